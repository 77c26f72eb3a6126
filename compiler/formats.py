"""Number formats as data: how a weight or an activation is stored, what that costs in bytes, and its reference.

A weight [N, K] is stored as unsigned codes with a scale and a minimum for each group of consecutive input features of
an output feature: ``w = scale * code + minimum``. A symmetric format keeps no minimum: it is ``-scale * 2^(bits-1)``.
Scales of a symmetric format's groups are small integers times one fp32 number per output feature (below 8 bits), so
that the sums of all groups add up as integers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from planish.errors import UnknownNameError

BITS = (8, 6, 5, 4, 3, 2)
"""Bits of a weight's code."""

GROUPS = (32, 64, 128)
"""Input features that share a scale; None, for all of an output feature, is a group too."""

ACTIVATIONS = ("fp", "a8", "a8-static", "a8-group")
"""fp32; int8 with a scale for each row, found when it is computed; int8 with one scale, found by calibration; int8 with
a scale for each of the weight's groups of a row, found when it is computed."""

LARGEST_CODE = 127
"""Of an activation: -128 is left out, so that a code and its negative both exist."""


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored.

    Attributes:
        bits: of a code.
        group: input features that share a scale; None for one scale per output feature.
        symmetric: whether the codes' middle, 2^(bits-1), stands for 0.
    """

    bits: int
    group: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.group not in (*GROUPS, None):
            raise UnknownNameError(
                f"no weight format of {self.bits} bits with groups of {self.group}",
                fix=f"bits are one of {_listed(BITS)}; groups one of {_listed(GROUPS)}, or None for a whole row",
            )

    @property
    def name(self) -> str:
        """As in ``Format.parse``: ``w4-g32``, ``w8``, ``w4-g32-min``."""
        group = f"-g{self.group}" if self.group else ""
        return f"w{self.bits}{group}{'' if self.symmetric else '-min'}"

    @property
    def two_level(self) -> bool:
        """Whether scales are integers times a number per output feature: rounding them is less than a step of the codes
        then, but not of codes of 8 bits."""
        return self.symmetric and self.group is not None and self.bits < 8

    @property
    def scale_dtype(self) -> torch.dtype:
        """int8 at two levels, fp16 for other groups, as in GGUF, and fp32 where there is one per output feature."""
        return torch.int8 if self.two_level else torch.float16 if self.group else torch.float32

    def groups(self, depth: int) -> int:
        """Groups of ``depth`` input features; the last may be smaller."""
        return -(-depth // self.group) if self.group else 1

    def nbytes(self, features: int, depth: int) -> int:
        """Bytes of a weight [features, depth]: whole bytes of codes for each output feature, scales and minimums."""
        numbers = 1 if self.symmetric else 2
        scales = self.groups(depth) * numbers * self.scale_dtype.itemsize + (4 if self.two_level else 0)
        return features * (-(-depth * self.bits // 8) + scales)


FORMATS = tuple(WeightFormat(b, g, s) for b in BITS for g in (*GROUPS, None) for s in (True, False))
"""All of them."""


@dataclass(frozen=True)
class Format:
    """Formats of a layer's weight and of its input; ``activation`` is one of ``ACTIVATIONS``."""

    weight: WeightFormat
    activation: str = "a8"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UnknownNameError(f"no activation format {self.activation!r}", fix=f"use {_listed(ACTIVATIONS)}")
        if self.by_group and (self.weight.group is None or self.weight.two_level):
            raise UnknownNameError(
                f"activations of {self.weight.name} have no scale for each group",
                why="groups of a symmetric format below 8 bits add up as integers before they are scaled",
                fix="use a format with groups and minimums, or of 8 bits: w4a8-g32-min-group, w8a8-g32-group",
            )

    @property
    def by_group(self) -> bool:
        """Whether each group of a row has a scale of its own."""
        return self.activation == "a8-group"

    @property
    def name(self) -> str:
        """``w4a8-g32``, ``w8a8-static``, ``w4a8-g32-min-group``, ``w4-g32`` (fp32 activations)."""
        head, _, rest = self.weight.name.partition("-")
        middle, _, how = self.activation.partition("-")
        middle, tail = middle.removeprefix("fp"), [how] if how else []
        return "-".join([head + middle, *([rest] if rest else []), *tail])

    @staticmethod
    def parse(name: str) -> Format:
        """The format that a name stands for: ``wBITS[a8][-gGROUP][-min][-static|-group]``.

        Raises:
            UnknownNameError: the name has another form, or there is no such format.
        """
        found = re.fullmatch(r"w(\d)(a8)?(?:-g(\d+))?(-min)?(-static|-group)?", name)
        if found is None or (found[5] and not found[2]):
            raise UnknownNameError(
                f"no format {name!r}",
                fix="write wBITS, a8 for int8 activations, -gGROUP, -min, and -static or -group: "
                "w4a8-g32, w8a8-static, w4-g128",
            )
        weight = WeightFormat(int(found[1]), int(found[3]) if found[3] else None, symmetric=not found[4])
        return Format(weight, f"a8{found[5] or ''}" if found[2] else "fp")


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))


