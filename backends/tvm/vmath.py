"""Transcendental functions as polynomials on whole vectors; the same code serves scalars.

Each takes and returns fp32 expressions with any number of lanes, and names its maximal error against fp64.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, keep, lanes_of, splat

_LOG2E = float.fromhex("0x1.715476p+0")
_LN2_HIGH = float.fromhex("0x1.62E43p-1")
_LN2_LOW = float.fromhex("0x1.05C61p-29")
_EXP = [float.fromhex(c) for c in ("0x1.0F9F9Cp-7", "0x1.573A1Ap-5", "0x1.555A80p-3", "0x1.FFFDC6p-2", "0x1.FFFFF6p-1")]
_EXP_LOWEST, _EXP_HIGHEST = -87.3, 88.3762


def _horner(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Polynomial with the highest power's coefficient first."""
    lanes = lanes_of(x)
    value: Expr = splat(coefficients[0], lanes)
    for c in coefficients[1:]:
        value = value * x + splat(c, lanes)
    return keep(value)


def _even_odd(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Polynomial of even degree as even(x^2) + x odd(x^2): two chains of half the length, which hides latency."""
    square = keep(x * x)
    return keep(_horner(square, coefficients[0::2]) + x * _horner(square, coefficients[1::2]))


def exp(x: Expr) -> Expr:
    """e^x, relative error 2e-7; 0 below -87.3 (where fp32 turns subnormal) and infinity above 88.37."""
    lanes = lanes_of(x)
    x = keep(x)
    value = exp_nonpositive(T.min(splat(_EXP_HIGHEST, lanes), x))
    return keep(tirx.Select(x > splat(_EXP_HIGHEST, lanes), splat(float("inf"), lanes), value))


def exp_nonpositive(x: Expr) -> Expr:
    """e^x for the x <= 0 (or -inf) of a softmax: without the upper range check; 0 below -87.3."""
    lanes = lanes_of(x)
    x = keep(x)
    return keep(tirx.Select(x < splat(_EXP_LOWEST, lanes), splat(0.0, lanes), exp_clamped(x)))


def exp_clamped(x: Expr) -> Expr:
    """e^x for x <= 88.37, and e^-87.3 = 1.2e-38 for everything below -87.3.

    x = n ln2 + t with t in [-ln2/2, ln2/2] (Cody-Waite in two steps); e^t is a degree-5 polynomial with the
    coefficients of Dukhan and Ablavatski (arXiv 2001.04438); 2^n is added into the exponent bits. n is rounded with
    ``nearbyint``: TVM's simplifier would remove the usual trick of adding and subtracting a large constant. The
    operand order of ``max`` lets NaN through: it is "a > b ? a : b".
    """
    lanes = lanes_of(x)
    x = keep(x)
    clamped = keep(T.max(splat(_EXP_LOWEST, lanes), x))
    n = keep(T.nearbyint(clamped * splat(_LOG2E, lanes)))
    t = keep(clamped - n * splat(_LN2_HIGH, lanes) - n * splat(_LN2_LOW, lanes))
    return _scale_by_power(_horner(t, [*_EXP, 1.0]), n)


_EXP2 = [
    float.fromhex(c) for c in ("0x1.5f0896p-10", "0x1.3cbf6cp-7", "0x1.c6af6cp-5", "0x1.ebfa4ap-3", "0x1.62e430p-1")
]


def exp2_clamped(x: Expr) -> Expr:
    """2^x for x <= 0, and 2^-126 = 1.2e-38 for everything below: relative error 2.6e-7.

    The cheapest exponential, for softmax over scores that were scaled by log2(e) beforehand: x = n + t is exact. The
    polynomial of degree 5 for 2^t on [-1/2, 1/2] is a Chebyshev fit of (2^t - 1)/t.
    """
    lanes = lanes_of(x)
    clamped = keep(T.max(splat(-126.0, lanes), x))
    n = keep(T.nearbyint(clamped))
    p = _horner(keep(clamped - n), [*_EXP2, 1.0])
    return times_power(p, n) if lanes == SCALEF_LANES else _scale_by_power(p, n)


def _scale_by_power(p: Expr, n: Expr) -> Expr:
    """p 2^n for p in [0.7, 1.5] and whole n, by adding n to the exponent bits."""
    lanes = lanes_of(p)
    kind, ints = ("float32", "int32") if lanes == 1 else (f"float32x{lanes}", f"int32x{lanes}")
    bits = T.reinterpret(ints, p) + T.shift_left(T.cast(n, ints), splat(23, lanes, "int32"))
    return keep(T.reinterpret(kind, bits))


def exp_difference(x: Expr) -> Expr:
    """e^x for the x <= 0 (or -inf, or NaN) that a row's largest value leaves: relative error 1.5e-6 at most.

    The cheapest reduction: x log2(e) = n + f with one fused multiply-add, whose only error is that of the constant
    (1.3e-8 |x|), and a polynomial for 2^f. With 16 lanes ``vscalefps`` multiplies by 2^n, down to denormal numbers.
    With fewer a fused multiply-add to a float whose unit is 1 rounds, and leaves the exponent n + 127 in the low
    bits: 0 below -87.7.
    """
    lanes = lanes_of(x)
    if lanes == SCALEF_LANES:
        x = keep(T.max(splat(-120.0, lanes), x))
        n = keep(T.nearbyint(x * splat(_LOG2E, lanes)))
        return times_power(_horner(fused_multiply_add(x, splat(_LOG2E, lanes), -n), [*_EXP2, 1.0]), n)
    x = keep(T.max(splat(_TWO_TO_0, lanes), x))
    kind, ints = ("float32", "int32") if lanes == 1 else (f"float32x{lanes}", f"int32x{lanes}")
    biased = fused_multiply_add(x, splat(_LOG2E, lanes), splat(_UNIT, lanes))
    f = fused_multiply_add(x, splat(_LOG2E, lanes), splat(_UNIT, lanes) - biased)
    power = T.shift_left(T.reinterpret(ints, biased), splat(23, lanes, "int32"))
    return keep(_horner(f, [*_EXP2, 1.0]) * T.reinterpret(kind, power))


_UNIT = float(3 << 22) + 127.0
"""Added to a small number, leaves the nearest whole number, plus 127, in the low bits of the sum."""

_TWO_TO_0 = -88.1
"""x whose n is -127, which as an exponent field is that of 0."""


SCALEF_LANES = 16
"""Vectors of AVX-512, which multiplies by powers of two in one instruction."""


def times_power(x: Expr, n: Expr) -> Expr:
    """x 2^n for vectors of ``SCALEF_LANES`` and whole n <= 0: exact."""
    every, rounding = tirx.const(0xFFFF, "uint16"), tirx.const(4, "int32")
    return keep(T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.mask.scalef.ps.512", x, n, x, every, rounding))


def fused_multiply_add(a: Expr, b: Expr, c: Expr) -> Expr:
    """a b + c, rounded once."""
    lanes = lanes_of(a)
    kind, suffix = ("float32", "f32") if lanes == 1 else (f"float32x{lanes}", f"v{lanes}f32")
    return keep(T.call_llvm_pure_intrin(kind, f"llvm.fma.{suffix}", a, b, c))


LOG2E = _LOG2E
"""What scores are scaled by for ``exp2_clamped``."""


_ERF_LIMIT = 3.8890872965260113
_ERF = [
    0.0018561175093054771,
    -0.004039109218865633,
    0.001809928915463388,
    -0.0029748636297881603,
    0.013360272161662579,
    -0.02228289656341076,
    0.028748732060194016,
    -0.04118291288614273,
    0.05765694007277489,
    -0.07393962889909744,
    0.09069980680942535,
    -0.10969780385494232,
    0.13502287864685059,
    -0.18150745332241058,
    0.3635997772216797,
]


def _erf_unbounded(x: Expr) -> Expr:
    """erf(x) to 3.3e-7, which beyond the limit is 1 to 2e-7: a degree-14 Chebyshev fit of erf(x)/x in
    w = 2 x^2/L^2 - 1 on |x| <= L = 5.5/sqrt(2) (powers of w, because powers of x^2 cancel badly in fp32)."""
    lanes = lanes_of(x)
    limit = splat(_ERF_LIMIT, lanes)
    z = keep(T.max(-limit, T.min(limit, x)))
    w = keep(z * z * splat(2 / _ERF_LIMIT**2, lanes) - splat(1.0, lanes))
    return keep(_even_odd(w, _ERF) * z)


def erf(x: Expr) -> Expr:
    """erf(x), absolute error 3.3e-7."""
    one = splat(1.0, lanes_of(x))
    return keep(T.max(-one, T.min(one, _erf_unbounded(x))))


_GELU_LIMIT = 5.5
_GELU = [c * 0.5 * 0.5**0.5 for c in _ERF]


def gelu(x: Expr) -> Expr:
    """x (1/2 + erf(x/sqrt 2)/2): the exact GELU, absolute error 1.1e-6: ``erf`` with both factors folded in.

    Bounding the second term makes the factor exactly 0 for very negative x and 1 for very positive x; at the limit the
    polynomial exceeds 1/2 by an ulp, so it never falls short of the bound.
    """
    lanes = lanes_of(x)
    x = keep(x)
    limit, half = splat(_GELU_LIMIT, lanes), splat(0.5, lanes)
    z = keep(T.max(-limit, T.min(limit, x)))
    w = keep(z * z * splat(2 / _GELU_LIMIT**2, lanes) - splat(1.0, lanes))
    return keep(x * (half + T.max(-half, T.min(half, _even_odd(w, _GELU) * z))))


_TANH = [-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1]


def tanh(x: Expr) -> Expr:
    """tanh(x), relative error 3e-7: an odd polynomial (Cephes' coefficients) below 0.625, else 1 - 2/(e^2|x| + 1)."""
    lanes = lanes_of(x)
    x = keep(x)
    one, size = splat(1.0, lanes), keep(T.max(x, -x))
    square = keep(x * x)
    small = x + x * square * _horner(square, _TANH)
    large = one - splat(2.0, lanes) / (exp(size + size) + one)
    signed = tirx.Select(x < splat(0.0, lanes), -large, large)
    return keep(tirx.Select(size < splat(0.625, lanes), small, signed))


def gelu_tanh(x: Expr) -> Expr:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): GELU's tanh form."""
    lanes = lanes_of(x)
    inner = x * splat(0.7978845608028654, lanes) * (splat(1.0, lanes) + splat(0.044715, lanes) * x * x)
    return keep(x * splat(0.5, lanes) * (splat(1.0, lanes) + tanh(inner)))


def sigmoid(x: Expr) -> Expr:
    """1/(1 + e^-x)."""
    lanes = lanes_of(x)
    return keep(splat(1.0, lanes) / (splat(1.0, lanes) + exp(-x)))


def silu(x: Expr) -> Expr:
    """x sigmoid(x)."""
    return keep(x * sigmoid(x))
