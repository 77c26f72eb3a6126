"""What each ATen op means to the CPU backend: four tables from op to index map, expression, generator or gather.

Every entry is one line or one small function; an op that is in none of the tables and has no kernel template
(``lower.py``) is unsupported, and is reported with its source line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm import vmath
from planish.backends.tvm.builder import Expr, as_int, dtype_of, equal, lanes_of, simplify, splat
from planish.backends.tvm.index import cast, flat_index, not_equal, unflatten_index
from planish.ops import argument, aten

if TYPE_CHECKING:
    from planish.backends.tvm.expr import Evaluator

Operand = Callable[[Any], Expr]
Index = tuple[Expr, ...]


# Elementwise: an expression over operands ------------------------------------------------------------------------


def match_lanes(values: list[Expr]) -> list[Expr]:
    """The values with scalars spread over the lanes of the widest one."""
    lanes = max(lanes_of(v) for v in values)
    return [splat(v, lanes) if lanes > 1 and lanes_of(v) == 1 else v for v in values]


def _operands(node: fx.Node, operand: Operand, dtype: torch.dtype, count: int) -> list[Expr]:
    return match_lanes([cast(operand(a), dtype) for a in node.args[:count]])


def _unary(function: Callable[[Expr], Expr]) -> Callable[[fx.Node, Operand], Expr]:
    return lambda node, operand: function(cast(operand(node.args[0]), node.meta["val"].dtype))


def _scaled(value: Expr, alpha: float, dtype: torch.dtype) -> Expr:
    return value if alpha == 1 else value * splat(cast(alpha, dtype), lanes_of(value))


def _arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: bools as bytes, where + is "or" and * is "and" once the result is a bool again."""
    return torch.uint8 if dtype is torch.bool else dtype


def _binary(function: Callable[[Expr, Expr], Expr]) -> Callable[[fx.Node, Operand], Expr]:
    def run(node: fx.Node, operand: Operand) -> Expr:
        dtype = node.meta["val"].dtype
        a, b = _operands(node, operand, _arithmetic_dtype(dtype), 2)
        return cast(function(a, _scaled(b, argument(node, 2, "alpha", 1), dtype)), dtype)

    return run


def _reversed_sub(node: fx.Node, operand: Operand) -> Expr:
    dtype = node.meta["val"].dtype
    a, b = _operands(node, operand, dtype, 2)
    return b - _scaled(a, argument(node, 2, "alpha", 1), dtype)


def _compare(function: Callable[[Expr, Expr], Expr]) -> Callable[[fx.Node, Operand], Expr]:
    def run(node: fx.Node, operand: Operand) -> Expr:
        samples = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args[:2]]
        samples = [torch.empty((1,) * v.dim(), dtype=v.dtype) if isinstance(v, torch.Tensor) else v for v in samples]
        return function(*_operands(node, operand, _arithmetic_dtype(torch.result_type(*samples)), 2))

    return run


def _logical(function: Callable[[Expr, Expr], Expr]) -> Callable[[fx.Node, Operand], Expr]:
    return lambda node, operand: function(*_operands(node, operand, torch.bool, 2))


def _bitwise(
    logical: Callable[[Expr, Expr], Expr], bits: Callable[[Expr, Expr], Expr]
) -> Callable[[fx.Node, Operand], Expr]:
    def run(node: fx.Node, operand: Operand) -> Expr:
        dtype = node.meta["val"].dtype
        return (logical if dtype is torch.bool else bits)(*_operands(node, operand, dtype, 2))

    return run


def _not(node: fx.Node, operand: Operand) -> Expr:
    value = cast(operand(node.args[0]), torch.bool)
    return tirx.Not(value)


def _where(node: fx.Node, operand: Operand) -> Expr:
    dtype = node.meta["val"].dtype
    condition, a, b = node.args[:3]
    return tirx.Select(
        *match_lanes([cast(operand(condition), torch.bool), cast(operand(a), dtype), cast(operand(b), dtype)])
    )


def _masked_fill(node: fx.Node, operand: Operand) -> Expr:
    dtype = node.meta["val"].dtype
    x, mask, value = node.args[:3]
    return tirx.Select(
        *match_lanes([cast(operand(mask), torch.bool), cast(operand(value), dtype), cast(operand(x), dtype)])
    )


def _clamp(node: fx.Node, operand: Operand) -> Expr:
    """The bound comes first in max and min ("a > b ? a : b"), so that NaN stays."""
    dtype = node.meta["val"].dtype
    value = cast(operand(node.args[0]), dtype)
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if low is not None:
        value = T.max(*match_lanes([cast(operand(low), dtype), value]))
    if high is not None:
        value = T.min(*match_lanes([cast(operand(high), dtype), value]))
    return value


