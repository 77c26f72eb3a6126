"""Passes and the one runner that runs them: order check, provenance, verification, timing, bisection."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from planish import verify
from planish.errors import PassOrderError
from planish.program import Program, source_line
from planish.targets import Target


@dataclass(frozen=True)
class Refusal:
    """A rewrite that matched but was not done: which rule, at which node and model line, and why."""

    rule: str
    node: str
    reason: str
    where: str = ""

    @staticmethod
    def at(rule: str, node: fx.Node, reason: str) -> Refusal:
        """A refusal at ``node``, with the line of the user's model."""
        return Refusal(rule, node.name, reason, source_line(node))


@dataclass(frozen=True)
class Note:
    """A decision that was made: by which rule, at which node and model line, what and on which figures."""

    rule: str
    node: str
    text: str
    where: str = ""

    @staticmethod
    def at(rule: str, node: fx.Node, text: str) -> Note:
        """A decision at ``node``, with the line of the user's model."""
        return Note(rule, node.name, text, source_line(node))


@dataclass
class Result:
    """What a pass did: how often each rewrite fired, the refusals, and the decisions that are worth a reason."""

    rewrites: Counter[str] = field(default_factory=Counter[str])
    refusals: list[Refusal] = field(default_factory=list[Refusal])
    notes: list[Note] = field(default_factory=list[Note])


@dataclass(frozen=True)
class Pass(ABC):
    """A graph rewrite. Subclasses are frozen dataclasses: their fields are the pass's options.

    Class attributes:
        name: verb-noun, as printed and as used in ``passes=[...]``.
        needs: facts that must hold before.
        makes: facts that hold afterwards.
        breaks: facts that no longer hold afterwards.
        tol: largest change of any output value that the pass may cause, relative to the output's largest magnitude,
            with everything computed in fp64; 0 means bit-equal.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()
    tol: ClassVar[float] = 0.0

    @abstractmethod
    def run(self, program: Program, target: Target) -> Result:
        """Rewrite ``program.module`` in place for ``target``."""

    @property
    def doc(self) -> str:
        """First line of the pass's docstring."""
        return (type(self).__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True)
class Step:
    """One executed pass (or the capture, step 0) as the dump and the report show it.

    ``ms`` is the pass's own time, ``max_error`` the largest relative change of an output in fp64 (None: not checked).
    """

    name: str
    ms: float
    ops_before: int
    ops_after: int
    rewrites: dict[str, int] = field(default_factory=dict[str, int])
    refusals: tuple[Refusal, ...] = ()
    max_error: float | None = None
    notes: tuple[Note, ...] = ()


Observer = Callable[[Step, Program], None]


def check_order(passes: Sequence[Pass], facts: frozenset[str] = frozenset()) -> None:
    """Check, before anything runs, that every pass finds the facts it needs.

    Raises:
        PassOrderError: naming the pass, the missing facts and which passes make them.
    """
    known = set(facts)
    broken_by: dict[str, str] = {}
    for p in passes:
        missing = sorted(p.needs - known)
        if missing:
            makers = sorted({q.name for q in passes if q.makes & set(missing)})
            lost = [f"{fact!r} was broken by {broken_by[fact]}" for fact in missing if fact in broken_by]
            raise PassOrderError(
                f"pass {p.name!r} needs {', '.join(map(repr, missing))}, which does not hold at its place",
                why="; ".join(lost)
                or f"no earlier pass makes it; it is made by: {', '.join(makers) or 'none in the list'}",
                fix="reorder the passes, or add the pass that makes the fact",
            )
        known = (known - p.breaks) | p.makes
        broken_by |= dict.fromkeys(p.breaks, p.name)


def count_ops(module: fx.GraphModule) -> int:
    """Operators in the graph; a fused group counts as one."""
    return sum(n.op in ("call_function", "call_module") for n in module.graph.nodes)


