"""quantize-mixed: every layer in the format that a budget, measured sensitivities and an integer program give it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx

from planish.budget import Budget
from planish.conv_ops import CONVOLUTION_LAST
from planish.errors import BudgetError, CalibrationError
from planish.passes.precision.calibration import Channels, observe
from planish.passes.precision.choice import allowed_treatments, choose, explain
from planish.passes.precision.columns import options
from planish.passes.precision.layer import Layer, layers, reason
from planish.passes.precision.loss import Loss
from planish.passes.precision.operand import Operand
from planish.passes.precision.rewrite import NOTABLE, Rewriter
from planish.passes.precision.sensitivity import MEASURED_SAMPLES, Scores, Site, measure, score, split
from planish.passes.precision.treatment import Treatment
from planish.pipeline import Note, Pass, Refusal, Result
from planish.program import Program
from planish.rules import remove_dead
from planish.targets import Target

MENU = ("w8a8", "w6a8-g32", "w5a8-g32", "w4a8-g32", "w4a8-g128", "w3a8-g32", "w2a8-g32")
"""Formats of linear layers that are tried."""

WITH_OUTLIERS = ("w8a8+8", "w4a8-g32+8")
"""Tried too where the input has a channel ``NOTABLE`` times as large as the median."""

CONVOLUTIONS = ("w8a8-static",)
"""Of convolutions: all positions of a window share a scale."""


@dataclass(frozen=True)
class QuantizeMixed(Pass):
    """Store the weights of layers as integer codes, each in the format that an integer program gives it.

    before: ``h = linear(x, w1); y = linear(gelu(h), w2)``
    after:  ``h = planish.quantized_linear(x, ..., "w8a8"); y = planish.quantized_linear(gelu(h), ..., "w4a8-g32")``

    Attributes:
        budget: what the assignment may cost; None where every layer is pinned.
        pin: pairs of a layer's name, or the beginning of some layers' names, and their format; ``"fp"`` for fp32.
        menu: formats of linear layers that are tried; empty for ``MENU``, and ``WITH_OUTLIERS`` where they help.
        measure: ``"kl"`` or ``"cosine"``; empty for KL where an output is a linear layer's, logits, else the cosine.
        deadline: seconds that probing may take, and then solving.
        seed: of the probes.
    """

    budget: Budget | None = None
    pin: tuple[tuple[str, str], ...] = ()
    menu: tuple[str, ...] = ()
    measure: str = ""
    deadline: float = 600.0
    seed: int = 0

    name: ClassVar[str] = "quantize-mixed"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    makes: ClassVar[frozenset[str]] = frozenset({"quantized"})
    tol: ClassVar[float] = float("inf")  # the change is what was asked for: the assignment reports it

    def run(self, program: Program, target: Target) -> Result:
        """Choose formats by the calibration inputs, and rewrite the layers."""
        if not program.calibration:
            raise CalibrationError(
                f"{self.name} needs calibration inputs",
                why="which layers bear few bits is found by running the model on them",
                fix="pass compile(..., calibration=[inputs, ...])",
            )
        if self.budget is None and not self.pin:
            raise BudgetError(f"{self.name} has no budget", fix="pass compile(..., budget=planish.Budget(bits=4.25))")
        work = _Work(program, self, target)
        work.run()
        remove_dead(program.module)
        return work.result


@dataclass
class _Work:
    program: Program
    options: QuantizeMixed
    target: Target
    result: Result = field(default_factory=Result)

    def run(self) -> None:
        """Sites, their scores, the program over them, and the rewriting."""
        nodes = [node for node in layers(self.program) if self._is_eligible(node)]
        channels = observe(self.program, nodes)
        sites = self._sites(nodes, channels)
        allowed = allowed_treatments(sites, self.options.pin)
        loss, samples = Loss.of(self.program, self.options.measure or None), split(self.program)
        searched = [replace(s, treatments=tuple(t for t in a if t.format)) for s, a in zip(sites, allowed, strict=True)]
        scores = score(self.program, searched, loss, samples, deadline=self.options.deadline, seed=self.options.seed)
        self._say_scores(nodes, scores, len(samples))
        batches = len(self.program.calibration)
        by_site = [
            options(i, site, channels[site.layers[0].node], batches, scores, allowed[i], self.target)
            for i, site in enumerate(sites)
        ]
        found = choose(sites, by_site, scores, self.options.budget, self.options.deadline)
        treatments = dict(enumerate(found.treatments))
        measured = measure(self.program, treatments, sites, loss, samples[:MEASURED_SAMPLES])
        self.program.assignment = explain(sites, by_site, scores, found, loss, measured)
        rewriter = Rewriter(self.program, QuantizeMixed.name, self.result)
        for site, treatment in zip(sites, found.treatments, strict=True):
            if treatment.format is not None:
                rewriter.quantise_all([la.node for la in site.layers], treatment.format, site.operands[treatment])

    def _is_eligible(self, node: fx.Node) -> bool:
        if why := reason(self.program, node):
            self.result.refusals.append(Refusal.at(QuantizeMixed.name, node, why))
        return not why

    def _sites(self, nodes: Sequence[fx.Node], channels: Mapping[fx.Node, Channels]) -> list[Site]:
        """Layers that read the same value, with what calibration says of it."""
        together: dict[Any, list[Layer]] = {}
        for node in nodes:
            together.setdefault((node.args[0], node.target), []).append(Layer.of(self.program, node))
        images = any(node.target is CONVOLUTION_LAST for node in nodes)
        sites: list[Site] = []
        for group in together.values():
            seen = channels[group[0].node]
            if not seen.rows:
                self._say(group[0].node, "calibration never reached it: it stays fp32")
            names = self._menu(group[0], seen) if seen.rows else ()
            treatments = tuple(Treatment.parse(name) for name in names)
            weights = torch.cat([layer.by_channel() for layer in group])
            operands = {
                t: Operand.of(seen, weights, t.format, t.outliers, equalise=not images) for t in treatments if t.format
            }
            sites.append(Site(tuple(group), treatments, operands))
        return sites

    def _menu(self, layer: Layer, seen: Channels) -> tuple[str, ...]:
        """Formats that are tried for a layer."""
        if layer.node.target is CONVOLUTION_LAST:
            return CONVOLUTIONS
        if self.options.menu:
            return self.options.menu
        return (*MENU, *(WITH_OUTLIERS if float(seen.against_median().max()) >= NOTABLE else ()))

    def _say(self, node: fx.Node, text: str) -> None:
        self.result.notes.append(Note.at(QuantizeMixed.name, node, text))

    def _say_scores(self, nodes: Sequence[fx.Node], scores: Scores, wanted: int) -> None:
        """What the assignment's figures rest on."""
        if nodes:
            ended = "" if scores.complete else f": the deadline of {self.options.deadline:g} s ended it"
            text = f"{len(scores.sums)} scores from {scores.samples} of {wanted} inputs{ended}"
            measured = f"{len(scores.measured)} of them measured directly"
            self._say(nodes[0], f"{text}, {measured}")
