"""How well scores foretell what formats do to a model, and what assignments made from them lose on other data."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planish import models
from planish.bench.result import BenchResult
from planish.capture import capture
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
    diagonal_fisher,
    measure,
    measure_each,
    probe,
    refine,
    split,
)
from planish.passes.precision.simulation import Simulation
from planish.passes.precision.sites import Site, find_sites
from planish.passes.precision.solve import Block, Column, solve
from planish.passes.precision.treatment import Treatment
from planish.pipeline import Result, run_pipeline
from planish.targets import Target

WEIGHTS = ("w8", "w6-g32", "w5-g32", "w4-g32", "w4-g128", "w3-g32", "w2-g32")
"""Formats of weights alone: activations stay fp32, so that what is compared are the scores of weights."""

COMPENSATED = "Gauss-Newton, GPTQ"

UNIFORM = ("w3-g32", "w4-g128", "w4-g32", "w5-g32")

BITS = (3.0, 4.0, 4.5)
"""Bytes of the assignments, as bits of a weight with scales."""

MANY_BITS = 4
"""Treatments of so many bits are those of which a score should be right by a tenth."""

SEEDS = 3
DOCUMENTS = 48
"""That scores are made from, and as many others that assignments are measured on."""

MAX_LEN = 256


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        threads: of PyTorch.
        rounds: seeds: of the probes and of the choice of documents.
    """

    threads: int
    rounds: int = SEEDS


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
class Case:
    """A model's sites, with inputs to score them by and others to judge by."""

    simulation: Simulation
    sites: Sequence[Site]
    loss: Loss
    samples: Sequence[Sample]
    held_out: Sequence[Sample]


def run(options: Options, compile_model: Callable[..., Any], log: Callable[[str], None]) -> BenchResult:
    """Run the benchmark.

    Args:
        options: what to run.
        compile_model: not used: scores and losses are of PyTorch's arithmetic.
        log: told the name of each phase.
    """
    torch.set_num_threads(options.threads)
    loaded = models.load("minilm")
    rows, scorers = list[dict[str, Any]](), list[dict[str, Any]]()
    for seed in range(options.rounds):
        log(f"minilm, seed {seed}: scores")
        case = _case(loaded, seed)
        found = _scorers(case, seed)
        scorers += [
            {"seed": seed, "scorer": one.name, "seconds": one.seconds, **_agreement(one, found[-1])} for one in found
        ]
        log(f"minilm, seed {seed}: assignments on other documents")
        rows += _assignments(case, found, seed)
        log(f"minilm, seed {seed}: the same with codes by GPTQ")
        case = _case(loaded, seed, compensate=True)
        scores = probe(case.simulation, case.loss, case.samples, seed=seed)
        rows += _assignments(case, [Scorer(COMPENSATED, _losses(scores), scores.seconds, scores)], seed)
    extra = {"scorers": scorers, "assignments": rows, "formats": list(WEIGHTS)}
    return BenchResult("precision", options.threads, {}, [], [], [], extra)


