"""Benchmarks of several models at batch 1 and 8: eager against inductor and compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from planish import models
from planish.bench import MIN_ROUNDS, limits
from planish.bench.builds import compile_images, compile_twice
from planish.bench.contest import COMPILED, contest
from planish.bench.kernels import kernel_rows, with_shares
from planish.bench.result import BenchResult, KernelRow, Row
from planish.errors import UnknownNameError

SUITES: Mapping[str, tuple[str, ...]] = {
    "cnn": ("efficientnet-lite0", "resnet50"),
    "families-real": tuple(row.name for row in models.MODELS.values() if row.module == "planish.models.shapes"),
}
"""Name of a benchmark to its models."""

ON_CODES = ("efficientnet-lite0",)
"""Models that are also built on 8-bit codes."""

BATCHES = (1, 8)
DOCUMENTS = 8
"""Images or texts of a round, at every batch size."""

COMPARED = 20
"""Images or texts that the compiled model's outputs are compared with eager's on."""


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        suite: a key of ``SUITES``.
        threads: of torch, inductor, the compiled model and the limits.
        rounds: timed rounds over all documents.
        only: models of the suite to run; all if empty.
    """

    suite: str
    threads: int
    rounds: int = 11
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rounds < MIN_ROUNDS:
            raise ValueError(f"rounds is {self.rounds}: an interval needs at least {MIN_ROUNDS}")
        for name in self.only:
            if name not in SUITES[self.suite]:
                raise UnknownNameError(
                    f"benchmark {self.suite!r} has no model {name!r}",
                    fix="use some of: " + ",".join(SUITES[self.suite]),
                )


def run(options: Options, compile_model: Callable[..., Any], log: Callable[[str], None]) -> BenchResult:
    """Run the benchmark; a row's name is contender, model and batch, a kernel's is kernel and model.

    Args:
        options: what to run.
        compile_model: ``planish.compile``.
        log: told the name of each phase.

    Raises:
        PlanishError: a model does not compile, a package or tool is missing, or outputs are not finite.
    """
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    kernels: list[KernelRow] = []
    absent: list[dict[str, str]] = []
    extra: dict[str, Any] = {"compared": COMPARED, "accuracy": {}, "compile": {}, "inductor": {}}
    with torch.inference_mode(), limits.probe(options.threads) as probe:
        before = limits.measure(probe)
        for name in options.only or SUITES[options.suite]:
            loaded = models.load(name)
            log(f"compiling {name}, twice")
            compiled, extra["compile"][name] = compile_twice(compile_model, loaded)
            ours = {COMPILED: compiled}
            if name in ON_CODES:
                log(f"compiling {name} on integer codes")
                ours |= compile_images(compile_model, loaded)
            for build, call in ours.items():
                extra["accuracy"][name if build == COMPILED else f"{name} {build}"] = _distance(loaded, call)
            for batch in BATCHES:
                label = f"{name} x{batch}"
                log(f"{label}:")
                found = contest(loaded, ours, loaded.data.batches(DOCUMENTS, batch), options.rounds, log)
                own = {"model": name, "batch": batch}
                rows += [replace(r, name=f"{r.name} {label}", extra={**r.extra, **own}) for r in found.rows]
                absent += [{**a, "name": f"{a['name']} {label}"} for a in found.absent]
                extra["inductor"][label] = found.mode
            log(f"each kernel of {name} alone")
            timed = kernel_rows(compiled, [loaded.data.batches(n, n)[0] for n in BATCHES], repeats=5)
            kernels += [replace(k, name=f"{k.name} {name}") for k in timed]
        found_limits = limits.combine(before, limits.measure(probe))
    kernels = with_shares(kernels, found_limits["fma_gflops"])
    return BenchResult(options.suite, options.threads, found_limits, rows, kernels, absent, extra)


def _distance(loaded: models.LoadedModel, compiled: Any) -> dict[str, float]:
    """The compiled model's outputs against eager's on ``COMPARED`` documents."""
    batches = loaded.data.batches(COMPARED, max(BATCHES))
    reference, candidate = ([loaded.metric.output(call(**b)) for b in batches] for call in (loaded.model, compiled))
    return loaded.metric.compare(reference, candidate, batches)
