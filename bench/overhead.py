"""What a call costs beside its kernels: Python, checks, thread start; and what a torch op before it changes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from planish.bench.latency import interleave, speedup
from planish.models.base import Batch

Compile = Callable[..., Any]


class TwoOps(torch.nn.Module):
    """The smallest model worth compiling: its kernels take well under a microsecond."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``gelu(x) + x``, any shape."""
        return torch.nn.functional.gelu(x) + x


def call_overhead(compile_model: Compile, calls: int = 500, chunks: int = 20) -> dict[str, float]:
    """Microseconds per call of a two-op model on 64 values: ``call_us`` compiled, ``call_us_eager`` in PyTorch.

    The median over ``chunks`` loops of ``calls`` calls each.
    """
    model, x = TwoOps().eval(), torch.linspace(-3, 3, 64).reshape(1, 64)
    compiled = compile_model(model, (x,))
    return {"call_us": _per_call_us(compiled, x, calls, chunks), "call_us_eager": _per_call_us(model, x, calls, chunks)}


def _per_call_us(call: Callable[..., Any], x: torch.Tensor, calls: int, chunks: int) -> float:
    def loop() -> None:
        for _ in range(calls):
            call(x)

    loop()
    times: list[float] = []
    for _ in range(chunks):
        start = time.perf_counter_ns()
        loop()
        times.append((time.perf_counter_ns() - start) / 1e3 / calls)
    return statistics.median(times)


def after_torch_op(call: Callable[..., Any], batch: Batch, rounds: int = 40) -> dict[str, Any]:
    """How much longer a call takes straight after a parallel torch op than straight after itself.

    torch's worker threads still spin after an op: a second thread pool would fight them for the cores.

    Returns:
        ``ms_alone``, ``ms_after_torch_op`` (medians), ``after_torch_op_ratio`` (1 is no difference) and its 95 %
        interval ``after_torch_op_ci95``.
    """
    a = torch.ones(512, 512)
    before: dict[str, Callable[[], object]] = {"alone": lambda: call(**batch), "after": lambda: a @ a}
    times: dict[str, list[float]] = {"alone": [], "after": []}

    def timed(name: str) -> Callable[[], None]:
        def run() -> None:
            before[name]()
            start = time.perf_counter_ns()
            call(**batch)
            times[name].append((time.perf_counter_ns() - start) / 1e6)

        return run

    interleave({name: timed(name) for name in before}, rounds)
    alone, after = times["alone"][1:], times["after"][1:]  # the first of each was the warm-up
    ratio = speedup(after, alone)
    return {
        "ms_alone": statistics.median(alone),
        "ms_after_torch_op": statistics.median(after),
        "after_torch_op_ratio": ratio.value,
        "after_torch_op_ci95": [ratio.low, ratio.high],
    }
