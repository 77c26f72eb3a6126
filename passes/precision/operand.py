"""How the input of a layer becomes codes: which channels stay fp32, what evens out the others, and the scale."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from planish.formats import LARGEST_CODE, Format, quantise, round_rows
from planish.passes.precision.calibration import SAMPLE, Channels

LIMITS = tuple(2 ** (-i / 2) for i in range(1, 17))
"""Parts of the largest channel's range that are tried as the limit of all channels."""

HEADROOM = 2.0
"""The limit is at least this many times the median channel's range: what is larger than in calibration is clipped, and
if every channel filled the range, one always would be."""


@dataclass(frozen=True, eq=False)
class Operand:
    """What calibration says of a value that some layers read.

    Attributes:
        channels: statistics of its last axis.
        outliers: channels that stay fp32, int64 [C] in order; None for none.
        equaliser: what channels are multiplied by, and weights divided, fp32 [K]; None to leave them as they are.
    """

    channels: Channels
    outliers: Tensor | None = None
    equaliser: Tensor | None = None

    @property
    def scale(self) -> float:
        """Of all rows: the largest value that became codes in calibration, over 127."""
        even = self._without_outliers(self.channels.largest * self._factors)
        return float(even.max().clamp_min(torch.finfo(torch.float32).tiny * LARGEST_CODE)) / LARGEST_CODE

    def bare(self, *, moments: bool = False) -> Operand:
        """Without the sample of the data, and without moments unless they are asked for."""
        channels = replace(self.channels, parts=[], moments=self.channels.moments if moments else None)
        return replace(self, channels=channels)

    @property
    def _factors(self) -> Tensor:
        return torch.ones(len(self.channels.largest)) if self.equaliser is None else self.equaliser

    def _without_outliers(self, x: Tensor) -> Tensor:
        return x if self.outliers is None else x.index_fill(-1, self.outliers, 0.0)

    @staticmethod
    def of(channels: Channels, weight: Tensor, form: Format, outliers: int, *, equalise: bool) -> Operand:
        """Choose outliers and equaliser.

        With equalisation, channels whose range exceeds a limit are scaled down to it, and their weights up: the limit
        is that of least error, or none. The outliers are then those whose range times weight is largest.

        Args:
            channels: statistics of the value.
            weight: what its channels are multiplied by, [products, K].
            form: of weight and value.
            outliers: how many channels stay fp32.
            equalise: whether to even out the others.
        """
        largest, weights = channels.largest, weight.abs().amax(0)
        kept = None
        if outliers:
            size = largest * weights if equalise else largest
            kept = size.topk(min(outliers, len(size))).indices.sort().values
        plain = Operand(channels, kept)
        if not equalise:
            return plain
        ranges = plain._without_outliers(largest)
        limits = [part * float(ranges.max()) for part in LIMITS]
        limits = [limit for limit in limits if limit >= HEADROOM * float(ranges.median()) > 0]
        tried = [plain, *(replace(plain, equaliser=(limit / largest).clamp_max(1.0)) for limit in limits)]
        some = weight[:: -(-len(weight) // SAMPLE)]
        return min(tried, key=lambda operand: operand._error(some, form))

    def _error(self, weight: Tensor, form: Format) -> float:
        """Expected square error of the products, rounding errors of x and weight taken as independent.

        ``sum_k E[dx_k^2] sum_n w_nk^2 + E[x_k^2] sum_n dw_nk^2``, over the sample of calibration (AQAS: both count).
        With a static scale, dx has what one half of the batches would clip of the other's largest values, once each.
        """
        even = self._factors
        x = self._without_outliers(self.channels.sample * even)
        rounded = round_rows(x, form, self.scale if form.activation == "a8-static" else None)
        of_x = ((x - rounded) / even).square().mean(0)
        if form.activation == "a8-static" and self.channels.halves.amax(1).min() > 0:
            halves = self._without_outliers(self.channels.halves * even)
            clipped = (halves.flip(0) - halves.amax(1, keepdim=True)).clamp_min(0.0) / even
            of_x = of_x + 2 * clipped.square().mean(0) / self.channels.rows
        inner = self._without_outliers(weight / even)
        of_weight = (inner - quantise(inner, form.weight).dequantise()).square().sum(0)
        return float((of_x * weight.square().sum(0) + x.square().mean(0) * of_weight).sum())