def _gelu(x: Expr, node: fx.Node) -> Expr:
    return vmath.gelu_tanh(x) if argument(node, 1, "approximate", "none") == "tanh" else vmath.gelu(x)


def _power(node: fx.Node, operand: Operand) -> Expr:
    dtype = node.meta["val"].dtype
    x, exponent = T.bind(cast(operand(node.args[0]), dtype)), operand(node.args[1])
    if exponent in (0, 1, 2, 3, 4) or not dtype.is_floating_point:
        value = one(x)
        for _ in range(int(exponent)):
            value = value * x
        return value
    if exponent in (0.5, -0.5):
        root = T.sqrt(x)
        return root if exponent > 0 else one(x) / root
    return T.pow(*match_lanes([x, cast(exponent, dtype)]))


def zero(value: Expr) -> Expr:
    """0 of the value's type and lanes."""
    return splat(tirx.const(0, dtype_of(value)), lanes_of(value))


def one(value: Expr) -> Expr:
    """1 of the value's type and lanes."""
    return splat(tirx.const(1, dtype_of(value)), lanes_of(value))


def _relu(x: Expr) -> Expr:
    return T.max(zero(x), x)


def _ordered(pick: Callable[[Expr, Expr], Expr]) -> Callable[[Expr, Expr], Expr]:
    """Maximum or minimum that yields NaN if either operand is NaN."""

    def run(a: Expr, b: Expr) -> Expr:
        a, b = T.bind(a), T.bind(b)
        return tirx.Select(T.isnan(a), a, pick(a, b)) if "float" in dtype_of(a) else pick(a, b)

    return run


ELEMENTWISE: dict[Any, Callable[[fx.Node, Operand], Expr]] = {
    aten.add.Tensor: _binary(lambda a, b: a + b),
    aten.add.Scalar: _binary(lambda a, b: a + b),
    aten.sub.Tensor: _binary(lambda a, b: a - b),
    aten.sub.Scalar: _binary(lambda a, b: a - b),
    aten.rsub.Scalar: _reversed_sub,
    aten.mul.Tensor: _binary(lambda a, b: a * b),
    aten.mul.Scalar: _binary(lambda a, b: a * b),
    aten.div.Tensor: _binary(lambda a, b: a / b),
    aten.div.Scalar: _binary(lambda a, b: a / b),
    aten.maximum.default: _binary(_ordered(lambda a, b: T.max(a, b))),
    aten.minimum.default: _binary(_ordered(lambda a, b: T.min(a, b))),
    aten.neg.default: _unary(lambda x: -x),
    aten.abs.default: _unary(lambda x: T.abs(x)),
    aten.exp.default: _unary(vmath.exp),
    aten.erf.default: _unary(vmath.erf),
    aten.tanh.default: _unary(vmath.tanh),
    aten.sigmoid.default: _unary(vmath.sigmoid),
    aten.silu.default: _unary(vmath.silu),
    aten.relu.default: _unary(_relu),
    aten.gelu.default: lambda node, operand: _gelu(operand(node.args[0]), node),
    aten.sqrt.default: _unary(lambda x: T.sqrt(x)),
    aten.rsqrt.default: _unary(lambda x: splat(1.0, lanes_of(x)) / T.sqrt(x)),
    aten.reciprocal.default: _unary(lambda x: splat(1.0, lanes_of(x)) / x),
    aten.pow.Tensor_Scalar: _power,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.eq.Tensor: _compare(lambda a, b: tirx.EQ(a, b)),
    aten.eq.Scalar: _compare(lambda a, b: tirx.EQ(a, b)),
    aten.ne.Tensor: _compare(not_equal),
    aten.ne.Scalar: _compare(not_equal),
    aten.lt.Tensor: _compare(lambda a, b: a < b),
    aten.lt.Scalar: _compare(lambda a, b: a < b),
    aten.le.Tensor: _compare(lambda a, b: a <= b),
    aten.le.Scalar: _compare(lambda a, b: a <= b),
    aten.gt.Tensor: _compare(lambda a, b: a > b),
    aten.gt.Scalar: _compare(lambda a, b: a > b),
    aten.ge.Tensor: _compare(lambda a, b: a >= b),
    aten.ge.Scalar: _compare(lambda a, b: a >= b),
    aten.logical_and.default: _logical(lambda a, b: tirx.And(a, b)),
    aten.logical_or.default: _logical(lambda a, b: tirx.Or(a, b)),
    aten.logical_not.default: _not,
    aten.__and__.Tensor: _bitwise(lambda a, b: tirx.And(a, b), lambda a, b: a & b),
    aten.__or__.Tensor: _bitwise(lambda a, b: tirx.Or(a, b), lambda a, b: a | b),
    aten.bitwise_and.Tensor: _bitwise(lambda a, b: tirx.And(a, b), lambda a, b: a & b),
    aten.bitwise_or.Tensor: _bitwise(lambda a, b: tirx.Or(a, b), lambda a, b: a | b),
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.where.Scalar: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten._to_copy.default: _unary(lambda x: x),
}

