"""Pooling to a given size: windows that are not all alike become gathers, masks and reductions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from planish.ops import aten


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


ADAPTIVE: dict[Any, Any] = {
    aten.adaptive_avg_pool1d.default: _average,
    aten.adaptive_avg_pool2d.default: _average,
    aten._adaptive_avg_pool2d.default: _average,
    aten.adaptive_avg_pool3d.default: _average,
    aten._adaptive_avg_pool3d.default: _average,
    aten.adaptive_max_pool1d.default: _maximum,
    aten.adaptive_max_pool2d.default: _maximum,
    aten.adaptive_max_pool3d.default: _maximum,
}
