"""Where the tokens of a padded batch lie: starts of rows, places of tokens, slots of positions.

The number of tokens is known when these kernels have run, not before. They leave it in the head of the arena, from
where the model's function takes it for every kernel after them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, i32, keep
from planish.backends.tvm.index import DTYPES, cast
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Region, Scratch, kernel, rows_in_parallel
from planish.ops import planish_ops
from planish.plan import count_word
from planish.program import Program


@dataclass(frozen=True)
class MaskRows:
    """Which positions of a padded batch count as tokens; see ``planish::token_starts``."""

    k: Kernel
    mask: fx.Node
    keep: int
    first: bool

    def is_token(self, row: Expr, column: Expr) -> Expr:
        """Whether the mask says so."""
        return self._equals(row, column, self.keep)

    def _equals(self, row: Expr, column: Expr, number: int) -> Expr:
        value, dtype = self.k.ev.at(self.mask, (row, column)), self.mask.meta["val"].dtype
        if dtype is torch.bool:
            return value if number else tirx.Not(value)
        return tirx.EQ(value, cast(number, dtype))

    def fits(self, row: Expr, columns: Expr) -> Expr:
        """1 if the row has a token and nothing but 0 and 1, else 0."""
        return T.bind(tirx.Select(self.counted(row, columns)[1], i32(1), i32(0)))

    def counted(self, row: Expr, columns: Expr) -> tuple[Expr, Expr]:
        """The number of tokens by the mask, and whether the row fits."""
        tokens, others = T.alloc_buffer((1,), "int32"), T.alloc_buffer((1,), "int32")
        for counter in (tokens, others):
            T.buffer_store(counter, i32(0), [0])
        with T.serial(0, columns) as s:
            T.buffer_store(tokens, tokens[0] + _one_if(self.is_token(row, s)), [0])
            T.buffer_store(others, others[0] + _one_if(self._equals(row, s, 1 - self.keep)), [0])
        return tokens[0], tirx.And(tokens[0] > 0, tirx.EQ(tokens[0] + others[0], columns))

    def counts(self, row: Expr, column: Expr, fits: Expr) -> Expr:
        """Whether a position counts as a token."""
        token = self.shows(row, column, fits)
        return tirx.Or(token, tirx.EQ(column, 0)) if self.first else token

    def shows(self, row: Expr, column: Expr, fits: Expr) -> Expr:
        """Whether a position is a token by the mask, or lies in a row that does not fit."""
        return tirx.Or(self.is_token(row, column), tirx.EQ(fits, 0))


def _one_if(condition: Expr) -> Expr:
    return tirx.Select(condition, i32(1), i32(0))


def lower_packing(module: Module, program: Program, region: Region, anchor: fx.Node) -> Lowered:
    """Kernel of one of the ``PACKING`` ops."""
    if anchor.target is planish_ops.token_starts.default:
        return _lower_starts(module, program, region, anchor)
    if anchor.target is planish_ops.token_places.default:
        return _lower_places(module, program, region, anchor)
    return _lower_slots(module, program, region, anchor)


def _lower_starts(module: Module, program: Program, region: Region, anchor: fx.Node) -> Lowered:
    """Tokens of each row, summed up."""
    mask, keep_value, first = anchor.args
    with kernel(module, program, region) as (k, out, _):
        rows = MaskRows(k, mask, keep_value, first)  # pyright: ignore
        batch, columns = k.ev.shape(mask)  # pyright: ignore
        with rows_in_parallel(batch) as row:
            tokens, fits = rows.counted(row, columns)
            if first:
                tokens = tokens + _one_if(tirx.Not(rows.is_token(row, i32(0))))
            T.buffer_store(out, tirx.Cast("int64", tirx.Select(fits, tokens, columns)), [row + 1])
        T.buffer_store(out, tirx.const(0, "int64"), [0])
        with T.serial(0, batch) as row:
            T.buffer_store(out, out[row] + out[row + 1], [row + 1])
    return _lowered(k, program, anchor, "token_starts")


def _lower_places(module: Module, program: Program, region: Region, anchor: fx.Node) -> Lowered:
    """The positions of the tokens; their number goes to the head of the arena."""
    mask, starts, keep_value, first = anchor.args
    (size,) = program.shape(anchor)
    with kernel(module, program, region) as (k, out, _):
        rows = MaskRows(k, mask, keep_value, first)  # pyright: ignore
        batch, columns = k.ev.shape(mask)  # pyright: ignore
        T.buffer_store(k.ev.status, tirx.Cast("int32", k.ev.at(starts, (batch,))), [count_word(program, str(size))])
        with rows_in_parallel(batch) as row:
            at = T.alloc_buffer((1,), "int32")
            T.buffer_store(at, tirx.Cast("int32", k.ev.at(starts, (row,))), [0])
            fits = rows.fits(row, columns)
            with T.serial(0, columns) as s, T.If(rows.counts(row, s, fits)), T.Then():
                T.buffer_store(out, tirx.Cast("int64", row * columns + s), [at[0]])
                T.buffer_store(at, at[0] + 1, [0])
    return _lowered(k, program, anchor, "token_places")


def _lower_slots(module: Module, program: Program, region: Region, anchor: fx.Node) -> Lowered:
    """The packed index of each position; for others -1, or by two sweeps the nearest token's."""
    mask, starts, keep_value, first, others = anchor.args
    nearest = others == "nearest"
    batch, columns = program.shape(anchor)
    extra = [(Scratch(4 * batch * columns), "int32")] if nearest else []
    with kernel(module, program, region, extra) as (k, out, scratch):
        rows = MaskRows(k, mask, keep_value, first)  # pyright: ignore
        batch, columns = k.ev.shape(mask)  # pyright: ignore
        with rows_in_parallel(batch) as row:
            fits = rows.fits(row, columns)
            at, slot, column = (T.alloc_buffer((1,), "int32") for _ in range(3))
            T.buffer_store(at, tirx.Cast("int32", k.ev.at(starts, (row,))), [0])
            T.buffer_store(slot, i32(-1), [0])
            T.buffer_store(column, -columns, [0])
            with T.serial(0, columns) as s:
                shown = rows.counts(row, s, fits) if others == "none" else rows.shows(row, s, fits)
                with T.If(keep(shown)):
                    with T.Then():
                        T.buffer_store(slot, at[0], [0])
                        T.buffer_store(column, s, [0])
                    if not nearest:
                        with T.Else():
                            T.buffer_store(slot, i32(-1), [0])
                T.buffer_store(at, at[0] + _one_if(rows.counts(row, s, fits)), [0])
                T.buffer_store(out, tirx.Cast("int64", slot[0]), [row * columns + s])
                if nearest:
                    T.buffer_store(scratch[0], column[0], [row * columns + s])
            if nearest:
                _look_ahead(rows, scratch[0], out, row, columns, fits)
    return _lowered(k, program, anchor, "token_slots")


