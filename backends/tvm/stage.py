"""One linear layer of a kernel: its blocks of columns, tile by tile, and everything done to the rows on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, ceil_div, i32, keep, lanes_at, workspace
from planish.backends.tvm.expr import Rows
from planish.backends.tvm.index import unflatten_index
from planish.backends.tvm.kernel import Kernel, Packed, Region, rows_in_parallel
from planish.backends.tvm.microkernel import prefetch
from planish.backends.tvm.operands import Matrix
from planish.backends.tvm.rowwise import normalise_row
from planish.backends.tvm.scalars import ELEMENTWISE
from planish.ops import LAYER_NORM, LAYERS, QUANTIZED, QUANTIZED_CONVOLUTION

PIECES = 2
"""Of a layer's columns for each core, where there are few rows."""


@dataclass(frozen=True)
class Stage:
    """One linear layer of a region: its op, the last elementwise op on its tiles, and the norm of its rows, if any.

    A convolution on codes is a layer of what each of its positions sees. ``weight_dtype`` is that of an fp32 layer's
    weight in memory.
    """

    linear: fx.Node
    stored: fx.Node
    norm: fx.Node | None
    weight_dtype: torch.dtype = torch.float32

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

    @property
    def bias(self) -> fx.Node | None:
        """The bias in memory, if there is one."""
        at = 5 if self.linear.target in QUANTIZED else 2
        bias = self.linear.args[at] if len(self.linear.args) > at else None
        return bias if isinstance(bias, fx.Node) else None


def stages_of(region: Region, narrow: Mapping[fx.Node, torch.dtype]) -> list[Stage]:
    """The region's linear layers in order; a stage ends where the next one's input, or the region's result, is.

    ``narrow`` are weights that are stored in half precision.
    """
    linears = [n for n in region.nodes if n.target in LAYERS | {QUANTIZED_CONVOLUTION}]
    ends = [n.args[0] for n in linears[1:]] + [region.result]
    stages: list[Stage] = []
    for linear, end in zip(linears, ends, strict=True):
        assert isinstance(end, fx.Node)
        norm = end if end.target is LAYER_NORM else None
        stored = norm.args[0] if norm is not None else end
        assert isinstance(stored, fx.Node)
        stages.append(Stage(linear, stored, norm, narrow.get(linear.args[1], torch.float32)))  # pyright: ignore
    return stages


@dataclass(frozen=True)
class Block:
    """Columns of a layer that are multiplied together: ``vectors`` fp32 vectors from ``column`` on.

    ``tail`` lanes of the last vector exist, 0 for all.
    """

    column: Expr
    vectors: int
    tail: int
    lanes: int

    @property
    def span(self) -> int:
        """Columns of all vectors."""
        return self.vectors * self.lanes

    @property
    def columns(self) -> int:
        """Columns that exist."""
        return self.span - (self.lanes - self.tail if self.tail else 0)


class Tiles(ABC):
    """How a layer's products are computed: the packed weights, the scratch memory, and the tile."""

    rows: int
    """Of the largest tile."""
    width: int
    """Columns of a block."""
    weight_bytes: int
    """Of the layer's packed weights."""

    @abstractmethod
    def constants(self) -> list[tuple[Packed, str]]:
        """Packed weights and the types of their elements."""

    @abstractmethod
    def scratch(self) -> list[tuple[int, str]]:
        """Memory that the rows of a chunk need: elements for each row, and their type."""

    @abstractmethod
    def prepare(self, code: StageCode, *, parallel: bool) -> None:
        """What is done with the layer's input before the products."""

    @abstractmethod
    def open(self, code: StageCode, block: Block) -> Any:
        """What is done once for a block; the result is given to ``multiply``."""

    @abstractmethod
    def multiply(self, code: StageCode, block: Block, row: Expr, left: Expr, tile: Expr, opened: Any) -> None:
        """One tile of at most ``left`` rows from ``row`` on, the ``tile``-th of the block."""

    @abstractmethod
    def adds_bias(self, block: Block) -> bool:
        """Whether the tile adds the bias, or the epilogue has to."""


