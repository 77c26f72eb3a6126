"""What each elementwise op computes: an expression over its operands' values, with any number of lanes.

Half-precision values are computed in fp32 and rounded after each op, as PyTorch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm import vmath
from planish.backends.tvm.arithmetic import (
    absolute,
    add,
    c_remainder,
    divide,
    exclusive,
    libm,
    match_lanes,
    multiply,
    negated,
    one,
    quotient,
    remainder,
    same_float,
    subtract,
    zero,
)
from planish.backends.tvm.builder import Expr, dtype_of, keep, lanes_of, splat
from planish.backends.tvm.index import cast, not_equal
from planish.ops import argument, aten

Operand = Callable[[Any], Expr]
Scalar = Callable[[fx.Node, Operand], Expr]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: half precisions in fp32; bools as bytes, where + is "or" and * "and" of a bool result."""
    if dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return torch.uint8 if dtype is torch.bool else dtype


def _result(node: fx.Node) -> torch.dtype:
    return compute_dtype(node.meta["val"].dtype)


def _common(node: fx.Node, count: int = 2) -> torch.dtype:
    """The dtype that PyTorch computes in: the promoted type of the operands."""
    samples: list[Any] = []
    for a in node.args[:count]:
        value = a.meta["val"] if isinstance(a, fx.Node) else a
        samples.append(_sample(value) if isinstance(value, torch.Tensor) else _number(value))
    return compute_dtype(torch.result_type(*samples))


def _sample(value: torch.Tensor) -> torch.Tensor:
    return torch.empty((1,) * value.dim(), dtype=value.dtype)


def _number(value: Any) -> int | float | bool:
    return 1 if isinstance(value, torch.SymInt) else 1.0 if isinstance(value, torch.SymFloat) else value


def _operands(node: fx.Node, operand: Operand, dtype: torch.dtype, count: int) -> list[Expr]:
    return match_lanes([cast(operand(a), dtype) for a in node.args[:count]])


# Functions of one value ------------------------------------------------------------------------------------------


def _unary(function: Callable[[Expr], Expr]) -> Scalar:
    return lambda node, operand: function(cast(operand(node.args[0]), _result(node)))


def _predicate(function: Callable[[Expr], Expr]) -> Scalar:
    """A test of a value in the value's own type."""

    def run(node: fx.Node, operand: Operand) -> Expr:
        return function(cast(operand(node.args[0]), compute_dtype(node.args[0].meta["val"].dtype)))  # pyright: ignore

    return run


def _library(name: str) -> Scalar:
    return _unary(lambda x: libm(name, x))


def _fast(vector: Callable[[Expr], Expr], name: str | Callable[[Expr], Expr]) -> Scalar:
    """Our vector code in fp32, the C library's function (or an expression) in fp64."""

    def run(x: Expr) -> Expr:
        if dtype_of(x) == "float32":
            return vector(x)
        return libm(name, x) if isinstance(name, str) else name(x)

    return _unary(run)


def _integral(function: Callable[[Expr], Expr]) -> Scalar:
    """Rounding: integers are left alone."""
    return _unary(lambda x: function(x) if "float" in dtype_of(x) else x)


def _relu(x: Expr) -> Expr:
    return T.max(zero(x), x)


def _sigmoid(x: Expr) -> Expr:
    return one(x) / (one(x) + libm("exp", -x))


def _sign(x: Expr) -> Expr:
    x = keep(x)
    if dtype_of(x).startswith("u"):
        return tirx.Select(x > zero(x), one(x), zero(x))
    signed = tirx.Select(x > zero(x), one(x), tirx.Select(x < zero(x), -one(x), zero(x)))
    return tirx.Select(T.isnan(x), zero(x), signed) if "float" in dtype_of(x) else signed


def _sign_bit(x: Expr) -> Expr:
    if "float" not in dtype_of(x):
        return x < zero(x)
    bits = "int64" if dtype_of(x) == "float64" else "int32"
    lanes = lanes_of(x)
    word = T.reinterpret(bits if lanes == 1 else f"{bits}x{lanes}", x)
    return word < zero(word)


