"""``fallback="eager"``: the graph is cut at the ops without a native form, and those run in PyTorch, each one named."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx
from torch.fx.passes.tools_common import stable_topological_sort
from torch.fx.passes.utils.fuser_utils import fuse_as_graphmodule
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from planish.backends.base import Backend, Unsupported
from planish.backends.segmented import Segment, SegmentedExecutable
from planish.errors import UnknownNameError, UnsupportedOpsError
from planish.ops import aten, is_random
from planish.pipeline import Pass, Refusal, Result
from planish.printer import short_source
from planish.program import Program, TensorSpec, source_line
from planish.rules import remove_dead
from planish.targets import Target
from planish.verify import infer_values

FALLBACKS = ("error", "eager")
"""What ``compile`` does with ops that have no native form."""


def check_fallback(name: str) -> None:
    """Raise UnknownNameError unless ``name`` is one of ``FALLBACKS``."""
    if name not in FALLBACKS:
        raise UnknownNameError(f"unknown fallback {name!r}", fix="use one of: " + ", ".join(FALLBACKS))


@dataclass(frozen=True)
class CutSegments(Pass):
    """Gather the ops between those without a native form into as few native segments as there can be.

    before: ``a = linear(x, w); b = linalg_inv(a); c = relu(b); d = relu(x)``
    after:  ``a, d = native_0(x); b = linalg_inv(a); c = native_1(b)``

    Independent ops may change places. A segment is a group with a tuple of results that holds its constants itself.

    Raises:
        UnsupportedOpsError: an op without a native form draws random numbers.
    """

    backend: Backend

    name: ClassVar[str] = "cut-segments"

    def run(self, program: Program, target: Target) -> Result:
        """Cut; every op left to PyTorch is a refusal with its reason."""
        eager = _eager(program, _ungroup(program, self.backend, target))
        _check_deterministic(eager)
        result = Result(refusals=[Refusal(self.name, u.node, f"{u.op}: {u.reason}", u.where) for u in eager.values()])
        _sizes_from_inputs(program)
        segments = _segments(program, eager)
        for index, segment in enumerate(segments):
            _take_constants(program.module, segment)
            _replace(program.module, segment, f"native_{index}")
        stable_topological_sort(program.module)
        remove_dead(program.module)
        result.rewrites = Counter({"native segment": len(segments)})
        return result


def _ungroup(program: Program, backend: Backend, target: Target) -> list[Unsupported]:
    """Take groups apart that hold an op without a native form, so that it alone leaves; returns all such ops.

    before: ``fused_linear_odd(x, w)``
    after:  ``odd(linear(x, w))``
    """
    graph = program.module.graph
    while True:
        missing = backend.unsupported(program, target)
        names = {u.node for u in missing}
        groups = {n: getattr(program.module, str(n.target)).graph for n in graph.find_nodes(op="call_module")}
        mixed = {n: g for n, g in groups.items() if any(i.name in names for i in g.nodes)}
        if not mixed:
            return missing
        for call, group in mixed.items():
            outer = dict(zip(group.find_nodes(op="placeholder"), call.args, strict=True))
            with graph.inserting_before(call):
                result = graph.graph_copy(group, outer)
            call.replace_all_uses_with(result)  # pyright: ignore
            graph.erase_node(call)


def _eager(program: Program, missing: list[Unsupported]) -> dict[fx.Node, Unsupported]:
    """The nodes that PyTorch runs: those without a native form, and those that read a value without one."""
    reported = {u.node: u for u in missing}
    eager: dict[fx.Node, Unsupported] = {}
    for node in program.nodes():
        if node.op not in ("call_function", "call_module"):
            continue
        read = [reported[i.name] for i in node.all_input_nodes if i.name in reported and reported[i.name].value]
        if node.name in reported:
            eager[node] = reported[node.name]
        elif read:
            why = f"it reads {read[0].node}: {read[0].reason}"
            eager[node] = Unsupported(node.name, str(node.target), source_line(node), why)
    return eager


def _check_deterministic(eager: Mapping[fx.Node, Unsupported]) -> None:
    random = [u for n, u in eager.items() if is_random(n)]
    if random:
        error = UnsupportedOpsError(
            "the model draws random numbers: " + ", ".join(f"{u.op} ({u.node})" for u in random),
            where=random[0].where,
            why="PyTorch would draw other numbers than the model does: ops may be merged, dropped and reordered",
            fix="draw them outside the model and pass them as an input",
        )
        error.ops = tuple(random)
        raise error


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta["val"], (int, torch.SymInt))


def _sizes_from_inputs(program: Program) -> None:
    """Compute sizes from the inputs' sizes alone, so that none ties a segment to another.

    before: ``s = sym_size(linear(x, w), 0) + 1``
    after:  ``s = sym_size(x, 0) + 1``
    """
    graph = program.module.graph
    inputs = graph.find_nodes(op="placeholder")
    known = set(program.symbols.values())
    sizes = [(n, _expression(n)) for n in program.nodes() if _is_size(n)]
    sizes = [(n, expr) for n, expr in sizes if expr.free_symbols <= known]
    if not sizes:
        return
    tracer = GraphAppendingTracer(graph)
    symbols: dict[sympy.Symbol, fx.Proxy] = {}
    with graph.inserting_before(inputs[-1].next):
        for name, symbol in program.symbols.items():
            node, axis = next((n, a) for n in inputs for a, s in enumerate(program.shape(n)) if str(s) == name)
            symbols[symbol] = fx.Proxy(graph.call_function(aten.sym_size.int, (node, axis)), tracer)
        for node, expr in sizes:
            value: Any = sympy_interp(PythonReferenceAnalysis, symbols, expr)
            _replace_size(node, value.node if isinstance(value, fx.Proxy) else int(value))
    infer_values(program)
    remove_dead(program.module)


def _expression(size: fx.Node) -> sympy.Expr:
    value: Any = size.meta["val"]
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)


def _replace_size(node: fx.Node, value: fx.Node | int) -> None:
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: value if n is node else n)  # pyright: ignore
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: value if n is node else n)  # pyright: ignore


def _segments(program: Program, eager: Mapping[fx.Node, Unsupported]) -> list[dict[fx.Node, int | None]]:
    """The native ops by the first segment that may hold them.

    An op goes where its last native operand is made, or after it if an eager op lies between. So there are as many
    segments as the path with the most changes from eager to native needs, and no cut has fewer.
    """
    place: dict[fx.Node, int] = {}
    segments: dict[int, dict[fx.Node, int | None]] = {}
    for node in program.nodes():
        if node.op not in ("call_function", "call_module") or (_is_size(node) and node not in eager):
            continue
        operands = [i for i in node.all_input_nodes if i in place]
        place[node] = max((place[i] + (node in eager and i not in eager) for i in operands), default=0)
        if node not in eager:
            segments.setdefault(place[node], {})[node] = None
    return [segments[k] for k in sorted(segments)]


def _take_constants(module: fx.GraphModule, segment: dict[fx.Node, int | None]) -> None:
    """Give a segment nodes of its own for the constants that it reads, ahead of its ops."""
    ops, constants = list(segment), dict[fx.Node, fx.Node]()
    for node in ops:
        for constant in [i for i in node.all_input_nodes if i.op == "get_attr"]:
            if constant not in constants:
                with module.graph.inserting_before(constant):
                    constants[constant] = module.graph.node_copy(constant)
            node.replace_input_with(constant, constants[constant])
    segment.clear()
    segment.update(dict.fromkeys([*constants.values(), *ops]))


def _replace(module: fx.GraphModule, segment: dict[fx.Node, int | None], name: str) -> None:
    """Put a call of a module in the place of a segment; the graph's order is left to be put right."""
    nodes, graph = list(segment), module.graph
    body, inputs, outputs = fuse_as_graphmodule(module, nodes, name, segment, always_return_tuple=True)
    while hasattr(module, name):
        name += "_"
    module.add_submodule(name, body)
    with graph.inserting_after(nodes[-1]):
        call = graph.create_node("call_module", name, inputs, name=name)
    call.meta["val"] = tuple(n.meta["val"] for n in outputs)
    with graph.inserting_after(call):
        for index, output in enumerate(outputs):
            result = graph.create_node("call_function", operator.getitem, (call, index), name=output.name)
            result.meta |= {k: v for k, v in output.meta.items() if k in ("val", "stack_trace")}
            output.replace_all_uses_with(result)
    for node in reversed(nodes):
        graph.erase_node(node)


