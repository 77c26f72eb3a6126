"""Half precision: costly ops are computed in fp32, cheap ones round by themselves."""

from __future__ import annotations

import torch
from torch import fx

from planish.ops import ATTENTION, CONVOLUTION, LINEAR, MATMUL, POOLS, RECURRENCES, ROWS, aten

_WIDENED = ROWS | POOLS | RECURRENCES | {LINEAR, ATTENTION, MATMUL, CONVOLUTION}
"""Ops whose kernels compute in fp32; elementwise ops and reductions round half precisions themselves."""


def widen_half(module: fx.GraphModule) -> None:
    """Compute costly ops of half precision in fp32, as PyTorch accumulates them, and round the result.

    before: ``linear(x, w)`` in fp16
    after:  ``_to_copy(linear(_to_copy(x, fp32), _to_copy(w, fp32)), fp16)``; ``canonicalize`` folds the weight's
    """
    graph = module.graph
    halves = (torch.float16, torch.bfloat16)
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.target not in _WIDENED or not isinstance(value, torch.Tensor) or value.dtype not in halves:
            continue

        def widened(operand: fx.Node) -> fx.Node:
            operand_value = operand.meta["val"]
            if not isinstance(operand_value, torch.Tensor) or operand_value.dtype not in halves:
                return operand
            return graph.call_function(aten._to_copy.default, (operand,), {"dtype": torch.float32})

        with graph.inserting_before(node):
            node.args = fx.node.map_arg(node.args, widened)
            node.kwargs = fx.node.map_arg(node.kwargs, widened)
        with graph.inserting_after(node):
            rounded = graph.call_function(aten._to_copy.default, (node,), {"dtype": value.dtype})
        node.replace_all_uses_with(rounded, delete_user_cb=lambda user, own=rounded: user is not own)
        rounded.meta = {"val": value, "stack_trace": node.meta.get("stack_trace")}
        del node.meta["val"]
