"""Passes over a stretch of a row in memory: whole vectors, several side by side, and one masked vector at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import ir, tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm import vmath
from planish.backends.tvm.builder import Expr, as_int, f32, horizontal, i32, keep, lanes_at, splat
from planish.backends.tvm.microkernel import CACHE_LINE, prefetch

WAYS = 4
"""Vectors side by side, each with accumulators of its own: as many as hide the latency of an addition."""

BLOCK = 4096
"""Elements that one set of fp32 accumulators adds up; the sums of such blocks are added to each other."""

Value = Callable[[Expr], Expr]
"""A result from what a stretch holds at its place."""


@dataclass(frozen=True)
class Stretch:
    """Consecutive elements of a row.

    Attributes:
        lanes: of the vectors.
        source: flat buffer that holds them.
        base: place of the first in the buffer.
        start: place of the first in its row.
        size: how many there are.
        ways: vectors side by side.
    """

    lanes: int
    source: Any
    base: Expr
    start: Expr
    size: Expr
    ways: int = WAYS

    def over(self, source: Any) -> Stretch:
        """The same stretch of another buffer."""
        return replace(self, source=source)

    def load(self, at: Expr, mask: Expr | None, fill: float = 0.0) -> Expr:
        """The vector ``at`` elements from the first; lanes off the mask hold ``fill``."""
        where = lanes_at(self.base + at, self.lanes)
        if mask is None:
            return T.bind(self.source[where])
        value = T.masked_load(f"float32x{self.lanes}", self.source, where, mask)
        return keep(tirx.Select(mask, value, splat(fill, self.lanes))) if fill else keep(value)

    def store(self, into: Any, at: Expr, mask: Expr | None, value: Expr) -> None:
        """Store a vector at the same place of another buffer."""
        where = lanes_at(self.base + at, self.lanes)
        if mask is None:
            T.buffer_store(into, value, [where])
        else:
            T.evaluate(T.masked_store(into, value, where, mask))

    def each(self, first: Expr, size: Expr, body: Callable[[int, Expr, Expr | None], None]) -> None:
        """Emit ``body(way, at, mask)`` for the vectors of ``size`` elements from ``first`` on."""
        lanes, step = self.lanes, self.lanes * self.ways
        known = as_int(size)
        size = size if known is None else known
        blocks = size // step if isinstance(size, int) else T.bind(T.floordiv(size, step))
        if known is None or known >= step:
            with T.serial(0, blocks) as block:
                for way in range(self.ways):
                    body(way, T.bind(first + block * step + way * lanes), None)
        whole = size // lanes if isinstance(size, int) else T.bind(T.floordiv(size, lanes))
        if known is None or known % step >= lanes:
            with T.serial(blocks * self.ways, whole) as vector:
                body(0, T.bind(first + vector * lanes), None)
        if known is None:
            with T.If(size > whole * lanes), T.Then():
                body(0, T.bind(first + whole * lanes), self.mask(size - whole * lanes))
        elif known % lanes:
            body(0, first + whole * lanes, self.mask(size - whole * lanes))

    def mask(self, count: Expr) -> Expr:
        """The first ``count`` lanes."""
        return T.ramp(0, 1, self.lanes) < splat(count, self.lanes, "int32")

    def registers(self, start: float) -> list[Any]:
        """One accumulator for each way."""
        found = [T.alloc_buffer((self.lanes,), "float32") for _ in range(self.ways)]
        for register in found:
            T.buffer_store(register, splat(start, self.lanes), [self.whole])
        return found

    @property
    def whole(self) -> Expr:
        """Index of all lanes of a register."""
        return lanes_at(i32(0), self.lanes)

    def blocks(self, body: Callable[[Expr, Expr], None]) -> None:
        """Emit ``body(first, size)`` for each block."""
        known = as_int(self.size)
        if known is not None and known <= BLOCK:
            body(i32(0), self.size)
            return
        with T.serial(0, T.floordiv(self.size + (BLOCK - 1), BLOCK)) as b:
            first = T.bind(b * BLOCK)
            body(first, T.bind(T.min(self.size - first, BLOCK)))


@dataclass(frozen=True)
class Soon:
    """What another pass uses next: the elements of ``buffer`` that lie ``ahead`` of a stretch's own."""

    buffer: Any
    ahead: Expr
    write: bool


