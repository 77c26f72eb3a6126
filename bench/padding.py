"""The padding benchmark: MiniLM on padded batches, with and without computing on the padding.

A round is one pass over a set's batches. Making the batches, and sorting them where a contender does, is not timed, as
tokenising is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from planish import models
from planish.bench import MIN_ROUNDS, limits, nested
from planish.bench.builds import PACKED, PADDED, REMOVES_PADDING, compile_padded
from planish.bench.expected import Expected, expect, kappa
from planish.bench.inductor import run_all
from planish.bench.kernels import kernel_rows, with_shares
from planish.bench.latency import interleave, speedup
from planish.bench.padded import PaddedSet, fill_set, sort_by_length, uniform_set
from planish.bench.peer import CTRANSLATE2, SETTLE, Peer, ctranslate2
from planish.bench.quality import correlation, outputs
from planish.bench.result import BenchResult, KernelRow, Row, make_row
from planish.errors import NumericError
from planish.models.base import Batch, LoadedModel
from planish.passes import REGISTRY

TOLERANCE = 1e-4
"""Largest difference from eager at a valid position, and of the correlation with the ratings."""

SORTED_EAGER, SORTED_PADDED = "eager-sorted", f"{PADDED}-sorted"
"""The cheap way to have less padding: sort by length, pad to each batch's longest row."""


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        threads: of torch, the compiled models, CTranslate2 and the limits.
        rounds: timed rounds over a set's batches.
        lengths: padded lengths of the synthetic sets.
        fills: shares of valid tokens; a batch for each of them and each length.
        rows: rows of a batch.
        docs: documents, and rows of a uniform set.
        max_len: tokens per document at most.
        model: a BERT of ``planish.models`` with documents.
    """

    threads: int
    rounds: int = 11
    lengths: tuple[int, ...] = (128, 256, 512)
    fills: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    rows: int = 16
    docs: int = 64
    max_len: int = 256
    model: str = "minilm"

    def __post_init__(self) -> None:
        if self.rounds < MIN_ROUNDS:
            raise ValueError(f"rounds is {self.rounds}: an interval needs at least {MIN_ROUNDS}")


@dataclass(frozen=True)
class Contender:
    """One side: ``run`` is a round, ``outputs`` its token states laid out as the set's own batches."""

    run: Callable[[], None]
    outputs: Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class Field:
    """The models that take part in every set, ready to call."""

    loaded: LoadedModel
    padded: Any
    packed: Any
    nested: nested.NestedEncoder
    peer: Peer | str

    def contenders(self, batches: Sequence[Batch]) -> dict[str, Contender]:
        """Who takes part on these batches; our packed build, which is compared with all others, comes last."""
        eager = self.loaded.model
        found = {
            "eager": self._plain(eager, batches),
            nested.NESTED: self._plain(self.nested, batches),
            PADDED: self._plain(self.padded, batches),
        }
        if len(batches) > 1:
            found |= {SORTED_EAGER: self._sorted(eager, batches), SORTED_PADDED: self._sorted(self.padded, batches)}
        if isinstance(self.peer, Peer):
            self.peer.load(batches)
            found[CTRANSLATE2] = Contender(self.peer.run, self.peer.outputs)
        return {**found, PACKED: self._plain(self.packed, batches)}

    def _plain(self, call: Callable[..., Any], batches: Sequence[Batch]) -> Contender:
        return Contender(run_all(call, batches), lambda: outputs(call, batches, self.loaded.metric))

    def _sorted(self, call: Callable[..., Any], batches: Sequence[Batch]) -> Contender:
        made = sort_by_length(batches)
        return Contender(
            run_all(call, made.batches),
            lambda: made.restore(outputs(call, made.batches, self.loaded.metric), batches),
        )


