"""The schema of a benchmark's JSON, shared by all benchmarks."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from planish.bench.latency import Ratio, speedup
from planish.targets import host_isa_levels


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        name: ``eager``, ``inductor``, ``planish-fp32`` and so on.
        ms_median: median of the rounds; a round is one pass over all batches.
        ms_min: fastest round.
        ratio_to_eager: eager's median over this one's.
        ratio_ci95: 95 % interval of that ratio.
        quality: distance to eager's outputs, as the model's metric names it.
        extra: what a benchmark adds to the row; its keys stand beside the others in the JSON.
    """

    name: str
    ms_median: float
    ms_min: float
    ratio_to_eager: float
    ratio_ci95: tuple[float, float]
    quality: dict[str, float]
    extra: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class KernelRow:
    """One kernel of the compiled model, timed alone.

    Attributes:
        name: its name in the plan.
        op: what it computes.
        shape: [M, N, K] of a GEMM; a chain of linear layers in one kernel is [M, N, K, N2, K2, ...].
        calls: how often the plan calls it.
        batch: the input's [batch, seq].
        ms: one call.
        gflops: 1e9 floating-point operations per second; 0 where it computes none.
        share_of_limit: gflops over the measured FMA peak; None where it computes none.
        gbs: 1e9 bytes of packed weights per second, where that was asked.
        rel_err: distance of the result from the fp32 layer's, ``|got - want| / |want|``, where that was asked.
    """

    name: str
    op: str
    shape: list[int]
    calls: int
    batch: list[int]
    ms: float
    gflops: float
    share_of_limit: float | None
    gbs: float | None = None
    rel_err: float | None = None


@dataclass(frozen=True)
class BenchResult:
    """A whole run; ``absent`` lists contenders that could not run with the reason, ``extra`` adds top-level keys."""

    bench: str
    threads: int
    limits: dict[str, Any]
    rows: list[Row]
    kernels: list[KernelRow]
    absent: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    extra: dict[str, Any] = field(default_factory=dict[str, Any])

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        rows = [_flat(row) for row in self.rows]
        head = {"bench": self.bench, "machine": machine(), "threads": self.threads, "limits": self.limits}
        kernels = [asdict(k) for k in self.kernels]
        return {**head, "rows": rows, "kernels": kernels, "absent": self.absent, **self.extra}

    def write(self, path: Path) -> None:
        """Write the JSON file; see :func:`write_json`."""
        write_json(path, self.to_dict())


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a benchmark's JSON object; a NaN or infinity raises ValueError, as JSON has none."""
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def _flat(row: Row) -> dict[str, Any]:
    values = asdict(row)
    extra = values.pop("extra")
    return {**values, "ratio_ci95": list(row.ratio_ci95), **extra}


def make_row(name: str, times: dict[str, list[float]], quality: dict[str, float], versus: Sequence[str] = ()) -> Row:
    """The row of one contender from interleaved times.

    Args:
        name: the contender, a key of ``times``.
        times: contender to milliseconds per round; has ``eager``.
        quality: its distance to eager.
        versus: other contenders whose ratio is added as ``ratio_to_X`` and ``ratio_to_X_ci95``.
    """
    ms = times[name]
    to_eager = speedup(times["eager"], ms)
    extra: dict[str, Any] = {"claim": "baseline" if name == "eager" else to_eager.claim("eager"), "rounds_ms": ms}
    for other in versus:
        ratio: Ratio = speedup(times[other], ms)
        extra[f"ratio_to_{other}"] = ratio.value
        extra[f"ratio_to_{other}_ci95"] = [ratio.low, ratio.high]
        extra[f"claim_{other}"] = ratio.claim(other)
    interval = (to_eager.low, to_eager.high)
    return Row(name, statistics.median(ms), min(ms), to_eager.value, interval, quality, extra)


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores this process may use, instruction sets, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = ("torch", "apache-tvm", "apache-tvm-ffi", "planish")
    versions = {name: metadata.version(name) for name in packages}
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "isa": list(host_isa_levels()),
        "python": platform.python_version(),
        **versions,
    }
