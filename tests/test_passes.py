"""canonicalize and fuse-groups: golden programs, reasons of refusals, rules that must not fire, idempotence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from planish import ops, passes, verify
from planish.backends.tvm import lower, maps, reduction, scalars
from planish.capture import capture
from planish.pipeline import Step, run_pipeline
from planish.printer import program_text
from planish.program import Dim, Program
from planish.targets import TARGETS

GOLDEN = Path(__file__).with_name("golden")
TARGET = TARGETS["cpu-avx2"]
ROWS = {0: Dim("rows", 1, 32)}


class Plain(nn.Module):
    """A function as a model, with linear layers to use."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        return self.function(self, x) if y is None else self.function(self, x, y)


def captured(function: Callable[..., Any], *inputs: torch.Tensor, dynamic: Mapping[str, Any] | None = None) -> Program:
    return capture(Plain(function).eval(), inputs, dynamic)[0]


def rewritten(program: Program, *names: str) -> tuple[Program, Step]:
    after, steps = run_pipeline(program, passes.resolve(names), TARGET, check_values=True)
    return after, steps[-1]


def targets(program: Program) -> list[str]:
    return [str(n.target) for n in program.nodes() if n.op in ("call_function", "call_module")]


def feed_forward(m: Plain, x: torch.Tensor) -> torch.Tensor:
    return m.norm(m.b(F.gelu(m.a(x))) + x)


