"""quantize-mixed: every layer in the format that a budget, measured sensitivities and an integer program give it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import ClassVar

from planish.budget import Budget
from planish.errors import BudgetError, CalibrationError
from planish.passes.precision.cache import load_scores, save_scores, scores_file
from planish.passes.precision.calibration import Channels
from planish.passes.precision.choice import allowed_treatments, choose, explain
from planish.passes.precision.columns import options
from planish.passes.precision.loss import Loss
from planish.passes.precision.rewrite import Rewriter
from planish.passes.precision.sensitivity import (
    MEASURED_SAMPLES,
    NOTHING,
    Sample,
    Scores,
    halve,
    measure,
    probe,
    refine,
    split,
)
from planish.passes.precision.simulation import Simulation
from planish.passes.precision.sites import Site, find_sites
from planish.passes.precision.swaps import selection, swap
from planish.pipeline import Note, Pass, Result
from planish.program import Program
from planish.rules import remove_dead
from planish.targets import Target


@dataclass(frozen=True)
class QuantizeMixed(Pass):
    """Store the weights of layers as integer codes, each in the format that an integer program gives it.

    before: ``h = linear(x, w1); y = linear(gelu(h), w2)``
    after:  ``h = planish.quantized_linear(x, ..., "w8a8"); y = planish.quantized_linear(gelu(h), ..., "w4a8-g32")``

    Attributes:
        budget: what the assignment may cost; None to leave what is not pinned in fp32.
        pin: pairs of a layer's name, or the beginning of some layers' names, and their format; ``"fp"`` for fp32.
        menu: formats of linear layers that are tried; empty for ``MENU``, and ``WITH_OUTLIERS`` where they help.
        measure: ``"kl"`` or ``"cosine"``; empty for KL where an output is a linear layer's, logits, else the cosine.
        deadline: seconds that probing may take, and then solving.
        seed: of the probes.
        cache: keep scores for later compiles of the same model with the same data, and use those that were kept.
        executor: where weights are rounded, layers probed and measured, and sizes solved for, such as Dask's
            ``client.get_executor()``; None for here. The assignment is the same.
    """

    budget: Budget | None = None
    pin: tuple[tuple[str, str], ...] = ()
    menu: tuple[str, ...] = ()
    measure: str = ""
    deadline: float = 600.0
    seed: int = 0
    cache: bool = True
    executor: Executor | None = field(default=None, compare=False, repr=False)

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
        batches = len(self.program.calibration)
        halve(self.program)
        sites, channels = find_sites(self.program, QuantizeMixed.name, self.result, self.options.menu, self.options.pin)
        if not sites:
            raise BudgetError(
                "no layer can be on codes", why="; ".join(r.reason for r in self.result.refusals) or "there is none"
            )
        self._say_halves(sites, channels)
        allowed = allowed_treatments(sites, self.options.pin, searched=self.options.budget is not None)
        loss, samples = Loss.of(self.program, self.options.measure or None), split(self.program)
        open_sites = [
            replace(s, treatments=tuple(t for t in a if t.format)) for s, a in zip(sites, allowed, strict=True)
        ]
        simulation = Simulation.of(self.program, open_sites, [s.half for s in samples], self.options.executor)
        probed, kept = selection(samples)
        scores = NOTHING if self.options.budget is None else self._score(simulation, open_sites, loss, probed)
        by_site = [
            options(i, site, channels[i], batches, scores, allowed[i], self.target) for i, site in enumerate(sites)
        ]
        found = choose(sites, by_site, scores, self.options.budget, self.options.deadline, self.options.executor)
        solution, swaps = swap(found.blocks, found.solution, found.minimised, found.limits, simulation, loss, kept)
        found = replace(found, solution=solution)
        self.result.notes += [Note.at(QuantizeMixed.name, sites[0].layers[0].node, text) for text in swaps]
        measured = measure(simulation, dict(enumerate(found.treatments)), loss, samples[:MEASURED_SAMPLES])
        chosen, table = explain(sites, by_site, scores, found, loss, measured), self.target.costs
        self.program.assignment = replace(chosen, processor=table.machine.processor if table else "")
        rewriter = Rewriter(self.program, QuantizeMixed.name, self.result)
        for site, treatment in zip(sites, found.treatments, strict=True):
            if treatment.format is not None:
                rewriter.quantise_all([la.node for la in site.layers], treatment.format, site.operands[treatment])

    def _score(self, simulation: Simulation, sites: Sequence[Site], loss: Loss, samples: Sequence[Sample]) -> Scores:
        """Scores of the treatments: kept ones, or by probing and measuring."""
        file = scores_file(self.program, sites, loss, self.options.seed)
        scores = load_scores(file) if self.options.cache else None
        was_kept = scores is not None
        if scores is None:
            deadline, executor = self.options.deadline, self.options.executor
            scores = probe(simulation, loss, samples, deadline=deadline, seed=self.options.seed, executor=executor)
            left = deadline - scores.seconds
            scores = refine(scores, simulation, sites, loss, samples, deadline=left, executor=executor)
            if self.options.cache and scores.complete and scores.measured:
                save_scores(file, scores)
        self._say_scores(sites, scores, len(samples), was_kept)
        return scores

    def _say_halves(self, sites: Sequence[Site], channels: Sequence[Channels]) -> None:
        """Where no other data can judge a layer's codes."""
        for site, seen in zip(sites, channels, strict=True):
            if seen.moments is not None and seen.rows and not all(seen.counts):
                text = "its codes are judged by the inputs they know, as every other batch has none: losses seem less"
                self.result.notes.append(Note.at(QuantizeMixed.name, site.layers[0].node, text))

    def _say_scores(self, sites: Sequence[Site], scores: Scores, wanted: int, was_kept: bool) -> None:
        """What the assignment's figures rest on."""
        ended = "" if scores.complete else f": the deadline of {self.options.deadline:g} s ended it"
        text = f"{len(scores.sums)} scores from {scores.samples} of {wanted} inputs{ended}"
        text += (
            f", {len(scores.measured)} of them measured directly{', kept from an earlier compile' if was_kept else ''}"
        )
        self.result.notes.append(Note.at(QuantizeMixed.name, sites[0].layers[0].node, text))
