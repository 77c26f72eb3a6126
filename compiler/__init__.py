"""planish: compiles a PyTorch model through small verified passes into one native function.

Use it as ``import planish; planish.compile(model, inputs)``: ``from planish import compile`` would hide the builtin.

Public names are loaded on first use (PEP 562), so that importing planish loads neither torch nor tvm: the command's
``--help`` and a program that only catches :class:`PlanishError` stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planish import backends, bench, dynamo, errors, models, passes, targets
    from planish.api import CompiledModel, compile
    from planish.assignment import Assignment
    from planish.budget import Budget
    from planish.decoder import CompiledDecoder, compile_decoder
    from planish.errors import PlanishError
    from planish.program import Dim
    from planish.state import State
    from planish.targets import Target

__version__ = "0.1.0"

_NAMES = {
    "Assignment": "planish.assignment",
    "Budget": "planish.budget",
    "CompiledDecoder": "planish.decoder",
    "CompiledModel": "planish.api",
    "Dim": "planish.program",
    "PlanishError": "planish.errors",
    "State": "planish.state",
    "Target": "planish.targets",
    "compile": "planish.api",
    "compile_decoder": "planish.decoder",
}
_MODULES = frozenset({"backends", "bench", "dynamo", "errors", "models", "passes", "targets"})

__all__ = [
    "Assignment",
    "Budget",
    "CompiledDecoder",
    "CompiledModel",
    "Dim",
    "PlanishError",
    "State",
    "Target",
    "__version__",
    "backends",
    "bench",
    "compile",
    "compile_decoder",
    "dynamo",
    "errors",
    "models",
    "passes",
    "targets",
]


def __getattr__(name: str) -> Any:
    """Load a public name or submodule on first use; raises AttributeError for any other name."""
    if name in _MODULES:
        return import_module(f"planish.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'planish' has no attribute {name!r}")
    value = getattr(import_module(_NAMES[name]), name)
    globals()[name] = value  # later look-ups skip this function
    return value


def __dir__() -> list[str]:
    """List the public names before any of them is loaded."""
    return sorted(set(globals()) | set(__all__))
