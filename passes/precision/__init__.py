"""Number formats of layers: what their inputs look like, and which format each gets."""

from planish.passes.precision.mixed import QuantizeMixed
from planish.passes.precision.uniform import QuantizeUniform

__all__ = ["QuantizeMixed", "QuantizeUniform"]
