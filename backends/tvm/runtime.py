"""Native code at run time: one launcher for the process, and models' shared libraries wired to it.

The object file of a compiled model leaves its parallel loops and workspaces to weak function pointers. Here the object
is linked alone into a shared library, loaded, and its pointers are set to the launcher's functions (`launcher.c` says
how that runs the loops).
"""

from __future__ import annotations

import _ctypes
import ctypes
import hashlib
import importlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import platformdirs

from planish.errors import ToolchainError

_SOURCE = Path(__file__).with_name("launcher.c")
_COMPILE_FLAGS = ("-O2", "-fPIC", "-shared", "-pthread")
# -Bsymbolic: a model reads its own pointers, even when another library in the process exports the same names.
# -z defs: a function that nothing provides is an error here, by name, and not a crash in a call.
# -O2: ziglang then links the C runtime it built for the launcher and does not build a debug one (28 s).
_LINK_FLAGS = ("-O2", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", "-Wl,-z,noexecstack")
_LINK_LIBRARIES = ("-lm",)
_COMPILERS = ("cc", "gcc", "clang")
_NO_COMPILER_FIX = "install gcc or pip install planish[arm]"
_TOOL_SECONDS = 300  # the first run of ziglang builds its own C runtime

_WIRED = {
    "__TVMBackendParallelLaunch": "planish_parallel_launch",
    "__TVMBackendAllocWorkspace": "planish_alloc_workspace",
    "__TVMBackendFreeWorkspace": "planish_free_workspace",
}
# Pointers into TVM's own runtime. Nothing sets them here, and a call through one would end the process.
_FOREIGN = (
    "__TVMBackendParallelBarrier",
    "__TVMFFIEnvModLookupFromImports",
    "__TVMFFIErrorSetRaisedFromCStr",
    "__TVMFFIFunctionCall",
    "__TVMFFIHandleInitOnce",
)
_FORKED_WITHOUT_EXEC = 0x40  # PF_FORKNOEXEC in field 9 of /proc/self/stat


class _ToolFailed(Exception):
    """A compiler could not do its work; the text is its command and what it printed."""


@dataclass(frozen=True)
class Launcher:
    """The process-wide launcher, and how it came to be.

    Args:
        path: where the launcher's library was loaded from.
        compiler: command that built it and that links models.
        openmp: file of the OpenMP runtime that torch uses, or an empty string.
        reason: why the route chosen at load time was chosen.
        cache: the cache folder, or why none is used.
        set_threads: number of threads for the calling thread's next launches; costs some 0.2 µs.
        begin: before a call of a model's function: its loops share one team of threads.
        end: after it.
    """

    path: str
    compiler: tuple[str, ...]
    openmp: str
    reason: str
    cache: str
    set_threads: Callable[[int], None]
    begin: Callable[[], None]
    end: Callable[[], None]
    _lib: ctypes.CDLL = field(repr=False)

    @property
    def route(self) -> str:
        """`openmp` (torch's own team) or `pthread` (our pool; always so in a forked child)."""
        return "openmp" if self._lib.planish_is_openmp() else "pthread"

    @property
    def forked(self) -> bool:
        """Whether this process was forked off after the launcher was loaded."""
        return bool(self._lib.planish_is_forked())

    def wire(self, lib: ctypes.CDLL) -> None:
        """Point the pointers of a model's library at the launcher; one that the model does not use is absent."""
        for variable, function in _WIRED.items():
            pointer = _pointer(lib, variable)
            if pointer is not None:
                pointer.value = ctypes.cast(getattr(self._lib, function), ctypes.c_void_p).value


_launcher: Launcher | None = None
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


# A thread that held the lock when the process forked does not exist in the child.
os.register_at_fork(after_in_child=_renew_lock)


def launcher() -> Launcher:
    """The launcher of this process, built on the first call ever and loaded on the first call of the process.

    Raises:
        ToolchainError: no C compiler, or none that works.
    """
    global _launcher
    if _launcher is None:
        with _lock:
            if _launcher is None:
                _launcher = _make_launcher(_find_compilers())
    return _launcher


def set_threads(n: int) -> None:
    """Set the number of threads that the calling thread's next launches use."""
    launcher().set_threads(n)


def load_library(*code: bytes | Path) -> ctypes.CDLL:
    """Link object files (bytes or paths) into one shared library, load it and wire it to the launcher.

    The library is unloaded when neither it nor a function taken from it is referenced any more; keep one of them for as
    long as a bare address of its code is in use.

    Raises:
        ToolchainError: no C compiler, the link failed, or the code needs TVM's runtime.
    """
    return _load_library(code, launcher())


def _load_library(code: Sequence[bytes | Path], active: Launcher) -> ctypes.CDLL:
    """`load_library` with a launcher of the caller's choice."""
    with _workspace() as folder:
        sources = [c if isinstance(c, Path) else Path(folder, f"model{i}.o") for i, c in enumerate(code)]
        target = Path(folder, "model.so")
        try:
            for source, c in zip(sources, code, strict=True):
                if isinstance(c, bytes):
                    source.write_bytes(c)
            _run((*active.compiler, *_LINK_FLAGS, "-o", str(target), *map(str, sources), *_LINK_LIBRARIES))
            lib = ctypes.CDLL(str(target))
        except (_ToolFailed, OSError) as error:
            raise ToolchainError(
                "a compiled model could not be linked and loaded",
                where=", ".join(map(str, sources)),
                why=str(error),
                fix="see the tool's message; a full disk or a cache folder mounted noexec are frequent reasons",
            ) from error
    # Never at exit: other threads may still be inside the code then.
    weakref.finalize(lib, _ctypes.dlclose, lib._handle).atexit = False
    foreign = [name for name in _FOREIGN if _pointer(lib, name) is not None]
    if foreign:
        raise ToolchainError(
            f"a compiled model calls TVM's runtime through {', '.join(foreign)}",
            where=", ".join(map(str, sources)),
            why="native models run without TVM's runtime, so these pointers stay null",
            fix="build the module with the C-ABI pipeline, without asserts, packed calls or parallel barriers",
        )
    active.wire(lib)
    return lib


def describe() -> dict[str, str]:
    """What `planish doctor` prints about the launcher.

    Raises:
        ToolchainError: no C compiler, or none that works.
    """
    active = launcher()
    return {
        "route": active.route,
        "reason": "forked child: libgomp's threads are gone" if active.forked else active.reason,
        "openmp": active.openmp or "none",
        "compiler": " ".join(active.compiler),
        "launcher": active.path,
        "cache": active.cache,
    }


def _pointer(lib: ctypes.CDLL, name: str) -> ctypes.c_void_p | None:
    """The exported pointer variable `name` of a library; None where the library has none."""
    try:
        return ctypes.c_void_p.in_dll(lib, name)
    except ValueError:
        return None


def _make_launcher(candidates: list[tuple[str, ...]]) -> Launcher:
    """Build or find the launcher with the first of the compilers that works."""
    if not candidates:
        raise ToolchainError(
            "no C compiler found",
            where=f"looked for {', '.join(_COMPILERS)} and the ziglang package",
            why="the thread launcher and compiled models are linked on this machine",
            fix=_NO_COMPILER_FIX,
        )
    failures: list[str] = []
    for compiler in candidates:
        try:
            path, lib, cache = _load_launcher(compiler)
        except (_ToolFailed, OSError) as error:
            failures.append(str(error))
        else:
            return _assemble(path, lib, cache, compiler, *_choose_route(lib))
    raise ToolchainError("no C compiler works", where=str(_SOURCE), why="\n".join(failures), fix=_NO_COMPILER_FIX)


def _assemble(path: str, lib: ctypes.CDLL, cache: str, compiler: tuple[str, ...], openmp: str, reason: str) -> Launcher:
    """The record of a loaded launcher."""
    # Through a PyDLL the call keeps the GIL: releasing it would cost more than the call.
    quick = ctypes.PyDLL(path, handle=lib._handle)
    quick.planish_set_threads.argtypes = [ctypes.c_int]
    for function in (quick.planish_set_threads, quick.planish_begin):
        function.restype = None
    lib.planish_end.restype = None  # it waits for threads, so the GIL is given up
    functions = quick.planish_set_threads, quick.planish_begin, lib.planish_end
    return Launcher(path, compiler, openmp, reason, cache, *functions, lib)


def _choose_route(lib: ctypes.CDLL) -> tuple[str, str]:
    """Take torch's OpenMP runtime where that is safe; returns the runtime's file and the reason for the choice."""
    # The runtime has to be loaded before it can be found.
    importlib.import_module("torch")
    flags = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6])
    if flags & _FORKED_WITHOUT_EXEC:
        # Whether torch had its team before the fork cannot be seen from here, and a launch on it would wait for ever.
        return "", "the process was forked before the launcher was loaded, and libgomp may hang after a fork"
    with open("/proc/self/maps") as maps:
        paths = (line.split(maxsplit=5)[-1].strip() for line in maps)
        torch_library = next((p for p in paths if os.path.basename(p).startswith("libtorch_cpu.so")), "")
    name = ctypes.create_string_buffer(4096)
    code = lib.planish_use_openmp(os.fsencode(torch_library), name, ctypes.c_size_t(len(name)))
    file = os.fsdecode(name.value)
    if code == 0:
        return file, "torch's own OpenMP team"
    return file, "torch's OpenMP runtime is not libgomp" if code == 2 else "torch was built without OpenMP"


