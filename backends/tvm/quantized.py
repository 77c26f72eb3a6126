"""Linear layers on integer codes: a chunk's rows become codes, then tiles of packed weights multiply them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, for_vectors, i32, lanes_at, splat
from planish.backends.tvm.kernel import Packed, rows_in_parallel
from planish.backends.tvm.row_codes import Quantise, row_codes
from planish.backends.tvm.stage import Block, Stage, StageCode, Tiles
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
    """Products of codes; the reference is ``planish::quantized_linear``.

    A subclass knows an instruction set: how codes lie in memory, and the tiles that multiply them.
    """

    unit: int
    """Input features that are unpacked together: rows of codes are whole units."""
    code_dtype: str
    """How the codes of activations stand in memory."""
    code_offset: int = 0
    """What they are stored more by."""
    together = 16
    """Codes of a row that are stored together, at most."""
    together_anywhere = 16
    """The same from a feature on that is no multiple of them."""
    quantise: type[Quantise] = Quantise
    """Makes codes of fp32 values."""
    sum_factor: int | None = None
    """What the sums of their groups are multiplied by for the tiles; None where these need none."""

    def __init__(self, target: Target, stage: Stage) -> None:
        self.node = stage.linear
        self.form = Format.parse(str(stage.linear.args[7]))
        self.units = -(-stage.depth // self.unit)
        self.groups = self.form.weight.groups(stage.depth)
        self.scale = self.node.args[6]
        optional = self.node.args[8:] if self.node.target is QUANTIZED_LINEAR else ()
        self.kept, self.equaliser = optional[:2], optional[2] if len(optional) > 2 else None
        self.kept = tuple(n for n in self.kept if n is not None)
        self.outliers = int(self.kept[0].meta["val"].shape[0]) if self.kept else 0  # pyright: ignore

    @abstractmethod
    def packed(self) -> list[tuple[Packed, str]]:
        """Codes and what scales them, which the tiles read, with the types of their elements; the codes first."""

    @abstractmethod
    def multiply_codes(self, code: StageCode, block: Block, row: Expr, left: Expr, opened: Any) -> None:
        """The products of a tile, without those of outliers."""

    def place(self, code: StageCode, at: Expr) -> Callable[[Expr], Expr]:
        """Where the features of row ``at`` of the chunk have their codes in scratch memory: one row after the other."""
        first = T.bind(at * self.depth)
        return lambda feature: first + feature

    @property
    def depth(self) -> int:
        """Input features, filled up to whole units."""
        return self.units * self.unit

    def constants(self) -> list[tuple[Packed, str]]:
        """Packed weights; features that stay fp32 with their weights; the input's scale if it is fixed."""
        kept = [*zip(self.kept, ("int64", "float32"), strict=False)]
        kept += [(self.equaliser, "float32")] if self.equaliser is not None else []
        kept += [(self.scale, "float32")] if self.scale is not None else []
        return self.packed() + [(Packed(n, "plain", 0), dtype) for n, dtype in kept]  # pyright: ignore

    @property
    def scales(self) -> int:
        """Of a row of codes."""
        return self.groups if self.form.by_group else 1

    @property
    def numbers(self) -> int:
        """Constants that a tile reads."""
        return len(self.packed())

    def optional(self, constants: list[Any]) -> tuple[Any, Any]:
        """In memory: the features that stay fp32, and the equaliser; None for what there is not."""
        features = constants[self.numbers] if self.outliers else None
        return features, None if self.equaliser is None else constants[self.numbers + len(self.kept)]

    def scratch(self) -> list[tuple[int, str]]:
        """Codes of the rows, their scales, sums where a tile needs them, and outliers."""
        rows = [(self.depth, self.code_dtype), (self.scales, "float32")]
        rows += [] if self.sum_factor is None else [(self.groups, "int32")]
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

    def multiply(self, code: StageCode, block: Block, row: Expr, left: Expr, tile: Expr, opened: Any) -> None:
        """A tile of codes, then the outliers."""
        self.multiply_codes(code, block, row, left, opened)
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
