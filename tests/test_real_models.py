"""The models with real weights, on real data, compiled against eager; the ones at real shapes; what judges them."""

from collections.abc import Generator

import pytest
import torch

import planish
from planish import models, verify
from planish.errors import NumericError
from planish.models.distance import TensorMetric, distance
from planish.models.registry import package_file


@pytest.fixture(autouse=True)
def _values_are_compared_here(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """These tests compare the outputs of whole models; in fp64 after every pass, one would take minutes."""
    monkeypatch.setattr(verify, "always", False)
    with torch.inference_mode():
        yield


def _compiled(loaded: models.LoadedModel) -> planish.CompiledModel:
    return planish.compile(loaded.model, loaded.inputs, dynamic=loaded.dynamic)


def _outputs(loaded: models.LoadedModel, call: object, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    return [loaded.metric.output(call(**batch)) for batch in batches]


@pytest.mark.needs_weights
@pytest.mark.slow
def test_efficientnet_agrees_on_all_images() -> None:
    loaded = models.load("efficientnet-lite0")
    batches = loaded.data.batches(20, 8)
    eager, compiled = (_outputs(loaded, call, batches) for call in (loaded.model, _compiled(loaded)))
    found = loaded.metric.compare(eager, compiled, batches)
    assert sum(len(scores) for scores in compiled) == 20
    assert found["top1_equal"] == 1.0
    assert found["max_rel"] < 1e-4


@pytest.mark.needs_weights
def test_efficientnet_knows_the_images() -> None:
    loaded = models.load("efficientnet-lite0")
    (scores,) = _outputs(loaded, loaded.model, loaded.data.batches(20, 20))
    assert int((scores.argmax(-1) == loaded.data.labels).sum()) == 18


@pytest.mark.needs_weights
@pytest.mark.slow
def test_crnn_reads_a_hundred_words_as_eager_does() -> None:
    from planish.models.crnn import decode

    loaded = models.load("crnn-en")
    assert len(set(loaded.data.texts)) == 100
    batches = loaded.data.batches(100, 1)
    assert len({batch["image"].shape[-1] for batch in batches}) > 50, "words of many widths, each at its own"
    eager, compiled = (_outputs(loaded, call, batches) for call in (loaded.model, _compiled(loaded)))
    read = [text for scores in compiled for text in decode(scores)]
    assert read == [text for scores in eager for text in decode(scores)]
    assert read == list(loaded.data.texts)
    assert loaded.metric.compare(eager, compiled, batches)["max_rel"] < 1e-4


@pytest.mark.needs_weights
def test_crnn_images_are_padded_with_white_and_are_the_same_in_every_batch() -> None:
    data = models.load("crnn-en").data
    one, all_at_once = data.batches(5, 1), data.batches(5, 5)[0]["image"]
    widths = [batch["image"].shape[-1] for batch in one]
    assert len(set(widths)) > 1
    assert tuple(all_at_once.shape) == (5, 1, 64, max(widths))
    for batch, padded, width in zip(one, all_at_once, widths, strict=True):
        assert torch.equal(batch["image"][0], padded[..., :width])
        assert bool((padded[..., width:] == 1.0).all())
        assert float(padded.amin()) == -1.0
    assert data.batches(1, 1, 40)[0]["image"].shape[-1] == 40


def test_greedy_ctc_merges_repeats_and_drops_blanks() -> None:
    from planish.models.crnn import ALPHABET, TextMetric, decode

    assert len(set(ALPHABET)) == 96
    a, b = 1 + ALPHABET.index("a"), 1 + ALPHABET.index("b")
    steps = torch.tensor([[0, a, a, 0, a, b, b, 0], [0] * 8, [a, b, a, b, a, b, a, b]])
    scores = torch.nn.functional.one_hot(steps, 97).float()
    assert decode(scores) == ["aab", "", "abababab"]
    other = scores.clone()
    other[1, 3, b] = 2.0
    found = TextMetric().compare([scores], [other], [{}])
    assert found == pytest.approx({"text_equal": 2 / 3, "max_rel": 2.0, "max_abs": 2.0})


@pytest.mark.needs_weights
def test_silero_is_the_packages_own_model() -> None:
    """The package's TorchScript has other weights; given ours, it returns what our module returns, chunk by chunk."""
    loaded = models.load("silero-vad")
    script = torch.jit.load(package_file(models.MODELS["silero-vad"], "silero_vad", "data", "silero_vad.jit"))
    own = loaded.model.state_dict()
    assert torch.equal(script._model.stft.forward_basis_buffer, own.pop("stft_conv.weight"))
    theirs = dict(script._model.named_parameters())
    for name, tensor in own.items():
        module, _, parameter = name.rpartition(".")
        theirs.pop(f"{_SILERO[module]}.{parameter}").copy_(tensor)
    assert theirs == {}
    script.reset_states()
    state = _silero().first_state(1)
    for chunk in loaded.data.chunks():
        speech, state = loaded.model(chunk, state)
        torch.testing.assert_close(speech, script(chunk[:, 64:], 16000), rtol=1e-5, atol=1e-6)


_SILERO = {
    **{f"conv{n + 1}": f"encoder.{n}.reparam_conv" for n in range(4)},
    "lstm_cell": "decoder.rnn",
    "final_conv": "decoder.decoder.2",
}
"""Module of the weights file to the same one in the package's TorchScript."""


def _silero() -> object:
    from planish.models import silero

    return silero


@pytest.mark.needs_weights
def test_silero_hears_the_vowel_and_carries_its_state_as_eager_does() -> None:
    loaded = models.load("silero-vad")
    compiled = _compiled(loaded)
    eager_state = compiled_state = _silero().first_state(1)
    speech: list[float] = []
    for chunk in loaded.data.chunks():
        want, eager_state = loaded.model(chunk, eager_state)
        got, compiled_state = compiled(chunk, compiled_state)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled_state, eager_state, rtol=1e-4, atol=1e-4)
        speech.append(got.item())
    assert max(speech[5:30]) < 0.1, "noise"
    assert min(speech[35:88]) > 0.5, "a vowel"
    assert max(speech[-10:]) < 0.1, "noise again"
    batch = loaded.data.batches(7, 7)
    eager, native = (_outputs(loaded, call, batch) for call in (loaded.model, compiled))
    assert loaded.metric.compare(eager, native, batch)["max_rel"] < 1e-5


@pytest.mark.needs_weights
def test_mobilenet_keeps_its_scale() -> None:
    """A batch norm that does nothing lets random weights shrink to nothing, layer by layer."""
    loaded = models.load("mobilenet-v2")
    assert 0.05 < float(loaded.metric.output(loaded.model(**loaded.inputs)).std()) < 20


@pytest.mark.needs_weights
def test_every_model_at_real_shape_is_in_the_registry() -> None:
    from planish.bench.suite import SUITES
    from planish.models.shapes import SHAPES

    assert SUITES["families-real"] == tuple(SHAPES)


@pytest.mark.needs_weights
def test_the_tiny_vit_has_the_structure_of_vit_b16() -> None:
    loaded = models.load("vit-b16-tiny")
    config = loaded.model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.patch_size) == (12, 12, 16)
    states = loaded.model.vit(loaded.inputs["pixel_values"]).last_hidden_state
    assert states.shape[1:] == (197, 192)
    assert loaded.metric.output(loaded.model(**loaded.inputs)).shape == (3 * 1000,)
    again = models.load("vit-b16-tiny").model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.needs_weights
