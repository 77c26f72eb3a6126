"""Outputs of a contender over all batches, and how well its embeddings agree with people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from planish.models.base import Batch, LoadedModel, Metric
from planish.models.embedding import embed
from planish.models.lee import pearson, rated


def outputs(call: Callable[..., Any], batches: Sequence[Batch], metric: Metric) -> list[torch.Tensor]:
    """What the metric judges, for each batch; copied, as a contender may reuse its output's memory."""
    return [metric.output(call(**batch)).clone() for batch in batches]


def correlation(
    loaded: LoadedModel, states: Callable[[Sequence[Batch]], list[torch.Tensor]], rows: int, max_len: int
) -> float:
    """Pearson correlation of the embeddings' cosines with human ratings of 1,225 pairs of the Lee documents.

    Args:
        loaded: the model that the contender stands for.
        states: its token states [rows, seq, width] for each batch.
        rows: documents of a batch.
        max_len: tokens per document at most.
    """
    known = rated(loaded.tokenizer)
    batches = known.documents.batches(len(known.documents.texts), rows, max_len)
    found = zip(states(batches), batches, strict=True)
    return pearson(torch.cat([embed(s, b["attention_mask"]) for s, b in found]), known.human)
