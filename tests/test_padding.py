"""remove-padding: encoders give the same tokens without computing the padding, and what reads padding is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import NATIVE
from padded import DYNAMIC, ENCODERS, MASKS, batch, encoder, mask_of, states
from torch import nn
from torch.nn import functional as F

import planish
from planish import passes
from planish.capture import capture
from planish.errors import UnknownNameError
from planish.ops import ATTENTION, VARLEN
from planish.passes.padding import RemovePadding
from planish.passes.padding.contents import reads_padding
from planish.pipeline import Step, run_pipeline
from planish.printer import program_text
from planish.program import Dim, Program
from planish.targets import TARGETS

GOLDEN = Path(__file__).with_name("golden")
TARGET = TARGETS["cpu-avx2"]


class Tokens(nn.Module):
    """One attention layer over embedded tokens, and a function of its states and the mask."""

    def __init__(self, head: Callable[..., Any], width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(100, width), nn.Linear(width, width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.norm, self.conv = nn.LayerNorm(width), nn.Conv1d(width, width, 3, padding=1)
        self.batch_norm, self.running = nn.BatchNorm1d(width, track_running_stats=False), nn.BatchNorm1d(width)
        self.head = head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.states(self.embed(input_ids), attention_mask)

    def states(self, x: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        rows, columns = attention_mask.shape

        def heads(t: torch.Tensor) -> torch.Tensor:
            return t.view(rows, columns, 2, -1).transpose(1, 2)

        mask = self.mask(attention_mask)
        mixed = F.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)), mask)
        x = self.norm(self.out(mixed.transpose(1, 2).reshape(rows, columns, -1)) + x)
        return self.head(self, x, attention_mask)

    def mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        return attention_mask.bool()[:, None, None, :]


def same(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x


def masked_mean(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weight = mask.unsqueeze(-1).float()
    return (x * weight).sum(1) / weight.sum(1)


def first_token(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return m.out(x[:, 0])


def masked_max(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(mask.unsqueeze(-1) == 0, -1e9).amax(1)


def masked_convolution(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return m.conv((x * mask.unsqueeze(-1)).transpose(1, 2)).transpose(1, 2)


def running_norm(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return m.running(x.transpose(1, 2)).transpose(1, 2)


def plain_mean(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x.mean(1)


def convolution(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return m.conv(x.transpose(1, 2)).transpose(1, 2)


def batch_norm(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return m.batch_norm(x.transpose(1, 2)).transpose(1, 2)


WIDE = {"input_ids": {0: Dim("batch", 2, 16), 1: Dim("seq", 17, 64)}}
WIDE["attention_mask"] = WIDE["input_ids"]
DIMS = {"input_ids": {0: Dim("batch", 2, 16), 1: Dim("seq", 2, 64)}}
DIMS["attention_mask"] = DIMS["input_ids"]


def captured(model: nn.Module, dynamic: Any = DIMS, rows: int = 3, columns: int = 9) -> Program:
    return capture(model.eval(), batch("right", rows, columns), dynamic)[0]


def rewritten(program: Program, policy: str = "zero") -> tuple[Program, Step]:
    pipeline = [*passes.resolve(["canonicalize"]), RemovePadding(policy)]
    after, steps = run_pipeline(program, pipeline, TARGET, check_values=True)
    return after, steps[-1]


def assert_tokens_equal(model: nn.Module, compiled: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compare what stands at tokens; returns what stands at padding."""
    with torch.no_grad():
        want, got = model(**inputs), compiled(**inputs)
    if isinstance(want, tuple):
        torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    want, got = states(want), states(got)
    mask = inputs["attention_mask"].bool()
    assert got.shape == want.shape
    if want.shape[:2] != mask.shape:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        return got[:0]
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-5, atol=1e-5)
    return got[~mask]


@pytest.mark.needs_weights
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_packed_and_equal_at_tokens(name: str) -> None:
    model = encoder(name)
    compiled = planish.compile(model, batch("right", 3, 17), dynamic=DYNAMIC)
    (step,) = (s for s in compiled.steps if s.name == "remove-padding")
    assert step.rewrites["attention on tokens"] == 2
    for seed, kind in enumerate((*MASKS, "holes", "left", "right")):
        for shape in ((4, 23), (1, 7), (16, 64)):
            padding = assert_tokens_equal(model, compiled, batch(kind, *shape, seed))
            assert not padding.any()


