"""Sizes of buffers as C expressions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from sympy.printing.str import StrPrinter

from planish.errors import UnknownNameError


class _Printer(StrPrinter):
    """Non-negative int64 expressions of dims: ``d[0] * 4``."""

    def __init__(self, dims: Sequence[str]) -> None:
        super().__init__()
        self._dims = dims

    def _print_Symbol(self, expr: Any) -> str:
        return f"d[{self._dims.index(expr.name)}]"

    def _print_Integer(self, expr: Any) -> str:
        return f"INT64_C({expr})"

    def _print_Pow(self, expr: Any, rational: bool = False) -> str:
        base, power = expr.args
        if not (power.is_Integer and power > 0):
            return self.emptyPrinter(expr)
        return "*".join([f"({self._print(base)})"] * int(power))

    def _print_FloorDiv(self, expr: Any) -> str:
        return "(({}) / ({}))".format(*map(self._print, expr.args))

    def _print_Max(self, expr: Any) -> str:
        return self._fold("maximum", expr.args)

    def _print_Min(self, expr: Any) -> str:
        return self._fold("minimum", expr.args)

    def _fold(self, name: str, args: Sequence[Any]) -> str:
        first, *rest = map(self._print, args)
        for other in rest:
            first = f"{name}({first}, {other})"
        return first

    def emptyPrinter(self, expr: Any) -> str:
        raise _no_form(expr, type(expr).__name__)


def in_c(size: int | sympy.Expr, dims: Sequence[str]) -> str:
    """A size over dim names as an int64 expression of ``d[i]``, the i-th of ``dims``.

    Raises:
        UnknownNameError: it has a function that C code has no form for.
    """
    if isinstance(size, int):
        return f"INT64_C({size})"
    if not all(n.is_Integer for n in size.atoms(sympy.Number)):
        raise _no_form(size, "a fraction")
    return _Printer(dims).doprint(size)


def _no_form(size: sympy.Expr, what: str) -> UnknownNameError:
    return UnknownNameError(f"the size {size} cannot be written in C", why=f"{what} has no form there", fix="report it")
