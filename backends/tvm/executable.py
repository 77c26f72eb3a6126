"""Running a compiled model: arenas, layouts per shape, and one call into native code."""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from planish.backends.base import KernelTime
from planish.backends.tvm import runtime
from planish.backends.tvm.codegen import ENTRY, STATUS_FAILED, ObjectCode
from planish.backends.tvm.expr import DIVISION_BY_ZERO
from planish.backends.tvm.pack import aligned
from planish.errors import InputError, KernelError
from planish.plan import ALIGN, HEAD, Plan, count_word
from planish.program import Program, evaluate

_LAYOUTS = 256
"""Shapes whose arena layout is remembered."""

_ARENAS = 8
"""Most arenas kept for later calls."""


_ROUNDS = 7
_ROUND_SECONDS = 0.02
"""How ``kernels`` spreads its timed calls."""

TICK = 1e-9
"""Seconds that ``kernels`` says a kernel takes where the machine was too noisy to tell."""


@dataclass(frozen=True)
class Layout:
    """Everything about a call that depends on the sizes only."""

    arena_bytes: int
    table: Any
    table_address: int
    outputs: tuple[tuple[int, ...], ...]


class TvmExecutable:
    """One native function with its weights. Immutable but for caches, which are safe under concurrent calls."""

    def __init__(
        self,
        program: Program,
        plan: Plan,
        outputs: list[int],
        blob: torch.Tensor,
        objects: list[ObjectCode],
        tir: dict[str, str],
    ) -> None:
        self.plan = plan
        self.objects = objects
        self._dims = tuple(program.dims)
        self._counts = {name: count_word(program, name) for name in program.counts}
        self._blob = blob
        self._tir = tir
        self._output_buffers = tuple(dict.fromkeys(outputs))
        self._order = tuple(self._output_buffers.index(o) for o in outputs)
        self._dtypes = tuple(program.outputs[outputs.index(o)].dtype for o in self._output_buffers)
        self._lib = runtime.load_library(*[o.code for o in objects])
        self._main: Any = getattr(self._lib, ENTRY)
        inputs = len(program.inputs)  # the state's buffers are the last of them
        pointers = inputs + len(self._output_buffers) + 3
        self._main.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int32] * (len(self._dims) + 2)
        self._main.restype = ctypes.c_int32
        self._launcher = runtime.launcher()
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._arenas: list[torch.Tensor] = []

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plan of the one native function."""
        return (self.plan,)

    def __call__(
        self, tensors: Sequence[torch.Tensor], dims: dict[str, int], state: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Fresh outputs for inputs of the right dtype and shape; copies inputs that are not contiguous or aligned."""
        layout = self._layout(dims)
        held = [_ready(t) for t in state]
        ready = [*(_ready(t) for t in tensors), *held]
        outputs = [torch.empty(s, dtype=d) for s, d in zip(layout.outputs, self._dtypes, strict=True)]
        arena = self._lease(layout.arena_bytes)
        try:
            with self._team():
                self._run(ready, outputs, arena, layout, tuple(dims.values()), 0, len(self.plan.calls))
        finally:
            if len(self._arenas) < _ARENAS:
                self._arenas.append(arena)
        with torch.inference_mode():
            for buffer, value in zip(state, held, strict=True):
                if value is not buffer:
                    buffer.copy_(value)
        return tuple(outputs[i] for i in self._order)

    @contextmanager
    def _team(self) -> Iterator[None]:
        """Calls inside share a team of threads, which is busy waiting between them."""
        self._launcher.set_threads(torch.get_num_threads())
        self._launcher.begin()
        try:
            yield
        finally:
            self._launcher.end()

    def _run(
        self,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        arena: torch.Tensor,
        layout: Layout,
        sizes: tuple[int, ...],
        first: int,
        last: int,
    ) -> None:
        base = arena.data_ptr()
        status = ctypes.c_int32.from_address(base)
        status.value = 0
        self._main(
            *[t.data_ptr() for t in inputs],
            *[t.data_ptr() for t in outputs],
            self._blob.data_ptr(),
            base,
            layout.table_address,
            *sizes,
            first,
            last,
        )
        if status.value == STATUS_FAILED:
            raise KernelError("a kernel could not get its scratch memory", fix="free memory, or use fewer threads")
        if status.value == DIVISION_BY_ZERO:
            raise InputError("an integer is divided by 0", why="PyTorch raises there, too", fix="mask the divisor")
        if status.value:
            raise InputError(
                "an index tensor holds a value outside the table it indexes",
                why="for example a token id beyond the vocabulary, or a sequence longer than the position table",
                fix="check the integer inputs",
            )

    def _layout(self, dims: dict[str, int]) -> Layout:
        key = tuple(dims.values())
        found = self._layouts.get(key)
        if found is None:
            offsets, height = self.plan.arena(dims)
            slots = [i for i, b in enumerate(self.plan.buffers) if b.kind == "arena"]
            table = (ctypes.c_int64 * max(1, len(slots)))(*[offsets.get(s, 0) + HEAD for s in slots])
            shapes = [tuple(evaluate(s, dims) for s in self.plan.buffers[o].shape) for o in self._output_buffers]
            found = Layout(height + HEAD, table, ctypes.addressof(table), tuple(shapes))
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.pop(next(iter(self._layouts)), None)
            self._layouts[key] = found
        return found

    def _lease(self, nbytes: int) -> torch.Tensor:
        """An arena of at least ``nbytes`` that no other call uses."""
        try:
            arena = self._arenas.pop()
        except IndexError:
            return aligned(nbytes)
        return arena if arena.numel() >= nbytes else aligned(nbytes)

    def kernels(
        self, tensors: Sequence[torch.Tensor], dims: dict[str, int], state: Sequence[torch.Tensor], repeats: int
    ) -> list[KernelTime]:
        """Time of each kernel alone, on the values that the whole model left in the arena.

        It is the median of a round's calls less the median of its calls that run no kernel: what the kernel takes
        inside the model, where one native call runs them all. The middle one of ``_ROUNDS`` rounds counts, each of at
        least ``_ROUND_SECONDS`` and together of at least ``repeats`` calls: a short kernel timed in one go shows what
        else the machine did just then. No kernel takes less than a tick of the clock, however noisy the machine.
        """
        layout = self._layout(dims)
        ready = [*(_ready(t) for t in tensors), *state]
        outputs = [torch.empty(s, dtype=d) for s, d in zip(layout.outputs, self._dtypes, strict=True)]
        arena = aligned(layout.arena_bytes)
        sizes = tuple(dims.values())
        with self._team():
            self._run(ready, outputs, arena, layout, sizes, 0, len(self.plan.calls))
        words = (ctypes.c_int32 * (HEAD // 4)).from_address(arena.data_ptr())
        dims = dims | {name: words[word] for name, word in self._counts.items()}

        def sample(first: int, last: int) -> float:
            times: list[float] = []
            with self._team():
                while len(times) < repeats / _ROUNDS or sum(times) < _ROUND_SECONDS:
                    start = time.perf_counter()
                    self._run(ready, outputs, arena, layout, sizes, first, last)
                    times.append(time.perf_counter() - start)
            return statistics.median(times)

        groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for index, call in enumerate(self.plan.calls):
            if call.undoes is not None:
                continue
            shape = tuple(evaluate(s, dims) for s in call.shape)
            groups.setdefault((call.kernel, shape), []).append(index)
        samples: dict[tuple[str, tuple[int, ...]], list[float]] = {key: [] for key in groups}
        for r in range(_ROUNDS):
            empty = sample(0, 0)
            for key, indices in groups.items():
                index = indices[r % len(indices)]
                samples[key].append(sample(index, index + 1) - empty)
        rows: list[KernelTime] = []
        for (name, shape), indices in groups.items():
            call = self.plan.calls[indices[0]]
            alone = max(statistics.median(samples[name, shape]), TICK)
            rows.append(KernelTime(name, call.op, shape, alone * 1e3, evaluate(call.flops, dims), len(indices)))
        return rows

    def sources(self) -> list[tuple[str, str, str]]:
        """(name, TIR, assembly) of every function; small kernels are inlined into the model's function."""
        assembly = [split_assembly(o.assembly) for o in self.objects]
        return [(name, tir, next((a[name] for a in assembly if name in a), "")) for name, tir in self._tir.items()]

    def weights_bytes(self) -> int:
        """Bytes of the weights blob."""
        return self._blob.numel()

    def trim(self) -> None:
        """Free the arenas that no call is using."""
        self._arenas.clear()


def _ready(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where native code can read it, else a copy.

    Native code needs contiguous memory, aligned as vector loads assume, that holds the values and not their negatives.
    """
    if tensor.is_contiguous() and not tensor.data_ptr() % ALIGN and not tensor.is_neg():
        return tensor
    copy = aligned(tensor.numel() * tensor.element_size()).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


_FUNCTION = re.compile(r"\s*\.type\s+(\S+),@function")
_LOCAL = re.compile(r"\.L__tvm\w+(?:\.\d+)?")
_DEBUG = re.compile(r"\s*\.(loc|cfi_\w+|Ltmp\d+:|Lfunc_\w+:)")


def split_assembly(text: str) -> dict[str, str]:
    """Assembly by function, without debug lines; the bodies of its parallel loops, themselves functions, follow it."""
    functions: dict[str, list[str]] = {}
    name, inside = "", False
    for line in text.splitlines():
        if found := _FUNCTION.match(line):
            name = found[1]
        inside = inside or (bool(name) and line.startswith(f"{name}:"))
        if inside and not _DEBUG.match(line):
            functions.setdefault(name, []).append(line)
        if line.strip().startswith(".size"):
            name, inside = "", False
    return {n: "\n".join(_with_bodies(n, functions)) + "\n" for n in functions if not n.startswith(".")}


def _with_bodies(name: str, functions: dict[str, list[str]]) -> list[str]:
    """A function's lines, and those of the local functions that it, or one of them, names."""
    names = [name]
    for each in names:
        used = [n for line in functions[each] for n in _LOCAL.findall(line) if n in functions]
        names += [n for n in dict.fromkeys(used) if n not in names]
    return [line for each in names for line in functions[each]]
