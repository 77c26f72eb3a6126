"""Windows as gathers: pooling to a given size, and what has no kernel: convolution and pooling of integers and fp64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from planish.ops import aten
from planish.tail import KERNEL_DTYPES


def _windows(length: int, wanted: int) -> tuple[Tensor, Tensor]:
    """Positions [wanted, longest] of each window over an axis, and which of them are inside it.

    Window i of n over an axis of length s goes from floor(i s / n) to ceil((i + 1) s / n); a shorter window repeats
    its last position.
    """
    window = torch.arange(wanted)
    first, end = window * length // wanted, -(-(window + 1) * length // wanted)
    longest = max(-(-(i + 1) * length // wanted) - i * length // wanted for i in range(wanted)) if wanted else 0
    place = first[:, None] + torch.arange(longest)[None]
    return torch.minimum(place, end[:, None] - 1), place < end[:, None]


def _sizes(x: Tensor, size: list[int | None]) -> list[tuple[int, int]]:
    """Axis and wanted length of each pooled axis."""
    first = x.dim() - len(size)
    return [(first + at, x.shape[first + at] if n is None else n) for at, n in enumerate(size)]


def _average(x: Tensor, size: list[int]) -> Any:
    """One axis after another: a mean of equal windows, else a masked sum over the positions of each window."""
    if all(wanted == 1 for wanted in size):
        return x.mean(list(range(x.dim() - len(size), x.dim())), keepdim=True)
    for axis, wanted in _sizes(x, size):  # pyright: ignore
        length = x.shape[axis]
        if not isinstance(length, int):
            return NotImplemented
        if wanted and length % wanted == 0:
            x = x.reshape([*x.shape[:axis], wanted, length // wanted, *x.shape[axis + 1 :]]).mean(axis + 1)
            continue
        place, inside = _windows(length, wanted)
        tail = [1] * (x.dim() - axis - 1)
        parts = x.index_select(axis, place.reshape(-1)).reshape([*x.shape[:axis], *place.shape, *x.shape[axis + 1 :]])
        total = torch.where(inside.reshape([*place.shape, *tail]), parts, 0).sum(axis + 1)
        x = total / inside.sum(1).to(x.dtype).reshape([wanted, *tail])
    return x


def _maximum(x: Tensor, size: list[int]) -> Any:
    """Values and positions (in the merged pooled axes) of the maxima of the windows, all axes at once."""
    axes = _sizes(x, size)  # pyright: ignore
    lengths = [x.shape[axis] for axis, _ in axes]
    if not all(isinstance(s, int) for s in lengths):
        return NotImplemented
    lead, count = list(x.shape[: axes[0][0]]), len(axes)
    place = torch.zeros((), dtype=torch.int64)
    for at, ((_, wanted), length) in enumerate(zip(axes, lengths, strict=True)):
        own, _ = _windows(length, wanted)
        shape = [1] * (2 * count)
        shape[at], shape[count + at] = own.shape
        place = place * length + own.reshape(shape)
    wanted = [n for _, n in axes]
    place = place.reshape([*wanted, -1])
    parts = x.reshape([*lead, -1]).index_select(-1, place.reshape(-1)).reshape([*lead, *place.shape])
    values, at = parts.max(-1)
    return values, place.expand(parts.shape).gather(-1, at.unsqueeze(-1)).squeeze(-1)


def _gathered(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    """All windows of ``x`` [N, C, size...] as [N, C, window..., element...]."""
    for i, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True)):
        axis = 2 + i
        count = (x.shape[axis] - spread * (size - 1) - 1) // step + 1
        place = torch.arange(count)[:, None] * step + torch.arange(size)[None] * spread
        x = x.index_select(axis, place.reshape(-1)).unflatten(axis, (count, size)).movedim(axis + 1, -1)
    return x


def _padded(x: Tensor, pads: list[tuple[int, int]]) -> Tensor:
    """``x`` with zeros before and after each of its last axes."""
    flat = [p for pair in reversed(pads) for p in pair]
    return torch.ops.aten.constant_pad_nd(x, flat, 0) if any(flat) else x


def _spread(x: Tensor, stride: list[int]) -> Tensor:
    """``x`` with ``stride - 1`` zeros between its elements."""
    for i, step in enumerate(stride):
        axis = 2 + i
        if step > 1:
            after = [(0, 0)] * (x.dim() - axis - 1)
            size = (x.shape[axis] - 1) * step + 1
            x = _padded(x.unsqueeze(axis + 1), [(0, step - 1), *after]).flatten(axis, axis + 1).narrow(axis, 0, size)
    return x


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Any:
    """A convolution of integers or fp64 is the sum of the products of its gathered windows with the weights.

    A transposed one is the convolution of the input spread by the stride with the flipped weights.
    """
    count = x.dim() - 2
    if x.dtype in KERNEL_DTYPES or len(stride) != count or not all(isinstance(s, int) for s in x.shape):
        return NotImplemented
    kernel = list(weight.shape[2:])
    pads = [(p, p) for p in padding]
    if transposed:
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(list(range(2, x.dim())))
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(r - p, r - p + extra) for r, p, extra in zip(reach, padding, output_padding, strict=True)]
        x, stride = _spread(x, stride), [1] * count
    parts = _gathered(_padded(x, pads), kernel, stride, dilation)
    places = list(parts.shape[2 : 2 + count])
    rows = parts.flatten(2 + count).flatten(2, 1 + count).unflatten(1, (groups, -1))  # [N, G, C/G, places, window]
    rows = rows.transpose(2, 3).flatten(3).unsqueeze(2)
    products = rows * weight.unflatten(0, (groups, -1)).flatten(2).unsqueeze(2)  # [N, G, O/G, places, C/G window]
    out = products.sum(-1).to(x.dtype).flatten(1, 2).unflatten(-1, places)
    return out if bias is None else out + bias.reshape([-1] + [1] * count)


def _pooled(op: Any, rank: int) -> Any:
    """Average pooling: of a tensor without a batch as a batch of one, of integers or fp64 over gathered windows."""

    def decompose(
        x: Tensor,
        kernel: list[int],
        stride: list[int] | None = None,
        padding: Any = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        options = (kernel, stride or kernel, padding, ceil_mode, count_include_pad, divisor_override)
        if x.dim() != rank:
            return op(x.unsqueeze(0), *options).squeeze(0)
        count = rank - 2
        fixed = all(isinstance(s, int) for s in x.shape)
        if x.dtype in KERNEL_DTYPES or ceil_mode or not fixed:
            return NotImplemented
        sizes, steps, pads = (list(v) * count if len(v) == 1 else list(v) for v in (kernel, stride or kernel, padding))

        def sums(t: Tensor) -> Tensor:
            padded = _padded(t, [(p, p) for p in pads])
            return _gathered(padded, sizes, steps, [1] * count).flatten(rank).sum(-1)

        divisor = divisor_override or (math.prod(sizes) if count_include_pad else sums(torch.ones_like(x[:1, :1])))
        return sums(x) / divisor if x.is_floating_point() else torch.div(sums(x), divisor, rounding_mode="trunc")

    return decompose


WINDOWS: dict[Any, Any] = {
    aten.convolution.default: _convolution,
    aten.avg_pool2d.default: _pooled(aten.avg_pool2d.default, 4),
    aten.avg_pool3d.default: _pooled(aten.avg_pool3d.default, 5),
    aten.adaptive_avg_pool1d.default: _average,
    aten.adaptive_avg_pool2d.default: _average,
    aten._adaptive_avg_pool2d.default: _average,
    aten.adaptive_avg_pool3d.default: _average,
    aten._adaptive_avg_pool3d.default: _average,
    aten.adaptive_max_pool1d.default: _maximum,
    aten.adaptive_max_pool2d.default: _maximum,
    aten.adaptive_max_pool3d.default: _maximum,
}
