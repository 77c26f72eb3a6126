"""The register-blocked tiles of integer codes for ARM's NEON, and the layouts they read.

Rows of activations' codes are int8 as they are, one row after the other: a product takes four input features of one
row from a lane of a register, and four columns by four features of the weight from another (``sdot``). Codes of fewer
than 8 bits are shifted to the top of their byte, where they are signed, so that all products are a power of two too
large; sums stay exact in int32, and so does a sum times its group's integer scale. The power of two is in the columns'
scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, f32, function, i32, lanes_at
from planish.backends.tvm.integer_tile import UNIT, WIDTH, planes
from planish.backends.tvm.microkernel import prefetch
from planish.formats import LARGEST_CODE, WeightFormat

LANES = 4
"""Columns of a vector."""

QUADS = UNIT // 4
"""Steps of a unit: ``sdot`` adds up four products."""

HALF = UNIT // 2
"""Activations' codes in a register."""

TILES = {8: 1, 4: 2, 2: 4, 1: 4}
"""Rows of a tile to its vectors of columns, at most: with more, sums and products do not fit 32 registers."""

AHEAD = 1024
"""Bytes of codes that a tile of eight rows fetches ahead. What counts is that LLVM moves no loads across: it would have
all rows of a unit in registers at once, and spill sums."""


def shift(form: WeightFormat) -> int:
    """Bits by which codes lie higher than their value."""
    return 8 - form.bits


def units_of_block(form: WeightFormat) -> int:
    """Units whose scaled products add up in int32."""
    scale = LARGEST_CODE if form.group else 1
    most = ((1 << 31) - 1) // (UNIT * LARGEST_CODE * 128 * scale)
    return 1 << (most.bit_length() - 1)


