"""Which ops may work on the packed tokens alone, and which values are read at padding."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from planish.ops import ATTENTION, ELEMENTWISE, LINEAR, REDUCTIONS, argument, aten
from planish.passes.padding.axes import BATCH, LABELS, POSITIONS, ROW_WISE, Axes, AxisMap
from planish.passes.padding.values import MaskValues, hides_padding

RESHAPING = frozenset(
    {
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)
"""Views that keep every element."""

ALONG = frozenset({aten.slice.Tensor, aten.select.int, aten.cat.default})
"""Ops that change one axis."""


@dataclass
class Liveness:
    """What a graph does with the padding of one mask.

    Attributes:
        axes: of every value.
        values: what the mask decides.
        keep: what the mask holds at tokens.
        exact: whether the model's outputs are wanted at padding too.
    """

    axes: AxisMap
    values: MaskValues
    keep: int
    exact: bool
    live: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    """Values that are read at padding, with the first reader that makes them so."""

    def find(self) -> None:
        """Fill ``live``, from the outputs backwards."""
        for node in reversed(list(self.axes.program.nodes())):
            for operand in node.all_input_nodes:
                if operand not in self.live and self.axes.is_token(operand) and self._reads_padding(node, operand):
                    self.live[operand] = self.live.get(node, node)

    def complaint(self, reader: fx.Node) -> str:
        """What a reader of padding does with it."""
        if reader.op == "output":
            wanted = "padding='exact' wants" if self.exact else "the output is not that of the padded texts and needs"
            return f"{wanted} the model's own values at padding"
        if reader.target is ATTENTION:
            return f"{reader.name} is not proved to hide padded keys"
        return f"{_name(reader)} combines positions and reads padding, which no mask has made a known number"

    def padding(self, node: fx.Node) -> float | None:
        """The number that a value is known to have at all padding."""
        return self.values.padding(node, 1 - self.keep)

    def hides(self, attention: fx.Node) -> bool:
        """Whether attention never gives weight to a key that is padding."""
        mask = argument(attention, 3, "attn_mask")
        return isinstance(mask, fx.Node) and hides_padding(self.values, mask, 1 - self.keep)

    @cached_property
    def padded_streams(self) -> set[fx.Node]:
        """Streams whose padding the mask marks: those of the keys that it hides."""
        hidden = [n.args[1] for n in self.axes.program.nodes() if n.target is ATTENTION and self.hides(n)]
        return {self.axes.stream(key) for key in hidden if self.axes.is_token(key)}  # pyright: ignore

    def is_free(self, output: fx.Node) -> bool:
        """Whether the model's output may hold anything at padding: [batch, positions, ...] of a stream with padding."""
        axes, program = self.axes[output], self.axes.program
        results: Any = program.module.graph.output_node().args[0]
        if self.exact or axes is None or output in results[len(results) - len(program.state) :]:
            return False
        in_front = axes[:2] in {((BATCH,), (p,)) for p in POSITIONS}
        return in_front and self.axes.stream(output) in self.padded_streams

    def _reads_padding(self, node: fx.Node, operand: fx.Node) -> bool:
        if node.op == "output":
            return not self.is_free(operand)
        if self.axes.is_token(node) and self.padding(node) is not None:
            return False
        if node.target is ATTENTION:
            keys = operand in node.args[1:3] and not self.hides(node)
            query = operand is node.args[0] and self.axes.is_token(node) and node in self.live
            return keys or query or operand is argument(node, 3, "attn_mask")
        if self.first_token_axis(node) is not None:
            return False
        if operand in self.axes.by_position(node) and (self.obstacle(node) is None or self._is_local(node)):
            return node in self.live
        return True

    def _is_local(self, node: fx.Node) -> bool:
        """Whether a value at a position depends on its operands' values there alone, though the op is not packed."""
        pointwise = node.target in ELEMENTWISE | RESHAPING | {aten.embedding.default}
        return pointwise and self.axes.is_token(node) and node not in self.axes.told_by_shape

    def first_token_axis(self, node: fx.Node) -> int | None:
        """The axis of positions of which ``node`` reads the first only (a [CLS] token); None if it does not."""
        if node.target not in (aten.select.int, aten.slice.Tensor) or not self.axes.is_token(node.args[0]):
            return None
        axes = self.axes[node.args[0]]  # pyright: ignore
        assert axes is not None
        axis = argument(node, 1, "dim", 0) % len(axes)
        first = node.args[2] == 0 if node.target is aten.select.int else _first_only(node)
        return axis if first and len(axes[axis]) == 1 and axes[axis][0] in POSITIONS else None

    def sums_tokens(self, node: fx.Node) -> bool:
        """Whether a sum over the positions adds nothing at padding."""
        operand = node.args[0] if node.target is aten.sum.dim_IntList else None
        if not isinstance(operand, fx.Node) or not self.axes.is_token(operand) or not _is_float(operand):
            return False
        axes = self.axes[operand]
        last = axes is not None and len(axes[-1]) == 1 and axes[-1][0] in POSITIONS
        return last and self.padding(operand) == 0 and not node.kwargs.get("dtype")

    def attends_from_few(self, node: fx.Node) -> bool:
        """Whether attention's keys are tokens while its queries are other rows of the same batch."""
        if node.target is not ATTENTION or self.axes.is_token(node.args[0]) or not self.hides(node):
            return False
        query = self.axes[node.args[0]]  # pyright: ignore
        heads = query is not None and len(query) == 4 and query[0] == (BATCH,) and _is_plain(query[1:])
        causal = argument(node, 5, "is_causal", False)
        return heads and not causal and all(self._heads_apart(a) for a in node.args[1:3])

    def reads_packed(self, node: fx.Node) -> bool:
        """Whether an op that gives no tokens reads them in packed form."""
        first = self.first_token_axis(node) is not None
        return first or self.sums_tokens(node) or self.attends_from_few(node)

    def _heads_apart(self, node: Any) -> bool:
        """Axes [batch, heads, positions, width]."""
        axes = self.axes[node] if isinstance(node, fx.Node) else None
        if axes is None or len(axes) != 4 or axes[0] != (BATCH,):
            return False
        return axes[2] in {(p,) for p in POSITIONS} and _is_plain((axes[1], axes[3]))

    def obstacle(self, node: fx.Node) -> str | None:
        """Why an op cannot work on the packed tokens, or None."""
        if node.op != "call_function":
            return "it is given for the padded batch"
        if not self.axes.is_token(node):
            return "its result has no element for each position"
        if node in self.axes.told_by_shape:
            return f"{_name(node)} mixes positions with other axes"
        if not _is_float(node):
            return "integers and conditions are computed for the padded batch"
        known = [self.axes[n] for n in (node, *node.all_input_nodes) if _is_tensor(n)]
        if None in known:
            return "the axes of an operand are not known"
        if any(not isinstance(a, (str, int)) for axes in known for axis in axes or () for a in axis):
            return "another of its axes has a dynamic size"
        return self._op_obstacle(node)

    def _op_obstacle(self, node: fx.Node) -> str | None:
        """Why an op on values whose axes are known cannot work on the packed tokens, or None."""
        target = node.target
        if target in ELEMENTWISE:
            return None if self._aligned(node) else "an operand is laid out in another way"
        if target is LINEAR:
            plain = self._plain_last(node.args[0]) and all(n.op == "get_attr" for n in node.all_input_nodes[1:])
            return None if plain else "the layer works along the positions, or its weight is computed"
        if target in ROW_WISE | REDUCTIONS:
            return None if self._plain_last(node.args[0]) else f"{_name(node)} combines positions"
        if target is ATTENTION:
            return self._attention_obstacle(node)
        if target is aten.embedding.default:
            return None if node.args[0].op == "get_attr" else "the table is computed"  # pyright: ignore
        if target in RESHAPING or target is aten.expand.default:
            return None if self.axes.is_token(node.args[0]) else "its operand has no element for each position"
        if target in ALONG:
            return None if self._keeps_positions(node) else f"{_name(node)} moves or cuts positions"
        return f"{_name(node)} combines positions"

    def _aligned(self, node: fx.Node) -> bool:
        """Whether each operand's merged axes are the result's."""
        result = self.axes[node]
        assert result is not None
        operands = [self.axes[n] for n in node.all_input_nodes if _is_tensor(n)]
        return all(
            axis == own or len(axis) < 2
            for axes in operands
            if axes is not None
            for axis, own in zip(axes, result[len(result) - len(axes) :], strict=True)
        )

    def _plain_last(self, node: Any) -> bool:
        axes = self.axes[node]
        return self.axes.is_token(node) and axes is not None and _is_plain(axes[-1:])

    def _attention_obstacle(self, node: fx.Node) -> str | None:
        if not all(self._heads_apart(a) for a in node.args[:3]):
            return "its operands are not [batch, heads, positions, width]"
        if not self.hides(node):
            return "its mask does not hide padding"
        dropout = argument(node, 4, "dropout_p", 0.0) or argument(node, 7, "enable_gqa", False)
        return "it has dropout or grouped heads" if dropout else None

    def _keeps_positions(self, node: fx.Node) -> bool:
        result = self.axes[node]
        operands = [n for n in node.all_input_nodes if _is_tensor(n)]
        if result is None or not all(self.axes.is_token(n) for n in operands):
            return False
        labelled = [a for a in result if set(a) & LABELS]
        return all([a for a in self.axes[n] or () if set(a) & LABELS] == labelled for n in operands)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_float(node: fx.Node) -> bool:
    return _is_tensor(node) and node.meta["val"].dtype is torch.float32


def _is_plain(axes: Axes) -> bool:
    return not any(atom in LABELS for axis in axes for atom in axis)


def _first_only(node: fx.Node) -> bool:
    start, end, step = argument(node, 2, "start", 0), argument(node, 3, "end"), argument(node, 4, "step", 1)
    return (start or 0) == 0 and end == 1 and step == 1


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1].strip("_")
