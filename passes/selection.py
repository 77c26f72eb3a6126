"""push-selections: what is computed by position is computed only at the positions that are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from planish.ops import ATTENTION, ELEMENTWISE, LAYER_NORM, LINEAR, MATMUL, REDUCTIONS, ROWS, argument, aten
from planish.passes.axes import REPEATED, result_axis, source_axis
from planish.passes.canonicalize import cancel_views, hashable, merge_equal, remove_identity
from planish.passes.pooling import pool_first
from planish.pipeline import Pass, Result
from planish.program import Program
from planish.rules import Refuse, Rule, apply_rules
from planish.targets import Target

_SELECTIONS = (aten.slice.Tensor, aten.select.int, aten.index_select.default)
_END = 2**63 - 1
"""The end of a slice that goes to the end."""


@dataclass(frozen=True)
class Selection:
    """Positions of an axis: an op, and its arguments after the axis.

    One position is a slice of one, unless it is known at run time only.
    """

    target: Any
    rest: tuple[Any, ...]

    @staticmethod
    def of(node: fx.Node) -> tuple[Selection, int]:
        """What a node selects, and along which axis of its operand."""
        rank = node.args[0].meta["val"].dim()  # pyright: ignore
        axis: Any = argument(node, 1, "dim", 0)
        if node.target is aten.index_select.default:
            return Selection(node.target, node.args[2:]), axis % rank
        start, end, step = (argument(node, i, name) for i, name in ((2, "start"), (3, "end"), (4, "step")))
        if node.target is aten.select.int:
            start = argument(node, 2, "index")
            if isinstance(start, fx.Node):
                return Selection(node.target, (start,)), axis % rank
            end = _END if start == -1 else start + 1
        rest = (start or 0, _END if end is None else end, step or 1)
        return Selection(aten.slice.Tensor, rest), axis % rank


@dataclass
class _Moving:
    """The rule, and what it has made: what several branches read is made once, or each residual would double it.

    ``made`` are the calls by target and arguments.
    """

    made: dict[Any, fx.Node] = field(default_factory=dict[Any, fx.Node])

    def rule(self) -> Rule:
        """Its row in a table of rules."""
        return Rule("selection moved up", frozenset(_SELECTIONS), self.move_up)

    def move_up(self, program: Program, node: fx.Node) -> fx.Node | Refuse | None:
        """Select the operands of an op that works on each position alone instead of its result.

        before: ``select(layer_norm(x + linear(attention(q, k, v), w)), 1, 0)``
        after:  ``squeeze(layer_norm(slice(x, 1, 0, 1) + linear(attention(slice(q, 2, 0, 1), k, v), w)), 1)``

        Whoever reads the op's result must read the same positions. Views on the way come along.
        """
        one = node.target is aten.select.int
        selection, axis = Selection.of(node)
        if selection.target is aten.select.int:
            return None
        x, at, views = _source(program, node.args[0], axis)
        count = 1 if one else program.shape(node)[axis]
        if at == REPEATED and not isinstance(count, int):
            return None
        new = x if at == REPEATED else self.op(program, x, at, selection, count)
        if not isinstance(new, fx.Node):
            return new
        size = count if isinstance(count, int) else program.module.graph.call_function(aten.sym_size.int, (new, at))
        for view, along in reversed(views):
            new = _same_view(program, view, new, along, size)
        return program.module.graph.call_function(aten.squeeze.dim, (new, axis)) if one else new

    def op(self, program: Program, op: fx.Node, axis: int, selection: Selection, count: Any) -> fx.Node | Refuse | None:
        """The op's result at positions of ``axis``, computed from its operands at those positions."""
        operands = next((f for ops, f in _OPERANDS if op.target in ops), None)
        axes = operands(program, op, axis) if operands else None
        if axes is None:
            return None
        total = program.shape(op)[axis]
        if 2 * program.upper_bound(count) > program.upper_bound(total):
            return Refuse(f"{count} of {total} positions of {op.name} are read: more than half")
        reader = _other_reader(program, op, axis, selection)
        if reader is not None:
            return Refuse(f"{op.name} is also read by {reader.name}, which reads other positions too")
        args = list(op.args)
        if op.target is ATTENTION and argument(op, 5, "is_causal"):
            mask = self.causal_mask(program, op)
            if mask is None:
                return Refuse(f"{op.name} is causal with other numbers of queries and keys")
            args, axes = [*args[:3], mask], {**axes, 3: 0}
        args = [self.positions(program, a, axes[i], selection) if i in axes else a for i, a in enumerate(args)]
        return self.once(program, op.target, *args, **op.kwargs)

    def causal_mask(self, program: Program, attention: fx.Node) -> fx.Node | None:
        """[queries, keys], true where the key is not after the query; None if they are not equally many."""
        q, k = attention.args[:2]
        size: Any = program.shape(k)[-2]
        if program.shape(q)[-2] != size:
            return None
        count = size if isinstance(size, int) else self.once(program, aten.sym_size.int, k, _rank(k) - 2)
        places = self.once(program, aten.arange.default, count, device=torch.device("cpu"))
        key, query = (self.once(program, aten.unsqueeze.default, places, a) for a in (0, 1))
        return self.once(program, aten.le.Tensor, key, query)

    def positions(self, program: Program, x: Any, axis: int, selection: Selection) -> Any:
        """An operand, or each of a list, at the positions of its axis."""
        if isinstance(x, (list, tuple)):
            return [self.positions(program, each, axis, selection) for each in x]  # pyright: ignore
        return self.once(program, selection.target, x, axis, *selection.rest)

    def once(self, program: Program, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call right behind its last operand; the one there is, if it has been made before."""
        key = (target, hashable(args), hashable(kwargs))
        known = self.made.get(key)
        if known is not None and not known._erased:
            return known
        operands: list[fx.Node] = []
        fx.node.map_arg((args, kwargs), operands.append)
        first = next(iter(program.nodes()))
        place = max(operands, default=first)
        while place.next.op in ("placeholder", "get_attr"):
            place = place.next
        with program.module.graph.inserting_before(place.next):
            self.made[key] = program.module.graph.call_function(target, args, kwargs)
        return self.made[key]


def _source(program: Program, x: Any, axis: int) -> tuple[fx.Node, int, list[tuple[fx.Node, int]]]:
    """What views show, its axis that lies along ``axis``, and the views, last first, each with the axis in it."""
    views: list[tuple[fx.Node, int]] = []
    while axis != REPEATED and (below := source_axis(program, x, axis)) is not None:
        views.append((x, axis))
        x, axis = x.args[0], below
    return x, axis, views


def _same_view(program: Program, view: fx.Node, x: fx.Node, axis: int, size: int | fx.Node) -> fx.Node:
    """The view of ``x``, which has ``size`` positions along the result's ``axis``."""
    rest = list(view.args[1:])
    if view.target in (aten.reshape.default, aten.expand.default):
        rest[0] = [size if a == axis else s for a, s in enumerate(rest[0])]  # pyright: ignore
    return program.module.graph.call_function(view.target, (x, *rest), view.kwargs)  # pyright: ignore


def _other_reader(program: Program, x: fx.Node, axis: int, selection: Selection) -> fx.Node | None:
    """A reader of ``x``, through views too, that reads anything but the positions of its ``axis``."""
    for user in x.users:
        if user.op != "call_function" or user.args[0] is not x:
            return user
        if user.target in _SELECTIONS and Selection.of(user) == (selection, axis):
            continue
        below = result_axis(program, user, axis)
        found = user if below is None else _other_reader(program, user, below, selection)
        if found is not None:
            return found
    return None


# where the positions of a result lie in the operands ----------------------------------------------------------------

Axes = dict[int, int]
"""Which arguments have the positions, and along which axis."""


def _rank(node: Any) -> int:
    return node.meta["val"].dim()


def _elementwise(program: Program, op: fx.Node, axis: int) -> Axes:
    """An operand that is broadcast along the axis stays."""
    shape, found = program.shape(op), Axes()
    for i, x in enumerate(op.args):
        if isinstance(x, fx.Node) and isinstance(x.meta["val"], torch.Tensor):
            at = axis - (len(shape) - _rank(x))
            if at >= 0 and program.shape(x)[at] == shape[axis]:
                found[i] = at
    return found


def _each_row(program: Program, op: fx.Node, axis: int) -> Axes | None:
    """A row is the last axis, or the ones that a norm is over."""
    along = len(op.args[1]) if op.target is LAYER_NORM else 1  # pyright: ignore
    return {0: axis} if axis < _rank(op) - along else None


def _reduced(program: Program, op: fx.Node, axis: int) -> Axes | None:
    """Of the last axis, which goes."""
    x = op.args[0]
    over = op.args[1] if isinstance(op.args[1], (list, tuple)) else [op.args[1]]
    return {0: axis} if _rank(x) == _rank(op) + 1 and [a % _rank(x) for a in over] == [_rank(x) - 1] else None  # pyright: ignore


def _joined(program: Program, op: fx.Node, axis: int) -> Axes | None:
    """An empty piece may have fewer axes."""
    alike = all(_rank(x) == _rank(op) for x in op.args[0])  # pyright: ignore
    return {0: axis} if alike and argument(op, 1, "dim", 0) % _rank(op) != axis else None


def _looked_up(program: Program, op: fx.Node, axis: int) -> Axes | None:
    return {1: axis} if axis < _rank(op.args[1]) else None


def _gathered(program: Program, op: fx.Node, axis: int) -> Axes | None:
    """Other axes of the operand may be longer than the index's."""
    along = op.args[1] % _rank(op)  # pyright: ignore
    same = program.shape(op.args[0])[axis] == program.shape(op)[axis]
    return {2: axis} if axis == along else {0: axis, 2: axis} if same else None


def _product(program: Program, op: fx.Node, axis: int) -> Axes:
    return {0: {0: 0, 1: 0}, 1: {0: 1}, 2: {1: 2}}[axis]


def _queries(program: Program, op: fx.Node, axis: int) -> Axes | None:
    """Rows of the queries, and of a mask that has them."""
    if axis != _rank(op) - 2 or op.kwargs.keys() & {"attn_mask", "is_causal"}:
        return None
    mask = argument(op, 3, "attn_mask")
    has_rows = isinstance(mask, fx.Node) and _rank(mask) > 1 and program.shape(mask)[-2] == program.shape(op)[-2]
    return {0: axis, 3: _rank(mask) - 2} if has_rows else {0: axis}


_OPERANDS: tuple[tuple[frozenset[Any], Callable[[Program, fx.Node, int], Axes | None]], ...] = (
    (ELEMENTWISE, _elementwise),
    (ROWS | {LINEAR}, _each_row),
    (REDUCTIONS, _reduced),
    (frozenset({aten.cat.default}), _joined),
    (frozenset({aten.embedding.default}), _looked_up),
    (frozenset({aten.gather.default}), _gathered),
    (frozenset({MATMUL}), _product),
    (frozenset({ATTENTION}), _queries),
)
"""Ops that compute each position of a result from the same position of operands, and where these have it."""


@dataclass(frozen=True)
class PushSelections(Pass):
    """Compute only the positions that are read: one query row of the last layer for CLS; pool before projecting."""

    name: ClassVar[str] = "push-selections"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    tol: ClassVar[float] = 1e-6  # a sum's bias is multiplied by the count, and rounded to fp32 once more

    def run(self, program: Program, target: Target) -> Result:
        """Move selections up, and merge those that meet at one operand, until nothing changes."""
        result, rules = Result(), (_Moving().rule(), pool_first, remove_identity, cancel_views)
        while True:
            step = apply_rules(program, rules)
            merged = merge_equal(program)
            result.rewrites += step.rewrites
            if merged:
                result.rewrites["equal node merged"] += merged
            if not step.rewrites and not merged:
                result.refusals = step.refusals
                return result
