"""Linear layers on integer codes for NEON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, i32, keep
from planish.backends.tvm.integer_tile import UNIT, WIDTH, packed_size
from planish.backends.tvm.kernel import Packed
from planish.backends.tvm.neon_codes import NeonQuantise
from planish.backends.tvm.neon_products import LANES, products_of
from planish.backends.tvm.neon_tile import build_neon_tile, middle, stacked, units_of_block
from planish.backends.tvm.quantized import IntegerTiles
from planish.backends.tvm.stage import Block, Stage, StageCode
from planish.formats import Format
from planish.targets import Target


def neon_reason(node: fx.Node) -> str | None:
    """Why a layer on integer codes has no kernel for NEON, or None."""
    whole = Format.parse(str(node.args[7]))
    form = whole.weight
    if whole.by_group:
        return f"the format {whole.name} has no kernel for ARM: use one with a scale for each row"
    if not form.symmetric or (form.bits == 8 and form.group):
        return f"the weight format {form.name} has no kernel for ARM: use a symmetric one, 8 bits without groups"
    return None


class NeonTiles(IntegerTiles):
    """Products of bytes."""

    width, unit, code_dtype, together, together_anywhere = WIDTH, UNIT, "int8", 4, 1
    quantise = NeonQuantise

    def __init__(self, target: Target, stage: Stage) -> None:
        super().__init__(target, stage)
        self.products = products_of(target)
        best = target.costs and target.costs.tile_rows(self.form.name, stage.columns, stage.depth)
        self.tiles = {rows: vectors for rows, vectors in self.products.tiles.items() if rows <= (best or rows)}
        self.rows = max(self.tiles)
        self.sum_factor = -middle(self.form.weight) if stacked(self.form.weight) else None
        self.weight_bytes = packed_size((stage.columns, stage.depth), self.form.weight)

    def packed(self) -> list[tuple[Packed, str]]:
        """Codes, steps of groups, scales of columns."""
        weight = self.form.weight
        codes, scales, _, channels = self.node.args[1:5]
        packed = [(Packed(codes, f"neon codes {weight.name}", self.products.columns), "uint8")]  # pyright: ignore
        packed += [(Packed(scales, "neon steps", 0), "int16")] if weight.group else []  # pyright: ignore
        return [*packed, (Packed(channels or scales, f"neon columns {weight.name}", 0), "float32")]  # pyright: ignore

    def place(self, code: StageCode, at: Expr) -> Callable[[Expr], Expr]:
        """In turn with those of the rows that are in the same tile, see ``neon_products``."""
        features = self.products.features
        start = T.bind(T.floordiv(at, self.rows) * self.rows)
        left, own = T.bind(T.min(code.count - start, self.rows)), T.bind(at - start)
        rows: Expr = i32(1)
        for size in sorted(self.tiles):
            begin = left - T.floormod(left, 2 * size)
            within = tirx.And(T.bitwise_and(left, i32(size)) > 0, tirx.And(own >= begin, own < begin + size))
            rows = tirx.Select(within, i32(size), rows)
        rows = keep(rows)
        begin = keep(left - T.floormod(left, 2 * rows))
        first = keep((start + begin) * self.depth + (own - begin) * features)
        step = keep(rows * features)
        return lambda i: first + T.floordiv(i, features) * step + T.floormod(i, features)

    def open(self, code: StageCode, block: Block) -> Any:
        """Nothing: tiles unpack codes on the way."""

    def adds_bias(self, block: Block) -> bool:
        """Always."""
        return True

    def multiply_codes(self, code: StageCode, block: Block, row: Expr, left: Expr, opened: Any) -> None:
        """Tiles of as many rows as there are: seven are four, two and one."""
        with T.If(left >= self.rows):
            with T.Then():
                self._tiles(code, block, row, self.rows)
            with T.Else():
                for rows in self.tiles:
                    if rows < self.rows:
                        with T.If(T.bitwise_and(left, i32(rows)) > 0), T.Then():
                            self._tiles(code, block, T.bind(row + (left - T.floormod(left, 2 * rows))), rows)

    def _tiles(self, code: StageCode, block: Block, row: Expr, rows: int) -> None:
        """All columns of a block, for some rows from ``row`` on."""
        vectors = self.tiles[rows]
        for column in range(0, block.columns, vectors * LANES):
            self._call(code, block, row, rows, column)

    def _call(self, code: StageCode, block: Block, row: Expr, rows: int, column: int) -> None:
        """A tile whose first column is the block's ``column``-th."""
        codes, scales, *sums = code.scratch
        form, bias, place = self.form.weight, code.stage.bias, code.place
        columns, at = min(self.tiles[rows] * LANES, block.columns - column), T.bind(row - code.first)
        panels, *steps, of_columns = code.constants[: self.numbers]
        first = T.bind(block.column + column)
        operands = [T.address_of(codes[at * self.depth])]
        within = 0 if stacked(form) else column * UNIT
        operands += [T.address_of(panels[(block.column * self.depth + within) * form.bits // 8])]
        operands += [T.address_of(s[block.column * self.groups + column]) for s in steps]
        operands += [T.address_of(sums[0][at * self.groups])] if stacked(form) else []
        operands += [T.address_of(of_columns[first]), T.address_of(scales[at])]
        operands += [T.address_of(place.buffer[place.row(row) + first])]
        operands += [T.address_of(code.k.ev.sources[bias].buffer[first])] if bias is not None else []
        kind = {"biased": bias is not None, "long": self.units > units_of_block(form)}
        words = [word for word, wanted in kind.items() if wanted]
        vector = column // LANES if stacked(form) else 0
        words += [f"from{vector}"] if vector else []
        name = "_".join(["planish_tile", self.products.name, form.name.replace("-", "_"), f"{rows}x{columns}", *words])
        symbol = code.k.module.tile(
            name, lambda: build_neon_tile(name, form, self.products, rows, columns, vector, **kind)
        )
        T.evaluate(T.call_extern("int32", symbol, *operands, place.stride, i32(self.units)))
