"""Timing that can be trusted on a shared machine: interleaved rounds, and an interval for every ratio."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """How many times faster a candidate is than a baseline: ``value`` with its 95 % interval ``low`` to ``high``."""

    value: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out 1: only then may a difference be claimed."""
        return self.low > 1.0 or self.high < 1.0

    def claim(self, baseline: str) -> str:
        """The claim in words, or ``no claim`` when the interval holds 1."""
        if not self.decided:
            return "no claim"
        return f"{self.value:.2f}x {baseline}" if self.low > 1.0 else f"slower: {self.value:.2f}x {baseline}"


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, pause: float = 0.0
) -> dict[str, list[float]]:
    """Time several calls in turn, so that a slow phase of the machine meets all of them.

    The order changes from round to round: over ``2 * len(calls)`` rounds each has run right after each other one
    equally often, as what a call leaves behind (caches, threads that still spin) is part of the next one's time.

    Args:
        calls: name to what is timed.
        rounds: timed rounds, at least 1.
        warmup: untimed rounds before them.
        pause: untimed seconds before each call, for threads that still spin after another process's turn.

    Returns:
        Name to milliseconds per round; entry i of every list is from round i.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for _ in range(warmup):
        for name in names:
            calls[name]()
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            for name in _order(names, i):
                if pause:
                    time.sleep(pause)
                start = time.perf_counter_ns()
                calls[name]()
                times[name].append((time.perf_counter_ns() - start) / 1e6)
    finally:
        if collecting:
            gc.enable()
    return times


def _order(names: Sequence[str], i: int) -> list[str]:
    """The order of round ``i``: a row of Williams's square (1949), then the same rows backwards."""
    count = len(names)
    zigzag = [(k + 1) // 2 if k % 2 else count - k // 2 for k in range(count)]  # 0, 1, -1, 2, -2, ...
    row = [names[(place + i) % count] for place in zigzag]
    return row if i // count % 2 == 0 else row[::-1]


def speedup(baseline_ms: Sequence[float], candidate_ms: Sequence[float], seed: int = 0) -> Ratio:
    """Ratio of the medians, baseline over candidate, with a bootstrap interval.

    Rounds are resampled in pairs: what slowed a whole round down slowed both sides.

    Args:
        baseline_ms: milliseconds per round.
        candidate_ms: milliseconds of the same rounds.
        seed: of the resampling, so that the same times give the same interval.
    """
    base, cand = np.asarray(baseline_ms, dtype=np.float64), np.asarray(candidate_ms, dtype=np.float64)
    if base.shape != cand.shape or base.size == 0:
        raise ValueError(f"need the same rounds on both sides, got {base.size} and {cand.size}")
    picks = np.random.default_rng(seed).integers(0, base.size, size=(_RESAMPLES, base.size))
    ratios = np.median(base[picks], axis=1) / np.median(cand[picks], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Ratio(float(np.median(base) / np.median(cand)), float(low), float(high))
