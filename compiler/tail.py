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
    values = values.unsqueeze(-1)
    before = rows <= values if right or side == "right" else rows < values
    before = before | (values != values)  # a NaN stands behind all others
    return before.sum(-1).to(torch.int32 if out_int32 else torch.int64)


def _bucketize(x: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    return _search(boundaries, x.reshape(-1), out_int32=out_int32, right=right).reshape(x.shape)


def _as_strided(x: Tensor, size: list[int], stride: list[int], storage_offset: int | None = None) -> Any:
    """A tensor's memory seen with other strides, where that memory is the tensor's elements in order."""
    if not x.is_contiguous() or x.storage_offset():
        return NotImplemented
    place = torch.full([1] * len(size), storage_offset or 0)
    for axis, (count, step) in enumerate(zip(size, stride, strict=True)):
        place = place + (torch.arange(count) * step).reshape([-1 if a == axis else 1 for a in range(len(size))])
    return torch.ops.aten.index.Tensor(x.reshape(-1), [place])


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The n-th true element of the mask takes the n-th element of the source.

    before: ``masked_scatter(x, mask, source)``
    after:  ``where(mask, source[cumsum(mask) - 1], x)``, all flat
    """
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    flat = mask.expand(shape).reshape(-1)
    if not source.numel() or not flat.numel():
        return x.expand(shape).clone()
    place = (flat.to(torch.int64).cumsum(0) - 1).clamp_min(0)
    return torch.where(flat, source.reshape(-1).index_select(0, place), x.expand(shape).reshape(-1)).reshape(shape)


def _put(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    flat = x.reshape(-1).index_put((index.reshape(-1),), source.reshape(-1), accumulate)
    return flat.reshape(x.shape)


def _neutral(reduce: str, dtype: torch.dtype) -> float:
    """What leaves the other operand of a reduction as it is."""
    if reduce in ("sum", "mean", "prod"):
        return 1 if reduce == "prod" else 0
    if dtype.is_floating_point:
        return -math.inf if reduce == "amax" else math.inf
    return torch.iinfo(dtype).min if reduce == "amax" else torch.iinfo(dtype).max


def _scatter_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    """Without ``x`` itself what is written starts from the neutral element; a mean is a sum over a count.

    before: ``scatter_reduce(x, 0, i, y, "mean")``
    after:  ``scatter_reduce(x, 0, i, y, "sum") / scatter_add(ones, 0, i, ones)``
    """
    if include_self and reduce != "mean":
        return NotImplemented
    ones = torch.ones_like(source)
    if not include_self:
        written = torch.zeros(x.shape, dtype=torch.bool).scatter(dim, index, True)
        x = torch.where(written, _neutral(reduce, x.dtype), x).to(x.dtype)
    if reduce != "mean":
        return x.scatter_reduce(dim, index, source, reduce)
    count = (torch.ones_like(x) if include_self else torch.zeros_like(x)).scatter_add(dim, index, ones).clamp_min(1)
    total = x.scatter_reduce(dim, index, source, "sum")
    return total / count if x.is_floating_point() else torch.div(total, count, rounding_mode="floor")


def _index_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """A ``scatter_reduce`` whose index is the same for all other axes."""
    if not x.dim():
        return x.reshape(1).index_reduce(0, index.reshape(1), source.reshape(1), reduce, include_self=include_self)[0]
    index = index.reshape([-1] + [1] * (x.dim() - dim % x.dim() - 1)).expand(source.shape)
    return x.scatter_reduce(dim, index, source, reduce, include_self=include_self)


def _trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    one: list[int],
    two: list[int],
    three: list[int],
    summed: list[int],
    unroll: int = 1,
) -> Tensor:
    """The product of three tensors, each with new axes of its own, summed over some axes."""
    for axes, at in ((one, 0), (two, 1), (three, 2)):
        for axis in axes:
            a, b, c = (t.unsqueeze(axis) if i == at else t for i, t in enumerate((a, b, c)))
    product = a * b * c
    return product.sum(summed) if summed else product


def _native_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, inner: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``group_norm`` with the mean and reciprocal deviation of each group."""
    rows = x.reshape(n, groups, -1)
    var, mean = torch.var_mean(rows, -1, correction=0)
    return torch.ops.aten.group_norm(x, groups, weight, bias, eps), mean, (var + eps).rsqrt()


def _angle(x: Tensor) -> Tensor:
    """Of a real number: pi where it is negative; a NaN stays."""
    dtype = x.dtype if x.is_floating_point() else torch.float32
    return torch.where(x != x, x.to(dtype), torch.where(x < 0, math.pi, 0.0).to(dtype))


def _round(x: Tensor, *, decimals: int = 0) -> Tensor:
    if not x.is_floating_point() or not decimals:
        return x.round()
    scale = 10.0 ** abs(decimals)
    return (x * scale).round() / scale if decimals > 0 else (x / scale).round() * scale


def _copy_sign(x: Tensor, number: float) -> Tensor:
    dtype = x.dtype if x.is_floating_point() else torch.float32
    return torch.copysign(x, torch.full((), number, dtype=dtype))


def _with_number(op: Any) -> Any:
    """A bitwise op with a number is one with a tensor of it."""
    return lambda x, number: op(x, torch.full((), number, dtype=x.dtype))


def _batched(op: Any, rank: int) -> Any:
    """Pooling of a tensor without a batch axis is that of a batch of one."""

    def decompose(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return NotImplemented if x.dim() == rank else op(x.unsqueeze(0), *args, **kwargs).squeeze(0)

    return decompose


def _gather(x: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    """A number is gathered from as a row of one."""
    return NotImplemented if x.dim() else x.reshape(1).gather(0, index.reshape(-1)).reshape(index.shape)


def _index_select(x: Tensor, dim: int, index: Tensor) -> Any:
    return NotImplemented if x.dim() else x.reshape(1).index_select(0, index.reshape(-1)).reshape(())


def _unfold(x: Tensor, dim: int, size: int, step: int) -> Any:
    return NotImplemented if x.dim() else x.reshape(1)[:size]


TAIL: dict[Any, Any] = {
    aten.gather.default: _gather,
    aten.index_select.default: _index_select,
    aten.unfold.default: _unfold,
    aten.max_pool2d.default: _batched(aten.max_pool2d.default, 4),
    aten.max_pool3d.default: _batched(aten.max_pool3d.default, 5),
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
    aten.as_strided.default: _as_strided,
    aten.masked_scatter.default: _masked_scatter,
    aten.put.default: _put,
    aten.scatter_reduce.two: _scatter_reduce,
    aten.index_reduce.default: _index_reduce,
    aten._trilinear.default: _trilinear,
    aten.native_group_norm.default: _native_group_norm,
    aten.angle.default: _angle,
    aten.round.decimals: _round,
    aten.copysign.Scalar: _copy_sign,
    aten.bitwise_and.Scalar: _with_number(torch.bitwise_and),
    aten.bitwise_or.Scalar: _with_number(torch.bitwise_or),
    aten.bitwise_xor.Scalar: _with_number(torch.bitwise_xor),
}
