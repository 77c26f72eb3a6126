"""The 20 ImageNet images that foolbox brings, and the distance between two sets of class scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from planish.models.base import Batch
from planish.models.distance import distance
from planish.models.registry import ModelRow, package_file

SIZE = 224
"""Height and width of an image in pixels."""

_WHOLE = 256
_EDGE = (_WHOLE - SIZE) // 2
"""An image of ImageNet is judged by its middle 7/8: resized to 256, with 16 pixels cut off at each side."""


@dataclass(frozen=True)
class Images:
    """Images [N, 3, 224, 224] with values in -1..1, and their ImageNet classes.

    Attributes:
        pixels: all images.
        labels: class of each, 0..999.
        argument: name of the model's input.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    argument: str

    def batches(self, n_docs: int = 20, batch: int = 8, max_len: int = 0) -> list[Batch]:
        """The first ``n_docs`` images, at most 20, in batches; an image has no length to cut to ``max_len``."""
        return [{self.argument: part.contiguous()} for part in self.pixels[:n_docs].split(batch)]


def load_images(row: ModelRow, argument: str) -> Images:
    """Read the images, their middle at 224 x 224, as EfficientNet-lite takes them: (value - 127) / 128.

    Raises:
        MissingPackageError: foolbox or its images are not installed.
    """
    files = sorted(package_file(row, "foolbox", "data").glob("imagenet_*.jpg"))
    pixels = torch.stack([_read(file) for file in files])
    labels = torch.tensor([int(file.stem.rsplit("_", 1)[1]) for file in files])
    return Images(pixels, labels, argument)


def _read(file: Path) -> torch.Tensor:
    with Image.open(file) as image:
        whole = image.convert("RGB").resize((_WHOLE, _WHOLE))
        values = np.array(whole.crop((_EDGE, _EDGE, _EDGE + SIZE, _EDGE + SIZE)), dtype=np.float32)
    return (torch.from_numpy(values).permute(2, 0, 1) - 127) / 128


@dataclass(frozen=True)
class LogitsMetric:
    """Judges a classifier by its class scores."""

    def output(self, result: Any) -> torch.Tensor:
        """The scores [batch, classes]."""
        return result

    def compare(
        self, reference: Sequence[torch.Tensor], candidate: Sequence[torch.Tensor], batches: Sequence[Batch]
    ) -> dict[str, float]:
        """Distance of a candidate's scores from the reference's, over all batches.

        Returns:
            ``top1_equal``, the share of images with the same best class; ``max_rel`` and ``max_abs`` of
            :func:`distance`.

        Raises:
            NumericError: shapes differ, or a score is NaN or infinite.
        """
        found = distance(reference, candidate)
        best, chosen = (torch.cat([scores.argmax(-1) for scores in side]) for side in (reference, candidate))
        return {"top1_equal": (best == chosen).double().mean().item(), **found}