def attention(m: Plain, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    batch, length = mask.shape

    def heads(t: torch.Tensor) -> torch.Tensor:
        return t.view(batch, length, 2, 8).transpose(1, 2)

    keys = mask.bool()[:, None, None, :] & torch.ones(1, 1, length, 1, dtype=torch.bool)
    mixed = F.scaled_dot_product_attention(heads(m.a(x)), heads(m.a(x * 2)), heads(m.a(x * 3)), keys)
    return m.b(mixed.transpose(1, 2).reshape(batch, length, 16))


CASES: dict[str, Callable[[], Program]] = {
    "feed_forward": lambda: captured(feed_forward, torch.randn(4, 8), dynamic={"x": ROWS}),
    "attention": lambda: captured(attention, torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", CASES)
def test_golden_program(name: str, update_golden: bool) -> None:
    program, _ = rewritten(CASES[name](), "canonicalize", "fuse-groups")
    text, path = program_text(program, sources=False), GOLDEN / f"{name}.py.txt"
    if update_golden:
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_a_second_run_rewrites_nothing(name: str) -> None:
    once, _ = rewritten(CASES[name](), "canonicalize")
    _, again = rewritten(once, "canonicalize")
    assert again.rewrites == {}
    fused, _ = rewritten(once, "fuse-groups")
    _, again = rewritten(fused, "fuse-groups")
    assert again.rewrites == {}


def test_constants_fold_and_dead_code_goes() -> None:
    def function(m: Plain, x: torch.Tensor) -> torch.Tensor:
        torch.relu(x)
        return x * (m.a.weight.sum(0) + 1)

    program, step = rewritten(captured(function, torch.randn(4, 8)), "canonicalize")
    assert step.rewrites["constant folded"] >= 2
    assert targets(program) == ["aten.mul.Tensor"]


def test_views_cancel_and_equal_nodes_merge() -> None:
    def function(m: Plain, x: torch.Tensor) -> torch.Tensor:
        swapped = x.transpose(0, 1).transpose(0, 1)
        return torch.relu(swapped.reshape(2, 16).reshape(4, 8)) + torch.relu(x)

    program, _ = rewritten(captured(function, torch.randn(4, 8)), "canonicalize")
    assert targets(program) == ["aten.relu.default", "aten.add.Tensor"]


def test_a_product_with_a_constant_is_a_linear_layer() -> None:
    """GPT-2's layers multiply by the weight as it stands; with a weight that is computed they stay products."""
    turned = captured(lambda m, x: torch.addmm(m.b.bias, x, m.b.weight.T), torch.randn(3, 16), dynamic={"x": ROWS})
    program, step = rewritten(turned, "canonicalize")
    assert targets(program) == ["aten.linear.default"]
    assert step.rewrites["product with a constant is a linear layer"] == 1
    computed = captured(lambda m, x: x @ x.T, torch.randn(16, 16))
    assert "aten.bmm.default" in targets(rewritten(computed, "canonicalize")[0])


def test_rows_of_a_linear_layer_stay_apart() -> None:
    """GPT-2 merges batch and sequence around each layer; a layer that is read twice stays as it is."""
    axes = {"x": {0: Dim("batch", 1, 8), 1: Dim("seq", 1, 8)}}

    def merging(m: Plain, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(m.b.bias, x.reshape(-1, 16), m.b.weight.T).view(*x.shape[:2], 8)

    program, step = rewritten(captured(merging, torch.randn(2, 3, 16), dynamic=axes), "canonicalize")
    assert step.rewrites["rows of a linear layer not merged"] == 1
    assert targets(program) == ["aten.linear.default"]

    def split_columns(m: Plain, x: torch.Tensor) -> torch.Tensor:
        return m.b(x.reshape(-1, 16)).view(*x.shape[:2], 2, 4)

    program, step = rewritten(captured(split_columns, torch.randn(2, 3, 16), dynamic=axes), "canonicalize")
    assert "rows of a linear layer not merged" not in step.rewrites

    def read_twice(m: Plain, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = m.b(x.reshape(-1, 16))
        return y.view(*x.shape[:2], 8), y

    _, step = rewritten(captured(read_twice, torch.randn(2, 3, 16), dynamic=axes), "canonicalize")
    assert "rows of a linear layer not merged" not in step.rewrites


def test_a_squeeze_meets_its_unsqueeze() -> None:
    program = captured(lambda m, x: x.unsqueeze(1).squeeze(1).exp(), torch.randn(3, 8))
    assert targets(rewritten(program, "canonicalize")[0]) == ["aten.exp.default"]
    two = captured(lambda m, x: x.view(1, 1, 24).squeeze(0).squeeze(0).exp(), torch.randn(3, 8))
    assert targets(rewritten(two, "canonicalize")[0]).count("aten.squeeze.dim") == 2


def test_padding_by_nothing_goes() -> None:
    program = captured(lambda m, x: F.pad(F.pad(x, (0, 0, 0, 0)), (0, 1)), torch.randn(3, 8))
    assert targets(rewritten(program, "canonicalize")[0]) == ["aten.constant_pad_nd.default"]


def test_adding_zero_stays_for_floats() -> None:
    """-0.0 + 0 is 0.0: dropping it would change a bit."""
    program, _ = rewritten(captured(lambda m, x: torch.relu(x) + 0, torch.randn(4, 8)), "canonicalize")
    assert targets(program) == ["aten.relu.default", "aten.add.Tensor"]


def test_a_true_mask_goes_and_what_remains_is_by_key() -> None:
    program, step = rewritten(CASES["attention"](), "canonicalize")
    assert step.rewrites["and with true removed"] == 1
    assert "aten.__and__.Tensor" not in targets(program)


def test_attention_scale_moves_into_the_query_weights() -> None:
    program, step = rewritten(CASES["attention"](), "canonicalize")
    assert step.rewrites["attention scale folded"] == 1
    node = next(n for n in program.nodes() if n.target is ops.ATTENTION)
    assert node.kwargs["scale"] == 1.0


def test_attention_scale_stays_where_the_query_is_shared() -> None:
    def function(m: Plain, x: torch.Tensor) -> torch.Tensor:
        q = m.a(x)
        return F.scaled_dot_product_attention(q, q, q)

    _, step = rewritten(captured(function, torch.randn(2, 4, 8)), "canonicalize")
    assert "attention scale folded" not in step.rewrites
    assert [r.reason for r in step.refusals] == ["the query is used elsewhere too"]
    assert "test_passes.py" in step.refusals[0].where


def test_linear_takes_activation_residual_norm_and_the_next_layer() -> None:
    program, step = rewritten(CASES["feed_forward"](), "canonicalize", "fuse-groups")
    assert step.rewrites == {"linear group": 1}
    assert [n.op for n in program.nodes() if n.op.startswith("call")] == ["call_module"]


def test_a_value_that_others_read_is_stored() -> None:
    def function(m: Plain, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = m.a(x)
        return torch.relu(y), torch.tanh(y)

    program, step = rewritten(captured(function, torch.randn(4, 8)), "canonicalize", "fuse-groups")
    assert "aten.linear.default" in targets(program)
    assert any("is used by 2 ops, so it is stored" in r.reason for r in step.refusals)


def test_a_hidden_layer_that_is_also_an_output_ends_the_chain() -> None:
    def function(m: Plain, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = m.a(x)
        return y, m.b(y)

    program, step = rewritten(captured(function, torch.randn(4, 8)), "canonicalize", "fuse-groups")
    assert targets(program) == ["aten.linear.default", "aten.linear.default"]
    assert any("is also read by output" in r.reason for r in step.refusals)


def test_layers_too_wide_for_the_cache_are_not_chained() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4096), nn.Linear(4096, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    program = capture(Wide().eval(), (torch.randn(4, 8),))[0]
    _, step = rewritten(program, "canonicalize", "fuse-groups")
    assert any("do not fit the second-level cache" in r.reason for r in step.refusals)


def test_fusing_needs_a_canonical_graph() -> None:
    with pytest.raises(Exception, match="needs 'canonical'"):
        rewritten(CASES["feed_forward"](), "fuse-groups")


def test_every_op_class_has_an_implementation() -> None:
    assert set(scalars.ELEMENTWISE) == ops.ELEMENTWISE
    assert set(maps.VIEWS) == ops.VIEWS
    assert set(maps.GENERATORS) == ops.GENERATORS
    assert set(maps.GATHERS) == ops.GATHERS
    assert set(reduction.FOLDS) | set(reduction.POSITIONS) == ops.REDUCTIONS
    assert set(reduction.SCANS) == ops.SCANS
    assert set(maps.JOINS) == ops.JOINS
    assert lower.LINEAR is ops.LINEAR


UNARY = [torch.relu, torch.tanh, torch.neg, torch.abs, lambda t: t * 1, lambda t: t.transpose(0, 1).transpose(0, 1)]
MIXING = [torch.add, torch.mul, torch.maximum, lambda a, b: torch.softmax(a, -1) + b]


@settings(max_examples=25, deadline=None)
@given(data=st.data(), rows=st.integers(2, 5), columns=st.integers(1, 9))
def test_random_graphs_keep_their_values(data: st.DataObject, rows: int, columns: int) -> None:
    """The runner compares every pass in fp64: exactly for fusing, to the declared tolerance for canonicalize."""
    step = st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 9))
    steps = data.draw(st.lists(step, min_size=1, max_size=7))

    def function(m: Plain, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for unary, mixing, which in steps:
            operand = values[which % len(values)]
            values.append(MIXING[mixing](UNARY[unary](values[-1]), operand))
        return values[-1]

    program = captured(function, torch.randn(rows, columns))
    after, step = rewritten(program, "canonicalize", "fuse-groups")
    assert step.max_error == 0.0
    assert verify.relative_error(program.run(*program.example)[0], after.run(*program.example)[0]) <= 1e-6
