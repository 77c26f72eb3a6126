"""What each treatment of each layer does to the loss, from a few gradients of the model in fp32.

Treatment k of layer l changes its output by dy. With g the gradient of a random probe of the model's outputs, the loss
is ``mean over inputs and probes of (sum g dy)^2 / 2`` (Gauss-Newton: the products are summed over the layer's whole
output first, then squared; the diagonal Fisher of the literature squares first and takes errors as independent). The
sums themselves are kept, so that the loss of several layers together is ``mean of (sum over layers of g dy)^2 / 2``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, fx

from planish.conv_ops import CONVOLUTION_LAST
from planish.formats import quantise_rows
from planish.ops import reference
from planish.passes.precision.layer import Layer
from planish.passes.precision.loss import Loss
from planish.passes.precision.operand import Operand
from planish.passes.precision.rewrite import held_weight, knows_inputs, rounded_weight
from planish.passes.precision.sites import Site
from planish.passes.precision.treatment import Treatment
from planish.program import Program

PROBES = 4
"""Random gradients of the outputs for each input."""

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
    """

    sums: Mapping[tuple[int, Treatment], Tensor]
    measured: Mapping[tuple[int, Treatment], float]
    samples: int
    complete: bool
    seconds: float

    def loss(self, site: int, treatment: Treatment) -> float:
        """Of one site treated so and everything else in fp32."""
        return 0.0 if treatment.format is None else float(self.sums[site, treatment].square().mean()) / 2

    def sigma(self, site: int, treatment: Treatment) -> float:
        """Standard error of ``loss``, over the inputs."""
        if treatment.format is None or self.samples < 2:
            return 0.0
        by_sample = self.sums[site, treatment].square().mean(1) / 2
        return float(by_sample.std() / self.samples**0.5)


def split(program: Program) -> list[Sample]:
    """The calibration inputs one by one, where all of them have the same dynamic first axis; else batch by batch."""
    specs = program.inputs[: program.arguments]
    first = {spec.shape[0] if spec.shape else None for spec in specs}
    state = program.example[program.arguments :]
    (axis,) = first if len(first) == 1 else (None,)
    alone = str(axis) in program.dims and program.dims[str(axis)].min == 1
    return [
        Sample((*row, *state), number % 2)
        for number, batch in enumerate(program.calibration)
        for row in (zip(*(t.split(1) for t in batch), strict=True) if alone else [batch])
    ]


Contraction = Callable[[Tensor, Tensor], Tensor]
"""From gradients [probes, outputs] and a change [outputs] to numbers whose squares are twice the loss, [probes]."""


def gauss_newton(gradients: Tensor, change: Tensor) -> Tensor:
    """``sum g dy``."""
    return gradients @ change


def diagonal_fisher(gradients: Tensor, change: Tensor) -> Tensor:
    """``sqrt(sum g^2 dy^2)``, which takes the errors of outputs as independent; to compare."""
    return (gradients.square() @ change.square()).sqrt()


def probe(
    program: Program,
    sites: Sequence[Site],
    loss: Loss,
    samples: Sequence[Sample],
    *,
    deadline: float = math.inf,
    seed: int = 0,
    contract: Contraction = gauss_newton,
) -> Scores:
    """Score all treatments of all sites by gradients of random probes of the outputs.

    Args:
        program: in fp32.
        sites: its layers.
        loss: how outputs are compared.
        samples: inputs, each with the state.
        deadline: seconds after which no further input is probed.
        seed: of the probes.
        contract: how gradients and changes become scores.
    """
    start = time.perf_counter()
    found: dict[tuple[int, Treatment], list[Tensor]] = {}
    done = 0
    with torch.inference_mode(False):
        simulated = _simulate(sites)
        generator = torch.Generator().manual_seed(seed)
        for sample in _progress(samples, "probing layers"):
            if done and time.perf_counter() - start > deadline:
                break
            for key, sums in _probe(program, simulated, loss, sample, generator, contract):
                found.setdefault(key, []).append(sums)
            done += 1
    sums = {key: torch.stack(values) for key, values in found.items()}
    return Scores(sums, {}, done, done == len(samples), time.perf_counter() - start)


def refine(
    scores: Scores,
    program: Program,
    sites: Sequence[Site],
    loss: Loss,
    samples: Sequence[Sample],
    *,
    deadline: float = math.inf,
) -> Scores:
    """Measure some treatments directly, those of few bits, of heads and of greatest loss, and scale all scores by that.

    Args:
        scores: by ``probe``, of the same program, sites and samples.
        program, sites, loss, samples: as in ``probe``.
        deadline: seconds after which nothing is measured any more; then the scores stay as they are.
    """
    start, part = time.perf_counter(), samples[: min(scores.samples, MEASURED_SAMPLES)]
    measured = measure_each(program, sites, loss, part, _to_measure(scores, sites), deadline)
    sums = _rescaled(scores.sums, measured, len(part))
    seconds = scores.seconds + time.perf_counter() - start
    return replace(scores, sums=sums, measured=measured, seconds=seconds)


