"""Convolutions of every kind, computed as they are defined: a loop over the window for each output position.

The fast kernels (``conv_gemm.py``, ``depthwise.py``) take the common kinds; this one takes all: any number of axes,
groups, dilation, transposed, both layouts. With the channels last it works on vectors of output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import sympy
import torch
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, ceil_div, f32, for_vectors, i32, lanes_at, splat
from planish.backends.tvm.index import flat_index, unflatten_index
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Packed, Region, kernel, rows_in_parallel
from planish.conv_ops import Convolution, Window
from planish.program import Program

Index = tuple[Expr, ...]


def conv_reason(node: fx.Node) -> str | None:
    """Why a convolution has no kernel here, or None."""
    x, weight = node.args[:2]
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    if x.meta["val"].dim() != weight.meta["val"].dim():
        return "a convolution without a batch axis has no kernel"
    if any(isinstance(a, fx.Node) for group in node.args[3:] for a in (group if isinstance(group, list) else [group])):
        return "stride, padding and dilation must be fixed"
    return None if node.meta["val"].dtype is torch.float32 else "convolutions are native for float32 only"


def lower_direct(
    module: Module, program: Program, region: Region, anchor: fx.Node, lanes: int, *, constant: bool
) -> Lowered:
    """Kernel of a region around any convolution; ``constant``: its weight can be packed beforehand.

    before: ``relu(convolution(x, w, b))``
    after:  for each position, for each vector of output channels of a group: bias, plus input times weight over the
            part of the window that lies inside and over the group's input channels; ReLU; store
    """
    conv = Convolution.of(anchor)
    window = conv.window
    lanes = lanes if window.channels_last and constant else 1
    packed = [(Packed(conv.weight, "transposed_taps" if conv.transposed else "taps", conv.groups), "float32")]
    extra, skip = (packed, [conv.weight]) if constant else ([], [])
    with kernel(module, program, region, extra, skip) as (k, out, extras):
        body = _Direct(k, conv, extras[0] if constant else None)
        batch, channels, spatial = window.split(k.ev.shape(anchor))
        groups = 1 if conv.is_depthwise else conv.groups
        width = channels // groups
        with positions(batch, spatial) as (n, place), T.serial(0, groups) as group:
            for start, count in for_vectors(width, lanes):
                channel = T.bind(group * width + start)
                value = body.sum(n, place, group, channel, count)
                store_value(k, anchor, value, out, window.join(n, lanes_at(channel, count), place), count)
    return lowered(k, program, "conv", anchor, conv)


@contextmanager
def positions(batch: Expr, spatial: Sequence[Expr]) -> Iterator[tuple[Expr, Index]]:
    """Emit a parallel loop over the positions of all images; yields (image, position)."""
    rows: Expr = i32(1)
    for s in (batch, *spatial):
        rows = rows * s
    with rows_in_parallel(T.bind(rows), tasks=256) as row:
        n, *place = (T.bind(i + i32(0)) for i in unflatten_index((batch, *spatial), row))
        yield n, tuple(place)


def store_value(k: Kernel, anchor: fx.Node, value: Expr, out: Any, index: Index, lanes: int) -> None:
    """Store the region's result at ``index``, the anchor's value there being ``value``."""
    k.ev.computed = {anchor: value}
    result = k.ev.at(k.region.result, index)
    k.ev.computed = {}
    T.buffer_store(out, splat(result, lanes), [flat_index(k.ev.shape(k.region.result), index)])


def lowered(k: Kernel, program: Program, stem: str, anchor: fx.Node, conv: Convolution) -> Lowered:
    """The finished kernel; ``shape`` is [N, O, output positions..., C / groups, window...]."""
    batch, channels, spatial = conv.window.split(program.shape(anchor))
    over = program.shape(conv.x if conv.transposed else anchor)
    _, _, steps = conv.window.split(over)
    depth = conv.inputs // conv.groups
    flops = 2 * batch * channels * depth * sympy.prod([*steps, *conv.window.kernel])
    assert k.function.func is not None
    shape = (batch, channels, *spatial, depth, *conv.window.kernel)
    return Lowered(stem, k.function.func, k.operands, stem, shape, flops)


class _Direct:
    """Code for one output position of a convolution; ``weights`` is None where they are not packed."""

    def __init__(self, k: Kernel, conv: Convolution, weights: Any) -> None:
        self.k, self.conv, self.weights = k, conv, weights

    def sum(self, n: Expr, place: Index, group: Expr, channel: Expr, lanes: int) -> Expr:
        """Bias and products of ``lanes`` output channels from ``channel`` on, which belong to ``group``."""
        conv, whole = self.conv, lanes_at(i32(0), lanes)
        total = T.alloc_buffer((lanes,), "float32")
        first = f32(0.0) if conv.bias is None else self.k.ev.at(conv.bias, (lanes_at(channel, lanes),))
        T.buffer_store(total, splat(first, lanes), [whole])
        depth = conv.inputs // conv.groups
        _, _, sizes = conv.window.split(self.k.ev.shape(conv.x))

        def multiply(tap: Expr, at: Index) -> None:
            with T.serial(0, depth) as c:
                source = lanes_at(channel, lanes) if conv.is_depthwise else T.bind(group * depth + c)
                x = self.k.ev.at(conv.x, conv.window.join(n, source, at))
                w = self._weight(tap, c, group, channel, lanes)
                T.buffer_store(total, total[whole] + splat(x, lanes) * w, [whole])

        (each_source if conv.transposed else each_tap)(conv.window, place, sizes, multiply)
        return T.bind(total[whole])

    def _weight(self, tap: Expr, c: Expr, group: Expr, channel: Expr, lanes: int) -> Expr:
        """The weights from input channel ``c`` of the group to the output channels."""
        conv = self.conv
        depth, width = conv.inputs // conv.groups, conv.outputs // conv.groups
        if self.weights is not None:
            return self.weights[lanes_at((tap * depth + c) * conv.outputs + channel, lanes)]
        where = unflatten_index(conv.window.kernel, tap)
        if not conv.transposed:
            return self.k.ev.at(conv.weight, (channel, c, *where))
        own = channel if conv.is_depthwise else group * depth + c
        return self.k.ev.at(conv.weight, (own, T.floormod(channel, width), *where))


def each_tap(window: Window, place: Index, sizes: Index, body: Callable[[Expr, Index], None]) -> None:
    """Loops over the window's positions that lie inside the input: ``body(tap, input position)``."""
    tap: Expr = i32(0)
    at: list[Expr] = []
    with ExitStack() as loops:
        for axis, (o, size) in enumerate(zip(place, sizes, strict=True)):
            first = T.bind(o * window.stride[axis] - window.padding[axis])
            low, high = inside(window, axis, first, size)
            i = loops.enter_context(T.serial(0, T.max(high - low, 0)))
            step = T.bind(low + i)
            tap = tap * window.kernel[axis] + step
            at.append(T.bind(first + step * window.dilation[axis]))
        body(T.bind(tap), tuple(at))


