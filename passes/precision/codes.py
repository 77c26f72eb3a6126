"""What the weights of layers are stored as: the codes of each format, and what they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from planish.formats import Format, Quantized, quantise
from planish.passes.precision.gptq import Compensation, Grid
from planish.passes.precision.layer import NOTABLE_WEIGHT, Matrix
from planish.passes.precision.operand import Operand
from planish.passes.precision.ranges import narrowed

EXACT_BITS = 8
"""Of codes that have next to no errors, unless their scale is that of a large outlier."""


Ways = Sequence[tuple[Format, Operand | None]]
"""Formats of layers that read one value, with what calibration says of the value."""

Held = list[list[Quantized]]
"""For each way the weight of each layer."""


def held_weights(layers: Sequence[Matrix], ways: Ways, *, per_tensor: bool = False) -> Held:
    """The codes of layers' weights: of what their evened-out input is multiplied by, 0 at outliers.

    With calibration, those of linear layers and 1 x 1 convolutions make up for each other's errors, where they have
    fewer than 8 bits or the weight has outliers.

    Args:
        layers: that read one value.
        ways: how they are stored.
        per_tensor: one scale for all of a weight.
    """
    return compensated(layers, ways, nearest_weights(layers, ways, per_tensor=per_tensor), refits=not per_tensor)


def nearest_weights(layers: Sequence[Matrix], ways: Ways, *, per_tensor: bool = False) -> Held:
    """The same with the nearest codes: of the inputs only their sizes count, by which ranges are narrowed."""
    return [[_nearest(layer, form, operand, per_tensor) for layer in layers] for form, operand in ways]


def compensated(
    layers: Sequence[Matrix], ways: Ways, nearest: Held, without: int | None = None, *, refits: bool = True
) -> Held:
    """The nearest codes, or others and other scales that make up for each other's errors.

    Args:
        layers, ways: as in ``held_weights``.
        nearest: by ``nearest_weights``.
        without: half of the calibration batches that the codes are not to know; see ``Channels.moment``.
        refits: whether scales may change; if not, codes alone do.
    """
    found, grids = [list(of_way) for of_way in nearest], dict[tuple[int, int], Grid]()
    compensation = None
    for way, (form, operand) in enumerate(ways):
        for i, layer in enumerate(layers):
            if operand is not None and operand.channels.moments is not None and knows_inputs(layer, form):
                if compensation is None:
                    seen = operand.channels
                    compensation = Compensation(seen.moment(without), seen.damping(without))
                grids[way, i] = Grid(layer.weight, nearest[way][i], operand.equaliser, operand.outliers)
    if compensation is None:
        return found
    for (way, i), held in zip(grids, compensation.stored(list(grids.values()), refits=refits), strict=True):
        found[way][i] = held
    return found


def _nearest(layer: Matrix, form: Format, operand: Operand | None, per_tensor: bool) -> Quantized:
    weight, importance = layer.weight, torch.ones(layer.channels)
    if operand is not None:
        importance = operand.channels.variance  # what the mean does, the corrected bias takes off
        if operand.equaliser is not None:
            weight = layer.times(weight, 1 / operand.equaliser)
            importance = importance * operand.equaliser**2
        if operand.outliers is not None:
            weight = weight.index_fill(1, operand.outliers, 0.0)
            importance = importance.index_fill(0, operand.outliers, 0.0)
    held = quantise(weight, form.weight, one_scale=per_tensor)
    if per_tensor or form.weight.bits >= EXACT_BITS:
        return held
    return narrowed(weight, held, layer.times(torch.ones_like(weight), importance))


def knows_inputs(layer: Matrix, form: Format) -> bool:
    """Whether the codes of a layer's weight depend on its inputs in calibration."""
    return layer.is_pointwise and (form.weight.bits < EXACT_BITS or layer.outlier_score >= NOTABLE_WEIGHT)


def rounded_weight(layer: Matrix, held: Quantized, operand: Operand | None) -> Tensor:
    """What the layer's own input is multiplied by in effect, fp32 [N, K]: outliers by their exact weights."""
    rounded = held.dequantise()
    if operand is not None and operand.equaliser is not None:
        rounded = layer.times(rounded, operand.equaliser)
    if operand is not None and operand.outliers is not None:
        rounded = rounded.index_copy(1, operand.outliers, layer.weight[:, operand.outliers])
    return rounded
