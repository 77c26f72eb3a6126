"""Linear layers: packed weights, register tiles, and everything elementwise (and layer norms) done on the way.

A region may hold a chain of linear layers, each reading the rows that the one before has just computed (a feed-forward
block). A chunk of rows then passes through all of them while it is in the second-level cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import TASKS, Expr, ceil_div, i32, round_up, workspace
from planish.backends.tvm.index import storage_dtype
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Packed, Region, Scratch, kernel
from planish.backends.tvm.microkernel import CACHE_LINE, UNROLL, call_tile, gemm_tile
from planish.backends.tvm.operands import Matrix, product, row_stride
from planish.backends.tvm.pack import COLUMNS
from planish.backends.tvm.quantized import IntegerTiles
from planish.backends.tvm.quantized_avx2 import Avx2Tiles
from planish.backends.tvm.quantized_neon import NeonTiles
from planish.backends.tvm.stage import Block, Stage, StageCode, Tiles, stages_of
from planish.ops import QUANTIZED, QUANTIZED_CONVOLUTION
from planish.program import Program
from planish.targets import Target

CHUNK_TILES = 8
"""Fewest row tiles in a chunk whose weights stream from memory: they do so once per chunk, so it must reuse them."""

RESIDENT_CHUNK_TILES = 2
"""Fewest row tiles in a chunk whose weights stay in the second-level cache."""

BALANCE = 8
"""The number of chunks is a multiple of this, so that a few threads get equal shares."""


def lower_linear(module: Module, program: Program, region: Region, narrow: Mapping[fx.Node, torch.dtype]) -> Lowered:
    """Kernel of a region around one or more linear layers.

    before: ``layer_norm(linear(gelu(linear(x, w, b)), v, c) + x)``
    after:  for each chunk of rows: for each layer: for each block of columns, for each tile of rows: multiply and add
            the bias, then GELU and residual on the tile while it is in the first-level cache; then the norm of the
            chunk's rows

    With few rows the column blocks are the parallel loop instead, and the norm a loop of its own.

    Args:
        module: for the kernel's tiles.
        program: of the region.
        region: around the layers.
        narrow: weights in fp32 whose values a half precision holds exactly, and which: they are stored so.
    """
    stages = stages_of(region, narrow)
    plan = Chain.plan(module.target, stages)
    constants = [c for tiles in plan.tiles for c in tiles.constants()]
    scratch = plan.scratch()
    few = TASKS * plan.least_rows()
    extra: list[tuple[Any, str]] = [*constants]
    extra += [(Scratch(few * elements * _BYTES[dtype]), dtype) for elements, dtype in scratch]
    skip = [c.node for c, _ in constants]
    with kernel(module, program, region, extra, skip=skip) as (k, out, extras):
        rows = T.bind(product(k.ev.shape(stages[0].linear)[:-1]) + i32(0))
        code = ChainCode(k, plan, extras[: len(constants)], out)
        with T.If(rows >= few):
            with T.Then():
                most = plan.rows_per_chunk()
                chunks = round_up(T.max(ceil_div(rows, most), TASKS), BALANCE)
                chunk = T.bind(round_up(ceil_div(rows, chunks), plan.tiles[0].rows))
                with T.parallel(0, ceil_div(rows, chunk)) as c:
                    memory = [workspace(most * elements, dtype) for elements, dtype in scratch]
                    first = T.bind(c * chunk)
                    code.emit(first, T.bind(T.min(chunk, rows - first)), memory, parallel=False)
            with T.Else():
                code.emit(i32(0), rows, extras[len(constants) :], parallel=True)
    m = product(program.shape(stages[0].linear)[:-1])
    shape = [m]
    for s in stages:
        shape += [s.columns, s.depth]
    flops = sum(2 * m * s.columns * s.depth for s in stages)
    forms = dict.fromkeys(t.form.name for t in plan.tiles if isinstance(t, IntegerTiles))
    stem = "_".join(["gemm", *(f.replace("-", "_") for f in forms)])
    assert k.function.func is not None
    return Lowered(stem, k.function.func, k.operands, "qgemm" if forms else "gemm", tuple(shape), flops)


_BYTES = {"float32": 4, "int32": 4, "int16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class Chain:
    """The stages of a region, how each is multiplied, and how many rows pass through all of them together."""

    target: Target
    stages: list[Stage]
    tiles: list[Tiles]

    @staticmethod
    def plan(target: Target, stages: list[Stage]) -> Chain:
        """Tiles of each stage."""
        return Chain(target, stages, [_tiles(target, s) for s in stages])

    def scratch(self) -> list[tuple[int, str]]:
        """Memory for each row: the results of all stages but the last, then what each stage's tiles need."""
        between = [(s.columns, storage_dtype(s.result.meta["val"].dtype)) for s in self.stages[:-1]]
        return between + [s for tiles in self.tiles for s in tiles.scratch()]

    def least_rows(self) -> int:
        """Fewest rows of a chunk."""
        resident = sum(t.weight_bytes for t in self.tiles) <= self.target.l2_bytes // 2
        return (RESIDENT_CHUNK_TILES if resident else CHUNK_TILES) * self.tiles[0].rows

    def rows_per_chunk(self) -> int:
        """Most rows of a chunk: what is read and kept for it fills at most 3/4 of the second-level cache."""
        per_row = 4 * self.stages[0].depth + sum(elements * _BYTES[dtype] for elements, dtype in self.scratch())
        rows = self.tiles[0].rows
        return max(self.least_rows(), self.target.l2_bytes * 3 // 4 // per_row // rows * rows)


def _tiles(target: Target, stage: Stage) -> Tiles:
    if stage.linear.target not in QUANTIZED:
        return FloatTiles(target, stage)
    return (NeonTiles if target.is_arm else Avx2Tiles)(target, stage)


class FloatTiles(Tiles):
    """Products in fp32."""

    def __init__(self, target: Target, stage: Stage) -> None:
        self.stage, self.block = stage, gemm_tile(target, stage.columns)
        self.rows, self.width = self.block.rows, self.block.vectors * target.lanes
        self.weight_bytes = stage.weight_dtype.itemsize * stage.columns * stage.depth

    def constants(self) -> list[tuple[Packed, str]]:
        """The weight in column panels."""
        dtype = self.stage.weight_dtype
        layout = COLUMNS[dtype]
        return [(Packed(self.stage.linear.args[1], layout, self.width), storage_dtype(dtype))]  # pyright: ignore

    def scratch(self) -> list[tuple[int, str]]:
        """None."""
        return []

    def prepare(self, code: StageCode, *, parallel: bool) -> None:
        """Nothing: rows are read as they are."""

    def open(self, code: StageCode, block: Block) -> Any:
        """Nothing."""

    def multiply(self, code: StageCode, block: Block, row: Expr, left: Expr, tile: Expr, opened: Any) -> None:
        """A tile, which fetches a part of the next block's panel."""
        panels, depth, source, place = code.constants[0], code.stage.depth, code.source, code.place
        begin = T.address_of(source.buffer[source.row(row)])
        panel = T.address_of(panels[block.column * depth])
        target = T.address_of(place.buffer[place.row(row) + block.column])
        # what the tiles of this block fetch for the next one: a part each, together the whole panel and again
        line = CACHE_LINE // code.stage.weight_dtype.itemsize
        part = T.floormod(tile, UNROLL * block.vectors) * (depth // UNROLL * line)
        ahead = T.address_of(panels[(block.column + block.span) * depth + part])
        bias = code.stage.bias if self.adds_bias(block) else None
        start = T.address_of(code.k.ev.sources[bias].buffer[block.column]) if bias is not None else None
        call_tile(
            code.k.module,
            self.block,
            left,
            (begin, panel, target, ahead),
            (source.stride, i32(block.span), place.stride, i32(depth)),
            vectors=block.vectors,
            tail_lanes=block.tail,
            bias=start,
            cold=start is not None,
            weights=code.stage.weight_dtype,
        )

    def adds_bias(self, block: Block) -> bool:
        """In blocks of whole vectors: a tile reads whole vectors of it."""
        return not block.tail


@dataclass
class ChainCode:
    """Code for the stages of a region; ``constants`` are all packed weights in order."""

    k: Kernel
    chain: Chain
    constants: list[Any]
    out: Any

    def emit(self, first: Expr, count: Expr, memory: list[Any], *, parallel: bool) -> None:
        """All stages for rows ``first .. first+count``.

        Args:
            memory: ``Chain.scratch`` for the rows from ``first`` on.
            parallel: make the column blocks parallel loops.
        """
        results: dict[fx.Node, Matrix] = {}
        constants, scratch = list(self.constants), list(memory)
        between = [scratch.pop(0) for _ in self.chain.stages[:-1]]
        for stage, tiles in zip(self.chain.stages, self.chain.tiles, strict=True):
            if stage is self.chain.stages[-1]:
                place = Matrix(self.out, i32(0), i32(0), i32(stage.columns))
            else:
                place = Matrix(between.pop(0), i32(0), first, i32(stage.columns))
            own = [constants.pop(0) for _ in tiles.constants()], [scratch.pop(0) for _ in tiles.scratch()]
            code = StageCode(self.k, stage, tiles, *own, self._source(stage, results), place, results, first, count)
            code.emit(parallel=parallel)
            results[stage.result] = place

    def _source(self, stage: Stage, results: dict[fx.Node, Matrix]) -> Matrix:
        x = stage.linear.args[0]
        assert isinstance(x, fx.Node)
        if x in results:
            return results[x]
        if stage.linear.target is QUANTIZED_CONVOLUTION:
            return Matrix(self.k.ev.sources[x].buffer, i32(0), i32(0), i32(0))  # its rows are gathered from windows
        access = row_stride(self.k.ev, x, stage.depth)
        assert access is not None, "lower() has made the operand a matrix"
        source, stride, offset = access
        return Matrix(self.k.ev.sources[source].buffer, offset, i32(0), stride)
