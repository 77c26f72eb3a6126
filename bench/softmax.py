"""The softmax benchmark: rows of 1K to 16M elements, against eager, inductor, a copy, and our own other schedules."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from planish.bench import MIN_ROUNDS, inductor, limits
from planish.bench.contest import COMPILED
from planish.bench.latency import interleave
from planish.bench.result import BenchResult, Row, make_row
from planish.errors import UnknownNameError
from planish.ops import planish_ops

KINDS: dict[str, Callable[..., torch.Tensor]] = {"softmax": torch.softmax, "log_softmax": torch.log_softmax}

LENGTHS = tuple(1 << bits for bits in range(10, 26, 2))
ELEMENTS = 1 << 20
"""Elements of a tensor at least: shorter rows are several."""

ROUND = 1 << 24
"""Elements of a round at least: a short call is timed several times in a row."""

FORCED = ("three-pass", "two-pass", "two-pass-stream")
MOVED = 8
"""Bytes per element that any softmax moves: x is read once and the result written once."""


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        threads: of torch, inductor, the compiled model and the limits.
        rounds: timed rounds.
        only: kinds to run; all if empty.
    """

    threads: int
    rounds: int = 11
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rounds < MIN_ROUNDS:
            raise ValueError(f"rounds is {self.rounds}: an interval needs at least {MIN_ROUNDS}")
        for name in self.only:
            if name not in KINDS:
                raise UnknownNameError(f"no kind {name!r}", fix="use some of: " + ",".join(KINDS))


class Softmax(torch.nn.Module):
    """One softmax or log_softmax; with a schedule it is our own operator, which other contenders do not know."""

    def __init__(self, kind: str, schedule: str | None = None) -> None:
        super().__init__()
        self.kind, self.schedule = kind, schedule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Over the last axis."""
        if self.schedule is None:
            return KINDS[self.kind](x, -1)
        op: Any = planish_ops.softmax if self.kind == "softmax" else planish_ops.log_softmax
        return op(x, self.schedule, 0)


def run(options: Options, compile_model: Callable[..., Any], log: Callable[[str], None]) -> BenchResult:
    """Run the benchmark; a row's name is contender, kind and shape.

    Args:
        options: what to run.
        compile_model: ``planish.compile``.
        log: told the name of each phase.
    """
    torch.set_num_threads(options.threads)
    _keep_freed_memory()
    rows: list[Row] = []
    absent: list[dict[str, str]] = []
    with torch.inference_mode(), limits.probe(options.threads) as probe:
        before = limits.measure(probe)
        for kind in options.only or KINDS:
            for length in LENGTHS:
                log(f"{kind} of rows of {length}")
                found, missing = contest(kind, length, options.rounds, compile_model)
                rows, absent = rows + found, absent + missing
        measured = limits.combine(before, limits.measure(probe))
    rows = [replace(r, extra={**r.extra, "share_of_read": _share(r, measured["read_gbs"])}) for r in rows]
    extra = {"memory": "freed results are reused on every side: no page faults are timed"}
    return BenchResult("softmax", options.threads, measured, rows, [], absent, extra)


def _share(row: Row, read_gbs: float) -> float:
    """Bytes per ns that a softmax moves at least, over what the machine reads: above 1 where rows stay in a cache."""
    return MOVED / row.extra["ns_per_element"] / read_gbs


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory, as a result of 64 MiB would be fresh pages on every call: 3/4 of its time."""
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


_MMAP_MAX, _TRIM_THRESHOLD = -4, -1


def contest(
    kind: str, length: int, rounds: int, compile_model: Callable[..., Any]
) -> tuple[list[Row], list[dict[str, str]]]:
    """All contenders on rows of one length, interleaved; their error is that against fp64.

    Call it in inference mode.
    """
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(max(1, ELEMENTS // length), length, generator=generator)
    repeats = max(1, ROUND // x.numel())
    batches = [{"x": x}] * repeats
    label = f"{kind} {x.shape[0]}x{length}"
    compiled = compile_model(Softmax(kind).eval(), (x,))
    calls: dict[str, Callable[..., Any]] = {"eager": Softmax(kind), COMPILED: compiled, "copy": _copy}
    calls |= {f"planish {s}": compile_model(Softmax(kind, s).eval(), (x,)) for s in FORCED}
    rival = inductor.build(Softmax(kind), batches)
    if isinstance(rival, inductor.Inductor):
        calls["inductor"] = rival.call
    times = interleave({name: inductor.run_all(call, batches) for name, call in calls.items()}, rounds)
    want = KINDS[kind](x.double(), -1)
    chosen = [note.text.partition(":")[0].partition(",")[0] for step in compiled.steps for note in step.notes]
    rows: list[Row] = []
    for name, call in calls.items():
        quality = {} if name == "copy" else {"max_rel": _error(call(x=x), want)}
        row = make_row(name, times, quality, _versus(name, calls))
        own = {"kind": kind, "shape": list(x.shape), "calls": repeats}
        own |= {"ns_per_element": row.ms_median * 1e6 / repeats / x.numel()}
        own |= {"schedule": chosen[0]} if name == COMPILED and chosen else {}
        rows.append(replace(row, name=f"{name} {label}", extra={**row.extra, **own}))
    absent = [{"name": f"inductor {label}", "reason": rival}] if isinstance(rival, str) else []
    return rows, absent


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def _versus(name: str, calls: dict[str, Any]) -> tuple[str, ...]:
    if name == COMPILED:
        return ("inductor",) if "inductor" in calls else ()
    return (f"planish {FORCED[0]}",) if name.removeprefix("planish ") in FORCED[1:] else ()


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference from fp64, relative to each element."""
    return ((got.double() - want) / want).abs().max().item()
