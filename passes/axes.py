"""Which axis of a view's operand lies along an axis of its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
from torch import fx

from planish.ops import aten
from planish.program import Program

REPEATED = -1
"""In place of an axis: all positions along the result's axis are the same one of the operand."""


def source_axis(program: Program, view: fx.Node, axis: int) -> int | None:
    """The operand's axis whose positions are, in order, those along ``axis`` of the result.

    Returns:
        ``REPEATED`` where the view repeats the operand along it; None for an axis that is mixed with others, and for
        an op that is no view.
    """
    trace = _TRACES.get(view.target)
    return None if trace is None else trace(program, view, axis)


def result_axis(program: Program, view: fx.Node, axis: int) -> int | None:
    """The result's axis along which ``axis`` of the operand lies; None where there is none."""
    axes = range(_rank(view)) if view.target in _TRACES else ()
    return next((a for a in axes if source_axis(program, view, a) == axis), None)


def _rank(node: Any) -> int:
    return node.meta["val"].dim()


def _transposed(program: Program, view: fx.Node, axis: int) -> int:
    a, b = (d % _rank(view) for d in view.args[1:3])  # pyright: ignore
    return {a: b, b: a}.get(axis, axis)


def _permuted(program: Program, view: fx.Node, axis: int) -> int:
    return view.args[1][axis] % _rank(view)  # pyright: ignore


def _unsqueezed(program: Program, view: fx.Node, axis: int) -> int | None:
    at = view.args[1] % _rank(view)  # pyright: ignore
    return None if axis == at else axis - (axis > at)


def _squeezed(program: Program, view: fx.Node, axis: int) -> int:
    if _rank(view) == _rank(view.args[0]):
        return axis  # an axis of more than one position stays
    at = view.args[1] % _rank(view.args[0])  # pyright: ignore
    return axis + (axis >= at)


def _cut(program: Program, view: fx.Node, axis: int) -> int | None:
    at = (view.args[1] if len(view.args) > 1 else 0) % _rank(view)  # pyright: ignore
    return None if axis == at else axis


def _selected(program: Program, view: fx.Node, axis: int) -> int:
    return axis + (axis >= view.args[1] % _rank(view.args[0]))  # pyright: ignore


def _expanded(program: Program, view: fx.Node, axis: int) -> int:
    before, after = program.shape(view.args[0]), program.shape(view)
    at = axis - (len(after) - len(before))
    return at if at >= 0 and before[at] == after[axis] else REPEATED


def _reshaped(program: Program, view: fx.Node, axis: int) -> int | None:
    """The axis of the same size with equally many positions before it."""
    before, after = program.shape(view.args[0]), program.shape(view)
    outer = sympy.prod(after[:axis])
    return next((a for a, s in enumerate(before) if s == after[axis] and sympy.prod(before[:a]) == outer), None)


_TRACES: dict[Any, Callable[[Program, fx.Node, int], int | None]] = {
    aten.transpose.int: _transposed,
    aten.permute.default: _permuted,
    aten.unsqueeze.default: _unsqueezed,
    aten.squeeze.dim: _squeezed,
    aten.slice.Tensor: _cut,
    aten.select.int: _selected,
    aten.expand.default: _expanded,
    aten.reshape.default: _reshaped,
}
