"""Scores of layers and treatments made steadier by each other (empirical Bayes, James-Stein).

A score is a mean over a few random probes, so it is off by a tenth. Errors taken as independent (diagonal Fisher) are a
sum over all outputs instead: next to no noise, but wrong by a factor that is mostly the layer's own. So

    log score = log diagonal + a[site] + b[treatment] + r

with ``r`` what is left of a least-squares fit: partly noise, partly what a treatment does to that layer alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from planish.passes.precision.treatment import Treatment

Key = tuple[int, Treatment]
"""A site and a treatment of it."""


def steadied(sums: Mapping[Key, Tensor], diagonal: Mapping[Key, float]) -> dict[Key, Tensor]:
    """Scale sums so that of each ``r`` only the part that is no noise is left.

    before: ``log mean sums^2 / 2 = log diagonal + a[site] + b[treatment] + r``
    after:  the same with ``part * r``: ``part`` is how far the ``r`` of every other probe agree with those of the
        probes between, ``sum r1 r2 / sum r^2``.

    Args:
        sums: ``sum g dy`` by site and treatment, [samples, probes].
        diagonal: losses were the errors of all outputs independent.
    """
    found = dict(sums)
    keys = [key for key, value in sums.items() if diagonal[key] > 0 and min(_losses(value)) > 0]
    if not keys:
        return found
    logs = torch.tensor([_losses(sums[key]) for key in keys], dtype=torch.float64).log()
    shape = torch.tensor([diagonal[key] for key in keys], dtype=torch.float64).log()
    left = _left(keys, logs - shape[:, None])
    part = float((left[:, 1] * left[:, 2]).sum() / left[:, 0].square().sum().clamp_min(TINY))
    part = min(1.0, max(0.0, part))
    for key, r in zip(keys, left[:, 0].tolist(), strict=True):
        found[key] = sums[key] * torch.tensor((part - 1) * r / 2, dtype=torch.float64).exp()
    return found


TINY = 1e-300


def _losses(sums: Tensor) -> tuple[float, float, float]:
    """Of all probes, of every other one, and of those between; of one probe alone, three times that."""
    halves = (sums, sums[:, ::2], sums[:, 1::2] if sums.shape[1] > 1 else sums)
    whole, one, two = (float(half.square().mean()) / 2 for half in halves)
    return whole, one, two


def _left(keys: list[Key], logs: Tensor) -> Tensor:
    """What is left of logs [keys, columns] after a number for each site and one for each treatment are taken off."""
    sites, treatments = (list(dict.fromkeys(key[i] for key in keys)) for i in (0, 1))
    design = torch.zeros(len(keys), len(sites) + len(treatments), dtype=torch.float64)
    for row, (site, treatment) in enumerate(keys):
        design[row, sites.index(site)] = design[row, len(sites) + treatments.index(treatment)] = 1.0
    return logs - design @ torch.linalg.lstsq(design, logs, driver="gelsd").solution
