"""Codes and scales of weights that make up for each other's errors, by what calibration says of the inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from planish.formats import Quantized, spread, with_steps

BLOCK = 32
"""Columns whose errors are passed on to the columns after them together."""

TOGETHER = 8192
"""Rows that are rounded together: enough to keep PyTorch's calls busy, and a block of them fits the caches."""


REFITS = 2
"""Times that scales are fitted to the codes; a third gains 0.5 % on MiniLM."""

RIDGE = 1e-2
"""Of a scale's own square in the fit: what the inputs do not tell stays as it was."""

FLOOR = 0.1
"""Of the median moment, added to all: an input that hardly varies in a few batches may do so in others."""

UNUSED = 1e-6
"""Of the largest moment: what an input that is always 0 counts in the fit of scales."""

FIT_NUMBERS = 1 << 21
"""Of a weight, whose scales are fitted at once."""


@dataclass(frozen=True)
class Grid:
    """A weight, and the values that it can have.

    Attributes:
        weight: fp32 [N, K].
        held: scales and minimums of what is stored, with the nearest codes.
        factors: what the stored values are multiplied by to stand for the weight, fp32 [K]; None for 1.
        exact: columns that are kept as they are, int64; None for none.
    """

    weight: Tensor
    held: Quantized
    factors: Tensor | None = None
    exact: Tensor | None = None