def _case(loaded: LoadedModel, seed: int, *, compensate: bool = False) -> Case:
    """MiniLM's sites, and two sets of documents drawn by the seed; codes are plainly rounded unless ``compensate``."""
    documents = loaded.data.batches(300, 1, MAX_LEN)
    random.Random(seed).shuffle(documents)
    parts = documents[:DOCUMENTS], documents[DOCUMENTS : 2 * DOCUMENTS]
    program, _ = capture(Embedder(loaded.model).eval(), loaded.inputs, loaded.dynamic)
    passes = default_pipeline(QuantizeMixed())
    before = resolve(passes[: [getattr(p, "name", p) in QUANTISERS for p in passes].index(True)])
    program, _ = run_pipeline(program, before, Target.host())
    names = [spec.name for spec in program.inputs]
    program.calibration, others = (tuple(_flat(names, part)) for part in parts)
    sites, _ = find_sites(program, QuantizeMixed.name, Result(), WEIGHTS)
    if not compensate:
        for site in sites:
            for operand in site.operands.values():
                operand.channels.moments = None
    samples = split(program)
    simulation = Simulation.of(program, sites, [None, *(s.half for s in samples)])
    return Case(simulation, sites, Loss.of(program), samples, [Sample(tensors) for tensors in others])


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
        scores: with what sites do to each other, where it knows that.
    """

    name: str
    losses: Losses
    seconds: float | None
    scores: Scores | None = None


def _scorers(case: Case, seed: int) -> list[Scorer]:
    """All of them; the last one measures every treatment directly."""
    data = (case.simulation, case.loss, case.samples)
    plain = probe(*data, seed=seed)
    refined = refine(plain, case.simulation, case.sites, case.loss, case.samples)
    fisher = probe(*data, seed=seed, contract=diagonal_fisher)
    weights = {(i, t): _weight_error(site, t) for i, site in enumerate(case.sites) for t in site.treatments}
    start = time.perf_counter()
    direct = measure_each(*data, list(plain.sums))
    return [
        Scorer("weight error", weights, None),
        Scorer("diagonal Fisher", _losses(fisher), fisher.seconds),
        Scorer("Gauss-Newton", _losses(plain), plain.seconds),
        Scorer("Gauss-Newton, refined", _losses(refined), refined.seconds),
        Scorer("Gauss-Newton, refined, pairs", _losses(refined), refined.seconds, refined),
        Scorer("direct", direct, time.perf_counter() - start),
    ]


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


def _agreement(scorer: Scorer, direct: Scorer) -> dict[str, Any]:
    """Rank correlation with what was measured, within each format and over all, and the median ratio to it."""
    from scipy.stats import spearmanr  # pyright: ignore

    def rank(keys: Sequence[tuple[int, Treatment]]) -> float:
        return float(spearmanr([scorer.losses[k] for k in keys], [direct.losses[k] for k in keys]).statistic)

    keys = list(direct.losses)
    within = {form: rank([k for k in keys if k[1].name == form]) for form in WEIGHTS}
    many = [k for k in keys if k[1].format is not None and k[1].format.weight.bits >= MANY_BITS]
    ratio = statistics.median(scorer.losses[k] / direct.losses[k] for k in many)
    return {"spearman": rank(keys), "spearman_within": within, "ratio_at_many_bits": ratio}


def _assignments(case: Case, scorers: Sequence[Scorer], seed: int) -> list[dict[str, Any]]:
    """For each scorer and size the assignment's loss on the other documents; and that of one format for all."""
    suffix = ", GPTQ" if scorers[0].name == COMPENSATED else ""
    weights = sum(layer.weight.numel() for site in case.sites for layer in site.layers)
    rows: list[dict[str, Any]] = []
    for form in UNIFORM:
        treatment = Treatment.parse(form)
        nbytes = sum(_nbytes(site, treatment) for site in case.sites)
        everywhere = dict.fromkeys(range(len(case.sites)), treatment)
        loss = measure(case.simulation, everywhere, case.loss, case.held_out)
        rows.append({"seed": seed, "scorer": f"uniform {form}{suffix}", "bits": 8 * nbytes / weights, "held_out": loss})
    for scorer in scorers:
        blocks = _blocks(case, scorer)
        for bits in BITS:
            found = solve(blocks, LOSS, {BYTES: bits / 8 * weights})
            names = [name for column in found.chosen for name in column.choices]
            chosen = {i: Treatment.parse(name) for i, name in enumerate(names)}
            loss = measure(case.simulation, chosen, case.loss, case.held_out)
            rows.append(
                {
                    "seed": seed,
                    "scorer": scorer.name,
                    "bits": bits,
                    "predicted": found.value if scorer.losses and scorer.seconds is not None else None,
                    "held_out": loss,
                    "gap": found.gap,
                    "seconds": found.seconds,
                }
            )
    return rows


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
