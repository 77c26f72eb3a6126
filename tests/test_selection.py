"""push-selections: what moves up and how far, what stops it, and pooling before a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from native import NATIVE
from torch import Tensor, nn
from torch.nn import functional as F

import planish
from planish.capture import capture
from planish.ops import ATTENTION, GENERATORS, LINEAR, VIEWS
from planish.passes import resolve
from planish.pipeline import Step, run_pipeline
from planish.printer import program_text
from planish.program import Dim, Program, evaluate
from planish.targets import TARGETS
from planish.verify import relative_error

GOLDEN = Path(__file__).with_name("golden")
MOVED, POOLED = "selection moved up", "pooled before the linear layer"
WIDTH, HEADS = 8, 2
AXES = {"x": {0: Dim("batch", 1, 8), 1: Dim("seq", 3, 32)}}

Body = Callable[["Layer", Tensor], Any]


class Layer(nn.Module):
    """Parts of a transformer, and the function of ``x`` [batch, seq, width] that a test makes of them."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down, self.norm = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.table = nn.Embedding(16, WIDTH)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)

    def attend(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        def heads(t: Tensor) -> Tensor:
            return t.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)), mask, 0.0, causal)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))

    def layer(self, x: Tensor, **options: Any) -> Tensor:
        x = self.norm(x + self.attend(x, **options))
        return self.norm(x + self.down(F.gelu(self.up(x))))


def example() -> Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def passed(body: Body, *names: str, dynamic: Any = AXES) -> tuple[Program, Step]:
    """The program after the passes, whose runner compares values in fp64 at two shapes, and the last of them."""
    program = capture(Layer(body).eval(), (example(),), dynamic)[0]
    after, steps = run_pipeline(program, resolve(names), TARGETS["cpu-avx2"], check_values=True)
    return after, steps[-1]


def pushed(body: Body, dynamic: Any = AXES) -> tuple[Program, Step]:
    return passed(body, "canonicalize", "push-selections", dynamic=dynamic)


def shapes(program: Program, target: Any) -> list[list[str]]:
    return [[str(s) for s in program.shape(n)] for n in program.nodes() if n.target is target]


def reasons(step: Step) -> list[str]:
    return [r.reason for r in step.refusals]


def first_token(m: Layer, x: Tensor) -> Tensor:
    return m.layer(x, mask=x[:, None, None, :, 0] > -1)[:, 0]


def last_token(m: Layer, x: Tensor) -> Tensor:
    return m.layer(x, causal=True)[:, -1]


ONE_ROW: Mapping[str, Body] = {"first token": first_token, "last token, causal": last_token}


@pytest.mark.parametrize("name", ONE_ROW)
def test_one_row_of_a_layer(name: str) -> None:
    """Keys and values of all tokens; the query, the output projection and the feed-forward layers of one."""
    after, step = pushed(ONE_ROW[name])
    rows = [shape[:-1] for shape in shapes(after, LINEAR) if len(shape) == 3]
    assert sorted(rows) == sorted([["batch", "1"]] * 4 + [["batch", "seq"]] * 2)
    assert shapes(after, ATTENTION) == [["batch", "2", "1", "4"]]
    assert step.rewrites[MOVED] >= 8


@pytest.mark.parametrize("name", ONE_ROW)
@pytest.mark.parametrize("target", NATIVE)
def test_one_row_in_native_code(name: str, target: str) -> None:
    model = Layer(ONE_ROW[name]).eval()
    compiled = planish.compile(model, (example(),), target, dynamic=AXES)
    for x in (example(), torch.randn(1, 17, WIDTH)):
        with torch.no_grad():
            assert relative_error(model(x), compiled(x)) < 1e-5


def test_golden_program(update_golden: bool) -> None:
    text, path = program_text(pushed(last_token)[0], sources=False), GOLDEN / "last_token.py.txt"
    if update_golden:
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", ONE_ROW)
def test_a_second_run_rewrites_nothing(name: str) -> None:
    once, _ = pushed(ONE_ROW[name])
    _, steps = run_pipeline(once, resolve(["push-selections"]), TARGETS["cpu-avx2"])
    assert steps[-1].rewrites == {}


def gathered(m: Layer, x: Tensor) -> Tensor:
    order = (x * 10).long() % WIDTH
    return x.gather(2, order)[:, 1]


def embedded(m: Layer, x: Tensor) -> Tensor:
    return m.table((x[..., 0] * 10).long() % 16)[:, 1:2]


