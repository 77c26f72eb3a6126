"""Where formats are chosen: layers that read the same value, and what each of them can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from planish.assignment import covers
from planish.conv_ops import CONVOLUTION_LAST
from planish.passes.precision.calibration import Channels, observe
from planish.passes.precision.layer import NOTABLE_WEIGHT, Layer, layers, reason
from planish.passes.precision.operand import Operand
from planish.passes.precision.rewrite import NOTABLE
from planish.passes.precision.treatment import Treatment
from planish.pipeline import Note, Refusal, Result
from planish.program import Program

MENU = ("w8a8", "w6a8-g32", "w5a8-g32", "w4a8-g32", "w4a8-g128", "w3a8-g32", "w3a8-g128", "w2a8-g32")
"""Formats of linear layers that are tried."""

WITH_OUTLIERS = ("w8a8+2", "w5a8-g32+2", "w4a8-g32+2", "w3a8-g32+2")
"""Tried too where the input has a channel ``NOTABLE`` times as large as the median, or a weight has outliers. With two
channels in fp32 w4a8-g32 of MiniLM's layer 0 has 0.56 times the error, with eight the same."""

CONVOLUTIONS = ("w8a8-static", "w6a8-g32-static", "w5a8-g32-static", "w4a8-g32-static")
"""Of convolutions: all positions of a window share a scale."""

DEPTHWISE = ("w8a8-static",)
"""Of depthwise ones, which have few weights."""


@dataclass(frozen=True)
class Site:
    """Layers that read the same value and are treated alike.

    Attributes:
        layers: in graph order.
        treatments: those that they can have, fp32 not among them.
        operands: what calibration says of the value, for each treatment.
        use: which one of the layers' uses, from 1: the same weights may read several values.
    """

    layers: tuple[Layer, ...]
    treatments: tuple[Treatment, ...]
    operands: Mapping[Treatment, Operand]
    use: int = 1

    @property
    def name(self) -> str:
        """Of its layers: ``encoder.layer.0.attention.self.query|key|value``; of their second use ``shared.dense#2``."""
        return self._layers if self.use == 1 else f"{self._layers}#{self.use}"

    @property
    def _layers(self) -> str:
        first = self.layers[0].name.rpartition(".")[0]
        if len(self.layers) > 1 and all(layer.name.rpartition(".")[0] == first for layer in self.layers):
            names = "|".join(layer.name.rpartition(".")[2] for layer in self.layers)
            return f"{first}.{names}" if first else names
        return "|".join(dict.fromkeys(layer.name for layer in self.layers))


def find_sites(
    program: Program, name: str, result: Result, menu: Sequence[str] = (), pins: Sequence[tuple[str, str]] = ()
) -> tuple[list[Site], list[Channels]]:
    """All sites of a program in graph order, with what calibration saw of the value that each reads.

    Args:
        program: canonical, with calibration inputs.
        name: of the pass, in what it says.
        result: gets the layers that stay fp32, with the reasons.
        menu: formats of linear layers; empty for ``MENU``, and ``WITH_OUTLIERS`` where they may help.
        pins: pairs of a layer's name or its beginning, and a format that the layer can have besides.
    """
    nodes = []
    for node in layers(program):
        if why := reason(program, node):
            result.refusals.append(Refusal.at(name, node, why))
        else:
            nodes.append(node)
    channels = observe(program, nodes)
    together: dict[Any, list[Layer]] = {}
    for node in nodes:
        together.setdefault((node.args[0], node.target), []).append(Layer.of(program, node))
    images = any(node.target is CONVOLUTION_LAST for node in nodes)
    sites, uses = list[Site](), Counter[str]()
    for group in together.values():
        bare = Site(tuple(group), (), {})
        uses[bare.name] += 1
        bare = replace(bare, use=uses[bare.name])
        seen = channels[group[0].node]
        if not seen.rows:
            result.notes.append(Note.at(name, group[0].node, "calibration never reached it: it stays fp32"))
        pinned = [form for n, form in pins if _suits(form, group) and covers(n, bare.name)]
        names = dict.fromkeys((*_menu(group, seen, menu), *pinned)) if seen.rows else ()
        treatments = tuple(Treatment.parse(n) for n in names)
        weights = torch.cat([layer.by_channel() for layer in group])
        operands = {
            t: Operand.of(seen, weights, t.format, t.outliers, equalise=not images) for t in treatments if t.format
        }
        sites.append(replace(bare, treatments=treatments, operands=_sharing_equalisers(operands)))
    return sites, [channels[site.layers[0].node] for site in sites]


def _sharing_equalisers(operands: Mapping[Treatment, Operand]) -> dict[Treatment, Operand]:
    """The same with one tensor for equal equalisers, so that what they make of an input is computed once."""
    known: dict[bytes, Tensor] = {}
    return {
        treatment: operand
        if operand.equaliser is None
        else replace(operand, equaliser=known.setdefault(operand.equaliser.numpy().tobytes(), operand.equaliser))
        for treatment, operand in operands.items()
    }


def _suits(form: str, group: Sequence[Layer]) -> bool:
    """Whether layers can have a format that they are pinned to, other than fp32: a convolution's scale is static."""
    treatment = Treatment.parse(form)
    if treatment.format is None or (form not in DEPTHWISE and any(layer.depthwise for layer in group)):
        return False
    is_static = treatment.format.activation == "a8-static" and not treatment.outliers
    return is_static or group[0].node.target is not CONVOLUTION_LAST


def _menu(group: Sequence[Layer], seen: Channels, menu: Sequence[str]) -> Sequence[str]:
    """Formats that are tried for layers."""
    if any(layer.depthwise for layer in group):
        return DEPTHWISE
    if group[0].node.target is CONVOLUTION_LAST:
        return CONVOLUTIONS
    if menu:
        return menu
    notable = float(seen.against_median().max()) >= NOTABLE
    notable = notable or any(layer.outlier_score >= NOTABLE_WEIGHT for layer in group)
    return (*MENU, *(WITH_OUTLIERS if notable else ()))
