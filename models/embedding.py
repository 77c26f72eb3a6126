"""Sentence embeddings from token states, and the distance between two sets of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from planish.errors import NumericError
from planish.models.base import Batch


def embed(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the token states at valid positions, scaled to length 1.

    Args:
        hidden: token states [batch, seq, width].
        mask: 1 at valid tokens, [batch, seq]; each row has at least one.

    Returns:
        Embeddings [batch, width] in the dtype of ``hidden``.
    """
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


@dataclass(frozen=True)
class EmbeddingMetric:
    """Judges an encoder by its embeddings and by its token states."""

    def output(self, result: Any) -> torch.Tensor:
        """The token states [batch, seq, width] of a model output (an object or a dict) or of a tuple's first member."""
        if isinstance(result, dict):
            return cast("dict[str, torch.Tensor]", result)["last_hidden_state"]
        return cast("tuple[torch.Tensor]", result)[0] if isinstance(result, tuple) else result.last_hidden_state

    def compare(
        self, reference: Sequence[torch.Tensor], candidate: Sequence[torch.Tensor], batches: Sequence[Batch]
    ) -> dict[str, float]:
        """Distance of a candidate's token states from the reference's, over all batches.

        Args:
            reference: token states [batch, seq, width] per batch.
            candidate: the same shapes, from the model that is judged.
            batches: the inputs, for their ``attention_mask``.

        Returns:
            ``cosine_min`` and ``cosine_mean`` over the documents' embeddings, and ``max_abs`` over the token states at
            valid positions. Computed in fp64, so that rounding of the metric itself does not show.

        Raises:
            NumericError: shapes differ, or a value at a valid position is NaN or infinite.
        """
        cosines: list[torch.Tensor] = []
        max_abs = 0.0
        for i, (ref, cand, batch) in enumerate(zip(reference, candidate, batches, strict=True)):
            if ref.shape != cand.shape:
                raise NumericError(f"batch {i}: outputs of shape {list(cand.shape)}, reference {list(ref.shape)}")
            mask = batch["attention_mask"]
            valid = mask.bool()
            # What padding holds is nobody's business: a NaN there must not reach the mean through 0 * NaN.
            a, b = (x.double().masked_fill(~valid.unsqueeze(-1), 0.0) for x in (ref, cand))
            for name, x in (("reference", a), ("judged model", b)):
                if not bool(torch.isfinite(x).all()):
                    raise NumericError(f"batch {i}: NaN or infinity at a valid position of the {name}'s output")
            cosines.append((embed(a, mask) * embed(b, mask)).sum(-1))
            max_abs = max(max_abs, (a - b).abs().max().item())
        cosine = torch.cat(cosines)
        return {"cosine_min": cosine.min().item(), "cosine_mean": cosine.mean().item(), "max_abs": max_abs}
