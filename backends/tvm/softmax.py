"""Softmax, its logarithm and its statistics over the last axis, by the schedule that fits the length of the rows.

A row is cut into chunks that stay in a core's second-level cache. Of each chunk the maximum and the sum of
exp(x - maximum) are kept; the row's own follow from them in the order of the chunks, whoever computed them, so the
bits do not depend on the number of threads. See docs/decisions/0013.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm import sweep
from planish.backends.tvm.arithmetic import libm
from planish.backends.tvm.builder import Expr, as_int, f32, for_vectors, i32, keep, lanes_at, splat
from planish.backends.tvm.index import cast, unflatten_index
from planish.backends.tvm.kernel import Kernel, Lowered, Module, Region, Scratch, kernel, rows_in_parallel
from planish.backends.tvm.rowwise import row_count, row_kernel, store
from planish.backends.tvm.sweep import Soon, Stretch
from planish.backends.tvm.vmath import exp_nonpositive
from planish.ops import LOG_SOFTMAX, SOFTMAX, STATISTICS
from planish.program import Program
from planish.targets import Target

_SHARES = 64
"""Most tasks that short rows are shared out in."""


@dataclass(frozen=True)
class Schedule:
    """How the rows of a softmax are computed.

    Attributes:
        two_pass: of two passes over memory the first takes maximum and sum of each chunk, the second computes the
            exponentials again; else those of a softmax are stored by the first and scaled by the second.
        stream: the result goes to memory past the caches.
        limit: rows of up to so many elements take three passes in any case.
    """

    two_pass: bool = False
    stream: bool = False
    limit: int = 0

    @staticmethod
    def of(node: fx.Node) -> Schedule:
        """What the pass chose for a node; three passes for an op that the pass has not seen."""
        if str(node.target).partition(".")[0] != "planish":
            return Schedule()
        name, limit = node.args[1:3]
        return Schedule(name != "three-pass", name == "two-pass-stream", int(limit))  # pyright: ignore


def chunk_size(target: Target) -> int:
    """Elements of a chunk: a power of two; it, its result and the next ones' fill half of the second-level cache."""
    return 1 << ((target.l2_bytes // 32).bit_length() - 1)


def lower_softmax(module: Module, program: Program, region: Region, anchor: fx.Node, lanes: int) -> Lowered:
    """Kernel of a region around a softmax or its logarithm, or of their statistics.

    before: ``softmax(a + b) * c``
    after:  chunks of rows in parallel: a + b into the result, maximum, exponentials and sum; then the scaling, times c

    Args:
        lanes: of the ops before and after the softmax; 1 where they need it.
    """
    shape, chunk = program.shape(anchor.args[0]), chunk_size(module.target)
    x = anchor.args[0]
    stored = x not in region.inputs or x.meta["val"].dtype is not torch.float32  # pyright: ignore
    longest = program.upper_bound(shape[-1])
    chunks = shape[-1] // chunk if isinstance(shape[-1], int) else sympy.floor(shape[-1] / chunk)
    pairs = sympy.prod(shape[:-1]) * (chunks + 2)
    extra: list[tuple[Any, str]] = [(Scratch(8 * pairs), "float32")] if longest > chunk else []
    if stored and anchor.target is STATISTICS:
        extra.append((Scratch(4 * sympy.prod(shape)), "float32"))
    with kernel(module, program, region, extra) as (k, out, scratch):
        lead, size = k.ev.shape(anchor.args[0])[:-1], k.ev.shape(anchor.args[0])[-1]  # pyright: ignore
        values = scratch[-1] if stored and anchor.target is STATISTICS else out
        rows = _Rows(k, anchor, out, lanes, lead, size, chunk, values, stored, scratch[0] if longest > chunk else None)
        if longest <= chunk:
            rows.short()
        else:
            _branch(size <= chunk, rows.short, lambda: rows.by_length(Schedule.of(anchor)))
    return row_kernel(k, program, anchor)


def _branch(condition: Any, yes: Callable[[], None], no: Callable[[], None]) -> None:
    """Emit one of two pieces of code, or a test and both where the condition is not known yet."""
    known = condition if isinstance(condition, bool) else as_int(condition)
    if known is not None:
        (yes if known else no)()
        return
    with T.If(condition):
        with T.Then():
            yes()
        with T.Else():
            no()


@dataclass
class _Rows:
    """The rows of one kernel.

    Attributes:
        k: the kernel.
        anchor: the softmax.
        out: where the result goes.
        lanes: of the ops before and after the softmax.
        lead: sizes of the axes before the last.
        size: length of a row.
        chunk: length of a chunk.
        values: where x is put first if it is computed here, and where exponentials are kept.
        stored: whether x is computed here; else it is a tensor in memory.
        pairs: maximum and sum of each chunk, and after a row's chunks those of the row; None if rows have one chunk.
    """

    k: Kernel
    anchor: fx.Node
    out: Any
    lanes: int
    lead: tuple[Expr, ...]
    size: Expr
    chunk: int
    values: Any
    stored: bool
    pairs: Any
    schedule: Schedule = field(default_factory=Schedule)

    def short(self) -> None:
        """Rows of one chunk each, in parallel, in three passes.

        The next row's maximum is looked for between the exponentials and the scaling: it does not wait for the sum,
        and the scaling does not wait for it.
        """
        self.schedule = Schedule()
        rows = row_count(self.lead)
        share = T.bind(T.max(T.floordiv(rows + (_SHARES - 1), _SHARES), 1))
        with T.parallel(0, T.floordiv(rows + share - 1, share)) as task:
            first = T.bind(task * share)
            count = T.bind(T.min(share, rows - first))
            found = T.alloc_buffer((1,), "float32")
            T.buffer_store(found, self._top(first, self._row(first)), [0])
            with T.serial(0, count) as r:
                row = T.bind(first + r)
                stretch, top = self._row(row), keep(found[0])
                total = sweep.exponentials(stretch, top, self._kept, self._soon(self.size))
                with T.If(r + 1 < count), T.Then():
                    T.buffer_store(found, self._top(row + 1, self._row(T.bind(row + 1))), [0])
                if self.anchor.target is STATISTICS:
                    nothing = tirx.EQ(top, f32(float("-inf")))
                    self._store_statistics(row, top, tirx.Select(nothing, f32(float("nan")), total))
                else:
                    self._finish(row, stretch, top, total, keep(f32(1.0) / total))

    def _soon(self, size: Expr) -> list[Soon]:
        """What the passes after the exponentials of ``size`` elements read and write: the next elements of x and of the
        exponentials; a logarithm's own place.
        """
        if self.stored:
            return []
        read = Soon(self.k.ev.sources[self.anchor.args[0]].buffer, size, write=False)  # pyright: ignore
        if self.schedule.two_pass:
            return [read]
        if self.anchor.target in SOFTMAX:
            return [read, Soon(self.out, size, write=True)]
        return [read, Soon(self.out, i32(0), write=True)] if self.anchor.target in LOG_SOFTMAX else [read]

    def by_length(self, schedule: Schedule) -> None:
        """Rows of several chunks, by the schedule; those up to its limit in three passes."""

        def run(chosen: Schedule) -> Callable[[], None]:
            return lambda: self._long(chosen)

        plain = Schedule()
        if not schedule.two_pass:
            self._long(plain)
        else:
            _branch(self.size <= schedule.limit, run(plain), run(schedule))

    def _long(self, schedule: Schedule) -> None:
        """Many rows in parallel, or few of them one after the other with their chunks in parallel."""
        self.schedule = schedule
        rows = row_count(self.lead)
        chunks = T.bind(T.floordiv(i32(0) + self.size + (self.chunk - 1), self.chunk))

        def together() -> None:
            with rows_in_parallel(rows) as row:
                with T.serial(0, chunks) as c:
                    self._first(row, c, chunks)
                self._combine(row, chunks)
                if self.anchor.target is not STATISTICS:
                    with T.serial(0, chunks) as c:
                        self._last(row, c, chunks)

        def in_turn() -> None:
            with T.serial(0, rows) as row:
                with T.parallel(0, chunks) as c:
                    self._first(row, c, chunks)
                self._combine(row, chunks)
                if self.anchor.target is not STATISTICS:
                    with T.parallel(0, chunks) as c:
                        self._last(row, c, chunks)

        _branch(rows >= self.k.module.target.shared_rows, together, in_turn)

    def _first(self, row: Expr, c: Expr, chunks: Expr) -> None:
        """Maximum and sum of a chunk."""
        top, total = self._statistics(row, self._chunk(row, c))
        self._put(row, c, chunks, top, total)

    def _combine(self, row: Expr, chunks: Expr) -> None:
        """Maximum and sum of a row from its chunks', added up in fp64."""
        first = T.bind(self._pair(row, 0, chunks))
        top, total = T.alloc_buffer((1,), "float32"), T.alloc_buffer((1,), "float64")
        T.buffer_store(top, f32(float("-inf")), [0])
        T.buffer_store(total, tirx.const(0.0, "float64"), [0])
        with T.serial(0, chunks) as c:
            T.buffer_store(top, T.max(self.pairs[first + c * 2], top[0]), [0])
        with T.serial(0, chunks) as c:
            weight = exp_nonpositive(self.pairs[first + c * 2] - top[0])
            part = tirx.Cast("float64", keep(self.pairs[first + c * 2 + 1])) * tirx.Cast("float64", weight)
            T.buffer_store(total, total[0] + part, [0])
        whole = keep(tirx.Cast("float32", total[0]))
        if self.anchor.target is STATISTICS:
            self._store_statistics(row, top[0], whole)
        else:
            self._put(row, chunks, chunks, top[0], whole)

    def _last(self, row: Expr, c: Expr, chunks: Expr) -> None:
        """The results of a chunk."""
        at = T.bind(self._pair(row, chunks, chunks))
        top, total = keep(self.pairs[at]), keep(self.pairs[at + 1])
        scale = f32(1.0) / total
        if not self.schedule.two_pass:
            scale = scale * exp_nonpositive(self.pairs[T.bind(self._pair(row, c, chunks))] - top)
        self._finish(row, self._chunk(row, c), top, total, keep(scale))

    def _pair(self, row: Expr, c: Expr, chunks: Expr) -> Expr:
        return (row * (chunks + 1) + c) * 2

    def _put(self, row: Expr, c: Expr, chunks: Expr, top: Expr, total: Expr) -> None:
        at = T.bind(self._pair(row, c, chunks))
        T.buffer_store(self.pairs, top, [at])
        T.buffer_store(self.pairs, total, [at + 1])

    def _chunk(self, row: Expr, c: Expr) -> Stretch:
        start = T.bind(c * self.chunk)
        return self._stretch(row, start, T.bind(T.min(self.size - start, self.chunk)))

    def _stretch(self, row: Expr, start: Expr, size: Expr) -> Stretch:
        """A part of a row; x is read from memory, or from where ``_statistics`` has put it."""
        base = T.bind(row * self.size + start)
        source = self.values if self.stored else self.k.ev.sources[self.anchor.args[0]].buffer  # pyright: ignore
        return Stretch(self.k.lanes, source, base, start, size)

    def _index(self, row: Expr) -> tuple[Expr, ...]:
        return tuple(T.bind(i + i32(0)) for i in unflatten_index(self.lead, row)) if self.lead else ()

    def _row(self, row: Expr) -> Stretch:
        return self._stretch(row, i32(0), self.size)

    def _top(self, row: Expr, stretch: Stretch) -> Expr:
        """The maximum of a stretch of a row, whose x is computed first if it is not in memory."""
        self._compute(row, stretch)
        return sweep.largest(stretch)

    def _compute(self, row: Expr, stretch: Stretch) -> None:
        """Put x where it is read from."""
        if not self.stored:
            return
        index = self._index(row)
        for start, count in for_vectors(stretch.size, self.lanes):
            value = self.k.ev.at(self.anchor.args[0], (*index, lanes_at(stretch.start + start, count)))
            value = splat(cast(value, torch.float32), count)
            T.buffer_store(self.values, value, [lanes_at(stretch.base + start, count)])

    @property
    def _kept(self) -> Any:
        """Where exponentials are kept: only a softmax needs them again."""
        return self.values if self.anchor.target in SOFTMAX else None

    def _statistics(self, row: Expr, stretch: Stretch) -> tuple[Expr, Expr]:
        """Maximum and sum of exp(x - maximum) of a stretch; a softmax in three passes keeps the exponentials."""
        top = self._top(row, stretch)
        kept = None if self.schedule.two_pass else self._kept
        return top, sweep.exponentials(stretch, top, kept, self._soon(self.chunk))

    def _store_statistics(self, row: Expr, top: Expr, total: Expr) -> None:
        T.buffer_store(self.out, top, [row * 2])
        T.buffer_store(self.out, total, [row * 2 + 1])

    def _finish(self, row: Expr, stretch: Stretch, top: Expr, total: Expr, scale: Expr) -> None:
        """Results from x or from the exponentials, through the ops that follow."""
        if self.anchor.target in LOG_SOFTMAX:
            shift = keep(libm("log", total))
            value = sweep.minus(top, shift)
        elif self.schedule.two_pass:
            value = sweep.exponential_times(top, scale)
        else:
            value, stretch = sweep.times(scale), stretch.over(self.values)
        if self.k.region.result is self.anchor:
            stream = self.schedule.stream and not self.stored and not self.k.module.target.is_arm  # its fence is x86's
            sweep.write(stretch, self.out, value, stream=stream)
            return
        index = self._index(row)
        for start, count in for_vectors(stretch.size, self.lanes):
            at = T.bind(stretch.base + start)
            result = keep(value(stretch.source[lanes_at(at, count)]))
            place = (*index, lanes_at(stretch.start + start, count))
            store(self.k, self.anchor, result, self.out, at, place, count)
