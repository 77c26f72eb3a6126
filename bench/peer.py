"""CTranslate2 as a contender: the one other engine for the CPU that removes padding; optional, in its own process.

Its process takes part in the interleaved rounds: the others wait while it runs. It gets the same token ids, as arrays
with the lengths of the rows, and the same number of threads; the time of a round holds one line each way.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from planish.bench.latency import interleave
from planish.bench.memory import ChildError
from planish.models.base import Batch, LoadedModel

CTRANSLATE2, CTRANSLATE2_INT8 = "ctranslate2-fp32", "ctranslate2-int8"

COMPUTE = {CTRANSLATE2: "float32", CTRANSLATE2_INT8: "int8_float32"}
"""What it calls the type of the weights."""

LIBRARIES = {"onednn": "0", "mkl": "1"}
"""Which library its GEMMs come from, and the CT2_USE_MKL that asks for it. Its own choice on processors that are not
Intel's is the first, and often the slower."""

SETTLE = 0.03
"""Seconds between two calls while a peer takes part: OpenMP's threads spin for some 10 ms after a call, here on cores
that the other process then needs. Without it whoever ran after the peer took 5 to 7 ms longer."""

_MESSAGES = "stderr.txt"


@dataclass(frozen=True)
class Child:
    """A process with the model loaded, see ``planish.bench.peer_process``; its files are in ``folder``."""

    process: subprocess.Popen[str]
    folder: Path

    def ask(self, command: str, argument: object) -> dict[str, Any]:
        """Send one command and wait for its answer; raises ChildError as ``answer`` does."""
        with suppress(BrokenPipeError):  # the child has ended: `answer` says so, with its messages
            print(json.dumps({command: argument}), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The child's next line.

        Raises:
            ChildError: it ended instead; the message holds the end of what it wrote to stderr.
        """
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            messages = (self.folder / _MESSAGES).read_text(errors="replace").strip()
            raise ChildError(f"the process ended with {self.process.wait()}", why=messages[-2000:])
        return json.loads(line)


@dataclass
class Peer:
    """CTranslate2 with the batches it was given last, on the library that is faster on them.

    Attributes:
        children: a process for each of ``LIBRARIES``.
        version: of CTranslate2.
        library: the one that runs.
        trial_ms: median ms of each in the trial.
    """

    children: dict[str, Child] = field(repr=False)
    version: str
    library: str = next(iter(LIBRARIES))
    trial_ms: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def mode(self) -> dict[str, Any]:
        """What ran: version, library and the times of the trial."""
        return {"version": self.version, "mode": self.library, "trial_ms": self.trial_ms}

    def load(self, batches: Sequence[Batch]) -> None:
        """Take the batches that the next calls of ``run`` and ``outputs`` are about, and try both libraries on them.

        Raises:
            ValueError: the valid tokens of a row do not stand left in it.
            ChildError: a process failed.
        """
        arrays: dict[str, Any] = {}
        for i, batch in enumerate(batches):
            mask = batch["attention_mask"]
            lengths = mask.sum(1)
            if not torch.equal(mask.bool(), torch.arange(mask.shape[1]) < lengths[:, None]):
                raise ValueError(f"batch {i}: CTranslate2 takes lengths, so valid tokens must stand left")
            arrays[f"ids{i}"] = batch["input_ids"].int().numpy()
            arrays[f"lengths{i}"] = lengths.int().numpy()
        for child in self.children.values():
            file = child.folder / "batches.npz"
            np.savez(file, **arrays)
            child.ask("load", str(file))
        times = interleave({lib: partial(c.ask, "run", True) for lib, c in self.children.items()}, rounds=3)
        self.trial_ms = {lib: statistics.median(ms) for lib, ms in times.items()}
        self.library = min(self.trial_ms, key=lambda lib: self.trial_ms[lib])

    def run(self) -> None:
        """One round: every batch once."""
        self.children[self.library].ask("run", True)

    def outputs(self) -> list[torch.Tensor]:
        """Token states [rows, seq, width] of each batch."""
        child = self.children[self.library]
        file = child.folder / "outputs.npz"
        child.ask("save", str(file))
        with np.load(file) as arrays:
            return [torch.tensor(arrays[f"out{i}"]) for i in range(len(arrays))]


@contextmanager
def ctranslate2(loaded: LoadedModel, threads: int, kind: str = CTRANSLATE2) -> Generator[Peer | str]:
    """CTranslate2 with the model's weights, or the reason why there is none.

    Args:
        loaded: the model; its ``folder`` is converted.
        threads: of CTranslate2.
        kind: a key of ``COMPUTE``.
    """
    if importlib.util.find_spec("ctranslate2") is None:
        yield "package ctranslate2 is not installed (pip install 'planish[peers]')"
        return
    if loaded.folder is None:
        yield f"model {loaded.name!r} has no checkpoint that CTranslate2 could convert"
        return
    with tempfile.TemporaryDirectory(prefix="planish-peer-") as name, ExitStack() as stack:
        folder = Path(name)
        try:
            _convert(loaded.folder, folder / "model")
            children = {lib: stack.enter_context(_serving(folder, lib, threads, COMPUTE[kind])) for lib in LIBRARIES}
            versions = [child.answer()["version"] for child in children.values()]
        except ChildError as error:
            found: Peer | str = f"CTranslate2 failed: {str(error).splitlines()[-1].strip()}"
        else:
            found = Peer(children, versions[0])
        yield found


def _convert(source: Path, target: Path) -> None:
    command = [sys.executable, "-m", "planish.bench.peer_process", "convert", str(source), str(target)]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        raise ChildError(f"conversion exited with {done.returncode}", why=done.stderr.strip()[-2000:])


@contextmanager
def _serving(folder: Path, library: str, threads: int, compute: str) -> Generator[Child]:
    """A child that loads the converted model and then says so; it ends with the block."""
    own = folder / library
    own.mkdir()
    command = [
        sys.executable,
        "-m",
        "planish.bench.peer_process",
        "serve",
        str(folder / "model"),
        str(threads),
        compute,
    ]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "CT2_USE_MKL": LIBRARIES[library]}
    pipe = subprocess.PIPE
    with (
        (own / _MESSAGES).open("w") as messages,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=messages, text=True, env=env) as process,
    ):
        try:
            yield Child(process, own)
        finally:
            process.kill()
            with suppress(BrokenPipeError):  # a command that was never read
                cast("IO[str]", process.stdin).close()