def _is_nan(x: Expr) -> Expr:
    return tirx.NE(zero(x), zero(x)) if "float" not in dtype_of(x) else T.isnan(x)


def _is_inf(x: Expr) -> Expr:
    if "float" not in dtype_of(x):
        return tirx.NE(zero(x), zero(x))
    x = keep(x)
    limit = splat(tirx.const(float("inf"), dtype_of(x)), lanes_of(x))
    return tirx.Or(tirx.EQ(x, limit), tirx.EQ(x, -limit))


def _round(node: fx.Node, operand: Operand) -> Expr:
    x = cast(operand(node.args[0]), _result(node))
    return T.nearbyint(x) if "float" in dtype_of(x) else x


def _not(node: fx.Node, operand: Operand) -> Expr:
    return tirx.Not(cast(operand(node.args[0]), torch.bool))


def _bitwise_not(node: fx.Node, operand: Operand) -> Expr:
    value = operand(node.args[0])
    return tirx.Not(value) if node.meta["val"].dtype is torch.bool else T.bitwise_not(value)


def _gelu(node: fx.Node, operand: Operand) -> Expr:
    x = cast(operand(node.args[0]), _result(node))
    if dtype_of(x) == "float32":
        return vmath.gelu_tanh(x) if argument(node, 1, "approximate", "none") == "tanh" else vmath.gelu(x)
    c = lambda v: splat(tirx.const(v, dtype_of(x)), lanes_of(x))  # noqa: E731
    if argument(node, 1, "approximate", "none") == "tanh":
        inner = c(0.7978845608028654) * (x + c(0.044715) * x * x * x)
        return c(0.5) * x * (one(x) + libm("tanh", inner))
    return c(0.5) * x * (one(x) + libm("erf", x * c(0.7071067811865476)))


# Functions of two values -----------------------------------------------------------------------------------------


def _scaled(value: Expr, alpha: Any, operand: Operand, dtype: torch.dtype) -> Expr:
    if isinstance(alpha, fx.Node):
        alpha = operand(alpha)
    elif alpha == 1:
        return value
    return multiply(value, splat(cast(alpha, dtype), lanes_of(value)))


def _binary(function: Callable[[Expr, Expr], Expr]) -> Scalar:
    def run(node: fx.Node, operand: Operand) -> Expr:
        dtype = _result(node)
        a, b = _operands(node, operand, dtype, 2)
        return function(a, _scaled(b, argument(node, 2, "alpha", 1), operand, dtype))

    return run


def _pair(function: Callable[[Expr, Expr], Expr]) -> Scalar:
    """A function of two values in the result's type."""
    return lambda node, operand: function(*_operands(node, operand, _result(node), 2))


def _reversed_sub(node: fx.Node, operand: Operand) -> Expr:
    dtype = _result(node)
    a, b = _operands(node, operand, dtype, 2)
    return subtract(b, _scaled(a, argument(node, 2, "alpha", 1), operand, dtype))


def _compare(function: Callable[[Expr, Expr], Expr]) -> Scalar:
    """A comparison; one of floats is kept from TVM, which takes not (a < b) for b <= a, also of a NaN."""

    def run(node: fx.Node, operand: Operand) -> Expr:
        a, b = _operands(node, operand, _common(node), 2)
        return keep(function(a, b)) if "float" in dtype_of(a) else function(a, b)

    return run


def _reflexive(function: Callable[[Expr, Expr], Expr]) -> Callable[[Expr, Expr], Expr]:
    """A comparison that holds for equal values; TVM takes a value to equal itself, which a NaN does not."""

    def run(a: Expr, b: Expr) -> Expr:
        return tirx.Not(T.isnan(a)) if same_float(a, b) else function(a, b)

    return run


def _logical(function: Callable[[Expr, Expr], Expr]) -> Scalar:
    return lambda node, operand: function(*_operands(node, operand, torch.bool, 2))


def _bitwise(logical: Callable[[Expr, Expr], Expr], bits: Callable[[Expr, Expr], Expr]) -> Scalar:
    def run(node: fx.Node, operand: Operand) -> Expr:
        dtype = node.meta["val"].dtype
        return (logical if dtype is torch.bool else bits)(*_operands(node, operand, dtype, 2))

    return run


