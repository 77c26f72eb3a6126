"""Capture: a PyTorch model and example inputs become a clean Program and the signature to call it by."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, SymIntArgument
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from planish import decompose, mutation, verify
from planish.complex_pairs import split_complex
from planish.errors import CaptureError, DimError, InputError, ModelStateError, first_lines
from planish.ops import COPIES, RESHAPES, aten
from planish.program import Dim, Program, TensorSpec, add_constant, evaluate, source_line
from planish.rules import remove_dead
from planish.size_one import check_size_one
from planish.widen import widen_half

Dynamic = Mapping[str, Mapping[int, Dim]]


@dataclass(frozen=True)
class Signature:
    """How a call of the model maps to flat tensors, and flat output tensors back to what the model returns.

    Attributes:
        parameters: the model's ``forward`` signature, to bind positional and keyword arguments; None if unknown.
        names: name of each leaf of the bound arguments, such as ``input_ids`` or ``pair.0``.
        leaves: for each leaf, None for a tensor input, or a 1-tuple with the constant it was captured with.
        in_spec: tree of the bound arguments.
        out_spec: tree of the outputs.
        slots: for each output leaf, an int (index into the output tensors), or a sympy size, or a 1-tuple constant.
    """

    parameters: inspect.Signature | None
    names: tuple[str, ...]
    leaves: tuple[tuple[Any] | None, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    slots: tuple[int | sympy.Expr | tuple[Any], ...]

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The input tensors of a call, in placeholder order.

        Raises:
            InputError: an argument is missing, unknown, of another structure, or a constant differs from the captured.
        """
        plain = self._plain_tensors(args, kwargs)
        if plain is not None:
            return plain
        bound = bind(self.parameters, args, kwargs)
        named, spec = pytree.tree_flatten(bound)
        if spec != self.in_spec:
            names = ", ".join(f"{k}={_describe(v)}" for k, v in bound.items())
            raise InputError(
                f"the call's arguments do not have the captured structure: got {names or 'nothing'}",
                why=f"the model was captured with {', '.join(self.names)}",
                fix="pass the same arguments as when compiling, or compile again with the new ones",
            )
        tensors: list[torch.Tensor] = []
        for name, leaf, const in zip(self.names, named, self.leaves, strict=True):
            if const is None:
                if not isinstance(leaf, torch.Tensor):
                    raise InputError(
                        f"input {name!r} must be a tensor, got {_describe(leaf)}", fix="pass a torch.Tensor"
                    )
                tensors.append(leaf)
            elif isinstance(leaf, torch.Tensor) or leaf != const[0]:
                raise InputError(
                    f"argument {name!r} is {_describe(leaf)}, the model was captured with {const[0]!r}",
                    why="arguments that are not tensors are constants of the compiled model",
                    fix="compile again with the new value",
                )
        return tensors

    @cached_property
    def _positions(self) -> list[int] | None:
        """Where each input stands among positional arguments, if every argument is one tensor."""
        order = list(self.parameters.parameters.values()) if self.parameters else []
        named = [p.name for p in order if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][: len(self.names)]
        plain = sorted(named) == list(self.names) and all(const is None for const in self.leaves)
        return [named.index(n) for n in self.names] if plain else None

    def _plain_tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor] | None:
        """The inputs of the usual call, all tensors by position or all by name, without the cost of binding it."""
        if self._positions is None:
            return None
        if len(args) == len(self.names) and not kwargs:
            tensors = [args[i] for i in self._positions]
        elif not args and len(kwargs) == len(self.names):
            tensors = [kwargs.get(n) for n in self.names]
        else:
            return None
        return tensors if all(isinstance(t, torch.Tensor) for t in tensors) else None

    def unflatten(self, tensors: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> Any:
        """What the model returns, from its output tensors and the sizes of the dynamic dims."""
        if self._is_one_tensor:
            return tensors[0]
        leaves: list[Any] = []
        for slot in self.slots:
            if isinstance(slot, int):
                leaves.append(tensors[slot])
            elif isinstance(slot, tuple):
                leaves.append(slot[0])
            else:
                leaves.append(evaluate(slot, sizes))
        return pytree.tree_unflatten(leaves, self.out_spec)

    @cached_property
    def _is_one_tensor(self) -> bool:
        return self.slots == (0,) and self.out_spec.is_leaf()


def bind(parameters: inspect.Signature | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Positional and keyword arguments as one dict by parameter name; ``*args`` become ``args.0`` and so on.

    Raises:
        InputError: the arguments do not fit the signature.
    """
    if parameters is None:
        return {f"arg{i}": a for i, a in enumerate(args)} | dict(kwargs)
    try:
        bound = parameters.bind_partial(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"the arguments do not fit forward{parameters}: {error}") from None
    flat: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = parameters.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            flat |= {f"{name}.{i}": v for i, v in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            flat |= value
        else:
            flat[name] = value
    return dict(sorted(flat.items()))


def capture(
    model: torch.nn.Module | ExportedProgram,
    inputs: tuple[Any, ...] | Mapping[str, Any],
    dynamic: Dynamic | None = None,
) -> tuple[Program, Signature]:
    """Export ``model`` for ``inputs`` (positional tuple or keyword dict) and clean the graph.

    Args:
        dynamic: input name to axis to ``Dim``; equal dim names are equal sizes.

    Raises:
        ModelStateError: the model is in training mode, or an input requires grad.
        InputError: inputs of a wrong kind or on another device.
        DimError: ``dynamic`` does not fit the inputs.
        CaptureError: torch.export failed, or the model fixes a dynamic dim or writes to what is no buffer.
    """
    check_model(model)
    check_inputs_kind(inputs)
    if isinstance(model, ExportedProgram):
        return _capture_exported(model)
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    parameters = inspect.signature(model.forward)
    bound = bind(parameters, args, kwargs)
    paths, in_spec = pytree.tree_flatten_with_path(bound)
    names = tuple(".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path, _ in paths)
    values = [value for _, value in paths]
    for name, value in zip(names, values, strict=True):
        if isinstance(value, torch.Tensor):
            check_tensor(name, value)
    dims = _check_dynamic(names, values, dynamic or {})
    flat = _FlatModule(model, parameters, in_spec, values)
    tensor_names = [n for n, v in zip(names, values, strict=True) if isinstance(v, torch.Tensor)]
    example = [v for v in values if isinstance(v, torch.Tensor)]
    exported = _export(flat, _for_tracing(tensor_names, example, dims), tensor_names, dims)
    program, slots = _to_program(exported, tensor_names, tuple(example), dims, prefix="model.")
    leaves = tuple(None if isinstance(v, torch.Tensor) else (v,) for v in values)
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    check_size_one(flat, program)
    return program, Signature(parameters, names, leaves, in_spec, out_spec, slots)


class _FlatModule(torch.nn.Module):
    """The model with its call flattened to a list of tensors; other arguments are constants."""

    def __init__(
        self, model: torch.nn.Module, parameters: inspect.Signature, in_spec: pytree.TreeSpec, values: list[Any]
    ) -> None:
        super().__init__()
        self.model = model
        self._call = (parameters, in_spec, [None if isinstance(v, torch.Tensor) else (v,) for v in values])
        self.eval()

    def forward(self, *tensors: torch.Tensor) -> Any:
        parameters, in_spec, leaves = self._call
        supply = iter(tensors)
        bound: dict[str, Any] = pytree.tree_unflatten([next(supply) if c is None else c[0] for c in leaves], in_spec)
        args = [
            bound.pop(name)
            for name, p in parameters.parameters.items()
            if p.kind is inspect.Parameter.POSITIONAL_ONLY and name in bound
        ]
        star = next((n for n, p in parameters.parameters.items() if p.kind is inspect.Parameter.VAR_POSITIONAL), None)
        if star is not None:
            ordered = [n for n, p in parameters.parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
            args += [bound.pop(name) for name in ordered if name in bound]
            args += [bound.pop(n) for n in sorted((n for n in bound if n.startswith(f"{star}.")), key=_star_index)]
        with mutation.assignments_as_writes(self.model):
            return self.model(*args, **bound)


def _star_index(name: str) -> int:
    return int(name.rsplit(".", 1)[1])


def check_model(model: Any) -> None:
    """Raise unless ``model`` can be captured: a module in eval mode with all its tensors on the CPU."""
    if isinstance(model, ExportedProgram):
        return
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"the model is {_describe(model)}",
            why="planish captures an nn.Module or an ExportedProgram",
            fix="pass one",
        )
    training = [n or type(model).__name__ for n, m in model.named_modules() if m.training]
    if training:
        raise ModelStateError(
            f"the model is in training mode ({training[0]!r} and {len(training) - 1} more modules)",
            why="planish compiles inference",
            fix="call model.eval() first",
        )
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if tensor.device.type != "cpu":
                raise ModelStateError(f"{kind} {name!r} is on {tensor.device}", fix="move the model: model.cpu()")


def check_inputs_kind(inputs: Any, name: str = "inputs") -> None:
    """Raise unless ``inputs`` is a tuple (or list) or a mapping."""
    if not isinstance(inputs, (tuple, list, Mapping)):
        raise InputError(
            f"{name} is {_describe(inputs)}",
            why="it must be a tuple of positional arguments or a dict of keyword arguments",
            fix="for one tensor write (x,)",
        )


def check_tensor(name: str, value: torch.Tensor) -> None:
    """Raise unless the tensor is a plain CPU tensor that does not require grad."""
    if value.requires_grad:
        raise ModelStateError(f"input {name!r} requires grad", why="planish compiles inference", fix="pass x.detach()")
    if value.device.type != "cpu":
        raise InputError(f"input {name!r} is on {value.device}", why="the target runs on the CPU", fix="pass x.cpu()")
    if value.layout != torch.strided:
        raise InputError(f"input {name!r} has layout {value.layout}", fix="pass a dense tensor: x.to_dense()")


def _check_dynamic(names: Sequence[str], values: Sequence[Any], dynamic: Dynamic) -> dict[tuple[str, int], Dim]:
    """Check the user's ``dynamic`` and return it as (input, axis) to dim."""
    if not isinstance(dynamic, Mapping) or not all(isinstance(axes, Mapping) for axes in dynamic.values()):
        raise DimError(
            f"dynamic is {dynamic!r}",
            why="it maps an input's name to a mapping of axis to dim",
            fix='write {"input_ids": {0: planish.Dim("batch", 1, 64)}}',
        )
    by_name = dict(zip(names, values, strict=True))
    found: dict[str, tuple[Dim, int]] = {}
    dims: dict[tuple[str, int], Dim] = {}
    for name, axes in dynamic.items():
        if not isinstance(by_name.get(name), torch.Tensor):
            tensors = [n for n, v in by_name.items() if isinstance(v, torch.Tensor)]
            raise DimError(
                f"dynamic names {name!r}, which is not a tensor input", fix=f"the inputs are: {', '.join(tensors)}"
            )
        shape = by_name[name].shape
        for axis, dim in axes.items():
            if not isinstance(dim, Dim):
                raise DimError(
                    f"dynamic[{name!r}][{axis}] is {_describe(dim)}",
                    why="a dynamic dimension needs a name and a range",
                    fix=f"write planish.Dim({dim!r}, 1, 256)"
                    if isinstance(dim, str)
                    else "write planish.Dim(name, min, max)",
                )
            if not 0 <= axis < len(shape):
                raise DimError(f"dynamic[{name!r}] names axis {axis}", why=f"the input has shape {list(shape)}")
            if not dim.min <= shape[axis] <= dim.max:
                raise DimError(
                    f"{name!r} has size {shape[axis]} on axis {axis}", why=f"its range is {dim.min}..{dim.max}"
                )
            known = found.setdefault(dim.name, (dim, shape[axis]))
            if known != (dim, shape[axis]):
                raise DimError(
                    f"dim {dim.name!r} has two ranges or sizes: {known} and {(dim, shape[axis])}",
                    why="equal names are equal sizes",
                    fix="use one Dim object, or two names",
                )
            if dim.min < dim.max:
                dims[name, axis] = dim
    return dims


_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)


def _for_tracing(
    names: Sequence[str], tensors: Sequence[torch.Tensor], dims: Mapping[tuple[str, int], Dim]
) -> tuple[torch.Tensor, ...]:
    """The example with dynamic dims of size 1 enlarged, which torch.export would fix at 1.

    Each is a tensor object of its own: torch.export would take one that is passed twice for a single input.
    """
    used = {t.shape[a] for n, t in zip(names, tensors, strict=True) for a in range(t.dim()) if (n, a) in dims}
    sizes: dict[str, int] = {}
    enlarged: list[torch.Tensor] = []
    for name, given in zip(names, tensors, strict=True):
        tensor = given.detach()
        for axis in range(tensor.dim()):
            dim = dims.get((name, axis))
            if dim is not None and tensor.shape[axis] == 1:
                free = next((p for p in _PRIMES if p not in used and p <= dim.max), dim.max)
                size = sizes.setdefault(dim.name, free)
                used.add(size)
                tensor = tensor.expand(*[size if a == axis else -1 for a in range(tensor.dim())]).contiguous()
        enlarged.append(tensor)
    return tuple(enlarged)


def _export(
    module: torch.nn.Module,
    tensors: tuple[torch.Tensor, ...],
    names: Sequence[str],
    dims: Mapping[tuple[str, int], Dim],
) -> ExportedProgram:
    symbols = {d.name: torch.export.Dim(d.name, min=d.min, max=d.max) for d in dims.values()}
    shapes = tuple(
        {a: symbols[dims[n, a].name] for a in range(t.dim()) if (n, a) in dims}
        for n, t in zip(names, tensors, strict=True)
    )
    try:
        with torch.no_grad(), decompose.symbolic_steps(), mutation.assigned_attributes() as assigned:
            exported = torch.export.export(module, tensors, dynamic_shapes=(shapes,) if shapes else None, strict=False)
            exported = _decomposed(exported)
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises many kinds; the user needs its text and our advice
        raise CaptureError(
            f"torch.export could not capture the model: {type(error).__name__}: {first_lines(error)}",
            why=mutation.shared_memory(module) if isinstance(error, AssertionError) else "",
            fix="make the forward free of data-dependent control flow and of fixed sizes in dynamic dims",
        ) from error
    mutation.check_assigned(exported, assigned)
    return exported


def _decomposed(exported: ExportedProgram) -> ExportedProgram:
    # torch copies its own tree specs in a way that it warns about itself
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return exported.run_decompositions(decompose.table())


def _capture_exported(exported: ExportedProgram) -> tuple[Program, Signature]:
    """A program exported by the user; its dims carry the names that torch.export gave them."""
    exported = _decomposed(exported)
    args, kwargs = exported.example_inputs or ((), {})
    names = [s.arg.name for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    bound = {f"arg{i}": a for i, a in enumerate(args)} | dict(kwargs)
    leaves, in_spec = pytree.tree_flatten(bound)
    if len(leaves) != len(names) or not all(isinstance(v, torch.Tensor) for v in leaves):
        raise CaptureError(
            "the exported program has inputs that are not tensors", fix="pass the nn.Module to compile()"
        )
    program, slots = _to_program(exported, names, tuple(leaves), {}, prefix="")
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    return program, Signature(None, tuple(bound), (None,) * len(leaves), in_spec, out_spec, slots)


def _to_program(
    exported: ExportedProgram,
    names: Sequence[str],
    example: tuple[torch.Tensor, ...],
    dims: Mapping[tuple[str, int], Dim],
    *,
    prefix: str,
) -> tuple[Program, tuple[int | sympy.Expr | tuple[Any], ...]]:
    """Turn lifted parameters into ``get_attr`` nodes, user inputs into placeholders, and clean the graph."""
    module = fx.GraphModule({}, fx.Graph(), class_name="Program")
    graph = module.graph
    mapping: dict[fx.Node, fx.Node] = {}
    kinds = {s.arg.name: s for s in exported.graph_signature.input_specs}
    supply = iter(names)
    state = mutation.written_buffers(exported, names, prefix)
    held = {b.source: b.name.replace(".", "_") for b in state}
    paths: dict[str, str] = {}
    for node in sorted(exported.graph.nodes, key=lambda n: (n.op != "placeholder", n in held)):  # the state comes last
        if node in held:
            mapping[node] = graph.placeholder(held[node])
            mapping[node].target = mapping[node].name
        elif node.op == "placeholder" and kinds[node.name].kind is not InputKind.USER_INPUT:
            target = str(kinds[node.name].target)
            tensor = exported.state_dict.get(target, exported.constants.get(target))
            if tensor is None:
                raise CaptureError(
                    f"torch.export made a constant {target!r} while taking an op apart, and did not keep its value",
                    fix="write the op that the model uses there with others, or run it outside the model",
                )
            name = add_constant(module, target.removeprefix(prefix).replace(".", "_"), tensor.detach())  # pyright: ignore
            paths[name] = target.removeprefix(prefix)
            mapping[node] = graph.create_node("get_attr", name, name=name)
        elif node.op == "placeholder":
            name = next(supply).replace(".", "_")
            mapping[node] = graph.create_node("placeholder", name, name=name)
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        mapping[node].meta = {k: v for k, v in node.meta.items() if k in ("val", "stack_trace")}
    slots = _flat_output(graph, [mapping[b.result] for b in state])
    _clean(module)
    split_complex(module)
    widen_half(module)
    symbols, program_dims = _dims(exported, names, dims, graph)
    program = Program(module, (), (), program_dims, symbols, (*example, *(b.initial for b in state)))
    program.state = tuple(b.name for b in state)
    program.paths = paths
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    program.inputs = tuple(TensorSpec(n.name, n.meta["val"].dtype, program.shape(n)) for n in placeholders)
    outputs = next(n for n in graph.nodes if n.op == "output").args[0]
    tensors = [s for s in exported.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    out_names = [s.arg.name for s in tensors if not isinstance(s.arg, (ConstantArgument, SymIntArgument))]
    out_names += [f"new_{spec.name}" for spec in program.inputs[program.arguments :]]
    program.outputs = tuple(
        TensorSpec(name, n.meta["val"].dtype, program.shape(n)) for name, n in zip(out_names, outputs, strict=True)
    )
    verify.infer_values(program)
    module.recompile()
    resolved = tuple(program.size(s.meta["val"]) if isinstance(s, fx.Node) else s for s in slots)
    return program, resolved  # pyright: ignore


def _flat_output(graph: fx.Graph, state: Sequence[fx.Node]) -> list[int | fx.Node | tuple[Any]]:
    """Make the output node a flat tuple of tensors, with the new state last instead of first.

    Returns:
        what each leaf of the model's own output is.
    """
    output = next(n for n in graph.nodes if n.op == "output")
    tensors: list[fx.Node] = []
    slots: list[int | fx.Node | tuple[Any]] = []
    for leaf in output.args[0][len(state) :]:  # pyright: ignore
        if not isinstance(leaf, fx.Node):
            slots.append((leaf,))
        elif isinstance(leaf.meta["val"], torch.Tensor):
            if leaf.meta["val"].layout is not torch.strided:
                raise CaptureError(
                    f"the model returns a tensor of layout {leaf.meta['val'].layout}",
                    where=source_line(leaf),
                    why="native code writes dense tensors",
                    fix="return the dense tensor and convert it outside the model",
                )
            slots.append(len(tensors))
            tensors.append(leaf)
        else:
            value = leaf.meta["val"]
            if not isinstance(value, torch.SymInt) or free_unbacked_symbols(value):
                raise CaptureError(
                    "the model returns a number that it reads from a tensor",
                    where=source_line(leaf),
                    why="a native function returns tensors, and sizes that follow from the inputs' shapes",
                    fix="return the tensor instead of calling .item() or .tolist() on it",
                )
            slots.append(leaf)
    output.args = ((*tensors, *state),)
    return slots


def _dims(
    exported: ExportedProgram, names: Sequence[str], dims: Mapping[tuple[str, int], Dim], graph: fx.Graph
) -> tuple[dict[str, sympy.Symbol], dict[str, Dim]]:
    """Symbol and range of every dynamic dim, by name."""
    symbols: dict[str, sympy.Symbol] = {}
    ranges: dict[str, Dim] = {}
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for name, node in zip(
        names, placeholders, strict=False
    ):  # behind the inputs comes the state, whose sizes are fixed
        for axis, size in enumerate(node.meta["val"].shape):
            dim = dims.get((name, axis))
            expr = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
            if dim is None and expr.is_Symbol and not dims:
                bounds = exported.range_constraints[expr]
                dim = Dim(str(expr), max(1, int(bounds.lower)), int(bounds.upper))
            if dim is None:
                continue
            if not expr.is_Symbol:
                raise CaptureError(
                    f"the model fixes dim {dim.name!r} (axis {axis} of {name!r}) to {expr}",
                    fix="leave it out of dynamic, or remove the fixed size from the model",
                )
            symbols[dim.name], ranges[dim.name] = expr, dim
    return symbols, ranges


_NO_VALUE = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}


def _clean(module: fx.GraphModule) -> None:
    """Drop what has no value of its own.

    before: ``_assert_tensor_metadata(x); y = clone(x); z = view(y, s); w = _to_copy(z, dtype of z)``
    after:  ``w = reshape(x, s)`` (a view of a tensor that is no longer made contiguous must be a reshape)
    """
    for node in list(module.graph.nodes):
        if node.target in _NO_VALUE:
            module.graph.erase_node(node)
        elif node.target in COPIES or _keeps_dtype(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target in RESHAPES:
            node.target = aten.reshape.default
        elif node.target is aten.dropout.default and not node.args[2]:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target is aten._to_copy.default:
            node.kwargs = {"dtype": node.meta["val"].dtype}
    remove_dead(module)


def _keeps_dtype(node: fx.Node) -> bool:
    if node.target is not aten._to_copy.default:
        return False
    return node.args[0].meta["val"].dtype == node.meta["val"].dtype  # pyright: ignore


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"{value!r} ({type(value).__name__})"
