"""choose-layout: convolutions and all between them work with the channels on the last axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from planish.conv_ops import (
    AVG_POOL_LAST,
    AVG_POOLS,
    CONVOLUTION_LAST,
    MAX_POOL_LAST,
    MAX_POOLS,
    POOLS,
    Convolution,
    pool_window,
)
from planish.ops import CONVOLUTION, ELEMENTWISE, LINEAR, argument, aten
from planish.passes.canonicalize import cancel_views, merge_equal, remove_identity
from planish.pipeline import Pass, Result
from planish.program import Program, add_constant, constant
from planish.rules import Refuse, Rewrite, Rule, apply_rules, sizes_of
from planish.targets import Target
from planish.verify import fake_mode

_PERMUTE, _RESHAPE = aten.permute.default, aten.reshape.default


@dataclass(frozen=True)
class ChooseLayout(Pass):
    """Move the channels of convolutions and poolings to the last axis; 1x1 convolutions become linear layers.

    before: ``max_pool2d(relu(convolution(x, w, b)), 3) + y``
    after:  ``permute(max_pool(relu(planish::convolution(permute(x), w, b)), 3) + permute(y))``

    A permute in front of a convolution meets the one behind the convolution before, and both go: the ones behind move
    down through every op that has a channels-last form. Values are the same, element by element.
    """

    name: ClassVar[str] = "choose-layout"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    makes: ClassVar[frozenset[str]] = frozenset({"channels-last"})
    tol: ClassVar[float] = 1e-12  # the same products, summed in another order

    def run(self, program: Program, target: Target) -> Result:
        """Apply the rules, if there is a convolution at all, and merge equal permutes until nothing changes."""
        result = Result()
        if not any(n.target is CONVOLUTION for n in program.nodes()):
            return result
        rules = _Layout().rules()
        while True:
            step = apply_rules(program, rules)
            result.rewrites += step.rewrites
            result.refusals = step.refusals
            if not merge_equal(program):
                return result


def _to_last(rank: int) -> list[int]:
    return [0, *range(2, rank), 1]


def _to_first(rank: int) -> list[int]:
    return [0, rank - 1, *range(1, rank - 1)]


def _rank(node: fx.Node) -> int:
    return node.meta["val"].dim()


def _zeros_around(node: fx.Node, axes: range) -> list[list[int]] | None:
    """How many zeros a ``constant_pad_nd`` puts before and after each of ``axes``; None if it does anything else."""
    pads: list[Any] = list(node.args[1])  # pyright: ignore
    sides = [pads[i : i + 2] for i in range(0, len(pads), 2)]  # the last axis first
    sides = (sides + [[0, 0]] * _rank(node))[: _rank(node)][::-1]
    elsewhere = any(p for axis, side in enumerate(sides) for p in side if axis not in axes)
    if argument(node, 2, "value", 0) != 0 or elsewhere or any(not isinstance(p, int) or p < 0 for p in pads):
        return None
    return [sides[axis] for axis in axes]


@dataclass
class _Layout:
    """The rules; ``moving`` are the permutes and transposes to channels-first that this pass has made.

    Only those move: a permute of the model's own is the model's business.
    """

    moving: set[fx.Node] = field(default_factory=set[fx.Node])

    def rules(self) -> tuple[Rule, ...]:
        """The table, in the order of trial."""

        def rule(name: str, rewrite: Rewrite, *targets: Any) -> Rule:
            return Rule(name, frozenset(targets), rewrite)

        return (
            remove_identity,
            cancel_views,
            rule("convolution with channels last", self.convolution, CONVOLUTION),
            rule("pooling with channels last", self.pooling, *(POOLS - {MAX_POOL_LAST, AVG_POOL_LAST})),
            rule("permute moved below elementwise", self.elementwise, *ELEMENTWISE),
            rule("permute moved below concatenation", self.concatenation, aten.cat.default),
            rule("permute moved below padding", self.padding, aten.constant_pad_nd.default),
            rule("padding folded into convolution", self.fold_padding, CONVOLUTION_LAST),
            rule("padding of the model's input moved below", self.permute_padding, _PERMUTE),
            rule("permute moved below slice", self.slice, aten.slice.Tensor),
            rule("permute of single positions is a reshape", self.single, _PERMUTE, _RESHAPE),
            rule("positions merged with channels last", self.merged, _RESHAPE),
            rule("positions split with channels last", self.split, _PERMUTE),
            rule("mean over positions with channels last", self.mean, aten.mean.dim),
        )

    # helpers --------------------------------------------------------------------------------------------------------

    def _first(self, program: Program, y: fx.Node, rank: int) -> fx.Node:
        """``y`` [N, spatial..., C] as [N, C, spatial...], a permute that moves on."""
        node = program.module.graph.call_function(_PERMUTE, (y, _to_first(rank)))
        self.moving.add(node)
        return node

    def _last(self, program: Program, x: fx.Node) -> fx.Node:
        return program.module.graph.call_function(_PERMUTE, (x, _to_last(_rank(x))))

    def _moved(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node in self.moving and node.target is _PERMUTE

    # rules ----------------------------------------------------------------------------------------------------------

    def convolution(self, program: Program, node: fx.Node) -> fx.Node | Refuse | None:
        """before: ``convolution(x, w, b, ...)``
        after:  ``permute(planish::convolution(permute(x), w, b, ...))``, a 1x1: ``permute(linear(permute(x), w, b))``
        """
        conv, graph = Convolution.of(node), program.module.graph
        if conv.weight.op != "get_attr":
            return Refuse("its weight is no constant")
        if _rank(conv.x) != _rank(conv.weight):
            return Refuse("it has no batch axis")
        x = self._last(program, conv.x)
        if not conv.is_pointwise:
            padding = [*conv.window.padding, *conv.padding_after]
            new = graph.call_function(CONVOLUTION_LAST, (x, *node.args[1:4], padding, *node.args[5:]))
            return self._first(program, new, _rank(node))
        weight = constant(program.module, conv.weight)
        matrix = weight.flatten(1).t() if conv.transposed else weight.flatten(1)
        w = graph.get_attr(add_constant(program.module, f"{conv.weight.target}_matrix", matrix.contiguous()))
        return self._first(program, graph.call_function(LINEAR, (x, w, conv.bias)), _rank(node))

    def pooling(self, program: Program, node: fx.Node) -> fx.Node | Refuse | None:
        """before: ``max_pool2d(permute(y), 3)``
        after:  ``permute(planish::max_pool(y, [3, 3], ...))``
        """
        x = node.args[0]
        if not self._moved(x):
            return Refuse("its input is not computed with the channels last")
        assert isinstance(x, fx.Node)
        window, ceil_mode = pool_window(node)
        args: tuple[Any, ...] = tuple(list(v) for v in (window.kernel, window.stride, window.padding))
        if node.target in MAX_POOLS:
            args = (*args, list(window.dilation), ceil_mode)
        else:
            args = (
                *args,
                ceil_mode,
                argument(node, 5, "count_include_pad", True),
                argument(node, 6, "divisor_override"),
            )
        target = MAX_POOL_LAST if node.target in MAX_POOLS else AVG_POOL_LAST
        assert node.target in MAX_POOLS | AVG_POOLS
        new = program.module.graph.call_function(target, (x.args[0], *args))
        return self._first(program, new, _rank(node))

    def elementwise(self, program: Program, node: fx.Node) -> fx.Node | Refuse | None:
        """before: ``add(permute(y), permute(z))``, ``mul(permute(y), s)`` with s constant
        after:  ``permute(add(y, z))``, ``permute(mul(y, t))`` with t = s permuted
        """
        operands = [a for a in node.all_input_nodes if isinstance(a.meta["val"], torch.Tensor)]
        if not any(map(self._moved, operands)):
            return None
        rank = _rank(node)
        new: dict[fx.Node, fx.Node] = {}
        for operand in operands:
            last = self._as_last(program, operand, rank)
            if last is None:
                return Refuse(f"its operand {operand.name} is not computed with the channels last")
            new[operand] = last
        args = fx.node.map_arg(node.args, lambda n: new.get(n, n))
        kwargs = fx.node.map_arg(node.kwargs, lambda n: new.get(n, n))
        return self._first(program, program.module.graph.call_function(node.target, args, kwargs), rank)  # pyright: ignore

    def _as_last(self, program: Program, operand: fx.Node, rank: int) -> fx.Node | None:
        """An operand of a channels-first result of ``rank`` axes, for the channels-last one; None: it costs a copy."""
        own = program.shape(operand)
        if self._moved(operand):
            return operand.args[0] if len(own) == rank else None  # pyright: ignore
        if all(s == 1 for s in own):
            return operand
        if operand.op == "get_attr":
            value = constant(program.module, operand)
            wide = value.reshape([1] * (rank - value.dim()) + list(value.shape)).movedim(1, -1).contiguous()
            return program.module.graph.get_attr(add_constant(program.module, f"{operand.target}_last", wide))
        if len(own) != rank:
            return None
        small = all(s == 1 for s in own[2:])
        known = any(u.target is _PERMUTE and u.args[1] == _to_last(rank) for u in operand.users)
        return self._last(program, operand) if small or known else None

    def concatenation(self, program: Program, node: fx.Node) -> fx.Node | Refuse | None:
        """before: ``cat([permute(y), permute(z)], 1)``
        after:  ``permute(cat([y, z], 3))``
        """
        pieces, rank = list(node.args[0]), _rank(node)  # pyright: ignore
        if not any(map(self._moved, pieces)):
            return None
        last = [self._as_last(program, p, rank) if _rank(p) == rank else None for p in pieces]
        if any(p is None for p in last):
            return Refuse("one of its pieces is not computed with the channels last")
        axis = _to_last(rank).index(argument(node, 1, "dim", 0) % rank)
        return self._first(program, program.module.graph.call_function(node.target, (last, axis)), rank)  # pyright: ignore

    def padding(self, program: Program, node: fx.Node) -> fx.Node | None:
        """before: ``constant_pad_nd(permute(y), [left, right, top, bottom])``
        after:  ``permute(constant_pad_nd(y, [0, 0, left, right, top, bottom]))``
        """
        x, pads = node.args[:2]
        if not self._moved(x):
            return None
        rank = _rank(node)
        each = [list(pads[i : i + 2]) for i in range(0, len(pads), 2)]  # pyright: ignore  (last axis first)
        each = (each + [[0, 0]] * rank)[:rank][::-1]
        moved = [p for axis in reversed(_to_last(rank)) for p in each[axis]]
        while moved[-2:] == [0, 0]:
            del moved[-2:]
        new = program.module.graph.call_function(node.target, (x.args[0], moved, *node.args[2:]))  # pyright: ignore
        with fake_mode(program):  # inferred from its arguments, the op would fix every dynamic size
            new.meta["val"] = node.meta["val"].permute(_to_last(rank)).contiguous()
        return self._first(program, new, rank)

    def fold_padding(self, program: Program, node: fx.Node) -> fx.Node | Refuse | None:
        """before: ``planish::convolution(constant_pad_nd(y, [0, 0, left, right, top, bottom]), padding=[0, 0, 0, 0])``
        after:  ``planish::convolution(y, padding=[top, left, bottom, right])``
        """
        conv = Convolution.of(node)
        if conv.x.target is not aten.constant_pad_nd.default:
            return None
        padded = _zeros_around(conv.x, range(1, _rank(conv.x) - 1))
        if padded is None or conv.transposed:
            return Refuse("what is padded is not zeros around the positions of a convolution")
        before = [p + s[0] for p, s in zip(conv.window.padding, padded, strict=True)]
        after = [p + s[1] for p, s in zip(conv.padding_after, padded, strict=True)]
        args = (conv.x.args[0], *node.args[1:4], before + after, *node.args[5:])
        return program.module.graph.call_function(CONVOLUTION_LAST, args)  # pyright: ignore

    def permute_padding(self, program: Program, node: fx.Node) -> fx.Node | None:
        """before: ``permute(constant_pad_nd(x, [left, right, top, bottom]), to last)`` in front of a convolution
        after:  ``constant_pad_nd(permute(x, to last), [0, 0, left, right, top, bottom])``
        """
        x, rank = node.args[0], _rank(node)
        assert isinstance(x, fx.Node)
        if x.target is not aten.constant_pad_nd.default or node.args[1] != _to_last(rank) or len(x.users) > 1:
            return None
        if not all(u.target is CONVOLUTION_LAST and u.args[0] is node for u in node.users):
            return None
        padded = _zeros_around(x, range(2, rank))
        if padded is None:
            return None
        inner = self._last(program, x.args[0])  # pyright: ignore
        pads = [0, 0, *(p for side in reversed(padded) for p in side)]
        new = program.module.graph.call_function(x.target, (inner, pads, 0.0))
        new.meta["val"] = node.meta["val"]  # inferred from its arguments, the op would fix every dynamic size
        return new

    def slice(self, program: Program, node: fx.Node) -> fx.Node | None:
        """before: ``slice(permute(y), 1, a, b)``
        after:  ``permute(slice(y, 3, a, b))``
        """
        x = node.args[0]
        if not self._moved(x):
            return None
        rank = _rank(node)
        axis = _to_last(rank).index(argument(node, 1, "dim", 0) % rank)
        new = program.module.graph.call_function(node.target, (x.args[0], axis, *node.args[2:]))  # pyright: ignore
        return self._first(program, new, rank)

    def single(self, program: Program, node: fx.Node) -> fx.Node | None:
        """before: ``permute(x, to last)`` of [n, c, 1, 1]; ``reshape(permute(y), s)`` of y [n, 1, 1, c]
        after:  ``reshape(x, [n, 1, 1, c])``; ``reshape(y, s)``
        """
        x, graph = node.args[0], program.module.graph
        assert isinstance(x, fx.Node)
        if node.target is _RESHAPE:
            single = self._moved(x) and all(s == 1 for s in program.shape(x)[2:])
            return graph.call_function(_RESHAPE, (x.args[0], node.args[1])) if single else None
        rank = _rank(node)
        if rank < 3 or node.args[1] != _to_last(rank) or any(s != 1 for s in program.shape(node)[1:-1]):
            return None
        if x.op == "call_function" and x in self.moving:
            return None
        sizes = sizes_of(program, node, [x])
        return None if sizes is None else graph.call_function(_RESHAPE, (x, sizes))

    def merged(self, program: Program, node: fx.Node) -> fx.Node | None:
        """before: ``reshape(permute(y), [n, c, h w])``
        after:  ``transpose(reshape(y, [n, h w, c]), 1, 2)``
        """
        x, shape = node.args[0], program.shape(node)
        if not self._moved(x) or len(shape) != 3 or shape[:2] != program.shape(x)[:2]:
            return None
        n, c, positions = node.args[1]  # pyright: ignore
        graph = program.module.graph
        rows = graph.call_function(_RESHAPE, (x.args[0], [n, positions, c]))  # pyright: ignore
        new = graph.call_function(aten.transpose.int, (rows, 1, 2))
        self.moving.add(new)
        return new

    def split(self, program: Program, node: fx.Node) -> fx.Node | None:
        """before: ``permute(reshape(transpose(z, 1, 2), [n, c, h, w]), to last)``
        after:  ``reshape(z, [n, h, w, c])``
        """
        x, rank = node.args[0], _rank(node)
        assert isinstance(x, fx.Node)
        if x.target is not _RESHAPE or rank < 4 or node.args[1] != _to_last(rank):
            return None
        rows: Any = x.args[0]
        if rows.target is not aten.transpose.int or _rank(rows) != 3 or {a % 3 for a in rows.args[1:3]} != {1, 2}:
            return None
        if program.shape(rows)[:2] != program.shape(x)[:2]:
            return None
        sizes: Sequence[Any] = x.args[1]  # pyright: ignore
        return program.module.graph.call_function(_RESHAPE, (rows.args[0], [sizes[a] for a in _to_last(rank)]))

    def mean(self, program: Program, node: fx.Node) -> fx.Node | None:
        """before: ``mean(transpose(z, 1, 2), [-1])`` of z [n, h w, c]
        after:  ``mean(z, [1])``
        """
        x, axes = node.args[:2]
        if x not in self.moving or x.target is not aten.transpose.int or len(node.args) > 2:  # pyright: ignore
            return None
        if [a % 3 for a in axes] != [2]:  # pyright: ignore
            return None
        return program.module.graph.call_function(node.target, (x.args[0], [1]))  # pyright: ignore
