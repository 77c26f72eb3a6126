"""The two builds of ours that the encoder's benchmarks set against each other: with and without padding."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from planish.budget import Budget
from planish.models.base import Batch, LoadedModel
from planish.passes import default_pipeline
from planish.passes.precision import QuantizeUniform

W6 = QuantizeUniform("w6a8-g32")

PADDED, PACKED = "planish-fp32-padded", "planish-fp32-packed"
"""Rows of the build that computes on padding, and of the default build, whose ``remove-padding`` drops it."""

INTEGER: dict[str, dict[str, Any]] = {
    "planish-int8": {"target": "cpu-int8"},
    "planish-int4": {"target": "cpu-int4"},
    "planish-w6a8": {"target": "cpu-int8", "passes": default_pipeline(W6)},
}
"""Builds on integer codes, without calibration, and how they are compiled."""

MIXED = "planish-mixed"
MIXED_BUDGET = Budget(bits=5.5)
"""Formats chosen layer by layer, on documents after those that are timed."""

TIMED_DOCUMENTS, CALIBRATION_DOCUMENTS, ROWS = 64, 48, 16

STATIC = "w8a8-static"

IMAGES: dict[str, QuantizeUniform] = {
    "int8": QuantizeUniform(STATIC, head=STATIC, equalise="none"),
    "int8-evened": QuantizeUniform(STATIC, head=STATIC, equalise="all"),
    "int8-tensor": QuantizeUniform(STATIC, head=STATIC, per_tensor=True, equalise="none"),
    "int8-tensor-evened": QuantizeUniform(STATIC, head=STATIC, per_tensor=True, equalise="all"),
}
"""Builds of a model of images on 8-bit codes: a scale for each output channel or one for all, evened out or not."""

CALIBRATION_IMAGES = 8

REMOVES_PADDING = "remove-padding"


def compile_padded(compile_model: Callable[..., Any], loaded: LoadedModel) -> Any:
    """The model compiled by every pass of the default pipeline but ``remove-padding``."""
    passes = [name for name in default_pipeline() if name != REMOVES_PADDING]
    return compile_model(loaded.model, loaded.inputs, dynamic=loaded.dynamic, passes=passes)


def compile_integer(compile_model: Callable[..., Any], loaded: LoadedModel) -> dict[str, Any]:
    """The model in each of ``INTEGER``'s builds, and in formats chosen layer by layer."""
    inputs, dynamic = loaded.inputs, loaded.dynamic
    found = {name: compile_model(loaded.model, inputs, dynamic=dynamic, **how) for name, how in INTEGER.items()}
    how = {"budget": MIXED_BUDGET, "calibration": calibration_batches(loaded)}
    return {**found, MIXED: compile_model(loaded.model, inputs, dynamic=dynamic, **how)}


def calibration_batches(loaded: LoadedModel) -> list[Batch]:
    """Documents after those that are timed, in batches."""
    return loaded.data.batches(TIMED_DOCUMENTS + CALIBRATION_DOCUMENTS, ROWS)[TIMED_DOCUMENTS // ROWS :]


def compile_images(compile_model: Callable[..., Any], loaded: LoadedModel) -> dict[str, Any]:
    """The model in each of ``IMAGES``'s builds, calibrated on its first images."""
    data = loaded.data.batches(CALIBRATION_IMAGES, CALIBRATION_IMAGES)
    found: dict[str, Any] = {}
    for name, quantize in IMAGES.items():
        passes = default_pipeline(quantize)
        how = {"dynamic": loaded.dynamic, "passes": passes, "calibration": data}
        found[f"planish-{name}"] = compile_model(loaded.model, loaded.inputs, **how)
    return found


def compile_twice(compile_model: Callable[..., Any], loaded: LoadedModel) -> tuple[Any, dict[str, float]]:
    """The compiled model, with the seconds of compiling it (export included) and of doing the same again."""
    seconds: list[float] = []
    compiled = None
    for _ in range(2):
        start = time.perf_counter()
        compiled = compile_model(loaded.model, loaded.inputs, dynamic=loaded.dynamic)
        seconds.append(time.perf_counter() - start)
    return compiled, {"compile_s": seconds[0], "second_compile_s": seconds[1]}
