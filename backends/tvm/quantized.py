"""Linear layers on integer codes: a chunk's rows become codes, then tiles of packed weights multiply them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, for_vectors, i32, lanes_at, splat, workspace
from planish.backends.tvm.integer_tile import (
    UNIT,
    WIDTH,
    activation_dtype,
    blocks,
    build_integer_tile,
    build_unpacking,
    packed_size,
    sums_in_integers,
    tile_rows,
)
from planish.backends.tvm.kernel import Packed, rows_in_parallel
from planish.backends.tvm.row_codes import row_codes
from planish.backends.tvm.stage import Block, Stage, StageCode, Tiles, choose_rows
from planish.formats import LARGEST_CODE, Format, WeightFormat
from planish.ops import QUANTIZED_CONVOLUTION, QUANTIZED_LINEAR, has_constant_weight
from planish.targets import Target


def quantized_reason(node: fx.Node) -> str | None:
    """Why a layer on integer codes has no kernel, or None; a group is formed around constant codes only."""
    form = Format.parse(str(node.args[7]))
    depth = int(node.args[1].meta["val"].shape[1])  # pyright: ignore
    if reason := _operand_reason(node, form):
        return reason
    if form.activation == "fp":
        return f"the format {form.name} keeps activations in fp32, which has no kernel yet"
    most = (1 << 31) // (LARGEST_CODE << form.weight.bits)
    if (form.weight.group or depth) > most:
        return f"sums of {depth} products of {form.weight.bits} bits do not fit 32 bits: use a format with groups"
    grouped = type(node.graph.owning_module).__name__ == "Group"
    if not grouped and not has_constant_weight(node):
        return "its codes, scales and minimums must be constants"
    return None


def _operand_reason(node: fx.Node, form: Format) -> str | None:
    """Why a layer's operands do not go together, or None."""
    x, codes = node.args[0].meta["val"], node.args[1].meta["val"]  # pyright: ignore
    if node.target is QUANTIZED_CONVOLUTION:
        groups, depthwise = node.args[12], node.args[12] == x.shape[-1] == codes.shape[0]
        if groups != 1 and not (depthwise and form.weight == WeightFormat(8)):
            return f"a convolution on codes of {x.shape[-1]} channels in {groups} groups, {form.name}, has no kernel"
        return None
    optional = any(a is not None for a in node.args[8:])
    if x.dtype is torch.int8 and (optional or node.args[6] is None):
        return "an input of codes needs their scale, and can have neither outliers nor an equaliser"
    return None


