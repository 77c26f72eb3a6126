"""remove-padding: an encoder computes only the real tokens of a padded batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from planish.errors import UnknownNameError
from planish.ops import ATTENTION, argument, aten
from planish.passes.padding.axes import AxisMap
from planish.passes.padding.contents import reads_padding
from planish.passes.padding.liveness import Liveness
from planish.passes.padding.pack import Packer
from planish.passes.padding.placement import place
from planish.passes.padding.values import MaskValues
from planish.pipeline import Note, Pass, Refusal, Result
from planish.program import Program
from planish.rules import remove_dead
from planish.targets import Target

POLICIES = ("zero", "exact", "nearest")
"""What an output holds at padding: 0; what the model computes there; or the nearest token's value."""


@dataclass(frozen=True)
class RemovePadding(Pass):
    """Compute only the tokens of a padded batch, where no output that counts depends on the padding.

    before: ``attention(view(linear(x, w)), ..., mask)``, x [B, S, H], mask 1 at tokens
    after:  ``varlen_attention(view(linear(packed x, w)), ..., starts)``, packed x [T, H] the tokens row after row;
            outputs [B, S, H] are restored at the end

    The mask is found behind attention: an input [B, S] that provably hides padded keys. What may be packed follows from
    three analyses: which axes are rows and positions (``axes``), what is known of values at padding (``values``), and
    who reads padding (``liveness``). Where to pack is a minimum cut (``placement``). When a call's mask does not fit
    (``planish::token_starts``), every position counts as a token, and all is computed as before.

    ByteTransformer (arXiv 2210.03052).

    Attributes:
        policy: what an output holds at padding, one of ``POLICIES``.
    """

    policy: str = "zero"

    name: ClassVar[str] = "remove-padding"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    makes: ClassVar[frozenset[str]] = frozenset({"packed"})
    tol: ClassVar[float] = 1e-9  # sums over fewer terms, in another order

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UnknownNameError(f"unknown padding {self.policy!r}", fix="use one of: " + ", ".join(POLICIES))

    def run(self, program: Program, target: Target) -> Result:
        """Pack for each mask in turn."""
        result = Result()
        for mask in _masks(program):
            self._pack(program, mask, result)
            remove_dead(program.module)
        return result

    def _pack(self, program: Program, mask: fx.Node, result: Result) -> None:
        """Pack what one mask allows, and say why the rest stays."""

        def refuse(node: fx.Node, reason: str) -> None:
            result.refusals.append(Refusal.at(self.name, node, reason))

        batch, tokens = program.shape(mask)
        if batch == tokens and not isinstance(batch, int):
            return refuse(mask, "its rows and positions are one dim, so they cannot be told apart")
        if batch == 1 or tokens == 1:
            return refuse(mask, "it has one row, or one position, whose axis cannot be told from others of size 1")
        if any(mask in (user.args[1:2]) for user in mask.users if user.target is aten.embedding.default):
            return refuse(mask, "it is made of token ids, which are no mask of 0 and 1")
        liveness = _analyse(program, mask, exact=self.policy == "exact")
        if liveness is None:
            return refuse(mask, "attention reads it, but it is not proved that it hides padded keys")
        allowed, kept = _packable(program, liveness)
        for reader, count in kept.items():
            refuse(reader, f"{liveness.complaint(reader)}, so {count} ops before it compute padding too")
        placement = place(liveness, allowed)
        readers = {user for n in placement.packed for user in n.users if liveness.attends_from_few(user)}
        if not readers and not any(n.target is ATTENTION for n in placement.packed):
            return None
        reason = reads_padding(program, mask, liveness.keep)
        if reason is not None:
            return refuse(mask, reason)
        result.notes.append(Note.at(self.name, mask, placement.text(len(allowed))))
        for node in placement.packed:
            result.rewrites["attention on tokens" if node.target is ATTENTION else "op on tokens"] += 1
        packer = Packer(liveness, placement.packed, self.policy == "nearest", result.rewrites)
        outputs = program.module.graph.output_node().args[0]
        padded = [s.name for s, n in zip(program.outputs, outputs, strict=True) if packer.is_altered(n)]  # pyright: ignore
        program.padded = {**program.padded, **dict.fromkeys(padded, (mask.name, liveness.keep))}
        packer.run()
        return None


def _packable(program: Program, liveness: Liveness) -> tuple[set[fx.Node], Counter[fx.Node]]:
    """The ops that may be packed, and for each reader of padding how many ops it keeps padded."""
    allowed: set[fx.Node] = set()
    kept: Counter[fx.Node] = Counter()
    masks = {argument(n, 3, "attn_mask") for n in program.nodes() if n.target is ATTENTION}
    for node in filter(liveness.axes.is_token, program.nodes()):
        if liveness.obstacle(node) is not None or node in masks:  # attention reads masks for the padded batch
            continue
        if node not in liveness.live or liveness.padding(node) is not None:
            allowed.add(node)
        else:
            kept[liveness.live[node]] += 1
    return allowed, kept


def _masks(program: Program) -> list[fx.Node]:
    """Inputs [B, S] that attention masks are made of, in order; a mask made of several of them marks no padding."""
    found: set[fx.Node] = set()
    for node in program.nodes():
        mask = argument(node, 3, "attn_mask") if node.target is ATTENTION else None
        pending = [mask] if isinstance(mask, fx.Node) else []
        seen: set[fx.Node] = set()
        while pending:
            n = pending.pop()
            if n not in seen:
                seen.add(n)
                pending += [i for i in n.all_input_nodes if isinstance(i.meta["val"], torch.Tensor)]
        inputs = [n for n in seen if n.op == "placeholder"]
        found |= {n for n in inputs if len(inputs) == 1 and n.meta["val"].dim() == 2}
    return [n for n in program.nodes() if n in found]


def _analyse(program: Program, mask: fx.Node, *, exact: bool) -> Liveness | None:
    """The analyses for the value of the mask that marks tokens; None if no attention is proved to hide the rest."""
    axes = AxisMap.of(program, mask)
    values = MaskValues(axes)
    for keep in (1, 0):
        liveness = Liveness(axes, values, keep, exact)
        if any(n.target is ATTENTION and liveness.hides(n) for n in program.nodes()):
            liveness.find()
            return liveness
    return None
