"""Scaled-dot-product attention at GEMM speed, one (batch, head) at a time, with scores that never leave the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import tvm.sym
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm import vmath
from planish.backends.tvm.builder import (
    TASKS,
    Expr,
    as_int,
    ceil_div,
    equal,
    f32,
    for_vectors,
    horizontal,
    i32,
    lanes_at,
    round_up,
    splat,
    transpose,
    workspace,
)
from planish.backends.tvm.expr import Evaluator
from planish.backends.tvm.index import flat_index, unflatten_index
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Region, kernel
from planish.backends.tvm.maps import PUSH
from planish.backends.tvm.microkernel import Tile, attention_tile, call_tile
from planish.ops import argument
from planish.program import Program

Index = tuple[Expr, ...]
_LOWEST = -3.4028234663852886e38


@dataclass(frozen=True)
class Matrix:
    """A [.., rows, columns] operand in memory: base address per item, elements between rows, contiguous columns."""

    buffer: Any
    lead: tuple[Expr, ...]
    stride: Expr
    offset: Expr

    def base(self, index: Index) -> Expr:
        """Element offset of the matrix at a leading index."""
        at = self.offset
        for coefficient, i in zip(self.lead, index, strict=True):
            at = at + coefficient * i
        return at


def matrix(ev: Evaluator, node: fx.Node) -> Matrix | None:
    """The operand as a matrix per item, or None where its columns are not contiguous."""
    over = tuple(tirx.Var(f"i{axis}", "int32") for axis in range(len(ev.shape(node))))
    found = ev.affine(node, over, over)
    if found is None:
        return None
    source, (*lead, stride, column, offset) = found
    return Matrix(ev.sources[source].buffer, tuple(lead), stride, offset) if equal(column, 1) else None


def result_matrix(ev: Evaluator, region: Region, attention: fx.Node, out: Any) -> Matrix | None:
    """Where the attention's result lies in the region's result, seen through the views after it."""
    over = tuple(tirx.Var(f"i{axis}", "int32") for axis in range(len(ev.shape(attention))))
    index: Index = over
    for node in region.nodes[region.nodes.index(attention) + 1 :]:
        if node.target in PUSH:
            index = PUSH[node.target](ev, node, index)
    found = list(tvm.sym.detect_linear_equation(flat_index(ev.shape(region.result), index), list(over)))
    if not found:
        return None
    *lead, stride, column, offset = found
    return Matrix(out, tuple(lead), stride, offset) if equal(column, 1) else None


def lower_attention(module: Module, program: Program, region: Region, attention: fx.Node) -> Lowered:
    """Kernel of a region around attention whose operands and result have contiguous columns (``lower.py`` sees to it).

    before: ``reshape(transpose(softmax(q k^T scale + mask) v))``
    after:  for each (batch, head): transpose k once into panels (times scale) and copy v, which lie scattered among the
            heads; for each tile of query rows: scores by the GEMM tile into a strip, exponentials and their sum on the
            strip, strip times v by the GEMM tile straight into the result, divided by the sum
    """
    q, key, value = attention.args[:3]
    assert isinstance(q, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    tile = attention_tile(module.target)
    depth, width = int(q.meta["val"].shape[-1]), int(value.meta["val"].shape[-1])
    keys = program.shape(key)[-2]
    most = program.upper_bound(keys)
    panel = tile.vectors * module.target.lanes
    per_key = depth + tile.rows + 1 + -(-width // module.target.lanes) * module.target.lanes
    with kernel(module, program, region) as (k, out, _):
        operands = [matrix(k.ev, n) for n in (q, key, value)]
        result = result_matrix(k.ev, region, attention, out)
        assert result is not None
        qm, km, vm = (m for m in operands if m is not None)
        shape = k.ev.shape(attention)
        items: Expr = i32(1)
        for s in shape[:-2]:
            items = items * s
        items = T.bind(items)
        n_keys, n_queries = k.ev.shape(key)[-2], shape[-2]
        padded = T.bind(round_up(n_keys, panel))
        with T.parallel(0, TASKS) as task:
            buffer = workspace(per_key * (most + panel))
            item = Item(k, attention, tile, buffer, qm, km, vm, result, depth, width, n_keys, n_queries)
            with T.serial(0, T.max(ceil_div(items - task, TASKS), 0)) as n:
                index = unflatten_index(shape[:-2], T.bind(task + n * TASKS))
                item.emit(tuple(T.bind(i + i32(0)) for i in index), padded)
    queries = program.shape(q)[-2]
    total = sympy.prod(program.shape(attention)[:-2])
    flops = 2 * total * queries * keys * (depth + width)
    assert k.function.func is not None
    return Lowered("attention", k.function.func, k.operands, "attention", (*program.shape(q)[:-1], keys, depth), flops)


@dataclass(frozen=True)
class Item:
    """Code for one (batch, head).

    Scratch of a task: k panels [depth, padded], scores [rows, padded], mask [padded], v [padded, width in vectors].
    """

    k: Kernel
    attention: fx.Node
    tile: Tile
    scratch: Any
    q: Matrix
    key: Matrix
    value: Matrix
    out: Matrix
    depth: int
    width: int
    keys: Expr
    queries: Expr

    @property
    def panel(self) -> int:
        """Keys per panel."""
        return self.tile.vectors * self.k.lanes

    def emit(self, index: Index, padded: Expr) -> None:
        """Statements for the item at the leading ``index``."""
        k_base, v_base = T.bind(self.key.base(index)), T.bind(self.value.base(index))
        q_base, o_base = T.bind(self.q.base(index)), T.bind(self.out.base(index))
        scores = T.bind(padded * self.depth)
        mask = T.bind(scores + padded * self.tile.rows)
        values = T.bind(mask + padded)
        self.pack_keys(k_base, padded)
        self.pack_values(values, v_base)
        per_row = self.mask_depends_on_row()
        if not per_row:
            self.fill_mask(mask, index, i32(0), padded)
        with T.serial(0, ceil_div(self.queries, self.tile.rows)) as t:
            row = T.bind(t * self.tile.rows)
            left = T.bind(self.queries - row)
            rows = T.bind(T.min(left, self.tile.rows))
            with T.serial(0, T.floordiv(padded, self.panel)) as p:
                a = T.address_of(self.q.buffer[q_base + row * self.q.stride])
                b = T.address_of(self.scratch[p * (self.depth * self.panel)])
                c = T.address_of(self.scratch[scores + p * self.panel])
                sizes = (self.q.stride, i32(self.panel), padded, i32(self.depth))
                call_tile(self.k.module, self.tile, left, (a, b, c, b), sizes, vectors=self.tile.vectors)
            inverse = T.alloc_buffer((self.tile.rows,), "float32")
            with T.serial(0, rows) as r:
                if per_row:
                    self.fill_mask(mask, index, T.bind(row + r), padded)
                T.buffer_store(inverse, self.softmax(T.bind(scores + r * padded), mask, padded), [r])
            self.weigh_values(values, scores, o_base, row, left, padded)
            with T.serial(0, rows) as r:
                at = T.bind(o_base + (row + r) * self.out.stride)
                scale = T.bind(inverse[r])
                for start, count in for_vectors(self.width, self.k.lanes):
                    place = lanes_at(at + start, count)
                    T.buffer_store(self.out.buffer, self.out.buffer[place] * splat(scale, count), [place])

    def pack_keys(self, k_base: Expr, padded: Expr) -> None:
        """Keys as [panel of keys][depth][key], times scale and log2(e); the last key is repeated up to a whole panel.

        With log2(e) in the scores the softmax can use powers of two.
        """
        lanes = self.k.lanes
        scale = argument(self.attention, 6, "scale")
        scale = vmath.LOG2E * float(self.depth**-0.5 if scale is None else scale)

        def key(j: Expr) -> Expr:
            return T.bind(k_base + T.min(j, self.keys - 1) * self.key.stride)

        def place(j: Expr, d: Expr) -> Expr:
            return T.floordiv(j, self.panel) * (self.depth * self.panel) + T.floormod(j, self.panel) + d * self.panel

        with T.serial(0, T.floordiv(padded, lanes)) as block:
            first = T.bind(block * lanes)
            rows = [key(first + j) for j in range(lanes)]
            with T.serial(0, self.depth // lanes) as columns:
                at = T.bind(columns * lanes)
                tile = [T.bind(self.key.buffer[lanes_at(row + at, lanes)]) for row in rows]
                for d, vector in enumerate(transpose(tile, lanes)):
                    T.buffer_store(self.scratch, vector * splat(scale, lanes), [lanes_at(place(first, at + d), lanes)])
            with T.serial(0, self.depth % lanes) as d:
                column = T.bind(d + self.depth // lanes * lanes)
                for j, row in enumerate(rows):
                    T.buffer_store(self.scratch, self.key.buffer[row + column] * f32(scale), [place(first + j, column)])

    @property
    def pitch(self) -> int:
        """Elements between the copied rows of v."""
        return -(-self.width // self.k.lanes) * self.k.lanes

    def pack_values(self, values: Expr, v_base: Expr) -> None:
        """Copy v's rows next to each other: in place they may share few cache sets."""
        with T.serial(0, self.keys) as j:
            row = T.bind(v_base + j * self.value.stride)
            for start, count in for_vectors(self.width, self.k.lanes):
                value = self.value.buffer[lanes_at(row + start, count)]
                T.buffer_store(self.scratch, value, [lanes_at(values + j * self.pitch + start, count)])

    def mask_node(self) -> fx.Node | None:
        """The mask operand."""
        mask = argument(self.attention, 3, "attn_mask")
        return mask if isinstance(mask, fx.Node) else None

    def mask_depends_on_row(self) -> bool:
        """Whether the mask differs between query rows: causal, or read from memory by query."""
        if argument(self.attention, 5, "is_causal", False):
            return True
        mask = self.mask_node()
        if mask is None:
            return False
        shape = self.k.ev.shape(mask)
        over = tuple(tirx.Var(f"i{axis}", "int32") for axis in range(len(shape)))
        index = tuple(0 if as_int(s) == 1 else v for s, v in zip(shape, over, strict=True))
        found = self.k.ev.affine(mask, index, over)
        return found is None or not equal(found[1][len(shape) - 2], 0)

    def fill_mask(self, mask: Expr, index: Index, row: Expr, padded: Expr) -> None:
        """What is added to the scores of a query row: the mask, and -inf beyond the last key."""
        lanes = self.k.lanes
        for start, count in for_vectors(self.keys, lanes):
            T.buffer_store(self.scratch, self.mask_value(index, row, start, count), [lanes_at(mask + start, count)])
        with T.serial(0, padded - self.keys) as j:
            T.buffer_store(self.scratch, f32(float("-inf")), [mask + self.keys + j])

    def mask_value(self, index: Index, row: Expr, start: Expr, lanes: int) -> Expr:
        """The additive mask at keys ``start ..`` of one row, times log2(e)."""
        column = lanes_at(start, lanes)
        hidden = splat(float("-inf"), lanes)
        value: Expr = splat(0.0, lanes)
        node = self.mask_node()
        if node is not None:
            shape = self.k.ev.shape(node)
            full = (*index, row, column)[len(index) + 2 - len(shape) :]
            at = tuple(0 if as_int(s) == 1 else i for s, i in zip(shape, full, strict=True))
            value = splat(self.k.ev.at(node, at), lanes)
            if "float" in str(value.ty):
                # finfo.min stays finite: a row masked by it throughout is uniform, one masked by -inf is 0
                finite = T.max(splat(_LOWEST, lanes), value * splat(vmath.LOG2E, lanes))
                value = tirx.Select(tirx.EQ(value, hidden), hidden, finite)
            else:
                value = tirx.Select(value, splat(0.0, lanes), hidden)
        if argument(self.attention, 5, "is_causal", False):
            value = tirx.Select(column <= splat(row, lanes), value, hidden)
        return value

    def softmax(self, at: Expr, mask: Expr, padded: Expr) -> Expr:
        """Exponentials of a strip row in place; returns the reciprocal of their sum, 0 for a row that sees no key."""
        lanes = self.k.lanes
        whole = lanes_at(i32(0), lanes)
        top, total = T.alloc_buffer((lanes,), "float32"), T.alloc_buffer((lanes,), "float32")
        T.buffer_store(top, splat(_LOWEST, lanes), [whole])
        T.buffer_store(total, splat(0.0, lanes), [whole])
        with T.serial(0, T.floordiv(padded, lanes)) as v:
            place = lanes_at(at + v * lanes, lanes)
            score = T.bind(self.scratch[place] + self.scratch[lanes_at(mask + v * lanes, lanes)])
            T.buffer_store(self.scratch, score, [place])
            T.buffer_store(top, T.max(top[whole], score), [whole])
        highest = horizontal(T.bind(top[whole]), lanes, lambda a, b: T.max(a, b))
        with T.serial(0, T.floordiv(padded, lanes)) as v:
            place = lanes_at(at + v * lanes, lanes)
            weight = vmath.exp2_clamped(self.scratch[place] - splat(highest, lanes))
            T.buffer_store(self.scratch, weight, [place])
            T.buffer_store(total, total[whole] + weight, [whole])
        total_sum = T.bind(horizontal(T.bind(total[whole]), lanes, lambda a, b: a + b))
        # the largest score of a row that sees a key weighs 1; a row that sees none sums up clamped exponentials only
        return tirx.Select(total_sum < f32(1e-30), f32(0.0), f32(1.0) / total_sum)

    def weigh_values(self, values: Expr, scores: Expr, o_base: Expr, row: Expr, left: Expr, padded: Expr) -> None:
        """The strip times v, straight into the result, a block of columns at a time."""
        lanes = self.k.lanes
        for start in range(0, self.width, self.panel):
            columns = min(self.panel, self.width - start)
            a = T.address_of(self.scratch[scores])
            b = T.address_of(self.scratch[values + start])
            c = T.address_of(self.out.buffer[o_base + row * self.out.stride + start])
            sizes = (padded, i32(self.pitch), self.out.stride, self.keys)
            vectors, tail = -(-columns // lanes), columns % lanes
            call_tile(self.k.module, self.tile, left, (a, b, c, b), sizes, vectors=vectors, tail_lanes=tail)
