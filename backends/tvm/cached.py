"""Attention of new tokens over a cache: one query row for each head, over the keys of its sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import (
    Expr,
    ceil_div,
    f32,
    for_vectors,
    horizontal,
    i32,
    keep,
    lanes_at,
    splat,
    workspace,
)
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Region, kernel
from planish.backends.tvm.vmath import exp_difference, tanh
from planish.program import Program

VECTORS = 4
"""Of a row of values that are summed in registers, for all heads that share it."""


def lower_cached(module: Module, program: Program, region: Region, anchor: fx.Node) -> Lowered:
    """Kernel of ``planish::cached_attention``: an item is a token and a head of keys, whose rows are read once for all
    heads that share it.

    before: ``softmax(query keys^T * scale) values`` for each token, over its sequence's keys up to its own
    after:  scores of one key after the other, exponentials in place, then sums of values in registers
    """
    query, keys, values = (program.shape(n) for n in anchor.args[:3])  # pyright: ignore
    with kernel(module, program, region) as (k, out, _):
        code = _Attention(k, anchor, out)
        tokens = T.bind(k.ev.shape(anchor)[0] + i32(0))
        with T.parallel(0, T.bind(tokens * code.groups)) as item:
            token = T.bind(T.floordiv(item, code.groups))
            code.emit(token, T.bind(item - token * code.groups))
    assert k.function.func is not None
    most = program.upper_bound(keys[1])
    flops = 2 * sympy.prod(query[:2]) * most * (query[2] + values[3])
    return Lowered("cached_attention", k.function.func, k.operands, "cached_attention", (*query, keys[1]), flops)


@dataclass(frozen=True)
class _Attention:
    k: Kernel
    anchor: fx.Node
    out: Any

    @property
    def groups(self) -> int:
        """Heads of keys."""
        return int(self.anchor.args[1].meta["val"].shape[2])  # pyright: ignore

    @property
    def heads(self) -> int:
        """That share a head of keys."""
        return int(self.anchor.meta["val"].shape[1]) // self.groups

    @property
    def length(self) -> int:
        """Positions of a sequence."""
        return int(self.anchor.args[1].meta["val"].shape[1])  # pyright: ignore

    def emit(self, token: Expr, group: Expr) -> None:
        """All heads that share one of keys, for a token."""
        query, keys, values, sequence, position, _, window, _ = self.anchor.args
        k, lanes = self.k, self.k.lanes
        depth = int(query.meta["val"].shape[2])  # pyright: ignore
        row = self._place(sequence, token, keys.meta["val"].shape[0])  # pyright: ignore
        last = self._place(position, token, self.length)
        first = keep(T.max(last + 1 - window, 0)) if window else i32(0)
        count = keep(last + 1 - first)
        start = keep((row * self.length + first) * self.groups + group)
        rows, stride = workspace(self.heads * depth), self._stride
        for head in range(self.heads):
            for at, n in for_vectors(depth, lanes):
                value = k.ev.at(query, (token, T.bind(group * self.heads + head), lanes_at(at, n)))
                T.buffer_store(rows, splat(value, n), [lanes_at(head * depth + at, n)])
        scores = workspace(self.heads * stride)
        self._scores(rows, depth, k.ev.sources[keys].buffer, start, count, scores)
        sums = self._exponentials(scores, count)
        self._values(k.ev.sources[values].buffer, start, count, scores, sums, token, group)

    @property
    def _stride(self) -> int:
        """Of a head's scores, in whole vectors."""
        return ceil_div(self.length, self.k.lanes) * self.k.lanes

    def _place(self, node: Any, token: Expr, size: int) -> Expr:
        """An element of an int64 tensor, kept within the cache."""
        at = T.cast(self.k.ev.at(node, (token,)), "int32")
        return keep(T.max(T.min(at, size - 1), 0))

    def _scores(self, rows: Any, depth: int, keys: Any, start: Expr, count: Expr, scores: Any) -> None:
        """Products of all keys with the heads' rows, less the largest of a head; -inf up to whole vectors."""
        lanes, scale, softcap = self.k.lanes, float(self.anchor.args[5]), float(self.anchor.args[7])  # pyright: ignore
        with T.serial(0, count) as j:
            key = keep((start + j * self.groups) * depth)
            for head in range(self.heads):
                total = T.alloc_buffer((lanes,), "float32")
                T.buffer_store(total, splat(0.0, lanes), [lanes_at(i32(0), lanes)])
                for at, n in for_vectors(depth, lanes):
                    place = lanes_at(i32(0), n)
                    product = rows[lanes_at(head * depth + at, n)] * keys[lanes_at(key + at, n)]
                    T.buffer_store(total, total[place] + product, [place])
                score = horizontal(T.bind(total[lanes_at(i32(0), lanes)]), lanes, lambda a, b: a + b) * f32(scale)
                if softcap:
                    score = f32(softcap) * tanh(score / f32(softcap))
                T.buffer_store(scores, score, [head * self._stride + j])
        with T.serial(count, ceil_div(count, lanes) * lanes) as j:
            for head in range(self.heads):
                T.buffer_store(scores, f32(float("-inf")), [head * self._stride + j])

    def _exponentials(self, scores: Any, count: Expr) -> list[Expr]:
        """Replace scores by exponentials; returns their sums."""
        lanes, found = self.k.lanes, list[Expr]()
        whole, vectors = lanes_at(i32(0), lanes), T.bind(ceil_div(count, lanes))
        for head in range(self.heads):
            first = head * self._stride
            top, total = (T.alloc_buffer((lanes,), "float32") for _ in range(2))
            T.buffer_store(top, splat(float("-inf"), lanes), [whole])
            T.buffer_store(total, splat(0.0, lanes), [whole])
            with T.serial(0, vectors) as v:
                T.buffer_store(top, T.max(top[whole], scores[lanes_at(first + v * lanes, lanes)]), [whole])
            largest = keep(horizontal(T.bind(top[whole]), lanes, T.max))
            with T.serial(0, vectors) as v:
                place = lanes_at(first + v * lanes, lanes)
                value = exp_difference(scores[place] - splat(largest, lanes))
                T.buffer_store(scores, value, [place])
                T.buffer_store(total, total[whole] + value, [whole])
            found.append(keep(horizontal(T.bind(total[whole]), lanes, lambda a, b: a + b)))
        return found

    def _values(
        self, values: Any, start: Expr, count: Expr, scores: Any, sums: list[Expr], token: Expr, group: Expr
    ) -> None:
        """Sums of the values, weighted by the exponentials."""
        width, lanes = int(self.anchor.meta["val"].shape[2]), self.k.lanes
        at = 0
        while at < width:
            n = lanes if width - at >= lanes else 1
            vectors = min(VECTORS, (width - at) // n)
            whole = lanes_at(i32(0), n)
            totals = [[T.alloc_buffer((n,), "float32") for _ in range(vectors)] for _ in range(self.heads)]
            for total in (t for row in totals for t in row):
                T.buffer_store(total, splat(0.0, n), [whole])
            with T.serial(0, count) as j:
                first = T.bind((start + j * self.groups) * width + at)
                loaded = [T.bind(values[lanes_at(first + v * n, n)]) for v in range(vectors)]
                for head, row in enumerate(totals):
                    weight = T.bind(splat(scores[head * self._stride + j], n))
                    for total, value in zip(row, loaded, strict=True):
                        T.buffer_store(total, total[whole] + weight * value, [whole])
            for head, row in enumerate(totals):
                place = keep(((token * self.groups + group) * self.heads + head) * width + at)
                for v, total in enumerate(row):
                    T.buffer_store(self.out, total[whole] / splat(sums[head], n), [lanes_at(place + v * n, n)])
            at += vectors * n
