"""The real encoder, end to end: values at many shapes, the dump run by hand, reuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import planish
from planish import models, verify
from planish.api import CompiledModel
from planish.models.base import LoadedModel
from planish.passes import resolve

pytestmark = pytest.mark.needs_weights

SHAPES = [(1, 1), (1, 7), (3, 5), (2, 64), (7, 143), (5, 256), (64, 3), (16, 37), (64, 256), (2, 512)]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return models.load("minilm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dump")


@pytest.fixture(scope="module")
def compiled(loaded: LoadedModel, folder: Path) -> CompiledModel:
    return planish.compile(loaded.model, loaded.inputs, dynamic=loaded.dynamic, dump=folder)


@pytest.mark.parametrize(("batch", "length"), SHAPES)
def test_values_at_many_shapes(loaded: LoadedModel, compiled: CompiledModel, batch: int, length: int) -> None:
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    ids = torch.randint(1000, 30000, (batch, length), generator=generator)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    with torch.no_grad():
        want = loaded.model(input_ids=ids, attention_mask=mask)
    got = compiled(input_ids=ids, attention_mask=mask)
    assert type(got) is type(want)
    valid = mask.bool()
    assert (want.last_hidden_state - got.last_hidden_state)[valid].abs().max() <= 1e-4
    assert torch.nn.functional.cosine_similarity(want.pooler_output, got.pooler_output).min() >= 0.99999


def test_real_documents(loaded: LoadedModel, compiled: CompiledModel) -> None:
    batch = loaded.data.batches(8, 8, 128)[0]
    with torch.no_grad():
        want = loaded.model(**batch)
    got = compiled(**batch)
    assert (want.last_hidden_state - got.last_hidden_state)[batch["attention_mask"].bool()].abs().max() <= 1e-4


def test_few_kernels_and_equal_ones_once(compiled: CompiledModel) -> None:
    text = compiled.report()
    kernels = [line.split(":")[0] for line in text.splitlines() if line.startswith("kernel ")]
    assert len(kernels) == 47
    assert len(set(kernels)) == 15


def test_first_and_last_program_of_the_dump_run_by_hand_and_agree(compiled: CompiledModel, folder: Path) -> None:
    stages = sorted(folder.glob("[0-9][0-9]-*.py"))
    names = [p.name for p in resolve(None)]
    assert [p.name for p in stages] == [f"{i:02d}-{name}.py" for i, name in enumerate(["captured", *names])]
    saved: list[dict[str, torch.Tensor]] = []
    for stage in (stages[0], stages[-1]):
        target = folder / f"{stage.stem}.safetensors"
        command = [sys.executable, "-I", str(stage), "--save", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        saved.append(safetensors.torch.load_file(target))
    assert saved[0].keys() == saved[1].keys()
    tokens = safetensors.torch.load_file(folder / "inputs.safetensors")["attention_mask"].bool()
    for name, want in saved[0].items():
        got = saved[1][name]
        if want.shape[:2] == tokens.shape:
            want, got = want[tokens], got[tokens]
        assert verify.relative_error(want, got) <= 1e-5
    assert (folder / "kernels").is_dir()
    assert (folder / "index.html").stat().st_size > 0


def test_an_unchanged_model_is_compiled_once(loaded: LoadedModel) -> None:
    first = planish.compile(loaded.model, loaded.inputs, dynamic=loaded.dynamic)
    again = planish.compile(loaded.model, loaded.inputs, dynamic=loaded.dynamic)
    assert again._compiled is first._compiled
    bias = loaded.model.pooler.dense.bias
    with torch.no_grad():
        bias += 1
        try:
            changed = planish.compile(loaded.model, loaded.inputs, dynamic=loaded.dynamic)
        finally:
            bias -= 1
    assert changed._compiled is not first._compiled
