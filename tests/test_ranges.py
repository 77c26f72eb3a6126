"""Ranges of codes that are narrower than the weights' extremes."""

from __future__ import annotations

import pytest
import torch

from planish.formats import FORMATS, Quantized, WeightFormat, quantise
from planish.passes.precision import ranges
from planish.passes.precision.ranges import narrowed

BELOW_8 = [form for form in FORMATS if form.bits < 8]


def drawn(rows: int, depth: int) -> torch.Tensor:
    return torch.randn(rows, depth, generator=torch.Generator().manual_seed(0))


def squares(weight: torch.Tensor, held: Quantized, importance: torch.Tensor) -> torch.Tensor:
    return ((held.dequantise() - weight).square() * importance).sum(1)


@pytest.mark.parametrize("form", BELOW_8, ids=lambda form: form.name)
def test_no_row_is_worse_than_by_its_extremes(form: WeightFormat) -> None:
    weight, importance = drawn(24, 150), drawn(1, 150).square()
    plain = quantise(weight, form)
    found = narrowed(weight, plain, importance)
    assert found.format == form
    # scales at two levels are rounded, as those of the extremes are
    assert (squares(weight, found, importance) <= 1.02 * squares(weight, plain, importance)).all()
    some = 0.95 if form.bits <= 3 else 1.001
    assert squares(weight, found, importance).sum() < some * squares(weight, plain, importance).sum()


def test_what_counts_for_nothing_is_clipped() -> None:
    weight = torch.linspace(-1, 1, 32).repeat(4, 1)
    weight[:, 0] = 2.0
    importance = torch.ones(1, 32)
    importance[0, 0] = 0.0
    form = WeightFormat(4, 32)
    found = narrowed(weight, quantise(weight, form), importance).dequantise()
    assert found[0, 0] < 1.3
    assert float((found - weight)[:, 1:].abs().max()) < 0.08


def test_parts_of_a_weight_are_looked_at_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, form = drawn(20, 64), WeightFormat(3, 32, symmetric=False)
    plain, importance = quantise(weight, form), torch.ones(20, 64)
    whole = narrowed(weight, plain, importance)
    monkeypatch.setattr(ranges, "NUMBERS", 3 * 64)
    parts = narrowed(weight, plain, importance)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)


def test_rows_of_zeros_stay_zeros() -> None:
    weight = torch.zeros(2, 64)
    for form in BELOW_8:
        assert not narrowed(weight, quantise(weight, form), torch.ones(1, 64)).dequantise().any()
