"""Rewriting the graph: what is packed, what is gathered for it, and what is restored from it."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic

from planish.ops import ATTENTION, ELEMENTWISE, REDUCTIONS, argument, aten, planish_ops
from planish.passes.padding.axes import BATCH, LABELS, POSITIONS, TOKENS, Atom, Axes, Axis
from planish.passes.padding.liveness import RESHAPING, Liveness
from planish.program import Dim, Program
from planish.verify import fake_mode, infer_values

_TRACED_TOKENS = 10007
"""Number of tokens in fake tensors: a prime that no other size is equal to."""


@dataclass
class Packer:
    """Makes the packed form of nodes.

    A packed value has the axes [T, the plain axes of the padded value]: its batch and position atoms are gone.

    Attributes:
        liveness: axes and readers.
        chosen: the nodes to be computed for tokens only.
        nearest: whether outputs hold at padding the nearest token's value instead of 0.
        rewrites: counts of what was done.
    """

    liveness: Liveness
    chosen: frozenset[fx.Node]
    nearest: bool
    rewrites: Counter[str]
    done: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    restored: dict[tuple[fx.Node, str], fx.Node] = field(default_factory=dict[tuple[fx.Node, str], fx.Node])
    made: dict[Any, fx.Node] = field(default_factory=dict[Any, fx.Node])

    @cached_property
    def altered(self) -> set[fx.Node]:
        """The packed nodes and all that depends on them."""
        found = set(self.chosen)
        for node in self.program.nodes():
            if any(n in found for n in node.all_input_nodes):
                found.add(node)
        return found

    @property
    def program(self) -> Program:
        """The graph."""
        return self.liveness.axes.program

    def run(self) -> None:
        """Rewrite the whole graph; what is no longer used is left for the caller to remove."""
        graph = self.program.module.graph
        for node in list(graph.nodes):
            with graph.inserting_before(node):
                if node in self.chosen:
                    self.done[node] = self._packed(node)
                elif node.op == "output":
                    self._write(node)
                elif node.target is not aten.sym_size.int:
                    self._read(node)
            infer_values(self.program)

    def _read(self, node: fx.Node) -> None:
        """Give a node that stays as it is the padded form of what it reads, or replace it by a reader of tokens."""
        if not any(n in self.chosen for n in node.all_input_nodes):
            return
        readers = (
            (self.liveness.first_token_axis(node) is not None, "first tokens gathered", self._first_tokens),
            (self.liveness.sums_tokens(node), "sum over tokens", self._sum),
            (self.liveness.attends_from_few(node), "attention of other rows on tokens", self._attend_from_few),
        )
        for applies, name, rewrite in readers:
            if applies:
                new = rewrite(node)
                new.meta["val"] = node.meta["val"]
                self.liveness.axes.known[new] = self.liveness.axes[node]
                self.altered.add(new)
                node.replace_all_uses_with(new)
                self.rewrites[name] += 1
                return
        for operand in node.all_input_nodes:
            if operand in self.chosen:
                node.replace_input_with(operand, self._restore(operand, "none"))

    def _write(self, output: fx.Node) -> None:
        """Give the model's outputs their form at padding, also those that are computed padded from restored values."""
        for operand in output.all_input_nodes:
            if self.is_altered(operand):
                if operand not in self.done:
                    axes = self.liveness.axes[operand]
                    assert axes is not None
                    self.done[operand] = self._gather(operand, axes, axes)
                output.replace_input_with(operand, self._restore(operand, "nearest" if self.nearest else "zero"))

    def is_altered(self, output: fx.Node) -> bool:
        """Whether an output's values at padding are not the model's."""
        free = self.liveness.axes.is_token(output) and self.liveness.is_free(output)
        return free and output in self.altered and self.liveness.padding(output) is None

    # the tokens -----------------------------------------------------------------------------------------------------

    def _once(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self.made:
            self.made[key] = make()
            infer_values(self.program)
        return self.made[key]

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.program.module.graph.call_function(target, args, kwargs)

    def size(self, label: Atom) -> int | fx.Node:
        """A label's size as a node, or the number it is."""
        size = self.liveness.axes.size(label)
        if isinstance(size, int):
            return size
        mask, axis = self.liveness.axes.mask, 0 if label == BATCH else 1
        return self._once(("size", axis), lambda: self._call(aten.sym_size.int, mask, axis))

    @property
    def rule(self) -> tuple[fx.Node, int, bool]:
        """What says which positions count as tokens: the mask, its value there, and whether the first always does."""
        first = any(self.liveness.first_token_axis(node) is not None for node in self.program.nodes())
        return self.liveness.axes.mask, self.liveness.keep, first

    @property
    def starts(self) -> fx.Node:
        """Where each row starts."""
        return self._once("starts", lambda: self._call(planish_ops.token_starts.default, *self.rule))

    @property
    def places(self) -> fx.Node:
        """Position of each token in the flattened batch; its length is a dim of the program, counted in each call."""
        return self._once("places", self._make_places)

    def _make_places(self) -> fx.Node:
        axes, program = self.liveness.axes, self.program
        mask, keep, first = self.rule
        node = self._call(planish_ops.token_places.default, mask, self.starts, keep, first)
        name = _free_name("tokens", program.dims)
        mode = fake_mode(program)
        assert mode.shape_env is not None
        source = ConstantSource(name)
        symbol = mode.shape_env.create_symbol(_TRACED_TOKENS, source, dynamic_dim=DimDynamic.DYNAMIC)
        count = mode.shape_env.create_symintnode(symbol, hint=_TRACED_TOKENS, source=source)
        with mode:
            node.meta["val"] = torch.empty((count,), dtype=torch.int64)
        bound = axes.batch * axes.tokens
        program.dims = {**program.dims, name: Dim(name, 1, max(1, program.upper_bound(bound)))}
        program.symbols = {**program.symbols, name: symbol}
        program.counts = {**program.counts, name: bound}
        return node

    @property
    def count(self) -> fx.Node:
        """T."""
        return self._once("count", lambda: self._call(aten.sym_size.int, self.places, 0))

    @property
    def columns(self) -> fx.Node:
        """Column of each token."""
        size = self.size(TOKENS)
        return self._once("columns", lambda: self._call(aten.remainder.Scalar, self.places, size))

    @property
    def rows(self) -> fx.Node:
        """Row of each token."""
        return self._once("rows", lambda: self._call(aten.floor_divide.default, self.places, self.size(TOKENS)))

    def slots(self, others: str) -> fx.Node:
        """Packed index of each position; see ``planish::token_slots``."""
        mask, keep, first = self.rule
        arguments = (mask, self.starts, keep, first, others)
        return self._once(("slots", others), lambda: self._call(planish_ops.token_slots.default, *arguments))

    @property
    def order(self) -> fx.Node:
        """Rows, longest first."""
        return self._once("order", self._make_order)

    def _make_order(self) -> fx.Node:
        ends = self._call(aten.slice.Tensor, self.starts, 0, 1, 2**63 - 1)
        lengths = self._call(aten.sub.Tensor, ends, self.begins)
        return self._call(planish_ops.argsort.default, lengths, True)

    @property
    def begins(self) -> fx.Node:
        """The first token of each row."""
        return self._once("begins", lambda: self._call(aten.slice.Tensor, self.starts, 0, 0, self.size(BATCH)))

    def _numbers(self, count: Any) -> fx.Node:
        """0, 1, ... below a count."""
        return self._call(aten.arange.default, count, device=torch.device("cpu"))

    # changing the form ----------------------------------------------------------------------------------------------

    def _sizes(self, axes: Sequence[Axis]) -> list[int | fx.Node]:
        """Sizes of axes as arguments of a reshape: a merged axis with a dynamic size is -1."""
        sizes: list[int | fx.Node] = []
        for axis in axes:
            dynamic = any(not isinstance(self.liveness.axes.size(a), int) for a in axis)
            if len(axis) == 1:
                sizes.append(self.size(axis[0]) if axis[0] in LABELS else axis[0])  # pyright: ignore
            else:
                sizes.append(-1 if dynamic else math.prod(self.liveness.axes.size(a) for a in axis))  # pyright: ignore
        return sizes

    def _rearranged(self, x: fx.Node, order: Sequence[int]) -> fx.Node:
        return x if list(order) == list(range(len(order))) else self._call(aten.permute.default, x, list(order))

    def _gather(self, x: fx.Node, axes: Axes, result: Axes) -> fx.Node:
        """The packed form of a value in memory that an op with the axes ``result`` reads.

        before: ``x`` with the axes ((batch), (heads), (), (width))
        after:  ``index_select(reshape(x, [batch, heads, width]), 0, rows)``, [T, heads, width]
        """
        axes = tuple(map(_named, ((),) * (len(result) - len(axes)) + axes, result))
        atoms = [a for axis in axes for a in axis]
        labels = [i for i, a in enumerate(atoms) if a in LABELS]
        plain = [axis for axis, own in zip(axes, result, strict=True) if _is_kept(own)]
        if not labels and len(plain) == len(axes):
            return x
        if [(a,) for a in atoms] != list(axes):
            x = self._call(aten.reshape.default, x, self._sizes([(a,) for a in atoms]))
        labels.sort(key=lambda i: atoms[i] != BATCH)
        x = self._rearranged(x, [*labels, *(i for i in range(len(atoms)) if i not in labels)])
        kept = [tuple(a for a in axis if a not in LABELS) for axis in plain]
        if not labels:
            return self._call(aten.reshape.default, x, self._sizes(kept))
        first = -1 if len(labels) == 2 else self.size(atoms[labels[0]])
        x = self._call(aten.reshape.default, x, [first, *self._sizes(kept)])
        self.rewrites["tokens gathered"] += 1
        index = self.places if len(labels) == 2 else self.rows if atoms[labels[0]] == BATCH else self.columns
        return self._call(aten.index_select.default, x, 0, index)

    def _value(self, node: Any, result: Axes) -> Any:
        """An operand in packed form: packed before, or gathered."""
        if not isinstance(node, fx.Node) or not isinstance(node.meta["val"], torch.Tensor):
            return node
        axes = self.liveness.axes[node]
        assert axes is not None
        if node not in self.done:
            return self._gather(node, axes, result) if axes else node
        own = _plain(axes)
        wanted = _plain(((),) * (len(result) - len(axes)) + axes, like=result)
        return self.done[node] if own == wanted else self._reshape(self.done[node], wanted)

    def _reshape(self, x: fx.Node, plain: Sequence[Axis]) -> fx.Node:
        return self._call(aten.reshape.default, x, [self.count, *self._sizes(plain)])

    def _restore(self, node: fx.Node, others: str) -> fx.Node:
        """The padded form of a packed value; padding holds the number that it is known to be there, else 0."""
        if self.liveness.padding(node) is not None:
            others = "none"
        key = (node, others)
        if key not in self.restored:
            self.restored[key] = self._restored(node, others)
            self.restored[key].meta["val"] = node.meta["val"]
            self.rewrites["padded form restored"] += 1
        return self.restored[key]

    def _restored(self, node: fx.Node, others: str) -> fx.Node:
        axes = self.liveness.axes[node]
        assert axes is not None
        slots = self.slots(others)
        x = self._call(aten.index.Tensor, self.done[node], [slots])
        if others != "nearest":
            for _ in _plain(axes):
                slots = self._call(aten.unsqueeze.default, slots, -1)
            known = self.liveness.padding(node)
            known = known if known is not None else torch.zeros((), dtype=node.meta["val"].dtype).item()
            x = self._call(aten.where.ScalarOther, self._call(aten.ge.Scalar, slots, 0), x, known)
        return self._laid_out(x, (BATCH, TOKENS), axes)

    def _laid_out(self, x: fx.Node, labels: tuple[str, ...], axes: Axes) -> fx.Node:
        """A value [labels, plain axes] with its axes in the order and grouping of ``axes``."""
        wanted = [TOKENS if a in POSITIONS else a for axis in axes for a in axis]
        plain = [i for i, a in enumerate(wanted) if a not in LABELS]
        split = [(a,) for a in labels] + [(wanted[i],) for i in plain]
        now = [(a,) for a in labels] + list(_plain(axes))
        if split != now:
            x = self._call(aten.reshape.default, x, self._sizes(split))
        at = {**{a: i for i, a in enumerate(labels)}, **{i: len(labels) + n for n, i in enumerate(plain)}}
        x = self._rearranged(x, [at[a if a in LABELS else i] for i, a in enumerate(wanted)])
        split = [len(a) for a in axes] == [1] * len(wanted)
        return x if split else self._call(aten.reshape.default, x, self._sizes(axes))

    # ops on tokens --------------------------------------------------------------------------------------------------

    def _packed(self, node: fx.Node) -> fx.Node:
        axes = self.liveness.axes[node]
        assert axes is not None
        target = node.target
        if target is ATTENTION:
            return self._attention(node)
        if target in ELEMENTWISE:
            args = [self._value(a, axes) for a in node.args]
            return self._call(target, *args, **node.kwargs)
        if target is aten.embedding.default:
            ids: Any = node.args[1]
            return self._call(target, node.args[0], self._value(ids, axes[:-1]), *node.args[2:], **node.kwargs)
        if target in RESHAPING:
            return self._reshaped(node, axes)
        if target is aten.cat.default:
            parts = [self._value(p, axes) for p in node.args[0]]  # pyright: ignore
            return self._call(target, parts, self._axis(axes, argument(node, 1, "dim", 0)))
        operand: Any = node.args[0]
        x = self._value(operand, self.liveness.axes[operand] or ())
        if target is aten.expand.default:
            return self._call(target, self._value(operand, axes), [self.count, *self._sizes(_plain(axes))])
        if target in (aten.slice.Tensor, aten.select.int):
            own = self.liveness.axes[operand]
            assert own is not None
            return self._call(target, x, self._axis(own, argument(node, 1, "dim", 0)), *node.args[2:])
        if target in REDUCTIONS or target in _BY_AXIS:
            return self._call(target, x, *_last_axis(node), **node.kwargs)
        return self._call(target, x, *node.args[1:], **node.kwargs)

    def _axis(self, axes: Axes, dim: int) -> int:
        """The packed axis of an axis that does not hold positions."""
        return 1 + sum(map(_is_kept, axes[: dim % len(axes)]))

    def _reshaped(self, node: fx.Node, axes: Axes) -> fx.Node:
        """A view that keeps every element: the plain atoms in their new order, regrouped."""
        operand: Any = node.args[0]
        own = self.liveness.axes[operand]
        assert own is not None
        x = self._value(operand, own)
        if node.target in (aten.permute.default, aten.transpose.int, aten.t.default):
            kept = [i for i, axis in enumerate(own) if _is_kept(axis)]
            return self._rearranged(x, [0, *(1 + kept.index(i) for i in _moved(node, len(own)) if i in kept)])
        return x if _plain(own) == _plain(axes) else self._reshape(x, _plain(axes))

    def _attention(self, node: fx.Node) -> fx.Node:
        query, key, value = (self._value(a, self.liveness.axes[a] or ()) for a in node.args[:3])  # pyright: ignore
        return self._varlen(node, (query, key, value), (self.starts, self.columns))

    def _varlen(self, node: fx.Node, operands: tuple[fx.Node, ...], queries: tuple[fx.Node, fx.Node | None]) -> fx.Node:
        """Attention on packed operands; ``queries`` are their starts and columns."""
        mask, causal = argument(node, 3, "attn_mask"), bool(argument(node, 5, "is_causal", False))
        if isinstance(mask, fx.Node):
            for _ in range(4 - mask.meta["val"].dim()):
                mask = self._call(aten.unsqueeze.default, mask, 0)
        scale = argument(node, 6, "scale")
        scale = float(node.args[0].meta["val"].shape[-1] ** -0.5 if scale is None else scale)  # pyright: ignore
        starts, columns = queries
        args = (*operands, starts, self.starts, self.order, mask, columns, self.columns, causal, scale)
        return self._call(planish_ops.varlen_attention.default, *args)

    # readers of tokens ----------------------------------------------------------------------------------------------

    def _first_tokens(self, node: fx.Node) -> fx.Node:
        """The first token of each row.

        before: ``select(x, 1, 0)``, x [B, S, H]
        after:  ``index_select(packed x, 0, starts[:-1])``
        """
        operand: Any = node.args[0]
        axes = self.liveness.axes[operand]
        assert axes is not None
        x = self._call(aten.index_select.default, self.done[operand], 0, self.begins)
        at = self.liveness.first_token_axis(node)
        gone = () if node.target is aten.select.int else ((),)
        rest = tuple(a for i, axis in enumerate(axes) for a in ([axis] if i != at else gone))
        return self._laid_out(x, (BATCH,), rest)

    def _sum(self, node: fx.Node) -> fx.Node:
        """A sum over the positions, to which padding adds nothing.

        before: ``sum(permute(x * mask), -1)``
        after:  ``segment_sum(packed x * mask, starts)``
        """
        operand: Any = node.args[0]
        axes = self.liveness.axes[operand]
        assert axes is not None
        x = self._call(planish_ops.segment_sum.default, self.done[operand], self.starts)
        kept = ((),) if argument(node, 2, "keepdim", False) else ()
        return self._laid_out(x, (BATCH,), (*axes[:-1], *kept))

    def _attend_from_few(self, node: fx.Node) -> fx.Node:
        """Attention of queries that are not tokens of this batch, such as one [CLS] row or a decoder's positions.

        before: ``attention(q, k, v, mask)``, q [B, heads, n, width]
        after:  ``varlen_attention(q as [B n, heads, width], packed k, packed v, query_starts=arange(B + 1) n)``
        """
        query, key, value = node.args[:3]
        batch, few = self.size(BATCH), self.program.shape(query)[2]  # pyright: ignore
        heads, width = (int(self.program.shape(query)[i]) for i in (1, 3))  # pyright: ignore
        count: Any = few if isinstance(few, int) else self._call(aten.sym_size.int, query, 2)
        x = self._call(aten.reshape.default, self._call(aten.permute.default, query, [0, 2, 1, 3]), [-1, heads, width])
        ends = self._call(operator.add, batch, 1) if isinstance(batch, fx.Node) else batch + 1
        starts = self._call(aten.mul.Tensor, self._numbers(ends), count)
        infer_values(self.program)
        total = self._call(aten.sym_size.int, x, 0)
        columns = self._call(aten.remainder.Scalar, self._numbers(total), count)
        packed = tuple(self._value(a, self.liveness.axes[a] or ()) for a in (key, value))  # pyright: ignore
        out = self._varlen(node, (x, *packed), (starts, columns))
        depth = int(value.meta["val"].shape[-1])  # pyright: ignore
        out = self._call(aten.reshape.default, out, [batch, count, heads, depth])
        return self._call(aten.permute.default, out, [0, 2, 1, 3])


_BY_AXIS = frozenset({aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default})


def _last_axis(node: fx.Node) -> tuple[Any, ...]:
    """Arguments after the operand, with the last axis by its negative number."""
    dims = node.args[1] if len(node.args) > 1 else -1
    return ([-1] if isinstance(dims, (list, tuple)) else -1, *node.args[2:])


def _named(axis: Axis, result: Axis) -> Axis:
    """An operand's axis, which is a row or position axis if it meets one in an elementwise result."""
    return result if axis and not set(axis) & LABELS and not _is_kept(result) else axis


def _is_kept(axis: Axis) -> bool:
    """Whether an axis has a place in the packed form: not if it holds nothing but rows or positions."""
    return not axis or bool(set(axis) - LABELS)


def _plain(axes: Axes, like: Axes | None = None) -> list[Axis]:
    """The axes of the packed form after T; which are kept is decided by ``like``, if it is given."""
    kept = [axis for axis, own in zip(axes, like or axes, strict=True) if _is_kept(own)]
    return [tuple(a for a in axis if a not in LABELS) for axis in kept]


def _moved(node: fx.Node, rank: int) -> list[int]:
    """The operand's axes in the order in which a permute or transpose puts them."""
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]]  # pyright: ignore
    a, b = (d % rank for d in node.args[1:3]) if node.target is aten.transpose.int else (0, 1)  # pyright: ignore
    moved = list(range(rank))
    moved[a], moved[b] = moved[b], moved[a]
    return moved


def _free_name(name: str, taken: Any) -> str:
    free, n = name, 0
    while free in taken:
        n += 1
        free = f"{name}_{n}"
    return free
