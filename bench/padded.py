"""Padded batches with known lengths: exact fills, evenly spread lengths, and the same rows sorted by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import floor

import torch

from planish.models.base import Batch

_IDS = (1000, 30000)
"""Range of the random token ids: whole words of BERT's vocabulary."""


@dataclass(frozen=True)
class PaddedSet:
    """Batches whose valid tokens stand left in their rows.

    Attributes:
        label: names the set in rows and tables.
        batches: ``input_ids`` and ``attention_mask`` each, [rows, seq].
    """

    label: str
    batches: list[Batch]

    @property
    def shapes(self) -> list[list[int]]:
        """[rows, seq] of each batch."""
        return [list(batch["input_ids"].shape) for batch in self.batches]

    @property
    def lengths(self) -> list[int]:
        """Valid tokens of each row, over all batches."""
        return [int(n) for batch in self.batches for n in batch["attention_mask"].sum(1)]


def spread(count: int, low: float, high: float) -> list[int]:
    """``count`` whole numbers, evenly spaced from ``low`` to ``high`` (one: their middle), each within 1 of its place.

    Their sum is exactly ``count * (low + high) / 2`` where that is whole: the running sum is rounded, not each number.
    """
    step = (high - low) / (count - 1) if count > 1 else 0.0
    first = low if count > 1 else (low + high) / 2
    sums = [0, *(floor(total + 0.5) for total in accumulate(first + i * step for i in range(count)))]
    return [after - before for before, after in pairwise(sums)]


def filled(rows: int, seq: int, fill: float) -> list[int]:
    """Lengths of one batch that hold exactly ``fill`` of its ``rows * seq`` places.

    One row is full, which is why the batch is padded to ``seq``; the others spread evenly around their mean, up to
    three quarters of the way to the nearer of 0 and ``seq``.

    Raises:
        ValueError: the share is no whole number of tokens, or too small for the full row and one token in each other.
    """
    tokens = round(fill * rows * seq)
    if abs(tokens - fill * rows * seq) > 1e-6 or not seq + rows - 1 <= tokens <= rows * seq:
        raise ValueError(f"{fill} of {rows} x {seq} places: no batch with one full row and no empty one has that fill")
    if rows == 1:
        return [seq]
    mean = (tokens - seq) / (rows - 1)
    reach = 0.75 * min(mean - 1, seq - mean)
    return [seq, *spread(rows - 1, mean - reach, mean + reach)]


def batch_of(lengths: Sequence[int], seq: int, seed: int) -> Batch:
    """Random token ids in rows of the given lengths, padded with id 0 to ``seq``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(*_IDS, (len(lengths), seq), generator=generator)
    mask = (torch.arange(seq) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def fill_set(rows: int, seq: int, fill: float) -> PaddedSet:
    """One batch with exactly that fill, its rows in seeded order."""
    lengths = _shuffled(filled(rows, seq, fill), seed=seq)
    return PaddedSet(f"fill {fill:g} x{seq}", [batch_of(lengths, seq, seed=seq)])


def uniform_set(docs: int, rows: int, seq: int) -> PaddedSet:
    """``docs`` rows with lengths spread evenly from 0.2 to 1 times ``seq``, in seeded order, all padded to ``seq``.

    The mean is 0.6 of ``seq``, as in ByteTransformer's measurements (arXiv 2210.03052).
    """
    lengths = _shuffled(spread(docs, 0.2 * seq, seq), seed=seq)
    parts = [lengths[i : i + rows] for i in range(0, docs, rows)]
    return PaddedSet(f"uniform x{seq}", [batch_of(part, seq, seed=seq + i) for i, part in enumerate(parts)])


def _shuffled(lengths: Sequence[int], seed: int) -> list[int]:
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    return [lengths[int(i)] for i in order]


@dataclass(frozen=True)
class Sorted:
    """The rows of a set sorted by length and cut into batches of the same sizes, each padded to its own longest row.

    Attributes:
        batches: the new batches.
        order: for each row of them the row it was, both counted over all batches.
    """

    batches: list[Batch]
    order: list[int]

    def restore(self, outputs: Sequence[torch.Tensor], batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Outputs for the new batches, laid out as for the old ones, with zeros at padding.

        Args:
            outputs: token states [rows, seq, width] for each new batch.
            batches: the old batches.
        """
        rows: dict[int, torch.Tensor] = dict(zip(self.order, (row for out in outputs for row in out), strict=True))
        restored: list[torch.Tensor] = []
        first = 0
        for batch in batches:
            count, seq = batch["attention_mask"].shape
            whole = outputs[0].new_zeros(count, seq, outputs[0].shape[-1])
            for i, mask in enumerate(batch["attention_mask"]):
                length = int(mask.sum())
                whole[i, :length] = rows[first + i][:length]
            restored.append(whole)
            first += count
        return restored


def sort_by_length(batches: Sequence[Batch]) -> Sorted:
    """See :class:`Sorted`; rows of equal length keep their order."""
    rows = [(ids, mask) for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
    lengths = [int(mask.sum()) for _, mask in rows]
    order = sorted(range(len(rows)), key=lambda i: lengths[i])
    made: list[Batch] = []
    first = 0
    for batch in batches:
        part = order[first : first + len(batch["input_ids"])]
        seq = max(lengths[i] for i in part)
        ids, masks = ([rows[i][which][:seq] for i in part] for which in (0, 1))
        made.append({"input_ids": torch.stack(ids), "attention_mask": torch.stack(masks)})
        first += len(part)
    return Sorted(made, order)