@dataclass(frozen=True)
class StageCode:
    """Code for one stage.

    Attributes:
        constants: the tiles' packed weights in memory.
        scratch: the tiles' scratch memory, whose first row is the first of the chunk.
        source: the layer's input.
        place: where its result goes.
        earlier: results of the stages before, which residuals may read.
        first: row of the chunk.
        count: of rows.
    """

    k: Kernel
    stage: Stage
    tiles: Tiles
    constants: list[Any]
    scratch: list[Any]
    source: Matrix
    place: Matrix
    earlier: dict[fx.Node, Matrix]
    first: Expr
    count: Expr

    def emit(self, *, parallel: bool) -> None:
        """The blocks of columns, then the norm."""
        self.tiles.prepare(self, parallel=parallel)
        lanes, width = self.k.lanes, self.tiles.width
        whole, rest = divmod(self.stage.columns, width)
        last = Block(i32(whole * width), -(-rest // lanes), self.stage.columns % lanes, lanes)
        blocks = whole + bool(rest)
        with self._shared_out(blocks) if parallel else T.serial(0, blocks) as n:
            block = Block(n * width, width // lanes, 0, lanes)
            if whole and rest:
                with T.If(n < whole):
                    with T.Then():
                        self._block(block)
                    with T.Else():
                        self._block(last)
            else:
                self._block(block if whole else last)
        if self.stage.norm is not None:
            if parallel:
                with rows_in_parallel(self.count) as row:
                    self._norm(row)
            else:
                with T.serial(0, self.count) as i:
                    self._norm(T.bind(self.first + i))

    @contextmanager
    def _shared_out(self, blocks: int) -> Iterator[Expr]:
        """A parallel loop over blocks. A single tile of rows is done as fast as its weights come from memory, and they
        come faster in a few long pieces than in many."""
        pieces = min(PIECES * self.k.module.target.cores, blocks)
        count = T.bind(tirx.Select(self.count <= self.tiles.rows, i32(pieces), i32(blocks)))
        with T.parallel(0, count) as piece:
            first, end = (T.bind(T.floordiv((piece + i) * blocks, count)) for i in (0, 1))
            with T.serial(0, end - first) as i:
                yield T.bind(first + i)

    def _block(self, block: Block) -> None:
        """A block of columns, tile by tile."""
        rows = self.tiles.rows
        done = self.stage.stored is self.stage.linear and (self.tiles.adds_bias(block) or self.stage.bias is None)
        opened = self.tiles.open(self, block)
        aside = None if self._stores_fp32 else workspace(rows * block.span)
        with T.serial(0, ceil_div(self.count, rows)) as t:
            row = T.bind(self.first + t * rows)
            left = T.bind(self.count - t * rows)
            self._fetch_residuals(row, T.min(left, rows), block)
            sums = self.place if aside is None else Matrix(aside, 0 - block.column, row, i32(block.span))
            self.tiles.multiply(replace(self, place=sums), block, row, left, t, opened)
            if not done:
                with T.serial(0, T.min(left, rows)) as i:
                    self._epilogue(T.bind(row + i), block, sums)

    @property
    def _stores_fp32(self) -> bool:
        """Whether a tile's sums can lie where the result goes; else they lie aside until the epilogue has made codes of
        them."""
        return self.stage.stored.meta["val"].dtype is torch.float32

    def _fetch_residuals(self, row: Expr, count: Expr, block: Block) -> None:
        """Have what the epilogue adds on its way from memory while the tile multiplies.

        A tile reads a few cache lines of each row, which the hardware's prefetcher does not foresee.
        """
        k, shape = self.k, self.k.program.shape(self.stage.linear)
        residuals = [n for n in k.ev.sources if self._is_operand(n) and k.program.shape(n) == shape]
        for node in residuals:
            buffer = k.ev.sources[node].buffer
            with T.serial(0, count) as i:
                start = keep((row + i) * self.stage.columns + block.column)
                for v in range(block.vectors):
                    prefetch(T.address_of(buffer[start + v * k.lanes]), level=1)

    def _is_operand(self, node: fx.Node) -> bool:
        """Whether an elementwise op of this stage's epilogue reads the fp32 tensor ``node``."""
        users = {n for n in self.k.region.nodes if n.target in ELEMENTWISE and node in n.all_input_nodes}
        return node.meta["val"].dtype is torch.float32 and bool(users)

    def _epilogue(self, row: Expr, block: Block, sums: Matrix) -> None:
        """The elementwise chain, and the bias where the tile did not add it, on one row of a tile's sums."""
        ev, lanes = self.k.ev, self.k.lanes
        index = self._enter_row(row)
        start, own = T.bind(self.place.row(row) + block.column), T.bind(sums.row(row) + block.column)
        bias = None if self.tiles.adds_bias(block) else self.stage.bias

        def element(at: Expr, count: int) -> None:
            place, last = lanes_at(start + at, count), lanes_at(block.column + at, count)
            value = sums.buffer[lanes_at(own + at, count)]
            if bias is not None:
                value = value + ev.at(bias, (last,))
            ev.computed = {self.stage.linear: T.bind(value)}
            T.buffer_store(self.place.buffer, ev.at(self.stage.stored, (*index, last)), [place])

        for v in range(block.vectors - bool(block.tail)):
            element(v * lanes, lanes)
        if block.tail:
            with T.serial(0, block.tail) as j:
                element(block.span - lanes + j, 1)
        ev.computed = {}
        ev.rows = {}

    def _norm(self, row: Expr) -> None:
        assert self.stage.norm is not None
        index = self._enter_row(row)
        norm, start = self.stage.norm, T.bind(self.place.row(row))
        normalise_row(self.k, norm, self.place.buffer, start, self.stage.columns, index, after=norm)
        self.k.ev.rows = {}

    def _enter_row(self, row: Expr) -> tuple[Expr, ...]:
        """Make the earlier stages' rows readable; returns the row's index along the leading axes."""
        lead = self.k.ev.shape(self.stage.linear)[:-1]
        self.k.ev.rows = {n: Rows(m.buffer, T.bind(m.row(row))) for n, m in self.earlier.items()}
        return unflatten_index(lead, row) if lead else ()


def choose_rows(left: Expr, most: int, call: Any) -> None:
    """Emit ``call(min(left, most))`` for a number of rows that only the run knows: a chain of comparisons."""

    def choose(rows: int) -> None:
        condition = left >= rows if rows == most else tirx.EQ(left, rows)
        with T.If(condition):
            with T.Then():
                call(rows)
            if rows > 1:
                with T.Else():
                    choose(rows - 1)

    choose(most)