def inside(window: Window, axis: int, first: Expr, size: Expr) -> tuple[Expr, Expr]:
    """The part ``low..high`` of the window, whose first position is ``first``, that lies in ``0..size``."""
    d = window.dilation[axis]
    low = T.bind(T.max(0, ceil_div(0 - first, d)))
    return low, T.bind(T.min(window.kernel[axis], ceil_div(size - first, d)))


def each_source(window: Window, place: Index, sizes: Index, body: Callable[[Expr, Index], None]) -> None:
    """The same for a transposed convolution: input i reaches output ``i stride - padding + tap dilation``."""
    tap: Expr = i32(0)
    at: list[Expr] = []
    condition: Expr = tirx.const(True, "bool")
    with ExitStack() as loops:
        for axis, (o, size) in enumerate(zip(place, sizes, strict=True)):
            step = loops.enter_context(T.serial(0, window.kernel[axis]))
            reach = T.bind(o + window.padding[axis] - step * window.dilation[axis])
            source = T.bind(T.floordiv(reach, window.stride[axis]))
            hits = tirx.And(reach >= 0, tirx.And(tirx.EQ(source * window.stride[axis], reach), source < size))
            condition = tirx.And(condition, hits)
            tap = tap * window.kernel[axis] + step
            at.append(source)
        with T.If(condition), T.Then():
            body(T.bind(tap), tuple(at))
