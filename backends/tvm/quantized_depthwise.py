"""Depthwise convolutions on codes, the channels last: vectors of channels, a few output pixels of a row in registers.

On AVX2 two lines of the window are multiplied at once: their codes interleaved, as int16, by ``vpmaddwd``, which adds
the two products in int32. NEON multiplies bytes. The image is first copied into a frame of zeros, so that all pixels
are alike: of bytes, that is cheaper than loops at the edges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, ClassVar

import sympy
import torch
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, as_int, for_vectors, i32, keep, lanes_at, splat
from planish.backends.tvm.conv import store_value
from planish.backends.tvm.index import unflatten_index
from planish.backends.tvm.integer_tile import LANES, STORED_LESS
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Packed, Region, Scratch, kernel, rows_in_parallel
from planish.backends.tvm.neon_products import long_products
from planish.conv_ops import Window, quantized_window
from planish.ops import QUANTIZED_CONVOLUTION
from planish.program import Program

PIXELS = (8, 7, 6, 5, 4)
"""Output pixels that are computed together, the first that divides the width, or else the first."""

CHANNELS = 64
"""Of a task: a cache line of codes."""


def is_quantized_depthwise(node: fx.Node) -> bool:
    """Whether a layer on codes is done here."""
    return node.target is QUANTIZED_CONVOLUTION and node.args[12] != 1


def packed_pairs(codes: torch.Tensor, taps: int) -> torch.Tensor:
    """8-bit codes [C, window] as int16 [pair of lines][tap][channel][2]; ``taps`` is the length of a line."""
    lines = (codes.to(torch.int16) - STORED_LESS).view(len(codes), -1, taps)
    even = torch.nn.functional.pad(lines, (0, 0, 0, lines.shape[1] % 2))
    return even.unflatten(1, (-1, 2)).permute(1, 3, 0, 2).reshape(-1)


def signed_taps(codes: torch.Tensor) -> torch.Tensor:
    """8-bit codes [C, window] as int8 [window][C]."""
    return (codes.to(torch.int16) - STORED_LESS).to(torch.int8).t().reshape(-1)


def lower_quantized_depthwise(module: Module, program: Program, region: Region, anchor: fx.Node) -> Lowered:
    """Kernel of a region around a depthwise convolution on codes.

    before: ``relu(planish::quantized_convolution(x, codes, ..., groups=channels))``
    after:  x into a frame of zeros; for each row of the output and 64 channels, for each block of pixels: products of
            codes in int32; times the scales, plus the bias, ReLU on the registers; store
    """
    window = quantized_window(anchor)
    batch, channels, spatial = window.split(program.shape(anchor.args[0]))  # pyright: ignore
    _, codes, scales, _, _, bias, input_scale, *_ = anchor.args
    frame = batch * channels
    for size, pad in zip(spatial, _around(anchor, window), strict=True):
        frame = frame * (size + pad)
    way = NeonDepthwise if module.target.is_arm else PairsDepthwise
    packed: list[tuple[Any, str]] = [
        (Packed(codes, way.layout, window.kernel[-1]), way.dtype),  # pyright: ignore
        (Packed(scales, "plain", 0), "float32"),  # pyright: ignore
        (Packed(input_scale, "plain", 0), "float32"),  # pyright: ignore
        (Scratch(frame), "int8"),
    ]
    skip: Any = [codes, scales, input_scale]
    with kernel(module, program, region, packed, skip=skip) as (k, out, extras):
        code = way(k, anchor, window, bias, *extras, out)
        code.fill_frame()
        code.emit()
    shape = (batch, channels, *program.shape(anchor)[1:-1], 1, *window.kernel)
    flops = 2 * sympy.prod([*program.shape(anchor), *window.kernel])
    assert k.function.func is not None
    return Lowered("depthwise_w8a8", k.function.func, k.operands, "qdepthwise", shape, flops)


def _around(anchor: fx.Node, window: Window) -> list[int]:
    """Zeros before and after each spatial axis together."""
    padding: Any = anchor.args[10]
    return [padding[axis] + padding[window.rank + axis] for axis in range(window.rank)]


@dataclass(frozen=True)
class _Depthwise(ABC):
    """Code of the kernel; a subclass knows how an instruction set multiplies."""

    layout: ClassVar[str]
    """Of the packed weights."""
    dtype: ClassVar[str]

    k: Kernel
    anchor: fx.Node
    window: Window
    bias: Any
    weights: Any
    scales: Any
    input_scale: Any
    frame: Any
    out: Any

    @property
    def _source(self) -> fx.Node:
        return self.anchor.args[0]  # pyright: ignore

    def _framed(self) -> list[Expr]:
        """Sizes of the frame's spatial axes."""
        _, _, spatial = self.window.split(self.k.ev.shape(self._source))
        return [size + pad for size, pad in zip(spatial, _around(self.anchor, self.window), strict=True)]

    def fill_frame(self) -> None:
        """Copy the image, line by line."""
        batch, channels, spatial = self.window.split(self.k.ev.shape(self._source))
        x, framed, before = self.k.ev.sources[self._source].buffer, self._framed(), self.window.padding
        lines: Expr = batch + i32(0)
        for size in framed[:-1]:
            lines = lines * size
        with rows_in_parallel(T.bind(lines)) as line:
            n, *place = (T.bind(i + i32(0)) for i in unflatten_index((batch, *framed[:-1]), line))
            inside, source = tirx.const(True, "bool"), n
            for at, pad, size in zip(place, before, spatial, strict=False):
                inside = tirx.And(inside, tirx.And(at >= pad, at < size + pad))
                source = source * size + (at - pad)
            begin, start = T.bind(line * framed[-1] * channels), T.bind(source * spatial[-1] * channels)
            left, middle = before[-1] * channels, spatial[-1] * channels
            right = (framed[-1] - spatial[-1] - before[-1]) * channels

            def zeros(first: Expr, count: Expr) -> None:
                for i, lanes in for_vectors(count, 4 * LANES):
                    T.buffer_store(self.frame, splat(0, lanes, "int8"), [lanes_at(first + i, lanes)])

            with T.If(inside):
                with T.Then():
                    zeros(begin, left)
                    for i, lanes in for_vectors(middle, 4 * LANES):
                        T.buffer_store(self.frame, x[lanes_at(start + i, lanes)], [lanes_at(begin + left + i, lanes)])
                    zeros(begin + left + middle, right)
                with T.Else():
                    zeros(begin, framed[-1] * channels)

    def emit(self) -> None:
        """Rows of the output, 64 channels at a time, in parallel."""
        batch, channels, (*outer, width) = self.window.split(self.k.ev.shape(self.anchor))
        parts = -(-channels // CHANNELS)
        tasks: Expr = batch * parts + i32(0)
        for size in outer:
            tasks = tasks * size
        known = as_int(width)
        pixels = self._blocks()
        block = next((p for p in pixels if known is not None and known % p == 0), pixels[0])
        with rows_in_parallel(T.bind(tasks)) as task:
            row = T.bind(T.truncdiv(task, parts))
            first = T.bind((task - row * parts) * CHANNELS)
            count = T.bind(T.min(channels - first, CHANNELS)) if channels % CHANNELS else CHANNELS
            n, *place = (T.bind(i + i32(0)) for i in unflatten_index((batch, *outer), row))
            blocks = T.bind(T.floordiv(width, block) + i32(0))
            for at, lanes in for_vectors(count, LANES):
                channel = T.bind(first + at)
                with T.serial(0, blocks) as b:
                    self._pixels((n, *place), T.bind(b * block), channel, lanes, block)
                with T.serial(0, width - blocks * block) as x:
                    self._pixels((n, *place), T.bind(blocks * block + x), channel, lanes, 1)

    def _pixels(self, place: tuple[Expr, ...], x: Expr, channel: Expr, lanes: int, block: int) -> None:
        """``block`` pixels from ``x`` on, of ``lanes`` channels."""
        totals = [T.alloc_buffer((lanes,), "int32") for _ in range(block)]
        whole = lanes_at(i32(0), lanes)
        for total in totals:
            T.buffer_store(total, splat(0, lanes, "int32"), [whole])
        self._sum(place, x, channel, lanes, totals)
        at = lanes_at(channel, lanes)
        scale = keep(self.scales[at] * splat(self.input_scale[0], lanes))
        for i, total in enumerate(totals):
            value = T.cast(total[whole], "float32" if lanes == 1 else f"float32x{lanes}") * scale
            if self.bias is not None:
                value = value + self.k.ev.at(self.bias, (at,))
            store_value(self.k, self.anchor, T.bind(value), self.out, (*place, T.bind(x + i), at), lanes)

    def _blocks(self) -> tuple[int, ...]:
        """Output pixels that may be computed together, the best first."""
        return PIXELS

    @abstractmethod
    def _sum(self, place: tuple[Expr, ...], x: Expr, channel: Expr, lanes: int, totals: list[Any]) -> None:
        """Add the products of all taps to ``totals``."""

    def _line(self, place: tuple[Expr, ...], x: Expr, channel: Expr, line: int) -> Expr:
        """Where in the frame a line of the window begins."""
        window, framed = self.window, self._framed()
        at, *outer = place
        steps = unflatten_index(window.kernel[:-1], line) if window.rank > 1 else ()
        for o, step, stride, dilation, size in zip(outer, steps, window.stride, window.dilation, framed, strict=False):
            at = at * size + (o * stride + step * dilation)
        channels = self.anchor.meta["val"].shape[-1]
        return T.bind((at * framed[-1] + x * window.stride[-1]) * channels + channel)


class PairsDepthwise(_Depthwise):
    """Two lines of the window at once, for AVX2."""

    layout, dtype = "pairs", "int16"

    def _sum(self, place: tuple[Expr, ...], x: Expr, channel: Expr, lanes: int, totals: list[Any]) -> None:
        window, channels = self.window, self.anchor.meta["val"].shape[-1]
        taps, lines = window.kernel[-1], prod(window.kernel[:-1])
        whole = lanes_at(i32(0), lanes)
        for pair in range(-(-lines // 2)):
            starts = [self._line(place, x, channel, line) for line in range(2 * pair, min(2 * pair + 2, lines))]
            loaded: dict[int, Expr] = {}
            for tap in range(taps):
                place_of = ((pair * taps + tap) * channels + channel) * 2
                weight = T.bind(self.weights[lanes_at(place_of, 2 * lanes)]) if lanes > 1 else place_of
                for i, total in enumerate(totals):
                    offset = i * window.stride[-1] + tap * window.dilation[-1]
                    if offset not in loaded:
                        loaded[offset] = self._pair([s + offset * channels for s in starts], lanes)
                    product = self._products(loaded[offset], weight, lanes)
                    T.buffer_store(total, total[whole] + product, [whole])

    def _pair(self, starts: list[Expr], lanes: int) -> Expr:
        """Codes of two lines at the same position, interleaved, as int16; of one line beside zeros."""
        if lanes == 1:
            return [self.frame[s] for s in starts]
        values = [T.bind(self.frame[lanes_at(s, lanes)]) for s in starts]
        values += [splat(0, lanes, "int8")] * (2 - len(values))
        order = [i32(i // 2 + i % 2 * lanes) for i in range(2 * lanes)]
        return T.bind(T.cast(T.Shuffle(values, order), f"int16x{2 * lanes}"))

    def _products(self, codes: Any, weight: Expr, lanes: int) -> Expr:
        """Products of both lines, added, int32."""
        if lanes > 1:
            return T.call_llvm_pure_intrin(f"int32x{lanes}", "llvm.x86.avx2.pmadd.wd", codes, weight)
        total: Expr = i32(0)
        for i, code in enumerate(codes):
            total = total + T.cast(code, "int32") * T.cast(self.weights[weight + i], "int32")
        return total


class NeonDepthwise(_Depthwise):
    """Two taps at once: products in int16, the sum of two cannot overflow; then it is added in int32."""

    layout, dtype = "signed taps", "int8"

    def _blocks(self) -> tuple[int, ...]:
        """As many as fit the registers with what they read."""
        return PIXELS if self.window.stride[-1] == 1 else PIXELS[-1:]

    def _sum(self, place: tuple[Expr, ...], x: Expr, channel: Expr, lanes: int, totals: list[Any]) -> None:
        window, channels = self.window, self.anchor.meta["val"].shape[-1]
        taps, whole = window.kernel[-1], lanes_at(i32(0), lanes)
        starts = [self._line(place, x, channel, line) for line in range(prod(window.kernel[:-1]))]

        @cache
        def codes(line: int, offset: int) -> Expr:
            return T.bind(self.frame[lanes_at(starts[line] + offset * channels, lanes)])

        def product(code: Expr, weight: Expr) -> Expr:
            if lanes == 1:
                return T.cast(code, "int32") * T.cast(weight, "int32")
            return long_products(self.k.module.target.arch, code, weight)

        for first in range(0, len(starts) * taps, 2):
            both = range(first, min(first + 2, len(starts) * taps))
            weights = [T.bind(self.weights[lanes_at(tap * channels + channel, lanes)]) for tap in both]
            for i, total in enumerate(totals):
                each = list[Expr]()
                for tap, weight in zip(both, weights, strict=True):
                    line, own = divmod(tap, taps)
                    code = codes(line, i * window.stride[-1] + own * window.dilation[-1])
                    each.append(product(code, weight))
                products = keep(sum(each[1:], each[0]))  # else TVM would add in int32
                products = T.cast(products, "int32" if lanes == 1 else f"int32x{lanes}")
                T.buffer_store(total, total[whole] + products, [whole])
