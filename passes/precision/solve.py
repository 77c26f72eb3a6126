"""The integer program: one configuration for each block, the least of one cost within limits of the others.

    minimise  sum_b cost(b, c_b)    so that  sum_b other(b, c_b) <= limit  for each limited cost

The columns of a block are its configurations, so that what its layers do to each other needs no product of variables
(HAWQ-V3 and CalibTIP have one per layer). A column that another one equals or beats in every cost is left out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp

from planish.errors import BudgetError

GAP = 1e-3
"""Relative distance of the solution from the proved bound at which the search ends."""

DEADLINE = 60.0
"""Seconds after which the best solution so far is taken."""

SCALE = 1e4
"""Limits are scaled to this, and the objective to about this: the solver's tolerances are absolute, 1e-6."""


@dataclass(frozen=True)
class Column:
    """A configuration of a block.

    Attributes:
        choices: the format of each of its groups, in the block's order.
        costs: by name, such as ``loss``, ``bytes``, ``ms``.
    """

    choices: tuple[str, ...]
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Block:
    """Groups of layers that are configured together, and their configurations."""

    groups: tuple[str, ...]
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Solution:
    """A choice for every block.

    Attributes:
        chosen: a column for each block.
        value: of what is minimised.
        bound: no choice has less.
        is_optimal: whether the search ended by itself; False where the deadline ended it.
        prices: for each limit, how much less the minimum gets per unit that the limit grows (of the relaxation, in
            which a block may be a mixture of its columns); at least 0.
        seconds: of the search.
        columns: how many there were, after those that others beat were left out.
    """

    chosen: tuple[Column, ...]
    value: float
    bound: float
    is_optimal: bool
    prices: Mapping[str, float]
    seconds: float
    columns: int

    @property
    def gap(self) -> float:
        """Relative distance of the value from the bound."""
        return 0.0 if self.value <= self.bound else (self.value - self.bound) / abs(self.value)

    def total(self, cost: str) -> float:
        """Sum of a cost over the chosen columns."""
        return sum(column.costs[cost] for column in self.chosen)


def solve(
    blocks: Sequence[Block],
    minimise: str,
    limits: Mapping[str, float],
    *,
    gap: float = GAP,
    deadline: float = DEADLINE,
) -> Solution:
    """Choose a column for each block, by HiGHS.

    Args:
        blocks: each with at least one column.
        minimise: name of the cost.
        limits: the most that the sums of other costs may be.
        gap: see ``GAP``.
        deadline: in seconds.

    Raises:
        BudgetError: nothing fits the limits, with the least that does; or the deadline came before any choice.
    """
    start = time.perf_counter()
    for name, limit in limits.items():
        least = sum(min(column.costs[name] for column in block.columns) for block in blocks)
        if least > limit:
            raise _too_small(name, limit, least)
    names = (minimise, *limits)
    kept = [tuple(pareto(block.columns, names)) for block in blocks]
    scale = SCALE / max(1e-300, sum(max(abs(c.costs[minimise]) for c in columns) for columns in kept))
    relaxed = _Model(kept, minimise, limits, scale)
    if relaxed.run(pulp.HiGHS(mip=False, msg=False, timeLimit=deadline)) is None:
        raise _together(blocks, limits, deadline)
    if relaxed.value > 0:  # so that the objective is near SCALE, and tolerances are small against it
        scale *= SCALE / relaxed.value
    prices = {name: max(0.0, -price) for name, price in relaxed.prices().items()}
    model = _Model(kept, minimise, limits, scale)
    left = max(0.1, deadline - (time.perf_counter() - start))
    optimal = model.run(pulp.HiGHS(msg=False, timeLimit=left, gapRel=gap))
    if optimal is None:
        raise _together(blocks, limits, deadline)
    chosen = tuple(columns[index] for columns, index in zip(kept, model.chosen(), strict=True))
    value = sum(column.costs[minimise] for column in chosen)
    bound = min(value, max(model.bound() / scale, relaxed.value / relaxed.scale))
    return Solution(chosen, value, bound, optimal, prices, time.perf_counter() - start, sum(map(len, kept)))


