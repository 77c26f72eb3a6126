"""Scalar semantics of the graph: the value of any node of a region at an index, as a TIR expression.

View-like ops are index maps, so they cost nothing and never become kernels of their own inside a region; elementwise
ops are expressions over their operands; sources are buffers in memory. The index of the last axis may be a vector
(``lanes_at``), and then so is the value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import tvm.sym
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, dtype_of, equal, i32, keep, lanes_of, simplify
from planish.backends.tvm.index import as_value, broadcast_index, cast, flat_index, to_tir
from planish.backends.tvm.maps import GATHERS, GENERATORS, JOINS, VIEWS
from planish.backends.tvm.scalars import DIVISIONS, ELEMENTWISE
from planish.ops import aten
from planish.program import Program

OUT_OF_RANGE = 1
"""Status word after an index read from memory was out of range."""

DIVISION_BY_ZERO = 3
"""Status word after an integer was divided by 0."""


class NeedsScalarLanes(Exception):
    """A region's value cannot be computed a vector at a time; it is built again one element at a time."""


@dataclass(frozen=True)
class Source:
    """A tensor in memory: a flat TIR buffer and the tensor's contiguous shape."""

    buffer: Any
    shape: tuple[Expr, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Rows:
    """The current row of a tensor that is being computed: a flat buffer and the position of the row's first element."""

    buffer: Any
    start: Expr


@dataclass
class Evaluator:
    """Values of the nodes of one region.

    Attributes:
        program: the graph's dims, for symbolic sizes.
        dims: TIR variable of each dynamic dim.
        sources: nodes whose values are in memory.
        computed: nodes whose value at the current index is already known.
        rows: nodes whose current row lies in memory of the kernel's own.
        status: one-element int32 buffer for ``OUT_OF_RANGE`` and ``DIVISION_BY_ZERO``.
    """

    program: Program
    dims: Mapping[str, Expr]
    sources: dict[fx.Node, Source]
    status: Any = None
    computed: dict[fx.Node, Expr] = field(default_factory=dict[fx.Node, Expr])
    rows: dict[fx.Node, Rows] = field(default_factory=dict[fx.Node, Rows])
    flat: bool = False
    _known: dict[Any, tuple[Expr, tuple[Expr, ...]]] | None = None

    def size(self, value: Any) -> Expr:
        """A size (int, symbolic int, node or sympy expression) as a Python int or TIR expression."""
        expr = value if isinstance(value, (int, sympy.Expr)) else self.program.size(value)
        return expr if isinstance(expr, int) else to_tir(expr, self.dims)

    def flatten(self, size: Expr) -> None:
        """From here on, see every tensor as one axis of ``size`` elements (elementwise regions of one shape)."""
        self.flat = True
        self.sources = {n: Source(s.buffer, (size,), s.dtype) for n, s in self.sources.items()}

    def shape(self, node: fx.Node) -> tuple[Expr, ...]:
        """Shape of a node's value."""
        return tuple(self.size(s) for s in self.program.shape(node))

    def at(self, node: Any, index: tuple[Expr, ...]) -> Expr:
        """Value of ``node`` (or of a Python scalar) at ``index``."""
        if not isinstance(node, fx.Node):
            return node
        if node in self.computed:
            return self.computed[node]
        if node in self.rows:
            return T.bind(self.rows[node].buffer[simplify(self.rows[node].start + index[-1])])
        if not isinstance(node.meta["val"], torch.Tensor):
            return self.size(node)
        if self._known is not None:
            return self._shared(node, index)
        self._known = {}
        try:
            return self._shared(node, index)
        finally:
            self._known = None

    def _shared(self, node: fx.Node, index: tuple[Expr, ...]) -> Expr:
        """A value that several ops of the region read is computed once."""
        assert self._known is not None
        key = (node, *map(id, index))
        if key not in self._known:
            self._known[key] = (self._value(node, index), index)  # the index is kept, so that its ids stay taken
        return self._known[key][0]

    @contextmanager
    def branch(self) -> Iterator[None]:
        """A branch of the code being written: what it computes is not known after it."""
        known = self._known
        self._known = dict(known or {})
        yield
        self._known = known

    def _value(self, node: fx.Node, index: tuple[Expr, ...]) -> Expr:
        if node in self.sources:
            return self.load(node, index)
        if node.target in VIEWS:
            return self.at(*VIEWS[node.target](self, node, index))
        if node.target in GENERATORS:
            return cast(GENERATORS[node.target](self, node, index), node.meta["val"].dtype)
        if node.target in GATHERS:
            return GATHERS[node.target](self, node, index)
        if node.target in JOINS:
            return JOINS[node.target](self, node, index)
        value = self.elementwise(node, index)
        return keep(value) if node.meta["val"].is_floating_point() or len(node.users) > 1 else value

    def elementwise(self, node: fx.Node, index: tuple[Expr, ...]) -> Expr:
        """Value of an elementwise node; operands are broadcast to its shape."""
        full = self.shape(node)

        def operand(arg: Any) -> Expr:
            if not isinstance(arg, fx.Node) or not isinstance(arg.meta["val"], torch.Tensor):
                return self.at(arg, ())
            if self.flat:
                return self.at(arg, index)
            return self.at(arg, broadcast_index(self.shape(arg), full, index))

        dtype = node.meta["val"].dtype
        if node.target in DIVISIONS and not dtype.is_floating_point:
            self._check_divisor(cast(operand(node.args[1]), dtype))
        return cast(ELEMENTWISE[node.target](node, operand), dtype)

    def _check_divisor(self, value: Expr) -> None:
        """An integer that something is divided by: 0 sets the status."""
        if isinstance(value, tirx.IntImm) and value.value:
            return
        if lanes_of(value) > 1:
            raise NeedsScalarLanes
        with T.If(tirx.EQ(keep(value), tirx.const(0, dtype_of(value)))), T.Then():
            T.buffer_store(self.status, i32(DIVISION_BY_ZERO), [0])

    def load(self, node: fx.Node, index: tuple[Expr, ...]) -> Expr:
        """Read a source; contiguous lanes become one vector load, lanes that agree one scalar load."""
        source = self.sources[node]
        where = flat_index(source.shape, index)
        if lanes_of(where) > 1 and isinstance(where, tirx.Broadcast):
            where = where.value
        return as_value(T.bind(source.buffer[where]), source.dtype)

    def scalar(self, place: Expr) -> Expr:
        """A place along an axis that all lanes share; a region where it differs is built again with one lane."""
        if lanes_of(place) > 1:
            raise NeedsScalarLanes
        return place

    def affine(
        self, node: fx.Node, index: tuple[Expr, ...], over: tuple[Any, ...]
    ) -> tuple[fx.Node, list[Expr]] | None:
        """Address of ``node`` at ``index`` as source, coefficients of the variables ``over``, and offset, in elements.

        Returns None where the address is not linear or the node is not a view of a source.
        """
        while node not in self.sources:
            if node.target not in VIEWS:
                return None
            node, index = VIEWS[node.target](self, node, index)
        flat = flat_index(self.sources[node].shape, index)
        found = tvm.sym.detect_linear_equation(flat if not isinstance(flat, int) else i32(flat), list(over))
        return (node, [simplify(c) for c in found]) if len(found) else None

    def checked(self, value: Expr, node: fx.Node, size: Expr, *, wrap: bool = False) -> Expr:
        """An index read from the tensor ``node``, made safe: out of range sets the status and reads element 0.

        With ``wrap`` negative indices count from the end.
        """
        base = node
        while base.target in VIEWS:
            base = base.args[0]  # pyright: ignore
        if base.target is aten.arange.default and equal(self.size(base.args[0]), size):
            return cast(value, torch.int32)
        if lanes_of(value) > 1:
            raise NeedsScalarLanes
        limit = tirx.Cast("int64", size if not isinstance(size, int) else i32(size))
        # Memory of their own keeps TVM from inlining these expressions into each other, which grows exponentially.
        wide, place = T.alloc_buffer((1,), "int64"), T.alloc_buffer((1,), "int32")
        T.buffer_store(wide, cast(value, torch.int64), [0])
        if wrap:
            T.buffer_store(wide, tirx.Select(wide[0] < 0, wide[0] + limit, wide[0]), [0])
        with T.If(tirx.Or(wide[0] < 0, wide[0] >= limit)), T.Then():
            T.buffer_store(self.status, i32(OUT_OF_RANGE), [0])
            T.buffer_store(wide, tirx.const(0, "int64"), [0])
        T.buffer_store(place, tirx.Cast("int32", wide[0]), [0])
        return T.bind(place[0])
