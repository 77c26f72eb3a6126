"""A hybrid vision transformer that has learnt something: MobileViT, trained for a minute on handwritten digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planish.models.base import Batch, LoadedModel
from planish.models.images import LogitsMetric

SIZE = 64
"""Pixels of an image's side; scikit-learn's have 8."""

TRAINED = 1400
"""Images that it is trained on, of 1,797; the others are data."""

EPOCHS, BATCH, RATE = 4, 50, 2e-3


@dataclass(frozen=True)
class Digits:
    """Images [n, 3, SIZE, SIZE] that training did not see."""

    images: torch.Tensor

    def batches(self, n: int, batch: int = 1, max_len: int = 0) -> list[Batch]:
        """The first ``n`` images or all, in whole batches."""
        parts: Sequence[torch.Tensor] = self.images[:n].split(batch)
        return [{"pixel_values": part} for part in parts if len(part) == batch]


class Classifier(torch.nn.Module):
    """Images [1, 3, SIZE, SIZE] to logits [1, 10]."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Any) -> torch.Tensor:
        """Of Hugging Face's model."""
        return self.model(pixel_values=pixel_values).logits


def trained_mobilevit() -> LoadedModel:
    """The model, from seeds alone, and its data."""
    from sklearn.datasets import load_digits  # pyright: ignore
    from transformers import MobileViTConfig, MobileViTForImageClassification

    found: Any = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    images = torch.nn.functional.interpolate(images, size=SIZE, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(found.target)
    with torch.random.fork_rng(devices=()), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        config = MobileViTConfig(image_size=SIZE, hidden_sizes=[48, 64, 96], num_labels=10)
        config.neck_hidden_sizes = [16, 32, 48, 64, 96, 128, 256]
        model = Classifier(MobileViTForImageClassification(config)).train()
        optimiser = torch.optim.AdamW(model.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, EPOCHS * TRAINED // BATCH)
        for _ in range(EPOCHS):
            for part in torch.randperm(TRAINED).split(BATCH):
                loss = torch.nn.functional.cross_entropy(model(images[part]), labels[part])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    data = Digits(images[TRAINED:])
    return LoadedModel(
        "mobilevit-digits",
        model.eval().requires_grad_(False),
        None,
        data.batches(1)[0],
        {},
        data,
        LogitsMetric(),
    )
