"""Where each view, gather, join and generator finds its elements: tables from op to index arithmetic.

Every entry is one line or one small function; an op that is in none of the tables and has no kernel template
(``lower.py``) is unsupported, and is reported with its source line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, as_int, equal, i32, keep, lanes_at, lanes_of, simplify, splat
from planish.backends.tvm.index import (
    as_stored,
    as_value,
    broadcast_index,
    cast,
    flat_index,
    storage_dtype,
    unflatten_index,
)
from planish.ops import argument, aten

if TYPE_CHECKING:
    from planish.backends.tvm.expr import Evaluator

Index = tuple[Expr, ...]


# Views: where in the operand an element of the result lies ---------------------------------------------------------


def _reshape(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    return node.args[0], regroup(ev.shape(node), ev.shape(node.args[0]), index)  # pyright: ignore


def regroup(shape: Index, other: Index, index: Index) -> Index:
    """The index in ``other`` of the element at ``index`` in ``shape``, both row-major over the same elements.

    Axes with equal sizes are taken over; only the groups of axes that are merged or split need arithmetic.
    """
    result: list[Expr] = []
    i = j = 0
    while i < len(shape) or j < len(other):
        i0, j0 = i, j
        i, j = min(i + 1, len(shape)), min(j + 1, len(other))
        while not equal(_product(shape[i0:i]), _product(other[j0:j])) and (i < len(shape) or j < len(other)):
            left, right = as_int(_product(shape[i0:i])), as_int(_product(other[j0:j]))
            grow = j == len(other) or (i < len(shape) and left is not None and (right is None or left < right))
            i, j = (i + 1, j) if grow else (i, j + 1)
        if i - i0 == 1 and j - j0 == 1:
            result.append(index[i0])
        else:
            result.extend(unflatten_index(other[j0:j], flat_index(shape[i0:i], index[i0:i])))
    return tuple(result)


def _product(sizes: tuple[Expr, ...]) -> Expr:
    total: Expr = 1
    for s in sizes:
        total = total * s
    return simplify(total)


def _permute(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    order = [d % len(index) for d in node.args[1]]  # pyright: ignore
    return node.args[0], tuple(index[order.index(axis)] for axis in range(len(index)))


def _transpose(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    if not index:  # of a number without axes
        return node.args[0], index
    a, b = (d % len(index) for d in node.args[1:3])  # pyright: ignore
    swapped = list(index)
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return node.args[0], tuple(swapped)


def _unsqueeze(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    axis = node.args[1] % len(index)  # pyright: ignore
    return node.args[0], index[:axis] + index[axis + 1 :]


def _squeeze(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    """The axes that are gone have index 0; which they are follows from the shapes."""
    shape = ev.shape(node.args[0])  # pyright: ignore
    dims = node.args[1] if len(node.args) > 1 else range(len(shape))
    named = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)}  # pyright: ignore
    rest = iter(index)
    return node.args[0], tuple(0 if a in named and as_int(s) == 1 else next(rest) for a, s in enumerate(shape))


def _expand(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    return node.args[0], broadcast_index(ev.shape(node.args[0]), ev.shape(node), index)  # pyright: ignore


def _slice(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    axis = argument(node, 1, "dim", 0) % len(index)
    start, step = argument(node, 2, "start", 0) or 0, argument(node, 4, "step", 1)
    size = ev.shape(node.args[0])[axis]  # pyright: ignore
    first = clamped(ev.at(start, ()), size)
    moved = index[axis] * splat(step, lanes_of(index[axis]), "int32") if step != 1 else index[axis]
    return node.args[0], (*index[:axis], simplify(moved + splat(first, lanes_of(moved), "int32")), *index[axis + 1 :])


def _select(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    axis = node.args[1] % (len(index) + 1)  # pyright: ignore
    at = ev.at(node.args[2], ())
    if isinstance(at, int) and at < 0:
        at = at + ev.shape(node.args[0])[axis]  # pyright: ignore
    return node.args[0], (*index[:axis], at, *index[axis:])


def _flip(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    """The falling index is kept: TVM rewrites ``a * 4 + (3 - i) % 4`` to ``a * 4 + (0 - i) % 4``."""
    shape = ev.shape(node)
    axes = {d % len(shape) for d in node.args[1]} if shape else set()  # pyright: ignore
    return node.args[0], tuple(
        keep(_minus(s - 1, i)) if axis in axes else i for axis, (s, i) in enumerate(zip(shape, index, strict=True))
    )


def _minus(a: Expr, b: Expr) -> Expr:
    return splat(a, lanes_of(b), "int32") - b


def _roll(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    """Element i of a rolled axis is element (i - shift) mod size; without dims the tensor is rolled as one axis."""
    shape = ev.shape(node)
    shifts, dims = argument(node, 1, "shifts"), argument(node, 2, "dims", [])
    if not dims:
        flat = _rolled(flat_index(shape, index), ev.at(shifts[0], ()), _product(shape))
        return node.args[0], unflatten_index(shape, flat)
    moved = list(index)
    for shift, dim in zip(shifts, dims, strict=True):
        axis = dim % len(shape)
        moved[axis] = _rolled(moved[axis], ev.at(shift, ()), shape[axis])
    return node.args[0], tuple(moved)


def _rolled(i: Expr, shift: Expr, size: Expr) -> Expr:
    lanes = lanes_of(i)
    return simplify(T.floormod(i - splat(shift, lanes, "int32"), splat(size, lanes, "int32")))


def _diagonal(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    """The diagonal is the result's last axis."""
    rank = len(index) + 1
    offset = argument(node, 1, "offset", 0)
    first, second = argument(node, 2, "dim1", 0) % rank, argument(node, 3, "dim2", 1) % rank
    rest, along = list(index[:-1]), index[-1]
    lanes = lanes_of(along)
    starts = {first: max(-offset, 0), second: max(offset, 0)}
    places = {axis: along + splat(start, lanes, "int32") for axis, start in starts.items()}
    return node.args[0], tuple(places[axis] if axis in places else rest.pop(0) for axis in range(rank))


