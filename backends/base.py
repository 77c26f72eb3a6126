"""What a backend offers: a list of what it cannot compile, and an executable of what it can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from planish.plan import Plan
from planish.program import Program
from planish.targets import Target


@dataclass(frozen=True)
class Unsupported:
    """An op of the graph without a lowering: the node, the op, the model's line, and why.

    ``value`` says that the result itself has no native form, so that no kernel could read it either.
    """

    node: str
    op: str
    where: str
    reason: str
    value: bool = False


@dataclass(frozen=True)
class KernelTime:
    """Time of one kernel alone: ``ms`` and ``flops`` of one call, ``calls`` how often the model makes it."""

    name: str
    op: str
    shape: tuple[int, ...]
    ms: float
    flops: int
    calls: int


class Executable(Protocol):
    """A compiled Program: immutable, and callable from many threads."""

    @property
    def plans(self) -> tuple[Plan, ...]:
        """One for each native function."""
        ...

    def __call__(
        self, tensors: Sequence[torch.Tensor], dims: dict[str, int], state: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Fresh output tensors for checked inputs; updates ``state`` in place, or leaves it as it was on an error."""
        ...

    def kernels(
        self, tensors: Sequence[torch.Tensor], dims: dict[str, int], state: Sequence[torch.Tensor], repeats: int
    ) -> list[KernelTime]:
        """Time of each kernel alone on real data; equal kernels on equal shapes are one row."""
        ...

    def sources(self) -> list[tuple[str, str, str]]:
        """Generated code as (name, TIR text, assembly text)."""
        ...

    def weights_bytes(self) -> int:
        """Bytes of the constants as stored."""
        ...

    def trim(self) -> None:
        """Give cached memory back."""
        ...


class Backend(Protocol):
    """A way to run Programs."""

    name: str

    def unsupported(self, program: Program, target: Target) -> list[Unsupported]:
        """Every op that has no lowering on the target."""
        ...

    def compile(self, program: Program, target: Target) -> Executable:
        """Native code for a Program whose ops are all supported."""
        ...
