"""rewrite-softmax: how each softmax goes over memory, and whether it is needed at all. See docs/decisions/0013."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from planish.ops import (
    ATTENTION,
    ELEMENTWISE,
    LOG_SOFTMAX,
    MATMUL,
    SCHEDULED,
    SOFTMAX,
    VIEWS,
    aten,
    planish_ops,
)
from planish.pipeline import Note, Pass, Refusal, Result
from planish.program import Program, evaluate
from planish.rules import Refuse, remove_dead
from planish.targets import Target
from planish.verify import infer_values

OPERATIONS = {("softmax", 3): 20, ("softmax", 2): 31, ("log_softmax", 3): 20, ("log_softmax", 2): 20}
"""Vector instructions per vector of elements, counted in the kernels' loops, by kind and number of passes."""

BYTES = {("softmax", 3): 16, ("softmax", 2): 12, ("log_softmax", 3): 12, ("log_softmax", 2): 12}
"""Bytes per element that go to or come from memory, where a row does not stay in the cache.

A chunk of a row does stay in the second-level cache. So three passes read x once, and write, read and write again the
result of a softmax; the logarithm keeps no exponentials and reads x twice, as two passes do.
"""

OPERATIONS_PER_NS, BYTES_PER_NS = 8.0, 32.0
"""Of one thread, as measured on a Zen 5 server core: what turns the counts above into modelled times."""

READ_SHARE = 4
"""Reading at most one element in so many of a softmax's row pays for finding it from the row's statistics."""

UNDERFLOW = -745.2
"""Where e^x is 0 in fp64."""


@dataclass(frozen=True)
class Choice:
    """The schedule of one softmax, and the figures that it was chosen by."""

    schedule: str
    limit: int
    why: str


@dataclass(frozen=True)
class RewriteSoftmax(Pass):
    """Choose how each softmax goes over its rows by their length, and drop those of which only places are read.

    before: ``y = softmax(x, -1)``
    after:  ``y = planish.softmax(x, "two-pass-stream", 2097152)``: three passes up to that length, two beyond

    before: ``argmax(softmax(x, -1), -1)``; ``gather(log_softmax(x, -1), -1, i)``
    after:  ``where(x[best] < inf, best, 0)`` with ``best = argmax(x, -1)``;
            ``gather(x, -1, i) - max - log(sum)`` with (max, sum) from ``planish.softmax_statistics(x)``
    """

    name: ClassVar[str] = "rewrite-softmax"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    makes: ClassVar[frozenset[str]] = frozenset({"softmax-scheduled"})
    tol: ClassVar[float] = 1e-12  # single places are computed in another order than whole rows

    def run(self, program: Program, target: Target) -> Result:
        """Rewrite every softmax over the last axis, in graph order."""
        rewriting = _Rewriting(program, target)
        for node in list(program.nodes()):
            if node.target is ATTENTION:
                text = "its softmax runs inside its kernel, on scores that never leave the cache"
                rewriting.result.notes.append(Note.at("attention", node, text))
            elif node.target in (SOFTMAX | LOG_SOFTMAX) - SCHEDULED:
                rewriting.softmax(node)
        remove_dead(program.module)
        return rewriting.result


