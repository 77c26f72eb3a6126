"""Program to Python text: the body of a dump's files, and the text that golden tests and diffs compare."""

from __future__ import annotations

import keyword
import operator
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx

from planish.errors import PlanishError
from planish.program import Program, constant, source_line


class DumpError(PlanishError):
    """A program could not be written as text, or a dump could not be written to its directory."""

    code = "dump"


Expression = Callable[[str, torch.Tensor], str]
"""Python expression for a constant, from its name and tensor."""

LOCAL_NAMES = frozenset({"torch", "math", "operator"})
"""Names a statement may use besides values; fx itself keeps nodes off Python's builtins."""

_SYMBOLS = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "floordiv": "//",
    "truediv": "/",
    "mod": "%",
    "pow": "**",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
}


def program_text(
    program: Program, *, sources: bool = True, expression: Expression | None = None, reserved: Iterable[str] = ()
) -> str:
    """The program as Python: constants, a function per fused group, and ``forward`` over the placeholders.

    Value names are node names. Only a name that means something else in the text (a group's function, a module)
    gets a suffix. The same program always gives the same text.

    Args:
        sources: write the model's source line above the statements it created, and the pass that made a node.
        expression: what to write for a constant; by default ``...``, so the text does not depend on its values.
        reserved: names that the text around this one defines; constants are renamed away from them.

    Raises:
        DumpError: a node or argument has no spelling in Python.
    """
    return _Printer(program, sources, expression or (lambda name, tensor: "..."), frozenset(reserved)).text()


class _Printer:
    """Names of everything in one program, and its text."""

    def __init__(self, program: Program, sources: bool, expression: Expression, reserved: frozenset[str]) -> None:
        self.program = program
        self.sources = sources
        self.expression = expression
        self.functions: dict[fx.GraphModule, str] = {}
        self.names: dict[fx.Node, str] = {}
        modules = list(_modules(program.module))
        self.taken = {n.name for _, m in modules for n in m.graph.nodes} | LOCAL_NAMES | reserved
        for target, module in modules[:-1]:
            if module not in self.functions:
                name = target.replace(".", "_")
                used = LOCAL_NAMES | reserved | {"forward"} | set(self.functions.values())
                self.functions[module] = _free(name, used)
        self.functions[program.module] = "forward"
        self.taken |= set(self.functions.values())
        for module in self.functions:
            self._name_nodes(module, reserved)

    def _name_nodes(self, module: fx.GraphModule, reserved: frozenset[str]) -> None:
        """Locals keep their name unless it hides something they use; constants are globals of the text."""
        hidden = LOCAL_NAMES | set(self.functions.values())
        for node in module.graph.nodes:
            nested = module is not self.program.module
            if node.op == "get_attr" and nested:
                name = _free(f"{self.functions[module]}_{node.name}", self.taken)
            elif node.name in (hidden | reserved if node.op == "get_attr" else hidden):
                name = _free(f"{node.name}_out" if node.op == "call_module" else f"{node.name}_", self.taken)
            else:
                name = node.name
            self.taken.add(name)
            self.names[node] = name

    def text(self) -> str:
        parts = [self._header(), *(self._function(m) for m in self.functions)]
        return "\n\n\n".join(part for part in parts if part) + "\n"

    def _header(self) -> str:
        lines: list[str] = []
        if self.program.dims:
            lines.append("# dims: " + ", ".join(f"{d.name} {d.min}..{d.max}" for d in self.program.dims.values()))
        if self.program.state:
            names = ", ".join(self.program.state)
            lines.append(f"# state: {names}: the last inputs before a call and the last outputs after it")
        for module in self.functions:
            for node in module.graph.nodes:
                if node.op == "get_attr":
                    tensor = _tensor(module, node)
                    value = self.expression(self.names[node], tensor)
                    lines.append(f"{self.names[node]} = {value}  # {describe(tensor.dtype, tensor.shape)}")
        return "\n".join(lines)

    def _function(self, module: fx.GraphModule) -> str:
        inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        lines = [f"def {self.functions[module]}({', '.join(self.names[n] for n in inputs)}):"]
        types = [f"{self.names[n]}: {self._value(n)}" for n in inputs if n.meta.get("val") is not None]
        if types:
            lines.append(f"    # {'; '.join(types)}")
        last = ""
        for node in module.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            where = short_source(source_line(node)) if self.sources else ""
            if where and where != last:
                lines.append(f"    # {where}")
                last = where
            lines.append(f"    {self._statement(module, node)}")
        return "\n".join(lines)

    def _statement(self, module: fx.GraphModule, node: fx.Node) -> str:
        if node.op == "output":
            return f"return {self._argument(node.args[0])}"
        notes = [self._value(node)] if node.meta.get("val") is not None else []
        notes += [f"by {node.meta['made_by']}"] if self.sources and "made_by" in node.meta else []
        comment = f"  # {', '.join(notes)}" if notes else ""
        return f"{self.names[node]} = {self._call(module, node)}{comment}"

    def _call(self, module: fx.GraphModule, node: fx.Node) -> str:
        args = [self._argument(a) for a in node.args]
        if node.op == "call_module":
            function = self.functions[_child(module, str(node.target))]
        elif node.op != "call_function":
            raise _unprintable(node, f"a {node.op} node")
        elif node.target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        elif node.target is operator.neg:
            return f"-{args[0]}"
        elif getattr(node.target, "__module__", "") == "_operator" and len(args) == 2 and _name(node) in _SYMBOLS:
            return f"{args[0]} {_SYMBOLS[_name(node)]} {args[1]}"
        else:
            function = _function_path(node)
        plain = [f"{k}={self._argument(v)}" for k, v in node.kwargs.items() if not keyword.iskeyword(k)]
        quoted = [f"{k!r}: {self._argument(v)}" for k, v in node.kwargs.items() if keyword.iskeyword(k)]
        return f"{function}({', '.join([*args, *plain, *(['**{' + ', '.join(quoted) + '}'] if quoted else [])])})"

    def _argument(self, value: object) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, (tuple, list)):
            items = [self._argument(v) for v in cast("Iterable[object]", value)]
            if isinstance(value, list):
                return f"[{', '.join(items)}]"
            return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
        if isinstance(value, slice):
            parts = [self._argument(getattr(value, name)) for name in ("start", "stop", "step")]  # pyright: ignore
            return f"slice({', '.join(parts)})"
        if isinstance(value, float) and not abs(value) < float("inf"):
            return f'float("{value}")'
        if value is None or value is Ellipsis or isinstance(value, (bool, int, float, complex, str)):
            return "..." if value is Ellipsis else repr(value)
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        raise DumpError(
            f"an argument of type {type(value).__name__} cannot be written as Python: {value!r}",
            why="an argument is a node, a number, a string, a dtype, a device, a layout or a list of those",
            fix="compile without dump, and report it",
        )

    def _value(self, node: fx.Node) -> str:
        return self._describe(node.meta["val"])

    def _describe(self, val: object) -> str:
        if isinstance(val, torch.Tensor):
            return describe(val.dtype, self.program.shape(val))
        if isinstance(val, (tuple, list)):
            return f"({', '.join(self._describe(v) for v in cast('Iterable[object]', val))})"
        return f"= {self.program.size(val)}" if isinstance(val, (int, torch.SymInt)) else type(val).__name__


