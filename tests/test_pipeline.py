"""The pass runner: order, graph rules, numeric check, bisection, provenance, refusals."""

import math
import operator
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from torch import fx

import planish
from planish import verify
from planish.capture import capture
from planish.errors import GraphError, NumericError, PassOrderError, UnknownNameError
from planish.ops import aten
from planish.pipeline import Pass, Refusal, Result, Step, bisect, check_order, count_ops, run_pipeline
from planish.program import Dim, Program, source_line
from planish.rules import Refuse, Rule, apply_rules, rule
from planish.targets import TARGETS, Target

REFERENCE = TARGETS["reference"]
THIS_FILE = __file__


class Model(torch.nn.Module):
    """A mask as transformers makes it (finfo.min, dtype arguments) and a few ops to rewrite."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = (1.0 - mask.to(torch.float32)) * torch.finfo(torch.float32).min
        y = torch.tanh(self.linear(x)) + hidden[:, :, None]
        return torch.softmax(y.to(torch.float32), -1) * 2.0  # the line of the mul


@cache
def captured() -> Program:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.int64)
    dims = {"x": {0: Dim("b", 1, 4), 1: Dim("s", 2, 8)}, "mask": {0: Dim("b", 1, 4), 1: Dim("s", 2, 8)}}
    return capture(Model().eval(), (x, mask), dims)[0]


@dataclass(frozen=True)
class Named(Pass):
    """Does nothing under a name of its own."""

    name: str = "named"  # pyright: ignore
    needs: frozenset[str] = frozenset()  # pyright: ignore
    makes: frozenset[str] = frozenset()  # pyright: ignore
    breaks: frozenset[str] = frozenset()  # pyright: ignore
    tol: float = 0.0  # pyright: ignore

    def run(self, program: Program, target: Target) -> Result:
        return Result()


def replace_call(program: Program, old: object, new: object, *args: object) -> None:
    """Replace every call of ``old`` by ``new(first argument, *args)``."""
    graph = program.module.graph
    for node in list(graph.nodes):
        if node.target is old:
            with graph.inserting_before(node):
                made = graph.call_function(new, (node.args[0], *args))
            node.replace_all_uses_with(made)
            graph.erase_node(node)


@dataclass(frozen=True)
class Scale(Named):
    """Deliberately broken: the final factor becomes ``factor``."""

    factor: float = 2.001

    def run(self, program: Program, target: Target) -> Result:
        replace_call(program, aten.mul.Tensor, aten.mul.Tensor, self.factor)
        return Result()


# Order ---------------------------------------------------------------------------------------------------------------


def test_order_is_checked_before_anything_runs() -> None:
    ran: list[str] = []

    @dataclass(frozen=True)
    class Noisy(Named):
        """Records that it ran."""

        def run(self, program: Program, target: Target) -> Result:
            ran.append(self.name)
            return Result()

    late = Named("late", makes=frozenset({"ready"}))
    with pytest.raises(PassOrderError, match=r"pass 'needy' needs 'ready'(.|\n)*made by: late"):
        run_pipeline(captured(), [Noisy("first"), Named("needy", needs=frozenset({"ready"})), late], REFERENCE)
    assert ran == []


def test_broken_fact_names_the_breaker() -> None:
    make = Named("make", makes=frozenset({"ready"}))
    spoil = Named("spoil", breaks=frozenset({"ready"}))
    use = Named("use", needs=frozenset({"ready"}))
    check_order([make, use, spoil])
    with pytest.raises(PassOrderError, match="'ready' was broken by spoil"):
        check_order([make, spoil, use])
    check_order([make, spoil, make, use])
    check_order([use], facts=frozenset({"ready"}))
    with pytest.raises(PassOrderError, match="none in the list"):
        check_order([use])


def test_facts_are_recorded() -> None:
    make, spoil = Named("make", makes=frozenset({"a", "b"})), Named("spoil", breaks=frozenset({"b"}))
    program, _ = run_pipeline(captured(), [make, spoil], REFERENCE)
    assert program.facts == {"a"}
    assert captured().facts == frozenset()


def test_the_default_pipeline_is_in_order() -> None:
    passes = planish.passes.resolve(None, target=TARGETS["cpu-int8"])
    check_order(passes)
    check_order(planish.passes.resolve(None))
    assert [p.name for p in passes] == [name for name in planish.passes.REGISTRY if name != "quantize-mixed"]
    assert all(p.doc for p in passes)


def test_unknown_pass_lists_the_known() -> None:
    with pytest.raises(UnknownNameError, match="canonicalize"):
        planish.compile(Model().eval(), (torch.zeros(2, 5, 6), torch.ones(2, 5)), passes=["canonicalise"])


# Values --------------------------------------------------------------------------------------------------------------


def test_broken_pass_is_caught_and_named() -> None:
    good, bad = Named("good"), Scale("bad", tol=1e-6)
    with pytest.raises(NumericError, match=r"pass 'bad' changed output 'mul\S*' by 0\.0005(.|\n)*limit is 1e-06"):
        run_pipeline(captured(), [good, bad, good], REFERENCE, check_values=True)


def test_declared_tolerance_is_allowed_and_reported() -> None:
    _, steps = run_pipeline(captured(), [Named("same"), Scale("near", tol=1e-3)], REFERENCE, check_values=True)
    errors = [s.max_error for s in steps]
    assert errors[:2] == [None, 0.0]
    assert errors[2] == pytest.approx(5e-4, rel=0.1)


def test_suite_checks_values_always() -> None:
    assert verify.always
    with pytest.raises(NumericError):
        run_pipeline(captured(), [Scale("bad")], REFERENCE)


def test_error_at_the_second_shape_only() -> None:
    """A factor n/5 for a dynamic size n is 1 at the example's 5 and wrong elsewhere."""

    @dataclass(frozen=True)
    class Freeze(Named):
        """Multiplies by the size of axis 1 over the example's size."""

        def run(self, program: Program, target: Target) -> Result:
            graph = program.module.graph
            output = next(n for n in graph.nodes if n.op == "output")
            (result,) = output.args[0]
            size = program.example[1].shape[1]
            with graph.inserting_before(output):
                ones = graph.call_function(aten.full_like.default, (result, 1.0))
                length = graph.call_function(aten.sum.dim_IntList, (ones, [1], True))
                factor = graph.call_function(aten.div.Scalar, (length, size))
                made = graph.call_function(aten.mul.Tensor, (result, factor))
            output.args = ((made,),)
            return Result()

    with pytest.raises(NumericError, match=r"pass 'freeze'(.|\n)*\[3, 6\], \[3, 6, 6\]"):
        run_pipeline(captured(), [Freeze("freeze")], REFERENCE, check_values=True)


