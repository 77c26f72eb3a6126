"""Links a bundle: the library, shared and static, and the program that checks it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from planish.backends.bundle import toolchain
from planish.backends.bundle.elf import localised
from planish.targets import ArmLevel

_FLAGS = ("-Os", "-fPIC", "-ffunction-sections", "-fdata-sections", "-pthread")
_SHARED = ("-Wl,-z,max-page-size=4096", "-Wl,--gc-sections", "-s", "-pthread")

VARIANTS = {"": (), "_single": ("SINGLE_THREAD",)}
"""Ends of the libraries' names to what is defined for them, behind the prefix."""

EXPORTS = ("arena_bytes", "init", "run", "set_threads", "error")


def link(folder: Path, prefix: str, level: ArmLevel, codes: Sequence[bytes]) -> None:
    """``libPREFIX.a`` and ``libPREFIX.so``, which export names that begin with the prefix, and PREFIX_check.

    Each library also without threads, as ``libPREFIX_single``.
    """
    tools = toolchain.tools(level)
    objects: list[str] = []
    for i, code in enumerate(codes):
        (folder / f"code{i}.o").write_bytes(code)
        objects.append(f"code{i}.o")
    shim, exported = "shim.o", {f"{prefix}_{name}" for name in EXPORTS}
    for end, words in VARIANTS.items():
        whole, defined = folder / f"{prefix}{end}.o", [f"-D{prefix.upper()}_{word}" for word in words]
        toolchain.call([*tools.cc, *_FLAGS, *defined, "-c", f"{prefix}.c", "-o", shim], folder)
        toolchain.call([*tools.cc, "-r", "-nostdlib", "-o", whole.name, shim, *objects], folder)
        whole.write_bytes(localised(whole.read_bytes(), exported))
        (folder / f"lib{prefix}{end}.a").unlink(missing_ok=True)
        toolchain.call([*tools.ar, "rcsD", f"lib{prefix}{end}.a", whole.name], folder)
        toolchain.call([*tools.shared, *_SHARED, "-o", f"lib{prefix}{end}.so", whole.name, "-lm"], folder)
        whole.unlink()
    check = f"{prefix}_check"
    toolchain.call([*tools.cc, "-O2", "-o", check, f"{check}.c", f"lib{prefix}.a", "-lm", "-pthread"], folder)
    for name in (shim, *objects):
        (folder / name).unlink()
