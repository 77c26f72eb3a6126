"""Where the rows of a matrix operand lie in memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from torch import fx
from tvm import tirx

from planish.backends.tvm.builder import Expr, as_int, equal, i32
from planish.backends.tvm.expr import Evaluator


@dataclass(frozen=True)
class Matrix:
    """Rows in memory: element ``(row, column)`` of a stage is at ``base + (row - first) * stride + column``."""

    buffer: Any
    base: Expr
    first: Expr
    stride: Expr

    def row(self, row: Expr) -> Expr:
        """Position of the row's first element."""
        return self.base + (row - self.first) * self.stride


def product(sizes: tuple[Expr, ...]) -> Expr:
    """Number of elements."""
    total: Expr = 1
    for s in sizes:
        total = total * s
    return total


def row_stride(ev: Evaluator, node: fx.Node, depth: int) -> tuple[fx.Node, Expr, Expr] | None:
    """Address of a matrix operand as (source, elements between rows, offset), its leading axes taken as one row axis.

    None where the last axis is not contiguous or the leading axes do not merge.
    """
    shape = ev.shape(node)
    over = tuple(tirx.Var(f"i{axis}", "int32") for axis in range(len(shape)))
    found = ev.affine(node, over, over)
    if found is None:
        return None
    source, (*strides, offset) = found
    if not equal(strides[-1], 1) and depth != 1:
        return None
    lead = [(s, n) for s, n in zip(strides[:-1], shape[:-1], strict=True) if as_int(n) != 1]
    for (outer, _), (inner, size) in itertools.pairwise(lead):
        if not equal(outer, inner * size):
            return None
    return source, (lead[-1][0] if lead else i32(depth)), offset
