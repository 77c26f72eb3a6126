"""The register-blocked tiles of integer codes, for AVX2 without dot-product instructions, and the layouts they read.

Sums of products are exact integers. Codes of up to 6 bits are multiplied as bytes (``vpmaddubsw``: unsigned by signed,
pairs added in int16) and summed in int16 for as many steps as cannot overflow; codes of 8 bits as int16
(``vpmaddwd``), since pairs of full bytes would saturate.

Symmetric formats below 8 bits have signed weights, and activations that are made unsigned by adding ``SHIFT``: what
that adds to a sum depends on the weights alone, and is where the sums start (``packed_offsets``). ``vpmaddwd`` by the
group's integer scale then widens an int16 sum, and all groups add up in int32. In other formats every group's sum
becomes fp32 once, and the weights' minimum is added times the sum of the activations' codes.

Where many rows share a panel of weights, its codes are unpacked to bytes once, before; with a few rows the tile unpacks
them on the way, and reads less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, dtype_of, f32, function, i32, keep, lanes_at, lanes_of
from planish.backends.tvm.microkernel import CACHE_LINE, prefetch
from planish.formats import LARGEST_CODE, Format, WeightFormat

LANES = 8
"""Columns of a vector: int32 sums in 32 bytes, also on processors that have wider vectors."""

UNIT = 32
"""Input features that are unpacked together; groups are whole units, the last is filled up with zeros."""

QUADS = UNIT // 4
"""Steps of a unit: ``vpmaddubsw`` and ``vpmaddwd`` together add up four products."""


WORD_STEPS = 4
"""Steps of 8-bit codes in an iteration of their loop."""

VECTORS = 2
"""Vectors of columns of a tile."""

WIDTH = VECTORS * LANES
"""Columns of a tile, and of a panel of the packed weight."""


AHEAD = 4096
"""Bytes of codes that a tile of one row fetches ahead: a page, where the hardware's own prefetching stops."""

TILE_ROWS = (4, 6)
"""Rows of the largest tile that are worth measuring."""


def tile_rows(form: WeightFormat) -> int:
    """Those of formats that no cost table has: as many as keep their sums in registers, measured on a Zen 3."""
    return 4 if form.bits == 6 or not (form.symmetric or form.bits == 8) else 6


SHIFT = 128
"""What activations' codes are stored more by, to be unsigned."""


def sums_in_integers(form: WeightFormat) -> bool:
    """Whether all groups of a row add up in int32."""
    return form.symmetric and form.bits < 8


def activation_dtype(form: WeightFormat) -> str:
    """How the codes of activations stand in memory."""
    return "uint8" if sums_in_integers(form) else "int16" if form.bits == 8 else "int8"


def code_offset(form: WeightFormat) -> int:
    """What the codes of activations are stored more by."""
    return SHIFT if sums_in_integers(form) else 0


def sum_factor(form: WeightFormat) -> int | None:
    """What the sums of activations' codes are multiplied by for the tile, which subtracts ``STORED_LESS`` itself; None
    where it needs no sums."""
    if sums_in_integers(form):
        return None
    return STORED_LESS - (1 << (form.bits - 1)) if form.symmetric else 1


