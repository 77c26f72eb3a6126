"""The integer program: against all assignments of small instances, in time on large ones, and what cannot be kept."""

from __future__ import annotations

import itertools
import random

import pytest

from planish.errors import BudgetError
from planish.passes.precision.solve import GAP, Block, Column, pareto, solve


def column(loss: float, size: float, ms: float = 0.0, name: str = "") -> Column:
    return Column((name or f"{loss}",), {"loss": loss, "bytes": size, "ms": ms})


def instance(draw: random.Random, blocks: int, columns: int) -> list[Block]:
    """Losses over six powers of ten, as those of formats are."""
    return [
        Block(
            (f"g{b}",),
            tuple(
                column(draw.random() * 10 ** draw.uniform(-6, 0), draw.randint(1, 10**6), draw.random(), str(c))
                for c in range(draw.randint(2, columns))
            ),
        )
        for b in range(blocks)
    ]


def least(blocks: list[Block], limits: dict[str, float]) -> float | None:
    """The least loss of all assignments within the limits."""
    losses = [
        sum(c.costs["loss"] for c in chosen)
        for chosen in itertools.product(*(block.columns for block in blocks))
        if all(sum(c.costs[name] for c in chosen) <= limit for name, limit in limits.items())
    ]
    return min(losses, default=None)


def test_equals_brute_force() -> None:
    draw, checked = random.Random(0), 0
    for _ in range(250):
        blocks = instance(draw, 5, 5)
        half = {
            name: draw.uniform(0.3, 0.9) * sum(max(c.costs[name] for c in block.columns) for block in blocks)
            for name in draw.choice((["bytes"], ["bytes", "ms"]))
        }
        want = least(blocks, half)
        if want is None:
            with pytest.raises(BudgetError):
                solve(blocks, "loss", half, gap=0.0)
            continue
        found = solve(blocks, "loss", half, gap=0.0)
        assert found.value == pytest.approx(want, rel=1e-9)
        assert found.bound <= found.value
        assert found.is_optimal
        assert all(found.total(name) <= limit for name, limit in half.items())
        checked += 1
    assert checked >= 200


def test_large_instances_close_their_gap() -> None:
    """210 linear layers: 30 blocks of 4 sites, 8 formats each."""
    draw = random.Random(1)

    def option(bits: int, size: float) -> tuple[float, float]:
        return 10 ** draw.uniform(-5, -2) * 4.0**-bits * draw.uniform(0.8, 1.2), size * (bits + 0.25)

    def block(b: int) -> Block:
        sites = [[option(bits, size) for bits in range(8)] for size in draw.choices((1e3, 2e3, 3e3), k=4)]
        columns = [
            column(sum(loss for loss, _ in chosen), sum(size for _, size in chosen))
            for chosen in itertools.product(*sites)
        ]
        return Block(tuple(f"{b}.{s}" for s in range(4)), tuple(columns))

    blocks = [block(b) for b in range(30)]
    smallest = sum(min(c.costs["bytes"] for c in block.columns) for block in blocks)
    found = solve(blocks, "loss", {"bytes": 20 * smallest})
    assert found.is_optimal
    assert found.gap <= GAP
    assert found.columns < 30 * 4096 / 10  # what others beat is left out
    assert found.prices["bytes"] > 0


def test_what_another_column_beats_is_left_out() -> None:
    columns = [column(1, 1, name="a"), column(1, 1, name="b"), column(2, 2, name="c"), column(0, 3, name="d")]
    assert [c.choices[0] for c in pareto(columns, ("loss", "bytes"))] == ["a", "d"]


def test_the_smallest_limit_that_can_be_kept_is_named() -> None:
    blocks = [Block(("a",), (column(0, 8), column(1, 4))), Block(("b",), (column(0, 8), column(1, 2)))]
    with pytest.raises(BudgetError, match="the least is 6") as caught:
        solve(blocks, "loss", {"bytes": 5})
    assert "allow bytes of 6 or more" in str(caught.value)


def test_limits_that_exclude_each_other_name_what_would_do() -> None:
    blocks = [Block(("a",), (column(0, 8, 1), column(1, 4, 9)))]
    with pytest.raises(BudgetError, match="the least ms is 9"):
        solve(blocks, "loss", {"bytes": 5, "ms": 5})


def test_a_deadline_is_told_from_an_optimum() -> None:
    """What costs least loss costs most of both limits, so that the proof takes minutes."""
    draw = random.Random(2)

    def hard() -> Column:
        size, ms = draw.randint(1, 10**6), draw.randint(1, 10**6)
        return column(2e6 - size - ms + draw.randint(0, 10**4), size, ms)

    blocks = [Block((f"{b}",), tuple(hard() for _ in range(15))) for b in range(60)]
    limits = {n: 0.5 * sum(max(c.costs[n] for c in block.columns) for block in blocks) for n in ("bytes", "ms")}
    found = solve(blocks, "loss", limits, gap=0.0, deadline=0.5)
    assert not found.is_optimal
    assert 0 < found.gap < 0.1
    assert all(found.total(name) <= limit for name, limit in limits.items())
