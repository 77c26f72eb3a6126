"""The next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planish.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: only so many of the most probable tokens; 0 for all.
        top_p: only the fewest most probable tokens whose probabilities add up to this; 1 for all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p} draw no tokens",
                fix="use a temperature and top_k of 0 or more, and top_p above 0 and up to 1",
            )

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens, int64 [R], from logits [R, vocabulary]."""
        if not self.temperature:
            return logits.argmax(-1)
        ordered, ids = (logits.double() / self.temperature).sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            ordered[:, self.top_k :] = -torch.inf
        chances = ordered.softmax(-1)
        before = chances.cumsum(-1) - chances
        chances = chances.masked_fill(before >= self.top_p, 0.0)
        return ids.gather(-1, torch.multinomial(chances, 1, generator=generator))[:, 0]
