"""The register-blocked tiles of integer codes for ARM's NEON, and the layouts they read.

How products take the codes of activations, int8, and of weights from registers is in ``neon_products``. Codes of fewer
than 8 bits are shifted to the top of their byte, where they are signed, so that all products are a power of two too
large; sums stay exact in int32, and so does a sum times its group's integer scale. The power of two is in the columns'
scales.

Codes of 2 bits in groups are stacked: a byte holds those of the panel's four vectors of columns for one feature. A tile
of all four vectors multiplies by the lowest code of each byte, by the lowest two at once, by three, and by the byte;
differences of these sums are those of the vectors. So three masks unpack four registers, instead of six operations. A
tile of fewer vectors masks its own codes. The lower three codes are unsigned, ``middle`` more than what they stand for:
sums start with what takes that off, which is known from the sum of the row's codes.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, f32, function, i32, lanes_at
from planish.backends.tvm.integer_tile import UNIT, WIDTH, packed_numbers, planes
from planish.backends.tvm.microkernel import prefetch
from planish.backends.tvm.neon_products import LANES, Products
from planish.formats import LARGEST_CODE, WeightFormat

QUADS = UNIT // 4
"""Registers of a vector's codes in a unit: they have 16 codes of the 128 each."""

STAGE = 2
"""Registers of codes whose operands are read together."""

FEWEST_EARLY = 4
"""Rows from which operands are read early: with fewer, registers of codes are not multiplied for long enough."""

AHEAD = 1024
"""Bytes of codes that are fetched ahead."""


VECTORS = WIDTH // LANES
"""Of a panel's columns."""


def stacked(form: WeightFormat) -> bool:
    """Whether a byte holds a code of each of a panel's vectors."""
    return form.bits * VECTORS == 8 and form.group is not None


def middle(form: WeightFormat) -> int:
    """The code of 0."""
    return 1 << (form.bits - 1)


