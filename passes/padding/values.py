"""What the mask decides: bounds of a value where a position is padding, and where it is a token."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from planish.ops import ELEMENTWISE, GENERATORS, VIEWS, aten
from planish.passes.padding.axes import TOKENS, AxisMap
from planish.program import constant

Bounds = tuple[float, float]

FINITE = 1e30
"""Values nothing is known about are taken to be finite and within this: masks use numbers beyond it, or -inf."""

HIDDEN = -1e4
"""A number at or below this, added to a score, hides the key: e^-10000 is 0."""

_UNKNOWN = (-FINITE, FINITE)
_AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_OR = (aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default)
_NOT = (aten.logical_not.default, aten.bitwise_not.default)
_WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
_FILL = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)


@dataclass
class MaskValues:
    """Bounds of values at the positions where the mask holds a given number, 0 or 1."""

    axes: AxisMap
    _found: dict[tuple[fx.Node, int | None, int], Bounds] = field(default_factory=dict)  # pyright: ignore

    def at(self, node: Any, mask: int | None, axis: int) -> Bounds:
        """Least and greatest value of a node where the mask is ``mask`` at the position along ``axis`` (negative).

        If that axis is not the mask's, or for ``mask`` None, the bounds hold everywhere.
        """
        if not isinstance(node, fx.Node):
            return (float(node), float(node)) if isinstance(node, (bool, int, float)) else _UNKNOWN
        own = self.axes[node]
        if own is None or len(own) < -axis or own[axis] != (TOKENS,):
            mask = None
        key = (node, mask, axis)
        if key not in self._found:
            self._found[key] = _typed(node, self._bounds(node, mask, axis))
        return self._found[key]

    def padding(self, node: fx.Node, mask: int) -> float | None:
        """The one number that a value has at all padding, if there is one."""
        axis = self.position_axis(node)
        low, high = self.at(node, mask, axis) if axis is not None else _UNKNOWN
        return low if low == high else None

    def position_axis(self, node: fx.Node) -> int | None:
        """The axis (negative) that is the mask's axis of positions; None if there is not exactly one."""
        axes = self.axes[node] or ()
        found = [i - len(axes) for i, axis in enumerate(axes) if axis == (TOKENS,)]
        return found[0] if len(found) == 1 else None

    def _bounds(self, node: fx.Node, mask: int | None, axis: int) -> Bounds:
        if node is self.axes.mask:
            return (0.0, 1.0) if mask is None else (float(mask), float(mask))
        if node.op == "get_attr":
            value = constant(self.axes.program.module, node)
            exact = value.numel() and not value.is_complex() and bool(torch.isfinite(value).all())
            return (float(value.min()), float(value.max())) if exact else _UNKNOWN
        if node.target in VIEWS:
            operand = node.args[0]
            assert isinstance(operand, fx.Node)
            own = self.position_axis(operand)
            return self.at(operand, None if own is None else mask, own or -1)
        if node.target in GENERATORS:
            return _generated(node)
        if node.target is aten.embedding.default:
            return self.at(node.args[0], None, -1)
        return self._elementwise(node, mask, axis) if node.target in ELEMENTWISE else _UNKNOWN

    def _elementwise(self, node: fx.Node, mask: int | None, axis: int) -> Bounds:
        operands: list[Any] = [
            self.at(a, mask, axis) if isinstance(a, (fx.Node, bool, int, float)) else a for a in node.args
        ]
        target = node.target
        if target in _WHERE:
            condition, yes, no = operands
            return no if condition == (0, 0) else yes if condition == (1, 1) else _join(yes, no)
        if target in _FILL:
            value, condition, other = operands
            return value if condition == (0, 0) else other if condition == (1, 1) else _join(value, other)
        if node.meta["val"].dtype is torch.bool:
            low, high = zip(*operands, strict=True)
            if target in _NOT:
                return 1 - high[0], 1 - low[0]
            if target in _AND:
                return min(low), min(high)
            if target in _OR:
                return max(low), max(high)
        return _arithmetic(node, operands)


