"""From scores to an assignment: pins, the integer program for a budget, and the reason for each choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from planish.assignment import Assignment, LayerChoice, Point, covers
from planish.budget import Budget
from planish.errors import BudgetError, UnknownNameError
from planish.passes.precision.columns import BYTES, LOSS, MS, MS_FP32, MS_ONE_ROW, Option, blocks_of
from planish.passes.precision.loss import Loss
from planish.passes.precision.sensitivity import Scores
from planish.passes.precision.sites import Site
from planish.passes.precision.solve import Block, Column, Solution, solve
from planish.passes.precision.tasks import run_all
from planish.passes.precision.treatment import Treatment

FRONT = 12
"""Sizes for which the least loss is reported."""

FRONT_GAP = 1e-2


def allowed_treatments(
    sites: Sequence[Site], pins: Sequence[tuple[str, str]], *, searched: bool
) -> list[tuple[Treatment, ...]]:
    """What each site may have: the one treatment that it is pinned to; else fp32, and its treatments if ``searched``.

    Raises:
        UnknownNameError: a pin's name is that of no layer, or its format is not among the layer's.
        BudgetError: two pins give a site different formats, neither by its whole name.
    """
    found = [(*(site.treatments if searched else ()), Treatment()) for site in sites]
    by: dict[int, tuple[str, str]] = {}
    for name, form in pins:
        treatment = Treatment.parse(form)
        covered = [i for i, site in enumerate(sites) if covers(name, site.name)]
        if not covered:
            names = ", ".join(site.name for site in sites)
            raise UnknownNameError(f"no layer {name!r} to pin", fix=f"use one of: {names}, or the beginning of some")
        if treatment.format is not None and treatment.format.activation == "fp":
            raise UnknownNameError(f"{form!r} has no kernel", fix=f"pin {name!r} to a format with a8, or to fp")
        for i in covered:
            before = by.get(i)
            if before is not None and before[0] == sites[i].name != name:
                continue  # a whole name says more than the beginning of some
            if before is not None and before[1] != form and name != sites[i].name:
                raise BudgetError(
                    f"{sites[i].name} is pinned to {before[1]!r} by {before[0]!r} and to {form!r} by {name!r}",
                    why="layers that read the same value have the same format",
                    fix="remove one of the pins",
                )
            if treatment not in (*sites[i].treatments, Treatment()):
                raise UnknownNameError(
                    f"{sites[i].name} cannot be pinned to {form!r}",
                    fix="use one of: " + ", ".join(t.name for t in (*sites[i].treatments, Treatment())),
                )
            by[i] = (name, form)
            found[i] = (treatment,)
    return found


@dataclass(frozen=True)
class Choice:
    """The solution for a budget, the program with what it minimises and limits, and the least loss of other sizes."""

    solution: Solution
    minimised: str
    limits: Mapping[str, float]
    blocks: tuple[Block, ...]
    front: tuple[Point, ...]

    @property
    def treatments(self) -> list[Treatment]:
        """Of each site."""
        return [Treatment.parse(name) for column in self.solution.chosen for name in column.choices]


def choose(
    sites: Sequence[Site],
    by_site: Sequence[Sequence[Option]],
    scores: Scores,
    budget: Budget | None,
    deadline: float,
    executor: Executor | None = None,
) -> Choice:
    """The assignment of least loss within a budget, or of the fewest bytes within a loss.

    Raises:
        BudgetError: no assignment fits, or the budget limits times that the target's cost table does not have.
    """
    minimise, limits = _program(sites, budget)
    known = set.intersection(*(set(o.costs) for of_site in by_site for o in of_site)) if by_site else {LOSS, BYTES}
    if missing := {minimise, *limits} - known:
        raise BudgetError(
            f"the budget limits {', '.join(sorted(missing))}, which is not known here",
            why="the target's cost table has no times of some of the formats",
            fix="use a CPU target and formats of `planish doctor --tune`, or limit bits or bytes",
        )
    blocks = blocks_of(
        sites, by_site, scores, (LOSS, BYTES, *(n for n in (MS, MS_ONE_ROW) if n in {minimise, *limits}))
    )
    solution = solve(blocks, minimise, limits, deadline=deadline)
    return Choice(solution, minimise, limits, tuple(blocks), _front(sites, blocks, deadline, executor))


def _program(sites: Sequence[Site], budget: Budget | None) -> tuple[str, dict[str, float]]:
    """What is minimised, and the limits."""
    if budget is None:  # what is not pinned stays fp32
        return LOSS, {}
    nbytes = budget.bytes if budget.bits is None else budget.bits / 8 * _weights(sites)
    given = {BYTES: nbytes, MS: budget.ms, MS_ONE_ROW: budget.ms_one_row}
    limits = {name: value for name, value in given.items() if value is not None}
    if budget.loss is None:
        return LOSS, limits
    return (MS if BYTES in limits else BYTES), {**limits, LOSS: budget.loss}


def _weights(sites: Sequence[Site]) -> int:
    return sum(layer.weight.numel() for site in sites for layer in site.layers)


def _front(
    sites: Sequence[Site], blocks: Sequence[Block], deadline: float, executor: Executor | None
) -> tuple[Point, ...]:
    """The least loss for sizes from the least to the most, evenly spaced by ratio."""
    least = sum(min(c.costs[BYTES] for c in block.columns) for block in blocks)
    most = sum(min(block.columns, key=lambda c: (c.costs[LOSS], c.costs[BYTES])).costs[BYTES] for block in blocks)
    if not blocks or least >= most:
        return ()
    sizes = [least * (most / least) ** (i / (FRONT - 1)) + 0.5 for i in range(FRONT)]
    points = dict(run_all("solving", _least_loss, [(blocks, size, deadline) for size in sizes], executor))
    weights = _weights(sites)
    return tuple(Point(int(size), 8 * size / weights, loss) for size, loss in sorted(points.items()))


def _least_loss(blocks: Sequence[Block], size: float, deadline: float) -> tuple[float, float]:
    """Bytes and loss of the assignment of least loss that is no larger."""
    found = solve(blocks, LOSS, {BYTES: size}, gap=FRONT_GAP, deadline=deadline)
    return found.total(BYTES), found.value


def explain(
    sites: Sequence[Site],
    by_site: Sequence[Sequence[Option]],
    scores: Scores,
    found: Choice,
    loss: Loss,
    measured: float,
) -> Assignment:
    """The assignment with a reason for each layer.

    The runner-up of a site is the treatment that changes least for the worse: the loss (or what else is minimised) of
    its block with it, plus the price of each limit times what it takes of it (its reduced cost in the relaxation).
    """
    solution, choices = found.solution, list[LayerChoice]()
    prices = {name: price for name, price in solution.prices.items() if price > 0}
    places = [(b, place) for b, block in enumerate(found.blocks) for place in range(len(block.groups))]
    for index, (site, treatment) in enumerate(zip(sites, found.treatments, strict=True)):
        mine = next(o for o in by_site[index] if o.treatment == treatment)
        block, place = places[index]
        runner, why = _runner_up(found.blocks[block], solution.chosen[block], place, found.minimised, prices)
        choices.append(
            LayerChoice(
                site.name,
                treatment.name,
                mine.costs[LOSS] if scores.samples else None,
                scores.sigma(index, treatment) if scores.samples else None,
                int(mine.costs[BYTES]),
                mine.costs.get(MS),
                runner,
                why,
            )
        )
    times = [choice.ms for choice in choices]
    in_fp32 = [next((o.costs.get(MS_FP32) for o in of_site), None) for of_site in by_site]
    return Assignment(
        loss.name,
        tuple(choices),
        solution.total(LOSS) if scores.samples else None,
        measured,
        sum(choice.bytes for choice in choices),
        8 * sum(choice.bytes for choice in choices) / max(1, _weights(sites)),
        _sum(times),
        _sum(in_fp32),
        found.minimised,
        found.limits,
        solution.gap,
        solution.is_optimal,
        dict(solution.prices),
        found.front,
    )


def _sum(numbers: Sequence[float | None]) -> float | None:
    """None where one is not known."""
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _runner_up(
    block: Block, chosen: Column, place: int, minimised: str, prices: Mapping[str, float]
) -> tuple[str, str]:
    """The next best treatment of the site at a place of its block, the others as chosen, and what it would change."""

    def reduced(column: Column) -> float:
        return column.costs[minimised] + sum(price * column.costs[name] for name, price in prices.items())

    rest = (*chosen.choices[:place], *chosen.choices[place + 1 :])
    others = [c for c in block.columns if c != chosen and (*c.choices[:place], *c.choices[place + 1 :]) == rest]
    runner = min(others, key=reduced, default=None)
    if runner is None:
        return "", "pinned, or all else is worse in every way"
    shown = [name for name in (LOSS, BYTES, MS) if name in chosen.costs]
    text = ", ".join(f"{name} {runner.costs[name] - chosen.costs[name]:+.3g}" for name in shown)
    more = reduced(runner) - reduced(chosen)
    if not prices:
        return runner.choices[place], text
    verdict = f"{more:.2g} {minimised} worse" if more >= 0 else f"{-more:.2g} {minimised} better, but beyond the limit,"
    return runner.choices[place], f"{text}: {verdict} at the limits' prices"
