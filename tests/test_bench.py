"""planish.bench: statistics, limits, and the encoder benchmark's schema on a stand-in for the compiled model."""

import dataclasses
import io
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import planish
from planish.backends.tvm import executable
from planish.bench import (
    encoder,
    inductor,
    latency,
    limits,
    memory,
    nncf_peer,
    overhead,
    precision,
    qgemm,
    report,
    result,
    softmax,
)
from planish.bench.builds import MIXED, PACKED
from planish.bench.int8_peers import ONNXRUNTIME_INT8, TORCH_INT8
from planish.bench.kernels import kernel_rows, with_shares
from planish.bench.latency import Ratio, interleave, speedup
from planish.bench.peer import COMPUTE
from planish.errors import TargetError, ToolchainError, UnknownNameError
from planish.models.smollm2 import perplexity
from planish.passes.precision.loss import Loss
from planish.passes.precision.sensitivity import Sample

_MS = st.lists(st.floats(0.5, 50.0), min_size=7, max_size=20)


def test_interleave_rotates_and_warms_up() -> None:
    order: list[str] = []
    times = interleave({n: lambda n=n: order.append(n) for n in "abc"}, rounds=4, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "cba"
    assert {name: len(ms) for name, ms in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(t >= 0 for ms in times.values() for t in ms)


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_each_call_follows_each_other_one_equally_often(count: int) -> None:
    order: list[int] = []
    interleave({str(n): lambda n=n: order.append(n) for n in range(count)}, rounds=2 * count, warmup=0)
    rounds = [order[i : i + count] for i in range(0, len(order), count)]
    assert all(sorted(one) == list(range(count)) for one in rounds)
    pairs = Counter(pair for one in rounds for pair in pairwise(one))
    assert len(pairs) == count * (count - 1)
    assert set(pairs.values()) == {2}


def test_a_pause_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: round(now * 1e9))
    monkeypatch.setattr(latency.time, "sleep", advance)
    times = interleave({"a": lambda: advance(0.002), "b": lambda: advance(0.004)}, rounds=3, pause=0.05)
    assert times == {"a": pytest.approx([2.0] * 3), "b": pytest.approx([4.0] * 3)}
    assert now == pytest.approx(4 * 0.006 + 6 * 0.05)


@given(_MS, st.floats(1.5, 4.0))
def test_a_constant_factor_is_found_exactly(base: list[float], factor: float) -> None:
    ratio = speedup([b * factor for b in base], base)
    assert ratio.low <= ratio.value * (1 + 1e-9)
    assert ratio.value <= ratio.high * (1 + 1e-9)
    assert ratio.value == pytest.approx(factor)


@given(_MS)
def test_the_same_times_give_no_claim(base: list[float]) -> None:
    assert speedup(base, base) == Ratio(1.0, 1.0, 1.0)
    assert speedup(base, base).claim("eager") == "no claim"


def test_speedup_is_seeded_and_claims_only_what_is_decided() -> None:
    noise = [1.0, 1.3, 0.8, 1.1, 0.9, 1.2, 1.0, 0.7, 1.4]
    shuffled = noise[4:] + noise[:4]
    assert speedup(noise, shuffled, seed=1) == speedup(noise, shuffled, seed=1)
    assert not speedup(noise, shuffled).decided
    assert speedup([2 * n for n in noise], [1.0] * 9).claim("eager").endswith("x eager")
    assert speedup([0.5] * 9, noise).claim("eager").startswith("slower: ")
    with pytest.raises(ValueError, match="same rounds"):
        speedup(noise, noise[1:])


def test_limits_measure_this_machine() -> None:
    with limits.probe(1) as tool:
        run = {isa: tool.fma(isa, 0.1) for isa in ("avx2",)} | {"read": tool.read(0.2, 64)}
        with pytest.raises(ToolchainError, match="exited with 2"):
            limits.Probe(tool.program, 0).fma("avx2", 0.1)
    assert not tool.program.exists()
    assert 5 < run["avx2"] < 1000, "one core does between 5 and 1000 GFLOP/s"
    assert 0.5 < run["read"] < 5000
    found = limits.combine({"avx2": 10.0, "avx512": 30.0, "read": 5.0}, {"avx2": 12.0, "avx512": 20.0, "read": 6.0})
    assert found["fma_gflops"] == 30.0
    assert found["isa"] == "avx512"
    assert found["read_gbs"] == 6.0
    assert found["fma_gflops_by_isa"] == {"avx2": 12.0, "avx512": 30.0}
    assert found["fma_gflops_runs"] == [30.0, 20.0]


def test_limits_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "limits"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    with pytest.raises(TargetError, match="lacks the instructions"):
        limits.Probe(fake, 1).fma("avx512")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(limits.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ToolchainError, match="no C compiler"), limits.probe(1):
        pass


@dataclass(frozen=True)
class _Time:
    name: str
    op: str
    shape: tuple[int, ...]
    ms: float
    flops: int
    calls: int


class _Compiled:
    """Eager with the compiled model's methods."""

    assignment = None

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        return self.model(*args, **kwargs)

    def kernels(self, inputs: dict[str, torch.Tensor], repeats: int = 20) -> list[_Time]:
        if isinstance(self.model, torch.nn.Linear):
            rows, n, k = len(inputs["input"]), self.model.out_features, self.model.in_features
            return [_Time("gemm", "gemm", (rows, n, k), 1.0, 2 * rows * n * k, 1)]
        rows = inputs["input_ids"].numel()
        return [
            _Time("layer_norm", "norm", (rows, 384), 0.1, 0, 12),
            _Time("gemm", "linear", (rows, 1536, 384), 1.0, 2 * rows * 1536 * 384, 6),
        ]

    def memory(self, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
        return {"arena_bytes": 3 << 20, "intermediates_bytes": 9 << 20, "weights_bytes": 86 << 20}


def _compile(model: torch.nn.Module, inputs: object = None, **_: object) -> _Compiled:
    return _Compiled(model)


def test_kernel_rows_give_the_share_of_the_peak() -> None:
    batch = {"input_ids": torch.zeros(4, 250, dtype=torch.int64)}
    gemm, norm = with_shares(kernel_rows(_Compiled(torch.nn.Identity()), [batch]), 2000.0)
    assert (gemm.name, gemm.shape, gemm.batch, gemm.calls) == ("gemm", [1000, 1536, 384], [4, 250], 6)
    assert gemm.gflops == pytest.approx(2 * 1000 * 1536 * 384 / 1e6)
    assert gemm.share_of_limit == pytest.approx(gemm.gflops / 2000.0)
    assert (norm.gflops, norm.share_of_limit) == (0.0, None)


def test_softmax_rows_show_every_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "ELEMENTS", 4096)
    monkeypatch.setattr(softmax, "ROUND", 8192)
    monkeypatch.setattr(softmax, "LENGTHS", (2048,))
    monkeypatch.setattr(softmax, "_keep_freed_memory", lambda: None)
    monkeypatch.setattr(softmax.inductor, "build", lambda model, batches: "no compiler")
    monkeypatch.setattr(limits, "measure", lambda tool: {"avx2": 100.0, "read": 20.0})
    before = torch.get_num_threads()
    try:
        found = softmax.run(softmax.Options(threads=before, rounds=7), planish.compile, lambda phase: None)
    finally:
        torch.set_num_threads(before)
    rows = {row.name: row for row in found.rows}
    assert len(rows) == 2 * (3 + len(softmax.FORCED))
    for kind in softmax.KINDS:
        own = rows[f"planish-fp32 {kind} 2x2048"]
        assert own.extra["schedule"] == "three-pass"
        assert own.quality["max_rel"] <= 2e-6
        assert own.extra["shape"] == [2, 2048]
        assert own.extra["ns_per_element"] == pytest.approx(own.ms_median * 1e6 / 8192)
        assert own.extra["share_of_read"] == pytest.approx(8 / own.extra["ns_per_element"] / 20.0)
        assert "ratio_to_planish three-pass_ci95" in rows[f"planish two-pass-stream {kind} 2x2048"].extra
    assert found.absent[0] == {"name": "inductor softmax 2x2048", "reason": "no compiler"}
    text = io.StringIO()
    report.show(json.loads(json.dumps(found.to_dict())), Console(file=text, width=200))
    assert "planish two-pass-stream log_softmax 2x2048" in text.getvalue()
    with pytest.raises(UnknownNameError, match="no kind 'soft'"):
        softmax.Options(1, 7, ("soft",))


def test_no_cxx_means_no_inductor_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = inductor.build(torch.nn.Linear(2, 2), [])
    assert isinstance(reason, str)
    assert "no-such-compiler" in reason


@pytest.mark.needs_cxx
@pytest.mark.slow
def test_inductor_keeps_the_faster_mode() -> None:
    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.linear(x))

    model, batch = Small().eval(), {"x": torch.randn(3, 8)}
    with torch.inference_mode():
        rival = inductor.build(model, [batch])
        assert isinstance(rival, inductor.Inductor)
        assert set(rival.trial_ms) == {"default", "freezing"}
        assert rival.trial_ms[rival.mode] == min(rival.trial_ms.values())
        torch.testing.assert_close(rival.call(**batch), model(**batch))