def packed_codes(codes: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Codes uint8 [N, K] as vectors of four columns, each [unit][plane][register][column][4], filled up with zeros.

    A plane of ``b`` bits has ``b`` registers of 16 bytes for a unit, each with ``8 / b`` times four input features of
    every column, the first four in the lowest bits. Codes are two's complement: what they stand for, in steps.
    """
    n, depth = codes.shape
    middle = 1 << (form.bits - 1)
    codes = torch.nn.functional.pad(codes, (0, -depth % UNIT, 0, -n % WIDTH), value=middle)
    signed = ((codes.to(torch.int16) - middle) & ((1 << form.bits) - 1)).to(torch.uint8)
    quads = signed.view(-1, LANES, codes.shape[1] // UNIT, QUADS, 4).permute(0, 2, 3, 1, 4)
    parts, low = list[torch.Tensor](), 0
    for bits in planes(form.bits):
        each = 8 // bits
        pieces = ((quads >> low) & ((1 << bits) - 1)).unflatten(2, (QUADS // each, each))
        places = torch.arange(0, 8, bits, dtype=torch.uint8).view(each, 1, 1)
        parts.append((pieces << places).sum(3, dtype=torch.uint8))
        low += bits
    return torch.cat(parts, 2).reshape(-1)


def build_neon_tile(
    symbol: str, form: WeightFormat, rows: int, columns: int, *, biased: bool, long: bool
) -> tirx.PrimFunc:
    """C[rows, columns] = scale_row times (scaled sums of products of codes) + bias.

    Parameters: codes of A, of B, with groups their steps (int16), scales of the columns and of the rows, C, with
    ``biased`` the bias; then the elements between rows of A and of C, and the units of B.

    Args:
        symbol: C name.
        form: of B, symmetric, with groups or 8 bits.
        rows: of the tile, in ``TILES``.
        columns: at most four for each of its vectors.
        biased: whether there is a bias.
        long: whether B has more units than ``units_of_block``.
    """
    pointers = ["int8", "uint8", *(["int16"] if form.group else []), "float32", "float32", "float32"]
    with function(symbol) as f:
        given, (lda, ldc, units) = f.parameters([*pointers, *(["float32"] if biased else [])], 3, align=4)
        bias = given.pop() if biased else None
        *steps, of_columns, row_scales, c = given[2:]
        vectors = -(-columns // LANES)
        tile = _Tile(form, rows, vectors, given[0], lda, given[1], steps[0] if steps else None, units)
        exact = tile.long_sums(of_columns) if long else tile.sums(i32(0), units)
        for i in range(rows):
            scale = T.bind(T.broadcast(row_scales[i], LANES))
            for v in range(vectors):
                value = exact[i][v][_WHOLE]
                if not long:
                    value = T.cast(value, "float32x4") * of_columns[lanes_at(v * LANES, LANES)]
                total = T.alloc_buffer((LANES,), "float32")
                T.buffer_store(total, value * scale, [_WHOLE])
                count = min(LANES, columns - v * LANES)
                for at in [lanes_at(0, LANES)] if count == LANES else range(count):
                    result = total[at] if bias is None else total[at] + bias[v * LANES + at]
                    T.buffer_store(c, result, [i * ldc + v * LANES + at])
    assert f.func is not None
    return f.func


_WHOLE = T.ramp(0, 1, LANES)


@dataclass(frozen=True)
class _Tile:
    """Code of a tile's sums."""

    form: WeightFormat
    rows: int
    vectors: int
    a: Any
    lda: Expr
    b: Any
    steps: Any
    units: Expr

    def long_sums(self, columns: Any) -> list[list[Any]]:
        """Of all units, times the columns' scales, fp32: block by block."""
        total, per_block = self._registers("float32"), units_of_block(self.form)
        self._clear(total)
        with T.serial(0, T.floordiv(self.units + (per_block - 1), per_block)) as block:
            first = T.bind(block * per_block)
            exact = self.sums(first, T.bind(T.min(first + per_block, self.units)))
            for v in range(self.vectors):
                column = T.bind(columns[lanes_at(v * LANES, LANES)])
                for of_row, registers in zip(exact, total, strict=True):
                    value = registers[v][_WHOLE] + T.cast(of_row[v][_WHOLE], "float32x4") * column
                    T.buffer_store(registers[v], value, [_WHOLE])
        return total

    def sums(self, first: Expr, last: Expr) -> list[list[Any]]:
        """Of some units, times the groups' steps, in int32."""
        total = self._registers("int32")
        self._clear(total)
        if self.steps is None:
            with T.serial(first, last) as unit:
                self._unit(unit, total)
            return total
        per_group = self.form.group // UNIT  # pyright: ignore
        begin, end = T.floordiv(first, per_group), T.floordiv(last + (per_group - 1), per_group)
        with T.serial(begin, end) as group:
            part = self._registers("int32")
            self._clear(part)
            if per_group == 1:
                self._unit(group, part)
            else:
                start = T.bind(group * per_group)
                with T.serial(start, T.bind(T.min(start + per_group, last))) as unit:
                    self._unit(unit, part)
            for v in range(self.vectors):
                place = lanes_at(group * WIDTH + v * LANES, LANES)
                step = T.bind(T.cast(self.steps[place], "int32x4"))
                for of_row, registers in zip(part, total, strict=True):
                    T.buffer_store(registers[v], registers[v][_WHOLE] + of_row[v][_WHOLE] * step, [_WHOLE])
        return total

    def _registers(self, dtype: str) -> list[list[Any]]:
        return [[T.alloc_buffer((LANES,), dtype) for _ in range(self.vectors)] for _ in range(self.rows)]

    def _clear(self, registers: list[list[Any]]) -> None:
        for register in (r for row in registers for r in row):
            zero = f32(0.0) if "float" in str(register.dtype) else i32(0)
            T.buffer_store(register, T.broadcast(zero, LANES), [_WHOLE])

    def _unit(self, unit: Expr, sums: list[list[Any]]) -> None:
        """32 input features of all rows and columns."""
        size = UNIT * LANES * self.form.bits // 8
        bases = [T.bind((v * self.units + unit) * size) for v in range(self.vectors)]
        for half in range(2):
            if self.rows == max(TILES):
                prefetch(T.address_of(self.b[bases[0] + half * size // 2 + AHEAD]), level=1)
            a = [
                T.bind(T.reinterpret("int32x4", self.a[lanes_at(i * self.lda + unit * UNIT + half * HALF, HALF)]))
                for i in range(self.rows)
            ]
            for quad in range(QUADS // 2):
                for v, base in enumerate(bases):
                    w = T.bind(self._codes(base, half * QUADS // 2 + quad))
                    for i in range(self.rows):
                        four = T.reinterpret("int8x16", T.Shuffle([a[i]], [i32(quad)] * LANES))
                        T.buffer_store(sums[i][v], _dot(sums[i][v][_WHOLE], w, four), [_WHOLE])

    def _codes(self, base: Expr, quad: int) -> Expr:
        """Codes of four input features of four columns, at the top of their bytes, from their bit planes."""
        first, place_to, code = 0, shift(self.form), None
        for bits in planes(self.form.bits):
            register, place = divmod(quad * bits, 8)
            piece = T.bind(self.b[lanes_at(base + (first + register) * 16, 16)])
            if place_to > place:
                piece = T.shift_left(piece, T.broadcast(tirx.const(place_to - place, "uint8"), 16))
            elif place_to < place:
                piece = T.shift_right(piece, T.broadcast(tirx.const(place - place_to, "uint8"), 16))
            if bits < 8 and not (place == 0 and place_to + bits == 8):  # else the shift leaves nothing else
                mask = tirx.const(((1 << bits) - 1) << place_to, "uint8")
                piece = T.bitwise_and(piece, T.broadcast(mask, 16))
            code = piece if code is None else T.bitwise_or(code, piece)
            first, place_to = first + bits, place_to + bits
        return T.reinterpret("int8x16", code)


def _dot(total: Expr, w: Expr, x: Expr) -> Expr:
    """Four products of bytes added to each int32."""
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", total, w, x)
