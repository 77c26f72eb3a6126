"""The register-blocked fp32 tile of convolutions: rows of the left matrix are runs of pixels in an image."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, f32, function, i32, lanes_at
from planish.backends.tvm.kernel import Module
from planish.backends.tvm.microkernel import CACHE_LINE, UNROLL, Tile, prefetch, store_row

ZERO, BIASED, SUM = "zero", "biased", "sum"
"""What the sums start from: zero, a row of biases, or what the result holds already."""


def build_window_tile(symbol: str, rows: int, vectors: int, lanes: int, *, ragged: bool, start: str) -> tirx.PrimFunc:
    """C[i, :] = start + sum over k of A[place[i] + k] B[k, :], accumulated in registers in the order of k.

    Parameters: A, B, C, ahead, place (int32, one position in A per row), with ``start`` BIASED the biases, then ldb,
    ldc, K, and with ``ragged`` the number of lanes of the last vector to store. Strides are in elements. One cache line
    from ``ahead`` on is fetched every ``UNROLL`` steps. One loop and no more: with the taps of the window as loops
    around it the compiler spills the accumulators.
    """
    with function(symbol) as f:
        pointers = ["float32"] * 4 + ["int32"] + ["float32"] * (start == BIASED)
        (a, b, c, ahead, place, *bias), (ldb, ldc, depth, *last) = f.parameters(pointers, 3 + ragged, align=4)
        whole = T.ramp(0, 1, lanes)
        acc = [[T.alloc_buffer((lanes,), "float32") for _ in range(vectors)] for _ in range(rows)]
        for i, row in enumerate(acc):
            for v, register in enumerate(row):
                first: Expr = T.broadcast(f32(0.0), lanes)
                if start == BIASED:
                    first = bias[0][lanes_at(v * lanes, lanes)]
                elif start == SUM:
                    first = c[lanes_at(i * ldc + v * lanes, lanes)]
                T.buffer_store(register, first, [whole])
        base = [T.bind(place[i]) for i in range(rows)]

        def step(k: Expr) -> None:
            panel = [T.bind(b[lanes_at(k * ldb + v * lanes, lanes)]) for v in range(vectors)]
            for at, registers in zip(base, acc, strict=True):
                scalar = T.bind(T.broadcast(a[at + k], lanes))
                for register, column in zip(registers, panel, strict=True):
                    T.buffer_store(register, register[whole] + scalar * column, [whole])

        blocks = T.bind(T.floordiv(depth, UNROLL))
        with T.serial(0, blocks) as block:
            prefetch(T.address_of(ahead[block * (CACHE_LINE // 4)]), level=2)
            for u in range(UNROLL):
                step(block * UNROLL + u)
        with T.serial(0, depth - blocks * UNROLL) as k:
            step(blocks * UNROLL + k)
        for i, registers in enumerate(acc):
            store_row(registers, c, i * ldc, lanes, last[0] if ragged else None)
    assert f.func is not None
    return f.func


def call_window_tile(
    module: Module,
    block: Tile,
    left: Expr,
    pointers: tuple[Expr, ...],
    sizes: tuple[Expr, ...],
    *,
    vectors: int,
    tail_lanes: int = 0,
    start: str = ZERO,
) -> None:
    """Emit a call of the tile with ``min(left, block.rows)`` rows.

    Args:
        pointers: A, B, C, ahead, place, and with BIASED the biases.
        sizes: ldb, ldc, K.
        tail_lanes: lanes of the last vector to store, 0 for all.
        start: what the sums start from.
    """
    arguments = (*pointers, *sizes, *([i32(tail_lanes)] if tail_lanes else []))
    lanes, ragged = module.target.lanes, bool(tail_lanes)

    def choose(rows: int) -> None:
        name = f"planish_window_{rows}x{vectors * lanes}_{start}" + ("_ragged" if ragged else "")
        symbol = module.tile(name, lambda: build_window_tile(name, rows, vectors, lanes, ragged=ragged, start=start))
        with T.If(left >= rows if rows == block.rows else tirx.EQ(left, rows)):
            with T.Then():
                T.evaluate(T.call_extern("int32", symbol, *arguments))
            if rows > 1:
                with T.Else():
                    choose(rows - 1)

    choose(block.rows)