def test_overhead_figures_of_eager_against_itself() -> None:
    figures = overhead.call_overhead(_compile, calls=50, chunks=5)
    assert 0 < figures["call_us"] < 10_000
    after = overhead.after_torch_op(lambda x: x @ x, {"x": torch.ones(64, 64)}, rounds=8)
    assert after["after_torch_op_ci95"][0] <= after["after_torch_op_ratio"] <= after["after_torch_op_ci95"][1]
    assert after["ms_alone"] > 0


def test_the_two_op_model_has_two_ops() -> None:
    exported = torch.export.export(overhead.TwoOps().eval(), (torch.ones(1, 64),))
    assert sum(node.op == "call_function" for node in exported.graph.nodes) == 2


def test_high_water_mark_sees_memory_that_is_gone() -> None:
    before = memory.high_water_mark()
    block = torch.ones(256 << 20, dtype=torch.uint8)
    del block
    assert memory.high_water_mark() > 200 << 20
    assert memory.high_water_mark() >= before


def test_a_failing_child_shows_its_error() -> None:
    with pytest.raises(memory.ChildError, match="unknown model 'nothing'"):
        memory.peak("eager", "nothing", 1, 1)


@pytest.mark.needs_weights
@pytest.mark.slow
def test_peak_of_a_child_does_not_count_its_parent() -> None:
    block = torch.ones(3 << 30, dtype=torch.uint8)
    marks = memory.peak("eager", "minilm", 1, 2)
    assert list(marks) == ["after_load", "after_compile", "after_run"]
    assert 80 << 20 < marks["after_load"] <= marks["after_compile"] <= marks["after_run"] < block.nbytes


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, without_peers: None) -> Callable[[], result.BenchResult]:
    """The encoder benchmark on two documents, without its rivals and without measuring processes."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(
        memory, "peak", lambda *_: {"after_load": 1 << 20, "after_compile": 2 << 20, "after_run": 3 << 20}
    )
    monkeypatch.setattr(limits, "measure", lambda _: {"avx2": 100.0, "read": 20.0})
    options = encoder.Options(threads=torch.get_num_threads(), rounds=7, docs=2, batch=1, max_len=24)
    return lambda: encoder.run(options, _compile, lambda _: None)


@pytest.mark.needs_weights
def test_encoder_json_has_the_schema(quick: Callable[[], result.BenchResult], tmp_path: Path) -> None:
    found = quick()
    file = tmp_path / "bench.json"
    found.write(file)
    read = json.loads(file.read_text())
    assert {"bench", "machine", "threads", "limits", "rows", "kernels", "absent"} <= set(read)
    assert (read["bench"], read["threads"]) == ("encoder", torch.get_num_threads())
    assert {"fma_gflops": 100.0, "read_gbs": 20.0}.items() <= read["limits"].items()
    exact = ["eager", "planish-fp32-padded", "planish-fp32-packed"]
    integer = ["planish-int8", "planish-int4", "planish-w6a8", "planish-mixed"]
    assert [row["name"] for row in read["rows"]] == ["eager", TORCH_INT8, *exact[1:], *integer]
    for row in read["rows"]:
        assert {"ms_median", "ms_min", "ratio_to_eager", "ratio_ci95", "quality"} <= set(row)
        assert set(row["quality"]) == {"cosine_min", "cosine_mean", "max_abs", "pearson"}
        assert 0 < row["ms_min"] <= row["ms_median"]
        low, high = row["ratio_ci95"]
        assert low <= row["ratio_to_eager"] <= high
        assert len(row["rounds_ms"]) == 7
    assert read["rows"][0]["ratio_to_eager"] == 1.0
    rows = {row["name"]: row for row in read["rows"]}
    for name in exact + integer:
        pearson = rows["eager"]["quality"]["pearson"]
        want = {"cosine_min": 1.0, "cosine_mean": 1.0, "max_abs": 0.0, "pearson": pearson}
        assert rows[name]["quality"] == pytest.approx(want, abs=2e-5)
    assert rows[TORCH_INT8]["quality"]["cosine_min"] < 0.99
    assert "claim_planish-fp32-padded" in rows["planish-fp32-packed"]
    for kernel in read["kernels"]:
        assert {"name", "shape", "ms", "gflops", "share_of_limit"} <= set(kernel)
    assert {tuple(k["batch"]) for k in read["kernels"] if k["name"] != "linear"} == {(1, 24), (1, 64), (7, 143)}
    assert {k["shape"][0] for k in read["kernels"] if k["name"] == "linear"} == {64, 1001, 4096}
    assert [absent["name"] for absent in read["absent"]] == ["inductor", *PEERS]
    assert "no-such-compiler" in read["absent"][0]["reason"]
    extras = {"call_us", "after_torch_op_ratio", "compile_s", "second_compile_s", "memory", "peers"}
    assert extras <= set(read)
    assert read["memory"]["peak_rss"]["planish"]["after_run"] == 3 << 20
    text = _printed(read)
    assert "no inductor row: no C++ compiler" in text
    assert "planish-fp32-packed" in text
    assert "1000x1536x384" not in text
    assert "1001x1536x384" in text
    assert "arena: 3.0 MiB for 9.0 MiB of intermediates (33%)" in text


def test_the_mixed_build_is_foretold_by_the_layers_of_a_calibration_batch() -> None:
    """fp32 takes 100; of its 60 for the layers of two calls, the formats save 30."""

    class Loaded:
        class data:
            @staticmethod
            def batches(docs: int, rows: int) -> list[dict[str, torch.Tensor]]:
                return [{"attention_mask": torch.ones(rows, 10)} for _ in range(docs // rows)]

    assignment: Any = dataclasses.make_dataclass("A", ["ms", "ms_fp32"])(15.0, 30.0)
    rows: Any = [
        dataclasses.make_dataclass("R", ["name", "ms_median"])(n, ms) for n, ms in ((PACKED, 100.0), (MIXED, 80.0))
    ]
    timed = [{"attention_mask": torch.ones(16, 10)}] * 2
    found = encoder._predicted(Loaded(), assignment, timed, rows)  # pyright: ignore
    assert found == {"foretold": 70.0, "measured": 80.0, "ratio": 0.875}
    assert encoder._predicted(Loaded(), None, timed, rows) == {}  # pyright: ignore


@pytest.mark.needs_weights
def test_precision_on_a_few_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "WEIGHTS", ("w8", "w3-g32"))
    monkeypatch.setattr(precision, "SUBJECTS", {"minilm": precision.Subject(4, 24, ("w3-g32",), (5.0,))})
    options = precision.Options(torch.get_num_threads(), 1)
    found = precision.run(options, planish.compile, lambda phase: None).to_dict()
    by_scorer = {row["scorer"]: row for row in found["scorers"]}
    assert by_scorer["direct"]["spearman"] == pytest.approx(1.0)
    assert by_scorer["Gauss-Newton"]["spearman_within"]["w3-g32"] > 0.8
    losses = {(row["scorer"], round(row["bits"], 1)): row["held_out"] for row in found["assignments"]}
    assert losses["Gauss-Newton", 5.0] < losses["uniform w3-g32", 3.3]
    assert losses["Gauss-Newton, GPTQ", 5.0] < losses["Gauss-Newton", 5.0]
    assert losses["Gauss-Newton, refined, pairs, swaps, GPTQ", 5.0] < losses["weight error", 5.0]
    text = _printed(found)
    assert "least within a format" in text
    assert "uniform w3-g32, GPTQ" in text
    with pytest.raises(UnknownNameError, match="no model 'bert' to score"):
        precision.run(precision.Options(1, 1, ("bert",)), planish.compile, lambda phase: None)


def test_nncf_is_compared_at_its_real_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for it that stores weights as bytes with an fp16 scale."""

    class Compressed(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            (layer,) = (m for m in model.modules() if isinstance(m, torch.nn.Linear))
            scale = (layer.weight.abs().max() / 127).half()
            self.register_buffer("codes", (layer.weight / scale.float()).round().to(torch.int8))
            self.register_buffer("scale", scale)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.codes.float() * self.scale.float()).T

    asked: list[dict[str, Any]] = []

    def compress(model: torch.nn.Module, **how: Any) -> Compressed:
        asked.append(how)
        return Compressed(model)

    modes = SimpleNamespace(INT4_SYM="int4", INT8_SYM="int8")
    stand_in = SimpleNamespace(
        CompressWeightsMode=modes, BackupMode=modes, Dataset=list, compress_weights=compress,
        IgnoredScope=lambda **how: how, set_log_level=lambda level: None,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "nncf", stand_in)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)).eval().requires_grad_(False)
    samples = [Sample((torch.randn(4, 64),)) for _ in range(6)]
    rows = nncf_peer.assignments(model, samples[:3], samples[3:], Loss(("cosine",)))
    assert [how["ratio"] for how in asked] == [*nncf_peer.RATIOS, *nncf_peer.RATIOS]
    assert {len(how["dataset"]) for how in asked} == {3}
    assert {row["bits"] for row in rows} == {8 + 16 / (64 * 32)}
    assert all(0 < row["held_out"] < 1e-3 for row in rows)
    assert rows[0]["scorer"] == "nncf, 100% 4 bits"


