"""Convolution and pooling with the channels on the last axis: the ``planish::`` operators, and their arguments by name.

Each operator has a plain-PyTorch reference, so a graph with them runs in eager, and a shape function. They take
``x`` [N, spatial..., C] with one to three spatial axes and otherwise the arguments of the ATen op they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from planish.ops import CONVOLUTION, argument, aten

_AVERAGE: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMUM: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _channels_last(y: Tensor) -> Tensor:
    return y.movedim(1, -1).contiguous()


@torch.library.custom_op("planish::convolution", mutates_args=())
def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """``aten.convolution`` of [N, spatial..., C]; the weight keeps ATen's order of axes.

    ``padding`` has the zeros before each spatial axis, then those after each.
    """
    rank = x.dim() - 2
    before, after = list(padding[:rank]), list(padding[rank:])
    x = x.movedim(-1, 1)
    if before != after:
        sides = [p for axis in reversed(range(rank)) for p in (before[axis], after[axis])]
        x, before = F.pad(x, sides), [0] * rank
    y = aten.convolution.default(x, weight, bias, stride, before, dilation, transposed, output_padding, groups)
    return _channels_last(y)


@torch.library.custom_op("planish::max_pool", mutates_args=())
def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """Maximum over windows of [N, spatial..., C]; padding is -inf, a NaN in the window is the result."""
    pool = _MAXIMUM[x.dim() - 2]
    return _channels_last(pool(x.movedim(-1, 1), kernel, stride, padding, dilation, ceil_mode))


@torch.library.custom_op("planish::avg_pool", mutates_args=())
def avg_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Mean over windows of [N, spatial..., C]; 1-d pooling has no ``divisor_override``."""
    pool = _AVERAGE[x.dim() - 2]
    last = () if x.dim() == 3 else (divisor_override,)
    return _channels_last(pool(x.movedim(-1, 1), kernel, stride, padding, ceil_mode, count_include_pad, *last))


