"""quantize-uniform: what becomes codes, what does not and why, and what calibration adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planish
from planish.capture import capture
from planish.errors import CalibrationError, UnknownNameError
from planish.formats import Format, Quantized, quantise
from planish.ops import QUANTIZED_LINEAR
from planish.passes import QUANTISERS, REGISTRY, Canonicalize, resolve
from planish.passes.precision import QuantizeUniform
from planish.pipeline import Step, run_pipeline
from planish.program import Program
from planish.targets import TARGETS, Target


class Block(nn.Module):
    """A feed-forward block with a head."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10, bias=False)

    def forward(self, x: Any) -> Tensor:
        """Of [batch, sequence, width]."""
        return self.head(self.norm(x + self.down(nn.functional.gelu(self.up(x)))))[:, 0]


def block() -> Block:
    """Seeded."""
    torch.manual_seed(0)
    return Block().eval()


def data(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantised(
    model: nn.Module, x: Tensor, p: QuantizeUniform, calibration: tuple[Tensor, ...] = ()
) -> tuple[Program, Step]:
    """The program after the pass, and its step."""
    program, _ = capture(model, (x,), None)
    program.calibration = tuple((c,) for c in calibration)
    program, steps = run_pipeline(program, [Canonicalize(), p], TARGETS["cpu-avx2"])
    return program, steps[-1]


def forms(program: Program) -> list[str]:
    """The formats of the layers, in order."""
    return [str(n.args[7]) for n in program.nodes() if n.target is QUANTIZED_LINEAR]


def scale_of(program: Program, layer: Any) -> float:
    """A layer's static scale."""
    return float(getattr(program.module, str(layer.args[6].target)))


def test_every_layer_gets_the_format_and_the_head_its_own() -> None:
    program, step = quantised(block(), data(2, 5, 64), QuantizeUniform("w4a8-g32"))
    assert forms(program) == ["w4a8-g32", "w4a8-g32", "w8a8"]
    assert step.rewrites == {"linear as w4a8-g32": 2, "linear as w8a8": 1}
    assert any("data-free" in note.text for note in step.notes)
    program, _ = quantised(block(), data(2, 5, 64), QuantizeUniform("w4a8-g32", head=""))
    assert forms(program)[-1] == "w4a8-g32"
    program, step = quantised(block(), data(2, 5, 64), QuantizeUniform("w4a8-g32", head="fp"))
    assert len(forms(program)) == 2
    assert ["stays fp32" in r.reason for r in step.refusals] == [True]


def test_what_stays_fp32_says_why() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.weight = nn.Linear(16, 64), nn.Parameter(torch.randn(8, 64))
            self.broken = nn.Linear(64, 64)
            self.broken.weight.data[0, 0] = float("inf")

        def forward(self, x: Any) -> Tensor:
            hidden = self.broken(self.narrow(x)) * 2
            return nn.functional.linear(hidden, self.weight * x.sum()) + 1

    _, step = quantised(Model().eval(), data(3, 16), QuantizeUniform("w8a8"))
    assert [r.reason for r in step.refusals] == [
        "it has 16 input features: codes pay from 32 on",
        "its weight holds NaN or infinity",
        "its weight is computed in each call",
    ]
    assert all("test_precision.py" in r.where for r in step.refusals)


@pytest.mark.parametrize("target", ["cpu-int8", "cpu-int4"])
def test_targets(target: str) -> None:
    model, x = block(), data(4, 7, 64)
    compiled = planish.compile(model, (x,), target=target, verify=True)
    same = ["canonicalize", QuantizeUniform(compiled.target.format)]
    want = planish.compile(model, (x,), target="reference", passes=same)
    torch.testing.assert_close(compiled(x), want(x), rtol=2e-2, atol=2e-3)
    error = (compiled(x) - model(x)).norm() / model(x).norm()
    assert error < {"cpu-int8": 0.02, "cpu-int4": 0.15}[target]
    assert "quantize-uniform" in compiled.report()
    assert next(s for s in compiled.steps if s.name == "quantize-uniform").max_error is not None


def test_only_integer_targets_quantise_by_default() -> None:
    names = [p.name for p in resolve(None)]
    assert names == [n for n in REGISTRY if n not in QUANTISERS]
    whole = [p.name for p in resolve(None, target=Target.parse("cpu-int8"))]
    assert whole == [n for n in REGISTRY if n != "quantize-mixed"]


def test_weights_shared_by_layers_are_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 64)
            self.head = nn.Linear(64, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Any) -> Tensor:
            return self.head(torch.tanh(self.table(ids)))

    model, ids = Tied().eval(), torch.randint(0, 50, (3, 4), generator=torch.Generator().manual_seed(0))
    passes = ["canonicalize", QuantizeUniform("w8a8", embedding="w8"), "fuse-groups"]
    compiled = planish.compile(model, (ids,), passes=passes, verify=True)
    assert (compiled(ids) - model(ids)).norm() < 0.02 * model(ids).norm()
    program, _ = quantised(model, ids, QuantizeUniform("w8a8", embedding="w8"))
    assert not any(t.dtype is torch.float32 and t.numel() > 64 for t in program.module.buffers())