@pytest.mark.parametrize("target", NATIVE)
@pytest.mark.parametrize(
    "head", [same, masked_mean, first_token, masked_max, masked_convolution, running_norm], ids=lambda h: h.__name__
)
def test_what_follows_an_encoder(head: Callable[..., Any], target: str) -> None:
    model = Tokens(head).eval()
    compiled = planish.compile(model, batch("right", 3, 9), target, dynamic=DIMS)
    kind = "attention of other rows on tokens" if head is first_token else "attention on tokens"
    assert compiled.steps[3].rewrites[kind] == 1
    for seed, kind in enumerate(MASKS):
        assert_tokens_equal(model, compiled, batch(kind, 5, 33, seed))


READERS = {plain_mean: ("mean",), convolution: ("convolution",), batch_norm: ("mean", "sum")}


@pytest.mark.parametrize("head", READERS, ids=lambda h: h.__name__)
def test_readers_of_padding_are_refused(head: Callable[..., Any]) -> None:
    program, step = rewritten(captured(Tokens(head)))
    assert step.rewrites == {}
    assert not any(n.target is VARLEN for n in program.nodes())
    assert step.refusals
    for refusal in step.refusals:
        reader, _, complaint = refusal.reason.partition(" ")
        assert reader in READERS[head]
        assert complaint.startswith("combines positions and reads padding")


@pytest.mark.parametrize("head", [*READERS, same, masked_mean], ids=lambda h: h.__name__)
def test_two_contents_of_padding_tell_readers(head: Callable[..., Any]) -> None:
    program = captured(Tokens(head))
    mask = next(n for n in program.nodes() if n.name == "attention_mask")
    reason = reads_padding(program, mask, 1)
    assert (reason is not None) == (head in READERS)
    assert reason is None or "changes at tokens" in reason


class Unproved(Tokens):
    def mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        return (attention_mask.float() * -5.0)[:, None, None, :]


class Transposed(Tokens):
    def mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        return attention_mask.bool()[:, None, :, None]


@pytest.mark.parametrize("model", [Unproved, Transposed])
def test_a_mask_that_does_not_hide_keys_is_refused(model: type[Tokens]) -> None:
    program, step = rewritten(captured(model(same)))
    assert any(n.target is ATTENTION for n in program.nodes())
    assert [r.reason for r in step.refusals] == ["attention reads it, but it is not proved that it hides padded keys"]


def additive(mask: torch.Tensor) -> torch.Tensor:
    return ((1.0 - mask.float()) * torch.finfo(torch.float32).min)[:, None, None, :]


def biased(mask: torch.Tensor) -> torch.Tensor:
    columns = torch.arange(mask.shape[1])
    distance = (columns[:, None] - columns[None, :]).abs().float() * -0.1
    return torch.where(mask.bool()[:, None, None, :], distance, float("-inf"))


def windowed(mask: torch.Tensor) -> torch.Tensor:
    columns = torch.arange(mask.shape[1])
    near = (columns[:, None] - columns[None, :]).abs() <= 3
    return mask.bool()[:, None, None, :] & near


def causal(mask: torch.Tensor) -> torch.Tensor:
    columns = torch.arange(mask.shape[1])
    return mask.bool()[:, None, None, :] & (columns[:, None] >= columns[None, :])


@pytest.mark.parametrize("form", [additive, biased, windowed, causal], ids=lambda f: f.__name__)
@pytest.mark.parametrize("fixed", [False, True])
def test_masks_of_every_form(form: Callable[[torch.Tensor], torch.Tensor], fixed: bool) -> None:
    model = Tokens(same).eval()
    model.mask = form  # pyright: ignore[reportAttributeAccessIssue]
    compiled = planish.compile(model, batch("right", 5, 33), dynamic=None if fixed else DIMS)
    assert compiled.steps[3].rewrites["attention on tokens"] == 1
    for seed, kind in enumerate(MASKS):
        assert_tokens_equal(model, compiled, batch(kind, 5, 33, seed))


