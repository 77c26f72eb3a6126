"""Writing TIR from plain Python: functions with a C ABI, vectors, and the few helpers every kernel uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import tvm
import tvm.sym
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

Expr = Any
"""A TIR expression or a Python number; TVM's Python classes carry no useful static types."""

TASKS = 16
"""Tasks per parallel region that need scratch memory of their own: enough to balance the load of a few cores."""

analyzer = tvm.sym.Analyzer()


@dataclass
class Function:
    """A TIR function under construction: pointer parameters, then int32 scalars; the result is an int32."""

    func: tirx.PrimFunc | None = None
    body: ExitStack = field(default_factory=ExitStack)

    def parameters(self, pointers: Sequence[str], scalars: int, *, align: int = 64) -> tuple[list[Any], list[Any]]:
        """Declare all parameters, once, at the start of the body.

        Args:
            pointers: element type of each pointer; it is seen as a flat buffer.
            scalars: number of int32 scalars.
            align: bytes to which the code may assume the pointers to be aligned.
        """
        handles = [T.arg(f"p{i}", T.handle(dtype)) for i, dtype in enumerate(pointers)]
        numbers = [T.arg(f"n{i}", T.int32()) for i in range(scalars)]
        # what TVM asks for before it allocates scratch memory: device 0 of kind 1, the CPU
        self.body.enter_context(T.attr(i32(0), "device_id", i32(0)))
        self.body.enter_context(T.attr(i32(0), "device_type", i32(1)))
        buffers = [
            T.decl_buffer((1 << 30,), dtype, data=handle, align=align)
            for dtype, handle in zip(pointers, handles, strict=True)
        ]
        return buffers, numbers


@contextmanager
def function(symbol: str | None = None) -> Iterator[Function]:
    """Build one function; ``symbol`` exports it under that C name, otherwise it is private to the module."""
    building = Function()
    with IRBuilder() as builder, T.prim_func(is_private=symbol is None, s_tir=True):
        T.func_name(symbol or "kernel")
        T.func_ret(tvm.ir.PrimType("int32"))
        attributes: dict[str, Any] = {"tirx.noalias": True}
        T.func_attr(attributes | ({"global_symbol": symbol} if symbol else {}))
        with building.body:
            yield building
        T.add_to_parent(tirx.Return(i32(0)))
    building.func = builder.get()


def i32(value: int) -> Expr:
    """An int32 constant."""
    return tirx.const(value, "int32")


def f32(value: float) -> Expr:
    """An fp32 constant."""
    return tirx.const(value, "float32")


def splat(value: Expr, lanes: int, dtype: str = "float32") -> Expr:
    """``value`` in every lane; a value that has that many lanes already is left alone."""
    scalar = tirx.const(value, dtype) if isinstance(value, (int, float)) else value
    return scalar if lanes_of(scalar) == lanes else T.broadcast(scalar, lanes)


def lanes_at(start: Expr, lanes: int) -> Expr:
    """Index of ``lanes`` consecutive elements from ``start``."""
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def lanes_of(value: Expr) -> int:
    """Number of vector lanes of an expression."""
    return value.ty.dtype.lanes if hasattr(value, "ty") else 1


def dtype_of(value: Expr) -> str:
    """Element type of an expression, without its lanes."""
    return str(value.ty).split("x")[0] if hasattr(value, "ty") else "int32"


def ceil_div(a: Expr, b: Expr) -> Expr:
    """ceil(a / b) for non-negative ints or expressions."""
    return -(-a // b) if isinstance(a, int) and isinstance(b, int) else T.floordiv(a + (b - 1), b)


def round_up(a: Expr, b: int) -> Expr:
    """The smallest multiple of ``b`` that is at least ``a``."""
    return ceil_div(a, b) * b


def simplify(value: Expr) -> Expr:
    """The expression in TVM's canonical form."""
    return value if isinstance(value, int) else analyzer.simplify(value)


def equal(a: Expr, b: Expr) -> bool:
    """Whether two sizes are provably equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(analyzer.can_prove_equal(a, b))


def as_int(value: Expr) -> int | None:
    """The value of a constant expression, else None."""
    value = simplify(value)
    return value if isinstance(value, int) else int(value.value) if isinstance(value, tirx.IntImm) else None


def keep(value: Expr) -> Expr:
    """The value, computed once: through memory of the kernel's own, which LLVM makes a register.

    ``T.bind`` is not enough for what is computed from bound values: TVM substitutes each into all its uses, again and
    again, which grows exponentially. It also hides integers from TVM's interval analysis, which fails on some.
    """
    if isinstance(value, (int, tirx.IntImm)):
        return value
    lanes, boolean = lanes_of(value), dtype_of(value) == "bool"
    place = T.alloc_buffer((lanes,), "uint8" if boolean else dtype_of(value))
    whole = lanes_at(i32(0), lanes)
    if boolean:  # not a cast: TVM's interval analysis fails on casts of bool vectors
        value = tirx.Select(value, splat(1, lanes, "uint8"), splat(0, lanes, "uint8"))
    T.buffer_store(place, value, [whole])
    return tirx.NE(place[whole], splat(0, lanes, "uint8")) if boolean else T.bind(place[whole])


def for_vectors(extent: Expr, lanes: int) -> Iterator[tuple[Expr, int]]:
    """Emit loops over ``0..extent`` by whole vectors, then element by element; yields (start, lanes) for each body.

    A body is written once per yield: ``for start, n in for_vectors(size, 16): …``.
    """
    if lanes == 1:
        with T.serial(0, extent) as element:
            yield element, 1
        return
    known = as_int(extent)
    whole = extent // lanes if isinstance(extent, int) else T.floordiv(extent, lanes)
    if known is None or known >= lanes:
        with T.serial(0, whole) as block:
            yield block * lanes, lanes
    if known is None or known % lanes:
        with T.serial(0, extent - whole * lanes) as rest:
            yield whole * lanes + rest, 1


def horizontal(vector: Expr, lanes: int, combine: Any) -> Expr:
    """Combine all lanes of a vector pairwise, in a fixed order."""
    while lanes > 1:
        half = lanes // 2
        low = T.Shuffle([vector], [i32(i) for i in range(half)])
        high = T.Shuffle([vector], [i32(i) for i in range(half, lanes)])
        vector, lanes = T.bind(combine(low, high)), half
    return vector


def transpose(rows: list[Expr], lanes: int) -> list[Expr]:
    """Transpose ``lanes`` vectors of ``lanes`` values in registers: log2(lanes) rounds of pairwise block exchanges."""
    step = lanes // 2
    while step:
        low = [j if not j & step else lanes + j - step for j in range(lanes)]
        high = [j + step if not j & step else lanes + j for j in range(lanes)]
        exchanged = list(rows)
        for i in range(lanes):
            if not i & step:
                pair = [rows[i], rows[i + step]]
                exchanged[i] = T.bind(T.Shuffle(pair, [i32(j) for j in low]))
                exchanged[i + step] = T.bind(T.Shuffle(pair, [i32(j) for j in high]))
        rows = exchanged
        step //= 2
    return rows


def workspace(elements: int, dtype: str = "float32") -> Any:
    """Scratch memory of a parallel task, as a flat buffer of fixed size.

    The launcher keeps it per thread, so the next task of the thread finds it in its cache.
    """
    return T.alloc_buffer((elements,), dtype)