def _ordered(pick: Callable[[Expr, Expr], Expr]) -> Callable[[Expr, Expr], Expr]:
    """Maximum or minimum that yields NaN if either operand is NaN."""

    def run(a: Expr, b: Expr) -> Expr:
        a, b = keep(a), keep(b)
        return tirx.Select(T.isnan(a), a, pick(a, b)) if "float" in dtype_of(a) else pick(a, b)

    return run


def _skipping_nan(pick: Callable[[Expr, Expr], Expr]) -> Callable[[Expr, Expr], Expr]:
    """Maximum or minimum that ignores a NaN."""

    def run(a: Expr, b: Expr) -> Expr:
        a, b = keep(a), keep(b)
        if "float" not in dtype_of(a):
            return pick(a, b)
        return tirx.Select(T.isnan(a), b, tirx.Select(T.isnan(b), a, pick(a, b)))

    return run


def _divided(node: fx.Node, operand: Operand) -> Expr:
    rounding = argument(node, 2, "rounding_mode")
    a, b = _operands(node, operand, _result(node), 2)
    return divide(a, b) if rounding is None else quotient(rounding)(a, b)


def _power(node: fx.Node, operand: Operand) -> Expr:
    dtype = _result(node)
    x, exponent = cast(operand(node.args[0]), dtype), operand(node.args[1])
    if isinstance(exponent, (int, float)) and (exponent in (0, 1, 2, 3, 4) or not dtype.is_floating_point):
        x = keep(x) if exponent else x
        value = one(x)
        for _ in range(int(exponent)):
            value = multiply(value, x)
        return value
    if exponent in (0.5, -0.5):
        root = T.sqrt(x)
        return root if exponent > 0 else one(x) / root
    return libm("pow", x, cast(exponent, dtype))


def _copy_sign(a: Expr, b: Expr) -> Expr:
    size = T.abs(keep(a))
    return tirx.Select(_sign_bit(b), -size, size)


def _shift(function: Callable[[Expr, Expr], Expr]) -> Scalar:
    """A shift by the type's width or more, or by a negative amount, gives what PyTorch gives: all bits shifted out."""

    def run(node: fx.Node, operand: Operand) -> Expr:
        dtype = node.meta["val"].dtype
        a, b = _operands(node, operand, dtype, 2)
        a, b = keep(a), keep(b)
        bits = splat(tirx.const(torch.iinfo(dtype).bits, dtype_of(a)), lanes_of(a))
        outside = b >= bits if dtype_of(a).startswith("u") else tirx.Or(b < zero(b), b >= bits)
        most = bits - one(bits)
        if function is T.shift_left:
            return tirx.Select(outside, zero(a), T.shift_left(a, tirx.Select(outside, zero(b), b)))
        gone = zero(a) if dtype_of(a).startswith("u") else T.shift_right(a, most)
        return tirx.Select(outside, gone, T.shift_right(a, tirx.Select(outside, zero(b), b)))

    return run


# Choices ---------------------------------------------------------------------------------------------------------


def _where(node: fx.Node, operand: Operand) -> Expr:
    dtype = _result(node)
    condition, a, b = node.args[:3]
    return tirx.Select(
        *match_lanes([cast(operand(condition), torch.bool), cast(operand(a), dtype), cast(operand(b), dtype)])
    )


def _masked_fill(node: fx.Node, operand: Operand) -> Expr:
    dtype = _result(node)
    x, mask, value = node.args[:3]
    return tirx.Select(
        *match_lanes([cast(operand(mask), torch.bool), cast(operand(value), dtype), cast(operand(x), dtype)])
    )


def _clamp(node: fx.Node, operand: Operand) -> Expr:
    """The bound comes first in max and min ("a > b ? a : b"), so that NaN stays; a NaN bound stays too."""
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    return _clamped(node, operand, low, high)


