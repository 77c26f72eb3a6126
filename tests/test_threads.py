"""Concurrent calls, threads that come and go, forks, bits, aliasing and memory."""

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

import planish
from planish import Dim
from planish.errors import KernelError

DYNAMIC = {"x": {0: Dim("batch", 1, 64)}}


class Model(torch.nn.Module):
    """A GEMM, a norm, a softmax and an elementwise op: each kind of parallel loop."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(48, 96), torch.nn.LayerNorm(96), torch.nn.Linear(96, 50)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.nn.functional.gelu(self.norm(self.first(x)))
        return self.last(y).softmax(-1), y


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def compiled(model: Model) -> planish.CompiledModel:
    return planish.compile(model, (torch.randn(4, 48),), dynamic=DYNAMIC)


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_two_threads_of_a_thousand_calls(compiled: planish.CompiledModel, model: Model) -> None:
    """Every call of every thread, at sizes of its own, gives what a lone call gives, to the bit."""
    inputs = [torch.randn(n, 48) for n in (1, 3, 17, 64)]
    wanted = [compiled(x) for x in inputs]
    for x, want in zip(inputs, wanted, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(want, model(x), rtol=1e-5, atol=5e-6)
    start = threading.Barrier(2)

    def calls(seed: int) -> int:
        start.wait()
        wrong = 0
        for i in range(1000):
            k = (i * (seed + 1) + seed) % len(inputs)
            wrong += not all(map(torch.equal, compiled(inputs[k]), wanted[k]))
        return wrong

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(calls, range(2))) == [0, 0]


def test_first_call_from_many_threads(model: Model) -> None:
    """One of them compiles, all get results."""
    cm = planish.compile(model, dynamic=DYNAMIC)
    x = torch.randn(5, 48)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: cm(x), range(4)))
    assert all(torch.equal(a[0], results[0][0]) for a in results)


def test_short_lived_threads_leave_no_threads(compiled: planish.CompiledModel) -> None:
    x = torch.randn(64, 48)
    compiled(x)
    process = psutil.Process()
    before = process.num_threads()
    failures: list[BaseException] = []

    def call() -> None:
        try:
            compiled(x)
        except BaseException as error:
            failures.append(error)

    for _ in range(100):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert failures == []
    deadline = time.monotonic() + 10  # the system takes a moment to count an ended thread out
    while process.num_threads() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.num_threads() <= before


CHILD = """
import os, signal, sys, torch, planish
torch.set_num_threads(2)
model = torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.LayerNorm(96)).eval()
x = torch.randn(600, 48)
cm = planish.compile(model, (x,), dynamic={"input": {0: planish.Dim("b", 1, 600)}})
want = cm(x).numpy()  # torch's own operators would wait for OpenMP threads that the child does not have
pid = os.fork()
if pid == 0:
    signal.alarm(60)  # a child that hangs must not outlive the test
    try:
        ok = (cm(x).numpy() == want).all()
    except planish.PlanishError as error:
        ok = bool(str(error))
    os._exit(0 if ok else 1)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert (cm(x).numpy() == want).all()
sys.exit(status)
"""


def test_call_in_a_forked_child() -> None:
    """It gives the parent's result, or says why not; it neither hangs nor crashes. The parent goes on working."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("batch", [1, 3, 17, 64])
@pytest.mark.parametrize("passes", [None, []], ids=["default", "unfused"])
def test_same_bits_at_every_thread_count(batch: int, passes: list[str] | None, model: Model) -> None:
    cm = planish.compile(model, (torch.randn(4, 48),), dynamic=DYNAMIC, passes=passes)
    x = torch.randn(batch, 48)
    results: list[tuple[torch.Tensor, ...]] = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(cm(x))
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_same_bits_alone_and_in_a_batch(compiled: planish.CompiledModel) -> None:
    """A row's result does not depend on its neighbours."""
    x = torch.randn(64, 48)
    together = compiled(x)
    for i in (0, 5, 63):
        alone = compiled(x[i : i + 1])
        assert all(torch.equal(a[0], t[i]) for a, t in zip(alone, together, strict=True))


COUNTS = """
import torch, psutil, planish
model = torch.nn.Sequential(torch.nn.Linear(48, 96)).eval()
cm = planish.compile(model, (torch.zeros(600, 48),), dynamic={"input": {0: planish.Dim("b", 1, 600)}})
x = torch.randn(600, 48)
def threads(n):
    torch.set_num_threads(n)
    cm(x)
    return psutil.Process().num_threads()
one, three = threads(1), threads(3)
assert three == one + 2, (one, three)
"""


def test_number_of_threads_is_followed() -> None:
    """``torch.set_num_threads`` decides how many threads a call uses, in a process whose torch made none before."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COUNTS], capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 0, done.stderr


def test_outputs_are_fresh(compiled: planish.CompiledModel) -> None:
    """No output aliases another, an input, or memory that a later call uses."""
    x = torch.randn(7, 48)
    first = compiled(x)
    kept = [t.clone() for t in first]
    second = compiled(torch.randn(7, 48))
    assert all(map(torch.equal, first, kept))
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (x, *first, *second)]
    assert all(a[1] <= b[0] or b[1] <= a[0] for i, a in enumerate(spans) for b in spans[:i])
    for t in (*first, *second):
        t.fill_(float("nan"))
    assert all(map(torch.equal, compiled(x), kept))
    assert all(t.untyped_storage().nbytes() <= t.nbytes + 4096 for t in first)


def test_memory_stays_flat(compiled: planish.CompiledModel) -> None:
    inputs = [torch.randn(n, 48) for n in range(1, 65)]
    process = psutil.Process()

    def calls(count: int) -> int:
        for i in range(count):
            compiled(inputs[i % 64])
        gc.collect()
        return process.memory_info().rss

    before = calls(300)
    assert calls(2000) - before < 2 << 20


def test_trim_gives_arenas_back(model: Model) -> None:
    cm = planish.compile(model, (torch.randn(4, 48),), dynamic=DYNAMIC, passes=[])
    x = torch.randn(64, 48)
    want = cm(x)
    cm.trim()
    assert all(map(torch.equal, cm(x), want))


def test_models_are_freed() -> None:
    """Compiling again and again neither keeps models nor their code."""
    import weakref

    x = torch.randn(4, 48)
    alive: list[weakref.ref[torch.nn.Module]] = []
    for _ in range(3):
        model = Model().eval()
        cm = planish.compile(model, (x,))
        cm(x)
        alive.append(weakref.ref(model))
        del model, cm
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


def test_a_kernel_without_scratch_memory_is_an_error() -> None:
    """Not a crash, and not silently wrong values: the calls after it are left out and the caller is told."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    cm = planish.compile(torch.nn.Sequential(*layers).eval(), (torch.randn(700, 64),))
    kind = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int)
    refuse = kind(lambda *_: None)
    library = cm._compiled.executable._lib
    allocate = ctypes.c_void_p.in_dll(library, "__TVMBackendAllocWorkspace")
    working, allocate.value = allocate.value, ctypes.cast(refuse, ctypes.c_void_p).value
    try:
        with pytest.raises(KernelError, match="scratch memory"):
            cm(torch.randn(700, 64))
    finally:
        allocate.value = working
    assert torch.isfinite(cm(torch.randn(700, 64))).all()
