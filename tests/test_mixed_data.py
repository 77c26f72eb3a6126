"""Mixed precision with unusual data and graphs: one batch, zeros, unreached layers, layers used on several values."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planish
from planish.assignment import covers
from planish.capture import capture
from planish.formats import Format
from planish.passes import Canonicalize
from planish.passes.precision import QuantizeUniform, sensitivity
from planish.passes.precision.calibration import Channels
from planish.passes.precision.codes import knows_inputs
from planish.passes.precision.layer import NOTABLE_WEIGHT, Matrix
from planish.passes.precision.loss import Loss
from planish.passes.precision.sensitivity import probe, split
from planish.passes.precision.simulation import Simulation
from planish.passes.precision.sites import find_sites
from planish.pipeline import Result, run_pipeline
from planish.program import Dim, Program
from planish.targets import TARGETS

ROWS = {"input": {0: Dim("rows", 1, 4096)}}


def perceptron(bias: bool = True) -> nn.Sequential:
    """Seeded, 64 to 64 to 40."""
    torch.manual_seed(0)
    layers = (nn.Linear(64, 64, bias=bias), nn.GELU(), nn.Linear(64, 40, bias=bias))
    return nn.Sequential(*layers).eval().requires_grad_(False)


def data(rows: int, seed: int = 0) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))


def compiled(model: nn.Module, calibration: list[Any], dynamic: Any = ROWS, **options: Any) -> Any:
    """On the reference backend."""
    example = calibration[0]
    return planish.compile(
        model, example, "reference", dynamic=dynamic, calibration=calibration, cache=False, **options
    )


def program_of(model: nn.Module, calibration: list[Any]) -> Program:
    """Captured and canonical."""
    program, _ = capture(model, calibration[0], ROWS)
    program, _ = run_pipeline(program, [Canonicalize()], TARGETS["cpu-avx2"])
    program.calibration = tuple(calibration)
    return program


def test_an_only_batch_is_judged_by_its_halves() -> None:
    model, fresh = perceptron(), data(2000, 9)
    losses = []
    for batches in (1, 2):
        calibration = [(part,) for part in data(40).split(40 // batches)]
        call = compiled(model, calibration, pin={"0": "w3a8-g32", "2": "w3a8-g32"})
        losses.append(call.assignment.measured_loss)
        assert "judged by the inputs they know" not in call.report()
    assert losses[0] == losses[1]
    true = Loss(("kl",)).measure([model(fresh)], [call(fresh)])
    assert losses[0] > 0.8 * true
    fixed = compiled(model, [(data(40),)], None, pin={"0": "w3a8-g32", "2": "w3a8-g32"})
    assert fixed.assignment.measured_loss < 0.8 * true
    assert "judged by the inputs they know" in fixed.report()


def test_the_halves_are_those_of_all_batches() -> None:
    """A batch that does not reach a layer counts too."""
    seen = Channels.none(2)
    seen.moments = torch.zeros(2, 2, 2)
    one, two = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 5.0], [0.0, 1.0]])
    for number, x in enumerate((torch.zeros(0, 2), one, two)):
        seen.add(x, None, number % 2)
    close = partial(torch.testing.assert_close, rtol=0.0, atol=1e-3)
    close(seen.moment(without=0), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    close(seen.moment(without=1), torch.tensor([[0.0, 0.0], [0.0, 8.0]]))
    close(seen.moment(), torch.tensor([[6.0, -6.0], [-6.0, 17.0]]))
    close(seen.variance, torch.tensor([1.5, 17 / 4]))


def test_rows_of_zeros_and_layers_that_do_nothing() -> None:
    budget = planish.Budget(bits=5)
    rows = [(data(1, i),) for i in range(8)]
    rows[3] = (torch.zeros(1, 64),)
    assert compiled(perceptron(bias=False), rows, budget=budget).assignment.measured_loss > 0
    idle = perceptron()
    idle[2].weight.zero_()
    assert compiled(idle, [(data(4, i),) for i in range(4)], budget=budget).assignment.measured_loss == 0


def test_probes_in_several_goes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(perceptron(), [(data(2, i),) for i in range(4)])
    sites, _ = find_sites(program, "test", Result())
    samples = split(program)
    simulation = Simulation.of(program, sites, [s.half for s in samples])
    at_once = probe(simulation, Loss.of(program), samples)
    monkeypatch.setattr(sensitivity, "GRADIENT_BYTES", 5 * 4 * (64 + 40))
    in_goes = probe(simulation, Loss.of(program), samples)
    for key, sums in at_once.sums.items():
        torch.testing.assert_close(in_goes.sums[key], sums, rtol=1e-4, atol=1e-9)
        assert in_goes.diagonal[key] == pytest.approx(at_once.diagonal[key], rel=1e-4)


class Repeated(nn.Module):
    """A layer that reads three values, once beside another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 40)

    def forward(self, x: Any) -> Tensor:
        """Logits of [rows, 64]."""
        gelu = nn.functional.gelu
        return self.head(gelu(self.first(3 * gelu(self.first(gelu(self.first(x) + self.other(x)))))))


