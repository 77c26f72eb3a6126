"""The plan: which kernels run in which order on which buffers, and where the buffers lie in the arena."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy

from planish.program import Program, evaluate

ALIGN = 64
"""Alignment in bytes of every buffer in an arena or blob: one cache line, one AVX-512 register."""

HEAD = ALIGN
"""Bytes at the start of an arena: int32 words, first the status, then the counted dims of the program."""


def count_word(program: Program, name: str) -> int:
    """The word in the head of the arena that holds a counted dim."""
    return 1 + list(program.counts).index(name)


Size = int | sympy.Expr


@dataclass(frozen=True)
class Buffer:
    """Memory for one tensor.

    Attributes:
        name: the node that owns it.
        kind: ``input``, ``state`` (read before it is written), ``output``, ``constant`` (in the weights blob) or
            ``arena``.
        itemsize: bytes per element.
        shape: sizes, possibly over dim names.
        addresses: whether its integers may address memory: it then keeps its place to the end of the call, so that a
            kernel can be run again alone.
    """

    name: str
    kind: str
    itemsize: int
    shape: tuple[Size, ...]
    addresses: bool = False

    def nbytes(self, dims: Mapping[str, int]) -> int:
        """Bytes for the given sizes of the dims."""
        return self.itemsize * math.prod(evaluate(s, dims) for s in self.shape)


@dataclass(frozen=True)
class Call:
    """One kernel call.

    Attributes:
        kernel: name of the kernel function; equal kernels share one.
        operands: indices into ``Plan.buffers``, in the kernel's parameter order.
        node: the graph node (or fused group) it computes.
        op: what kind of kernel it is, such as ``gemm``.
        shape: the sizes it works on ([M, N, K] for a GEMM).
        flops: multiply-adds count two.
        commits: whether it stores the new value of a state, which happens only if no kernel has failed.
        undoes: index of the call whose writes into a state it takes back, which happens only if a kernel has failed
            after that call.
    """

    kernel: str
    operands: tuple[int, ...]
    node: str
    op: str
    shape: tuple[Size, ...]
    flops: Size
    commits: bool = False
    undoes: int | None = None


@dataclass
class Plan:
    """Buffers and kernel calls of a whole model, in execution order."""

    buffers: list[Buffer] = field(default_factory=list[Buffer])
    calls: list[Call] = field(default_factory=list[Call])

    def lifetimes(self) -> dict[int, tuple[int, int]]:
        """First and last call that touches each arena buffer."""
        spans: dict[int, tuple[int, int]] = {}
        for step, call in enumerate(self.calls):
            for b in call.operands:
                if self.buffers[b].kind == "arena":
                    last = len(self.calls) - 1 if self.buffers[b].addresses else step
                    spans[b] = (spans.get(b, (step, step))[0], last)
        return spans

    def state_updates(self) -> list[str]:
        """How each buffer of the state gets its new value."""
        copied = {b for call in self.calls if call.commits for b in call.operands}
        held = [i for i, b in enumerate(self.buffers) if b.kind == "state"]
        return ["computed apart, then copied" if i in copied else "written in place" for i in held]

    def arena(self, dims: Mapping[str, int]) -> tuple[dict[int, int], int]:
        """Offset of each arena buffer and the arena's size in bytes, for given sizes of the dims."""
        spans = self.lifetimes()
        sizes = {b: -(-self.buffers[b].nbytes(dims) // ALIGN) * ALIGN for b in spans}
        return place_by_size(sizes, spans)


def place_by_size(sizes: Mapping[int, int], spans: Mapping[int, tuple[int, int]]) -> tuple[dict[int, int], int]:
    """Greedy packing: largest first, each at the lowest offset where no buffer alive at the same time lies.

    Args:
        sizes: bytes per buffer.
        spans: first and last step of each buffer, inclusive.

    Returns:
        offset per buffer, and the height reached in bytes.
    """
    placed: list[int] = []
    offsets: dict[int, int] = {}
    for b in sorted(sizes, key=lambda b: (-sizes[b], spans[b], b)):
        first, last = spans[b]
        busy = sorted(
            (offsets[o], offsets[o] + sizes[o]) for o in placed if spans[o][0] <= last and first <= spans[o][1]
        )
        at = 0
        for low, high in busy:
            if at + sizes[b] <= low:
                break
            at = max(at, high)
        offsets[b] = at
        placed.append(b)
    return offsets, max((offsets[b] + sizes[b] for b in placed), default=0)
