"""Speed of each kernel of a compiled model, timed alone, as a share of the machine's limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planish.bench.result import KernelRow
from planish.models.base import Batch


def kernel_rows(compiled: Any, batches: Sequence[Batch], fma_gflops: float, repeats: int = 20) -> list[KernelRow]:
    """Table of kernels for each of the given inputs, slowest in total first.

    Args:
        compiled: a compiled model; its ``kernels(inputs, repeats=...)`` gives milliseconds and FLOPs of one call.
        batches: inputs; the same kernels appear once for each.
        fma_gflops: the measured peak.
        repeats: timed calls of each kernel.
    """
    rows: list[KernelRow] = []
    for batch in batches:
        size = list(next(iter(batch.values())).shape)
        times = sorted(compiled.kernels(batch, repeats=repeats), key=lambda k: -k.ms * k.calls)
        for k in times:
            gflops = k.flops / k.ms / 1e6 if k.flops else 0.0
            share = gflops / fma_gflops if k.flops else None
            rows.append(KernelRow(k.name, k.op, list(k.shape), k.calls, size, k.ms, gflops, share))
    return rows