def test_layers_used_on_several_values_replay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Repeated().eval().requires_grad_(False)
    calibration, dynamic = [(data(4, i),) for i in range(4)], {"x": ROWS["input"]}
    pins = {"first": "w8a8", "first|other": "w4a8-g32", "first#2": "w5a8-g32", "head": "fp"}
    call = compiled(model, calibration, dynamic, pin=pins, dump=tmp_path / "a")
    found = planish.Assignment.load(tmp_path / "a" / "precision.json").pins
    assert found == {"first|other": "w4a8-g32", "first": "w8a8", "first#2": "w5a8-g32", "head": "fp"}
    again = compiled(model, calibration, dynamic, pin=found, dump=tmp_path / "b")
    assert planish.Assignment.load(tmp_path / "b" / "precision.json") == again.assignment == call.assignment
    assert torch.equal(again(data(3, 7)), call(data(3, 7)))
    assert covers("first", "first#2")
    assert not covers("first#2", "first")


def test_a_weight_that_reads_several_values_has_codes_for_each() -> None:
    """Each value has outliers of its own, so that codes made for another would be far off."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.head = nn.Linear(64, 64), nn.Linear(64, 40)

        def forward(self, x: Any) -> Tensor:
            values = [x * torch.where(torch.arange(64) == i, 200.0, 1.0) for i in range(6)]
            return self.head(sum(self.shared(v) for v in values))

    torch.manual_seed(0)
    model = Siamese().eval().requires_grad_(False)
    calibration = [(data(4, i),) for i in range(4)]
    for p in (
        QuantizeUniform("w8a8-static", outliers=2, equalise="none"),
        QuantizeUniform("w8a8", outliers=2, equalise="none"),
    ):
        call = compiled(model, calibration, {"x": ROWS["input"]}, passes=["canonicalize", p])
        want = model(data(4, 9))
        assert (call(data(4, 9)) - want).norm() < 0.02 * want.norm()


def test_a_weight_with_outliers_is_told_by_its_rows() -> None:
    torch.manual_seed(0)
    plain, column, spread = (0.05 * torch.randn(96, 128) for _ in range(3))
    column[:, 5] *= 300
    spread[torch.arange(96), torch.randint(0, 128, (96,))] *= 300
    matrices = [Matrix(weight, 128) for weight in (plain, column, spread)]
    assert [m.outlier_score >= NOTABLE_WEIGHT for m in matrices] == [False, True, True]
    assert [knows_inputs(m, Format.parse("w8a8")) for m in matrices] == [False, True, True]
    assert all(knows_inputs(m, Format.parse("w4a8-g32")) for m in matrices)
    assert Matrix(torch.zeros(4, 64), 64).outlier_score == 0
