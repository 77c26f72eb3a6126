"""quantize-mixed: scores against what is measured, budgets, pins, reasons, and what cannot be kept."""

from __future__ import annotations

import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planish
from planish.assignment import covers
from planish.bench import tune
from planish.capture import capture
from planish.errors import BudgetError, CalibrationError, UnknownNameError
from planish.passes import Canonicalize
from planish.passes.precision import QuantizeMixed
from planish.passes.precision.calibration import Channels
from planish.passes.precision.loss import Loss
from planish.passes.precision.sensitivity import Sample, measure, measure_each, probe, refine, split
from planish.passes.precision.simulation import Simulation
from planish.passes.precision.sites import find_sites
from planish.passes.precision.solve import Block, Column, Solution, solve
from planish.passes.precision.swaps import selection, swap
from planish.passes.precision.treatment import Treatment
from planish.pipeline import Result, run_pipeline
from planish.program import Dim, Program
from planish.targets import TARGETS

WIDTH = 64


class Layer(nn.Module):
    """Layers that read one value, attention-like, and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Any) -> Tensor:
        """Of [batch, seq, WIDTH]."""
        scores = (self.query(x) @ self.key(x).transpose(1, 2) / WIDTH**0.5).softmax(-1)
        x = self.norm(x + scores @ x)
        return x + self.down(nn.functional.gelu(self.up(x)))


class Model(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, 40)

    def forward(self, x: Any) -> Tensor:
        """Logits [batch, seq, 40]."""
        for layer in self.layer:
            x = layer(x)
        return self.head(x)


def model() -> Model:
    """Seeded, its layers of unlike importance."""
    torch.manual_seed(0)
    made = Model().eval().requires_grad_(False)
    made.layer[1].down.weight.mul_(4)
    return made


def data(seed: int, rows: int = 2) -> Tensor:
    """Seeded normal numbers [rows, 12, WIDTH]."""
    return torch.randn(rows, 12, WIDTH, generator=torch.Generator().manual_seed(seed))


CALIBRATION = [(data(i),) for i in range(8)]
DYNAMIC = {"x": {0: Dim("batch", 1, 8)}}


def compiled(**options: Any) -> Any:
    """The model with a budget or pins."""
    options.setdefault("calibration", CALIBRATION)
    options.setdefault("target", "reference")
    return planish.compile(model(), (data(0),), dynamic=DYNAMIC, **options)


def prepared() -> Program:
    """The captured program with its calibration."""
    program, _ = capture(model(), (data(0),), DYNAMIC)
    program, _ = run_pipeline(program, [Canonicalize()], TARGETS["cpu-avx2"])
    program.calibration = tuple(CALIBRATION)
    return program


def test_scores_foretell_what_is_measured() -> None:
    program = prepared()
    sites, _ = find_sites(program, "test", Result(), ("w8a8", "w5a8-g32", "w4-g32", "w3a8-g32"))
    assert [site.name for site in sites][:3] == ["layer.0.query|key", "layer.0.up", "layer.0.down"]
    loss, samples = Loss.of(program), split(program)
    assert loss.kinds == ("kl",)
    assert len(samples) == 16
    simulation = Simulation.of(program, sites, (0, 1))
    scores = probe(simulation, loss, samples)
    found = measure_each(simulation, loss, samples, list(scores.sums))
    foretold = [math.log(scores.loss(*key) / value) for key, value in found.items()]
    assert abs(statistics.fmean(foretold)) < math.log(1.2)
    assert max(map(abs, foretold)) < math.log(2)
    assert all(scores.sigma(*key) < scores.loss(*key) for key in found)
    refined = refine(scores, simulation, sites, loss, samples)
    heads = [key for key in refined.measured if sites[key[0]].name == "head"]
    assert len(heads) == 4
    ratios = [refined.loss(*key) / found[key] for key in refined.measured]
    assert max(ratios) / min(ratios) < 1.5


def test_a_site_treated_alone_and_measured_together_agree() -> None:
    program = prepared()
    sites, _ = find_sites(program, "test", Result(), ("w3a8-g32",))
    loss, samples = Loss.of(program), split(program)[:4]
    three = Treatment.parse("w3a8-g32")
    simulation = Simulation.of(program, sites, (0, 1))
    alone = measure_each(simulation, loss, samples, [(0, three)])[0, three]
    assert measure(simulation, {0: three}, loss, samples) == pytest.approx(alone, rel=1e-3)
    assert measure(simulation, {0: Treatment()}, loss, samples) == 0


def test_what_is_simulated_is_what_runs() -> None:
    """The measured loss of an assignment is that of the compiled model."""
    program = prepared()
    call = compiled(budget=planish.Budget(bits=4.5), target="cpu-avx2")
    sites, _ = find_sites(program, "test", Result())
    treatments = {i: Treatment.parse(call.assignment.pins[site.name]) for i, site in enumerate(sites)}
    loss, total = Loss.of(program), 0.0
    others = [Sample((data(i, 1),)) for i in range(100, 124)]
    for sample in others:
        total += loss.measure(program.run(*sample.tensors), [call(*sample.tensors)]) / len(others)
    assert measure(Simulation.of(program, sites, (None,)), treatments, loss, others) == pytest.approx(total, rel=0.02)
    assert call.assignment.measured_loss == pytest.approx(total, rel=0.4)
    assert call.assignment.predicted_loss == pytest.approx(total, rel=0.5)


def test_budgets_are_kept_and_the_loss_falls_with_them() -> None:
    found = {bits: compiled(budget=planish.Budget(bits=bits)).assignment for bits in (3.0, 4.5, 8.5)}
    assert all(assignment.bits <= bits for bits, assignment in found.items())
    losses = [assignment.measured_loss for assignment in found.values()]
    assert losses == sorted(losses, reverse=True)
    front = [point.loss for point in found[4.5].front]
    assert front == sorted(front, reverse=True)
    assert len(front) > 5
    by_loss = compiled(budget=planish.Budget(loss=2 * found[4.5].predicted_loss)).assignment
    assert by_loss.predicted_loss <= 2 * found[4.5].predicted_loss
    assert by_loss.bytes < found[4.5].bytes


def test_times_of_the_cost_table_can_be_limited() -> None:
    slow = compiled(budget=planish.Budget(bits=8.5), target="cpu-avx2").assignment
    fast = compiled(budget=planish.Budget(ms=0.9 * slow.ms), target="cpu-avx2").assignment
    assert fast.ms <= 0.9 * slow.ms
    assert fast.predicted_loss > slow.predicted_loss
    with pytest.raises(BudgetError, match="the least is"):
        compiled(budget=planish.Budget(ms_one_row=1e-9), target="cpu-avx2")


def test_pins() -> None:
    assignment = compiled(budget=planish.Budget(bits=4.5), pin={"head": "w8a8", "layer.1": "w5a8-g128"}).assignment
    assert assignment.pins["head"] == "w8a8"
    assert {form for name, form in assignment.pins.items() if name.startswith("layer.1")} == {"w5a8-g128"}
    alone = compiled(pin={"layer.0.down": "w4a8-g32"}).assignment
    assert [name for name, form in alone.pins.items() if form != "fp"] == ["layer.0.down"]
    assert {layer.loss for layer in alone.layers} == {alone.predicted_loss} == {None}
    assert alone.measured_loss > 0
    assert "predicted" not in alone.table() + alone.explain("layer.0.down")
    again = compiled(pin=assignment.pins)
    assert again.assignment.pins == assignment.pins
    with pytest.raises(UnknownNameError, match=r"no layer 'layer\.7' to pin"):
        compiled(pin={"layer.7": "w8a8"})
    with pytest.raises(UnknownNameError, match="no format 'int8'"):
        compiled(pin={"head": "int8"})
    with pytest.raises(UnknownNameError, match="has no kernel"):
        compiled(pin={"head": "w4-g32"})
    with pytest.raises(BudgetError, match="same format"):
        compiled(pin={"layer.0.query": "w8a8", "layer.0.key": "w4a8-g32"})


def test_a_pinned_format_without_times_in_the_cost_table() -> None:
    pins = {"layer.1.down": "w5a8-g128"}
    assert compiled(target="cpu-avx2", budget=planish.Budget(bits=6), pin=pins).assignment.ms is None
    with pytest.raises(BudgetError, match="the budget limits ms, which is not known here"):
        compiled(target="cpu-avx2", budget=planish.Budget(ms=1.0), pin=pins)


def test_a_dump_replays_the_assignment(tmp_path: Path) -> None:
    first = compiled(budget=planish.Budget(bits=4.5), dump=tmp_path / "a")
    read = planish.Assignment.load(tmp_path / "a" / "precision.json")
    assert read == first.assignment
    second = compiled(pin=read.pins, dump=tmp_path / "b")
    x = data(99)
    assert torch.equal(first(x), second(x))
    assert planish.Assignment.load(tmp_path / "b" / "precision.json") == second.assignment
    assert second.assignment.gap == 0
    compiled(budget=planish.Budget(bits=4.5), dump=tmp_path / "c")
    assert (tmp_path / "a" / "precision.json").read_bytes() == (tmp_path / "c" / "precision.json").read_bytes()
    with pytest.raises(BudgetError, match="no assignment can be read"):
        planish.Assignment.load(tmp_path / "a" / "pipeline.json")


def test_reasons() -> None:
    call = compiled(budget=planish.Budget(bits=4.5))
    text = call.explain("layer.1")
    assert len(text.splitlines()) == 3
    assert "loss" in text
    assert "bytes" in text
    assert "layer.0.query|key" in call.explain("layer.0.key")
    report = call.report()
    assert "of the proved bound" in report
    assert "1 % more takes" in report
    assert "predicted" in report
    assert "measured" in report
    with pytest.raises(UnknownNameError, match="no layer 'encoder'"):
        call.explain("encoder")
    plain = planish.compile(model(), (data(0),))
    with pytest.raises(UnknownNameError, match="not chosen layer by layer"):
        plain.explain("head")


def test_what_cannot_be_kept() -> None:
    with pytest.raises(BudgetError, match="the least is"):
        compiled(budget=planish.Budget(bits=1.5))
    with pytest.raises(BudgetError, match="is empty"):
        planish.Budget()
    with pytest.raises(BudgetError, match="over 0"):
        planish.Budget(bits=-4)
    with pytest.raises(BudgetError, match="both limit the size"):
        planish.Budget(bits=4, bytes=1000)
    with pytest.raises(CalibrationError, match="without calibration"):
        compiled(budget=planish.Budget(bits=4), calibration=None)
    with pytest.raises(BudgetError, match=r"no pass of passes=\[...\] uses them"):
        compiled(budget=planish.Budget(bits=4), passes=["canonicalize"])
    with pytest.raises(BudgetError, match="ms"):
        planish.compile(
            model(), (data(0),), target="reference", calibration=CALIBRATION[:1], budget=planish.Budget(ms=1.0)
        )


def test_models_without_layers_and_layers_without_rows() -> None:
    with pytest.raises(BudgetError, match="no layer can be on codes"):
        planish.compile(nn.GELU().eval(), (data(0),), calibration=CALIBRATION, budget=planish.Budget(bits=4))
    seen = Channels.none(3)
    seen.add(torch.zeros(0, 3), None, 0)
    assert seen.rows == 0


def test_a_deadline_keeps_what_was_probed() -> None:
    passes = ["canonicalize", QuantizeMixed(planish.Budget(bits=4.5), deadline=1e-3, cache=False)]
    call = planish.compile(
        model(), (data(0),), target="reference", dynamic=DYNAMIC, passes=passes, calibration=CALIBRATION
    )
    assert "scores from 1 of 16 inputs: the deadline of 0.001 s ended it" in call.report()
    assert call.assignment.bits <= 4.5


def test_scores_are_kept_for_later_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compiled(budget=planish.Budget(bits=4.5))
    assert "kept from an earlier compile" not in first.report()
    (file,) = (tmp_path / "planish" / "scores").iterdir()
    again = compiled(budget=planish.Budget(bits=4.5))
    assert "kept from an earlier compile" in again.report()
    assert again.assignment == first.assignment
    assert "kept from" not in compiled(budget=planish.Budget(bits=4.5), cache=False).report()
    assert "kept from" not in compiled(budget=planish.Budget(bits=4.5), calibration=CALIBRATION[::-1]).report()
    file.write_bytes(b"not scores")
    assert compiled(budget=planish.Budget(bits=4.5)).assignment == first.assignment


def test_an_executor_finds_the_same_assignment() -> None:
    """Two processes of a Dask cluster; the model, its weights and the data are sent to them."""
    distributed = pytest.importorskip("distributed")
    budget = planish.Budget(bits=4.5)
    serial = compiled(budget=budget, cache=False)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        ran = set(client.run(lambda: __import__("os").getpid()).values())
        assert len(ran) == 2
        elsewhere = compiled(budget=budget, cache=False, executor=client.get_executor())
        grid = tune.Grid(rows=(1, 8), shapes=((32, 64),), formats=("fp32", "w8a8"), rounds=1)
        costs = tune.run(grid, planish.Target.host(), planish.compile, print, client.get_executor())
    assert [(layer.format, layer.n, layer.k) for layer in costs.layers] == [("fp32", 32, 64), ("w8a8", 32, 64)]
    assert elsewhere.assignment == serial.assignment
    x = data(99)
    assert torch.equal(elsewhere(x), serial(x))


def test_an_executor_that_is_stopped_by_the_deadline() -> None:
    with ThreadPoolExecutor(2) as executor:
        mixed = QuantizeMixed(planish.Budget(bits=4.5), deadline=1e-3, cache=False, executor=executor)
        call = planish.compile(
            model(),
            (data(0),),
            target="reference",
            dynamic=DYNAMIC,
            passes=["canonicalize", mixed],
            calibration=CALIBRATION,
        )
    assert "scores from 2 of 16 inputs" in call.report()  # a task has two


def test_the_error_of_the_compiler_is_told_from_that_of_codes() -> None:
    native = compiled(budget=planish.Budget(bits=4.5), target="cpu-avx2")
    assert 0 < native.assignment.compiler_error < 1e-3
    assert native.assignment.measured_loss > 1e-4
    assert compiled(budget=planish.Budget(bits=4.5)).assignment.compiler_error == 0
    assert "compiled code against the same codes" in native.report()


def test_swaps_are_decided_by_inputs_that_are_kept() -> None:
    """Scores that are wrong about a block are put right."""
    program = prepared()
    sites, _ = find_sites(program, "test", Result(), ("w8a8", "w3a8-g32"))
    samples = split(program)
    simulation, loss = Simulation.of(program, sites, (0, 1)), Loss.of(program)
    head = len(sites) - 1
    blocks = [
        Block(
            (site.name,),
            tuple(
                Column(
                    (t.name,),
                    {
                        "loss": (t.name == "w3a8-g32") * (0.01 if i == head else 0.1),
                        "bytes": float(t.format.weight.bits),
                    },
                )
                for t in site.treatments
            ),
        )
        for i, site in enumerate(sites)
    ]
    limits = {"bytes": 8.0 * len(sites) - 5}
    found = solve(blocks, "loss", limits)
    assert found.chosen[head].choices == ("w3a8-g32",)
    better, said = swap(blocks, found, "loss", limits, simulation, loss, samples)

    def lost(solution: Solution) -> float:
        treatments = [Treatment.parse(c.choices[0]) for c in solution.chosen]
        return measure(simulation, dict(enumerate(treatments)), loss, samples)

    assert len(said) >= 1
    assert better.total("bytes") <= limits["bytes"]
    assert lost(better) < lost(found)
    assert swap(blocks, found, "loss", limits, simulation, loss, ())[0] is found
    few, kept = selection(samples[:12])
    assert (len(few), len(kept)) == (12, 0)
    many, kept = selection(samples * 2)
    assert (len(many), len(kept)) == (27, 5)


def test_outlier_channels_are_offered_where_there_are_some() -> None:
    spiky = model()
    spiky.layer[0].norm.weight[5] = 300.0
    call = planish.compile(spiky, (data(0),), target="reference", calibration=CALIBRATION, pin={"layer.0.up": "w8a8+8"})
    assert call.assignment.pins["layer.0.up"] == "w8a8+8"
    assert any(
        "channel 5 of its input" in note.text and "8 channels stay fp32" in note.text
        for s in call.steps
        for note in s.notes
    )


def test_a_weight_with_outliers_may_keep_channels() -> None:
    spiky = model()
    with torch.no_grad():
        spiky.layer[1].down.weight[3, 7] = 20.0
    call = planish.compile(
        spiky, (data(0),), target="reference", calibration=CALIBRATION, budget=planish.Budget(bits=6.5), cache=False
    )
    assert call.assignment.pins["layer.1.down"].endswith("+2")
    assert not any(form.endswith("+2") for name, form in call.assignment.pins.items() if name != "layer.1.down")


def test_the_loss_of_hidden_states_is_the_cosine() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Layer()

        def forward(self, x: Any) -> Tensor:
            return self.inner.norm(self.inner(x))

    torch.manual_seed(0)
    program, _ = capture(Hidden().eval(), (data(0),), None)
    assert Loss.of(program).kinds == ("cosine",)
    assert Loss.of(program, "kl").kinds == ("kl",)
    with pytest.raises(UnknownNameError, match="no loss 'mse'"):
        Loss.of(program, "mse")


@pytest.mark.parametrize("kind", ["kl", "cosine", "square"])
def test_probes_have_the_curvature_of_the_loss(kind: str) -> None:
    torch.manual_seed(0)
    y = torch.randn(6, 20)
    change = 1e-3 * torch.randn(6, 20)
    loss, generator = Loss((kind,)), torch.Generator().manual_seed(0)
    want = loss.measure([y.double()], [(y + change).double()])
    squares = []
    for _ in range(4000):
        (r,) = loss.probe([y], generator)
        assert r is not None
        squares.append(float((r * change).sum()) ** 2 / 2)
    assert sum(squares) / len(squares) == pytest.approx(want, rel=0.1)


def test_rows_of_zeros_do_not_count() -> None:
    loss = Loss(("cosine", None))
    y, ids = torch.randn(4, 8), torch.arange(4)
    y[2:] = 0
    assert loss.measure([y, ids], [y, ids]) == pytest.approx(0, abs=1e-12)
    r, none = loss.probe([y, ids], torch.Generator().manual_seed(0))
    assert r is not None
    assert none is None
    assert not r[2:].any()
    assert r[:2].any()


def test_single_numbers_are_compared_by_their_squares() -> None:
    program, _ = capture(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1)).eval(), (data(0),), None)
    assert Loss.of(program).kinds == ("square",)

    class Label(nn.Module):
        def forward(self, x: Any) -> Tensor:
            return x.argmax(-1)

    program, _ = capture(Label().eval(), (data(0),), None)
    with pytest.raises(CalibrationError, match="no numbers that could be compared"):
        Loss.of(program)


def test_names_cover_whole_parts() -> None:
    assert covers("encoder.layer.1", "encoder.layer.1.query|key")
    assert not covers("encoder.layer.1", "encoder.layer.10.query|key")
    assert covers("a.key", "a.query|key")
    assert covers("a.query|key", "a.query|key")
    assert covers("b.gate", "a.up|b.gate")
    assert not covers("b", "a.up")


def test_convolutions_are_sites() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 48, 1), nn.ReLU(), nn.Conv2d(48, 48, 3, 2, 1), nn.ReLU(), nn.Conv2d(48, 40, 1))
    images = [(torch.randn(2, 32, 12, 12),) for _ in range(4)]
    call = planish.compile(net.eval(), images[0], target="cpu-avx2", calibration=images, budget=planish.Budget(bits=9))
    assert set(call.assignment.pins.values()) <= {"w8a8-static", "w6a8-g32-static", "w8a8", "w6a8-g32", "fp"}
    with pytest.raises(UnknownNameError, match="cannot be pinned to 'w4a8-g32'"):
        planish.compile(net, images[0], target="cpu-avx2", calibration=images, pin={"2": "w4a8-g32"})
    x = images[0][0]
    assert ((call(x) - net(x)).norm() / net(x).norm()) < 0.03


def test_convolutions_that_read_one_value_are_one_site() -> None:
    """A window of 3 beside a 1 x 1 one, whose codes know the inputs; a depthwise one has 8 bits only."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.side = nn.Conv2d(32, 48, 3, 2, 1), nn.Conv2d(32, 48, 1, 2)
            self.deep = nn.Conv2d(48, 48, 3, 1, 1, groups=48)

        def forward(self, x: Any) -> Tensor:
            y = (self.body(x) + self.side(x)).relu()
            return self.deep(y).flatten(2).mean(2)

    torch.manual_seed(0)
    net = Net().eval()
    images = [(torch.randn(2, 32, 12, 12),) for _ in range(4)]
    call = planish.compile(net, images[0], target="cpu-avx2", calibration=images, budget=planish.Budget(bits=5.5))
    assert set(call.assignment.pins) == {"body|side", "deep"}
    assert call.assignment.pins["body|side"] in ("w5a8-g32-static", "w4a8-g32-static")
    assert call.assignment.compiler_error < 1e-3
    assert ((call(images[1][0]) - net(images[1][0])).norm() / net(images[1][0]).norm()) < 0.1