@dataclass
class _Rewriting:
    program: Program
    target: Target
    result: Result = field(default_factory=Result)

    def softmax(self, node: fx.Node) -> None:
        """Drop one softmax, or give it a schedule."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        reason = _why_not(self.program, self.target, node, x)
        if reason is not None:
            self._refuse("softmax scheduled", node, reason)
            return
        graph = self.program.module.graph
        kind = _kind(node)
        choice = choose(self.program, self.target, kind, x, stream=all(u.op == "output" for u in node.users))
        with graph.inserting_before(node):
            if x.meta["val"].dtype is not torch.float32:
                x = graph.call_function(aten._to_copy.default, (x,), {"dtype": torch.float32})
                infer_values(self.program)
        if self._drop(node, x, choice):
            return
        if _from_product(x) and any(_into_product(u) for u in node.users):
            why = "it is attention spelled out: as scaled_dot_product_attention its scores would not be stored"
            self._refuse("attention", node, why)
        ours = planish_ops.softmax.default if kind == "softmax" else planish_ops.log_softmax.default
        with graph.inserting_before(node):
            new = graph.call_function(ours, (x, choice.schedule, choice.limit))
        node.replace_all_uses_with(new)
        self.result.rewrites[f"{kind} scheduled"] += 1
        infer_values(self.program)
        self.result.notes.append(Note(f"{kind} scheduled", new.name, choice.why, Note.at("", node, "").where))

    def _drop(self, node: fx.Node, x: fx.Node, choice: Choice) -> bool:
        """Compute what the readers of a softmax take from it without it, if that is so for all of them."""
        readers = {user: _reader(self.program, node, user) for user in node.users}
        wanted = [u for u, how in readers.items() if how is not None]
        if not wanted:
            return False
        for user, how in readers.items():
            if isinstance(how, Refuse):
                self._refuse("softmax dropped", user, how.reason)
        others = [u for u, how in readers.items() if how is None or isinstance(how, Refuse)]
        if others:
            for user in wanted:
                if not isinstance(readers[user], Refuse):
                    why = f"the whole row is written anyway, for {others[0].name}"
                    self._refuse("softmax dropped", user, why)
            return False
        places = _Places(self.program, x, node, choice)
        where = Note.at("", node, "").where
        for user, how in readers.items():
            with self.program.module.graph.inserting_before(user):
                new: fx.Node = how(places, user)  # pyright: ignore
            infer_values(self.program)
            user.replace_all_uses_with(new)
            self.result.rewrites["softmax dropped"] += 1
        text = f"only {', '.join(u.name for u in wanted)} read it: the row of results is never written"
        if places.statistics is not None:
            text += f"; its maximum and sum: {choice.why}"
        self.result.notes.append(Note("softmax dropped", node.name, text, where))
        return True

    def _refuse(self, rule: str, node: fx.Node, reason: str) -> None:
        self.result.refusals.append(Refusal.at(rule, node, reason))


def _kind(node: fx.Node) -> str:
    return "log_softmax" if node.target in LOG_SOFTMAX else "softmax"


def _why_not(program: Program, target: Target, node: fx.Node, x: fx.Node) -> str | None:
    """Why a softmax stays as it is, or None."""
    rank = x.meta["val"].dim()
    if not rank or node.args[1] % rank != rank - 1:  # pyright: ignore
        return "it is not over the last axis"
    if not target.llc_bytes:
        return f"the target {target.name!r} has no caches to choose by"
    dtype = node.meta["val"].dtype
    if dtype is not torch.float32:
        return f"schedules are for float32, not {dtype}"
    return "it has no elements" if 0 in program.shape(x) else None


def choose(program: Program, target: Target, kind: str, x: fx.Node, *, stream: bool) -> Choice:
    """The schedule of the rows of ``x``.

    A row stays in the cache if it, its result and as much again fit its share: the whole last-level cache where rows
    go one after the other, else one core's part.

    Args:
        kind: ``softmax`` or ``log_softmax``.
        stream: whether nothing reads the result soon, so that it may go past the caches.
    """
    *lead, size = program.shape(x)
    sharing = target.cores if program.upper_bound(sympy.prod(lead)) >= target.shared_rows else 1
    fits = target.llc_bytes // max(sharing, 1) // 16
    shortest, longest = _lower_bound(program, size), program.upper_bound(size)
    costs = {(passes, cached): _modelled(target, kind, passes, cached) for passes in (3, 2) for cached in (True, False)}
    figures = "; ".join(
        f"{name} {costs[passes, True]:.2f} ns per element in the cache, {costs[passes, False]:.2f} ns and "
        f"{BYTES[kind, passes]} bytes from memory"
        for name, passes in (("three passes", 3), ("two", 2))
    )
    modelled = f"modelled for one thread of {target.name}: {figures}"
    here = f"rows of {_range(shortest, longest)} elements, of which {fits} stay in the cache"
    if longest <= fits or costs[3, False] < costs[2, False]:
        return Choice("three-pass", 0, f"three-pass: {here}; {modelled}")
    name = "two-pass-stream" if stream else "two-pass"
    past = ", result stored past the caches" if stream else ""
    limit = fits if shortest <= fits else 0
    mixed = f", three-pass up to {limit} elements" if limit else ""
    return Choice(name, limit, f"{name}{mixed}{past}: {here}; {modelled}")


def _modelled(target: Target, kind: str, passes: int, cached: bool) -> float:
    """ns per element of one thread: what the instructions take, or what memory takes if that is more."""
    compute = OPERATIONS[kind, passes] / target.lanes / OPERATIONS_PER_NS
    return compute if cached else max(compute, BYTES[kind, passes] / BYTES_PER_NS)


def _range(low: int, high: int) -> str:
    return str(high) if low == high else f"{low} to {high}"


def _lower_bound(program: Program, size: Any) -> int:
    return evaluate(size, {name: dim.min for name, dim in program.dims.items()})


def _from_product(x: Any) -> bool:
    """Whether ``x`` is a product of matrices, seen through views and elementwise ops."""
    while isinstance(x, fx.Node) and x.target in VIEWS | ELEMENTWISE:
        x = x.args[0]
    return isinstance(x, fx.Node) and x.target is MATMUL


def _into_product(user: fx.Node) -> bool:
    while user.target in VIEWS and len(user.users) == 1:
        user = next(iter(user.users))
    return user.target is MATMUL


Reader = Callable[["_Places", fx.Node], fx.Node]


def _reader(program: Program, node: fx.Node, user: fx.Node) -> Reader | Refuse | None:
    """How a reader of a softmax is computed without it; None if it reads whole rows."""
    rank = node.meta["val"].dim()
    args = user.args
    if user.target is aten.argmax.default:
        return _Places.argmax if len(args) == 2 and args[1] % rank == rank - 1 and not user.kwargs else None  # pyright: ignore
    if user.target is planish_ops.argtopk.default:
        return _Places.argtopk if args[2] else Refuse(_SMALLEST)
    if user.target in (aten.argmin.default, planish_ops.argsort.default):
        return Refuse(_SMALLEST)
    if user.target is aten.select.int and args[1] % rank == rank - 1:  # pyright: ignore
        return _few(program, node, 1) or _Places.select
    if user.target is not aten.gather.default or args[1] % rank != rank - 1 or args[0] is not node:  # pyright: ignore
        return None
    index = args[2]
    if program.shape(index)[:-1] != program.shape(node)[:-1]:
        return Refuse("its index leaves rows out")
    return _few(program, node, program.upper_bound(program.shape(index)[-1])) or _Places.gather


_SMALLEST = "among the smallest, probabilities that are rounded to 0 are in another order than the scores"


def _few(program: Program, node: fx.Node, count: int) -> Refuse | None:
    size = _lower_bound(program, program.shape(node)[-1])
    return Refuse(f"it reads {count} elements of rows of {size}") if count * READ_SHARE > size else None


class _Places:
    """What single places of ``softmax(x)`` hold.

    A row of x that holds a NaN or +inf, or nothing but -inf, is all NaN in its softmax.
    """

    def __init__(self, program: Program, x: fx.Node, node: fx.Node, choice: Choice) -> None:
        self.graph = program.module.graph
        self.x, self.node, self.choice = x, node, choice
        self.log = node.target in LOG_SOFTMAX
        self.axis = x.meta["val"].dim() - 1
        self.statistics: fx.Node | None = None

    def _call(self, op: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(op, args)

    def argmax(self, user: fx.Node) -> fx.Node:
        """before: ``argmax(softmax(x), -1)``
        after:  ``where(x[best] < inf, best, 0)``, ``best = argmax(x, -1)``: a row of NaN has its first as maximum
        """
        best = self._call(aten.argmax.default, self.x, self.axis)
        place = self._call(aten.unsqueeze.default, best, self.axis)
        top = self._call(aten.squeeze.dim, self._call(aten.gather.default, self.x, self.axis, place), self.axis)
        return self._call(aten.where.ScalarOther, self._call(aten.lt.Scalar, top, math.inf), best, 0)

    def argtopk(self, user: fx.Node) -> fx.Node:
        """before: ``argtopk(log_softmax(x), k, True)``
        after:  ``where(x[best] < inf, best, arange(k))``, ``best = argtopk(x, k, True)``

        A softmax makes equal what it rounds to 0, and equal elements are taken in order: so there it is ``argtopk`` of
        ``where(sum < inf, where(x >= max - 745.2, x, -inf), 0)``, with (max, sum) the row's statistics.
        """
        k = user.args[1]
        if self.log:
            best = self._call(planish_ops.argtopk.default, self.x, k, True)
            first = self._call(aten.slice.Tensor, best, self.axis, 0, 1)
            finite = self._call(aten.lt.Scalar, self._call(aten.gather.default, self.x, self.axis, first), math.inf)
            options: dict[str, Any] = {"dtype": torch.int64, "device": torch.device("cpu")}
            in_order = self.graph.call_function(aten.arange.default, (k,), options)
            return self._call(aten.where.self, finite, best, in_order)
        top, total = (self._call(aten.slice.Tensor, self._row(), self.axis, i, i + 1) for i in range(2))
        lowest = self._call(aten.add.Tensor, top, UNDERFLOW)
        scores = self._call(aten.where.ScalarOther, self._call(aten.ge.Tensor, self.x, lowest), self.x, -math.inf)
        scores = self._call(aten.where.ScalarOther, self._call(aten.lt.Scalar, total, math.inf), scores, 0.0)
        return self._call(planish_ops.argtopk.default, scores, k, True)

    def gather(self, user: fx.Node) -> fx.Node:
        """before: ``gather(softmax(x), -1, i)``
        after:  ``exp(gather(x, -1, i) - max) / sum``
        """
        value = self._call(aten.gather.default, self.x, self.axis, user.args[2])
        top, total = (self._call(aten.slice.Tensor, self._row(), self.axis, i, i + 1) for i in range(2))
        return self._from(value, top, total)

    def select(self, user: fx.Node) -> fx.Node:
        """before: ``select(softmax(x), -1, i)``
        after:  ``exp(select(x, -1, i) - max) / sum``
        """
        value = self._call(aten.select.int, self.x, self.axis, user.args[2])
        top, total = (self._call(aten.select.int, self._row(), self.axis, i) for i in range(2))
        return self._from(value, top, total)

    def _row(self) -> fx.Node:
        """Maximum and sum of every row, computed once for all readers."""
        if self.statistics is None:
            with self.graph.inserting_before(self.node):
                choice = self.choice
                schedule = choice.schedule.removesuffix("-stream")
                self.statistics = self._call(planish_ops.softmax_statistics.default, self.x, schedule, choice.limit)
        return self.statistics

    def _from(self, value: fx.Node, top: fx.Node, total: fx.Node) -> fx.Node:
        below = self._call(aten.sub.Tensor, value, top)
        if self.log:
            return self._call(aten.sub.Tensor, below, self._call(aten.log.default, total))
        return self._call(aten.div.Tensor, self._call(aten.exp.default, below), total)
