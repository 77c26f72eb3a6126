"""What 8-bit activations cost SmolLM2: perplexity with scales by tensor, by row, and with outliers in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from planish import models
from planish.bench.quality import outputs
from planish.bench.result import BenchResult
from planish.models.smollm2 import perplexity
from planish.passes import default_pipeline
from planish.passes.precision import QuantizeUniform

CALIBRATION, HELD_OUT = range(15), range(20, 32)
"""Documents that scales are taken from, and that the perplexity is measured on."""

MAX_LEN = 512

WEIGHT = "w8a8-g32"
"""Weights are as good as exact: what is measured are the activations."""

STATIC = f"{WEIGHT}-static"
ROWS = {
    "static": (QuantizeUniform(STATIC, head="fp", equalise="none"), True),
    "static, evened": (QuantizeUniform(STATIC, head="fp"), True),
    "per token": (QuantizeUniform(WEIGHT, head="fp"), False),
    "per token, evened": (QuantizeUniform(WEIGHT, head="fp"), True),
    "per token, 8 channels fp32, evened": (QuantizeUniform(WEIGHT, head="fp", outliers=8), True),
    "static, 8 channels fp32": (QuantizeUniform(STATIC, head="fp", outliers=8, equalise="none"), True),
    "static, 8 channels fp32, evened": (QuantizeUniform(STATIC, head="fp", outliers=8), True),
}
"""Row name to the pass, and whether it is given data. The head's logits stay fp32."""


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        threads: of the compiled models.
        rounds: not used: nothing is timed.
    """

    threads: int
    rounds: int = 0


def run(options: Options, compile_model: Callable[..., Any], log: Callable[[str], None]) -> BenchResult:
    """Run the benchmark.

    Args:
        options: what to run.
        compile_model: ``planish.compile``.
        log: told the name of each phase.
    """
    torch.set_num_threads(options.threads)
    loaded = models.load("smollm2")
    texts = loaded.data.batches(max(HELD_OUT) + 1, max_len=MAX_LEN)
    held_out, calibration = [texts[i] for i in HELD_OUT], [texts[i] for i in CALIBRATION]
    found: dict[str, float] = {}
    notes: list[str] = []
    with torch.inference_mode():
        log("fp32")
        found["fp32"] = perplexity(outputs(loaded.model, held_out, loaded.metric), held_out)
        for name, (quantize, wants_data) in ROWS.items():
            log(name)
            passes = default_pipeline(quantize)
            data = {"calibration": calibration} if wants_data else {}
            call = compile_model(loaded.model, loaded.inputs, dynamic=loaded.dynamic, passes=passes, **data)
            found[name] = perplexity(outputs(call, held_out, loaded.metric), held_out)
            if name == "static":
                notes = [f"{n.node}: {n.text}" for step in call.steps for n in step.notes if n.rule == "outlier"]
    tokens = sum(b["input_ids"].shape[1] for b in held_out)
    rows = [{"name": n, "perplexity": p, "to_fp32": p / found["fp32"] - 1} for n, p in found.items()]
    extra = {"perplexity": rows, "held_out_tokens": tokens, "outliers": notes}
    return BenchResult("perplexity", options.threads, {}, [], [], [], extra)
