"""Models that write to their buffers: every step is compared with the eager model doing the same."""

import copy
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import planish
from planish.capture import capture
from planish.errors import CaptureError, InputError, NumericError, StateError, UnknownNameError
from planish.pipeline import Pass, Result
from planish.program import Program
from planish.targets import Target

Inputs = tuple[torch.Tensor, ...]


class Stateful(torch.nn.Module):
    """A module with the given buffers and forward."""

    def __init__(self, forward: Callable[..., Any], **buffers: torch.Tensor) -> None:
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.run = forward
        self.eval()

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> Any:
        return self.run(self, x, at)


def _counter(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    m.count += 1
    return x * m.count


def _running_mean(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    m.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
    m.count = m.count + 1
    return x - m.mean


def _hidden(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    m.h.copy_(torch.tanh(x + m.h))
    return m.h


def _swap(m: Any, x: torch.Tensor, at: torch.Tensor) -> Inputs:
    old = m.a.clone()
    m.a.copy_(m.b)
    m.b.copy_(old)
    m.last.copy_(x)
    return m.a + x, old


def _ring(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    m.ring.copy_(torch.cat([m.ring[1:], x[:1]]))
    return m.ring.sum(0)


def _by_position(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    m.cache.index_copy_(1, at, x.unsqueeze(0))
    return m.cache.sum(1)


def _by_index(m: Any, x: torch.Tensor, at: torch.Tensor) -> Inputs:
    m.cache[:, at] = x * 2
    return m.cache.amax(1), m.cache


def _by_own_count(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    m.cache[0, (m.count % 8).reshape(1)] = x
    m.count += 1
    return m.cache.sum(1)


def _accumulated(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    m.cache[0].index_add_(0, at, x)
    return m.cache.sum(1)


def _twice(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    m.cache.index_copy_(1, at, x.unsqueeze(0))
    m.cache.index_copy_(1, 7 - at, -x.unsqueeze(0))
    return m.cache.sum(1)


def _prefix(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    m.cache[:, 2 : 2 + x.shape[0]] = x
    return m.cache.sum(1)


def _part_of_a_part(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    m.cache[0, -3] = x[0] + 1
    return m.cache.sum(1)


def _strided(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    m.cache[:, 1:8:3] = x.sum(0)
    return m.cache.sum(1)


def _old_value_read_later(m: Any, x: torch.Tensor, at: torch.Tensor) -> Inputs:
    old = m.cache.clone()
    m.cache.index_copy_(1, at, x.unsqueeze(0))
    return m.cache.sum(1) - old.sum(1), old


def _old_value_read_before(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    before = torch.softmax(m.cache.sum(1), -1)
    m.cache.index_copy_(1, at, x.unsqueeze(0) + before)
    return m.cache.sum(1)


def _source_is_the_cache(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    m.cache[0] += x.sum(0)
    m.cache.index_copy_(1, at, m.cache[:, 3:4] * 2)
    return m.cache.sum(1)


def _source_is_a_view(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    rows = (7 - torch.arange(4))[:, None].expand(4, 4)
    m.cache.scatter_(0, rows, m.cache.reshape(4, 8).clone())
    return m.cache + x


COUNT = torch.tensor(3)
APART, IN_PLACE = "computed apart, then copied", "written in place"

CASES: list[tuple[Callable[..., Any], dict[str, torch.Tensor], dict[str, str]]] = [
    (_counter, {"count": COUNT}, {"count": APART}),
    (_running_mean, {"mean": torch.randn(4), "count": COUNT}, {"mean": APART, "count": APART}),
    (_hidden, {"h": torch.zeros(1, 4)}, {"h": APART}),
    (_swap, {"a": torch.randn(4), "b": torch.randn(4), "last": torch.zeros(1, 4)}, {}),
    (_ring, {"ring": torch.randn(5, 4)}, {"ring": APART}),
    (_by_position, {"cache": torch.randn(1, 8, 4)}, {"cache": IN_PLACE}),
    (_by_index, {"cache": torch.zeros(2, 8, 4)}, {"cache": IN_PLACE}),
    (_by_own_count, {"cache": torch.zeros(1, 8, 4), "count": COUNT}, {"count": APART, "cache": IN_PLACE}),
    (_accumulated, {"cache": torch.randn(1, 8, 4)}, {}),
    (_twice, {"cache": torch.randn(1, 8, 4)}, {"cache": IN_PLACE}),
    (_prefix, {"cache": torch.randn(2, 8, 4)}, {"cache": IN_PLACE}),
    (_part_of_a_part, {"cache": torch.randn(2, 8, 4)}, {"cache": IN_PLACE}),
    (_strided, {"cache": torch.randn(2, 8, 4)}, {"cache": IN_PLACE}),
    (_old_value_read_later, {"cache": torch.randn(1, 8, 4)}, {"cache": APART}),
    (_old_value_read_before, {"cache": torch.randn(1, 8, 4)}, {"cache": IN_PLACE}),
    (_source_is_the_cache, {"cache": torch.randn(2, 8, 4)}, {"cache": APART}),
    (_source_is_a_view, {"cache": torch.randn(8, 4)}, {"cache": APART}),
]


def _inputs(step: int) -> Inputs:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(1, 4, generator=generator), torch.tensor([(step * 3) % 8])


def _follow(cm: Any, model: torch.nn.Module, state: planish.State, steps: Sequence[int] = range(4)) -> None:
    """Compare outputs and buffers with the eager model's over several calls."""
    for step in steps:
        got, want = cm(*_inputs(step), state=state), model(*_inputs(step))
        torch.testing.assert_close(got, want)
        buffers = dict(model.named_buffers())
        for name in state.names:
            torch.testing.assert_close(state[name], buffers[name])


@pytest.mark.parametrize("target", ["cpu", "reference"])
@pytest.mark.parametrize(("forward", "buffers", "how"), CASES, ids=[c[0].__name__.strip("_") for c in CASES])
def test_steps(forward: Callable[..., Any], buffers: dict[str, torch.Tensor], how: dict[str, str], target: str) -> None:
    model = Stateful(forward, **copy.deepcopy(buffers))
    cm = planish.compile(model, _inputs(0), target, verify=True)
    for name, value in buffers.items():
        assert torch.equal(getattr(model, name), value), "compiling must not run the model's writes"
    state = cm.new_state()
    assert set(state.names) == set(buffers)
    _follow(cm, copy.deepcopy(model), state)
    lines = dict(line.removeprefix("state ").split(": ") for line in cm.report().splitlines() if line[:6] == "state ")
    assert how.items() <= lines.items() or target == "reference"
    state.reset()
    _follow(cm, copy.deepcopy(model), state)


class Attention(torch.nn.Module):
    """One decoding step of attention over a cache: the new key and value go to position ``at``."""

    def __init__(self, width: int = 16, heads: int = 2, length: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, heads, length, width // heads))

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        mask = torch.arange(self.keys.shape[2]) <= at[:, None]
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Decoder(torch.nn.Module):
    """Two layers of attention behind an embedding, a table that is read behind them, and a count of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = torch.nn.Embedding(10, 16), torch.nn.Embedding(4, 16)
        self.layers = torch.nn.ModuleList(Attention() for _ in range(2))
        self.register_buffer("calls", torch.zeros(()))
        self.eval()

    def forward(self, ids: torch.Tensor, at: torch.Tensor, late: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        self.calls += 1
        for layer in self.layers:
            x = layer(x, at)
        return x + self.positions(late)


def _step(token: int, at: int, late: int = 0) -> Inputs:
    return torch.tensor([[token]]), torch.tensor([at]), torch.tensor([[late]])


@pytest.fixture(scope="module")
def decoder() -> tuple[Decoder, Any]:
    torch.manual_seed(0)
    model = Decoder()
    return model, planish.compile(model, _step(1, 0))


def test_a_cache_is_written_in_place(decoder: tuple[Decoder, Any]) -> None:
    """No kernel works on a whole cache but attention, which reads it."""
    model, cm = decoder
    eager, state = copy.deepcopy(model), cm.new_state()
    assert sorted(state.names) == ["calls", "layers.0.keys", "layers.0.values", "layers.1.keys", "layers.1.values"]
    for at, token in enumerate([3, 1, 4, 1, 5, 9]):
        torch.testing.assert_close(cm(*_step(token, at), state=state), eager(*_step(token, at)))
    for name in state.names:
        torch.testing.assert_close(state[name], eager.get_buffer(name))
    calls = cm._compiled.executable.plan.calls
    assert sum(c.op == "write" for c in calls) == 4
    assert all(c.op == "attention" for c in calls if c.shape[-3:] == (2, 8, 8)), [str(c) for c in calls]


def test_kernels_are_timed_on_a_state_of_their_own(decoder: tuple[Decoder, Any]) -> None:
    _, cm = decoder
    state = cm.new_state()
    rows = {row.op for row in cm.kernels(_step(1, 0), repeats=1)}
    assert "write" in rows
    assert "undo" not in rows, "it runs after a failure only"
    assert not any(state[name].any() or cm.new_state()[name].any() for name in state.names)


@pytest.mark.parametrize("bad", [_step(11, 2), _step(1, 8), _step(1, 2, 4)], ids=["before", "write", "behind"])
def test_a_failed_call_leaves_the_state(decoder: tuple[Decoder, Any], bad: Inputs) -> None:
    """A bad index is found before the first write to a cache, in it, or behind all of them."""
    _, cm = decoder
    state = cm.new_state()
    for at in range(3):
        cm(*_step(at, at), state=state)
    before = [state[name] for name in state.names]
    with pytest.raises(InputError, match="index"):
        cm(*bad, state=state)
    for name, value in zip(state.names, before, strict=True):
        assert torch.equal(state[name], value), name
    with pytest.raises(InputError):
        cm(torch.zeros(1, 2, dtype=torch.int64), *bad[1:], state=state)
    cm(*_step(1, 3), state=state)


def test_duplicate_places_are_restored_in_order() -> None:
    """Several writes to one place are taken back the last first."""

    def forward(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        m.cache.index_put_((at,), x, accumulate=True)
        return m.table[at - 5] + m.cache[at]

    model = Stateful(forward, cache=torch.randn(8, 4), table=torch.randn(3, 4))
    at = torch.tensor([6, 6, 5])
    cm = planish.compile(model, (torch.randn(3, 4), at))
    assert "state cache: written in place" in cm.report()
    state, x = cm.new_state(), torch.randn(3, 4)
    torch.testing.assert_close(cm(x, at, state=state), copy.deepcopy(model)(x, at))
    before = state["cache"]
    with pytest.raises(InputError):
        cm(x, torch.tensor([7, 7, 0]), state=state)  # the cache has a row 0, the table has no row -5
    assert torch.equal(state["cache"], before)


def test_dynamic_sizes() -> None:
    """A prefix of any length below the cache's is written (torch.export fixes a length that may be the whole one)."""

    def forward(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        m.cache[:, : x.shape[0]] = x
        m.count += x.shape[0]
        return m.cache.sum(1)

    model = Stateful(forward, cache=torch.randn(2, 8, 4), count=COUNT.clone())
    rows = planish.Dim("rows", 1, 7)
    cm = planish.compile(model, {"x": torch.randn(3, 4), "at": torch.zeros(1)}, dynamic={"x": {0: rows}}, verify=True)
    eager, state = copy.deepcopy(model), cm.new_state()
    for size in (3, 7, 1, 5):
        x = torch.randn(size, 4)
        torch.testing.assert_close(cm(x, torch.zeros(1), state=state), eager(x, torch.zeros(1)))
        torch.testing.assert_close(state["cache"], eager.cache)
        assert state["count"] == eager.count
    assert "state cache: written in place" in cm.report()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool])
def test_dtypes(dtype: torch.dtype) -> None:
    def forward(m: Any, x: torch.Tensor, at: torch.Tensor) -> Inputs:
        m.cache.index_copy_(0, at, x.to(dtype))
        m.last.copy_(x)
        return m.cache.clone(), m.last + 0

    model = Stateful(forward, cache=torch.zeros(8, 4, dtype=dtype), last=torch.zeros(1, 4, dtype=torch.float16))
    cm = planish.compile(model, _inputs(0))
    _follow(cm, copy.deepcopy(model), cm.new_state())


def test_a_model_of_state_alone() -> None:
    """No input at all; and a buffer that is not saved."""

    class Ticks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(2), persistent=False)

        def forward(self) -> torch.Tensor:
            self.count += 1
            return self.count * 2

    cm = planish.compile(Ticks().eval(), ())
    state = cm.new_state()
    assert [cm(state=state)[0].item() for _ in range(3)] == [2, 4, 6]


# States --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counter() -> Any:
    return planish.compile(Stateful(_counter, count=COUNT.clone()), _inputs(0))


def test_states_are_independent(counter: Any) -> None:
    x, at = torch.ones(1, 4), torch.zeros(1, dtype=torch.int64)
    first, second = counter.new_state(), counter.new_state()
    counter(x, at, state=first)
    counter(x, at, state=first)
    fork = first.clone()
    counter(x, at, state=fork)
    assert [int(s["count"]) for s in (first, second, fork)] == [5, 3, 6]
    first.reset()
    assert [int(s["count"]) for s in (first, second, fork)] == [3, 3, 6]
    first["count"].fill_(99)
    assert int(first["count"]) == 3, "what is read is a copy"
    assert str(fork) == "State(count: int64[])"
    assert isinstance(fork, planish.State)


def test_wrong_states(counter: Any) -> None:
    x, at = _inputs(0)
    with pytest.raises(StateError, match=r"count.*\n.*\n.*compiled.new_state\(\)"):
        counter(x, at)
    other = planish.compile(Stateful(_counter, count=COUNT.clone()), (x, at), cache=False)
    with pytest.raises(StateError, match="another model's"):
        counter(x, at, state=other.new_state())
    pure = planish.compile(torch.nn.ReLU().eval(), (x,))
    with pytest.raises(StateError, match="has no state"):
        pure(x, state=other.new_state())
    with pytest.raises(StateError, match="has no state"):
        pure.new_state()
    with pytest.raises(UnknownNameError, match="count"):
        other.new_state()["cache"]


def test_a_model_may_have_an_argument_named_state() -> None:
    class Cell(torch.nn.Module):
        def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
            return x + state

    x = torch.ones(3)
    assert torch.equal(planish.compile(Cell().eval(), (x, x))(x, state=x), x + x)


def test_compiled_at_the_first_call() -> None:
    cm = planish.compile(Stateful(_counter, count=COUNT.clone()))
    with pytest.raises(InputError, match="not compiled yet"):
        cm.new_state()
    with pytest.raises(StateError, match="new_state"):
        cm(*_inputs(0))
    _follow(cm, Stateful(_counter, count=COUNT.clone()), cm.new_state())


def test_a_model_that_ran_on_starts_where_it_is() -> None:
    """A model whose buffers changed is not the one that was compiled before; a compiled one keeps its start."""
    model = Stateful(_counter, count=COUNT.clone())
    first = planish.compile(model, _inputs(0))
    model(*_inputs(0))
    second = planish.compile(model, _inputs(0))
    assert (int(first.new_state()["count"]), int(second.new_state()["count"])) == (3, 4)
    _follow(second, model, second.new_state())


def test_many_threads_with_states_of_their_own(decoder: tuple[Decoder, Any]) -> None:
    model, cm = decoder
    eager = copy.deepcopy(model)
    want = [eager(*_step(t, t)) for t in range(8)]
    failures: list[str] = []

    def work() -> None:
        for _ in range(5):
            state = cm.new_state()
            for t in range(8):
                got = cm(*_step(t, t), state=state)
                failures.extend([f"step {t}"] if not torch.allclose(got, want[t], atol=1e-5) else [])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_one_state_serves_one_call_at_a_time(counter: Any) -> None:
    """While a call runs, every other use of its state is refused, and the call itself is unharmed."""
    state, x = counter.new_state(), _inputs(0)[0]
    refused: list[str] = []

    class Slow:
        """An executable that tries to use the state that is lent to it."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, *args: Any) -> Any:
            for use in (lambda: counter(*_inputs(0), state=state), lambda: state["count"], state.reset, state.clone):
                thread = threading.Thread(target=lambda use=use: _expect(StateError, use, refused))
                thread.start()
                thread.join()
            return self.inner(*args)

    compiled = counter._compiled
    inner = compiled.executable
    object.__setattr__(compiled, "executable", Slow(inner))
    try:
        got = counter(*_inputs(0), state=state)
    finally:
        object.__setattr__(compiled, "executable", inner)
    assert ["in use by another thread" in text for text in refused] == [True] * 4
    torch.testing.assert_close(got, x * 4)
    assert int(state["count"]) == 4


def _expect(kind: type[Exception], use: Callable[[], Any], messages: list[str]) -> None:
    try:
        use()
    except kind as error:
        messages.append(str(error))


# Programs ------------------------------------------------------------------------------------------------------------


def test_the_program_is_a_function_of_its_state() -> None:
    model = Stateful(_by_own_count, cache=torch.zeros(1, 8, 4), count=COUNT.clone())
    program, _ = capture(model, _inputs(0))
    assert program.state == ("cache", "count")
    assert program.arguments == 2
    assert [str(s) for s in program.inputs[2:]] == ["cache: float32[1, 8, 4]", "count: int64[]"]
    assert [str(s) for s in program.outputs[1:]] == ["new_cache: float32[1, 8, 4]", "new_count: int64[]"]
    model.count.fill_(7)
    assert int(program.example[3]) == 3, "the program holds a copy"
    assert program.clone().state == program.state


@dataclass(frozen=True)
class Forget(Pass):
    """Start from zeros in every call."""

    name: ClassVar[str] = "forget-state"

    def run(self, program: Program, target: Target) -> Result:
        """Read zeros instead of the cache."""
        graph = program.module.graph
        cache = next(n for n in graph.nodes if n.name == "cache")
        with graph.inserting_before(next(iter(cache.users))):
            zero = graph.call_function(torch.ops.aten.zeros_like.default, (cache,))
        cache.replace_all_uses_with(zero, delete_user_cb=lambda n: n is not zero)
        return Result()


def test_a_wrong_pass_is_found_on_a_state_of_zeros() -> None:
    """A pass that loses the old cache is exact on the captured zeros; the second comparison has other values."""
    model = Stateful(_by_position, cache=torch.zeros(1, 8, 4))
    with pytest.raises(NumericError, match="forget-state"):
        planish.compile(model, _inputs(0), passes=[Forget()], verify=True)


def test_dumps_run(tmp_path: Path) -> None:
    """Each stage reads the state with the inputs and gives the new one with the outputs."""
    model = Stateful(_by_own_count, cache=torch.randn(1, 8, 4), count=COUNT.clone())
    cm = planish.compile(model, _inputs(0), dump=tmp_path / "dump")
    want = [model(*_inputs(0)), model.cache, model.count]
    for stage in sorted((tmp_path / "dump").glob("0*.py")):
        assert "# state: cache, count: the last inputs before a call and the last outputs after it" in stage.read_text()
        saved = tmp_path / "saved.safetensors"
        subprocess.run([sys.executable, "-I", str(stage), "--save", str(saved)], check=True, capture_output=True)
        values = load_file(saved)
        for name, expected in zip(sorted(values, key=lambda n: (n.startswith("new_"), n)), want, strict=True):
            torch.testing.assert_close(values[name], expected)
    state = cm.new_state()
    cm(*_inputs(0), state=state)
    _follow(cm, model, state)


def test_exported_programs() -> None:
    """A program that the user exported has the same state."""
    model = Stateful(_by_position, cache=torch.randn(1, 8, 4))
    exported = torch.export.export(copy.deepcopy(model), _inputs(0))
    cm = planish.compile(exported, _inputs(0))
    _follow(cm, model, cm.new_state())
    writes = torch.export.export(Stateful(lambda m, x, at: x.add_(1)), _inputs(0))
    with pytest.raises(CaptureError, match="writes to its input 'x'"):
        planish.compile(writes, _inputs(0))


# Refusals ------------------------------------------------------------------------------------------------------------


class Parameter(torch.nn.Module):
    """Writes to a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return x * self.weight.add_(1)


class Attribute(torch.nn.Module):
    """Assigns a tensor that is no buffer, before or after it reads it."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.seen, self.first = torch.zeros(1, 4), first

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        if self.first:
            self.seen = x * 2
            return self.seen + 1
        self.seen = self.seen + x
        return self.seen * 2


def _grow(m: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    m.cache = torch.cat([m.cache, x])
    return m.cache.sum(0)


def _shared() -> torch.nn.Module:
    memory = torch.zeros(8, 4)
    return Stateful(lambda m, x, at: m.a.index_copy_(0, at, x).sum() + m.b.sum(), a=memory, b=memory[1:])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Stateful(lambda m, x, at: x.add_(1)), "writes to its input 'x'"),
        (Parameter().eval(), "writes to its parameter 'weight'"),
        (Attribute(first=False).eval(), "reads its attribute 'seen' in forward and then assigns it"),
        (Stateful(_grow, cache=torch.zeros(1, 4)), r"buffer 'cache', float32\[1, 4\] before and float32\[2, 4\]"),
        (_shared(), "share no memory, and these do: model.a and model.b"),
    ],
    ids=["input", "parameter", "attribute", "growing", "shared"],
)
def test_refused(model: torch.nn.Module, words: str) -> None:
    with pytest.raises(CaptureError, match=words) as caught:
        planish.compile(model, _inputs(0))
    assert "fix:" in str(caught.value)


def test_an_attribute_that_is_assigned_first_is_no_state() -> None:
    model, (x, at) = Attribute(first=True).eval(), _inputs(0)
    cm = planish.compile(model, (x, at))
    torch.testing.assert_close(cm(x, at), x * 2 + 1)
    assert torch.equal(model.seen, torch.zeros(1, 4)), "compiling leaves the model as it is"
