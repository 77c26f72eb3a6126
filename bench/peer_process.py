"""CTranslate2 in a process of its own: what each of its two uses runs, see ``planish.bench.peer``.

Neither torch nor a model is loaded here for the timed use, so that no other library's threads take part. Commands come
as one JSON object a line, and each is answered by one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np


def convert(folder: str, target: str) -> None:
    """Convert a checkpoint of transformers to CTranslate2's format in fp32."""
    converters: Any = import_module("ctranslate2.converters")
    converters.TransformersConverter(folder).convert(target)


def serve(model: str, threads: int, compute: str) -> None:
    """Load a converted encoder and answer commands until the input ends.

    ``{"load": FILE}`` takes batches from an npz file, ``ids0``, ``lengths0``, ``ids1`` and so on; ``{"run": true}``
    runs each once and answers with the milliseconds; ``{"save": FILE}`` writes their token states ``out0``, ``out1``.
    ``compute`` is the type of its weights, ``float32`` or ``int8_float32``.
    """
    library: Any = import_module("ctranslate2")
    encoder = library.Encoder(model, device="cpu", compute_type=compute, inter_threads=1, intra_threads=threads)
    batches: list[tuple[Any, Any]] = []

    def load(file: str) -> dict[str, Any]:
        with np.load(file) as arrays:
            views = {name: library.StorageView.from_array(arrays[name].copy()) for name in arrays}
        batches[:] = [(views[f"ids{i}"], views[f"lengths{i}"]) for i in range(len(views) // 2)]
        return {"batches": len(batches)}

    def run(_: bool) -> dict[str, Any]:
        start = time.perf_counter_ns()
        for ids, lengths in batches:
            encoder.forward_batch(ids, lengths)
        return {"ms": (time.perf_counter_ns() - start) / 1e6}

    def save(file: str) -> dict[str, Any]:
        states = [np.array(encoder.forward_batch(*batch).last_hidden_state) for batch in batches]
        named: dict[str, Any] = {f"out{i}": array for i, array in enumerate(states)}
        np.savez(file, **named)
        return {"saved": len(states)}

    commands: dict[str, Callable[[Any], dict[str, Any]]] = {"load": load, "run": run, "save": save}
    print(json.dumps({"version": library.__version__}), flush=True)
    for line in sys.stdin:
        ((name, argument),) = json.loads(line).items()
        print(json.dumps(commands[name](argument)), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(sys.argv[2], sys.argv[3])
    else:
        serve(sys.argv[2], int(sys.argv[3]), sys.argv[4])