PEERS = [ONNXRUNTIME_INT8, *COMPUTE]


def _printed(read: dict[str, Any]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    report.show(read, console)
    return console.export_text()


def test_rows_compare_with_inductor_and_json_refuses_nan(tmp_path: Path) -> None:
    times = {"eager": [4.0] * 7, "inductor": [3.0] * 7, "planish-fp32": [2.0] * 7}
    row = result.make_row("planish-fp32", times, {"cosine_min": float("nan")}, ("inductor",))
    assert (row.ratio_to_eager, row.ratio_ci95, row.extra["ratio_to_inductor"]) == (2.0, (2.0, 2.0), 1.5)
    assert (row.extra["claim"], row.extra["claim_inductor"]) == ("2.00x eager", "1.50x inductor")
    with pytest.raises(ValueError, match="JSON"):
        result.BenchResult("encoder", 1, {}, [row], []).write(tmp_path / "x.json")


def test_qgemm_times_every_format_at_every_shape(monkeypatch: pytest.MonkeyPatch, without_peers: None) -> None:
    monkeypatch.setattr(limits, "measure", lambda _: {"avx2": 100.0, "read": 20.0})
    monkeypatch.setattr(limits.Probe, "read", lambda *_: 20.0)
    monkeypatch.setattr(limits.Probe, "fma", lambda *_: 100.0)
    monkeypatch.setattr(qgemm, "SHAPES", ((5, 48, 64), (1, 48, 64)))
    monkeypatch.setattr(qgemm, "VECTOR_DEPTH", 64)
    monkeypatch.setattr(qgemm, "BEYOND", 1 / 1024)
    monkeypatch.setattr(qgemm, "CALLS_MS", 0.01)
    monkeypatch.setattr(executable, "_ROUND_SECONDS", 1e-3)
    options = qgemm.Options(threads=torch.get_num_threads(), rounds=7, only=("w8a8", "w4a8-g32"))
    read = qgemm.run(options, planish.compile, lambda _: None).to_dict()
    names = ["fp32", "w8a8", "w4a8-g32"]
    assert [(k["name"], k["shape"][0]) for k in read["kernels"]] == [
        *((name, m) for m in (5, 1) for name in names),
        ("w8a8", 1),
        ("w4a8-g32", 1),
    ]
    by_name = {k["name"]: k for k in read["kernels"][:3]}
    assert by_name["fp32"]["rel_err"] < 1e-6 < by_name["w8a8"]["rel_err"] < 0.02 < by_name["w4a8-g32"]["rel_err"] < 0.2
    for k in read["kernels"]:
        of = k["gflops"] / 100.0 if k["gbs"] is None else k["gbs"] / 20.0
        assert k["share_of_limit"] == pytest.approx(of), k
    assert 0.0 < read["mlp_rel_err"]["planish w8a8"] < 0.02
    assert "not installed" in read["mlp_rel_err"]["onnxruntime int8"]
    text = _printed(read)
    assert "5x48x64" in text
    assert "400 GOP/s" in text
    with pytest.raises(UnknownNameError, match="w9a8"):
        qgemm.Options(threads=1, only=("w9a8",))


def test_no_kernel_takes_less_than_a_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    run = executable.TvmExecutable._run  # pyright: ignore

    def noisy(self: executable.TvmExecutable, *args: Any) -> None:
        run(self, *args)
        first, last = args[-2:]
        if first == last:
            time.sleep(1e-4)

    monkeypatch.setattr(executable, "_ROUND_SECONDS", 1e-3)
    call = planish.compile(torch.nn.ReLU().eval(), (torch.zeros(4),), cache=False)
    assert [k.ms < 0.01 for k in call.kernels((torch.zeros(4),))] == [True]
    monkeypatch.setattr(executable.TvmExecutable, "_run", noisy)
    assert [k.ms for k in call.kernels((torch.zeros(4),))] == [pytest.approx(1e-6)]


def test_perplexity_of_a_sure_model_is_one() -> None:
    ids = torch.tensor([[3, 1, 2]])
    sure = torch.nn.functional.one_hot(torch.tensor([[1, 2, 0]]), 4) * 100.0
    assert perplexity([sure], [{"input_ids": ids}]) == pytest.approx(1.0)
    assert perplexity([torch.zeros(1, 3, 4)], [{"input_ids": ids}]) == pytest.approx(4.0)


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 7"):
        encoder.Options(threads=1, rounds=6)


def test_command_line_has_the_shared_options() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "planish.bench", "encoder", "--help"], capture_output=True, text=True, check=True
    )
    assert "--json" in done.stdout
    assert "--threads" in done.stdout
    few = subprocess.run(
        [sys.executable, "-m", "planish.bench", "encoder", "--rounds", "3"], capture_output=True, text=True, check=False
    )
    assert few.returncode == 2
