"""The reference backend: runs the rewritten graph in eager PyTorch. It is the oracle of the tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from planish.backends.base import KernelTime, Unsupported
from planish.plan import Plan
from planish.program import Program
from planish.targets import Target


class ReferenceExecutable:
    """The Program's own graph; it has no kernels and no arena."""

    def __init__(self, program: Program) -> None:
        self._program = program

    @property
    def plans(self) -> tuple[Plan, ...]:
        """There are none."""
        return ()

    def __call__(
        self, tensors: Sequence[torch.Tensor], dims: dict[str, int], state: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Eager outputs; cloned, so that no output is an input, a constant or a buffer of the state."""
        values = self._program.run(*tensors, *state)
        results = [t.clone(memory_format=torch.contiguous_format) for t in values]
        outputs, after = results[: len(results) - len(state)], results[len(results) - len(state) :]
        with torch.inference_mode():
            for buffer, value in zip(state, after, strict=True):
                buffer.copy_(value)
        return tuple(outputs)

    def kernels(
        self, tensors: Sequence[torch.Tensor], dims: dict[str, int], state: Sequence[torch.Tensor], repeats: int
    ) -> list[KernelTime]:
        """There are none."""
        return []

    def sources(self) -> list[tuple[str, str, str]]:
        """There are none."""
        return []

    def weights_bytes(self) -> int:
        """Bytes of parameters and buffers."""
        module = self._program.module
        return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])

    def trim(self) -> None:
        """Nothing is cached."""


class ReferenceBackend:
    """Supports whatever PyTorch runs."""

    name = "reference"

    def unsupported(self, program: Program, target: Target) -> list[Unsupported]:
        """Nothing is."""
        return []

    def compile(self, program: Program, target: Target) -> ReferenceExecutable:
        """Wrap the Program."""
        return ReferenceExecutable(program)