@convolution.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    sizes: list[Any] = []
    rank = x.dim() - 2
    for axis, size in enumerate(x.shape[1:-1]):
        around = padding[axis] + padding[rank + axis]
        reach = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        if transposed:
            sizes.append((size - 1) * stride[axis] - around + reach + output_padding[axis])
        else:
            sizes.append((size + around - reach) // stride[axis] + 1)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return x.new_empty((x.shape[0], *sizes, channels))


def _pooled(x: Tensor, windows: Sequence[Sequence[int]], ceil_mode: bool) -> Tensor:
    """An empty tensor of the shape of a pooling's result; ``windows`` are (kernel, stride, padding, dilation)."""
    sizes: list[Any] = []
    for size, (kernel, stride, padding, dilation) in zip(x.shape[1:-1], windows, strict=True):
        free = size + 2 * padding - dilation * (kernel - 1) - 1
        count = (free + (stride - 1 if ceil_mode else 0)) // stride + 1
        # a window must begin inside the input or the padding before it
        sizes.append(count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count)
    return x.new_empty((x.shape[0], *sizes, x.shape[-1]))


@max_pool.register_fake
def _(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    return _pooled(x, list(zip(kernel, stride, padding, dilation, strict=True)), ceil_mode)


@avg_pool.register_fake
def _(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    return _pooled(x, list(zip(kernel, stride, padding, [1] * len(kernel), strict=True)), ceil_mode)


CONVOLUTION_LAST = torch.ops.planish.convolution.default
MAX_POOL_LAST = torch.ops.planish.max_pool.default
AVG_POOL_LAST = torch.ops.planish.avg_pool.default

CONVOLUTIONS = frozenset({CONVOLUTION, CONVOLUTION_LAST})
MAX_POOLS = frozenset({aten.max_pool2d.default, aten.max_pool3d.default, MAX_POOL_LAST})
AVG_POOLS = frozenset({aten.avg_pool2d.default, aten.avg_pool3d.default, AVG_POOL_LAST})
POOLS = MAX_POOLS | AVG_POOLS


@dataclass(frozen=True)
class Window:
    """Which input positions an output position sees, one entry per spatial axis.

    Position ``o`` of the output sees ``o stride - padding + k dilation`` for k in ``0..kernel``.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    channels_last: bool

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    def split(self, sizes: Sequence[Any]) -> tuple[Any, Any, tuple[Any, ...]]:
        """(batch, channels, spatial) of a shape or index in this layout."""
        if self.channels_last:
            return sizes[0], sizes[-1], tuple(sizes[1:-1])
        return sizes[0], sizes[1], tuple(sizes[2:])

    def join(self, batch: Any, channel: Any, spatial: Sequence[Any]) -> tuple[Any, ...]:
        """A shape or index in this layout."""
        return (batch, *spatial, channel) if self.channels_last else (batch, channel, *spatial)


@dataclass(frozen=True)
class Convolution:
    """A convolution node by its arguments; both layouts have the same."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    window: Window
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    padding_after: tuple[int, ...]
    """Zeros after each spatial axis; those before are the window's."""

    @staticmethod
    def of(node: fx.Node) -> Convolution:
        """The arguments of an ``aten.convolution`` or ``planish::convolution`` node."""
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
        kernel = tuple(weight.meta["val"].shape[2:])  # pyright: ignore
        rank, last = len(kernel), node.target is CONVOLUTION_LAST
        before, after = (padding[:rank], padding[rank:]) if last else (padding, padding)  # pyright: ignore
        spatial = [_spread(v, rank) for v in (stride, before, dilation, output_padding, after)]
        window = Window(kernel, *spatial[:3], channels_last=last)
        return Convolution(x, weight, bias, window, bool(transposed), spatial[3], int(groups), spatial[4])  # pyright: ignore

    @property
    def inputs(self) -> int:
        """Input channels."""
        shape = self.weight.meta["val"].shape
        return int(shape[0] if self.transposed else shape[1] * self.groups)

    @property
    def outputs(self) -> int:
        """Output channels."""
        shape = self.weight.meta["val"].shape
        return int(shape[1] * self.groups if self.transposed else shape[0])

    @property
    def is_depthwise(self) -> bool:
        """Whether every output channel sees exactly one input channel of its own."""
        return self.groups == self.inputs == self.outputs

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a linear layer on the channels of each position."""
        w = self.window
        plain = set(w.kernel) == {1} and set(w.stride) == {1} and not any(w.padding) and not any(self.output_padding)
        return plain and self.groups == 1


def quantized_window(node: fx.Node) -> Window:
    """The window of a ``planish::quantized_convolution`` node; its padding is that before each axis."""
    kernel, stride, padding, dilation = (tuple(int(v) for v in a) for a in node.args[8:12])  # pyright: ignore
    return Window(kernel, stride, padding[: len(kernel)], dilation, channels_last=True)


def pool_window(node: fx.Node) -> tuple[Window, bool]:
    """The window of a pooling node and whether the output size is rounded up."""
    rank = node.args[0].meta["val"].dim() - 2  # pyright: ignore
    kernel = _spread(node.args[1], rank)
    stride = _spread(argument(node, 2, "stride") or kernel, rank)
    padding = _spread(argument(node, 3, "padding", 0), rank)
    is_max = node.target in MAX_POOLS
    dilation = _spread(argument(node, 4, "dilation", 1), rank) if is_max else (1,) * rank
    ceil_mode = bool(argument(node, 5 if is_max else 4, "ceil_mode", False))
    last = node.target in (MAX_POOL_LAST, AVG_POOL_LAST)
    return Window(kernel, stride, padding, dilation, last), ceil_mode


def _spread(value: Any, rank: int) -> tuple[int, ...]:
    """One int per spatial axis; ATen takes one for all."""
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * rank if len(values) == 1 else values))
