"""The families benchmark: its list, rows of families that compile and of one that does not, and its JSON."""

import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from planish.bench import families as bench
from planish.bench.families import LEVELS, FamiliesResult, FamilyRow, Reason
from planish.errors import UnknownNameError
from planish.models import families

MUST_HAVE = [
    "resnet",
    "convnext",
    "mobilenet_v1",
    "mobilenet_v2",
    "efficientnet",
    "mobilevit",
    "mobilevitv2",
    "vit",
    "swin",
    "bert",
    "distilbert",
    "albert",
    "roberta",
    "xlm-roberta",
    "electra",
    "mpnet",
    "modernbert",
    "deberta-v2",
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "mixtral",
    "qwen2_moe",
    "t5",
    "bart",
    "whisper",
    "wav2vec2",
    "clip",
    "mamba",
    "jamba",
    "vilt",
    "led",
    "deit",
    "esm",
    "levit",
    "siglip",
    "deepseek_v2",
    "detr",
    "qwen3_next",
    "yolos",
]


def test_the_list_has_86_families() -> None:
    assert len(families.FAMILIES) == 86
    assert set(MUST_HAVE) <= set(families.FAMILIES)
    assert set(Counter(row.kind for row in families.FAMILIES.values())) == set(families.KINDS)
    with pytest.raises(UnknownNameError, match="deberta-v2"):
        families.family("debertav2")


@pytest.mark.parametrize("name", ["bert", "t5", "wav2vec2", "whisper", "clip", "vit"])
def test_inputs_and_dims_agree(name: str) -> None:
    small, large = families.inputs(name, 3, 12), families.inputs(name, 5, 17, seed=1)
    both, batch = families.dynamic(name), families.dynamic(name, sequences=False)
    assert set(small) == set(both) == set(batch)
    for argument, tensor in small.items():
        assert (tensor.shape[0], large[argument].shape[0]) == (3, 5)
        assert {a for a in range(tensor.dim()) if tensor.shape[a] != large[argument].shape[a]} == set(both[argument])
        assert set(batch[argument]) == {0}
        for axis, dim in both[argument].items():
            assert dim.min <= tensor.shape[axis] <= dim.max
    again = families.inputs(name, 3, 12)
    assert all(torch.equal(small[argument], again[argument]) for argument in small)


@pytest.mark.needs_weights
def test_a_family_has_the_same_random_weights_every_time() -> None:
    state = torch.get_rng_state()
    one, two = families.build("distilbert"), families.build("distilbert")
    assert torch.equal(state, torch.get_rng_state())
    assert not one.training
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert sum(p.numel() for p in one.parameters()) < 100_000


@pytest.mark.needs_weights
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "distilbert", "electra"])
def test_families_that_are_native(name: str) -> None:
    from planish.bench.family import check

    phases: list[str] = []
    row = check(name, phases.append)
    assert phases == ["build", "eager", "compile", "run"]
    assert (row.dynamic, row.native_share, row.match, row.reasons) == ("batch+seq", 1.0, True, [])
    assert row.max_rel_err is not None
    assert row.max_rel_err < 1e-5
    assert row.compile_s is not None
    assert row.export_s is not None
    assert row.compile_s > 0
    assert row.export_s > 0


@pytest.mark.needs_weights
@pytest.mark.slow
def test_a_family_that_fails_has_typed_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    from planish.backends.base import Unsupported
    from planish.backends.tvm.backend import TvmBackend
    from planish.bench.family import check

    lines = ("/lib/site-packages/transformers/a.py:1 in f: x", "/lib/site-packages/transformers/a.py:2 in f: x")
    missing = [Unsupported("erf_1", "aten.erf.default", line, "it has no lowering") for line in lines]
    missing.append(Unsupported("fft", "aten._fft_r2c.default", "", "the dtype complex64 has no kernels"))
    monkeypatch.setattr(TvmBackend, "unsupported", lambda *_: missing)
    row = check("distilbert", lambda _: None)
    assert (row.dynamic, row.native_share, row.match) == ("batch+seq", 0.0, False)
    assert (row.max_rel_err, row.compile_s) == (None, None)
    assert [(r.error, r.op, r.nodes, r.where) for r in row.reasons] == [
        ("UnsupportedOpsError", "aten.erf.default", 2, "transformers/a.py:1 in f: x"),
        ("UnsupportedOpsError", "aten._fft_r2c.default", 1, ""),
    ]


