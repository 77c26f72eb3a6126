"""The passes, by name, and the default pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from planish.passes.canonicalize import Canonicalize
from planish.passes.fusion import FuseGroups
from planish.passes.layout import ChooseLayout
from planish.passes.padding import RemovePadding
from planish.passes.precision import QuantizeUniform
from planish.passes.selection import PushSelections
from planish.passes.softmax import RewriteSoftmax

if TYPE_CHECKING:
    from planish.pipeline import Pass
    from planish.targets import Target

REGISTRY: dict[str, Pass] = {
    p.name: p
    for p in (
        Canonicalize(),
        PushSelections(),
        RemovePadding(),
        ChooseLayout(),
        QuantizeUniform(),
        RewriteSoftmax(),
        FuseGroups(),
    )
}
"""Every pass with its default options, in the order of the default pipeline."""

ON_INTEGERS = frozenset({QuantizeUniform.name})
"""Passes of the default pipeline of targets that have a format of integer codes."""


def resolve(passes: Sequence[str | Pass] | None, padding: str = "zero", target: Target | None = None) -> list[Pass]:
    """The passes to run: the default pipeline, or names and Pass objects as given.

    Args:
        passes: None for the default pipeline.
        target: whose default pipeline it is; None for one without integer codes.
        padding: the policy of ``remove-padding``, where it is not given as an object.

    Raises:
        UnknownNameError: a name that is not registered, or an unknown policy.
    """
    from planish.errors import UnknownNameError

    removal = RemovePadding(padding)
    if passes is None:
        quantised = target is not None and target.format
        passes = [name for name in REGISTRY if quantised or name not in ON_INTEGERS]
    chosen: list[Pass] = []
    for p in passes:
        if isinstance(p, str) and p not in REGISTRY:
            raise UnknownNameError(f"unknown pass {p!r}", fix="use one of: " + ", ".join(REGISTRY))
        chosen.append(removal if p == removal.name else REGISTRY[p] if isinstance(p, str) else p)
    return chosen
