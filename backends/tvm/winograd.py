"""Convolutions with 3 x 3 windows by Winograd's minimal filtering; see ``winograd_tile.py`` for the algebra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import (
    TASKS,
    Expr,
    ceil_div,
    f32,
    for_vectors,
    i32,
    keep,
    lanes_at,
    round_up,
    splat,
    workspace,
)
from planish.backends.tvm.conv import lowered, store_value
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Packed, Region, Scratch, kernel, rows_in_parallel
from planish.backends.tvm.microkernel import CACHE_LINE, UNROLL, Tile, call_tile, gemm_tile
from planish.backends.tvm.winograd_tile import (
    INPUTS,
    OUTPUTS,
    PRODUCTS,
    WINDOW,
    build_input_transform,
    build_output_transform,
)
from planish.conv_ops import CONVOLUTION_LAST, Convolution
from planish.program import Program, evaluate
from planish.targets import Target

TASK_TILES = 24
"""Most tiles of a task: a multiple of the rows of both register blocks, few enough for the second-level cache."""

GAIN = 0.6
"""Largest share of the direct kernel's cost at which the larger weights and rounding errors are worth it."""


def is_winograd(program: Program, region: Region, node: fx.Node) -> bool:
    """Whether a convolution is done here: 3 x 3, dense, step 1, its input in memory, and cheaper than directly."""
    if node.target is not CONVOLUTION_LAST:
        return False
    conv = Convolution.of(node)
    window = conv.window
    fits = window.kernel == (WINDOW, WINDOW) and {*window.stride, *window.dilation} == {1}
    if not fits or conv.transposed or conv.groups > 1 or conv.x not in region.inputs:
        return False
    direct, winograd = costs(program, node, conv)
    return winograd <= GAIN * direct


