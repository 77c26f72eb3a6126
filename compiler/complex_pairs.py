"""Complex numbers as pairs of real tensors, so that passes and backends see real ones only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from planish.ops import aten
from planish.program import add_constant, constant

Pair = tuple[fx.Node, fx.Node]
"""Real and imaginary part."""

Emit = Callable[..., fx.Node]
"""Adds a call of an op before the one that is being replaced."""

_EACH = frozenset(
    {
        *(aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dims, aten.expand.default, aten.permute.default),
        *(aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten.index_select.default, aten.neg.default),
    }
)
"""Ops that do the same to both parts of their first argument."""

KEPT = frozenset({aten.polar.default, aten.complex.default, aten.view_as_complex.default, aten.view_as_real.default})
"""Ops that decomposition leaves whole, for ``split_complex``; PyTorch's take them apart by writing into views."""


def _product(emit: Emit, a: Pair | Any, b: Pair | Any) -> Pair:
    """(r + i j)(s + t j); one of the two may be real."""
    if not isinstance(a, tuple):
        a, b = b, a
    if not isinstance(b, tuple):
        return emit(aten.mul.Tensor, a[0], b), emit(aten.mul.Tensor, a[1], b)
    (r, i), (s, t) = a, b
    real = emit(aten.sub.Tensor, emit(aten.mul.Tensor, r, s), emit(aten.mul.Tensor, i, t))
    return real, emit(aten.add.Tensor, emit(aten.mul.Tensor, r, t), emit(aten.mul.Tensor, i, s))


def _polar(emit: Emit, length: fx.Node, angle: fx.Node) -> Pair:
    cosine, sine = emit(aten.cos.default, angle), emit(aten.sin.default, angle)
    return emit(aten.mul.Tensor, length, cosine), emit(aten.mul.Tensor, length, sine)


def _both(op: Any) -> Callable[[Emit, Pair, Pair], Pair]:
    return lambda emit, a, b: (emit(op, a[0], b[0]), emit(op, a[1], b[1]))


_RULES: dict[Any, Callable[..., Pair]] = {
    aten.polar.default: _polar,
    aten.complex.default: lambda emit, real, imaginary: (real, imaginary),
    aten.view_as_complex.default: lambda emit, x: (emit(aten.select.int, x, -1, 0), emit(aten.select.int, x, -1, 1)),
    aten.mul.Tensor: _product,
    aten.add.Tensor: _both(aten.add.Tensor),
    aten.sub.Tensor: _both(aten.sub.Tensor),
    aten._conj.default: lambda emit, x: (x[0], emit(aten.neg.default, x[1])),
}
"""Complex op to its two parts, from operands that are pairs where complex."""

_COMPLEX_ONLY = frozenset({aten.add.Tensor, aten.sub.Tensor})
"""Ops whose rule takes no real operand: it would have to be expanded to a part of its own."""


def split_complex(module: fx.GraphModule) -> None:
    """Replace complex tensors by their parts, as far as the rules reach.

    before: ``view_as_real(mul(view_as_complex(x), polar(1, t)))``
    after:  ``stack([x0 cos t - x1 sin t, x0 sin t + x1 cos t], -1)``

    An op without a rule keeps its complex operands, put together again from their parts.
    """
    graph = module.graph
    pairs: dict[fx.Node, Pair] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr" and _is_complex(node):
            value = constant(module, node)
            with graph.inserting_before(node):
                pairs[node] = tuple(  # pyright: ignore
                    graph.get_attr(add_constant(module, f"{node.target}_{part}", getattr(value, part).contiguous()))
                    for part in ("real", "imag")
                )
        elif node.op == "call_function":
            _split_call(graph, node, pairs)
    for node in reversed(list(pairs)):
        if not node.users:
            graph.erase_node(node)


def _is_complex(value: Any) -> bool:
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(tensor, torch.Tensor) and tensor.is_complex()


def _split_call(graph: fx.Graph, node: fx.Node, pairs: dict[fx.Node, Pair]) -> None:
    """Add one call's pair, or make what it reads whole again."""
    if not _is_complex(node) and not any(map(_is_complex, node.all_input_nodes)):
        return

    def emit(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(op, args, kwargs)
        made.meta["stack_trace"] = node.meta.get("stack_trace")
        return made

    with graph.inserting_before(node):
        known = all(n in pairs for n in node.all_input_nodes if _is_complex(n))
        operands = [pairs.get(a, a) if isinstance(a, fx.Node) else a for a in node.args]
        if known and node.target is aten.view_as_real.default:
            ends = [emit(aten.unsqueeze.default, part, -1) for part in operands[0]]  # pyright: ignore
            joined = emit(aten.cat.default, ends, -1)
            joined.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(joined)
            graph.erase_node(node)
        elif known and node.target in _EACH:
            first, *rest = operands
            pairs[node] = tuple(emit(node.target, part, *rest, **node.kwargs) for part in first)  # pyright: ignore
        elif known and node.target in _RULES and _fits(node, operands):
            pairs[node] = _RULES[node.target](emit, *operands)
        else:
            for operand in node.all_input_nodes:
                if operand in pairs:
                    whole = emit(aten.complex.default, *pairs[operand])
                    whole.meta["val"] = operand.meta["val"]
                    node.replace_input_with(operand, whole)


def _fits(node: fx.Node, operands: list[Any]) -> bool:
    """Whether the rule of the node's op takes these operands; none takes complex numbers or ``alpha``."""
    numbers = any(isinstance(o, complex) for o in operands) or bool(node.kwargs)
    return not numbers and (node.target not in _COMPLEX_ONLY or all(isinstance(o, tuple) for o in operands))
