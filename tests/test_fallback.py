"""``fallback="eager"``: ops without a native form run in PyTorch, those alone, and by name."""

from __future__ import annotations

import gc
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import planish
from planish.errors import DimError, InputError, UnknownNameError, UnsupportedOpsError

j0 = torch.special.bessel_j0


class Model(torch.nn.Module):
    """Two linear layers and whatever ``body`` does with them."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.register_buffer("table", torch.randn(8, 8))
        self.body = body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


def cut(body: Callable[..., Any], x: torch.Tensor | None = None, **options: Any) -> tuple[Any, Model]:
    model = Model(body).eval()
    return planish.compile(model, (torch.randn(4, 8) if x is None else x,), fallback="eager", **options), model


def check(compiled: Any, model: Model, x: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def segments(compiled: Any) -> int:
    step = compiled.steps[-1]
    assert step.name == "cut-segments"
    return step.rewrites.get("native segment", 0)


class _Seen(TorchDispatchMode):
    """Counts the ops that PyTorch runs, but for memory: what native code needs to be called at all."""

    MEMORY = frozenset({"aten.empty.memory_format", "aten.copy_.default", "aten.view.default", "aten.view.dtype",
                        "aten.slice.Tensor", "aten.detach.default", "aten.clone.default"})  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) not in self.MEMORY:
            self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


def seen(compiled: Any, *inputs: torch.Tensor) -> dict[str, int]:
    with _Seen() as mode:
        compiled(*inputs)
    return dict(mode.ops)


@pytest.fixture
def operator() -> Iterator[Any]:
    """Custom operators of the user's, gone after the test."""
    with torch.library._scoped_library("planish_test", "FRAGMENT"):

        @torch.library.custom_op("planish_test::twice", mutates_args=())
        def twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * 2, x.sum(-1)

        @twice.register_fake
        def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.empty_like(x), x.new_empty(x.shape[:-1])

        @torch.library.custom_op("planish_test::liar", mutates_args=())
        def liar(x: torch.Tensor) -> torch.Tensor:
            return x[:1].clone()

        @liar.register_fake
        def _(x: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(x)

        yield torch.ops.planish_test


def between(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.b(j0(m.a(x)))


def branches(m: Model, x: torch.Tensor) -> torch.Tensor:
    left = torch.relu(m.b(j0(m.a(x))))
    right = torch.sigmoid(m.a(j0(m.b(x))))
    return left * right


def only(m: Model, x: torch.Tensor) -> torch.Tensor:
    return torch.special.bessel_y1(j0(x))


def first_and_last(m: Model, x: torch.Tensor) -> torch.Tensor:
    return j0(m.a(j0(x)))


def several_results(m: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q, r = torch.linalg.qr(m.a(x))
    return torch.relu(q), r + 1, q


def reads_a_constant(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.a(x) @ torch.linalg.qr(m.table + x.sum())[0] + m.table[:4]


def number(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.b(torch.relu(m.a(x)) * x.sum().item())


def complex_values(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.b(torch.fft.ifft(torch.fft.fft(m.a(x)) * 2).real)


def complex_weights(m: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    z = torch.nn.functional.linear(x * 1j, m.table * (1 + 1j)) + m.table[0] * 2j
    return z.real, torch.var(z, -1), m.a(x) + m.table[1] * 1j


def zero_dims(m: Model, x: torch.Tensor) -> torch.Tensor:
    sign, scale = torch.linalg.slogdet(m.a(x).T @ x + 9 * torch.eye(8))
    return m.a(x) * scale * sign + torch.argmax(j0(x).sum()).to(torch.int32)


def not_contiguous(m: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q = torch.linalg.qr(m.a(x).T)[0]  # column-major
    return m.b(q @ q.T), q.T + 1


def nested(m: Model, x: torch.Tensor) -> dict[str, Any]:
    y = j0(m.a(x))
    return {"x": x, "y": y, "table": m.table, "again": [y, m.b(y)], "rows": x.shape[0], "none": None}


J0, Y1, QR = "prims.bessel_j0.default", "aten.special_bessel_y1.default", "aten.linalg_qr.default"
FFT = {"aten._fft_r2c.default": 1, "aten.mul.Tensor": 1, "aten._fft_c2c.default": 1, "aten.view_as_real.default": 1}
WEIGHTS = {"aten.mul.Tensor": 1, "aten.linear.default": 1, "aten.add.Tensor": 2, "aten.view_as_real.default": 1,
           "aten.var.correction": 1}  # fmt: skip
DET = {"aten._linalg_slogdet.default": 1}

PARTS = {"aten.linear.default": ["aten.t.default", "aten.mm.default"]}
"""What PyTorch itself makes of an op."""

BODIES = {
    # the body, how many native segments it needs, and the ops that PyTorch runs
    "between": (between, 2, {J0: 1}),
    "branches": (branches, 2, {J0: 2}),
    "only": (only, 0, {J0: 1, Y1: 1}),
    "first and last": (first_and_last, 1, {J0: 2}),
    "several results": (several_results, 2, {QR: 1}),
    "constant": (reads_a_constant, 2, {QR: 1}),
    "number": (number, 2, {"aten._local_scalar_dense.default": 1, "aten.mul.Tensor": 1}),
    "complex": (complex_values, 2, FFT),
    "complex weights": (complex_weights, 1, WEIGHTS),
    "no axes": (zero_dims, 2, DET | {J0: 1}),
    "not contiguous": (not_contiguous, 2, {QR: 1}),
    "nested": (nested, 2, {J0: 1}),
}


@pytest.mark.parametrize("name", BODIES)
def test_values_segments_and_what_runs_in_pytorch(name: str) -> None:
    body, count, ops = BODIES[name]
    x = torch.randn(4, 8)
    compiled, model = cut(body, x)
    check(compiled, model, x)
    check(compiled, model, x.T.contiguous().T)
    assert segments(compiled) == count
    named = {op: len(lines) for op, lines in compiled._compiled.coverage.eager.items()}
    assert named == ops
    assert seen(compiled, x) == {within: n for op, n in ops.items() for within in PARTS.get(op, [op])}
    for op, times in named.items():
        assert f"{op} ({times}, at test_fallback.py:" in repr(compiled)
        assert f": {op}: " in compiled.report()


def test_an_op_that_checks_its_matrix_raises_as_in_pytorch() -> None:
    compiled, model = cut(lambda m, x: m.a(torch.linalg.inv(x) + torch.linalg.solve(x, m.table)), torch.eye(8) * 2)
    check(compiled, model, torch.randn(8, 8))
    assert compiled._compiled.coverage.eager.keys() == {"aten.linalg_inv.default", "aten.linalg_solve.default"}
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        compiled(torch.zeros(8, 8))


def test_outputs_share_memory_with_nothing() -> None:
    def body(m: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.linalg.qr(x.T)[0].T
        z = torch.fft.fft(y)
        return x, m.table, y, z, torch.view_as_real(z), m.a(y)

    x = torch.randn(4, 8)
    compiled, model = cut(body, x)
    for _ in range(2):
        kept = x.clone()
        outputs = compiled(x)
        for output, want in zip(outputs, model(x), strict=True):
            torch.testing.assert_close(output, want.detach(), rtol=1e-4, atol=1e-5)
        for output in outputs:
            output.zero_()  # seen by no other output, the input, or the next call
        assert len({o.untyped_storage().data_ptr() for o in outputs}) == len(outputs)
        torch.testing.assert_close(x, kept, rtol=0, atol=0)


def test_sizes_cross_a_cut() -> None:
    def body(m: Model, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        y = torch.cat([j0(m.a(x)), x])  # a size of 2 rows is known from the input alone
        y = j0(y.reshape(2, x.shape[0], 8)).expand(3, 2, x.shape[0], 8)
        z = m.b(y) * y.shape[2] + torch.arange(x.shape[0])[:, None]
        return torch.fft.fft(z, dim=2).real[..., None] + torch.ones(x.shape[0] // 2 + 1), y.shape[2] ** 2

    rows = planish.Dim("rows", 1, 64)
    model = Model(body).eval()
    compiled = planish.compile(model, {"x": torch.randn(4, 8)}, dynamic={"x": {0: rows}}, fallback="eager")
    for size in (1, 2, 7, 64):
        check(compiled, model, torch.randn(size, 8))
    with pytest.raises(DimError, match="rows"):
        compiled(torch.randn(65, 8))
    with pytest.raises(InputError):
        compiled(torch.randn(4, 9))


def test_sizes_that_follow_from_values_stay_in_pytorch() -> None:
    def body(m: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = m.a(x)
        rows = torch.nonzero(y[:, 0] > 0)
        kept = torch.masked_select(y, y > 0) * 2
        return rows + 1, kept, m.b(y) + kept.sum()

    x = torch.randn(6, 8)
    compiled, model = cut(body, x)
    for scale in (1.0, -1.0, 0.0):
        check(compiled, model, x * scale)


def test_an_op_that_breaks_its_promise_is_caught_before_native_code(operator: Any) -> None:
    def body(m: Model, x: torch.Tensor) -> torch.Tensor:
        return m.b(operator.liar(m.a(x)))

    x = torch.randn(1, 8)
    compiled, model = cut(body, x)
    check(compiled, model, x)
    compiled, _ = cut(body, torch.randn(4, 8), passes=())
    with pytest.raises(InputError, match=r"liar.*\[1, 8\].*\[4, 8\][\s\S]*fake function"):
        compiled(torch.randn(4, 8))


def test_a_custom_operator_of_several_results(operator: Any) -> None:
    def body(m: Model, x: torch.Tensor) -> torch.Tensor:
        double, total = operator.twice(torch.relu(m.a(x)))
        return m.b(double) + total[:, None]

    x = torch.randn(4, 8)
    compiled, model = cut(body, x)
    check(compiled, model, x)
    assert segments(compiled) == 2
    assert compiled._compiled.coverage.eager.keys() == {"planish_test.twice.default"}


def test_a_group_gives_up_only_the_op_without_a_kernel() -> None:
    def body(m: Model, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(m.a(x)).to(torch.complex64).abs() * 2 + m.b(x)

    x = torch.randn(4, 8)
    compiled, model = cut(body, x)
    check(compiled, model, x)
    assert {"aten._to_copy.default", "aten.abs.default"} == compiled._compiled.coverage.eager.keys()


def test_nothing_keeps_the_model_or_the_executable() -> None:
    x = torch.randn(4, 8)
    compiled, model = cut(reads_a_constant, x)
    compiled(x)
    kept = [weakref.ref(model.a.weight), weakref.ref(compiled._compiled.executable)]
    gc.collect()
    gc.disable()
    try:
        del model
        assert kept[0]() is None
        del compiled
        assert kept[1]() is None
    finally:
        gc.enable()


def test_threads() -> None:
    compiled, model = cut(branches)
    inputs = [torch.randn(4, 8) for _ in range(16)]
    with torch.no_grad():
        wants = [model(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(compiled, inputs * 8), wants * 8, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_kernels_memory_and_sources_of_all_segments() -> None:
    x = torch.randn(4, 8)
    compiled, _ = cut(lambda m, x: torch.softmax(m.a(j0(torch.softmax(m.a(x), -1))), -1), x)
    names = [row.name for row in compiled.kernels((x,), repeats=1)]
    assert {name.partition(".")[0] for name in names} == {"native_0", "native_1"}
    assert set(names) <= {name for name, tir, _ in compiled.sources() if tir}
    assert all(name in compiled.report() for name in names)
    memory = compiled.memory((x,))
    assert memory["intermediates_bytes"] == 2 * 4 * 8 * 4
    assert memory["weights_bytes"] >= 2 * (8 + 1) * 8 * 4
    compiled.trim()


def test_the_dump_shows_the_cut_and_runs(tmp_path: Any) -> None:
    x = torch.randn(4, 8)
    compiled, model = cut(several_results, x, dump=tmp_path / "dump")
    stage = tmp_path / "dump" / f"{len(compiled.steps) - 1:02d}-cut-segments.py"
    text = stage.read_text()
    assert all(part in text for part in ("def native_0(", "def native_1(", "torch.ops.aten.linalg_qr.default("))
    assert "linalg_qr" in stage.with_suffix(".why.txt").read_text()
    assert list((tmp_path / "dump" / "kernels").glob("native_1.*.tir.py"))
    space: dict[str, Any] = {"__file__": str(stage), "__name__": "stage"}
    exec(compile(text, str(stage), "exec"), space)
    for got, want in zip(space["forward"](*space["inputs"]()), model(x), strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)


def test_the_log_names_what_runs_in_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "planish"):
        cut(between)
    assert [r.getMessage() for r in caplog.records if r.name == "planish"] == [
        f"2/3 ops native; eager: {J0} (1, at test_fallback.py:{Model.forward.__code__.co_firstlineno + 1})"
    ]
    caplog.clear()
    compiled, _ = cut(lambda m, x: m.a(x))
    assert not [r for r in caplog.records if r.name == "planish"]
    assert "eager" not in compiled.report()


def test_an_unknown_fallback_and_the_default() -> None:
    model, x = Model(between).eval(), torch.randn(4, 8)
    with pytest.raises(UnknownNameError, match=r"'slow'[\s\S]*error, eager"):
        planish.compile(model, (x,), fallback="slow")
    check(planish.compile(model, (x,), fallback="eager"), model, x)
    check(planish.compile(model, fallback="eager"), model, x)
    for _ in range(2):  # the result of the other fallback is not reused
        with pytest.raises(UnsupportedOpsError, match=r"bessel_j0[\s\S]*fallback='eager'"):
            planish.compile(model, (x,))
    check(planish.compile(model, (x,), "reference", fallback="eager"), model, x)


def test_random_numbers_are_refused_by_name() -> None:
    def body(m: Model, x: torch.Tensor) -> torch.Tensor:
        return m.b(j0(m.a(x))) + torch.rand(8) + torch.rand(8) + torch.normal(m.table[:4], 1.0)

    with pytest.raises(UnsupportedOpsError, match="random numbers") as caught:
        cut(body)
    assert [u.op for u in caught.value.ops] == ["aten.rand.default", "aten.rand.default", "prims.normal.default"]


def test_a_state_is_updated_across_a_cut() -> None:
    class Running(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.eye(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.copy_(torch.linalg.inv(self.total + x * x.mT + 2 * torch.eye(3)))
            return self.total * 2

    torch.manual_seed(0)
    model, x = Running().eval(), torch.rand(3, 3)
    native = planish.compile(model, (x,), fallback="eager")
    state = native.new_state()
    for _ in range(3):
        with torch.no_grad():
            want = model(x)
        torch.testing.assert_close(native(x, state=state), want)
        torch.testing.assert_close(state["total"], model.total)
    assert "state total: computed apart, then copied" in native.report()
    assert native.kernels((x,), 1)
