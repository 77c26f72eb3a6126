"""Winograd's minimal filtering: its matrices exactly, its kernel against eager, and when it is chosen."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from native import WEAKER
from torch import nn

import planish
from planish.backends.tvm.winograd_tile import INPUTS, OUTPUTS, WINDOW, matrices

TARGETS = ("cpu", *WEAKER)


def check(model: nn.Module, *inputs: torch.Tensor, target: str = "cpu", **options: Any) -> planish.CompiledModel:
    """Compile for the first input and compare with the fp64 model at all of them."""
    native = planish.compile(model, inputs[:1], target, **options)
    exact = [model.double()(x.double()).detach() for x in inputs]
    model.float()
    for x, want in zip(inputs, exact, strict=True):
        torch.testing.assert_close(native(x).double(), want, rtol=0, atol=4e-6 * want.abs().max().item())
    return native


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """A target."""
    return str(request.param)


def test_the_matrices_filter_exactly() -> None:
    a, g, b = matrices()

    def times(matrix: Any, vector: list[Fraction]) -> list[Fraction]:
        return [sum((f * v for f, v in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]

    data = [Fraction(n) for n in (3, -1, 4, 1, -5, 9)]
    window = [Fraction(n) for n in (2, -7, 1)]
    products = [x * y for x, y in zip(times(b, data), times(g, window), strict=True)]
    direct = [sum(data[i + k] * window[k] for k in range(WINDOW)) for i in range(OUTPUTS)]
    assert len(products) == INPUTS
    assert times(a, products) == direct


class Block(nn.Module):
    """A pointwise and a 3 x 3 convolution with a residual, as in a residual network."""

    def __init__(self, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, inputs, 1), nn.Conv2d(inputs, outputs, 3, **options)
        self.shortcut = nn.Conv2d(inputs, outputs, 3, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """relu(conv(conv(x)) + shortcut(x))."""
        y = torch.relu(self.first(x))
        return torch.relu(self.second(y) + self.shortcut(y))


@pytest.mark.parametrize(
    ("channels", "size", "padding"),
    [((20, 50), (9, 14), 1), ((48, 64), (8, 8), 1), ((64, 32), (18, 11), 0), ((40, 33), (6, 13), (2, 0))],
    ids=str,
)
def test_against_eager(target: str, channels: tuple[int, int], size: tuple[int, int], padding: Any) -> None:
    """Whole and cut-off tiles, ragged channels, padding, a residual read by the epilogue."""
    torch.manual_seed(0)
    model = Block(*channels, padding=padding).eval()
    native = check(model, torch.randn(3, channels[0], *size), target=target)
    assert "conv_winograd" in native.report()


def test_more_tiles_than_are_transformed_at_once(target: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 256, 1), nn.Conv2d(256, 16, 3, padding=1, bias=False)).eval()
    native = check(model, torch.randn(2, 8, 40, 44), target=target)
    assert "conv_winograd" in native.report()


def test_dynamic_sizes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1)).eval()
    dims = {0: planish.Dim("batch", 1, 9), 2: planish.Dim("h", 4, 40), 3: planish.Dim("w", 4, 40)}
    sizes = ((2, 12, 16), (1, 4, 5), (7, 31, 40))
    native = check(model, *(torch.randn(n, 16, h, w) for n, h, w in sizes), dynamic={"input": dims})
    assert "conv_winograd" in native.report()


@pytest.mark.parametrize(
    ("reason", "options", "size"),
    [
        ("a stride", {"stride": 2}, 24),
        ("dilation", {"dilation": 2}, 24),
        ("groups", {"groups": 2}, 24),
        ("another window", {"kernel_size": 5}, 24),
        ("too few tiles for its weights", {}, 6),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_is_not_chosen(reason: str, options: dict[str, Any], size: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, **{"kernel_size": 3, **options})
    native = check(nn.Sequential(nn.Conv2d(8, 64, 1), conv).eval(), torch.randn(1, 8, size, size))
    assert "conv_winograd" not in native.report(), reason
