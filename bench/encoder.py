"""The encoder benchmark: MiniLM on real documents, eager against inductor, CTranslate2 and our two builds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from planish import models
from planish.assignment import Assignment
from planish.bench import MIN_ROUNDS, limits, memory, overhead
from planish.bench.builds import (
    MIXED,
    PACKED,
    PADDED,
    calibration_batches,
    compile_integer,
    compile_padded,
    compile_twice,
)
from planish.bench.contest import Contest, contest
from planish.bench.int8_peers import ONNXRUNTIME_INT8, TORCH_INT8, onnxruntime, torch_dynamic
from planish.bench.kernels import gemm_rows, kernel_rows, with_shares
from planish.bench.peer import COMPUTE, Peer, ctranslate2
from planish.bench.quality import correlation
from planish.bench.result import BenchResult, Row
from planish.models.base import Batch, LoadedModel


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        threads: of torch, inductor, the compiled model and the limits.
        rounds: timed rounds over all batches.
        docs: documents, in file order.
        batch: documents per batch.
        max_len: tokens per document at most.
        model: name in ``planish.models``.
    """

    threads: int
    rounds: int = 11
    docs: int = 64
    batch: int = 16
    max_len: int = 256
    model: str = "minilm"

    def __post_init__(self) -> None:
        if self.rounds < MIN_ROUNDS:
            raise ValueError(f"rounds is {self.rounds}: an interval needs at least {MIN_ROUNDS}")


def run(options: Options, compile_model: Callable[..., Any], log: Callable[[str], None]) -> BenchResult:
    """Run the benchmark.

    Args:
        options: what to run.
        compile_model: ``planish.compile``.
        log: told the name of each phase.

    The row that counts is the default build's, which drops padding; the kernels and memory are that build's too.

    Raises:
        PlanishError: the model does not compile, a package or tool is missing, or outputs are not finite.
    """
    torch.set_num_threads(options.threads)
    log("peak memory, in processes of their own")
    peaks = {name: memory.peak(name, options.model, options.threads, options.docs) for name in ("planish", "eager")}
    loaded = models.load(options.model)
    batches = loaded.data.batches(options.docs, options.batch, options.max_len)
    log("other engines' 8-bit builds")
    others: dict[str, Any] = {TORCH_INT8: torch_dynamic(loaded)}
    others[ONNXRUNTIME_INT8] = onnxruntime(loaded, options.threads)
    with torch.inference_mode(), limits.probe(options.threads) as probe:
        log(f"compiling {options.model}, twice")
        compiled, compile_times = compile_twice(compile_model, loaded)
        log(f"compiling {options.model} on integer codes")
        ours = {PADDED: compile_padded(compile_model, loaded), PACKED: compiled}
        ours |= compile_integer(compile_model, loaded)
        with ExitStack() as stack:
            for kind in COMPUTE:
                others[kind] = stack.enter_context(ctranslate2(loaded, options.threads, kind))
            found = contest(loaded, ours, batches, options.rounds, log, others)
            rows = [_with_pearson(loaded, row, found, options) for row in found.rows]
        log("the machine's limits, each kernel alone, call overhead")
        limits_before = limits.measure(probe)
        probes = _probe_batches(loaded, batches)
        kernels = gemm_rows(compile_model, loaded.model) + kernel_rows(compiled, probes)
        limits_found = limits.combine(limits_before, limits.measure(probe))
        kernels = with_shares(kernels, limits_found["fma_gflops"])
        extra = {
            "batches": [list(b["input_ids"].shape) for b in batches],
            **compile_times,
            **overhead.call_overhead(compile_model),
            **overhead.after_torch_op(compiled, probes[1]),
            "memory": {**compiled.memory(batches[0]), "peak_rss": peaks},
            "inductor": found.mode,
            "peers": {name: peer.mode for name, peer in others.items() if isinstance(peer, Peer)},
            "predicted_ms": _predicted(loaded, ours[MIXED].assignment, batches, rows),
        }
    return BenchResult("encoder", options.threads, limits_found, rows, kernels, found.absent, extra)


def _with_pearson(loaded: LoadedModel, row: Row, found: Contest, options: Options) -> Row:
    """The row, its quality with the correlation with human ratings."""
    pearson = correlation(loaded, found.states[row.name], options.batch, options.max_len)
    return replace(row, quality={**row.quality, "pearson": pearson})


def _predicted(
    loaded: LoadedModel, assignment: Assignment | None, batches: list[Batch], rows: list[Row]
) -> dict[str, float]:
    """What a round of the mixed build should take, and takes.

    Foretold is the fp32 build's time less what the cost table says that formats save: it is of a calibration batch's
    layers, and as good as linear in the tokens.
    """
    if assignment is None or assignment.ms is None or assignment.ms_fp32 is None:
        return {}
    timed, calibration = (
        sum(int(batch["attention_mask"].sum()) for batch in part) for part in (batches, calibration_batches(loaded))
    )
    calls = timed / (calibration / len(calibration_batches(loaded)))
    took = {row.name: row.ms_median for row in rows}
    foretold = took[PACKED] - (assignment.ms_fp32 - assignment.ms) * calls
    return {"foretold": foretold, "measured": took[MIXED], "ratio": foretold / took[MIXED]}


def _probe_batches(loaded: LoadedModel, batches: list[Batch]) -> list[Batch]:
    """Inputs for the table of kernels: a full batch, 64 tokens, and a row count no tile size divides."""
    small = loaded.data.batches(1, 1, 64)[0]
    ragged = loaded.data.batches(7, 7, 143)[0]
    return [batches[0], small, ragged]
