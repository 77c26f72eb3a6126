"""Our builds of a model against eager, inductor and a peer, interleaved: what every model benchmark does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planish.bench import inductor
from planish.bench.latency import interleave
from planish.bench.peer import CTRANSLATE2, SETTLE, Peer
from planish.bench.quality import outputs, quality
from planish.bench.result import Row, make_row
from planish.models.base import Batch, LoadedModel

COMPILED = "planish-fp32"


@dataclass(frozen=True)
class Contest:
    """The contenders' rows, inductor or the reason why there is none, and the same of the peer, if one was asked."""

    rows: list[Row]
    rival: inductor.Inductor | str
    peer: Peer | str | None = None

    @property
    def absent(self) -> list[dict[str, str]]:
        """Contenders that could not run, with the reason."""
        named = {"inductor": self.rival, CTRANSLATE2: self.peer}
        return [{"name": name, "reason": found} for name, found in named.items() if isinstance(found, str)]

    @property
    def mode(self) -> dict[str, Any] | None:
        """Which of inductor's modes ran, and the times of the trial."""
        rival = self.rival
        return None if isinstance(rival, str) else {"mode": rival.mode, "trial_ms": rival.trial_ms}


def contest(
    loaded: LoadedModel,
    ours: Mapping[str, Callable[..., Any]],
    batches: Sequence[Batch],
    rounds: int,
    log: Callable[[str], None],
    peer: Peer | str | None = None,
) -> Contest:
    """Time eager, the faster mode of inductor, the peer and our builds in turn, and compare outputs with eager's.

    Call it in inference mode.

    Args:
        loaded: the model, with its metric.
        ours: row name to compiled model; each is compared with every contender before it.
        batches: a round is one pass over them.
        rounds: timed rounds.
        log: told the name of each phase.
        peer: another engine, or why there is none; None if none was asked.
    """
    log("compiling with inductor, both modes")
    rival = inductor.build(loaded.model, batches)
    log(f"{rounds} interleaved rounds")
    calls: dict[str, Callable[..., Any]] = {"eager": loaded.model}
    if isinstance(rival, inductor.Inductor):
        calls["inductor"] = rival.call
    calls |= ours
    runs: dict[str, Callable[[], None]] = {n: inductor.run_all(c, batches) for n, c in calls.items()}
    if isinstance(peer, Peer):
        peer.load(batches)
        runs[CTRANSLATE2] = peer.run
    times = interleave(runs, rounds, pause=SETTLE if isinstance(peer, Peer) else 0.0)
    reference = outputs(loaded.model, batches, loaded.metric)
    qualities = {n: quality(c, reference, batches, loaded.metric) for n, c in calls.items()}
    if isinstance(peer, Peer):
        qualities[CTRANSLATE2] = loaded.metric.compare(reference, peer.outputs(), batches)
    order = [n for n in runs if n not in ours] + list(ours)
    rows = [make_row(n, times, qualities[n], order[1 : order.index(n)] if n in ours else ()) for n in order]
    return Contest(rows, rival, peer)
