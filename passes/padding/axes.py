"""Which axis of a value runs over the rows of the padded batch, and which over their positions.

Every axis is a product of atoms: the batch, the positions, or a plain number. Reshapes regroup the same atoms in the
same order, permutes reorder axes, so the two can be followed through merged axes such as [positions, batch * heads];
and a hidden width that happens to equal the number of positions is never taken for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from planish.ops import (
    ATTENTION,
    ELEMENTWISE,
    LINEAR,
    REDUCTIONS,
    VIEWS,
    argument,
    aten,
)
from planish.program import Program

BATCH = "batch"
TOKENS = "tokens"
"""The mask's own axis of positions."""
SAME = "same"
"""An axis as long as ``TOKENS`` that does not come from the mask: the queries of a mask of pairs, for example."""

POSITIONS = frozenset({TOKENS, SAME})
LABELS = frozenset({BATCH, TOKENS, SAME})

Atom = str | int | sympy.Expr
"""A label, or a plain size."""
Axis = tuple[Atom, ...]
"""Atoms, outer first; an axis of size 1 has none."""
Axes = tuple[Axis, ...]


@dataclass
class AxisMap:
    """The axes of every value of a graph, as far as they are known, for one mask [batch, positions].

    Attributes:
        batch: size of the batch axis.
        tokens: number of positions of a row.
        known: axes of the values.
        told_by_shape: values whose axes are what their sizes say: how they come from the operands' is not known.
    """

    program: Program
    mask: fx.Node
    batch: int | sympy.Expr
    tokens: int | sympy.Expr
    known: dict[fx.Node, Axes | None] = field(default_factory=dict[fx.Node, "Axes | None"])
    told_by_shape: set[fx.Node] = field(default_factory=set[fx.Node])

    streams: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    """Values whose positions are the same ones: towards a common representative."""

    @staticmethod
    def of(program: Program, mask: fx.Node) -> AxisMap:
        """The map of a whole graph."""
        found = AxisMap(program, mask, *program.shape(mask))
        for node in program.nodes():
            if isinstance(node.meta.get("val"), torch.Tensor):
                found.known[node] = found._axes(node)
        for node in filter(found.is_token, program.nodes()):
            for operand in filter(found.is_token, found.by_position(node)):
                found.streams[found.stream(node)] = found.stream(operand)
        return found

    def by_position(self, node: fx.Node) -> list[fx.Node]:
        """The operands that an op reads position by position: not keys and values, not a table."""
        if node.op == "output":
            return []
        own = {ATTENTION: 0, aten.embedding.default: 1}.get(node.target)
        return node.all_input_nodes if own is None else [node.args[own]]  # pyright: ignore

    def stream(self, node: fx.Node) -> fx.Node:
        """What stands for all values over the same positions; a decoder's are not its encoder's, though sizes agree."""
        while self.streams.get(node, node) is not node:
            node = self.streams[node]
        return node

    def __getitem__(self, node: fx.Node) -> Axes | None:
        return self.known.get(node)

    def is_token(self, node: Any) -> bool:
        """Whether a value has one element, or one vector, for each position of the batch."""
        axes = self.known.get(node) if isinstance(node, fx.Node) else None
        atoms = [a for axis in axes for a in axis] if axes is not None else []
        return atoms.count(BATCH) == 1 and sum(a in POSITIONS for a in atoms) == 1

    def size(self, atom: Atom) -> int | sympy.Expr:
        """Size of an atom."""
        return {BATCH: self.batch, TOKENS: self.tokens, SAME: self.tokens}[atom] if isinstance(atom, str) else atom

    def from_shape(self, node: fx.Node) -> Axes | None:
        """The axes as far as their sizes tell: a dynamic size has a name, a number is only a number."""
        axes: list[Axis] = []
        for size in self.program.shape(node):
            if isinstance(size, int):
                axes.append(() if size == 1 else (size,))
            elif size in (self.batch, self.tokens):
                axes.append((BATCH,) if size == self.batch else (SAME,))
            elif {self.batch, self.tokens} & size.free_symbols:
                return None
            else:
                axes.append((size,))
        return tuple(axes)

    def _axes(self, node: fx.Node) -> Axes | None:
        if node is self.mask:
            return ((BATCH,), (TOKENS,))
        if node.op == "placeholder":
            return self._input(node)
        axes = None
        if node.op == "call_function":
            for targets, rule in _RULES:
                if node.target in targets:
                    axes = rule(self, node)
        if axes is None:
            self.told_by_shape.add(node)
        return axes if axes is not None else self.from_shape(node)

    def _input(self, node: fx.Node) -> Axes | None:
        """Another input. One of fixed size that begins with the mask's two sizes is taken to hold a row's positions.

        Taking it for that can only miss a rewrite: the two axes are coordinates like any others.
        """
        shape, axes = self.program.shape(node), self.from_shape(node)
        fixed = isinstance(self.batch, int) and isinstance(self.tokens, int)
        if axes is not None and fixed and len(shape) > 1 and shape[:2] == (self.batch, self.tokens):
            return ((BATCH,), (SAME,), *axes[2:])
        return axes

    def unify(self, a: Axis, b: Axis) -> Axis | None:
        """The axis of an elementwise result from two operands' axes, or None if they run over different things."""
        if not a or not b or a == b:
            return a or b
        if len(a) == len(b) and all(x == y or {x, y} == POSITIONS for x, y in zip(a, b, strict=True)):
            return tuple(TOKENS if x in POSITIONS else x for x in a)
        for number, label in ((a, b), (b, a)):
            named = len(label) == 1 and label[0] in LABELS
            if named and len(number) == 1 and isinstance(number[0], int) and self.size(label[0]) == number[0]:
                return label
        return None

    def broadcast(self, operands: Sequence[Axes | None], rank: int) -> Axes | None:
        """Axes of the result of an elementwise op."""
        result: list[Axis] = [()] * rank
        for axes in operands:
            if axes is None:
                return None
            for i, axis in enumerate(axes, rank - len(axes)):
                both = self.unify(result[i], axis)
                if both is None:
                    return None
                result[i] = both
        return tuple(result)

    def regroup(self, axes: Axes, shape: Sequence[int | sympy.Expr]) -> Axes | None:
        """The axes after a reshape to ``shape``: the same atoms, grouped anew; a number may be split."""
        atoms = [a for axis in axes for a in axis]
        result: list[Axis] = []
        for size in shape:
            axis: list[Atom] = []
            product: int | sympy.Expr = 1
            while product != size:
                if not atoms:
                    return None
                atom = atoms.pop(0)
                left = sympy.sympify(size) / product
                if isinstance(atom, int) and left.is_number:
                    if not left.is_Integer or (atom > left and atom % int(left)):
                        return None
                    if atom > left:
                        atoms.insert(0, atom // int(left))
                        atom = int(left)
                axis.append(atom)
                product = product * self.size(atom)
            result.append(tuple(axis))
        return tuple(result) if not atoms else None


def _own(map_: AxisMap, node: fx.Node) -> Axes | None:
    return map_[node.args[0]]  # pyright: ignore


def _elementwise(map_: AxisMap, node: fx.Node) -> Axes | None:
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
    return map_.broadcast([map_[n] for n in tensors], node.meta["val"].dim())


def _view(map_: AxisMap, node: fx.Node) -> Axes | None:
    axes = _own(map_, node)
    if axes is None:
        return None
    rank = len(axes)
    if node.target is aten.reshape.default:
        return map_.regroup(axes, map_.program.shape(node))
    if node.target is aten.permute.default:
        return tuple(axes[d % rank] for d in node.args[1])  # pyright: ignore
    if node.target in (aten.transpose.int, aten.t.default) and rank > 1:
        a, b = (d % rank for d in node.args[1:3]) if node.target is aten.transpose.int else (0, 1)  # pyright: ignore
        order = list(axes)
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    if node.target is aten.unsqueeze.default:
        axis = node.args[1] % (rank + 1)  # pyright: ignore
        return (*axes[:axis], (), *axes[axis:])
    return _sized_view(map_, node, axes)


def _sized_view(map_: AxisMap, node: fx.Node, axes: Axes) -> Axes | None:
    """Views whose result's sizes say what became of an axis."""
    rank, shape = len(axes), map_.from_shape(node)
    if node.target in (aten.slice.Tensor, aten.select.int):
        axis = argument(node, 1, "dim", 0) % rank
        cut = () if node.target is aten.select.int or shape is None else shape[axis : axis + 1]
        if cut and map_.program.shape(node)[axis] == map_.program.shape(node.args[0])[axis]:  # pyright: ignore
            cut = axes[axis : axis + 1]
        if axes[axis] == (BATCH,) and cut != (BATCH,):  # other rows' positions are not the mask's
            axes = tuple((SAME,) if a == (TOKENS,) else a for a in axes)
        return None if shape is None else (*axes[:axis], *cut, *axes[axis + 1 :])
    if node.target is aten.expand.default and shape is not None:
        own = [()] * (len(shape) - rank) + list(axes)
        return tuple(a or b for a, b in zip(own, shape, strict=True))
    if node.target in (aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default):
        dims = node.args[1] if len(node.args) > 1 else range(rank)
        gone = {d % rank for d in ([dims] if isinstance(dims, int) else dims)}  # pyright: ignore
        return tuple(a for i, a in enumerate(axes) if not (i in gone and a == ()))
    return None


def _linear(map_: AxisMap, node: fx.Node) -> Axes | None:
    axes = _own(map_, node)
    width = node.meta["val"].shape[-1]
    return None if axes is None else (*axes[:-1], () if width == 1 else (int(width),))


def _attention(map_: AxisMap, node: fx.Node) -> Axes | None:
    query, value = map_[node.args[0]], map_[node.args[2]]  # pyright: ignore
    return None if query is None or value is None else (*query[:-1], value[-1])


def _embedding(map_: AxisMap, node: fx.Node) -> Axes | None:
    axes = map_[node.args[1]]  # pyright: ignore
    width = node.meta["val"].shape[-1]
    return None if axes is None else (*axes, () if width == 1 else (int(width),))


def _reduced(map_: AxisMap, node: fx.Node) -> Axes | None:
    axes = _own(map_, node)
    if axes is None or not axes:
        return None
    return (*axes[:-1], ()) if node.meta["val"].dim() == len(axes) else axes[:-1]


def _joined(map_: AxisMap, node: fx.Node) -> Axes | None:
    """A concatenation or padding: the axis it changes is as its size says."""
    shape = map_.from_shape(node)
    parts = node.args[0] if node.target is aten.cat.default else [node.args[0]]
    every = [map_[p] for p in parts]  # pyright: ignore
    if shape is None or any(axes is None or len(axes) != len(shape) for axes in every):
        return None
    first: Axes = every[0]  # pyright: ignore
    return tuple(
        a if all(axes[i] == a for axes in every) and map_.program.shape(parts[0])[i] == size else own  # pyright: ignore
        for i, (a, own, size) in enumerate(zip(first, shape, map_.program.shape(node), strict=True))
    )


ROW_WISE = frozenset(
    {aten.layer_norm.default, aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default}
)

_RULES: tuple[tuple[frozenset[Any], Callable[[AxisMap, fx.Node], Axes | None]], ...] = (
    (ELEMENTWISE, _elementwise),
    (VIEWS, _view),
    (frozenset({LINEAR}), _linear),
    (frozenset({ATTENTION}), _attention),
    (frozenset({aten.embedding.default}), _embedding),
    (ROW_WISE, _own),
    (REDUCTIONS, _reduced),
    (frozenset({aten.cat.default, aten.constant_pad_nd.default}), _joined),
)
