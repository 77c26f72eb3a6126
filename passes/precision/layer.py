"""A linear layer or a convolution as the matrix that is quantised."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from planish.conv_ops import CONVOLUTION_LAST, Convolution
from planish.ops import LINEAR, VIEWS, has_constant_weight
from planish.program import Program, constant

DEPTHWISE = "depthwise convolution"

NOTABLE_WEIGHT = 40.0
"""A weight of this outlier score has outliers: a row's scale is theirs, so that codes of the others are coarse. A few
layers of MiniLM have 140 to 330, of SmolLM2 48 to 57, the others 4 to 40."""

LEAST_DEPTH = 32
"""Fewest input features of a layer: with less, turning rows into codes costs more than the products save."""


@dataclass(frozen=True)
class Matrix:
    """The weight of a layer, apart from the graph.

    Attributes:
        weight: fp32 [N, K]; of a convolution K is [window..., C / groups].
        channels: size of the input's last axis, C; K of a linear layer.
        kind: as reports call it: ``linear``, ``convolution``, ``depthwise convolution``.
        window: of a convolution; empty for a linear layer.
    """

    weight: Tensor
    channels: int
    kind: str = "linear"
    window: tuple[int, ...] = ()

    @property
    def is_linear(self) -> bool:
        """Whether it has no window."""
        return not self.window

    @property
    def is_pointwise(self) -> bool:
        """Whether each output position is the matrix times an input position."""
        return not self.depthwise and all(size == 1 for size in self.window)

    @property
    def depthwise(self) -> bool:
        """Whether each feature has an input channel of its own."""
        return self.kind == DEPTHWISE

    @property
    def outlier_score(self) -> float:
        """``max_i max_j |W_ij| / mean_j |W_ij|``: QuantMoE-Bench's score, of the rows, as they share scales."""
        sizes = self.weight.abs()
        return float((sizes.amax(1) / sizes.mean(1).clamp_min(torch.finfo(torch.float32).tiny)).max())

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

    def as_argument(self, weight: Tensor) -> Tensor:
        """Another weight [N, K] in the shape that the layer's op takes: [N, C / groups, window...]."""
        if self.is_linear:
            return weight
        return weight.unflatten(1, (*self.window, -1)).movedim(-1, 1)


@dataclass(frozen=True)
class Layer(Matrix):
    """A layer with a constant weight.

    Attributes:
        node: its op.
        name: where it is in the model: ``encoder.layer.0.output.dense``.
        bias: of N features, or None.
    """

    node: fx.Node = field(kw_only=True)
    name: str = field(kw_only=True)
    bias: fx.Node | None = field(kw_only=True)

    @property
    def is_head(self) -> bool:
        """Whether the model returns the layer's result or a view of it."""
        return returns(self.node)

    @property
    def matrix(self) -> Matrix:
        """Without its place in the graph."""
        return Matrix(self.weight, self.channels, self.kind, self.window)

    @staticmethod
    def of(program: Program, node: fx.Node) -> Layer:
        """The layer that a linear or ``planish::convolution`` node computes."""
        weight = constant(program.module, node.args[1]).detach().float()  # pyright: ignore
        name = program.path(node.args[1]).removesuffix(".weight")  # pyright: ignore
        bias: Any = node.args[2] if len(node.args) > 2 else None
        channels = int(node.args[0].meta["val"].shape[-1])  # pyright: ignore
        if node.target is not CONVOLUTION_LAST:
            return Layer(weight, channels, node=node, name=name, bias=bias)
        kind = DEPTHWISE if Convolution.of(node).is_depthwise else "convolution"
        rows = weight.movedim(1, -1).flatten(1)
        return Layer(rows, channels, kind, tuple(weight.shape[2:]), node=node, name=name, bias=bias)


def is_pointwise(node: fx.Node) -> bool:
    """Whether a layer's outputs are each a matrix times one row of its input."""
    if node.target is LINEAR:
        return True
    conv = Convolution.of(node)
    return conv.groups == 1 and set(conv.window.kernel) == {1}


def returns(node: fx.Node) -> bool:
    """Whether the model returns a node's result or a view of it."""
    return any(u.op == "output" or (u.target in VIEWS and returns(u)) for u in node.users)


def layers(program: Program) -> list[fx.Node]:
    """Every node that may be a layer on codes, in graph order; see ``reason`` for which are."""
    return [n for n in program.nodes() if n.target in (LINEAR, CONVOLUTION_LAST)]


def reason(program: Program, node: fx.Node) -> str | None:
    """Why a linear layer or a convolution cannot be on codes, or None."""
    if not has_constant_weight(node) or node.args[1].meta["val"].dim() < 2:  # pyright: ignore
        return "its weight is computed in each call"
    if node.meta["val"].dtype is not torch.float32:
        return f"it computes in {node.meta['val'].dtype}, and integer kernels return fp32"
    if node.target is CONVOLUTION_LAST and (found := convolution_reason(program, node)):
        return found
    layer = Layer.of(program, node)
    if layer.weight.shape[1] < LEAST_DEPTH and not layer.depthwise:
        return f"it has {layer.weight.shape[1]} input features: codes pay from {LEAST_DEPTH} on"
    return None if layer.weight.isfinite().all() else "its weight holds NaN or infinity"


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
