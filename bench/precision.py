"""How well scores foretell what formats do to a model, and what assignments made from them lose on other data."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planish import models
from planish.bench import nncf_peer
from planish.bench.digits import trained_mobilevit
from planish.bench.result import BenchResult
from planish.capture import capture
from planish.errors import UnknownNameError
from planish.models.base import Batch, LoadedModel
from planish.models.embedding import embed
from planish.passes import QUANTISERS, default_pipeline, resolve
from planish.passes.precision import QuantizeMixed
from planish.passes.precision.codes import held_weights, rounded_weight
from planish.passes.precision.columns import BYTES, LOSS, Option, blocks_of
from planish.passes.precision.loss import Loss
from planish.passes.precision.sensitivity import (
    Sample,
    Scores,
    measure,
    measure_each,
    probe,
    refine,
    split,
)
from planish.passes.precision.simulation import Simulation
from planish.passes.precision.sites import Site, find_sites
from planish.passes.precision.solve import Block, Column, solve
from planish.passes.precision.swaps import swap
from planish.passes.precision.treatment import Treatment
from planish.pipeline import Result, run_pipeline
from planish.targets import Target

WEIGHTS = ("w8", "w6-g32", "w5-g32", "w4-g32", "w4-g128", "w3-g32", "w3-g128", "w2-g32")
"""Formats of weights alone: activations stay fp32, so that what is compared are the scores of weights."""

GPTQ = ", GPTQ"
"""Ends the names of rows whose codes make up for each other's errors; the codes of others are the nearest ones."""

UNIFORM = ("w3-g32", "w4-g128", "w4-g32", "w5-g32")
"""Formats that all layers get, to compare."""

BITS = (3.0, 4.0, 4.5)
"""Bytes of the assignments, as bits of a weight with scales."""

OF_IMAGES = ("w4-g32", "w5-g32")
"""The same for models with convolutions, which have formats of their own."""

BITS_OF_IMAGES = (5.0, 6.0)

FEWEST = 5
"""Measured treatments that a figure of agreement is made from."""

MANY_BITS = 4
"""Treatments of so many bits are those of which a score should be right by a tenth."""

SEEDS = 3


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        threads: of PyTorch.
        rounds: seeds: of the probes and of the choice of inputs.
        only: names of ``SUBJECTS``; empty for all.
    """

    threads: int
    rounds: int = SEEDS
    only: tuple[str, ...] = ()


class Embedder(torch.nn.Module):
    """An encoder with the mean over its tokens: ids and mask [batch, seq] to embeddings [batch, width]."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Any, attention_mask: Any) -> torch.Tensor:
        """Of length 1."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return embed(hidden, attention_mask)


@dataclass(frozen=True)
class Subject:
    """A model whose layers are scored.

    Attributes:
        inputs: that scores are made from; swaps are decided by half as many others, assignments judged by as many more.
        max_len: of documents, in tokens.
        uniform: formats that all layers get, depthwise convolutions 8 bits.
        bits: sizes of assignments; empty for those of the uniform formats.
        every: one in so many sites is measured directly; where that is not all, no assignment is made from that.
    """

    inputs: int
    max_len: int
    uniform: tuple[str, ...] = UNIFORM
    bits: tuple[float, ...] = BITS
    every: int = 1


SUBJECTS = {
    "minilm": Subject(32, 256),
    "smollm2": Subject(8, 128, ("w3-g128", "w3-g32", "w4-g32"), (), every=10),
    "efficientnet-lite0": Subject(8, 0, OF_IMAGES, BITS_OF_IMAGES),  # there are 20 images
    "mobilevit-digits": Subject(32, 0, OF_IMAGES, BITS_OF_IMAGES),
}


@dataclass(frozen=True)
class Case:
    """A model's sites, with inputs to score them by, others to decide swaps by and others to judge by."""

    subject: Subject
    simulation: Simulation
    sites: Sequence[Site]
    loss: Loss
    samples: Sequence[Sample]
    selection: Sequence[Sample]
    held_out: Sequence[Sample]


