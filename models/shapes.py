"""Transformers models at the shapes people run, with seeded random weights: for speed, not for accuracy.

Widths, heads, patches and lengths are those of the named model; some have fewer layers, as equal layers run the same
kernels again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from planish.models.base import Batch, LoadedModel
from planish.models.distance import TensorMetric
from planish.models.families import ALL, IDS, LARGE_PIXELS, Input, axes, fill
from planish.models.registry import ModelRow
from planish.models.seeded import randomize, transformer
from planish.program import Dim

SEQ = 128
"""Tokens of a text."""

_DIMS = {"batch": Dim("batch", 1, 32), "seq": Dim("seq", 1, SEQ)}


@dataclass(frozen=True)
class Shape:
    """One model.

    Attributes:
        model_type: transformers' name of the architecture.
        config: fields of its configuration, beyond transformers' defaults.
        auto: transformers' auto class.
        inputs: the arguments.
    """

    model_type: str
    config: Mapping[str, Any]
    auto: str
    inputs: tuple[Input, ...]


def _images(model_type: str, **config: Any) -> Shape:
    return Shape(model_type, {"num_labels": 1000, **config}, "AutoModelForImageClassification", (LARGE_PIXELS,))


def _texts(model_type: str, **config: Any) -> Shape:
    """Token states: the scores of a vocabulary are wanted for one token, not for all of a prefill's."""
    return Shape(model_type, {"use_cache": False, **config}, "AutoModel", (IDS, ALL))


_TINY_VIT = {"hidden_size": 192, "intermediate_size": 768}

SHAPES: Mapping[str, Shape] = {
    "vit-b16-tiny": _images("vit", **_TINY_VIT),
    "vit-ti16": _images("vit", **_TINY_VIT, num_attention_heads=3),
    "swin-t": _images("swin"),
    "convnext-t": _images("convnext"),
    "mobilenet-v2": _images("mobilenet_v2"),
    "bert-base-2l": _texts("bert", num_hidden_layers=2),
    "gpt2-small-4l": _texts("gpt2", n_layer=4),
    "llama-4l": _texts(
        "llama",
        num_hidden_layers=4,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    ),
}
"""The models by name. ViT-B/16 (Dosovitskiy et al. 2020, arXiv 2010.11929) at the width of DeiT-Ti (Touvron et al.
2020, arXiv 2012.12877), once with the 12 heads of the first and once with the 3 of the second; the Llama is as wide as
SmolLM2-135M."""


@dataclass(frozen=True)
class Noise:
    """Seeded inputs: document i is the same in every batch."""

    inputs: tuple[Input, ...]

    def batches(self, n_docs: int = 8, batch: int = 8, max_len: int = SEQ) -> list[Batch]:
        """``n_docs`` images, or texts of ``max_len`` tokens and at most ``SEQ``, in batches."""
        sizes = {"batch": 1, "seq": min(max_len, SEQ)}
        docs = [fill(self.inputs, sizes, seed) for seed in range(n_docs)]
        parts = [docs[i : i + batch] for i in range(0, n_docs, batch)]
        return [{i.name: torch.cat([doc[i.name] for doc in part]) for i in self.inputs} for part in parts]


def build(row: ModelRow) -> LoadedModel:
    """The model of ``SHAPES`` that the row names; batch may grow to 32, a text to 128 tokens."""
    shape = SHAPES[row.name]
    data = Noise(shape.inputs)
    model = transformer(shape.auto, shape.model_type, shape.config)
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        randomize(model, seed=0)  # transformers' weights and norms that do nothing leave outputs of 1e-21
    return LoadedModel(
        name=row.name,
        model=model,
        tokenizer=None,
        inputs=data.batches(3, 3, 96)[0],
        dynamic=axes(shape.inputs, _DIMS),
        data=data,
        metric=TensorMetric(),
    )
