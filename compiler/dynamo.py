"""``torch.compile(model, backend="planish")``: every graph that dynamo makes becomes one native function.

Dynamo hands a graph over with the parameters among its inputs. They are bound as constants, as ``planish.compile`` has
them; a graph that is called with other parameters, or with changed ones, is compiled again for those. Nothing runs in
PyTorch but what dynamo itself leaves there when it breaks the graph, which the log and :func:`graphs` show, and what
``options={"fallback": "eager"}`` allows, as in ``planish.compile``. Outputs hold at padding what eager computes there,
unless ``options={"padding": "zero"}`` says that they need not.

Tensors of the model that the graph writes to are no constants but the state of the compiled graph, held where they are.
"""

from __future__ import annotations

import inspect
import logging
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, cast

import torch
from torch import fx

from planish import api
from planish.errors import CaptureError, DimError, InputError, ModelStateError
from planish.program import Dim

log = logging.getLogger("planish.dynamo")

SMALLEST_BOUND = 4096
"""Dynamic sizes may grow up to this without compiling again."""

_lock = Lock()
_made = 0

_STATIC = "pass dynamic=False to torch.compile"


def graphs() -> int:
    """How many graphs dynamo has handed over in this process.

    One for a whole model, more where dynamo breaks the graph or makes it again, for example for a dynamic shape.
    """
    return _made


