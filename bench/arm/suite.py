"""The benchmark of code for ARM: tiles at every level, and whole models as bundles under qemu."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from planish.bench.arm.models import MODELS, measure_model
from planish.bench.arm.tiles import COLUMNS, DEPTH, measure_plain, measure_tile
from planish.bench.result import BenchResult
from planish.errors import UnknownNameError

CPUS = {
    "armv8-dotprod": ("neoverse-n1", "cortex-a55", "neoverse-n2"),
    "armv8-i8mm": ("neoverse-n2",),
    "armv8": ("cortex-a53", "cortex-a72"),
    "armv7": ("cortex-a57",),
}
"""Level to the processors whose cycles are modelled. LLVM has no model of a Cortex-A7, and takes a Cortex-A76 for a
much older one: what holds for neoverse-n1 holds for that."""

FORMATS = ("w4a8-g32", "w4a8-g128", "w2a8-g32", "w2a8-g128", "w8a8")
OTHERS = ("w6a8-g32", "w5a8-g32", "w3a8-g32")
"""Measured at the usual level only."""

TARGET = "arm-int4"

ROWS = {"armv7": (1, 2), "armv8": (1, 2, 4)}


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        threads: of PyTorch; counted code runs in one.
        rounds: not used, nothing is timed.
        only: levels or models; all if empty.
    """

    threads: int
    rounds: int = 0
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = (*CPUS, *MODELS)
        for name in self.only:
            if name not in known:
                raise UnknownNameError(f"no level or model {name!r} in this benchmark", fix="use: " + ",".join(known))


def run(options: Options, compile_model: Callable[..., Any], log: Callable[[str], None]) -> BenchResult:
    """Run the benchmark.

    Args:
        options: what to run.
        compile_model: ``planish.compile``.
        log: told the name of each phase.

    Raises:
        ToolchainError: a cross compiler, qemu or llvm-mca is missing.
    """
    torch.set_num_threads(options.threads)
    kernels, models = list[Any](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="planish-arm-") as folder:
        for level, cpus in CPUS.items():
            if options.only and level not in options.only:
                continue
            log(f"tiles of {level}")
            for form in (*FORMATS, *(OTHERS if level == "armv8-dotprod" else ())):
                for rows in ROWS.get(level, (1, 2, 4, 8)):
                    kernels.append(measure_tile(form, level, rows, cpus, Path(folder) / "tile"))
            kernels.append(measure_plain(level, cpus, Path(folder) / "tile"))
        for name in MODELS:
            if options.only and name not in options.only:
                continue
            log(f"{name} as a bundle, under qemu")
            models.append(asdict(measure_model(name, TARGET, compile_model, Path(folder) / "bundle")))
    method = (
        f"cycles are modelled by llvm-mca, not timed on silicon: K={DEPTH}, N={COLUMNS}, 6,000 executed instructions "
        "from 40 % on, all data in the first-level cache; code is tuned for each processor"
    )
    return BenchResult("arm", options.threads, {}, [], kernels, [], {"models": models, "method": method})