def compile_segments(program: Program, backend: Backend, target: Target) -> SegmentedExecutable:
    """Native code for the segments of a program that ``CutSegments`` has cut; it takes their graphs out of it."""
    segments: dict[str, Segment] = {}
    for node in program.module.graph.find_nodes(op="call_module"):
        name = str(node.target)
        body: fx.GraphModule = getattr(program.module, name)
        inputs = [n for n in body.graph.find_nodes(op="placeholder") if isinstance(n.meta["val"], torch.Tensor)]
        outputs: Any = body.graph.output_node().args[0]
        reads, writes = _specs(program, inputs), _specs(program, outputs)
        part = Program(body, reads, writes, program.dims, program.symbols, (), program.facts)
        segments[name] = Segment(backend.compile(part, target), reads)
    return SegmentedExecutable(program, segments)


def _specs(program: Program, nodes: Sequence[fx.Node]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(n.name, n.meta["val"].dtype, program.shape(n)) for n in nodes)


@dataclass(frozen=True)
class Coverage:
    """How many ops of a program are native, and the model's lines of each op that runs in PyTorch.

    Sizes and the picking of one of an op's results are no ops; an op in a group counts by itself.
    """

    native: int
    eager: Mapping[str, tuple[str, ...]]

    @staticmethod
    def of(program: Program) -> Coverage:
        """The coverage of a program that ``CutSegments`` has cut."""
        eager: dict[str, tuple[str, ...]] = {}
        for node in program.nodes():
            if _is_op(node):
                line = short_source(source_line(node)).partition(" ")[0]
                eager[str(node.target)] = (*eager.get(str(node.target), ()), line)
        return Coverage(sum(1 for _ in _ops(program.module)) - sum(map(len, eager.values())), eager)

    @property
    def count(self) -> int:
        """How many ops run in PyTorch."""
        return sum(map(len, self.eager.values()))

    def __str__(self) -> str:
        lines = {op: ", ".join(dict.fromkeys(filter(None, at))) for op, at in self.eager.items()}
        ops = [f"{op} ({len(at)}{', at ' * bool(lines[op])}{lines[op]})" for op, at in self.eager.items()]
        return f"{self.native}/{self.native + self.count} ops native; eager: {', '.join(ops)}"


_SIZES = frozenset({aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int, aten.sym_storage_offset.default})


def _is_op(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target not in _SIZES


def _ops(module: fx.GraphModule) -> Iterator[fx.Node]:
    """The ops of a graph and of the groups in it."""
    for node in module.graph.nodes:
        if node.op == "call_module":
            yield from _ops(getattr(module, str(node.target)))
        elif _is_op(node):
            yield node
