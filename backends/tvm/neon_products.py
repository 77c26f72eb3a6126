"""Products of bytes on ARM, by what a level's processors have: how registers of codes are multiplied and added up.

A cell is ``rows`` rows by four columns of a tile. While products are added it has ``parts`` registers of int32x4, which
``whole`` turns into ``sums`` registers; ``of_row`` gives a row of those.

The codes of a tile's rows lie in turn: ``features`` of the first row, as many of the second, and so on, then the next
features. A register of 16 of them serves several rows, or several features of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, i32
from planish.targets import Target

LANES = 4
"""Columns of a cell."""


_LONG_PRODUCTS = {"aarch64": "llvm.aarch64.neon.smull.v8i16", "arm": "llvm.arm.neon.vmulls.v8i16"}


def long_products(arch: str, a: Expr, b: Expr) -> Expr:
    """Products of eight bytes, in int16."""
    if arch in _LONG_PRODUCTS:
        return T.call_llvm_pure_intrin("int16x8", _LONG_PRODUCTS[arch], a, b)
    return T.cast(a, "int16x8") * T.cast(b, "int16x8")


class Products(ABC):
    """An instruction set's way to multiply."""

    name: str
    rows = 1
    parts = 1
    sums = 1
    columns = 4
    """Of a register of weights' codes."""
    tiles: dict[int, int]
    """Rows of a tile to its vectors of columns, at most: with more, sums and products do not fit the registers."""

    @property
    def features(self) -> int:
        """Of a column in a register of weights' codes, and of a row that lie together."""
        return 16 // self.columns

    def of_tile(self, rows: int) -> Products:
        """How a tile of some rows multiplies the same codes."""
        return self

    def operand(self, load: Callable[[int], Expr], piece: int, cell: int, rows: int) -> Expr:
        """What a cell multiplies by: ``features`` of its rows, the ``piece``-th of a unit.

        Args:
            load: gives a register of the unit's codes of the tile's rows, int32x4.
            piece: number of the features in the unit.
            cell: of the tile.
            rows: of the tile.
        """
        register, lane = divmod(piece * rows + cell, 4)
        return T.reinterpret("int8x16", T.Shuffle([load(register)], [i32(lane)] * LANES))

    @abstractmethod
    def add(self, parts: list[Any], w: Expr, x: Expr, register: int, pending: dict[int, Any]) -> None:
        """Add the products of a register of a unit's codes with a cell's operand.

        Args:
            parts: of the cell.
            w: codes, int8x16.
            x: the cell's operand.
            register: number of the codes' register in the unit.
            pending: what an earlier register of the cell has left to add.
        """

    def begun(self, numbers: list[Expr]) -> list[Expr]:
        """A cell's parts whose sums are one number for each of its rows, int32."""
        return [T.broadcast(numbers[0], LANES)]

    def whole(self, parts: list[Expr]) -> list[Expr]:
        """Sums of a cell."""
        return parts

    def steps(self, of_columns: Expr) -> list[Expr]:
        """Numbers of four columns as the registers of sums have them."""
        return [of_columns]

    def of_row(self, sums: list[Expr], row: int) -> Expr:
        """Four columns of one of the cell's rows, of whichever type sums have."""
        return sums[row]


