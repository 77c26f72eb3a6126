"""The two builds of ours that the encoder's benchmarks set against each other: with and without padding."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from planish.models.base import LoadedModel
from planish.passes import REGISTRY

PADDED, PACKED = "planish-fp32-padded", "planish-fp32-packed"
"""Rows of the build that computes on padding, and of the default build, whose ``remove-padding`` drops it."""

REMOVES_PADDING = "remove-padding"


def compile_padded(compile_model: Callable[..., Any], loaded: LoadedModel) -> Any:
    """The model compiled by every pass of the default pipeline but ``remove-padding``."""
    passes = [name for name in REGISTRY if name != REMOVES_PADDING]
    return compile_model(loaded.model, loaded.inputs, dynamic=loaded.dynamic, passes=passes)


def compile_twice(compile_model: Callable[..., Any], loaded: LoadedModel) -> tuple[Any, dict[str, float]]:
    """The compiled model, with the seconds of compiling it (export included) and of doing the same again."""
    seconds: list[float] = []
    compiled = None
    for _ in range(2):
        start = time.perf_counter()
        compiled = compile_model(loaded.model, loaded.inputs, dynamic=loaded.dynamic)
        seconds.append(time.perf_counter() - start)
    return compiled, {"compile_s": seconds[0], "second_compile_s": seconds[1]}