def run(options: Options, compile_model: Callable[..., Any], log: Callable[[str], None]) -> BenchResult:
    """Run the benchmark.

    Args:
        options: what to run.
        compile_model: not used: scores and losses are of PyTorch's arithmetic.
        log: told the name of each phase.

    Raises:
        UnknownNameError: a name is not in ``SUBJECTS``.
    """
    torch.set_num_threads(options.threads)
    if unknown := [name for name in options.only if name not in SUBJECTS]:
        raise UnknownNameError(f"no model {unknown[0]!r} to score", fix="use some of: " + ", ".join(SUBJECTS))
    rows, scorers = list[dict[str, Any]](), list[dict[str, Any]]()
    for name in options.only or SUBJECTS:
        loaded = trained_mobilevit() if name == "mobilevit-digits" else models.load(name)
        for seed in range(options.rounds):
            facts = {"model": name, "seed": seed}
            log(f"{name}, seed {seed}: scores")
            case = _case(loaded, SUBJECTS[name], seed)
            found = _scorers(case, seed)
            direct = _direct(case)
            of_one = [{"scorer": o.name, "seconds": o.seconds, **_agreement(o, direct)} for o in (*found, direct)]
            scorers += [facts | row for row in of_one]
            found += [direct] if case.subject.every == 1 else []
            log(f"{name}, seed {seed}: assignments on other inputs")
            rows += [facts | row for row in _assignments(case, found, "")]
            peers = list[dict[str, Any]]()
            if name == "minilm" and nncf_peer.is_installed():
                log(f"{name}, seed {seed}: assignments by NNCF")
                peers = nncf_peer.assignments(_module(loaded), case.samples, case.held_out, case.loss)
            log(f"{name}, seed {seed}: the same with codes by GPTQ")
            case = _case(loaded, SUBJECTS[name], seed, compensate=True)
            rows += [facts | r for r in _assignments(case, _scorers(case, seed), GPTQ, [p["bits"] for p in peers])]
            rows += [facts | row for row in peers]
    extra = {"scorers": scorers, "assignments": rows, "formats": list(WEIGHTS)}
    return BenchResult("precision", options.threads, {}, [], [], [], extra)


def _case(loaded: LoadedModel, subject: Subject, seed: int, *, compensate: bool = False) -> Case:
    """A model's sites, and two sets of inputs drawn by the seed; codes are plainly rounded unless ``compensate``."""
    inputs = loaded.data.batches(300, 1, subject.max_len)
    random.Random(seed).shuffle(inputs)
    ends = (0, subject.inputs, subject.inputs + subject.inputs // 2, 2 * subject.inputs + subject.inputs // 2)
    parts = [inputs[start:end] for start, end in itertools.pairwise(ends)]
    program, _ = capture(_module(loaded), loaded.inputs, loaded.dynamic)
    passes = default_pipeline(QuantizeMixed())
    before = resolve(passes[: [getattr(p, "name", p) in QUANTISERS for p in passes].index(True)])
    program, _ = run_pipeline(program, before, Target.host())
    names = [spec.name for spec in program.inputs]
    program.calibration, selection, held_out = (tuple(_flat(names, part)) for part in parts)
    sites, _ = find_sites(program, QuantizeMixed.name, Result(), WEIGHTS)
    if not compensate:
        for site in sites:
            for operand in site.operands.values():
                operand.channels.moments = None
    samples = split(program)
    simulation = Simulation.of(program, sites, [None, *(s.half for s in samples)])
    others = [[Sample(tensors) for tensors in part] for part in (selection, held_out)]
    return Case(subject, simulation, sites, Loss.of(program), samples, *others)


def _module(loaded: LoadedModel) -> torch.nn.Module:
    """What is scored: of an encoder, the mean over its tokens."""
    return Embedder(loaded.model).eval() if loaded.name == "minilm" else loaded.model


def _flat(names: Sequence[str], batches: Sequence[Batch]) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(batch[name] for name in names) for batch in batches]


Losses = Mapping[tuple[int, Treatment], float]


@dataclass(frozen=True)
class Scorer:
    """A way to foretell losses.

    Attributes:
        name: in the tables.
        losses: of each site and treatment alone.
        seconds: that it took; None where that is next to nothing.
        scores: with what sites do to each other, where that is to count.
        swaps: whether the assignment is improved by measured ones.
    """

    name: str
    losses: Losses
    seconds: float | None
    scores: Scores | None = None
    swaps: bool = False


def _scorers(case: Case, seed: int) -> list[Scorer]:
    """Those that do not measure everything; the last one does what ``quantize-mixed`` does."""
    plain = probe(case.simulation, case.loss, case.samples, seed=seed)
    weights = {(i, t): _weight_error(site, t) for i, site in enumerate(case.sites) for t in site.treatments}
    found = [
        Scorer("weight error", weights, None),
        Scorer("diagonal Fisher", plain.diagonal, plain.seconds),
        Scorer("Gauss-Newton", _losses(plain), plain.seconds),
    ]
    if case.subject.every > 1:  # too large a model to measure much of it
        return [*found, Scorer("Gauss-Newton, pairs, swaps", _losses(plain), plain.seconds, plain, swaps=True)]
    refined = refine(plain, case.simulation, case.sites, case.loss, case.samples)
    return [
        *found,
        Scorer("Gauss-Newton, refined", _losses(refined), refined.seconds),
        Scorer("Gauss-Newton, refined, pairs, swaps", _losses(refined), refined.seconds, refined, swaps=True),
    ]


