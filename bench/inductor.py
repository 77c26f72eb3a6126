"""The inductor contender: the faster of its default and its freezing mode."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from planish.bench.latency import interleave
from planish.models.base import Batch


@dataclass(frozen=True)
class Inductor:
    """The compiled model to call, which mode won, and the median ms of each mode in the trial."""

    call: Callable[..., Any]
    mode: str
    trial_ms: dict[str, float]


def build(model: torch.nn.Module, batches: Sequence[Batch]) -> Inductor | str:
    """Compile with ``torch.compile(dynamic=True)`` in both modes and keep the faster.

    Call it in inference mode: freezing is refused elsewhere.

    Returns:
        The contender, or the reason why there is none: no C++ compiler, or inductor failed on this model.
    """
    cxx = os.environ.get("CXX", "g++")
    if shutil.which(cxx) is None:
        return f"no C++ compiler: {cxx!r} is not on PATH (run `make deps` as root, or install g++)"
    torch.compiler.reset()  # code that was compiled for too many models already would run in eager
    torch_compile = cast("Callable[..., Callable[..., Any]]", torch.compile)  # pyright: ignore[reportUnknownMemberType]
    modes = {
        "default": torch_compile(model, dynamic=True),
        "freezing": torch_compile(model, dynamic=True, options={"freezing": True}),
    }
    calls = {mode: run_all(call, batches) for mode, call in modes.items()}
    try:
        times = interleave(calls, rounds=3)
    except (TorchDynamoException, CppCompileError, InvalidCxxCompiler) as error:
        return f"inductor failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    trial = {mode: statistics.median(ms) for mode, ms in times.items()}
    winner = min(trial, key=lambda mode: trial[mode])
    return Inductor(modes[winner], winner, trial)


def run_all(call: Callable[..., Any], batches: Sequence[Batch]) -> Callable[[], None]:
    """One round: the call on every batch in turn."""

    def run() -> None:
        for batch in batches:
            call(**batch)

    return run
