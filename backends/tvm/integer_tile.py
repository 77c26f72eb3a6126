"""The register-blocked tile of integer codes, for AVX2 without dot-product instructions, and the layout it reads.

Sums of products are exact integers. Codes of up to 6 bits are multiplied as bytes (``vpmaddubsw``: unsigned weights by
signed activations, pairs added in int16) and summed in int16 for as many steps as cannot overflow; codes of 8 bits as
int16 (``vpmaddwd``), since pairs of full bytes would saturate. Every group's sum becomes fp32 once.

Where many rows share a panel of weights, its codes are unpacked to bytes once, before; with a few rows the tile unpacks
them on the way, and reads less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, f32, function, i32, keep, lanes_at
from planish.backends.tvm.microkernel import prefetch
from planish.formats import LARGEST_CODE, WeightFormat

LANES = 8
"""Columns of a vector: int32 sums in 32 bytes, also on processors that have wider vectors."""

UNIT = 32
"""Input features that are unpacked together; groups are whole units, the last is filled up with zeros."""

QUADS = UNIT // 4
"""Steps of a unit: ``vpmaddubsw`` and ``vpmaddwd`` together add up four products."""


VECTORS = 2
"""Vectors of columns of a tile."""

WIDTH = VECTORS * LANES
"""Columns of a tile, and of a panel of the packed weight."""


def tile_rows(form: WeightFormat) -> int:
    """Rows of the largest tile: as many as keep their sums in registers, measured on a Zen 3."""
    return 6 if form.bits == 8 else 4


def activation_dtype(form: WeightFormat) -> str:
    """How the codes of activations stand in memory."""
    return "int16" if form.bits == 8 else "int8"


def sum_factor(form: WeightFormat) -> int:
    """What sums of activations' codes are multiplied by for the tile: in a symmetric format minus the code of 0."""
    return (STORED_LESS if form.bits == 8 else 0) - (1 << (form.bits - 1)) if form.symmetric else 1


STORED_LESS = 128
"""What 8-bit codes are stored less, to be signed."""


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the bit planes that codes are split into, lowest bits first: 6 bits are 4 and 2."""
    return tuple(width for width in (4, 2, 1) if bits & width)


def packed_codes(codes: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Codes uint8 [N, K] as panels of columns, each [unit][vector][column], filled up with zeros.

    8 bits: int8 [pair][vector][column][2], less ``STORED_LESS``. Fewer bits: for each plane of ``b`` bits ``b`` vectors
    of 32 bytes, [column][4] each; vector v holds quads ``8/b v`` and following, the first in the lowest bits.
    """
    n, depth = codes.shape
    middle = 1 << (form.bits - 1) if form.bits == 8 else 0
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
    """Scales or minimums [N, groups] as panels [group][column], filled up with zeros."""
    padded = torch.nn.functional.pad(numbers, (0, 0, 0, -numbers.shape[0] % WIDTH))
    return padded.unflatten(0, (-1, WIDTH)).transpose(1, 2).reshape(-1)


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
    """The codes of a panel, of up to 6 bits, as bytes [unit][quad][vector][column][4].

    Parameters: packed codes, the bytes, then the units.
    """
    with function(symbol) as f:
        (packed, unpacked), (units,) = f.parameters(["uint8", "uint8"], 1, align=4)
        with T.serial(0, units) as unit:
            for quad in range(QUADS):
                for v in range(VECTORS):
                    code = _unpacked(form, packed, (unit * VECTORS + v) * form.bits * 4 * LANES, quad)
                    place = lanes_at(((unit * QUADS + quad) * VECTORS + v) * 4 * LANES, 4 * LANES)
                    T.buffer_store(unpacked, code, [place])
    assert f.func is not None
    return f.func


