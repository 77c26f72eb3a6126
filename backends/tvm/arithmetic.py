"""Arithmetic on values of any type and number of lanes, as PyTorch does it: IEEE floats, integers that wrap around."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tvm import tirx
from tvm.script.ir_builder import tirx as T
from tvm_ffi import structural_equal

from planish.backends.tvm.builder import Expr, dtype_of, i32, keep, lanes_at, lanes_of, splat
from planish.backends.tvm.index import cast


def match_lanes(values: list[Expr]) -> list[Expr]:
    """The values with scalars spread over the lanes of the widest one."""
    lanes = max(lanes_of(v) for v in values)
    return [splat(v, lanes) if lanes > 1 and lanes_of(v) == 1 else v for v in values]


def zero(value: Expr) -> Expr:
    """0 of the value's type and lanes."""
    return splat(tirx.const(0, dtype_of(value)), lanes_of(value))


def one(value: Expr) -> Expr:
    """1 of the value's type and lanes."""
    return splat(tirx.const(1, dtype_of(value)), lanes_of(value))


def libm(name: str, *values: Expr) -> Expr:
    """The C library's function, one lane at a time."""
    values = tuple(match_lanes(list(values)))
    lanes, dtype = lanes_of(values[0]), dtype_of(values[0])
    symbol = name + ("f" if dtype == "float32" else "")
    if lanes == 1:
        return keep(T.call_extern(dtype, symbol, *values))
    whole = lanes_at(i32(0), lanes)
    places = [T.alloc_buffer((lanes,), dtype) for _ in values]
    for place, value in zip(places, values, strict=True):
        T.buffer_store(place, value, [whole])
    with T.serial(0, lanes) as lane:
        T.buffer_store(places[0], T.call_extern(dtype, symbol, *(place[lane] for place in places)), [lane])
    return T.bind(places[0][whole])


def _wrapping(function: Callable[..., Expr]) -> Callable[..., Expr]:
    """Integer arithmetic that wraps around, as PyTorch's does.

    TVM and LLVM take signed overflow for impossible (x + 1 > x would always hold), so 32 bits are computed in 64 and
    cut, and what comes out is kept from TVM. There is nothing wider than 64 bits to compute in: LLVM still takes
    ``-x < 0`` for ``x > 0``, also of the lowest 64-bit integer.
    """

    def run(*values: Expr) -> Expr:
        if dtype_of(values[0]) not in ("int32", "int64"):
            return function(*values)
        if dtype_of(values[0]) == "int64":
            return keep(function(*values))
        wide = function(*(cast(v, torch.int64) for v in values))
        return keep(cast(wide, torch.int32))

    return run


@_wrapping
def add(a: Expr, b: Expr) -> Expr:
    """a + b."""
    return a + b


@_wrapping
def subtract(a: Expr, b: Expr) -> Expr:
    """a - b."""
    return a - (keep(b) if same_float(a, b) else b)  # TVM takes x - x for 0


def same_float(a: Expr, b: Expr) -> bool:
    """Whether TVM would take the values for equal, though they may be NaN or infinite."""
    return "float" in dtype_of(a) and structural_equal(a, b)


@_wrapping
def multiply(a: Expr, b: Expr) -> Expr:
    """a b."""
    return _not_folded(a) * _not_folded(b)


@_wrapping
def negated(x: Expr) -> Expr:
    """-x; a float's 0 changes its sign."""
    return zero(x) - x if "int" in dtype_of(x) else -x


@_wrapping
def absolute(x: Expr) -> Expr:
    """|x|; the lowest integer stays."""
    return x if dtype_of(x).startswith("uint") else T.abs(x)


def divide(a: Expr, b: Expr) -> Expr:
    """a / b of floating-point values."""
    return _not_folded(a) / _not_folded(b)


def _not_folded(value: Expr) -> Expr:
    """A constant 0 is kept from TVM, which refuses x / 0.0 and takes 0.0 * x and 0.0 / x for 0, also of a NaN."""
    number = value.value if isinstance(value, tirx.Broadcast) else value
    return keep(value) if isinstance(number, tirx.FloatImm) and not number.value else value


def exclusive(a: Expr, b: Expr) -> Expr:
    """Whether one of two conditions holds, but not both."""
    return tirx.Or(tirx.And(a, tirx.Not(b)), tirx.And(tirx.Not(a), b))


def quotient(rounded: str) -> Callable[[Expr, Expr], Expr]:
    """a / b rounded to an integer: ``floor`` or ``trunc``; an integer divided by 0 is reported, and 0."""

    def run(a: Expr, b: Expr) -> Expr:
        if "float" in dtype_of(a):
            return T.trunc(divide(a, b)) if rounded == "trunc" else _floor_quotient(a, b)
        a, b, trap, safe = _safe_divisor(a, b)
        whole = T.truncdiv(a, safe) if rounded == "trunc" else T.floordiv(a, safe)
        return tirx.Select(trap, tirx.Select(tirx.EQ(b, zero(b)), zero(a), zero(a) - a), whole)

    return run


def _safe_divisor(a: Expr, b: Expr) -> tuple[Expr, Expr, Expr, Expr]:
    """Operands of an integer division that cannot trap: 0 and -1 are replaced by 1."""
    a, b = keep(a), keep(b)
    trap = tirx.EQ(b, zero(b)) if dtype_of(b).startswith("u") else tirx.Or(tirx.EQ(b, zero(b)), tirx.EQ(b, -one(b)))
    return a, b, trap, keep(tirx.Select(trap, one(b), b))


def _floor_quotient(a: Expr, b: Expr) -> Expr:
    """Python's a // b: from the exact remainder, as the quotient itself may be rounded up to a whole number."""
    a, b = keep(a), keep(b)
    rest = keep(libm("fmod", a, b))
    exact = (a - rest) / b
    below = tirx.And(tirx.NE(rest, zero(rest)), exclusive(b < zero(b), rest < zero(rest)))
    whole = keep(tirx.Select(below, exact - one(exact), exact))
    half = splat(tirx.const(0.5, dtype_of(a)), lanes_of(a))
    down = keep(T.floor(whole))
    nearest = tirx.Select(whole - down > half, down + one(down), down)
    by_zero = tirx.EQ(b, zero(b))
    return tirx.Select(by_zero, a / b, tirx.Select(tirx.EQ(whole, zero(whole)), zero(whole) * (a / b), nearest))


def remainder(a: Expr, b: Expr) -> Expr:
    """Python's a % b, with the sign of b."""
    if "float" not in dtype_of(a):
        a, b, trap, safe = _safe_divisor(a, b)
        return tirx.Select(trap, zero(a), T.floormod(a, safe))
    b = keep(b)
    rest = keep(libm("fmod", a, b))
    wrong = tirx.And(tirx.NE(rest, zero(rest)), exclusive(b < zero(b), rest < zero(rest)))
    return tirx.Select(wrong, rest + b, rest)


def c_remainder(a: Expr, b: Expr) -> Expr:
    """C's a % b, with the sign of a."""
    if "float" in dtype_of(a):
        return libm("fmod", a, b)
    a, b, trap, safe = _safe_divisor(a, b)
    return tirx.Select(trap, zero(a), T.truncmod(a, safe))
