"""Orders of the elements of rows: a stable merge sort of positions."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, i32, keep
from planish.backends.tvm.index import cast, unflatten_index
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Region, Scratch, kernel, rows_in_parallel
from planish.backends.tvm.rowwise import row_count
from planish.backends.tvm.scalars import compute_dtype
from planish.ops import planish_ops
from planish.program import Program

LEVELS = 31
"""Merges of a row of any 32-bit length."""


def lower_sort(module: Module, program: Program, region: Region, anchor: fx.Node) -> Lowered:
    """Kernel of ``planish::argsort`` or ``planish::argtopk``.

    before: ``argsort(x, descending)``
    after:  for each row: positions 0, 1, 2, … merged in runs of 1, 2, 4, … from one scratch row into another
    """
    x = anchor.args[0]
    assert isinstance(x, fx.Node)
    best = anchor.target is planish_ops.argtopk.default
    descending = bool(anchor.args[2 if best else 1])
    elements = sympy.prod(program.shape(x))
    with kernel(module, program, region, [(Scratch(16 * elements), "int32")]) as (k, out, (scratch,)):
        shape = k.ev.shape(x)
        lead, size = shape[:-1], shape[-1]
        kept = k.ev.shape(anchor)[-1]
        with rows_in_parallel(row_count(lead)) as row:
            index = tuple(T.bind(i + i32(0)) for i in unflatten_index(lead, row)) if lead else ()
            first = T.bind(row * size * 2)
            _merge_sort(k, x, index, scratch, first, size, descending=descending)
            with T.serial(0, kept) as i:
                T.buffer_store(out, tirx.Cast("int64", scratch[first + i]), [row * kept + i])
    assert k.function.func is not None
    return Lowered("sort", k.function.func, k.operands, "sort", program.shape(x), elements)


def _merge_sort(
    k: Kernel, x: fx.Node, index: tuple[Expr, ...], scratch: Any, first: Expr, size: Expr, *, descending: bool
) -> None:
    """Sorted positions at ``scratch[first ..]``; the ``size`` elements after them are used in between."""
    other = T.bind(first + size)
    with T.serial(0, size) as i:
        T.buffer_store(scratch, i, [first + i])
    with T.serial(0, LEVELS) as level:
        run = T.bind(T.shift_left(i32(1), level))
        with T.If(run < size), T.Then():
            with T.serial(0, T.floordiv(size + run * 2 - 1, run * 2)) as pair:
                begin = T.bind(pair * run * 2)
                middle, end = T.bind(T.min(begin + run, size)), T.bind(T.min(begin + run * 2, size))
                _merge(k, x, index, scratch, (first, other), (begin, middle, end), descending=descending)
            with T.serial(0, size) as i:
                T.buffer_store(scratch, scratch[other + i], [first + i])


def _merge(
    k: Kernel,
    x: fx.Node,
    index: tuple[Expr, ...],
    scratch: Any,
    places: tuple[Expr, Expr],
    bounds: tuple[Expr, Expr, Expr],
    *,
    descending: bool,
) -> None:
    """Merge two neighbouring runs; of equal elements the left one comes first, and a NaN counts as the largest."""
    (first, other), (begin, middle, end) = places, bounds
    left, right = T.alloc_buffer((1,), "int32"), T.alloc_buffer((1,), "int32")
    take = T.alloc_buffer((1,), "int32")
    T.buffer_store(left, begin, [0])
    T.buffer_store(right, middle, [0])
    dtype = compute_dtype(x.meta["val"].dtype)

    def value(at: Expr) -> Expr:
        return keep(cast(k.ev.at(x, (*index, T.bind(scratch[first + at]))), dtype))

    with T.serial(begin, end) as i:
        T.buffer_store(take, tirx.Select(right[0] < end, i32(1), i32(0)), [0])
        with T.If(tirx.And(left[0] < middle, right[0] < end)), T.Then():
            a, b = value(left[0]), value(right[0])
            before = b > a if descending else b < a
            if dtype.is_floating_point:
                a_odd, b_odd = T.isnan(a), T.isnan(b)
                odd = tirx.And(b_odd, tirx.Not(a_odd)) if descending else tirx.And(a_odd, tirx.Not(b_odd))
                before = tirx.Or(before, odd)
            T.buffer_store(take, tirx.Select(before, i32(1), i32(0)), [0])
        with T.If(tirx.EQ(take[0], 1)):
            with T.Then():
                T.buffer_store(scratch, scratch[first + right[0]], [other + i])
                T.buffer_store(right, right[0] + 1, [0])
            with T.Else():
                T.buffer_store(scratch, scratch[first + left[0]], [other + i])
                T.buffer_store(left, left[0] + 1, [0])


def sort_reason(node: fx.Node) -> str | None:
    """Why a sort has no kernel here, or None."""
    return None if node.args[0].meta["val"].dtype is not torch.bool else "bools are not sorted natively"  # pyright: ignore
