"""Program: the one graph that every pass reads and rewrites, and how it prints itself as runnable Python."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx

from planish.assignment import Assignment
from planish.errors import DimError


@dataclass(frozen=True)
class Dim:
    """A dynamic dimension of an input.

    Args:
        name: the dimension's name; equal names are equal sizes.
        min: the smallest size that is allowed, at least 1.
        max: the largest size that is allowed.
    """

    name: str
    min: int = 1
    max: int = 4096

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name.isidentifier()):
            raise DimError(f"dim name {self.name!r} is not an identifier", fix='write planish.Dim("batch", 1, 64)')
        if not 1 <= self.min <= self.max:
            raise DimError(
                f"dim {self.name!r} has the range {self.min}..{self.max}",
                why="a range needs 1 <= min <= max",
                fix="correct the bounds",
            )


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of an input or output; a dynamic size is a sympy expression over dim names."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | sympy.Expr, ...]

    def __str__(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclass
class Program:
    """A captured model on its way to native code.

    The module is an ``fx.GraphModule`` at ATen level: placeholders are the user's tensors, ``get_attr`` nodes are
    constants, the output is a flat tuple, and a fused group is a ``call_module`` of a GraphModule. It runs in eager
    PyTorch after every pass. ``node.meta["val"]`` holds a fake tensor with symbolic sizes.

    A model that writes to its buffers is a pure function here too: the last ``len(state)`` inputs are those buffers
    before the call, the last ``len(state)`` outputs what they hold after it, in the order of ``state``.

    Attributes:
        module: the graph.
        inputs: one spec per placeholder that is a tensor.
        outputs: one spec per output tensor.
        dims: name to dynamic dimension.
        symbols: the shape environment's symbol for each dim name.
        facts: what passes have established (see ``Pass.makes``).
        example: tensors that the model was captured with, one per input, copies of the buffers for the state; empty for
            a part of a program.
        state: names of the model's mutable buffers, such as ``attention.cache``.
        counts: dims that are counted in each call, not read from the inputs' shapes, with their upper bounds: the
            tokens of a packed batch.
        calibration: inputs that are representative of what the model will see, each as ``example`` without the state.
        padded: outputs [B, S, ...] whose values at padding are not the model's: name of the output to the name of the
            mask input [B, S] and the mask's value at tokens.
        paths: constants by name, to where they are in the model: ``encoder.layer.0.output.dense.weight``.
        assignment: the formats that ``quantize-mixed`` chose.
    """

    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, Dim]
    symbols: dict[str, sympy.Symbol]
    example: tuple[torch.Tensor, ...]
    facts: frozenset[str] = field(default_factory=frozenset[str])
    state: tuple[str, ...] = ()
    counts: dict[str, int | sympy.Expr] = field(default_factory=dict[str, "int | sympy.Expr"])
    calibration: tuple[tuple[torch.Tensor, ...], ...] = ()
    padded: dict[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])
    paths: dict[str, str] = field(default_factory=dict[str, str])
    assignment: Assignment | None = None

    @property
    def arguments(self) -> int:
        """How many of the inputs a caller gives; the others are the state."""
        return len(self.inputs) - len(self.state)

    def clone(self) -> Program:
        """A Program whose graph can be rewritten without touching this one; tensors are shared."""
        return replace(self, module=clone_module(self.module))

    def nodes(self) -> Iterator[fx.Node]:
        """All nodes in execution order."""
        return iter(self.module.graph.nodes)

    def run(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs for flat input tensors, in eager PyTorch."""
        with torch.no_grad():
            return tuple(self.module(*tensors))

    def shape(self, value: Any) -> tuple[int | sympy.Expr, ...]:
        """Shape of a node or fake tensor: ints, and sympy expressions over dim names where dynamic."""
        val = value.meta["val"] if isinstance(value, fx.Node) else value
        return tuple(self.size(s) for s in val.shape)

    def path(self, constant: fx.Node) -> str:
        """Where a constant, or the one that it was made from, is in the model; its own name where that is not known."""
        name = str(constant.target)
        made_from = max((n for n in self.paths if name == n or name.startswith(f"{n}_")), key=len, default="")
        return self.paths.get(made_from, name)

    def example_dims(self) -> dict[str, int]:
        """Size of each dim in the example inputs; its minimum where no input has it as an axis."""
        sizes = {name: dim.min for name, dim in self.dims.items()}
        for spec, tensor in zip(self.inputs, self.example, strict=True):
            sizes |= {str(s): n for s, n in zip(spec.shape, tensor.shape, strict=True) if str(s) in sizes}
        return sizes

    def upper_bound(self, size: int | sympy.Expr) -> int:
        """The largest value of a size that grows with every dim."""
        return evaluate(size, {name: dim.max for name, dim in self.dims.items()})

    def size(self, value: Any) -> int | sympy.Expr:
        """A size or symbolic int as an int, or as a sympy expression over dim names."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if isinstance(value, torch.SymInt):
            expr = value.node.expr.xreplace({s: dim_symbol(n) for n, s in self.symbols.items()})
            return int(expr) if expr.is_number else expr
        return int(value)


def dim_symbol(name: str) -> sympy.Symbol:
    """The symbol that stands for a dim in sizes."""
    return sympy.Symbol(name, integer=True, positive=True)


def evaluate(size: int | sympy.Expr, dims: Mapping[str, int]) -> int:
    """A size for given sizes of the dims."""
    return (
        size
        if isinstance(size, int)
        else int(size.xreplace({dim_symbol(n): sympy.Integer(v) for n, v in dims.items()}))
    )


def clone_module(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph and of the groups nested in it; tensors and fake values are shared, not copied."""
    attrs: dict[str, Any] = {**module._parameters, **module._buffers}
    attrs |= {n: clone_module(m) for n, m in module.named_children() if isinstance(m, fx.GraphModule)}
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        new = graph.node_copy(node, lambda n: mapping[n])
        new.meta = copy.copy(node.meta)
        mapping[node] = new
    return fx.GraphModule(attrs, graph, class_name=type(module).__name__)


def constant(module: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    """The tensor that a ``get_attr`` node of ``module`` reads."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def add_constant(module: fx.GraphModule, name: str, value: torch.Tensor) -> str:
    """Store a tensor on the module under a free name derived from ``name``; returns the name."""
    free, n = name, 0
    while hasattr(module, free):
        n += 1
        free = f"{name}_{n}"
    module.register_buffer(free, value)
    return free


_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def source_line(node: fx.Node) -> str:
    """The line (``file:line, in f: code``) that created a node: the innermost one outside PyTorch and planish."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith("File ")]
    users = [i for i in frames if not lines[i].removeprefix('File "').startswith(_LIBRARIES)]
    if not frames:
        return ""
    at = (users or frames)[-1]
    file, line, *rest = lines[at].removeprefix("File ").split(", ")
    code = f": {lines[at + 1]}" if at + 1 < len(lines) and at + 1 not in frames else ""
    return f"{file.strip(chr(34))}:{line.removeprefix('line ')} {' '.join(rest)}{code}"
