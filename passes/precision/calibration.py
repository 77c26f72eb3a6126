"""Calibration: one run over the user's inputs, and what each layer's input channels looked like in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, fx

from planish.errors import CalibrationError
from planish.ops import planish_ops
from planish.passes.precision.layer import is_pointwise
from planish.program import Program, source_line

SAMPLE = 256
"""Rows of a layer's input that are kept, in all and of each batch; and rows of a weight that errors are taken from."""


LEAST_DAMPING, MOST_DAMPING = 0.03, 1e6
"""Of ``Channels.damping``: the least is that of least loss on other data of MiniLM, of 0.01 to 0.3."""

ROUNDING = 1e-5
"""Of a channel's square sum, in fp32: as much as its variance may be off."""


@dataclass
class Channels:
    """Statistics of a layer's input, channel by channel (the last axis, K).

    Attributes:
        largest: largest magnitude, [K].
        later: the same without the first token of each sequence, [K]; equal where there are no sequences.
        totals: sums over the rows of every other batch, and of those between, fp64 [2, K].
        squares: sums of squares over all rows, fp64 [K].
        counts: how many rows these are, [2].
        parts: of each batch some rows, at most SAMPLE.
        halves: the largest magnitudes in every other batch, and in those between, [2, K]: how far ranges may be off.
        moments: sums of ``x x'`` over every other batch, and over those between, [2, K, K]; None where neither a linear
            layer nor a 1 x 1 convolution reads it.
    """

    largest: Tensor
    later: Tensor
    totals: Tensor
    squares: Tensor
    counts: list[int] = field(default_factory=lambda: [0, 0])
    parts: list[Tensor] = field(default_factory=list[Tensor])
    halves: Tensor = field(default_factory=lambda: torch.zeros(2, 1))
    moments: Tensor | None = None

    @staticmethod
    def none(depth: int) -> Channels:
        """Of no rows yet."""
        sums = torch.zeros(3, depth, dtype=torch.float64)
        return Channels(torch.zeros(depth), torch.zeros(depth), sums[:2], sums[2])

    @property
    def rows(self) -> int:
        """How many there were."""
        return sum(self.counts)

    @property
    def sample(self) -> Tensor:
        """Some of the rows, evenly spaced over all batches, [at most SAMPLE, K]."""
        rows = torch.cat(self.parts)
        return rows[:: -(-len(rows) // SAMPLE)]

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, fp32 [K]."""
        return (self.totals.sum(0) / max(self.rows, 1)).float()

    @property
    def variance(self) -> Tensor:
        """Of each channel, fp32 [K]."""
        return (self.squares / max(self.rows, 1) - self.mean.double().square()).clamp_min(0.0).float()

    def against_median(self) -> Tensor:
        """How many times each channel's largest magnitude exceeds the median channel's, [K]."""
        return self.largest / self.largest.median().clamp_min(torch.finfo(torch.float32).tiny)

    def moment(self, without: int | None = None) -> Tensor:
        """Sum of ``(x - E[x]) (x - E[x])'`` over the rows, [K, K]: what the mean does, a corrected bias takes off.

        Args:
            without: half of the batches to leave out, if there are others: 0 for the first, third, ..., or 1.
        """
        assert self.moments is not None
        halves = self._without(without)
        total, count = self.totals[halves].sum(0), sum(self.counts[half] for half in halves)
        squares = self.moments[halves].double().sum(0)
        return (squares - total.outer(total) / max(count, 1) + ROUNDING * squares.diagonal().diag()).float()

    def damping(self, without: int | None = None) -> float:
        """Part of ``moment``'s diagonal to add to it, so that what is by chance in the rest of it counts for nothing.

        Correlations that are there are in both halves of the batches, chance is not: of the squares of a half, or of
        both, ``part`` is what the products of the two halves' correlations come to. Scaling all of them by it is the
        best one number can do (Ledoit and Wolf 2004), and so is dividing the diagonal by it. Of one batch alone, chance
        is taken to be that of independent rows.
        """
        halves = self._without(without)
        scale = self.moment().diagonal().clamp_min(torch.finfo(torch.float32).tiny).rsqrt() * self.rows**0.5
        found = self._correlations(halves, scale)
        if all(self.counts):
            common = (self._correlations([0], scale) * self._correlations([1], scale)).sum()
        else:
            common = found.square().sum() - len(scale) * (len(scale) - 1) / max(1, self.rows)
        part = float(common / found.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
        return max(LEAST_DAMPING, 1 / min(1.0, max(part, 1 / MOST_DAMPING)) - 1)

    def _without(self, without: int | None) -> list[int]:
        """The halves but one, if the other has rows."""
        return [0, 1] if without is None or not self.counts[1 - without] else [1 - without]

    def _correlations(self, halves: list[int], scale: Tensor) -> Tensor:
        """Of the channels, 0 with themselves."""
        without = None if len(halves) > 1 else 1 - halves[0]
        count = sum(self.counts[half] for half in halves)
        return (self.moment(without) * scale * scale[:, None] / max(1, count)).fill_diagonal_(0.0)

    def add(self, x: Tensor, first: Tensor | None, half: int) -> None:
        """Take in a batch [rows, K], maybe of none.

        Args:
            x: the batch.
            first: which rows are first tokens, bool [rows]; None where there are no sequences.
            half: of the batches that it is in, 0 or 1.
        """
        if not len(x):
            return
        largest = x.abs().amax(0)
        self.largest = torch.maximum(self.largest, largest)
        self.halves = self.halves.expand(2, len(largest)).clone()
        self.halves[half] = torch.maximum(self.halves[half], largest)
        rest = x if first is None else x[~first]
        if len(rest):
            self.later = torch.maximum(self.later, rest.abs().amax(0))
        self.totals[half] += x.double().sum(0)
        self.squares += x.double().square().sum(0)
        if self.moments is not None:
            self.moments[half].addmm_(x.T, x)
        self.counts[half] += len(x)
        self.parts.append(x[:: -(-len(x) // SAMPLE)].clone())


def observe(program: Program, layers: Sequence[fx.Node]) -> dict[fx.Node, Channels]:
    """Run the program on its calibration inputs, once each, and collect statistics of the layers' first operands.

    Layers with the same first operand have the same statistics.

    Raises:
        CalibrationError: a layer's input holds NaN or infinity.
    """
    found: dict[Any, Channels] = {}
    for layer in layers:
        x: Any = layer.args[0]
        depth = int(x.meta["val"].shape[-1])
        if x not in found:
            found[x] = Channels.none(depth)
        if is_pointwise(layer) and found[x].moments is None:
            found[x].moments = torch.zeros(2, depth, depth)
    state = program.example[program.arguments :]
    console = Console(stderr=True)
    for number, inputs in enumerate(
        track(program.calibration, "calibration", console=console, transient=True, disable=not console.is_terminal)
    ):
        with torch.no_grad():
            _Observer(program.module, found, number).run(*inputs, *state)
    return {layer: found[layer.args[0]] for layer in layers}


class _Observer(fx.Interpreter):
    """Runs the graph and looks at some of its values."""

    def __init__(self, module: fx.GraphModule, found: dict[fx.Node, Channels], number: int) -> None:
        super().__init__(module)
        self._found, self._number = found, number
        self._starts: Tensor | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and look at its value."""
        result = super().run_node(n)
        if n in self._found:
            if not result.isfinite().all():
                reader = next(iter(n.users))
                raise CalibrationError(
                    f"in calibration batch {self._number} the input of {reader.name} holds NaN or infinity",
                    where=source_line(reader),
                    why="its scale would be meaningless",
                    fix="check that batch in eager PyTorch, and leave it out",
                )
            self._found[n].add(result.reshape(-1, result.shape[-1]), self._first_tokens(result), self._number % 2)
        if n.target is planish_ops.token_starts.default:
            self._starts = result
        return result

    def _first_tokens(self, x: Tensor) -> Tensor | None:
        """Which rows of x are first tokens: at the starts of a packed batch, in column 0 of [B, S, K]."""
        if x.dim() == 3:
            return (torch.arange(x.shape[1]) == 0).repeat(x.shape[0])
        if x.dim() == 2 and self._starts is not None and int(self._starts[-1]) == len(x):
            first = torch.zeros(len(x), dtype=torch.bool)
            first[self._starts[:-1][self._starts[:-1] < len(x)]] = True
            return first
        return None


def check_calibration(names: Sequence[str], batches: Sequence[Sequence[Tensor]]) -> None:
    """Raise CalibrationError unless there are batches and no input holds NaN."""
    if not batches:
        raise CalibrationError(
            "the calibration set is empty",
            why="scales and outliers are found by running it",
            fix="pass some inputs, calibration=[...], or leave calibration out to quantise without data",
        )
    for number, batch in enumerate(batches):
        for name, tensor in zip(names, batch, strict=True):
            if tensor.is_floating_point() and tensor.isnan().any():
                raise CalibrationError(
                    f"calibration batch {number}: input {name!r} holds NaN",
                    why="every statistic behind it would be NaN",
                    fix="leave that batch out",
                )
