"""Convolutions and layers on codes that are given, in native code against their references."""

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


def codes_of(x: Tensor, scale: float) -> Tensor:
    """As a quantising pass writes it."""
    return (x * (1 / scale)).round().clamp(-127, 127).to(torch.int8)


class Conv(nn.Module):
    """A convolution in a format on codes, and what follows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, form: str, window: tuple[Any, ...], groups: int) -> None:
        super().__init__()
        held = quantise(weight.movedim(1, -1).flatten(1), Format.parse(form).weight)
        for name, value in held.stored.items():
            self.register_buffer(name, value)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", torch.tensor([0.05]))
        self.form, self.window, self.groups = form, (list(weight.shape[2:]), *window), groups

    def forward(self, x: Any) -> Tensor:
        """Of codes [B, spatial..., C]."""
        held = (self.codes, self.scales, self.minimums, self.channels, self.bias, self.input_scale)
        return planish_ops.quantized_convolution(x, *held, self.form, *self.window, self.groups)


def conv(shape: tuple[int, ...], form: str, window: tuple[Any, ...], groups: int = 1) -> Conv:
    """A seeded convolution."""
    generator = torch.Generator().manual_seed(sum(shape))
    bias = torch.randn(shape[0], generator=generator)
    return Conv(torch.randn(*shape, generator=generator), bias, form, window, groups).eval()


def codes(*shape: int) -> Tensor:
    """Seeded codes of activations."""
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


def check(got: Tensor, want: Tensor) -> None:
    """Compare relative to the largest value."""
    assert got.shape == want.shape
    torch.testing.assert_close(got / want.abs().max(), want / want.abs().max(), rtol=0.0, atol=1e-6)


DENSE = [
    ((8, 3, 3, 3), ([2, 2], [0, 0, 1, 1], [1, 1])),
    ((40, 33, 3, 3), ([1, 1], [1, 1, 1, 1], [1, 1])),
    ((16, 16, 5, 1), ([1, 2], [2, 0, 2, 0], [1, 1])),
    ((24, 8, 3, 3), ([1, 1], [2, 2, 2, 2], [2, 2])),
    ((24, 40, 1, 1), ([2, 2], [0, 0, 0, 0], [1, 1])),
    ((24, 40, 3), ([1], [1, 1], [1])),
]


@pytest.mark.parametrize(("shape", "window"), DENSE)
@pytest.mark.parametrize("form", ["w8a8-static", "w4a8-g32-static"])
def test_dense(shape: tuple[int, ...], window: tuple[Any, ...], form: str) -> None:
    model = conv(shape, form, window)
    spatial = [11, 9][: len(shape) - 2]
    compiled = planish.compile(model, (codes(1, *spatial, shape[1]),), dynamic={"x": {0: Dim("batch", 1, 4)}})
    for batch in (1, 3):
        x = codes(batch, *spatial, shape[1])
        check(compiled(x), model(x))


DEPTHWISE = [
    ((72, 1, 3, 3), ([1, 1], [1, 1, 1, 1], [1, 1]), (14, 14)),
    ((72, 1, 5, 5), ([2, 2], [1, 1, 2, 2], [1, 1]), (14, 13)),
    ((13, 1, 3, 3), ([1, 1], [2, 2, 2, 2], [2, 2]), (9, 11)),
    ((130, 1, 2, 3), ([1, 1], [0, 1, 0, 1], [1, 1]), (7, 7)),
    ((64, 1, 5), ([1], [2, 2], [1]), (30,)),
]


@pytest.mark.parametrize(("shape", "window", "spatial"), DEPTHWISE)
def test_depthwise(shape: tuple[int, ...], window: tuple[Any, ...], spatial: tuple[int, ...]) -> None:
    model = conv(shape, "w8a8-static", window, groups=shape[0])
    compiled = planish.compile(model, (codes(1, *spatial, shape[0]),), dynamic={"x": {0: Dim("batch", 1, 4)}})
    for batch in (1, 3):
        x = codes(batch, *spatial, shape[0])
        check(compiled(x), model(x))
    assert [call.op for call in compiled._compiled.executable.plan.calls] == ["qdepthwise"]


@pytest.mark.parametrize("groups", [1, 24])
def test_extremes_of_one_sign_do_not_overflow(groups: int) -> None:
    model = Conv(torch.ones(24, 24 // groups, 5, 5), None, "w8a8-static", ([1, 1], [0] * 4, [1, 1]), groups).eval()
    x = torch.full((1, 9, 9, 24), 127, dtype=torch.int8)
    check(planish.compile(model, (x,))(x), model(x))
    check(planish.compile(model, (x,))(-x), -model(x))


def test_codes_between_layers_are_stored_as_bytes() -> None:
    """What makes codes of a layer's result is done on its tiles, by whatever kernel computes it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = conv((48, 24, 1, 1), "w8a8-static", ([1, 1], [0] * 4, [1, 1]))
            self.each = conv((48, 1, 3, 3), "w8a8-static", ([1, 1], [1] * 4, [1, 1]), groups=48)
            self.down = conv((16, 48, 3, 3), "w8a8-static", ([1, 1], [1] * 4, [1, 1]))
            self.head = conv((20, 16, 1, 1), "w8a8-static", ([1, 1], [0] * 4, [1, 1]))
            names = ("codes", "scales", "minimums", "channels", "bias", "input_scale")
            self.held = [getattr(self.head, name) for name in names]

        def forward(self, x: Any) -> Tensor:
            x = codes_of(self.each(codes_of(self.up(x).clamp(0, 60), 0.5)).relu(), 2.0)
            return planish_ops.quantized_linear(codes_of(self.down(x), 10.0), *self.held, "w8a8-static") + 1

    model, x = Model().eval(), codes(2, 10, 12, 24)
    compiled = planish.compile(model, (x,))
    got, want = compiled(x), model(x)
    assert (got - want).norm() < 2e-3 * want.norm()  # a value may round to another code where it lies between two
    plan = compiled._compiled.executable.plan
    assert len(plan.calls) == 4
    between = [b for b in plan.buffers if b.kind == "arena" and not b.name.endswith("scratch")]
    assert [b.itemsize for b in between] == [1, 1, 1]


@pytest.mark.parametrize(
    ("shape", "form", "groups"), [((48, 1, 3, 3), "w8a8-static", 24), ((24, 1, 3, 3), "w8a8-g32-static", 24)]
)
def test_groups_without_a_kernel_are_refused(shape: tuple[int, ...], form: str, groups: int) -> None:
    model = conv(shape, form, ([1, 1], [1] * 4, [1, 1]), groups)
    with pytest.raises(UnsupportedOpsError, match="of 24 channels in 24 groups"):
        planish.compile(model, (codes(1, 5, 5, 24),))


def test_codes_with_an_equaliser_are_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = conv((8, 32, 1, 1), "w8a8-static", ([1, 1], [0] * 4, [1, 1]))
            self.register_buffer("even", torch.ones(32))

        def forward(self, x: Any) -> Tensor:
            held = (self.layer.codes, self.layer.scales, None, None, None, self.layer.input_scale, "w8a8-static")
            return planish_ops.quantized_linear(x, *held, None, None, self.even)

    with pytest.raises(UnsupportedOpsError, match="neither outliers nor an equaliser"):
        planish.compile(Model().eval(), (codes(3, 32),))