STORED_LESS = 128
"""What 8-bit codes are stored less, to be signed."""


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the bit planes that codes are split into, lowest bits first: 6 bits are 4 and 2."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed_codes(codes: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Codes uint8 [N, K] as panels of columns, each [unit][vector][column], filled up with codes of 0.

    8 bits: int8 [pair][vector][column][2], less ``STORED_LESS``. Fewer bits: for each plane of ``b`` bits ``b`` vectors
    of 32 bytes, [column][4] each; vector v holds quads ``8/b v`` and following, the first in the lowest bits.
    """
    n, depth = codes.shape
    middle = 1 << (form.bits - 1) if form.bits == 8 or form.symmetric else 0
    codes = torch.nn.functional.pad(codes, (0, -depth % UNIT, 0, -n % WIDTH), value=middle)
    if form.bits == 8:
        pairs = (codes.to(torch.int16) - STORED_LESS).to(torch.int8).view(-1, WIDTH, codes.shape[1] // 2, 2)
        return pairs.transpose(1, 2).reshape(-1).view(torch.uint8)
    quads = codes.view(-1, VECTORS, LANES, codes.shape[1] // UNIT, QUADS, 4).permute(0, 3, 1, 4, 2, 5)
    parts, shift = [], 0
    for bits in planes(form.bits):
        each = 8 // bits
        pieces = ((quads >> shift) & ((1 << bits) - 1)).unflatten(3, (QUADS // each, each))
        places = torch.arange(0, 8, bits, dtype=torch.uint8).view(each, 1, 1)
        parts.append((pieces << places).sum(4, dtype=torch.uint8))
        shift += bits
    return torch.cat(parts, 3).reshape(-1)


def packed_numbers(numbers: torch.Tensor) -> torch.Tensor:
    """Scales, minimums [N, groups] or one number per column [N] as panels [group][column], filled up with zeros."""
    numbers = numbers.view(len(numbers), -1)
    padded = torch.nn.functional.pad(numbers, (0, 0, 0, -numbers.shape[0] % WIDTH))
    return padded.unflatten(0, (-1, WIDTH)).transpose(1, 2).reshape(-1)


def packed_steps(scales: torch.Tensor) -> torch.Tensor:
    """Integer scales int8 [N, groups] as panels [group][column][2]: one for each int16 of a column's sum."""
    return packed_numbers(scales).repeat_interleave(2)


def units_of_block(form: WeightFormat) -> int:
    """Units whose products add up in int32: each int16 sum is scaled by up to 127, or in one group by 1."""
    scale = LARGEST_CODE if form.group else 1
    most = (1 << 30) // (2 * ((1 << 15) - 1) * scale) * safe_quads(form.bits) // QUADS
    return 1 << (most.bit_length() - 1)