class Compensation:
    """How the inputs of a layer let rounding errors of its weight's columns make up for each other.

    before: ``codes = round((w - lowest) / step)``
    after:  the same column by column, the one of largest inputs first; then ``w_rest -= error * U[j, rest] / U[j, j]``
        with ``U' U`` the inverse of the damped moment (GPTQ, Frantar et al. 2022, with scales fixed beforehand).

    The damping is a part of each input's own moment, so that inputs of very different sizes are damped alike, and of
    the median moment. Weights are in their own units, evened out or not: one factorisation is that of all formats.
    """

    def __init__(self, moment: Tensor, damping: float) -> None:
        """Factorise.

        Args:
            moment: sum of ``x x'`` over the inputs, fp32 [K, K].
            damping: part of each input's own moment that is added to it, besides ``FLOOR``.
        """
        self._order = moment.diagonal().argsort(descending=True, stable=True)
        moment = moment[self._order][:, self._order].double()
        diagonal = moment.diagonal()
        unused = diagonal == 0
        usual = diagonal[~unused].median() if not unused.all() else torch.zeros(())
        added = damping * diagonal + FLOOR * usual * ~unused
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment + torch.diag(added + unused.double())))
        self._upper = torch.linalg.cholesky(inverse, upper=True).float()
        back = self._order.argsort()
        # inputs that are always 0 share scales with others, which are to count
        self._moment = (moment + torch.diag(added + UNUSED * diagonal.max() * unused))[back][:, back].float()

    def stored(self, grids: Sequence[Grid], *, refits: bool = True) -> list[Quantized]:
        """Codes, scales that are fitted to them, codes for those scales, and so on ``REFITS`` times; or codes alone."""
        if not refits:
            return [replace(g.held, codes=c) for g, c in zip(grids, self.codes(grids), strict=True)]
        for _ in range(REFITS):
            codes = self.codes(grids)
            grids = [self._refitted(grid, of_one) for grid, of_one in zip(grids, codes, strict=True)]
        return [grid.held for grid in grids]

    def codes(self, grids: Sequence[Grid]) -> list[Tensor]:
        """The codes of some weights of the same inputs, uint8 [N, K] each."""
        parts = [part for grid in grids for part in self._parts(grid)]
        rows = [len(part.codes) for part in parts]
        found: list[Tensor] = []
        start = 0
        while start < len(parts):
            end = start + 1
            while end < len(parts) and sum(rows[start : end + 1]) <= TOGETHER:
                end += 1
            columns = (torch.cat(c, 1) for c in zip(*(p.columns for p in parts[start:end]), strict=True))
            highest = torch.cat([torch.full((len(p.codes),), p.highest) for p in parts[start:end]])
            found += self._round(*columns, highest).split(rows[start:end], 1)
            start = end
        codes = iter(found)
        return [torch.cat([self._in_place(next(codes), part) for part in self._parts(grid)]) for grid in grids]

    def _parts(self, grid: Grid) -> Iterator[_Part]:
        for start in range(0, len(grid.weight), TOGETHER):
            yield _Part(grid, slice(start, start + TOGETHER), self._order)

    def _in_place(self, codes: Tensor, part: _Part) -> Tensor:
        found = part.codes.clone()
        found[:, self._order] = codes.T.to(torch.uint8)
        if part.grid.exact is not None:
            found[:, part.grid.exact] = part.codes[:, part.grid.exact]
        return found

    def _round(self, rest: Tensor, step: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
        """Codes [K, N] of columns in order; a column of the weight is a row here."""
        depth, upper = len(rest), self._upper
        inverse = torch.where(step == 0, 0.0, 1 / step)
        codes, zero = torch.empty(rest.shape), torch.zeros(())
        for start in range(0, depth, BLOCK):
            end = min(depth, start + BLOCK)
            errors = torch.empty(end - start, rest.shape[1])
            for j in range(start, end):
                codes[j] = ((rest[j] - lowest[j]) * inverse[j]).round_().clamp_(zero, highest)
                errors[j - start] = (rest[j] - codes[j] * step[j] - lowest[j]) / upper[j, j]
                if j + 1 < end:
                    rest[j + 1 : end].addr_(upper[j, j + 1 : end], errors[j - start], alpha=-1)
            rest[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
        return codes

    def _refitted(self, grid: Grid, codes: Tensor) -> Grid:
        """The grid with codes and the scales of least error for them.

        before: ``w ~ scale[g] * code + minimum[g]`` with the scales that were there
        after:  with scales that minimise ``(w - w~)' M (w - w~)``: a least-squares problem for each row. (AdaQuant,
            Hubara et al. 2020, goes there by gradient steps.)
        """
        held, (features, depth) = grid.held, grid.weight.shape
        form = held.format
        factors = torch.ones(depth) if grid.factors is None else grid.factors
        if grid.exact is not None:
            factors = factors.index_fill(0, grid.exact, 0.0)
        rows = max(1, FIT_NUMBERS // depth)
        found: list[Tensor] = []
        for part in (slice(start, start + rows) for start in range(0, features, rows)):
            steps, values = held.steps()[part], codes[part].float()
            fixed = 0.0 if held.minimums is None else spread(held.minimums[part].float(), form, depth)
            values = values - (1 << (form.bits - 1)) if held.minimums is None else values
            rest = (grid.weight[part] - (values * spread(steps, form, depth) + fixed) * factors) * (factors != 0)
            found.append(steps + _fitted(values * factors, rest, self._moment, form.group or depth))
        return replace(grid, held=with_steps(replace(held, codes=codes), torch.cat(found)))


def _fitted(values: Tensor, rest: Tensor, moment: Tensor, group: int) -> Tensor:
    """The change of scales [rows, groups] by which ``values`` [rows, K], each times its group's, come closest to
    ``rest`` in the metric of ``moment``."""
    more = -values.shape[1] % group
    values, rest = (torch.nn.functional.pad(t, (0, more)) for t in (values, rest))
    moment = torch.nn.functional.pad(moment, (0, more, 0, more))
    sides = (values * (rest @ moment)).unflatten(1, (-1, group)).sum(2).double()
    rows, groups = sides.shape
    normal = torch.zeros(rows, groups, groups)
    for place in range(groups):
        start = place * group
        products = values[:, start : start + group] @ moment[start : start + group, start:]
        normal[:, place, place:] = products.mul_(values[:, start:]).unflatten(1, (-1, group)).sum(2)
    normal = (normal + normal.triu(1).mT).double()
    diagonal = normal.diagonal(dim1=1, dim2=2)
    normal = normal + torch.diag_embed(RIDGE * diagonal + torch.where(diagonal > 0, 0.0, 1.0))
    return torch.cholesky_solve(sides[:, :, None], torch.linalg.cholesky(normal)).squeeze(2).float()


class _Part:
    """Some rows of a grid."""

    def __init__(self, grid: Grid, rows: slice, order: Tensor) -> None:
        self.grid, self._rows, self._order = grid, rows, order
        self.codes = grid.held.codes[rows]
        self.highest = float((1 << grid.held.format.bits) - 1)

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight, the distance of two values and the lowest one, [K, N] in order."""
        grid, depth = self.grid, self.grid.weight.shape[1]
        weight = grid.weight[self._rows]
        step, lowest = (spread(t[self._rows], grid.held.format, depth) for t in (grid.held.steps(), grid.held.lowest()))
        if grid.factors is not None:
            step, lowest = step * grid.factors, lowest * grid.factors
        if grid.exact is not None:
            step = step.index_fill(1, grid.exact, 0.0)
            lowest = lowest.index_copy(1, grid.exact, weight[:, grid.exact])
        weight, step, lowest = (t[:, self._order].T.contiguous() for t in (weight, step, lowest))
        return weight, step, lowest