def _simulate(sites: Sequence[Site]) -> list[list[_Simulated]]:
    return [[_Simulated(layer, site) for layer in site.layers] for site in sites]


def _progress(items: Sequence[Any], what: str) -> Iterator[Any]:
    console = Console(stderr=True)
    return iter(track(items, what, console=console, transient=True, disable=not console.is_terminal))


class _Simulated:
    """A layer as its treatments compute it, in fp32."""

    def __init__(self, layer: Layer, site: Site) -> None:
        self.layer, self.site = layer, site
        self._errors: dict[tuple[Treatment, int | None], tuple[Tensor, Tensor]] = {}

    def inputs(self, x: Tensor, treatments: Sequence[Treatment]) -> dict[Treatment, Tensor]:
        """The layer's input as treatments see it; equal ones are one tensor."""
        found: dict[Any, Tensor] = {}
        result: dict[Treatment, Tensor] = {}
        for treatment in treatments:
            assert treatment.format is not None
            operand = self.site.operands[treatment]
            equaliser = operand.equaliser
            key = (treatment.format.activation, treatment.outliers, None if equaliser is None else equaliser.data_ptr())
            if key not in found:
                found[key] = _rounded(x, treatment, operand)
            result[treatment] = found[key]
        return result

    def error(self, treatment: Treatment, half: int | None) -> tuple[Tensor, Tensor]:
        """How far a treatment's weight is off, fp32 [N, K], and what that makes of the mean input, [N].

        Args:
            treatment: of the site.
            half: of the calibration data that the weight's codes do not know.
        """
        assert treatment.format is not None
        key = (treatment, half if knows_inputs(self.layer, treatment.format) else None)
        if key not in self._errors:
            operand = self.site.operands[treatment]
            held = held_weight(self.layer, treatment.format, operand, without=key[1])
            error = rounded_weight(self.layer, held, operand) - self.layer.weight
            lost = self.layer.of_mean(error, operand.channels.mean)
            self._errors[key] = (error.bfloat16(), lost)  # an error need not be known better than to 0.4 %
        error, lost = self._errors[key]
        return error.float(), lost

    def apply(self, x: Tensor, weight: Tensor, rest: tuple[Any, ...]) -> Tensor:
        """The layer's op with another weight [N, K] and no bias; ``rest`` are the op's further arguments."""
        if self.layer.node.target is CONVOLUTION_LAST:
            shape = self.layer.node.args[1].meta["val"].shape  # pyright: ignore
            weight = weight.unflatten(1, (*shape[2:], shape[1])).movedim(-1, 1)
        return reference(self.layer.node.target)(x, weight, None, *rest)


def _rounded(x: Tensor, treatment: Treatment, operand: Operand) -> Tensor:
    """What a layer's input is to a treatment of it, in its own units: rounded, but for outliers."""
    assert treatment.format is not None
    if treatment.format.activation == "fp":
        return x
    inner = x if operand.outliers is None else x.index_fill(-1, operand.outliers, 0.0)
    inner = inner if operand.equaliser is None else inner * operand.equaliser
    codes, scales = quantise_rows(inner, operand.scale if treatment.format.activation == "a8-static" else None)
    rounded = codes.float() * scales
    rounded = rounded if operand.equaliser is None else rounded / operand.equaliser
    if operand.outliers is not None:
        rounded.index_copy_(-1, operand.outliers, x.index_select(-1, operand.outliers))
    return rounded


