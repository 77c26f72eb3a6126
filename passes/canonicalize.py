"""canonicalize: one spelling for every computation, and nothing computed that is known, unused or computed twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from planish.ops import ATTENTION, LINEAR, MATMUL, VIEWS, argument, aten, is_random
from planish.passes.affine import fold_scale, fold_shift
from planish.passes.attention_patterns import recognise_attention
from planish.passes.gathers import gather_is_view
from planish.pipeline import Pass, Result
from planish.program import Program, add_constant, constant
from planish.rules import Refuse, Rule, apply_rules, rule, sizes_of
from planish.targets import Target

FOLD_LIMIT = 1 << 20
"""Largest growth in bytes that folding a constant may cause: an expanded constant is better kept as a view."""


@rule("constant folded")
def fold_constant(program: Program, node: fx.Node) -> fx.Node | None:
    """Compute at compile time what depends on constants only.

    before: ``add(weight, 1)``
    after:  ``weight_1``, a new constant
    """
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor) or not node.args:
        return None
    inputs = node.all_input_nodes
    if is_random(node) or not inputs or any(n.op != "get_attr" for n in inputs):
        return None
    values = {n: constant(program.module, n) for n in inputs}
    value = node.target(  # pyright: ignore
        *fx.node.map_arg(node.args, lambda n: values[n]), **fx.node.map_arg(node.kwargs, lambda n: values[n])
    )
    if value.nbytes > sum(t.nbytes for t in values.values()) + FOLD_LIMIT:
        return None
    name = add_constant(program.module, f"{node.name}_folded", value.detach().contiguous())
    return program.module.graph.get_attr(name)


_SHAPED = VIEWS - {aten.flip.default, aten.roll.default, aten.diagonal.default, aten.unfold.default}
"""Views that are told by the shapes (and orders of axes) alone."""


@rule(
    "identity removed",
    *_SHAPED,
    aten.constant_pad_nd.default,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
)
def remove_identity(program: Program, node: fx.Node) -> fx.Node | None:
    """Drop an op that returns its operand.

    before: ``reshape(x, shape of x)``, ``x + 0``, ``x * 1``, ``transpose(x, 1, 1)``, ``slice(x, 0, 0, size)``,
            ``constant_pad_nd(x, [0, 0])``
    after:  ``x``
    """
    x = node.args[0]
    if not isinstance(x, fx.Node) or not _same_type(program, x, node):
        return None
    if node.target is aten.constant_pad_nd.default:
        return None if any(node.args[1]) else x  # pyright: ignore
    if node.target in _SHAPED:
        return x if _view_is_identity(program, node, x) else None
    neutral = 0 if node.target in (aten.add.Tensor, aten.sub.Tensor) else 1
    other = node.args[1]
    # x + 0 turns -0.0 into 0.0, so the additive identity is exact for integers only
    exact = neutral == 1 or not node.meta["val"].is_floating_point()
    return x if isinstance(other, (int, float)) and other == neutral and exact else None


def _same_type(program: Program, a: fx.Node, b: fx.Node) -> bool:
    left, right = a.meta["val"], b.meta["val"]
    same = isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and left.dtype == right.dtype
    return same and program.shape(a) == program.shape(b)


def _view_is_identity(program: Program, node: fx.Node, x: fx.Node) -> bool:
    rank = max(node.meta["val"].dim(), 1)  # a number counts as one axis
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]] == list(range(len(node.args[1])))  # pyright: ignore
    if node.target is aten.transpose.int:
        return node.args[1] % rank == node.args[2] % rank  # pyright: ignore
    if node.target is aten.t.default:
        return rank < 2
    return node.target is not aten.slice.Tensor or argument(node, 4, "step", 1) == 1


@rule(
    "views cancelled",
    *(aten.transpose.int, aten.permute.default, aten.reshape.default, aten.expand.default, aten.squeeze.dim),
)
def cancel_views(program: Program, node: fx.Node) -> fx.Node | None:
    """Make one view of two of a kind.

    before: ``transpose(transpose(x, 1, 2), 2, 1)``, ``permute(permute(x, p), q)``, ``reshape(reshape(x, s), t)``,
            ``expand(expand(x, s), t)``, ``squeeze(unsqueeze(x, 0), 0)``
    after:  ``x``, ``permute(x, p after q)``, ``reshape(x, t)``, ``expand(x, t)``, ``x``
    """
    x = node.args[0]
    if node.target is aten.squeeze.dim:
        return _unsqueezed(node)
    if not isinstance(x, fx.Node) or x.target is not node.target:
        return None
    source, graph, rank = x.args[0], program.module.graph, max(node.meta["val"].dim(), 1)
    if node.target is aten.transpose.int:
        axes = {d % rank for d in node.args[1:3]}  # pyright: ignore
        return source if axes == {d % rank for d in x.args[1:3]} else None  # pyright: ignore
    if node.target is aten.permute.default:
        order = [x.args[1][d] for d in node.args[1]]  # pyright: ignore
        return graph.call_function(node.target, (source, order))
    if node.target is aten.expand.default and _keeps_sizes(node):
        # -1 keeps the inner view's size, which the outer one alone would not know
        return None
    return graph.call_function(node.target, (source, node.args[1]))  # pyright: ignore


def _unsqueezed(node: fx.Node) -> fx.Node | None:
    """The tensor without the axis that ``squeeze`` takes away, if an unsqueeze has just put it there."""
    x, axis = node.args
    assert isinstance(x, fx.Node)
    if x.target is not aten.unsqueeze.default:
        return None
    rank = x.meta["val"].dim()
    return x.args[0] if axis % rank == x.args[1] % rank else None  # pyright: ignore


def _keeps_sizes(node: fx.Node) -> bool:
    return any(isinstance(s, int) and s == -1 for s in node.args[1])  # pyright: ignore


@rule("expand sizes written out", aten.expand.default)
def name_expand_sizes(program: Program, node: fx.Node) -> fx.Node | None:
    """Replace -1 by the size it stands for.

    before: ``expand(x, [b, -1, s])``
    after:  ``expand(x, [b, 4, s])``
    """
    if not _keeps_sizes(node):
        return None
    shape = program.shape(node)
    sizes = [own if s == -1 else s for s, own in zip(node.args[1], shape, strict=True)]  # pyright: ignore
    if not all(isinstance(s, (int, fx.Node)) for s in sizes):
        return None
    return program.module.graph.call_function(aten.expand.default, (node.args[0], sizes))


@rule("comparison decided", aten.ge.Scalar, aten.gt.Scalar, aten.lt.Scalar, aten.le.Scalar)
def decide_comparison(program: Program, node: fx.Node) -> fx.Node | None:
    """A comparison of a range that starts at 0 with a bound it never crosses is a constant.

    before: ``ge(arange(n), 0)``, ``lt(arange(n), 0)``
    after:  ``full(n, True)``, ``full(n, False)``
    """
    base, bound = _through_views(node.args[0]), node.args[1]
    if base.target is not aten.arange.default or not isinstance(bound, (int, float)):
        return None
    always = {aten.ge.Scalar: bound <= 0, aten.gt.Scalar: bound < 0}
    never = {aten.lt.Scalar: bound <= 0, aten.le.Scalar: bound < 0}
    if always.get(node.target) or never.get(node.target):
        return _full(program, node, node.target in always)
    return None


def _through_views(node: Any) -> fx.Node:
    while node.target in VIEWS:
        node = node.args[0]
    return node


def _full(program: Program, like: fx.Node, value: bool) -> fx.Node:
    """A tensor of one value with the shape of ``like``."""
    sizes = sizes_of(program, like, like.all_input_nodes)
    assert sizes is not None
    return program.module.graph.call_function(
        aten.full.default, (sizes, value), {"dtype": like.meta["val"].dtype, "device": torch.device("cpu")}
    )


_AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)


@rule("and with true removed", *_AND)
def drop_true(program: Program, node: fx.Node) -> fx.Node | None:
    """True is the neutral element of and.

    before: ``ones(shape) & x``
    after:  ``x``, expanded to the result's shape
    """
    if node.meta["val"].dtype is not torch.bool:
        return None
    for own, other in ((0, 1), (1, 0)):
        x = node.args[other]
        if isinstance(x, fx.Node) and x.meta["val"].dtype is torch.bool and _is_true(node.args[own]):
            if program.shape(x) == program.shape(node):
                return x
            sizes = sizes_of(program, node, node.all_input_nodes)
            return sizes and program.module.graph.call_function(aten.expand.default, (x, sizes))
    return None


def _is_true(node: Any) -> bool:
    base = _through_views(node)
    if base.target in (aten.ones.default, aten.new_ones.default, aten.ones_like.default):
        return True
    return base.target in (aten.full.default, aten.full_like.default) and base.args[1] is True


@rule("attention scale folded", ATTENTION)
def fold_attention_scale(program: Program, node: fx.Node) -> fx.Node | Refuse | None:
    """Scale the query projection's weights instead of the scores; rounds each weight once more.

    before: ``attention(view(linear(x, w, b)), k, v, scale=s)``
    after:  ``attention(view(linear(x, w s, b s)), k, v, scale=1)``
    """
    query = node.args[0]
    assert isinstance(query, fx.Node)
    if node.meta["val"].is_complex():
        return None
    scale = argument(node, 6, "scale")
    scale = query.meta["val"].shape[-1] ** -0.5 if scale is None else scale
    if not isinstance(scale, float) or scale == 1.0:
        return None
    chain: list[fx.Node] = [query]
    while chain[-1].target in VIEWS:
        chain.append(chain[-1].args[0])  # pyright: ignore
    linear = chain[-1]
    if linear.target is not LINEAR or any(p.op != "get_attr" for p in linear.args[1:] if isinstance(p, fx.Node)):
        return Refuse("the query is not a view of a linear layer with constant weights")
    if any(len(n.users) != 1 for n in chain) or query in node.args[1:]:
        return Refuse("the query is used elsewhere too")
    graph = program.module.graph
    scaled: list[Any] = []
    for p in linear.args[1:]:
        if isinstance(p, fx.Node):
            value = (constant(program.module, p).double() * scale).to(p.meta["val"].dtype)
            with graph.inserting_before(linear):
                p = graph.get_attr(add_constant(program.module, f"{p.target}_scaled", value))
        scaled.append(p)
    linear.args = (linear.args[0], *scaled)
    return graph.call_function(ATTENTION, node.args[:6], {**node.kwargs, "scale": 1.0})


@rule("product with a constant is a linear layer", MATMUL)
def name_linear(program: Program, node: fx.Node) -> fx.Node | None:
    """A linear layer's weight is packed when compiling, and its shift and scale fold into the weights.

    before: ``bmm(x, w)``, w [1, k, n] constant
    after:  ``unsqueeze(linear(squeeze(x, 0), transposed w), 0)``
    """
    x, w = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(w, fx.Node)
    if w.op != "get_attr" or w.meta["val"].shape[0] != 1 or node.meta["val"].dtype is not torch.float32:
        return None
    graph = program.module.graph
    weight = add_constant(program.module, f"{w.target}_transposed", constant(program.module, w)[0].t().contiguous())
    rows = graph.call_function(aten.squeeze.dim, (x, 0))
    return graph.call_function(aten.unsqueeze.default, (graph.call_function(LINEAR, (rows, graph.get_attr(weight))), 0))


@rule("rows of a linear layer not merged", aten.reshape.default)
def keep_rows_apart(program: Program, node: fx.Node) -> fx.Node | None:
    """A linear layer works on the last axis, however many there are before it.

    before: ``reshape(linear(reshape(x, [batch seq, k]), w, b), [batch, seq, n])``
    after:  ``linear(reshape(x, [batch, seq, k]), w, b)``
    """
    layer: Any = node.args[0]
    merged: Any = layer.args[0] if layer.target is LINEAR and len(layer.users) == 1 else None
    if merged is None or merged.target is not aten.reshape.default:
        return None
    if program.shape(node)[-1:] != program.shape(layer)[-1:]:
        return None
    graph, sizes = program.module.graph, node.args[1]
    rows = graph.call_function(aten.reshape.default, (merged.args[0], [*sizes[:-1], program.shape(merged)[-1]]))  # pyright: ignore
    return graph.call_function(LINEAR, (rows, *layer.args[1:]))


RULES: tuple[Rule, ...] = (
    fold_constant,
    remove_identity,
    name_expand_sizes,
    cancel_views,
    decide_comparison,
    drop_true,
    gather_is_view,
    name_linear,
    keep_rows_apart,
    recognise_attention,
    fold_attention_scale,
    fold_scale,
    fold_shift,
)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Fold constants, drop dead, repeated and neutral ops, cancel views, fold scales and shifts into weights."""

    name: ClassVar[str] = "canonicalize"
    makes: ClassVar[frozenset[str]] = frozenset({"canonical"})
    tol: ClassVar[float] = 1e-5  # folding a scale or a shift into weights rounds them to fp32 once more

    def run(self, program: Program, target: Target) -> Result:
        """Apply the rules and merge equal nodes until nothing changes."""
        result = Result()
        while True:
            step = apply_rules(program, RULES)
            merged = merge_equal(program)
            result.rewrites += step.rewrites
            result.refusals = step.refusals
            if merged:
                result.rewrites["equal node merged"] += merged
            else:
                return result


def merge_equal(program: Program) -> int:
    """Common-subexpression elimination: one node for equal calls on equal operands; returns how many went.

    Sizes are equal if they are the same expression of the dims, whatever tensor they are read from.

    before: ``a = sym_size(x, 0); b = sym_size(linear(x, w), 0)``
    after:  ``a``
    """
    seen: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(program.nodes()):
        if node.op not in ("call_function", "get_attr") or is_random(node):
            continue
        if isinstance(node.meta.get("val"), torch.SymInt):
            key: Any = program.size(node)
        else:
            key = (node.op, node.target, hashable(node.args), hashable(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            program.module.graph.erase_node(node)
            merged += 1
    return merged


def hashable(value: Any) -> Any:
    """Arguments of a call as a key: equal keys are equal calls."""
    if isinstance(value, dict):
        return tuple((k, hashable(v)) for k, v in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(hashable(v) for v in value)
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
