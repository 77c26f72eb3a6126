"""Rewrite rules: a pass is a table of them, and ``apply_rules`` is the one function that runs a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from planish.ops import aten
from planish.pipeline import Refusal, Result
from planish.program import Program
from planish.verify import infer_values


@dataclass(frozen=True)
class Refuse:
    """Returned by a rule that matched but must not fire, with the reason."""

    reason: str


Rewrite = Callable[[Program, fx.Node], "fx.Node | Refuse | None"]


@dataclass(frozen=True)
class Rule:
    """One local rewrite.

    Attributes:
        name: noun phrase, as counted in the step's rewrites.
        targets: the operators at which it may start; empty means every node.
        rewrite: returns the node whose value replaces the matched one (which may be an existing node), ``None`` when
            the pattern is not there, or ``Refuse`` when it is there but a check forbids the rewrite.
    """

    name: str
    targets: frozenset[Any]
    rewrite: Rewrite


def rule(name: str, *targets: Any) -> Callable[[Rewrite], Rule]:
    """Make a ``Rule`` of a function; the function's docstring shows ``before:`` and ``after:``."""
    return lambda rewrite: Rule(name, frozenset(targets), rewrite)


def apply_rules(program: Program, rules: Sequence[Rule]) -> Result:
    """Apply the rules, in table order at each node and in graph order, until none fires; then drop dead nodes."""
    result = Result()
    refused: dict[tuple[str, str], Refusal] = {}
    while _sweep(program, rules, result, refused):
        pass
    result.refusals = list(refused.values())
    return result


def _sweep(program: Program, rules: Sequence[Rule], result: Result, refused: dict[tuple[str, str], Refusal]) -> bool:
    fired = False
    graph = program.module.graph
    for node in list(graph.nodes):
        if node._erased or node.op in ("placeholder", "output"):
            continue
        for r in rules:
            if r.targets and node.target not in r.targets:
                continue
            with graph.inserting_before(node):
                new = r.rewrite(program, node)
            if isinstance(new, Refuse):
                refused[r.name, node.name] = Refusal.at(r.name, node, new.reason)
            elif new is not None:
                if "val" not in new.meta:
                    new.meta["val"] = node.meta["val"]
                infer_values(program)
                node.replace_all_uses_with(new)
                result.rewrites[r.name] += 1
                refused.pop((r.name, node.name), None)
                fired = True
                break
    remove_dead(program.module, result)
    return fired


def remove_dead(module: fx.GraphModule, result: Result | None = None) -> None:
    """Erase nodes nobody uses, and constants nobody reads."""
    for node in reversed(list(module.graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            module.graph.erase_node(node)
            if result is not None:
                result.rewrites["dead code"] += 1
    read = {str(n.target) for n in module.graph.nodes if n.op in ("get_attr", "call_module")}
    for name in [*module._parameters, *module._buffers, *module._modules]:
        if name not in read:
            delattr(module, name)


def sizes_of(program: Program, node: fx.Node, operands: Sequence[fx.Node]) -> list[int | fx.Node] | None:
    """The node's shape as ints and size nodes; sizes are read off operands that have them on the same axis."""
    sizes: list[int | fx.Node] = []
    shape = program.shape(node)
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            sizes.append(size)
            continue
        for x in operands:
            own = program.shape(x) if isinstance(x.meta["val"], torch.Tensor) else ()
            at = axis - len(shape) + len(own)
            if at >= 0 and own[at] == size:
                sizes.append(program.module.graph.call_function(aten.sym_size.int, (x, at)))
                sizes[-1].meta["val"] = x.meta["val"].shape[at]
                break
        else:
            return None
    return sizes