class _Fixed(torch.nn.Module):
    """Exports with a dynamic batch only: its sequence has one length."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = (input_ids * attention_mask).float().reshape(-1, 12) * 2
        return total, input_ids + 1


def test_a_family_that_fixes_its_sequence_keeps_a_dynamic_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from planish.bench import family

    monkeypatch.setattr(families, "build", lambda _: _Fixed().eval())
    row = family.check("bert", lambda _: None)
    assert (row.dynamic, row.native_share, row.match) == ("batch", 1.0, True)
    assert [(r.error, r.phase) for r in row.reasons] == [("CaptureError", "compile batch+seq")]
    assert FamiliesResult([row]).summary()["blocked_by"] == {}


def test_wrong_values_and_torch_ops_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    from planish.api import compile as compile_model
    from planish.bench import family

    class Wrong:
        def __init__(self, model: Any, inputs: Any, **options: Any) -> None:
            self.steps = compile_model(model, inputs, "reference", **options).steps

        def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            total, ids = _Fixed()(input_ids, attention_mask)
            return total * 1.01, ids + 1

    monkeypatch.setattr(families, "build", lambda _: _Fixed().eval())
    monkeypatch.setattr(family.planish, "compile", Wrong)
    monkeypatch.setattr(family, "LEVELS", ("static",))
    row = family.check("bert", lambda _: None)
    assert not row.match
    assert row.native_share < 1
    assert row.max_rel_err is not None
    assert row.max_rel_err > 0.005
    assert {"aten.mul.Tensor", "aten.add.Tensor"} <= {r.op for r in row.reasons if r.error == "TorchOp"}
    assert sum(r.error == "NumericError" for r in row.reasons) == 2


def test_a_crash_and_a_timeout_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def child(code: str) -> FamilyRow:
        monkeypatch.setattr(bench, "_command", lambda _: [sys.executable, "-c", code])
        return bench.check_in_child("bert", time_limit=1.0)

    begun = 'import os, time; print(\'{"phase": "compile"}\', flush=True)\n'
    crash = child(begun + "os.kill(os.getpid(), 11)").reasons
    assert [(r.error, r.phase) for r in crash] == [("ChildError", "compile")]
    assert "SIGSEGV" in crash[0].message
    slow = child(begun + "time.sleep(30)").reasons
    assert [(r.error, r.phase, r.message) for r in slow] == [("TimeoutError", "compile", "not done after 1 s")]
    failed = child("raise SystemExit('no such thing')").reasons
    assert [(r.error, r.phase, r.message) for r in failed] == [("ChildError", "start", "exit status 1: no such thing")]


def _rows() -> list[FamilyRow]:
    conv = Reason("UnsupportedOpsError", "compile", "it has no lowering", "aten.conv2d.default", 53, "m.py:1")
    fixed = Reason("CaptureError", "compile batch+seq", "[capture] seq is fixed")
    return [
        FamilyRow("bert", "encoder", "batch+seq", 1.0, True, 3e-7, 2.5, 1.5),
        FamilyRow("jamba", "moe", "batch", 1.0, False, None, 3.0, 9.0, [fixed, Reason("NumericError", "run", "wrong")]),
        FamilyRow("resnet", "vision", "batch", export_s=2.0, reasons=[conv]),
        FamilyRow("vilt", "multimodal", reasons=[Reason("CaptureError", f"compile {x}", "data") for x in LEVELS]),
    ]


def test_json_and_table(tmp_path: Path) -> None:
    result = FamiliesResult(_rows())
    result.write(tmp_path / "families.json")
    read = json.loads((tmp_path / "families.json").read_text())
    assert read["bench"] == "families"
    assert "torch" in read["machine"]
    fields = {"name", "kind", "dynamic", "native_share", "match", "max_rel_err", "compile_s", "export_s", "reasons"}
    assert all(set(row) == fields for row in read["rows"])
    assert [FamilyRow.from_dict(row) for row in read["rows"]] == _rows()
    assert read["summary"] == {
        "families": 4,
        "native": 2,
        "native_and_match": 1,
        "dynamic": {"batch+seq": 1, "batch": 2, "not captured": 1},
        "blocked_by": {"CaptureError": 1, "NumericError": 1, "aten.conv2d.default": 1},
    }
    from planish.bench.report import show_families

    console = Console(width=100, record=True, file=io.StringIO())
    show_families(read, console)
    text = console.export_text()
    assert "aten.conv2d.default x53: it has no lowering" in text
    assert "native: 2 of 4 families, 1 match" in text


def test_the_command_line_answers_at_once_and_knows_the_names() -> None:
    command = [sys.executable, "-m", "planish.bench", "families"]
    loaded = (
        "import sys, planish.bench.cli; print(sorted({'torch', 'numpy', 'rich', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout == "[]\n"
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "--only" in done.stdout
    wrong = subprocess.run([*command, "--only", "bert,nothing"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "unknown family 'nothing'" in wrong.stderr