@dataclass(frozen=True)
class Quantized:
    """A weight in a format: ``codes`` uint8 [N, K], ``scales`` and ``minimums`` [N, groups] in the format's dtype.

    ``minimums`` is None for a symmetric format, ``channels``, fp32 [N], for one whose scales have one level.
    """

    format: WeightFormat
    codes: Tensor
    scales: Tensor
    minimums: Tensor | None
    channels: Tensor | None

    @property
    def stored(self) -> dict[str, Tensor | None]:
        """What there is to keep, in the order of ``planish::quantized_linear``."""
        return {"codes": self.codes, "scales": self.scales, "minimums": self.minimums, "channels": self.channels}

    def dequantise(self) -> Tensor:
        """The weight that the codes stand for, fp32 [N, K]."""
        depth = self.codes.shape[1]
        step, lowest = (spread(t, self.format, depth) for t in (self.steps(), self.lowest()))
        return self.codes.float() * step + lowest

    def steps(self) -> Tensor:
        """Distance of two codes, fp32 [N, groups]."""
        return self.scales.float() if self.channels is None else self.scales.float() * self.channels[:, None]

    def lowest(self) -> Tensor:
        """What code 0 stands for, fp32 [N, groups]."""
        if self.minimums is not None:
            return self.minimums.float()
        return self.steps() * -float(1 << (self.format.bits - 1))

    def rows(self, rows: slice) -> Quantized:
        """Some of the output features."""
        parts = {name: None if t is None else t[rows] for name, t in self.stored.items()}
        return replace(self, **parts)  # pyright: ignore


def quantise(weight: Tensor, form: WeightFormat, *, one_scale: bool = False) -> Quantized:
    """The nearest codes of a weight, with the scales that its extremes ask for.

    A symmetric group's extreme of larger magnitude gets code 0, whose value is one step further from 0 than the
    highest code's: with few bits that is a large part of the range (as GGUF's Q4_0 does; a scale may be negative).

    Args:
        weight: [N, K], finite.
        form: the format.
        one_scale: give all of the weight the scale that its extremes ask for.

    Raises:
        ValueError: the weight is no matrix, is empty, holds NaN or infinity, or needs scales beyond fp16.
    """
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"a weight to quantise is a matrix with elements, not {list(weight.shape)}")
    if not weight.isfinite().all():
        raise ValueError("the weight holds NaN or infinity")
    depth, group = weight.shape[1], form.group or weight.shape[1]
    grouped = torch.nn.functional.pad(weight.float(), (0, -depth % group), value=float("nan")).unflatten(1, (-1, group))
    low = grouped.nan_to_num(nan=float("inf")).amin(2)
    high = grouped.nan_to_num(nan=float("-inf")).amax(2)
    if one_scale:
        low, high = low.min().expand_as(low), high.max().expand_as(high)
    minimums = None
    if form.symmetric:
        scales = torch.where(high > -low, high, low) / -float(1 << (form.bits - 1))
    else:
        minimums = low.to(form.scale_dtype)
        scales = (high - minimums.float()) / float((1 << form.bits) - 1)
    held = with_steps(Quantized(form, torch.empty(0), scales, minimums, None), scales)
    if not (held.steps().isfinite().all() and held.lowest().isfinite().all()):
        raise ValueError("the weight's scales are too large for fp16: use a format with one scale for each row")
    return nearest(weight.float(), held)


