"""Linear layers: packed weights, register tiles, and everything elementwise (and a layer norm) done on the tile."""

from __future__ import annotations

import sympy
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import TASKS, Expr, as_int, ceil_div, equal, i32, lanes_at, round_up
from planish.backends.tvm.expr import Evaluator
from planish.backends.tvm.index import unflatten_index
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Packed, Region, kernel, rows_in_parallel
from planish.backends.tvm.microkernel import call_tile, gemm_tile
from planish.backends.tvm.rowwise import normalise_row
from planish.program import Program
from planish.rules import aten

CHUNK_TILES = 4
"""Fewest row tiles in a chunk: the weights stream from the cache once per chunk, so a chunk must reuse them."""


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
    for (outer, _), (inner, size) in zip(lead, lead[1:], strict=False):
        if not equal(outer, inner * size):
            return None
    return source, (lead[-1][0] if lead else i32(depth)), offset


def lower_linear(module: Module, program: Program, region: Region, linear: fx.Node) -> Lowered:
    """Kernel of a region around a linear layer.

    before: ``layer_norm(gelu(linear(x, w, b)) + r)``
    after:  for each chunk of rows, for each block of columns, for each tile of rows: multiply, then bias, GELU and
            residual on the tile while it is in the first-level cache; then the norm of the chunk's rows.

    With few rows the column blocks are the parallel loop instead, and the norm a loop of its own.
    """
    x, weight = linear.args[:2]
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    columns, depth = (int(s) for s in weight.meta["val"].shape)
    tile = gemm_tile(module.target)
    width = tile.vectors * module.target.lanes
    norm = region.find({aten.layer_norm.default})
    packed = Packed(weight, "columns", width)
    with kernel(module, program, region, [(packed, "float32")], skip=(weight,)) as (k, out, (panels,)):
        access = row_stride(k.ev, x, depth)
        assert access is not None, "lower() has made the operand a matrix"
        source, stride, offset = access
        a, lead = k.ev.sources[source].buffer, k.ev.shape(linear)[:-1]
        rows = T.bind(product(lead) + i32(0))
        stored = norm.args[0] if norm is not None else region.result
        assert isinstance(stored, fx.Node)

        def block(first: Expr, count: Expr, column: Expr, vectors: int, tail: int) -> None:
            """Rows ``first .. first+count`` of the column block that starts at ``column``."""
            span = vectors * module.target.lanes
            with T.serial(0, ceil_div(count, tile.rows)) as t:
                row = T.bind(first + t * tile.rows)
                left = T.bind(count - t * tile.rows)
                begin = T.address_of(a[row * stride + offset])
                panel = T.address_of(panels[column * depth])
                target = T.address_of(out[row * columns + column])
                operands = (begin, panel, target, stride, i32(span), i32(columns), i32(depth))
                call_tile(module, tile, left, operands, vectors=vectors, tail_lanes=tail)
                if stored is not linear or linear.args[2:3] not in ((), (None,)):
                    with T.serial(0, T.min(left, tile.rows)) as i:
                        epilogue(k, linear, stored, out, T.bind(row + i), column, span, tail, lead)

        whole, rest = divmod(columns, width)
        vectors = -(-rest // module.target.lanes)
        blocks = whole + bool(rest)

        def column_block(first: Expr, count: Expr, index: Expr) -> None:
            if not rest:
                block(first, count, index * width, tile.vectors, 0)
                return
            if not whole:
                block(first, count, i32(0), vectors, columns % module.target.lanes)
                return
            with T.If(index < whole):
                with T.Then():
                    block(first, count, index * width, tile.vectors, 0)
                with T.Else():
                    block(first, count, i32(whole * width), vectors, columns % module.target.lanes)

        def norm_row(row: Expr) -> None:
            assert norm is not None
            k.ev.computed.clear()
            index = unflatten_index(lead, row) if lead else ()
            normalise_row(k, norm, out, row * columns, columns, index)

        with T.If(rows >= TASKS * CHUNK_TILES * tile.rows):
            with T.Then():
                most = max(1, module.target.l2_bytes // 2 // (4 * depth) // tile.rows) * tile.rows
                chunk = T.bind(T.min(round_up(ceil_div(rows, TASKS), tile.rows), most))
                with T.parallel(0, ceil_div(rows, chunk)) as c:
                    first = T.bind(c * chunk)
                    count = T.bind(T.min(chunk, rows - first))
                    with T.serial(0, blocks) as n:
                        column_block(first, count, n)
                    if norm is not None:
                        with T.serial(0, count) as i:
                            norm_row(T.bind(first + i))
            with T.Else():
                with T.parallel(0, blocks) as n:
                    column_block(i32(0), rows, n)
                if norm is not None:
                    with rows_in_parallel(rows) as row:
                        norm_row(row)
    m = sympy.prod(program.shape(linear)[:-1])
    flops = 2 * m * columns * depth
    shape = (int(m) if m.is_number else m, columns, depth)
    assert k.function.func is not None
    return Lowered("gemm", k.function.func, k.operands, "gemm", shape, flops)


def epilogue(
    k: Kernel,
    linear: fx.Node,
    stored: fx.Node,
    out: tirx.Buffer,
    row: Expr,
    column: Expr,
    span: int,
    tail: int,
    lead: tuple[Expr, ...],
) -> None:
    """Bias and elementwise chain on one row of a tile, in place; ``stored`` is the node whose value is kept."""
    lanes = k.lanes
    index = unflatten_index(lead, row) if lead else ()
    columns = k.ev.shape(linear)[-1]

    def element(at: Expr, count: int) -> None:
        place = lanes_at(row * columns + at, count)
        value = out[place]
        bias = linear.args[2] if len(linear.args) > 2 else None
        last = lanes_at(at, count)
        if isinstance(bias, fx.Node):
            value = value + k.ev.at(bias, (last,))
        k.ev.computed = {linear: T.bind(value)}
        T.buffer_store(out, k.ev.at(stored, (*index, last)), [place])

    for v in range(span // lanes - bool(tail)):
        element(column + v * lanes, lanes)
    if tail:
        with T.serial(0, tail) as j:
            element(column + (span - lanes) + j, 1)
    k.ev.computed = {}
