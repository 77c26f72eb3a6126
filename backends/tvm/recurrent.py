"""Recurrent layers: one kernel runs all time steps, with the states in scratch memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm import vmath
from planish.backends.tvm.builder import Expr, ceil_div, f32, for_vectors, i32, lanes_at, splat, workspace
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Packed, Region, kernel
from planish.backends.tvm.microkernel import Tile, call_tile, gemm_tile
from planish.ops import planish_ops
from planish.program import Program


def lower_recurrent(module: Module, program: Program, region: Region, anchor: fx.Node) -> Lowered:
    """Kernel of ``planish::lstm_layer`` or ``planish::gru_layer``.

    before: ``lstm_layer(gates, weight, h, c, reverse)``
    after:  for each tile of the batch: for each time step: h times the packed weight, added to the step's gates;
            sigmoids and tanh; the new states into scratch (for the next step) and into the result
    """
    weight = anchor.args[1]
    assert isinstance(weight, fx.Node)
    count, size = (int(s) for s in weight.meta["val"].shape)
    tile = gemm_tile(module.target)
    width = tile.vectors * module.target.lanes
    panels = [(Packed(weight, "columns", width), "float32")]
    with kernel(module, program, region, panels, skip=[weight]) as (k, out, (packed,)):
        steps, batch, _ = k.ev.shape(anchor)
        with T.parallel(0, ceil_div(batch, tile.rows) + i32(0)) as block:
            pitch = -(-count // width) * width
            memory = workspace(tile.rows * (pitch + 2 * size))
            first = T.bind(block * tile.rows)
            rows = T.bind(T.min(batch - first, tile.rows))
            code = Recurrence(k, anchor, packed, out, memory, tile, size, count, pitch)
            code.begin(first, rows)
            with T.serial(0, steps) as s:
                code.step(T.bind(steps - 1 - s if anchor.args[-1] else s + i32(0)), batch, first, rows)
    steps, batch = program.shape(anchor)[:2]
    assert k.function.func is not None
    flops = sympy.Integer(2) * steps * batch * count * size
    return Lowered("recurrent", k.function.func, k.operands, "recurrent", (steps * batch, count, size), flops)


@dataclass(frozen=True)
class Recurrence:
    """Code for one tile of the batch. Scratch: what h contributes to the gates [rows, pitch], then h, then c."""

    k: Kernel
    anchor: fx.Node
    packed: Any
    out: Any
    memory: Any
    tile: Tile
    size: int
    count: int
    pitch: int

    @property
    def _is_lstm(self) -> bool:
        return self.anchor.target is planish_ops.lstm_layer.default

    @property
    def _states(self) -> tuple[Any, ...]:
        """The nodes of the first states."""
        return self.anchor.args[2:4] if self._is_lstm else self.anchor.args[3:4]

    def _state(self, which: int) -> int:
        return self.tile.rows * (self.pitch + which * self.size)

    def begin(self, first: Expr, rows: Expr) -> None:
        """Copy the first states."""
        for which, node in enumerate(self._states):
            with T.serial(0, rows) as r:
                for start, lanes in for_vectors(self.size, self.k.lanes):
                    value = self.k.ev.at(node, (first + r, lanes_at(start, lanes)))
                    T.buffer_store(self.memory, value, [lanes_at(self._state(which) + r * self.size + start, lanes)])

    def step(self, t: Expr, batch: Expr, first: Expr, rows: Expr) -> None:
        """One time step."""
        self._multiply(rows)
        with T.serial(0, rows) as r:
            for start, lanes in for_vectors(self.size, self.k.lanes):
                if self._is_lstm:
                    self._lstm(t, batch, T.bind(first + r), r, start, lanes)
                else:
                    self._gru(t, batch, T.bind(first + r), r, start, lanes)

    def _multiply(self, rows: Expr) -> None:
        """h times the recurrent weight."""
        width = self.tile.vectors * self.k.lanes
        whole, rest = divmod(self.count, width)

        def panel(column: Expr, vectors: int) -> None:
            h, c = T.address_of(self.memory[self._state(0)]), T.address_of(self.memory[column])
            b = T.address_of(self.packed[column * self.size])
            sizes = (i32(self.size), i32(vectors * self.k.lanes), i32(self.pitch), i32(self.size))
            call_tile(self.k.module, self.tile, rows, (h, b, c, b), sizes, vectors=vectors)

        if whole:
            with T.serial(0, whole) as n:
                panel(T.bind(n * width), self.tile.vectors)
        if rest:
            panel(i32(whole * width), -(-rest // self.k.lanes))

    def _part(self, r: Expr, gate: int, start: Expr, lanes: int) -> Expr:
        """What h contributes to a gate."""
        return self.memory[lanes_at(r * self.pitch + gate * self.size + start, lanes)]

    def _given(self, t: Expr, row: Expr, gate: int, start: Expr, lanes: int) -> Expr:
        """What the input contributes to a gate."""
        return self.k.ev.at(self.anchor.args[0], (t, row, lanes_at(gate * self.size + start, lanes)))

    def _lstm(self, t: Expr, batch: Expr, row: Expr, r: Expr, start: Expr, lanes: int) -> None:
        i, f, g, o = (
            T.bind(self._part(r, gate, start, lanes) + self._given(t, row, gate, start, lanes)) for gate in range(4)
        )
        at_h, at_c = (lanes_at(self._state(which) + r * self.size + start, lanes) for which in range(2))
        c = T.bind(vmath.sigmoid(f) * self.memory[at_c] + vmath.sigmoid(i) * vmath.tanh(g))
        h = T.bind(vmath.sigmoid(o) * vmath.tanh(c))
        place = (t * batch + row) * (2 * self.size) + start
        for value, inside, outside in ((h, at_h, place), (c, at_c, place + self.size)):
            T.buffer_store(self.memory, value, [inside])
            T.buffer_store(self.out, value, [lanes_at(outside, lanes)])

    def _gru(self, t: Expr, batch: Expr, row: Expr, r: Expr, start: Expr, lanes: int) -> None:
        bias = self.anchor.args[2]

        def hidden(gate: int) -> Expr:
            own = self.k.ev.at(bias, (lanes_at(gate * self.size + start, lanes),))
            return T.bind(self._part(r, gate, start, lanes) + own)

        reset, update = (
            T.bind(vmath.sigmoid(hidden(gate) + self._given(t, row, gate, start, lanes))) for gate in range(2)
        )
        new = T.bind(vmath.tanh(self._given(t, row, 2, start, lanes) + reset * hidden(2)))
        at = lanes_at(self._state(0) + r * self.size + start, lanes)
        h = T.bind(new * (splat(f32(1.0), lanes) - update) + update * self.memory[at])
        T.buffer_store(self.memory, h, [at])
        T.buffer_store(self.out, h, [lanes_at((t * batch + row) * self.size + start, lanes)])


def recurrent_reason(node: fx.Node) -> str | None:
    """Why a recurrent layer has no kernel here, or None."""
    return None if node.args[1].op == "get_attr" else "the recurrent weight must be a constant"  # pyright: ignore
