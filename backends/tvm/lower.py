"""Lowering: every op or fused group of a Program becomes a kernel call on planned buffers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from planish.backends.base import Unsupported
from planish.backends.tvm.attention import lower_attention, matrix, result_matrix
from planish.backends.tvm.builder import Function, function
from planish.backends.tvm.cached import lower_cached
from planish.backends.tvm.elementwise import lower_elementwise
from planish.backends.tvm.expr import Evaluator, NeedsScalarLanes, Source
from planish.backends.tvm.gemm import lower_linear
from planish.backends.tvm.index import DTYPES, translatable
from planish.backends.tvm.inplace import Write, find_write, lower_write
from planish.backends.tvm.kernel import Lowered, Module, Packed, Region, Scratch, Status
from planish.backends.tvm.maps import index_reason
from planish.backends.tvm.matmul import lower_grouped, lower_matmul
from planish.backends.tvm.operands import row_stride
from planish.backends.tvm.quantized import quantized_reason
from planish.backends.tvm.quantized_depthwise import is_quantized_depthwise, lower_quantized_depthwise
from planish.backends.tvm.quantized_neon import neon_reason
from planish.backends.tvm.recurrent import lower_recurrent, recurrent_reason
from planish.backends.tvm.reduction import lower_reduction, lower_running, lower_scan, reduction_reason
from planish.backends.tvm.rowwise import lower_rows, row_reason
from planish.backends.tvm.scalars import elementwise_reason
from planish.backends.tvm.scatter import lower_scatter, scatter_reason
from planish.backends.tvm.softmax import lower_softmax
from planish.backends.tvm.sort import lower_sort, sort_reason
from planish.backends.tvm.tokens import lower_packing, packing_reason
from planish.backends.tvm.varlen import lower_segment_sum, lower_varlen
from planish.backends.tvm.windows import is_window, lower_window, window_reason
from planish.conv_ops import POOLS
from planish.ops import (
    ATTENTION,
    CACHED,
    ELEMENTWISE,
    GROUPED,
    INLINE,
    LAYERS,
    LINEAR,
    LOG_SOFTMAX,
    MATMUL,
    PACKING,
    QUANTIZED,
    QUANTIZED_CONVOLUTION,
    QUANTIZED_LINEAR,
    RECURRENCES,
    REDUCTIONS,
    ROWS,
    RUNNING,
    SCANS,
    SCATTERS,
    SEGMENT_SUM,
    SOFTMAX,
    SORTS,
    STATISTICS,
    VARLEN,
    argument,
    aten,
)
from planish.plan import Buffer, Call, Plan
from planish.program import Program, constant, source_line
from planish.targets import Target

ALIASES = {aten.reshape.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}
"""Views of a contiguous tensor that keep the order of its elements: another shape of the same buffer."""


MATRIX_OPS = (*LAYERS, ATTENTION, VARLEN, MATMUL, GROUPED)
"""Ops whose first operand (in attention three) must be a matrix in memory."""


def unsupported(program: Program, target: Target) -> list[Unsupported]:
    """Every op without a lowering, with its reason; also inside fused groups."""
    found: list[Unsupported] = []
    for node in program.nodes():
        grouped = node.op == "call_module"
        for n in getattr(program.module, str(node.target)).graph.nodes if grouped else [node]:
            value_reason = _value_reason(program, n)
            reason = value_reason or _op_reason(n)
            if reason is None and target.is_arm and n.target in QUANTIZED:
                reason = neon_reason(n)
            if reason:
                found.append(Unsupported(n.name, str(n.target), source_line(n), reason, value=bool(value_reason)))
    return found


def _value_reason(program: Program, node: fx.Node) -> str | None:
    """Why no kernel can write or read the node's value, or None."""
    value = node.meta.get("val")
    if node.op == "output" or value is None:
        return None
    if isinstance(value, (tuple, list)):
        return "it has several results"
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return "it is a number that is read from a tensor"
    sizes = program.shape(value) if isinstance(value, torch.Tensor) else (program.size(value),)
    unknown = {str(s) for size in sizes if isinstance(size, sympy.Expr) for s in size.free_symbols} - {*program.dims}
    if unknown:
        return "its size follows from values, not from the inputs' shapes"
    if not isinstance(value, torch.Tensor):
        return None if translatable(sizes[0]) else f"the size {sizes[0]} has no integer form"
    if value.layout is not torch.strided:
        return f"the layout {value.layout} has no kernels"
    if value.dtype not in DTYPES:
        return f"the dtype {value.dtype} has no kernels yet"
    if not all(map(translatable, sizes)):
        return "its shape has no integer form"
    elements = program.upper_bound(sympy.prod(sizes))
    if elements >= 1 << 31:
        return f"it may have {elements:,} elements, and kernels index with 32 bits: lower the dims' upper bounds"
    return None


