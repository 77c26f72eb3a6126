"""The columns of the integer program: what every configuration of a block of sites costs."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from planish.costs import FP32 as FP32_COST
from planish.passes.precision.calibration import Channels
from planish.passes.precision.sensitivity import Scores
from planish.passes.precision.sites import Site
from planish.passes.precision.solve import Block, Column, pareto
from planish.passes.precision.treatment import Treatment
from planish.targets import Target

LOSS, BYTES, MS, MS_ONE_ROW = "loss", "bytes", "ms", "ms_one_row"

MS_FP32 = "ms_fp32"
"""What a site takes in fp32, whatever its treatment."""

ERRORS = 4.0
"""Standard errors that what two sites do to each other must exceed to count."""

TINY = 1e-300

MOST_CONFIGURATIONS = 20_000
"""Of a block; with more, it is split."""


@dataclass(frozen=True)
class Option:
    """A treatment of a site and what it costs by itself."""

    treatment: Treatment
    costs: Mapping[str, float]


def options(
    index: int,
    site: Site,
    channels: Channels,
    batches: int,
    scores: Scores,
    allowed: Sequence[Treatment],
    target: Target,
) -> list[Option]:
    """What each allowed treatment of a site costs; treatments that take longer than fp32 are left out.

    Args:
        index: of the site.
        site: its layers.
        channels: of its input; ``rows / batches`` are the rows of a call.
        batches: of the calibration.
        scores: of all sites.
        allowed: fp32 may be among them.
        target: whose cost table counts; without one there are no times.
    """
    rows = max(1, round(channels.rows / batches))
    exact = _costs(Treatment(), site, rows, target)
    found: list[Option] = []
    for treatment in allowed:
        costs = _costs(treatment, site, rows, target)
        if len(allowed) > 1 and any(costs[name] > exact[name] for name in (MS, MS_ONE_ROW) if name in costs):
            continue
        before = {MS_FP32: exact[MS]} if MS in exact else {}
        found.append(Option(treatment, {LOSS: scores.loss(index, treatment), **costs, **before}))
    return found


def _costs(treatment: Treatment, site: Site, rows: int, target: Target) -> dict[str, float]:
    """Bytes of the site's weights, and milliseconds of its layers for some rows and for one."""
    shapes = [tuple(layer.weight.shape) for layer in site.layers]
    costs: dict[str, float] = {BYTES: sum(treatment.nbytes(n, k) for n, k in shapes)}
    form = FP32_COST if treatment.format is None else treatment.format.name
    table = target.costs
    if table is not None and form.removesuffix("-static") in table.formats:
        for name, m in ((MS, rows), (MS_ONE_ROW, 1)):
            outliers = [min(1.0, treatment.outliers / k) * table.ms(FP32_COST, m, n, k) for n, k in shapes]
            costs[name] = sum(table.ms(form, m, n, k) for n, k in shapes) + sum(outliers)
    return costs


def blocks_of(
    sites: Sequence[Site], by_site: Sequence[Sequence[Option]], scores: Scores, names: Sequence[str]
) -> list[Block]:
    """The program's blocks, their columns' losses with what the sites of a block do to each other.

    Args:
        sites: in graph order.
        by_site: options of each.
        scores: of all sites.
        names: of the costs that count; an option that another one equals or beats in all of them is left out.
    """
    kept = [_beaten_left_out(of_site, names) for of_site in by_site]
    return [_block(sites, kept, scores, members) for members in _members(sites, kept)]


def _beaten_left_out(of_site: Sequence[Option], names: Sequence[str]) -> list[Option]:
    columns = [Column((option.treatment.name,), option.costs) for option in of_site]
    left = {column.choices[0] for column in pareto(columns, names)}
    return [option for option in of_site if option.treatment.name in left]


def _members(sites: Sequence[Site], kept: Sequence[Sequence[Option]]) -> Iterator[list[int]]:
    """Consecutive sites of the same block of the model, as many as have few enough configurations."""
    members: list[int] = []
    for index, site in enumerate(sites):
        count = math.prod(len(kept[i]) for i in (*members, index))
        if members and (_stem(site) != _stem(sites[members[0]]) or count > MOST_CONFIGURATIONS):
            yield members
            members = []
        members.append(index)
    if members:
        yield members


def _stem(site: Site) -> str:
    """Name of the block that a site is part of: up to the first number, ``encoder.layer.0``; else of the site."""
    found = re.match(r".*?\.\d+(?=\.)", site.layers[0].name)
    return found[0] if found else site.name


def _block(sites: Sequence[Site], kept: Sequence[Sequence[Option]], scores: Scores, members: Sequence[int]) -> Block:
    """``loss = mean (sum_i s_i)^2 / 2``, multiplied out, so that only pairs of treatments are needed.

    Of the thousands of pairs many are large by chance, and a minimum finds those: they are shrunk by their errors.
    """
    some = next(iter(scores.sums.values()), torch.zeros(1, 1, dtype=torch.float64))
    sums = [
        torch.stack([scores.sums.get((i, o.treatment), torch.zeros_like(some)).flatten() for o in kept[i]])
        for i in members
    ]
    rank = len(members)
    loss = torch.zeros([len(s) for s in sums], dtype=torch.float64)
    for a, b in itertools.combinations_with_replacement(range(rank), 2):
        products = sums[a] @ sums[b].T / some.numel()
        shape = [1] * rank
        if a == b:
            shape[a] = len(sums[a])
            loss += products.diagonal().reshape(shape) / 2
        else:
            shape[a], shape[b] = products.shape
            squares = sums[a].square() @ sums[b].square().T / some.numel()
            loss += _significant(products, (squares - products.square()) / some.numel()).reshape(shape)
    names = set.intersection(*(set(o.costs) for i in members for o in kept[i])) - {LOSS}  # some formats have no times
    columns = [
        Column(
            tuple(option.treatment.name for option in chosen),
            {LOSS: float(value), **{name: sum(o.costs[name] for o in chosen) for name in sorted(names)}},
        )
        for chosen, value in zip(itertools.product(*(kept[i] for i in members)), loss.flatten().tolist(), strict=True)
    ]
    return Block(tuple(sites[i].name for i in members), tuple(columns))


def _significant(means: torch.Tensor, variances: torch.Tensor) -> torch.Tensor:
    """Means shrunk towards 0, the more the larger their standard errors; 0 below ``ERRORS`` of them (James-Stein)."""
    return means * (1 - ERRORS**2 * variances / means.square().clamp_min(TINY)).clamp_min(0)