def _fold(stretch: Stretch, registers: list[Any], combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """All lanes of all registers combined, in a fixed order."""
    whole = stretch.whole
    while len(registers) > 1:
        half = len(registers) // 2
        for into, other in zip(registers[:half], registers[half:], strict=True):
            T.buffer_store(into, combine(into[whole], other[whole]), [whole])
        registers = registers[:half]
    return keep(horizontal(T.bind(registers[0][whole]), stretch.lanes, combine))


def largest(stretch: Stretch) -> Expr:
    """The largest element; NaN is passed over ("a > b ? a : b" takes b where a is NaN): the sum will show it."""
    registers, whole = stretch.registers(float("-inf")), stretch.whole

    def body(way: int, at: Expr, mask: Expr | None) -> None:
        value = stretch.load(at, mask, float("-inf"))
        T.buffer_store(registers[way], T.max(value, registers[way][whole]), [whole])

    stretch.each(i32(0), stretch.size, body)
    return _fold(stretch, registers, T.max)


def exponentials(stretch: Stretch, top: Expr, into: Any = None, soon: Sequence[Soon] = ()) -> Expr:
    """Sum of exp(x - top); the exponentials are stored ``into`` a buffer if there is one.

    What ``soon`` names is fetched into the cache meanwhile: the passes that use it compute too little to hide that. In
    a stretch of nothing but -inf, which may be part of a longer row, all are 0.
    """
    if stretch.lanes != vmath.SCALEF_LANES:  # the constants leave few of 16 registers
        stretch = replace(stretch, ways=WAYS // 2)
    whole, finite = stretch.whole, splat(_reference(top), stretch.lanes)
    total, part = stretch.registers(0.0), stretch.registers(0.0)

    def block(first: Expr, size: Expr) -> None:
        for register in part:
            T.buffer_store(register, splat(0.0, stretch.lanes), [whole])

        def body(way: int, at: Expr, mask: Expr | None) -> None:
            value = vmath.exp_difference(stretch.load(at, mask, float("-inf")) - finite)
            if into is not None:
                stretch.store(into, at, mask, value)
            if way % (CACHE_LINE // (4 * stretch.lanes)) == 0:
                for place in soon:
                    address = T.address_of(place.buffer[stretch.base + place.ahead + at])
                    prefetch(address, level=1, write=place.write)
            T.buffer_store(part[way], part[way][whole] + value, [whole])

        stretch.each(first, size, body)
        for sum_, register in zip(total, part, strict=True):
            T.buffer_store(sum_, sum_[whole] + register[whole], [whole])

    stretch.blocks(block)
    return _fold(stretch, total, lambda a, b: a + b)


def _reference(top: Expr) -> Expr:
    """What is subtracted from the elements of a stretch: its maximum, but 0 instead of -inf."""
    return keep(tirx.Select(tirx.EQ(top, f32(float("-inf"))), f32(0.0), top))


def times(scale: Expr) -> Value:
    """value * scale."""
    return lambda value: value * splat(scale, _lanes(value))


def minus(top: Expr, shift: Expr) -> Value:
    """(value - top) - shift: in this order, as ``top`` may be so large that ``shift`` is lost in it."""
    return lambda value: keep(value - splat(top, _lanes(value))) - splat(shift, _lanes(value))


def exponential_times(top: Expr, scale: Expr) -> Value:
    """exp(value - top) * scale."""
    return lambda value: vmath.exp_difference(value - splat(top, _lanes(value))) * splat(scale, _lanes(value))


def _lanes(value: Expr) -> int:
    return value.ty.dtype.lanes


def write(stretch: Stretch, out: Any, value: Value, *, stream: bool) -> None:
    """Store ``value`` of each element of the stretch at its place in ``out``.

    With ``stream`` the stores go past the caches, from the first place that is aligned to a vector on.
    """
    lanes = stretch.lanes

    def body(way: int, at: Expr, mask: Expr | None) -> None:
        stretch.store(out, at, mask, value(stretch.load(at, mask)))

    if not stream:
        stretch.each(i32(0), stretch.size, body)
        return

    def past_caches(way: int, at: Expr, mask: Expr | None) -> None:
        if mask is not None:
            return body(way, at, mask)
        with T.attr(i32(0), "pragma_import_llvm", ir.StringImm(_STREAM.format(lanes=lanes, align=4 * lanes))):
            address = T.address_of(out[stretch.base + at])
            T.evaluate(T.call_extern("int32", f"planish_stream{lanes}", address, keep(value(stretch.load(at, None)))))
        return None

    head = T.bind(T.min(T.bitwise_and(i32(0) - stretch.base, i32(lanes - 1)), stretch.size))
    with T.If(head > 0), T.Then():
        body(0, i32(0), stretch.mask(head))
    stretch.each(head, T.bind(stretch.size - head), past_caches)
    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.sse.sfence"))


_STREAM = """
define i32 @planish_stream{lanes}(ptr %place, <{lanes} x float> %value) {{
  store <{lanes} x float> %value, ptr %place, align {align}, !nontemporal !0
  ret i32 0
}}
!0 = !{{i32 1}}
"""
"""A store that TIR has no words for; TVM inlines the function."""