def test_input_program_is_left_alone() -> None:
    program = captured()
    before = program.module.code
    run_pipeline(program, [Scale("scale", tol=1.0)], REFERENCE)
    assert program.module.code == before


def test_second_shape_is_another_in_range() -> None:
    program = captured()
    mask, x = verify.second_shape(program)
    assert x.shape == (3, 6, 6)
    assert mask.shape == (3, 6)
    assert mask.dtype is torch.int64
    full = capture(torch.nn.Tanh().eval(), (torch.randn(4, 3),), {"input": {0: Dim("b", 1, 4)}})[0]
    assert verify.second_shape(full)[0].shape == (3, 3)
    small = capture(torch.nn.Tanh().eval(), (torch.randn(3, 2),), {"input": {0: Dim("b", 3, 3)}})[0]
    assert verify.second_shape(small)[0].shape == (3, 2)


def test_in_fp64_widens_dtype_arguments() -> None:
    """The graph's ``.to(float32)`` and finfo.min stay harmless: nothing is rounded to fp32, nothing overflows."""
    program = captured()
    wide = verify.in_fp64(program.module)
    seen: list[torch.dtype] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                seen.append(value.dtype)
            return value

    mask = torch.tensor([[1, 1, 0, 1, 0]] * 2)
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        (got,) = Watch(wide).run(mask, x.double())
        want = program.run(mask, x)[0]
    assert set(seen) == {torch.float64}
    torch.testing.assert_close(got.float(), want, rtol=1e-5, atol=1e-6)
    assert program.module.linear_weight.dtype is torch.float32
    assert not torch.equal(got, want.double())


@pytest.mark.parametrize(
    ("want", "got", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 2.1], 0.05),
        ([0.0, 0.0], [0.0, 1e-9], math.inf),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([math.nan, 1.0], [1.0, math.nan], math.inf),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf),
        ([math.inf, 1.0], [math.nan, 1.0], math.inf),
        ([1.0], [math.nan], math.inf),
        ([1.0], [1.0, 1.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_relative_error(want: list[float], got: list[float], error: float) -> None:
    assert verify.relative_error(torch.tensor(want), torch.tensor(got)) == pytest.approx(error, rel=1e-6)


# Bisection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 13])
def test_bisect_names_the_guilty_pass(count: int) -> None:
    program = captured()
    want = program.run(*program.example)

    def is_good(candidate: Program) -> bool:
        return verify.relative_error(want[0], candidate.run(*candidate.example)[0]) < 1e-5

    for guilty in range(count):
        passes = [Scale("bad") if i == guilty else Named(f"p{i}") for i in range(count)]
        found = bisect(program, passes, REFERENCE, is_good)
        assert found is not None
        assert (found.name, found.index) == ("bad", guilty)
        assert found.tries <= math.ceil(math.log2(count)) + 1
    assert bisect(program, [Named(f"p{i}") for i in range(count)], REFERENCE, is_good) is None


# Graph rules ---------------------------------------------------------------------------------------------------------


def mutate(program: Program, name: str) -> None:
    """Break one rule of Program."""
    graph = program.module.graph
    nodes = list(graph.nodes)
    output, placeholder = nodes[-1], nodes[[n.op for n in nodes].index("placeholder")]
    result = output.args[0][0]
    with graph.inserting_before(output):
        if name == "method":
            made = graph.call_method("contiguous", (result,))
        elif name == "in_place":
            made = graph.call_function(aten.add_.Tensor, (result, 1.0))
        elif name == "python":
            made = graph.call_function(math.sin, (2.0,))
        elif name == "dtype":
            made = graph.call_function(aten._to_copy.default, (result,), {"dtype": torch.float16})
        elif name == "shape":
            made = graph.call_function(aten.unsqueeze.default, (result, 0))
        elif name == "module":
            program.module.add_module("extra", torch.nn.Tanh())
            made = graph.call_module("extra", (result,))
        elif name == "input":
            made = result
            with graph.inserting_after(placeholder):
                graph.placeholder("another").meta["val"] = placeholder.meta["val"]
        else:
            output.args = (result,)
            return
    if "val" not in made.meta and made.op != "call_function":
        made.meta["val"] = result.meta["val"]
    if name == "python":
        made.meta["val"] = 1.0
        return
    output.args = ((made,),)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("method", "is a method call"),
        ("in_place", "neither a functional ATen"),
        ("python", "neither a functional ATen"),
        ("dtype", "became torch.float16"),
        ("shape", r"became torch.float32\['?1"),
        ("module", "not a fused group"),
        ("input", "3 placeholders for 2 inputs"),
        ("output", "flat tuple"),
    ],
)
def test_graph_rules(name: str, words: str) -> None:
    @dataclass(frozen=True)
    class Breaker(Named):
        """Leaves a graph that breaks a rule."""

        def run(self, program: Program, target: Target) -> Result:
            mutate(program, name)
            return Result()

    with pytest.raises(GraphError, match=f"after pass 'breaker': (.|\n)*{words}"):
        run_pipeline(captured(), [Breaker("breaker")], REFERENCE)


