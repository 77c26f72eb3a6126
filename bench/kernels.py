"""Speed of each kernel of a compiled model, timed alone, as a share of the machine's limit."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from planish.bench.result import KernelRow
from planish.models.base import Batch
from planish.program import Dim

PASSES = 5
"""Times all kernels are timed in turn. A shared machine can be slow for a quarter of a second on end, which would
decide the whole row of a kernel timed in one go; its row is the median pass."""


def kernel_rows(compiled: Any, batches: Sequence[Batch], repeats: int = 20) -> list[KernelRow]:
    """Table of kernels for each of the given inputs, slowest in total first.

    Args:
        compiled: a compiled model; its ``kernels(inputs, repeats=...)`` gives milliseconds and FLOPs of one call.
        batches: inputs; the same kernels appear once for each.
        repeats: timed calls of each kernel in a pass.
    """
    passes = [[compiled.kernels(batch, repeats=repeats) for batch in batches] for _ in range(PASSES)]
    rows: list[KernelRow] = []
    for batch, timed in zip(batches, zip(*passes, strict=True), strict=True):
        size = list(next(iter(batch.values())).shape)
        kernels = [(same[0], statistics.median(k.ms for k in same)) for same in zip(*timed, strict=True)]
        for k, ms in sorted(kernels, key=lambda row: -row[1] * row[0].calls):
            rows.append(KernelRow(k.name, k.op, list(k.shape), k.calls, size, ms, _gflops(k.flops, ms), None))
    return rows


def _gflops(flops: float, ms: float) -> float:
    return flops / ms / 1e6 if flops else 0.0


def with_shares(rows: Sequence[KernelRow], fma_gflops: float) -> list[KernelRow]:
    """The rows with their share of the peak that was measured around them; None where nothing is computed."""
    return [replace(r, share_of_limit=r.gflops / fma_gflops if r.gflops else None) for r in rows]


GEMM_ROWS = (64, 1001, 4096)
"""Row counts at which each GEMM shape is timed: one small batch, one that no tile size divides, a full batch."""


def gemm_rows(compile_model: Callable[..., Any], model: torch.nn.Module, repeats: int = 40) -> list[KernelRow]:
    """Each distinct linear layer of the model alone, without what the passes fuse with it, at ``GEMM_ROWS`` rows.

    Args:
        compile_model: ``planish.compile``.
        model: its ``nn.Linear`` layers give N and K.
        repeats: timed calls of each shape in a pass.
    """
    counts = Counter((m.out_features, m.in_features) for m in model.modules() if isinstance(m, torch.nn.Linear))
    layers: dict[tuple[int, int], Any] = {}
    for n, k in sorted(counts):
        inputs = {"input": torch.randn(GEMM_ROWS[0], k, generator=torch.Generator().manual_seed(0))}
        dims = {"input": {0: Dim("rows", 1, max(GEMM_ROWS))}}
        layers[n, k] = compile_model(torch.nn.Linear(k, n).eval(), inputs, dynamic=dims)
    samples: dict[tuple[int, int, int], list[Any]] = {(m, n, k): [] for n, k in layers for m in GEMM_ROWS}
    for _ in range(PASSES):
        for (m, n, k), timed in samples.items():
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
            timed += layers[n, k].kernels({"input": x}, repeats=repeats)
    rows: list[KernelRow] = []
    for (m, n, k), timed in samples.items():
        ms = statistics.median(time.ms for time in timed)
        rows.append(KernelRow("linear", "gemm", [m, n, k], counts[n, k], [m, k], ms, _gflops(timed[0].flops, ms), None))
    return rows