MOVING: Mapping[str, Body] = {
    "elementwise, broadcast": lambda m, x: (x.exp() + x[:, :1] * m.norm.weight)[:, 1],
    "softmax of other axes": lambda m, x: torch.softmax(x * 2, -1)[:, 1],
    "linear": lambda m, x: m.up(x)[:, -2],
    "reduction": lambda m, x: (x * 2).sum(-1)[:, 1],
    "root mean square norm": lambda m, x: (x * (x.pow(2).mean(-1, keepdim=True) + 1).rsqrt() * m.norm.weight)[:, 0],
    "joined along other axes": lambda m, x: torch.cat([x.exp(), -x], -1)[:, 0],
    "a product's rows": lambda m, x: (x.exp() @ x.transpose(1, 2))[:, 2],
    "a product's columns": lambda m, x: (x @ x.exp().transpose(1, 2))[:, :, 2],
    "a batch": lambda m, x: (x.exp() @ x.transpose(1, 2))[1],
    "gather": gathered,
    "embedding": embedded,
    "transposed": lambda m, x: x.exp().transpose(1, 2)[..., 0],
    "permuted and split": lambda m, x: x.exp().view(*x.shape[:2], 2, 4).permute(0, 2, 1, 3)[:, :, 0],
    "unsqueezed": lambda m, x: x.exp().unsqueeze(1)[:, :, 1],
    "half of the columns": lambda m, x: x.exp()[..., :4],
    "every third": lambda m, x: x.exp()[:, :, ::3],
    "picked by an index": lambda m, x: m.up(x).index_select(1, torch.arange(2)),
    "rotated halves": lambda m, x: (x.exp() * 2 + torch.cat([-x.exp()[..., 4:], x.exp()[..., :4]], -1))[:, 0],
}


def computed(program: Program) -> int:
    """Elements that ops other than views compute, for the example."""
    nodes = [n for n in program.nodes() if n.op == "call_function" and isinstance(n.meta["val"], Tensor)]
    sizes = program.example_dims()
    shapes = [program.shape(n) for n in nodes if n.target not in VIEWS | GENERATORS]
    return sum(prod(evaluate(s, sizes) for s in shape) for shape in shapes)


@pytest.mark.parametrize("name", MOVING)
def test_selections_move_up(name: str) -> None:
    """At most half is computed."""
    dynamic = None if name == "a batch" else AXES
    before, _ = passed(MOVING[name], "canonicalize", dynamic=dynamic)
    after, step = pushed(MOVING[name], dynamic)
    assert step.rewrites[MOVED] >= 1
    assert computed(after) <= computed(before) / 2


def two_rows(m: Layer, x: Tensor) -> Any:
    y = m.up(x)
    return y[:, 0], y[:, 1]


def hidden_too(m: Layer, x: Tensor) -> Any:
    y = m.layer(x)
    return y[:, 0], y


def other_queries(m: Layer, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[:, :-1].exp(), x, x, is_causal=True)[:, 0]


