"""Linear layers: packed weights, register tiles, and everything elementwise (and layer norms) done on the way.

A region may hold a chain of linear layers, each reading the rows that the one before has just computed (a feed-forward
block). A chunk of rows then passes through all of them while it is in the second-level cache.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import (
    TASKS,
    Expr,
    as_int,
    ceil_div,
    equal,
    i32,
    keep,
    lanes_at,
    round_up,
    workspace,
)
from planish.backends.tvm.expr import Evaluator, Rows
from planish.backends.tvm.index import unflatten_index
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Packed, Region, Scratch, kernel, rows_in_parallel
from planish.backends.tvm.microkernel import CACHE_LINE, UNROLL, Tile, call_tile, gemm_tile, prefetch
from planish.backends.tvm.rowwise import normalise_row
from planish.backends.tvm.scalars import ELEMENTWISE
from planish.ops import LAYER_NORM, LINEAR
from planish.program import Program
from planish.targets import Target

CHUNK_TILES = 8
"""Fewest row tiles in a chunk whose weights stream from memory: they do so once per chunk, so it must reuse them."""

RESIDENT_CHUNK_TILES = 2
"""Fewest row tiles in a chunk whose weights stay in the second-level cache."""

BALANCE = 8
"""The number of chunks is a multiple of this, so that a few threads get equal shares."""


@dataclass(frozen=True)
class Stage:
    """One linear layer of a region: its op, the last elementwise op on its tiles, and the norm of its rows, if any."""

    linear: fx.Node
    stored: fx.Node
    norm: fx.Node | None

    @property
    def result(self) -> fx.Node:
        """The value that the stage leaves behind."""
        return self.norm or self.stored

    @property
    def columns(self) -> int:
        """Output features."""
        return int(self.linear.args[1].meta["val"].shape[0])  # pyright: ignore

    @property
    def depth(self) -> int:
        """Input features."""
        return int(self.linear.args[1].meta["val"].shape[1])  # pyright: ignore


def stages_of(region: Region) -> list[Stage]:
    """The region's linear layers in order; a stage ends where the next one's input, or the region's result, is."""
    linears = [n for n in region.nodes if n.target is LINEAR]
    ends = [n.args[0] for n in linears[1:]] + [region.result]
    stages: list[Stage] = []
    for linear, end in zip(linears, ends, strict=True):
        assert isinstance(end, fx.Node)
        norm = end if end.target is LAYER_NORM else None
        stored = norm.args[0] if norm is not None else end
        assert isinstance(stored, fx.Node)
        stages.append(Stage(linear, stored, norm))
    return stages


def product(sizes: tuple[Expr, ...]) -> Expr:
    """Number of elements."""
    total: Expr = 1
    for s in sizes:
        total = total * s
    return total


def row_stride(ev: Evaluator, node: fx.Node, depth: int) -> tuple[fx.Node, Expr, Expr] | None:
    """Address of a matrix operand as (source, elements between rows, offset), its leading axes taken as one row axis.

    None where the last axis is not contiguous or the leading axes do not merge.
    """
    shape = ev.shape(node)
    over = tuple(tirx.Var(f"i{axis}", "int32") for axis in range(len(shape)))
    found = ev.affine(node, over, over)
    if found is None:
        return None
    source, (*strides, offset) = found
    if not equal(strides[-1], 1) and depth != 1:
        return None
    lead = [(s, n) for s, n in zip(strides[:-1], shape[:-1], strict=True) if as_int(n) != 1]
    for (outer, _), (inner, size) in itertools.pairwise(lead):
        if not equal(outer, inner * size):
            return None
    return source, (lead[-1][0] if lead else i32(depth)), offset


def least_tiles(target: Target, stages: list[Stage]) -> int:
    """Fewest row tiles of a chunk."""
    weights = sum(4 * s.columns * s.depth for s in stages)
    return RESIDENT_CHUNK_TILES if weights <= target.l2_bytes // 2 else CHUNK_TILES


