"""Documents as padded batches of token ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from planish.errors import InputError
from planish.models.base import Batch


@dataclass(frozen=True)
class Documents:
    """Texts in a fixed order, turned into the batches an encoder takes.

    Attributes:
        texts: the documents.
        tokenizer: a ``tokenizers.Tokenizer`` without padding and truncation, which ends every text with ``[SEP]``.
        pad_id: the id that fills a row up to its batch's length; 0 is BERT's [PAD].
    """

    texts: tuple[str, ...] = field(repr=False)
    tokenizer: Any = field(repr=False)
    pad_id: int = 0

    def ids(self, n_docs: int, max_len: int) -> list[list[int]]:
        """Token ids of the first ``n_docs`` documents; a longer one is cut to ``max_len`` and keeps its final [SEP].

        Raises:
            InputError: more documents than there are, or no room for [CLS] and [SEP].
        """
        if not 1 <= n_docs <= len(self.texts):
            raise InputError(f"n_docs is {n_docs}", why=f"there are {len(self.texts)} documents", fix="ask for fewer")
        if max_len < 2:
            raise InputError(f"max_len is {max_len}", why="[CLS] and [SEP] take two tokens", fix="use at least 2")
        encoded = [e.ids for e in self.tokenizer.encode_batch(list(self.texts[:n_docs]))]
        return [row if len(row) <= max_len else [*row[: max_len - 1], row[-1]] for row in encoded]

    def batches(self, n_docs: int = 64, batch: int = 16, max_len: int = 256) -> list[Batch]:
        """The first documents as batches padded to their longest row.

        Args:
            n_docs: how many documents, in file order.
            batch: documents per batch; the last one may hold fewer.
            max_len: upper bound of tokens per document.

        Returns:
            For each batch ``input_ids`` and ``attention_mask`` (1 at real tokens), both int64 of shape [batch, seq].

        Raises:
            InputError: a count is out of range.
        """
        if batch < 1:
            raise InputError(f"batch is {batch}", why="a batch holds at least one document", fix="use at least 1")
        rows = self.ids(n_docs, max_len)
        return [self._pad(rows[i : i + batch]) for i in range(0, n_docs, batch)]

    def _pad(self, rows: list[list[int]]) -> Batch:
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}
