"""Tiles of integer codes for ARM: instructions for each product, modelled products a cycle, bytes, spills."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch
import tvm

from planish.backends.bundle import toolchain
from planish.backends.tvm.codegen import object_code
from planish.backends.tvm.integer_tile import UNIT, WIDTH, packed_numbers
from planish.backends.tvm.neon_products import LANES, products_of
from planish.backends.tvm.neon_tile import build_neon_tile, middle, packed_codes, packed_columns, stacked
from planish.bench.arm.emulator import Emulator
from planish.bench.arm.modelled import cycles_of
from planish.formats import Format, quantise
from planish.targets import ARM_LEVELS, ARM_PROCESSORS, Target

COLUMNS, DEPTH = 64, 1024
"""N and K of the layer that tiles are measured on."""


@dataclass(frozen=True)
class TileRow:
    """A tile of some rows, called for all columns of a layer.

    Attributes:
        name: its format, or what else it is.
        level: instructions that it may use.
        M: rows.
        group: input features that share a scale; 0 where all of a column do.
        instr_per_mac: executed instructions for each product.
        macs_per_cycle: products a cycle by LLVM's model of a processor, of the code that is tuned for it.
        bytes: of its code; of the longest one where a panel needs several.
        spills: loads and stores of vector registers on the stack in it.
        rel_err: distance of its results from exact ones, as a part of their length; None where it is not asked.
    """

    name: str
    level: str
    M: int
    group: int
    instr_per_mac: float
    macs_per_cycle: dict[str, float]
    bytes: int
    spills: int
    rel_err: float | None


def measure_tile(form: str, level: str, rows: int, cpus: Sequence[str], folder: Path) -> TileRow:
    """A tile's row; its code is built anew for each of the processors, the first of which gives the other figures.

    Raises:
        ToolchainError: a tool is missing, or the code failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weight = Format.parse(form).weight
    found = list[Built]()
    for cpu in cpus:
        target = Target.parse(ARM_LEVELS[level].target)
        fits = cpu in ARM_PROCESSORS and ARM_LEVELS[level] in ARM_PROCESSORS[cpu].levels
        target = target.tuned(cpu) if fits else target
        found.append(build_quantized(form, target, rows, cpu, folder))
    first = found[0]
    cycles = {cpu: round(built.macs_per_cycle, 2) for cpu, built in zip(cpus, found, strict=True)}
    return TileRow(
        form,
        level,
        rows,
        weight.group or 0,
        round(first.instructions / (rows * COLUMNS * DEPTH), 4),
        cycles,
        first.nbytes,
        first.spills,
        max(b.error for b in found),
    )


@dataclass(frozen=True)
class Built:
    """What is known of a tile's code, see ``TileRow``."""

    instructions: int
    macs_per_cycle: float
    nbytes: int
    spills: int
    error: float