def packed_columns(scales: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """The columns' scales, fp32 [N], less the power of two that their sums are too large by, and zeros."""
    numbers = packed_numbers(scales.view(-1)).view(-1, VECTORS, LANES)
    shifts = [form.bits * v for v in range(VECTORS)] if stacked(form) else [8 - form.bits] * VECTORS
    return (numbers / torch.tensor([1 << s for s in shifts]).view(-1, 1)).view(-1)


def units_of_block(form: WeightFormat) -> int:
    """Units whose scaled products add up in int32."""
    scale = LARGEST_CODE if form.group else 1
    most = ((1 << 31) - 1) // (UNIT * LARGEST_CODE * 128 * scale)
    return 1 << (most.bit_length() - 1)


def packed_codes(codes: torch.Tensor, form: WeightFormat, columns: int) -> torch.Tensor:
    """Codes uint8 [N, K] as panels of ``WIDTH`` columns, each [unit][vector][plane][register], and zeros.

    A plane of ``b`` bits has ``b`` registers of 16 bytes for a unit, whose bytes hold ``8 / b`` codes each, the first
    in the lowest bits. Codes in the same bits are those of four features of four columns, or of eight of two
    ``columns``, then of the vector's other two. They are two's complement: what they stand for, in steps.

    Stacked codes: [unit][register], the first vector's in the lowest bits; all but the last's stay unsigned.
    """
    n, depth = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -depth % UNIT, 0, -n % WIDTH), value=middle(form))
    signed = ((codes.to(torch.int16) - middle(form)) & ((1 << form.bits) - 1)).to(torch.uint8)
    features = 16 // columns
    shape = (-1, VECTORS, LANES // columns, columns, codes.shape[1] // UNIT, UNIT // features, features)
    if stacked(form):
        *lower, last = zip(*(t.view(shape).movedim(1, 0) for t in (codes, signed)), strict=True)
        of_vectors = torch.stack(
            [*(code for code, _ in lower), last[1]], -1
        )  # [panel][half][column][unit][piece][feature][v]
        places = torch.arange(0, 8, form.bits, dtype=torch.uint8)
        return (of_vectors << places).sum(-1, dtype=torch.uint8).permute(0, 3, 4, 1, 2, 5).reshape(-1)
    registers = signed.view(shape).permute(0, 4, 1, 5, 2, 3, 6).reshape(-1, QUADS, columns, features)
    parts, low = list[torch.Tensor](), 0
    for bits in planes(form.bits):
        each = 8 // bits
        pieces = ((registers >> low) & ((1 << bits) - 1)).unflatten(1, (QUADS // each, each))
        places = torch.arange(0, 8, bits, dtype=torch.uint8).view(each, 1, 1)
        parts.append((pieces << places).sum(2, dtype=torch.uint8))
        low += bits
    return torch.cat(parts, 1).reshape(-1)


def build_neon_tile(
    symbol: str,
    form: WeightFormat,
    products: Products,
    rows: int,
    columns: int,
    vector: int = 0,
    *,
    biased: bool,
    long: bool,
) -> tirx.PrimFunc:
    """C[rows, columns] = scale_row times (scaled sums of products of codes) + bias.

    Parameters: codes of A, of B, with groups their steps (int16), where codes are stacked ``-middle`` times the sum of
    each row's codes in each group [rows, groups], scales of the columns and of the rows, C, with ``biased`` the bias;
    then the elements between rows of C, and the units of B. Rows of A lie in turn, see ``neon_products``.

    Args:
        symbol: C name.
        form: of B, symmetric, with groups or 8 bits.
        products: how the level multiplies codes.
        rows: of the tile, in ``products.tiles``.
        columns: at most four for each of its vectors.
        vector: of the panel, that the tile begins with; where codes are stacked, as B is the whole panel then.
        biased: whether there is a bias.
        long: whether B has more units than ``units_of_block``.
    """
    products = products.of_tile(rows)
    pointers = ["int8", "uint8", *(["int16"] if form.group else []), *(["int32"] if stacked(form) else [])]
    pointers += ["float32", "float32", "float32"]
    with function(symbol) as f:
        given, (ldc, units) = f.parameters([*pointers, *(["float32"] if biased else [])], 2, align=4)
        bias = given.pop() if biased else None
        *numbers, of_columns, row_scales, c = given[2:]
        steps, sums_of_a = [*numbers, None, None][:2]
        vectors = -(-columns // LANES)
        tile = _Tile(form, products, rows, vectors, vector, given[0], given[1], steps, sums_of_a, units)
        exact = tile.long_sums(of_columns) if long else tile.sums(i32(0), units)
        for i in range(rows):
            scale = T.bind(T.broadcast(row_scales[i], LANES))
            for v in range(vectors):
                cell, within = divmod(i, products.rows)
                value = products.of_row([_whole(register) for register in exact[cell][v]], within)
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

Cells = list[list[list[Any]]]
"""Registers of the cells of a tile, by rows, then by vectors of columns."""


@dataclass(frozen=True)
class _Tile:
    """Code of a tile's sums."""

    form: WeightFormat
    products: Products
    rows: int
    vectors: int
    vector: int
    a: Any
    b: Any
    steps: Any
    sums_of_a: Any
    units: Expr

    def long_sums(self, columns: Any) -> Cells:
        """Of all units, times the columns' scales, fp32: block by block."""
        total, per_block = self._cells("float32", self.products.sums), units_of_block(self.form)
        with T.serial(0, T.floordiv(self.units + (per_block - 1), per_block)) as block:
            first = T.bind(block * per_block)
            exact = self.sums(first, T.bind(T.min(first + per_block, self.units)))
            for v in range(self.vectors):
                column = self.products.steps(T.bind(columns[lanes_at(v * LANES, LANES)]))
                for of_cell, cell in zip(exact, total, strict=True):
                    for part, register, numbers in zip(of_cell[v], cell[v], column, strict=True):
                        value = _whole(register) + T.cast(_whole(part), "float32x4") * numbers
                        T.buffer_store(register, value, [_WHOLE])
        return total

    def sums(self, first: Expr, last: Expr) -> Cells:
        """Of some units, times the groups' steps, in int32."""
        if self.steps is None:
            parts = self._cells("int32", self.products.parts)
            with T.serial(first, last) as unit:
                self._unit(unit, parts)
            return [[self._stored(self._whole(cell)) for cell in row] for row in parts]
        total = self._cells("int32", self.products.sums)
        per_group = self.form.group // UNIT  # pyright: ignore
        begin, end = T.floordiv(first, per_group), T.floordiv(last + (per_group - 1), per_group)
        with T.serial(begin, end) as group:
            parts = self._begun(group) if stacked(self.form) else self._cells("int32", self.products.parts)
            if per_group == 1:
                self._unit(group, parts)
            else:
                start = T.bind(group * per_group)
                with T.serial(start, T.bind(T.min(start + per_group, last))) as unit:
                    self._unit(unit, parts)
            for v in range(self.vectors):
                place = lanes_at(group * WIDTH + v * LANES, LANES)
                steps = self.products.steps(T.bind(T.cast(self.steps[place], "int32x4")))
                for of_cell, cell in zip(parts, total, strict=True):
                    sums = self._whole(of_cell[v])
                    if v and self._by_differences:
                        sums = [own - lower for own, lower in zip(sums, self._whole(of_cell[v - 1]), strict=True)]
                    for part, register, step in zip(sums, cell[v], steps, strict=True):
                        T.buffer_store(register, _whole(register) + part * step, [_WHOLE])
        return total

    @property
    def _by_differences(self) -> bool:
        """Whether sums are those of a vector's codes with all lower ones."""
        return stacked(self.form) and self.vectors == VECTORS

    def _begun(self, group: Expr) -> Cells:
        """Registers of a group of stacked codes: what takes off that the lower codes are unsigned."""
        bits, groups = self.form.bits, T.floordiv(self.units + (per_group := self.form.group // UNIT) - 1, per_group)  # pyright: ignore
        of_rows = [T.bind(self.sums_of_a[row * groups + group]) for row in range(self.rows)]
        of_rows += [i32(0)] * (-self.rows % self.products.rows)
        cells = self._cells("int32", self.products.parts)
        for v in range(self.vectors):
            own = [self.vector + v] if not self._by_differences else range(v + 1)
            factor = sum(1 << (bits * at) for at in own if at < VECTORS - 1)
            for i, cell in enumerate(cells):
                of_cell = of_rows[i * self.products.rows : (i + 1) * self.products.rows]
                begun = self.products.begun([T.bind(n * i32(factor)) for n in of_cell])
                for register, value in zip(cell[v], begun, strict=True):
                    T.buffer_store(register, value, [_WHOLE])
        return cells

    def _whole(self, cell: list[Any]) -> list[Expr]:
        return self.products.whole([_whole(register) for register in cell])

    def _stored(self, values: list[Expr]) -> list[Any]:
        registers = [T.alloc_buffer((LANES,), "int32") for _ in values]
        for register, value in zip(registers, values, strict=True):
            T.buffer_store(register, value, [_WHOLE])
        return registers

    def _cells(self, dtype: str, count: int) -> Cells:
        """Registers of zeros, ``count`` for each cell."""
        cells = range(-(-self.rows // self.products.rows))
        found = [[[T.alloc_buffer((LANES,), dtype) for _ in range(count)] for _ in range(self.vectors)] for _ in cells]
        zero = f32(0.0) if dtype == "float32" else i32(0)
        for register in (r for row in found for cell in row for r in cell):
            T.buffer_store(register, T.broadcast(zero, LANES), [_WHOLE])
        return found

    def _unit(self, unit: Expr, parts: Cells) -> None:
        """32 input features of all rows and columns.

        Tiles of many rows read what two registers of codes need while the two before are multiplied, and a prefetch
        stands in between, across which LLVM moves no loads: it would have them just before their use, where an in-order
        processor waits.
        """
        first, start = T.bind(unit * (UNIT * WIDTH * self.form.bits // 8)), T.bind(unit * (UNIT * self.rows))
        pending = defaultdict[tuple[int, int], dict[int, Any]](dict)

        @cache
        def load(register: int) -> Expr:
            return T.bind(T.reinterpret("int32x4", self.a[lanes_at(start + register * 16, 16)]))

        @cache
        def load_register(at: int) -> Expr:
            return T.bind(self.b[lanes_at(first + at, 16)])

        def load_codes(v: int, register: int) -> list[tuple[Expr, int, int]]:
            return [(load_register(at), low, bits) for at, low, bits in self._places(v, register)]

        def operand(register: int, cell: int) -> Expr:
            return self.products.operand(load, register * self.products.columns // LANES, cell, self.rows)

        def load_ahead(begin: int) -> None:
            for register in range(begin, begin + STAGE):
                _ = [load_codes(v, register) for v in range(self.vectors)]
                _ = [operand(register, cell) for cell in range(len(parts))]

        stages = range(STAGE - 1, QUADS - 1, STAGE) if self.rows >= FEWEST_EARLY else ()
        if stages:
            load_ahead(0)
        for register, v in itertools.product(range(QUADS), range(self.vectors)):
            if register in stages and v == self.vectors - 1:
                prefetch(T.address_of(self.b[first + register * 16 + AHEAD]), level=1)
                load_ahead(register + 1)
            w = T.bind(self._codes(load_codes(v, register)))
            for cell, of_cell in enumerate(parts):
                self.products.add(of_cell[v], w, operand(register, cell), register, pending[cell, v])

    def _places(self, v: int, register: int) -> list[tuple[int, int, int]]:
        """Where codes have their bits: for each plane the first byte in the unit, the lowest bit there, the width."""
        if stacked(self.form):
            return [(register * 16, (self.vector + v) * self.form.bits, self.form.bits)]
        found, first = list[tuple[int, int, int]](), v * self.form.bits
        for bits in planes(self.form.bits):
            at, low = divmod(register * bits, 8)
            found.append(((first + at) * 16, low, bits))
            first += bits
        return found

    def _codes(self, pieces: list[tuple[Expr, int, int]]) -> Expr:
        """Codes at the top of their bytes, from their bit planes: each with the lowest bit and the width.

        Stacked codes stay where they are in their bytes.
        """
        if stacked(self.form):
            ((byte, low, bits),) = pieces
            mask = ((1 << (low + bits)) - 1) & (-1 if self._by_differences else -1 << low)
            return T.reinterpret("int8x16", T.bitwise_and(byte, T.broadcast(tirx.const(mask, "uint8"), 16)))
        to, code = 8 - self.form.bits, None
        for piece, low, bits in pieces:
            if to > low:
                piece = T.shift_left(piece, T.broadcast(tirx.const(to - low, "uint8"), 16))
            elif to < low:
                piece = T.shift_right(piece, T.broadcast(tirx.const(low - to, "uint8"), 16))
            if bits < 8 and not (low == 0 and to + bits == 8):  # else the shift leaves nothing else
                mask = tirx.const(((1 << bits) - 1) << to, "uint8")
                piece = T.bitwise_and(piece, T.broadcast(mask, 16))
            code = piece if code is None else T.bitwise_or(code, piece)
            to += bits
        return T.reinterpret("int8x16", code)


def _whole(register: Any) -> Expr:
    return register[_WHOLE]
