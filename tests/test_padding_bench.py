"""planish.bench padding: batches with exact fills, the formula, and the schema on a stand-in for the compiled model."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from planish import models
from planish.bench import builds, limits, nested, padding, report, result
from planish.bench.builds import PACKED, PADDED
from planish.bench.expected import expect, kappa
from planish.bench.padded import batch_of, fill_set, filled, sort_by_length, spread, uniform_set
from planish.bench.peer import CTRANSLATE2
from planish.bench.quality import outputs
from planish.errors import NumericError


@pytest.mark.parametrize("seq", [128, 256, 512])
@pytest.mark.parametrize("fill", [0.25, 0.5, 0.75, 1.0])
def test_fills_are_exact(seq: int, fill: float) -> None:
    lengths = filled(16, seq, fill)
    assert sum(lengths) == fill * 16 * seq
    assert lengths[0] == max(lengths) == seq
    assert min(lengths) >= 1
    if fill < 1:
        assert max(lengths[1:]) - min(lengths[1:]) >= 0.2 * seq, "mixed lengths, as real batches have"
    made = fill_set(16, seq, fill)
    assert sorted(made.lengths) == sorted(lengths)
    assert made.shapes == [[16, seq]]
    assert torch.equal(made.batches[0]["input_ids"] > 0, made.batches[0]["attention_mask"] == 1)
    assert torch.equal(made.batches[0]["input_ids"], fill_set(16, seq, fill).batches[0]["input_ids"])


@given(st.integers(1, 40), st.integers(1, 600), st.floats(0, 1))
def test_any_fill_is_exact_or_refused(rows: int, seq: int, fill: float) -> None:
    tokens = round(fill * rows * seq)
    if tokens < seq + rows - 1:
        with pytest.raises(ValueError, match="no empty one"):
            filled(rows, seq, tokens / (rows * seq))
        return
    lengths = filled(rows, seq, tokens / (rows * seq))
    assert len(lengths) == rows
    assert sum(lengths) == tokens
    assert all(1 <= n <= seq for n in lengths)


@pytest.mark.parametrize("wrong", [(16, 128, 0.1), (3, 10, 0.55), (16, 128, 1.5), (16, 128, 0.0)])
def test_fills_that_cannot_be_are_refused(wrong: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match=r"places: no batch with one full row"):
        filled(*wrong)


def test_spread_is_even_and_keeps_the_sum() -> None:
    assert spread(5, 10, 20) == [10, 13, 15, 17, 20]
    assert spread(1, 4, 8) == [6]
    assert sum(spread(64, 0.2 * 100, 100)) == 64 * 60


@pytest.mark.parametrize("seq", [128, 256, 512])
def test_uniform_lengths_have_the_papers_mean(seq: int) -> None:
    made = uniform_set(64, 16, seq)
    assert made.shapes == [[16, seq]] * 4
    assert sum(made.lengths) / 64 / seq == pytest.approx(0.6, abs=1e-4)
    assert min(made.lengths) == pytest.approx(0.2 * seq, abs=1)
    assert max(made.lengths) == seq
    assert made.lengths != sorted(made.lengths)


def test_sorted_rows_are_the_same_rows_with_less_padding() -> None:
    batches = [batch_of(lengths, 9, seed=i) for i, lengths in enumerate(([9, 2, 4], [1, 8, 2], [3, 9]))]
    made = sort_by_length(batches)
    assert [list(b["input_ids"].shape) for b in made.batches] == [[3, 2], [3, 8], [2, 9]]
    assert [int(n) for b in made.batches for n in b["attention_mask"].sum(1)] == [1, 2, 2, 3, 4, 8, 9, 9]
    assert sorted(made.order) == list(range(8))
    states = [b["input_ids"].float().unsqueeze(-1) + 0.5 for b in made.batches]  # 0.5 at padding must not come back
    for batch, back in zip(batches, made.restore(states, batches), strict=True):
        mask = batch["attention_mask"]
        assert torch.equal(back.squeeze(-1), batch["input_ids"] + 0.5 * mask)


def test_the_formula_by_hand() -> None:
    found = expect([64, 32], [64, 64], hidden=16, ratio=1.5)
    assert (found.kappa, found.f1, found.f2) == (1.5, 0.75, (64**2 + 32**2) / (2 * 64**2))
    assert found.a == 1.5 * 64 / 96
    assert found.speedup == pytest.approx((1 + 1.0) / (0.75 + 0.625))


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 500)), min_size=1, max_size=20), st.floats(0.1, 5))
def test_the_formula_is_the_ratio_of_costs(rows: list[tuple[int, int]], ratio: float) -> None:
    """Each row costs its tokens and its tokens squared, whatever lengths its batch was padded to."""
    lengths, padded = [n for n, _ in rows], [n + extra for n, extra in rows]

    def cost(sizes: list[int]) -> float:
        return sum(24 * 384**2 * s + ratio * 4 * 384 * s * s for s in sizes)

    found = expect(lengths, padded, 384, ratio)
    assert found.speedup == pytest.approx(cost(padded) / cost(lengths))
    assert expect(padded, padded, 384, ratio).speedup == pytest.approx(1)


def _kernel(op: str, ms: float, gflops: float, calls: int) -> result.KernelRow:
    return result.KernelRow(op, op, [1], calls, [1, 1], ms, gflops, None)


def test_kappa_weighs_every_call() -> None:
    kernels = [
        _kernel("gemm", 2.0, 100.0, 3),
        _kernel("gemm", 1.0, 50.0, 6),
        _kernel("attention", 1.0, 40.0, 6),
        _kernel("layer_norm", 9.0, 1.0, 12),
    ]
    gemm = (2.0 * 3 + 1.0 * 6) / (200 * 3 + 50 * 6)
    assert kappa(kernels) == pytest.approx((1 / 40) / gemm)
    with pytest.raises(NumericError, match="no time per FLOP of 'attention'"):
        kappa(kernels[:2])


@pytest.fixture(scope="module")
def minilm() -> models.LoadedModel:
    return models.load("minilm")


@pytest.mark.needs_weights
def test_nested_encoder_is_the_same_model(minilm: models.LoadedModel) -> None:
    batches = fill_set(4, 24, 0.5).batches
    with torch.inference_mode():
        encoder = nested.build(minilm.model, batches[0])
        found = minilm.metric.compare(
            *(outputs(call, batches, minilm.metric) for call in (minilm.model, encoder)), batches
        )
    assert found["max_abs"] < 1e-5


@pytest.mark.needs_weights
def test_nested_encoder_off_its_fast_path_is_refused(minilm: models.LoadedModel) -> None:
    batch = {name: tensor.flip(1) for name, tensor in fill_set(4, 24, 0.5).batches[0].items()}
    with torch.inference_mode(), pytest.raises(NumericError, match="0 of 6 layers"):
        nested.build(minilm.model, batch)


@dataclass(frozen=True)
class _Time:
    name: str
    op: str
    shape: tuple[int, ...]
    ms: float
    flops: int
    calls: int


class _Compiled:
    """Eager with the compiled model's methods; ``shift`` is added to its token states."""

    def __init__(self, model: torch.nn.Module, shift: float) -> None:
        self.model, self.shift = model, shift

    def __call__(self, **inputs: torch.Tensor) -> Any:
        return (self.model(**inputs).last_hidden_state + self.shift,)

    def kernels(self, inputs: dict[str, torch.Tensor], repeats: int = 20) -> list[_Time]:
        rows, seq = inputs["input_ids"].shape
        return [
            _Time("gemm_0", "gemm", (rows * seq, 384, 384), 1.0, 2 * rows * seq * 384 * 384, 18),
            _Time("attention_0", "attention", (rows, 12, seq, seq, 32), 0.5, 4 * rows * seq * seq * 384, 6),
        ]


