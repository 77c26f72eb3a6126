"""Types, sizes and index arithmetic in TIR."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, dtype_of, lanes_of, simplify, splat

DTYPES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


def storage_dtype(dtype: torch.dtype) -> str:
    """TIR type of the bytes in memory: a bool is a byte."""
    return "uint8" if dtype is torch.bool else DTYPES[dtype]


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


def cast(value: Expr, dtype: torch.dtype) -> Expr:
    """Convert a value (or Python scalar) to a torch dtype."""
    kind = DTYPES[dtype]
    if isinstance(value, (bool, int, float)):
        return tirx.const(float(value) if dtype.is_floating_point else value, kind)
    lanes = lanes_of(value)
    wanted = kind if lanes == 1 else f"{kind}x{lanes}"
    if str(value.ty) == wanted:
        return value
    if dtype is torch.bool:
        return not_equal(value, splat(0, lanes, dtype_of(value)))
    if dtype_of(value) == "bool":  # TVM's integer-set analysis fails on casts of bool vectors
        return tirx.Select(value, splat(1, lanes, kind), splat(0, lanes, kind))
    return tirx.Cast(wanted, value)


def not_equal(a: Expr, b: Expr) -> Expr:
    """a != b; true where either is NaN, which TVM's own operator is not."""
    different = tirx.NE(a, b)
    return tirx.Or(different, tirx.Or(T.isnan(a), T.isnan(b))) if "float" in dtype_of(a) else different
