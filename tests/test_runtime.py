"""The launcher: right on both routes, from several threads, after a fork, nested, and with no thread left behind."""

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from planish.backends.tvm import runtime
from planish.errors import ToolchainError

# What TVM emits for `for i in T.parallel(n)`: a lambda that takes its share of the range from task_id and num_task.
SOURCE = r"""
#include <stdint.h>
#include <unistd.h>
typedef struct { void *sync; int32_t num_task; } Env;
typedef int (*Lambda)(int, Env *, void *);
__attribute__((weak)) int (*__TVMBackendParallelLaunch)(Lambda, void *, int);
__attribute__((weak)) void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
__attribute__((weak)) int (*__TVMBackendFreeWorkspace)(int, int, void *);
#define launch __TVMBackendParallelLaunch
typedef struct { int32_t *out; int n, rounds, base; } Args;

static int share(int id, Env *env, Args *a, int *end) {
  int chunk = (a->n + env->num_task - 1) / env->num_task;
  *end = (id + 1) * chunk < a->n ? (id + 1) * chunk : a->n;
  return id * chunk;
}
static int add_body(int id, Env *env, void *p) {
  Args *a = p;
  int end;
  for (int i = share(id, env, a, &end); i < end; i++)
    for (int r = 0; r < a->rounds; r++) a->out[i] += a->base + i;
  return 0;
}
int add(int32_t *out, int n, int rounds, int base) { Args a = {out, n, rounds, base}; return launch(add_body, &a, 0); }

static int outer_body(int id, Env *env, void *p) {
  Args *a = p;
  int end;
  for (int i = share(id, env, a, &end); i < end; i++) {
    Args row = {a->out + i * 64, 64, 1, i};
    if (launch(add_body, &row, 0)) return 3;
  }
  return 0;
}
int nested(int32_t *out, int rows) { Args a = {out, rows, 1, 0}; return launch(outer_body, &a, 0); }

static int fail_body(int id, Env *env, void *p) { return id == env->num_task / 2 ? *(int *)p : 0; }
int fail(int code) { return launch(fail_body, &code, 0); }

static int count_body(int id, Env *env, void *p) { ((int32_t *)p)[id] += env->num_task; return 0; }
int counts(int32_t *out, int num_task) { return launch(count_body, out, num_task); }

static int slow_body(int id, Env *env, void *p) { usleep(300 + 100 * (id % 3)); ((int32_t *)p)[id] += 1; return 0; }
int slow(int32_t *out, int num_task) { return launch(slow_body, out, num_task); }

static int empty_body(int id, Env *env, void *p) { return 0; }
int empty(int launches) { for (int i = 0; i < launches; i++) if (launch(empty_body, 0, 0)) return 1; return 0; }

static void region_body(void *p) {
  static int32_t scratch[4][64];
  static int member;
  Args a = {scratch[__sync_fetch_and_add(&member, 1) % 4], 64, 1, 0};
  if (launch(add_body, &a, 0)) __sync_fetch_and_or((int *)p, 1);
}
int in_region(void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
  int failed = 0;
  parallel(region_body, &failed, 2, 0);
  return failed;
}
int workspace(void) {
  char *p = __TVMBackendAllocWorkspace(1, 0, 100, 2, 32);
  if (!p || (uintptr_t)p % 64) return 1;
  p[99] = 1;
  return __TVMBackendFreeWorkspace(1, 0, p);
}
"""


def build(folder: Path, source: str) -> Path:
    """Compile C text to an object file, the way TVM hands one over."""
    (folder / "code.c").write_text(source)
    command = [*runtime.launcher().compiler, "-O2", "-fPIC", "-c", "code.c", "-o", "code.o"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "code.o"


@pytest.fixture(scope="module")
def model_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("object"), SOURCE)


def make_pthread_launcher(folder: Path) -> runtime.Launcher:
    """A launcher of its own that was never told about libgomp, beside the process's one."""
    path = folder / "launcher.so"
    compiler = runtime.launcher().compiler
    runtime._compile_launcher(compiler, path)
    return runtime._assemble(str(path), ctypes.CDLL(str(path)), "none", compiler, "", "a test wants our pool")


@pytest.fixture(scope="module")
def pthread_launcher(tmp_path_factory: pytest.TempPathFactory) -> runtime.Launcher:
    return make_pthread_launcher(tmp_path_factory.mktemp("launcher"))


class Code:
    """The test's library, wired to one launcher."""

    def __init__(self, launcher: runtime.Launcher, model_object: Path) -> None:
        self.launcher = launcher
        self.lib = runtime._load_library([model_object], launcher)

    def add(self, threads: int, n: int = 1000, rounds: int = 1, base: int = 0) -> bool:
        """Whether one parallel loop over `n` items gives what a serial one gives."""
        out = (ctypes.c_int32 * n)()
        self.launcher.set_threads(threads)
        rc = self.lib.add(out, n, rounds, base)
        return rc == 0 and all(value == rounds * (base + i) for i, value in enumerate(out))


