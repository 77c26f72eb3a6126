"""Our builds of a model against eager, inductor and a peer, interleaved: what every model benchmark does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from planish.bench import inductor
from planish.bench.latency import interleave
from planish.bench.peer import SETTLE, Peer
from planish.bench.quality import outputs
from planish.bench.result import Row, make_row
from planish.models.base import Batch, LoadedModel

COMPILED = "planish-fp32"


@dataclass(frozen=True)
class Contest:
    """The contenders' rows; inductor and the others asked for, or the reason why there is none; each one's outputs."""

    rows: list[Row]
    rival: inductor.Inductor | str
    others: Mapping[str, Any]
    states: dict[str, Callable[[Sequence[Batch]], list[torch.Tensor]]]

    @property
    def absent(self) -> list[dict[str, str]]:
        """Contenders that could not run, with the reason."""
        named = {"inductor": self.rival, **self.others}
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
    others: Mapping[str, Peer | Callable[..., Any] | str] | None = None,
) -> Contest:
    """Time eager, the faster mode of inductor, other engines and our builds in turn, and compare outputs with eager's.

    Call it in inference mode.

    Args:
        loaded: the model, with its metric.
        ours: row name to compiled model; each is compared with every contender before it.
        batches: a round is one pass over them.
        rounds: timed rounds.
        log: told the name of each phase.
        others: row name to an engine in a process of its own, a model in this one, or why there is none.
    """
    log("compiling with inductor, both modes")
    rival = inductor.build(loaded.model, batches)
    log(f"{rounds} interleaved rounds")
    others = others or {}
    calls: dict[str, Callable[..., Any]] = {"eager": loaded.model}
    if isinstance(rival, inductor.Inductor):
        calls["inductor"] = rival.call
    peers = {name: found for name, found in others.items() if isinstance(found, Peer)}
    calls |= {n: found for n, found in others.items() if not isinstance(found, (Peer, str))}
    calls |= ours
    runs: dict[str, Callable[[], None]] = {n: inductor.run_all(c, batches) for n, c in calls.items()}
    for name, peer in peers.items():
        peer.load(batches)
        runs[name] = peer.run
    times = interleave(runs, rounds, pause=SETTLE if others else 0.0)
    states = {n: partial(_states_of_call, loaded, c) for n, c in calls.items()}
    states |= {n: partial(_states_of_peer, peer) for n, peer in peers.items()}
    reference = states["eager"](batches)
    qualities = {n: loaded.metric.compare(reference, states[n](batches), batches) for n in runs}
    order = [n for n in runs if n not in ours] + list(ours)
    rows = [make_row(n, times, qualities[n], order[1 : order.index(n)] if n in ours else ()) for n in order]
    return Contest(rows, rival, others, states)


def _states_of_call(loaded: LoadedModel, call: Callable[..., Any], batches: Sequence[Batch]) -> list[torch.Tensor]:
    return outputs(call, batches, loaded.metric)


def _states_of_peer(peer: Peer, batches: Sequence[Batch]) -> list[torch.Tensor]:
    peer.load(batches)
    return peer.outputs()
