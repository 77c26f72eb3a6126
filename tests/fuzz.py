"""Random graphs: chains of ops drawn by hypothesis as lines of Python, and their comparison with eager.

A drawn graph is the text of its ``forward``, so a counterexample is read, pasted and run as it stands. Names of float
dtypes and weights are looked up in a namespace: with every float dtype mapped to fp64 the same text is the reference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import planish

SIZES = (0, 1, 2, 3, 5, 7, 11, 17)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)
DTYPES = (*FLOATS, *INTEGERS, torch.bool)
SPELLED = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "boolean": torch.bool,
}
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 2e-6}
"""Of one op's result, relative to the largest value: some units in the last place."""

FACTOR = 8
"""How many times eager's own distance from fp64 the native result may be from eager."""


@dataclass(frozen=True)
class Input:
    """One input of a graph.

    Attributes:
        layout: how it lies in memory: ``plain``, ``transposed``, ``strided`` (every other element), ``expanded`` (a
            first axis of stride 0) or ``shifted`` (unaligned).
        special: whether some floats are NaN, infinite, or a negative zero.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    special: bool
    seed: int

    def make(self, size: int | None = None) -> torch.Tensor:
        """The tensor, with ``size`` instead of the first axis's size."""
        shape = self.shape if size is None else (size, *self.shape[1:])
        if self.layout == "transposed" and len(shape) > 1:
            return self._values((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2)
        if self.layout == "strided" and shape:
            return self._values((*shape[:-1], 2 * shape[-1]))[..., ::2]
        if self.layout == "expanded" and shape and shape[0] > 1:
            return self._values((1, *shape[1:])).expand(shape)
        if self.layout == "shifted":
            return self._values((math.prod(shape) + 1,))[1:].view(shape)
        return self._values(shape)

    def _values(self, shape: tuple[int, ...]) -> torch.Tensor:
        g = torch.Generator().manual_seed(self.seed)
        x = torch.randn(shape, generator=g) * 2
        if self.special and self.dtype.is_floating_point:
            odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0])
            x = torch.where(torch.rand(shape, generator=g) < 0.15, odd[torch.randint(0, 5, shape, generator=g)], x)
        return x > 0 if self.dtype is torch.bool else (x * 3).to(self.dtype) if x.dtype != self.dtype else x