def _unfold(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    """Window w, element e of an axis is its element w step + e; the elements are the result's last axis."""
    axis, step = node.args[1] % (len(index) - 1), node.args[3]  # pyright: ignore
    *rest, element = index
    rest[axis] = rest[axis] * splat(step, lanes_of(rest[axis]), "int32") + element  # pyright: ignore
    return node.args[0], tuple(rest)


VIEWS: dict[Any, Callable[[Any, fx.Node, Index], tuple[Any, Index]]] = {
    aten.reshape.default: _reshape,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: lambda ev, node, index: (node.args[0], tuple(reversed(index))),
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.flip.default: _flip,
    aten.roll.default: _roll,
    aten.diagonal.default: _diagonal,
    aten.unfold.default: _unfold,
}


def _push_reshape(ev: Evaluator, node: fx.Node, index: Index) -> Index:
    return regroup(ev.shape(node.args[0]), ev.shape(node), index)  # pyright: ignore


PUSH: dict[Any, Callable[[Any, fx.Node, Index], Index]] = {
    aten.reshape.default: _push_reshape,
    aten.permute.default: lambda ev, node, index: tuple(index[d % len(index)] for d in node.args[1]),  # pyright: ignore
    aten.transpose.int: lambda ev, node, index: _transpose(ev, node, index)[1],
}
"""Views turned round: where an element of the operand lies in the result."""


# Generators: values made from the index alone ------------------------------------------------------------------------


def _arange(ev: Evaluator, node: fx.Node, index: Index) -> Expr:
    start, step = (0, 1) if len(node.args) == 1 else (ev.at(node.args[0], ()), argument(node, 2, "step", 1))
    dtype = node.meta["val"].dtype
    lanes = lanes_of(index[0])
    value = cast(index[0], dtype)
    if step != 1:
        value = value * splat(cast(step, dtype), lanes)
    return value if isinstance(start, int) and start == 0 else value + splat(cast(start, dtype), lanes)


def _constant(at: int | float) -> Callable[[Any, fx.Node, Index], Expr]:
    return lambda ev, node, index: at


def _filled(position: int) -> Callable[[Any, fx.Node, Index], Expr]:
    return lambda ev, node, index: ev.at(node.args[position], ())


GENERATORS: dict[Any, Callable[[Any, fx.Node, Index], Expr]] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.full.default: _filled(1),
    aten.full_like.default: _filled(1),
    aten.scalar_tensor.default: _filled(0),
    aten.ones.default: _constant(1),
    aten.new_ones.default: _constant(1),
    aten.ones_like.default: _constant(1),
    aten.zeros.default: _constant(0),
    aten.new_zeros.default: _constant(0),
    aten.zeros_like.default: _constant(0),
}


