"""Scores made steadier by each other: noise goes, what a treatment does to a layer stays."""

import torch

from planish.passes.precision.steadied import Key, steadied
from planish.passes.precision.treatment import Treatment

TREATMENTS = [Treatment.parse(name) for name in ("w8", "w5-g32", "w4-g32", "w3-g32", "w2-g32")]
SITES = 20


Sums = dict[Key, torch.Tensor]


def scores(interaction: float, samples: int, probes: int) -> tuple[Sums, dict[Key, float], dict[Key, float]]:
    """Sums by which losses are known but for noise, the diagonal, and the losses' logarithms."""
    generator = torch.Generator().manual_seed(0)
    of_site, of_form = (3 * torch.randn(n, generator=generator) for n in (SITES, len(TREATMENTS)))
    sums, diagonal, logs = Sums(), dict[Key, float](), dict[Key, float]()
    for i in range(SITES):
        for j, treatment in enumerate(TREATMENTS):
            log = of_site[i] + of_form[j] + interaction * torch.randn((), generator=generator)
            noise = torch.randn(samples, probes, generator=generator, dtype=torch.float64)
            sums[i, treatment] = (2 * log.exp()).sqrt() * noise
            diagonal[i, treatment] = float((of_form[j] + 0.5 * of_site[i]).exp())
            logs[i, treatment] = float(log)
    return sums, diagonal, logs


def error(sums: Sums, logs: dict[Key, float]) -> float:
    """Root mean square of the logarithms."""
    return float(torch.stack([(v.square().mean() / 2).log() - logs[k] for k, v in sums.items()]).square().mean().sqrt())


def test_noise_goes() -> None:
    sums, diagonal, logs = scores(0.0, 32, 6)
    assert error(steadied(sums, diagonal), logs) < 0.65 * error(sums, logs)


def test_what_a_treatment_does_to_a_layer_stays() -> None:
    sums, diagonal, logs = scores(1.0, 32, 6)
    assert error(steadied(sums, diagonal), logs) < 1.01 * error(sums, logs)
    sums, diagonal, logs = scores(0.1, 32, 6)
    assert error(steadied(sums, diagonal), logs) < 0.9 * error(sums, logs)


def test_signs_and_proportions_of_the_sums_stay() -> None:
    sums, diagonal, _ = scores(0.1, 8, 4)
    for key, value in steadied(sums, diagonal).items():
        ratio = value / sums[key]
        torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
        assert ratio[0, 0] > 0


def test_what_cannot_be_steadied_stays() -> None:
    sums, diagonal, _ = scores(0.1, 8, 4)
    one = {key: value[:, :1] for key, value in sums.items()}
    found = steadied(one, diagonal)
    for key, value in one.items():
        torch.testing.assert_close(found[key], value)
    key = next(iter(sums))
    nothing = {key: torch.zeros(8, 4, dtype=torch.float64)}
    assert steadied(nothing, diagonal)[key].abs().max() == 0
    alone = {key: sums[key]}
    torch.testing.assert_close(steadied(alone, diagonal)[key], sums[key])
