"""GPTQ: what it gains on correlated inputs, and that it is plain rounding where there is nothing to gain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from planish.formats import Quantized, WeightFormat, quantise
from planish.passes.precision.gptq import BLOCK, gptq

FORMS = [WeightFormat(b, g, s) for b, g, s in ((4, 32, True), (3, 64, False), (2, None, True), (4, 128, True))]


def rounded(weight: Tensor, held: Quantized, moment: Tensor) -> Tensor:
    """The weight that GPTQ's codes stand for."""
    codes = gptq(weight, held, moment)
    assert codes.dtype is torch.uint8
    return Quantized(held.format, codes, held.scales, held.minimums, held.channels).dequantise()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_errors_on_correlated_inputs_fall(form: WeightFormat) -> None:
    torch.manual_seed(0)
    depth = BLOCK + 37
    weight = torch.randn(24, depth)
    x = torch.randn(2000, 20) @ torch.randn(20, depth) + 0.3 * torch.randn(2000, depth)
    held = quantise(weight, form)
    plain = (x @ (held.dequantise() - weight).T).square().mean()
    found = (x @ (rounded(weight, held, x.T @ x) - weight).T).square().mean()
    assert found < 0.5 * plain


def test_independent_inputs_round_as_usual() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 96)
    held = quantise(weight, WeightFormat(4, 32))
    assert torch.equal(gptq(weight, held, torch.diag(torch.rand(96))), held.codes)


def test_inputs_that_are_always_zero() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    held = quantise(weight, WeightFormat(4, 32))
    moment = torch.randn(64, 300) @ torch.randn(300, 64)
    moment = moment @ moment.T
    moment[:, 10] = moment[10] = 0
    assert rounded(weight, held, moment).isfinite().all()
    assert torch.equal(gptq(weight, held, torch.zeros(64, 64)), held.codes)


def test_the_weight_is_left_as_it_was() -> None:
    weight = torch.randn(8, 64)
    before = weight.clone()
    gptq(weight, quantise(weight, WeightFormat(2, 32)), torch.eye(64) + 1)
    assert torch.equal(weight, before)