class DotProducts(Products):
    """``sdot``: four products added to each of four sums."""

    name, tiles = "dot", {8: 1, 4: 2, 2: 4, 1: 4}

    def add(self, parts: list[Any], w: Expr, x: Expr, register: int, pending: dict[int, Any]) -> None:
        """One instruction."""
        _add(parts[0], T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", _of(parts[0]), w, x))


class MatrixProducts(Products):
    """``smmla``: two rows by two columns, eight products added to each sum."""

    name, rows, parts, sums, columns, tiles = "matrix", 2, 2, 2, 2, {8: 1, 4: 2, 2: 4, 1: 4}

    def of_tile(self, rows: int) -> Products:
        """A single row leaves half of each product unused: it takes ``sdot``."""
        return self if rows > 1 else _HALF_DOTS

    def operand(self, load: Callable[[int], Expr], piece: int, cell: int, rows: int) -> Expr:
        """A register."""
        return T.reinterpret("int8x16", load(piece * (rows // 2) + cell))

    def add(self, parts: list[Any], w: Expr, x: Expr, register: int, pending: dict[int, Any]) -> None:
        """One instruction: registers are the first and the second two columns in turn."""
        into = parts[register % 2]
        _add(into, T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.smmla.v4i32.v16i8", _of(into), x, w))

    def begun(self, numbers: list[Expr]) -> list[Expr]:
        """Of the first row twice, then of the second."""
        return [_vector([numbers[row] for row in (0, 0, 1, 1)])] * 2

    def steps(self, of_columns: Expr) -> list[Expr]:
        """Of two columns twice, for each two columns."""
        return [T.bind(T.Shuffle([of_columns], [i32(c) for c in (i, i + 1) * 2])) for i in (0, 2)]

    def of_row(self, sums: list[Expr], row: int) -> Expr:
        """The halves of both registers."""
        return T.Shuffle(sums, [i32(c) for c in (2 * row, 2 * row + 1, 2 * row + 4, 2 * row + 5)])


class HalfDotProducts(DotProducts):
    """``sdot`` for one row of what ``smmla`` takes: two sums for each of two columns."""

    name, parts, columns = "half_dots", 2, 2

    def operand(self, load: Callable[[int], Expr], piece: int, cell: int, rows: int) -> Expr:
        """Eight codes twice."""
        register, half = divmod(piece, 2)
        return T.reinterpret("int8x16", T.Shuffle([load(register)], [i32(2 * half), i32(2 * half + 1)] * 2))

    def add(self, parts: list[Any], w: Expr, x: Expr, register: int, pending: dict[int, Any]) -> None:
        """One instruction: registers are the first and the second two columns in turn."""
        super().add(parts[register % 2 :], w, x, register, pending)

    def begun(self, numbers: list[Expr]) -> list[Expr]:
        """In one of two neighbours."""
        return _beside_zeros(numbers[0])

    def whole(self, parts: list[Expr]) -> list[Expr]:
        """Neighbours added."""
        return _neighbours_added(parts)


_HALF_DOTS = HalfDotProducts()


class LongProducts(Products):
    """``smull`` and ``smlal``: products in int16, two of which cannot overflow; then pairs are added to int32."""

    name, parts = "long", 2

    def __init__(self, arch: str, tiles: dict[int, int], widen: str) -> None:
        self.tiles, self._arch, self._widen = tiles, arch, widen

    def operand(self, load: Callable[[int], Expr], piece: int, cell: int, rows: int) -> Expr:
        """Four codes twice."""
        register, lane = divmod(piece * rows + cell, 4)
        return T.reinterpret("int8x8", T.Shuffle([load(register)], [i32(lane)] * 2))

    def add(self, parts: list[Any], w: Expr, x: Expr, register: int, pending: dict[int, Any]) -> None:
        """Two instructions; after every other register two more. Codes of activations are not below -127."""
        for half, into in enumerate(parts):
            codes = T.Shuffle([w], [i32(8 * half + i) for i in range(8)])
            products = long_products(self._arch, codes, x)
            if register % 2 == 0:
                pending[half] = products
                continue
            pairs = T.call_llvm_pure_intrin("int32x4", self._widen, T.bind(pending.pop(half) + products))
            _add(into, _of(into) + pairs)

    def begun(self, numbers: list[Expr]) -> list[Expr]:
        """In one of two neighbours."""
        return _beside_zeros(numbers[0])

    def whole(self, parts: list[Expr]) -> list[Expr]:
        """Neighbours added: of the first two columns, then of the others."""
        return _neighbours_added(parts)


class PortableProducts(Products):
    """Plain multiplications, for the twin on the host: the same sums, as they are exact."""

    name, tiles = "portable", DotProducts.tiles

    def add(self, parts: list[Any], w: Expr, x: Expr, register: int, pending: dict[int, Any]) -> None:
        """Sixteen products, added by fours."""
        products = T.bind(T.cast(T.bind(w), "int32x16") * T.cast(T.bind(x), "int32x16"))
        total = _of(parts[0])
        for k in range(4):
            total = total + T.Shuffle([products], [i32(4 * c + k) for c in range(LANES)])
        _add(parts[0], total)


_PRODUCTS: dict[str, Products] = {
    "armv8-dotprod": DotProducts(),
    "armv8-i8mm": MatrixProducts(),
    "armv8": LongProducts("aarch64", {4: 1, 2: 2, 1: 4}, "llvm.aarch64.neon.saddlp.v4i32.v8i16"),
    "armv7": LongProducts("arm", {2: 1, 1: 2}, "llvm.arm.neon.vpaddls.v4i32.v8i16"),
}


def products_of(target: Target) -> Products:
    """How a target for ARM, or its twin on the host, multiplies codes."""
    return _PRODUCTS[target.isa] if target.is_cross else PortableProducts()


_WHOLE = T.ramp(0, 1, LANES)


def _vector(numbers: list[Expr]) -> Expr:
    return T.Shuffle(numbers, [i32(i) for i in range(len(numbers))])


def _beside_zeros(number: Expr) -> list[Expr]:
    """Two registers of which neighbours add up to a number."""
    return [_vector([number, i32(0)] * 2)] * 2


def _neighbours_added(parts: list[Expr]) -> list[Expr]:
    """Of both registers, in one."""
    even, odd = (T.Shuffle(parts, [i32(2 * c + i) for c in range(LANES)]) for i in range(2))
    return [even + odd]


def _of(register: Any) -> Expr:
    return register[_WHOLE]


def _add(register: Any, value: Expr) -> None:
    T.buffer_store(register, value, [_WHOLE])
