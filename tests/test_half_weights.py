"""Layers in fp32 whose weights a half precision holds exactly: they are stored so, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from native import NATIVE
from torch import nn

import planish


def perceptron(dtype: torch.dtype | None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(90, 50), nn.GELU(), nn.Linear(50, 37, bias=False)).eval()
    return model.to(dtype).float() if dtype else model


@pytest.mark.parametrize("target", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_as_half(target: str, dtype: torch.dtype) -> None:
    rows = planish.Dim("rows", 1, 200)
    model, full = perceptron(dtype), perceptron(None)
    native, wide = (
        planish.compile(m, (torch.randn(3, 90),), target, dynamic={"input": {0: rows}}) for m in (model, full)
    )
    elements = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    weights, widened = (each.memory((torch.randn(3, 90),))["weights_bytes"] for each in (native, wide))
    assert widened - weights >= 2 * elements - 256
    for count in (1, 7, 200):
        x = torch.randn(count, 90)
        torch.testing.assert_close(native(x), model(x), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("value", [float("nan"), 1e5, 1 + 2.0**-20])
def test_what_no_half_holds_stays(value: float) -> None:
    model = nn.Linear(32, 32).half().float().eval().requires_grad_(False)
    model.weight[3, 5] = value
    native, x = planish.compile(model, (torch.randn(4, 32),)), torch.randn(4, 32)
    assert native.memory((x,))["weights_bytes"] >= 4 * 32 * 32
    torch.testing.assert_close(native(x), model(x), equal_nan=True, rtol=1e-5, atol=1e-5)