def build_integer_tile(
    symbol: str, form: WeightFormat, rows: int, columns: int, *, biased: bool, unpacked: bool
) -> tirx.PrimFunc:
    """C[rows, columns] = scale_row (sum over groups of scale (sum of code products) + minimum (sum of codes)) + bias.

    Parameters: codes of A (as int32), of B (with ``unpacked`` as ``build_unpacking`` leaves them), scales of B, with an
    asymmetric format the minimums of B; for each row and group the sum of A's codes times ``sum_factor``; scales of
    the rows, C, with ``biased`` the bias. Then the elements between rows of A (int32), of the sums and of C, and the
    units of B. ``columns`` of a panel are stored.
    """
    number = "float16" if form.group else "float32"
    pointers = ["int32", "int8" if form.bits == 8 else "uint8", number, *([] if form.symmetric else [number])]
    pointers += ["int32", "float32", "float32", *(["float32"] if biased else [])]
    with function(symbol) as f:
        given, (lda, lds, ldc, units) = f.parameters(pointers, 4, align=2)
        a, b, scales, *given = given
        minimums = None if form.symmetric else given.pop(0)
        sums, row_scales, c, *bias = given
        for i in range(rows):  # or the stores of the sums between groups wait behind those of C
            prefetch(T.address_of(c[i * ldc]), level=1, write=True)
        total = _registers(rows, "float32")
        _fill(total, lambda i: T.broadcast(f32(0.0), LANES))
        per_group = units if form.group is None else form.group // UNIT
        groups = i32(1) if form.group is None else T.floordiv(units + (per_group - 1), per_group)
        with T.serial(0, groups) as g:
            exact = _registers(rows, "int32")
            factor = 1 if form.symmetric else STORED_LESS if form.bits == 8 else 0
            _fill(exact, lambda i: T.broadcast(sums[i * lds + g] * factor if factor else i32(0), LANES))
            first = T.bind(g * per_group)
            with T.serial(first, T.bind(T.min(first + per_group, units))) as unit:
                if form.bits == 8:
                    _unit_of_words(a, lda, b, unit, exact)
                else:
                    _unit_of_bytes(form, a, lda, _codes_of_unit(form, b, unit, unpacked=unpacked), unit, exact)
            places = [lanes_at((g * VECTORS + v) * LANES, LANES) for v in range(VECTORS)]
            wide = [T.bind(T.cast(scales[at], f"float32x{LANES}")) for at in places]
            least = [] if minimums is None else [T.bind(T.cast(minimums[at], f"float32x{LANES}")) for at in places]
            for i in range(rows):
                for v in range(VECTORS):
                    value = total[i][v][_WHOLE] + T.cast(exact[i][v][_WHOLE], f"float32x{LANES}") * wide[v]
                    if least:
                        value = value + T.broadcast(T.cast(sums[i * lds + g], "float32"), LANES) * least[v]
                    T.buffer_store(total[i][v], value, [_WHOLE])
        for i in range(rows):
            scale = T.bind(T.broadcast(row_scales[i], LANES))
            for v in range(-(-columns // LANES)):
                T.buffer_store(total[i][v], total[i][v][_WHOLE] * scale, [_WHOLE])
                count = min(LANES, columns - v * LANES)
                for at in [lanes_at(0, LANES)] if count == LANES else range(count):
                    value = total[i][v][at]
                    value = value + bias[0][v * LANES + at] if bias else value
                    T.buffer_store(c, value, [i * ldc + v * LANES + at])
    assert f.func is not None
    return f.func


_WHOLE = T.ramp(0, 1, LANES)


def _registers(rows: int, dtype: str) -> list[list[Any]]:
    return [[T.alloc_buffer((LANES,), dtype) for _ in range(VECTORS)] for _ in range(rows)]


def _fill(registers: list[list[Any]], value: Callable[[int], Expr]) -> None:
    for i, row in enumerate(registers):
        for register in row:
            T.buffer_store(register, value(i), [_WHOLE])


def _unit_of_words(a: Any, lda: Expr, b: Any, unit: Expr, exact: list[list[Any]]) -> None:
    """A unit of 8-bit codes: 16 steps of two products in int16.

    The steps are a loop: of a sequence LLVM would add up the products first, in more registers than there are.
    """
    with T.serial(0, UNIT // 2) as s:
        pair = T.bind(unit * (UNIT // 2) + s)
        words = [
            keep(T.cast(b[lanes_at((pair * VECTORS + v) * 2 * LANES, 2 * LANES)], f"int16x{2 * LANES}"))
            for v in range(VECTORS)
        ]
        for i, row in enumerate(exact):
            both = T.bind(T.reinterpret(f"int16x{2 * LANES}", T.broadcast(a[i * lda + pair], LANES)))
            for register, word in zip(row, words, strict=True):
                T.buffer_store(register, register[_WHOLE] + _add_pairs(word, both), [_WHOLE])


def _codes_of_unit(form: WeightFormat, b: Any, unit: Expr, *, unpacked: bool) -> Callable[[int], list[Expr]]:
    """The codes of a quad of the unit, one vector of bytes for each vector of columns."""
    if unpacked:
        places = [unit * (QUADS * VECTORS) + v for v in range(VECTORS)]
        return lambda quad: [T.bind(b[lanes_at((place + quad * VECTORS) * 4 * LANES, 4 * LANES)]) for place in places]
    base = T.bind(unit * (VECTORS * form.bits * 4 * LANES))
    return lambda quad: [_unpacked(form, b, base + v * form.bits * 4 * LANES, quad) for v in range(VECTORS)]


def _unit_of_bytes(
    form: WeightFormat, a: Any, lda: Expr, codes: Callable[[int], list[Expr]], unit: Expr, exact: list[list[Any]]
) -> None:
    """A unit of codes of up to 6 bits: 8 steps of four products, in int16 as long as they fit."""
    ones, words = T.broadcast(tirx.const(1, "int16"), 2 * LANES), T.ramp(0, 1, 2 * LANES)
    steps = safe_quads(form.bits)
    for begin in range(0, QUADS, steps):
        short = [[T.alloc_buffer((2 * LANES,), "int16") for _ in row] for row in exact]
        for q in range(begin, begin + steps):
            of_quad = codes(q)
            for i, row in enumerate(short):
                four = T.bind(T.reinterpret(f"int8x{4 * LANES}", T.broadcast(a[i * lda + unit * QUADS + q], LANES)))
                for register, code in zip(row, of_quad, strict=True):
                    product = T.call_llvm_pure_intrin(f"int16x{2 * LANES}", "llvm.x86.avx2.pmadd.ub.sw", code, four)
                    T.buffer_store(register, _fence(product if q == begin else register[words] + product), [words])
        for registers, parts in zip(exact, short, strict=True):
            for register, part in zip(registers, parts, strict=True):
                T.buffer_store(register, register[_WHOLE] + _add_pairs(part[words], ones), [_WHOLE])


def _fence(value: Expr) -> Expr:
    """A vector of int16 that LLVM takes as it is: of a chain of sums it would add up the products first, in more
    registers than there are. The intrinsic is for fp32, and no instruction."""
    number = f"float32x{LANES}"
    fenced = T.call_llvm_pure_intrin(number, f"llvm.arithmetic.fence.v{LANES}f32", T.reinterpret(number, value))
    return T.reinterpret(f"int16x{2 * LANES}", fenced)


def _add_pairs(x: Expr, y: Expr) -> Expr:
    """Products of int16, neighbours added in int32."""
    return T.call_llvm_pure_intrin(f"int32x{LANES}", "llvm.x86.avx2.pmadd.wd", x, y)


def _unpacked(form: WeightFormat, b: Any, base: Expr, quad: int) -> Expr:
    """Codes of four input features of eight columns, as bytes, from their bit planes."""
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
    return keep(code)
