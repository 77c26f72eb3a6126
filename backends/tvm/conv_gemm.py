"""Convolutions with the channels last as matrix products, without building the matrix.

A row of the left matrix is what one output pixel sees. With the channels last it consists of runs of consecutive
values: one per row of the window. The register tile walks over these runs in the image itself, from a position of its
own for each pixel; the image is first copied into a frame of zeros if the convolution pads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import TASKS, Expr, ceil_div, f32, for_vectors, i32, keep, lanes_at, splat
from planish.backends.tvm.conv import lowered
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Packed, Region, Scratch, kernel, rows_in_parallel
from planish.backends.tvm.microkernel import CACHE_LINE, UNROLL, Tile, gemm_tile
from planish.backends.tvm.window_tile import BIASED, SUM, ZERO, call_window_tile
from planish.conv_ops import CONVOLUTION_LAST, Convolution
from planish.program import Program

LEAST_DEPTH = 4
"""Fewest input channels of a group: with less the direct loops over vectors of channels do better."""


def is_gemm(node: fx.Node) -> bool:
    """Whether a convolution is done here: channels last, one or two spatial axes, not transposed, groups not tiny."""
    if node.target is not CONVOLUTION_LAST:
        return False
    conv = Convolution.of(node)
    deep = conv.groups == 1 or conv.inputs // conv.groups >= LEAST_DEPTH
    return conv.window.rank <= 2 and not conv.transposed and deep


def _plane(values: tuple[Any, ...], missing: Any) -> tuple[Any, Any]:
    """Two spatial axes: one alone is the second."""
    return (missing, *values) if len(values) == 1 else values  # pyright: ignore


@dataclass(frozen=True)
class Image:
    """The tensor that the tiles read: [N, height, width, channels] at the start of ``buffer``."""

    buffer: Any
    height: Expr
    width: Expr


def lower_conv_gemm(module: Module, program: Program, region: Region, anchor: fx.Node) -> Lowered:
    """Kernel of a region around a convolution.

    before: ``relu(planish::convolution(x, w, b, padding=[1, 1]))``
    after:  x into a frame of zeros; for each chunk of pixels and block of output channels: for each tile of pixels:
            multiply and add the bias, then ReLU on the tile while it is in the first-level cache
    """
    conv = Convolution.of(anchor)
    per_group = conv.outputs // conv.groups
    width = gemm_tile(module.target, per_group).vectors * module.target.lanes
    layout = Packed(conv.weight, "window_columns", width) if conv.groups == 1 else None
    packed = layout or Packed(conv.weight, "group_panels", per_group)
    framed = any((*conv.window.padding, *conv.padding_after)) or conv.x not in region.inputs
    extra: list[tuple[Any, str]] = [(packed, "float32")]
    if framed:
        batch, _, spatial = conv.window.split(program.shape(conv.x))
        elements = batch * conv.inputs
        for size, before, after in zip(spatial, conv.window.padding, conv.padding_after, strict=True):
            elements = elements * (size + before + after)
        extra.append((Scratch(4 * elements), "float32"))
    with kernel(module, program, region, extra, skip=[conv.weight]) as (k, out, extras):
        if framed:
            image = fill_frame(k, conv, extras[1])
        else:
            _, _, spatial = conv.window.split(k.ev.shape(conv.x))
            image = Image(k.ev.sources[conv.x].buffer, *_plane(spatial, 1))
        _Product(k, anchor, conv, image, extras[0], out).emit()
    return lowered(k, program, "conv_gemm", anchor, conv)


def fill_frame(k: Kernel, conv: Convolution, frame: Any) -> Image:
    """Emit the copy of the input into a frame of zeros; returns the framed image."""
    batch, channels, spatial = conv.window.split(k.ev.shape(conv.x))
    (top, left), (rows, columns) = _plane(conv.window.padding, 0), map(keep, _plane(spatial, 1))
    bottom, right = _plane(conv.padding_after, 0)
    height, width = keep(rows + (top + bottom)), keep(columns + (left + right))
    with rows_in_parallel(T.bind(batch * height + i32(0))) as row:
        n = T.bind(T.truncdiv(row, height))
        y = T.bind(row - n * height - top)
        base = T.bind(row * width * channels)

        def zeros(first: Expr, count: Expr) -> None:
            for at, lanes in for_vectors(count, k.lanes):
                T.buffer_store(frame, splat(f32(0.0), lanes), [lanes_at(base + first + at, lanes)])

        with T.If(tirx.And(y >= 0, y < rows)):
            with T.Then():
                zeros(0, left * channels)
                with T.serial(0, columns) as x:
                    place = (y, x)[2 - len(spatial) :]
                    for c, lanes in for_vectors(channels, k.lanes if conv.x in k.region.inputs else 1):
                        value = k.ev.at(conv.x, (n, *place, lanes_at(c, lanes)))
                        at = base + (left + x) * channels + c
                        T.buffer_store(frame, splat(value, lanes), [lanes_at(at, lanes)])
                zeros((left + columns) * channels, right * channels)
            with T.Else():
                zeros(0, width * channels)
    return Image(frame, height, width)


@dataclass
class _Product:
    """Code for all pixels and all output channels."""

    k: Kernel
    anchor: fx.Node
    conv: Convolution
    image: Image
    panels: Any
    out: Any
    plane: tuple[Expr, Expr] = (1, 1)
    """Height and width of the result."""

    @property
    def tile(self) -> Tile:
        """Register block."""
        return gemm_tile(self.k.module.target, self.columns)

    @property
    def depth(self) -> int:
        """Input channels of a group."""
        return self.conv.inputs // self.conv.groups

    @property
    def columns(self) -> int:
        """Output channels of a group."""
        return self.conv.outputs // self.conv.groups

    def emit(self) -> None:
        """Chunks of pixels for each block of columns, all in parallel."""
        batch, _, spatial = self.conv.window.split(self.k.ev.shape(self.anchor))
        plane = _plane(spatial, 1)
        pixels = keep(keep(batch * plane[0] * plane[1]) + i32(0))
        lanes, width = self.k.lanes, self.tile.vectors * self.k.lanes
        whole, rest = divmod(self.columns, width)
        blocks = whole + bool(rest)
        wanted = -(-TASKS // (blocks * self.conv.groups))
        chunk = keep(T.min(ceil_div(ceil_div(pixels, wanted), self.tile.rows) * self.tile.rows, self._most_pixels()))
        chunks = keep(ceil_div(pixels, chunk))
        with T.parallel(0, self.conv.groups * blocks * chunks) as task:
            self.plane = keep(plane[0]), keep(plane[1])
            self.image = Image(self.image.buffer, keep(self.image.height), keep(self.image.width))
            column = keep(T.truncdiv(task, chunks))
            first = keep((task - column * chunks) * chunk)
            group = keep(T.truncdiv(column, blocks))
            n = keep(column - group * blocks)
            count = keep(T.min(chunk, pixels - first))
            tail = (-(-rest // lanes), rest % lanes)
            if whole and rest:
                with T.If(n < whole):
                    with T.Then():
                        self._block(group, n * width, first, count, self.tile.vectors, 0)
                    with T.Else():
                        self._block(group, i32(whole * width), first, count, *tail)
            elif whole:
                self._block(group, n * width, first, count, self.tile.vectors, 0)
            else:
                self._block(group, i32(0), first, count, *tail)

    def _most_pixels(self) -> int:
        """Pixels of a chunk whose inputs fill half the second-level cache."""
        sy, sx = _plane(self.conv.window.stride, 1)
        fitting = self.k.module.target.l2_bytes // 2 // (4 * self.depth * sy * sx)
        return max(8, fitting // self.tile.rows) * self.tile.rows

    def _block(self, group: Expr, column: Expr, first: Expr, count: Expr, vectors: int, tail: int) -> None:
        """``count`` pixels of ``vectors`` vectors of the group's columns; ``tail`` lanes of the last, 0 for all.

        Where the block's weights overflow the second-level cache, one part of the window's rows after the other.
        """
        rows, _ = _plane(self.conv.window.kernel, 1)
        span = vectors * self.k.lanes
        weights = 4 * span * self.depth * rows * _plane(self.conv.window.kernel, 1)[1]
        parts = min(rows, -(-weights // (self.k.module.target.l2_bytes // 2)))
        step = -(-rows // parts)
        for top in range(0, rows, step):
            last = top + step >= rows
            with T.serial(0, ceil_div(count, self.tile.rows)) as t:
                pixel = keep(first + t * self.tile.rows)
                left = keep(count - t * self.tile.rows)
                self._tile(group, column, pixel, left, vectors, tail, range(top, min(top + step, rows)))
                if last:
                    self._finish(group, column, pixel, left, span, tail)

    def _tile(self, group: Expr, column: Expr, pixel: Expr, left: Expr, vectors: int, tail: int, rows: range) -> None:
        """Some rows of the window for one tile of pixels: one call of the register tile per run of values."""
        conv = self.conv
        (_, kx), (dil_y, dil_x) = _plane(conv.window.kernel, 1), _plane(conv.window.dilation, 1)
        joined = dil_x == 1 and conv.groups == 1  # the taps of a row of the window are one run
        taps, run = (1, kx * self.depth) if joined else (kx, self.depth)
        first = [self._position(pixel + i) + group * self.depth for i in range(self.tile.rows)]
        line = T.bind(dil_y * self.image.width * conv.inputs)

        def multiply(y: Expr, x: Expr, start: str) -> None:
            place = T.alloc_buffer((self.tile.rows,), "int32")
            for i, at in enumerate(first):
                T.buffer_store(place, at + y * line + x * (dil_x * conv.inputs), [i])
            self._call(group, column, pixel, left, vectors, tail, (y * taps + x) * run, run, place, start)

        for x in range(taps):
            beginning = not rows.start and not x
            multiply(i32(rows.start), i32(x), self._beginning(tail) if beginning else SUM)
        with T.serial(0, len(rows) - 1) as y, T.serial(0, taps) as x:
            multiply(rows.start + 1 + y, x, SUM)

    def _beginning(self, tail: int) -> str:
        """What the first sums start from; a ragged tile adds its biases at the end, as it would read beyond them."""
        return ZERO if self.conv.bias is None or tail else BIASED

    def _call(
        self,
        group: Expr,
        column: Expr,
        pixel: Expr,
        left: Expr,
        vectors: int,
        tail: int,
        row: Expr,
        run: int,
        place: Any,
        start: str,
    ) -> None:
        """Multiply runs of ``run`` values, one per pixel at ``place``, by the weights from ``row`` on."""
        conv, span = self.conv, vectors * self.k.lanes
        window = math.prod(conv.window.kernel) * self.depth
        if conv.groups == 1:
            ldb, begin = span, column * window + row * span
        else:
            ldb = -(-self.columns // self.k.lanes) * self.k.lanes
            begin = (group * window + row) * ldb + column
        channel = group * self.columns + column
        target = T.address_of(self.out[pixel * conv.outputs + channel])
        # what the tiles of this block fetch for the next one: a part each, together the whole panel and again
        part = T.floormod(T.floordiv(pixel, self.tile.rows), UNROLL * vectors) * (run // UNROLL * (CACHE_LINE // 4))
        ahead = T.address_of(self.panels[begin + window * span + part])
        pointers = (T.address_of(self.image.buffer[0]), T.address_of(self.panels[begin]), target, ahead)
        pointers = (*pointers, T.address_of(place[0]))
        if start == BIASED:
            pointers = (*pointers, T.address_of(self.k.ev.sources[conv.bias].buffer[channel]))  # pyright: ignore
        sizes = (i32(ldb), i32(conv.outputs), i32(run))
        module = self.k.module
        call_window_tile(module, self.tile, left, pointers, sizes, vectors=vectors, tail_lanes=tail, start=start)

    def _position(self, pixel: Expr) -> Expr:
        """Where in the image the window of an output pixel begins."""
        n, (y, x) = self._place(pixel)
        sy, sx = _plane(self.conv.window.stride, 1)
        return keep(((n * self.image.height + y * sy) * self.image.width + x * sx) * self.conv.inputs)

    def _place(self, pixel: Expr) -> tuple[Expr, tuple[Expr, Expr]]:
        """Image and position of an output pixel."""
        height, width = self.plane
        line = keep(T.truncdiv(pixel, width))
        n = keep(T.truncdiv(line, height))
        return n, (keep(line - n * height), keep(pixel - line * width))

    def _finish(self, group: Expr, column: Expr, pixel: Expr, left: Expr, span: int, tail: int) -> None:
        """The elementwise ops, and the bias of a ragged tile, on one tile in place."""
        ev, lanes, bias = self.k.ev, self.k.lanes, self.conv.bias
        if self.k.region.result is self.anchor and (bias is None or not tail):
            return
        with T.serial(0, T.min(left, self.tile.rows)) as i:
            row = T.bind(pixel + i)
            n, (y, x) = self._place(row)
            place = (y, x)[2 - self.conv.window.rank :]
            start = T.bind(group * self.columns + column)

            def element(at: Expr, count: int) -> None:
                channel = lanes_at(start + at, count)
                where = lanes_at(row * self.conv.outputs + start + at, count)
                value = self.out[where]
                if bias is not None and tail:
                    value = value + ev.at(bias, (channel,))
                ev.computed = {self.anchor: T.bind(value)}
                T.buffer_store(self.out, ev.at(self.k.region.result, (n, *place, channel)), [where])

            for v in range(span // lanes - bool(tail)):
                element(v * lanes, lanes)
            if tail:
                with T.serial(0, tail) as j:
                    element(span - lanes + j, 1)
        ev.computed = {}