def backend(graph: fx.GraphModule, example: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Graph:
    """The dynamo backend ``planish``.

    Args:
        graph: torch functions and operators, in inference.
        example: unused: the first call brings the values to capture with.
        options: ``{"fallback": "eager"}`` runs operators without kernels in PyTorch; ``padding`` as in
            ``planish.compile``, ``"exact"`` if it is not given.

    Returns:
        A callable that compiles at its first call. There an error reaches the user as it is, with its own class, where
        dynamo would wrap one that is raised here.
    """
    global _made
    made = Graph(graph, options or {})
    with _lock:
        _made += 1
        log.info(
            "torch.compile made %d graph(s) so far; this one has %d operators, %d inputs and %d constants",
            _made,
            sum(node.op.startswith("call_") for node in graph.graph.nodes),
            len(made.inputs),
            len(made.constants),
        )
    return made


@dataclass(frozen=True)
class _Input:
    """A placeholder for an input tensor: its name, its place in a call, and the symbol of each dynamic axis."""

    name: str
    place: int
    symbols: dict[int, str]


@dataclass(frozen=True)
class _Compiled:
    """A result, with the constants it was compiled for (weak references: the model may go) and their versions.

    ``held`` are the indices of those that the graph writes to: they are its state, whatever they contain.
    """

    model: api.CompiledModel
    constants: tuple[weakref.ref[torch.Tensor], ...]
    versions: tuple[int, ...]
    held: tuple[int, ...]

    @staticmethod
    def of(model: api.CompiledModel, constants: Sequence[torch.Tensor]) -> _Compiled:
        """The result for these constants, registered as ``constant_0`` and so on."""
        held = tuple(int(name.removeprefix("constant_")) for name in model.state_names())
        fixed = [t for i, t in enumerate(constants) if i not in held]
        return _Compiled(model, tuple(map(weakref.ref, constants)), _versions(fixed), held)

    def fits(self, constants: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same constants, unchanged but for the state."""
        same = all(ref() is tensor for ref, tensor in zip(self.constants, constants, strict=True))
        return same and self.versions == _versions([t for i, t in enumerate(constants) if i not in self.held])

    def run(self, constants: Sequence[torch.Tensor], tensors: dict[str, torch.Tensor]) -> Any:
        """Call the model; what it writes to are the tensors themselves, as their version counters tell."""
        if not self.held:
            return self.model(**tensors)
        state = [constants[i].detach() for i in self.held]
        memory = {t.untyped_storage().data_ptr() for t in state}
        # An input that is a view of the state is read as it was before the call.
        apart = {n: t.clone() if t.untyped_storage().data_ptr() in memory else t for n, t in tensors.items()}
        result = self.model(**apart, state=self.model.state_over(state))
        torch.autograd.graph.increment_version([t for t in state if not t.is_inference()])
        return result


def _versions(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Counts that grow when a tensor is written to; a tensor made in inference mode has none."""
    return tuple(0 if t.is_inference() else t._version for t in tensors)


class Graph:
    """One graph of dynamo's, called as dynamo calls it: parameters, sizes and input tensors by position.

    Attributes:
        inputs: the placeholders that are input tensors.
        constants: places of the parameters, buffers and other tensors of modules in a call.
        sizes: place of an int in a call to the input and the axis it is the size of.
        numbers: places of numbers that are attributes of a module, such as the share that dropout drops, or that
            have one value. A float comes as a tensor without axes.
        aliases: index of an output to the place of the constant that it is, after writes to it.
    """

    def __init__(self, graph: fx.GraphModule, options: Mapping[str, Any]) -> None:
        self.graph = graph
        self._options = {"fallback": "error", "padding": "exact"} | dict(options)
        self.inputs: list[_Input] = []
        self.constants: list[int] = []
        self.sizes: dict[int, tuple[str, int]] = {}
        self.numbers: list[int] = []
        self._problem: InputError | None = None
        self._found: dict[tuple[Any, ...], _Compiled] = {}
        self._lock = Lock()
        self._sort_placeholders()
        if unknown := options.keys() - {"fallback", "padding"}:
            self._problem = InputError(f"unknown option {min(unknown)!r}", fix='use "fallback" or "padding"')
        places = {n: i for i, n in enumerate(n for n in graph.graph.nodes if n.op == "placeholder")}
        outputs = [places.get(_written(leaf)) for leaf in graph.graph.output_node().args[0]]  # pyright: ignore
        self.aliases = {i: place for i, place in enumerate(outputs) if place in self.constants}

    def _sort_placeholders(self) -> None:
        others: dict[int, fx.Node] = {}
        for place, node in enumerate(n for n in self.graph.graph.nodes if n.op == "placeholder"):
            value = node.meta.get("example_value")
            if "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {}):
                self.constants.append(place)
            elif isinstance(value, torch.Tensor) and not node.meta["grapharg"].pass_arg_as_tensor:
                self.inputs.append(_Input(node.name, place, _symbols(value)))
            else:
                others[place] = node
        owner = {symbol: (i.name, axis) for i in self.inputs for axis, symbol in i.symbols.items()}
        for place, node in others.items():
            value = node.meta.get("example_value")
            if str(value) in owner:
                self.sizes[place] = owner[str(value)]
            elif _has_one_value(value) or node.meta["grapharg"].source.guard_source.is_unspecialized_nn_module():
                self.numbers.append(place)
            else:
                self._problem = InputError(
                    f"argument {node.name!r} is a number that varies",
                    why="a compiled graph takes tensors; only sizes of its tensors may vary",
                    fix=f"{_STATIC}, or pass the number as a tensor",
                )

    def __call__(self, *args: Any) -> Any:
        """The graph's outputs, as a tuple.

        Raises:
            ModelStateError: gradients are wanted.
            InputError, CaptureError, DimError, UnsupportedOpsError: at a call that compiles.
        """
        if self._problem is not None:
            raise self._problem
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            raise ModelStateError(
                "torch.compile asks for gradients",
                why="planish compiles inference: gradients are enabled and a parameter or an input requires them",
                fix="call the model inside torch.inference_mode() or torch.no_grad()",
            )
        constants = [args[place] for place in self.constants]
        tensors = {i.name: args[i.place] for i in self.inputs}
        tensors = {name: t.detach() if t.requires_grad else t for name, t in tensors.items()}
        bounds = [_bound(args[i.place].shape[axis]) for i in self.inputs for axis in i.symbols]
        numbers = {place: _number(args[place]) for place in self.numbers}
        key = (*map(id, constants), *bounds, *numbers.values())
        with self._lock:
            found = self._found.get(key)
            if found is None or not found.fits(constants):
                module = _Bound(self, constants, numbers)
                model = self._compile(module, args, tensors)
                found = _Compiled.of(model, constants)
                alive = {k: c for k, c in self._found.items() if all(ref() is not None for ref in c.constants)}
                self._found = alive | {key: found}
        result = found.run(constants, tensors)
        held = {self.constants[i] for i in found.held}
        return tuple(args[self.aliases[i]] if self.aliases.get(i) in held else leaf for i, leaf in enumerate(result))

    def _compile(
        self, module: torch.nn.Module, args: Sequence[Any], tensors: dict[str, torch.Tensor]
    ) -> api.CompiledModel:
        _check_inference(self.graph)
        axes = {i.name: {axis: (s, args[i.place].shape[axis]) for axis, s in i.symbols.items()} for i in self.inputs}
        try:
            dynamic = {
                name: {axis: Dim(symbol, min(2, size), _bound(size)) for axis, (symbol, size) in sizes.items()}
                for name, sizes in axes.items()
            }
            return api.compile(module, tensors, dynamic=dynamic, cache=False, **self._options)
        except (CaptureError, DimError) as error:
            if not any(axes.values()):
                raise
            fix = f"{_STATIC}, which compiles for each shape; {error.fix}".rstrip("; ")
            raise type(error)(error.what, where=error.where, why=error.why, fix=fix) from error


def _written(node: Any) -> Any:
    """The tensor that an operation in place returns: ``x`` for ``x.add_(1)`` or ``x += 1``, else the node itself."""
    while isinstance(node, fx.Node) and node.args:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if not in_place and node.target not in _AUGMENTED:
            break
        node = node.args[0]
    return node


_AUGMENTED = {getattr(operator, f"i{n}") for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")} | {
    getattr(operator, f"i{n}") for n in ("and", "or", "xor", "lshift", "rshift")
}
"""``x += y`` and the like, as dynamo writes them."""


def _symbols(tensor: torch.Tensor) -> dict[int, str]:
    """Axis to symbol, for the axes of a fake tensor that vary."""
    sizes = {axis: size for axis, size in enumerate(tensor.shape) if isinstance(size, torch.SymInt)}
    return {axis: str(size) for axis, size in sizes.items() if not _has_one_value(size)}


def _has_one_value(size: Any) -> bool:
    """Whether it is a symbolic int that dynamo has found to be one number."""
    return isinstance(size, torch.SymInt) and cast("Any", size).node.expr.is_number


def _number(value: Any) -> int | float:
    return value.item() if isinstance(value, torch.Tensor) else int(value)


class _Float:
    """Stands for the tensor that dynamo passes a float in: the graph only takes its value out."""

    def __init__(self, value: float) -> None:
        self.value = value

    def item(self) -> float:
        """The float."""
        return self.value


def _bound(size: int) -> int:
    """The upper bound to compile a dynamic size for: a larger size compiles again."""
    return max(SMALLEST_BOUND, 1 << (size - 1).bit_length())


def _check_inference(graph: fx.GraphModule) -> None:
    """Raise if a function of the graph is called as in training: dropout that drops, batch norm that learns."""
    for node in graph.graph.nodes:
        if node.op != "call_function" or not inspect.isfunction(node.target):
            continue
        try:
            bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        except (TypeError, ValueError):
            continue
        bound.apply_defaults()
        if bound.arguments.get("training") is True:
            raise ModelStateError(
                f"the model is in training mode ({node.target.__name__} is called with training=True)",
                why="planish compiles inference",
                fix="call model.eval() first",
            )


class _Bound(torch.nn.Module):
    """The graph as a module of its input tensors alone, taken by name."""

    def __init__(self, source: Graph, constants: Sequence[torch.Tensor], numbers: Mapping[int, float]) -> None:
        super().__init__()
        self.graph = source.graph
        for index, tensor in enumerate(constants):
            self.register_buffer(f"constant_{index}", tensor.detach())
        self.eval()
        self.forward = self._by_name(source, numbers)

    def _by_name(self, source: Graph, numbers: Mapping[int, float]) -> Callable[..., Any]:
        """A forward whose signature names the inputs."""
        names = [i.name for i in source.inputs]

        def forward(**tensors: torch.Tensor) -> Any:
            args: dict[int, Any] = {i.place: tensors[i.name] for i in source.inputs}
            args |= {place: getattr(self, f"constant_{n}") for n, place in enumerate(source.constants)}
            args |= {place: _Float(n) if isinstance(n, float) else n for place, n in numbers.items()}
            args |= {place: tensors[name].shape[axis] for place, (name, axis) in source.sizes.items()}
            return self.graph(*(args[place] for place in range(len(args))))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # pyright: ignore
        return forward
