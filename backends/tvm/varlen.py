"""Attention within each row of a packed batch, and sums over its rows."""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.attention import Block, Columns, Item, Matrix, Rows, Scores, Terms, matrix, result_matrix
from planish.backends.tvm.builder import (
    TASKS,
    Expr,
    ceil_div,
    i32,
    lanes_at,
    splat,
    workspace,
)
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Region, kernel
from planish.program import Program


def lower_varlen(module: Module, program: Program, region: Region, attention: fx.Node) -> Lowered:
    """Kernel of a region around ``planish::varlen_attention``: an item is one row of the batch and one head.

    The rows come longest first, and tasks take items in turn, so that a long row at the end keeps nobody waiting.
    """
    query, key, value, query_starts, key_starts, order, mask, query_columns, key_columns = attention.args[:9]
    shape = program.shape(mask) if isinstance(mask, fx.Node) else program.shape(key)[:1]
    most = program.upper_bound(shape[-1])
    block = Block.of(module, attention, most)
    with kernel(module, program, region) as (k, out, _):
        places = [_by_head(matrix(k.ev, n)) for n in (query, key, value)]  # pyright: ignore
        places.append(_by_head(result_matrix(k.ev, region, attention, out)))
        heads = int(program.shape(attention)[1])
        batch = k.ev.shape(order)[0]  # pyright: ignore
        items = T.bind(batch * heads)
        with T.parallel(0, TASKS) as task:
            buffer = workspace(block.scratch(k.lanes))
            with T.serial(0, T.max(ceil_div(items - task, TASKS), 0)) as n:
                item = T.bind(task + n * TASKS)
                row, head = _integer(k, order, T.floordiv(item, heads)), T.bind(T.floormod(item, heads))
                q, q_end = (_integer(k, query_starts, T.bind(row + i)) for i in (0, 1))
                s, s_end = (_integer(k, key_starts, T.bind(row + i)) for i in (0, 1))
                columns = [_columns(k, query_columns, q, q_end), _columns(k, key_columns, s, s_end)]
                scores = Scores(k, Terms.of(attention), (row, head), *columns)
                operands = [_rows(place, head, start) for place, start in zip(places, (q, s, s, q), strict=True)]
                code = Item(k, block, buffer, scores, operands[0], operands[1], operands[2], operands[3])
                code.emit(T.bind(s_end - s), T.bind(q_end - q), single=most <= block.keys)
    queries, keys = program.shape(query)[0], program.shape(key)[0]  # pyright: ignore
    # rows of equal lengths take the fewest operations: sum(l^2) >= T^2 / B
    pairs = queries * keys / program.shape(order)[0]  # pyright: ignore
    flops = 2 * sympy.floor(heads * pairs) * (block.depth + block.width)
    assert k.function.func is not None
    sizes = (queries, heads, keys, block.depth)
    return Lowered("varlen_attention", k.function.func, k.operands, "attention", sizes, flops)


def _by_head(place: Matrix | None) -> Matrix:
    """A [rows, heads, columns] operand as one matrix for each head."""
    assert place is not None, "lower() has made the operand a matrix"
    return Matrix(place.buffer, (place.stride,), place.lead[0], place.offset)


def _rows(place: Matrix, head: Expr, start: Expr) -> Rows:
    return Rows(place.buffer, T.bind(place.base((head,)) + start * place.stride), place.stride)


def _integer(k: Kernel, node: Any, at: Expr) -> Expr:
    """An element of an int64 tensor."""
    return T.bind(tirx.Cast("int32", k.ev.at(node, (at,))))


def _columns(k: Kernel, columns: Any, first: Expr, end: Expr) -> Columns | None:
    """Columns of the tokens ``first .. end``; they stand in order."""
    if not isinstance(columns, fx.Node):
        return None

    def of(i: Expr) -> Expr:
        return _integer(k, columns, T.bind(first + i))

    last = T.bind(T.max(end - 1, 0))
    start = T.bind(T.min(first, last))  # a row without tokens must not read beyond the others'
    first_column, last_column = (_integer(k, columns, at) for at in (start, last))
    return Columns(of, first_column, T.bind(tirx.EQ(last_column - first_column, last - start)))


_WAYS = 4
"""Vectors of a segment sum that are accumulated at a time."""


def lower_segment_sum(module: Module, program: Program, region: Region, anchor: fx.Node) -> Lowered:
    """Kernel of ``planish::segment_sum``: for each row and some columns, the tokens one after another."""
    x, starts = anchor.args
    assert isinstance(x, fx.Node)
    with kernel(module, program, region) as (k, out, _):
        rows, *rest = k.ev.shape(anchor)
        width: Expr = i32(1)
        for size in rest:
            width = width * size
        width = T.bind(width)
        source, lanes = k.ev.sources[x].buffer, k.lanes
        span = lanes * _WAYS
        pieces = T.bind(ceil_div(width, span))
        with T.parallel(0, T.bind(rows * pieces)) as piece:
            row, column = T.bind(T.floordiv(piece, pieces)), T.bind(T.floormod(piece, pieces) * span)
            first, end = (_integer(k, starts, T.bind(row + i)) for i in (0, 1))

            def add(count: int, at: Expr, row: Expr = row, first: Expr = first, end: Expr = end) -> None:
                total = T.alloc_buffer((count,), "float32")
                whole = lanes_at(i32(0), count)
                T.buffer_store(total, splat(0.0, count), [whole])
                with T.serial(0, end - first) as t:
                    value = source[lanes_at((first + t) * width + at, count)]
                    T.buffer_store(total, total[whole] + value, [whole])
                T.buffer_store(out, total[whole], [lanes_at(row * width + at, count)])

            with T.If(column + span <= width):
                with T.Then():
                    for way in range(_WAYS):
                        add(lanes, column + way * lanes)
                with T.Else(), T.serial(0, width - column) as i:
                    add(1, column + i)
    assert k.function.func is not None
    elements = sympy.prod(program.shape(x))
    return Lowered("segment_sum", k.function.func, k.operands, "segment_sum", program.shape(x), elements)
