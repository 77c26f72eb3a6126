"""The families benchmark: which families of transformers compile to one native function and agree with eager.

Each family is compiled and checked by ``planish.bench.family`` in a process of its own, so that a crash or an endless
compile is a row with its reason.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from planish.bench.memory import ChildError
from planish.bench.result import machine, write_json
from planish.models.families import family

LEVELS = ("batch+seq", "batch", "static")
"""Which dims are dynamic, in the order tried: a family keeps the first that torch.export can capture."""

TIME_LIMIT = 600.0
"""Seconds for one family; generous, as other work on the machine must not decide a row."""

PROCESSES = 2
"""Families checked at once: each takes 1 to 2 GB."""


@dataclass(frozen=True)
class Reason:
    """Why a family is not native, does not match, or is less dynamic than it could be.

    Attributes:
        error: class of the error; ``TorchOp`` for an op that torch computed during the call.
        phase: what was being done: build, eager, compile (with the level that did not export), run.
        message: what the error says.
        op: the op it concerns, if one.
        nodes: how many nodes of the graph it concerns.
        where: line of the model that made the first of them.
    """

    error: str
    phase: str
    message: str
    op: str | None = None
    nodes: int = 1
    where: str = ""


@dataclass
class FamilyRow:
    """What became of one family.

    Attributes:
        name: the family.
        kind: encoder, decoder, moe, seq2seq, audio, multimodal or vision.
        dynamic: a member of ``LEVELS``; None if it could not be captured.
        native_share: ops inside the native function over the graph's ops after ``canonicalize``; 0 without one.
        match: every float output is within 1e-4 of eager's, relative to its largest value, and the others are equal.
        max_rel_err: the largest such error; None if nothing ran, or if it is infinite.
        compile_s: seconds of compiling beyond torch.export.
        export_s: seconds inside torch.export.
        reasons: why any of this is less than it could be.
    """

    name: str
    kind: str
    dynamic: str | None = None
    native_share: float = 0.0
    match: bool = False
    max_rel_err: float | None = None
    compile_s: float | None = None
    export_s: float | None = None
    reasons: list[Reason] = field(default_factory=list[Reason])

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> FamilyRow:
        """The row that ``to_dict`` wrote."""
        row = FamilyRow(**values)
        row.reasons = [Reason(**reason) for reason in values["reasons"]]
        return row


@dataclass(frozen=True)
class FamiliesResult:
    """A run over several families."""

    rows: list[FamilyRow]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        rows = [row.to_dict() for row in self.rows]
        return {"bench": "families", "machine": machine(), "threads": 1, "rows": rows, "summary": self.summary()}

    def summary(self) -> dict[str, Any]:
        """How many families are native, match and are dynamic, and what keeps how many of the others from it."""
        blockers = Counter(b for row in self.rows for b in {r.op or r.error for r in row.reasons if _blocks(r)})
        return {
            "families": len(self.rows),
            "native": sum(row.native_share == 1.0 for row in self.rows),
            "native_and_match": sum(row.native_share == 1.0 and row.match for row in self.rows),
            "dynamic": dict(Counter(row.dynamic or "not captured" for row in self.rows)),
            "blocked_by": dict(sorted(blockers.items(), key=lambda item: (-item[1], item[0]))),
        }

    def write(self, path: Path) -> None:
        """Write the JSON file."""
        write_json(path, self.to_dict())


def _blocks(reason: Reason) -> bool:
    """Whether it keeps the family from compiling; a dim that torch.export fixes only makes it less dynamic."""
    return reason.error != "CaptureError" or reason.phase == f"compile {LEVELS[-1]}"


def run(names: Sequence[str], done: Callable[[FamilyRow], None]) -> FamiliesResult:
    """Check families, ``PROCESSES`` at a time.

    Args:
        names: families of ``planish.models.families``, in the order of the rows.
        done: told each row as soon as it is there, from another thread.
    """

    def one(name: str) -> FamilyRow:
        row = check_in_child(name)
        done(row)
        return row

    with ThreadPoolExecutor(PROCESSES) as pool:
        return FamiliesResult(list(pool.map(one, names)))


def check_in_child(name: str, time_limit: float = TIME_LIMIT) -> FamilyRow:
    """The row of one family from a fresh process; a crash or a timeout is a reason in it that names the phase."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(_command(name), capture_output=True, text=True, check=False, env=env, timeout=time_limit)
    except subprocess.TimeoutExpired as error:
        phase = _last(error.stdout, "phase") or "start"
        return _failed(name, TimeoutError.__name__, phase, f"not done after {time_limit:.0f} s")
    row = _last(done.stdout, "row")
    if row is not None:
        return FamilyRow.from_dict(row)
    end = " ".join(done.stderr.split())[-600:]
    return _failed(
        name, ChildError.__name__, _last(done.stdout, "phase") or "start", f"{_exit(done.returncode)}: {end}"
    )


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", "planish.bench.family", name]


def _failed(name: str, error: str, phase: str, message: str) -> FamilyRow:
    return FamilyRow(name, family(name).kind, reasons=[Reason(error, phase, message)])


def _exit(code: int) -> str:
    """What a return code says: the signal's name, or the status."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _last(output: str | bytes | None, key: str) -> Any:
    """The value of ``key`` in the last line of JSON that has it; other lines are what libraries print."""
    text = output.decode() if isinstance(output, bytes) else output or ""
    lines = [line for line in text.splitlines() if line.startswith(f'{{"{key}": ')]
    return json.loads(lines[-1])[key] if lines else None