def test_positions_are_not_taken_for_a_width_of_the_same_size() -> None:
    model = Tokens(same, width=32).eval()
    compiled = planish.compile(model, batch("right", 32, 32))
    assert compiled.steps[3].rewrites["attention on tokens"] == 1
    assert_tokens_equal(model, compiled, batch("holes", 32, 32))


def test_rows_that_do_not_fit_are_computed_whole() -> None:
    model = Tokens(same).eval()
    compiled = planish.compile(model, batch("right", 4, 9), dynamic=DIMS)
    inputs = batch("right", 4, 9, 3)
    inputs["attention_mask"][0] = 0  # no token
    inputs["attention_mask"][1, 4] = 2  # neither padding nor token, by the mask's two values
    with torch.no_grad():
        want, got = model(**inputs), compiled(**inputs)
    torch.testing.assert_close(got[:2], want[:2], rtol=1e-5, atol=1e-5)
    assert_tokens_equal(model, compiled, {k: v[2:] for k, v in inputs.items()})
    mask = inputs["attention_mask"][2:].bool()
    torch.testing.assert_close(got[2:][mask], want[2:][mask], rtol=1e-5, atol=1e-5)


def test_policy_nearest_repeats_the_nearest_token() -> None:
    model = Tokens(same).eval()
    compiled = planish.compile(model, batch("right", 3, 9), dynamic=DIMS, padding="nearest")
    inputs = batch("holes", 5, 33)
    got, mask = compiled(**inputs), inputs["attention_mask"].bool()
    assert_tokens_equal(model, compiled, inputs)
    for row, column in (~mask).nonzero().tolist():
        tokens = mask[row].nonzero().squeeze(1)
        nearest = tokens[(tokens - column).abs().argmin()]
        assert torch.equal(got[row, column], got[row, nearest])


def test_policy_exact_keeps_padding_that_is_returned() -> None:
    model = Tokens(same).eval()
    _, step = rewritten(captured(model), "exact")
    assert step.rewrites == {}
    assert "padding='exact'" in step.refusals[0].reason
    inputs = batch("holes", 5, 33)
    compiled = planish.compile(model, batch("right", 3, 9), dynamic=DIMS, padding="exact")
    torch.testing.assert_close(compiled(**inputs), model(**inputs).detach(), rtol=1e-5, atol=1e-5)
    _, step = rewritten(captured(Tokens(masked_mean)), "exact")
    assert step.rewrites["attention on tokens"] == 1


def test_an_unknown_policy_is_an_error() -> None:
    with pytest.raises(UnknownNameError, match="zero, exact, nearest"):
        planish.compile(Tokens(same).eval(), batch("right", 3, 9), padding="zeros")


def test_a_second_run_rewrites_nothing() -> None:
    once, _ = rewritten(captured(Tokens(masked_mean)))
    _, steps = run_pipeline(once, [RemovePadding()], TARGET, check_values=True)
    assert steps[-1].rewrites == {}


def test_golden_program(update_golden: bool) -> None:
    program, _ = rewritten(captured(Tokens(masked_mean)))
    text, path = program_text(program, sources=False), GOLDEN / "padding.py.txt"
    if update_golden:
        path.write_text(text)
    assert text == path.read_text()


def test_without_attention_nothing_is_packed() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a = nn.Embedding(100, 8), nn.Linear(8, 8)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.a(self.embed(input_ids)) * attention_mask.unsqueeze(-1)

    _, step = rewritten(captured(Layers()))
    assert step.rewrites == {}
    assert step.refusals == ()


def test_with_ops_in_pytorch_the_batch_stays_padded() -> None:
    def strange(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)

    model, inputs = Tokens(strange).eval(), batch("right", 5, 33)
    compiled = planish.compile(model, batch("right", 3, 9), dynamic=DIMS, fallback="eager")
    assert "remove-padding" not in [s.name for s in compiled.steps]
    torch.testing.assert_close(compiled(**inputs), model(**inputs).detach(), rtol=1e-5, atol=1e-5)


def test_torch_compile_keeps_padding_unless_told() -> None:
    model, inputs = Tokens(same).eval(), batch("left", 3, 9)
    with torch.no_grad():
        exact = torch.compile(model, backend="planish", dynamic=False)(**inputs)
        torch.testing.assert_close(exact, model(**inputs), rtol=1e-5, atol=1e-5)
        torch._dynamo.reset()
        zero = torch.compile(model, backend="planish", dynamic=False, options={"padding": "zero"})(**inputs)
    assert not zero[~inputs["attention_mask"].bool()].any()


