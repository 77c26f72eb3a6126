"""What kind of computation each ATen op is: the one classification that passes and backends share."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

LINEAR = aten.linear.default
ATTENTION = aten.scaled_dot_product_attention.default
LAYER_NORM = aten.layer_norm.default

ROWS = frozenset({LAYER_NORM, aten.softmax.int, aten._softmax.default})
"""Map each row (last axis) to a row of the same length."""

REDUCTIONS = frozenset({aten.mean.dim, aten.sum.dim_IntList, aten.amax.default})
"""Reduce the last axis."""

VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
    }
)
"""Index maps: every element of the result is one element of the operand."""

GENERATORS = frozenset(
    {
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.full.default,
        aten.full_like.default,
        aten.scalar_tensor.default,
        aten.ones.default,
        aten.new_ones.default,
        aten.ones_like.default,
        aten.zeros.default,
        aten.new_zeros.default,
        aten.zeros_like.default,
    }
)
"""Values made from the index alone."""

GATHERS = frozenset({aten.embedding.default, aten.index.Tensor, aten.gather.default, aten.index_select.default})
"""Each element is read from a place that another tensor names."""

ELEMENTWISE = frozenset(
    {
        aten.add.Tensor,
        aten.add.Scalar,
        aten.sub.Tensor,
        aten.sub.Scalar,
        aten.rsub.Scalar,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.maximum.default,
        aten.minimum.default,
        aten.neg.default,
        aten.abs.default,
        aten.exp.default,
        aten.erf.default,
        aten.tanh.default,
        aten.sigmoid.default,
        aten.silu.default,
        aten.relu.default,
        aten.gelu.default,
        aten.sqrt.default,
        aten.rsqrt.default,
        aten.reciprocal.default,
        aten.pow.Tensor_Scalar,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.eq.Tensor,
        aten.eq.Scalar,
        aten.ne.Tensor,
        aten.ne.Scalar,
        aten.lt.Tensor,
        aten.lt.Scalar,
        aten.le.Tensor,
        aten.le.Scalar,
        aten.gt.Tensor,
        aten.gt.Scalar,
        aten.ge.Tensor,
        aten.ge.Scalar,
        aten.logical_and.default,
        aten.logical_or.default,
        aten.logical_not.default,
        aten.__and__.Tensor,
        aten.__or__.Tensor,
        aten.bitwise_and.Tensor,
        aten.bitwise_or.Tensor,
        aten.where.self,
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
        aten.where.Scalar,
        aten.masked_fill.Scalar,
        aten._to_copy.default,
    }
)
"""One value from the values at the same (broadcast) index."""

INLINE = VIEWS | GENERATORS | GATHERS | ELEMENTWISE
"""Ops that a kernel can compute on the way, element by element."""


def short_name(node: fx.Node) -> str:
    """The op's name without namespace and overload, as used in names of groups: ``layer_norm``."""
    target: Any = node.target
    return str(target).split(".")[1].strip("_")


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Argument of an ATen call given by position or by keyword."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)
