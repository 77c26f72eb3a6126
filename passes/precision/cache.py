"""Scores of a model on some data, kept for its later compiles: probing takes most of a compile's time."""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from planish import formats
from planish.passes.precision.loss import Loss
from planish.passes.precision.sensitivity import Scores
from planish.passes.precision.sites import Site
from planish.passes.precision.treatment import Treatment
from planish.program import Program

log = logging.getLogger("planish")


def scores_file(program: Program, sites: Sequence[Site], loss: Loss, seed: int) -> Path:
    """Where the scores are kept: a name for all that they follow from.

    That is the graph, its constants and state, the calibration inputs in order, each site's treatments, the loss, the
    seed, PyTorch's version and threads, and the code that makes scores.
    """
    digest = hashlib.sha256(f"{torch.__version__} {torch.get_num_threads()} {seed} {loss.kinds}".encode())
    for source in (*sorted(Path(__file__).parent.glob("*.py")), Path(formats.__file__)):
        digest.update(source.read_bytes())
    digest.update(f"{program.module.graph}\n".encode())
    for site in sites:
        digest.update(f"{site.name} {[t.name for t in site.treatments]}\n".encode())
    constants = [str(n.target) for n in program.nodes() if n.op == "get_attr"]
    tensors = [operator.attrgetter(name)(program.module) for name in dict.fromkeys(constants)]
    tensors += [t for batch in program.calibration for t in batch]
    for tensor in (*tensors, *program.example[program.arguments :]):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return platformdirs.user_cache_path("planish") / "scores" / f"{digest.hexdigest()[:32]}.safetensors"


def save_scores(file: Path, scores: Scores) -> None:
    """Keep scores; a file is there whole or not at all, and what prevents that is only logged."""
    tensors = {_name(*key): value.contiguous() for key, value in scores.sums.items()}
    measured = json.dumps({_name(*key): loss for key, loss in scores.measured.items()})
    facts = {"measured": measured, "samples": str(scores.samples), "seconds": repr(scores.seconds)}
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            whole = Path(folder, file.name)
            save_file(tensors, whole, facts)
            whole.replace(file)
    except (OSError, SafetensorError) as error:
        log.warning("scores are not kept: %s", error)


def load_scores(file: Path) -> Scores | None:
    """Scores that were kept, or None where there are none that can be read."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stored:
            sums: dict[str, Tensor] = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            facts: Mapping[str, str] = stored.metadata()
        measured = {_key(name): loss for name, loss in json.loads(facts["measured"]).items()}
        found = {_key(name): value for name, value in sums.items()}
        return Scores(found, measured, int(facts["samples"]), True, float(facts["seconds"]))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        log.warning("kept scores cannot be read, so layers are probed again: %s", error)
        return None


def _name(site: int, treatment: Treatment) -> str:
    return f"{site} {treatment.name}"


def _key(name: str) -> tuple[int, Treatment]:
    site, treatment = name.split(" ")
    return int(site), Treatment.parse(treatment)