def describe(dtype: torch.dtype, shape: Iterable[Any]) -> str:
    """``float32[batch, 384]``."""
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"


def _modules(module: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """Every group with the name it is called by, callees before callers; ``module`` itself comes last."""
    for node in module.graph.nodes:
        if node.op == "call_module":
            child = _child(module, str(node.target))
            nested = list(_modules(child))
            yield from nested[:-1]
            yield str(node.target), child
    yield "", module


def _child(module: fx.GraphModule, target: str) -> fx.GraphModule:
    child = module.get_submodule(target)
    if not isinstance(child, fx.GraphModule):
        raise DumpError(
            f"{target!r} is a {type(child).__name__}, not a fused group",
            why="only a GraphModule can be written as Python",
            fix="compile without dump, and report it",
        )
    return child


def _tensor(module: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    value: Any = constant(module, node)
    if not isinstance(value, torch.Tensor):
        raise _unprintable(node, f"a constant of type {type(value).__name__}")
    return value.detach()


def _free(name: str, taken: Iterable[str]) -> str:
    free, n = name, 0
    taken = set(taken)
    while free in taken:
        n += 1
        free = f"{name}{'' if name.endswith('_') else '_'}{n}"
    return free


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _function_path(node: fx.Node) -> str:
    """``torch.ops.aten.linear.default``, or a function of torch, math or operator."""
    if isinstance(node.target, torch._ops.OpOverload):  # pyright: ignore
        path, _, overload = str(node.target).rpartition(".")  # pyright: ignore
        if keyword.iskeyword(overload):  # aten.random.from
            return f'getattr(torch.ops.{path}, "{overload}")'
        return f"torch.ops.{path}.{overload}"
    home = {"torch": "torch", "math": "math", "_operator": "operator"}.get(getattr(node.target, "__module__", ""))
    if home is None:
        raise _unprintable(node, f"a call of {node.target}")
    return f"{home}.{_name(node)}"


def _unprintable(node: fx.Node, what: str) -> DumpError:
    return DumpError(
        f"{node.name} is {what}, which cannot be written as Python",
        where=source_line(node),
        why="a program calls ATen operators, fused groups and functions of torch, math and operator",
        fix="compile without dump, and report it",
    )


def short_source(line: str) -> str:
    """A ``file:line ...`` whose file is relative to where it was imported from, so that two machines' texts agree."""
    match = re.match(r"(.*?)(:\d+ .*|:\d+$)", line)
    if match is None:
        return line
    path = Path(match[1])
    roots = [Path(entry or ".").resolve() for entry in ["", *sys.path]]
    inside = [root for root in roots if path.is_absolute() and path.is_relative_to(root)]
    short = path.relative_to(max(inside, key=lambda root: len(root.parts))) if inside else path
    return f"{short.as_posix()}{match[2]}"