def pareto(columns: Sequence[Column], names: Sequence[str]) -> list[Column]:
    """The columns that no other equals or beats in all the named costs; of equal ones the first, in order."""
    costs = np.array([[column.costs[name] for name in names] for column in columns])
    kept: list[int] = []
    for i in np.lexsort(costs.T[::-1]):  # whatever beats column i is before it
        if not (costs[kept] <= costs[i]).all(1).any():
            kept.append(int(i))
    return [columns[i] for i in sorted(kept)]


class _Model:
    """The program as PuLP's, with its objective scaled."""

    def __init__(
        self, kept: Sequence[Sequence[Column]], minimise: str, limits: Mapping[str, float], scale: float
    ) -> None:
        self.scale, self._limits = scale, limits
        self._problem: Any = pulp.LpProblem("assignment", pulp.LpMinimize)
        self._taken = [
            [self._problem.add_variable(f"x_{b}_{c}", cat="Binary") for c in range(len(columns))]
            for b, columns in enumerate(kept)
        ]
        flat = [
            (x, column)
            for variables, columns in zip(self._taken, kept, strict=True)
            for x, column in zip(variables, columns, strict=True)
        ]
        self._problem += pulp.LpAffineExpression([(x, scale * column.costs[minimise]) for x, column in flat])
        for b, variables in enumerate(self._taken):
            self._problem += pulp.LpAffineExpression([(x, 1) for x in variables]) == 1, f"one_{b}"
        for i, (name, limit) in enumerate(limits.items()):
            unit = SCALE / limit if limit > 0 else 1.0
            terms = pulp.LpAffineExpression([(x, unit * column.costs[name]) for x, column in flat])
            self._problem += terms <= unit * limit, f"limit_{i}"

    def run(self, solver: Any) -> bool | None:
        """Whether the search ended by itself; None where there is no solution."""
        self._problem.solve(solver)
        found = self._problem.sol_status  # ``status`` does not tell an optimum from what a deadline left
        if found not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return None
        return found == pulp.LpSolutionOptimal

    @property
    def value(self) -> float:
        """Of the scaled objective."""
        return float(pulp.value(self._problem.objective) or 0.0)

    def bound(self) -> float:
        """That the search proved, of the scaled objective."""
        return float(self._problem.solverModel.getInfo().mip_dual_bound)

    def prices(self) -> dict[str, float]:
        """Change of the unscaled objective per unit of each limit."""
        units = {name: SCALE / limit if limit > 0 else 1.0 for name, limit in self._limits.items()}
        return {
            name: self._problem.get_constraint_by_name(f"limit_{i}").pi * units[name] / self.scale
            for i, name in enumerate(self._limits)
        }

    def chosen(self) -> list[int]:
        """Index of each block's column."""
        return [max(range(len(row)), key=lambda i: row[i].varValue or 0.0) for row in self._taken]


def _too_small(name: str, limit: float, least: float) -> BudgetError:
    return BudgetError(
        f"no assignment has {name} of at most {limit:.6g}: the least is {least:.6g}",
        why="even with the smallest format that each layer may have it is more",
        fix=f"allow {name} of {least:.6g} or more, offer smaller formats, or pin fewer layers",
    )


def _together(blocks: Sequence[Block], limits: Mapping[str, float], deadline: float) -> BudgetError:
    """What to say where each limit can be kept alone: the least of the last one while the others are kept."""
    *others, last = limits
    if not others:
        return BudgetError(
            f"no assignment was found in {deadline:g} seconds", why="the deadline came first", fix="allow more time"
        )
    held = {name: limits[name] for name in others}
    try:
        least = solve(blocks, last, held, deadline=deadline).value
    except BudgetError as error:
        return error
    if least > limits[last]:
        return BudgetError(
            f"no assignment keeps all limits: with {', '.join(f'{n} <= {v:.6g}' for n, v in held.items())} "
            f"the least {last} is {least:.6g}",
            why=f"the limit of {last} is {limits[last]:.6g}",
            fix=f"allow {last} of {least:.6g} or more, or more of the others",
        )
    return BudgetError(
        f"no assignment was found in {deadline:g} seconds", why="the deadline came first", fix="allow more time"
    )
