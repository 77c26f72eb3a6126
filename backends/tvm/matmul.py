"""Products of two runtime matrices: the second is packed on the way, the first is read in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.attention import Matrix, matrix
from planish.backends.tvm.builder import Expr, ceil_div, for_vectors, i32, keep, lanes_at, splat, workspace
from planish.backends.tvm.index import unflatten_index
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Region, kernel, rows_in_parallel
from planish.backends.tvm.microkernel import Tile, call_tile, gemm_tile
from planish.backends.tvm.operands import product, row_stride
from planish.ops import LINEAR
from planish.program import Program

ROWS_PER_TASK = 128
"""Rows that share one packing of a panel: enough to make packing cheap, few enough to give every thread work."""


@dataclass(frozen=True)
class Operands:
    """The product C[item, row, column] = sum over k of A[item, row, k] B[item, k, column].

    Attributes:
        a: the first operand in memory.
        b: vector of ``count`` values of the second one from a column on, at an item's index and a k.
        lead: sizes of the leading axes whose indices name an item.
        index: the result's index from an item's index, a row and a column.
    """

    a: Matrix
    b: Callable[[tuple[Expr, ...], Expr, Expr, int], Expr]
    lead: tuple[Expr, ...]
    index: Callable[[tuple[Expr, ...], Expr, Expr], tuple[Expr, ...]]


def lower_matmul(module: Module, program: Program, region: Region, anchor: fx.Node, lanes: int) -> Lowered:
    """Kernel of a region around a product whose second operand is no constant.

    before: ``relu(bmm(a, b))``, ``relu(linear(x, w, bias))`` with a weight that is computed
    after:  for each item, panel of columns and chunk of rows: copy the panel of b into scratch as [k][column]; for each
            tile of rows: multiply, then bias and ReLU on the tile
    """
    first, second = anchor.args[:2]
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    depth = program.shape(first)[-1]
    tile = gemm_tile(module.target)
    width = tile.vectors * module.target.lanes
    with kernel(module, program, region) as (k, out, _):
        operands = _linear_operands(k, anchor) if anchor.target is LINEAR else _batched_operands(k, anchor)
        shape = k.ev.shape(anchor)
        columns = shape[-1]
        rows = keep((product(shape[:-1]) if anchor.target is LINEAR else shape[-2]) + i32(0))
        panels, chunks = keep(ceil_div(columns, width) + i32(0)), keep(ceil_div(rows, ROWS_PER_TASK))
        items = keep(product(operands.lead) + i32(0))
        code = Product(k, anchor, operands, tile, out, k.ev.size(depth), columns, lanes)
        with T.parallel(0, items * panels * chunks) as task:
            memory = workspace(max(1, program.upper_bound(depth)) * width)
            item, panel, chunk = (keep(i + i32(0)) for i in unflatten_index((items, panels, chunks), task))
            at = tuple(keep(i + i32(0)) for i in unflatten_index(operands.lead, item)) if operands.lead else ()
            row = keep(chunk * ROWS_PER_TASK)
            count = keep(T.min(rows - row, ROWS_PER_TASK))
            code.emit(memory, at, item, row, count, keep(panel * width))
    m, n = product(program.shape(anchor)[:-1]), program.shape(anchor)[-1]
    assert k.function.func is not None
    return Lowered("matmul", k.function.func, k.operands, "matmul", (m, n, depth), sympy.Integer(2) * m * n * depth)


def lower_grouped(module: Module, program: Program, region: Region, anchor: fx.Node, lanes: int) -> Lowered:
    """Kernel of ``planish::grouped_mm``.

    before: ``grouped_mm(x, weight, ends)``
    after:  zeros; then for each group that has rows, and panel of columns: copy the panel of the group's matrix into
            scratch; for each tile of the group's rows: multiply
    """
    first, weight, ends = anchor.args
    assert isinstance(first, fx.Node)
    assert isinstance(weight, fx.Node)
    groups, depth, columns = (int(s) for s in weight.meta["val"].shape)
    tile = gemm_tile(module.target, 0)
    width = tile.vectors * module.target.lanes
    with kernel(module, program, region) as (k, out, _):
        a = matrix(k.ev, first)
        assert a is not None, "lower() has made the operand a matrix"
        rows = T.bind(k.ev.shape(anchor)[0] + i32(0))
        with rows_in_parallel(rows) as row:
            for start, count in for_vectors(columns, k.lanes):
                T.buffer_store(out, splat(0.0, count), [lanes_at(row * columns + start, count)])

        def b(at: tuple[Expr, ...], d: Expr, column: Expr, count: int) -> Expr:
            return k.ev.at(weight, (*at, d, lanes_at(column, count)))

        def end(group: Expr) -> Expr:
            return T.max(0, T.min(tirx.Cast("int32", k.ev.at(ends, (group,))), rows))

        operands = Operands(Matrix(a.buffer, (), a.stride, a.offset), b, (), lambda at, row, column: (row, column))
        code = Product(k, anchor, operands, tile, out, depth, i32(columns), lanes)
        with T.parallel(0, groups * -(-columns // width)) as task:
            memory = workspace(max(1, depth) * width)
            group, panel = (T.bind(i + i32(0)) for i in unflatten_index((groups, -(-columns // width)), task))
            start = T.alloc_buffer((1,), "int32")
            T.buffer_store(start, i32(0), [0])
            with T.If(group > 0), T.Then():
                T.buffer_store(start, end(T.max(group - 1, 0)), [0])
            begin = T.bind(start[0])
            count = keep(end(group) - begin)
            with T.If(count > 0), T.Then():
                code.emit(memory, (group,), i32(0), begin, count, T.bind(panel * width))
    m = program.shape(anchor)[0]
    assert k.function.func is not None
    flops = sympy.Integer(2) * m * columns * depth
    return Lowered("grouped_matmul", k.function.func, k.operands, "grouped_matmul", (m, columns, depth), flops)


def _batched_operands(k: Kernel, anchor: fx.Node) -> Operands:
    first, second = anchor.args[:2]
    assert isinstance(first, fx.Node)
    a = matrix(k.ev, first)
    assert a is not None, "lower() has made the operand a matrix"

    def b(at: tuple[Expr, ...], depth: Expr, column: Expr, count: int) -> Expr:
        return k.ev.at(second, (*at, depth, lanes_at(column, count)))

    return Operands(a, b, k.ev.shape(anchor)[:-2], lambda at, row, column: (*at, row, column))


def _linear_operands(k: Kernel, anchor: fx.Node) -> Operands:
    first, weight = anchor.args[:2]
    assert isinstance(first, fx.Node)
    access = row_stride(k.ev, first, int(first.meta["val"].shape[-1]))
    assert access is not None, "lower() has made the operand a matrix"
    source, stride, offset = access
    lead = k.ev.shape(anchor)[:-1]

    def b(at: tuple[Expr, ...], depth: Expr, column: Expr, count: int) -> Expr:
        return k.ev.at(weight, (lanes_at(column, count), depth))

    def index(at: tuple[Expr, ...], row: Expr, column: Expr) -> tuple[Expr, ...]:
        return (*unflatten_index(lead, row), column) if lead else (column,)

    return Operands(Matrix(k.ev.sources[source].buffer, (), stride, offset), b, (), index)


@dataclass(frozen=True)
class Product:
    """Code for one task."""

    k: Kernel
    anchor: fx.Node
    operands: Operands
    tile: Tile
    out: Any
    depth: Expr
    columns: Expr
    lanes: int

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.tile.vectors * self.k.lanes

    def emit(self, memory: Any, at: tuple[Expr, ...], item: Expr, row: Expr, count: Expr, column: Expr) -> None:
        """Rows ``row .. row+count`` of the panel that starts at ``column``."""
        left = T.bind(T.min(self.columns - column, self.width))
        self._pack(memory, at, column, left)
        rows_before = item * self._rows()
        with T.serial(0, ceil_div(count, self.tile.rows)) as t:
            first = T.bind(row + t * self.tile.rows)
            here = T.bind(count - t * self.tile.rows)
            place = T.bind((rows_before + first) * self.columns + column)
            self._multiply(memory, at, first, here, place, left)
            if self.k.region.result is not self.anchor or self._bias() is not None:
                with T.serial(0, T.min(here, self.tile.rows)) as i:
                    self._epilogue(at, T.bind(first + i), T.bind(place + i * self.columns), column, left)

    def _rows(self) -> Expr:
        """Rows of an item."""
        return self.k.ev.shape(self.anchor)[-2] if self.operands.lead else 0

    def _pack(self, memory: Any, at: tuple[Expr, ...], column: Expr, left: Expr) -> None:
        """The panel as [k][column], zeros beyond the last column."""
        with T.serial(0, self.depth) as d:
            with T.If(left < self.width), T.Then():
                for start, count in for_vectors(self.width, self.k.lanes):
                    T.buffer_store(memory, splat(0.0, count), [lanes_at(d * self.width + start, count)])
            for start, count in for_vectors(left, self.lanes):
                value = self.operands.b(at, d, column + start, count)
                T.buffer_store(memory, splat(value, count), [lanes_at(d * self.width + start, count)])

    def _multiply(self, memory: Any, at: tuple[Expr, ...], row: Expr, here: Expr, place: Expr, left: Expr) -> None:
        """One tile of rows; the last panel stores only the columns that exist."""
        base = self.operands.a.base(at if self.operands.lead else ())
        a = T.address_of(self.operands.a.buffer[base + row * self.operands.a.stride])
        b, c = T.address_of(memory[0]), T.address_of(self.out[place])
        sizes = (self.operands.a.stride, i32(self.width), self.columns, self.depth)

        def narrower(vectors: int) -> None:
            last = T.bind(left - (vectors - 1) * self.k.lanes)

            def call() -> None:
                call_tile(self.k.module, self.tile, here, (a, b, c, b), sizes, vectors=vectors, tail_lanes=last)

            if vectors == 1:
                call()
                return
            with T.If(last > 0):
                with T.Then():
                    call()
                with T.Else():
                    narrower(vectors - 1)

        with T.If(tirx.EQ(left, self.width)):
            with T.Then():
                call_tile(self.k.module, self.tile, here, (a, b, c, b), sizes, vectors=self.tile.vectors)
            with T.Else():
                narrower(self.tile.vectors)

    def _bias(self) -> fx.Node | None:
        bias = self.anchor.args[2] if self.anchor.target is LINEAR and len(self.anchor.args) > 2 else None
        return bias if isinstance(bias, fx.Node) else None

    def _epilogue(self, at: tuple[Expr, ...], row: Expr, place: Expr, column: Expr, left: Expr) -> None:
        """Bias and the elementwise chain on one row of a tile, in place."""
        ev, bias = self.k.ev, self._bias()
        for start, count in for_vectors(left, self.lanes):
            where, last = lanes_at(place + start, count), lanes_at(column + start, count)
            value = T.bind(self.out[where])
            if bias is not None:
                value = T.bind(value + splat(ev.at(bias, (last,)), count))
            ev.computed = {self.anchor: value}
            result = ev.at(self.k.region.result, self.operands.index(at, row, last))
            ev.computed = {}
            T.buffer_store(self.out, splat(result, count), [where])