def blocks(form: WeightFormat, depth: int) -> int:
    """Sums in int32 that ``depth`` input features need."""
    return -(-depth // (UNIT * units_of_block(form)))


def packed_offsets(codes: torch.Tensor, scales: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Where the int32 sums start, [block][column] in panels: minus ``SHIFT`` times the scaled weights' sum."""
    depth = codes.shape[1]
    steps = scales.long().repeat_interleave(form.group, 1)[:, :depth] if form.group else 1
    signed = (codes.long() - (1 << (form.bits - 1))) * steps
    parts = signed.split(UNIT * units_of_block(form), 1)
    return packed_numbers(torch.stack([part.sum(1) * -SHIFT for part in parts], 1).int())


def packed_size(shape: tuple[int, int], form: WeightFormat) -> int:
    """Bytes of ``packed_codes``."""
    n, depth = shape
    return -(-n // WIDTH) * WIDTH * -(-depth // UNIT) * UNIT * form.bits // 8


def safe_quads(bits: int) -> int:
    """Steps whose sums of two products fit int16, as a part of a unit: 8 up to 4 bits, 4 for 5 bits, 2 for 6."""
    steps = QUADS
    while steps * 2 * ((1 << bits) - 1) * LARGEST_CODE > (1 << 15) - 1:
        steps //= 2
    return steps


def build_unpacking(symbol: str, form: WeightFormat) -> tirx.PrimFunc:
    """The codes of a panel, of up to 6 bits, as bytes [unit][quad][vector][column][4]; signed in a symmetric format.

    Parameters: packed codes, the bytes, then the units.
    """
    with function(symbol) as f:
        signed = sums_in_integers(form)
        (packed, unpacked), (units,) = f.parameters(["uint8", "int8" if signed else "uint8"], 1, align=4)
        with T.serial(0, units) as unit:
            for quad in range(QUADS):
                for v in range(VECTORS):
                    code = _unpacked(form, packed, (unit * VECTORS + v) * form.bits * 4 * LANES, quad)
                    place = lanes_at(((unit * QUADS + quad) * VECTORS + v) * 4 * LANES, 4 * LANES)
                    T.buffer_store(unpacked, code, [place])
    assert f.func is not None
    return f.func


def build_integer_tile(
    symbol: str, whole: Format, rows: int, columns: int, *, biased: bool, unpacked: bool
) -> tirx.PrimFunc:
    """C[rows, columns] = scale_row times (scaled sums of products of codes) + bias, ``columns`` of a panel.

    Parameters: codes of A (as int32), of B (with ``unpacked`` as ``build_unpacking`` leaves them), then

    - where sums are integers: offsets, with groups their steps, scales of the columns; of the rows; C;
    - else: scales of B, with an asymmetric format its minimums; for each row and group the sum of A's codes times
      ``sum_factor``; scales of the rows, or of their groups; C;

    with ``biased`` the bias. Then the elements between rows of A (int32), of the sums and of C, and the units of B.
    """
    form = whole.weight
    exact = sums_in_integers(form)
    pointers = ["int32", "int8" if form.bits == 8 or (exact and unpacked) else "uint8"]
    if exact:
        pointers += ["int32", *(["int8"] if form.group else []), "float32"]
    else:
        number = "float16" if form.group else "float32"
        pointers += [number, *([] if form.symmetric else [number]), "int32"]
    pointers += ["float32", "float32", *(["float32"] if biased else [])]
    with function(symbol) as f:
        given, (lda, lds, ldc, units) = f.parameters(pointers, 4, align=2)
        a, b, *numbers = given
        *numbers, row_scales, c = numbers[:-1] if biased else numbers
        for i in range(rows):  # or the stores of sums wait behind those of C
            prefetch(T.address_of(c[i * ldc]), level=1, write=True)
        total = _registers(rows, "float32")
        _fill(total, lambda i, v: T.broadcast(f32(0.0), LANES))
        tile = _Tile(form, rows, a, lda, b, units, total, unpacked=unpacked)
        if exact:
            tile.blocks(numbers)
        else:
            tile.groups(numbers, lds, row_scales if whole.by_group else None)
        for i in range(rows):
            scale = None if whole.by_group else T.bind(T.broadcast(row_scales[i], LANES))
            for v in range(-(-columns // LANES)):
                if scale is not None:
                    T.buffer_store(total[i][v], total[i][v][_WHOLE] * scale, [_WHOLE])
                count = min(LANES, columns - v * LANES)
                for at in [lanes_at(0, LANES)] if count == LANES else range(count):
                    value = total[i][v][at]
                    value = value + given[-1][v * LANES + at] if biased else value
                    T.buffer_store(c, value, [i * ldc + v * LANES + at])
    assert f.func is not None
    return f.func


_WHOLE = T.ramp(0, 1, LANES)


def _registers(rows: int, dtype: str) -> list[list[Any]]:
    return [[T.alloc_buffer((LANES,), dtype) for _ in range(VECTORS)] for _ in range(rows)]


def _fill(registers: list[list[Any]], value: Callable[[int, int], Expr]) -> None:
    for i, row in enumerate(registers):
        for v, register in enumerate(row):
            T.buffer_store(register, value(i, v), [_WHOLE])


@dataclass(frozen=True)
class _Tile:
    """Code of a tile's sums, which end up in ``total``, fp32."""

    form: WeightFormat
    rows: int
    a: Any
    lda: Expr
    b: Any
    units: Expr
    total: list[list[Any]]
    unpacked: bool

    def blocks(self, numbers: list[Any]) -> None:
        """All groups in int32, block by block."""
        offsets, *steps, columns = numbers
        per_block, per_group = units_of_block(self.form), (self.form.group or UNIT) // UNIT
        with T.serial(0, T.floordiv(self.units + (per_block - 1), per_block)) as block:
            self._fetch(offsets, (block + 1) * VECTORS * LANES)
            self._fetch(columns, VECTORS * LANES)
            starts = [T.bind(offsets[lanes_at((block * VECTORS + v) * LANES, LANES)]) for v in range(VECTORS)]
            exact = _registers(self.rows, "int32")
            _fill(exact, lambda i, v: starts[v])
            first = T.bind(block * per_block)
            with T.serial(first, T.bind(T.min(first + per_block, self.units))) as unit:
                place = T.floordiv(unit, per_group) * VECTORS
                if steps:
                    self._fetch(steps[0], place * 2 * LANES + T.floordiv(self.units, per_group) * VECTORS * 2 * LANES)
                scales = [self._step(steps[0], place + v) if steps else _ONES for v in range(VECTORS)]
                self._unit_of_bytes(unit, exact, scales)
            for v in range(VECTORS):
                column = T.bind(columns[lanes_at(v * LANES, LANES)])
                for registers, sums in zip(self.total, exact, strict=True):
                    value = T.cast(sums[v][_WHOLE], f"float32x{LANES}") * column
                    T.buffer_store(registers[v], registers[v][_WHOLE] + value, [_WHOLE])

    def _fetch(self, numbers: Any, at: Expr) -> None:
        """Have what the next panel reads on its way: a single row does so little with a panel that it would wait."""
        if self.rows == 1:
            prefetch(T.address_of(numbers[at]), level=1)

    def _fetch_codes(self, base: Expr, nbytes: int) -> None:
        """The same for codes: a step's bytes further on."""
        for line in range(0, nbytes, CACHE_LINE):
            self._fetch(self.b, base + line + AHEAD)

    def _step(self, steps: Any, place: Expr) -> Expr:
        """Scales of a vector of columns, twice each, as int16."""
        return keep(T.cast(steps[lanes_at(place * 2 * LANES, 2 * LANES)], f"int16x{2 * LANES}"))

    def groups(self, numbers: list[Any], lds: Expr, group_scales: Any) -> None:
        """Each group in int32, all of them in fp32; with ``group_scales``, times those of the rows' groups."""
        scales, *minimums, sums = numbers
        form, total = self.form, self.total
        per_group = self.units if form.group is None else form.group // UNIT
        groups = i32(1) if form.group is None else T.floordiv(self.units + (per_group - 1), per_group)
        with T.serial(0, groups) as g:
            exact = _registers(self.rows, "int32")
            factor = 1 if form.symmetric else STORED_LESS if form.bits == 8 else 0
            _fill(exact, lambda i, v: T.broadcast(sums[i * lds + g] * factor if factor else i32(0), LANES))
            first = T.bind(g * per_group)
            with T.serial(first, T.bind(T.min(first + per_group, self.units))) as unit:
                if form.bits == 8:
                    self._unit_of_words(unit, exact)
                else:
                    self._unit_of_bytes(unit, exact, [_ONES] * VECTORS)
            for of_columns in (scales, *minimums):
                self._fetch(of_columns, (g + groups) * VECTORS * LANES)
            places = [lanes_at((g * VECTORS + v) * LANES, LANES) for v in range(VECTORS)]
            wide = [T.bind(T.cast(scales[at], f"float32x{LANES}")) for at in places]
            least = [T.bind(T.cast(m[at], f"float32x{LANES}")) for m in minimums for at in places]
            for i in range(self.rows):
                for v in range(VECTORS):
                    value = T.cast(exact[i][v][_WHOLE], f"float32x{LANES}") * wide[v]
                    if group_scales is None:
                        value = total[i][v][_WHOLE] + value
                    if least:
                        value = value + T.broadcast(T.cast(sums[i * lds + g], "float32"), LANES) * least[v]
                    if group_scales is not None:
                        value = total[i][v][_WHOLE] + value * T.broadcast(group_scales[i * lds + g], LANES)
                    T.buffer_store(total[i][v], value, [_WHOLE])

    def _unit_of_words(self, unit: Expr, exact: list[list[Any]]) -> None:
        """A unit of 8-bit codes: 16 steps of two products in int16."""
        with T.serial(0, UNIT // 2 // WORD_STEPS) as part:
            first = T.bind((unit * (UNIT // 2 // WORD_STEPS) + part) * WORD_STEPS)
            self._fetch_codes(first * VECTORS * 2 * LANES, WORD_STEPS * VECTORS * 2 * LANES)
            for pair in (first + step for step in range(WORD_STEPS)):
                words = [
                    keep(T.cast(self.b[lanes_at((pair * VECTORS + v) * 2 * LANES, 2 * LANES)], f"int16x{2 * LANES}"))
                    for v in range(VECTORS)
                ]
                for i, row in enumerate(exact):
                    both = T.reinterpret(f"int16x{2 * LANES}", T.broadcast(self.a[i * self.lda + pair], LANES))
                    both = T.bind(both)
                    for register, word in zip(row, words, strict=True):
                        T.buffer_store(register, _fence(register[_WHOLE] + _add_pairs(word, both)), [_WHOLE])

    def _unit_of_bytes(self, unit: Expr, exact: list[list[Any]], scales: list[Expr]) -> None:
        """A unit of codes of up to 6 bits: 8 steps of four products, in int16 as long as they fit."""
        words, steps, codes = T.ramp(0, 1, 2 * LANES), safe_quads(self.form.bits), self._codes_of(unit)
        for begin in range(0, QUADS, steps):
            short = [[T.alloc_buffer((2 * LANES,), "int16") for _ in row] for row in exact]
            for q in range(begin, begin + steps):
                of_quad = codes(q)
                for i, row in enumerate(short):
                    four = T.bind(T.broadcast(self.a[i * self.lda + unit * QUADS + q], LANES))
                    for register, code in zip(row, of_quad, strict=True):
                        product = self._products(four, code)
                        value = product if q == begin else register[words] + product
                        T.buffer_store(register, _fence(value), [words])
            for registers, parts in zip(exact, short, strict=True):
                for register, part, scale in zip(registers, parts, scales, strict=True):
                    T.buffer_store(register, register[_WHOLE] + _add_pairs(part[words], scale), [_WHOLE])

    def _products(self, of_a: Expr, of_b: Expr) -> Expr:
        """Products of bytes, neighbours added in int16: the first operand is unsigned."""
        size = 4 * LANES
        if sums_in_integers(self.form):
            pair = T.reinterpret(f"uint8x{size}", of_a), of_b
        else:
            pair = of_b, T.reinterpret(f"int8x{size}", of_a)
        return T.call_llvm_pure_intrin(f"int16x{2 * LANES}", "llvm.x86.avx2.pmadd.ub.sw", *pair)

    def _codes_of(self, unit: Expr) -> Callable[[int], list[Expr]]:
        """The codes of a quad of the unit, one vector of bytes for each vector of columns."""
        if self.unpacked:
            place = T.bind(unit * (QUADS * VECTORS * 4 * LANES))
            return lambda quad: [
                T.bind(self.b[lanes_at(place + (quad * VECTORS + v) * 4 * LANES, 4 * LANES)]) for v in range(VECTORS)
            ]
        base = T.bind(unit * (VECTORS * self.form.bits * 4 * LANES))
        self._fetch_codes(base, VECTORS * self.form.bits * 4 * LANES)
        return lambda quad: [
            _unpacked(self.form, self.b, base + v * self.form.bits * 4 * LANES, quad) for v in range(VECTORS)
        ]


_ONES = T.broadcast(tirx.const(1, "int16"), 2 * LANES)


def _fence(value: Expr) -> Expr:
    """A vector of integers that LLVM takes as it is: of a chain of sums it would add up the products first, in more
    registers than there are. The intrinsic is for fp32, and no instruction."""
    number = f"float32x{LANES}"
    fenced = T.call_llvm_pure_intrin(number, f"llvm.arithmetic.fence.v{LANES}f32", T.reinterpret(number, value))
    return T.reinterpret(f"{dtype_of(value)}x{lanes_of(value)}", fenced)


def _add_pairs(x: Expr, y: Expr) -> Expr:
    """Products of int16, neighbours added in int32."""
    return T.call_llvm_pure_intrin(f"int32x{LANES}", "llvm.x86.avx2.pmadd.wd", x, y)


def _unpacked(form: WeightFormat, b: Any, base: Expr, quad: int) -> Expr:
    """Codes of four input features of eight columns, as bytes, from their bit planes; signed in a symmetric format."""
    size, first, shift = 4 * LANES, 0, 0
    code: Expr = None
    for bits in planes(form.bits):
        vector, place = divmod(quad * bits, 8)
        stored = T.bind(b[lanes_at(base + (first + vector) * size, size)])
        moved = place - shift
        if moved > 0:
            stored = T.shift_right(stored, T.broadcast(tirx.const(moved, "uint8"), size))
        elif moved < 0:
            stored = T.shift_left(stored, T.broadcast(tirx.const(-moved, "uint8"), size))
        mask = T.broadcast(tirx.const(((1 << bits) - 1) << shift, "uint8"), size)
        piece = T.bitwise_and(stored, mask)
        code = piece if code is None else T.bitwise_or(code, piece)
        first, shift = first + bits, shift + bits
    if not sums_in_integers(form):
        return keep(code)
    middle = T.broadcast(tirx.const(1 << (form.bits - 1), "int8"), size)
    return keep(T.reinterpret(f"int8x{size}", keep(code)) - middle)
