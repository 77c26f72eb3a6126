"""CRNN text recognizer with EasyOCR's English weights: convolutions, two bidirectional LSTMs, CTC.

The weights' package states no licence, so it serves the tests alone.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from planish.models.base import Batch, LoadedModel
from planish.models.distance import distance
from planish.models.registry import ModelRow, package_file
from planish.program import Dim

ALPHABET = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €" + string.ascii_uppercase + string.ascii_lowercase
"""The characters of classes 1 to 96; class 0 is CTC's blank."""

HEIGHT, WIDTH = 64, 512
"""Of an image in pixels; the width is the largest that is taken."""


class Recurrent(nn.Module):
    """A bidirectional LSTM and a linear layer, [N, T, width] to [N, T, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, width, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The states of both directions, mixed."""
        return self.linear(self.rnn(x)[0])


class CRNN(nn.Module):
    """CRNN (Shi et al. 2015, arXiv 1507.05717) on gray images [N, 1, 64, W] in -1..1.

    Its convolutions leave 3 rows, which are averaged, and W / 4 - 1 columns, the time steps.
    """

    def __init__(self, classes: int = 1 + len(ALPHABET), width: int = 256) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_conv(1, width // 8),
            nn.MaxPool2d(2),
            *_conv(width // 8, width // 4),
            nn.MaxPool2d(2),
            *_conv(width // 4, width // 2),
            *_conv(width // 2, width // 2),
            nn.MaxPool2d((2, 1)),
            *_conv(width // 2, width, norm=True),
            *_conv(width, width, norm=True),
            nn.MaxPool2d((2, 1)),
            nn.Conv2d(width, width, 2),
            nn.ReLU(),
        )
        self.sequence = nn.Sequential(Recurrent(width), Recurrent(width))
        self.prediction = nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Scores [N, T, classes]."""
        columns = self.features(image).mean(2).transpose(1, 2)
        return self.prediction(self.sequence(columns))


def _conv(inputs: int, outputs: int, *, norm: bool = False) -> list[nn.Module]:
    """A 3x3 convolution and ReLU, with a batch norm between them instead of a bias if ``norm``."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()] if norm else [conv, nn.ReLU()]


def decode(scores: Tensor) -> list[str]:
    """The texts of scores [N, T, classes]: each step's best class, repeats merged, blanks dropped (greedy CTC)."""
    rows = [torch.unique_consecutive(row).tolist() for row in scores.argmax(-1)]
    return ["".join(ALPHABET[best - 1] for best in row if best) for row in rows]


@dataclass(frozen=True)
class Words:
    """Words as images: black on white, in the font that Pillow brings."""

    texts: tuple[str, ...]

    def batches(self, n_docs: int = 100, batch: int = 20, max_len: int = WIDTH) -> list[Batch]:
        """The first words as images [N, 1, 64, W], white at their right up to the width of the batch's widest.

        One that is wider than ``max_len`` pixels is cut.
        """
        images = [_render(text)[..., :max_len] for text in self.texts[:n_docs]]
        return [{"image": _padded(images[i : i + batch])} for i in range(0, len(images), batch)]


def _padded(images: list[Tensor]) -> Tensor:
    widest = max(image.shape[-1] for image in images)
    return torch.stack([nn.functional.pad(image, (0, widest - image.shape[-1]), value=1.0) for image in images])


def _render(text: str) -> Tensor:
    """[1, 64, W] with -1 for black and 1 for white, and 12 pixels of white before and after the text."""
    font = ImageFont.load_default(size=44)
    image = Image.new("L", (int(font.getlength(text)) + 24, HEIGHT), 255)
    ImageDraw.Draw(image).text((12, HEIGHT // 2), text, fill=0, font=font, anchor="lm")
    return torch.from_numpy(np.array(image, dtype=np.float32))[None] / 127.5 - 1


@dataclass(frozen=True)
class TextMetric:
    """Judges a recognizer by its texts and its scores."""

    def output(self, result: Any) -> Tensor:
        """The scores [N, T, classes]."""
        return result

    def compare(
        self, reference: Sequence[Tensor], candidate: Sequence[Tensor], batches: Sequence[Batch]
    ) -> dict[str, float]:
        """``text_equal``, the share of images whose texts are equal; ``max_rel`` and ``max_abs`` of the scores.

        Raises:
            NumericError: shapes differ, or a score is NaN or infinite.
        """
        found = distance(reference, candidate)
        ref, cand = ([text for scores in side for text in decode(scores)] for side in (reference, candidate))
        return {"text_equal": sum(a == b for a, b in zip(ref, cand, strict=True)) / len(ref), **found}


def build(row: ModelRow) -> LoadedModel:
    """Load the weights, and 100 words of the Lee background documents; batch may grow to 32, the width to 512.

    Raises:
        MissingPackageError: a file of one of the row's packages is not there.
    """
    weights = package_file(row, "easyocr_en_models", "models", "english_g2.pth")
    lee = package_file(row, "gensim", "test", "test_data", "lee_background.cor")
    words = dict.fromkeys(re.findall(r"[A-Za-z]{3,}", lee.read_text("latin-1")))
    model = CRNN()
    model.load_state_dict(_renamed(torch.load(weights, map_location="cpu", weights_only=True)))
    data = Words(tuple(words)[:100])
    return LoadedModel(
        name=row.name,
        model=model.eval().requires_grad_(False),
        tokenizer=None,
        inputs=data.batches(2, 2)[0],
        dynamic={"image": {0: Dim("batch", 1, 32), 3: Dim("width", 16, WIDTH)}},
        data=data,
        metric=TextMetric(),
    )


_PARTS = {
    "module.FeatureExtraction.ConvNet": "features",
    "module.SequenceModeling": "sequence",
    "module.Prediction": "prediction",
}


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights file's parts under the names they have in :class:`CRNN`."""
    return {
        own + name.removeprefix(theirs): tensor
        for name, tensor in weights.items()
        for theirs, own in _PARTS.items()
        if name.startswith(theirs)
    }
