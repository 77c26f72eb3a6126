"""A model compiled for another machine: its code and weights, to be saved, and the graph that says what it computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planish.backends.reference import ReferenceExecutable
from planish.backends.tvm.codegen import ObjectCode
from planish.backends.tvm.executable import split_assembly
from planish.plan import Plan
from planish.program import Program


@dataclass
class CrossExecutable(ReferenceExecutable):
    """Runs the rewritten graph in PyTorch; a bundle runs the code.

    Attributes:
        program: what the code computes.
        plan: its buffers and kernel calls.
        outputs: the buffer of each output.
        blob: weights, as the kernels read them.
        objects: object code.
        tir: of each function.
    """

    program: Program
    plan: Plan
    outputs: list[int]
    blob: torch.Tensor
    objects: list[ObjectCode]
    tir: dict[str, str]

    def __post_init__(self) -> None:
        super().__init__(self.program)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plan of the one native function."""
        return (self.plan,)

    def sources(self) -> list[tuple[str, str, str]]:
        """(name, TIR, assembly) of every function."""
        assembly = [split_assembly(o.assembly) for o in self.objects]
        return [(name, tir, next((a[name] for a in assembly if name in a), "")) for name, tir in self.tir.items()]

    def weights_bytes(self) -> int:
        """Bytes of the weights blob."""
        return self.blob.numel()
