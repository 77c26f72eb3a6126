"""One compiled model against eager and inductor, interleaved: what every model benchmark does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from planish.bench import inductor
from planish.bench.latency import interleave
from planish.bench.quality import outputs, quality
from planish.bench.result import Row, make_row
from planish.models.base import Batch, LoadedModel

COMPILED = "planish-fp32"


@dataclass(frozen=True)
class Contest:
    """The contenders' rows, and inductor or the reason why there is none."""

    rows: list[Row]
    rival: inductor.Inductor | str

    @property
    def absent(self) -> list[dict[str, str]]:
        """Contenders that could not run, with the reason."""
        return [{"name": "inductor", "reason": self.rival}] if isinstance(self.rival, str) else []

    @property
    def mode(self) -> dict[str, Any] | None:
        """Which of inductor's modes ran, and the times of the trial."""
        rival = self.rival
        return None if isinstance(rival, str) else {"mode": rival.mode, "trial_ms": rival.trial_ms}


def compile_twice(compile_model: Callable[..., Any], loaded: LoadedModel) -> tuple[Any, dict[str, float]]:
    """The compiled model, with the seconds of compiling it (export included) and of doing the same again."""
    seconds: list[float] = []
    compiled = None
    for _ in range(2):
        start = time.perf_counter()
        compiled = compile_model(loaded.model, loaded.inputs, dynamic=loaded.dynamic)
        seconds.append(time.perf_counter() - start)
    return compiled, {"compile_s": seconds[0], "second_compile_s": seconds[1]}


def contest(
    loaded: LoadedModel, compiled: Any, batches: Sequence[Batch], rounds: int, log: Callable[[str], None]
) -> Contest:
    """Time eager, the faster mode of inductor and the compiled model in turn, and compare their outputs with eager's.

    Call it in inference mode.

    Args:
        loaded: the model, with its metric.
        compiled: the compiled model.
        batches: a round is one pass over them.
        rounds: timed rounds.
        log: told the name of each phase.
    """
    log("compiling with inductor, both modes")
    rival = inductor.build(loaded.model, batches)
    log(f"{rounds} interleaved rounds")
    calls: dict[str, Callable[..., Any]] = {"eager": loaded.model}
    if isinstance(rival, inductor.Inductor):
        calls["inductor"] = rival.call
    calls[COMPILED] = compiled
    times = interleave({n: inductor.run_all(c, batches) for n, c in calls.items()}, rounds)
    reference = outputs(loaded.model, batches, loaded.metric)
    qualities = {n: quality(c, reference, batches, loaded.metric) for n, c in calls.items()}
    versus = ("inductor",) if "inductor" in calls else ()
    rows = [make_row(n, times, qualities[n], versus if n == COMPILED else ()) for n in calls]
    return Contest(rows, rival)
