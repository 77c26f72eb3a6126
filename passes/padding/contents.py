"""The last check before packing: run the graph as it is with two different contents of the padding."""

from __future__ import annotations

import torch
from torch import fx

from planish.program import Program
from planish.verify import relative_error

_TOLERANCE = 1e-4
"""Largest relative change of an output: masked scores are exactly 0 after the softmax, sums are rounded."""


def reads_padding(program: Program, mask: fx.Node, keep: int) -> str | None:
    """Why padding cannot be left out, or None: the outputs at tokens change when padding holds something else.

    The example inputs are run with a mask of its own: rows of all lengths, from one token to full ones. Every other
    input with the mask's two axes in front is changed at padding: integers are taken from elsewhere in the same input,
    so that they stay valid.
    """
    inputs = list(program.example)
    specs = program.inputs
    at = next(i for i, spec in enumerate(specs) if spec.name == mask.name)
    rows, columns = inputs[at].shape
    lengths = 1 + torch.arange(rows) * (columns - 1) // max(1, rows - 1)
    valid = torch.arange(columns) < lengths.unsqueeze(1)
    inputs[at] = torch.where(valid, keep, 1 - keep).to(inputs[at].dtype)
    results: list[tuple[torch.Tensor, ...]] = []
    for turn in (1, 2):
        changed = [
            t if i == at or spec.shape[:2] != specs[at].shape else _changed(t, valid, turn)
            for i, (t, spec) in enumerate(zip(inputs, specs, strict=True))
        ]
        results.append(program.run(*changed))
    for spec, first, second in zip(program.outputs, *results, strict=True):
        if first.shape[:2] == valid.shape and spec.shape[:2] == specs[at].shape:
            first, second = first[valid], second[valid]
        error = relative_error(first, second)
        if not error <= _TOLERANCE:
            return f"output {spec.name} changes at tokens, by {error:.1e}, when padding holds other values"
    return None


def _changed(tensor: torch.Tensor, valid: torch.Tensor, turn: int) -> torch.Tensor:
    """The input with other values at padding: another row's tokens, for floats also negated in turn 2."""
    other = tensor.roll(turn, 0)
    other = torch.where(valid.roll(turn, 0).view(valid.shape + (1,) * (tensor.dim() - 2)), other, tensor[:, :1])
    if tensor.is_floating_point() and turn == 2:
        other = -other - 1
    return torch.where(valid.view(valid.shape + (1,) * (tensor.dim() - 2)), tensor, other)