def _clamped(node: fx.Node, operand: Operand, low: Any, high: Any) -> Expr:
    dtype = _result(node)
    value = cast(operand(node.args[0]), dtype)
    for bound, pick in ((low, T.max), (high, T.min)):
        if isinstance(bound, fx.Node) and isinstance(bound.meta["val"], torch.Tensor):
            value = _ordered(pick)(*match_lanes([cast(operand(bound), dtype), value]))
        elif bound is not None:
            value = pick(*match_lanes([cast(operand(bound), dtype), value]))
    return value


def _clamp_max(node: fx.Node, operand: Operand) -> Expr:
    return _clamped(node, operand, None, argument(node, 1, "max"))


_AND = _bitwise(lambda a, b: tirx.And(a, b), lambda a, b: a & b)
_OR = _bitwise(lambda a, b: tirx.Or(a, b), lambda a, b: a | b)
_XOR = _bitwise(exclusive, lambda a, b: a ^ b)
_LEFT, _RIGHT = _shift(T.shift_left), _shift(T.shift_right)
_EQUAL, _DIFFERENT = _compare(_reflexive(lambda a, b: tirx.EQ(a, b))), _compare(not_equal)
_LESS, _LESS_EQUAL = _compare(lambda a, b: a < b), _compare(_reflexive(lambda a, b: a <= b))
_GREATER, _GREATER_EQUAL = _compare(lambda a, b: a > b), _compare(_reflexive(lambda a, b: a >= b))

DIVISIONS = frozenset(
    {
        aten.div.Tensor_mode,
        aten.div.Scalar_mode,
        aten.floor_divide.default,
        aten.fmod.Tensor,
        aten.fmod.Scalar,
        aten.remainder.Tensor,
        aten.remainder.Scalar,
    }
)
"""Ops that PyTorch refuses to do with an integer divisor of 0."""

