"""Linear layers on integer codes for AVX2."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, i32, workspace
from planish.backends.tvm.integer_tile import (
    UNIT,
    WIDTH,
    activation_dtype,
    blocks,
    build_integer_tile,
    build_unpacking,
    code_offset,
    packed_size,
    sum_factor,
    sums_in_integers,
    tile_rows,
)
from planish.backends.tvm.kernel import Packed
from planish.backends.tvm.quantized import IntegerTiles
from planish.backends.tvm.stage import Block, Stage, StageCode, choose_rows
from planish.targets import Target


class Avx2Tiles(IntegerTiles):
    """Products by ``vpmaddubsw`` and ``vpmaddwd``."""

    width, unit = WIDTH, UNIT

    def __init__(self, target: Target, stage: Stage) -> None:
        super().__init__(target, stage)
        weight = self.form.weight
        measured = target.costs and target.costs.tile_rows(self.form.name, stage.columns, stage.depth)
        self.rows = measured or tile_rows(weight)
        self.weight_bytes = packed_size((stage.columns, stage.depth), weight)
        self.code_dtype, self.code_offset, self.sum_factor = (
            activation_dtype(weight),
            code_offset(weight),
            sum_factor(weight),
        )

    def packed(self) -> list[tuple[Packed, str]]:
        """Codes and what scales them."""
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
        return packed

    def _numbers_per_column(self) -> list[int]:
        """How many of each constant but the codes a column has."""
        if not sums_in_integers(self.form.weight):
            return [self.groups] * (self.numbers - 1)
        sums = blocks(self.form.weight, self.node.args[1].meta["val"].shape[1])  # pyright: ignore
        return [sums, *([2 * self.groups] if self.form.weight.group else []), 1]

    @property
    def _wide(self) -> bool:
        return self.form.weight.bits == 8

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

    def multiply_codes(self, code: StageCode, block: Block, row: Expr, left: Expr, opened: Any) -> None:
        """A tile of unpacked or packed codes."""
        if opened is None:
            self._call(code, block, row, left, self._panel(code, block), unpacked=False)
        else:
            with T.If(code.count >= self.rows):
                with T.Then():
                    self._call(code, block, row, left, T.address_of(opened[0]), unpacked=True)
                with T.Else():
                    self._call(code, block, row, left, self._panel(code, block), unpacked=False)

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
        operands += [T.address_of(scales[at * self.scales])]
        operands += [T.address_of(place.buffer[place.row(row) + block.column])]
        operands += [T.address_of(code.k.ev.sources[bias].buffer[block.column])] if bias is not None else []
        per_word = 2 if self._wide else 4
        sizes = [i32(self.depth // per_word), i32(self.groups), place.stride, i32(self.units)]
        kind = {"biased": bias is not None, "unpacked": unpacked}

        def call(count: int) -> None:
            form = self.form
            words = [word for word, wanted in kind.items() if wanted]
            words = ["group", *words] if form.by_group else words
            name = "_".join(["planish_tile", form.weight.name.replace("-", "_"), f"{count}x{block.columns}", *words])
            symbol = code.k.module.tile(name, lambda: build_integer_tile(name, form, count, block.columns, **kind))
            T.evaluate(T.call_extern("int32", symbol, *operands, *sizes))

        choose_rows(left, self.rows if unpacked or self._wide else self.rows - 1, call)