def scrambled(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    rows, columns, width = x.shape
    mixed = m.out(x).reshape(rows, width, columns) * torch.arange(width)[:, None]
    return m.out(mixed.reshape(rows, columns, width))


def interleaved(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    rows, columns, width = x.shape
    mixed = m.out(x).reshape(columns, rows, width) * torch.arange(rows)[None, :, None]
    return m.out(mixed.reshape(rows, columns, width))


def shifted(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return m.out(torch.cat([x[:, 1:], x[:, :1]], 1))


def padded_heads(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.pad(m.out(x)[:, None], (0, 0, 0, 0, 1, 1)).sum(1)


def added_first_token(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return m.out(x + m.out(x[:, 0])[:, None])


def added_masked_sum(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return m.out(x + (x * mask.unsqueeze(-1)).sum(1, keepdim=True))


def first_of_a_convolution(m: Tokens, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x * mask.unsqueeze(-1)
    return m.conv(x.transpose(1, 2)).transpose(1, 2) * 2, torch.relu(x)[:, 0]


@pytest.mark.parametrize(
    "head",
    [
        *(scrambled, interleaved, shifted, padded_heads),
        *(added_first_token, added_masked_sum, first_of_a_convolution),
    ],
    ids=lambda h: h.__name__,
)
def test_what_moves_or_mixes_positions_is_right(head: Callable[..., Any]) -> None:
    model, fixed = Tokens(head).eval(), head is scrambled  # torch.export cannot have it with a dynamic size
    compiled = planish.compile(model, batch("right", 5, 33), "reference", dynamic=None if fixed else WIDE)
    for seed, kind in enumerate(MASKS):
        assert_tokens_equal(model, compiled, batch(kind, 5, 33, seed))


class OtherRows(Tokens):
    """Keys are hidden by the mask of the row before, too."""

    def mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        return attention_mask.roll(1, 0).bool()[:, None, None, :]


def test_a_mask_of_other_rows_is_refused() -> None:
    _, step = rewritten(captured(OtherRows(same)))
    assert step.rewrites == {}
    assert "not proved" in step.refusals[0].reason


class Embedded(Tokens):
    """Takes embeddings instead of ids."""

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.states(inputs_embeds, attention_mask)


def test_embeddings_as_inputs() -> None:
    model = Embedded(same, width=64).eval()
    axes = DIMS["input_ids"]
    example = {"inputs_embeds": torch.randn(3, 9, 64), "attention_mask": mask_of("right", 3, 9)}
    compiled = planish.compile(model, example, dynamic=dict.fromkeys(example, axes))
    assert compiled.steps[3].rewrites["attention on tokens"] == 1
    for seed, kind in enumerate(MASKS):
        inputs = {"inputs_embeds": torch.randn(5, 33, 64), "attention_mask": mask_of(kind, 5, 33, seed)}
        assert_tokens_equal(model, compiled, inputs)


class EncoderDecoder(nn.Module):
    """Queries of a decoder that attend to the tokens of a padded source."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.source, self.embed = Tokens(same), nn.Embedding(100, 16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        memory, x = self.source(input_ids, attention_mask), self.embed(target_ids)
        heads = [
            f(t).unflatten(-1, (2, 8)).transpose(1, 2) for f, t in ((self.q, x), (self.k, memory), (self.v, memory))
        ]
        mixed = F.scaled_dot_product_attention(*heads, attention_mask.bool()[:, None, None, :])
        return mixed.transpose(1, 2).flatten(2)


def test_cross_attention_reads_packed_keys() -> None:
    model, target = EncoderDecoder().eval(), torch.randint(0, 100, (5, 4))
    dynamic = {**DIMS, "target_ids": {0: Dim("batch", 2, 16), 1: Dim("targets", 2, 16)}}
    example = {**batch("right", 3, 9), "target_ids": torch.randint(0, 100, (3, 5))}
    compiled = planish.compile(model, example, dynamic=dynamic)
    assert compiled.steps[3].rewrites["attention of other rows on tokens"] == 1
    for seed, kind in enumerate(MASKS):
        inputs = {**batch(kind, 5, 33, seed), "target_ids": target}
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)


class TwoStreams(Tokens):
    """A decoder of the source's size, whose states are nobody's padding, and values of another input."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, target_ids: torch.Tensor, feats: torch.Tensor
    ) -> Any:
        memory = super().forward(input_ids, attention_mask)
        x = self.embed(target_ids)
        heads = [
            f(t).unflatten(-1, (2, 8)).transpose(1, 2) for f, t in ((self.q, x), (self.k, memory), (self.v, memory))
        ]
        mixed = F.scaled_dot_product_attention(*heads, self.mask(attention_mask))
        return x + self.out(mixed.transpose(1, 2).flatten(2)), self.out(feats)


@pytest.mark.parametrize("fixed", [False, True])
def test_only_outputs_of_the_padded_texts_are_zeroed(fixed: bool) -> None:
    model = TwoStreams(same).eval()

    def inputs(kind: str, rows: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 100, (rows, columns), generator=generator)
        feats = torch.randn(rows, columns, 16, generator=generator)
        return {**batch(kind, rows, columns, seed), "target_ids": ids, "feats": feats}

    example = inputs("right", 5, 33, 0)
    compiled = planish.compile(model, example, dynamic=None if fixed else dict.fromkeys(example, DIMS["input_ids"]))
    for seed, kind in enumerate(MASKS):
        given = inputs(kind, 5, 33, seed)
        with torch.no_grad():
            for want, got in zip(model(**given), compiled(**given), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


class TypedMask(Tokens):
    """Keys are hidden by two inputs: neither marks padding."""

    def forward(self, token_type_ids: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.states(self.embed(input_ids), attention_mask * (token_type_ids == 0))


def test_a_mask_of_two_inputs_marks_no_padding() -> None:
    model, inputs = TypedMask(same).eval(), batch("right", 5, 33)
    inputs["token_type_ids"] = torch.randint(0, 2, (5, 33))
    compiled = planish.compile(model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)


def test_a_finite_mask_under_which_a_query_may_see_no_key_is_refused() -> None:
    model = Tokens(same)
    model.mask = lambda mask: causal(mask).float().log().clamp(min=-1e30)  # pyright: ignore[reportAttributeAccessIssue]
    _, step = rewritten(captured(model))
    assert "not proved" in step.refusals[0].reason


class Remembering(Tokens):
    """Writes its states, padding included, to a buffer."""

    def __init__(self) -> None:
        super().__init__(same)
        self.register_buffer("last", torch.zeros(5, 33, 16))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        before = self.last.clone()
        self.last.copy_(super().forward(input_ids, attention_mask))
        return before.sum(1)


def test_padding_written_to_a_state_is_kept() -> None:
    compiled = planish.compile(Remembering().eval(), batch("right", 5, 33))
    state, model = compiled.new_state(), Remembering().eval()
    for seed in (1, 2):
        inputs = batch("right", 5, 33, seed)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs, state=state), model(**inputs), rtol=1e-4, atol=1e-4)


@settings(max_examples=15)
@given(st.sampled_from(MASKS), st.integers(1, 5), st.integers(1, 40), st.booleans(), st.data())
def test_tokens_are_numbered_as_in_pytorch(
    kind: str, rows: int, columns: int, first: bool, data: st.DataObject
) -> None:
    mask = mask_of(kind, rows, columns, data.draw(st.integers(0, 99)))
    dtype = data.draw(st.sampled_from([torch.bool, torch.int64, torch.float32]))
    keep = data.draw(st.sampled_from([0, 1]))
    others = data.draw(st.sampled_from(["none", "zero", "nearest"]))
    mask = (mask if keep else 1 - mask).to(dtype)
    if data.draw(st.booleans()):
        mask[0] = 1 - keep

    class Numbered(nn.Module):
        def forward(self, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
            starts = torch.ops.planish.token_starts(mask, keep, first)
            return starts, torch.ops.planish.token_slots(mask, starts, keep, first, others)

    compiled = planish.compile(Numbered().eval(), (mask,))
    for got, want in zip(compiled(mask), Numbered()(mask), strict=True):
        assert torch.equal(got, want)
