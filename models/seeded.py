"""Random weights that are the same every time: for models whose speed matters, and not what they say."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn


def transformer(auto: str, model_type: str, fields: Mapping[str, Any]) -> nn.Module:
    """A model of transformers in eval mode, with the random weights that its architecture starts training from.

    Args:
        auto: transformers' auto class.
        model_type: transformers' name of the architecture.
        fields: what its configuration sets beyond the defaults.
    """
    config = configuration(model_type, **fields)
    import transformers

    with torch.random.fork_rng(devices=()):  # pyright: ignore[reportUnknownMemberType]
        torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
        model = cast("nn.Module", getattr(transformers, auto).from_config(config))
    return model.eval().requires_grad_(False)


def configuration(model_type: str, **fields: Any) -> Any:
    """The transformers configuration of an architecture; imports transformers, and keeps it from downloading."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    from transformers import AutoConfig

    return cast("Callable[..., Any]", AutoConfig.for_model)(model_type, **fields)  # pyright: ignore[reportUnknownMemberType]


def randomize(model: nn.Module, seed: int) -> None:
    """Give a CNN random weights and batch-norm statistics that keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0.0, (2 / fan_in) ** 0.5, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.0, generator=generator)
            module.bias.normal_(0.0, 0.1, generator=generator)
            module.running_mean.normal_(0.0, 0.1, generator=generator)  # pyright: ignore
            module.running_var.uniform_(0.8, 1.2, generator=generator)  # pyright: ignore
