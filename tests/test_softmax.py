"""rewrite-softmax and its kernels: every schedule against eager on awkward rows, what is chosen, what is dropped."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import planish
from planish import passes, targets
from planish.backends.tvm.softmax import chunk_size
from planish.capture import capture
from planish.ops import planish_ops
from planish.passes.softmax import choose
from planish.pipeline import Step, run_pipeline
from planish.printer import program_text
from planish.program import Dim, Program
from planish.targets import TARGETS, Target

GOLDEN = Path(__file__).with_name("golden")
INF, NAN, LOWEST = float("inf"), float("nan"), torch.finfo(torch.float32).min
SCHEDULES = ("three-pass", "two-pass", "two-pass-stream")
KINDS: dict[str, Callable[..., torch.Tensor]] = {"softmax": torch.softmax, "log_softmax": torch.log_softmax}


@pytest.fixture(params=["cpu-avx512", "cpu-avx2"])
def target(request: pytest.FixtureRequest) -> Target:
    """A level with small caches, so that a row of 4,099 elements has several chunks."""
    found = TARGETS[request.param]
    if found.isa not in targets.host_isa_levels():
        pytest.skip(f"this machine lacks {found.isa}, which target {found.name} needs")
    return replace(found, l2_bytes=1 << 14, llc_bytes=1 << 16)


class Function(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def forced(kind: str, schedule: str, limit: int = 0) -> Function:
    """One softmax with a schedule that the pass has not chosen."""
    return Function(lambda x: getattr(torch.ops.planish, kind)(x, schedule, limit))


def awkward(size: int, rows: int = 20) -> torch.Tensor:
    """Rows of masks in all their spellings, of numbers that fp32 cannot tell apart, and of nothing that is a number."""
    g = torch.Generator().manual_seed(size)
    x = torch.randn(rows, size, generator=g) * 4
    some = torch.rand(size, generator=g) < 0.5
    for row, fill in ((1, -INF), (2, LOWEST), (3, -1e30), (4, 1e30), (5, -1e7), (6, 1e7)):
        x[row, some] = fill
    for row, fill in ((7, -INF), (8, LOWEST), (9, -1e30), (10, 0.25), (11, INF)):
        x[row] = fill
    x[12, size // 2], x[13, size // 3] = NAN, INF
    x[14] = x[14] * 1e6
    x[15] = x[15] * 30  # most of it is rounded to 0
    x[16, : size // 2] = -INF  # whole chunks of nothing
    x[17] = x[17] - 1e4
    x[18, size - 1] = NAN
    return x


# Kernels -------------------------------------------------------------------------------------------------------------


WAYS = [(kind, schedule) for kind in KINDS for schedule in SCHEDULES]


def every(limit: int = 0) -> Function:
    """All schedules of both, in one model: one compile."""
    return Function(lambda x: [getattr(torch.ops.planish, k)(x, s, limit) for k, s in WAYS])


def check(x: torch.Tensor, results: Sequence[torch.Tensor]) -> None:
    """Compare with eager: fp32 rounds x - max alike, so even the smallest probabilities agree."""
    want = {kind: function(x, -1) for kind, function in KINDS.items()}
    for (kind, schedule), got in zip(WAYS, results, strict=True):
        atol = 2e-38 if kind == "softmax" else 1e-6
        where = f"{schedule} {kind} of {list(x.shape)}: "
        torch.testing.assert_close(
            got, want[kind], rtol=4e-6, atol=atol, equal_nan=True, msg=lambda m, where=where: where + m
        )


@pytest.mark.parametrize("size", [1, 7, 16, 1000, 4099])
def test_awkward_rows_give_what_eager_gives(size: int, target: Target) -> None:
    x = awkward(size)
    results = planish.compile(every(), (x,), target)(x)
    check(x, results)
    if size > chunk_size(target):  # fewer rows are computed one after the other, by chunks
        few = x[: target.shared_rows - 1]
        for whole, split in zip(results, planish.compile(every(), (few,), target)(few), strict=True):
            assert torch.equal(split.nan_to_num(7.0), whole[: target.shared_rows - 1].nan_to_num(7.0))


def test_any_length_at_run_time(target: Target) -> None:
    """One kernel for all lengths: short rows, those up to the limit, those beyond; also with one dimension."""
    dims = {"x": {1: Dim("n", 1, 5000)}}
    compiled = planish.compile(every(2500), (awkward(1024),), target, dynamic=dims)
    line = planish.compile(every(2500), (torch.randn(3000),), target, dynamic={"x": {0: Dim("n", 1, 5000)}})
    for size in (1, 15, 17, 1024, 1025, 2500, 2501, 4999):
        x = awkward(size)
        check(x, compiled(x))
        check(x[0], line(x[0]))


@pytest.mark.parametrize("size", [33, 4099])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_ops_before_and_after(kind: str, schedule: str, size: int, target: Target) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        scores = (x.transpose(0, 1) * 0.5).masked_fill(x.transpose(0, 1) > 3, -INF)
        return torch.relu(getattr(torch.ops.planish, kind)(scores, schedule, 0) * 3 + 1)

    x = torch.randn(size, 17)
    compiled = planish.compile(Function(function), (x,), target)
    assert sum(call.op == kind for call in compiled._compiled.calls) == 1  # pyright: ignore
    torch.testing.assert_close(compiled(x), function(x), rtol=2e-6, atol=2e-6)


def test_half_scores_become_floats_first(target: Target) -> None:
    x = torch.randn(5, 2000).half()
    compiled = planish.compile(Function(lambda x: torch.softmax(x, -1, dtype=torch.float32)), (x,), target)
    torch.testing.assert_close(compiled(x), torch.softmax(x.float(), -1), rtol=4e-6, atol=2e-38)


@pytest.mark.parametrize("size", [7, 4099])
def test_statistics(size: int, target: Target) -> None:
    """From memory and through a view, whose row is written down first."""

    def function(x: torch.Tensor) -> Any:
        return [torch.ops.planish.softmax_statistics(v, s, 0) for v in (x, x.flip(-1)) for s in SCHEDULES]

    x = awkward(size)
    for part in (x, x[:9]):
        for got, want in zip(planish.compile(Function(function), (part,), target)(part), function(part), strict=True):
            torch.testing.assert_close(got, want, rtol=4e-6, atol=0, equal_nan=True)


def test_same_bits_at_every_thread_count(target: Target) -> None:
    before = torch.get_num_threads()
    try:
        for x in (torch.randn(1, 10_000), torch.randn(40, 3000)):
            compiled = planish.compile(every(), (x,), target)
            results: list[list[torch.Tensor]] = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(compiled(x))
            assert all(torch.equal(a, b) for r in results for a, b in zip(results[0], r, strict=True))
    finally:
        torch.set_num_threads(before)


def test_long_sums_stay_accurate(target: Target) -> None:
    """Equal addends are the worst case of a running fp32 sum: every rounding has the same sign."""
    x = torch.full((1, 3_000_001), 0.3)
    for (kind, _), got in zip(WAYS, planish.compile(every(), (x,), target)(x), strict=True):
        want = KINDS[kind](x.double(), -1)
        assert float(((got - want) / want).abs().max()) <= 2e-6


def test_only_streams_store_past_the_caches(target: Target) -> None:
    x = torch.randn(2, 4096)
    for schedule in SCHEDULES:
        objects = planish.compile(forced("softmax", schedule), (x,), target)._compiled.executable.objects  # pyright: ignore
        assembly = "".join(o.assembly for o in objects)
        assert ("vmovntps" in assembly) == (schedule == "two-pass-stream")
        assert ("sfence" in assembly) == (schedule == "two-pass-stream")


def test_a_chunk_and_its_result_fit_the_second_level_cache() -> None:
    assert chunk_size(TARGETS["cpu-avx512"]) == 1 << 15
    assert chunk_size(TARGETS["cpu-avx2"]) == 1 << 14


# What is chosen ------------------------------------------------------------------------------------------------------

WIDE = TARGETS["cpu-avx512"]


def captured(function: Callable[..., Any], x: torch.Tensor, dynamic: dict[int, Dim] | None = None) -> Program:
    return capture(Function(function), (x,), {"x": dynamic} if dynamic else None)[0]


def rewritten(program: Program, to: Target = WIDE) -> tuple[Program, Step]:
    after, steps = run_pipeline(program, passes.resolve(["canonicalize", "rewrite-softmax"]), to, check_values=True)
    return after, steps[-1]


def called(program: Program) -> list[str]:
    return [str(n.target) for n in program.nodes() if n.op == "call_function"]


def sampled(x: torch.Tensor) -> Any:
    """Probabilities, and the two best of another row of them."""
    best = torch.topk(torch.log_softmax(x * 2, -1), 2)
    return torch.softmax(x, -1), best.values, best.indices


def test_golden_program(update_golden: bool) -> None:
    program, _ = rewritten(captured(sampled, torch.randn(3, 64), {1: Dim("n", 8, 1 << 23)}))
    text, path = program_text(program, sources=False), GOLDEN / "softmax.py.txt"
    if update_golden:
        path.write_text(text)
    assert text == path.read_text()


def test_a_second_run_rewrites_nothing() -> None:
    once, step = rewritten(captured(sampled, torch.randn(3, 64)))
    assert step.rewrites == {"softmax scheduled": 1, "softmax dropped": 2}
    _, again = rewritten(once)
    assert again.rewrites == {}


@pytest.mark.parametrize(
    ("shape", "dims", "schedule", "limit"),
    [
        ((1, 2048), None, "three-pass", 0),
        ((1, 1 << 21), None, "three-pass", 0),
        ((1, (1 << 21) + 1), None, "two-pass-stream", 0),
        ((16, 1 << 18), None, "three-pass", 0),
        ((16, (1 << 18) + 1), None, "two-pass-stream", 0),
        ((2, 50), {1: Dim("n", 1, 1 << 21)}, "three-pass", 0),
        ((2, 50), {1: Dim("n", 1, 1 << 22)}, "two-pass-stream", 1 << 21),
        ((2, 50), {0: Dim("b", 1, 16), 1: Dim("n", 1, 1 << 22)}, "two-pass-stream", 1 << 18),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_row_decides(kind: str, shape: tuple[int, ...], dims: Any, schedule: str, limit: int) -> None:
    """A single row has the whole last-level cache (32 MiB here); 16 rows share it between 8 cores."""
    program = captured(lambda x: x, torch.randn(2, 50) if dims else torch.empty(shape), dims)
    x = next(n for n in program.nodes() if n.op == "placeholder")
    choice = choose(program, WIDE, kind, x, stream=True)
    assert (choice.schedule, choice.limit) == (schedule, limit)
    assert choice.why.startswith(schedule)
    assert re.search(r"modelled for one thread of cpu-avx512: three passes [\d.]+ ns", choice.why)


def test_a_result_that_is_read_at_once_stays_in_the_caches() -> None:
    program = captured(lambda x: (torch.softmax(x, -1), torch.softmax(x * 2, -1).sum(-1)), torch.zeros(1, 1 << 22))
    after, _ = run_pipeline(program, passes.resolve(["canonicalize"]), WIDE)
    after, step = run_pipeline(after, passes.resolve(["rewrite-softmax"]), WIDE)
    found = [n.args[1] for n in after.nodes() if n.target is planish_ops.softmax.default]
    assert found == ["two-pass-stream", "two-pass"]
    assert [n.rule for n in step[-1].notes] == ["softmax scheduled"] * 2


def test_vectors_of_four_make_a_second_exponential_dearer_than_memory() -> None:
    program = captured(lambda x: torch.softmax(x, -1), torch.zeros(1, 1 << 24))
    x = next(n for n in program.nodes() if n.op == "placeholder")
    avx2 = TARGETS["cpu-avx2"]
    assert choose(program, avx2, "softmax", x, stream=True).schedule == "two-pass-stream"
    assert choose(program, replace(avx2, vector_bytes=16), "softmax", x, stream=True).schedule == "three-pass"


def test_what_has_no_schedule_says_why() -> None:
    program = captured(lambda x: torch.softmax(x, -1), torch.randn(3, 64))
    after, step = rewritten(program, TARGETS["reference"])
    assert called(after) == ["aten.softmax.int"]
    assert [r.reason for r in step.refusals] == ["the target 'reference' has no caches to choose by"]


def test_attention_is_named() -> None:
    heads = torch.randn(1, 2, 8, 8)
    _, step = rewritten(captured(lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x), heads))
    assert [n.rule for n in step.notes] == ["attention"]
    assert "scores that never leave the cache" in step.notes[0].text

    def spelled_out(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.softmax(x @ x.transpose(-1, -2) * 0.3, -1)
        return weights, weights @ x

    spelled = captured(spelled_out, heads)
    _, step = rewritten(spelled)
    assert any("it is attention spelled out" in r.reason for r in step.refusals)
    assert step.rewrites == {"softmax scheduled": 1}


# What is dropped -----------------------------------------------------------------------------------------------------


def ties() -> torch.Tensor:
    """Awkward rows in fp32, and rows of equal elements."""
    x = awkward(64)
    x[19] = torch.randint(0, 3, (64,)).float()
    x[0, 10], x[0, 40] = 20.0, 20.0
    return x


READERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "argmax": lambda p: p.argmax(-1),
    "argtopk": lambda p: torch.ops.planish.argtopk(p, 3, True),
    "topk": lambda p: torch.topk(p, 3),
    "gather": lambda p: p.gather(-1, torch.arange(16).expand(20, 16) * 3),
    "select": lambda p: p[..., 5],
    "several": lambda p: (p[..., 0], p.argmax(-1), torch.topk(p, 2).values),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_single_places_do_without_the_row(kind: str, reader: str, target: Target) -> None:
    """The runner compares in fp64, here on rows of NaN, infinities, masks and ties."""
    program = captured(lambda x: READERS[reader](KINDS[kind](x, -1)), ties())
    after, step = rewritten(program)
    assert not any(name.endswith(("softmax.default", "softmax.int")) for name in called(after))
    assert step.rewrites["softmax dropped"] >= 1
    assert "the row of results is never written" in step.notes[0].text
    model = Function(lambda x: READERS[reader](KINDS[kind](x, -1)))
    x = torch.randn(20, 64)
    want, got = model(x), planish.compile(model, (x,), target)(x)
    for w, g in zip(*((v if isinstance(v, tuple) else (v,)) for v in (want, got)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)


def test_rows_that_are_written_anyway_keep_their_readers() -> None:
    program = captured(lambda x: (torch.softmax(x, -1) * 2, torch.softmax(x, -1).argmax(-1)), torch.randn(3, 64))
    after, step = rewritten(program)
    assert "aten.argmax.default" in called(after)
    assert "planish.softmax.default" in called(after)
    assert [r.reason for r in step.refusals] == ["the whole row is written anyway, for mul"]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda p: p.argmin(-1), "among the smallest"),
        (lambda p: torch.topk(p, 2, largest=False).indices, "among the smallest"),
        (lambda p: p.sort(-1).indices, "among the smallest"),
        (lambda p: p.gather(-1, torch.zeros(3, 9, dtype=torch.int64)), "it reads 9 elements of rows of 32"),
        (lambda p: p.gather(-1, torch.zeros(2, 1, dtype=torch.int64)), "its index leaves rows out"),
    ],
    ids=["argmin", "smallest", "sort", "wide", "rows"],
)
def test_what_is_not_dropped_says_why(function: Callable[..., Any], reason: str) -> None:
    after, step = rewritten(captured(lambda x: function(torch.softmax(x, -1)), torch.randn(3, 32)))
    assert "planish.softmax.default" in called(after)
    assert any(r.reason.startswith(reason) for r in step.refusals)


def test_whole_rows_are_not_dropped() -> None:
    for function in (lambda p: p.sum(-1), lambda p: p.argmax(), lambda p: p[0], lambda p: p.gather(0, p.long()[:1])):
        after, step = rewritten(captured(lambda x, f=function: f(torch.softmax(x, -1)), torch.randn(3, 32)))
        assert "softmax dropped" not in step.rewrites
        assert "planish.softmax.default" in called(after)


# Where it is shown ---------------------------------------------------------------------------------------------------


def test_the_choice_is_in_dump_and_report(tmp_path: Path) -> None:
    x = torch.randn(3, 64)
    compiled = planish.compile(Function(lambda x: torch.softmax(x, -1)), (x,), "cpu", dump=tmp_path)
    (why,) = tmp_path.glob("*rewrite-softmax.why.txt")
    text = why.read_text()
    assert text.startswith("softmax scheduled at softmax_default: three-pass: rows of 64 elements")
    assert "modelled for one thread of cpu: three passes" in text
    assert "\n  at: test_softmax.py:" in text
    assert "softmax scheduled at softmax_default: three-pass" in compiled.report()
    assert "1 decided" in (tmp_path / "index.html").read_text()
    (stage,) = tmp_path.glob("*rewrite-softmax.py")
    assert "import planish.ops" in stage.read_text()
    assert "planish.softmax.default(x, 'three-pass', 0)" in stage.read_text()


def test_the_last_level_cache_is_read_from_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = Target.parse("cpu")
    assert host.llc_bytes >= host.l2_bytes > 0
    assert host.cores > 0
    files = {"0/level": "2", "0/size": "1024K", "1/level": "3", "1/size": "98304K", "1/shared_cpu_list": "0-1,8\n"}
    for name, text in files.items():
        file = tmp_path / f"index{name}"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(targets, "CACHES", tmp_path)
    monkeypatch.setattr(targets.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert (Target.host().llc_bytes, Target.host().cores) == (96 << 20, 2)
    monkeypatch.setattr(targets, "CACHES", tmp_path / "none")
    assert Target.host().llc_bytes == TARGETS[f"cpu-{Target.host().isa}"].llc_bytes
