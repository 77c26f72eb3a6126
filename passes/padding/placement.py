"""Where a batch is packed: the cheapest cut between what runs on tokens and what runs on the padded batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from planish.ops import ATTENTION, LINEAR, VIEWS, argument
from planish.passes.padding.liveness import Liveness
from planish.program import Program, evaluate

FILL = 0.5
"""Share of tokens in a batch that the choice assumes; it decides only whether packing pays for its copies."""

FLOPS_PER_BYTE = 8.0
"""Machine balance of the model of costs: a core does some 100 GFLOP/s and moves some 12 GB/s."""

_MS = 12e6
"""Bytes moved in a millisecond."""


@dataclass(frozen=True)
class Placement:
    """The ops to pack, and what the model of costs says, in bytes' worth of time.

    Attributes:
        packed: values that are computed for tokens only.
        saved: what that saves at ``FILL``.
        copied: what packing and restoring cost.
    """

    packed: frozenset[fx.Node]
    saved: float
    copied: float

    def text(self, allowed: int) -> str:
        """The decision and its figures."""
        return (
            f"{len(self.packed)} of {allowed} ops that may be packed are; modelled at the example's shape with "
            f"{FILL:.0%} tokens, it saves {self.saved / _MS:.3g} ms and copies for {self.copied / _MS:.3g} ms"
        )


def place(liveness: Liveness, allowed: Iterable[fx.Node]) -> Placement:
    """Choose among the ops that may be packed.

    A node on the source's side of the minimum cut is packed. Cut edges are what is lost: the saving of an op that stays
    padded, and the copy of a value that is needed in the other form, once however many ops read it.
    """
    allowed = set(allowed)
    program = liveness.axes.program
    graph = nx.DiGraph()
    graph.add_nodes_from(["packed", "padded"])
    costs = {n: _cost(program, n) for n in allowed}
    for node in allowed:
        graph.add_edge("packed", node, capacity=(1 - FILL) * costs[node])
    for node in filter(liveness.axes.is_token, program.nodes()):
        size = 2 * _bytes(program, node)
        for user in node.users:
            as_mask = user.target is ATTENTION and node is argument(user, 3, "attn_mask")
            if as_mask or liveness.reads_packed(user):  # read as it is
                continue
            reader = user if user in allowed else "padded"
            if node in allowed:
                graph.add_edge(node, ("restored", node), capacity=size)
                graph.add_edge(("restored", node), reader)
            if user in allowed:
                graph.add_edge(user, ("gathered", node))
                graph.add_edge(("gathered", node), node if node in allowed else "padded", capacity=size)
    lost, (source, _) = nx.minimum_cut(graph, "packed", "padded", flow_func=nx.algorithms.flow.boykov_kolmogorov)
    packed = frozenset(n for n in source if isinstance(n, fx.Node))
    saved = (1 - FILL) * sum(costs[n] for n in packed)
    left = (1 - FILL) * sum(costs[n] for n in allowed - packed)
    return Placement(packed, saved, lost - left)


def _bytes(program: Program, node: fx.Node) -> float:
    value: torch.Tensor = node.meta["val"]
    dims = program.example_dims()
    return float(value.element_size() * math.prod(evaluate(s, dims) for s in program.shape(node)))


def _cost(program: Program, node: fx.Node) -> float:
    """What an op costs, in bytes' worth of time: its result written, or the floating-point operations it takes."""
    if node.target in VIEWS:
        return 0.0
    own = _bytes(program, node)
    if node.target is LINEAR:
        return max(own, own / 4 * 2 * int(node.args[1].meta["val"].shape[1]) / FLOPS_PER_BYTE)  # pyright: ignore
    if node.target is ATTENTION:
        keys = evaluate(program.shape(node.args[1])[-2], program.example_dims())  # pyright: ignore
        return max(own, own / 4 * 4 * keys / FLOPS_PER_BYTE)
    return own
