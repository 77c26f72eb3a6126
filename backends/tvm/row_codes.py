"""The rows that a layer on integer codes multiplies, as codes in scratch memory: made, copied or gathered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, f32, for_vectors, horizontal, i32, keep, lanes_at, splat, workspace
from planish.backends.tvm.index import unflatten_index
from planish.backends.tvm.vmath import fused_multiply_add
from planish.conv_ops import Window, quantized_window
from planish.formats import LARGEST_CODE, TINY
from planish.ops import QUANTIZED_CONVOLUTION

if TYPE_CHECKING:
    from planish.backends.tvm.quantized import IntegerTiles
    from planish.backends.tvm.stage import StageCode


LANES = 8
"""Codes that are summed together, at most."""


def row_codes(code: StageCode, tiles: IntegerTiles) -> RowCodes:
    """How the layer's input becomes rows of codes."""
    if tiles.node.target is QUANTIZED_CONVOLUTION:
        return _Gather(code, tiles)
    is_codes = tiles.node.args[0].meta["val"].dtype is torch.int8  # pyright: ignore
    return (_Copy if is_codes else tiles.quantise)(code, tiles)


@dataclass
class RowCodes(ABC):
    """Code for one row of a chunk: its codes, their sums where a tile needs them, and its scale."""

    code: StageCode
    tiles: IntegerTiles

    @abstractmethod
    def emit(self, at: Expr) -> None:
        """Row ``at`` of the chunk."""

    def _store(self, index: Expr, value: Expr, lanes: int) -> None:
        """Store ``lanes`` codes, int32 or int8 in -127..127, from ``index`` on, as tiles read them."""
        dtype, offset = self.tiles.code_dtype, self.tiles.code_offset
        if offset:
            value = keep(T.cast(value, _vector("int32", lanes))) + splat(offset, lanes, "int32")
        T.buffer_store(self.code.scratch[0], T.cast(keep(value), _vector(dtype, lanes)), [lanes_at(index, lanes)])

    def _finish(self, place: Callable[[Expr], Expr], at_row: Expr) -> None:
        """Zeros up to whole units, and the sums."""
        tiles, form = self.tiles, self.tiles.form.weight
        padded, group = tiles.depth, form.group or tiles.depth
        codes, _, *sums = self.code.scratch
        with T.serial(self.code.stage.depth, padded) as at:
            T.buffer_store(codes, tirx.const(0, tiles.code_dtype), [place(at)])
        if tiles.sum_factor is None:
            return
        lanes = min(LANES, tiles.together)
        total, whole = T.alloc_buffer((lanes,), "int32"), T.ramp(0, 1, lanes)
        with T.serial(0, tiles.groups) as g:
            T.buffer_store(total, splat(0, lanes, "int32"), [whole])
            begin = T.bind(g * group)
            with T.serial(0, T.bind(T.floordiv(T.min(padded - begin, group), lanes))) as v:
                part = T.cast(codes[lanes_at(place(begin + v * lanes), lanes)], f"int32x{lanes}")
                T.buffer_store(total, total[whole] + part, [whole])
            of_group = horizontal(T.bind(total[whole]), lanes, lambda a, b: a + b)
            T.buffer_store(sums[0], of_group * tiles.sum_factor, [at_row * tiles.groups + g])


