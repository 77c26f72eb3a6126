"""The passes, by name, and the default pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from planish.passes.canonicalize import Canonicalize
from planish.passes.fusion import FuseGroups
from planish.passes.layout import ChooseLayout
from planish.passes.padding import RemovePadding
from planish.passes.precision import QuantizeMixed, QuantizeUniform
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
        QuantizeMixed(),
        RewriteSoftmax(),
        FuseGroups(),
    )
}
"""Every pass with its default options, in the order of the default pipeline."""

QUANTISERS = frozenset({QuantizeUniform.name, QuantizeMixed.name})
"""Passes that put layers on integer codes, of which a pipeline has one at most."""


def default_pipeline(quantiser: Pass | None = None) -> list[str | Pass]:
    """The default pipeline, with a quantising pass at its place or without one."""
    names = [name for name in REGISTRY if name not in QUANTISERS]
    if quantiser is None:
        return [*names]
    place = sum(name not in QUANTISERS for name in list(REGISTRY)[: list(REGISTRY).index(quantiser.name)])
    return [*names[:place], quantiser, *names[place:]]


def resolve(
    passes: Sequence[str | Pass] | None,
    padding: str = "zero",
    target: Target | None = None,
    mixed: QuantizeMixed | None = None,
) -> list[Pass]:
    """The passes to run: the default pipeline, or names and Pass objects as given.

    Args:
        passes: None for the default pipeline.
        padding: the policy of ``remove-padding``, where it is not given as an object.
        target: whose default pipeline it is; None for one without integer codes.
        mixed: the pass for a budget or pins; takes the place of the target's one format.

    Raises:
        UnknownNameError: a name that is not registered, or an unknown policy.
    """
    from planish.errors import UnknownNameError

    removal = RemovePadding(padding)
    if passes is None:
        uniform = QuantizeUniform() if target is not None and target.format else None
        passes = default_pipeline(mixed or uniform)
    chosen: list[Pass] = []
    for p in passes:
        p = mixed if p == QuantizeMixed.name and mixed is not None else p
        if isinstance(p, str) and p not in REGISTRY:
            raise UnknownNameError(f"unknown pass {p!r}", fix="use one of: " + ", ".join(REGISTRY))
        chosen.append(removal if p == removal.name else REGISTRY[p] if isinstance(p, str) else p)
    return chosen
