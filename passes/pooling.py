"""Rule of ``push-selections``: a mean or sum over positions is taken before a linear layer instead of after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from planish.ops import LINEAR, aten
from planish.passes.axes import source_axis
from planish.program import Program, add_constant, constant, evaluate
from planish.rules import Refuse, rule

_MEAN, _SUM = aten.mean.dim, aten.sum.dim_IntList


@rule("pooled before the linear layer", _MEAN, _SUM)
def pool_first(program: Program, node: fx.Node) -> fx.Node | Refuse | None:
    """Apply a linear layer to the pooled row instead of to every row.

    before: ``mean(permute(linear(x, w, b), [0, 2, 1]), [-1])``, ``sum(permute(linear(x, w, b) * m, [0, 2, 1]), [-1])``
    after:  ``linear(mean(permute(x, [0, 2, 1]), [-1]), w, b)``,
            ``linear(sum(permute(x * m, [0, 2, 1]), [-1]), w) + sum(permute(m, [0, 2, 1]), [-1]) * b``
    """
    found = _pooled(program, node)
    if not isinstance(found, _Pooled):
        return found
    if found.cost_after(program) >= found.cost_before(program):
        return Refuse(f"pooling what {found.layer.name} reads takes no fewer operations")
    return found.rewrite(program, node)


@dataclass(frozen=True)
class _Pooled:
    """``layer``'s result, times ``weights`` by position, pooled: ``order`` are its axes, the pooled one last."""

    layer: fx.Node
    weights: fx.Node | None
    order: list[int]

    def cost_before(self, program: Program) -> int:
        """Operations per pooled row, of the example."""
        width, depth = program.shape(self.layer.args[1])
        return self._count(program) * evaluate(2 * width * depth + width, {})

    def cost_after(self, program: Program) -> int:
        """Operations per pooled row, of the example, when the pooling comes first."""
        width, depth = program.shape(self.layer.args[1])
        return evaluate(2 * width * depth, {}) + self._count(program) * evaluate(depth, {})

    def _count(self, program: Program) -> int:
        return evaluate(program.shape(self.layer)[self.order[-1]], program.example_dims())

    def rewrite(self, program: Program, node: fx.Node) -> fx.Node | Refuse:
        """The pooled rows through the layer."""
        graph = program.module.graph
        x, weight, *rest = self.layer.args
        bias = rest[0] if rest else None
        if self.weights is None and node.target is _SUM and bias is not None:
            bias = self._summed_bias(program, bias)
            if isinstance(bias, Refuse):
                return bias

        def pooled(rows: Any) -> fx.Node:
            return graph.call_function(
                node.target, (graph.call_function(aten.permute.default, (rows, self.order)), [-1])
            )  # pyright: ignore

        if self.weights is None:
            return graph.call_function(LINEAR, (pooled(x), weight, bias))
        weights, dtype = self.weights, self.layer.meta["val"].dtype
        if weights.meta["val"].dtype is not dtype:
            weights = graph.call_function(aten._to_copy.default, (weights,), {"dtype": dtype})
        total = graph.call_function(LINEAR, (pooled(graph.call_function(aten.mul.Tensor, (x, weights))), weight))
        if bias is None:
            return total
        shift = graph.call_function(aten.mul.Tensor, (pooled(weights), bias))
        return graph.call_function(aten.add.Tensor, (total, shift))

    def _summed_bias(self, program: Program, bias: Any) -> fx.Node | Refuse:
        """The bias times the number of rows."""
        count = program.shape(self.layer)[self.order[-1]]
        if not isinstance(count, int) or bias.op != "get_attr":
            return Refuse("how often the bias is added is not known when compiling")
        value = (constant(program.module, bias).double() * count).to(bias.meta["val"].dtype)
        return program.module.graph.get_attr(add_constant(program.module, f"{bias.target}_summed", value))


def _pooled(program: Program, node: fx.Node) -> _Pooled | Refuse | None:
    """What a reduction of the last axis pools, if that are the rows of a linear layer, its columns staying last."""
    x: Any = node.args[0]
    chain, order = [x], list(range(x.meta["val"].dim()))
    while (axes := _permutation(program, x)) is not None:
        order = [axes[a] for a in order]
        x = x.args[0]
        chain.append(x)
    if x.target is aten.mul.Tensor:
        layer, weights = _layer_and_weights(program, x)
        chain.append(layer)
    else:
        layer, weights = x, None
    columns = len(order) - 1
    if layer is None or layer.target is not LINEAR or len(order) < 2 or len(node.args) > 2 or node.kwargs:
        return None
    if order[:-1] != [a for a in range(len(order)) if a != order[-1]] or order[-1] == columns:
        return None
    if weights is not None and program.shape(weights)[order[-1]] != program.shape(layer)[order[-1]]:
        return None
    shared = next((n for n in chain if len(n.users) != 1), None)
    if shared is not None:
        return Refuse(f"{shared.name} is read by {' and '.join(u.name for u in shared.users)}")
    return _Pooled(layer, weights, order)


def _permutation(program: Program, view: fx.Node) -> list[int] | None:
    """The operand's axis along each axis of a view that only reorders them."""
    if view.op != "call_function":
        return None
    axes = [source_axis(program, view, a) for a in range(view.meta["val"].dim())]
    known = [a for a in axes if a is not None]
    same = len(known) == len(axes) and sorted(known) == list(range(view.args[0].meta["val"].dim()))  # pyright: ignore
    return known if same else None


def _layer_and_weights(program: Program, product: fx.Node) -> tuple[Any, Any]:
    """A linear layer's result and what its rows are weighed with, [..., rows, 1]."""
    a, b = product.args
    for layer, weights in ((a, b), (b, a)):
        if not isinstance(layer, fx.Node) or not isinstance(weights, fx.Node) or layer.target is not LINEAR:
            continue
        same = weights.meta["val"].dim() == layer.meta["val"].dim()
        if same and program.shape(weights)[-1] == 1 and program.shape(product) == program.shape(layer):
            return layer, weights
    return None, None
