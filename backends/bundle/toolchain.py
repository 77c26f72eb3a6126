"""The cross compiler and the emulator of a target."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from planish.errors import ToolchainError
from planish.targets import Target

_SECONDS = 300


def compiler(target: Target) -> tuple[str, str]:
    """Commands of the target's C compiler and of its binutils, without the tool's name: ``aarch64-linux-gnu-``.

    Raises:
        ToolchainError: there is none.
    """
    prefix = target.triple.replace("armv7a", "arm") + "-"
    if shutil.which(prefix + "gcc") is None:
        raise ToolchainError(
            f"no C compiler for {target.name}",
            where=f"looked for {prefix}gcc",
            fix=f"apt-get install gcc-{prefix[:-1]}",
        )
    return prefix + "gcc", prefix


def emulator(target: Target) -> list[str]:
    """Command that runs the target's programs here, with its C library.

    Raises:
        ToolchainError: there is none.
    """
    name = "qemu-aarch64" if target.arch == "aarch64" else "qemu-arm"
    if shutil.which(name) is None:
        raise ToolchainError(
            f"no emulator for {target.name}", where=f"looked for {name}", fix="apt-get install qemu-user"
        )
    root = Path("/usr") / target.triple.replace("armv7a", "arm")
    return [name, "-L", str(root)]


def call(command: Sequence[str | Path], folder: Path) -> str:
    """Run a tool in a folder; returns what it printed.

    Raises:
        ToolchainError: it failed; with its command and message.
    """
    words = [str(w) for w in command]
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(f"{words[0]} did not end in {_SECONDS} s", where=" ".join(words)) from error
    if done.returncode:
        raise ToolchainError(
            f"{words[0]} failed with {done.returncode}", where=" ".join(words), why=done.stderr.strip()
        )
    return done.stdout
