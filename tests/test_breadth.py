"""The breadth of the CPU backend against eager, unfused and through the default pipeline."""

from functools import cache
from typing import Any

import pytest
import torch
from breadth import GROUPS
from families import Bundle
from torch.utils import _pytree as pytree

import planish
from planish import decompose, verify


@cache
def model_of(name: str) -> Bundle:
    torch.manual_seed(0)
    return Bundle(GROUPS[name].functions)


@cache
def results(name: str, passes: tuple[str, ...] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs = GROUPS[name].inputs()
    native = planish.compile(model_of(name), inputs, passes=passes)
    with torch.no_grad():
        return model_of(name)(*inputs), native(*inputs)


CASES = [(name, case) for name, group in GROUPS.items() for case in group.functions]


@pytest.mark.parametrize("passes", [(), None], ids=["unfused", "default"])
@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}-{c}" for n, c in CASES])
def test_like_eager(name: str, case: str, passes: tuple[str, ...] | None) -> None:
    want, got = (pytree.tree_leaves(r[case]) for r in results(name, passes))
    assert len(want) == len(got)
    for w, g in zip(want, got, strict=True):
        assert (w.dtype, w.shape) == (g.dtype, g.shape)
        assert verify.relative_error(w, g) <= GROUPS[name].tolerance


@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 48, 49, 100])
def test_products_at_any_width(size: int) -> None:
    """Panels of columns with every kind of rest."""
    rows, depth = planish.Dim("rows", 1, 128), planish.Dim("depth", 1, 128)
    columns = planish.Dim("columns", 1, 128)

    class Product(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.bmm(a, b) + 1

    example = {"a": torch.randn(2, 5, 7), "b": torch.randn(2, 7, 6)}
    compiled = planish.compile(
        Product().eval(), example, dynamic={"a": {1: rows, 2: depth}, "b": {1: depth, 2: columns}}
    )
    a, b = torch.randn(2, 9, 13), torch.randn(2, 13, size)
    torch.testing.assert_close(compiled(a=a, b=b), torch.bmm(a, b) + 1)


def test_a_mixture_of_experts() -> None:
    """Rows grouped by expert; experts without rows, and rows after the last expert's."""

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 20, 50))

        def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            return torch.ops.planish.grouped_mm(x, self.weight, ends)

    model = Experts().eval()
    x, ends = torch.randn(13, 20), torch.tensor([3, 3, 10, 12])
    compiled = planish.compile(model, (x, ends))
    with torch.no_grad():
        for given in (ends, torch.tensor([0, 0, 0, 13]), torch.tensor([0, 0, 0, 0])):
            torch.testing.assert_close(compiled(x, given), model(x, given))


class Rotary(torch.nn.Module):
    """Rotary embedding in complex numbers, with a table of its own and with angles made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.polar(torch.ones(9, 4), torch.rand(9, 4)), persistent=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Both, added; x [B, T, 8], positions [T]."""
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        angles = positions[:, None] * torch.arange(4)
        made = torch.polar(torch.ones_like(angles, dtype=torch.float32), angles.float())
        turned = pairs * made.unsqueeze(0) + pairs * self.table[positions].conj() * 0.5
        return torch.view_as_real(turned).flatten(-2).type_as(x) + turned.real.sum(-1, keepdim=True)


def test_complex_numbers_become_pairs() -> None:
    torch.manual_seed(0)
    model, positions = Rotary().eval(), torch.tensor([3, 0, 8, 1, 7])
    native = planish.compile(model, (torch.randn(1, 5, 8), positions), dynamic={"x": {0: planish.Dim("b", 1, 9)}})
    x = torch.randn(4, 5, 8)
    torch.testing.assert_close(native(x, positions), model(x, positions))


def test_a_complex_op_without_kernel_is_named() -> None:
    class Spectrum(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.view_as_real(torch.fft.rfft(x) * 2)

    with pytest.raises(planish.errors.UnsupportedOpsError, match="_fft_r2c"):
        planish.compile(Spectrum().eval(), (torch.randn(2, 8),))


class Recurrent(torch.nn.Module):
    """A recurrent layer over [batch, steps, 8], and its last states."""

    def __init__(self, layer: torch.nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
def test_the_steps_of_a_recurrent_layer_may_vary(kind: type[torch.nn.RNNBase], inference: bool) -> None:
    """Traced in inference mode too, where torch looks its rules up elsewhere."""
    torch.manual_seed(0)
    model = Recurrent(kind(8, 16, bidirectional=True, batch_first=True)).eval().requires_grad_(False)
    dims = {0: planish.Dim("batch", 1, 8), 1: planish.Dim("steps", 1, 40)}
    with torch.inference_mode(inference):
        compiled = planish.compile(model, {"x": torch.randn(3, 7, 8)}, dynamic={"x": dims})
    for batch, steps in ((3, 7), (1, 1), (5, 33)):
        x = torch.randn(batch, steps, 8)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_tracing_elsewhere_keeps_torchs_own_rules() -> None:
    """Also after a capture that failed."""
    key, op = torch._C.DispatchKey.CompositeImplicitAutograd, torch.ops.aten.lstm.input
    table = torch._decomp.global_decomposition_table["post_autograd"]
    own = op.py_kernels[key], table[op]
    with decompose.symbolic_steps():
        assert op.py_kernels[key] is table[op] is not own[0]
    assert (op.py_kernels[key], table[op]) == own
    with pytest.raises(ZeroDivisionError), decompose.symbolic_steps():
        raise ZeroDivisionError
    assert (op.py_kernels[key], table[op]) == own


def test_a_projected_lstm_is_traced_by_torchs_rule() -> None:
    torch.manual_seed(0)
    model = Recurrent(torch.nn.LSTM(8, 6, proj_size=3)).eval().requires_grad_(False)
    x = torch.randn(4, 2, 8)
    with torch.no_grad(), decompose.symbolic_steps():
        exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("passes", [(), None], ids=["unfused", "default"])
def test_numbers_without_axes_and_other_strides(passes: tuple[str, ...] | None) -> None:
    model = Bundle(
        {
            "transposed": lambda x, n: n.transpose(0, -1).transpose(0, 0),
            "bucket": lambda x, n: torch.bucketize(n, torch.tensor([0.0, 1.0, 2.0])),
            "strided": lambda x, n: torch.as_strided(x, (2, 3), (1, 4), 2),
            "one": lambda x, n: torch.as_strided(x, (), (), 5),
        }
    )
    inputs = torch.arange(12.0).reshape(3, 4), torch.tensor(1.5)
    native, want = planish.compile(model, inputs, passes=passes)(*inputs), model(*inputs)
    torch.testing.assert_close(native, want, rtol=0, atol=0)
