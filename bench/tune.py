"""Measures linear layers on this machine in every format and blocking: the cost table of `planish doctor --tune`."""

from __future__ import annotations

import statistics
from collections import ChainMap
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from planish.backends.tvm.executable import TICK
from planish.backends.tvm.integer_tile import TILE_ROWS, tile_rows
from planish.backends.tvm.microkernel import gemm_tile
from planish.bench.qgemm import Layer
from planish.costs import FP32, CostTable, LayerCost
from planish.errors import CostTableError
from planish.formats import Format, quantise
from planish.passes.precision.sites import MENU
from planish.passes.precision.tasks import run_all
from planish.program import Dim
from planish.targets import Target

FORMATS = (FP32, *MENU)


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        rows: numbers of rows M; some are more than 1.
        shapes: pairs of N and K.
        formats: of the layers.
        rounds: times everything is timed in turn; the median counts.
    """

    rows: tuple[int, ...] = (1, 64, 256)
    shapes: tuple[tuple[int, int], ...] = ((384, 384), (1536, 384), (384, 1536), (3072, 768), (768, 3072))
    formats: tuple[str, ...] = FORMATS
    rounds: int = 3


GRID = Grid()
"""Widths of small and base transformers. It takes a few minutes."""

MARGIN = 1.03
"""Gain that is no noise."""

REPEATS = 7
"""Timed calls of a kernel in a round at least, of which the median counts; short ones are called for milliseconds."""


class Layers(torch.nn.Module):
    """Layers that have nothing to do with each other: compiled together, as they share their tiles' code."""

    def __init__(self, layers: list[torch.nn.Module]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each of its own input [M, K]."""
        return tuple(layer(x) for layer, x in zip(self.layers, xs, strict=True))


def run(
    grid: Grid,
    target: Target,
    compile_model: Callable[..., Any],
    log: Callable[[str], None],
    executor: Executor | None = None,
) -> CostTable:
    """Measure the grid on as many threads as the target has cores.

    All layers are timed in turn, the blockings of a format right after each other: a shared machine is slow in bursts.

    Args:
        grid: what to measure.
        target: this machine.
        compile_model: ``planish.compile``.
        log: told the name of each phase.
        executor: of machines like this one, which measure a format each, one at a time; None for here.

    Raises:
        CostTableError: the machine is too busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(target.cores)
    try:
        if executor is None:
            samples = _samples(grid, target, compile_model, log)
        else:
            tasks = [(replace(grid, formats=(form,)), target, compile_model, _unheard) for form in grid.formats]
            samples = dict(ChainMap(*run_all("measuring", _samples, tasks, executor)))
    finally:
        torch.set_num_threads(threads)
    layers: list[LayerCost] = []
    for form, (n, k) in product(grid.formats, grid.shapes):
        best = _best(form, n, k, grid, samples)
        ms = tuple((m, _ms(samples[form, n, k, best, m])) for m in sorted(grid.rows))
        layers.append(LayerCost(form, n, k, best or gemm_tile(target, n).rows, ms))
    return CostTable(target.machine, tuple(sorted(layers)))


Key = tuple[str, int, int, int | None, int]
"""Format, N, K, tile rows, M."""


def _blockings(form: str) -> tuple[int | None, ...]:
    """Tile rows to choose from, first what counts without a table; None where the kernel chooses by itself."""
    if form == FP32:
        return (None,)
    usual = tile_rows(Format.parse(form).weight)
    return (usual, *(rows for rows in TILE_ROWS if rows != usual))


def _best(form: str, n: int, k: int, grid: Grid, samples: dict[Key, list[float]]) -> int | None:
    """The blocking that gains most over the usual one, or that one where none gains more than ``MARGIN``.

    A gain is the median ratio of times that were taken one after the other, where there is more than one row: at one
    row all blockings are the same.
    """
    usual, *others = _blockings(form)

    def gain(rows: int | None) -> float:
        keys = [((form, n, k, usual, m), (form, n, k, rows, m)) for m in grid.rows if m > 1]
        return statistics.median(a / b for x, y in keys for a, b in zip(samples[x], samples[y], strict=True))

    best = max(others, key=gain, default=usual)
    return best if gain(best) > MARGIN else usual


def _unheard(phase: str) -> None:
    """What other machines are told to log with."""


@torch.inference_mode()
def _samples(
    grid: Grid, target: Target, compile_model: Callable[..., Any], log: Callable[[str], None]
) -> dict[Key, list[float]]:
    """Milliseconds of everything in every round."""
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(max(grid.rows), k, generator=generator) for _, k in grid.shapes)
    calls: dict[str, dict[int | None, Any]] = {}
    for form in grid.formats:
        log(f"compiling layers in {form}")
        model, dims = _model(form, grid, generator), _dims(grid)
        calls[form] = {
            rows: compile_model(model, inputs, _asking(target, form, grid, rows), dynamic=dims, cache=False)
            for rows in _blockings(form)
        }
    samples: dict[Key, list[float]] = {}
    for number in range(grid.rounds):
        log(f"measuring, round {number + 1} of {grid.rounds}")
        for form, m in product(grid.formats, grid.rows):
            for rows, call in calls[form].items():
                for time in call.kernels(tuple(x[:m] for x in inputs), repeats=REPEATS):
                    _, n, k = time.shape
                    samples.setdefault((form, n, k, rows, m), []).append(time.ms)
    return samples


def _model(form: str, grid: Grid, generator: torch.Generator) -> torch.nn.Module:
    """A layer of every shape."""
    layers: list[torch.nn.Module] = []
    for n, k in grid.shapes:
        weight = torch.randn(n, k, generator=generator) / k**0.5
        if form == FP32:
            exact = torch.nn.Linear(k, n, bias=False).requires_grad_(False)
            exact.weight.copy_(weight)
            layers.append(exact)
        else:
            layers.append(Layer(quantise(weight, Format.parse(form).weight), form))
    return Layers(layers).eval()


def _dims(grid: Grid) -> dict[str, dict[int, Dim]]:
    return {f"xs.{i}": {0: Dim("rows", 1, max(grid.rows))} for i in range(len(grid.shapes))}


def _asking(target: Target, form: str, grid: Grid, rows: int | None) -> Target:
    """The target with a table that asks for a blocking: nobody reads the time in it."""
    layers = (LayerCost(form, n, k, rows, ((1, 1.0),)) for n, k in sorted(grid.shapes) if rows is not None)
    return replace(target, format="", costs=CostTable(target.machine, tuple(layers)))


def _ms(samples: list[float]) -> float:
    """The median, in as many digits as are not noise."""
    ms = statistics.median(samples)
    if ms <= 1e3 * TICK:
        raise CostTableError(
            "a kernel took no longer than calls that run none",
            why="the machine was busy with something else",
            fix="run it again when the machine is idle",
        )
    return float(f"{ms:.4g}")


def as_rows(table: CostTable) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the table for people: a layer's tile rows, and its GFLOP/s at each M."""
    sizes = sorted({m for layer in table.layers for m, _ in layer.ms})
    columns = ["format", "N x K", "tile rows", *(f"GFLOP/s at {m}" for m in sizes)]
    cells = [
        [
            layer.format,
            f"{layer.n} x {layer.k}",
            str(layer.tile_rows),
            *(f"{2e-6 * m * layer.n * layer.k / layer.at(m):.0f}" for m in sizes),
        ]
        for layer in table.layers
    ]
    return columns, cells
