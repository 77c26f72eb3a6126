"""Rows of fp32 values as codes, for ARM's NEON: sixteen at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, f32, for_vectors, horizontal, i32, keep, lanes_at, splat
from planish.backends.tvm.neon_products import LANES
from planish.backends.tvm.row_codes import Quantise
from planish.formats import LARGEST_CODE

TOGETHER = 4
"""Vectors."""

_UNIT = float(3 << 22)
"""Added to a small number, rounds it to the nearest whole number, which is in the low bits of the sum."""


class NeonQuantise(Quantise):
    """Maxima that keep NaN and infinity, and rounding by an addition: no comparisons, no conversions."""

    def _largest(self, x: Any, start: Expr, count: int) -> tuple[Expr, Expr]:
        tops = [T.alloc_buffer((LANES,), "float32") for _ in range(TOGETHER)]
        whole = lanes_at(i32(0), LANES)
        for top in tops:
            T.buffer_store(top, splat(0.0, LANES), [whole])
        for at, vectors, lanes in _pieces(count):
            for v, top in zip(range(vectors), tops, strict=False):
                place, value = lanes_at(i32(0), lanes), x[lanes_at(start + at + v * LANES, lanes)]
                T.buffer_store(top, _maximum(top[place], _intrinsic("fabs", value)), [place])
        first, *others = (top[whole] for top in tops)
        largest = keep(horizontal(T.bind(reduce(_maximum, others, first)), LANES, _maximum))
        return largest, keep(_intrinsic("fma", largest, f32(0.0), f32(0.0)))

    def _codes(self, x: Any, start: Expr, place: Callable[[Expr], Expr], inverse: Expr, count: int) -> None:
        for at, vectors, lanes in _pieces(count):
            values = [x[lanes_at(start + at + v * LANES, lanes)] for v in range(vectors)]
            sums = [T.bind(_rounded(self._bounded(value * splat(inverse, lanes)))) for value in values]
            codes = _narrowed(sums)
            words = T.reinterpret(f"int32x{vectors}", codes) if vectors > 1 else None
            for v in range(vectors):
                own = codes if words is None else T.reinterpret(f"int8x{LANES}", T.Shuffle([words], [i32(v)]))
                T.buffer_store(self.code.scratch[0], own, [lanes_at(place(at + v * LANES), lanes)])

    def _bounded(self, value: Expr) -> Expr:
        """Within the codes; a row's own scale has it so that no value is beyond."""
        if self.tiles.scale is None:
            return value
        lanes = splat(float(LARGEST_CODE), value.ty.dtype.lanes)
        return _intrinsic("maxnum", -lanes, _intrinsic("minnum", lanes, value))


def _pieces(depth: int) -> Iterator[tuple[Expr, int, int]]:
    """Emit loops over a row: by several vectors, by one, by elements; yields where, vectors, their lanes."""
    step = TOGETHER * LANES
    whole = depth // step * step
    if whole:
        with T.serial(0, depth // step) as block:
            yield block * step, TOGETHER, LANES
    for at, lanes in for_vectors(depth - whole, LANES) if depth > whole else ():
        yield whole + at, 1, lanes


def _narrowed(sums: list[Expr]) -> Expr:
    """The lowest bytes of registers: the even halves, twice. Of a cast LLVM makes a slow look-up in four registers."""
    if len(sums) == 1:
        lanes = sums[0].ty.dtype.lanes
        return keep(T.cast(sums[0], "int8" if lanes == 1 else f"int8x{lanes}"))
    for dtype, lanes in (("int16", 2 * LANES), ("int8", 4 * LANES)):
        parts = [T.bind(T.reinterpret(f"{dtype}x{lanes}", each)) for each in sums]
        pairs = zip(parts[0::2], parts[1::2], strict=True)
        sums = [T.bind(T.Shuffle(list(pair), [i32(2 * i) for i in range(lanes)])) for pair in pairs]
    return sums[0]


def _rounded(value: Expr) -> Expr:
    """The nearest whole number, in the low bits of an int32; the product is rounded before, as in the reference."""
    lanes = value.ty.dtype.lanes
    total = _intrinsic("arithmetic.fence", value) + splat(_UNIT, lanes)
    return T.reinterpret("int32" if lanes == 1 else f"int32x{lanes}", total)


def _maximum(a: Expr, b: Expr) -> Expr:
    """The larger one, or NaN if one is."""
    return _intrinsic("maximum", a, b)


def _intrinsic(name: str, *values: Expr) -> Expr:
    """LLVM's function of fp32 vectors or numbers."""
    lanes = values[0].ty.dtype.lanes
    kind, suffix = ("float32", "f32") if lanes == 1 else (f"float32x{lanes}", f"v{lanes}f32")
    return T.call_llvm_pure_intrin(kind, f"llvm.{name}.{suffix}", *values)
