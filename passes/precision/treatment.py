"""How a layer is computed: its format and how many input channels stay fp32."""

from __future__ import annotations

import re
from dataclasses import dataclass

from planish.errors import UnknownNameError
from planish.formats import Format

FP32 = "fp"
"""The treatment that leaves a layer as it is."""


@dataclass(frozen=True)
class Treatment:
    """One way to compute a layer.

    Attributes:
        format: of weight and input; None for fp32.
        outliers: input channels that stay fp32 (LLM.int8).
    """

    format: Format | None = None
    outliers: int = 0

    @property
    def name(self) -> str:
        """``fp``, ``w4a8-g32``, ``w8a8+8`` (with 8 outliers)."""
        if self.format is None:
            return FP32
        return self.format.name + (f"+{self.outliers}" if self.outliers else "")

    @staticmethod
    def parse(name: str) -> Treatment:
        """The treatment that a name stands for.

        Raises:
            UnknownNameError: there is none of that name.
        """
        if name == FP32:
            return Treatment()
        found = re.fullmatch(r"(.*?)(?:\+([1-9]\d*))?", name)
        if found is None:
            raise UnknownNameError(
                f"no treatment {name!r}", fix='write "fp", a format, or a format and outliers: w8a8+8'
            )
        return Treatment(Format.parse(found[1]), int(found[2] or 0))

    def nbytes(self, features: int, depth: int) -> int:
        """Bytes of a layer's weight [features, depth]: with outliers, their indices and weights in fp32 too."""
        if self.format is None:
            return 4 * features * depth
        outliers = min(self.outliers, depth)
        return self.format.weight.nbytes(features, depth) + outliers * (4 * features + 8)
