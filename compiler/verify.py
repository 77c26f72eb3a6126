"""Checks between passes: the rules every graph keeps, and equal values in fp64 before and after a pass."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_aggregate

from planish.errors import GraphError, NumericError
from planish.program import Program, clone_module, evaluate, source_line

always = False
"""True in the test-suite: every pipeline compares values after every pass."""

_SCALAR_NAMES = ("add", "sub", "mul", "pow", "floordiv", "mod", "neg", "getitem")
_SCALAR_FUNCTIONS = {getattr(operator, name) for name in _SCALAR_NAMES} | {torch.sym_max, torch.sym_min}


_SYMBOLIC: dict[Any, Any] = {torch.ops.aten.constant_pad_nd.default: torch._refs.constant_pad_nd}
"""What gives the shape of ops whose own shape code fixes symbolic sizes to the example's."""


def fake_mode(program: Program) -> FakeTensorMode:
    """The fake-tensor mode (with its symbolic shapes) that the graph was captured in."""
    values = (n.meta.get("val") for n in program.nodes())
    return next(v.fake_mode for v in values if isinstance(v, FakeTensor))


def infer_values(program: Program) -> None:
    """Give every node that a pass created its fake value (shape, dtype), from the fake values of its arguments."""
    mode = fake_mode(program)

    def value(arg: Any) -> Any:
        return arg.meta["val"] if isinstance(arg, fx.Node) else arg

    for node in program.nodes():
        if "val" in node.meta or node.op == "output":
            continue
        if node.op == "get_attr":
            tensor = operator.attrgetter(str(node.target))(program.module)
            node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        elif node.op == "call_function":
            args, kwargs = map_aggregate(node.args, value), map_aggregate(node.kwargs, value)
            with mode:
                node.meta["val"] = _SYMBOLIC.get(node.target, node.target)(*args, **kwargs)  # pyright: ignore


def check_graph(program: Program, name: str) -> None:
    """Raise GraphError, naming the pass, if the graph breaks a rule of ``Program``."""

    def fail(what: str, node: fx.Node | None = None) -> None:
        raise GraphError(
            f"after pass {name!r}: {what}",
            where=source_line(node) if node is not None else "",
            why="passes must keep the rules of Program",
            fix=f"this is a defect of pass {name!r}: leave it out with passes=[...] and report it",
        )

    try:
        program.module.graph.lint()
    except RuntimeError as error:
        fail(str(error))
    nodes = list(program.nodes())
    names = [n.name for n in nodes if n.op == "placeholder"]
    if len(names) != len(program.inputs):
        fail(f"{len(names)} placeholders for {len(program.inputs)} inputs")
    for node in nodes:
        if node.op == "call_function" and not _allowed(node):
            fail(
                f"{node.name} calls {node.target}, which is neither a functional ATen/planish op nor integer maths",
                node,
            )
        if node.op == "call_module" and not isinstance(getattr(program.module, str(node.target), None), fx.GraphModule):
            fail(f"{node.name} calls {node.target}, which is not a fused group", node)
        if node.op == "call_method":
            fail(f"{node.name} is a method call", node)
        if node.op != "output" and "val" not in node.meta:
            fail(f"{node.name} has no fake value", node)
    outputs = nodes[-1].args[0]
    if not isinstance(outputs, (tuple, list)) or len(outputs) != len(program.outputs):
        fail("the output is not the flat tuple of the captured outputs")
    for spec, out in zip(program.outputs, outputs, strict=True):
        got = (out.meta["val"].dtype, program.shape(out))
        if got != (spec.dtype, spec.shape):
            fail(f"output {spec.name} became {got[0]}{list(map(str, got[1]))}, was {spec}", out)