def run(options: Options, compile_model: Callable[..., Any], log: Callable[[str], None]) -> BenchResult:
    """Run the benchmark; a row's name is contender and set.

    Args:
        options: what to run.
        compile_model: ``planish.compile``.
        log: told the name of each phase.

    Raises:
        PlanishError: the model does not compile, a package or tool is missing, or a contender's outputs are not
            eager's: a time of wrong values is no result.
    """
    torch.set_num_threads(options.threads)
    loaded = models.load(options.model)
    rows: list[Row] = []
    kernels: list[KernelRow] = []
    summary: list[dict[str, Any]] = []
    with (
        torch.inference_mode(),
        limits.probe(options.threads) as probe,
        ctranslate2(loaded, options.threads) as peer,
    ):
        log(f"compiling {options.model}, with and without {REMOVES_PADDING}")
        before = limits.measure(probe)
        sets = _sets(options, loaded)
        packed = compile_model(loaded.model, loaded.inputs, dynamic=loaded.dynamic)
        padded = compile_padded(compile_model, loaded)
        field = Field(loaded, padded, packed, nested.build(loaded.model, sets[0].batches[0]), peer)
        ratios: dict[tuple[int, ...], float] = {}
        for chosen in sets:
            shape = tuple(chosen.shapes[0])
            if shape not in ratios:
                log(f"the kernels at {shape[0]} x {shape[1]}, each alone")
                timed = kernel_rows(padded, chosen.batches[:1], repeats=5)
                ratios[shape] = kappa(timed)
                kernels += timed
            log(f"{chosen.label}: {options.rounds} interleaved rounds")
            found, times = _measure(field, chosen, options.rounds)
            rows += found
            summary.append(_summary(chosen, _expected(loaded, chosen, ratios[shape]), times, peer))
        log("correlation with human ratings")
        correlation = _correlations(loaded, {"eager": loaded.model, PADDED: padded, PACKED: packed}, options)
        found_limits = limits.combine(before, limits.measure(probe))
    extra = {"removes_padding": REMOVES_PADDING in REGISTRY, "sets": summary, "lee_pearson": correlation}
    absent = [{"name": CTRANSLATE2, "reason": peer}] if isinstance(peer, str) else []
    shares = with_shares(kernels, found_limits["fma_gflops"])
    return BenchResult("padding", options.threads, found_limits, rows, shares, absent, extra)


def _sets(options: Options, loaded: LoadedModel) -> list[PaddedSet]:
    """The batches: for each length every fill and the uniform lengths, then the documents."""
    made: list[PaddedSet] = []
    for seq in options.lengths:
        made += [fill_set(options.rows, seq, fill) for fill in options.fills]
        made.append(uniform_set(options.docs, options.rows, seq))
    documents = loaded.data.batches(options.docs, options.rows, options.max_len)
    return [*made, PaddedSet("documents", documents)]


def _measure(field: Field, chosen: PaddedSet, rounds: int) -> tuple[list[Row], dict[str, list[float]]]:
    """The rows of one set, and every contender's milliseconds per round."""
    contenders = field.contenders(chosen.batches)
    pause = SETTLE if isinstance(field.peer, Peer) else 0.0
    times = interleave({name: c.run for name, c in contenders.items()}, rounds, pause=pause)
    metric = field.loaded.metric
    reference = contenders["eager"].outputs()
    rows: list[Row] = []
    for name, contender in contenders.items():
        quality = metric.compare(reference, contender.outputs(), chosen.batches)
        if quality["max_abs"] > TOLERANCE:
            raise NumericError(f"{name} differs from eager by {quality['max_abs']:.1e} on {chosen.label!r}")
        versus = [other for other in contenders if other not in ("eager", name)] if name == PACKED else []
        row = make_row(name, times, quality, versus)
        rows.append(replace(row, name=f"{name} {chosen.label}", extra={**row.extra, "set": chosen.label}))
    return rows, times


def _expected(loaded: LoadedModel, chosen: PaddedSet, ratio: float) -> Expected:
    model: Any = loaded.model
    padded = [seq for rows, seq in chosen.shapes for _ in range(rows)]
    return expect(chosen.lengths, padded, model.config.hidden_size, ratio)


def _summary(
    chosen: PaddedSet, expected: Expected, times: Mapping[str, Sequence[float]], peer: Peer | str
) -> dict[str, Any]:
    """A set's entry in ``sets``: what the formula promises over the padded build, and what was measured.

    ``measured`` is the padded build's time over the packed one's; 1 / measured - 1 is what the packed build loses where
    nothing is padding.
    """
    measured = speedup(times[PADDED], times[PACKED])
    return {
        "set": chosen.label,
        "batches": chosen.shapes,
        "tokens": sum(chosen.lengths),
        **asdict(expected),
        "measured": measured.value,
        "measured_ci95": [measured.low, measured.high],
        "measured_to_expected": measured.value / expected.speedup,
        "claim": measured.claim(PADDED),
        "ctranslate2": peer.mode if isinstance(peer, Peer) else None,
    }


def _correlations(loaded: LoadedModel, calls: Mapping[str, Callable[..., Any]], options: Options) -> dict[str, float]:
    """Pearson correlation of the embeddings' cosines with human ratings of 1,225 pairs, for each contender.

    Raises:
        NumericError: one is not eager's.
    """
    found: dict[str, float] = {}
    for name, call in calls.items():
        states = partial(outputs, call, metric=loaded.metric)
        found[name] = correlation(loaded, states, options.rows, options.max_len)
        if abs(found[name] - found["eager"]) > TOLERANCE:
            raise NumericError(f"{name}: correlation {found[name]:.6f} with the ratings, eager {found['eager']:.6f}")
    return found
