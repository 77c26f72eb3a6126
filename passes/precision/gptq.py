"""Codes of a weight that make up for each other's rounding errors, by what calibration says of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.formats import Quantized, spread

DAMPING = 0.03
"""Part of the mean of the diagonal that is added to it: least loss on other data of MiniLM, of 0.003 to 0.3."""

BLOCK = 128
"""Columns whose errors are passed on to the columns after them together."""


def gptq(weight: Tensor, held: Quantized, moment: Tensor) -> Tensor:
    """Codes that keep ``x @ weight.T`` rather than the weight: each column's error is taken up by those after it.

    before: ``codes = round((w - lowest) / step)``
    after:  the same column by column, the one of largest inputs first; then ``w_rest -= error * U[j, rest] / U[j, j]``
        with ``U' U`` the inverse of the damped moment (GPTQ, Frantar et al. 2022, with scales fixed beforehand).

    Args:
        weight: fp32 [N, K].
        held: its scales and minimums; its codes are not looked at.
        moment: sum of ``x x'`` over the inputs, fp32 [K, K].

    Returns:
        uint8 [N, K].
    """
    depth = weight.shape[1]
    order = moment.diagonal().argsort(descending=True, stable=True)
    upper = _upper(moment[order][:, order].double()).float()
    step, lowest = (spread(t, held.format, depth)[:, order].T.contiguous() for t in (held.steps(), held.lowest()))
    rest = weight[:, order].T.contiguous()  # a column of the weight is a row here
    inverse = torch.where(step == 0, 0.0, 1 / step)
    codes = torch.empty(rest.shape)
    highest = float((1 << held.format.bits) - 1)
    for start in range(0, depth, BLOCK):
        end = min(depth, start + BLOCK)
        errors = torch.empty(end - start, rest.shape[1])
        for j in range(start, end):
            codes[j] = ((rest[j] - lowest[j]) * inverse[j]).round_().clamp_(0, highest)
            errors[j - start] = (rest[j] - codes[j] * step[j] - lowest[j]) / upper[j, j]
            if j + 1 < end:
                rest[j + 1 : end].addr_(upper[j, j + 1 : end], errors[j - start], alpha=-1)
        rest[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    found = torch.empty(weight.shape, dtype=torch.uint8)
    found[:, order] = codes.T.to(torch.uint8)
    return found


def _upper(moment: Tensor) -> Tensor:
    """The upper triangular U with ``U' U`` the inverse of the damped moment."""
    diagonal = moment.diagonal()
    damping = DAMPING * float(diagonal.mean()) or 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment + damping * torch.eye(len(moment)).double()))
    return torch.linalg.cholesky(inverse, upper=True)
