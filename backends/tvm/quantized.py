"""Linear layers on integer codes: the rows become codes first, then tiles of packed weights multiply them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, ceil_div, f32, for_vectors, horizontal, i32, keep, lanes_at, splat
from planish.backends.tvm.gemm import product, row_stride
from planish.backends.tvm.integer_tile import (
    LANES,
    UNIT,
    activation_dtype,
    build_integer_tile,
    sum_factor,
    tile_rows,
    tile_vectors,
)
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Packed, Region, Scratch, kernel, rows_in_parallel
from planish.backends.tvm.vmath import fused_multiply_add
from planish.formats import LARGEST_CODE, TINY, Format, WeightFormat
from planish.program import Program

ROWS_PER_TASK = 96
"""Rows that share a panel of weights while it is in the first-level cache."""

PANELS_PER_TASK = 8
"""Panels of weights that share a chunk of rows while it is in the second-level cache."""


def quantized_reason(node: fx.Node) -> str | None:
    """Why a ``planish::quantized_linear`` has no kernel, or None."""
    form = Format.parse(str(node.args[6]))
    depth = int(node.args[1].meta["val"].shape[1])  # pyright: ignore
    if form.activation == "fp":
        return f"the format {form.name} keeps activations in fp32, which has no kernel yet"
    most = (1 << 31) // (LARGEST_CODE << form.weight.bits)
    if (form.weight.group or depth) > most:
        return f"sums of {depth} products of {form.weight.bits} bits do not fit 32 bits: use a format with groups"
    constants = [a for a in node.args[1:4] if a is not None]
    if any(a.op != "get_attr" for a in constants):  # pyright: ignore
        return "its codes, scales and minimums must be constants"
    return None


@dataclass(frozen=True)
class _Layer:
    """One layer: its op, format and sizes; ``depth`` is filled up to whole units."""

    node: fx.Node
    form: Format
    columns: int
    depth: int

    @staticmethod
    def of(node: fx.Node) -> _Layer:
        columns, depth = (int(s) for s in node.args[1].meta["val"].shape)  # pyright: ignore
        return _Layer(node, Format.parse(str(node.args[6])), columns, depth)

    @property
    def weight(self) -> WeightFormat:
        return self.form.weight

    @property
    def units(self) -> int:
        return -(-self.depth // UNIT)

    @property
    def row_words(self) -> int:
        """int32 words of a row of activations' codes."""
        return self.units * UNIT // (2 if activation_dtype(self.weight) == "int16" else 4)

    @property
    def groups(self) -> int:
        return self.weight.groups(self.depth)


def lower_quantized(module: Module, program: Program, region: Region, node: fx.Node) -> Lowered:
    """Kernel of ``planish::quantized_linear``.

    before: ``quantized_linear(x, codes, scales, minimums, bias, input_scale, "w4a8-g32")``
    after:  for each row: its largest magnitude, codes, their sums by group; then for each chunk of rows and panels of
            columns: for each panel, for each tile of rows: integer products, scales, bias
    """
    layer = _Layer.of(node)
    _, codes, scales, minimums, bias, _, _ = node.args
    rows = product(program.shape(node)[:-1])
    number = "float16" if layer.weight.group else "float32"
    name = layer.weight.name
    extra: list[tuple[Any, str]] = [(Packed(codes, f"codes {name}", 0), "uint8")]  # pyright: ignore
    extra += [(Packed(n, f"numbers {name}", 0), number) for n in (scales, minimums) if n is not None]  # pyright: ignore
    constants = [n for n in (codes, scales, minimums) if n is not None]
    extra += [
        (Scratch(4 * rows * layer.row_words), activation_dtype(layer.weight)),
        (Scratch(4 * rows * layer.groups), "int32"),
        (Scratch(4 * rows), "float32"),
    ]
    with kernel(module, program, region, extra, skip=constants) as (k, out, given):  # pyright: ignore
        count = T.bind(product(k.ev.shape(node)[:-1]) + i32(0))
        *weights, of_rows, sums, row_scales = given
        _Quantise(k, layer, of_rows, sums, row_scales).emit(count)
        _multiply(k, layer, weights, (of_rows, sums, row_scales), out, count, bias)
    assert k.function.func is not None
    shape = (rows, layer.columns, layer.depth)
    flops = sympy.Integer(2) * rows * layer.columns * layer.depth
    return Lowered(f"linear_{layer.form.name.replace('-', '_')}", k.function.func, k.operands, "qgemm", shape, flops)