def _direct(case: Case) -> Scorer:
    """What measuring finds, of one in so many sites."""
    start = time.perf_counter()
    keys = [(i, t) for i, site in enumerate(case.sites) if i % case.subject.every == 0 for t in site.treatments]
    losses = measure_each(case.simulation, case.loss, case.samples, keys)
    return Scorer("direct", losses, time.perf_counter() - start)


def _losses(scores: Scores) -> Losses:
    return {key: scores.loss(*key) for key in scores.sums}


def _weight_error(site: Site, treatment: Treatment) -> float:
    assert treatment.format is not None
    operand, total = site.operands[treatment], 0.0
    for layer in site.layers:
        ((held,),) = held_weights([layer], [(treatment.format, operand)])
        rounded = rounded_weight(layer, held, operand)
        total += float((rounded - layer.weight).square().sum())
    return total


def _agreement(scorer: Scorer, measured: Scorer) -> dict[str, Any]:
    """Rank correlation with what was measured, within each format and over all, and the median ratio to it."""
    direct = measured.losses
    from scipy.stats import spearmanr  # pyright: ignore

    def rank(keys: Sequence[tuple[int, Treatment]]) -> float:
        return float(spearmanr([scorer.losses[k] for k in keys], [direct[k] for k in keys]).statistic)

    by_form: dict[str, list[tuple[int, Treatment]]] = {}
    for key in direct:
        by_form.setdefault(key[1].name, []).append(key)
    within = {form: rank(keys) for form, keys in by_form.items() if len(keys) >= FEWEST}
    many = [k for k in direct if k[1].format is not None and k[1].format.weight.bits >= MANY_BITS]
    ratio = statistics.median(scorer.losses[k] / direct[k] for k in many) if len(many) >= FEWEST else None
    return {"spearman": rank(list(direct)), "spearman_within": within, "ratio_at_many_bits": ratio}


def _assignments(
    case: Case, scorers: Sequence[Scorer], suffix: str, more: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """For each scorer and size the assignment's loss on the other inputs, and that of one format for all.

    ``suffix`` ends the names of rows; ``more`` are sizes of peers' assignments, in bits of a weight.
    """
    weights = sum(layer.weight.numel() for site in case.sites for layer in site.layers)
    rows: list[dict[str, Any]] = []
    for form in case.subject.uniform:
        everywhere = {i: _like(site, Treatment.parse(form)) for i, site in enumerate(case.sites)}
        nbytes = sum(_nbytes(site, everywhere[i]) for i, site in enumerate(case.sites))
        loss = measure(case.simulation, everywhere, case.loss, case.held_out)
        rows.append({"scorer": f"uniform {form}{suffix}", "bits": 8 * nbytes / weights, "held_out": loss})
    sizes = sorted({*(case.subject.bits or (row["bits"] for row in rows)), *more})
    for scorer in scorers:
        blocks = _blocks(case, scorer)
        for bits in sizes:
            limits = {BYTES: bits / 8 * weights + 0.5}
            found = solve(blocks, LOSS, limits)
            if scorer.swaps:
                found, _ = swap(blocks, found, LOSS, limits, case.simulation, case.loss, case.selection)
            names = [name for column in found.chosen for name in column.choices]
            chosen = {i: Treatment.parse(name) for i, name in enumerate(names)}
            loss = measure(case.simulation, chosen, case.loss, case.held_out)
            rows.append(
                {
                    "scorer": scorer.name + suffix,
                    "bits": bits,
                    "predicted": found.value if scorer.seconds is not None else None,
                    "held_out": loss,
                    "gap": found.gap,
                    "seconds": found.seconds,
                }
            )
    return rows


def _like(site: Site, wanted: Treatment) -> Treatment:
    """The site's treatment whose weights have a format; its first, of 8 bits, where it has none such."""
    return next(
        (t for t in site.treatments if t.format and t.format.weight == wanted.format.weight), site.treatments[0]
    )  # pyright: ignore


def _blocks(case: Case, scorer: Scorer) -> list[Block]:
    """The program's columns: each site by itself, or with what sites do to each other."""
    by_site = [
        [Option(t, {LOSS: scorer.losses[i, t], BYTES: _nbytes(site, t)}) for t in site.treatments]
        for i, site in enumerate(case.sites)
    ]
    if scorer.scores is not None:
        return blocks_of(case.sites, by_site, scorer.scores, (LOSS, BYTES))
    return [
        Block((site.name,), tuple(Column((o.treatment.name,), o.costs) for o in options))
        for site, options in zip(case.sites, by_site, strict=True)
    ]


def _nbytes(site: Site, treatment: Treatment) -> int:
    return sum(treatment.nbytes(*layer.weight.shape) for layer in site.layers)