def test_captured_graphs_keep_the_rules() -> None:
    verify.check_graph(captured(), "capture")
    assert all("val" in n.meta for n in captured().nodes() if n.op != "output")


# Provenance, refusals, steps -----------------------------------------------------------------------------------------


def test_made_by_and_source_line() -> None:
    program, _ = run_pipeline(captured(), [Named("idle"), Scale("scale-it", tol=1.0)], REFERENCE)
    made = [n for n in program.nodes() if n.meta.get("made_by") == "scale-it"]
    assert {n.target for n in made} == {aten.mul.Tensor}
    last = made[-1]
    assert source_line(last).startswith(THIS_FILE)
    assert "the line of the mul" in source_line(last)
    assert all("made_by" not in n.meta for n in captured().nodes())
    assert all(n.meta.get("made_by") in (None, "scale-it") for n in program.nodes())


@rule("doubling", aten.mul.Tensor)
def doubling(program: Program, node: fx.Node) -> fx.Node | Refuse | None:
    """before: ``x * 2.0``; after: ``x + x``."""
    if node.args[1] != 2.0:
        return Refuse(f"the factor is {node.args[1]}")
    return program.module.graph.call_function(aten.add.Tensor, (node.args[0], node.args[0]))


@dataclass(frozen=True)
class Rewrite(Named):
    """Applies a table of one rule."""

    rules: tuple[Rule, ...] = field(default=(doubling,))

    def run(self, program: Program, target: Target) -> Result:
        return apply_rules(program, self.rules)


def test_rules_refusals_and_steps() -> None:
    observed: list[tuple[Step, str]] = []
    program, steps = run_pipeline(
        captured(), [Rewrite("rewrite")], REFERENCE, observe=lambda s, p: observed.append((s, p.module.code))
    )
    step = steps[1]
    assert step.rewrites == {"dead code": 1, "doubling": 1}
    assert step.max_error == 0.0
    (refusal,) = step.refusals
    assert refusal.rule == "doubling"
    assert refusal.reason.startswith("the factor is -3.4")
    assert refusal.where.startswith(f"{THIS_FILE}:")
    assert "torch.finfo" in refusal.where
    assert [s.name for s, _ in observed] == ["captured", "rewrite"]
    assert observed[0][0].ops_after == step.ops_before == count_ops(captured().module)
    assert step.ops_after == count_ops(program.module)
    assert observed[1][1] == program.module.code != observed[0][1]
    again, steps = run_pipeline(program, [Rewrite("rewrite")], REFERENCE)
    assert steps[1].rewrites == {}
    assert again.module.code == program.module.code


def test_refusal_at_a_node() -> None:
    node = next(n for n in captured().nodes() if n.target is aten.tanh.default)
    refusal = Refusal.at("r", node, "because")
    assert (refusal.rule, refusal.node, refusal.reason) == ("r", node.name, "because")
    assert refusal.where.startswith(THIS_FILE)


def test_sizes_are_integer_maths() -> None:
    """A new node over symbolic sizes gets its fake value by itself."""
    program = captured().clone()
    graph = program.module.graph
    x = next(n for n in graph.nodes if n.name == "x")
    with graph.inserting_before(next(n for n in graph.nodes if n.op == "call_function")):
        size = graph.call_function(aten.sym_size.int, (x, 1))
        total = graph.call_function(operator.mul, (size, 3))
    verify.infer_values(program)
    assert str(program.size(total)) == "3*s"
