"""Rule of ``canonicalize``: attention that a model spells out becomes the one op that has a kernel.

Between the product of queries and keys and the softmax are read: views that regroup the matrices of scores, a factor,
terms, and conditions under which scores are replaced by a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from planish.ops import ATTENTION, MATMUL, aten
from planish.program import Program, constant
from planish.rules import Refuse, rule

Shape = tuple[int | sympy.Expr, ...]

ABSORBING = -1e25
"""A constant this low absorbs every score that is added to it, in fp64 too: adding it and replacing by it are equal."""

_REGROUPING = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim)
_FACTORS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)


@dataclass(frozen=True)
class Term:
    """What is added to scores of the shape ``over``."""

    value: fx.Node
    over: Shape


@dataclass(frozen=True)
class Hidden:
    """Scores of the shape ``over`` are replaced by ``value`` where ``condition`` is ``when``."""

    condition: fx.Node
    when: bool
    value: float
    over: Shape


@dataclass(frozen=True)
class Scores:
    """``scale * product + terms``, hidden in places."""

    product: fx.Node
    scale: float = 1.0
    terms: tuple[Term, ...] = ()
    hidden: tuple[Hidden, ...] = ()


@rule("attention recognised", MATMUL)
def recognise_attention(program: Program, node: fx.Node) -> fx.Node | Refuse | None:
    """One op for attention that is spelled out, so that its scores stay in the cache.

    before: ``bmm(softmax(bmm(q, transpose(k)) * s + bias + mask), v)``, the operands [batch heads, seq, d];
            ``softmax(masked_fill(scores, hidden, -inf))``
    after:  ``attention(q, k, v, bias + mask, scale=s)``, the operands [batch, heads, seq, d];
            ``attention(q, k, v, logical_not(hidden))``

    A row whose scores are all -inf has weights of 0 afterwards, as in PyTorch's own op, where softmax gives NaN. Rows
    hidden by the lowest finite number keep their equal weights.
    """
    weights, value = node.args
    assert isinstance(weights, fx.Node)
    assert isinstance(value, fx.Node)
    softmax = _regrouped(program, weights)
    if softmax.target not in _SOFTMAX or node.meta["val"].dtype is not torch.float32 or not _is_over_keys(softmax):
        return None
    scores = _read(program, softmax.args[0])
    if not isinstance(scores, Scores):
        return scores
    for n in (weights, softmax):
        if len(n.users) != 1:
            return _shared(n)
    return _build(program, node, value, softmax, scores)


def _is_over_keys(softmax: fx.Node) -> bool:
    x = softmax.args[0]
    assert isinstance(x, fx.Node)
    return x.meta["val"].dtype is torch.float32 and softmax.args[1] in (-1, x.meta["val"].dim() - 1)


def _shared(node: fx.Node) -> Refuse:
    return Refuse(f"{node.name} is read by {' and '.join(u.name for u in node.users)}, so it is computed anyway")


def _regroups(program: Program, view: fx.Node) -> bool:
    """Whether a view leaves the last two axes as they are, and the order of the matrices with it."""
    if view.target not in _REGROUPING:
        return False
    before, after = program.shape(view.args[0]), program.shape(view)
    return len(before) > 1 and before[-2:] == after[-2:]


def _regrouped(program: Program, node: Any) -> fx.Node:
    """What a chain of such views is made of."""
    while _regroups(program, node):
        node = node.args[0]
    return node


def _read(program: Program, node: Any) -> Scores | Refuse | None:
    """The scores that a node holds; None if it holds anything else."""
    if not isinstance(node, fx.Node) or (node.target is not MATMUL and node.target not in _STEPS):
        return None
    if node.target is MATMUL:
        return Scores(node) if len(node.users) == 1 else _shared(node)
    found = _STEPS[node.target](program, node)
    return _shared(node) if isinstance(found, Scores) and len(node.users) != 1 else found


def _read_view(program: Program, node: fx.Node) -> Scores | Refuse | None:
    return _read(program, node.args[0]) if _regroups(program, node) else None


def _read_scaled(program: Program, node: fx.Node) -> Scores | Refuse | None:
    x, factor = without_factor(program, node)
    found = None if x is node else _read(program, x)
    if not isinstance(found, Scores):
        return found
    if found.terms or found.hidden:
        return Refuse(f"{node.name} scales scores that something is added to")
    return replace(found, scale=found.scale * factor)


def _read_sum(program: Program, node: fx.Node) -> Scores | Refuse | None:
    a, b = node.args
    if node.kwargs or not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
        return None
    shape, refused = program.shape(node), None
    for x, other in ((a, b), (b, a)):
        found = _read(program, x) if program.shape(x) == shape else None
        if isinstance(found, Scores):
            return replace(found, terms=(*found.terms, Term(other, shape)))
        refused = refused or found
    return refused


def _read_filled(program: Program, node: fx.Node) -> Scores | Refuse | None:
    x, condition, value = node.args
    return _read_hidden(program, node, x, condition, True, value)


def _read_chosen(program: Program, node: fx.Node) -> Scores | Refuse | None:
    condition, yes, no = node.args
    if number(program, no) is not None:
        return _read_hidden(program, node, yes, condition, False, no)
    return _read_hidden(program, node, no, condition, True, yes)


def _read_hidden(
    program: Program, node: fx.Node, x: Any, condition: Any, when: bool, value: Any
) -> Scores | Refuse | None:
    low, shape = number(program, value), program.shape(node)
    found = _read(program, x) if low is not None and isinstance(x, fx.Node) and program.shape(x) == shape else None
    if low is None or not isinstance(found, Scores):
        return found
    if not low <= ABSORBING:
        return Refuse(f"hidden scores are {low:g}, which is not so low that adding it would be the same")
    return replace(found, hidden=(*found.hidden, Hidden(condition, when, low, shape)))


_STEPS: dict[Any, Callable[[Program, fx.Node], Scores | Refuse | None]] = {
    **dict.fromkeys(_REGROUPING, _read_view),
    **dict.fromkeys(_FACTORS, _read_scaled),
    aten.add.Tensor: _read_sum,
    aten.masked_fill.Scalar: _read_filled,
    aten.masked_fill.Tensor: _read_filled,
    aten.where.self: _read_chosen,
    aten.where.ScalarOther: _read_chosen,
    aten.where.ScalarSelf: _read_chosen,
}
"""Op to the function that reads scores that it has computed."""


def number(program: Program, value: Any) -> float | None:
    """A number, or the one value of a constant tensor without axes."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], torch.Tensor) or value.meta["val"].dim():
        return None
    if value.op == "get_attr":
        return float(constant(program.module, value))
    at = {aten.full.default: 1, aten.scalar_tensor.default: 0}.get(value.target)  # pyright: ignore
    found = None if at is None else value.args[at]
    return float(found) if isinstance(found, (int, float)) else None