# Gathers: the place in the operand is itself read from a tensor -------------------------------------------------------


def _embedding(ev: Evaluator, node: fx.Node, index: Index) -> Expr:
    weight, ids = node.args[:2]
    row = ev.checked(ev.at(ids, index[:-1]), ids, ev.shape(weight)[0])  # pyright: ignore
    return ev.at(weight, (row, index[-1]))


def _index(ev: Evaluator, node: fx.Node, index: Index) -> Expr:
    """Indexing by tensors: their common axes stand where the indexed were, or in front if those are not one run."""
    source, tensors = node.args[:2]
    shape = ev.shape(source)  # pyright: ignore
    used = [i for i, t in enumerate(tensors) if t is not None]  # pyright: ignore
    rank = max(len(ev.shape(tensors[i])) for i in used)  # pyright: ignore
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    grid, rest = index[first : first + rank], list(index[:first] + index[first + rank :])
    places: list[Expr] = []
    for axis, size in enumerate(shape):
        if axis not in used:
            places.append(rest.pop(0))
            continue
        own = ev.shape(tensors[axis])  # pyright: ignore
        part = tuple(0 if as_int(s) == 1 else i for s, i in zip(own, grid[rank - len(own) :], strict=True))
        places.append(ev.checked(ev.at(tensors[axis], part), tensors[axis], size, wrap=True))  # pyright: ignore
    return ev.at(source, tuple(places))


def _gather(ev: Evaluator, node: fx.Node, index: Index) -> Expr:
    source, axis, ids = node.args[:3]
    shape = ev.shape(source)  # pyright: ignore
    axis = axis % len(shape)  # pyright: ignore
    place = ev.checked(ev.at(ids, index), ids, shape[axis])  # pyright: ignore
    return ev.at(source, (*index[:axis], place, *index[axis + 1 :]))


def _index_select(ev: Evaluator, node: fx.Node, index: Index) -> Expr:
    source, axis, ids = node.args[:3]
    shape = ev.shape(source)  # pyright: ignore
    axis = axis % len(shape)  # pyright: ignore
    place = ev.checked(ev.at(ids, (index[axis],)), ids, shape[axis])  # pyright: ignore
    return ev.at(source, (*index[:axis], place, *index[axis + 1 :]))


GATHERS: dict[Any, Callable[[Any, fx.Node, Index], Expr]] = {
    aten.embedding.default: _embedding,
    aten.index.Tensor: _index,
    aten.gather.default: _gather,
    aten.index_select.default: _index_select,
}


# Joins: which operand an element is read from depends on its place ----------------------------------------------------


Case = tuple[Expr, Callable[[], Expr]]


def chosen(ev: Evaluator, node: fx.Node, index: Index, cases: list[Case], otherwise: Callable[[], Expr]) -> Expr:
    """The value of the first case whose condition holds; only that one is computed, so none reads out of bounds."""
    dtype = node.meta["val"].dtype
    lanes = max((lanes_of(i) for i in index), default=1)
    place = T.alloc_buffer((lanes,), storage_dtype(dtype))

    def keep(value: Callable[[], Expr]) -> None:
        with ev.branch():
            T.buffer_store(place, splat(as_stored(value(), dtype), lanes), [lanes_at(i32(0), lanes)])

    def emit(rest: list[Case]) -> None:
        if not rest:
            keep(otherwise)
            return
        (condition, value), *others = rest
        with T.If(condition):
            with T.Then():
                keep(value)
            with T.Else():
                emit(others)

    emit(cases)
    return as_value(T.bind(place[lanes_at(i32(0), lanes)]), dtype)


def _at_axis(ev: Evaluator, index: Index, axis: int) -> Expr:
    """The place along the axis that is joined, the same for all lanes."""
    return ev.scalar(index[axis])