@dataclass(frozen=True)
class Weight:
    """A constant of a graph: normal noise, or integers below ``high``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    high: int = 0

    def make(self) -> torch.Tensor:
        """The tensor; its values depend on the shape only."""
        g = torch.Generator().manual_seed(math.prod(self.shape))
        if not self.dtype.is_floating_point:
            return torch.randint(0, self.high, self.shape, generator=g, dtype=self.dtype)
        return torch.randn(self.shape, generator=g).to(self.dtype)


@dataclass(frozen=True)
class Graph:
    """A drawn graph.

    Attributes:
        lines: assignments ``v2 = v0.permute(1, 0)``; the inputs are ``v0``, ``v1``, ...
        results: what it returns.
        weights: its constants.
        sizes: other sizes to check of the dynamic first axis of the first input; none if it is fixed.
    """

    inputs: tuple[Input, ...]
    lines: tuple[str, ...]
    results: tuple[str, ...]
    weights: tuple[Weight, ...]
    sizes: tuple[int, ...]

    def __repr__(self) -> str:
        given = [f"    v{i} = {x}" for i, x in enumerate(self.inputs)]
        weights = [f"    {w}" for w in self.weights]
        body = [f"    {line}" for line in self.lines]
        sizes = [f"    # also with v0 of first sizes {list(self.sizes)}"] if self.sizes else []
        return "\n".join(["graph:", *sizes, *given, *weights, *body, f"    return {', '.join(self.results)}"])

    def dtypes(self) -> list[torch.dtype]:
        """Float dtypes that the lines name."""
        named = {word for line in self.lines for word in re.findall(r"\w+", line)}
        return [t for n, t in SPELLED.items() if n in named and t.is_floating_point]


class Model(torch.nn.Module):
    """A graph as a module; with ``wide`` it computes in fp64."""

    def __init__(self, graph: Graph, *, wide: bool = False) -> None:
        super().__init__()
        self.wide = wide
        for w in graph.weights:
            tensor = w.make()
            self.register_buffer(w.name, tensor.double() if wide and tensor.is_floating_point() else tensor)
        names = [f"v{i}" for i in range(len(graph.inputs))]
        text = [f"def forward(self, {', '.join(names)}):"]
        text += [f"    {w.name} = self.{w.name}" for w in graph.weights]
        text += [f"    {line}" for line in graph.lines]
        text += [f"    return ({', '.join(graph.results)},)"]
        space = namespace(wide=wide)
        exec("\n".join(text), space)
        self.run: Callable[..., tuple[torch.Tensor, ...]] = space["forward"]
        self.eval()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.wide:
            tensors = tuple(t.double() if t.is_floating_point() else t for t in tensors)
        return self.run(self, *tensors)


def namespace(*, wide: bool = False) -> dict[str, Any]:
    """What the lines of a graph may name."""
    dtypes = {n: torch.float64 if wide and t.is_floating_point else t for n, t in SPELLED.items()}
    return {"torch": torch, "F": F, **dtypes}


class IllConditioned(Exception):
    """Eager refuses fp64, or differs from it where a value is infinite or NaN: there is nothing to compare with."""


def check(graph: Graph) -> None:
    """Compile the graph and compare it with eager, at all its sizes.

    Raises:
        AssertionError: a result differs.
        IllConditioned: there is no right result.
        CaptureError, UnsupportedOpsError: from ``planish.compile``.
    """
    model, wide = Model(graph), Model(graph, wide=True)
    inputs = tuple(x.make() for x in graph.inputs)
    if not accepted(wide, inputs):  # such as a transposed convolution without outputs, which PyTorch takes in fp32 only
        raise IllConditioned
    dynamic = {"tensors.0": {0: planish.Dim("n", 1, 32)}} if graph.sizes else None
    compiled = planish.compile(model, inputs, dynamic=dynamic, cache=False)
    compare(graph, model, wide, compiled, inputs)
    for size in graph.sizes:
        resized = (graph.inputs[0].make(size), *inputs[1:])
        if accepted(model, resized):
            compare(graph, model, wide, compiled, resized)


def accepted(model: Model, inputs: tuple[torch.Tensor, ...]) -> bool:
    """Whether eager computes the graph for these inputs."""
    try:
        model(*inputs)
    except (RuntimeError, IndexError, ValueError):
        return False
    return True


def compare(
    graph: Graph, model: Model, wide: Model, compiled: planish.CompiledModel, inputs: tuple[torch.Tensor, ...]
) -> None:
    """Compare the results for these inputs; they must come out of the call as they went in."""
    before = tuple(t.clone() for t in inputs)
    with torch.no_grad():
        want, exact = model(*inputs), wide(*inputs)
    got = compiled(*inputs)
    for i, (t, kept) in enumerate(zip(inputs, before, strict=True)):
        assert same_bits(t, kept), f"input v{i} was written to"
    coarsest = max(ROUNDING.get(d, 2e-6) for d in (*(x.dtype for x in graph.inputs), *graph.dtypes()))
    for name, w, g, e in zip(graph.results, want, got, exact, strict=True):
        assert (g.dtype, g.shape) == (w.dtype, w.shape), f"{name}: {g.dtype}{[*g.shape]} for {w.dtype}{[*w.shape]}"
        problem = difference(w, g, e, coarsest)
        assert problem is None, f"{name}: {problem}\neager  {w}\nnative {g}"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same values; a NaN is one."""
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def difference(want: torch.Tensor, got: torch.Tensor, exact: torch.Tensor, rounding: float) -> str | None:
    """What is wrong with ``got``, given eager's result and the one in fp64; None if nothing is.

    Floats may be off by ``FACTOR`` times eager's own error, but no less than ``rounding`` of the largest value.
    """
    if same_bits(want, got):
        return None
    if not want.is_floating_point():
        return f"{int((want != got).sum())} of {want.numel()} differ"
    want, got, exact = want.double(), got.double(), exact.double()
    odd = ~torch.isfinite(want)
    if not torch.equal(odd, ~torch.isfinite(exact)):
        raise IllConditioned
    if not torch.equal(odd, ~torch.isfinite(got)) or not same_bits(want[odd], got[odd]):
        return "NaN or infinity stand in other places"
    want, got, exact = (torch.where(odd, 0.0, t) for t in (want, got, exact))
    scale, own, error = (float(t.abs().max()) for t in (exact, want - exact, got - want))
    limit = FACTOR * own + rounding * scale
    return None if error <= limit else f"off by {error:.3g}, the limit is {limit:.3g}"