def lower_linear(module: Module, program: Program, region: Region) -> Lowered:
    """Kernel of a region around one or more linear layers.

    before: ``layer_norm(linear(gelu(linear(x, w, b)), v, c) + x)``
    after:  for each chunk of rows: for each layer: for each block of columns, for each tile of rows: multiply and add
            the bias, then GELU and residual on the tile while it is in the first-level cache; then the norm of the
            chunk's rows

    With few rows the column blocks are the parallel loop instead, and the norm a loop of its own.
    """
    stages = stages_of(region)
    weights = tuple(s.linear.args[1] for s in stages)
    tiles = [gemm_tile(module.target, s.columns) for s in stages]
    widths = [t.vectors * module.target.lanes for t in tiles]
    packed = [(Packed(w, "columns", width), "float32") for w, width in zip(weights, widths, strict=True)]  # pyright: ignore
    between = sum(s.columns for s in stages[:-1])
    few = TASKS * least_tiles(module.target, stages) * tiles[0].rows
    scratch = [(Scratch(4 * few * between), "float32")] if between else []
    with kernel(module, program, region, packed + scratch, skip=weights) as (k, out, extras):  # pyright: ignore
        rows = T.bind(product(k.ev.shape(stages[0].linear)[:-1]) + i32(0))
        chain = Chain(k, stages, extras[: len(stages)], out)
        with T.If(rows >= few):
            with T.Then():
                most = chain.rows_per_chunk()
                chunks = round_up(T.max(ceil_div(rows, most), TASKS), BALANCE)
                chunk = T.bind(round_up(ceil_div(rows, chunks), chain.tile.rows))
                with T.parallel(0, ceil_div(rows, chunk)) as c:
                    memory = workspace(most * between) if between else None
                    first = T.bind(c * chunk)
                    chain.emit(first, T.bind(T.min(chunk, rows - first)), memory, most, parallel=False)
            with T.Else():
                chain.emit(i32(0), rows, extras[-1] if between else None, few, parallel=True)
    m = product(program.shape(stages[0].linear)[:-1])
    shape = [m]
    for s in stages:
        shape += [s.columns, s.depth]
    flops = sum(2 * m * s.columns * s.depth for s in stages)
    assert k.function.func is not None
    return Lowered("gemm", k.function.func, k.operands, "gemm", tuple(shape), flops)


@dataclass(frozen=True)
class Matrix:
    """Rows in memory: element ``(row, column)`` of a stage is at ``base + (row - first) * stride + column``."""

    buffer: Any
    base: Expr
    first: Expr
    stride: Expr

    def row(self, row: Expr) -> Expr:
        """Position of the row's first element."""
        return self.base + (row - self.first) * self.stride


