"""Ranges of codes, narrower than the extremes of the weights: few weights are clipped, the others have finer steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from planish.formats import Quantized, nearest, spread, with_steps

PARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Of a group's range that are tried."""

CLIPPED = 3.0
"""What the error of a clipped weight counts: such errors all go towards 0, and do not cancel in a sum as others do."""

NUMBERS = 1 << 22
"""Of a weight, that are looked at at once."""


def narrowed(weight: Tensor, held: Quantized, importance: Tensor) -> Quantized:
    """The nearest codes in the ranges of least error, of ``PARTS`` of the extremes' ranges.

    before: ``scale = largest / 2^(bits - 1)`` for each group: the extreme is exact, the others have its step
    after:  ``part * scale`` of the part, and of the sign where the format is symmetric (its range is not), of least
        ``sum_k importance_k (w_k - w~_k)^2``, ``CLIPPED`` times as much where w_k is beyond the range. (Banner et al.
        2019 clip likewise, by a distribution; these are the groups' own errors.)

    Args:
        weight: fp32 [N, K].
        held: it, by ``planish.formats.quantise``.
        importance: of each input feature, fp32 [1, K] or [N, K]: its mean square; all alike where that is not known.

    Returns:
        Codes with other steps; with other minimums too where the format has some.
    """
    rows = max(1, NUMBERS // weight.shape[1])
    found = [
        _best(weight[start : start + rows], part, importance.expand_as(weight)[start : start + rows])
        for start, part in ((start, held.rows(slice(start, start + rows))) for start in range(0, len(weight), rows))
    ]
    steps, lowest = (torch.cat(parts) for parts in zip(*found, strict=True))
    if held.minimums is not None:
        held = replace(held, minimums=lowest.to(held.minimums.dtype))
    return nearest(weight, with_steps(held, steps))


def _best(weight: Tensor, held: Quantized, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Steps and lowest values of least error, [N, groups] each."""
    form, depth = held.format, weight.shape[1]
    group = form.group or depth
    best_steps, best_lowest = held.steps(), held.lowest()
    least = torch.full_like(best_steps, float("inf"))
    for steps, lowest in _tried(held):
        step, low = spread(steps, form, depth), spread(lowest, form, depth)
        unclipped = ((weight - low) / step).nan_to_num_(nan=0.0).round_()
        codes = unclipped.clamp(0, (1 << form.bits) - 1)
        counts = torch.where(codes == unclipped, importance, CLIPPED * importance)
        errors = (codes.mul_(step).add_(low).sub_(weight)).square_().mul_(counts)
        error = torch.nn.functional.pad(errors, (0, -depth % group)).unflatten(1, (-1, group)).sum(2)
        better = error < least
        least = torch.where(better, error, least)
        best_steps, best_lowest = torch.where(better, steps, best_steps), torch.where(better, lowest, best_lowest)
    return best_steps, best_lowest


def _tried(held: Quantized) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps and lowest values: around 0 of a symmetric format, of either sign; around the middle of another."""
    steps, lowest, top = held.steps(), held.lowest(), float((1 << held.format.bits) - 1)
    for part in PARTS:
        if held.minimums is not None:
            yield part * steps, lowest + (1 - part) * steps * top / 2
        else:
            yield part * steps, part * lowest
            yield -part * steps, -part * lowest