@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-b16-tiny", "llama-4l"])
def test_models_at_real_shapes_agree(name: str) -> None:
    loaded = models.load(name)
    compiled = _compiled(loaded)
    batches = [*loaded.data.batches(1, 1), *loaded.data.batches(5, 5, 17)]
    eager, native = (_outputs(loaded, call, batches) for call in (loaded.model, compiled))
    assert loaded.metric.compare(eager, native, batches)["max_rel"] < 1e-4


@pytest.mark.needs_weights
def test_texts_and_images_are_the_same_in_every_batch() -> None:
    from planish.models.families import ALL, IDS, LARGE_PIXELS
    from planish.models.shapes import SEQ, Noise

    texts, images = Noise((IDS, ALL)), Noise((LARGE_PIXELS,))
    for data, axis in ((texts, "input_ids"), (images, "pixel_values")):
        one, all_at_once = data.batches(3, 1), data.batches(3, 3)
        assert torch.equal(torch.cat([b[axis] for b in one]), all_at_once[0][axis])
        assert not torch.equal(one[0][axis], one[1][axis])
    assert tuple(texts.batches(1, 1)[0]["attention_mask"].shape) == (1, SEQ)
    assert tuple(texts.batches(1, 1, 17)[0]["input_ids"].shape) == (1, 17)


def test_distance_finds_the_largest_difference_of_all_batches() -> None:
    reference = [torch.tensor([1.0, -8.0]), torch.tensor([2.0])]
    assert distance(reference, reference) == {"max_rel": 0.0, "max_abs": 0.0}
    assert distance(reference, [reference[0], torch.tensor([1.0])]) == {"max_rel": 0.125, "max_abs": 1.0}
    zero = torch.zeros(2)
    assert distance([zero], [zero + 0.5]) == {"max_rel": 0.5, "max_abs": 0.5}


@pytest.mark.parametrize("side", [0, 1])
def test_distance_refuses_what_it_cannot_compare(side: int) -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    with pytest.raises(NumericError, match="NaN or infinity"):
        distance(*([[bad], [good]] if side == 0 else [[good], [bad]]))
    with pytest.raises(NumericError, match="shape"):
        distance([good], [good[:2]])


def test_tensor_metric_judges_every_output() -> None:
    metric = TensorMetric()
    result = {"a": torch.ones(2, 2), "b": (torch.zeros(1), torch.full((1, 1), 3.0))}
    assert metric.output(result).tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 3.0]
    assert metric.output(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]
