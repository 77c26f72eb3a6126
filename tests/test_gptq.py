"""GPTQ: what it gains on correlated inputs, and that it is plain rounding where there is nothing to gain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from planish.formats import Quantized, WeightFormat, quantise
from planish.passes.precision.calibration import LEAST_DAMPING, Channels
from planish.passes.precision.gptq import BLOCK, TOGETHER, Compensation, Grid

FORMS = [WeightFormat(b, g, s) for b, g, s in ((4, 32, True), (3, 64, False), (2, None, True), (4, 128, True))]


def rounded(weight: Tensor, held: Quantized, moment: Tensor) -> Tensor:
    """The weight that GPTQ's codes stand for."""
    (codes,) = Compensation(moment, LEAST_DAMPING).codes([Grid(weight, held)])
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
    assert torch.equal(rounded(weight, held, torch.diag(torch.rand(96))), held.dequantise())


def test_inputs_that_are_always_zero() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    held = quantise(weight, WeightFormat(4, 32))
    moment = torch.randn(64, 300) @ torch.randn(300, 64)
    moment = moment @ moment.T
    moment[:, 10] = moment[10] = 0
    assert rounded(weight, held, moment).isfinite().all()
    assert torch.equal(rounded(weight, held, torch.zeros(64, 64)), held.dequantise())


def test_the_weight_is_left_as_it_was() -> None:
    weight = torch.randn(8, 64)
    before = weight.clone()
    rounded(weight, quantise(weight, WeightFormat(2, 32)), torch.eye(64) + 1)
    assert torch.equal(weight, before)


def test_weights_rounded_together_are_those_rounded_alone() -> None:
    torch.manual_seed(0)
    moment = torch.randn(64, 90)
    compensation = Compensation(moment @ moment.T, LEAST_DAMPING)
    sizes = (5, TOGETHER + 3, 40)
    grids = [Grid(w, quantise(w, f)) for n, f in zip(sizes, FORMS, strict=False) for w in [torch.randn(n, 64)]]
    together = compensation.codes(grids)
    assert [len(codes) for codes in together] == list(sizes)
    for grid, codes in zip(grids, together, strict=True):
        assert (codes != compensation.codes([grid])[0]).float().mean() < 1e-3  # products in another order


def test_evened_out_weights_and_columns_that_stay() -> None:
    """With factors the values are those times the factors; what rounding loses elsewhere does not change columns."""
    torch.manual_seed(0)
    weight, factors, exact = torch.randn(24, 96), torch.rand(96) + 0.5, torch.tensor([3, 50])
    x = torch.randn(2000, 20) @ torch.randn(20, 96) + 0.3 * torch.randn(2000, 96)
    held = quantise((weight / factors).index_fill(1, exact, 0.0), WeightFormat(3, 32))

    def error(codes: Tensor) -> float:
        stored = Quantized(held.format, codes, held.scales, held.minimums, held.channels).dequantise() * factors
        return float((x @ (stored.index_copy(1, exact, weight[:, exact]) - weight).T).square().mean())

    (codes,) = Compensation(x.T @ x, LEAST_DAMPING).codes([Grid(weight, held, factors, exact)])
    assert torch.equal(codes[:, exact], held.codes[:, exact])
    assert error(codes) < 0.5 * error(held.codes)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("evened", [False, True])
def test_fitted_scales_lessen_the_error(form: WeightFormat, evened: bool) -> None:
    torch.manual_seed(0)
    depth = 3 * 128 + 37
    weight, x = torch.randn(24, depth), torch.randn(2000, 20) @ torch.randn(20, depth) + 0.3 * torch.randn(2000, depth)
    factors = torch.rand(depth) + 0.5 if evened else torch.ones(depth)
    exact = torch.tensor([3, 50]) if evened else torch.tensor([], dtype=torch.int64)
    held = quantise((weight / factors).index_fill(1, exact, 0.0), form)
    compensation = Compensation(x.T @ x, LEAST_DAMPING)
    grid = Grid(weight, held, factors if evened else None, exact if evened else None)

    def error(found: Quantized) -> float:
        stored = (found.dequantise() * factors).index_copy(1, exact, weight[:, exact])
        return float((x @ (stored - weight).T).square().mean())

    (codes,), (found,) = compensation.codes([grid]), compensation.stored([grid])
    before = error(Quantized(form, codes, held.scales, held.minimums, held.channels))
    assert error(found) < (0.95 if form.group else 1.02) * before  # one scale of a row has little to fit
    for mine, given in zip(found.stored.values(), held.stored.values(), strict=True):
        assert (mine is None) == (given is None)
        assert mine is None or (mine.dtype, mine.shape) == (given.dtype, given.shape)


def test_scales_that_the_inputs_say_nothing_of_stay() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    held = quantise(weight, WeightFormat(4, 32))
    (found,) = Compensation(torch.zeros(64, 64), LEAST_DAMPING).stored([Grid(weight, held)])
    assert found.dequantise().isfinite().all()
    assert (found.dequantise() - weight).norm() < 1.01 * (held.dequantise() - weight).norm()
    zeros = quantise(torch.zeros(8, 64), WeightFormat(4, 32))
    (found,) = Compensation(torch.eye(64), LEAST_DAMPING).stored([Grid(torch.zeros(8, 64), zeros)])
    assert found.dequantise().abs().max() == 0


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_inputs_that_are_always_zero_do_not_set_scales(size: float) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64), size * torch.randn(4000, 8) @ torch.randn(8, 64)
    x = (x + 0.3 * size * torch.randn(4000, 64)) * (torch.arange(64) % 2)
    held = quantise(weight, WeightFormat(4, 32))
    compensation = Compensation(x[:256].T @ x[:256], LEAST_DAMPING)
    (fitted,), (codes,) = (compensation.stored([Grid(weight, held)], refits=refits) for refits in (True, False))

    def error(found: Quantized) -> float:
        return float((x[256:] @ (found.dequantise() - weight).T).square().mean())

    assert torch.equal(codes.scales, held.scales)
    assert error(fitted) < 0.97 * error(codes)


def test_few_rows_are_not_believed() -> None:
    """What correlates by chance in few rows must not make codes worse than the nearest ones on others."""
    torch.manual_seed(0)
    depth = 128
    weight, fresh = torch.randn(32, depth), torch.randn(4000, depth)
    held = quantise(weight, WeightFormat(4, 32))
    few = Channels.none(depth)
    few.moments = torch.zeros(2, depth, depth)
    for half in range(2):
        few.add(torch.randn(12, depth), None, half)

    def error(damping: float) -> float:
        (found,) = Compensation(few.moment(), damping).stored([Grid(weight, held)], refits=False)
        return float((fresh @ (found.dequantise() - weight).T).square().mean())

    nearest = float((fresh @ (held.dequantise() - weight).T).square().mean())
    assert few.damping() > 10 * LEAST_DAMPING
    assert error(few.damping()) < 1.1 * nearest < 1.3 * nearest < error(LEAST_DAMPING)
