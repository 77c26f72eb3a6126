"""planish.formats: names, bytes, and the references of weights and activations."""

from __future__ import annotations

import pytest
import torch

from planish.errors import UnknownNameError
from planish.formats import BITS, FORMATS, Format, WeightFormat, quantise, quantise_rows


@pytest.mark.parametrize("weight", FORMATS, ids=lambda w: w.name)
@pytest.mark.parametrize("activation", ["fp", "a8", "a8-static"])
def test_a_name_and_its_format_stand_for_each_other(weight: WeightFormat, activation: str) -> None:
    form = Format(weight, activation)
    assert Format.parse(form.name) == form


def test_names() -> None:
    assert Format.parse("w4a8-g32") == Format(WeightFormat(4, 32), "a8")
    assert Format.parse("w8a8-static") == Format(WeightFormat(8), "a8-static")
    assert Format.parse("w5-g128-min") == Format(WeightFormat(5, 128, symmetric=False), "fp")


@pytest.mark.parametrize("name", ["", "w4a4", "w7a8", "w4a8-g48", "w4a8-32", "int4", "w8-static", "w4a8-g32 "])
def test_an_unknown_name_says_what_there_is(name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"(?s)w4a8-g32|bits are one of 8, 6, 5, 4, 3, 2; groups one of 32"):
        Format.parse(name)


def test_bytes_hold_codes_scales_and_minimums() -> None:
    assert WeightFormat(8).nbytes(10, 64) == 10 * (64 + 4)
    assert WeightFormat(4, 32).nbytes(10, 64) == 10 * (32 + 2 + 4)
    assert WeightFormat(4, 32, symmetric=False).nbytes(10, 64) == 10 * (32 + 2 * 4)
    assert WeightFormat(4, 128).nbytes(1, 576) == 288 + 5 + 4  # the last group has 64
    assert WeightFormat(3, 32).nbytes(1, 33) == 13 + 2 + 4


@pytest.mark.parametrize("weight", FORMATS, ids=lambda w: w.name)
@pytest.mark.parametrize("depth", [1, 31, 128, 200, 576])
def test_a_weight_is_off_by_half_a_step_or_one_at_the_far_end(weight: WeightFormat, depth: int) -> None:
    torch.manual_seed(depth)
    w = torch.randn(9, depth) * torch.logspace(-3, 3, 9)[:, None]
    q = quantise(w, weight)
    assert q.codes.dtype is torch.uint8
    assert int(q.codes.max()) < 1 << weight.bits
    assert q.scales.shape == (9, weight.groups(depth))
    step = q.steps().abs().repeat_interleave(weight.group or depth, 1)[:, :depth]
    # beyond half a step: the far end of a symmetric range, and the rounding of scales and minimums
    reach = 1.0 if weight.symmetric else 0.5
    extremes = w.abs().amax(1, keepdim=True)
    assert ((q.dequantise() - w).abs() <= reach * 1.001 * step + 2e-3 * extremes).all()
    again = quantise(q.dequantise(), weight)
    torch.testing.assert_close(again.dequantise(), q.dequantise(), rtol=2e-3, atol=0.0 if weight.symmetric else 1e-2)


def test_extremes_are_exact_where_scales_are_fp32() -> None:
    w = torch.tensor([[-3.0, 0.0, 1.5], [0.25, -0.125, 0.0], [0.0, 0.0, 0.0]])
    for bits in BITS:
        exact = quantise(w, WeightFormat(bits)).dequantise()
        assert exact[0, 0] == -3.0
        assert exact[1, 0] == 0.25
        assert (exact[2] == 0.0).all()
        ends = quantise(w, WeightFormat(bits, symmetric=False)).dequantise()
        torch.testing.assert_close(ends[:, :1].float(), w[:, :1])


def test_fewer_bits_are_worse_and_smaller_groups_better() -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 512)

    def error(form: WeightFormat) -> float:
        return (quantise(w, form).dequantise() - w).square().mean().item()

    by_bits = [error(WeightFormat(bits, 64)) for bits in BITS]
    assert by_bits == sorted(by_bits)
    by_group = [error(WeightFormat(4, group)) for group in (32, 64, 128, None)]
    assert by_group == sorted(by_group)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(0, 4), torch.tensor([[1.0, float("nan")]])])
def test_what_is_no_finite_matrix_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"matrix|NaN"):
        quantise(bad, WeightFormat(4, 32))


def test_weights_beyond_fp16_scales_are_refused() -> None:
    w = torch.full((2, 40), 1e7)
    with pytest.raises(ValueError, match="too large for fp16"):
        quantise(w, WeightFormat(4, 32, symmetric=False))
    for group in (32, None):
        torch.testing.assert_close(quantise(w, WeightFormat(4, group)).dequantise(), w, rtol=1e-6, atol=0.0)


def test_rows_keep_their_largest_magnitude() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-30, 2e-30, 0.0], [float("inf"), 1.0, 0.0]])
    codes, scales = quantise_rows(x)
    assert codes.dtype is torch.int8
    assert codes[0].tolist() == [64, -127, 32]
    assert scales[1].item() == 0.0
    assert codes[2, 1].item() == 127
    assert scales[3].isnan().all()
    torch.testing.assert_close((codes * scales)[:3], x[:3], rtol=0.0, atol=2.0 / 254)


def test_a_static_scale_clips() -> None:
    codes, scales = quantise_rows(torch.tensor([[1.0, -300.0, 0.4]]), 1.0)
    assert codes.tolist() == [[1, -127, 0]]
    assert scales.tolist() == [[1.0]]
