"""Winograd's minimal filtering: 4 x 4 outputs of a 3 x 3 window from 36 products per channel instead of 144.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015). With d the 6 x 6 inputs of a tile
and g the window, the outputs are ``A^T [(G g G^T) * (B^T d B)] A``. The three matrices follow from evaluating
polynomials at the points below and at infinity (Toom and Cook).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, for_vectors, function, keep, lanes_at, lanes_of, splat

OUTPUTS, WINDOW = 4, 3
"""Outputs of a tile and taps of the window, along one axis."""

INPUTS = OUTPUTS + WINDOW - 1
"""Inputs of a tile along one axis, and products per output tile and axis."""

POINTS = (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2))
"""Where the polynomials are evaluated, besides infinity.

The best of all pairs of eighths by rounding error: 8e-7 of the outputs' root mean square with 256 channels, where the
usual 1 and 2 give 1.8e-6 and the direct sum 2e-7.
"""

PRODUCTS = INPUTS * INPUTS
"""Products per tile and channel."""

Matrix = tuple[tuple[Fraction, ...], ...]


@cache
def matrices() -> tuple[Matrix, Matrix, Matrix]:
    """A^T [4, 6], G [6, 3] and B^T [6, 6]."""
    powers = [[p**k for k in range(max(OUTPUTS, WINDOW))] for p in POINTS]
    a = [[*(row[k] for row in powers), Fraction(k == OUTPUTS - 1)] for k in range(OUTPUTS)]
    g = [[row[k] / _distances(i) for k in range(WINDOW)] for i, row in enumerate(powers)]
    g.append([Fraction(k == WINDOW - 1) for k in range(WINDOW)])
    b = [_polynomial([q for j, q in enumerate(POINTS) if j != i]) for i in range(len(POINTS))]
    b.append(_polynomial(POINTS))
    return _frozen(a), _frozen(g), _frozen(b)


def _distances(index: int) -> Fraction:
    """Product of the distances of a point to all others."""
    product = Fraction(1)
    for j, q in enumerate(POINTS):
        product *= 1 if j == index else POINTS[index] - q
    return product


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of the product of ``x - root``, the constant first, filled up to ``INPUTS``."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *coefficients], [*(c * root for c in coefficients), Fraction(0)]
        coefficients = [s - r for s, r in zip(shifted, scaled, strict=True)]
    return coefficients + [Fraction(0)] * (INPUTS - len(coefficients))


def _frozen(rows: Sequence[Sequence[Fraction]]) -> Matrix:
    return tuple(tuple(row) for row in rows)


def _times(matrix: Matrix, values: Sequence[Expr]) -> list[Expr]:
    """The product with a vector of expressions; zeros and ones cost nothing."""
    results: list[Expr] = []
    for row in matrix:
        total: Expr = None
        for factor, value in zip(row, values, strict=True):
            if factor:
                term = value if abs(factor) == 1 else value * splat(float(abs(factor)), lanes_of(value))
                total = (
                    (term if factor > 0 else -term) if total is None else total + term if factor > 0 else total - term
                )
        results.append(keep(total))
    return results


def _both_axes(matrix: Matrix, values: Sequence[Sequence[Expr]]) -> list[list[Expr]]:
    """``matrix values matrix^T``."""
    columns = [_times(matrix, column) for column in zip(*values, strict=True)]
    return [_times(matrix, row) for row in zip(*columns, strict=True)]


def build_input_transform(symbol: str, lanes: int) -> tirx.PrimFunc:
    """``B^T d B`` for every channel of a tile.

    Parameters: d, the results, then the elements between rows of d, the channels, which are also the elements between
    its pixels, and the elements between results.
    """
    with function(symbol) as f:
        (source, result), (line, channels, stride) = f.parameters(["float32"] * 2, 3, align=4)
        for c, count in for_vectors(channels, lanes):
            d = [
                [keep(source[lanes_at(y * line + x * channels + c, count)]) for x in range(INPUTS)]
                for y in range(INPUTS)
            ]
            products = [value for row in _both_axes(matrices()[2], d) for value in row]
            for i, value in enumerate(products):
                T.buffer_store(result, value, [lanes_at(i * stride + c, count)])
    assert f.func is not None
    return f.func


def build_output_transform(symbol: str, lanes: int) -> tirx.PrimFunc:
    """``A^T m A`` for every channel of a tile; whole vectors of channels.

    Parameters: m, the results, then the elements between the products of m, the channels, which are also the elements
    between the results.
    """
    with function(symbol) as f:
        (products, result), (stride, channels) = f.parameters(["float32"] * 2, 2, align=4)
        with T.serial(0, T.truncdiv(channels, lanes)) as v:
            c = v * lanes
            m = [
                [keep(products[lanes_at((y * INPUTS + x) * stride + c, lanes)]) for x in range(INPUTS)]
                for y in range(INPUTS)
            ]
            outputs = [value for row in _both_axes(matrices()[0], m) for value in row]
            for i, value in enumerate(outputs):
                T.buffer_store(result, value, [lanes_at(i * channels + c, lanes)])
    assert f.func is not None
    return f.func