class _Recorder(fx.Interpreter):
    """Runs the graph so that autograd can go through it, and keeps what layers read and return."""

    def __init__(self, module: fx.GraphModule, nodes: frozenset[fx.Node]) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, tuple[tuple[Any, ...], Tensor]] = {}
        self._nodes = nodes

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(reference(target), args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._nodes:
            if not result.requires_grad:
                result = result.detach().requires_grad_()
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.seen[n] = (tuple(a.detach() if isinstance(a, Tensor) else a for a in args), result)
        return result


def _probe(
    program: Program,
    simulated: Sequence[Sequence[_Simulated]],
    loss: Loss,
    sample: Sample,
    generator: torch.Generator,
    contract: Contraction,
) -> Iterator[tuple[tuple[int, Treatment], Tensor]]:
    """For each site and treatment what its layers' changes contract to, summed, fp64 [PROBES]."""
    nodes = [one.layer.node for group in simulated for one in group]
    recorder = _Recorder(program.module, frozenset(nodes))
    with torch.enable_grad():
        outputs = recorder.run(*(t.clone() if t.is_inference() else t for t in sample.tensors))
        values = [recorder.seen[node][1] for node in nodes]
        gradients: list[Sequence[Tensor | None]] = []
        for number in range(PROBES):
            parts = zip(outputs, loss.probe([t.detach() for t in outputs], generator), strict=True)
            total = torch.stack([(y * r).sum() for y, r in parts if r is not None]).sum()
            gradients.append(torch.autograd.grad(total, values, retain_graph=number < PROBES - 1, allow_unused=True))
    by_node = {node: [probe[i] for probe in gradients] for i, node in enumerate(nodes)}
    for index, group in enumerate(simulated):
        sums: dict[Treatment, Tensor] = {}
        for one in group:
            args, y = recorder.seen[one.layer.node]
            g = torch.stack([torch.zeros_like(y) if g is None else g for g in by_node[one.layer.node]]).flatten(1)
            for treatment, change in _changes(one, args, one.site.treatments, sample.half):
                part = contract(g, change.reshape(-1)).double()
                sums[treatment] = sums[treatment] + part if treatment in sums else part
        yield from (((index, treatment), part) for treatment, part in sums.items())


def _changes(
    one: _Simulated, args: tuple[Any, ...], treatments: Sequence[Treatment], half: int | None
) -> Iterator[tuple[Treatment, Tensor]]:
    """How treatments change the layer's output: ``(xq - x) W' + xq dW' - E[x] dW'``."""
    x, rest = args[0], args[3:]
    of_input: dict[int, Tensor] = {}
    for treatment, rounded in one.inputs(x, treatments).items():
        error, lost = one.error(treatment, half)
        change = one.apply(rounded, error, rest) - lost  # the corrected bias takes it off
        if rounded is not x:
            if id(rounded) not in of_input:
                of_input[id(rounded)] = one.apply(rounded - x, one.layer.weight, rest)
            change = change + of_input[id(rounded)]
        yield treatment, change


class _Treated(fx.Interpreter):
    """Runs the graph with some layers as treated."""

    def __init__(
        self, module: fx.GraphModule, layers: Mapping[fx.Node, tuple[_Simulated, Treatment]], half: int | None
    ) -> None:
        super().__init__(module)
        self._layers, self._half = layers, half

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n not in self._layers:
            return result
        one, treatment = self._layers[n]
        args, _ = self.fetch_args_kwargs_from_env(n)
        ((_, change),) = _changes(one, args, (treatment,), self._half)
        return result + change


def measure_each(
    program: Program,
    sites: Sequence[Site],
    loss: Loss,
    samples: Sequence[Sample],
    keys: Sequence[tuple[int, Treatment]],
    deadline: float = math.inf,
) -> dict[tuple[int, Treatment], float]:
    """The mean loss of each site and treatment, by running the model with it; none where the deadline comes first."""
    start, simulated = time.perf_counter(), _simulate(sites)
    totals = dict.fromkeys(keys, 0.0)
    for sample in _progress(samples, "measuring layers"):
        with torch.no_grad():
            exact = fx.Interpreter(program.module, garbage_collect_values=False)
            want = exact.run(*sample.tensors)
            for index, group in enumerate(simulated):
                mine = [treatment for site, treatment in keys if site == index]
                if time.perf_counter() - start > deadline:
                    return {}
                known = _before([one.layer.node for one in group], exact.env) if mine else {}
                for treatment in mine:
                    layers = {one.layer.node: (one, treatment) for one in group}
                    run = _Treated(program.module, layers, sample.half)
                    got = run.run(*sample.tensors, initial_env=dict(known))
                    totals[index, treatment] += loss.measure(want, got) / len(samples)
    return totals


def _before(nodes: Sequence[fx.Node], values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    """The values that do not depend on some nodes."""
    changed = set(nodes)
    for node in nodes[0].graph.nodes:
        if not changed.isdisjoint(node.all_input_nodes):
            changed.add(node)
    return {node: value for node, value in values.items() if node not in changed and node.op != "output"}


def measure(
    program: Program, assigned: Mapping[int, Treatment], sites: Sequence[Site], loss: Loss, samples: Sequence[Sample]
) -> float:
    """The loss of sites treated as assigned, all together, over some inputs; the others stay fp32."""
    layers = {
        layer.node: (_Simulated(layer, replace(sites[index], treatments=(treatment,))), treatment)
        for index, treatment in assigned.items()
        for layer in sites[index].layers
        if treatment.format is not None
    }
    total = 0.0
    with torch.no_grad():
        for sample in samples:
            want = program.module(*sample.tensors)
            got = _Treated(program.module, layers, sample.half).run(*sample.tensors)
            total += loss.measure(want, got) / len(samples)
    return total


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
    carried = math.exp(statistics.fmean(math.log(whole[k] / part[k]) for k in sums if part[k] > 0 < whole[k]))
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
