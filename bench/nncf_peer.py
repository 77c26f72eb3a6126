"""NNCF's mixed precision of weights, a greedy choice of two levels, to compare: `pip install nncf` into an environment
of its own, as it pins other packages' versions."""

from __future__ import annotations

import copy
import importlib.util
import logging
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from planish.passes.precision.loss import Loss
from planish.passes.precision.sensitivity import Sample

RATIOS = (1.0, 0.8, 0.5)
"""Parts of the layers that have 4 bits in groups of 32; the others have 8."""

WAYS = {"nncf": {}, "nncf, scales estimated": {"scale_estimation": True}}
"""What is done about errors, of what it can do with a PyTorch model."""

STORED = (torch.uint8, torch.int8, torch.float16)
"""What it keeps compressed weights and their scales in."""


def is_installed() -> bool:
    """Whether there is something to compare with."""
    return importlib.util.find_spec("nncf") is not None


def assignments(
    model: torch.nn.Module, calibration: Sequence[Sample], held_out: Sequence[Sample], loss: Loss
) -> list[dict[str, Any]]:
    """Rows like those of ``planish.bench.precision``, without predictions.

    Args:
        model: in fp32, of the samples' tensors; its embedding tables stay so.
        calibration: that layers are chosen by.
        held_out: that the loss is of.
        loss: of the model's outputs.
    """
    import nncf  # pyright: ignore

    nncf.set_log_level(logging.ERROR)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    with torch.no_grad():
        want = [model(*sample.tensors) for sample in held_out]
    rows: list[dict[str, Any]] = []
    for name, how in WAYS.items():
        for ratio in RATIOS:
            found = nncf.compress_weights(
                copy.deepcopy(model),
                mode=nncf.CompressWeightsMode.INT4_SYM,
                backup_mode=nncf.BackupMode.INT8_SYM,
                ratio=ratio,
                group_size=32,
                all_layers=True,
                dataset=nncf.Dataset([sample.tensors for sample in calibration]),
                ignored_scope=nncf.IgnoredScope(patterns=[".*embedding.*"], validate=False),
                **how,
            )
            nbytes = sum(t.numel() * t.itemsize for t in found.state_dict().values() if t.dtype in STORED)
            with torch.no_grad():
                pairs = zip(want, held_out, strict=True)
                losses = [loss.measure([y], [found(*sample.tensors)]) for y, sample in pairs]
            facts = {"bits": 8 * nbytes / linear, "held_out": statistics.fmean(losses)}
            rows.append({"scorer": f"{name}, {ratio:.0%} 4 bits", **facts})
    return rows
