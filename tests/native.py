"""The targets whose code this machine runs."""

from __future__ import annotations

from planish.targets import TARGETS, Target, host_isa_levels

NATIVE = [t for t in ("cpu-avx2", "cpu-avx512") if TARGETS[t].isa in host_isa_levels()]

WEAKER = [t for t in NATIVE if TARGETS[t].isa != Target.host().isa]
"""Those whose code is not that of ``"cpu"``."""