@dataclass
class _Quantise:
    """Code that turns the rows of x into codes, their sums and their scales; the reference is ``quantise_rows``."""

    k: Kernel
    layer: _Layer
    codes: Any
    sums: Any
    row_scales: Any

    def emit(self, rows: Expr) -> None:
        """All rows, in parallel."""
        x = self.layer.node.args[0]
        assert isinstance(x, fx.Node)
        access = row_stride(self.k.ev, x, self.layer.depth)
        assert access is not None, "lower() has made the operand a matrix"
        source, stride, offset = access
        buffer, fixed = self.k.ev.sources[source].buffer, self.layer.node.args[5]
        with rows_in_parallel(rows) as row:
            start = T.bind(offset + row * stride)
            top, poison = self._largest(buffer, start)
            if fixed is None:
                inverse = tirx.Select(top > f32(TINY), f32(LARGEST_CODE) / top, f32(0.0))
                scale = top / f32(LARGEST_CODE)
            else:
                inverse, scale = f32(1.0) / f32(float(fixed)), f32(float(fixed))  # pyright: ignore
            T.buffer_store(self.row_scales, scale + poison, [row])
            self._codes(buffer, start, row, keep(inverse))

    def _largest(self, x: Any, start: Expr) -> tuple[Expr, Expr]:
        """Largest magnitude of a row; and 0, or NaN if the row holds NaN or infinity."""
        lanes = self.k.lanes
        top, poison = (T.alloc_buffer((lanes,), "float32") for _ in range(2))
        whole = T.ramp(0, 1, lanes)
        for register in (top, poison):
            T.buffer_store(register, splat(0.0, lanes), [whole])
        for at, n in for_vectors(self.layer.depth, lanes):
            value, place = keep(x[lanes_at(start + at, n)]), lanes_at(i32(0), n)
            T.buffer_store(top, T.max(top[place], T.max(value, -value)), [place])
            T.buffer_store(poison, fused_multiply_add(value, splat(0.0, n), poison[place]), [place])
        largest = keep(horizontal(T.bind(top[whole]), lanes, T.max))
        return largest, keep(horizontal(T.bind(poison[whole]), lanes, lambda a, b: a + b))

    def _codes(self, x: Any, start: Expr, row: Expr, inverse: Expr) -> None:
        layer, lanes = self.layer, self.k.lanes
        dtype = activation_dtype(layer.weight)
        padded, group = layer.units * UNIT, layer.weight.group or layer.units * UNIT
        first = T.bind(row * padded)
        total = T.alloc_buffer((LANES,), "int32")
        whole = T.ramp(0, 1, LANES)
        for at, n in for_vectors(layer.depth, lanes):
            value = x[lanes_at(start + at, n)] * splat(inverse, n)
            value = T.max(splat(-float(LARGEST_CODE), n), T.min(splat(float(LARGEST_CODE), n), T.nearbyint(value)))
            code = T.cast(keep(value), "int32" if n == 1 else f"int32x{n}")
            T.buffer_store(
                self.codes, T.cast(keep(code), dtype if n == 1 else f"{dtype}x{n}"), [lanes_at(first + at, n)]
            )
        with T.serial(layer.depth, padded) as at:
            T.buffer_store(self.codes, tirx.const(0, dtype), [first + at])
        with T.serial(0, layer.groups) as g:
            T.buffer_store(total, splat(0, LANES, "int32"), [whole])
            begin = T.bind(g * group)
            with T.serial(0, T.bind(T.floordiv(T.min(padded - begin, group), LANES))) as v:
                part = T.cast(self.codes[lanes_at(first + begin + v * LANES, LANES)], f"int32x{LANES}")
                T.buffer_store(total, total[whole] + part, [whole])
            of_group = horizontal(T.bind(total[whole]), LANES, lambda a, b: a + b)
            T.buffer_store(self.sums, of_group * sum_factor(layer.weight), [row * layer.groups + g])


