"""The cross compiler and the emulator of a target."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from planish.errors import ToolchainError
from planish.targets import ArmLevel

EMULATED = {"armv8": "cortex-a53", "armv8-dotprod": "cortex-a76", "armv8-i8mm": "max", "armv7": "cortex-a7"}
"""For each instruction-set level, a processor of qemu's that has no more; the highest has what qemu has."""

SECONDS = 300
"""After which a tool is stopped."""


@dataclass(frozen=True)
class Tools:
    """Commands that link bundles.

    Attributes:
        cc: C compiler and linker.
        shared: the same, that makes a shared library whose code is on pages with other data.
        ar: archiver.
    """

    cc: tuple[str, ...]
    shared: tuple[str, ...]
    ar: tuple[str, ...]


def tools(level: ArmLevel) -> Tools:
    """The cross compiler of Debian for a level, or else zig, of the ``arm`` extra.

    At its first use zig builds its runtime libraries, for a minute or two.

    Raises:
        ToolchainError: there is neither.
    """
    name = prefix(level)
    if shutil.which(name + "gcc"):
        cc = (name + "gcc",)
        return Tools(cc, (*cc, "-shared", "-Wl,-z,noseparate-code"), (name + "ar",))
    if importlib.util.find_spec("ziglang"):
        zig = (sys.executable, "-m", "ziglang")
        system = "aarch64-linux-gnu" if level.arch == "aarch64" else "arm-linux-gnueabihf"
        cc = (*zig, "cc", "-target", system, *(() if level.arch == "aarch64" else ("-mcpu=cortex_a7",)))
        return Tools(cc, (*cc, "-shared"), (*zig, "ar"))
    raise ToolchainError(
        f"no C compiler for {level.isa}",
        where=f"looked for {name}gcc and for zig",
        fix=f"apt-get install gcc-{name[:-1]}, or pip install 'planish[arm]'",
    )


def compiler(level: ArmLevel) -> tuple[str, str]:
    """gcc's command for a level, and the beginning of its binutils' names: ``aarch64-linux-gnu-``.

    Raises:
        ToolchainError: there is none.
    """
    name = prefix(level)
    if shutil.which(name + "gcc") is None:
        raise ToolchainError(
            f"no C compiler for {level.isa}", where=f"looked for {name}gcc", fix=f"apt-get install gcc-{name[:-1]}"
        )
    return name + "gcc", name


def prefix(level: ArmLevel) -> str:
    """What the names of a level's tools begin with: ``aarch64-linux-gnu-``."""
    return level.triple.replace("armv7a", "arm") + "-"


def emulator(level: ArmLevel) -> list[str]:
    """Command that runs a level's programs here, with its C library.

    Raises:
        ToolchainError: there is none.
    """
    name = "qemu-aarch64" if level.arch == "aarch64" else "qemu-arm"
    if shutil.which(name) is None:
        raise ToolchainError(
            f"no emulator for {level.isa}", where=f"looked for {name}", fix="apt-get install qemu-user"
        )
    root = Path("/usr") / prefix(level)[:-1]
    if not root.is_dir():
        package = "libc6-dev-arm64-cross" if level.arch == "aarch64" else "libc6-dev-armhf-cross"
        raise ToolchainError(f"no C library of {level.isa} here", where=str(root), fix=f"apt-get install {package}")
    return [name, "-L", str(root)]


def call(command: Sequence[str | Path], folder: Path) -> str:
    """Run a tool in a folder; returns what it printed.

    Raises:
        ToolchainError: it failed; with its command and message.
    """
    words = [str(w) for w in command]
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(f"{words[0]} did not end in {SECONDS} s", where=" ".join(words)) from error
    if done.returncode:
        raise ToolchainError(
            f"{words[0]} failed with {done.returncode}", where=" ".join(words), why=done.stderr.strip()
        )
    return done.stdout
