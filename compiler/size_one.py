"""A dynamic dim of size 1: the captured graph against the model, which may take another path there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from planish import mutation, verify
from planish.errors import CaptureError, first_lines
from planish.program import Program, evaluate, source_line


def check_size_one(model: torch.nn.Module, program: Program) -> None:
    """torch.export treats a size of 1 as a special case: check the captured graph against the model there."""
    ones = {name for name, dim in program.dims.items() if dim.min == 1}
    if not ones:
        return
    small = list(program.example)
    sizes: dict[str, int] = {}
    for i, spec in enumerate(program.inputs):
        for axis, size in enumerate(spec.shape):
            if str(size) in ones:
                small[i] = small[i].narrow(axis, 0, 1).contiguous()
            sizes[str(size)] = small[i].shape[axis]

    def fail(what: str, where: str = "") -> CaptureError:
        return CaptureError(
            f"the captured graph differs from the model at size 1: {what}",
            where=where,
            why="the model takes another path when a dynamic dim is 1",
            fix=f"start the range of {', '.join(sorted(ones))} at 2",
        )

    graph, buffers = _ShapeCheck(program, sizes), [f"model.{name}" for name in program.state]
    with torch.no_grad():
        try:
            inputs, state = small[: program.arguments], small[program.arguments :]
            want, after = mutation.run_unchanged(model, inputs, dict(zip(buffers, state, strict=True)))
            got = graph.run(*small)
        except (RuntimeError, ValueError, IndexError) as error:
            raise fail(f"it fails with {first_lines(error)}") from error
    if graph.wrong is not None:
        raise fail(f"{graph.wrong.name} has another shape", source_line(graph.wrong))
    worst = max((verify.relative_error(w, g) for w, g in zip([*want, *after], got, strict=True)), default=0.0)
    if not worst <= 1e-4:
        raise fail(f"relative error {worst:.3g}")


class _ShapeCheck(fx.Interpreter):
    """Runs the captured graph and keeps the first node whose value has another shape than was captured."""

    def __init__(self, program: Program, sizes: Mapping[str, int]) -> None:
        super().__init__(program.module)
        self.program, self.sizes = program, sizes
        self.wrong: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.wrong is None and n.op == "call_function" and isinstance(value, torch.Tensor):
            shape = self.program.shape(n)
            known = all(isinstance(s, int) or {str(f) for f in s.free_symbols} <= self.sizes.keys() for s in shape)
            if known and tuple(value.shape) != tuple(evaluate(s, self.sizes) for s in shape):
                self.wrong = n
        return value