def _multiply(
    k: Kernel, layer: _Layer, weights: list[Any], rows_of: tuple[Any, Any, Any], out: Any, count: Expr, bias: Any
) -> None:
    """The tiles: tasks of some panels and a chunk of rows."""
    form, width = layer.weight, LANES * tile_vectors(layer.weight)
    panels, whole = -(-layer.columns // width), layer.columns // width
    blocks, chunks = -(-panels // PANELS_PER_TASK), T.bind(ceil_div(count, ROWS_PER_TASK))
    of_rows, sums, row_scales = rows_of
    panel_bytes = width * layer.units * UNIT * form.bits // 8
    start_of_bias = k.ev.sources[bias].buffer if bias is not None else None
    with T.parallel(0, chunks * blocks) as task:
        block = T.bind(T.floordiv(task, chunks))
        first = T.bind((task - block * chunks) * ROWS_PER_TASK)
        rows = T.bind(T.min(count - first, ROWS_PER_TASK))
        begin = T.bind(block * PANELS_PER_TASK)
        with T.serial(begin, T.bind(T.min(begin + PANELS_PER_TASK, panels))) as panel:
            at = T.bind(panel * (width * layer.groups))
            pointers = [T.address_of(weights[0][T.bind(panel * panel_bytes)])]
            pointers += [T.address_of(w[at]) for w in weights[1:]]
            with T.serial(0, ceil_div(rows, tile_rows(form))) as t:
                row = T.bind(first + t * tile_rows(form))
                column = T.bind(panel * width)
                operands = [T.address_of(of_rows[row * (layer.units * UNIT)]), *pointers]
                operands += [T.address_of(sums[row * layer.groups]), T.address_of(row_scales[row])]
                operands += [T.address_of(out[row * layer.columns + column])]
                sizes = [i32(layer.row_words), i32(layer.groups), i32(layer.columns), i32(layer.units)]
                call = _Call(k.module, form, operands, sizes, start_of_bias, column)
                left = T.bind(rows - t * tile_rows(form))
                if whole == panels:
                    call.emit(left, tile_rows(form), width)
                else:
                    with T.If(panel < whole):
                        with T.Then():
                            call.emit(left, tile_rows(form), width)
                        with T.Else():
                            call.emit(left, tile_rows(form), layer.columns - whole * width)


@dataclass(frozen=True)
class _Call:
    """A call of a tile with as many rows as are left."""

    module: Module
    form: WeightFormat
    operands: list[Any]
    sizes: list[Any]
    bias: Any
    column: Expr

    def emit(self, left: Expr, rows: int, columns: int) -> None:
        """A tile of ``min(left, rows)`` rows, of which ``columns`` of the panel are stored."""
        condition = left >= rows if rows == tile_rows(self.form) else tirx.EQ(left, rows)
        with T.If(condition):
            with T.Then():
                self._call(rows, columns)
            if rows > 1:
                with T.Else():
                    self.emit(left, rows - 1, columns)

    def _call(self, rows: int, columns: int) -> None:
        biased = self.bias is not None
        name = f"planish_tile_{self.form.name.replace('-', '_')}_{rows}x{columns}{'_biased' if biased else ''}"
        symbol = self.module.tile(name, lambda: build_integer_tile(name, self.form, rows, columns, biased=biased))
        bias = [T.address_of(self.bias[self.column])] if biased else []
        T.evaluate(T.call_extern("int32", symbol, *self.operands, *bias, *self.sizes))
