"""The model in fp32 with layers computed as treatments would compute them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from planish.formats import round_rows
from planish.ops import reference
from planish.passes.precision.codes import compensated, knows_inputs, nearest_weights, rounded_weight
from planish.passes.precision.layer import Matrix
from planish.passes.precision.operand import Operand
from planish.passes.precision.sites import Site
from planish.passes.precision.tasks import run_all
from planish.passes.precision.treatment import Treatment
from planish.program import Program

Errors = Mapping[tuple[Treatment, int | None], tuple[Tensor, Tensor]]
"""For each treatment, and each half of the calibration data that its codes do not know, how far the weight is off,
[N, K] in bf16 (it need not be known better than to 0.4 %), and what that makes of the mean input, fp32 [N]."""


@dataclass(frozen=True)
class SimulatedLayer:
    """A layer of a site.

    Attributes:
        node: its place in the graph, from 0.
        matrix: its weight.
        operands: what calibration says of its input, for each treatment, without the data.
        errors: of its weight.
    """

    node: int
    matrix: Matrix
    operands: Mapping[Treatment, Operand]
    errors: Errors

    def changes(
        self, args: Sequence[Any], target: Any, treatments: Sequence[Treatment], half: int | None
    ) -> Iterator[tuple[Treatment, Tensor]]:
        """How treatments change the layer's output: ``(xq - x) W' + xq dW' - E[x] dW'``.

        Args:
            args: of its op: x, weight, bias and the rest.
            target: the op.
            treatments: some of the layer's.
            half: of the calibration data that the weight's codes are not to know.
        """
        x, rest = args[0], args[3:]
        of_input: dict[int, Tensor] = {}
        for treatment, rounded in self._inputs(x, treatments).items():
            key = (treatment, half if (treatment, half) in self.errors else None)
            error, lost = self.errors[key]
            change = self._apply(target, rounded, error.float(), rest) - lost  # the corrected bias takes it off
            if rounded is not x:
                if id(rounded) not in of_input:
                    of_input[id(rounded)] = self._apply(target, rounded - x, self.matrix.weight, rest)
                change = change + of_input[id(rounded)]
            yield treatment, change

    def _apply(self, target: Any, x: Tensor, weight: Tensor, rest: Sequence[Any]) -> Tensor:
        return reference(target)(x, self.matrix.as_argument(weight), None, *rest)

    def _inputs(self, x: Tensor, treatments: Sequence[Treatment]) -> dict[Treatment, Tensor]:
        """The layer's input as treatments see it; equal ones are one tensor."""
        found: dict[Any, Tensor] = {}
        result: dict[Treatment, Tensor] = {}
        for treatment in treatments:
            assert treatment.format is not None
            operand = self.operands[treatment]
            equaliser = operand.equaliser
            key = (treatment.format.activation, treatment.outliers, id(equaliser))
            if key not in found:
                found[key] = _rounded(x, treatment, operand)
            result[treatment] = found[key]
        return result


def _rounded(x: Tensor, treatment: Treatment, operand: Operand) -> Tensor:
    """What a layer's input is to a treatment of it, in its own units: rounded, but for outliers."""
    assert treatment.format is not None
    if treatment.format.activation == "fp":
        return x
    inner = x if operand.outliers is None else x.index_fill(-1, operand.outliers, 0.0)
    inner = inner if operand.equaliser is None else inner * operand.equaliser
    static = treatment.format.activation == "a8-static"
    rounded = round_rows(inner, treatment.format, operand.scale if static else None)
    rounded = rounded if operand.equaliser is None else rounded / operand.equaliser
    if operand.outliers is not None:
        rounded.index_copy_(-1, operand.outliers, x.index_select(-1, operand.outliers))
    return rounded


@dataclass(frozen=True)
class Simulation:
    """A program in fp32 and its sites; can be sent to other processes.

    Attributes:
        module: the program's graph.
        sites: the layers of each.
    """

    module: fx.GraphModule
    sites: tuple[tuple[SimulatedLayer, ...], ...]

    def __reduce__(self) -> Any:
        """Sent as data: PyTorch would trace the graph again, which is not safe beside other threads."""
        return _received, (*_to_send(self.module), self.sites)

    @staticmethod
    def of(
        program: Program,
        sites: Sequence[Site],
        halves: Sequence[int | None],
        executor: Executor | None = None,
    ) -> Simulation:
        """Find the codes of all treatments of all sites.

        Args:
            program: in fp32.
            sites: its layers.
            halves: of the calibration data that codes are not to know; None for codes that know all of it.
            executor: see ``run_all``.
        """
        places = {node: i for i, node in enumerate(program.module.graph.nodes)}
        arguments = [
            ([layer.matrix for layer in site.layers], {t: site.operands[t].bare(moments=True) for t in site.treatments})
            for site in sites
        ]
        found = run_all("rounding weights", _errors, [(*of_one, tuple(halves)) for of_one in arguments], executor)
        simulated = [
            tuple(
                SimulatedLayer(places[layer.node], matrix, {t: o.bare() for t, o in operands.items()}, errors)
                for layer, matrix, errors in zip(site.layers, matrices, of_site, strict=True)
            )
            for site, (matrices, operands), of_site in zip(sites, arguments, found, strict=True)
        ]
        return Simulation(program.module, tuple(simulated))

    def nodes(self) -> list[fx.Node]:
        """Of the graph, in order."""
        return list(self.module.graph.nodes)

    def run(
        self, tensors: Sequence[Tensor], treated: Mapping[int, Treatment], half: int | None, known: Any = None
    ) -> Sequence[Tensor]:
        """The outputs with some sites as treated.

        Args:
            tensors: inputs and state.
            treated: treatments by site.
            half: of the calibration data that the weights' codes are not to know.
            known: values of nodes that need not be computed.
        """
        nodes = self.nodes()
        layers = {
            nodes[layer.node]: (layer, treatment)
            for site, treatment in treated.items()
            for layer in self.sites[site]
            if treatment.format is not None
        }
        return _Treated(self.module, layers, half).run(*tensors, initial_env=known)


