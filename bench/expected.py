"""What removing padding can gain at most: from the lengths, and from what attention costs beside the linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planish.bench.result import KernelRow
from planish.errors import NumericError


def kappa(kernels: Sequence[KernelRow]) -> float:
    """(attention ms per FLOP) / (GEMM ms per FLOP) over all calls of a model: 1 where both run at the same speed.

    Raises:
        NumericError: the model has no attention or no GEMM, or one of them took no time that could be measured.
    """
    attention, gemm = (_ms_per_flop(kernels, op) for op in ("attention", "gemm"))
    return attention / gemm


def _ms_per_flop(kernels: Sequence[KernelRow], op: str) -> float:
    rows = [k for k in kernels if k.op == op]
    ms = sum(k.ms * k.calls for k in rows)
    flops = sum(k.gflops * k.ms * 1e6 * k.calls for k in rows)
    if not (ms > 0 and flops > 0):
        raise NumericError(f"no time per FLOP of {op!r}", why="no kernel of it took a time that could be measured")
    return ms / flops


@dataclass(frozen=True)
class Expected:
    """The speed-up over the padded build if time followed the FLOPs of valid tokens only.

    A layer of width H with an inner layer of 4 H costs 24 H² FLOPs of GEMM for a token and 4 H S of attention, so with
    a = kappa S / (6 H) a padded row costs S (1 + a) and a packed one of l tokens l + a l² / S.

    Attributes:
        kappa: see :func:`kappa`.
        f1: mean(l) / S; over batches of different S the same as sum(l) / sum(S).
        f2: mean(l²) / S²; sum(l²) / sum(S²).
        a: attention's time over the GEMMs' of a padded row; S is sum(S²) / sum(S).
        speedup: (1 + a) / (f1 + a f2).
    """

    kappa: float
    f1: float
    f2: float
    a: float
    speedup: float


def expect(lengths: Sequence[int], padded: Sequence[int], hidden: int, ratio: float) -> Expected:
    """The formula on actual lengths.

    Args:
        lengths: valid tokens of each row.
        padded: length that row was padded to.
        hidden: width of the model.
        ratio: attention's time per FLOP over the GEMMs', see :func:`kappa`.
    """
    total, squares = sum(padded), sum(s * s for s in padded)
    f1, f2 = sum(lengths) / total, sum(n * n for n in lengths) / squares
    a = ratio * (squares / total) / (6 * hidden)
    return Expected(ratio, f1, f2, a, (1 + a) / (f1 + a * f2))
