"""Every error planish raises on purpose: what happened, where in the model, why, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planish.backends.base import Unsupported


class PlanishError(Exception):
    """Base class: a message made of *what*, *where*, *why* and *fix*; empty parts are left out.

    Args:
        what: the fact, naming the value that is wrong.
        where: the line of the user's model (``file:line``) or the argument it concerns.
        why: the rule that was broken.
        fix: what the user can do.
    """

    code = "error"

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        parts = [f"[{self.code}] {what}"]
        parts += [f"  {label}: {text}" for label, text in (("at", where), ("why", why), ("fix", fix)) if text]
        super().__init__("\n".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.why, self.fix))


def _rebuild(kind: type[PlanishError], what: str, where: str, why: str, fix: str) -> PlanishError:
    return kind(what, where=where, why=why, fix=fix)


def first_lines(error: Exception) -> str:
    """The beginning of another library's error message, to be part of one of ours."""
    return "\n    ".join(line for line in str(error).strip().splitlines()[:6] if line.strip())


class CaptureError(PlanishError):
    """The model could not be captured as one graph by torch.export."""

    code = "capture"


class ModelStateError(PlanishError):
    """The model or its inputs are in a state planish does not compile: training mode, or gradients required."""

    code = "model-state"


class UnsupportedOpsError(PlanishError):
    """Some operators of the graph have no lowering on the target; all of them are listed at once.

    Attributes:
        ops: one ``planish.backends.base.Unsupported`` for each of them, for programs that sort or count them.
    """

    code = "unsupported-ops"
    ops: tuple[Unsupported, ...] = ()

    def __reduce__(self) -> tuple[object, ...]:
        return (*super().__reduce__(), {"ops": self.ops})


class InputError(PlanishError):
    """A compiled model was called with inputs it was not compiled for."""

    code = "input"


class CalibrationError(PlanishError):
    """Calibration inputs are missing, empty or hold what is no number."""

    code = "calibration"


class BudgetError(PlanishError):
    """A budget or pinned formats that no assignment of formats can keep."""

    code = "budget"


class StateError(PlanishError):
    """A call without the state it needs or with a wrong one, or two uses of one state at the same time."""

    code = "state"


class DimError(PlanishError):
    """A dynamic dimension is described wrongly, or its size is outside its range."""

    code = "dim"


class TargetError(PlanishError):
    """The target's name is unknown, or this machine cannot run its code."""

    code = "target"


class PassOrderError(PlanishError):
    """A pass needs a fact that no earlier pass makes, or that an earlier pass breaks."""

    code = "pass-order"


class GraphError(PlanishError):
    """A pass left a graph that breaks the rules every Program keeps."""

    code = "graph"


class NumericError(PlanishError):
    """A pass changed the model's values by more than the tolerance it declares."""

    code = "numeric"


class KernelError(PlanishError):
    """Native code reported a failure at run time."""

    code = "kernel"


class ToolchainError(PlanishError):
    """A tool needed to build native code is missing or failed."""

    code = "toolchain"


class CostTableError(PlanishError):
    """A table of kernel times cannot be measured, read or written."""

    code = "costs"


class MissingPackageError(PlanishError):
    """An optional package is needed for what was asked."""

    code = "missing-package"


class UnknownNameError(PlanishError):
    """A name that is not in a registry; the message lists the names that are."""

    code = "unknown-name"
