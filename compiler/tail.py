"""Decompositions of ops that few models call, into what the graph keeps whole (see ``decompose.table``)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from planish.ops import aten

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What products have kernels for; half precisions are widened."""


def _bmm(a: Tensor, b: Tensor) -> Any:
    """Integer (and fp64) products, which are rare and small, are sums of products.

    before: ``bmm(a, b)`` of int64
    after:  ``sum(a[:, :, None, :] * transpose(b, 1, 2)[:, None], -1)``
    """
    if a.dtype in KERNEL_DTYPES:
        return NotImplemented
    return (a.unsqueeze(2) * b.transpose(1, 2).unsqueeze(1)).sum(-1).to(a.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """As ``bmm``."""
    if x.dtype in KERNEL_DTYPES:
        return NotImplemented
    product = (x.unsqueeze(-2) * weight).sum(-1).to(x.dtype)
    return product if bias is None else product + bias


def _addbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """The sum of a batch of products, as one product: the batch becomes part of the inner axis."""
    flat = a.permute(1, 0, 2).reshape(a.shape[1], -1)
    return torch.addmm(bias, flat, b.reshape(-1, b.shape[2]), beta=beta, alpha=alpha)


def _distances(a: Tensor, b: Tensor, p: float, compute_mode: int | None = None) -> Tensor:
    """``cdist``: the p-norm of the difference of every row of ``a`` and every row of ``b``."""
    difference = (a.unsqueeze(-2) - b.unsqueeze(-3)).abs()
    if p == 0:
        return (difference != 0).sum(-1).to(a.dtype)
    if math.isinf(p):
        return difference.amax(-1)
    return (difference**p).sum(-1) ** (1 / p)


def _running(*, largest: bool) -> Any:
    def decompose(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """``cummax``: the running extremum's positions and a gather of their values."""
        if not x.dim():
            return x.clone(), torch.zeros((), dtype=torch.int64)
        moved = x.transpose(dim, -1)
        at = torch.ops.planish.argcummax(moved.to(torch.uint8) if x.dtype is torch.bool else moved, largest)
        return moved.gather(-1, at).transpose(dim, -1), at.transpose(dim, -1)

    return decompose


def _kth_value(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The k-th (from 1) smallest along an axis: an element of the sorted rows."""
    if not x.dim():
        return x.clone(), torch.zeros((), dtype=torch.int64)
    values, order = x.sort(dim=dim, stable=True)
    pair = values.select(dim, k - 1), order.select(dim, k - 1)
    return (pair[0].unsqueeze(dim), pair[1].unsqueeze(dim)) if keepdim else pair


def _median(x: Tensor) -> Tensor:
    return torch.median(x.reshape(-1), 0)[0]


def _median_along(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower median, or the first NaN if there is one: sorted rows end with their NaNs."""
    if not x.dim():
        return x.clone(), torch.zeros((), dtype=torch.int64)
    values, order = x.sort(dim=dim, stable=True)
    size = x.shape[dim]
    at = torch.full_like(order.select(dim, 0).unsqueeze(dim), (size - 1) // 2)
    if x.is_floating_point():
        odd = x.isnan().sum(dim, keepdim=True)
        at = torch.where(odd > 0, size - odd, at)
    return _picked(values, order, at, dim, keepdim=keepdim)


def _median_of_numbers(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """``nanmedian``: the lower median of what is not NaN."""
    if not x.is_floating_point() or not x.dim():
        return _median_along(x, dim, keepdim)
    values, order = x.sort(dim=dim, stable=True)
    count = (~x.isnan()).sum(dim, keepdim=True)
    return _picked(values, order, (count - 1).clamp_min(0) // 2, dim, keepdim=keepdim)


def _picked(values: Tensor, order: Tensor, at: Tensor, dim: int, *, keepdim: bool) -> tuple[Tensor, Tensor]:
    pair = values.gather(dim, at), order.gather(dim, at)
    return pair if keepdim else (pair[0].squeeze(dim), pair[1].squeeze(dim))


def _search(
    sequence: Tensor,
    values: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """``searchsorted``: how many elements of the sorted rows come before each value."""
    rows = sequence if sorter is None else sequence.gather(-1, sorter)
    rows = rows.reshape([*rows.shape[:-1], *[1] * (max(values.dim(), 1) if rows.dim() == 1 else 1), rows.shape[-1]])
    values = values.unsqueeze(-1)  # the comparisons are turned round for a NaN, which stands behind all others
    before = ~(rows > values) if right or side == "right" else ~(rows >= values)
    return before.sum(-1).to(torch.int32 if out_int32 else torch.int64)


def _bucketize(x: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    return _search(boundaries, x, out_int32=out_int32, right=right)


def _with_number(op: Any) -> Any:
    """A bitwise op with a number is one with a tensor of it."""
    return lambda x, number: op(x, torch.full((), number, dtype=x.dtype))


TAIL: dict[Any, Any] = {
    aten.bmm.default: _bmm,
    aten.linear.default: _linear,
    aten.addbmm.default: _addbmm,
    aten._cdist_forward.default: _distances,
    aten.cummax.default: _running(largest=True),
    aten.cummin.default: _running(largest=False),
    aten.kthvalue.default: _kth_value,
    aten.median.default: _median,
    aten.median.dim: _median_along,
    aten.nanmedian.default: lambda x: torch.nanmedian(x.reshape(-1), 0)[0],
    aten.nanmedian.dim: _median_of_numbers,
    aten.searchsorted.Tensor: _search,
    aten.searchsorted.Scalar: lambda rows, value, **options: _search(rows, rows.new_full((), value), **options),
    aten.bucketize.Tensor: _bucketize,
    aten.bitwise_and.Scalar: _with_number(torch.bitwise_and),
    aten.bitwise_or.Scalar: _with_number(torch.bitwise_or),
    aten.bitwise_xor.Scalar: _with_number(torch.bitwise_xor),
}
