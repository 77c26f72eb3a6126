"""The benchmark of linear layers on integer codes: every format at several shapes, against the machine's limits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from planish.bench import MIN_ROUNDS, limits
from planish.bench.mlp import errors
from planish.bench.result import BenchResult, KernelRow
from planish.errors import UnknownNameError
from planish.formats import Format, Quantized, quantise
from planish.ops import planish_ops
from planish.targets import Target, host_isa_levels

FP32 = "fp32"
FORMATS = ("w8a8", "w6a8", "w6a8-g32", "w5a8", "w5a8-g32", "w4a8", "w4a8-g32", "w4a8-g128", "w3a8-g32", "w2a8-g32")

SHAPES = ((144, 3072, 768), (1, 3072, 768), (4, 3072, 768), (16, 3072, 768))
SHAPES += ((1000, 384, 384), (1000, 1536, 384), (1000, 384, 1536), (130, 576, 576))
"""M, N, K."""

VECTOR = ("w8a8", "w4a8-g32", "w4a8-g128", "w2a8-g32")
"""Formats that also multiply one row by a matrix that no cache holds."""

VECTOR_DEPTH = 4096
BEYOND = 4
"""Such a matrix is at least so many times as large as the last-level cache."""

CALLS_MS = 20.0
"""Time of a round at least: a short call is timed several times in a row."""

PROBE_SECONDS = 0.2
"""Time of one measurement of a limit of the machine among the rounds."""


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        threads: of the compiled layers and the limits.
        rounds: times all formats of a shape are timed in turn.
        only: formats to run; all if empty.
    """

    threads: int
    rounds: int = 11
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rounds < MIN_ROUNDS:
            raise ValueError(f"rounds is {self.rounds}: a median needs at least {MIN_ROUNDS}")
        for name in self.only:
            if name not in FORMATS:
                raise UnknownNameError(f"no format {name!r} in this benchmark", fix="use some of: " + ",".join(FORMATS))


class Layer(torch.nn.Module):
    """A linear layer whose weight is stored in a format."""

    def __init__(self, held: Quantized, form: str) -> None:
        super().__init__()
        for name, value in held.stored.items():
            self.register_buffer(name, value)
        self.form = form

    def forward(self, x: Any) -> torch.Tensor:
        """Of rows [M, K]."""
        held = (self.codes, self.scales, self.minimums, self.channels)
        return planish_ops.quantized_linear(x, *held, None, None, self.form)


def run(options: Options, compile_model: Callable[..., Any], log: Callable[[str], None]) -> BenchResult:
    """Run the benchmark.

    Args:
        options: what to run.
        compile_model: ``planish.compile``.
        log: told the name of each phase.
    """
    torch.set_num_threads(options.threads)
    names = options.only or FORMATS
    with torch.inference_mode(), limits.probe(options.threads) as probe:
        found = limits.measure(probe)
        kernels: list[KernelRow] = []
        for shape in SHAPES:
            log(f"{'x'.join(map(str, shape))}, {len(names)} formats and fp32")
            kernels += _products(shape, names, options.rounds, compile_model, probe)
            found = _better(found, limits.measure(probe))
        for name in [n for n in VECTOR if n in names]:
            log(f"one row by a matrix beyond the caches, {name}")
            kernels.append(_vector(name, options.rounds, compile_model, probe))
        log("error of a multilayer perceptron")
        measured = limits.combine(found, limits.measure(probe))
    extra = {"int8_limit_gops": INT8_LIMIT * measured["fma_gflops"], "mlp_rel_err": errors(compile_model)}
    return BenchResult("qgemm", options.threads, measured, [], kernels, [], extra)


INT8_LIMIT = 4.0
"""Products of bytes per product in fp32 that AVX2's multipliers do: 32 in a vector against 8."""


def _better(one: Mapping[str, float], two: Mapping[str, float]) -> dict[str, float]:
    return {key: max(one[key], two[key]) for key in one}


def _products(
    shape: tuple[int, int, int],
    names: tuple[str, ...],
    rounds: int,
    compile_model: Callable[..., Any],
    probe: limits.Probe,
) -> list[KernelRow]:
    """A row for fp32 and each format; all are timed in turn.

    A share is of the FMA peak measured in the same round, in the median round: on a shared machine it changes by a
    fifth from second to second.
    """
    m, n, k = shape
    generator = torch.Generator().manual_seed(n + k)
    x, weight = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator) / k**0.5
    exact = torch.nn.Linear(k, n, bias=False).eval().requires_grad_(False)
    exact.weight.copy_(weight)
    models: dict[str, torch.nn.Module] = {FP32: exact}
    for name in names:
        models[name] = Layer(quantise(weight, Format.parse(name).weight), name).eval()
    calls = {name: compile_model(model, (x,), cache=False) for name, model in models.items()}
    times, shares = _times(calls, x, rounds, lambda: probe.fma(host_isa_levels()[-1], PROBE_SECONDS))
    want, rows = exact(x), list[KernelRow]()
    for name, call in calls.items():
        ms, gflops = times[name], 2e-6 * m * n * k / times[name]
        error = ((call(x) - want).norm() / want.norm()).item()
        share = 2e-6 * m * n * k * shares[name]
        rows.append(KernelRow(name, "qgemm", [m, n, k], 1, [m, k], ms, gflops, share, rel_err=error))
    return rows


def _vector(name: str, rounds: int, compile_model: Callable[..., Any], probe: limits.Probe) -> KernelRow:
    """One row by a matrix of random codes; its share is of the bandwidth read just before, in the median round.

    On a shared machine the bandwidth changes by a half from second to second.
    """
    form, k = Format.parse(name).weight, VECTOR_DEPTH
    per_row = form.nbytes(1, k)
    n = -(-int(BEYOND * Target.host().llc_bytes) // per_row // 64) * 64
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 1 << form.bits, (n, k), dtype=torch.uint8, generator=generator)
    scales = (100 * torch.rand(n, form.groups(k), generator=generator)).to(form.scale_dtype)
    channels = torch.full((n,), 1e-6) if form.two_level else None
    x = torch.randn(1, k, generator=generator)
    call = compile_model(Layer(Quantized(form, codes, scales, None, channels), name).eval(), (x,), cache=False)
    times, shares = _times({name: call}, x, rounds, lambda: probe.read(PROBE_SECONDS))
    ms, nbytes = times[name], form.nbytes(n, k)
    share = nbytes / 1e6 * shares[name]
    return KernelRow(name, "qgemv", [1, n, k], 1, [1, k], ms, 2e-6 * n * k / ms, share, gbs=nbytes / ms / 1e6)


def _times(
    calls: Mapping[str, Any], x: torch.Tensor, rounds: int, limit: Callable[[], float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Median ms of each call, kernels alone, timed in turn; and the median of 1 / (ms times the limit of the round)."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    shares: dict[str, list[float]] = {name: [] for name in calls}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        ms = sum(time.ms for time in call.kernels((x,), repeats=3))
        repeats[name] = max(3, int(CALLS_MS / ms))
    for _ in range(rounds):
        of_round = limit()
        for name, call in calls.items():
            samples[name].append(sum(time.ms for time in call.kernels((x,), repeats=repeats[name])))
            shares[name].append(1 / (samples[name][-1] * of_round))
    return tuple({name: statistics.median(v) for name, v in found.items()} for found in (samples, shares))  # pyright: ignore
