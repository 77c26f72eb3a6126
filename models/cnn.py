"""ResNet-50 (He et al. 2015, arXiv 1512.03385) with seeded random weights: for speed, not for accuracy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from planish.models.base import LoadedModel
from planish.models.images import LogitsMetric, load_images
from planish.models.registry import ModelRow
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
    """ResNet-50 in eval mode with random weights and batch-norm statistics that keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    model = ResNet().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0.0, (2 / fan_in) ** 0.5, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.0, generator=generator)
            module.bias.normal_(0.0, 0.1, generator=generator)
            module.running_mean.normal_(0.0, 0.1, generator=generator)  # pyright: ignore
            module.running_var.uniform_(0.8, 1.2, generator=generator)  # pyright: ignore
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
