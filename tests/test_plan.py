"""Arena placement: nothing overlaps that lives at the same time, everything is aligned, memory is used again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import planish
from planish.plan import ALIGN, Buffer, Call, Plan, place_by_size
from planish.program import dim_symbol

Lives = dict[int, tuple[int, tuple[int, int]]]


@st.composite
def lives(draw: st.DrawFn) -> Lives:
    """Buffers with a size (some are empty) and a first and last step."""
    count = draw(st.integers(0, 24))
    found: Lives = {}
    for b in range(count):
        first = draw(st.integers(0, 12))
        found[b] = (ALIGN * draw(st.integers(0, 40)), (first, first + draw(st.integers(0, 6))))
    return found


def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


@given(lives())
def test_never_overlaps(drawn: Lives) -> None:
    sizes = {b: size for b, (size, _) in drawn.items()}
    spans = {b: span for b, (_, span) in drawn.items()}
    offsets, height = place_by_size(sizes, spans)
    assert offsets.keys() == sizes.keys()
    for a in sizes:
        assert offsets[a] >= 0
        assert offsets[a] % ALIGN == 0
        assert offsets[a] + sizes[a] <= height
        for b in range(a):
            together = spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1]
            memory = [(offsets[i], offsets[i] + sizes[i]) for i in (a, b)]
            assert not (together and overlap(*memory)), (a, b)


@given(lives())
def test_height_is_bounded(drawn: Lives) -> None:
    """At least what is alive at one step, at most everything beside each other."""
    sizes = {b: size for b, (size, _) in drawn.items()}
    spans = {b: span for b, (_, span) in drawn.items()}
    _, height = place_by_size(sizes, spans)
    alive = [sum(sizes[b] for b, (first, last) in spans.items() if first <= step <= last) for step in range(20)]
    assert max(alive) <= height <= sum(sizes.values())


def test_reuse_in_a_chain() -> None:
    """In a chain of equal buffers two places are enough."""
    sizes = dict.fromkeys(range(8), 10 * ALIGN)
    offsets, height = place_by_size(sizes, {b: (b, b + 1) for b in sizes})
    assert height == 20 * ALIGN
    assert set(offsets.values()) == {0, 10 * ALIGN}


def chain(kind: str = "arena") -> Plan:
    n = dim_symbol("n")
    buffers = [
        Buffer("x", "input", 4, (n,)),
        *(Buffer(f"b{i}", kind, 4, (n, 3)) for i in range(4)),
        Buffer("y", "output", 4, (n,)),
    ]
    calls = [Call(f"k{i}", (i, i + 1, -1), f"b{i}", "elementwise", (n,), 0) for i in range(5)]
    return Plan(buffers, calls)


def test_lifetimes_of_arena_buffers_only() -> None:
    """The status word (operand -1) is no buffer, though Python would take it as the last one."""
    assert chain().lifetimes() == {1: (0, 1), 2: (1, 2), 3: (2, 3), 4: (3, 4)}
    assert chain("constant").lifetimes() == {}


@pytest.mark.parametrize("n", [1, 5, 16, 1000])
def test_arena_grows_with_the_dims(n: int) -> None:
    offsets, height = chain().arena({"n": n})
    one = -(-12 * n // ALIGN) * ALIGN
    assert height == 2 * one
    assert all(at % ALIGN == 0 for at in offsets.values())


class Deep(torch.nn.Module):
    """Unfused it has an intermediate per op; far fewer are alive at once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = torch.tanh(x) + 1.0
        return x


def test_arena_of_a_compiled_model() -> None:
    model = Deep().eval()
    cm = planish.compile(model, (torch.randn(8, 100),), dynamic={"x": {0: planish.Dim("b", 1, 64)}}, passes=[])
    for b in (1, 3, 64):
        memory = cm.memory((torch.zeros(b, 100),))
        assert memory["intermediates_bytes"] == 11 * 4 * 100 * b
        assert memory["arena_bytes"] == 2 * -(-4 * 100 * b // ALIGN) * ALIGN
    assert cm.memory((torch.zeros(64, 100),))["weights_bytes"] <= ALIGN
    x = torch.randn(64, 100)
    torch.testing.assert_close(cm(x), model(x), rtol=1e-5, atol=1e-6)
