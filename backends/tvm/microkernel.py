"""The register-blocked fp32 tile that GEMM and attention are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, f32, function, i32, lanes_at, splat
from planish.backends.tvm.index import as_value, cast, storage_dtype
from planish.backends.tvm.kernel import Module
from planish.targets import Target


@dataclass(frozen=True)
class Tile:
    """Register block: ``rows`` by ``vectors`` accumulators, plus one register per B vector and one for A.

    8 x 3 on 32 registers and 4 x 3 on 16 leave the row count a divisor of common batch shapes; measured on AVX-512,
    8 x 48 runs at 90-95 % of the FMA peak, 12 x 32 and 6 x 64 slightly below.
    """

    rows: int
    vectors: int


def gemm_tile(target: Target, columns: int = 0) -> Tile:
    """Block for an output of so many columns: the one whose width leaves least over, 8 x 3 where both do,
    and where the number is not known (0).

    The last block of columns may be narrower, and a tile of one vector runs at half the speed: 64 columns are one
    block of 6 x 4, not one of 8 x 3 and a rest.
    """
    tiles = (Tile(8, 3), Tile(6, 4)) if target.vector_registers >= 32 else (Tile(4, 3), Tile(6, 2))
    return min(tiles, key=lambda t: -columns % (t.vectors * target.lanes))


def attention_tile(target: Target) -> Tile:
    """Block for attention, whose head sizes are multiples of two vectors; smaller where code is to be small."""
    return Tile(8 if target.is_arm else 12, 2) if target.vector_registers >= 32 else Tile(6, 2)


UNROLL = 4
"""Steps of k per iteration of a tile's loop, and steps per prefetched cache line."""


def build_tile(
    symbol: str,
    rows: int,
    vectors: int,
    lanes: int,
    *,
    ragged: bool,
    biased: bool,
    cold: bool,
    weights: torch.dtype = torch.float32,
) -> tirx.PrimFunc:
    """C[rows, vectors*lanes] = A[rows, K] B[K, vectors*lanes], accumulated in registers in the order of k.

    Parameters: A, B, C, ahead, with ``biased`` the row that the sums start from, then lda, ldb, ldc, K, and with
    ``ragged`` the number of lanes of the last vector to store. Strides are in elements. B may be of half precision, it
    is widened as it is read. With ``cold``, C is not in the cache yet and is fetched to be written. One cache line from
    ``ahead`` on is fetched into the second-level cache every ``UNROLL`` steps: the weights that the next tiles multiply
    would otherwise arrive late. Every row is computed by the same sequence of operations whatever ``rows`` is, so
    results do not depend on how rows are cut into tiles.
    """
    with function(symbol) as f:
        types = ["float32", storage_dtype(weights), "float32", storage_dtype(weights), *["float32"] * biased]
        pointers, (lda, ldb, ldc, depth, *rest) = f.parameters(
            types, 4 + ragged, align=2 if weights.itemsize == 2 else 4
        )
        a, b, c, ahead, *start = pointers
        last = rest[0] if ragged else None
        whole = T.ramp(0, 1, lanes)
        acc = [[T.alloc_buffer((lanes,), "float32") for _ in range(vectors)] for _ in range(rows)]
        for v in range(vectors):
            first = T.bind(start[0][lanes_at(v * lanes, lanes)] if start else T.broadcast(f32(0.0), lanes))
            for row in acc:
                T.buffer_store(row[v], first, [whole])

        def step(k: Expr) -> None:
            stored = [b[lanes_at(k * ldb + v * lanes, lanes)] for v in range(vectors)]
            panel = [T.bind(cast(as_value(value, weights), torch.float32)) for value in stored]
            for i, row in enumerate(acc):
                scalar = T.bind(T.broadcast(a[i * lda + k], lanes))
                for register, column in zip(row, panel, strict=True):
                    T.buffer_store(register, register[whole] + scalar * column, [whole])

        if cold:
            for i in range(rows):
                for v in range(vectors):
                    prefetch(T.address_of(c[i * ldc + v * lanes]), level=1, write=True)
        blocks = T.floordiv(depth, UNROLL)
        with T.serial(0, blocks) as block:
            prefetch(T.address_of(ahead[block * (CACHE_LINE // weights.itemsize)]), level=2)
            for u in range(UNROLL):
                step(block * UNROLL + u)
        with T.serial(0, depth - blocks * UNROLL) as k:
            step(blocks * UNROLL + k)
        for i, row in enumerate(acc):
            store_row(row, c, i * ldc, lanes, last)
    assert f.func is not None
    return f.func


def store_row(row: list[Any], c: Any, at: Expr, lanes: int, last: Expr | None) -> None:
    """Store a row's accumulators from ``at`` on; of the last one only ``last`` lanes, if given."""
    whole = T.ramp(0, 1, lanes)
    for v, register in enumerate(row):
        if last is None or v < len(row) - 1:
            T.buffer_store(c, register[whole], [lanes_at(at + v * lanes, lanes)])
        else:
            spill = T.alloc_buffer((lanes,), "float32")
            T.buffer_store(spill, register[whole], [whole])
            with T.serial(0, last) as j:
                T.buffer_store(c, spill[j], [at + v * lanes + j])


CACHE_LINE = 64


def prefetch(address: Expr, *, level: int, write: bool = False) -> None:
    """Emit a fetch of one cache line into a cache level, to be read or written; any address is allowed."""
    locality, data = i32(4 - level), i32(1)
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", address, i32(int(write)), locality, data))


def tile_symbol(
    module: Module, rows: int, vectors: int, weights: torch.dtype, *, ragged: bool, biased: bool, cold: bool
) -> str:
    """C symbol of the tile function of this size, shared by all kernels of the module."""
    lanes, kind = module.target.lanes, {"ragged": ragged, "biased": biased, "cold": cold}
    words = [str(weights).removeprefix("torch.")] if weights is not torch.float32 else []
    words += [word for word, wanted in kind.items() if wanted]
    name = "_".join([f"planish_tile_{rows}x{vectors * lanes}", *words])
    return module.tile(name, lambda: build_tile(name, rows, vectors, lanes, **kind, weights=weights))


def call_tile(
    module: Module,
    block: Tile,
    left: Expr,
    pointers: tuple[Expr, Expr, Expr, Expr],
    sizes: tuple[Expr, Expr, Expr, Expr],
    *,
    vectors: int,
    tail_lanes: Expr = 0,
    bias: Expr | None = None,
    cold: bool = False,
    weights: torch.dtype = torch.float32,
) -> None:
    """Emit a call of the tile with ``min(left, block.rows)`` rows: a chain of comparisons picks the row count.

    Args:
        pointers: A, B, C, ahead.
        sizes: lda, ldb, ldc, K.
        tail_lanes: lanes of the last vector to store, 0 for all.
        bias: pointer to the row that the sums start from; None for zeros.
        cold: whether C is not in the cache yet.
        weights: of B in memory.
    """
    ragged = not isinstance(tail_lanes, int) or tail_lanes > 0
    arguments = (
        *pointers,
        *([] if bias is None else [bias]),
        *sizes,
        *([splat(tail_lanes, 1, "int32")] if ragged else []),
    )

    def choose(rows: int) -> None:
        condition = left >= rows if rows == block.rows else tirx.EQ(left, rows)
        with T.If(condition):
            with T.Then():
                symbol = tile_symbol(module, rows, vectors, weights, ragged=ragged, biased=bias is not None, cold=cold)
                T.evaluate(T.call_extern("int32", symbol, *arguments))
            if rows > 1:
                with T.Else():
                    choose(rows - 1)

    choose(block.rows)