def _errors(
    matrices: Sequence[Matrix], operands: Mapping[Treatment, Operand], halves: Sequence[int | None]
) -> list[Errors]:
    """Of each layer of a site."""
    found: list[dict[tuple[Treatment, int | None], tuple[Tensor, Tensor]]] = [{} for _ in matrices]
    ways = {t: (t.format, operand) for t, operand in operands.items() if t.format is not None}
    nearest = dict(zip(ways, nearest_weights(matrices, list(ways.values())), strict=True))
    knowing = {t for t, (form, _) in ways.items() if any(knows_inputs(m, form) for m in matrices)}
    for half in dict.fromkeys((*halves, None)):
        chosen = [t for t in ways if (half in halves if t in knowing else half is None)]
        held = compensated(matrices, [ways[t] for t in chosen], [nearest[t] for t in chosen], half)
        for treatment, of_way in zip(chosen, held, strict=True):
            operand = operands[treatment]
            for i, (matrix, weight) in enumerate(zip(matrices, of_way, strict=True)):
                error = rounded_weight(matrix, weight, operand) - matrix.weight
                found[i][treatment, half] = error.bfloat16(), matrix.of_mean(error, operand.channels.mean)
    return found  # pyright: ignore


class _Treated(fx.Interpreter):
    """Runs the graph with some layers as treated."""

    def __init__(
        self, module: fx.GraphModule, layers: Mapping[fx.Node, tuple[SimulatedLayer, Treatment]], half: int | None
    ) -> None:
        super().__init__(module)
        self._layers, self._half = layers, half

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n not in self._layers:
            return result
        layer, treatment = self._layers[n]
        args, _ = self.fetch_args_kwargs_from_env(n)
        ((_, change),) = layer.changes(args, n.target, (treatment,), self._half)
        return result + change


class Recorder(fx.Interpreter):
    """Runs the graph so that autograd can go through it, and keeps what some nodes read and return."""

    def __init__(self, module: fx.GraphModule, nodes: frozenset[fx.Node]) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, tuple[tuple[Any, ...], Tensor]] = {}
        self._nodes = nodes

    def fetch_attr(self, target: str) -> Any:
        """A constant; one made in inference mode is cloned, or backward could not keep it."""
        value = super().fetch_attr(target)
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An op as PyTorch computes it."""
        return super().call_function(reference(target), args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; keep what it reads and returns."""
        result = super().run_node(n)
        if n in self._nodes:
            if not result.requires_grad:
                result = result.detach().requires_grad_()
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.seen[n] = (tuple(a.detach() if isinstance(a, Tensor) else a for a in args), result)
        return result


def _to_send(module: fx.GraphModule) -> tuple[list[tuple[Any, ...]], dict[str, Tensor]]:
    """A graph's nodes, each as op, name, target, arguments in which nodes are ``_Place``s; and its constants."""
    places = {node: _Place(i) for i, node in enumerate(module.graph.nodes)}
    nodes = [
        (
            node.op,
            node.name,
            _target_to_send(node.target),
            *(map_arg(a, places.__getitem__) for a in (node.args, node.kwargs)),
        )
        for node in module.graph.nodes
    ]
    names = dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "get_attr")
    return nodes, {name: operator.attrgetter(name)(module) for name in names}


def _target_to_send(target: Any) -> Any:
    return _Overload(*str(target).split(".")) if isinstance(target, torch._ops.OpOverload) else target


@dataclass(frozen=True)
class _Place:
    """Of a node in its graph."""

    index: int


@dataclass(frozen=True)
class _Overload:
    """An op by its name: ``aten.add.Tensor``."""

    namespace: str
    op: str
    overload: str


def _received(
    sent: Sequence[tuple[Any, ...]], constants: Mapping[str, Tensor], sites: tuple[tuple[SimulatedLayer, ...], ...]
) -> Simulation:
    graph, nodes = fx.Graph(), list[fx.Node]()

    def in_place(value: Any) -> Any:
        return map_aggregate(value, lambda v: nodes[v.index] if isinstance(v, _Place) else v)

    for op, name, target, args, kwargs in sent:
        if isinstance(target, _Overload):
            target = getattr(getattr(getattr(torch.ops, target.namespace), target.op), target.overload)
        nodes.append(graph.create_node(op, target, in_place(args), in_place(kwargs), name))
    return Simulation(fx.GraphModule(dict(constants), graph), sites)


def before(nodes: Sequence[fx.Node], values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    """The values that do not depend on some nodes."""
    changed = set(nodes)
    for node in nodes[0].graph.nodes:
        if not changed.isdisjoint(node.all_input_nodes):
            changed.add(node)
    return {node: value for node, value in values.items() if node not in changed and node.op != "output"}
