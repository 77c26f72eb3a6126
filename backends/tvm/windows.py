"""Which kernel computes a convolution, a pooling or the mean of all positions."""

from __future__ import annotations

from torch import fx

from planish.backends.tvm.conv import conv_reason, lower_direct
from planish.backends.tvm.conv_gemm import is_gemm, lower_conv_gemm
from planish.backends.tvm.depthwise import is_depthwise, lower_depthwise
from planish.backends.tvm.kernel import Lowered, Module, Region
from planish.backends.tvm.pool import is_channel_mean, lower_channel_mean, lower_pool, pool_reason
from planish.backends.tvm.winograd import is_winograd, lower_winograd
from planish.conv_ops import CONVOLUTIONS, POOLS
from planish.program import Program


def is_window(node: fx.Node) -> bool:
    """Whether an op is one of this module's."""
    return node.target in CONVOLUTIONS | POOLS or is_channel_mean(node)


def window_reason(node: fx.Node) -> str | None:
    """Why such an op has no kernel, or None."""
    if node.target in CONVOLUTIONS:
        return conv_reason(node)
    return pool_reason(node) if node.target in POOLS else None


def lower_window(
    module: Module, program: Program, region: Region, anchor: fx.Node, lanes: int, *, constant: bool
) -> Lowered:
    """Kernel of a region around such an op; ``constant``: a convolution's weight can be packed beforehand."""
    if anchor.target in POOLS:
        return lower_pool(module, program, region, anchor, lanes)
    if anchor.target not in CONVOLUTIONS:
        return lower_channel_mean(module, program, region, anchor, lanes)
    if constant and is_depthwise(anchor):
        return lower_depthwise(module, program, region, anchor, lanes)
    if constant and is_winograd(program, region, anchor):
        return lower_winograd(module, program, region, anchor)
    if constant and is_gemm(anchor):
        return lower_conv_gemm(module, program, region, anchor)
    return lower_direct(module, program, region, anchor, lanes, constant=constant)
