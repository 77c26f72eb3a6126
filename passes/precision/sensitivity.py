"""What each treatment of each layer does to the loss, from a few gradients of the model in fp32.

Treatment k of layer l changes its output by dy. With g the gradient of a random probe of the model's outputs, the loss
is ``mean over inputs and probes of (sum g dy)^2 / 2`` (Gauss-Newton: the products are summed over the layer's whole
output first, then squared; the diagonal Fisher of the literature squares first and takes errors as independent: it is
found too, because it makes the noise of the probes less, see ``steadied``). The sums themselves are kept, so that the
loss of several layers together is ``mean of (sum over layers of g dy)^2 / 2``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from planish.passes.precision.loss import Loss
from planish.passes.precision.simulation import Recorder, Simulation, before
from planish.passes.precision.sites import Site
from planish.passes.precision.steadied import Key, steadied
from planish.passes.precision.tasks import pieces, run_all
from planish.passes.precision.treatment import Treatment
from planish.program import Program

PROBES, MOST_PROBES = 4, 24
"""Random gradients of the outputs for each input, at least and at most."""

ALL_PROBES = 192
"""Of all inputs together: the standard error of a score is then a tenth of it. A minimum finds the errors of scores."""

GRADIENT_BYTES = 4 << 30
"""That the gradients of an input may take; where they would take more, probes are done in several goes."""

MEASURED = 0.1
"""Share of the scored treatments, those of greatest loss, that are measured directly."""

FEW_BITS = 3
"""Treatments of at most so many bits are measured directly: their errors are no small changes."""

MEASURED_SAMPLES = 12
"""Inputs that direct measurements use."""


@dataclass(frozen=True)
class Sample:
    """An input.

    Attributes:
        tensors: with the state.
        half: of the calibration batches that it is from, 0 or 1: weights whose codes know the calibration data are
            judged by codes that know the other half only, or the loss would seem less than it is; None for other data.
    """

    tensors: tuple[Tensor, ...]
    half: int | None = None


@dataclass(frozen=True)
class Scores:
    """What probing found.

    Attributes:
        sums: for each site and treatment ``sum g dy``, fp64 [samples, probes], scaled so that ``loss`` is what was
            measured directly where that was done, and by what measuring found for the treatment elsewhere.
        measured: sites and treatments that were measured directly, with the loss of those inputs.
        samples: inputs that were probed.
        complete: False where the deadline came before all of the inputs.
        seconds: of probing and of measuring together.
        diagonal: what the losses would be were errors of outputs independent; nothing of kept scores.
    """

    sums: Mapping[tuple[int, Treatment], Tensor]
    measured: Mapping[tuple[int, Treatment], float]
    samples: int
    complete: bool
    seconds: float
    diagonal: Mapping[tuple[int, Treatment], float] = field(default_factory=dict[tuple[int, Treatment], float])

    def loss(self, site: int, treatment: Treatment) -> float:
        """Of one site treated so and everything else in fp32; 0 where nothing was probed."""
        if treatment.format is None or not self.samples:
            return 0.0
        return float(self.sums[site, treatment].square().mean()) / 2

    def sigma(self, site: int, treatment: Treatment) -> float:
        """Standard error of ``loss``, over the inputs."""
        if treatment.format is None or self.samples < 2:
            return 0.0
        by_sample = self.sums[site, treatment].square().mean(1) / 2
        return float(by_sample.std() / self.samples**0.5)


NOTHING = Scores({}, {}, 0, True, 0.0)
"""Where there is nothing to choose, as all is pinned."""


def split(program: Program) -> list[Sample]:
    """The calibration inputs one by one, where all of them have the same dynamic first axis; else batch by batch."""
    state, alone = program.example[program.arguments :], _has_rows(program)
    return [
        Sample((*row, *state), number % 2)
        for number, batch in enumerate(program.calibration)
        for row in (zip(*(t.split(1) for t in batch), strict=True) if alone else [batch])
    ]


def halve(program: Program) -> None:
    """Split an only calibration batch in two where it has rows, so that the halves can judge each other's codes."""
    if len(program.calibration) == 1 and _has_rows(program) and len(program.calibration[0][0]) > 1:
        rows = len(program.calibration[0][0])
        program.calibration = tuple(zip(*(t.split(-(-rows // 2)) for t in program.calibration[0]), strict=True))


def _has_rows(program: Program) -> bool:
    """Whether all inputs have the same dynamic first axis, which may be 1."""
    first = {spec.shape[0] if spec.shape else None for spec in program.inputs[: program.arguments]}
    (axis,) = first if len(first) == 1 else (None,)
    return str(axis) in program.dims and program.dims[str(axis)].min == 1


def probe(
    simulation: Simulation,
    loss: Loss,
    samples: Sequence[Sample],
    *,
    deadline: float = math.inf,
    seed: int = 0,
    executor: Executor | None = None,
) -> Scores:
    """Score all treatments of all sites by gradients of random probes of the outputs.

    Args:
        simulation: of the sites.
        loss: how outputs are compared.
        samples: inputs, each with the state.
        deadline: seconds after which no further input is probed.
        seed: of the probes.
        executor: see ``run_all``.
    """
    start = time.perf_counter()
    seeded = [(seed * 1_000_003 + i, sample) for i, sample in enumerate(samples)]
    probes = min(MOST_PROBES, max(PROBES, -(-ALL_PROBES // len(samples))))
    arguments = [(simulation, loss, piece, probes) for piece in pieces(seeded, executor)]
    found = [
        of_one for piece in run_all("probing", _probe_all, arguments, executor, start + deadline) for of_one in piece
    ]
    sums = {key: torch.stack([of_one[key].sums for of_one in found]) for key in found[0]}
    diagonal = {key: statistics.fmean(of_one[key].diagonal for of_one in found) / probes for key in found[0]}
    sums, complete = steadied(sums, diagonal), len(found) == len(samples)
    return Scores(sums, {}, len(found), complete, time.perf_counter() - start, diagonal)


def refine(
    scores: Scores,
    simulation: Simulation,
    sites: Sequence[Site],
    loss: Loss,
    samples: Sequence[Sample],
    *,
    deadline: float = math.inf,
    executor: Executor | None = None,
) -> Scores:
    """Measure some treatments directly, those of few bits, of heads and of greatest loss, and scale all scores by that.

    Args:
        scores: by ``probe``, of the same simulation and samples.
        simulation: of the sites.
        sites: in the same order.
        loss, samples: as in ``probe``.
        deadline: seconds after which nothing is measured any more; then the scores stay as they are.
        executor: see ``run_all``.
    """
    start, part = time.perf_counter(), samples[: min(scores.samples, MEASURED_SAMPLES)]
    keys = _to_measure(scores, sites)
    measured = measure_each(simulation, loss, part, keys, deadline=deadline, executor=executor)
    sums = _rescaled(scores.sums, measured, len(part))
    seconds = scores.seconds + time.perf_counter() - start
    return replace(scores, sums=sums, measured=measured, seconds=seconds)


@dataclass(frozen=True)
class _Probed:
    """Of a site, a treatment and an input: ``sum g dy``, fp64 [probes], and the total of ``sum g^2 dy^2 / 2``."""

    sums: Tensor
    diagonal: float

    def __add__(self, other: _Probed) -> _Probed:
        """Of two layers."""
        return _Probed(self.sums + other.sums, self.diagonal + other.diagonal)

    def and_more(self, other: _Probed) -> _Probed:
        """With other probes."""
        return _Probed(torch.cat([self.sums, other.sums]), self.diagonal + other.diagonal)


def _probe_all(
    simulation: Simulation, loss: Loss, samples: Sequence[tuple[int, Sample]], probes: int
) -> list[dict[Key, _Probed]]:
    with torch.inference_mode(False):
        return [_probe(simulation, loss, sample, seed, probes) for seed, sample in samples]


def _probe(simulation: Simulation, loss: Loss, sample: Sample, seed: int, probes: int) -> dict[Key, _Probed]:
    """What the changes of each site and treatment contract to, as many probes at once as there is memory for."""
    places = simulation.nodes()
    nodes = [places[layer.node] for group in simulation.sites for layer in group]
    recorder = Recorder(simulation.module, frozenset(nodes))
    generator = torch.Generator().manual_seed(seed)
    found: dict[Key, _Probed] = {}
    with torch.enable_grad():
        outputs = recorder.run(*(t.clone() if t.is_inference() else t for t in sample.tensors))
        values = [recorder.seen[node][1] for node in nodes]
        together = max(1, GRADIENT_BYTES // sum(4 * value.numel() for value in values))
        for start in range(0, probes, together):
            end = min(probes, start + together)
            gradients: list[Sequence[Tensor | None]] = []
            for number in range(start, end):
                parts = zip(outputs, loss.probe([t.detach() for t in outputs], generator), strict=True)
                total = torch.stack([(y * r).sum() for y, r in parts if r is not None]).sum()
                more = number < probes - 1
                gradients.append(torch.autograd.grad(total, values, retain_graph=more, allow_unused=True))
            by_node = {node: [probe[i] for probe in gradients] for i, node in enumerate(nodes)}
            for key, part in _contracted(simulation, recorder, by_node, sample.half).items():
                found[key] = found[key].and_more(part) if key in found else part
    return found


def _contracted(
    simulation: Simulation, recorder: Recorder, gradients: dict[fx.Node, list[Tensor | None]], half: int | None
) -> dict[Key, _Probed]:
    """Gradients of each layer's output times the changes of it; takes them out of ``gradients``, to free them."""
    places, found = simulation.nodes(), dict[Key, _Probed]()
    for index, group in enumerate(simulation.sites):
        for layer in group:
            node = places[layer.node]
            args, y = recorder.seen[node]
            g = torch.stack([torch.zeros_like(y) if g is None else g for g in gradients.pop(node)]).flatten(1)
            squares = g.square().sum(0)
            for treatment, change in layer.changes(args, node.target, list(layer.operands), half):
                change, key = change.reshape(-1), (index, treatment)
                part = _Probed((g @ change).double(), float(squares @ change.square_()) / 2)
                found[key] = found[key] + part if key in found else part
    return found


def measure_each(
    simulation: Simulation,
    loss: Loss,
    samples: Sequence[Sample],
    keys: Sequence[Key],
    *,
    deadline: float = math.inf,
    executor: Executor | None = None,
) -> dict[Key, float]:
    """The mean loss of each site and treatment, by running the model with it; none where the deadline comes first."""
    end = time.perf_counter() + deadline
    if deadline <= 0 or not keys:
        return {}
    arguments = [
        (simulation, loss, piece, keys, end if executor is None else math.inf) for piece in pieces(samples, executor)
    ]
    found = [of_one for piece in run_all("measuring", _measure_each, arguments, executor, end) for of_one in piece]
    if len(found) < len(samples) or not all(found):
        return {}
    return {key: sum(of_one[key] for of_one in found) / len(samples) for key in keys}


def _measure_each(
    simulation: Simulation, loss: Loss, samples: Sequence[Sample], keys: Sequence[Key], end: float
) -> list[dict[Key, float]]:
    """The losses of each sample; none of one during which the end comes, by ``time.perf_counter``."""
    with torch.no_grad():
        return [_measure_one(simulation, loss, sample, keys, end) for sample in samples]


def _measure_one(
    simulation: Simulation, loss: Loss, sample: Sample, keys: Sequence[Key], end: float
) -> dict[Key, float]:
    exact = fx.Interpreter(simulation.module, garbage_collect_values=False)
    want = exact.run(*sample.tensors)
    places, found = simulation.nodes(), dict[Key, float]()
    for index, group in enumerate(simulation.sites):
        mine = [treatment for site, treatment in keys if site == index]
        known = before([places[layer.node] for layer in group], exact.env) if mine else {}
        for treatment in mine:
            if time.perf_counter() > end:
                return {}
            got = simulation.run(sample.tensors, {index: treatment}, sample.half, dict(known))
            found[index, treatment] = loss.measure(want, got)
    return found


def measure(simulation: Simulation, assigned: Mapping[int, Treatment], loss: Loss, samples: Sequence[Sample]) -> float:
    """The loss of sites treated as assigned, all together, over some inputs; the others stay fp32."""
    return statistics.fmean(measure_samples(simulation, assigned, loss, samples))


def measure_samples(
    simulation: Simulation, assigned: Mapping[int, Treatment], loss: Loss, samples: Sequence[Sample]
) -> list[float]:
    """The same for each input."""
    found: list[float] = []
    with torch.no_grad():
        for sample in samples:
            want = fx.Interpreter(simulation.module).run(*sample.tensors)
            found.append(loss.measure(want, simulation.run(sample.tensors, assigned, sample.half)))
    return found


def _to_measure(scores: Scores, sites: Sequence[Site]) -> list[tuple[int, Treatment]]:
    """Few bits, heads, and the treatments of greatest loss."""
    by_loss = sorted(scores.sums, key=lambda key: -scores.loss(*key))
    top = set(by_loss[: math.ceil(MEASURED * len(by_loss))])
    return [
        (site, treatment)
        for site, treatment in scores.sums
        if treatment.format is not None
        and ((site, treatment) in top or treatment.format.weight.bits <= FEW_BITS or sites[site].layers[0].is_head)
    ]


def _rescaled(
    sums: Mapping[tuple[int, Treatment], Tensor], measured: Mapping[tuple[int, Treatment], float], samples: int
) -> Mapping[tuple[int, Treatment], Tensor]:
    """Sums that give the measured losses; unmeasured ones scaled by what measuring found for their treatment.

    What was measured on a part of the inputs is carried to all of them by what all sites' sums say of that part.
    """
    if not measured:
        return sums
    part = {key: float(value[:samples].square().mean()) / 2 for key, value in sums.items()}
    whole = {key: float(value.square().mean()) / 2 for key, value in sums.items()}
    logs = [math.log(whole[k] / part[k]) for k in sums if part[k] > 0 < whole[k]]
    carried = math.exp(statistics.fmean(logs)) if logs else 1.0
    ratios: dict[Treatment, list[float]] = {}
    for key, loss in measured.items():
        if part[key] > 0 < loss:
            ratios.setdefault(key[1], []).append(math.log(loss / part[key]))
    found = dict(sums)
    for key in sums:
        if key in measured and whole[key] > 0:
            found[key] = sums[key] * math.sqrt(max(0.0, measured[key]) * carried / whole[key])
        elif key[1] in ratios:
            found[key] = sums[key] * math.exp(statistics.fmean(ratios[key[1]]) / 2)
    return found
