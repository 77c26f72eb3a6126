"""The machine's own limits, measured: fp32 multiply-adds per second and bytes read per second."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from planish.errors import TargetError, ToolchainError
from planish.targets import host_isa_levels

# Well beyond any last-level cache share, so that memory is measured.
_READ_MIB = 1024


@dataclass(frozen=True)
class Probe:
    """A compiled measuring program; see ``limits.c`` for what it measures and how."""

    program: Path
    threads: int

    def fma(self, isa: str, seconds: float = 0.5) -> float:
        """fp32 GFLOP/s of register-only multiply-adds; ``isa`` is ``"avx512"`` or ``"avx2"``."""
        return self._run("fma", isa, str(self.threads), str(seconds))

    def read(self, seconds: float = 1.0, mib: int = _READ_MIB) -> float:
        """GB/s (10^9 bytes) read from ``mib`` mebibytes of memory."""
        return self._run("read", str(self.threads), str(seconds), str(mib))

    def _run(self, *args: str) -> float:
        done = subprocess.run([str(self.program), *args], capture_output=True, text=True, check=False)
        if done.returncode == 3:
            raise TargetError(f"limits {' '.join(args)}: this processor lacks the instructions")
        if done.returncode != 0:
            raise ToolchainError(f"limits {' '.join(args)} exited with {done.returncode}", why=done.stderr.strip())
        return float(done.stdout)


@contextmanager
def probe(threads: int) -> Generator[Probe]:
    """Compile the measuring program into a temporary folder, which goes when the context ends.

    Raises:
        ToolchainError: there is no C compiler, or it failed.
    """
    with tempfile.TemporaryDirectory(prefix="planish-limits-") as folder:
        program = Path(folder, "limits")
        with resources.as_file(resources.files("planish.bench") / "limits.c") as source:
            command = [*_compiler(), "-O3", "-pthread", "-o", str(program), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ToolchainError("limits.c does not compile", where=" ".join(command), why=done.stderr.strip())
        yield Probe(program, threads)


def measure(tool: Probe) -> dict[str, float]:
    """FMA GFLOP/s for each instruction set this processor has, and ``read``: GB/s from memory."""
    return {isa: tool.fma(isa) for isa in host_isa_levels()} | {"read": tool.read()}


def combine(*runs: dict[str, float]) -> dict[str, Any]:
    """The limits object of the JSON from measurements before and after the timings: the higher of each counts.

    Returns:
        ``fma_gflops`` at the widest instruction set, which ``isa`` names; ``read_gbs``; ``fma_gflops_by_isa``; and
        ``fma_gflops_runs``, whose spread shows how steady the machine was.
    """
    best = {key: max(run[key] for run in runs) for key in runs[0]}
    read = best.pop("read")
    widest = list(best)[-1]
    return {
        "fma_gflops": best[widest],
        "read_gbs": read,
        "isa": widest,
        "fma_gflops_by_isa": best,
        "fma_gflops_runs": [run[widest] for run in runs],
    }


def _compiler() -> list[str]:
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    raise ToolchainError(
        "no C compiler found, so the machine's limits cannot be measured",
        why="none of cc, gcc, clang is on PATH and the ziglang package is not installed",
        fix='install gcc, or pip install "planish[arm]" for the ziglang compiler',
    )
