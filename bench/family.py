"""One family of models compiled and checked against eager: what each process of the families benchmark does."""

from __future__ import annotations

import json
import operator
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import planish
from planish import verify
from planish.bench.families import LEVELS, FamilyRow, Reason
from planish.errors import CaptureError, UnsupportedOpsError
from planish.models import families
from planish.models.base import Batch

TOLERANCE = 1e-4
"""Largest relative error of an fp32 output that counts as a match."""

_SHAPE, _SECOND = (3, 12), (5, 17)
"""Batch and sequence that a family is captured at, and checked at where they are dynamic."""

aten = torch.ops.aten
HOUSEKEEPING = frozenset(
    {
        aten.empty.memory_format,  # output tensors; bytes for the arena and for copies
        aten.slice.Tensor,  # the aligned part of those bytes
        aten.view.dtype,  # ... read as the dtype
        aten.view.default,  # ... and in the shape of an input
        aten.copy_.default,  # an input that is not aligned or not contiguous
    }
)
"""The torch ops that a call of a compiled model may run: they allocate or copy, and compute nothing."""


class TorchOps(TorchDispatchMode):
    """While active, counts the torch ops that are no housekeeping."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.computing: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count and run one op."""
        if func not in HOUSEKEEPING:
            self.computing[str(func)] += 1
        return func(*args, **(kwargs or {}))


class ExportClock:
    """Seconds spent inside torch.export while its block is active."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Generator[None]:
        """Wrap the two functions through which a model is exported."""
        export: Any = torch.export.export
        decompose = cast("Any", ExportedProgram.run_decompositions)  # pyright: ignore[reportUnknownMemberType]
        torch.export.export = self._timed(export)
        ExportedProgram.run_decompositions = self._timed(decompose)
        try:
            yield
        finally:
            torch.export.export = export
            ExportedProgram.run_decompositions = decompose

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def check(name: str, enter: Callable[[str], None]) -> FamilyRow:
    """Build, compile and check one family.

    Args:
        name: the family.
        enter: told the name of each phase when it starts: ``build``, ``eager``, ``compile`` and ``run``.

    Returns:
        Its row. Whatever fails, and an error of torch or TVM too, is a reason in the row and no exception.
    """
    row = FamilyRow(name, families.family(name).kind)
    phase = ""

    def begin(now: str) -> None:
        nonlocal phase
        phase = now
        enter(now)

    try:
        begin("build")
        model = families.build(name)
        begin("eager")
        with torch.no_grad():
            model(**families.inputs(name, *_SHAPE))
        begin("compile")
        compiled = _compile(name, model, row)
        if compiled is not None:
            begin("run")
            _compare(name, model, compiled, row)
    except Exception as error:  # the row of a family that breaks something must say so, whatever it broke
        row.reasons.append(Reason(type(error).__name__, phase, _text(error)))
    return row


def _compile(name: str, model: torch.nn.Module, row: FamilyRow) -> Any:
    """The compiled model with as many dynamic axes as torch.export allows, or None with the reasons in the row."""
    for level in LEVELS:
        dynamic = families.dynamic(name, sequences=level == "batch+seq") if level != "static" else {}
        if level == "batch+seq" and dynamic == families.dynamic(name, sequences=False):
            continue  # an image has no sequence
        row.dynamic = level
        clock = ExportClock()
        start = time.perf_counter()
        try:
            with clock.running():
                example = families.inputs(name, *_SHAPE)
                # "exact": what is compared is every value of every output, also at padding
                compiled = planish.compile(model, example, dynamic=dynamic, padding="exact", cache=False)
            row.compile_s = time.perf_counter() - start - clock.seconds
            return compiled
        except CaptureError as error:
            row.dynamic = None
            row.reasons.append(Reason("CaptureError", f"compile {level}", _text(error)))
        except UnsupportedOpsError as error:
            row.reasons += _missing(error)
            return None
        finally:
            row.export_s = clock.seconds
    return None


def _missing(error: UnsupportedOpsError) -> list[Reason]:
    """One reason for each op and cause, with the number of nodes it concerns and the first one's line."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for op in error.ops:
        if op.op != str(operator.getitem):  # takes a result of an op that is listed itself
            groups.setdefault((op.op, op.reason), []).append(op)
    return [
        Reason("UnsupportedOpsError", "compile", why, op, len(found), found[0].where.rpartition("site-packages/")[2])
        for (op, why), found in groups.items()
    ]


def _compare(name: str, model: torch.nn.Module, compiled: Any, row: FamilyRow) -> None:
    """Run the compiled model on other values, at another shape where it is dynamic, and judge every output."""
    batch = _SHAPE[0] if row.dynamic == "static" else _SECOND[0]
    seq = _SECOND[1] if row.dynamic == "batch+seq" else _SHAPE[1]
    inputs: Batch = families.inputs(name, batch, seq, seed=1)
    with torch.no_grad():
        want = model(**inputs)
    with TorchOps() as seen:
        got = compiled(**inputs)
    step = next(step for step in compiled.steps if step.name == "canonicalize")
    row.native_share = max(0.0, 1 - seen.computing.total() / max(1, step.ops_after))
    row.reasons += [Reason("TorchOp", "run", "computed by torch", op, n) for op, n in sorted(seen.computing.items())]
    expected, found = _tensors(want), _tensors(got)
    row.reasons += [Reason("NumericError", "run", text) for text in _differences(expected, found)]
    row.match = not any(reason.error == "NumericError" for reason in row.reasons)
    worst = max(map(verify.relative_error, expected, found), default=0.0)
    row.max_rel_err = worst if worst < float("inf") else None


def _differences(expected: list[torch.Tensor], found: list[torch.Tensor]) -> list[str]:
    """In words, every output that is not what eager returns."""
    if len(expected) != len(found):
        return [f"{len(found)} output tensors, eager returns {len(expected)}"]
    texts: list[str] = []
    for index, (want, got) in enumerate(zip(expected, found, strict=True)):
        error = verify.relative_error(want, got)
        if want.dtype is not got.dtype or error > (TOLERANCE if want.is_floating_point() else 0.0):
            texts.append(f"output {index} is {_spec(got)}, eager's {_spec(want)}: relative error {error:.3g}")
    return texts


def _tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor of a model's output."""
    return [value for value in pytree.tree_leaves(output) if isinstance(value, torch.Tensor)]


def _spec(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:600]


def main() -> None:
    """Check the family named on the command line; each phase and finally the row are lines of JSON on stdout."""
    torch.set_num_threads(1)
    row = check(sys.argv[1], lambda phase: print(json.dumps({"phase": phase}), flush=True))
    print(json.dumps({"row": row.to_dict()}, allow_nan=False), flush=True)


if __name__ == "__main__":
    main()
