"""A kernel under construction: its parameters, and the region of the graph it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import tvm_ffi
from torch import fx
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, Function, function
from planish.backends.tvm.expr import Evaluator, Source
from planish.backends.tvm.index import storage_dtype
from planish.plan import Size
from planish.program import Program
from planish.targets import Target


@dataclass(frozen=True)
class Region:
    """What one kernel computes: a lone op, or the inside of a fused group.

    Attributes:
        name: the node in the outer graph.
        nodes: the operators, in execution order; the last one is the result.
        inputs: nodes whose values come from outside (tensors only).
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]

    @property
    def result(self) -> fx.Node:
        """The node whose value the region stores."""
        return self.nodes[-1]

    def find(self, targets: Any) -> fx.Node | None:
        """The last node that calls one of ``targets``."""
        return next((n for n in reversed(self.nodes) if n.target in targets), None)


@dataclass
class Module:
    """Functions of one model. ``tiles`` are the register-blocked loops that kernels call; they are made on demand.

    Tiles become an object file of their own: inlined into a kernel they would share its registers and spill.
    """

    target: Target
    functions: dict[str, tirx.PrimFunc] = field(default_factory=dict[str, tirx.PrimFunc])
    tiles: dict[str, tirx.PrimFunc] = field(default_factory=dict[str, tirx.PrimFunc])
    _by_hash: dict[int, list[str]] = field(default_factory=dict[int, list[str]])

    def tile(self, name: str, build: Callable[[], tirx.PrimFunc]) -> str:
        """C symbol of the tile ``name``, built at first use."""
        if name not in self.tiles:
            self.tiles[name] = build()
        return name

    def kernel(self, stem: str, func: tirx.PrimFunc) -> str:
        """Name of ``func`` in the module: an equal kernel's name, or a new one made from ``stem``."""
        key = tvm_ffi.structural_hash(func)
        for name in self._by_hash.setdefault(key, []):
            if tvm_ffi.structural_equal(self.functions[name], func):
                return name
        name = f"{stem}_{sum(n.rsplit('_', 1)[0] == stem for n in self.functions)}"
        self._by_hash[key].append(name)
        self.functions[name] = func
        return name


@dataclass(frozen=True)
class Lowered:
    """One kernel and what it is called with.

    ``operands`` are graph nodes (their buffers), ``Packed`` weights, a ``Scratch`` request or the index of a buffer of
    the plan, in parameter order.
    """

    stem: str
    func: tirx.PrimFunc
    operands: tuple[Any, ...]
    op: str
    shape: tuple[Size, ...]
    flops: Size


@dataclass(frozen=True)
class Packed:
    """A constant stored in the blob in another layout: ``layout`` names it, ``width`` is its parameter.

    ``other`` is a second constant that it is made from.
    """

    node: fx.Node
    layout: str
    width: int
    other: fx.Node | None = None


@dataclass(frozen=True)
class Scratch:
    """Arena memory that lives only during the call, in bytes."""

    nbytes: Size


@dataclass(frozen=True)
class Status:
    """The int32 that kernels set when they meet an index out of range."""


@dataclass
class Kernel:
    """Parameters and evaluator of a kernel being written; see ``kernel``."""

    module: Module
    program: Program
    region: Region
    function: Function
    ev: Evaluator
    operands: tuple[Any, ...]

    @property
    def lanes(self) -> int:
        """fp32 lanes of the target's vectors."""
        return self.module.target.lanes


@contextmanager
def kernel(
    module: Module,
    program: Program,
    region: Region,
    extra: Sequence[tuple[Any, str]] = (),
    skip: Sequence[fx.Node] = (),
) -> Iterator[tuple[Kernel, Any, list[Any]]]:
    """Begin the kernel of a region; yields it, the output buffer and one buffer per ``extra`` operand.

    Parameters in order: the region's inputs (but ``skip``), the output, the extras, the status, then one int32 per dim.
    """
    read = [n for n in region.inputs if n not in skip]
    tensors = [*read, region.result]
    operands = (*tensors, *(operand for operand, _ in extra), Status())
    types = [*(storage_dtype(n.meta["val"].dtype) for n in tensors), *(dtype for _, dtype in extra), "int32"]
    with function() as f:
        buffers, scalars = f.parameters(types, len(program.dims))
        ev = Evaluator(program, dict(zip(program.dims, scalars, strict=True)), {}, status=buffers[-1])
        ev.sources |= {n: Source(b, ev.shape(n), n.meta["val"].dtype) for n, b in zip(read, buffers, strict=False)}
        yield Kernel(module, program, region, f, ev, operands), buffers[len(read)], buffers[len(tensors) : -1]


@contextmanager
def rows_in_parallel(rows: Expr, tasks: int = 64) -> Iterator[Expr]:
    """Emit a parallel loop over rows, in at most ``tasks`` contiguous chunks; yields the row."""
    chunk = T.bind(T.max(T.floordiv(rows + (tasks - 1), tasks), 1))
    with T.parallel(0, T.floordiv(rows + chunk - 1, chunk)) as c:
        first = T.bind(c * chunk)
        with T.serial(0, T.min(chunk, rows - first)) as r:
            yield T.bind(first + r)