def _arithmetic(node: fx.Node, operands: list[Any]) -> Bounds:
    """Interval arithmetic of the few ops that masks are made with; any op on single numbers is computed."""
    known = [o for o in operands if isinstance(o, tuple)]
    plain = len(known) == len(operands)
    target = node.target
    if target in (aten.mul.Tensor, aten.mul.Scalar) and (0.0, 0.0) in known:
        return 0.0, 0.0
    if plain and all(low == high for low, high in known) and _is_pointwise(node):
        return _computed(node, [low for low, _ in known])
    if not plain or len(known) < 1:
        return _UNKNOWN
    low, high = zip(*known, strict=True)
    if target in (aten.add.Tensor, aten.add.Scalar) and not node.kwargs:
        return sum(low), sum(high)
    if target in (aten.sub.Tensor, aten.sub.Scalar) and not node.kwargs:
        return low[0] - high[1], high[0] - low[1]
    if target in (aten.mul.Tensor, aten.mul.Scalar):
        products = [a * b for a, b in itertools.product(known[0], known[1])]
        return min(products), max(products)
    if target is aten.minimum.default:
        return min(low), min(high)
    if target is aten.maximum.default:
        return max(low), max(high)
    if target is aten.neg.default:
        return -high[0], -low[0]
    return known[0] if target is aten._to_copy.default and node.meta["val"].is_floating_point() else _UNKNOWN


def _is_pointwise(node: fx.Node) -> bool:
    return all(isinstance(a, (fx.Node, bool, int, float)) for a in node.args)


def _computed(node: fx.Node, numbers: list[float]) -> Bounds:
    """The op itself on numbers of the operands' types."""
    args: list[Any] = []
    for arg, number in zip(node.args, numbers, strict=True):
        tensor = isinstance(arg, fx.Node) and isinstance(arg.meta["val"], torch.Tensor)
        args.append(torch.tensor(number).to(arg.meta["val"].dtype) if tensor else arg)  # pyright: ignore
    if any(isinstance(a, fx.Node) for a in args):
        return _UNKNOWN
    value = float(node.target(*args, **node.kwargs))  # pyright: ignore
    return (value, value) if value == value else _UNKNOWN


def _generated(node: fx.Node) -> Bounds:
    if node.target is aten.arange.default:
        return 0.0, FINITE
    names = str(node.target)
    if "zeros" in names or "ones" in names:
        return (0.0, 0.0) if "zeros" in names else (1.0, 1.0)
    value = node.args[0] if node.target is aten.scalar_tensor.default else node.args[1] if len(node.args) > 1 else None
    return (float(value), float(value)) if isinstance(value, (bool, int, float)) and "full" in names else _UNKNOWN


def _join(a: Bounds, b: Bounds) -> Bounds:
    return min(a[0], b[0]), max(a[1], b[1])


def _typed(node: fx.Node, bounds: Bounds) -> Bounds:
    """A bool is 0 or 1."""
    value = node.meta["val"]
    is_bool = isinstance(value, torch.Tensor) and value.dtype is torch.bool
    return (max(0.0, bounds[0]), min(1.0, bounds[1])) if is_bool else bounds


def hides_padding(values: MaskValues, mask: fx.Node, padding: int) -> bool:
    """Whether an attention mask hides every key that is padding, and not every other key too."""

    def highest(number: int) -> float:
        return values.at(mask, number, -1)[1]

    hidden = 0.0 if mask.meta["val"].dtype is torch.bool else HIDDEN
    axes = values.axes[mask]
    ends_in_keys = axes is not None and axes[-1] == (TOKENS,)
    if not ends_in_keys or not highest(padding) <= hidden < highest(1 - padding):
        return False
    # where a query sees no key at all, numbers weigh padding like the other keys, and -inf or False weigh none
    infinite = mask.meta["val"].dtype is torch.bool or highest(padding) == float("-inf")
    return infinite or values.at(mask, 1 - padding, -1)[0] > HIDDEN
