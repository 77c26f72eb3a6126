"""Types, sizes and index arithmetic in TIR."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, dtype_of, equal, keep, lanes_of, simplify, splat

DTYPES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "float32",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}
"""Type of a value in a kernel; a bfloat16 is a float32 that has been rounded."""


def storage_dtype(dtype: torch.dtype) -> str:
    """TIR type of the bytes in memory: a bool is a byte, a bfloat16 the upper half of a float32."""
    return {torch.bool: "uint8", torch.bfloat16: "uint16"}.get(dtype, DTYPES[dtype])


def to_tir(expr: sympy.Expr, dims: Mapping[str, Expr]) -> Expr:
    """A size over dim names as an int32 expression."""
    args = [to_tir(a, dims) for a in expr.args]
    if expr.is_Integer:
        return int(expr)  # pyright: ignore
    if expr.is_Symbol:
        return dims[str(expr)]
    kind = type(expr).__name__
    fold: dict[str, Callable[[Expr, Expr], Expr]] = {
        "Add": lambda a, b: a + b,
        "Mul": lambda a, b: a * b,
        "FloorDiv": _floordiv,
        "PythonMod": lambda a, b: T.floormod(a, b),
        "Mod": lambda a, b: T.floormod(a, b),
        "Max": lambda a, b: T.max(a, b),
        "Min": lambda a, b: T.min(a, b),
        "Pow": lambda a, b: _power(a, int(b)),
    }
    if kind not in fold:
        raise KeyError(kind)
    value = args[0]
    for a in args[1:]:
        value = fold[kind](value, a)
    return value


def _floordiv(a: Expr, b: Expr) -> Expr:
    return a // b if isinstance(a, int) and isinstance(b, int) else T.floordiv(a, b)


def _power(base: Expr, exponent: int) -> Expr:
    value = base
    for _ in range(exponent - 1):
        value = value * base
    return value


def translatable(expr: Any) -> bool:
    """Whether ``to_tir`` knows every function in a size."""
    known = {"Add", "Mul", "FloorDiv", "PythonMod", "Mod", "Max", "Min", "Pow"}
    if isinstance(expr, int) or expr.is_Integer or expr.is_Symbol:
        return True
    positive = type(expr).__name__ != "Pow" or (expr.args[1].is_Integer and expr.args[1] > 0)
    return type(expr).__name__ in known and positive and all(translatable(a) for a in expr.args)


def flat_index(shape: tuple[Expr, ...], index: tuple[Expr, ...]) -> Expr:
    """Row-major position of an index."""
    flat: Expr = 0
    for size, i in zip(shape, index, strict=True):
        flat = flat * size + i
    return simplify(flat)


def unflatten_index(shape: tuple[Expr, ...], flat: Expr) -> tuple[Expr, ...]:
    """Index of a row-major position; the first axis needs no remainder."""
    index: list[Expr] = []
    for axis in range(len(shape) - 1, -1, -1):
        index.append(simplify(T.floormod(flat, shape[axis])) if axis else flat)
        flat = simplify(T.floordiv(flat, shape[axis])) if axis else flat
    return tuple(reversed(index))


def broadcast_index(own: tuple[Expr, ...], full: tuple[Expr, ...], index: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """Where an operand of shape ``own`` is read for an index of the broadcast shape ``full``.

    A size that is neither 1 nor the result's for certain decides when the kernel runs.
    """
    extra = len(index) - len(own)
    place: list[Expr] = []
    for size, wanted, i in zip(own, full[extra:], index[extra:], strict=True):
        known = size if isinstance(size, int) else simplify(size)
        if isinstance(known, (int, tirx.IntImm)):
            place.append(0 if int(known) == 1 else i)
        elif equal(size, wanted):
            place.append(i)
        else:
            lanes = lanes_of(i)
            place.append(i * splat(tirx.Select(tirx.EQ(size, 1), 0, 1), lanes, "int32"))
    return tuple(place)


def cast(value: Expr, dtype: torch.dtype) -> Expr:
    """Convert a value (or Python scalar) to a torch dtype."""
    kind = DTYPES[dtype]
    if isinstance(value, (bool, int, float)):
        exact = torch.tensor(value, dtype=dtype).item() if dtype in (torch.bfloat16, torch.bool) else value
        return tirx.const(float(exact) if dtype.is_floating_point else exact, kind)
    lanes = lanes_of(value)
    wanted = kind if lanes == 1 else f"{kind}x{lanes}"
    if dtype is torch.bfloat16:
        return _rounded_to_bfloat16(value if str(value.ty) == wanted else cast(value, torch.float32))
    if str(value.ty) == wanted:
        return value
    if dtype is torch.bool:
        return not_equal(value, splat(0, lanes, dtype_of(value)))
    if dtype_of(value) == "bool":  # TVM's integer-set analysis fails on casts of bool vectors
        return tirx.Select(value, splat(1, lanes, kind), splat(0, lanes, kind))
    if dtype.is_floating_point and "int" in dtype_of(value):
        value = keep(value)  # TVM's interval analysis fails on floats made of integers with known bounds
    return tirx.Cast(wanted, value)


def as_stored(value: Expr, dtype: torch.dtype) -> Expr:
    """The value as it stands in memory (see ``storage_dtype``)."""
    value = cast(value, dtype)
    if dtype is torch.bfloat16:
        lanes = lanes_of(value)
        bits = T.shift_right(T.reinterpret(_vector("uint32", lanes), value), splat(16, lanes, "uint32"))
        return tirx.Cast(_vector("uint16", lanes), bits)
    return cast(value, torch.uint8) if dtype is torch.bool else value


def as_value(stored: Expr, dtype: torch.dtype) -> Expr:
    """The value of what stands in memory: the inverse of ``as_stored``."""
    lanes = lanes_of(stored)
    if dtype is torch.bfloat16:
        bits = tirx.Cast(_vector("uint32", lanes), stored)
        return T.reinterpret(_vector("float32", lanes), T.shift_left(bits, splat(16, lanes, "uint32")))
    return tirx.NE(stored, splat(0, lanes, "uint8")) if dtype is torch.bool else stored


def _vector(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _rounded_to_bfloat16(value: Expr) -> Expr:
    """The float32 with its lower half rounded away, to even; a NaN stays one."""
    lanes = lanes_of(value)
    word = _vector("uint32", lanes)
    value = T.bind(value)
    bits = T.bind(T.reinterpret(word, value))
    odd = T.bitwise_and(T.shift_right(bits, splat(16, lanes, "uint32")), splat(1, lanes, "uint32"))
    rounded = T.bitwise_and(bits + splat(0x7FFF, lanes, "uint32") + odd, splat(0xFFFF0000, lanes, "uint32"))
    return tirx.Select(T.isnan(value), value, T.reinterpret(_vector("float32", lanes), rounded))


def not_equal(a: Expr, b: Expr) -> Expr:
    """a != b; true where either is NaN, which TVM's own operator is not."""
    different = tirx.NE(a, b)
    return tirx.Or(different, tirx.Or(T.isnan(a), T.isnan(b))) if "float" in dtype_of(a) else different
