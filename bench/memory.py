"""Peak memory of loading, compiling and running a model, each contender in a process of its own.

The high-water mark is the kernel's ``VmHWM``. ``getrusage``'s ``ru_maxrss`` is no use here: Linux carries it
across exec, so a child of a large parent starts with the parent's peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planish.errors import PlanishError


class ChildError(PlanishError):
    """A measuring process failed."""

    code = "child"


def peak(contender: str, model: str, threads: int, docs: int) -> dict[str, int]:
    """Peak resident bytes of a fresh process that loads, compiles and runs.

    Args:
        contender: ``"planish"`` or ``"eager"``, which compiles nothing.
        model: name in ``planish.models``.
        threads: of torch and of the compiled model.
        docs: how many documents it runs over, in batches of 16.

    Returns:
        High-water marks in bytes so far, after each phase: ``after_load``, ``after_compile``, ``after_run``.

    Raises:
        ChildError: the process failed; the message holds the end of its output.
    """
    command = [sys.executable, "-m", "planish.bench.memory", contender, model, str(threads), str(docs)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        raise ChildError(f"{' '.join(command[2:])} exited with {done.returncode}", why=done.stderr.strip()[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def high_water_mark() -> int:
    """The largest resident size this process has had, in bytes.

    Raises:
        ChildError: the kernel does not say.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ChildError("/proc/self/status has no VmHWM", why="peak memory is read from Linux's own count")


def measure(contender: str, model: str, threads: int, docs: int) -> dict[str, int]:
    """The body of the child process; see :func:`peak`."""
    import torch

    import planish

    torch.set_num_threads(threads)
    loaded = planish.models.load(model)
    marks = {"after_load": high_water_mark()}
    call: Callable[..., Any] = loaded.model
    if contender == "planish":
        call = planish.compile(loaded.model, loaded.inputs, dynamic=loaded.dynamic)
    marks["after_compile"] = high_water_mark()
    with torch.inference_mode():
        for batch in loaded.data.batches(docs):
            call(**batch)
    marks["after_run"] = high_water_mark()
    return marks


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
