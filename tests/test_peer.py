"""planish.bench.peer: CTranslate2 in its own process, on a stand-in for its package and, where installed, on itself."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from planish import models
from planish.bench.memory import ChildError
from planish.bench.padded import fill_set, uniform_set
from planish.bench.peer import LIBRARIES, Peer, ctranslate2
from planish.models.distance import TensorMetric

_PACKAGE = '''
"""States are [id, length of the row] at each position; id 13 breaks it."""
import numpy as np

__version__ = "0.stub"


class StorageView:
    from_array = staticmethod(lambda array: array)


class Encoder:
    def __init__(self, path, device, compute_type, inter_threads, intra_threads):
        assert open(path).read() == "converted", "the child must get the converted model"
        assert (device, compute_type, inter_threads, intra_threads) == ("cpu", "float32", 1, 3)

    def forward_batch(self, ids, lengths):
        assert ids.dtype == lengths.dtype == np.int32
        if (ids == 13).any():
            raise RuntimeError("unlucky id")
        states = np.stack([ids, np.broadcast_to(lengths[:, None], ids.shape)], -1).astype(np.float32)
        return type("Output", (), {"last_hidden_state": states})
'''

_CONVERTERS = """
class TransformersConverter:
    def __init__(self, folder):
        if not folder.endswith("checkpoint"):
            raise ValueError("no such checkpoint")

    def convert(self, target):
        open(target, "w").write("converted")
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of CTranslate2's name that the children find."""
    folder = tmp_path / "site" / "ctranslate2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(_PACKAGE)
    (folder / "converters.py").write_text(_CONVERTERS)
    monkeypatch.syspath_prepend(folder.parent)
    paths = [str(folder.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return folder


_NO_DATA: Any = None


def _model(folder: Path | None) -> models.LoadedModel:
    return models.LoadedModel("stub", torch.nn.Identity(), None, {}, {}, _NO_DATA, TensorMetric(), folder)


def test_the_process_runs_the_batches_it_was_given(package: Path) -> None:
    with ctranslate2(_model(package / "checkpoint"), threads=3) as peer:
        assert isinstance(peer, Peer)
        for batches in (uniform_set(6, 2, 8).batches, fill_set(3, 10, 0.5).batches):
            peer.load(batches)
            peer.run()
            assert set(peer.trial_ms) == set(LIBRARIES)
            assert peer.trial_ms[peer.library] == min(peer.trial_ms.values())
            assert (peer.mode["version"], peer.mode["mode"]) == ("0.stub", peer.library)
            for batch, states in zip(batches, peer.outputs(), strict=True):
                lengths = batch["attention_mask"].sum(1, keepdim=True).expand_as(batch["input_ids"])
                assert torch.equal(states, torch.stack([batch["input_ids"], lengths], -1).float())
        children = [child.process for child in peer.children.values()]
        assert all(process.poll() is None for process in children)
    assert all(process.poll() is not None for process in children), "no process outlives the block"


def test_a_process_that_breaks_shows_its_error(package: Path) -> None:
    bad = fill_set(3, 10, 0.5).batches
    bad[0]["input_ids"][0, 0] = 13
    with ctranslate2(_model(package / "checkpoint"), threads=3) as peer:
        assert isinstance(peer, Peer)
        with pytest.raises(ChildError, match="unlucky id"):
            peer.load(bad)
        with pytest.raises(ChildError, match="unlucky id"):
            peer.run()


def test_tokens_that_do_not_stand_left_are_refused(package: Path) -> None:
    batch = {name: tensor.flip(1) for name, tensor in fill_set(3, 10, 0.5).batches[0].items()}
    with ctranslate2(_model(package / "checkpoint"), threads=3) as peer:
        assert isinstance(peer, Peer)
        with pytest.raises(ValueError, match="must stand left"):
            peer.load([batch])


def test_what_it_cannot_convert_is_a_reason(package: Path) -> None:
    with ctranslate2(_model(package / "elsewhere"), threads=3) as peer:
        assert peer == "CTranslate2 failed: ValueError: no such checkpoint"
    with ctranslate2(_model(None), threads=3) as peer:
        assert peer == "model 'stub' has no checkpoint that CTranslate2 could convert"
    with ctranslate2(_model(package / "checkpoint"), threads=2) as peer:
        assert isinstance(peer, str)
        assert peer.startswith("CTranslate2 failed: AssertionError")


def test_without_the_package_it_is_absent(without_peers: None) -> None:
    with ctranslate2(_model(None), threads=1) as peer:
        assert peer == "package ctranslate2 is not installed (pip install 'planish[peers]')"


@pytest.mark.needs_weights
@pytest.mark.skipif(importlib.util.find_spec("ctranslate2") is None, reason="optional: planish[peers]")
def test_the_real_one_agrees_with_eager() -> None:
    loaded = models.load("minilm")
    batches = fill_set(4, 24, 0.5).batches
    with ctranslate2(loaded, torch.get_num_threads()) as peer, torch.inference_mode():
        assert isinstance(peer, Peer), peer
        peer.load(batches)
        reference = [loaded.metric.output(loaded.model(**batch)) for batch in batches]
        assert loaded.metric.compare(reference, peer.outputs(), batches)["max_abs"] < 1e-5
