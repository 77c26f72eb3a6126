"""planish.bench cnn and families-real: the schema on a small model, and the options."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import planish
from planish import models
from planish.bench import limits, report, result, suite
from planish.errors import UnknownNameError
from planish.models.distance import TensorMetric


class _Rows:
    """Documents of 24 numbers."""

    def batches(self, n_docs: int = 8, batch: int = 8, max_len: int = 0) -> list[dict[str, torch.Tensor]]:
        rows = torch.arange(24.0 * n_docs).reshape(n_docs, 24) / 24 / n_docs
        return [{"input": part} for part in rows.split(batch)]


def _small(name: str) -> models.LoadedModel:
    torch.manual_seed(0)
    return models.LoadedModel(
        name=name,
        model=torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU()).eval().requires_grad_(False),
        tokenizer=None,
        inputs=_Rows().batches(3, 3)[0],
        dynamic={"input": {0: planish.Dim("batch", 1, 32)}},
        data=_Rows(),
        metric=TensorMetric(),
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> result.BenchResult:
    """The suite on small models of two of its names, without inductor and without measuring processes."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(models, "load", _small)
    monkeypatch.setattr(limits, "measure", lambda _: {"avx2": 100.0, "read": 20.0})
    options = suite.Options("families-real", torch.get_num_threads(), 7, ("vit-ti16", "swin-t"))
    return suite.run(options, planish.compile, lambda _: None)


def test_every_model_and_batch_has_its_rows(quick: result.BenchResult, tmp_path: Path) -> None:
    quick.write(tmp_path / "bench.json")
    read: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    assert read["bench"] == "families-real"
    labels = [f"{model} x{batch}" for model in ("vit-ti16", "swin-t") for batch in (1, 8)]
    assert [row["name"] for row in read["rows"]] == [f"{who} {x}" for x in labels for who in ("eager", "planish-fp32")]
    for row in read["rows"]:
        assert row["name"].endswith(f"{row['model']} x{row['batch']}")
        assert row["quality"]["max_rel"] < 1e-5
        assert len(row["rounds_ms"]) == 7
    assert [absent["name"] for absent in read["absent"]] == [f"inductor {x}" for x in labels]
    assert {name: found["max_rel"] < 1e-5 for name, found in read["accuracy"].items()} == dict.fromkeys(
        ("vit-ti16", "swin-t"), True
    )
    assert [(k["name"].split()[1], k["shape"]) for k in read["kernels"]] == [
        (model, [batch, 40, 24]) for model in ("vit-ti16", "swin-t") for batch in (1, 8)
    ]
    assert all(k["share_of_limit"] > 0 for k in read["kernels"])
    console = Console(width=200, record=True, file=io.StringIO())
    report.show(read, console)
    text = console.export_text()
    assert "no inductor vit-ti16 x1 row: no C++ compiler" in text
    assert "against eager on 20: max rel. Δ" in text


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="no model 'resnet50'"):
        suite.Options("families-real", 1, only=("vit-ti16", "resnet50"))
    with pytest.raises(ValueError, match="at least 7"):
        suite.Options("cnn", 1, rounds=6)


def test_every_model_of_a_suite_exists() -> None:
    assert all(set(names) <= set(models.MODELS) for names in suite.SUITES.values())


def test_help_lists_every_benchmark() -> None:
    from planish.bench.cli import app

    names = {c.name or c.callback.__name__.replace("_", "-") for c in app.registered_commands if c.callback}
    assert set(suite.SUITES) < names
    bench, own = (
        subprocess.run(
            [sys.executable, "-m", module, *options, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for module, options in (("planish.bench", ()), ("planish", ("bench",)))
    )
    for name in names:
        assert name in bench
        assert name in own
