"""Gathers of everything in order become views; every other gather stays one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.capture import capture
from planish.passes import resolve
from planish.pipeline import Step, run_pipeline
from planish.program import Dim, Program
from planish.targets import TARGETS

RULE = "gather of everything in order"
AXES = {"x": {0: Dim("rows", 3, 32), 1: Dim("columns", 3, 32)}}


class Gathered(nn.Module):
    """``x`` at the places that a function makes of it."""

    def __init__(self, places: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.index(x, list(self.places(x)))


def rewritten(places: Callable[[Tensor], Sequence[Tensor]], *shape: int, dynamic: Any = AXES) -> tuple[Program, Step]:
    program = capture(Gathered(places).eval(), (torch.randn(shape),), dynamic)[0]
    after, steps = run_pipeline(program, resolve(["canonicalize"]), TARGETS["cpu-avx2"], check_values=True)
    return after, steps[-1]


def ops(program: Program) -> list[str]:
    names = [str(n.target).removeprefix("aten.") for n in program.nodes() if n.op == "call_function"]
    return [n for n in names if not n.startswith("sym_size")]


def test_transformers_mask_is_a_view_of_the_mask() -> None:
    def places(x: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = (torch.arange(n) for n in x.shape)
        return rows[:, None, None, None], columns[None, None, None, :]

    after, step = rewritten(places, 4, 5)
    assert step.rewrites[RULE] == 1
    assert ops(after) == ["reshape.default"]
    assert [str(s) for s in after.outputs[0].shape] == ["rows", "1", "1", "columns"]


@pytest.mark.parametrize(
    "places",
    [
        lambda x: (torch.arange(x.shape[0])[:, None].expand(*x.shape[:2]), torch.arange(0, x.shape[1])),
        lambda x: (torch.arange(x.shape[0]).reshape(-1, 1), torch.arange(0, x.shape[1], 1).expand(*x.shape[:2])),
        lambda x: (torch.arange(x.shape[0]),),
    ],
    ids=["expanded", "reshaped", "rows only"],
)
def test_all_places_in_order_are_the_tensor_itself(places: Callable[[Tensor], Sequence[Tensor]]) -> None:
    after, step = rewritten(places, 4, 5, 4)
    assert step.rewrites[RULE] == 1
    assert ops(after) == []


def test_axes_in_another_order_are_permuted() -> None:
    after, _ = rewritten(lambda x: (torch.arange(x.shape[0]), torch.arange(x.shape[1])[:, None]), 4, 5, 4)
    assert ops(after) == ["permute.default"]


def test_one_position_of_a_fixed_axis() -> None:
    """All positions of an axis of one element are position 0, wherever the index tensor has it."""
    after, step = rewritten(
        lambda x: (torch.arange(1)[:, None], torch.arange(x.shape[1])), 1, 5, dynamic={"x": {1: AXES["x"][1]}}
    )
    assert step.rewrites[RULE] == 1
    assert ops(after) == []


@pytest.mark.parametrize(
    "places",
    [
        lambda x: (torch.arange(x.shape[0] - 1, -1, -1)[:, None], torch.arange(x.shape[1])),
        lambda x: (torch.arange(0, x.shape[0], 2)[:, None], torch.arange(x.shape[1])),
        lambda x: (torch.arange(-x.shape[0], 0)[:, None], torch.arange(x.shape[1])),
        lambda x: (torch.arange(1, x.shape[0])[:, None], torch.arange(x.shape[1])),
        lambda x: (torch.arange(2)[:, None], torch.arange(x.shape[1])),
        lambda x: (torch.arange(x.shape[0]), torch.arange(x.shape[0])),
        lambda x: (torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1]) % 2),
        lambda x: (torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2]) % x.shape[0],),
        lambda x: (torch.arange(x.shape[0])[:, None].expand(x.shape[:2]),),
    ],
    ids=[
        *("backwards", "every second", "from the end", "not from the start", "a part", "the diagonal"),
        *("computed", "over two axes", "repeated"),
    ],
)
def test_other_gathers_stay(places: Callable[[Tensor], Sequence[Tensor]]) -> None:
    after, step = rewritten(places, 6, 7)
    assert RULE not in step.rewrites
    assert "index.Tensor" in ops(after)


def test_sizes_must_be_equal_for_every_size_of_the_dims() -> None:
    """Rows and columns of the example are equally many, but need not be."""

    class Square(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x[torch.arange(y.shape[0])]

    example = (torch.randn(4, 3), torch.randn(3))
    dims = {"x": {0: Dim("a", 1, 32)}, "y": {0: Dim("b", 1, 3)}}
    program = capture(Square().eval(), example, dims)[0]
    after, steps = run_pipeline(program, resolve(["canonicalize"]), TARGETS["cpu-avx2"])
    assert RULE not in steps[-1].rewrites
    assert "index.Tensor" in ops(after)