def _op_reason(node: fx.Node) -> str | None:
    """Why an op whose value a kernel could write has no kernel, or None."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    checks = {
        LINEAR: _linear_reason,
        QUANTIZED_LINEAR: quantized_reason,
        QUANTIZED_CONVOLUTION: quantized_reason,
        ATTENTION: _attention_reason,
        aten.index.Tensor: index_reason,
    }
    if target in checks:
        return checks[target](node)
    if target in ELEMENTWISE:
        return elementwise_reason(node)
    if target in INLINE:
        return None
    if target in ROWS | {STATISTICS}:
        return row_reason(node)
    if is_window(node):
        return window_reason(node)
    tables = (
        (REDUCTIONS | SCANS, reduction_reason),
        (SORTS, sort_reason),
        (SCATTERS, scatter_reason),
        (RECURRENCES, recurrent_reason),
        ({MATMUL, GROUPED, SEGMENT_SUM, VARLEN, CACHED}, _float_reason),
        (PACKING, packing_reason),
        (RUNNING, lambda node: None),
    )
    for targets, reason in tables:
        if target in targets:
            return reason(node)
    return "it has no lowering"


def _float_reason(node: fx.Node) -> str | None:
    """Why an op has no kernel, or None."""
    dtype = node.meta["val"].dtype
    return None if dtype is torch.float32 else f"it is native for float32, not {dtype}"


def _linear_reason(node: fx.Node) -> str | None:
    if node.args[1].meta["val"].dim() != 2:  # pyright: ignore
        return "the weight of a linear layer must be a matrix"
    return _float_reason(node)


def _attention_reason(node: fx.Node) -> str | None:
    q, k, v = (a.meta["val"] for a in node.args[:3])  # pyright: ignore
    if argument(node, 4, "dropout_p", 0.0):
        return "dropout in attention is training"
    if q.shape[:-2] != k.shape[:-2]:
        return "query and key have different heads or batches"
    if k.shape[:-1] != v.shape[:-1]:
        return "key and value have different heads, batches or lengths"
    if isinstance(q.shape[-1], torch.SymInt):
        return "the head size must be fixed"
    return None


@dataclass
class Lowering:
    """State of lowering one Program: the TIR module, the plan, and where each node's value is."""

    program: Program
    target: Target
    module: Module
    plan: Plan = field(default_factory=Plan)
    place: dict[fx.Node, int] = field(default_factory=dict[fx.Node, int])
    constants: list[tuple[int, tuple[fx.Node, ...], str, int]] = field(default_factory=list)  # pyright: ignore
    packed: dict[tuple[Any, ...], int] = field(default_factory=dict[tuple[Any, ...], int])

    def buffer(self, node: fx.Node, kind: str) -> int:
        """A new buffer for the node's value."""
        value = node.meta["val"]
        addresses = bool(self.program.counts) and value.dtype in (torch.int32, torch.int64)
        self.plan.buffers.append(Buffer(node.name, kind, value.element_size(), self.program.shape(value), addresses))
        return len(self.plan.buffers) - 1

    def lower(self) -> None:
        """Fill plan and module."""
        results: list[fx.Node] = list(next(n for n in self.program.nodes() if n.op == "output").args[0])  # pyright: ignore
        placeholders = [n for n in self.program.nodes() if n.op == "placeholder"]
        placeholders = [n for n in placeholders if isinstance(n.meta["val"], torch.Tensor)]
        for i, node in enumerate(placeholders):
            self.place[node] = self.buffer(node, "input" if i < self.program.arguments else "state")
        held = placeholders[self.program.arguments :]
        outputs, updated = results[: len(results) - len(held)], results[len(results) - len(held) :]
        for old, new in zip(held, updated, strict=True):
            self._find_writes(old, new)
        direct = self._direct_outputs(outputs)
        for node in self.program.nodes():
            if node.op in ("call_function", "call_module") and isinstance(node.meta["val"], torch.Tensor):
                self._lower_node(node, direct)
        for output in outputs:
            if self.plan.buffers[self._place(output)].kind != "output" or outputs.count(output) > 1:
                self._copy_out(output)
        self.outputs = [self.result[o] if o in self.result else self._place(o) for o in outputs]
        self._commit([(self.place[old], new) for old, new in zip(held, updated, strict=True)])
        for index, (found, undo, outer, buffer) in reversed(self.undo.items()):
            self._emit(found.region, undo, outer, buffer)
            self.plan.calls[-1] = replace(self.plan.calls[-1], undoes=index)

    result: dict[fx.Node, int] = field(default_factory=dict[fx.Node, int])
    outputs: list[int] = field(default_factory=list[int])
    writes: dict[fx.Node, Write] = field(default_factory=dict[fx.Node, Write])
    undo: dict[int, tuple[Write, Lowered, dict[fx.Node, fx.Node], int]] = field(default_factory=dict)  # pyright: ignore

    def _direct_outputs(self, outputs: list[fx.Node]) -> set[fx.Node]:
        """Nodes whose kernel writes straight into an output tensor."""
        computed = {o for o in outputs if o.op in ("call_function", "call_module") and o.target not in ALIASES}
        return {o for o in computed if outputs.count(o) == 1}

    def _copy_out(self, output: fx.Node) -> None:
        """An output that is an input, a constant, a view or returned twice gets a tensor of its own."""
        if output not in self.result:
            self.result[output] = self.buffer(output, "output")
            self._copy(output, self.result[output])

    def _copy(self, node: fx.Node, index: int) -> None:
        """Copy a value to another buffer."""
        copy = fx.Graph()
        source = copy.placeholder("source")
        same = copy.call_function(aten._to_copy.default, (source,), {"dtype": node.meta["val"].dtype})
        source.meta["val"] = same.meta["val"] = node.meta["val"]
        region = Region(node.name, (same,), (source,))
        self._emit(region, self._choose(region, {source: node}), {source: node}, index)

    def _find_writes(self, old: fx.Node, new: fx.Node) -> None:
        """The writes that lead from a buffer's old value to its new one, if nothing else does."""
        found: dict[fx.Node, Write] = {}
        node = new
        while node is not old:
            if node.op not in ("call_function", "call_module"):
                return
            if node.target in ALIASES:
                node = node.args[0]  # pyright: ignore
                continue
            region, outer = self._region(node)
            write = find_write(self.program, region)
            if write is None:
                return
            found[node], node = write, outer[write.base]  # pyright: ignore
        self.writes |= found

    def _write_in_place(self, node: fx.Node, found: Write, outer: dict[fx.Node, fx.Node]) -> bool:
        """Write into the buffer of the state that holds the base, if nothing reads that value any more.

        Kernels run in the order in which they are lowered, so a reader that has a place already has run by then.
        """
        buffer = self.place[outer[found.base]]
        others = [outer[i] for i in found.region.inputs if i is not found.base]
        readers = {user for holder, at in self.place.items() if at == buffer for user in holder.users} - {node}
        shared = any(self.place.get(other) == buffer for other in others)
        if self.plan.buffers[buffer].kind != "state" or shared or any(r not in self.place for r in readers):
            return False
        shape = found.shape(self.program)
        log = Buffer(f"{node.name}_log", "arena", node.meta["val"].element_size(), shape)
        self.plan.buffers.append(log)
        write, undo = lower_write(self.module, self.program, found, len(self.plan.buffers) - 1)
        self._emit(found.region, write, outer, buffer)
        self.undo[len(self.plan.calls) - 1] = (found, undo, outer, buffer)
        self.place[node] = buffer
        return True

    def _commit(self, updates: list[tuple[int, fx.Node]]) -> None:
        """Copy the new values of a state, given as (buffer, value), once nothing reads the old ones any more."""
        moved = [(buffer, new) for buffer, new in updates if self._place(new) != buffer]
        copied = [(buffer, new) for buffer, new in moved if 0 not in self.program.shape(new)]
        for _, new in copied:
            if self.plan.buffers[self._place(new)].kind == "state":  # another buffer's old value
                index = self.buffer(new, "arena")
                self._copy(new, index)
                self.place[new] = index
        for buffer, new in copied:
            self._copy(new, buffer)
            self.plan.calls[-1] = replace(self.plan.calls[-1], commits=True)

    def _lower_node(self, node: fx.Node, direct: set[fx.Node]) -> None:
        if node.target in ALIASES and node.args[0] in self.place and self._is_plain(node.args[0]):
            self.place[node] = self.place[node.args[0]]
            return
        if any(s == 0 for s in self.program.shape(node)):
            self.place[node] = self.buffer(node, "output" if node in direct else "arena")
            return
        region, outer = self._region(node)
        if node in self.writes and self._write_in_place(node, self.writes[node], outer):
            return
        self._lower_region(region, outer, node, direct)

    def _is_plain(self, node: Any) -> bool:
        return self.plan.buffers[self.place[node]].kind in ("arena", "input", "state")

    def _region(self, node: fx.Node) -> tuple[Region, dict[fx.Node, fx.Node]]:
        """The region of a lone op or group, and which outer node each of its inputs is."""
        if node.op == "call_module":
            graph = getattr(self.program.module, str(node.target)).graph
            inner = [n for n in graph.nodes if n.op == "placeholder"]
            outer = dict(zip(inner, node.args, strict=True))
            nodes = tuple(n for n in graph.nodes if n.op == "call_function")
            tensors = tuple(n for n in inner if isinstance(n.meta["val"], torch.Tensor))
            return Region(node.name, nodes, tensors), outer  # pyright: ignore
        inputs = tuple(dict.fromkeys(n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)))
        return Region(node.name, (node,), inputs), {n: n for n in inputs}

    def _lower_region(self, region: Region, outer: dict[fx.Node, fx.Node], node: fx.Node, direct: set[fx.Node]) -> None:
        region, outer = self._with_matrix_operands(region, outer)
        attention = region.find({ATTENTION, VARLEN})
        if attention is not None and not self._is_result_matrix(region, attention):
            region, outer = self._computed_before(region, outer, attention)
        lowered = self._choose(region, outer)
        index = self.buffer(node, "output" if node in direct else "arena")
        self._emit(region, lowered, outer, index)
        self.place[node] = index

    def _with_matrix_operands(
        self, region: Region, outer: dict[fx.Node, fx.Node]
    ) -> tuple[Region, dict[fx.Node, fx.Node]]:
        """Compute an operand of a matrix kernel that is no matrix in memory by a kernel of its own, before."""
        anchor = next((n for n in region.nodes if n.target in MATRIX_OPS), None)
        if anchor is None:
            return region, outer
        count = 3 if anchor.target in (ATTENTION, VARLEN) else 1
        for operand in dict.fromkeys(anchor.args[:count]):
            assert isinstance(operand, fx.Node)
            if operand not in region.inputs and not self._is_matrix(region, operand, anchor):
                region, outer = self._computed_before(region, outer, operand)
        return region, outer

    def _computed_before(
        self, region: Region, outer: dict[fx.Node, fx.Node], node: fx.Node
    ) -> tuple[Region, dict[fx.Node, fx.Node]]:
        """Compute an inner node by a kernel of its own; returns the region that reads its value from memory."""
        before = region.nodes[: region.nodes.index(node) + 1]
        part = Region(f"{region.name}_{node.name}", _needed(before), region.inputs)
        part = replace(part, inputs=_used_inputs(part))
        index = self.buffer(node, "arena")
        self._emit(part, self._choose(part, outer), outer, index)
        self.place[node] = index
        rest = _without(region, node)
        return replace(rest, inputs=(*_used_inputs(rest), node)), {**outer, node: node}

    def _is_matrix(self, region: Region, operand: fx.Node, anchor: fx.Node) -> bool:
        with function() as f:
            ev = self._evaluator(f, region)
            if anchor.target in LAYERS:
                return row_stride(ev, operand, int(operand.meta["val"].shape[-1])) is not None
            return matrix(ev, operand) is not None

    def _is_result_matrix(self, region: Region, attention: fx.Node) -> bool:
        with function() as f:
            return result_matrix(self._evaluator(f, region), region, attention, None) is not None

    def _evaluator(self, f: Function, region: Region) -> Evaluator:
        """An evaluator for questions about addresses; it generates no code that is kept."""
        _, scalars = f.parameters([], len(self.program.dims))
        ev = Evaluator(self.program, dict(zip(self.program.dims, scalars, strict=True)), {})
        ev.sources = {n: Source(None, ev.shape(n), n.meta["val"].dtype) for n in region.inputs}
        return ev

    def _choose(self, region: Region, outer: dict[fx.Node, fx.Node]) -> Lowered:
        """The kernel of a region: by the op it is built around, elementwise if there is none."""
        for lanes in (self.target.lanes, 1):
            try:
                return self._template(region, outer, lanes)
            except NeedsScalarLanes:
                continue
        raise AssertionError("one lane always works")

    def _template(self, region: Region, outer: dict[fx.Node, fx.Node], lanes: int) -> Lowered:
        module, program = self.module, self.program
        if anchor := region.find(LAYERS | {QUANTIZED_CONVOLUTION}):
            return self._layer(region, outer, anchor, lanes)
        if anchor := region.find({MATMUL}):
            return lower_matmul(module, program, region, anchor, lanes)
        if anchor := region.find({GROUPED}):
            return lower_grouped(module, program, region, anchor, lanes)
        if anchor := region.find({ATTENTION}):
            return lower_attention(module, program, region, anchor)
        if anchor := next(filter(is_window, region.nodes), None):
            constant = anchor.target in POOLS | REDUCTIONS or self._has_constant_weight(anchor)
            return lower_window(module, program, region, anchor, lanes, constant=constant)
        if anchor := region.find(SOFTMAX | LOG_SOFTMAX | {STATISTICS}):
            return lower_softmax(module, program, region, anchor, lanes)
        if anchor := region.find(ROWS):
            return lower_rows(module, program, region, anchor, lanes)
        if anchor := region.find(REDUCTIONS):
            return lower_reduction(module, program, region, anchor, lanes)
        for targets, lower in _WHOLE:
            if anchor := region.find(targets):
                return lower(module, program, region, anchor)
        return lower_elementwise(module, program, region, lanes)

    def _layer(self, region: Region, outer: dict[fx.Node, fx.Node], anchor: fx.Node, lanes: int) -> Lowered:
        """The kernel of a region around a linear layer, or around a layer on codes."""
        if is_quantized_depthwise(anchor):
            return lower_quantized_depthwise(self.module, self.program, region, anchor)
        if anchor.target in QUANTIZED or self._has_constant_weight(anchor):
            return lower_linear(self.module, self.program, region, self._narrow(region, outer))
        return lower_matmul(self.module, self.program, region, anchor, lanes)

    def _narrow(self, region: Region, outer: dict[fx.Node, fx.Node]) -> dict[fx.Node, torch.dtype]:
        """Weights of layers in fp32 whose values a half precision holds exactly, and which."""
        found: dict[fx.Node, torch.dtype] = {}
        for weight in {n.args[1] for n in region.nodes if n.target is LINEAR}:
            assert isinstance(weight, fx.Node)
            value = constant(self.program.module, outer[weight])
            for dtype in (torch.float16, torch.bfloat16):
                if torch.equal(value.to(dtype).to(value.dtype), value):
                    found.setdefault(weight, dtype)
        return found

    def _has_constant_weight(self, layer: fx.Node) -> bool:
        """Whether the weight can be packed beforehand; groups are formed around such layers only."""
        weight = layer.args[1]
        assert isinstance(weight, fx.Node)
        return weight.op == "get_attr" or weight.graph is not self.program.module.graph

    def _emit(self, region: Region, lowered: Lowered, outer: dict[fx.Node, fx.Node], index: int) -> None:
        """Append the call; operands become buffers."""
        operands: list[int] = []
        for operand in lowered.operands:
            if operand is region.result:
                operands.append(index)
            elif isinstance(operand, Packed):
                nodes = tuple(outer[n] for n in (operand.node, operand.other) if n is not None)
                operands.append(self._constant(nodes, operand.layout, operand.width))
            elif isinstance(operand, Scratch):
                self.plan.buffers.append(Buffer(f"{region.name}_scratch", "arena", 1, (operand.nbytes,)))
                operands.append(len(self.plan.buffers) - 1)
            elif isinstance(operand, Status):
                operands.append(STATUS)
            elif isinstance(operand, int):
                operands.append(operand)
            else:
                operands.append(self._place(outer[operand]))
        name = self.module.kernel(lowered.stem, lowered.func)
        self.plan.calls.append(Call(name, tuple(operands), region.name, lowered.op, lowered.shape, lowered.flops))

    def _place(self, node: fx.Node) -> int:
        if node.op == "get_attr":
            return self._constant((node,), "plain", 0)
        return self.place[node]

    def _constant(self, nodes: tuple[fx.Node, ...], layout: str, width: int) -> int:
        key = (*(n.target for n in nodes), layout, width)
        if key not in self.packed:
            self.packed[key] = self.buffer(nodes[0], "constant")
            self.constants.append((self.packed[key], nodes, layout, width))
        return self.packed[key]