@pytest.fixture(params=["openmp", "pthread"])
def code(request: pytest.FixtureRequest, model_object: Path, pthread_launcher: runtime.Launcher) -> Iterator[Code]:
    chosen = runtime.launcher() if request.param == "openmp" else pthread_launcher
    assert chosen.route == request.param
    yield Code(chosen, model_object)
    chosen.set_threads(1)


def os_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def settles(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether a condition comes true in time; threads that were told to end need a moment to be gone."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def in_child(check: Callable[[], bool], seconds: float = 30) -> str:
    """Run a check in a forked child; a child that hangs is killed, and only that child."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return {0: "right", 1: "wrong"}.get(os.waitstatus_to_exitcode(status), "crashed")
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 7, 17, 1000])
def test_every_iteration_runs_once(code: Code, threads: int, n: int) -> None:
    assert all(code.add(threads, n, base=base) for base in range(20))


def test_the_loop_is_cut_into_tasks_for_the_asked_threads(code: Code) -> None:
    for threads, asked, tasks in [(1, 0, 1), (2, 0, 16), (4, 0, 32), (1, 5, 5), (2, 5, 5)]:
        out = (ctypes.c_int32 * 64)()
        code.launcher.set_threads(threads)
        assert code.lib.counts(out, asked) == 0
        assert list(out) == [tasks] * tasks + [0] * (64 - tasks)


def test_thread_numbers_out_of_range_are_clamped(code: Code) -> None:
    assert code.add(0)
    assert code.add(-3)


def test_two_python_threads_call_at_once(code: Code) -> None:
    right: list[int] = []

    def call(base: int) -> None:
        right.append(sum(code.add(2, n=64, base=base + i) for i in range(1000)))

    callers = [threading.Thread(target=call, args=(base,)) for base in (0, 5000)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert right == [1000, 1000]


def test_a_launch_ends_after_its_last_task(code: Code) -> None:
    """Also when several launches overlap: each waits for its own tasks, whoever runs them."""
    late: list[int] = []

    def call() -> None:
        code.launcher.set_threads(4)
        for _ in range(40):
            out = (ctypes.c_int32 * 5)()
            rc = code.lib.slow(out, 5)
            late.append(rc or list(out) != [1] * 5)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    call()
    assert late == [False] * 160


def test_forked_child_works(code: Code) -> None:
    assert code.add(2)
    assert (
        in_child(lambda: code.launcher.route == "pthread" and all(code.add(2, base=i) for i in range(200))) == "right"
    )
    assert code.add(2)


def test_child_of_a_forked_child_works(code: Code) -> None:
    assert in_child(lambda: code.add(2) and in_child(lambda: code.add(2)) == "right" and code.add(2)) == "right"


def test_fork_during_a_launch_of_another_thread(code: Code) -> None:
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            code.launcher.set_threads(2)
            code.lib.empty(1000)

    other = threading.Thread(target=keep_busy)
    other.start()
    try:
        assert [in_child(lambda: code.add(2)) for _ in range(10)] == ["right"] * 10
    finally:
        stop.set()
        other.join()


def test_launcher_made_in_a_forked_child_leaves_libgomp_alone() -> None:
    script = """
import os, torch
(torch.ones(512, 512) @ torch.ones(512, 512)).sum()
from planish.backends.tvm import runtime
pid = os.fork()
if pid == 0:
    os._exit(0 if runtime.launcher().route == "pthread" and "forked" in runtime.describe()["reason"] else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=120, check=False).returncode == 0


def test_short_lived_threads_leave_no_os_thread(code: Code) -> None:
    code.add(2)
    before = os_threads()
    right: list[bool] = []
    for i in range(100):
        caller = threading.Thread(target=lambda base: right.append(code.add(2, n=64, base=base)), args=(i,))
        caller.start()
        caller.join()
    assert right == [True] * 100
    assert settles(lambda: os_threads() == before), (before, os_threads())


def test_pool_threads_take_no_signal(tmp_path: Path, model_object: Path) -> None:
    own = Code(make_pthread_launcher(tmp_path), model_object)
    before, mask = set(os.listdir("/proc/self/task")), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert own.add(4)
    created = set(os.listdir("/proc/self/task")) - before
    assert len(created) == 3
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    for task in created:
        status = Path("/proc/self/task", task, "status").read_text()
        blocked = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16)
        assert blocked & 1 << (signal.SIGINT - 1)


def test_error_code_of_a_task_is_the_result(code: Code) -> None:
    for threads in (1, 2, 4):
        code.launcher.set_threads(threads)
        assert code.lib.fail(-7) == -7
        assert code.lib.fail(0) == 0


