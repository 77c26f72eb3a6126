"""Causal language models of transformers as a step over packed tokens, whose cache is in the module's buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import CaptureError, DimError, first_lines
from planish.ops import CACHED

NAME = "planish"
"""Of the attention that is registered with transformers."""


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of a step belong."""

    sequence: Tensor
    position: Tensor


class _Cache:
    """What a model of transformers takes for its cache."""

    is_compileable = False

    def __init__(self, step: Step, tokens: Tokens) -> None:
        self.step, self.tokens, self.layers = step, tokens, [self]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Write the tokens' keys and values, [1, g, T, d]; returns the whole cache, which the attention reads."""
        held = [getattr(self.step, f"{name}_{layer}") for name in ("keys", "values")]
        for cache, new in zip(held, (key, value), strict=True):
            cache[self.tokens.sequence, self.tokens.position] = new[0].transpose(0, 1)
        return held[0], held[1]

    def get_seq_length(self, *_: Any) -> int:
        """Positions come with the tokens."""
        return 0

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        """Nothing is masked by a tensor."""
        return 0, 0


class Step(nn.Module):
    """One step of a model: new tokens to the logits at some of them.

    Attributes:
        model: of transformers, with a language model's head.
        batch: sequences that the cache has room for.
        max_len: positions of each.
    """

    def __init__(self, model: nn.Module, batch: int, max_len: int) -> None:
        super().__init__()
        _check(model, max_len)
        self.model = model
        for layer, (keys, values) in enumerate(_shapes(model)):
            for name, (heads, width) in (("keys", keys), ("values", values)):
                self.register_buffer(f"{name}_{layer}", torch.zeros(batch, max_len, heads, width))
        self.eval()

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows."""
        return int(self.model.get_input_embeddings().num_embeddings)  # pyright: ignore

    def forward(self, ids: Tensor, sequence: Tensor, position: Tensor, reads: Tensor) -> Tensor:
        """Logits [R, vocabulary] at the tokens ``reads``, int64 [R]; the other inputs are int64 [T]."""
        tokens = Tokens(sequence, position)
        mask = ids.new_zeros(1, 1, 1, 1, dtype=torch.float32)  # given whole, so that transformers makes none
        with _attending(self.model, tokens):
            found = self.model(
                input_ids=ids[None],
                attention_mask=mask,
                position_ids=position[None],
                past_key_values=_Cache(self, tokens),
                use_cache=True,
                logits_to_keep=reads,
            )
        return found.logits[0]


def _check(model: nn.Module, max_len: int) -> None:
    """Whether a model is one of transformers that generates text, and knows enough positions."""
    config: Any = getattr(model, "config", None)
    causal = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None  # pyright: ignore
    if config is None or not causal or getattr(config, "is_encoder_decoder", False):
        raise CaptureError(
            f"{type(model).__name__} is no causal language model of transformers",
            why="its cache and its attention are replaced by those of planish",
            fix="pass AutoModelForCausalLM.from_pretrained(...), or use planish.compile",
        )
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and max_len > most:
        raise DimError(f"max_len={max_len}, but the model knows {most} positions", fix=f"use max_len={most} or less")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [1, h, T, d] over the whole cache, to [1, T, h, w]."""
    if others.get("s_aux") is not None:
        raise CaptureError(
            "attention with sinks has no cached form",
            where=type(module).__name__,
            why="sinks are scores that belong to no token",
            fix="use a model without them",
        )
    tokens = _tokens[-1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = CACHED(
        query[0].transpose(0, 1),
        key,
        value,
        tokens.sequence,
        tokens.position,
        scale,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out[None], None


_tokens: list[Tokens] = []


@contextmanager
def _attending(model: nn.Module, tokens: Tokens) -> Iterator[None]:
    """Have the model attend by ``_attention``."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    _tokens.append(tokens)
    try:
        yield
    finally:
        _tokens.pop()
        config._attn_implementation = before


Shape = tuple[int, int]


class _Shapes(_Cache):
    """Sees which keys and values a model caches."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[Shape, Shape]] = {}
        self.layers = [self]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.found[layer] = (key.shape[1], key.shape[3]), (value.shape[1], value.shape[3])
        return key[0].transpose(0, 1)[None], value[0].transpose(0, 1)[None]


def _shapes(model: nn.Module) -> list[tuple[Shape, Shape]]:
    """Heads and width of the keys and values of each layer."""
    cache, zero = _Shapes(), torch.zeros(1, dtype=torch.int64)
    inputs = {"input_ids": zero[None], "attention_mask": torch.zeros(1, 1, 1, 1), "position_ids": zero[None]}
    try:
        with torch.inference_mode(), _attending(model, Tokens(zero, zero)):
            model(**inputs, past_key_values=cache, use_cache=True)
    except (AttributeError, TypeError, ValueError) as error:
        raise CaptureError(
            f"{type(model).__name__} does not run with a cache of keys and values",
            why=first_lines(error),
            fix="models whose layers keep something else have no cached form: use planish.compile",
        ) from error
    if not cache.found:
        raise CaptureError(f"{type(model).__name__} keeps no keys and values", fix="use planish.compile")
    return [cache.found[layer] for layer in range(len(cache.found))]
