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
class Buffer:
    """A buffer that a model writes to.

    Attributes:
        name: its name in the model.
        source: the placeholder of the exported graph that is its value before a call.
        result: the node of the exported graph that is its value after the call.
        initial: a copy of its value now.
    """

    name: str
    source: fx.Node
    result: fx.Node
    initial: torch.Tensor


_WRITES = {
    OutputKind.BUFFER_MUTATION: "buffer",
    OutputKind.PARAMETER_MUTATION: "parameter",
    OutputKind.USER_INPUT_MUTATION: "input",
}


def written_buffers(exported: ExportedProgram, inputs: Sequence[str], prefix: str) -> tuple[Buffer, ...]:
    """The buffers that a model writes to, in the order in which their new values lead the exported graph's outputs.

    Args:
        inputs: names of the user's inputs.
        prefix: what the names of all parameters and buffers begin with, left out of the result.

    Raises:
        CaptureError: the model writes to an input or a parameter.
    """
    signature = exported.graph_signature
    placeholders = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    output = next(n for n in exported.graph.nodes if n.op == "output")
    names = dict(zip(signature.user_inputs, inputs, strict=True))
    owners = {str(s.target): s.arg.name for s in signature.input_specs if s.target is not None}
    found: list[Buffer] = []
    for spec, node in zip(signature.output_specs, output.args[0], strict=True):  # pyright: ignore
        if spec.kind not in _WRITES:
            continue
        target = str(spec.target)
        name = names.get(target, target.removeprefix(prefix))
        if spec.kind is not OutputKind.BUFFER_MUTATION:
            raise CaptureError(
                f"the model writes to its {_WRITES[spec.kind]} {name!r}",
                where=source_line(node),  # pyright: ignore
                why="a compiled model changes registered buffers, which are its state, and nothing else",
                fix="write to a copy, x = x.clone(), or keep the value in a registered buffer",
            )
        value = exported.state_dict.get(target, exported.constants.get(target))
        initial = value.detach().clone(memory_format=torch.contiguous_format)  # pyright: ignore
        found.append(Buffer(name, placeholders[owners[target]], node, initial))  # pyright: ignore
    return tuple(found)


def run_unchanged(
    model: torch.nn.Module, tensors: Sequence[torch.Tensor], buffers: Mapping[str, torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that a model returns, and what its ``buffers`` hold afterwards, without a change of the model."""
    own = {name: value.clone() for name, value in buffers.items()}
    result = torch.func.functional_call(model, own, tuple(tensors), tie_weights=False)
    # a buffer that the model has assigned is another tensor now, which functional_call puts into ``own``
    return [v for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor)], [own[name] for name in buffers]


def shared_memory(model: torch.nn.Module) -> str:
    """Which buffers share memory with another tensor of the model, in words; export fails where one is written to."""
    tensors = [*model.named_buffers(remove_duplicate=False), *model.named_parameters()]
    tensors += [(f"{n}.{k}", v) for n, m in model.named_modules() for k, v in vars(m).items() if torch.is_tensor(v)]
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors:
        groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    shared = [" and ".join(names) for at, names in groups.items() if at and len(names) > 1 and buffers & {*names}]
    return f"a buffer that the model writes to may share no memory, and these do: {'; '.join(shared)}" if shared else ""
