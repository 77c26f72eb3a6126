"""``planish::quantized_linear`` in native code against its reference: sizes, formats, scales, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planish
from planish.errors import UnsupportedOpsError
from planish.formats import Format, quantise
from planish.ops import planish_ops
from planish.program import Dim


class Quantized(nn.Module):
    """A layer in a format, and what else is done with its input and result."""

    def __init__(self, weight: Tensor, bias: Tensor | None, form: str, input_scale: float | None = None) -> None:
        super().__init__()
        held = quantise(weight, Format.parse(form).weight)
        for name, value in held.stored.items():
            self.register_buffer(name, value)
        self.register_buffer("bias", bias)
        self.form = form
        self.register_buffer("input_scale", None if input_scale is None else torch.tensor([input_scale]))

    def forward(self, x: Any) -> Tensor:
        """Of rows [..., K]."""
        held = (self.codes, self.scales, self.minimums, self.channels, self.bias)
        return planish_ops.quantized_linear(x, *held, self.input_scale, self.form)


def layer(n: int, k: int, form: str, *, bias: bool = True, input_scale: float | None = None) -> Quantized:
    """A seeded layer."""
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    return Quantized(weight, torch.randn(n, generator=generator) if bias else None, form, input_scale).eval()


def rows(m: int, k: int) -> Tensor:
    """Seeded activations, each row of its own size."""
    generator = torch.Generator().manual_seed(m + k)
    return torch.randn(m, k, generator=generator) * torch.logspace(-2, 2, m)[:, None]


def check(got: Tensor, want: Tensor, *, rtol: float = 1e-5) -> None:
    """Compare each row relative to its largest value."""
    assert got.shape == want.shape
    assert got.dtype is torch.float32
    size = want.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    torch.testing.assert_close(got / size, want / size, rtol=0.0, atol=rtol, equal_nan=True)


FORMS = ["w8a8", "w8a8-g32", "w8a8-g128-min", "w6a8-g64", "w5a8-g32", "w4a8-g32", "w4a8-g128", "w4a8-g32-min"]
FORMS += ["w3a8-g32", "w2a8-g32", "w2a8-min", "w4a8-g32-min-group", "w8a8-g32-group", "w6a8-g64-min-group"]


@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_rows(form: str) -> None:
    model = layer(51, 576, form)
    compiled = planish.compile(model, (rows(4, 576),), dynamic={"x": {0: Dim("m", 1, 300)}})
    for m in (1, 2, 5, 6, 7, 96, 97, 130):
        check(compiled(rows(m, 576)), model(rows(m, 576)))


@pytest.mark.parametrize("form", ["w8a8", "w4a8-g32", "w6a8-g128-min"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 31), (8, 32), (9, 33), (16, 200), (17, 64), (130, 40)])
def test_ragged_sizes(form: str, n: int, k: int) -> None:
    model, x = layer(n, k, form, bias=n % 2 == 0), rows(9, k)
    check(planish.compile(model, (x,))(x), model(x))


@pytest.mark.parametrize("form", FORMS)
def test_extremes_of_one_sign_do_not_saturate(form: str) -> None:
    """All codes of both operands are the largest there are: random ones hide an overflow."""
    model, x = Quantized(torch.ones(24, 576), None, form).eval(), torch.full((7, 576), 3.0)
    check(planish.compile(model, (x,))(x), model(x))
    check(planish.compile(model, (x,))(-x), -model(x))
    if "min" not in form:
        torch.testing.assert_close(model(x), torch.full((7, 24), 3.0 * 576), rtol=1e-3, atol=0.0)


def test_a_scale_from_calibration_clips() -> None:
    model, x = layer(20, 70, "w8a8-static", input_scale=0.01), rows(6, 70)
    assert x.abs().max() > 1.27
    check(planish.compile(model, (x,))(x), model(x))


@pytest.mark.parametrize("form", ["w8a8-static", "w8a8-g32-min-static", "w4a8-g32-static", "w4a8-g32-min-static"])
def test_codes_that_are_given(form: str) -> None:
    model = layer(51, 70, form, input_scale=0.02)
    for m in (1, 7, 130):
        x = torch.randint(-127, 128, (m, 70), dtype=torch.int8, generator=torch.Generator().manual_seed(m))
        check(planish.compile(model, (x,))(x), model(x))


@pytest.mark.parametrize("form", ["w8a8", "w4a8-g32", "w8a8-static"])
@pytest.mark.parametrize("kept", [True, False])
def test_an_equaliser_multiplies_what_becomes_codes(form: str, kept: bool) -> None:
    class Even(Quantized):
        def forward(self, x: Any) -> Tensor:
            held = (self.codes, self.scales, self.minimums, self.channels, self.bias, self.input_scale, self.form)
            return planish_ops.quantized_linear(x, *held, self.features, self.exact, self.equaliser)

    torch.manual_seed(0)
    weight, x = torch.randn(51, 70) / 8, torch.randn(130, 70)
    model = Even(weight, torch.randn(51), form, 0.03 if "static" in form else None).eval()
    model.register_buffer("equaliser", torch.rand(70) + 0.5)
    features = torch.tensor([3, 69]) if kept else None
    model.register_buffer("features", features)
    model.register_buffer("exact", weight[:, features].T.contiguous() if kept else None)
    for m in (1, 7, 130):
        check(planish.compile(model, (x[:m],))(x[:m]), model(x[:m]))


@pytest.mark.parametrize("form", ["w8a8", "w4a8-g32", "w8a8-static"])
def test_outliers_stay_fp32_and_do_not_decide_the_scale(form: str) -> None:
    class Kept(Quantized):
        def __init__(self, weight: Tensor, features: Tensor) -> None:
            super().__init__(weight.index_fill(1, features, 0.0), torch.randn(len(weight)), form, scale)
            self.register_buffer("features", features)
            self.register_buffer("exact", weight[:, features].T.contiguous())

        def forward(self, x: Any) -> Tensor:
            held = (self.codes, self.scales, self.minimums, self.channels, self.bias)
            return planish_ops.quantized_linear(x, *held, self.input_scale, self.form, self.features, self.exact)

    scale = 0.03 if "static" in form else None
    torch.manual_seed(0)
    weight, x, features = torch.randn(51, 70) / 8, torch.randn(300, 70), torch.tensor([3, 11, 69])
    x[:, features] *= 1000
    model = Kept(weight, features).eval()
    for m in (1, 7, 300):
        check(planish.compile(model, (x[:m],))(x[:m]), model(x[:m]))
    exact = torch.nn.functional.linear(x, weight, model.bias)
    plain = Quantized(weight, model.bias, form, scale)
    assert (model(x) - exact).norm() < 0.2 * (plain(x) - exact).norm()


def test_rows_of_zeros_and_of_what_is_no_number() -> None:
    model, x = layer(20, 70, "w4a8-g32"), rows(6, 70)
    x[0] = 0.0
    x[1, 69] = float("nan")
    x[2, 3] = float("inf")
    x[3] = 1e-37
    got, want = planish.compile(model, (x,))(x), model(x)
    assert torch.equal(got.isnan().all(1), torch.tensor([False, True, True, False, False, False]))
    check(got, want)
    assert torch.equal(got[0], model.bias)


def test_inside_a_model_that_reads_views() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layer(64, 48, "w8a8"), layer(10, 64, "w4a8-g32")

        def forward(self, x: Any) -> Tensor:
            hidden = nn.functional.gelu(self.first(x.transpose(1, 2)))
            return self.second(hidden[:, 1:]).softmax(-1)

    model, x = Model().eval(), torch.randn(3, 48, 5, generator=torch.Generator().manual_seed(3))
    compiled = planish.compile(model, (x,))
    # a hidden value may round to another code where it lies between two
    torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=1e-3)


def test_the_reference_is_near_the_layer_it_stands_for() -> None:
    weight, x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), rows(16, 512)
    exact = x @ weight.T
    errors = []
    for form in ("w8a8", "w6a8-g32", "w5a8-g32", "w4a8-g32", "w3a8-g32", "w2a8-g32"):
        got = Quantized(weight, None, form)(x)
        errors.append(((got - exact).norm() / exact.norm()).item())
    assert errors == sorted(errors)
    assert errors[0] < 0.02


@pytest.mark.parametrize(
    ("form", "reason"), [("w4-g32", "keeps activations in fp32"), ("w8a8", "its codes, scales and minimums must be")]
)
def test_what_has_no_kernel_says_why(form: str, reason: str) -> None:
    class Computed(Quantized):
        def forward(self, x: Any) -> Tensor:
            codes = self.codes if form != "w8a8" else self.codes ^ x[:1, :1].to(torch.uint8)
            return planish_ops.quantized_linear(x, codes, self.scales, None, self.channels, None, None, form)

    model = Computed(torch.randn(8, 32), None, form).eval()
    with pytest.raises(UnsupportedOpsError, match=reason):
        planish.compile(model, (rows(3, 32),))