def _vector(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


class _Copy(RowCodes):
    """The input is codes already."""

    def emit(self, at: Expr) -> None:
        """Widen them."""
        source = self.code.source
        start, place = T.bind(source.row(self.code.first + at)), self.tiles.place(self.code, at)
        for i, n in for_vectors(self.code.stage.depth, self.tiles.together):
            self._store(place(i), source.buffer[lanes_at(start + i, n)], n)
        self._finish(place, at)
        T.buffer_store(self.code.scratch[1], self.code.constants[-1][0], [at])


class _Gather(RowCodes):
    """The input is an image of codes; a row is what one position of the output sees of it, zeros beyond its edges."""

    def emit(self, at: Expr) -> None:
        """A run of codes for each position of the window."""
        code, window = self.code, quantized_window(self.tiles.node)
        where = self.tiles.place(code, at)
        batch, channels, sizes = window.split(code.k.ev.shape(self.tiles.node.args[0]))
        _, _, spatial = window.split(code.k.ev.shape(self.tiles.node))
        n, *place = (T.bind(i + i32(0)) for i in unflatten_index((batch, *spatial), T.bind(code.first + at)))
        with ExitStack() as loops:
            taps = [loops.enter_context(T.serial(0, size)) for size in window.kernel]
            line, inside, tap = n, tirx.const(True, "bool"), i32(0)
            positions = self._positions(window, place, taps)
            for position, size, own, extent in zip(positions, sizes, taps, window.kernel, strict=True):
                inside = tirx.And(inside, tirx.And(position >= 0, position < size))
                line, tap = line * size + position, tap * extent + own
            start, feature = T.bind(line * channels), T.bind(tap * channels)
            together = self.tiles.together if int(channels) % self.tiles.together == 0 else self.tiles.together_anywhere
            with T.If(inside):
                with T.Then():
                    for i, lanes in for_vectors(channels, together):
                        self._store(where(feature + i), code.source.buffer[lanes_at(start + i, lanes)], lanes)
                with T.Else():
                    for i, lanes in for_vectors(channels, together):
                        self._store(where(feature + i), splat(0, lanes, "int32"), lanes)
        self._finish(where, at)
        T.buffer_store(code.scratch[1], code.constants[-1][0], [at])

    def _positions(self, window: Window, place: list[Expr], taps: list[Expr]) -> list[Expr]:
        """Where in the input a position of the window lies, axis by axis."""
        axes = zip(place, taps, window.stride, window.padding, window.dilation, strict=True)
        return [T.bind(o * stride - pad + tap * dilation) for o, tap, stride, pad, dilation in axes]


class Quantise(RowCodes):
    """The input is fp32; the reference is ``planish.formats.quantise_rows``."""

    def emit(self, at: Expr) -> None:
        """Find the row's scale, if it is not given, and round."""
        source = self.code.source
        x, start = source.buffer, T.bind(source.row(self.code.first + at))
        if self.tiles.outliers or self.tiles.equaliser is not None:
            x, start = self._evened(x, start, at), i32(0)
        place, depth, group = self.tiles.place(self.code, at), self.code.stage.depth, self._group
        whole, rest = divmod(depth, group)
        with T.serial(0, whole) as g:
            first = T.bind(g * group) if whole > 1 else i32(0)
            self._quantise(x, start, at * self.tiles.scales + g, place, first, group)
        if rest:
            self._quantise(x, start, at * self.tiles.scales + whole, place, i32(whole * group), rest)
        self._finish(place, at)

    @property
    def _group(self) -> int:
        """Features that share a scale."""
        by_group = self.tiles.form.by_group
        return (self.tiles.form.weight.group if by_group else None) or self.code.stage.depth

    def _quantise(
        self, x: Any, start: Expr, scale_at: Expr, place: Callable[[Expr], Expr], first: Expr, count: int
    ) -> None:
        """Features ``first .. first + count``, which share a scale."""
        top, poison = self._largest(x, T.bind(start + first), count)
        if self.tiles.scale is None:
            inverse = tirx.Select(top > f32(TINY), f32(LARGEST_CODE) / top, f32(0.0))
            scale = top / f32(LARGEST_CODE)
        else:
            scale = keep(self.code.constants[-1][0])
            inverse = f32(1.0) / scale
        T.buffer_store(self.code.scratch[1], scale + poison, [scale_at])
        self._codes(x, T.bind(start + first), lambda i: place(first + i), keep(inverse), count)

    def _evened(self, x: Any, start: Expr, at: Expr) -> Any:
        """A copy of the row, times the equaliser, with zeros at the outliers, which are stored apart."""
        tiles, even = self.tiles, workspace(self.tiles.depth)
        features, equaliser = tiles.optional(self.code.constants)
        for i, n in for_vectors(self.code.stage.depth, self.code.k.lanes):
            value = x[lanes_at(start + i, n)]
            value = value if tiles.equaliser is None else value * equaliser[lanes_at(i, n)]
            T.buffer_store(even, value, [lanes_at(i, n)])
        if not tiles.outliers:
            return even
        with T.serial(0, tiles.outliers) as c:
            feature = keep(T.cast(features[c], "int32"))
            T.buffer_store(self.code.scratch[-1], x[start + feature], [at * tiles.outliers + c])
            T.buffer_store(even, f32(0.0), [feature])
        return even

    def _largest(self, x: Any, start: Expr, count: int) -> tuple[Expr, Expr]:
        """Largest magnitude of some features; and 0, or NaN if they hold NaN or infinity."""
        lanes = self.code.k.lanes
        top, poison = (T.alloc_buffer((lanes,), "float32") for _ in range(2))
        whole = T.ramp(0, 1, lanes)
        for register in (top, poison):
            T.buffer_store(register, splat(0.0, lanes), [whole])
        for at, n in for_vectors(count, lanes):
            value, place = keep(x[lanes_at(start + at, n)]), lanes_at(i32(0), n)
            T.buffer_store(top, T.max(top[place], T.max(value, -value)), [place])
            T.buffer_store(poison, fused_multiply_add(value, splat(0.0, n), poison[place]), [place])
        largest = keep(horizontal(T.bind(top[whole]), lanes, T.max))
        return largest, keep(horizontal(T.bind(poison[whole]), lanes, lambda a, b: a + b))

    def _codes(self, x: Any, start: Expr, place: Callable[[Expr], Expr], inverse: Expr, count: int) -> None:
        """Round, and store where ``place`` says."""
        for at, n in for_vectors(count, self.code.k.lanes):
            value = x[lanes_at(start + at, n)] * splat(inverse, n)
            value = T.max(splat(-float(LARGEST_CODE), n), T.min(splat(float(LARGEST_CODE), n), T.nearbyint(value)))
            self._store(place(at), T.cast(keep(value), _vector("int32", n)), n)