def run_pipeline(
    program: Program,
    passes: Sequence[Pass],
    target: Target,
    *,
    check_values: bool = False,
    observe: Observer | None = None,
) -> tuple[Program, list[Step]]:
    """Run the passes in order on a copy of ``program``.

    After each pass fake values are inferred for new nodes and the graph is checked against the rules of
    ``verify.check_graph``; with ``check_values`` the outputs before and after are compared in fp64 on the captured
    inputs, also at a second dynamic shape. ``observe`` sees every step with the Program it left, step 0 being the
    captured graph.

    Raises:
        PassOrderError, GraphError, NumericError: naming the pass.
    """
    check_order(passes, program.facts)
    ops = count_ops(program.module)
    steps = [Step("captured", 0.0, ops, ops)]
    if observe:
        observe(steps[0], program)
    for p in passes:
        program, step = run_pass(program, p, target, check_values=check_values, observe=observe)
        steps.append(step)
    return program, steps


def run_pass(
    program: Program, p: Pass, target: Target, *, check_values: bool = False, observe: Observer | None = None
) -> tuple[Program, Step]:
    """Run one pass on a copy of ``program``, as ``run_pipeline`` does.

    Raises:
        GraphError, NumericError: naming the pass.
    """
    before, program = program, program.clone()
    start = time.perf_counter()
    with provenance(program.module, p.name):
        result = p.run(program, target)
    ms = (time.perf_counter() - start) * 1e3
    verify.infer_values(program)
    program.module.recompile()
    verify.check_graph(program, p.name)
    program.facts = (program.facts - p.breaks) | p.makes
    error = verify.check_values(before, program, p.name, p.tol) if check_values or verify.always else None
    step = Step(
        p.name,
        ms,
        count_ops(before.module),
        count_ops(program.module),
        dict(sorted(result.rewrites.items())),
        tuple(result.refusals),
        error,
        tuple(result.notes),
    )
    if observe:
        observe(step, program)
    return program, step


@contextmanager
def provenance(module: fx.GraphModule, name: str) -> Iterator[None]:
    """While active, every node created in ``module`` is marked as made by pass ``name``, and a node that replaces
    another one inherits its source line."""

    def created(node: fx.Node) -> None:
        node.meta.setdefault("made_by", name)

    def replaced(old: fx.Node, new: str, user: fx.Node) -> None:
        new_node = next((n for n in user.graph.nodes if n.name == new), None)
        if new_node is not None and not new_node.meta.get("stack_trace") and old.meta.get("stack_trace"):
            new_node.meta["stack_trace"] = old.meta["stack_trace"]

    module._register_create_node_hook(created)
    module._register_replace_node_hook(replaced)
    try:
        yield
    finally:
        module._unregister_create_node_hook(created)
        module._unregister_replace_node_hook(replaced)


@dataclass(frozen=True)
class Guilty:
    """The pass that ``bisect`` found, its index in the pipeline, and how many prefixes were tried."""

    name: str
    index: int
    tries: int


def bisect(
    program: Program, passes: Sequence[Pass], target: Target, is_good: Callable[[Program], bool]
) -> Guilty | None:
    """The first pass after which ``is_good`` is false, by binary search over the pipeline's prefixes.

    Needs at most ``ceil(log2(len(passes))) + 1`` tries. Values are not checked on the way (``is_good`` decides), so
    a pass that is wrong can be found.

    Returns:
        None if the whole pipeline is good.
    """

    def good(count: int) -> bool:
        nonlocal tries
        tries += 1
        rewritten = program
        for p in passes[:count]:
            rewritten = rewritten.clone()
            p.run(rewritten, target)
            verify.infer_values(rewritten)
            rewritten.module.recompile()
        return is_good(rewritten)

    tries = 0
    if good(len(passes)):
        return None
    low, high = 0, len(passes)  # the captured program is taken to be good, the whole pipeline is known to be bad
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return Guilty(passes[high - 1].name, high - 1, tries)
