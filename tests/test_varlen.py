"""Attention on packed rows and segment sums against their definitions in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native import NATIVE
from torch import nn

import planish


class Varlen(nn.Module):
    """``planish::varlen_attention`` on rows of given lengths."""

    def __init__(self, is_causal: bool, scale: float) -> None:
        super().__init__()
        self.is_causal, self.scale = is_causal, scale

    def forward(
        self, q: Any, k: Any, v: Any, qs: Any, ks: Any, order: Any, mask: Any, qc: Any, kc: Any
    ) -> torch.Tensor:
        return torch.ops.planish.varlen_attention(q, k, v, qs, ks, order, mask, qc, kc, self.is_causal, self.scale)


def operands(
    lengths: list[int], heads: int, depth: int, width: int, keys: list[int] | None = None
) -> tuple[torch.Tensor, ...]:
    """q, k, v, starts, order, mask that hides nothing, and columns."""
    keys = keys or lengths
    generator = torch.Generator().manual_seed(sum(lengths))
    q = torch.randn(sum(lengths), heads, depth, generator=generator)
    k, v = (torch.randn(sum(keys), heads, n, generator=generator) for n in (depth, width))
    starts = [torch.tensor([0, *lens]).cumsum(0) for lens in (lengths, keys)]
    columns = [torch.cat([torch.arange(n) for n in lens]) for lens in (lengths, keys)]
    mask = torch.zeros(len(lengths), 1, 1, max(keys))
    return q, k, v, *starts, torch.tensor(keys).argsort(descending=True, stable=True), mask, *columns


def assert_as_defined(given: tuple[torch.Tensor, ...], target: str, *, is_causal: bool = False) -> None:
    model = Varlen(is_causal, given[0].shape[-1] ** -0.5).eval()
    got = planish.compile(model, given, target)(*given)
    wide = [t.double() if t.is_floating_point() else t for t in given]
    torch.testing.assert_close(got, model(*wide).float(), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("target", NATIVE)
@pytest.mark.parametrize(("depth", "width"), [(8, 8), (32, 32), (64, 64), (17, 40), (80, 16)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_of_all_lengths(depth: int, width: int, is_causal: bool, target: str) -> None:
    assert_as_defined(operands([1, 70, 0, 13, 32, 255], 3, depth, width), target, is_causal=is_causal)


@pytest.mark.parametrize("target", NATIVE)
def test_queries_of_their_own(target: str) -> None:
    assert_as_defined(operands([1, 5, 40], 2, 16, 16, keys=[33, 1, 100]), target)


@pytest.mark.parametrize("target", NATIVE)
def test_rows_longer_than_a_block_of_keys(target: str) -> None:
    given = operands([5000, 3, 2100], 1, 64, 64)
    given[1].mul_(3.0)  # the greatest score is raised from block to block
    assert_as_defined(given, target)
    hidden = given[6].clone()
    hidden[0, :, :, :4096] = float("-inf")
    hidden[1] = float("-inf")  # a row that sees no key
    assert_as_defined((*given[:6], hidden, *given[7:]), target, is_causal=False)


@pytest.mark.parametrize("form", ["bool", "heads", "pairs", "lowest"])
def test_masks(form: str) -> None:
    given = operands([9, 1, 30], 2, 16, 16)
    generator = torch.Generator().manual_seed(1)
    shape = {"bool": (3, 1, 1, 30), "heads": (1, 2, 30, 30), "pairs": (3, 2, 30, 30), "lowest": (3, 1, 1, 30)}[form]
    mask = torch.randn(shape, generator=generator)
    if form == "bool":
        mask = mask > 0
    elif form == "lowest":
        mask = torch.full(shape, torch.finfo(torch.float32).min)
    model = Varlen(False, 0.25).eval()
    given = (*given[:6], mask, *given[7:])
    got = planish.compile(model, given)(*given)
    torch.testing.assert_close(got, model(*given), rtol=1e-5, atol=5e-6)


def test_dense_attention_over_more_keys_than_a_block() -> None:
    q, k, v = (torch.randn(1, 2, n, 64) for n in (70, 5000, 5000))
    mask = torch.randn(70, 5000)

    class Dense(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    got = planish.compile(Dense().eval(), (q, k, v, mask))(q, k, v, mask)
    want = Dense()(*(t.double() for t in (q, k, v, mask)))
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("target", NATIVE)
@pytest.mark.parametrize("width", [(1,), (64,), (3, 67)])
def test_segment_sums(width: tuple[int, ...], target: str) -> None:
    class Sums(nn.Module):
        def forward(self, x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
            return torch.ops.planish.segment_sum(x, starts)

    x, starts = torch.randn(40, *width), torch.tensor([0, 7, 7, 8, 40])
    got = planish.compile(Sums().eval(), (x, starts), target)(x, starts)
    torch.testing.assert_close(got, Sums()(x.double(), starts).float(), rtol=1e-5, atol=1e-6)
