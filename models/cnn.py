"""ResNet-50 (He et al. 2015, arXiv 1512.03385) with seeded random weights: for speed, not for accuracy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from planish.models.base import LoadedModel
from planish.models.images import LogitsMetric, load_images
from planish.models.registry import ModelRow
from planish.models.seeded import randomize
from planish.program import Dim


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with batch norms, and the shortcut; the stride is on the 3x3 one (ResNet v1.5)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *_conv(inputs, width, 1),
            nn.ReLU(),
            *_conv(width, width, 3, stride),
            nn.ReLU(),
            *_conv(width, outputs, 1),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, 4 width, H / stride, W / stride]."""
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet of bottleneck blocks on images [N, 3, H, W]; returns logits [N, classes]."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        stages: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stages.append(Bottleneck(channels, width << stage, 2 if stage and not block else 1))
                channels = 4 * width << stage
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes]."""
        return self.classifier(self.pool(self.stages(self.stem(x))).flatten(1))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs)


def resnet50(seed: int = 0) -> ResNet:
    """ResNet-50 in eval mode with random weights."""
    model = ResNet().eval().requires_grad_(False)
    randomize(model, seed)
    return model


def build(row: ModelRow) -> LoadedModel:
    """The model and the images; batch may grow to 32.

    Raises:
        MissingPackageError: the images are not installed.
    """
    data = load_images(row, "x")
    return LoadedModel(
        name=row.name,
        model=resnet50(),
        tokenizer=None,
        inputs=data.batches(2, 2)[0],
        dynamic={"x": {0: Dim("batch", 1, 32)}},
        data=data,
        metric=LogitsMetric(),
    )
