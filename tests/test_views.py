"""Chains of views drawn at random: as they are, in an elementwise op, and before a softmax."""

import math
from typing import Any

import torch
from families import Tensors
from hypothesis import given, settings
from hypothesis import strategies as st

import planish

aten = torch.ops.aten


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[str, Any]]]:
    """A shape and up to four views of it, each valid for the shape that the one before leaves."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 17]), min_size=1, max_size=4)))
    first, steps = shape, []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["permute", "reshape", "slice", "select", "expand", "unsqueeze"]))
        axis = draw(st.integers(0, len(shape) - 1)) if shape else 0
        if kind == "permute":
            option: Any = tuple(draw(st.permutations(range(len(shape)))))
        elif kind == "reshape":
            sizes = draw(st.permutations(shape))
            cut = draw(st.integers(0, len(sizes)))
            option = (*sizes[:cut], math.prod(sizes[cut:]))
        elif kind == "slice" and shape:
            start = draw(st.integers(0, shape[axis] - 1))
            option = (axis, start, draw(st.integers(start + 1, shape[axis])), draw(st.integers(1, 3)))
        elif kind == "select" and len(shape) > 1:
            option = (axis, draw(st.integers(-shape[axis], shape[axis] - 1)))
        elif kind == "expand":
            option = (draw(st.integers(1, 3)), *shape)
        else:
            kind, option = "unsqueeze", axis
        steps.append((kind, option))
        shape = tuple(view(torch.empty(shape), kind, option).shape)
    return first, steps


def view(x: torch.Tensor, kind: str, option: Any) -> torch.Tensor:
    """Apply one drawn view."""
    if kind == "slice":
        axis, start, stop, step = option
        return aten.slice.Tensor(x, axis, start, stop, step)
    if kind == "select":
        return x.select(*option)
    return getattr(x, kind)(option)


class Chain(torch.nn.Module):
    """Views of one input; as they are, in an elementwise op, and before a softmax."""

    def __init__(self, steps: list[tuple[str, Any]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: torch.Tensor) -> Tensors:
        y = x
        for kind, option in self.steps:
            y = view(y, kind, option)
        return y, y * 2 + y, y.softmax(-1)


@settings(max_examples=10)
@given(chains())
def test_chains_of_views(drawn: tuple[tuple[int, ...], list[tuple[str, Any]]]) -> None:
    shape, steps = drawn
    model = Chain(steps).eval()
    x = torch.arange(float(math.prod(shape))).view(shape) / 16
    for passes in ([], None):
        got = planish.compile(model, (x,), passes=passes, cache=False)(x)
        torch.testing.assert_close(got, model(x), rtol=2e-6, atol=1e-7)


class Falling(torch.nn.Module):
    """Rows that are gathered, laid end to end and read backwards by one op."""

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, rows).reshape(-1).flip(0) + 1


def test_a_gathered_tensor_backwards() -> None:
    """The index is divided by the row's length while it falls."""
    for width in (4, 6, 32):
        x, rows = torch.arange(3.0 * width).view(3, width), torch.tensor([2, 0, 1])
        got = planish.compile(Falling().eval(), (x, rows))(x, rows)
        assert torch.equal(got, Falling()(x, rows))