ELEMENTWISE: dict[Any, Scalar] = {
    aten.add.Tensor: _binary(add),
    aten.add.Scalar: _binary(add),
    aten.sub.Tensor: _binary(subtract),
    aten.sub.Scalar: _binary(subtract),
    aten.rsub.Scalar: _reversed_sub,
    aten.mul.Tensor: _pair(multiply),
    aten.mul.Scalar: _pair(multiply),
    aten.div.Tensor: _pair(divide),
    aten.div.Scalar: _pair(divide),
    aten.div.Tensor_mode: _divided,
    aten.div.Scalar_mode: _divided,
    aten.floor_divide.default: _pair(quotient("floor")),
    aten.fmod.Tensor: _pair(c_remainder),
    aten.fmod.Scalar: _pair(c_remainder),
    aten.remainder.Tensor: _pair(remainder),
    aten.remainder.Scalar: _pair(remainder),
    aten.maximum.default: _pair(_ordered(lambda a, b: T.max(a, b))),
    aten.minimum.default: _pair(_ordered(lambda a, b: T.min(a, b))),
    aten.fmax.default: _pair(_skipping_nan(lambda a, b: T.max(a, b))),
    aten.fmin.default: _pair(_skipping_nan(lambda a, b: T.min(a, b))),
    aten.atan2.default: _pair(lambda a, b: libm("atan2", a, b)),
    aten.hypot.default: _pair(lambda a, b: libm("hypot", a, b)),
    aten.copysign.Tensor: _pair(_copy_sign),
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Tensor_Tensor: _pair(lambda a, b: libm("pow", a, b)),
    aten.pow.Scalar: _pair(lambda a, b: libm("pow", a, b)),
    aten.neg.default: _unary(negated),
    aten.abs.default: _unary(absolute),
    aten.sign.default: _unary(_sign),
    aten.exp.default: _fast(vmath.exp, "exp"),
    aten.erf.default: _fast(vmath.erf, "erf"),
    aten.tanh.default: _fast(vmath.tanh, "tanh"),
    aten.sigmoid.default: _fast(vmath.sigmoid, _sigmoid),
    aten.silu.default: _fast(vmath.silu, lambda x: x * _sigmoid(x)),
    aten.relu.default: _unary(_relu),
    aten.gelu.default: _gelu,
    aten.sqrt.default: _unary(lambda x: T.sqrt(x)),
    aten.rsqrt.default: _unary(lambda x: one(x) / T.sqrt(x)),
    aten.reciprocal.default: _unary(lambda x: one(x) / x),
    aten.log.default: _library("log"),
    aten.log2.default: _library("log2"),
    aten.log10.default: _library("log10"),
    aten.log1p.default: _library("log1p"),
    aten.expm1.default: _library("expm1"),
    aten.exp2.default: _library("exp2"),
    aten.erfc.default: _library("erfc"),
    aten.lgamma.default: _library("lgamma"),
    aten.nextafter.default: _pair(lambda a, b: libm("nextafter", a, b)),
    aten.sin.default: _library("sin"),
    aten.cos.default: _library("cos"),
    aten.tan.default: _library("tan"),
    aten.asin.default: _library("asin"),
    aten.acos.default: _library("acos"),
    aten.atan.default: _library("atan"),
    aten.sinh.default: _library("sinh"),
    aten.cosh.default: _library("cosh"),
    aten.asinh.default: _library("asinh"),
    aten.acosh.default: _library("acosh"),
    aten.atanh.default: _library("atanh"),
    aten.floor.default: _integral(lambda x: T.floor(x)),
    aten.ceil.default: _integral(lambda x: T.ceil(x)),
    aten.trunc.default: _integral(lambda x: T.trunc(x)),
    aten.round.default: _round,
    aten.signbit.default: _predicate(_sign_bit),
    aten.isnan.default: _predicate(_is_nan),
    aten.isinf.default: _predicate(_is_inf),
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: _clamp_max,
    aten.eq.Tensor: _EQUAL,
    aten.eq.Scalar: _EQUAL,
    aten.ne.Tensor: _DIFFERENT,
    aten.ne.Scalar: _DIFFERENT,
    aten.lt.Tensor: _LESS,
    aten.lt.Scalar: _LESS,
    aten.le.Tensor: _LESS_EQUAL,
    aten.le.Scalar: _LESS_EQUAL,
    aten.gt.Tensor: _GREATER,
    aten.gt.Scalar: _GREATER,
    aten.ge.Tensor: _GREATER_EQUAL,
    aten.ge.Scalar: _GREATER_EQUAL,
    aten.logical_and.default: _logical(lambda a, b: tirx.And(a, b)),
    aten.logical_or.default: _logical(lambda a, b: tirx.Or(a, b)),
    aten.logical_xor.default: _logical(exclusive),
    aten.logical_not.default: _not,
    aten.bitwise_not.default: _bitwise_not,
    aten.__and__.Tensor: _AND,
    aten.__or__.Tensor: _OR,
    aten.__xor__.Tensor: _XOR,
    aten.bitwise_and.Tensor: _AND,
    aten.bitwise_or.Tensor: _OR,
    aten.bitwise_xor.Tensor: _XOR,
    aten.bitwise_left_shift.Tensor: _LEFT,
    aten.__lshift__.Tensor: _LEFT,
    aten.__lshift__.Scalar: _LEFT,
    aten.bitwise_right_shift.Tensor: _RIGHT,
    aten.__rshift__.Tensor: _RIGHT,
    aten.__rshift__.Scalar: _RIGHT,
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.where.Scalar: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten._to_copy.default: lambda node, operand: operand(node.args[0]),
}
"""Op to expression; the caller converts the result to the node's dtype."""


def elementwise_reason(node: fx.Node) -> str | None:
    """Why an elementwise op has no expression for its operands, or None."""
    if node.target is aten.nextafter.default and node.meta["val"].dtype not in (torch.float32, torch.float64):
        return "the next number is native for float32 and float64 only"
    integers = not node.meta["val"].dtype.is_floating_point
    powers = (aten.pow.Tensor_Tensor, aten.pow.Scalar)
    if node.target in powers and integers:
        return "powers with a tensor as exponent are native for floating point only"
    if node.target is aten.pow.Tensor_Scalar and integers and not 0 <= node.args[1] <= 64:  # pyright: ignore
        return "integer powers are native for exponents from 0 to 64"
    return None
