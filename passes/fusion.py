"""fuse-groups: which ops become one kernel, decided around the ops that cost: GEMMs, attention, norms, reductions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from planish.conv_ops import CONVOLUTIONS, POOLS
from planish.ops import (
    ATTENTION,
    ELEMENTWISE,
    INLINE,
    LAYER_NORM,
    LAYERS,
    MATMUL,
    QUANTIZED_CONVOLUTION,
    REDUCTIONS,
    ROWS,
    STATISTICS,
    VARLEN,
    VIEWS,
    argument,
    aten,
    has_constant_weight,
    short_name,
)
from planish.pipeline import Pass, Refusal, Result
from planish.program import Program
from planish.rules import remove_dead
from planish.targets import Target

WINDOWS = CONVOLUTIONS | POOLS | {QUANTIZED_CONVOLUTION}
"""Ops that combine a window of positions."""

CHAIN_ROWS = 64
"""Rows of a chain of linear layers that must fit the second-level cache, or the weights are reread too often."""


@dataclass
class Group:
    """Ops that become one kernel. ``nodes`` are copied into it; what others need of them stays outside as well."""

    anchor: fx.Node
    result: fx.Node
    nodes: set[fx.Node] = field(default_factory=set[fx.Node])


@dataclass(frozen=True)
class FuseGroups(Pass):
    """Group GEMM + bias + activation + residual + norm, attention with its views, rows and elementwise chains.

    before: ``y = linear(x, w, b); z = gelu(y)``
    after:  ``z = fused_linear_gelu_0(x, w, b)``, a GraphModule with the two ops

    A view never ends a kernel if its consumer can read through it: it is copied into each consumer, where it is an
    index map. A value that two kernels need is stored, never computed twice (views and generators excepted).
    """

    name: ClassVar[str] = "fuse-groups"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    makes: ClassVar[frozenset[str]] = frozenset({"fused"})

    def run(self, program: Program, target: Target) -> Result:
        """Form groups in graph order around the costly ops, then around what is left, and build their modules."""
        fusion = _Fusion(program, Result())
        nodes = list(program.nodes())
        for node in nodes:
            if _is_anchor(node) and node not in fusion.owned:
                fusion.around(node, target)
        for node in reversed(nodes):
            if (
                node.op == "call_function"
                and fusion.is_needed(node)
                and node.target in INLINE
                and node not in fusion.owned
            ):
                fusion.chain(node)
        fusion.build()
        return fusion.outcome


def _is_anchor(node: fx.Node) -> bool:
    if node.target in CONVOLUTIONS | LAYERS | {QUANTIZED_CONVOLUTION}:
        return has_constant_weight(node) and _is_float(node)
    return node.target in ROWS | REDUCTIONS | WINDOWS | {ATTENTION, VARLEN, MATMUL, STATISTICS} and _is_float(node)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32


def _makes_codes(group: Group, user: fx.Node) -> bool:
    """Whether ``user`` turns the result of a layer, whose kernel can store bytes, into int8 codes."""
    return group.anchor.target in LAYERS | {QUANTIZED_CONVOLUTION} and user.meta["val"].dtype is torch.int8


@dataclass
class _Fusion:
    program: Program
    outcome: Result
    groups: list[Group] = field(default_factory=list[Group])
    owned: set[fx.Node] = field(default_factory=set[fx.Node])
    within: dict[fx.Node, list[Group]] = field(default_factory=dict[fx.Node, list[Group]])
    alone: set[fx.Node] = field(default_factory=set[fx.Node])

    def around(self, anchor: fx.Node, target: Target) -> None:
        """The group of a costly op: what it reads through, then what follows it."""
        group = Group(anchor, anchor, {anchor})
        if anchor.target in LAYERS:
            self._read_through(group, anchor.args[:1])
            self._follow(group)
            self._follow_norm(group)
            while (longer := self._next_layer(group, target)) is not None:
                group = longer
        elif anchor.target is QUANTIZED_CONVOLUTION:
            self._follow(group)
        elif anchor.target in WINDOWS:
            self._read_through(group, anchor.args[:1])
            self._follow(group)
        elif anchor.target in (ATTENTION, VARLEN):
            mask = anchor.args[6] if anchor.target is VARLEN else argument(anchor, 3, "attn_mask")
            self._read_through(group, [*anchor.args[:3], mask])
            self._follow_views(group)
        elif anchor.target is MATMUL:
            self._read_through(group, anchor.args[:2])
            self._follow(group)
        elif anchor.target is STATISTICS:
            self._absorb(group, anchor.args[0])
        else:
            self._absorb(group, anchor.args[0])
            self._follow(group)
        self._keep(group)

    def chain(self, sink: fx.Node) -> None:
        """A group of elementwise ops, gathers and views that ends at ``sink``."""
        group = Group(sink, sink, {sink})
        for operand in sink.all_input_nodes:
            self._absorb(group, operand)
        self._keep(group)

    def is_needed(self, node: fx.Node) -> bool:
        """Whether a user outside all groups, or in a group that has no copy of the node, reads it.

        Consumers come first: this is asked in reverse graph order.
        """
        needed = any(
            user.op == "output" or user in self.alone or any(node not in g.nodes for g in self.within.get(user, ()))
            for user in node.users
        )
        if needed and node not in self.owned:
            self.alone.add(node)
        return needed

    def _keep(self, group: Group) -> None:
        """Accept a group of two or more ops if it is convex."""
        loop = self._loop(group)
        if loop is not None:
            self._refuse(group.anchor, f"the group is not convex: its input {loop.name} depends on its result")
            group = Group(group.anchor, group.anchor, {group.anchor})
        self.owned |= {n for n in group.nodes if set(n.users) <= group.nodes or n is group.result}
        self.alone -= group.nodes
        for node in group.nodes:
            self.within.setdefault(node, []).append(group)
        if len(group.nodes) < 2:
            return
        self.groups.append(group)
        self.outcome.rewrites[f"{short_name(group.anchor)} group"] += 1

    def _loop(self, group: Group) -> fx.Node | None:
        """An input of the group that is computed from its result, which would make the fused graph cyclic."""
        after: set[fx.Node] = {group.result}
        for node in _from(group.result):
            if any(n in after for n in node.all_input_nodes):
                after.add(node)
        return next((i for i in _inputs(group.nodes) if i in after), None)

    def _read_through(self, group: Group, operands: Iterable[object]) -> None:
        """Copy the views in front of operands into the group."""
        for operand in operands:
            while isinstance(operand, fx.Node) and operand.target in VIEWS and operand not in self.owned:
                group.nodes.add(operand)
                operand = operand.args[0]

    def _absorb(self, group: Group, operand: object) -> None:
        """Take producers into the group: views and generators always, other inline ops if nothing else uses them."""
        if not isinstance(operand, fx.Node) or operand.target not in INLINE or operand in self.owned:
            return
        free = operand.target in VIEWS or operand.target is aten.arange.default
        if not free and not set(operand.users) <= group.nodes:
            self._refuse(operand, f"{operand.name} is used by {len(operand.users)} kernels, so it is stored once")
            return
        group.nodes.add(operand)
        for source in operand.all_input_nodes:
            self._absorb(group, source)

    def _follow(self, group: Group) -> None:
        """Take elementwise consumers of the same shape, as long as each is the only one."""
        while (user := self._only_user(group)) is not None:
            if user.target not in ELEMENTWISE or not (_is_float(user) or _makes_codes(group, user)):
                return
            if self.program.shape(user) != self.program.shape(group.result):
                self._refuse(user, f"its shape differs from {group.result.name}'s")
                return
            group.nodes.add(user)
            group.result = user

    def _follow_norm(self, group: Group) -> None:
        """Take the layer norm of the rows that the group has just computed."""
        user = self._only_user(group)
        if user is None or user.target is not LAYER_NORM:
            return
        if user.args[0] is group.result and len(user.args[1]) == 1:  # pyright: ignore
            group.nodes.add(user)
            group.result = user

    def _next_layer(self, group: Group, target: Target) -> Group | None:
        """The group with the linear layer that reads its rows, if nothing outside needs what lies between.

        before: ``y = fused_linear_gelu(x); z = fused_linear_add(y, x)``
        after:  ``z = fused_linear_gelu_add(x)``: a chunk of rows of ``y`` stays in the second-level cache
        """
        readers = [u for u in group.result.users if u.target in LAYERS and u.args[0] is group.result and _is_anchor(u)]
        if len(readers) != 1 or readers[0] in self.owned:
            return None
        layer = readers[0]
        longer = Group(group.anchor, layer, group.nodes | {layer})
        self._follow(longer)
        self._follow_norm(longer)
        outside = [u for u in group.result.users if u not in longer.nodes]
        if outside:
            self._refuse(
                layer, f"{group.result.name} is also read by {outside[0].name}, so it is stored between the layers"
            )
            return None
        widths = [int(n.args[1].meta["val"].shape[0]) for n in longer.nodes if n.target in LAYERS]  # pyright: ignore
        if 4 * CHAIN_ROWS * sum(widths) > target.l2_bytes:
            self._refuse(layer, f"{CHAIN_ROWS} rows of {sum(widths)} values do not fit the second-level cache")
            return None
        return longer

    def _follow_views(self, group: Group) -> None:
        """Take views after attention that leave each head's columns together."""
        width = self.program.shape(group.anchor)[-1]
        while (user := self._only_user(group)) is not None:
            if not _keeps_columns(self.program, user, width):
                return
            group.nodes.add(user)
            group.result = user

    def _only_user(self, group: Group) -> fx.Node | None:
        users = list(group.result.users)
        if len(users) == 1:
            return users[0] if users[0].op != "output" and users[0] not in self.owned else None
        if any(u.target in ELEMENTWISE | {LAYER_NORM} for u in users):
            self._refuse(group.result, f"{group.result.name} is used by {len(users)} ops, so it is stored")
        return None

    def _refuse(self, node: fx.Node, reason: str) -> None:
        refusal = Refusal.at(FuseGroups.name, node, reason)
        if refusal not in self.outcome.refusals:
            self.outcome.refusals.append(refusal)

    def build(self) -> None:
        """Replace each group's result by a call of its module."""
        graph = self.program.module.graph
        order = {n: i for i, n in enumerate(graph.nodes)}
        for count, group in enumerate(sorted(self.groups, key=lambda g: order[g.result])):
            nodes = _reaching(sorted(group.nodes, key=order.__getitem__), group.result)
            inputs = _inputs(nodes)
            names = [short_name(n) for n in nodes if n.target not in VIEWS or len(nodes) == 1]
            name = "_".join(["fused", *dict.fromkeys(names or [short_name(group.result)]), str(count)])
            self.program.module.add_submodule(name, _module(nodes, inputs, group.result))
            with graph.inserting_before(group.result):
                call = graph.create_node("call_module", name, tuple(inputs), name=name)
            call.meta |= {k: v for k, v in group.result.meta.items() if k in ("val", "stack_trace")}
            group.result.replace_all_uses_with(call)
        remove_dead(self.program.module)


