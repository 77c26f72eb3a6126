"""Cycles of executed code by LLVM's models of processors (llvm-mca): data in the first cache, no branch missed.

They rank kernels. They are not times: nothing here runs on ARM.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from planish.backends.bundle import toolchain
from planish.bench.arm.emulator import Emulator
from planish.errors import ToolchainError

WINDOW = 6000
"""Executed instructions that are modelled, at most half of all: from ``START`` of them on, as they were executed."""

START = 0.4

_TOOLS = ("llvm-mca-19", "llvm-mca-20", "llvm-mca-18", "llvm-mca")
_FEATURES = {"aarch64": "+dotprod,+i8mm,+bf16,+fullfp16", "arm": "+neon,+vfp4"}
_BRANCH = re.compile(
    r"\b(b\.\w+|b|bl|cbnz|cbz|tbz|tbnz|bne|beq|bgt|bge|blt|ble|bcc|bcs|bhi|bls|bmi|bpl)(\.\w)?\s+(.*?,\s*)?[0-9a-f]+\s*$"
)


def cycles_of(emulator: Emulator, program: Path, symbol: str, cpu: str) -> float:
    """Cycles that all executed instructions of ``symbol`` take on a processor, by those in the window.

    Raises:
        ToolchainError: llvm-mca is missing or cannot read the code.
    """
    total = emulator.counts(program, symbol).total
    length = min(WINDOW, total // 2)
    code = emulator.instructions(program)
    lines = [_operand_free(code.get(at, "nop")) for at in emulator.window(program, symbol, int(total * START), length)]
    listing = emulator.folder / "window.s"
    listing.write_text(".Lx:\n" + "\n".join(lines) + "\n")
    triple = emulator.level.triple
    options = [f"-mtriple={triple}", f"-mcpu={cpu}", f"-mattr={_FEATURES[emulator.level.arch]}"]
    text = toolchain.call([_tool(), *options, "-iterations=1", "-noalias", listing], emulator.folder)
    cycles = re.search(r"Total Cycles:\s+(\d+)", text)
    assert cycles is not None
    return int(cycles[1]) * total / length


def _operand_free(line: str) -> str:
    """An instruction as an assembler reads it: jumps go to one label."""
    line = re.sub(r"<.*?>", "", line)
    return _BRANCH.sub(lambda m: f"{m[1]}{m[2] or ''} {m[3] or ''}.Lx", line)


def _tool() -> str:
    for name in _TOOLS:
        if shutil.which(name):
            return name
    raise ToolchainError("no llvm-mca", where=f"looked for {', '.join(_TOOLS)}", fix="apt-get install llvm-19")