def costs(program: Program, node: fx.Node, conv: Convolution) -> tuple[float, float]:
    """Modelled cost of the direct kernel and of this one, in multiply-adds, at the sizes of the example inputs.

    Beside the products there are the transforms of each tile (about 300 and 220 vector instructions per vector of input
    and output channels), and the weights, which are four times as many: a float from memory takes as long as about 12
    multiply-adds.
    """
    example = program.example_dims()
    batch, _, spatial = conv.window.split([evaluate(s, example) for s in program.shape(node)])
    height, width = spatial
    tiles = batch * -(-height // OUTPUTS) * -(-width // OUTPUTS)
    weights = conv.inputs * conv.outputs
    direct = batch * height * width * WINDOW**2 * weights
    products = PRODUCTS * weights * max(tiles, 12)
    return direct, products + tiles * (300 * conv.inputs + 220 * conv.outputs)


def lower_winograd(module: Module, program: Program, region: Region, anchor: fx.Node) -> Lowered:
    """Kernel of a region around a 3 x 3 convolution.

    before: ``relu(planish::convolution(x, w, b, padding=[1, 1]))``
    after:  for some tiles of 6 x 6 pixels at a time: B^T d B of each into scratch; for each block of output channels
            and few tiles: 36 matrix products; then A^T m A, bias and ReLU of each tile
    """
    conv = Convolution.of(anchor)
    tile = gemm_tile(module.target, conv.outputs)
    packed = Packed(conv.weight, "winograd", tile.vectors * module.target.lanes)
    most = most_tiles(module.target, conv.inputs)
    stride = most * conv.inputs + CACHE_LINE // 4  # off the powers of two, which would share few lines of the cache
    scratch = Scratch(4 * PRODUCTS * stride)
    with kernel(module, program, region, [(packed, "float32"), (scratch, "float32")], skip=[conv.weight]) as found:
        k, out, (panels, transformed) = found
        _Code(k, anchor, conv, tile, panels, transformed, most, stride, out).emit()
    return lowered(k, program, "conv_winograd", anchor, conv)


def most_tiles(target: Target, channels: int) -> int:
    """Tiles transformed at once: they fill two second-level caches, at least one task."""
    return max(1, 2 * target.l2_bytes // (4 * PRODUCTS * channels * TASK_TILES)) * TASK_TILES


@dataclass
class _Code:
    """Code of the kernel; ``most`` tiles are transformed at once, ``stride`` floats for each product."""

    k: Kernel
    anchor: fx.Node
    conv: Convolution
    tile: Tile
    panels: Any
    transformed: Any
    most: int
    stride: int
    out: Any

    def emit(self) -> None:
        """Transform some tiles, multiply them, and so on."""
        batch, _, spatial = self.conv.window.split(self.k.ev.shape(self.anchor))
        tiles = keep(batch * ceil_div(spatial[0], OUTPUTS) * ceil_div(spatial[1], OUTPUTS) + i32(0))
        with T.serial(0, ceil_div(tiles, self.most)) as group:
            first = keep(group * self.most)
            count = keep(T.min(self.most, tiles - first))
            with rows_in_parallel(count) as t:
                self._transform(first + t, t)
            self._multiply(first, count)

    def _place(self, tile: Expr) -> tuple[Expr, Expr, Expr]:
        """Image of a tile and position of its first output."""
        _, _, (height, width) = self.conv.window.split(self.k.ev.shape(self.anchor))
        down, across = keep(ceil_div(height, OUTPUTS)), keep(ceil_div(width, OUTPUTS))
        line = keep(T.truncdiv(tile, across))
        n = keep(T.truncdiv(line, down))
        return n, keep((line - n * down) * OUTPUTS), keep((tile - line * across) * OUTPUTS)

    def _transform(self, tile: Expr, slot: Expr) -> None:
        """The inputs of a tile, transformed; one that reaches over the border is first copied into a patch."""
        conv, channels = self.conv, self.conv.inputs
        image = self.k.ev.sources[conv.x].buffer
        _, _, (height, width) = conv.window.split(self.k.ev.shape(conv.x))
        n, y, x = self._place(tile)
        top, left = keep(y - conv.window.padding[0]), keep(x - conv.window.padding[1])
        result = T.address_of(self.transformed[slot * channels])

        def call(source: Expr, line: Expr) -> None:
            name = "planish_winograd_input"
            symbol = self.k.module.tile(name, lambda: build_input_transform(name, self.k.lanes))
            T.evaluate(T.call_extern("int32", symbol, source, result, line, i32(channels), i32(self.stride)))

        inside = tirx.And(tirx.And(top >= 0, left >= 0), tirx.And(top + INPUTS <= height, left + INPUTS <= width))
        with T.If(inside):
            with T.Then():
                start = ((n * height + top) * width + left) * channels
                call(T.address_of(image[start]), width * channels + i32(0))
            with T.Else():
                patch = workspace(PRODUCTS * channels)
                with T.serial(0, INPUTS) as i, T.serial(0, INPUTS) as j:
                    self._copy_pixel(patch, (i * INPUTS + j) * channels, (n, keep(top + i), keep(left + j)))
                call(T.address_of(patch[0]), i32(INPUTS * channels))

    def _copy_pixel(self, patch: Any, to: Expr, at: tuple[Expr, Expr, Expr]) -> None:
        """One pixel of the image, zeros outside of it."""
        conv, channels = self.conv, self.conv.inputs
        _, _, (height, width) = conv.window.split(self.k.ev.shape(conv.x))
        n, y, x = at
        exists = tirx.And(tirx.And(y >= 0, y < height), tirx.And(x >= 0, x < width))
        with T.If(exists):
            with T.Then():
                for c, lanes in for_vectors(channels, self.k.lanes):
                    value = self.k.ev.at(conv.x, (n, y, x, lanes_at(c, lanes)))
                    T.buffer_store(patch, splat(value, lanes), [lanes_at(to + c, lanes)])
            with T.Else():
                for c, lanes in for_vectors(channels, self.k.lanes):
                    T.buffer_store(patch, splat(f32(0.0), lanes), [lanes_at(to + c, lanes)])

    def _multiply(self, first: Expr, count: Expr) -> None:
        """Products and outputs of ``count`` tiles: tasks of few tiles and one block of columns."""
        width = self.tile.vectors * self.k.lanes
        whole, rest = divmod(self.conv.outputs, width)
        blocks = whole + bool(rest)
        share = round_up(ceil_div(count * blocks, TASKS), self.tile.rows)
        chunk = keep(T.min(share, TASK_TILES))
        chunks = keep(ceil_div(count, chunk))
        with T.parallel(0, blocks * chunks) as task:
            block = keep(T.truncdiv(task, chunks))
            slot = keep((task - block * chunks) * chunk)
            tiles = keep(T.min(chunk, count - slot))
            products = workspace(PRODUCTS * TASK_TILES * width)
            if whole and rest:
                with T.If(block < whole):
                    with T.Then():
                        self._products(block, slot, tiles, products, self.tile.vectors)
                    with T.Else():
                        self._products(block, slot, tiles, products, -(-rest // self.k.lanes))
            else:
                self._products(block, slot, tiles, products, self.tile.vectors if whole else -(-rest // self.k.lanes))
            with T.serial(0, tiles) as t:
                self._outputs(keep(first + slot + t), t, block, products)

    def _products(self, block: Expr, slot: Expr, tiles: Expr, products: Any, vectors: int) -> None:
        """The matrix products of one block of columns, ``vectors`` wide."""
        depth, rows = self.conv.inputs, self.tile.rows
        width, span = self.tile.vectors * self.k.lanes, vectors * self.k.lanes
        with T.serial(0, PRODUCTS) as p, T.serial(0, ceil_div(tiles, rows)) as t:
            panel = keep(block * (PRODUCTS * depth * width) + p * (depth * span))
            source = T.address_of(self.transformed[p * self.stride + (slot + t * rows) * depth])
            target = T.address_of(products[(p * TASK_TILES + t * rows) * width])
            # what the tiles fetch for the next product: a part each
            part = depth * span + T.floormod(t, UNROLL * vectors) * (depth // UNROLL * (CACHE_LINE // 4))
            pointers = (source, T.address_of(self.panels[panel]), target, T.address_of(self.panels[panel + part]))
            sizes = (i32(depth), i32(span), i32(width), i32(depth))
            call_tile(self.k.module, self.tile, keep(tiles - t * rows), pointers, sizes, vectors=vectors)

    def _outputs(self, tile: Expr, slot: Expr, block: Expr, products: Any) -> None:
        """The outputs of a tile that lie in the image, with bias and elementwise ops."""
        conv, width = self.conv, self.tile.vectors * self.k.lanes
        _, _, (height, columns) = conv.window.split(self.k.ev.shape(self.anchor))
        patch = workspace(OUTPUTS * OUTPUTS * width)
        name = "planish_winograd_output"
        symbol = self.k.module.tile(name, lambda: build_output_transform(name, self.k.lanes))
        pointers = (T.address_of(products[slot * width]), T.address_of(patch[0]))
        T.evaluate(T.call_extern("int32", symbol, *pointers, i32(TASK_TILES * width), i32(width)))
        n, top, left = self._place(tile)
        channel = keep(block * width)
        present = width if conv.outputs % width == 0 else keep(T.min(width, conv.outputs - channel))
        with T.serial(0, T.min(OUTPUTS, height - top)) as i, T.serial(0, T.min(OUTPUTS, columns - left)) as j:
            y, x = keep(top + i), keep(left + j)
            for c, lanes in for_vectors(present, self.k.lanes):
                at = lanes_at(channel + c, lanes)
                value = patch[lanes_at((i * OUTPUTS + j) * width + c, lanes)]
                if conv.bias is not None:
                    value = value + splat(self.k.ev.at(conv.bias, (at,)), lanes)
                store_value(self.k, self.anchor, keep(value), self.out, (n, y, x, at), lanes)
