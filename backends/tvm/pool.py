"""Pooling: the maximum or the mean of each window, and the mean of all positions of a channels-last tensor."""

from __future__ import annotations

import sympy
import torch
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, ceil_div, f32, for_vectors, i32, lanes_at, splat
from planish.backends.tvm.conv import Index, each_tap, inside, positions, store_value
from planish.backends.tvm.kernel import Lowered, Module, Region, kernel, rows_in_parallel
from planish.conv_ops import MAX_POOLS, Window, pool_window
from planish.ops import argument, aten
from planish.program import Program


def pool_reason(node: fx.Node) -> str | None:
    """Why a pooling op has no kernel here, or None."""
    x = node.args[0].meta["val"]  # pyright: ignore
    rank = {"1": 3, "2": 4, "3": 5}.get(str(node.target).split("pool")[1][:1], x.dim())
    if x.dim() != rank:
        return "pooling without a batch axis has no kernel"
    if any(isinstance(a, fx.Node) for group in node.args[1:] for a in (group if isinstance(group, list) else [group])):
        return "the window must be fixed"
    return None if x.dtype is torch.float32 else "pooling is native for float32 only"


def lower_pool(module: Module, program: Program, region: Region, anchor: fx.Node, lanes: int) -> Lowered:
    """Kernel of a region around a pooling op.

    before: ``relu(max_pool(x, 3, 2))``
    after:  for each position, for each vector of channels: the maximum over the part of the window inside; ReLU; store
    """
    window, _ = pool_window(anchor)
    lanes = lanes if window.channels_last else 1
    is_max = anchor.target in MAX_POOLS
    x = anchor.args[0]
    assert isinstance(x, fx.Node)
    with kernel(module, program, region) as (k, out, _):
        batch, channels, spatial = window.split(k.ev.shape(anchor))
        _, _, sizes = window.split(k.ev.shape(x))
        with positions(batch, spatial) as (n, place):
            scale = None if is_max else T.bind(f32(1.0) / tirx.Cast("float32", _divisor(anchor, window, place, sizes)))
            for start, count in for_vectors(channels, lanes):
                whole, channel = lanes_at(i32(0), count), lanes_at(start, count)
                total = T.alloc_buffer((count,), "float32")
                T.buffer_store(total, splat(float("-inf") if is_max else 0.0, count), [whole])

                def combine(tap: Expr, at: Index, whole: Expr = whole, channel: Expr = channel) -> None:
                    value = T.bind(k.ev.at(x, window.join(n, channel, at)))
                    old = total[whole]  # noqa: B023  (called at once)
                    # "old > value ? old : value" keeps a NaN of ``value``; one of ``old`` must stay too
                    new = tirx.Select(T.isnan(old), old, T.max(old, value)) if is_max else old + value
                    T.buffer_store(total, new, [whole])  # noqa: B023

                each_tap(window, place, sizes, combine)
                value = total[whole] if scale is None else total[whole] * splat(scale, count)
                store_value(k, anchor, T.bind(value), out, window.join(n, channel, place), count)
    elements = sympy.prod(program.shape(anchor))
    assert k.function.func is not None
    name = "max_pool" if is_max else "avg_pool"
    shape = (*program.shape(anchor), *window.kernel)
    return Lowered(name, k.function.func, k.operands, name, shape, elements * sympy.prod(window.kernel))


def _divisor(anchor: fx.Node, window: Window, place: Index, sizes: Index) -> Expr:
    """What the sum of a window is divided by: PyTorch clips the window to the padded input, then to the input."""
    override = argument(anchor, 6, "divisor_override")
    if override:
        return i32(int(override))
    with_padding = argument(anchor, 5, "count_include_pad", True)
    count: Expr = i32(1)
    for axis, (o, size) in enumerate(zip(place, sizes, strict=True)):
        first = T.bind(o * window.stride[axis] - window.padding[axis])
        if with_padding:
            reach = T.min(first + window.kernel[axis], size + window.padding[axis]) - first
        else:
            low, high = inside(window, axis, first, size)
            reach = high - low
        count = count * reach
    return count


def is_channel_mean(node: fx.Node) -> bool:
    """Whether an op is an fp32 mean over all axes between the first and the last."""
    if node.target is not aten.mean.dim or node.meta["val"].dtype is not torch.float32:
        return False
    x = node.args[0].meta["val"]  # pyright: ignore
    axes = node.args[1]
    return x.dim() > 2 and [a % x.dim() for a in axes] == list(range(1, x.dim() - 1))  # pyright: ignore


def lower_channel_mean(module: Module, program: Program, region: Region, anchor: fx.Node, lanes: int) -> Lowered:
    """Kernel of a region around the mean over the inner axes: vectors along the last one.

    before: ``relu(mean(x, [1, 2]))`` of [n, h, w, c]
    after:  for each image and vector of channels: the sum over all positions, times 1 / (h w); ReLU; store
    """
    x = anchor.args[0]
    assert isinstance(x, fx.Node)
    with kernel(module, program, region) as (k, out, _):
        batch, *spatial, channels = k.ev.shape(x)
        kept = len(k.ev.shape(anchor)) > 2
        scale: Expr = i32(1)
        for s in spatial:
            scale = scale * s
        scale = T.bind(f32(1.0) / tirx.Cast("float32", scale))
        block = lanes * 4
        blocks = ceil_div(channels, block)
        with rows_in_parallel(T.bind(batch * blocks + i32(0))) as row:
            n, first = T.bind(T.floordiv(row, blocks)), T.bind(T.floormod(row, blocks) * block)
            for start, count in for_vectors(T.bind(T.min(channels - first, block)), lanes):
                channel, whole = lanes_at(first + start, count), lanes_at(i32(0), count)
                total = T.alloc_buffer((count,), "float32")
                T.buffer_store(total, splat(0.0, count), [whole])
                with T.grid(*spatial) as place:
                    at = place if isinstance(place, (list, tuple)) else [place]
                    value = splat(k.ev.at(x, (n, *at, channel)), count)
                    T.buffer_store(total, total[whole] + value, [whole])
                middle = (0,) * (len(k.ev.shape(anchor)) - 2) if kept else ()
                store_value(k, anchor, T.bind(total[whole] * splat(scale, count)), out, (n, *middle, channel), count)
    assert k.function.func is not None
    return Lowered("channel_mean", k.function.func, k.operands, "mean", program.shape(x), sympy.prod(program.shape(x)))