def _cat(ev: Evaluator, node: fx.Node, index: Index) -> Expr:
    pieces = [p for p in node.args[0] if p.meta["val"].dim() == len(index)]  # pyright: ignore  (old-style empty ones)
    axis = argument(node, 1, "dim", 0) % len(index)
    i = _at_axis(ev, index, axis)
    end: Expr = 0
    cases: list[Case] = []
    for piece in pieces:
        start, end = end, simplify(end + ev.shape(piece)[axis])
        moved = (*index[:axis], simplify(i - start), *index[axis + 1 :])
        cases.append((i < end, lambda piece=piece, moved=moved: ev.at(piece, moved)))
    return chosen(ev, node, index, cases[:-1], cases[-1][1])


def _pad(ev: Evaluator, node: fx.Node, index: Index) -> Expr:
    x, pads, value = node.args[0], node.args[1], argument(node, 2, "value", 0)
    shape, moved = ev.shape(x), list(index)  # pyright: ignore
    inside: Expr = None
    for pair in range(len(pads) // 2):  # pyright: ignore
        axis = len(shape) - 1 - pair
        before, after = ev.at(pads[2 * pair], ()), ev.at(pads[2 * pair + 1], ())  # pyright: ignore
        if before == 0 and after == 0:
            continue
        i = _at_axis(ev, index, axis) - before
        within = tirx.And(i >= 0, i < shape[axis])
        inside = within if inside is None else tirx.And(inside, within)
        moved[axis] = simplify(i)
    if inside is None:
        return ev.at(x, index)
    return chosen(ev, node, index, [(inside, lambda: ev.at(x, tuple(moved)))], lambda: value)


def _slice_scatter(ev: Evaluator, node: fx.Node, index: Index) -> Expr:
    x, source = node.args[:2]
    axis = argument(node, 2, "dim", 0) % len(index)
    start, end, step = argument(node, 3, "start") or 0, argument(node, 4, "end"), argument(node, 5, "step", 1)
    size = ev.shape(node)[axis]
    i = _at_axis(ev, index, axis)
    first = clamped(ev.at(start, ()), size)
    last = size if end is None else clamped(ev.at(end, ()), size)
    inside = tirx.And(i >= first, i < last)
    if step != 1:
        inside = tirx.And(inside, tirx.EQ(T.floormod(i - first, step), 0))
    moved = (*index[:axis], simplify(T.floordiv(i - first, step)), *index[axis + 1 :])
    return chosen(ev, node, index, [(inside, lambda: ev.at(source, moved))], lambda: ev.at(x, index))


def clamped(at: Expr, size: Expr) -> Expr:
    """A slice's bound: negative ones count from the end, and all are moved into ``0..size``."""
    if isinstance(at, int) and isinstance(size, int):
        return min(max(at + size if at < 0 else at, 0), size)
    if isinstance(at, int):
        return T.max(at + size, 0) if at < 0 else size if at >= 2**31 - 1 else T.min(at, size)
    return T.max(T.min(tirx.Select(at < 0, at + size, at), size), 0)


def _select_scatter(ev: Evaluator, node: fx.Node, index: Index) -> Expr:
    x, source = node.args[:2]
    axis, at = node.args[2] % len(index), ev.at(node.args[3], ())  # pyright: ignore
    at = at + ev.shape(node)[axis] if isinstance(at, int) and at < 0 else at
    i = _at_axis(ev, index, axis)
    moved = (*index[:axis], *index[axis + 1 :])
    return chosen(ev, node, index, [(tirx.EQ(i, at), lambda: ev.at(source, moved))], lambda: ev.at(x, index))


JOINS: dict[Any, Callable[[Any, fx.Node, Index], Expr]] = {
    aten.cat.default: _cat,
    aten.constant_pad_nd.default: _pad,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
}


def index_reason(node: fx.Node) -> str | None:
    """Why an ``index.Tensor`` call is not a gather of this table, or None."""
    used = [t for t in node.args[1] if t is not None]  # pyright: ignore
    if any(t.meta["val"].dtype in (torch.bool, torch.uint8) for t in used):  # pyright: ignore
        return "indexing by a mask gives a shape that depends on data"
    return None
