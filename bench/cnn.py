"""The image classifiers: EfficientNet-lite0 and ResNet-50 at batch 1 and 8, eager against inductor and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from planish import models
from planish.bench import limits
from planish.bench.contest import compile_twice, contest
from planish.bench.kernels import kernel_rows, with_shares
from planish.bench.latency import MIN_ROUNDS
from planish.bench.result import BenchResult, KernelRow, Row

MODELS = ("efficientnet-lite0", "resnet50")
BATCHES = (1, 8)
IMAGES = 8
"""Images of a round, at every batch size; the outputs are compared on all 20."""


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        threads: of torch, inductor, the compiled model and the limits.
        rounds: timed rounds over all images.
    """

    threads: int
    rounds: int = 11

    def __post_init__(self) -> None:
        if self.rounds < MIN_ROUNDS:
            raise ValueError(f"rounds is {self.rounds}: an interval needs at least {MIN_ROUNDS}")


def run(options: Options, compile_model: Callable[..., Any], log: Callable[[str], None]) -> BenchResult:
    """Run the benchmark; a row's name is contender, model and batch.

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
    extra: dict[str, Any] = {"accuracy": {}, "compile": {}, "inductor": {}}
    with torch.inference_mode(), limits.probe(options.threads) as probe:
        before = limits.measure(probe)
        for name in MODELS:
            loaded = models.load(name)
            log(f"compiling {name}, twice")
            compiled, extra["compile"][name] = compile_twice(compile_model, loaded)
            everything = loaded.data.batches(20, 8)
            extra["accuracy"][name] = _distance(loaded, compiled, everything)
            for batch in BATCHES:
                label = f"{name} x{batch}"
                log(f"{label}:")
                found = contest(loaded, compiled, loaded.data.batches(IMAGES, batch), options.rounds, log)
                own = {"model": name, "batch": batch}
                rows += [replace(r, name=f"{r.name} {label}", extra={**r.extra, **own}) for r in found.rows]
                absent += [{**a, "name": f"{a['name']} {label}"} for a in found.absent]
                extra["inductor"][label] = found.mode
            log(f"each kernel of {name} alone")
            kernels += kernel_rows(compiled, [loaded.data.batches(n, n)[0] for n in BATCHES], repeats=5)
        found_limits = limits.combine(before, limits.measure(probe))
    return BenchResult(
        "cnn", options.threads, found_limits, rows, with_shares(kernels, found_limits["fma_gflops"]), absent, extra
    )


def _distance(loaded: models.LoadedModel, compiled: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The compiled model's scores against eager's on all images."""
    reference = [loaded.model(**b) for b in batches]
    return loaded.metric.compare(reference, [compiled(**b) for b in batches], batches)