_WHOLE = (
    (SCANS, lower_scan),
    (RUNNING, lower_running),
    (SORTS, lower_sort),
    (SCATTERS, lower_scatter),
    (RECURRENCES, lower_recurrent),
    (PACKING, lower_packing),
    ({SEGMENT_SUM}, lower_segment_sum),
    ({VARLEN}, lower_varlen),
    ({CACHED}, lower_cached),
)
"""Ops whose kernels compute nothing else, or (attention) only views around them."""

STATUS = -1
"""Operand index of the status word."""


def _needed(nodes: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """The nodes that the last one depends on, in order."""
    keep: set[fx.Node] = {nodes[-1]}
    for n in reversed(nodes):
        if n in keep:
            keep |= set(n.all_input_nodes)
    return tuple(n for n in nodes if n in keep)


def _without(region: Region, operand: fx.Node) -> Region:
    """The region's nodes that are still needed once ``operand`` comes from outside."""
    keep: set[fx.Node] = {region.result}
    for n in reversed(region.nodes):
        if n in keep and n is not operand:
            keep |= set(n.all_input_nodes)
    return Region(region.name, tuple(n for n in region.nodes if n in keep and n is not operand), region.inputs)


def _used_inputs(region: Region) -> tuple[fx.Node, ...]:
    used = {i for n in region.nodes for i in n.all_input_nodes}
    return tuple(n for n in region.inputs if n in used)