Quick = Callable[..., result.BenchResult]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, without_peers: None) -> Quick:
    """The benchmark on a few short batches; ``passes`` collects what each build was compiled with."""
    monkeypatch.setattr(limits, "measure", lambda _: {"avx2": 100.0, "read": 20.0})
    options = padding.Options(torch.get_num_threads(), 7, lengths=(16,), fills=(0.5, 1.0), rows=4, docs=8, max_len=24)

    def go(passes: list[Any], padded_shift: float = 0.0) -> result.BenchResult:
        def stand_in(model: torch.nn.Module, inputs: object, **given: Any) -> _Compiled:
            passes.append(given.get("passes"))
            return _Compiled(model, padded_shift if "passes" in given else 0.0)

        return padding.run(options, stand_in, lambda _: None)

    return go


@pytest.mark.needs_weights
@pytest.mark.slow
def test_json_has_the_schema(quick: Quick, tmp_path: Path) -> None:
    passes: list[Any] = []
    quick(passes).write(tmp_path / "bench.json")
    read: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    assert passes[0] is None, "the default build is the one that counts"
    assert builds.REMOVES_PADDING not in passes[1]
    assert {"canonicalize", "fuse-groups"} <= set(passes[1])
    assert read["bench"] == "padding"
    assert read["absent"] == [
        {"name": CTRANSLATE2, "reason": "package ctranslate2 is not installed (pip install 'planish[peers]')"}
    ]
    few, several = ("eager", nested.NESTED, PADDED), ("eager-sorted", f"{PADDED}-sorted")
    wanted = {"fill 0.5 x16": few, "fill 1 x16": few, "uniform x16": (*few, *several), "documents": (*few, *several)}
    names = [f"{who} {label}" for label, whose in wanted.items() for who in (*whose, PACKED)]
    assert [row["name"] for row in read["rows"]] == names
    for row in read["rows"]:
        assert row["name"].endswith(row["set"])
        assert set(row["quality"]) == {"cosine_min", "cosine_mean", "max_abs"}
        assert row["quality"]["max_abs"] < 1e-5
        assert len(row["rounds_ms"]) == 7
        rivals = {key.removeprefix("claim_") for key in row if key.startswith("claim_")}
        assert rivals == (set(wanted[row["set"]]) - {"eager"} if row["name"].startswith(PACKED) else set())
    assert [found["set"] for found in read["sets"]] == list(wanted)
    ratio = (0.5 / (4 * 4 * 16 * 16 * 384)) / (1.0 / (2 * 4 * 16 * 384 * 384))
    half, full = read["sets"][:2]
    assert half["kappa"] == pytest.approx(ratio)
    assert (half["f1"], half["tokens"], half["batches"]) == (0.5, 32, [[4, 16]])
    assert half["speedup"] == pytest.approx((1 + half["a"]) / (0.5 + half["a"] * half["f2"]))
    assert full["speedup"] == 1
    for found in read["sets"]:
        low, high = found["measured_ci95"]
        assert low <= found["measured"] <= high
        assert found["measured_to_expected"] == pytest.approx(found["measured"] / found["speedup"])
    assert {tuple(k["batch"]) for k in read["kernels"]} == {(4, 16), (4, 24)}
    assert set(read["lee_pearson"]) == {"eager", PADDED, PACKED}
    assert read["lee_pearson"]["eager"] == pytest.approx(0.60, abs=0.02), "24 tokens of each document"
    console = Console(width=220, record=True, file=io.StringIO())
    report.show(read, console)
    text = console.export_text()
    assert "fill 1 x16: packed takes" in text
    assert "fill 0.5 x16: packed takes" not in text
    assert "1 of 4x16" in text
    assert "Pearson correlation with human ratings" in text


@pytest.mark.needs_weights
def test_wrong_values_are_no_result(quick: Quick) -> None:
    with pytest.raises(NumericError, match=r"planish-fp32-padded differs from eager by 2.0e-03 on 'fill 0.5 x16'"):
        quick([], padded_shift=2e-3)


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 7"):
        padding.Options(threads=1, rounds=6)
