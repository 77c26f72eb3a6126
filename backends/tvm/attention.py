"""Scaled-dot-product attention at GEMM speed, one (batch, head) at a time, with scores that never leave the cache."""

from __future__ import annotations

from collections.abc import Callable
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
from planish.ops import VARLEN, argument
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


@dataclass(frozen=True)
class Terms:
    """What an attention op says about its scores, whichever op it is.

    Attributes:
        mask: added to the scores, or bool; None where all keys are seen.
        causal: whether a query sees keys up to its own column only.
        scale: of the scores.
    """

    mask: fx.Node | None
    causal: bool
    scale: float

    @staticmethod
    def of(attention: fx.Node) -> Terms:
        """The terms of ``scaled_dot_product_attention`` or ``planish::varlen_attention``."""
        packed = attention.target is VARLEN
        mask = argument(attention, 6 if packed else 3, "attn_mask")
        causal = bool(argument(attention, 9 if packed else 5, "is_causal", False))
        scale = argument(attention, 10 if packed else 6, "scale")
        depth = int(attention.args[0].meta["val"].shape[-1])  # pyright: ignore
        scale = float(depth**-0.5 if scale is None else scale)
        return Terms(mask if isinstance(mask, fx.Node) else None, causal, scale)


@dataclass(frozen=True)
class Block:
    """Sizes that the kernel of an attention op works in.

    Attributes:
        tile: register block.
        depth: of queries and keys.
        width: of values.
        keys: most keys whose scores, transposed keys and copied values are at hand together: they fill at most half the
            second-level cache.
        queries: most queries that a block of keys serves before it is copied again.
    """

    tile: Tile
    depth: int
    width: int
    keys: int
    queries: int = 1024

    @staticmethod
    def of(module: Module, attention: fx.Node, most: int) -> Block:
        """The block for at most ``most`` keys."""
        tile, lanes = attention_tile(module.target), module.target.lanes
        depth, width = (int(attention.args[i].meta["val"].shape[-1]) for i in (0, 2))  # pyright: ignore
        panel = tile.vectors * lanes
        fitting = module.target.l2_bytes // 2 // (4 * (depth + tile.rows + 1 + -(-width // lanes) * lanes))
        keys = min(round_up(most, panel), max(1, fitting // panel) * panel)
        return Block(tile, depth, width, keys)

    def scratch(self, lanes: int) -> int:
        """Elements of a task's scratch memory."""
        pitch = -(-self.width // lanes) * lanes
        strip = (self.keys + lanes) * self.tile.rows
        return self.keys * (self.depth + 1 + pitch) + strip + self.tile.rows * pitch + 2 * self.queries


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
    keys, queries = program.shape(key)[-2], program.shape(q)[-2]
    most = program.upper_bound(keys)
    block = Block.of(module, attention, most)
    with kernel(module, program, region) as (k, out, _):
        places = [matrix(k.ev, n) for n in (q, key, value)]  # pyright: ignore
        places.append(result_matrix(k.ev, region, attention, out))
        shape = k.ev.shape(attention)
        items: Expr = i32(1)
        for s in shape[:-2]:
            items = items * s
        items = T.bind(items)
        with T.parallel(0, TASKS) as task:
            buffer = workspace(block.scratch(k.lanes))
            with T.serial(0, T.max(ceil_div(items - task, TASKS), 0)) as n:
                index = tuple(T.bind(i + i32(0)) for i in unflatten_index(shape[:-2], T.bind(task + n * TASKS)))
                scores = Scores(k, Terms.of(attention), index)
                bases = [T.bind(m.base(index)) for m in places if m is not None]
                strides = [m.stride for m in places if m is not None]
                buffers = [m.buffer for m in places if m is not None]
                operands = [Rows(b, at, s) for b, at, s in zip(buffers, bases, strides, strict=True)]
                item = Item(k, block, buffer, scores, operands[0], operands[1], operands[2], operands[3])
                item.emit(k.ev.shape(key)[-2], shape[-2], single=most <= block.keys)
    total = sympy.prod(program.shape(attention)[:-2])
    flops = 2 * total * queries * keys * (block.depth + block.width)
    assert k.function.func is not None
    sizes = (*program.shape(q)[:-1], keys, block.depth)
    return Lowered("attention", k.function.func, k.operands, "attention", sizes, flops)


@dataclass(frozen=True)
class Rows:
    """A matrix in memory: first element, elements between rows; columns are contiguous."""

    buffer: Any
    base: Expr
    stride: Expr


@dataclass(frozen=True)
class Columns:
    """Columns in the padded batch of a row's tokens.

    Attributes:
        of: column of a token, from its number within the row.
        first: column of the first token.
        follow: whether they follow each other, as they do where the mask has no holes.
    """

    of: Callable[[Expr], Expr]
    first: Expr
    follow: Expr


@dataclass(frozen=True)
class Scores:
    """What is added to the scores of one (batch, head).

    Attributes:
        lead: index of the batch and the head.
        queries: columns of the queries in the mask; None where a query's number is its column.
        keys: columns of the keys.
    """

    k: Kernel
    terms: Terms
    lead: Index
    queries: Columns | None = None
    keys: Columns | None = None

    def by_row(self) -> bool:
        """Whether they differ between query rows: causal, or read from memory by query."""
        if self.terms.causal:
            return True
        mask = self.terms.mask
        if mask is None:
            return False
        shape = self.k.ev.shape(mask)
        over = tuple(tirx.Var(f"i{axis}", "int32") for axis in range(len(shape)))
        index = tuple(0 if as_int(s) == 1 else v for s, v in zip(shape, over, strict=True))
        found = self.k.ev.affine(mask, index, over)
        return found is None or not equal(found[1][len(shape) - 2], 0)

    def store(self, query: Expr, first: Expr, count: Expr, into: Any, at: Expr) -> None:
        """Write what is added at keys ``first .. first+count`` of a query, times log2(e).

        Keys whose columns follow each other are read a vector at a time.
        """
        row = query if self.queries is None else self.queries.of(query)

        def follow(start: Expr) -> None:
            for j, lanes in for_vectors(count, self.k.lanes):
                value = self._value(row, lanes_at(T.bind(start + j), lanes), lanes)
                T.buffer_store(into, value, [lanes_at(at + j, lanes)])

        if self.keys is None:
            follow(first)
            return
        with T.If(self.keys.follow):
            with T.Then():
                follow(T.bind(self.keys.first + first))
            with T.Else(), T.serial(0, count) as j:
                T.buffer_store(into, self._value(row, self.keys.of(first + j), 1), [at + j])

    def _value(self, row: Expr, column: Expr, lanes: int) -> Expr:
        """The additive mask at some columns of a row, times log2(e)."""
        hidden = splat(float("-inf"), lanes)
        value: Expr = splat(0.0, lanes)
        node = self.terms.mask
        if node is not None:
            shape = self.k.ev.shape(node)
            full = (*self.lead, row, column)[len(self.lead) + 2 - len(shape) :]
            at = tuple(0 if as_int(s) == 1 else i for s, i in zip(shape, full, strict=True))
            value = splat(self.k.ev.at(node, at), lanes)
            if "float" in str(value.ty):
                # finfo.min stays finite: a row masked by it throughout is uniform, one masked by -inf is 0
                finite = T.max(splat(_LOWEST, lanes), value * splat(vmath.LOG2E, lanes))
                value = tirx.Select(tirx.EQ(value, hidden), hidden, finite)
            else:
                value = tirx.Select(value, splat(0.0, lanes), hidden)
        if self.terms.causal:
            value = tirx.Select(column <= splat(row, lanes), value, hidden)
        return value


@dataclass(frozen=True)
class Item:
    """Code for one (batch, head).

    Keys come in blocks. Of each query the sum so far is kept as a mantissa and a power of two: the weights are
    2^(score - n), n the greatest score so far, rounded. When a block raises n, what there is is scaled by a power of
    two, which is exact (Dukhan and Ablavatski, arXiv 2001.04438).

    Scratch of a task, for a block of keys: k panels [depth, keys], scores [rows, keys], mask [keys], v [keys, width in
    vectors]; then a tile of results [rows, width in vectors], and for each query n and the sum.
    """

    k: Kernel
    block: Block
    scratch: Any
    scores: Scores
    q: Rows
    key: Rows
    value: Rows
    out: Rows

    @property
    def panel(self) -> int:
        """Keys per panel."""
        return self.block.tile.vectors * self.k.lanes

    @property
    def pitch(self) -> int:
        """Elements between the copied rows of v."""
        return -(-self.block.width // self.k.lanes) * self.k.lanes

    def place(self, part: str) -> int:
        """Where a part of the scratch memory begins."""
        keys, rows, depth = self.block.keys, self.block.tile.rows, self.block.depth
        sizes = {
            "keys": keys * depth,
            "scores": (keys + self.k.lanes) * rows,
            "mask": keys,
            "values": keys * self.pitch,
            "tile": rows * self.pitch,
            "power": self.block.queries,
            "sum": self.block.queries,
        }
        names = list(sizes)
        return sum(sizes[name] for name in names[: names.index(part)])

    def emit(self, keys: Expr, queries: Expr, *, single: bool) -> None:
        """Statements for the item; with ``single`` its keys are known to fit one block."""
        block = self.block
        with T.serial(0, ceil_div(queries, block.queries)) as part:
            first = T.bind(part * block.queries)
            rows = T.bind(T.min(queries - first, block.queries))
            if single:
                self._keys(first, rows, i32(0), T.bind(keys + i32(0)), started=False, last=True)
            else:
                self._blocks(first, rows, keys)

    def _blocks(self, first: Expr, rows: Expr, keys: Expr) -> None:
        """All blocks of keys for a chunk of queries."""
        size = self.block.keys
        with T.serial(0, ceil_div(keys, size)) as j:
            begin = T.bind(j * size)
            count = T.bind(T.min(keys - begin, size))
            with T.If(tirx.EQ(j, i32(0))):
                with T.Then():
                    self._keys(first, rows, begin, count, started=False, last=False)
                with T.Else():
                    self._keys(first, rows, begin, count, started=True, last=False)
        with T.serial(0, rows) as r:
            self._scale(T.bind(first + r), _reciprocal(T.bind(self.scratch[self.place("sum") + r])))

    def _keys(self, first: Expr, rows: Expr, begin: Expr, count: Expr, *, started: bool, last: bool) -> None:
        """A block of keys for a chunk of queries: added to what is there if ``started``, divided if it is the last."""
        tile = self.block.tile
        padded = T.bind(round_up(count, self.panel))
        self.pack_keys(begin, count, padded)
        self.pack_values(begin, count)
        by_row = self.scores.by_row()
        if not by_row:
            self.fill_mask(i32(0), begin, count, padded)
        with T.serial(0, ceil_div(rows, tile.rows)) as t:
            row = T.bind(first + t * tile.rows)
            left = T.bind(rows - t * tile.rows)
            here = T.bind(T.min(left, tile.rows))
            with T.serial(0, T.floordiv(padded, self.panel)) as p:
                a = T.address_of(self.q.buffer[self.q.base + row * self.q.stride])
                b = T.address_of(self.scratch[self.place("keys") + p * (self.block.depth * self.panel)])
                c = T.address_of(self.scratch[self.place("scores") + p * self.panel])
                start = None if by_row else T.address_of(self.scratch[self.place("mask") + p * self.panel])
                sizes = (self.q.stride, i32(self.panel), self.strip(padded), i32(self.block.depth))
                call_tile(self.k.module, tile, left, (a, b, c, b), sizes, vectors=tile.vectors, bias=start)
            factor = T.alloc_buffer((tile.rows,), "float32")
            with T.serial(0, here) as r:
                if by_row:
                    self.fill_mask(T.bind(row + r), begin, count, padded)
                    self._add_mask(self._strip_row(r, padded), padded)
                scale = self._weigh(T.bind(row - first + r), r, padded, started=started, last=last)
                if scale is not None:
                    T.buffer_store(factor, scale, [r])
            self.weigh_values(row, left, count, padded, started=started)
            if started:
                with T.serial(0, here) as r:
                    self._add(T.bind(row + r), r, T.bind(factor[r]))
            elif last:
                with T.serial(0, here) as r:
                    self._scale(T.bind(row + r), T.bind(factor[r]))

    def _weigh(self, query: Expr, r: Expr, padded: Expr, *, started: bool, last: bool) -> Expr | None:
        """Turn a strip row into weights; returns what the result so far (or, if it is the last block, the new one) is
        to be multiplied by."""
        powers, sums = self.place("power") + query, self.place("sum") + query
        at = self._strip_row(r, padded)
        highest = T.bind(T.nearbyint(self._highest(at, padded)))
        if started:
            before = T.bind(self.scratch[powers])
            highest = T.bind(T.max(before, highest))
        total = self.softmax(at, highest, padded)
        if last:
            return _reciprocal(total)
        scale = None
        if started:
            scale = T.bind(vmath.exp2_clamped(before - highest))
            total = T.bind(self.scratch[sums] * scale + total)
        T.buffer_store(self.scratch, highest, [powers])
        T.buffer_store(self.scratch, total, [sums])
        return scale

    def pack_keys(self, begin: Expr, count: Expr, padded: Expr) -> None:
        """Keys as [panel of keys][depth][key], times scale and log2(e); the last key is repeated up to a whole panel.

        With log2(e) in the scores the softmax can use powers of two.
        """
        lanes, depth = self.k.lanes, self.block.depth
        scale = vmath.LOG2E * self.scores.terms.scale

        def key(j: Expr) -> Expr:
            return T.bind(self.key.base + (begin + T.min(j, count - 1)) * self.key.stride)

        def place(j: Expr, d: Expr) -> Expr:
            return T.floordiv(j, self.panel) * (depth * self.panel) + T.floormod(j, self.panel) + d * self.panel

        with T.serial(0, T.floordiv(padded, lanes)) as block:
            first = T.bind(block * lanes)
            rows = [key(first + j) for j in range(lanes)]
            with T.serial(0, depth // lanes) as columns:
                at = T.bind(columns * lanes)
                tile = [T.bind(self.key.buffer[lanes_at(row + at, lanes)]) for row in rows]
                for d, vector in enumerate(transpose(tile, lanes)):
                    T.buffer_store(self.scratch, vector * splat(scale, lanes), [lanes_at(place(first, at + d), lanes)])
            with T.serial(0, depth % lanes) as d:
                column = T.bind(d + depth // lanes * lanes)
                for j, row in enumerate(rows):
                    T.buffer_store(self.scratch, self.key.buffer[row + column] * f32(scale), [place(first + j, column)])

    def pack_values(self, begin: Expr, count: Expr) -> None:
        """Copy v's rows next to each other: in place they may share few cache sets."""
        with T.serial(0, count) as j:
            row = T.bind(self.value.base + (begin + j) * self.value.stride)
            for start, lanes in for_vectors(self.block.width, self.k.lanes):
                value = self.value.buffer[lanes_at(row + start, lanes)]
                place = lanes_at(self.place("values") + j * self.pitch + start, lanes)
                T.buffer_store(self.scratch, value, [place])

    def fill_mask(self, row: Expr, begin: Expr, count: Expr, padded: Expr) -> None:
        """What is added to the scores of a query row: the mask, and -inf beyond the last key."""
        mask = self.place("mask")
        self.scores.store(row, begin, count, self.scratch, i32(mask))
        with T.serial(0, padded - count) as j:
            T.buffer_store(self.scratch, f32(float("-inf")), [mask + count + j])

    def strip(self, padded: Expr) -> Expr:
        """Elements between the rows of scores: not a power of two, or all rows would share few cache sets."""
        return padded + self.k.lanes

    def _strip_row(self, r: Expr, padded: Expr) -> Expr:
        return T.bind(self.place("scores") + r * self.strip(padded))

    def _add_mask(self, at: Expr, padded: Expr) -> None:
        """Add a row's own mask to its scores; one that all rows share is what the sums of the tiles start from."""
        lanes, mask = self.k.lanes, self.place("mask")
        with T.serial(0, T.floordiv(padded, lanes)) as v:
            place = lanes_at(at + v * lanes, lanes)
            T.buffer_store(self.scratch, self.scratch[place] + self.scratch[lanes_at(mask + v * lanes, lanes)], [place])

    def _highest(self, at: Expr, padded: Expr) -> Expr:
        """The greatest score of a strip row."""
        lanes = self.k.lanes
        whole = lanes_at(i32(0), lanes)
        top = [T.alloc_buffer((lanes,), "float32") for _ in range(self.block.tile.vectors)]
        for register in top:
            T.buffer_store(register, splat(_LOWEST, lanes), [whole])
        with T.serial(0, T.floordiv(padded, self.panel)) as p:
            for v, register in enumerate(top):
                score = self.scratch[lanes_at(at + p * self.panel + v * lanes, lanes)]
                T.buffer_store(register, T.max(register[whole], score), [whole])
        for register in top[1:]:
            T.buffer_store(top[0], T.max(top[0][whole], register[whole]), [whole])
        return horizontal(T.bind(top[0][whole]), lanes, lambda a, b: T.max(a, b))

    def softmax(self, at: Expr, highest: Expr, padded: Expr) -> Expr:
        """Weights 2^(score - highest) of a strip row in place; returns their sum."""
        lanes = self.k.lanes
        whole = lanes_at(i32(0), lanes)
        totals = [T.alloc_buffer((lanes,), "float32") for _ in range(self.block.tile.vectors)]
        for total in totals:
            T.buffer_store(total, splat(0.0, lanes), [whole])
        with T.serial(0, T.floordiv(padded, self.panel)) as p:
            for v, total in enumerate(totals):
                place = lanes_at(at + p * self.panel + v * lanes, lanes)
                weight = vmath.exp2_clamped(self.scratch[place] - splat(highest, lanes))
                T.buffer_store(self.scratch, weight, [place])
                T.buffer_store(total, total[whole] + weight, [whole])
        for total in totals[1:]:
            T.buffer_store(totals[0], totals[0][whole] + total[whole], [whole])
        return T.bind(horizontal(T.bind(totals[0][whole]), lanes, lambda a, b: a + b))

    def weigh_values(self, row: Expr, left: Expr, count: Expr, padded: Expr, *, started: bool) -> None:
        """The strip times v, a block of columns at a time: straight into the result, or beside it if ``started``."""
        lanes, tile = self.k.lanes, self.block.tile
        into, at, stride = self.out.buffer, T.bind(self.out.base + row * self.out.stride), self.out.stride
        if started:
            into, at, stride = self.scratch, i32(self.place("tile")), i32(self.pitch)
        for start in range(0, self.block.width, self.panel):
            columns = min(self.panel, self.block.width - start)
            a = T.address_of(self.scratch[self.place("scores")])
            b = T.address_of(self.scratch[self.place("values") + start])
            c = T.address_of(into[at + start])
            sizes = (self.strip(padded), i32(self.pitch), stride, count)
            vectors, tail = -(-columns // lanes), columns % lanes
            call_tile(self.k.module, tile, left, (a, b, c, b), sizes, vectors=vectors, tail_lanes=tail)

    def _scale(self, row: Expr, factor: Expr) -> None:
        at = T.bind(self.out.base + row * self.out.stride)
        for start, lanes in for_vectors(self.block.width, self.k.lanes):
            place = lanes_at(at + start, lanes)
            T.buffer_store(self.out.buffer, self.out.buffer[place] * splat(factor, lanes), [place])

    def _add(self, row: Expr, r: Expr, factor: Expr) -> None:
        at, tile = T.bind(self.out.base + row * self.out.stride), T.bind(self.place("tile") + r * self.pitch)
        for start, lanes in for_vectors(self.block.width, self.k.lanes):
            place = lanes_at(at + start, lanes)
            new = self.scratch[lanes_at(tile + start, lanes)]
            T.buffer_store(self.out.buffer, self.out.buffer[place] * splat(factor, lanes) + new, [place])


def _reciprocal(total: Expr) -> Expr:
    """1/total; 0 for a row that sees no key: it sums up clamped exponentials only, a key seen at the top weighs 0.7."""
    return tirx.Select(total < f32(1e-30), f32(0.0), f32(1.0) / total)
