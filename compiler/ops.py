"""What kind of computation each ATen op is: the one classification that passes and backends share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._library.custom_ops import OPDEFS

import planish.cache_ops
import planish.custom_ops
import planish.packing_ops
import planish.quantized_ops  # noqa: F401  (all four register torch.ops.planish)

aten = torch.ops.aten
planish_ops = torch.ops.planish

LINEAR = aten.linear.default
QUANTIZED_LINEAR = planish_ops.quantized_linear.default
LAYERS = frozenset({LINEAR, QUANTIZED_LINEAR})
"""Linear layers; the second argument's axes are output and input features."""

QUANTIZED_CONVOLUTION = planish_ops.quantized_convolution.default
QUANTIZED = frozenset({QUANTIZED_LINEAR, QUANTIZED_CONVOLUTION})
"""Layers on integer codes: their first eight arguments are the same."""

ATTENTION = aten.scaled_dot_product_attention.default
VARLEN = planish_ops.varlen_attention.default
CACHED = planish_ops.cached_attention.default
LAYER_NORM = aten.layer_norm.default

SCHEDULED = frozenset({planish_ops.softmax.default, planish_ops.log_softmax.default})
"""A softmax with the schedule that ``rewrite-softmax`` chose."""

SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, planish_ops.softmax.default})
LOG_SOFTMAX = frozenset({aten.log_softmax.int, aten._log_softmax.default, planish_ops.log_softmax.default})
STATISTICS = planish_ops.softmax_statistics.default
"""What a softmax needs to know of a row; its values at single places follow from that."""

ROWS = SOFTMAX | LOG_SOFTMAX | {LAYER_NORM}
"""Map each row (last axis) to a row of the same length."""

REDUCTIONS = frozenset(
    {
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.prod.dim_int,
        aten.amax.default,
        aten.amin.default,
        aten.any.dim,
        aten.all.dim,
        aten.argmax.default,
        aten.argmin.default,
    }
)
"""Reduce the last axis."""

SCANS = frozenset({aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default})
"""Combine each element of a row (last axis) with all before it."""

RUNNING = frozenset({planish_ops.argcummax.default})
"""Positions of the extrema so far; the values are gathered by them."""

SORTS = frozenset({planish_ops.argsort.default, planish_ops.argtopk.default})
"""Positions of a row's elements in order; the values are gathered by them."""

MATMUL = aten.bmm.default
GROUPED = planish_ops.grouped_mm.default
CONVOLUTION = aten.convolution.default
POOLS = frozenset({aten.max_pool2d.default, aten.max_pool3d.default, aten.avg_pool2d.default, aten.avg_pool3d.default})
"""Reduce windows that slide over the last axes."""

SCATTERS = frozenset(
    {
        aten.scatter.src,
        aten.scatter.value,
        aten.scatter_add.default,
        aten.scatter_reduce.two,
        aten.index_put.default,
    }
)
"""Write values at places that another tensor names, into a copy of the operand, in order."""

RECURRENCES = frozenset({planish_ops.lstm_layer.default, planish_ops.gru_layer.default})
"""One direction of one recurrent layer, over all time steps."""

PACKING = frozenset(
    {planish_ops.token_starts.default, planish_ops.token_places.default, planish_ops.token_slots.default}
)
"""Where the tokens of a padded batch lie in the packed one."""

SEGMENT_SUM = planish_ops.segment_sum.default

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
        aten.flip.default,
        aten.roll.default,
        aten.diagonal.default,
        aten.unfold.default,
    }
)
"""Index maps: every element of the result is one element of the operand."""

RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default})
"""What capture replaces by ``reshape``."""

COPIES = frozenset(
    {
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
        aten.lift_fresh.default,
        torch.ops.prims.copy_strided.default,
    }
)
"""What capture replaces by the operand itself."""

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

JOINS = frozenset(
    {aten.cat.default, aten.constant_pad_nd.default, aten.slice_scatter.default, aten.select_scatter.default}
)
"""Each element is read from the one of several operands that covers its place."""

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
        aten.masked_fill.Tensor,
        aten.clamp.Tensor,
        aten.clamp_max.default,
        aten.logical_xor.default,
        aten.__xor__.Tensor,
        aten.bitwise_xor.Tensor,
        aten.bitwise_not.default,
        aten.bitwise_left_shift.Tensor,
        aten.bitwise_right_shift.Tensor,
        aten.__lshift__.Tensor,
        aten.__rshift__.Tensor,
        aten.__lshift__.Scalar,
        aten.__rshift__.Scalar,
        aten.pow.Tensor_Tensor,
        aten.pow.Scalar,
        aten.div.Tensor_mode,
        aten.div.Scalar_mode,
        aten.floor_divide.default,
        aten.fmod.Tensor,
        aten.fmod.Scalar,
        aten.remainder.Tensor,
        aten.remainder.Scalar,
        aten.atan2.default,
        aten.hypot.default,
        aten.copysign.Tensor,
        aten.fmax.default,
        aten.fmin.default,
        aten.log.default,
        aten.log2.default,
        aten.log10.default,
        aten.log1p.default,
        aten.expm1.default,
        aten.exp2.default,
        aten.erfc.default,
        aten.lgamma.default,
        aten.nextafter.default,
        aten.sin.default,
        aten.cos.default,
        aten.tan.default,
        aten.asin.default,
        aten.acos.default,
        aten.atan.default,
        aten.sinh.default,
        aten.cosh.default,
        aten.asinh.default,
        aten.acosh.default,
        aten.atanh.default,
        aten.floor.default,
        aten.ceil.default,
        aten.round.default,
        aten.trunc.default,
        aten.sign.default,
        aten.signbit.default,
        aten.isnan.default,
        aten.isinf.default,
    }
)
"""One value from the values at the same (broadcast) index."""

INLINE = VIEWS | GENERATORS | GATHERS | JOINS | ELEMENTWISE
"""Ops that a kernel can compute on the way, element by element."""

IR = INLINE | (ROWS - SCHEDULED) | REDUCTIONS | SCANS | POOLS | SCATTERS | {LINEAR, ATTENTION, MATMUL, CONVOLUTION}
"""Every ATen op that the graph keeps whole."""


def reference(op: Any) -> Callable[..., Any]:
    """A ``planish::`` operator as a plain PyTorch function, which autograd can go through; others as they are."""
    name = f"{op.namespace}::{op._opname}" if isinstance(op, torch._ops.OpOverload) else ""
    return OPDEFS[name]._init_fn if name in OPDEFS else op


def short_name(node: fx.Node) -> str:
    """The op's name without namespace and overload, as used in names of groups: ``layer_norm``."""
    target: Any = node.target
    return str(target).split(".")[1].strip("_")


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Argument of an ATen call given by position or by keyword."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def has_constant_weight(layer: fx.Node) -> bool:
    """Whether what a layer or convolution multiplies by can be packed beforehand."""
    weights = [layer.args[1]]
    if layer.target in QUANTIZED:
        optional = layer.args[8:] if layer.target is QUANTIZED_LINEAR else ()
        weights = [a for a in (*layer.args[1:5], layer.args[6], *optional) if a is not None]
    return all(isinstance(w, fx.Node) and w.op == "get_attr" for w in weights)


def is_random(node: fx.Node) -> bool:
    """Whether an op draws random numbers; dropout in inference and attention without dropout draw none."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    switches = [(i, a) for i, a in enumerate(op._schema.arguments) if a.name in ("train", "training", "dropout_p")]
    return all(argument(node, i, a.name, a.default_value) for i, a in switches)