@dataclass
class Chain:
    """Code for the stages of a region."""

    k: Kernel
    stages: list[Stage]
    panels: list[Any]
    out: Any

    @property
    def tile(self) -> Tile:
        """Register block of the first stage, by whose rows chunks are cut."""
        return gemm_tile(self.k.module.target, self.stages[0].columns)

    def rows_per_chunk(self) -> int:
        """Most rows of a chunk: what is read and kept for it fills at most 3/4 of the second-level cache."""
        per_row = 4 * (self.stages[0].depth + sum(s.columns for s in self.stages[:-1]))
        fitting = self.k.module.target.l2_bytes * 3 // 4 // per_row
        return max(least_tiles(self.k.module.target, self.stages), fitting // self.tile.rows) * self.tile.rows

    def emit(self, first: Expr, count: Expr, memory: Any, most: int, *, parallel: bool) -> None:
        """All stages for rows ``first .. first+count``.

        Args:
            memory: the results of all stages but the last, one after another, ``most`` rows from ``first`` on each.
            parallel: make the column blocks parallel loops.
        """
        results: dict[fx.Node, Matrix] = {}
        base: Expr = i32(0)
        for index, stage in enumerate(self.stages):
            if stage is self.stages[-1]:
                place = Matrix(self.out, i32(0), i32(0), i32(stage.columns))
            else:
                place = Matrix(memory, base, first, i32(stage.columns))
                base = base + i32(most * stage.columns)
            StageCode(self, stage, self.panels[index], self._source(stage, results), place, results).emit(
                first, count, parallel=parallel
            )
            results[stage.result] = place

    def _source(self, stage: Stage, results: dict[fx.Node, Matrix]) -> Matrix:
        x = stage.linear.args[0]
        assert isinstance(x, fx.Node)
        if x in results:
            return results[x]
        access = row_stride(self.k.ev, x, stage.depth)
        assert access is not None, "lower() has made the operand a matrix"
        source, stride, offset = access
        return Matrix(self.k.ev.sources[source].buffer, offset, i32(0), stride)


@dataclass(frozen=True)
class StageCode:
    """Code for one stage. ``earlier`` are the results of the stages before, which residuals may read."""

    chain: Chain
    stage: Stage
    panels: Any
    source: Matrix
    place: Matrix
    earlier: dict[fx.Node, Matrix]

    @property
    def tile(self) -> Tile:
        """Register block."""
        return gemm_tile(self.chain.k.module.target, self.stage.columns)

    def emit(self, first: Expr, count: Expr, *, parallel: bool) -> None:
        """The blocks of columns, then the norm."""
        tile, lanes = self.tile, self.chain.k.lanes
        width = tile.vectors * lanes
        whole, rest = divmod(self.stage.columns, width)
        with (T.parallel if parallel else T.serial)(0, whole + bool(rest)) as n:
            if whole and rest:
                with T.If(n < whole):
                    with T.Then():
                        self._block(first, count, n * width, tile.vectors, 0)
                    with T.Else():
                        self._block(first, count, i32(whole * width), -(-rest // lanes), self.stage.columns % lanes)
            elif whole:
                self._block(first, count, n * width, tile.vectors, 0)
            else:
                self._block(first, count, i32(0), -(-rest // lanes), self.stage.columns % lanes)
        if self.stage.norm is not None:
            if parallel:
                with rows_in_parallel(count) as row:
                    self._norm(row)
            else:
                with T.serial(0, count) as i:
                    self._norm(T.bind(first + i))

    def _block(self, first: Expr, count: Expr, column: Expr, vectors: int, tail: int) -> None:
        """Rows ``first .. first+count`` of ``vectors`` vectors of columns; ``tail`` lanes of the last, 0 for all."""
        tile, depth = self.tile, self.stage.depth
        span = vectors * self.chain.k.lanes
        bias = self._bias() if not tail else None  # a tile reads whole vectors of it
        done = self.stage.stored is self.stage.linear and (bias is not None or self._bias() is None)
        with T.serial(0, ceil_div(count, tile.rows)) as t:
            row = T.bind(first + t * tile.rows)
            left = T.bind(count - t * tile.rows)
            begin = T.address_of(self.source.buffer[self.source.row(row)])
            panel = T.address_of(self.panels[column * depth])
            target = T.address_of(self.place.buffer[self.place.row(row) + column])
            # what the tiles of this block fetch for the next one: a part each, together the whole panel and again
            part = T.floormod(t, UNROLL * vectors) * (depth // UNROLL * (CACHE_LINE // 4))
            ahead = T.address_of(self.panels[(column + span) * depth + part])
            pointers = (begin, panel, target, ahead)
            sizes = (self.source.stride, i32(span), self.place.stride, i32(depth))
            start = T.address_of(self.chain.k.ev.sources[bias].buffer[column]) if bias is not None else None
            self._fetch_residuals(row, T.min(left, tile.rows), column, vectors)
            options = {"vectors": vectors, "tail_lanes": tail, "bias": start, "cold": start is not None}
            call_tile(self.chain.k.module, tile, left, pointers, sizes, **options)
            if not done:
                with T.serial(0, T.min(left, tile.rows)) as i:
                    self._epilogue(T.bind(row + i), column, span, tail)

    def _fetch_residuals(self, row: Expr, count: Expr, column: Expr, vectors: int) -> None:
        """Have what the epilogue adds on its way from memory while the tile multiplies.

        A tile reads a few cache lines of each row, which the hardware's prefetcher does not foresee.
        """
        k, shape = self.chain.k, self.chain.k.program.shape(self.stage.linear)
        residuals = [n for n in k.ev.sources if self._is_operand(n) and k.program.shape(n) == shape]
        for node in residuals:
            buffer = k.ev.sources[node].buffer
            with T.serial(0, count) as i:
                start = keep((row + i) * self.stage.columns + column)
                for v in range(vectors):
                    prefetch(T.address_of(buffer[start + v * k.lanes]), level=1)

    def _is_operand(self, node: fx.Node) -> bool:
        """Whether an elementwise op of this stage's epilogue reads the fp32 tensor ``node``."""
        users = {n for n in self.chain.k.region.nodes if n.target in ELEMENTWISE and node in n.all_input_nodes}
        return node.meta["val"].dtype is torch.float32 and bool(users)

    def _bias(self) -> fx.Node | None:
        """The bias in memory, if there is one."""
        bias = self.stage.linear.args[2] if len(self.stage.linear.args) > 2 else None
        return bias if isinstance(bias, fx.Node) else None

    def _epilogue(self, row: Expr, column: Expr, span: int, tail: int) -> None:
        """The elementwise chain, and the bias of a ragged tile, on one row of a tile, in place."""
        ev, lanes = self.chain.k.ev, self.chain.k.lanes
        index = self._enter_row(row)
        start = T.bind(self.place.row(row) + column)

        def element(at: Expr, count: int) -> None:
            place, last = lanes_at(start + at, count), lanes_at(column + at, count)
            value = self.place.buffer[place]
            bias = self._bias()
            if bias is not None and tail:
                value = value + ev.at(bias, (last,))
            ev.computed = {self.stage.linear: T.bind(value)}
            T.buffer_store(self.place.buffer, ev.at(self.stage.stored, (*index, last)), [place])

        for v in range(span // lanes - bool(tail)):
            element(v * lanes, lanes)
        if tail:
            with T.serial(0, tail) as j:
                element(span - lanes + j, 1)
        ev.computed = {}
        ev.rows = {}

    def _norm(self, row: Expr) -> None:
        assert self.stage.norm is not None
        index = self._enter_row(row)
        norm, start = self.stage.norm, T.bind(self.place.row(row))
        normalise_row(self.chain.k, norm, self.place.buffer, start, self.stage.columns, index, after=norm)
        self.chain.k.ev.rows = {}

    def _enter_row(self, row: Expr) -> tuple[Expr, ...]:
        """Make the earlier stages' rows readable; returns the row's index along the leading axes."""
        lead = self.chain.k.ev.shape(self.stage.linear)[:-1]
        self.chain.k.ev.rows = {n: Rows(m.buffer, T.bind(m.row(row))) for n, m in self.earlier.items()}
        return unflatten_index(lead, row) if lead else ()