class IntegerTiles(Tiles):
    """Products of codes; the reference is ``planish::quantized_linear``."""

    width = WIDTH

    def __init__(self, target: Target, stage: Stage) -> None:
        self.node = stage.linear
        self.form = Format.parse(str(stage.linear.args[7]))
        self.units = -(-stage.depth // UNIT)
        self.groups = self.form.weight.groups(stage.depth)
        measured = target.costs and target.costs.tile_rows(self.form.name, stage.columns, stage.depth)
        self.rows = measured or tile_rows(self.form.weight)
        self.weight_bytes = packed_size((stage.columns, stage.depth), self.form.weight)
        self.scale = self.node.args[6]
        optional = self.node.args[8:] if self.node.target is QUANTIZED_LINEAR else ()
        self.kept, self.equaliser = optional[:2], optional[2] if len(optional) > 2 else None
        self.kept = tuple(n for n in self.kept if n is not None)
        self.outliers = int(self.kept[0].meta["val"].shape[0]) if self.kept else 0  # pyright: ignore

    @property
    def depth(self) -> int:
        """Input features, filled up to whole units."""
        return self.units * UNIT

    def constants(self) -> list[tuple[Packed, str]]:
        """Codes and what scales them; features that stay fp32 with their weights; the input's scale if it is fixed."""
        weight = self.form.weight
        codes, scales, minimums, channels = self.node.args[1:5]
        packed = [(Packed(codes, f"codes {weight.name}", 0), "int8" if self._wide else "uint8")]  # pyright: ignore
        if sums_in_integers(weight):
            packed += [(Packed(codes, f"offsets {weight.name}", 0, scales), "int32")]  # pyright: ignore
            packed += [(Packed(scales, "steps", 0), "int8")] if weight.group else []  # pyright: ignore
            packed += [(Packed(channels or scales, "numbers", 0), "float32")]  # pyright: ignore
        else:
            number = "float16" if weight.group else "float32"
            packed += [(Packed(n, "numbers", 0), number) for n in (scales, minimums) if n is not None]  # pyright: ignore
        kept = [*zip(self.kept, ("int64", "float32"), strict=False)]
        kept += [(self.equaliser, "float32")] if self.equaliser is not None else []
        kept += [(self.scale, "float32")] if self.scale is not None else []
        return packed + [(Packed(n, "plain", 0), dtype) for n, dtype in kept]  # pyright: ignore

    @property
    def numbers(self) -> int:
        """Constants that a tile reads."""
        return len(self.constants()) - len(self.kept) - (self.equaliser is not None) - (self.scale is not None)

    def optional(self, constants: list[Any]) -> tuple[Any, Any]:
        """In memory: the features that stay fp32, and the equaliser; None for what there is not."""
        features = constants[self.numbers] if self.outliers else None
        return features, None if self.equaliser is None else constants[self.numbers + len(self.kept)]

    def _numbers_per_column(self) -> list[int]:
        """How many of each constant but the codes a column has."""
        if not sums_in_integers(self.form.weight):
            return [self.groups] * (self.numbers - 1)
        sums = blocks(self.form.weight, self.node.args[1].meta["val"].shape[1])  # pyright: ignore
        return [sums, *([2 * self.groups] if self.form.weight.group else []), 1]

    @property
    def _wide(self) -> bool:
        return self.form.weight.bits == 8

    def scratch(self) -> list[tuple[int, str]]:
        """Codes of the rows, their scales, sums where a tile needs them, and outliers."""
        rows = [(self.depth, activation_dtype(self.form.weight)), (1, "float32")]
        rows += [] if sums_in_integers(self.form.weight) else [(self.groups, "int32")]
        return rows + ([(self.outliers, "float32")] if self.outliers else [])

    def prepare(self, code: StageCode, *, parallel: bool) -> None:
        """The rows as codes."""
        rows = row_codes(code, self)
        if parallel:
            with rows_in_parallel(code.count) as row:
                rows.emit(row)
        else:
            with T.serial(0, code.count) as row:
                rows.emit(row)

    def open(self, code: StageCode, block: Block) -> Any:
        """Unpack the block's panel if there are enough rows to gain from that; else the tiles do."""
        if self._wide:
            return None
        unpacked = workspace(self.depth * WIDTH, "int8" if sums_in_integers(self.form.weight) else "uint8")
        signed = "_signed" if sums_in_integers(self.form.weight) else ""
        name = f"planish_unpack_{self.form.weight.bits}{signed}"
        symbol = code.k.module.tile(name, lambda: build_unpacking(name, self.form.weight))
        with T.If(code.count >= self.rows), T.Then():
            place = T.address_of(unpacked[0])
            T.evaluate(T.call_extern("int32", symbol, self._panel(code, block), place, i32(self.units)))
        return unpacked

    def multiply(self, code: StageCode, block: Block, row: Expr, left: Expr, tile: Expr, opened: Any) -> None:
        """A tile of unpacked or packed codes, then the outliers."""
        if opened is None:
            self._call(code, block, row, left, self._panel(code, block), unpacked=False)
        else:
            with T.If(code.count >= self.rows):
                with T.Then():
                    self._call(code, block, row, left, T.address_of(opened[0]), unpacked=True)
                with T.Else():
                    self._call(code, block, row, left, self._panel(code, block), unpacked=False)
        if self.outliers:
            with T.serial(0, T.min(left, self.rows)) as i:
                self._add_outliers(code, block, T.bind(row + i))

    def _add_outliers(self, code: StageCode, block: Block, row: Expr) -> None:
        """One row of a tile plus the products of its outliers in fp32."""
        place, weights, values = code.place, code.constants[self.numbers + 1], code.scratch[-1]
        start, first = T.bind(place.row(row) + block.column), T.bind((row - code.first) * self.outliers)
        for at, n in for_vectors(block.columns, block.lanes):
            total, whole = T.alloc_buffer((n,), "float32"), lanes_at(i32(0), n)
            T.buffer_store(total, place.buffer[lanes_at(start + at, n)], [whole])
            with T.serial(0, self.outliers) as c:
                column = lanes_at(c * code.stage.columns + block.column + at, n)
                T.buffer_store(total, total[whole] + splat(values[first + c], n) * weights[column], [whole])
            T.buffer_store(place.buffer, total[whole], [lanes_at(start + at, n)])

    def adds_bias(self, block: Block) -> bool:
        """Always."""
        return True

    def _panel(self, code: StageCode, block: Block) -> Expr:
        """Address of the block's packed codes."""
        return T.address_of(code.constants[0][T.bind(block.column * (self.depth * self.form.weight.bits // 8))])

    def _call(self, code: StageCode, block: Block, row: Expr, left: Expr, panel: Expr, *, unpacked: bool) -> None:
        codes, scales, *sums = code.scratch
        place, bias, at = code.place, code.stage.bias, T.bind(row - code.first)
        operands = [T.address_of(codes[at * self.depth]), panel]
        numbers = zip(code.constants[1:], self._numbers_per_column(), strict=False)
        operands += [T.address_of(n[T.bind(block.column * count)]) for n, count in numbers]
        operands += [] if sums_in_integers(self.form.weight) else [T.address_of(sums[0][at * self.groups])]
        operands += [T.address_of(scales[at])]
        operands += [T.address_of(place.buffer[place.row(row) + block.column])]
        operands += [T.address_of(code.k.ev.sources[bias].buffer[block.column])] if bias is not None else []
        per_word = 2 if self._wide else 4
        sizes = [i32(self.depth // per_word), i32(self.groups), place.stride, i32(self.units)]
        kind = {"biased": bias is not None, "unpacked": unpacked}

        def call(count: int) -> None:
            form = self.form.weight
            words = [word for word, wanted in kind.items() if wanted]
            name = "_".join(["planish_tile", form.name.replace("-", "_"), f"{count}x{block.columns}", *words])
            symbol = code.k.module.tile(name, lambda: build_integer_tile(name, form, count, block.columns, **kind))
            T.evaluate(T.call_extern("int32", symbol, *operands, *sizes))

        choose_rows(left, self.rows if unpacked or self._wide else self.rows - 1, call)
