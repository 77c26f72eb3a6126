"""How far outputs are from those in fp32, as one number, and random gradients that tell it to second order.

For a small change d of an output row y, the loss is ``d' H d / 2``. A probe is a random vector r with ``E[r r'] = H``,
independent for each row, so that ``E[(sum r d)^2] / 2`` is the loss of all rows together (Gauss-Newton: contract first,
then square).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planish.errors import CalibrationError, UnknownNameError
from planish.ops import LAYERS, VIEWS
from planish.program import Program

KL, COSINE = "kl", "cosine"
MEASURES = (KL, COSINE)

SQUARE = "square"
"""Of outputs that are single numbers, whatever measure is asked for: rows of one have no direction."""


@dataclass(frozen=True)
class Loss:
    """The mean over outputs of the mean over their rows (last axis).

    A row's loss is the KL divergence from its softmax in fp32 (``kl``: logits), or one minus the cosine with itself in
    fp32 (``cosine``: embeddings and hidden states). Rows of zeros do not count: that is what padding holds. Single
    numbers are compared together, by half their square error over their mean square (``square``).

    Attributes:
        kinds: of each output of the program; None for what does not count: integers, and the state.
    """

    kinds: tuple[str | None, ...]

    @staticmethod
    def of(program: Program, measure: str | None = None) -> Loss:
        """The loss of a program: ``measure`` for all outputs, or by what each is: a linear layer's result is logits.

        Raises:
            UnknownNameError: there is no such measure.
            CalibrationError: no output can be compared.
        """
        if measure not in (*MEASURES, None):
            raise UnknownNameError(f"no loss {measure!r}", fix=f"use one of {MEASURES}")
        (output,) = (n for n in program.nodes() if n.op == "output")
        kinds: list[str | None] = []
        for i, node in enumerate(output.args[0]):  # pyright: ignore
            counts = node.meta["val"].is_floating_point() and i < len(program.outputs) - len(program.state)
            source = node
            while source.target in VIEWS:
                source = source.args[0]
            is_number = node.meta["val"].dim() < 2 or program.shape(node)[-1] == 1
            kind = SQUARE if is_number else measure or (KL if source.target in LAYERS else COSINE)
            kinds.append(kind if counts else None)
        if not any(kinds):
            raise CalibrationError(
                "the model returns no numbers that could be compared",
                why="what a format does is judged by the outputs, and integers do not change a little",
                fix="compile a model that returns what they are made from, such as logits",
            )
        return Loss(tuple(kinds))

    @property
    def name(self) -> str:
        """For reports."""
        return " and ".join(sorted({kind for kind in self.kinds if kind}))

    def measure(self, reference: Sequence[Tensor], found: Sequence[Tensor]) -> float:
        """The loss of a run's outputs, in fp64."""
        losses = []
        for kind, want, got in zip(self.kinds, reference, found, strict=True):
            if kind is None:
                continue
            if kind == SQUARE:
                square = want.double().square().mean().clamp_min(torch.finfo(torch.float64).tiny)
                losses.append((got.double() - want.double()).square().mean() / square / 2)
                continue
            want, got = (t.double().reshape(-1, t.shape[-1]) for t in (want, got))
            keep = want.abs().amax(1) > 0
            if not keep.any():
                losses.append(torch.zeros((), dtype=torch.float64))
                continue
            want, got = want[keep], got[keep]
            if kind == KL:
                logs = want.log_softmax(1)
                losses.append((logs.exp() * (logs - got.log_softmax(1))).sum(1).mean())
            else:
                losses.append(1 - torch.cosine_similarity(want, got, dim=1).mean())
        return float(torch.stack(losses).mean()) if losses else 0.0

    def probe(self, reference: Sequence[Tensor], generator: torch.Generator) -> list[Tensor | None]:
        """A random gradient for each output.

        For KL it is ``softmax(y) - onehot(label)`` with a label drawn from that softmax (Fisher), for the cosine
        ``(I - u u') z / |y|`` with u = y / |y| and z normal, for numbers ``z / sqrt(mean y^2)``.
        """
        counted = sum(kind is not None for kind in self.kinds)
        found: list[Tensor | None] = []
        for kind, y in zip(self.kinds, reference, strict=True):
            if kind is None:
                found.append(None)
                continue
            if kind == SQUARE:
                size = (counted * y.square().sum()).sqrt().clamp_min(torch.finfo(y.dtype).tiny)
                found.append(torch.randn(y.shape, generator=generator, dtype=y.dtype) / size)
                continue
            rows = y.reshape(-1, y.shape[-1])
            keep = rows.abs().amax(1, keepdim=True) > 0
            if kind == KL:
                r = rows.softmax(1)
                labels = torch.multinomial(r, 1, generator=generator)
                r = r.scatter_add(1, labels, torch.full_like(labels, -1, dtype=r.dtype))
            else:
                size = rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
                unit = rows / size
                r = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
                r = (r - (r * unit).sum(1, keepdim=True) * unit) / size
            found.append((torch.where(keep, r, 0.0) / (counted * keep.sum()).clamp_min(1).sqrt()).reshape(y.shape))
        return found