def build_quantized(form: str, target: Target, rows: int, cpu: str, folder: Path) -> Built:
    """Build and run the tile of a format for some rows; its cycles are modelled on ``cpu``.

    Raises:
        ToolchainError: a tool is missing, or the code failed.
    """
    weight, products = Format.parse(form).weight, products_of(target)
    level, columns = ARM_LEVELS[target.isa], products.tiles[rows] * LANES
    symbol = f"planish_tile_{rows}"
    begins = {at: f"{symbol}_{at if stacked(weight) else 0}" for at in range(0, WIDTH, columns)}
    tiles = {
        name: build_neon_tile(name, weight, products, rows, columns, at // LANES, biased=False, long=False)
        for at, name in reversed(begins.items())
    }
    code = object_code({tvm.ir.GlobalVar(name): tile for name, tile in tiles.items()}, target)
    (folder / "tile.o").write_bytes(code.code)
    want = _write_data(form, products.columns, rows, folder)
    facts = {
        "tiles": [(name, at) for at, name in begins.items()],
        "grouped": bool(weight.group),
        "stacked": stacked(weight),
        "rows": rows,
        "n": COLUMNS,
        "width": WIDTH,
        "bytes_per_column": DEPTH * weight.bits // 8,
        "bytes_of_unit": UNIT * weight.bits // 8,
        "groups": weight.groups(DEPTH),
        "units": DEPTH // UNIT,
    }
    template = Path(__file__).with_name("tile.c.j2").read_text()
    (folder / "main.c").write_text(jinja2.Template(template, undefined=jinja2.StrictUndefined).render(facts))
    cc, tools = toolchain.compiler(level)
    toolchain.call([cc, "-O2", "-static", "main.c", "tile.o", "-o", "program"], folder)
    emulator, program = Emulator(folder, level), folder / "program"
    instructions = emulator.counts(program, symbol).total
    cycles = cycles_of(emulator, program, symbol, cpu)
    got = torch.from_numpy(np.fromfile(folder / "c.bin", np.float32)).view(rows, COLUMNS).double()
    listed = toolchain.call([f"{tools}nm", "-S", "tile.o"], folder)
    nbytes = max(int(size, 16) for size in re.findall(rf"^\S+ (\S+) [tT] {symbol}", listed, re.MULTILINE))
    error = ((got - want).norm() / want.norm()).item()
    return Built(instructions, rows * COLUMNS * DEPTH / cycles, nbytes, spills(code.assembly), error)


def spills(assembly: str) -> int:
    """Loads and stores of whole vector registers on the stack; the caller's are saved by halves, d8 to d15."""
    return len(re.findall(r"^\s*(?:(?:ldr|str|ldp|stp)\s+q.*\[sp|v(?:ld1|st1)\.64.*\[sp)", assembly, re.MULTILINE))


def _write_data(form: str, columns: int, rows: int, folder: Path) -> torch.Tensor:
    """Operands as files; returns the exact result, fp64 [rows, COLUMNS]."""
    weight = Format.parse(form).weight
    generator = torch.Generator().manual_seed(rows)
    a = torch.randint(-127, 128, (rows, DEPTH), dtype=torch.int8, generator=generator)
    scales_of_rows = torch.rand(rows, generator=generator) / 127
    held = quantise(torch.randn(COLUMNS, DEPTH, generator=generator), weight)
    channels = held.channels if held.channels is not None else held.scales
    in_turn = a.view(rows, -1, 16 // columns).transpose(0, 1)
    parts = {"a": in_turn, "b": packed_codes(held.codes, weight, columns), "rows": scales_of_rows}
    parts |= {"columns": packed_columns(channels, weight)}
    parts |= {"steps": packed_numbers(held.scales.short())} if weight.group else {}
    parts |= (
        {"sums": a.view(rows, -1, weight.group).sum(2, dtype=torch.int32) * -middle(weight)} if stacked(weight) else {}
    )
    for name, part in parts.items():
        part.contiguous().numpy().tofile(folder / f"{name}.bin")
    steps = held.scales.double().repeat_interleave(weight.group, 1)[:, :DEPTH] if weight.group else 1.0
    exact = (held.codes.double() - (1 << (weight.bits - 1))) * steps
    return a.double() @ exact.T * scales_of_rows.double()[:, None] * channels.double().view(-1)


PLAIN = """
#include <stdint.h>
int planish_plain(const int8_t *a, const uint8_t *b, const int16_t *steps, const float *columns,
                  const float *rows, float *c) {
  for (int n = 0; n < %(n)d; n++) {
    int total = 0;
    for (int group = 0; group < %(depth)d / 32; group++) {
      int sum = 0;
      for (int k = 0; k < 16; k++) {
        uint8_t byte = b[(n * %(depth)d + group * 32) / 2 + k];
        sum += a[group * 32 + k] * ((byte & 15) - 8) + a[group * 32 + 16 + k] * ((byte >> 4) - 8);
      }
      total += sum * steps[n * (%(depth)d / 32) + group];
    }
    c[n] = total * columns[n] * rows[0];
  }
  return 0;
}
int main(void) {
  static int8_t a[%(depth)d]; static uint8_t b[%(n)d * %(depth)d / 2]; static int16_t steps[%(n)d * %(depth)d / 32];
  static float columns[%(n)d], rows[1], c[%(n)d];
  return planish_plain(a, b, steps, columns, rows, c);
}
"""


def measure_plain(level: str, cpus: Sequence[str], folder: Path) -> TileRow:
    """The same layer in plain C, 4 bits in groups of 32, one row, as gcc -O3 compiles it for the first processor."""
    folder.mkdir(parents=True, exist_ok=True)
    found = ARM_LEVELS[level]
    (folder / "plain.c").write_text(PLAIN % {"n": COLUMNS, "depth": DEPTH})
    cc, tools = toolchain.compiler(found)
    flags = [*GCC[level], "-O3", "-fno-inline", "-static"]
    toolchain.call([cc, *flags, "plain.c", "-o", "plain"], folder)
    toolchain.call([cc, *flags, "-S", "plain.c", "-o", "plain.s"], folder)
    emulator, program = Emulator(folder, found), folder / "plain"
    count = emulator.counts(program, "planish_plain").total
    cycles = {cpu: round(COLUMNS * DEPTH / cycles_of(emulator, program, "planish_plain", cpu), 2) for cpu in cpus}
    sizes = toolchain.call([f"{tools}nm", "-S", program], folder)
    size = re.search(r"^\S+ (\S+) [tT] planish_plain$", sizes, re.MULTILINE)
    assert size is not None
    stack = spills((folder / "plain.s").read_text())
    return TileRow(
        "gcc -O3, plain C, w4a8-g32",
        level,
        1,
        32,
        round(count / (COLUMNS * DEPTH), 4),
        cycles,
        int(size[1], 16),
        stack,
        None,
    )


GCC = {
    "armv8": ("-march=armv8-a",),
    "armv8-dotprod": ("-march=armv8.2-a+dotprod",),
    "armv8-i8mm": ("-march=armv8.6-a+i8mm",),
    "armv7": ("-marm", "-march=armv7-a", "-mfpu=neon-vfpv4", "-mfloat-abi=hard"),
}
