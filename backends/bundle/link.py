"""Links a bundle: the library, shared and static, and the program that checks it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from planish.backends.bundle import toolchain
from planish.targets import ArmLevel

_FLAGS = ("-Os", "-fPIC", "-ffunction-sections", "-fdata-sections", "-pthread")
_SHARED = ("-shared", "-Wl,-z,max-page-size=4096", "-Wl,-z,noseparate-code", "-Wl,--gc-sections", "-s", "-pthread")

VARIANTS = {"": (), "_single": ("SINGLE_THREAD",)}
"""Ends of the libraries' names to what is defined for them, behind the prefix."""

EXPORTS = ("arena_bytes", "init", "run", "set_threads", "error")


def link(folder: Path, prefix: str, level: ArmLevel, codes: Sequence[bytes]) -> None:
    """``libPREFIX.a`` and ``libPREFIX.so``, which export names that begin with the prefix, and PREFIX_check.

    Each library also without threads, as ``libPREFIX_single``.
    """
    cc, tools = toolchain.compiler(level)
    objects: list[str] = []
    for i, code in enumerate(codes):
        (folder / f"code{i}.o").write_bytes(code)
        objects.append(f"code{i}.o")
    keep, shim = folder / "exports", "shim.o"
    keep.write_text("".join(f"{prefix}_{n}\n" for n in EXPORTS))
    for end, words in VARIANTS.items():
        whole, defined = f"{prefix}{end}.o", [f"-D{prefix.upper()}_{word}" for word in words]
        toolchain.call([cc, *_FLAGS, *defined, "-c", f"{prefix}.c", "-o", shim], folder)
        toolchain.call([f"{tools}ld", "-r", "-o", whole, shim, *objects], folder)
        toolchain.call([f"{tools}objcopy", f"--keep-global-symbols={keep.name}", whole], folder)
        (folder / f"lib{prefix}{end}.a").unlink(missing_ok=True)
        toolchain.call([f"{tools}ar", "rcsD", f"lib{prefix}{end}.a", whole], folder)
        toolchain.call([cc, *_SHARED, "-o", f"lib{prefix}{end}.so", whole, "-lm"], folder)
        (folder / whole).unlink()
    check = f"{prefix}_check"
    toolchain.call([cc, "-O2", "-o", check, f"{check}.c", f"lib{prefix}.a", "-lm", "-pthread"], folder)
    for name in (shim, keep.name, *objects):
        (folder / name).unlink()
