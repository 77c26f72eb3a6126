"""The cost table of a processor for ARM: cycles of tiles by LLVM's model of it, at the clock and bandwidth assumed.

It says which format is how much faster than which; its milliseconds are no measurement.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import tvm

from planish.backends.bundle import toolchain
from planish.backends.tvm.codegen import object_code
from planish.backends.tvm.microkernel import build_tile, gemm_tile
from planish.backends.tvm.neon_products import products_of
from planish.bench.arm.emulator import Emulator
from planish.bench.arm.modelled import cycles_of
from planish.bench.arm.tiles import COLUMNS, DEPTH, build_quantized
from planish.costs import FP32, CostTable, LayerCost
from planish.formats import Format
from planish.passes.precision.sites import MENU
from planish.targets import ARM_LEVELS, GIGABYTES, GIGAHERTZ, Target

STANDS_IN = {
    "cortex-a7": "cortex-a57",
    "cortex-a15": "cortex-a57",
    "cortex-a17": "cortex-a57",
    "cortex-a32": "cortex-a53",
    "cortex-a75": "neoverse-n1",
    "cortex-a76": "neoverse-n1",
    "cortex-a77": "neoverse-n1",
    "cortex-a78": "neoverse-n1",
}
"""Processors that LLVM has no model of, or takes for much older ones, and whose model is used."""

MANY = 256
"""Rows at which a table ends: many times those of a tile."""

MARGIN = 1.05
"""Gain of a tile of fewer rows that is worth reading the weights more often, which the model takes to be free."""

N, K = 384, 1536
"""The one layer of the table: by the model all layers have the same throughput."""


def modelled_costs(target: Target, log: Callable[[str], None]) -> CostTable:
    """The table of an ARM target: the larger of the time of the products, on all cores, and of reading the weights.

    Args:
        target: for ARM.
        log: told the name of each phase.

    Raises:
        ToolchainError: a cross compiler, qemu or llvm-mca is missing.
    """
    layers = list[LayerCost]()
    cpu = STANDS_IN.get(target.mcpu, target.mcpu)
    for form in (FP32, *MENU):
        log(f"modelling {form} on {cpu}")
        found = _fp32(target, cpu) if form == FP32 else _quantized(form, target, cpu)
        nbytes = 4 * N * K if form == FP32 else Format.parse(form).weight.nbytes(N, K)
        reading = nbytes / GIGABYTES / 1e6
        best = max(rows for rows in found if MARGIN * found[rows] >= max(found.values()))
        found = {rows: macs for rows, macs in found.items() if rows <= best} | {MANY: found[best]}
        ms = [(m, max(reading, m * N * K / (macs * GIGAHERTZ * 1e6 * target.cores))) for m, macs in found.items()]
        layers.append(LayerCost(form, N, K, best, tuple((m, float(f"{each:.4g}")) for m, each in sorted(ms))))
    return CostTable(target.machine, tuple(sorted(layers)))


def _quantized(form: str, target: Target, cpu: str) -> dict[int, float]:
    """Rows of each tile to its products a cycle."""
    with tempfile.TemporaryDirectory(prefix="planish-arm-") as folder:
        tiles = sorted(products_of(target).tiles)
        return {rows: build_quantized(form, target, rows, cpu, Path(folder)).macs_per_cycle for rows in tiles}


MAIN = """
#include <stdlib.h>
#include <string.h>
int planish_tile(const float *a, const float *b, float *c, const float *ahead, int lda, int ldb, int ldc, int k);
int main(void) {
  float *a = aligned_alloc(64, %(rows)d * %(k)d * 4), *b = aligned_alloc(64, %(n)d * %(k)d * 4);
  float *c = aligned_alloc(64, %(rows)d * %(n)d * 4);
  memset(a, 0, %(rows)d * %(k)d * 4), memset(b, 0, %(n)d * %(k)d * 4);
  for (int n = 0; n < %(n)d; n += %(columns)d)
    planish_tile(a, b + n * %(k)d, c + n, b, %(k)d, %(columns)d, %(n)d, %(k)d);
  return 0;
}
"""


def _fp32(target: Target, cpu: str) -> dict[int, float]:
    """The same for tiles in fp32 of one row, and of as many as there are."""
    block, level, found = gemm_tile(target, COLUMNS), ARM_LEVELS[target.isa], dict[int, float]()
    for rows in (1, block.rows):
        kind = {"ragged": False, "biased": False, "cold": False}
        tile = build_tile("planish_tile", rows, block.vectors, target.lanes, **kind)
        code = object_code({tvm.ir.GlobalVar("planish_tile"): tile}, target)
        with tempfile.TemporaryDirectory(prefix="planish-arm-") as name:
            folder = Path(name)
            (folder / "tile.o").write_bytes(code.code)
            sizes = {"rows": rows, "k": DEPTH, "n": COLUMNS, "columns": block.vectors * target.lanes}
            (folder / "main.c").write_text(MAIN % sizes)
            cc, _ = toolchain.compiler(level)
            toolchain.call([cc, "-O2", "-static", "main.c", "tile.o", "-o", "program"], folder)
            cycles = cycles_of(Emulator(folder, level), folder / "program", "planish_tile", cpu)
        found[rows] = rows * COLUMNS * DEPTH / cycles
    return found
