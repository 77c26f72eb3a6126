"""Outputs of a contender over all batches, and their distance to eager's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from planish.models.base import Batch, Metric


def outputs(call: Callable[..., Any], batches: Sequence[Batch], metric: Metric) -> list[torch.Tensor]:
    """What the metric judges, for each batch; copied, as a contender may reuse its output's memory."""
    return [metric.output(call(**batch)).clone() for batch in batches]


def quality(
    call: Callable[..., Any], reference: Sequence[torch.Tensor], batches: Sequence[Batch], metric: Metric
) -> dict[str, float]:
    """Run a contender over all batches and compare it with the reference's outputs."""
    return metric.compare(reference, outputs(call, batches, metric), batches)