def _allowed(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return node.target in _SCALAR_FUNCTIONS


def check_values(before: Program, after: Program, name: str, tol: float) -> float:
    """Largest change of an output in fp64, relative to the output's largest magnitude, over two dynamic shapes.

    Padding where an output holds no value of the model's (``Program.padded``) is left out.

    Raises:
        NumericError: if it exceeds ``tol``, naming the pass and the output.
    """
    reference, candidate = in_fp64(before.module), in_fp64(after.module)
    worst = 0.0
    for inputs in (before.example, second_shape(before)):
        wide = [t.to(_wide(t.dtype)) for t in inputs]
        results: list[tuple[torch.Tensor, ...]] = []
        for module in (reference, candidate):
            with torch.no_grad(), torch.random.fork_rng(devices=()):
                torch.manual_seed(0)  # an op that draws random numbers draws the same in both
                results.append(module(*wide))
        want, got = results
        for spec, w, g in zip(before.outputs, want, got, strict=True):
            shown = _shown(after, spec.name, inputs)
            error = relative_error(*(t if shown is None else t[shown] for t in (w, g)))
            worst = max(worst, error)
            if not error <= tol:
                raise NumericError(
                    f"pass {name!r} changed output {spec.name!r} by {error:.3g} in fp64, its limit is {tol:.3g}",
                    where=f"inputs of shape {[list(t.shape) for t in inputs]}",
                    fix=f"this is a defect of pass {name!r}: leave it out with passes=[...] and report it",
                )
    return worst


def _shown(program: Program, output: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Where an output holds the model's values, bool [B, S]; None where it does everywhere."""
    if output not in program.padded:
        return None
    mask, keep = program.padded[output]
    return inputs[[spec.name for spec in program.inputs].index(mask)] == keep


def relative_error(want: torch.Tensor, got: torch.Tensor) -> float:
    """max|got - want| / max|want|; infinite where shapes differ, or NaN or infinity stand in different places."""
    if want.shape != got.shape:
        return float("inf")
    if want.numel() == 0 or torch.equal(want, got):
        return 0.0
    if want.is_complex() and got.is_complex():
        want, got = torch.view_as_real(want.resolve_conj()), torch.view_as_real(got.resolve_conj())
    want, got = want.double(), got.double()
    odd = ~torch.isfinite(want)
    if not torch.equal(odd, ~torch.isfinite(got)) or not torch.equal(want[odd].nan_to_num(), got[odd].nan_to_num()):
        return float("inf")
    difference = torch.where(odd, 0.0, got - want).abs().max().item()
    scale = torch.where(odd, 0.0, want).abs().max().item()
    return difference / scale if scale else (float("inf") if difference else 0.0)


def second_shape(program: Program) -> tuple[torch.Tensor, ...]:
    """The example inputs resized along their dynamic dims to other sizes in range, by repeating or cutting values.

    Floating-point state, which often starts as zeros, gets numbers from 0 to 1; counts and positions stay valid as
    they are.
    """
    sizes: dict[str, int] = {}
    example = program.example_dims()
    for name, dim in program.dims.items():
        now = example[name]
        sizes[name] = now + 1 if now < dim.max else max(dim.min, now - 1)
    resized: list[torch.Tensor] = []
    for spec, tensor in zip(program.inputs, program.example, strict=True):
        for axis, size in enumerate(spec.shape):
            if not isinstance(size, int):
                new = evaluate(size, sizes)
                tensor = tensor.index_select(axis, torch.arange(new) % tensor.shape[axis])
        resized.append(tensor.contiguous())
    generator = torch.Generator().manual_seed(0)
    for i in range(program.arguments, len(resized)):
        if resized[i].is_floating_point():
            resized[i] = torch.rand(resized[i].shape, generator=generator).to(resized[i].dtype)
    return tuple(resized)


def in_fp64(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph that computes in fp64: parameters, buffers and every dtype argument are mapped."""
    wide = clone_module(module)
    _widen(wide)
    return wide


def _widen(module: fx.GraphModule) -> None:
    for name, tensor in list({**module._parameters, **module._buffers}.items()):
        if _wide(tensor.dtype) is not tensor.dtype:
            value = tensor.detach().to(_wide(tensor.dtype))
            setattr(module, name, torch.nn.Parameter(value, False) if name in module._parameters else value)

    def widen(arg: Any) -> Any:
        return _wide(arg) if isinstance(arg, torch.dtype) else arg

    for node in module.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, widen), map_aggregate(node.kwargs, widen)
    module.recompile()
    for child in module.children():
        if isinstance(child, fx.GraphModule):
            _widen(child)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else torch.complex128 if dtype.is_complex else dtype


def max_abs(want: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference over pairs of tensors."""
    return max(
        (w.double() - g.double()).abs().max().item() if w.numel() else 0.0 for w, g in zip(want, got, strict=True)
    )
