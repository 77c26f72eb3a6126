"""What a model writes to while it runs: its buffers become state, anything else is an error."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from planish.errors import CaptureError
from planish.printer import describe
from planish.program import source_line

_ASSIGNED = re.compile(r"The tensor attributes? (.*?) (?:was|were) assigned during export")


@contextmanager
def assigned_attributes() -> Iterator[list[str]]:
    """Around an export, collect the tensor attributes (no buffers) that the model assigns: export only warns of them.

    Other warnings pass.
    """
    names: list[str] = []
    with warnings.catch_warnings(record=True) as heard:
        warnings.filterwarnings("always", _ASSIGNED.pattern)
        try:
            yield names
        finally:
            for warning in heard:
                found = _ASSIGNED.match(str(warning.message))
                names += [n.strip().removeprefix("self.") for n in found[1].split(",")] if found else []
    for warning in heard:
        if not _ASSIGNED.match(str(warning.message)):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def check_assigned(exported: ExportedProgram, names: Sequence[str]) -> None:
    """Raise if the graph reads what an attribute in ``names`` held before: the captured value would never change.

    An attribute that is assigned before it is read only carries a value from one line of the model to another.
    """
    read = {n.name for n in exported.graph.nodes if n.op == "placeholder" and n.users}
    for spec in exported.graph_signature.input_specs:
        name = str(spec.target)
        if spec.kind is InputKind.CONSTANT_TENSOR and name in names and spec.arg.name in read:
            raise CaptureError(
                f"the model reads its attribute {name.removeprefix('model.')!r} in forward and then assigns it",
                why="only a registered buffer can change from call to call",
                fix='register it: self.register_buffer("name", tensor)',
            )


@contextmanager
def assignments_as_writes(model: torch.nn.Module) -> Iterator[None]:
    """Around a forward, make a buffer that the model assigns one that it writes to: export loses assignments.

    before: ``self.h = new``
    after:  ``self.h.copy_(new)``

    Raises:
        CaptureError: the new tensor has another shape or dtype.
    """
    before = {name: (module, dict(module._buffers)) for name, module in model.named_modules()}
    try:
        yield
        for path, (module, old) in before.items():
            for name, tensor in old.items():
                new = module._buffers.get(name)
                if new is not tensor:
                    _write(f"{path}.{name}".lstrip("."), tensor, new)
    finally:
        for module, old in before.values():
            module._buffers.clear()
            module._buffers.update(old)


def _write(name: str, old: torch.Tensor | None, new: torch.Tensor | None) -> None:
    if old is None or new is None or old.shape != new.shape or old.dtype != new.dtype:
        told = [describe(t.dtype, t.shape) if t is not None else "None" for t in (old, new)]
        raise CaptureError(
            f"the model assigns its buffer {name!r}, {told[0]} before and {told[1]} afterwards",
            why="a state's buffers keep their shapes and dtypes",
            fix="register the buffer at its full size, and write to a part of it",
        )
    old.copy_(new)


@dataclass(frozen=True)
class Lifted:
    """State of a captured graph: each mutable buffer's name, its value at capture, and the node it has afterwards."""

    names: tuple[str, ...]
    initial: tuple[torch.Tensor, ...]
    after: tuple[fx.Node, ...]


_WRITES = {
    OutputKind.BUFFER_MUTATION: "buffer",
    OutputKind.PARAMETER_MUTATION: "parameter",
    OutputKind.USER_INPUT_MUTATION: "input",
}


def lift_state(exported: ExportedProgram, graph: fx.Graph, mapping: dict[fx.Node, fx.Node], prefix: str) -> Lifted:
    """Make the buffers that a model writes to the graph's last inputs, and leave only the user's outputs.

    before: ``def f(x): new = self.count + 1; return (new, x * new)``, where ``new`` is what ``count`` holds afterwards
    after:  ``def f(x, count): new = count + 1; return (x * new,)``, and ``new`` among the result's ``after``

    Args:
        graph: a copy of the exported graph with every parameter and buffer as a ``get_attr``.
        mapping: node of the exported graph to its copy.
        prefix: what the names of all buffers begin with, left out of the result.

    Raises:
        CaptureError: the model writes to an input or a parameter, or to memory that two of its tensors share.
    """
    signature = exported.graph_signature
    output = next(n for n in graph.nodes if n.op == "output")
    leaves: tuple[fx.Node, ...] = output.args[0]  # pyright: ignore
    written = [(s, n) for s, n in zip(signature.output_specs, leaves, strict=True) if s.kind in _WRITES]
    for spec, node in written:
        if spec.kind is not OutputKind.BUFFER_MUTATION:
            raise CaptureError(
                f"the model writes to its {_WRITES[spec.kind]} {str(spec.target).removeprefix(prefix)!r}",
                where=source_line(node),
                why="a compiled model changes registered buffers, which are its state, and nothing else",
                fix="write to a copy, x = x.clone(), or keep the value in a registered buffer",
            )
    output.args = (leaves[len(written) :],)
    owners = {str(s.target): s.arg.name for s in signature.input_specs}
    by_name = {n.name: mapping[n] for n in exported.graph.nodes if n.op == "placeholder"}
    names = [str(spec.target) for spec, _ in written]
    _check_own_memory(exported, names, prefix)
    for name in names:
        _make_input(graph, by_name[owners[name]])
    initial = [_value(exported, name).detach().clone(memory_format=torch.contiguous_format) for name in names]
    return Lifted(tuple(n.removeprefix(prefix) for n in names), tuple(initial), tuple(n for _, n in written))


def _make_input(graph: fx.Graph, constant: fx.Node) -> None:
    """Replace a ``get_attr`` by a placeholder behind all others."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    at = graph.inserting_after(placeholders[-1]) if placeholders else graph.inserting_before(next(iter(graph.nodes)))
    with at:
        node = graph.placeholder(constant.name)
    node.meta = dict(constant.meta)
    constant.replace_all_uses_with(node)
    graph.erase_node(constant)


def _value(exported: ExportedProgram, name: str) -> torch.Tensor:
    value = exported.state_dict.get(name, exported.constants.get(name))
    assert isinstance(value, torch.Tensor)
    return value


def _check_own_memory(exported: ExportedProgram, written: Sequence[str], prefix: str) -> None:
    """Raise if a written buffer shares memory with another tensor, which would have to change with it."""
    tensors = {**exported.constants, **exported.state_dict}
    for name in written:
        memory = _value(exported, name).untyped_storage().data_ptr()
        for other, tensor in tensors.items():
            shared = isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() == memory
            if shared and other != name and memory:
                raise CaptureError(
                    f"the model writes to {name.removeprefix(prefix)!r}, "
                    f"which shares its memory with {other.removeprefix(prefix)!r}",
                    why="each buffer of a state has memory of its own",
                    fix="register one buffer, and take the view of it in forward",
                )


def run_unchanged(
    model: torch.nn.Module, tensors: Sequence[torch.Tensor], buffers: Mapping[str, torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that a model returns, and what its ``buffers`` hold afterwards, without a change of the model."""
    own = {name: value.clone() for name, value in buffers.items()}
    result = torch.func.functional_call(model, own, tuple(tensors), tie_weights=False)
    # a buffer that the model has assigned is another tensor now, which functional_call puts into ``own``
    return [v for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor)], [own[name] for name in buffers]
