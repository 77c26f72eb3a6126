"""The ``planish::`` operators of a decoder's cache: what tokens of several sequences saw before them.

Tokens come packed, [T, ...], whatever sequences they are from: ``sequence`` [T] says which, ``position`` [T] where in
it. A cache has room for B sequences of L positions, [B, L, heads, width]; what is at positions that were not written
yet, or that belong to an earlier text, is never read.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("planish::cached_attention", mutates_args=())
def cached_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequence: Tensor,
    position: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Causal attention of new tokens over the cache, in which they are already.

    Args:
        query: [T, h, d]; h is a multiple of g, and consecutive heads share a head of keys and values.
        keys: [B, L, g, d].
        values: [B, L, g, w].
        sequence: int64 [T], of each token.
        position: int64 [T]; a token sees the keys of its sequence up to its own position.
        scale: of the scores.
        window: most keys that a token sees, its own among them; 0 for all.
        softcap: c in ``c tanh(score / c)`` (Gemma 2); 0 for none.

    Returns:
        [T, h, w].
    """
    heads, shared = query.shape[1], query.shape[1] // keys.shape[2]
    rows = list[Tensor]()
    for t, (row, last) in enumerate(zip(sequence.tolist(), position.tolist(), strict=True)):
        first = max(0, last + 1 - window) if window else 0
        seen = slice(first, last + 1)
        k, v = (c[row, seen].repeat_interleave(shared, 1) for c in (keys, values))
        scores = torch.einsum("hd,khd->hk", query[t], k) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        rows.append(torch.einsum("hk,khw->hw", scores.softmax(-1), v))
    return torch.stack(rows) if rows else query.new_zeros(0, heads, values.shape[3])


@cached_attention.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequence: Tensor,
    position: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1], values.shape[3]))
