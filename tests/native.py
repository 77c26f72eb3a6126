"""The targets whose code this machine runs."""

from __future__ import annotations

from planish.targets import TARGETS, host_isa_levels

NATIVE = [t for t in ("cpu-avx2", "cpu-avx512") if TARGETS[t].isa in host_isa_levels()]