def without_factor(program: Program, node: fx.Node) -> tuple[fx.Node, float]:
    """What is multiplied with a number, and the number; the node itself and 1 if it is no such product."""
    if node.target not in _FACTORS:
        return node, 1.0
    (a, b), divided = node.args[:2], node.target in (aten.div.Tensor, aten.div.Scalar)
    for x, other in ((a, b), (b, a)):
        factor = number(program, other)
        fits = isinstance(x, fx.Node) and x.meta["val"].dtype is node.meta["val"].dtype
        if factor and fits and (x is a or not divided):
            return x, 1 / factor if divided else factor  # pyright: ignore
    return node, 1.0


def _build(
    program: Program, node: fx.Node, value: fx.Node, softmax: fx.Node, scores: Scores
) -> fx.Node | Refuse | None:
    """The op over [batch, heads] where these are known apart, as [batch heads, seq, d] again."""
    query, by_query = without_factor(program, scores.product.args[0])  # pyright: ignore
    keys, by_keys = without_factor(program, scores.product.args[1])  # pyright: ignore
    widths = (program.shape(query)[-1], program.shape(value)[-1])
    leads = [program.shape(n)[:-2] for n in (softmax, _regrouped(program, query))]
    lead = next((a for a in leads if len(a) == 2), leads[0] or (1,))
    if not all(isinstance(w, int) for w in widths):
        return Refuse("the width of a head is dynamic")
    if all(s == 1 for s in lead):
        return Refuse("it is one matrix, and the kernel's threads share the work by batch and head")
    build = _Builder(program, node, lead)
    try:
        operands = [build.grouped(query), build.keys(keys), build.grouped(value)]
        mask = build.mask(scores)
        merged = build.sizes(program.shape(node))
    except _UnknownSizeError as error:
        return Refuse(f"no node of the graph is the size {error}")
    operands += [] if mask is None else [mask]
    scale = scores.scale * by_query * by_keys
    attention = program.module.graph.call_function(ATTENTION, tuple(operands), {"scale": scale})
    return build.made(aten.reshape.default, attention, merged)