def nearest(weight: Tensor, held: Quantized) -> Quantized:
    """The nearest codes of a weight, fp32 [N, K], with the scales and minimums of ``held``."""
    lowest, step = (spread(t, held.format, weight.shape[1]) for t in (held.lowest(), held.steps()))
    codes = ((weight - lowest) / step).nan_to_num(nan=0.0).round().clamp(0, (1 << held.format.bits) - 1)
    return replace(held, codes=codes.to(torch.uint8))


def with_steps(held: Quantized, steps: Tensor) -> Quantized:
    """The same codes with other distances of them, fp32 [N, groups], as the format stores them."""
    if not held.format.two_level:
        return replace(held, scales=steps.to(held.format.scale_dtype))
    channels = steps.abs().amax(1) / LARGEST_CODE
    scales = (steps / channels[:, None]).nan_to_num(nan=0.0).round()
    return replace(held, scales=scales.to(torch.int8), channels=channels)


def spread(numbers: Tensor, form: WeightFormat, depth: int) -> Tensor:
    """One number for each input feature from one for each group: [..., groups] to [..., depth]."""
    return numbers.repeat_interleave(form.group or depth, -1)[..., :depth]


def round_rows(x: Tensor, form: Format, scale: float | None = None) -> Tensor:
    """What codes of activations stand for, fp32 [..., K]: of each row, or its groups, or with the one scale."""
    if form.by_group:
        codes, scales = quantise_groups(x, form.weight.group or x.shape[-1])
        scales = spread(scales, form.weight, x.shape[-1])
    else:
        codes, scales = quantise_rows(x, scale)
    return codes.float() * scales


def quantise_groups(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """int8 codes of activations [..., K], and the scale of each group of a row, fp32 [..., groups]; see the next."""
    depth = x.shape[-1]
    grouped = torch.nn.functional.pad(x.float(), (0, -depth % group)).unflatten(-1, (-1, group))
    codes, scales = quantise_rows(grouped)
    return codes.flatten(-2)[..., :depth], scales[..., 0]


def quantise_rows(x: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """int8 codes of activations, and the scale of each row: ``x ~ codes * scale``.

    Rows of less than ``TINY`` are zeros. A row with NaN or infinity has a NaN as scale, so all that follows is NaN.

    Args:
        x: [..., K].
        scale: of all rows, from calibration; None to take each row's largest magnitude over 127.

    Returns:
        codes int8 [..., K] in -127..127, and scales fp32 [..., 1].
    """
    x = x.float()
    if scale is None:
        top = x.abs().amax(-1, keepdim=True)
        scales = top / LARGEST_CODE
        # not LARGEST_CODE / top: PyTorch rounds the reciprocal first
        inverse = torch.where(top > TINY, torch.full_like(top, LARGEST_CODE) / top, 0.0)
    else:
        scales = torch.full((*x.shape[:-1], 1), scale)
        inverse = 1.0 / scales
    codes = (x * inverse).round().nan_to_num(nan=0.0).clamp(-LARGEST_CODE, LARGEST_CODE)
    finite = x.isfinite().all(-1, keepdim=True)
    return codes.to(torch.int8), torch.where(finite, scales, float("nan"))


TINY = 1e-36
"""Largest magnitude of a row that counts as zeros: the inverse of its scale would not be a number."""
