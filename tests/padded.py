"""Padded batches for tests: masks of every kind, and tiny encoders of every family."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from planish.program import Dim

MASKS = ("right", "left", "holes", "one", "full")
AXES = {0: Dim("batch", 1, 16), 1: Dim("seq", 1, 64)}
DYNAMIC = {"input_ids": AXES, "attention_mask": AXES}
ENCODERS = (
    *("bert", "roberta", "distilbert", "albert", "electra", "mpnet", "xlm-roberta", "modernbert"),
    "nn.TransformerEncoder",
)


def mask_of(kind: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A mask [rows, columns], 1 at tokens; every row has one or more."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    column = torch.arange(columns)
    if kind == "right":
        mask = column < lengths
    elif kind == "left":
        mask = column >= columns - lengths
    elif kind == "holes":
        mask = torch.randint(0, 2, (rows, columns), generator=generator).bool()
        mask[torch.arange(rows), lengths.squeeze(1) - 1] = True
    elif kind == "one":
        mask = (column < 1).expand(rows, columns)
    else:
        mask = torch.ones(rows, columns, dtype=torch.bool)
    return mask.long()


def batch(kind: str, rows: int, columns: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids and a mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (rows, columns), generator=generator)
    return {"input_ids": ids, "attention_mask": mask_of(kind, rows, columns, seed)}


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` with an embedding in front and the mask that transformers' models take."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)


def encoder(name: str, **changes: Any) -> nn.Module:
    """A random tiny encoder: two layers, 32 wide, 4 heads."""
    torch.manual_seed(0)
    if name == "nn.TransformerEncoder":
        return TorchEncoder().eval()
    with _quiet():
        from transformers import AutoConfig, AutoModel

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 96, "vocab_size": 100, "pad_token_id": 1}
    if name == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 100, "pad_token_id": 1}
    elif name in ("albert", "electra"):
        sizes["embedding_size"] = 16
    elif name == "modernbert":
        sizes |= {"local_attention": 8, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return AutoModel.from_config(AutoConfig.for_model(name, **sizes | changes)).eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers says much about image processors when it is imported."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def states(output: Any) -> torch.Tensor:
    """The token states of a model's output."""
    return output if isinstance(output, torch.Tensor) else output[0]