def _find_compilers() -> list[tuple[str, ...]]:
    """Commands of the C compilers on this machine, the preferred one first."""
    found: list[tuple[str, ...]] = [(path,) for name in _COMPILERS if (path := shutil.which(name))]
    if importlib.util.find_spec("ziglang"):
        found.append((sys.executable, "-m", "ziglang", "cc"))
    return found


def _load_launcher(compiler: tuple[str, ...]) -> tuple[str, ctypes.CDLL, str]:
    """Load the launcher from the cache, built there if need be; without a usable cache, build it for this process.

    Returns:
        The path it was loaded from, the library, and the cache folder or why there is none.
    """
    try:
        path = _cached_launcher(compiler, _cache_folder())
        return str(path), ctypes.CDLL(str(path)), str(path.parent)
    except (_ToolFailed, OSError) as error:
        note = f"none: {error}"
    with tempfile.TemporaryDirectory(prefix="planish-") as folder:
        path = Path(folder, "launcher.so")
        _compile_launcher(compiler, path)
        return str(path), ctypes.CDLL(str(path)), note


def _cached_launcher(compiler: tuple[str, ...], cache: Path) -> Path:
    """Path of the launcher in the cache; built in a folder of its own there and renamed when it is whole."""
    identity = (*(os.path.realpath(part) if os.path.isabs(part) else part for part in compiler), *_COMPILE_FLAGS)
    text = "\0".join((platform.machine(), *identity, _SOURCE.read_text()))
    path = cache / f"launcher-{hashlib.sha256(text.encode()).hexdigest()[:32]}.so"
    if not path.exists():
        with filelock.FileLock(cache / "launcher.lock", timeout=_TOOL_SECONDS):
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=cache) as folder:
                    built = Path(folder, "launcher.so")
                    _compile_launcher(compiler, built)
                    built.replace(path)
    return path


def _compile_launcher(compiler: tuple[str, ...], target: Path) -> None:
    _run((*compiler, *_COMPILE_FLAGS, "-o", str(target), str(_SOURCE), "-ldl"))


def _run(command: tuple[str, ...]) -> None:
    """Run a build tool quietly; its output is shown only when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise _ToolFailed(f"{' '.join(command)}: not finished after {_TOOL_SECONDS} s") from error
    if done.returncode:
        raise _ToolFailed(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr.strip()}")


def _cache_folder() -> Path:
    """The folder native code is loaded from.

    Raises:
        OSError: it cannot be made or written, or somebody else could have put a file there.
    """
    path = platformdirs.user_cache_path("planish") / "native"
    for folder in (path.parent, path):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) != 0o700:
        raise PermissionError(f"{path} is not a folder of ours with mode 0700; remove it, or chmod 700 it")
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written")
    return path


def _workspace() -> AbstractContextManager[str]:
    """A private temporary folder: in the cache where that works (/tmp may be noexec), else the system's."""
    try:
        return tempfile.TemporaryDirectory(dir=_cache_folder())
    except OSError:
        return tempfile.TemporaryDirectory(prefix="planish-")
