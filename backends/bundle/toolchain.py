"""The cross compiler and the emulator of a target."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from planish.errors import ToolchainError
from planish.targets import ArmLevel

EMULATED = {"armv8": "cortex-a53", "armv8-dotprod": "cortex-a76", "armv8-i8mm": "max", "armv7": "cortex-a7"}
"""For each instruction-set level, a processor of qemu's that has no more; the highest has what qemu has."""

SECONDS = 300
"""After which a tool is stopped."""


def compiler(level: ArmLevel) -> tuple[str, str]:
    """Commands of a level's C compiler and of its binutils, without the tool's name: ``aarch64-linux-gnu-``.

    Raises:
        ToolchainError: there is none.
    """
    tools = prefix(level)
    if shutil.which(tools + "gcc") is None:
        raise ToolchainError(
            f"no C compiler for {level.isa}",
            where=f"looked for {tools}gcc",
            fix=f"apt-get install gcc-{tools[:-1]}",
        )
    return tools + "gcc", tools


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