def _reaching(nodes: list[fx.Node], result: fx.Node) -> list[fx.Node]:
    """Those of ``nodes`` that the result depends on."""
    needed = {result}
    for node in reversed(nodes):
        if node in needed:
            needed |= set(node.all_input_nodes)
    return [n for n in nodes if n in needed]


def _keeps_columns(program: Program, user: fx.Node, width: object) -> bool:
    shape = program.shape(user)
    if user.target is aten.transpose.int:
        return len(shape) - 1 not in {d % len(shape) for d in user.args[1:3]}  # pyright: ignore
    if user.target is aten.permute.default:
        return user.args[1][-1] % len(shape) == len(shape) - 1  # pyright: ignore
    last = shape[-1] if shape else 0
    return (
        user.target is aten.reshape.default and isinstance(last, int) and isinstance(width, int) and last % width == 0
    )


def _from(node: fx.Node) -> Iterable[fx.Node]:
    """The nodes after ``node`` in execution order."""
    while (node := node.next).op != "root":
        yield node


def _inputs(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Nodes outside that the group reads, tensors first, in order of use."""
    inside = set(nodes)
    found = dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside)
    return sorted(found, key=lambda n: not isinstance(n.meta["val"], torch.Tensor))


def _module(nodes: list[fx.Node], inputs: list[fx.Node], result: fx.Node) -> fx.GraphModule:
    """The group's body as a module of its own."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        mapping[node] = graph.placeholder(node.name)
    for node in nodes:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    for node, copy in mapping.items():
        copy.meta = dict(node.meta)
    graph.output(mapping[result])
    return fx.GraphModule({}, graph, class_name="Group")