class _UnknownSizeError(Exception):
    """More than one size of a shape is that of no node."""


class _Builder:
    """Makes nodes in front of ``node``; ``lead`` are the axes of the result before seq and d."""

    def __init__(self, program: Program, node: fx.Node, lead: Shape) -> None:
        self.program, self.lead = program, lead
        self.known: dict[int | sympy.Expr, fx.Node] = {}
        for n in program.nodes():
            if n is node:
                break
            if isinstance(n.meta.get("val"), torch.SymInt):
                self.known.setdefault(program.size(n), n)

    def made(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call."""
        return self.program.module.graph.call_function(target, args, kwargs)

    def sizes(self, shape: Shape) -> list[int | fx.Node]:
        """The shape as numbers and size nodes; -1 for one that no node has."""
        found = [s if isinstance(s, int) else self.known.get(s) for s in shape]
        if found.count(None) > 1:
            raise _UnknownSizeError(next(s for s, f in zip(shape, found, strict=True) if f is None))
        return [-1 if f is None else f for f in found]

    def grouped(self, x: fx.Node) -> fx.Node:
        """[n, rows, columns] by batch and head; cancels with the view that has merged them."""
        return self.made(aten.reshape.default, x, self.sizes((*self.lead, *self.program.shape(x)[-2:])))

    def keys(self, transposed: fx.Node) -> fx.Node:
        """[batch, heads, seq, d] of [n, d, seq]; cancels with the transpose that the model has made."""
        if transposed.target is not aten.transpose.int:
            return self.made(aten.transpose.int, self.grouped(transposed), -2, -1)
        _, depth, rows = self.program.shape(transposed)
        flat = self.made(aten.transpose.int, transposed, 1, 2)
        return self.made(aten.reshape.default, flat, self.sizes((*self.lead, rows, depth)))

    def mask(self, scores: Scores) -> fx.Node | None:
        """What is added to the scores; where some become -inf and nothing is added, which are seen."""
        total, seen = None, None
        for term in scores.terms:
            value = self.by_lead(term.value, term.over)
            if term.value.meta["val"].dtype is not torch.float32:
                value = self.made(aten._to_copy.default, value, dtype=torch.float32)
            total = value if total is None else self.made(aten.add.Tensor, total, value)
        for hidden in scores.hidden:
            condition = self.by_lead(hidden.condition, hidden.over)
            if math.isinf(hidden.value):
                shown = self.made(aten.logical_not.default, condition) if hidden.when else condition
                seen = shown if seen is None else self.made(aten.logical_and.default, seen, shown)
            else:
                low = self.low(condition, hidden)
                total = low if total is None else self.made(aten.add.Tensor, total, low)
        if total is None or seen is None:
            return seen if total is None else total
        return self.made(aten.where.ScalarOther, seen, total, -math.inf)

    def low(self, condition: fx.Node, hidden: Hidden) -> fx.Node:
        """The low constant where scores are hidden, 0 elsewhere."""
        zero = self.made(aten.full.default, [], 0.0, dtype=torch.float32, device=torch.device("cpu"))
        if hidden.when:
            return self.made(aten.where.ScalarSelf, condition, hidden.value, zero)
        return self.made(aten.where.ScalarOther, condition, zero, hidden.value)

    def by_lead(self, x: fx.Node, over: Shape) -> fx.Node:
        """What is broadcast to scores of the shape ``over``, for scores [batch, heads, seq, seq]."""
        own = self.program.shape(x)
        own = (1,) * (len(over) - len(own)) + own
        if over[:-2] == self.lead and x.meta["val"].dim() > 1:
            return x
        if over[:-2] == self.lead or all(s == 1 for s in own[:-2]):
            return self.made(aten.reshape.default, x, self.sizes(own[-2:]))
        if own[:-2] != over[:-2]:
            x = self.made(aten.expand.default, x, self.sizes((*over[:-2], *own[-2:])))
        return self.made(aten.reshape.default, x, self.sizes((*self.lead, *own[-2:])))
