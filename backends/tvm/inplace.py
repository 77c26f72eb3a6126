"""Writing into a buffer of the state instead of a copy of it, and taking the writes back when a later kernel fails."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, i32, keep, simplify
from planish.backends.tvm.index import flat_index, storage_dtype, unflatten_index
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Region, kernel, rows_in_parallel
from planish.backends.tvm.maps import clamped
from planish.backends.tvm.scatter import Emit, count, emitter, places, write, written_shape
from planish.ops import SCATTERS, argument, aten
from planish.plan import Size
from planish.program import Program

_PARTS = {aten.slice_scatter.default: aten.slice.Tensor, aten.select_scatter.default: aten.select.int}
"""Ops that replace one part of a tensor, and the view that is this part."""


@dataclass(frozen=True)
class Write:
    """A region that computes a tensor with some elements replaced.

    Attributes:
        region: its result is the tensor.
        base: the input that has all other elements.
        parts: for a part of a part (``cache[0, 3] = x``) the ops from the outermost to the innermost; empty for a
            scatter.
    """

    region: Region
    base: fx.Node
    parts: tuple[fx.Node, ...]

    def shape(self, program: Program) -> tuple[Size, ...]:
        """The values that are written."""
        return program.shape(self.parts[-1].args[1]) if self.parts else written_shape(program, self.region.result)


def find_write(program: Program, region: Region) -> Write | None:
    """The write that a region is, if it reads nothing else of its base and stays inside it for certain."""
    anchor = region.result
    if anchor.target not in SCATTERS | _PARTS.keys() or anchor.args[0] not in region.inputs:
        return None
    base: Any = anchor.args[0]
    parts = [anchor] if anchor.target in _PARTS else []
    while parts and (inner := _inner(region, parts[-1])) is not None:
        parts.append(inner)
    own = {anchor, *parts}
    old = {n.args[0] for n in own}  # the base and views of it, which only the write itself may read
    alone = all(not old & _operands(n, own) for n in region.nodes if n not in old)
    inside = all(_stays_inside(program, p) for p in parts)
    return Write(region, base, tuple(parts)) if alone and inside else None


def _operands(node: fx.Node, own: set[fx.Node]) -> set[fx.Node]:
    """The nodes that a node reads, without the operand that one of ``own`` writes to."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args[1:] if node in own else node.args, node.kwargs), found.append)
    return set(found)


def _inner(region: Region, part: fx.Node) -> fx.Node | None:
    """The write to a part of the part that ``part`` replaces: its source, if that is a changed view of the same part.

    before: ``select_scatter(x, select_scatter(select(x, 0, 0), y, 0, 3), 0, 0)``
    after:  the inner ``select_scatter``
    """
    source: Any = part.args[1]
    if source not in region.nodes or source.target not in _PARTS or set(source.users) != {part}:
        return None
    view = source.args[0]
    names = ("dim", "start", "end", "step") if part.target is aten.slice_scatter.default else ("dim", "index")
    same = view.target is _PARTS[part.target] and view.args[0] is part.args[0] and view in region.nodes  # pyright: ignore
    equal = all(argument(part, i + 2, n) == argument(view, i + 1, n) for i, n in enumerate(names))
    return source if same and equal else None


def _stays_inside(program: Program, part: fx.Node) -> bool:
    """Whether a part's place is known and ends inside the tensor at every size of the dims."""
    shape = program.shape(part.args[0])
    axis = argument(part, 2, "dim", 0) % len(shape)
    size, at = shape[axis], argument(part, 3, "start", 0) or 0
    if not isinstance(size, int) or not isinstance(at, int):
        return False
    if part.target is aten.select_scatter.default:
        return -size <= at < size
    values = program.upper_bound(program.shape(part.args[1])[axis])
    return clamped(at, size) + (values - 1) * argument(part, 5, "step", 1) < size


def lower_write(module: Module, program: Program, found: Write, log: int) -> tuple[Lowered, Lowered]:
    """Kernels of a write into its base's own memory, and of taking it back.

    before: copy x; ``copy[index[i]] = source[i]`` for every i
    after:  ``log[i] = x[index[i]]; x[index[i]] = source[i]``; to take it back ``x[index[i]] = log[i]``, the last first

    Args:
        log: buffer of the plan for the values that are overwritten.
    """
    return _kernel(module, program, found, log, back=False), _kernel(module, program, found, log, back=True)


def _kernel(module: Module, program: Program, found: Write, log: int, *, back: bool) -> Lowered:
    region, anchor = found.region, found.region.result
    dtype = storage_dtype(anchor.meta["val"].dtype)
    named = set() if found.parts else set(places(anchor))
    skip = [n for n in region.inputs if n is found.base or (back and n not in named)]
    with kernel(module, program, region, [(log, dtype)], skip) as (k, out, (saved,)):
        shape = k.ev.shape(anchor)
        writes = tuple(k.ev.size(s) for s in found.shape(program))
        emit = _into_parts(k, found.parts) if found.parts else emitter(k, anchor)
        total = count(writes)
        with _loop(total, parallel=bool(found.parts)) as step:
            at = keep(total - 1 - step) if back else step  # see maps._flip
            place, value, combine = emit(unflatten_index(writes, at) if writes else ())
            where = T.bind(flat_index(shape, place) + i32(0))
            if back:
                T.buffer_store(out, saved[at], [where])
            else:
                T.buffer_store(saved, out[where], [at])
                write(anchor, out, where, value(), combine)
    assert k.function.func is not None
    name = "undo" if back else "write"
    return Lowered(name, k.function.func, k.operands, name, found.shape(program), sympy.prod(found.shape(program)))


def _loop(total: Expr, *, parallel: bool) -> AbstractContextManager[Expr]:
    """Over all writes; those of a scatter may meet in one place, so they are made in order."""
    return rows_in_parallel(total) if parallel else T.serial(0, total)


def _into_parts(k: Kernel, parts: tuple[fx.Node, ...]) -> Emit:
    """Writes to a part: an index of the source is one of the part, which lies at a fixed place."""

    def emit(index: tuple[Expr, ...]) -> Any:
        place = index
        for part in reversed(parts):
            place = _outward(k, part, place)
        return place, lambda: k.ev.at(parts[-1].args[1], index), None

    return emit


def _outward(k: Kernel, part: fx.Node, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """From an index of the part to one of the tensor that it is part of."""
    sizes = k.ev.shape(part.args[0])  # pyright: ignore
    axis = argument(part, 2, "dim", 0) % len(sizes)
    at = argument(part, 3, "start", 0) or 0
    if part.target is aten.select_scatter.default:
        return (*index[:axis], at % sizes[axis], *index[axis:])
    moved = index[axis] * argument(part, 5, "step", 1) + clamped(at, sizes[axis])
    return (*index[:axis], simplify(moved), *index[axis + 1 :])