def _look_ahead(rows: MaskRows, before: Any, out: Any, row: Expr, columns: Expr, fits: Expr) -> None:
    """From the end: take the token after a position where it is nearer than the one before, at column ``before``."""
    slot, column = T.alloc_buffer((1,), "int64"), T.alloc_buffer((1,), "int32")
    T.buffer_store(slot, tirx.const(-1, "int64"), [0])
    T.buffer_store(column, columns * 2, [0])
    with T.serial(0, columns) as i:
        s = T.bind(columns - 1 - i)
        at = T.bind(row * columns + s)
        with T.If(rows.shows(row, s, fits)), T.Then():
            T.buffer_store(slot, out[at], [0])
            T.buffer_store(column, s, [0])
        with T.If(column[0] - s < s - before[at]), T.Then():
            T.buffer_store(out, slot[0], [at])


def _lowered(k: Kernel, program: Program, anchor: fx.Node, name: str) -> Lowered:
    assert k.function.func is not None
    return Lowered(name, k.function.func, k.operands, name, program.shape(anchor), 0)


def packing_reason(node: fx.Node) -> str | None:
    """Why a mask cannot be read, or None."""
    dtype = node.args[0].meta["val"].dtype  # pyright: ignore
    return None if dtype in DTYPES else f"a mask of {dtype} has no kernels"