def test_a_static_scale_is_the_largest_value_of_the_calibration() -> None:
    x = data(2, 5, 64)
    program, _ = quantised(block(), x, QuantizeUniform("w8a8-static", head="", equalise="none"), (x, 3 * x))
    first = next(n for n in program.nodes() if n.target is QUANTIZED_LINEAR)
    assert scale_of(program, first) == pytest.approx(3 * x.abs().max().item() / 127)
    plain, _ = quantised(block(), x, QuantizeUniform("w8a8"), (x,))
    assert next(n for n in plain.nodes() if n.target is QUANTIZED_LINEAR).args[6] is None


def test_the_bias_takes_up_the_mean_of_what_rounding_takes_away() -> None:
    torch.manual_seed(1)
    model, x = nn.Linear(64, 32).eval(), data(500, 64) + 2
    form = Format.parse("w3a8-g32")
    p = QuantizeUniform(form.name, head="", equalise="none")
    (with_data, _), (without, _) = (quantised(model, x, p, c) for c in ((x,), ()))
    mean = (model(x)).mean(0)
    assert (with_data.run(x)[0].mean(0) - mean).abs().max() < 0.02
    assert (without.run(x)[0].mean(0) - mean).abs().max() > 0.1
    stored = dict(with_data.module.named_buffers())
    held = [stored.get(f"weight_{part}") for part in ("codes", "scales", "minimums", "channels")]
    lost = (model.weight - Quantized(form.weight, *held).dequantise()) @ x.mean(0)  # pyright: ignore
    (corrected,) = [t for n, t in with_data.module.named_buffers() if "corrected_bias" in n]
    torch.testing.assert_close(corrected, model.bias + lost, rtol=1e-5, atol=1e-5)


def test_the_largest_channels_stay_fp32_and_are_reported() -> None:
    x = data(2, 9, 64)
    x[..., 7] *= 100
    x[:, 0, 20] = 500.0
    program, step = quantised(block(), x, QuantizeUniform("w8a8-static", head="", outliers=2), (x,))
    first = next(n for n in program.nodes() if n.target is QUANTIZED_LINEAR)
    assert getattr(program.module, str(first.args[8].target)).tolist() == [7, 20]
    assert scale_of(program, first) < 0.1
    (note,) = [n for n in step.notes if n.node == first.name]
    assert note.text.startswith("up: channel 20 of its input reaches 500")
    assert "at first tokens only; 2 channels stay fp32" in note.text
    exact = block()(x)
    assert (program.run(x)[0] - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "the calibration set is empty"),
        ([(torch.full((2, 5, 64), float("nan")),)], "calibration batch 0: input 'x' holds NaN"),
        ([(torch.full((2, 5, 64), 3e38),)], "in calibration batch 0 the input of linear.* holds NaN or infinity"),
        (torch.zeros(2, 5, 64), "calibration is a Tensor"),
        ([torch.zeros(2, 5, 64)], "calibration batch 0 is a float32 tensor"),
        ([(torch.zeros(2, 5, 63),)], "calibration batch 0: input 'x' has size 63 on axis 2"),
    ],
)
def test_calibration_that_cannot_be_used(calibration: Any, message: str) -> None:
    with pytest.raises(planish.PlanishError, match=message):
        planish.compile(block(), (data(2, 5, 64),), target="cpu-int8", calibration=calibration)


def test_calibration_without_integer_codes_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="nothing in the pipeline for 'cpu' uses them"):
        planish.compile(block(), (data(2, 5, 64),), calibration=[(data(2, 5, 64),)])


@pytest.mark.parametrize(
    "p",
    [
        QuantizeUniform("w8a8-static"),
        QuantizeUniform("w8a8", outliers=4),
        QuantizeUniform("w8a8", head="w8a8-static"),
    ],
)
def test_what_needs_calibration_says_so(p: QuantizeUniform) -> None:
    with pytest.raises(CalibrationError, match="without calibration"):
        quantised(block(), data(2, 5, 64), p)


def test_an_unknown_format_lists_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match="no weight format of 9 bits"):
        quantised(block(), data(2, 5, 64), QuantizeUniform("w9a8"))
    with pytest.raises(UnknownNameError, match="no embedding format 'w4-g32'"):
        quantised(block(), data(2, 5, 64), QuantizeUniform("w8a8", embedding="w4-g32"))


