"""``planish demo``: real sentence embeddings, eager PyTorch against the compiled model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import planish

if TYPE_CHECKING:
    from planish.models.base import Batch, LoadedModel

Model = Callable[..., Any]


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        eager_ms, compiled_ms: median time of all batches, in milliseconds.
        quality: the model's metric, compiled against eager.
        compile_s: time of ``planish.compile``, in seconds.
        documents: how many were embedded.
        nearest: the two most similar documents by the compiled model's embeddings, and their cosine.
    """

    eager_ms: float
    compiled_ms: float
    quality: dict[str, float]
    compile_s: float
    documents: int
    nearest: tuple[int, int, float]

    def __str__(self) -> str:
        first, second, cosine = self.nearest
        quality = ", ".join(
            f"{name} {value:.3g}" if "abs" in name else f"{name} {value:.7f}" for name, value in self.quality.items()
        )
        return "\n".join(
            (
                f"compiled in {self.compile_s:.1f} s on {torch.get_num_threads()} threads",
                f"{self.documents} documents: eager {self.eager_ms:.0f} ms, compiled {self.compiled_ms:.0f} ms: "
                f"{self.eager_ms / self.compiled_ms:.2f}x",
                f"compiled against eager: {quality}",
                f"most similar documents: {first} and {second} (cosine {cosine:.3f})",
            )
        )


def run_demo(
    loaded: LoadedModel, dump: Path | None, advance: Callable[[str], None], documents: int = 64, rounds: int = 7
) -> DemoResult:
    """Compile ``loaded``, embed documents with it and with eager PyTorch in turn, and compare.

    Args:
        loaded: a model of ``planish.models`` whose output is token states.
        dump: folder for the programs after each pass, or None.
        advance: called with the name of each step as it starts.
        documents: how many documents, 16 to a batch.
        rounds: timed rounds of each side; the sides take turns.
    """
    from planish.models.embedding import embed

    advance(f"compiling {loaded.name}")
    start = time.perf_counter()
    compiled = planish.compile(loaded.model, loaded.inputs, dynamic=loaded.dynamic, dump=dump)
    compile_s = time.perf_counter() - start
    batches = loaded.data.batches(documents)
    advance(f"embedding {documents} documents, eager and compiled in turn")
    with torch.inference_mode():
        eager_states, states = (_outputs(m, loaded, batches) for m in (loaded.model, compiled))
        times = [(_milliseconds(loaded.model, batches), _milliseconds(compiled, batches)) for _ in range(rounds)]
    eager_ms, compiled_ms = (statistics.median(side) for side in zip(*times, strict=True))
    vectors = torch.cat([embed(s, b["attention_mask"]) for s, b in zip(states, batches, strict=True)])
    return DemoResult(
        eager_ms,
        compiled_ms,
        loaded.metric.compare(eager_states, states, batches),
        compile_s,
        documents,
        _nearest(vectors),
    )


def _outputs(model: Model, loaded: LoadedModel, batches: Sequence[Batch]) -> list[torch.Tensor]:
    return [loaded.metric.output(model(**batch)) for batch in batches]


def _milliseconds(model: Model, batches: Sequence[Batch]) -> float:
    start = time.perf_counter()
    for batch in batches:
        model(**batch)
    return (time.perf_counter() - start) * 1e3


def _nearest(vectors: torch.Tensor) -> tuple[int, int, float]:
    """The pair of different rows of [n, width] unit vectors with the largest cosine."""
    cosines = (vectors @ vectors.T).fill_diagonal_(-2.0)
    first, second = divmod(int(cosines.argmax()), len(vectors))
    return first, second, float(cosines[first, second])
