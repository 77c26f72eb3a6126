"""Elementwise groups: one loop nest over the result, vectors along the last axis."""

from __future__ import annotations

import sympy
import torch
from torch import fx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, equal, for_vectors, i32, lanes_at, splat
from planish.backends.tvm.index import as_stored, unflatten_index
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Region, kernel, rows_in_parallel
from planish.backends.tvm.scalars import ELEMENTWISE
from planish.program import Program

FLAT_CHUNK = 4096
"""Elements per row when a flat loop is cut into rows."""


def lower_elementwise(module: Module, program: Program, region: Region, lanes: int) -> Lowered:
    """Kernel of a region of elementwise ops, views, generators and gathers.

    before: ``gelu(a + b)``
    after:  for each row of the result, for each vector: load a and b, add, GELU, store

    Where every operand has the result's shape the tensor is one flat row, cut into chunks.
    """
    result = region.result
    dtype = result.meta["val"].dtype
    with kernel(module, program, region) as (k, out, _):
        shape = k.ev.shape(result)
        if is_flat(k, region, shape):
            flat(k, result, out, shape, lanes)
        else:
            lead, size = shape[:-1], shape[-1] if shape else 1
            rows: Expr = i32(1)
            for s in lead:
                rows = rows * s
            with rows_in_parallel(T.bind(rows)) as row:
                index = tuple(T.bind(i + i32(0)) for i in unflatten_index(lead, row)) if lead else ()
                base = T.bind(row * size)
                for start, count in for_vectors(size, lanes):
                    place = (*index, lanes_at(start, count)) if shape else ()
                    store(k, result, place, out, base + start, count, dtype)
    name = str(result.target).split(".")[1] if len(region.nodes) == 1 else "elementwise"
    elements = sympy.prod(program.shape(result))
    arithmetic = sum(n.target in ELEMENTWISE for n in region.nodes)
    assert k.function.func is not None
    return Lowered(name, k.function.func, k.operands, name, program.shape(result), arithmetic * elements)


def is_flat(k: Kernel, region: Region, shape: tuple[Expr, ...]) -> bool:
    """Whether all nodes are elementwise and all tensors have the result's shape."""

    def same(node: fx.Node) -> bool:
        own = k.ev.shape(node)
        return len(own) == len(shape) and all(equal(a, b) for a, b in zip(own, shape, strict=True))

    return len(shape) > 1 and all(n.target in ELEMENTWISE for n in region.nodes) and all(map(same, region.inputs))


def flat(k: Kernel, result: fx.Node, out: Expr, shape: tuple[Expr, ...], lanes: int) -> None:
    """The loop over a flat tensor: sources are seen as one axis."""
    size: Expr = i32(1)
    for s in shape:
        size = size * s
    size = T.bind(size)
    k.ev.flatten(size)
    with rows_in_parallel(T.floordiv(size + (FLAT_CHUNK - 1), FLAT_CHUNK)) as row:
        base = T.bind(row * FLAT_CHUNK)
        for start, count in for_vectors(T.bind(T.min(size - base, FLAT_CHUNK)), lanes):
            at = T.bind(base + start)
            store(k, result, (lanes_at(at, count),), out, at, count, result.meta["val"].dtype)


def store(
    k: Kernel, result: fx.Node, index: tuple[Expr, ...], out: Expr, at: Expr, lanes: int, dtype: torch.dtype
) -> None:
    """Store the value of ``result`` at ``index``; a bool becomes a byte."""
    value = as_stored(k.ev.at(result, index), dtype)
    T.buffer_store(out, splat(value, lanes), [lanes_at(at, lanes)])
