"""The ``planish::`` operators of packed batches: the real tokens of a padded batch, one after another.

A padded batch has B rows of S positions, and a mask that says which hold a token. Packed, the T tokens lie row after
row in the order they had; ``starts`` [B+1] says where each row begins, ``places`` [T] which position of the flattened
batch (row * S + column) each token came from.

In a row whose mask has no token, or holds anything but 0 and 1, every position counts as a token, and what is computed
for the row is what the padded batch would give. Attention still applies the mask, so more tokens than the mask's never
change a result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


@torch.library.custom_op("planish::token_starts", mutates_args=())
def token_starts(mask: Tensor, keep: int, first: bool) -> Tensor:
    """Where each row's tokens start in the packed batch, int64 [B+1]; the last element is T.

    Args:
        mask: [B, S], ``keep`` at tokens and ``1 - keep`` at padding.
        keep: 1 or 0.
        first: whether column 0 counts as a token in every row, because somebody reads it.
    """
    return functional.pad(_kept(mask, keep, first).sum(1).cumsum(0), (1, 0))


@token_starts.register_fake
def _(mask: Tensor, keep: int, first: bool) -> Tensor:
    return mask.new_empty((mask.shape[0] + 1,), dtype=torch.int64)


@torch.library.custom_op("planish::token_places", mutates_args=())
def token_places(mask: Tensor, starts: Tensor, keep: int, first: bool) -> Tensor:
    """Position of each token in the flattened batch, int64 [T]; the other arguments are those of ``token_starts``."""
    return _kept(mask, keep, first).flatten().nonzero().squeeze(1)


@token_places.register_fake
def _(mask: Tensor, starts: Tensor, keep: int, first: bool) -> Tensor:
    return mask.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


@torch.library.custom_op("planish::token_slots", mutates_args=())
def token_slots(mask: Tensor, starts: Tensor, keep: int, first: bool, others: str) -> Tensor:
    """Where in the packed batch each position's token lies, int64 [B, S].

    Args:
        mask: as in ``token_starts``, like ``keep`` and ``first``.
        starts: of the rows.
        others: what other positions have: ``"none"`` -1; ``"zero"`` -1, also a first column that counts as a token but
            is padding; ``"nearest"`` the token of their row that is nearest, the earlier one of two.
    """
    kept = _kept(mask, keep, first)
    slots = kept.flatten().cumsum(0).view(kept.shape) - 1
    shown = kept if others == "none" else (mask == keep) | ~_fits(mask, keep)
    if others != "nearest":
        return slots.masked_fill(~shown, -1)
    column, size = torch.arange(mask.shape[1]), mask.shape[1]
    before = torch.where(shown, column, -size).cummax(1)[0]
    after = torch.where(shown, column, 2 * size).flip(1).cummin(1)[0].flip(1)
    return slots.gather(1, torch.where(column - before <= after - column, before, after))


@token_slots.register_fake
def _(mask: Tensor, starts: Tensor, keep: int, first: bool, others: str) -> Tensor:
    return mask.new_empty(mask.shape, dtype=torch.int64)


def _fits(mask: Tensor, keep: int) -> Tensor:
    """Which rows have a token and nothing but 0 and 1 in the mask, bool [B, 1]."""
    kept = mask == keep
    return (kept.any(1) & (kept | (mask == 1 - keep)).all(1)).unsqueeze(1)


def _kept(mask: Tensor, keep: int, first: bool) -> Tensor:
    """Which positions count as tokens, bool [B, S]."""
    kept = (mask == keep) | ~_fits(mask, keep)
    if first:
        kept[:, 0] = True
    return kept


@torch.library.custom_op("planish::segment_sum", mutates_args=())
def segment_sum(x: Tensor, starts: Tensor) -> Tensor:
    """Sum of each row's tokens: [T, ...] to [B, ...]."""
    rows = torch.repeat_interleave(torch.arange(starts.shape[0] - 1), starts.diff())
    return x.new_zeros(starts.shape[0] - 1, *x.shape[1:]).index_add(0, rows, x)


@segment_sum.register_fake
def _(x: Tensor, starts: Tensor) -> Tensor:
    return x.new_empty((starts.shape[0] - 1, *x.shape[1:]))


@torch.library.custom_op("planish::varlen_attention", mutates_args=())
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    order: Tensor,
    mask: Tensor | None,
    query_columns: Tensor | None,
    key_columns: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Scaled-dot-product attention within each row of a packed batch.

    Args:
        query: [Tq, h, d].
        key: [Tk, h, d].
        value: [Tk, h, w].
        query_starts: int64 [B+1].
        key_starts: int64 [B+1].
        order: int64 [B], the rows in the order of work, longest first; it does not change the result.
        mask: bool or added to the scores, broadcastable to [B, h, Sq, Sk] of the padded batch; read at the tokens'
            columns.
        query_columns: int64 [Tq], column of each query in the padded batch; given with a mask or where causal.
        key_columns: int64 [Tk].
        is_causal: a query sees keys up to its own column only.
        scale: of the scores.

    Returns:
        [Tq, h, w]; a query that sees no key gives 0.
    """
    out = query.new_zeros(query.shape[0], query.shape[1], value.shape[2])
    q_ends, k_ends = query_starts.tolist(), key_starts.tolist()
    for row in range(len(q_ends) - 1):
        q, k = slice(q_ends[row], q_ends[row + 1]), slice(k_ends[row], k_ends[row + 1])
        hidden = None if mask is None else mask[row if mask.shape[0] > 1 else 0]
        if hidden is not None and query_columns is not None and key_columns is not None:
            hidden = hidden.index_select(-1, key_columns[k])
            hidden = hidden.index_select(-2, query_columns[q]) if hidden.shape[-2] > 1 else hidden
        if is_causal and query_columns is not None and key_columns is not None:
            seen = key_columns[k] <= query_columns[q].unsqueeze(1)
            hidden = seen if hidden is None else _hide(hidden, seen)
        parts = (t.transpose(0, 1).unsqueeze(0) for t in (query[q], key[k], value[k]))
        result = functional.scaled_dot_product_attention(*parts, attn_mask=hidden, scale=scale)
        out[q] = result[0].transpose(0, 1)
    return out


def _hide(mask: Tensor, seen: Tensor) -> Tensor:
    return mask & seen if mask.dtype is torch.bool else mask.masked_fill(~seen, float("-inf"))


@varlen_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    order: Tensor,
    mask: Tensor | None,
    query_columns: Tensor | None,
    key_columns: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1], value.shape[2]))