REFUSED: Mapping[str, tuple[Body, str]] = {
    "hidden states are returned": (hidden_too, "layer_norm_1 is also read by output"),
    "two rows are read": (two_rows, "linear is also read by select_1, which reads other positions too"),
    "nearly all rows are read": (lambda m, x: m.up(x)[:, 1:], "positions of linear are read: more than half"),
    "causal by a corner": (other_queries, "is causal with other numbers of queries and keys"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_reader(name: str) -> None:
    body, reason = REFUSED[name]
    _, step = pushed(body)
    assert MOVED not in step.rewrites
    assert any(reason in r for r in reasons(step)), reasons(step)


STAYING: Mapping[str, Body] = {
    "softmax of the axis": lambda m, x: torch.softmax(x, 1)[:, 0],
    "columns of a layer": lambda m, x: m.up(x)[..., 0],
    "columns of a norm": lambda m, x: m.norm(x)[..., :2],
    "sums so far": lambda m, x: x.cumsum(1)[:, 0],
    "merged axes": lambda m, x: x.exp().view(-1, WIDTH)[0],
    "along a join": lambda m, x: torch.cat([x, x.exp()], 1)[:, 0],
    "a place known at run time": lambda m, x: x.exp()[:, x.shape[1] - 2],
    "an empty piece": lambda m, x: torch.cat([torch.zeros(0), x.exp()], -1)[:, 1],
    "an input": lambda m, x: x[:, 0].exp(),
}


@pytest.mark.parametrize("name", STAYING)
def test_mixed_positions_stay(name: str) -> None:
    _, step = pushed(STAYING[name])
    assert MOVED not in step.rewrites


def test_residual_branches_are_selected_once() -> None:
    """Each of twelve residuals is read twice: selecting it for each reader would make 4,096 of the first."""

    def body(m: Layer, x: Tensor) -> Tensor:
        for _ in range(12):
            x = x + m.down(F.gelu(m.up(m.norm(x))))
        return x[:, 0]

    after, step = pushed(body)
    assert step.rewrites[MOVED] == 5 * 12
    assert len(shapes(after, LINEAR)) == 24


POOLING: Mapping[str, Body] = {
    "mean": lambda m, x: m.up(x).mean(1),
    "mean, kept axis": lambda m, x: m.up(x).mean(1, keepdim=True),
    "masked sum": lambda m, x: (m.up(x) * (x[..., :1] > 0)).sum(1) / (x[..., :1] > 0).sum(1),
    "masked mean": lambda m, x: (m.up(x) * (x[..., :1] > 0)).mean(1),
    "sum without bias": lambda m, x: F.linear(x, m.up.weight).sum(1),
    "sum over batches": lambda m, x: m.up(x).mean(0),
}


@pytest.mark.parametrize("name", POOLING)
def test_pooling_moves_in_front_of_a_layer(name: str) -> None:
    after, step = pushed(POOLING[name])
    assert step.rewrites[POOLED] == 1
    assert shapes(after, LINEAR) == [["seq" if name == "sum over batches" else "batch", "32"]]


def test_the_bias_of_a_sum_is_added_as_often() -> None:
    after, step = pushed(lambda m, x: m.up(x).sum(1), None)
    assert step.rewrites[POOLED] == 1
    assert shapes(after, LINEAR) == [["3", "32"]]
    _, step = pushed(lambda m, x: m.up(x).sum(1))
    assert POOLED not in step.rewrites
    assert any("how often the bias is added" in r for r in reasons(step))


def test_pooling_that_saves_nothing_stays() -> None:
    """Of a single row it would add the pooling of the longer rows."""
    _, step = pushed(lambda m, x: m.down(m.up(x[:, :1]).exp()).mean(1))
    assert POOLED not in step.rewrites
    assert any("takes no fewer operations" in r for r in reasons(step))


def test_a_layer_that_others_read_is_pooled_after_it() -> None:
    def body(m: Layer, x: Tensor) -> Any:
        y = m.up(x)
        return y.mean(1), y

    _, step = pushed(body)
    assert POOLED not in step.rewrites
    assert any("linear is read by" in r for r in reasons(step))


OTHER_POOLING: Mapping[str, Body] = {
    "of columns": lambda m, x: m.up(x).mean(-1),
    "behind an activation": lambda m, x: F.gelu(m.up(x)).mean(1),
    "of everything": lambda m, x: m.up(x).mean(),
    "of one number": lambda m, x: x[0, 0, 0].mean(),
    "with an axis in front": lambda m, x: m.up(x).unsqueeze(0).mean(2),
}


@pytest.mark.parametrize("body", OTHER_POOLING.values(), ids=OTHER_POOLING)
def test_other_pooling_stays(body: Body) -> None:
    assert POOLED not in pushed(body)[1].rewrites


def transformers_model(name: str, auto: str) -> tuple[nn.Module, Any, Any]:
    from planish.models import families
    from planish.models.seeded import transformer

    row = families.family(name)
    model = transformer(auto, name, {**families._small(row, name), **row.config})
    return model, families.inputs(name, 3, 9), families.dynamic(name)


class Last(nn.Module):
    """Scores of the next token, as a caller that wants no others asks for them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -1]


@pytest.mark.needs_weights
@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("bert", "AutoModelForSequenceClassification"),
        ("vit", "AutoModelForImageClassification"),
        ("gpt2", "AutoModelForCausalLM"),
        ("llama", "AutoModelForCausalLM"),
    ],
)
def test_last_layers_of_transformers(name: str, auto: str) -> None:
    """The last layer's attention has one query row, and everything behind it one row."""
    model, inputs, dynamic = transformers_model(name, auto)
    model = Last(model).eval() if "Causal" in auto else model
    program = capture(model, inputs, dynamic)[0]
    passes = resolve(["canonicalize", "push-selections"])
    after, _ = run_pipeline(program, passes, TARGETS["cpu-avx2"], check_values=True)
    first, last = shapes(after, ATTENTION)
    assert (first[-2] != "1", last[-2]) == (True, "1")
    nodes = list(after.nodes())
    behind = nodes[max(i for i, n in enumerate(nodes) if n.target is ATTENTION) :]
    assert all("seq" not in map(str, after.shape(n)) for n in behind if n.target is LINEAR)
    compiled = planish.compile(model, inputs, dynamic=dynamic)
    with torch.no_grad():
        want, got = model(**inputs), compiled(**inputs)
    want, got = (r if isinstance(r, Tensor) else r[0] for r in (want, got))
    assert relative_error(want, got) < 1e-4


@pytest.mark.needs_weights
def test_a_model_that_returns_its_hidden_states_keeps_them() -> None:
    model, inputs, dynamic = transformers_model("bert", "AutoModel")
    program = capture(model, inputs, dynamic)[0]
    _, steps = run_pipeline(program, resolve(["canonicalize", "push-selections"]), TARGETS["cpu-avx2"])
    assert steps[-1].rewrites == {}
    assert any("is also read by output" in r for r in reasons(steps[-1]))