def test_launch_inside_a_task(code: Code) -> None:
    out = (ctypes.c_int32 * (64 * 20))()
    code.launcher.set_threads(2)
    for _ in range(50):
        assert code.lib.nested(out, 20) == 0
    assert list(out) == [50 * (i + row) for row in range(20) for i in range(64)]


def test_launch_inside_an_openmp_region(code: Code) -> None:
    runtime_file = runtime.launcher().openmp
    parallel = ctypes.cast(ctypes.CDLL(runtime_file).GOMP_parallel, ctypes.c_void_p)
    code.launcher.set_threads(2)
    assert [code.lib.in_region(parallel) for _ in range(50)] == [0] * 50


def test_workspace_is_aligned(code: Code) -> None:
    assert code.lib.workspace() == 0


def test_openmp_route_is_torchs_own_team(model_object: Path) -> None:
    own = Code(runtime.launcher(), model_object)
    threads = torch.get_num_threads()
    torch.ones(1 << 20).exp()
    before = set(os.listdir("/proc/self/task"))
    assert own.add(threads)
    assert set(os.listdir("/proc/self/task")) == before


def test_launcher_is_one_object_for_all_threads() -> None:
    seen: list[runtime.Launcher] = []
    callers = [threading.Thread(target=lambda: seen.append(runtime.launcher())) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len({id(item) for item in seen}) == 1


def test_set_threads_is_per_python_thread(model_object: Path) -> None:
    own = Code(runtime.launcher(), model_object)

    def tasks() -> int:
        out = (ctypes.c_int32 * 64)()
        own.lib.counts(out, 0)
        return out[0]

    runtime.set_threads(2)
    seen: list[int] = []
    other = threading.Thread(target=lambda: seen.append(tasks()))
    other.start()
    other.join()
    assert (tasks(), seen) == (16, [1])
    runtime.set_threads(1)


def test_library_from_bytes_and_its_unloading(model_object: Path) -> None:
    gc.collect()  # the libraries of earlier tests
    lib = runtime.load_library(model_object.read_bytes())
    runtime.set_threads(2)
    assert lib.empty(10) == 0

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(name)

    run, name = lib.empty, lib._name
    count = mapped()
    del lib
    gc.collect()
    assert run(10) == 0
    assert mapped() == count
    del run
    gc.collect()
    assert count > 0
    assert mapped() == 0
    runtime.set_threads(1)


def test_models_have_pointers_of_their_own(model_object: Path, pthread_launcher: runtime.Launcher) -> None:
    first = runtime._load_library([model_object], runtime.launcher())
    second = runtime._load_library([model_object], pthread_launcher)
    name = "__TVMBackendParallelLaunch"
    assert ctypes.c_void_p.in_dll(first, name).value != ctypes.c_void_p.in_dll(second, name).value


def test_undefined_function_is_a_link_error(tmp_path: Path) -> None:
    code = build(tmp_path, "int missing_function(void); int f(void) { return missing_function(); }")
    with pytest.raises(ToolchainError, match="missing_function"):
        runtime.load_library(code)


def test_code_for_tvms_runtime_is_refused(tmp_path: Path) -> None:
    text = "__attribute__((weak)) int (*__TVMFFIFunctionCall)(void); int f(void) { return __TVMFFIFunctionCall(); }"
    with pytest.raises(ToolchainError, match="__TVMFFIFunctionCall"):
        runtime.load_library(build(tmp_path, text))


def test_no_compiler_says_what_to_install() -> None:
    with pytest.raises(ToolchainError, match=r"install gcc or pip install planish\[arm\]"):
        runtime._make_launcher([])


def test_broken_compiler_is_reported_and_the_next_one_taken() -> None:
    with pytest.raises(ToolchainError, match="no C compiler works"):
        runtime._make_launcher([("false",), ("no-such-compiler",)])
    working = runtime.launcher().compiler
    assert runtime._make_launcher([("false",), working]).compiler == working


def test_cache_is_private_and_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = runtime.launcher().compiler
    path, _, cache = runtime._load_launcher(compiler)
    written = Path(path).stat().st_mtime_ns
    assert Path(path).parent == Path(cache)
    assert Path(cache).stat().st_mode & 0o777 == 0o700
    assert runtime._load_launcher(compiler)[0] == path
    assert Path(path).stat().st_mtime_ns == written
    assert {item.name for item in Path(cache).iterdir()} <= {Path(path).name, "launcher.lock"}


def test_cache_open_to_others_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "planish" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    path, lib, cache = runtime._load_launcher(runtime.launcher().compiler)
    assert lib.planish_is_openmp() == 0
    assert not Path(path).is_relative_to(tmp_path)
    assert "0700" in cache
    assert not list(folder.iterdir())


def test_describe_names_route_compiler_and_cache() -> None:
    facts = runtime.describe()
    assert facts["route"] == "openmp"
    assert "libgomp" in facts["openmp"]
    assert set(facts) == {"route", "reason", "openmp", "compiler", "launcher", "cache"}