FLOAT_ONLY = {
    aten.exp.default,
    aten.erf.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.gelu.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
}
"""Ops whose vector code is fp32."""


# Views: where in the operand an element of the result lies ---------------------------------------------------------


def _reshape(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    return node.args[0], regroup(ev.shape(node), ev.shape(node.args[0]), index)  # pyright: ignore


def regroup(shape: Index, other: Index, index: Index) -> Index:
    """The index in ``other`` of the element at ``index`` in ``shape``, both row-major over the same elements.

    Axes with equal sizes are taken over; only the groups of axes that are merged or split need arithmetic.
    """
    result: list[Expr] = []
    i = j = 0
    while i < len(shape) or j < len(other):
        i0, j0 = i, j
        i, j = min(i + 1, len(shape)), min(j + 1, len(other))
        while not equal(_product(shape[i0:i]), _product(other[j0:j])) and (i < len(shape) or j < len(other)):
            left, right = as_int(_product(shape[i0:i])), as_int(_product(other[j0:j]))
            grow = j == len(other) or (i < len(shape) and left is not None and (right is None or left < right))
            i, j = (i + 1, j) if grow else (i, j + 1)
        if i - i0 == 1 and j - j0 == 1:
            result.append(index[i0])
        else:
            result.extend(unflatten_index(other[j0:j], flat_index(shape[i0:i], index[i0:i])))
    return tuple(result)


def _product(sizes: tuple[Expr, ...]) -> Expr:
    total: Expr = 1
    for s in sizes:
        total = total * s
    return simplify(total)


def _permute(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    order = [d % len(index) for d in node.args[1]]  # pyright: ignore
    return node.args[0], tuple(index[order.index(axis)] for axis in range(len(index)))


def _transpose(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    a, b = (d % len(index) for d in node.args[1:3])  # pyright: ignore
    swapped = list(index)
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return node.args[0], tuple(swapped)


def _unsqueeze(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    axis = node.args[1] % len(index)  # pyright: ignore
    return node.args[0], index[:axis] + index[axis + 1 :]


def _squeeze(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    """The axes that are gone have index 0; which they are follows from the shapes."""
    shape = ev.shape(node.args[0])  # pyright: ignore
    dims = node.args[1] if len(node.args) > 1 else range(len(shape))
    named = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)}  # pyright: ignore
    rest = iter(index)
    return node.args[0], tuple(0 if a in named and as_int(s) == 1 else next(rest) for a, s in enumerate(shape))


def _expand(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    shape = ev.shape(node.args[0])  # pyright: ignore
    tail = index[len(index) - len(shape) :]
    return node.args[0], tuple(0 if as_int(s) == 1 else i for s, i in zip(shape, tail, strict=True))


def _slice(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    axis = argument(node, 1, "dim", 0) % len(index)
    start, step = argument(node, 2, "start", 0) or 0, argument(node, 4, "step", 1)
    size = ev.shape(node.args[0])[axis]  # pyright: ignore
    first = ev.at(start, ())
    if isinstance(first, int) and isinstance(size, int):
        first = min(max(first + size if first < 0 else first, 0), size)
    elif isinstance(first, int) and first < 0:
        first = T.max(first + size, 0)
    moved = index[axis] * splat(step, lanes_of(index[axis]), "int32") if step != 1 else index[axis]
    return node.args[0], (*index[:axis], simplify(moved + first), *index[axis + 1 :])


def _select(ev: Evaluator, node: fx.Node, index: Index) -> tuple[Any, Index]:
    axis = node.args[1] % (len(index) + 1)  # pyright: ignore
    at = ev.at(node.args[2], ())
    if isinstance(at, int) and at < 0:
        at = at + ev.shape(node.args[0])[axis]  # pyright: ignore
    return node.args[0], (*index[:axis], at, *index[axis:])


VIEWS: dict[Any, Callable[[Any, fx.Node, Index], tuple[Any, Index]]] = {
    aten.reshape.default: _reshape,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: lambda ev, node, index: (node.args[0], tuple(reversed(index))),
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
}


def _push_reshape(ev: Evaluator, node: fx.Node, index: Index) -> Index:
    return regroup(ev.shape(node.args[0]), ev.shape(node), index)  # pyright: ignore


PUSH: dict[Any, Callable[[Any, fx.Node, Index], Index]] = {
    aten.reshape.default: _push_reshape,
    aten.permute.default: lambda ev, node, index: tuple(index[d % len(index)] for d in node.args[1]),  # pyright: ignore
    aten.transpose.int: lambda ev, node, index: _transpose(ev, node, index)[1],
}
"""Views turned round: where an element of the operand lies in the result."""


# Generators: values made from the index alone ------------------------------------------------------------------------


def _arange(ev: Evaluator, node: fx.Node, index: Index) -> Expr:
    start, step = (0, 1) if len(node.args) == 1 else (ev.at(node.args[0], ()), argument(node, 2, "step", 1))
    dtype = node.meta["val"].dtype
    lanes = lanes_of(index[0])
    value = cast(index[0], dtype)
    if step != 1:
        value = value * splat(cast(step, dtype), lanes)
    return value if isinstance(start, int) and start == 0 else value + splat(cast(start, dtype), lanes)


def _constant(at: int | float) -> Callable[[Any, fx.Node, Index], Expr]:
    return lambda ev, node, index: at


def _filled(position: int) -> Callable[[Any, fx.Node, Index], Expr]:
    return lambda ev, node, index: ev.at(node.args[position], ())


GENERATORS: dict[Any, Callable[[Any, fx.Node, Index], Expr]] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.full.default: _filled(1),
    aten.full_like.default: _filled(1),
    aten.scalar_tensor.default: _filled(0),
    aten.ones.default: _constant(1),
    aten.new_ones.default: _constant(1),
    aten.ones_like.default: _constant(1),
    aten.zeros.default: _constant(0),
    aten.new_zeros.default: _constant(0),
    aten.zeros_like.default: _constant(0),
}


# Gathers: the place in the operand is itself read from a tensor -------------------------------------------------------


def _embedding(ev: Evaluator, node: fx.Node, index: Index) -> Expr:
    weight, ids = node.args[:2]
    row = ev.checked(ev.at(ids, index[:-1]), ids, ev.shape(weight)[0])  # pyright: ignore
    return ev.at(weight, (row, index[-1]))


def _index(ev: Evaluator, node: fx.Node, index: Index) -> Expr:
    """Indexing by tensors on neighbouring axes (``index_reason`` excludes the rest)."""
    source, tensors = node.args[:2]
    shape = ev.shape(source)  # pyright: ignore
    used = [i for i, t in enumerate(tensors) if t is not None]  # pyright: ignore
    rank = max(len(ev.shape(tensors[i])) for i in used)  # pyright: ignore
    first = used[0]
    grid = index[first : first + rank]
    places: list[Expr] = []
    for axis in used:
        own = ev.shape(tensors[axis])  # pyright: ignore
        part = tuple(0 if as_int(s) == 1 else i for s, i in zip(own, grid[rank - len(own) :], strict=True))
        places.append(ev.checked(ev.at(tensors[axis], part), tensors[axis], shape[axis], wrap=True))  # pyright: ignore
    return ev.at(source, (*index[:first], *places, *index[first + rank :]))


def _gather(ev: Evaluator, node: fx.Node, index: Index) -> Expr:
    source, axis, ids = node.args[:3]
    shape = ev.shape(source)  # pyright: ignore
    axis = axis % len(shape)  # pyright: ignore
    place = ev.checked(ev.at(ids, index), ids, shape[axis])  # pyright: ignore
    return ev.at(source, (*index[:axis], place, *index[axis + 1 :]))


def _index_select(ev: Evaluator, node: fx.Node, index: Index) -> Expr:
    source, axis, ids = node.args[:3]
    shape = ev.shape(source)  # pyright: ignore
    axis = axis % len(shape)  # pyright: ignore
    place = ev.checked(ev.at(ids, (index[axis],)), ids, shape[axis])  # pyright: ignore
    return ev.at(source, (*index[:axis], place, *index[axis + 1 :]))


GATHERS: dict[Any, Callable[[Any, fx.Node, Index], Expr]] = {
    aten.embedding.default: _embedding,
    aten.index.Tensor: _index,
    aten.gather.default: _gather,
    aten.index_select.default: _index_select,
}


def index_reason(node: fx.Node) -> str | None:
    """Why an ``index.Tensor`` call is not a gather of this table, or None."""
    tensors = node.args[1]
    used = [i for i, t in enumerate(tensors) if t is not None]  # pyright: ignore
    if any(tensors[i].meta["val"].dtype in (torch.bool, torch.uint8) for i in used):  # pyright: ignore
        return "indexing by a mask gives a shape that depends on data"
    if used != list(range(used[0], used[-1] + 1)):
        return "the indexed axes are not neighbours"
    return None
