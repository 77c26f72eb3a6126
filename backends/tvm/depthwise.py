"""Convolutions of narrow groups with the channels last: vectors of channels, a few output pixels of a row in registers.

A depthwise convolution has groups of one channel. With groups of 2, 4 or 8 a vector holds whole groups, and each output
lane meets each input channel of its group after a shuffle of the input vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, ceil_div, f32, for_vectors, i32, lanes_at, splat
from planish.backends.tvm.conv import Index, each_tap, inside, lowered, store_value
from planish.backends.tvm.index import unflatten_index
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Packed, Region, kernel, rows_in_parallel
from planish.conv_ops import CONVOLUTION_LAST, Convolution
from planish.program import Program

WIDEST = 8
"""Most channels of a group: more are a matrix product with enough columns."""


def is_depthwise(node: fx.Node) -> bool:
    """Whether a convolution is done here: as many output as input channels in each of several narrow groups."""
    if node.target is not CONVOLUTION_LAST:
        return False
    conv = Convolution.of(node)
    depth = conv.inputs // conv.groups
    narrow = depth <= WIDEST and depth & (depth - 1) == 0 and conv.groups > 1
    return narrow and conv.inputs == conv.outputs and not conv.transposed


def lower_depthwise(module: Module, program: Program, region: Region, anchor: fx.Node, lanes: int) -> Lowered:
    """Kernel of a region around a depthwise convolution.

    before: ``relu(planish::convolution(x, w, b, groups=channels))``
    after:  for each row of the output, for each block of pixels, for each vector of channels: bias, plus input times
            weight over the window; ReLU on the registers; store. Pixels whose window leaves the row go one by one.
    """
    conv = Convolution.of(anchor)
    with kernel(module, program, region, [(Packed(conv.weight, "taps", conv.groups), "float32")], [conv.weight]) as (
        k,
        out,
        (weights,),
    ):
        batch, _, (*outer, width) = conv.window.split(k.ev.shape(anchor))
        rows: Expr = batch + i32(0)
        for s in outer:
            rows = rows * s
        code = _Row(k, anchor, conv, weights, out, lanes)
        low, high = code.interior(width)
        block = module.target.vector_registers // 4
        with rows_in_parallel(T.bind(rows)) as row:
            n, *place = (T.bind(i + i32(0)) for i in unflatten_index((batch, *outer), row))
            with T.serial(0, low) as x:
                code.edge(n, (*place, x))
            blocks = T.bind(T.floordiv(high - low, block))
            with T.serial(0, blocks) as b:
                code.inner(n, tuple(place), T.bind(low + b * block), block)
            with T.serial(0, high - low - blocks * block) as x:
                code.inner(n, tuple(place), T.bind(low + blocks * block + x), 1)
            with T.serial(0, width - high) as x:
                code.edge(n, (*place, T.bind(high + x)))
    return lowered(k, program, "depthwise", anchor, conv)


@dataclass(frozen=True)
class _Row:
    """Code for the pixels of one row of the output."""

    k: Kernel
    anchor: fx.Node
    conv: Convolution
    weights: Any
    out: Any
    lanes: int

    def interior(self, width: Expr) -> tuple[Expr, Expr]:
        """The pixels ``low..high`` of a row whose windows do not leave it."""
        window, (*_, size) = self.conv.window, self.conv.window.split(self.k.ev.shape(self.conv.x))[2]
        stride, pad = window.stride[-1], window.padding[-1]
        reach = (window.kernel[-1] - 1) * window.dilation[-1]
        low = T.bind(T.min(-(-pad // stride), width) + i32(0))
        return low, T.bind(T.max(low, T.min(width, ceil_div(size + pad - reach, stride))))

    def edge(self, n: Expr, place: Index) -> None:
        """One pixel, over the part of its window that lies inside."""
        _, channels, sizes = self.conv.window.split(self.k.ev.shape(self.conv.x))
        for start, count in for_vectors(channels, self.lanes):
            total, channel, whole = self._start(start, count), lanes_at(start, count), lanes_at(i32(0), count)

            def multiply(
                tap: Expr, at: Index, total: Any = total, start: Expr = start, count: int = count, whole: Expr = whole
            ) -> None:
                for x, w in zip(self._inputs(n, at, start, count), self._weights(tap, start, count), strict=True):
                    T.buffer_store(total, total[whole] + x * w, [whole])

            each_tap(self.conv.window, place, sizes, multiply)
            store_value(self.k, self.anchor, T.bind(total[whole]), self.out, (n, *place, channel), count)

    def inner(self, n: Expr, place: Index, x: Expr, block: int) -> None:
        """``block`` pixels from ``x`` on, whose windows do not leave the row."""
        window = self.conv.window
        _, channels, _ = window.split(self.k.ev.shape(self.conv.x))
        for start, count in for_vectors(channels, self.lanes):
            totals = [self._start(start, count) for _ in range(block)]
            channel, whole = lanes_at(start, count), lanes_at(i32(0), count)
            with self._lines(place) as (tap, at):
                first = T.bind(x * window.stride[-1] - window.padding[-1])
                loaded: dict[int, list[Expr]] = {}
                for step in range(window.kernel[-1]):
                    weights = self._weights(tap * window.kernel[-1] + step, start, count)
                    for i, total in enumerate(totals):
                        offset = i * window.stride[-1] + step * window.dilation[-1]
                        if offset not in loaded:
                            loaded[offset] = self._inputs(n, (*at, first + offset), start, count)
                        for value, w in zip(loaded[offset], weights, strict=True):
                            T.buffer_store(total, total[whole] + value * w, [whole])
            for i, total in enumerate(totals):
                index = (n, *place, T.bind(x + i), channel)
                store_value(self.k, self.anchor, T.bind(total[whole]), self.out, index, count)

    @property
    def depth(self) -> int:
        """Channels of a group."""
        return self.conv.inputs // self.conv.groups

    def _inputs(self, n: Expr, at: Index, start: Expr, count: int) -> list[Expr]:
        """For each channel of a group: what the output channels ``start .. start+count`` see of it at a position."""
        if count == 1:
            first = T.bind(start - T.floormod(start, self.depth))
            return [T.bind(self.k.ev.at(self.conv.x, (n, *at, first + j))) for j in range(self.depth)]
        value = T.bind(self.k.ev.at(self.conv.x, (n, *at, lanes_at(start, count))))
        if self.depth == 1:
            return [value]
        lanes = [[i32(lane - lane % self.depth + j) for lane in range(count)] for j in range(self.depth)]
        return [T.bind(T.Shuffle([value], order)) for order in lanes]

    def _weights(self, tap: Expr, start: Expr, count: int) -> list[Expr]:
        """The weights of the same, for one position of the window."""
        rows = [(tap * self.depth + j) * self.conv.outputs + start for j in range(self.depth)]
        return [T.bind(self.weights[lanes_at(row, count)]) for row in rows]

    def _start(self, start: Expr, count: int) -> Any:
        """A register that holds the bias of ``count`` channels."""
        total, channel = T.alloc_buffer((count,), "float32"), lanes_at(start, count)
        bias = self.conv.bias
        first = f32(0.0) if bias is None else self.k.ev.at(bias, (channel,))
        T.buffer_store(total, splat(first, count), [lanes_at(i32(0), count)])
        return total

    @contextmanager
    def _lines(self, place: Index) -> Iterator[tuple[Expr, Index]]:
        """Loops over the lines of the window that lie inside the input; yields (line of the window, its position)."""
        window, sizes = self.conv.window, self.conv.window.split(self.k.ev.shape(self.conv.x))[2]
        line: Expr = i32(0)
        at: list[Expr] = []
        with ExitStack() as loops:
            for axis, (o, size) in enumerate(zip(place, sizes, strict=False)):
                first = T.bind(o * window.stride[axis] - window.padding[axis])
                low, high = inside(window, axis, first, size)
                step = T.bind(low + loops.enter_context(T.serial(0, T.max(high - low, 0))))
                line = line * window.kernel[axis] + step
                at.append(T.bind(first + step * window.dilation[axis]))
            yield T.bind(line), tuple(at)
