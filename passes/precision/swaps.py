"""Exchanges between layers that scores cannot tell apart, decided by running the model on inputs kept for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from planish.passes.precision.loss import Loss
from planish.passes.precision.sensitivity import Sample, measure_samples
from planish.passes.precision.simulation import Simulation
from planish.passes.precision.solve import Block, Column, Solution
from planish.passes.precision.treatment import Treatment

SWAPS = 2
"""At most so many are made."""

TRIED = 6
"""Candidates that are measured for each: those of least predicted loss."""

ERRORS = 2.0
"""Standard errors by which the measured loss must fall."""

SHARE = 6
"""One in so many inputs is kept for selection, the last ones, if that leaves ``LEAST``."""

LEAST = 4


def selection(samples: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """The inputs that scores are made from, and those that swaps are decided by; none of few."""
    kept = len(samples) // SHARE
    return (samples[:-kept], samples[-kept:]) if kept >= LEAST else (samples, ())


def swap(
    blocks: Sequence[Block],
    found: Solution,
    minimised: str,
    limits: Mapping[str, float],
    simulation: Simulation,
    loss: Loss,
    samples: Sequence[Sample],
) -> tuple[Solution, list[str]]:
    """Exchange the configurations of two blocks where that measurably lessens the loss within the limits.

    Args:
        blocks: of the program, in the order of the sites.
        found: its solution.
        minimised: swaps are only tried where this is the loss.
        limits: of the other costs.
        simulation, loss: of the same sites.
        samples: inputs that neither the scores nor the codes know.

    Returns:
        The solution, and what was exchanged, in words. Its value is still the predicted one.
    """
    said: list[str] = []
    if minimised != "loss" or not samples or not limits:
        return found, said
    known = _losses(found.chosen, simulation, loss, samples)
    for _ in range(SWAPS):
        best, best_losses = None, known
        for chosen in _candidates(blocks, found.chosen, limits)[:TRIED]:
            losses = _losses(chosen, simulation, loss, samples)
            gain = known - losses
            if gain.mean() > ERRORS * gain.std() / len(gain) ** 0.5 and losses.mean() < best_losses.mean():
                best, best_losses = chosen, losses
        if best is None:
            break
        said.append(_words(blocks, found.chosen, best, float(known.mean()), float(best_losses.mean())))
        value = sum(column.costs[minimised] for column in best)
        found, known = replace(found, chosen=best, value=value), best_losses
    return found, said


def _candidates(
    blocks: Sequence[Block], chosen: tuple[Column, ...], limits: Mapping[str, float]
) -> list[tuple[Column, ...]]:
    """Choices with another column of one block, or of two, within the limits; the least predicted loss first."""
    left = {name: limit - sum(c.costs[name] for c in chosen) for name, limit in limits.items()}
    moves = [
        (b, column, {name: column.costs[name] - chosen[b].costs[name] for name in ("loss", *limits)})
        for b, block in enumerate(blocks)
        for column in _near(block, chosen[b], limits)
    ]
    found: list[tuple[float, tuple[Column, ...]]] = []
    for i, (b, column, change) in enumerate(moves):
        for other, second, more in ((b, column, dict.fromkeys(change, 0.0)), *moves[i + 1 :]):
            fits = all(change[name] + more[name] <= left[name] for name in limits)
            gains = min(change["loss"], more["loss"]) < 0  # for less loss one of the two must have less
            if fits and gains and (other != b or second is column):
                swapped = list(chosen)
                swapped[b], swapped[other] = column, second
                found.append((change["loss"] + more["loss"], tuple(swapped)))
    return [choice for _, choice in sorted(found, key=lambda pair: pair[0])]


def _near(block: Block, chosen: Column, limits: Mapping[str, float]) -> list[Column]:
    """Of the columns with one other format than the chosen one, the next cheaper and the next better one."""
    others = [c for c in block.columns if sum(a != b for a, b in zip(c.choices, chosen.choices, strict=True)) == 1]
    cheaper = [c for c in others if all(c.costs[name] <= chosen.costs[name] for name in limits)]
    better = [c for c in others if c.costs["loss"] < chosen.costs["loss"]]
    first = next(iter(limits))
    picks = [min(cheaper, key=lambda c: c.costs["loss"], default=None)]
    picks += [min(better, key=lambda c: c.costs[first], default=None)]
    return [c for c in picks if c is not None]


def _losses(chosen: Sequence[Column], simulation: Simulation, loss: Loss, samples: Sequence[Sample]) -> torch.Tensor:
    names = [name for column in chosen for name in column.choices]
    return torch.tensor(measure_samples(simulation, dict(enumerate(map(Treatment.parse, names))), loss, samples))


def _words(blocks: Sequence[Block], old: Sequence[Column], new: Sequence[Column], before: float, after: float) -> str:
    changed = [
        f"{group} {a} to {b}"
        for block, of_old, of_new in zip(blocks, old, new, strict=True)
        for group, a, b in zip(block.groups, of_old.choices, of_new.choices, strict=True)
        if a != b
    ]
    return f"measured swap: {', '.join(changed)}: loss {before:.3g} to {after:.3g} on inputs kept for that"
