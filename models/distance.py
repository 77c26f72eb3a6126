"""How far tensors are from those of the reference: what every metric but the embeddings' starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from planish.errors import NumericError
from planish.models.base import Batch


def distance(reference: Sequence[torch.Tensor], candidate: Sequence[torch.Tensor]) -> dict[str, float]:
    """Largest difference between two lists of tensors of equal shapes, in fp64.

    Returns:
        ``max_abs``, and ``max_rel``: the same over the largest magnitude in the reference.

    Raises:
        NumericError: shapes differ, or a value is NaN or infinite.
    """
    max_abs = largest = 0.0
    for i, (ref, cand) in enumerate(zip(reference, candidate, strict=True)):
        if ref.shape != cand.shape:
            raise NumericError(f"batch {i}: outputs of shape {list(cand.shape)}, reference {list(ref.shape)}")
        for name, x in (("reference", ref), ("judged model", cand)):
            if not bool(torch.isfinite(x).all()):
                raise NumericError(f"batch {i}: NaN or infinity in the {name}'s output")
        max_abs = max(max_abs, (ref.double() - cand.double()).abs().max().item())
        largest = max(largest, ref.abs().max().item())
    return {"max_rel": max_abs / largest if largest else max_abs, "max_abs": max_abs}


@dataclass(frozen=True)
class TensorMetric:
    """Judges a model by all values it returns."""

    def output(self, result: Any) -> torch.Tensor:
        """All tensors of the result, in its order, as one row [values]."""
        return torch.cat([tensor.flatten() for tensor in pytree.tree_leaves(result)])

    def compare(
        self, reference: Sequence[torch.Tensor], candidate: Sequence[torch.Tensor], batches: Sequence[Batch]
    ) -> dict[str, float]:
        """See :func:`distance`."""
        return distance(reference, candidate)
