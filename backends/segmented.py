"""Running a program that is cut into native segments: PyTorch runs the ops between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import fx

from planish.backends.base import Executable, KernelTime
from planish.errors import InputError
from planish.plan import Plan
from planish.program import Program, TensorSpec, evaluate

_SHAPES = 256
"""Sizes of the dims for which the segments' input shapes are remembered."""


@dataclass(frozen=True)
class Segment:
    """Native code of a part of the graph, and the tensors it reads."""

    executable: Executable
    inputs: tuple[TensorSpec, ...]


class SegmentedExecutable:
    """A graph whose groups are native segments and whose other ops run in PyTorch. Immutable; calls share nothing.

    Args:
        program: its groups' graphs are dropped, for the segments have the constants in their own form.
        segments: by the name of their group.
    """

    def __init__(self, program: Program, segments: Mapping[str, Segment]) -> None:
        self._segments = segments
        # A method in the cache would keep the executable, and with it the weights, until the next garbage collection.
        self._shapes = lru_cache(_SHAPES)(partial(_input_shapes, segments, tuple(program.dims)))
        for name in segments:
            delattr(program.module, name)
        for node in program.nodes():
            node.meta = {}  # fake values would keep everything that capture knew about shapes
        self._graph = _Graph(program.module)
        self._constants = [*program.module.parameters(), *program.module.buffers()]

    @property
    def plans(self) -> tuple[Plan, ...]:
        """One for each segment; a kernel's name starts with its segment's."""
        return tuple(
            Plan(plan.buffers, [replace(call, kernel=f"{name}.{call.kernel}") for call in plan.calls])
            for name, segment in self._segments.items()
            for plan in segment.executable.plans
        )

    def __call__(
        self, tensors: Sequence[torch.Tensor], dims: dict[str, int], state: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Fresh outputs; one that PyTorch made as a view of an input, a constant or another output is copied.

        Raises:
            InputError: an op in PyTorch returned another shape or dtype than it had promised to the next segment.
        """
        results = self._run(
            [*tensors, *state], dims, lambda name, given: self._segments[name].executable(given, dims, ())
        )
        outputs, after = results[: len(results) - len(state)], results[len(results) - len(state) :]
        with torch.inference_mode():
            for buffer, value in zip(state, after, strict=True):
                buffer.copy_(value)
        return outputs

    def _run(self, tensors: Sequence[torch.Tensor], dims: dict[str, int], call: _Call) -> tuple[torch.Tensor, ...]:
        shapes = self._shapes(tuple(dims.values()))

        def checked(name: str, given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            for spec, shape, tensor in zip(self._segments[name].inputs, shapes[name], given, strict=True):
                if tensor.shape != shape or tensor.dtype is not spec.dtype:
                    raise InputError(
                        f"{spec.name} is {tensor.dtype}{list(tensor.shape)}, compiled for {spec.dtype}{list(shape)}",
                        why="native code reads memory as the shapes that the model was captured with say",
                        fix="give the inputs the sizes that the model checks for, or correct the fake function of "
                        "the custom operator that returned this",
                    )
            return call(name, given)

        graph = copy.copy(self._graph)
        graph.segment = checked
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            outputs = graph.run(*tensors, enable_io_processing=False)
        return self._fresh(outputs, tensors)

    def _fresh(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        taken = {t.untyped_storage().data_ptr() for t in [*inputs, *self._constants]}
        fresh: dict[int, torch.Tensor] = {}  # by identity: what is returned twice stays one tensor
        for output in outputs:
            if id(output) not in fresh:
                shared = output.untyped_storage().data_ptr() in taken
                fresh[id(output)] = output.clone(memory_format=torch.contiguous_format) if shared else output
                taken.add(output.untyped_storage().data_ptr())
        return tuple(fresh[id(output)] for output in outputs)

    def kernels(
        self, tensors: Sequence[torch.Tensor], dims: dict[str, int], state: Sequence[torch.Tensor], repeats: int
    ) -> list[KernelTime]:
        """Time of each segment's kernels, on the values that the segments before and PyTorch give it."""
        rows: list[KernelTime] = []

        def timed(name: str, given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            executable = self._segments[name].executable
            rows.extend(replace(row, name=f"{name}.{row.name}") for row in executable.kernels(given, dims, (), repeats))
            return executable(given, dims, ())

        self._run([*tensors, *state], dims, timed)
        return rows

    def sources(self) -> list[tuple[str, str, str]]:
        """(name, TIR, assembly) of every segment's functions; a name starts with its segment's."""
        return [
            (f"{name}.{function}", tir, assembly)
            for name, segment in self._segments.items()
            for function, tir, assembly in segment.executable.sources()
        ]

    def weights_bytes(self) -> int:
        """Bytes of the constants, of the segments and of the ops in PyTorch."""
        own = sum(t.nbytes for t in self._constants)
        return own + sum(segment.executable.weights_bytes() for segment in self._segments.values())

    def trim(self) -> None:
        """Give the segments' cached memory back."""
        for segment in self._segments.values():
            segment.executable.trim()


def _input_shapes(
    segments: Mapping[str, Segment], names: tuple[str, ...], sizes: tuple[int, ...]
) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that each segment reads, for the sizes of the dims."""
    dims = dict(zip(names, sizes, strict=True))
    return {
        name: [tuple(evaluate(s, dims) for s in spec.shape) for spec in segment.inputs]
        for name, segment in segments.items()
    }


_Call = Callable[[str, list[torch.Tensor]], tuple[torch.Tensor, ...]]


class _Graph(fx.Interpreter):
    """Runs the graph node by node and drops each value after its last use; ``segment`` runs the groups."""

    segment: _Call

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # an error keeps its own text

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A segment reads tensors; it knows the sizes from the dims."""
        return self.segment(target, [a for a in args if isinstance(a, torch.Tensor)])
