"""Writing values at places that a tensor names: a copy of the operand, then the writes in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, as_int, i32, simplify
from planish.backends.tvm.index import as_stored, as_value, cast, flat_index, unflatten_index
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Region, kernel, rows_in_parallel
from planish.backends.tvm.rowwise import add, maximum, minimum, multiply
from planish.backends.tvm.scalars import compute_dtype
from planish.ops import argument, aten
from planish.plan import Size
from planish.program import Program

Combine = Callable[[Expr, Expr], Expr]
_REDUCE: dict[str, Combine] = {"sum": add, "prod": multiply, "amax": maximum, "amin": minimum}


def lower_scatter(module: Module, program: Program, region: Region, anchor: fx.Node) -> Lowered:
    """Kernel of a scatter.

    before: ``scatter_add(x, 1, index, source)``
    after:  copy x; then one element of ``index`` after another: ``result[i, index[i, j]] += source[i, j]``

    The writes are sequential, so the last of several to one place wins, and sums do not depend on the thread count.
    """
    with kernel(module, program, region) as (k, out, _):
        shape = k.ev.shape(anchor)
        total = count(shape)
        x = anchor.args[0]
        with rows_in_parallel(total) as at:
            value = k.ev.at(x, unflatten_index(shape, at) if shape else ())
            T.buffer_store(out, as_stored(value, anchor.meta["val"].dtype), [at])
        writes = tuple(k.ev.size(s) for s in written_shape(program, anchor))
        emit = emitter(k, anchor)
        with T.serial(0, count(writes)) as at:
            place, value, combine = emit(unflatten_index(writes, at) if writes else ())
            write(anchor, out, T.bind(flat_index(shape, place) + i32(0)), value(), combine)
    assert k.function.func is not None
    elements = sympy.prod(program.shape(anchor))
    return Lowered("scatter", k.function.func, k.operands, "scatter", program.shape(anchor), elements)


def count(shape: tuple[Expr, ...]) -> Expr:
    """The number of elements."""
    total: Expr = i32(1)
    for s in shape:
        total = total * s
    return T.bind(total)


def write(anchor: fx.Node, out: Any, at: Expr, value: Expr, combine: Combine | None) -> None:
    """Store a value, combined with what is there, at a position of the scatter's result."""
    result = anchor.meta["val"].dtype
    if combine is not None:
        dtype = compute_dtype(result)
        value = combine(cast(as_value(out[at], result), dtype), cast(value, dtype))
    T.buffer_store(out, as_stored(value, result), [at])


Emit = Callable[[tuple[Expr, ...]], tuple[tuple[Expr, ...], Callable[[], Expr], "Combine | None"]]
"""Index of a write to its place in the result, the code of its value, and how it is combined with what is there."""


def written_shape(program: Program, anchor: fx.Node) -> tuple[Size, ...]:
    """How many values a scatter writes, as a shape."""
    if anchor.target is not aten.index_put.default:
        return program.shape(anchor.args[2])
    first, grid, rest = _grid(program, anchor)
    return (*rest[:first], *grid, *rest[first:])


def emitter(k: Kernel, anchor: fx.Node) -> Emit:
    """The writes of a scatter."""
    return (_indexed if anchor.target is aten.index_put.default else _along)(k, anchor)


def places(anchor: fx.Node) -> list[fx.Node]:
    """The tensors that name the places of a scatter."""
    named = anchor.args[1] if anchor.target is aten.index_put.default else [anchor.args[2]]
    return [n for n in named if n is not None]  # pyright: ignore


def _along(k: Kernel, anchor: fx.Node) -> Emit:
    """Writes of the scatter family: the index tensor names the place along one axis."""
    _, dim, ids, source = anchor.args[:4]
    assert isinstance(ids, fx.Node)
    sizes, rank = k.ev.shape(anchor), len(k.ev.shape(anchor))
    combine = {aten.scatter_add.default: add}.get(anchor.target)  # pyright: ignore
    if anchor.target is aten.scatter_reduce.two:
        combine = _REDUCE[anchor.args[4]]  # pyright: ignore

    def emit(index: tuple[Expr, ...]) -> tuple[tuple[Expr, ...], Callable[[], Expr], Combine | None]:
        if not rank:
            return (), lambda: k.ev.at(source, index), combine
        axis = dim % rank  # pyright: ignore
        place = k.ev.checked(k.ev.at(ids, index), ids, sizes[axis])
        return (*index[:axis], place, *index[axis + 1 :]), lambda: k.ev.at(source, index), combine

    return emit


def _grid(program: Program, anchor: fx.Node) -> tuple[int, list[Size], list[Size]]:
    """Of ``index_put``: where the indexed axes stand in the writes, the broadcast index shape, and the other axes."""
    tensors = anchor.args[1]
    used = [i for i, t in enumerate(tensors) if t is not None]  # pyright: ignore
    shapes = [program.shape(tensors[i]) for i in used]  # pyright: ignore
    rank = max(map(len, shapes))
    grid: list[Size] = []
    for axis in range(rank):
        own = [s[axis - rank + len(s)] for s in shapes if axis - rank + len(s) >= 0]
        grid.append(next((s for s in own if s != 1), own[0]))
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    return first, grid, [s for axis, s in enumerate(program.shape(anchor)) if axis not in used]


def _indexed(k: Kernel, anchor: fx.Node) -> Emit:
    """Writes of ``index_put``: one place per element of the broadcast index tensors and the axes that have none."""
    tensors, values = anchor.args[1:3]
    accumulate = argument(anchor, 3, "accumulate", False)
    sizes = k.ev.shape(anchor)
    first, grid, _ = _grid(k.program, anchor)
    rank = len(grid)
    used = [i for i, t in enumerate(tensors) if t is not None]  # pyright: ignore

    def emit(index: tuple[Expr, ...]) -> tuple[tuple[Expr, ...], Callable[[], Expr], Combine | None]:
        inner, outer = index[first : first + rank], list(index[:first] + index[first + rank :])
        place: list[Expr] = []
        for axis, size in enumerate(sizes):
            if axis not in used:
                place.append(outer.pop(0))
                continue
            own = k.ev.shape(tensors[axis])  # pyright: ignore
            part = tuple(0 if as_int(s) == 1 else i for s, i in zip(own, inner[rank - len(own) :], strict=True))
            place.append(k.ev.checked(k.ev.at(tensors[axis], part), tensors[axis], size, wrap=True))  # pyright: ignore
        shape = k.ev.shape(values)  # pyright: ignore
        tail = index[len(index) - len(shape) :]
        at = tuple(0 if as_int(s) == 1 else simplify(i) for s, i in zip(shape, tail, strict=True))
        return tuple(place), lambda: k.ev.at(values, at), add if accumulate else None

    return emit


def scatter_reason(node: fx.Node) -> str | None:
    """Why a scatter has no kernel here, or None."""
    if node.target is aten.scatter_reduce.two:
        if node.args[4] not in _REDUCE:
            return f"the reduction {node.args[4]!r} is not native"
        if not argument(node, 5, "include_self", True):
            return "include_self=False is not native"
    if node.target is aten.index_put.default:
        used = [t for t in node.args[1] if t is not None]  # pyright: ignore
        if any(t.meta["val"].dtype in (torch.bool, torch.uint8) for t in used):  # pyright: ignore
            return "writing several values by a mask depends on how many are true"
    return None
