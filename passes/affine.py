"""Rules of ``canonicalize``: a constant scale or shift per channel, such as a batch norm's, goes into the weights.

Each folded weight is rounded to fp32 once, from a product in fp64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from planish.conv_ops import Convolution
from planish.ops import CONVOLUTION, LINEAR, aten
from planish.program import Program, add_constant, constant
from planish.rules import Refuse, rule


@rule("scale folded into weights", aten.mul.Tensor)
def fold_scale(program: Program, node: fx.Node) -> fx.Node | Refuse | None:
    """Multiply the weights of a layer instead of its result.

    before: ``convolution(x, w, b) * s``, s constant with one value per output channel
    after:  ``convolution(x, w s, b s)``
    """
    found = _layer_and_constant(program, node)
    if not isinstance(found, tuple):
        return found
    layer, scale = found
    weight, bias = (None if a is None else constant(program.module, a).double() for a in _weights(layer))
    assert weight is not None
    if layer.target is CONVOLUTION and Convolution.of(layer).transposed:
        groups = Convolution.of(layer).groups
        each = weight.unflatten(0, (groups, -1))  # [groups, C/groups, O/groups, window...]
        scaled = each * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = scaled.flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    return _with_weights(program, layer, weight, None if bias is None else bias * scale)


@rule("shift folded into bias", aten.add.Tensor)
def fold_shift(program: Program, node: fx.Node) -> fx.Node | Refuse | None:
    """Add to the bias of a layer instead of its result.

    before: ``convolution(x, w, b) + t``, t constant with one value per output channel
    after:  ``convolution(x, w, b + t)``
    """
    if node.kwargs:
        return None
    found = _layer_and_constant(program, node)
    if not isinstance(found, tuple):
        return found
    layer, shift = found
    _, bias = _weights(layer)
    return _with_weights(
        program, layer, None, shift if bias is None else constant(program.module, bias).double() + shift
    )


def _layer_and_constant(program: Program, node: fx.Node) -> tuple[fx.Node, torch.Tensor] | Refuse | None:
    """The layer and the constant that are combined, the constant as one fp64 value per output channel."""
    for layer, other in (node.args[:2], node.args[1::-1]):
        is_layer = isinstance(layer, fx.Node) and layer.target in (LINEAR, CONVOLUTION)
        if not is_layer or not isinstance(other, fx.Node) or other.op != "get_attr":
            continue
        if node.meta["val"].is_complex() or node.meta["val"].dtype is not layer.meta["val"].dtype:
            return None
        per_channel = _per_channel(constant(program.module, other), layer)
        if per_channel is None or program.shape(layer) != program.shape(node):
            return None
        if any(a is not None and a.op != "get_attr" for a in _weights(layer)):
            return Refuse("the layer's weights are not constants")
        if len(layer.users) != 1:
            return Refuse(f"{layer.name} is used elsewhere too")
        return layer, per_channel
    return None


def _per_channel(value: torch.Tensor, layer: fx.Node) -> torch.Tensor | None:
    """A constant that varies along the layer's channels only, as [channels]; None for any other."""
    result = layer.meta["val"]
    axis = result.dim() - 1 if layer.target is LINEAR else 1
    shape = [1] * (result.dim() - value.dim()) + list(value.shape)
    if len(shape) != result.dim() or any(s != 1 for a, s in enumerate(shape) if a != axis):
        return None
    return value.double().reshape(-1).expand(int(result.shape[axis]))


def _weights(layer: fx.Node) -> tuple[Any, Any]:
    """The weight and the bias (None if there is none)."""
    return layer.args[1], layer.args[2] if len(layer.args) > 2 else None


def _with_weights(program: Program, layer: fx.Node, weight: torch.Tensor | None, bias: torch.Tensor | None) -> fx.Node:
    """The layer with other weights; None keeps the weight it has, and has no bias."""
    graph, old = program.module.graph, layer.args[1]
    assert isinstance(old, fx.Node)

    def stored(value: torch.Tensor, what: str) -> fx.Node:
        return graph.get_attr(add_constant(program.module, f"{old.target}_{what}", value.to(old.meta["val"].dtype)))

    new = old if weight is None else stored(weight.contiguous(), "scaled")
    shifted = None if bias is None else stored(bias.contiguous(), "bias")
    return graph.call_function(layer.target, (layer.args[0], new, shifted, *layer.args[3:]), layer.kwargs)  # pyright: ignore
