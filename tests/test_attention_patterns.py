"""Attention that a model spells out: which spellings become the one op, with which mask, and which stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from native import NATIVE
from torch import Tensor, nn

import planish
from planish.capture import capture
from planish.ops import ATTENTION
from planish.passes import resolve
from planish.pipeline import Step, run_pipeline
from planish.printer import program_text
from planish.program import Dim, Program
from planish.targets import TARGETS
from planish.verify import relative_error

GOLDEN = Path(__file__).with_name("golden")
RULE = "attention recognised"
HEADS, WIDTH = 2, 8
LOWEST = torch.finfo(torch.float32).min
AXES = {0: Dim("batch", 1, 8), 1: Dim("seq", 1, 16)}

Spelling = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Any]


class Spelled(nn.Module):
    """Self-attention over ``x`` [batch, seq, width], its weighing spelled by ``spelling(q, k, v, keys, bias)``.

    ``keys`` [batch, seq] is true for tokens that are there.
    """

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.bias = nn.Parameter(torch.randn(HEADS, 1, 1))
        self.spelling = spelling

    def forward(self, x: Tensor, keys: Tensor) -> Any:
        def heads(t: Tensor) -> Tensor:
            return t.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

        mixed = self.spelling(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)), keys, self.bias)
        mixed, *others = mixed if isinstance(mixed, tuple) else (mixed,)
        result = self.out(mixed.transpose(1, 2).reshape(x.shape))
        return (result, *others) if others else result


def example() -> tuple[Tensor, Tensor]:
    keys = torch.ones(3, 5, dtype=torch.bool)
    keys[0, 3:] = keys[2, 0] = False
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0)), keys


def rewritten(spelling: Spelling) -> tuple[Program, Program, Step]:
    """The program before and after ``canonicalize``; the runner compares their values in fp64."""
    program = capture(Spelled(spelling).eval(), example(), {"x": AXES, "keys": AXES})[0]
    after, steps = run_pipeline(program, resolve(["canonicalize"]), TARGETS["cpu-avx2"], check_values=True)
    return program, after, steps[-1]


def attention(program: Program) -> Any:
    return next(n for n in program.nodes() if n.target is ATTENTION)


def ops(program: Program) -> set[str]:
    return {str(n.target).removeprefix("aten.") for n in program.nodes() if n.op == "call_function"}


def plain(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """As MPNet: a bias by head and distance, then a mask of 0 and the lowest number."""
    place = torch.arange(q.shape[2])
    near = bias * (place[None, :] - place[:, None]).abs()
    mask = torch.where(keys[:, None, None, :], 0.0, LOWEST)
    return torch.softmax(q @ k.transpose(-1, -2) * 0.5 + near + mask, -1) @ v


def merged(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """As Bloom: batch and heads are one axis, which the first term has too, and two axes for the second term."""
    batch, heads, seq, d = q.shape
    q, k, v = (t.reshape(-1, seq, d) for t in (q, k, v))
    slope = (bias * torch.arange(seq)).expand(batch, heads, 1, seq).reshape(-1, 1, seq)
    scores = torch.baddbmm(slope, q, k.transpose(1, 2), alpha=0.5).view(batch, heads, seq, seq)
    scores = scores + torch.where(keys[:, None, None, :], 0.0, LOWEST)
    return torch.bmm(torch.softmax(scores, -1).view(-1, seq, seq), v).view(batch, heads, seq, d)


def windows(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """As Swin: the leading axes are split for a term that all batches share, and merged again."""
    batch, heads, seq, _ = q.shape
    scores = (q @ k.transpose(-1, -2)).view(batch, 1, heads, seq, seq)
    causal = torch.where(torch.ones(seq, seq).tril() > 0, 0.0, -100.0)
    return torch.softmax((scores + causal[None, None, None] + bias).view(batch, heads, seq, seq), -1) @ v


def filled(value: float) -> Spelling:
    def spelling(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        scores = (q * 0.5) @ k.transpose(-1, -2)
        return torch.softmax(scores.masked_fill(~keys[:, None, None, :], value), -1, dtype=torch.float32) @ v

    return spelling


def chosen(value: float) -> Spelling:
    def spelling(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        scores = torch.where(keys[:, None, None, :], q @ k.transpose(-1, -2), torch.full([], value))
        return torch.softmax(scores, -1) @ v

    return spelling


def both(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    scores = (q @ k.permute(0, 1, 3, 2) + bias).masked_fill(~keys[:, None, None, :], -math.inf)
    return torch.softmax(scores, -1) @ v


SPELLINGS: Mapping[str, Spelling] = {
    "plain": plain,
    "biased": biased,
    "merged": merged,
    "windows": windows,
    "filled with the lowest": filled(LOWEST),
    "filled with -inf": filled(-math.inf),
    "chosen with the lowest": chosen(LOWEST),
    "chosen with -inf": chosen(-math.inf),
    "bias and -inf": both,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelled_attention_becomes_the_op(name: str) -> None:
    _, after, step = rewritten(SPELLINGS[name])
    assert step.rewrites[RULE] == 1
    assert not ops(after) & {"bmm.default", "softmax.int"}
    query, key, value = attention(after).args[:3]
    assert all([str(s) for s in after.shape(n)] == ["batch", "2", "seq", "4"] for n in (query, key, value))
    assert attention(after).kwargs["scale"] == 1.0, "the factor went into the query's weights"


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_second_run_rewrites_nothing(name: str) -> None:
    _, once, _ = rewritten(SPELLINGS[name])
    _, steps = run_pipeline(once, resolve(["canonicalize"]), TARGETS["cpu-avx2"])
    assert steps[-1].rewrites == {}


def test_golden_program(update_golden: bool) -> None:
    text, path = program_text(rewritten(biased)[1], sources=False), GOLDEN / "spelled_attention.py.txt"
    if update_golden:
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize(("value", "dtype"), [(-math.inf, torch.bool), (LOWEST, torch.float32)])
@pytest.mark.parametrize("spelling", [filled, chosen])
def test_infinities_become_booleans(spelling: Callable[[float], Spelling], value: float, dtype: torch.dtype) -> None:
    mask = attention(rewritten(spelling(value))[1]).args[3]
    assert mask.meta["val"].dtype is dtype
    assert mask.meta["val"].shape[1:3] == (1, 1), "by key only"


@pytest.mark.parametrize("name", ["biased", "merged", "filled with the lowest", "chosen with the lowest"])
@pytest.mark.parametrize("target", NATIVE)
def test_a_text_of_padding_only_is_weighed_as_before(name: str, target: str) -> None:
    """All its scores are the lowest number, so that its weights are equal."""
    model, (x, keys) = Spelled(SPELLINGS[name]).eval(), example()
    keys[1] = False
    compiled = planish.compile(model, (x, keys), target)
    assert relative_error(model(x, keys), compiled(x, keys)) < 1e-5
    program, after, _ = rewritten(SPELLINGS[name])
    assert relative_error(program.run(keys, x)[0], after.run(keys, x)[0]) < 1e-5


@pytest.mark.parametrize("name", ["filled with -inf", "chosen with -inf", "bias and -inf"])
@pytest.mark.parametrize("target", NATIVE)
def test_a_text_without_a_score_has_no_weights(name: str, target: str) -> None:
    """It was NaN; all other texts keep their values."""
    model, (x, keys) = Spelled(SPELLINGS[name]).eval(), example()
    compiled = planish.compile(model, (x, keys), target)
    keys = keys.clone()
    keys[1] = False
    want, nothing = model(x, keys), model.out(torch.zeros(5, WIDTH))
    assert want[1].isnan().all()
    for got in (compiled(x, keys), rewritten(SPELLINGS[name])[1].run(keys, x)[0]):
        assert relative_error(want[[0, 2]], got[[0, 2]]) < 1e-5
        assert relative_error(nothing, got[1]) < 1e-5


def weights_too(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor) -> Any:
    weights = torch.softmax(q @ k.transpose(-1, -2), -1)
    return weights @ v, weights


def scores_too(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor) -> Any:
    scores = q @ k.transpose(-1, -2) + bias
    return torch.softmax(scores, -1) @ v, scores


def scaled_last(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax((q @ k.transpose(-1, -2) + bias) * 0.5, -1) @ v


def one_matrix(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor) -> Any:
    return plain(q[0, 0], k[0, 0], v[0, 0], keys, bias) + q * 0


REFUSED: Mapping[str, tuple[Spelling, str]] = {
    "weights are returned": (weights_too, "softmax is read by"),
    "scores are returned": (scores_too, "is read by softmax and output"),
    "hidden scores count": (filled(-10000.0), "hidden scores are -10000"),
    "terms are scaled": (scaled_last, "scales scores that something is added to"),
    "one matrix": (one_matrix, "it is one matrix"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_have_a_reason(name: str) -> None:
    spelling, reason = REFUSED[name]
    _, after, step = rewritten(spelling)
    assert RULE not in step.rewrites
    assert {"bmm.default", "softmax.int"} <= ops(after)
    assert any(r.rule == RULE and reason in r.reason for r in step.refusals), step.refusals


def over_queries(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2), -2) @ v


def capped(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(q @ k.transpose(-1, -2)), -1) @ v


def mixed(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """The weights are turned before they weigh."""
    return torch.softmax(q @ k.transpose(-1, -2), -1).transpose(-1, -2) @ v


@pytest.mark.parametrize("spelling", [over_queries, capped, mixed])
def test_other_computations_stay(spelling: Spelling) -> None:
    _, after, step = rewritten(spelling)
    assert RULE not in step.rewrites
    assert {"bmm.default", "softmax.int"} <= ops(after)


def test_pytorch_module_with_weights_that_nobody_reads() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: Tensor, keys: Tensor) -> Tensor:
            return self.attention(x, x, x, key_padding_mask=~keys, need_weights=True)[0]

    program = capture(Encoder().eval(), example(), {"x": AXES, "keys": AXES})[0]
    after, steps = run_pipeline(program, resolve(["canonicalize"]), TARGETS["cpu-avx2"], check_values=True)
    assert steps[-1].rewrites[RULE] == 1
    assert not ops(after) & {"bmm.default", "softmax.int"}


@pytest.mark.needs_weights
@pytest.mark.parametrize("name", ["bert", "gpt2", "mpnet", "bloom", "deberta-v2"])
def test_transformers_in_eager_attention(name: str) -> None:
    """All their attention is recognised, also with padding on either side and a text of padding only."""
    from planish.models import families

    model = families.build(name)
    model.config._attn_implementation = "eager"
    inputs = families.inputs(name, 3, 9)
    mask = inputs["attention_mask"]
    mask[0, 5:] = mask[2, :2] = 0
    compiled = planish.compile(model, inputs, dynamic=families.dynamic(name), padding="exact")
    step = next(s for s in compiled.steps if s.name == "canonicalize")
    assert step.rewrites[RULE] == 2
    assert not [r for r in step.refusals if r.rule == RULE]
    for lengths in (mask, torch.cat([mask[:2], torch.zeros_like(mask[2:])])):
        given = {**inputs, "attention_mask": lengths}
        with torch.no_grad():
            assert relative_error(model(**given)[0], compiled(**given)[0]) < 1e-4
