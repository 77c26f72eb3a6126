"""Runs a bundle's own check under an emulator."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import msgspec

from planish.backends.bundle import toolchain
from planish.errors import InputError, ToolchainError
from planish.targets import ARM_LEVELS


class Manifest(msgspec.Struct):
    """What of a bundle's manifest.json its check needs."""

    prefix: str
    isa: str


@dataclass(frozen=True)
class Check:
    """How a bundle's check ended.

    Attributes:
        passed: whether all outputs are what the bundle says.
        off: of each output, the distance from that, as a part of its length; empty where the program stopped before.
        text: what it printed.
    """

    passed: bool
    off: dict[str, float]
    text: str


def check_bundle(folder: Path, cpu: str | None = None) -> Check:
    """Run the check of the bundle in a folder under qemu-user.

    Args:
        folder: as ``save`` has written it.
        cpu: processor as qemu names it; None for one that has the code's instructions and no more.

    Raises:
        InputError: the folder holds no bundle.
        ToolchainError: qemu is missing, or has no such processor.
    """
    manifest = read_manifest(folder)
    level = ARM_LEVELS[manifest.isa]
    program = folder / f"{manifest.prefix}_check"
    command = [*toolchain.emulator(level), "-cpu", cpu or toolchain.EMULATED[level.isa], f"./{program.name}"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=toolchain.SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(f"the check did not end in {toolchain.SECONDS} s", where=" ".join(command)) from error
    if "unable to find CPU model" in done.stderr:
        raise ToolchainError(f"qemu has no processor {cpu!r}", fix=f"see {command[0]} -cpu help")
    off = {name: float(value) for name, value in re.findall(r"^(\S+): off by (\S+) of", done.stdout, re.MULTILINE)}
    stopped = (
        f"stopped by signal {-done.returncode}: is {cpu} of level {manifest.isa}?\n" if done.returncode < 0 else ""
    )
    return Check(done.returncode == 0, off, done.stdout + done.stderr + stopped)


def read_manifest(folder: Path) -> Manifest:
    """Of the bundle in a folder.

    Raises:
        InputError: there is none.
    """
    path = folder / "manifest.json"
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise InputError(
            f"{folder} holds no bundle", why=str(error), fix="give a folder that save() has written"
        ) from error
    if manifest.isa not in ARM_LEVELS or not (folder / f"{manifest.prefix}_check").is_file():
        raise InputError(f"the bundle in {folder} cannot be checked", why=f"it is for {manifest.isa}, or has no check")
    return manifest
