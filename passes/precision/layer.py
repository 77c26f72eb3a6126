"""A linear layer or a convolution as the matrix that is quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from planish.conv_ops import CONVOLUTION_LAST, Convolution
from planish.program import Program, constant


@dataclass(frozen=True)
class Layer:
    """A layer with a constant weight.

    Attributes:
        node: its op.
        weight: fp32 [N, K]; of a convolution K is [window..., C / groups].
        bias: of N features, or None.
        depthwise: whether each feature has an input channel of its own.
    """

    node: fx.Node
    weight: Tensor
    bias: fx.Node | None
    depthwise: bool = False

    @staticmethod
    def of(program: Program, node: fx.Node) -> Layer:
        """The layer that a linear or ``planish::convolution`` node computes."""
        weight = constant(program.module, node.args[1]).detach().float()  # pyright: ignore
        bias: Any = node.args[2] if len(node.args) > 2 else None
        if node.target is not CONVOLUTION_LAST:
            return Layer(node, weight, bias)
        return Layer(node, weight.movedim(1, -1).flatten(1), bias, Convolution.of(node).is_depthwise)

    @property
    def kind(self) -> str:
        """As reports call it."""
        if self.depthwise:
            return "depthwise convolution"
        return "convolution" if self.node.target is CONVOLUTION_LAST else "linear"

    @property
    def channels(self) -> int:
        """Size of the input's last axis."""
        return int(self.node.args[0].meta["val"].shape[-1])  # pyright: ignore

    def by_channel(self) -> Tensor:
        """What each input channel is multiplied by, [products, C]."""
        return self.weight.T if self.depthwise else self.weight.reshape(-1, self.channels)

    def times(self, weight: Tensor, factors: Tensor) -> Tensor:
        """A weight [N, K] with what each input channel is multiplied by times a factor of its own, [C]."""
        if self.depthwise:
            return weight * factors[:, None]
        return (weight.unflatten(1, (-1, self.channels)) * factors).flatten(1)

    def of_mean(self, weight: Tensor, mean: Tensor) -> Tensor:
        """The layer with another weight [N, K] on an input that is ``mean``, [C], at all positions; [N]."""
        if self.depthwise:
            return weight.sum(1) * mean
        return weight.unflatten(1, (-1, self.channels)).sum(1) @ mean


def convolution_reason(program: Program, node: fx.Node) -> str | None:
    """Why a convolution stays fp32, or None."""
    conv = Convolution.of(node)
    if conv.transposed or (conv.groups > 1 and not conv.is_depthwise):
        return "only dense and depthwise convolutions have kernels on codes"
    if not program.calibration:
        return "all positions of a window share a scale, which is found by calibration"
    window = conv.window
    if window.kernel == (3, 3) and {*window.stride, *window.dilation} == {1} and not conv.is_depthwise:
        return "in fp32 it takes a quarter of the products (Winograd), which no codes of 8 bits make up for"
    return None
