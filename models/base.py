"""What every loaded model brings: the module, how to call it, real data, and how to judge its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from planish.program import Dim

Batch = dict[str, torch.Tensor]


class Data(Protocol):
    """Real inputs, in a fixed order."""

    def batches(self, n_docs: int = 64, batch: int = 16, max_len: int = 256) -> list[Batch]:
        """The first ``n_docs`` documents as padded batches of at most ``batch`` documents of ``max_len`` tokens.

        Images are documents without a length.
        """
        ...


class Metric(Protocol):
    """How far a model's outputs are from the reference's."""

    def output(self, result: Any) -> torch.Tensor:
        """The tensor that is judged, taken from what the model returned."""
        ...

    def compare(
        self, reference: Sequence[torch.Tensor], candidate: Sequence[torch.Tensor], batches: Sequence[Batch]
    ) -> dict[str, float]:
        """Named numbers over all batches; ``reference[i]`` and ``candidate[i]`` are outputs for ``batches[i]``."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model ready to compile, run and judge.

    Attributes:
        name: its name in the registry.
        model: the module, in eval mode and without gradients.
        tokenizer: text to ids, without padding and truncation; None for images.
        inputs: example inputs by argument name: a small batch of real data.
        dynamic: argument name to {axis: Dim}, for ``planish.compile(..., dynamic=...)``.
        data: real inputs.
        metric: how outputs are compared.
        folder: the checkpoint's folder as Hugging Face lays it out, for other engines to convert; None without one.
    """

    name: str
    model: torch.nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    inputs: Batch = field(repr=False)
    dynamic: dict[str, dict[int, Dim]]
    data: Data
    metric: Metric
    folder: Path | None = None
