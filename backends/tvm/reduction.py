"""Reductions and scans over the last axis: one row at a time, with the elementwise ops before and after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.arithmetic import divide, libm, zero
from planish.backends.tvm.builder import Expr, i32, keep, lanes_at, splat
from planish.backends.tvm.index import DTYPES, as_stored, cast, unflatten_index
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Region, kernel, rows_in_parallel
from planish.backends.tvm.rowwise import (
    accumulate,
    add,
    maximum,
    minimum,
    multiply,
    row_count,
    row_kernel,
    store,
)
from planish.backends.tvm.scalars import compute_dtype
from planish.ops import aten
from planish.program import Program


@dataclass(frozen=True)
class Fold:
    """How a reduction combines: start value by dtype, combination, and whether the length divides the result."""

    start: Callable[[torch.dtype], float]
    combine: Callable[[Expr, Expr], Expr]
    divide: bool = False


def _lowest(dtype: torch.dtype) -> float:
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> float:
    return float("inf") if dtype.is_floating_point else torch.iinfo(dtype).max


FOLDS: dict[Any, Fold] = {
    aten.sum.dim_IntList: Fold(lambda dtype: 0, add),
    aten.mean.dim: Fold(lambda dtype: 0, add, divide=True),
    aten.prod.dim_int: Fold(lambda dtype: 1, multiply),
    aten.amax.default: Fold(_lowest, maximum),
    aten.amin.default: Fold(_highest, minimum),
    aten.any.dim: Fold(lambda dtype: 0, lambda a, b: a | b),
    aten.all.dim: Fold(lambda dtype: 1, lambda a, b: a & b),
}
"""Reductions by an associative combination."""

POSITIONS: dict[Any, bool] = {aten.argmax.default: True, aten.argmin.default: False}
"""Reductions to the position of the extremum: whether it is the largest."""


def _log_add_exp(a: Expr, b: Expr) -> Expr:
    """log(exp(a) + exp(b)) without overflow; equal infinities stay."""
    high, low = keep(maximum(a, b)), keep(minimum(a, b))
    difference = keep(tirx.Select(tirx.EQ(a, b), zero(a), low - high))
    return keep(high + libm("log1p", libm("exp", difference)))


SCANS: dict[Any, tuple[float, Callable[[Expr, Expr], Expr]]] = {
    aten.cumsum.default: (0.0, add),
    aten.cumprod.default: (1.0, multiply),
    aten.logcumsumexp.default: (float("-inf"), _log_add_exp),
}
"""Running combinations, and what they start from."""


def _reduced_dtype(node: fx.Node) -> torch.dtype:
    """What a reduction is computed in."""
    if node.target in (aten.any.dim, aten.all.dim):
        return torch.bool
    return node.meta["val"].dtype


def lower_reduction(module: Module, program: Program, region: Region, anchor: fx.Node, lanes: int) -> Lowered:
    """Kernel of a region around a reduction over the last axis.

    before: ``sqrt(mean(a * a, -1))``
    after:  for each row: accumulated vectors, combined pairwise; the square root on the result
    """
    with kernel(module, program, region) as (k, out, _):
        x = anchor.args[0]
        assert isinstance(x, fx.Node)
        shape = k.ev.shape(x)
        lead, size = shape[:-1], shape[-1]
        with rows_in_parallel(row_count(lead)) as row:
            index = tuple(T.bind(i + i32(0)) for i in unflatten_index(lead, row)) if lead else ()
            if anchor.target in POSITIONS:
                value = _position(k, x, index, size, largest=POSITIONS[anchor.target])
            else:
                value = _folded(k, anchor, x, index, size, lanes)
            kept = len(k.ev.shape(anchor)) > len(lead)
            store(k, anchor, value, out, row, (*index, i32(0)) if kept else index, 1)
    return row_kernel(k, program, anchor)


def _folded(k: Kernel, anchor: fx.Node, x: fx.Node, index: tuple[Expr, ...], size: Expr, lanes: int) -> Expr:
    fold, wanted = FOLDS[anchor.target], _reduced_dtype(anchor)
    dtype = compute_dtype(wanted)

    def at(start: Expr, count: int) -> Expr:
        value = cast(k.ev.at(x, (*index, lanes_at(start, count))), wanted)
        return splat(cast(value, dtype), count)

    value = accumulate(k, size, fold.start(dtype), fold.combine, at, lanes, DTYPES[dtype])
    if fold.divide:
        value = T.bind(divide(value, cast(size, dtype)))
    return cast(value, torch.bool) if wanted is torch.bool else value


def _position(k: Kernel, x: fx.Node, index: tuple[Expr, ...], size: Expr, *, largest: bool) -> Expr:
    """Position of the first extremum; a NaN counts as one."""
    dtype = compute_dtype(x.meta["val"].dtype)
    best, place = T.alloc_buffer((1,), DTYPES[dtype]), T.alloc_buffer((1,), "int64")
    T.buffer_store(place, tirx.const(0, "int64"), [0])
    T.buffer_store(best, cast(k.ev.at(x, (*index, i32(0))), dtype), [0])
    with T.serial(1, size) as i:
        value = keep(cast(k.ev.at(x, (*index, i)), dtype))
        better = value > best[0] if largest else value < best[0]
        if dtype.is_floating_point:
            better = tirx.And(tirx.Not(T.isnan(best[0])), tirx.Or(better, T.isnan(value)))
        with T.If(better), T.Then():
            T.buffer_store(best, value, [0])
            T.buffer_store(place, tirx.Cast("int64", i), [0])
    return place[0]


def lower_scan(module: Module, program: Program, region: Region, anchor: fx.Node) -> Lowered:
    """Kernel of a scan over the last axis.

    before: ``cumsum(x, -1)``
    after:  for each row: one running value, stored after each element
    """
    with kernel(module, program, region) as (k, out, _):
        x, (start, combine) = anchor.args[0], SCANS[anchor.target]
        assert isinstance(x, fx.Node)
        shape = k.ev.shape(x)
        lead, size = shape[:-1], shape[-1]
        result = anchor.meta["val"].dtype
        dtype = compute_dtype(result)
        with rows_in_parallel(row_count(lead)) as row:
            index = tuple(T.bind(i + i32(0)) for i in unflatten_index(lead, row)) if lead else ()
            running = T.alloc_buffer((1,), DTYPES[dtype])
            T.buffer_store(running, tirx.const(start if dtype.is_floating_point else int(start), DTYPES[dtype]), [0])
            with T.serial(0, size) as i:
                value = cast(k.ev.at(x, (*index, i)), dtype)
                T.buffer_store(running, combine(running[0], value), [0])
                T.buffer_store(out, as_stored(running[0], result), [row * size + i])
    return row_kernel(k, program, anchor)


def lower_running(module: Module, program: Program, region: Region, anchor: fx.Node) -> Lowered:
    """Kernel of ``planish::argcummax``.

    before: ``argcummax(x, largest)``
    after:  for each row: the extremum so far and its position, stored after each element; a NaN counts as one
    """
    x, largest = anchor.args
    assert isinstance(x, fx.Node)
    dtype = compute_dtype(x.meta["val"].dtype)
    with kernel(module, program, region) as (k, out, _):
        shape = k.ev.shape(x)
        lead, size = shape[:-1], shape[-1]
        with rows_in_parallel(row_count(lead)) as row:
            index = tuple(T.bind(i + i32(0)) for i in unflatten_index(lead, row)) if lead else ()
            best, place = T.alloc_buffer((1,), DTYPES[dtype]), T.alloc_buffer((1,), "int64")
            with T.serial(0, size) as i:
                value = keep(cast(k.ev.at(x, (*index, i)), dtype))
                better = value >= best[0] if largest else value <= best[0]
                if dtype.is_floating_point:
                    better = tirx.Or(T.isnan(value), tirx.And(tirx.Not(T.isnan(best[0])), better))
                with T.If(tirx.Or(tirx.EQ(i, 0), better)), T.Then():
                    T.buffer_store(best, value, [0])
                    T.buffer_store(place, tirx.Cast("int64", i), [0])
                T.buffer_store(out, place[0], [row * size + i])
    return row_kernel(k, program, anchor)


def reduction_reason(node: fx.Node) -> str | None:
    """Why a reduction or scan has no kernel here, or None."""
    x = node.args[0].meta["val"]  # pyright: ignore
    axes = node.args[1] if len(node.args) > 1 else None
    axes = [axes] if isinstance(axes, int) else axes
    if not axes or not x.dim() or [a % x.dim() for a in axes] != [x.dim() - 1]:  # pyright: ignore
        return "only the last axis is reduced natively"
    return None