def test_calibration_is_run_once_per_batch_and_changes_nothing_else() -> None:
    seen: list[int] = []

    def batches() -> Any:
        for i in range(3):
            seen.append(i)
            yield (data(2, 5, 64, seed=i),)

    x = data(2, 5, 64)
    compiled = planish.compile(block(), (x,), target="cpu-int8", calibration=batches())
    assert seen == [0, 1, 2]
    assert (compiled(x) - block()(x)).norm() < 0.02 * block()(x).norm()


class Images(nn.Module):
    """A stem, an inverted bottleneck and a head, as in networks for phones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.Conv2d(32, 96, 1)
        self.each = nn.Conv2d(96, 96, 5, padding=2, groups=96)
        self.down, self.pair = nn.Conv2d(96, 32, 1), nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.dense, self.two = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1, groups=2)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Any) -> Tensor:
        """Of [batch, 3, height, width]."""
        x = nn.functional.relu6(self.stem(x))
        x = x + self.down(nn.functional.relu6(self.each(nn.functional.relu6(self.up(x)))))
        x = self.two(nn.functional.relu(self.dense(nn.functional.relu(self.pair(x)))))
        return self.head(x.mean((2, 3)))


IMAGES = [QuantizeUniform("w8a8-static", head=""), QuantizeUniform("w8a8"), QuantizeUniform("w4a8-g32", head="fp")]


@pytest.mark.parametrize("p", IMAGES)
def test_convolutions_become_codes_where_calibration_gives_them_a_scale(p: QuantizeUniform) -> None:
    torch.manual_seed(0)
    model, x = Images().eval(), data(2, 3, 32, 32)
    passes: list[Any] = ["canonicalize", "choose-layout", p, "fuse-groups"]
    compiled = planish.compile(model, (x,), passes=passes, calibration=[(x,)], verify=True)
    step = next(s for s in compiled.steps if s.name == "quantize-uniform")
    weights = p.format.removesuffix("-static")
    static = f"{weights}-static"
    assert step.rewrites[f"convolution as {static}"] == 1
    assert step.rewrites["depthwise convolution as w8a8-static"] == 1
    assert step.rewrites[f"linear as {p.format}"] >= 2
    reasons = [r.reason for r in step.refusals]
    assert "it has 27 input features: codes pay from 32 on" in reasons
    assert any("Winograd" in reason for reason in reasons)
    assert "only dense and depthwise convolutions have kernels on codes" in reasons
    want = planish.compile(model, (x,), target="reference", passes=passes[:-1], calibration=[(x,)])(x)
    torch.testing.assert_close(compiled(x), want, rtol=2e-2, atol=2e-2)
    assert (compiled(x) - model(x)).norm() < (0.3 if "w4" in p.format else 0.04) * model(x).norm()


def test_without_calibration_windows_stay_fp32() -> None:
    torch.manual_seed(0)
    x = data(1, 3, 16, 16)
    compiled = planish.compile(Images().eval(), (x,), target="cpu-int8")
    step = next(s for s in compiled.steps if s.name == "quantize-uniform")
    assert sum("found by calibration" in r.reason for r in step.refusals) == 4
    assert set(step.rewrites) == {"linear as w8a8"}


def test_codes_are_stored_where_nothing_else_reads_the_value() -> None:
    """Layers that read one value share its codes; a value that is read otherwise becomes codes inside its layer."""
    x = data(2, 5, 64)
    program, _ = quantised(block(), x, QuantizeUniform("w8a8-static", head="", equalise="none"), (x,))
    layers = [n for n in program.nodes() if n.target is QUANTIZED_LINEAR]
    kinds = [n.args[0].meta["val"].dtype for n in layers]  # pyright: ignore
    assert kinds == [torch.float32, torch.int8, torch.int8]  # the residual reads x too


def test_channels_far_above_the_others_are_evened_out() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(64, 32).eval().requires_grad_(False), data(2, 40, 64)
    x[..., 7] *= 50
    model.weight[:, 7] /= 50
    exact, errors = model(x), list[float]()
    for equalise in (True, False):
        p = QuantizeUniform("w8a8-static", head="", equalise="all" if equalise else "none")
        program, _ = quantised(model, x, p, (x,))
        errors.append(float((program.run(x)[0] - exact).norm() / exact.norm()))
    assert errors[0] < 0.1 * errors[1]
    program, _ = quantised(model, x, QuantizeUniform("w8a8", head=""), (x,))
    layer = next(n for n in program.nodes() if n.target is QUANTIZED_LINEAR)
    even = getattr(program.module, str(layer.args[10].target))
    assert int(even.argmin()) == 7
    assert float(even.max()) == 1.0


def test_one_scale_for_all_of_a_weight() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    weight[2] *= 10
    held = quantise(weight, Format.parse("w8a8").weight, one_scale=True)
    assert len(held.scales.unique()) == 1
    assert held.dequantise()[2].allclose(weight[2], atol=float(held.steps().abs().max()) / 2 + 1e-6)
