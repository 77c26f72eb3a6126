"""Norms over the last axis: one row at a time, with the ops before and after them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, dtype_of, f32, for_vectors, horizontal, i32, keep, lanes_at, splat
from planish.backends.tvm.index import as_stored, unflatten_index
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Region, kernel, rows_in_parallel
from planish.ops import argument, aten
from planish.program import Program

Index = tuple[Expr, ...]


WAYS = 4
"""Independent accumulators of a reduction: as many as hide the latency of an addition."""


def accumulate(
    k: Kernel,
    size: Expr,
    start: float | bool,
    combine: Callable[[Expr, Expr], Expr],
    value: Any,
    lanes: int,
    dtype: str = "float32",
) -> Expr:
    """Combine ``value(start, lanes)`` over ``0..size`` in a fixed order.

    ``WAYS`` vectors side by side, the vectors that are left, then single elements; at the end the accumulators and
    their lanes pairwise.
    """
    wide = [T.alloc_buffer((lanes,), dtype) for _ in range(WAYS)]
    narrow = T.alloc_buffer((1,), dtype)
    whole = lanes_at(i32(0), lanes)
    for register in wide:
        T.buffer_store(register, splat(tirx.const(start, dtype), lanes), [whole])
    T.buffer_store(narrow, tirx.const(start, dtype), [i32(0)])
    step = lanes * WAYS
    blocks = size // step if isinstance(size, int) else T.floordiv(size, step)
    with T.serial(0, blocks) as block:
        for way, register in enumerate(wide):
            T.buffer_store(register, combine(register[whole], value(block * step + way * lanes, lanes)), [whole])
    for at, count in for_vectors(size - blocks * step, lanes):
        into, where = (wide[0], whole) if count > 1 or lanes == 1 else (narrow, i32(0))
        T.buffer_store(into, combine(into[where], value(blocks * step + at, count)), [where])
    # Through memory: TVM inlines nested expressions into each other, which grows exponentially.
    for distance in (WAYS // 2, WAYS // 4):
        for into, other in zip(wide[:distance], wide[distance : 2 * distance], strict=True):
            T.buffer_store(into, combine(into[whole], other[whole]), [whole])
    return T.bind(combine(horizontal(T.bind(wide[0][whole]), lanes, combine), narrow[0]))


def add(a: Expr, b: Expr) -> Expr:
    """Sum."""
    return a + b


def maximum(a: Expr, b: Expr) -> Expr:
    """Maximum that keeps NaN ("a > b ? a : b" keeps a NaN of b)."""
    a = keep(a)
    return tirx.Select(T.isnan(a), a, T.max(a, b)) if "float" in dtype_of(a) else T.max(a, b)


def minimum(a: Expr, b: Expr) -> Expr:
    """Minimum that keeps NaN."""
    a = keep(a)
    return tirx.Select(T.isnan(a), a, T.min(a, b)) if "float" in dtype_of(a) else T.min(a, b)


def multiply(a: Expr, b: Expr) -> Expr:
    """Product."""
    return a * b


def normalise_row(
    k: Kernel,
    norm: fx.Node,
    out: tirx.Buffer,
    base: Expr,
    size: Expr,
    index: Index,
    lanes: int = 0,
    after: fx.Node | None = None,
) -> None:
    """Layer-normalise the row at ``out[base : base+size]`` in place; stores ``after``, an op on the norm's value.

    Two passes for the statistics (mean, then the mean square of the differences), as accurate as PyTorch's.
    """
    lanes = lanes or k.lanes
    weight, bias, eps = argument(norm, 2, "weight"), argument(norm, 3, "bias"), argument(norm, 4, "eps", 1e-5)
    scale = f32(1.0) / (f32(float(size)) if isinstance(size, int) else tirx.Cast("float32", size))

    def at(start: Expr, count: int) -> Expr:
        return out[lanes_at(base + start, count)]

    mean = T.bind(accumulate(k, size, 0.0, add, at, lanes) * scale)

    def squared(start: Expr, count: int) -> Expr:
        difference = T.bind(at(start, count) - splat(mean, count))
        return difference * difference

    variance = accumulate(k, size, 0.0, add, squared, lanes) * scale
    inverse = T.bind(f32(1.0) / T.sqrt(variance + f32(eps)))
    for start, count in for_vectors(size, lanes):
        last = lanes_at(start, count)
        value = (at(start, count) - splat(mean, count)) * splat(inverse, count)
        if weight is not None:
            value = value * k.ev.at(weight, (last,))
        if bias is not None:
            value = value + k.ev.at(bias, (last,))
        store(k, norm, T.bind(value), out, base + start, (*index, last), count, after)


def store(
    k: Kernel,
    anchor: fx.Node,
    value: Expr,
    out: tirx.Buffer,
    at: Expr,
    index: Index,
    lanes: int,
    after: fx.Node | None = None,
) -> None:
    """Store ``after`` (by default the region's result) at ``index``, the anchor's value there being ``value``."""
    before = k.ev.computed
    k.ev.computed = {anchor: value}
    result = k.ev.at(after or k.region.result, index)
    k.ev.computed = before
    dtype = (after or k.region.result).meta["val"].dtype
    T.buffer_store(out, splat(as_stored(result, dtype), lanes), [lanes_at(at, lanes)])


def lower_rows(module: Module, program: Program, region: Region, anchor: fx.Node, lanes: int) -> Lowered:
    """Kernel of a region around a norm.

    before: ``gelu(layer_norm(a + b))``
    after:  for each row: store a+b into the result's row while summing it, normalise it there, GELU on the way out
    """
    with kernel(module, program, region) as (k, out, _):
        shape = k.ev.shape(anchor)
        lead, size = shape[:-1], shape[-1]
        x = anchor.args[0]
        with rows_in_parallel(row_count(lead)) as row:
            index = tuple(T.bind(i + i32(0)) for i in unflatten_index(lead, row)) if lead else ()
            base = T.bind(row * size)
            for start, count in for_vectors(size, lanes):
                value = k.ev.at(x, (*index, lanes_at(start, count)))
                T.buffer_store(out, splat(value, count), [lanes_at(base + start, count)])
            normalise_row(k, anchor, out, base, size, index, lanes)
    return row_kernel(k, program, anchor)


def row_count(lead: tuple[Expr, ...]) -> Expr:
    total: Expr = i32(1)
    for s in lead:
        total = total * s
    return T.bind(total)


def row_kernel(k: Kernel, program: Program, anchor: fx.Node) -> Lowered:
    x = anchor.args[0]
    elements = sympy.prod(program.shape(x))
    assert k.function.func is not None
    name = str(anchor.target).split(".")[1]
    return Lowered(name, k.function.func, k.operands, name, program.shape(x), 5 * elements)


def row_reason(node: fx.Node) -> str | None:
    """Why a norm or softmax has no kernel here, or None."""
    x = node.args[0].meta["val"]  # pyright: ignore
    if node.target is aten.layer_norm.default:
        last = len(node.args[1]) == 1  # pyright: ignore
    else:  # planish's own have no other axis
        last = x.dim() > 0 and (isinstance(node.args[1], str) or node.args[1] % x.dim() == x.dim() - 1)  # pyright: ignore
    if not last:
        return "only the last axis is normalised natively"
    return None if node.meta["val"].dtype is torch.float32 else f"it is native for float32, not {x.dtype}"
