"""Speed of each kernel of a compiled model, timed alone, as a share of the machine's limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from planish.bench.result import KernelRow
from planish.models.base import Batch
from planish.program import Dim


def kernel_rows(compiled: Any, batches: Sequence[Batch], repeats: int = 20) -> list[KernelRow]:
    """Table of kernels for each of the given inputs, slowest in total first.

    Args:
        compiled: a compiled model; its ``kernels(inputs, repeats=...)`` gives milliseconds and FLOPs of one call.
        batches: inputs; the same kernels appear once for each.
        repeats: timed calls of each kernel.
    """
    rows: list[KernelRow] = []
    for batch in batches:
        size = list(next(iter(batch.values())).shape)
        times = sorted(compiled.kernels(batch, repeats=repeats), key=lambda k: -k.ms * k.calls)
        for k in times:
            gflops = k.flops / k.ms / 1e6 if k.flops else 0.0
            rows.append(KernelRow(k.name, k.op, list(k.shape), k.calls, size, k.ms, gflops, None))
    return rows


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
        repeats: timed calls.
    """
    layers = Counter((m.out_features, m.in_features) for m in model.modules() if isinstance(m, torch.nn.Linear))
    rows: list[KernelRow] = []
    for (n, k), calls in sorted(layers.items()):
        inputs = {"input": torch.randn(GEMM_ROWS[0], k, generator=torch.Generator().manual_seed(0))}
        dims = {"input": {0: Dim("rows", 1, max(GEMM_ROWS))}}
        compiled = compile_model(torch.nn.Linear(k, n).eval(), inputs, dynamic=dims)
        for m in GEMM_ROWS:
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
            (time,) = compiled.kernels({"input": x}, repeats=repeats)
            gflops = time.flops / time.ms / 1e6
            rows.append(KernelRow("linear", "gemm", [m, n, k], calls, [m, k], time.ms, gflops, None))
    return rows
