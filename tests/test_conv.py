"""Convolution, pooling, folding of norms and the layout pass: against eager, on both instruction sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from families import Bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from native import WEAKER
from torch import nn
from torch.nn import functional as F

import planish
from planish import passes
from planish.capture import capture
from planish.pipeline import Step, run_pipeline
from planish.program import Program
from planish.targets import TARGETS

aten = torch.ops.aten
WAYS = {"unfused": ("cpu", ()), **{target: (target, None) for target in ("cpu", *WEAKER)}}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> tuple[str, tuple[str, ...] | None]:
    """A target and pipeline."""
    return WAYS[request.param]


def compare(
    model: nn.Module,
    way: tuple[str, tuple[str, ...] | None],
    *inputs: torch.Tensor,
    dynamic: Any = None,
    more: tuple[torch.Tensor, ...] = (),
) -> None:
    """Compile for ``inputs`` and compare with eager there and at ``more`` inputs of other sizes."""
    native = planish.compile(model, inputs, way[0], dynamic=dynamic, passes=way[1])
    for x in (inputs, *((m,) for m in more)):
        with torch.no_grad():
            want, got = model(*x), native(*x)
        pairs = {"": (want, got)} if isinstance(want, torch.Tensor) else {k: (want[k], got[k]) for k in want}
        for name, (w, g) in pairs.items():
            atol = 3e-6 * max(1.0, w[w.isfinite()].abs().max().item())
            torch.testing.assert_close(
                g, w, rtol=2e-6, atol=atol, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
            )


def bundle(layers: Mapping[str, Callable[..., torch.Tensor]]) -> Bundle:
    return Bundle(layers)


CONV2D: dict[str, dict[str, Any]] = {
    "3x3": {"out_channels": 64, "kernel_size": 3, "padding": 1},
    "3x3_ragged": {"out_channels": 50, "kernel_size": 3, "padding": 1, "bias": False},
    "3x3_narrow": {"out_channels": 5, "kernel_size": 3},
    "strided": {"out_channels": 33, "kernel_size": 3, "padding": 1, "stride": 2},
    "stride3": {"out_channels": 96, "kernel_size": (5, 3), "padding": (2, 0), "stride": (3, 1)},
    "much_padding": {"out_channels": 16, "kernel_size": 3, "padding": 4, "stride": 3},
    "dilated": {"out_channels": 16, "kernel_size": 3, "padding": 2, "dilation": 2},
    "dilated_x": {"out_channels": 20, "kernel_size": (1, 3), "dilation": (1, 3)},
    "even": {"out_channels": 48, "kernel_size": 2, "stride": 2, "bias": False},
    "pointwise": {"out_channels": 40, "kernel_size": 1},
    "pointwise_strided": {"out_channels": 40, "kernel_size": 1, "stride": 2, "bias": False},
    "pointwise_padded": {"out_channels": 8, "kernel_size": 1, "padding": 1},
    "groups": {"out_channels": 32, "kernel_size": 3, "padding": 1, "groups": 4},
    "groups_wide": {"out_channels": 400, "kernel_size": 3, "padding": 1, "groups": 2},
    "groups_of_4": {"out_channels": 40, "kernel_size": 3, "padding": 1, "groups": 10},
    "groups_of_8": {"out_channels": 40, "kernel_size": (5, 3), "padding": 2, "groups": 5, "bias": False},
    "groups_shallow": {"out_channels": 40, "kernel_size": 3, "padding": 1, "groups": 20, "stride": 2},
    "depthwise": {"out_channels": 40, "kernel_size": 3, "padding": 1, "groups": 40},
    "depthwise_5_strided": {
        "out_channels": 40,
        "kernel_size": 5,
        "padding": 2,
        "groups": 40,
        "stride": 2,
        "bias": False,
    },
    "depthwise_dilated": {"out_channels": 40, "kernel_size": 3, "padding": 4, "groups": 40, "dilation": 2},
    "depthwise_multiplied": {"out_channels": 80, "kernel_size": 3, "padding": 1, "groups": 40},
    "same": {"out_channels": 16, "kernel_size": (3, 4), "padding": "same"},
    "reflected": {"out_channels": 16, "kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize(("batch", "size"), [(1, (7, 7)), (3, (13, 18))], ids=str)
def test_conv2d(way: tuple[str, tuple[str, ...] | None], batch: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = bundle({name: nn.Conv2d(40, **options) for name, options in CONV2D.items()})
    compare(model, way, torch.randn(batch, 40, *size))


def test_conv2d_of_a_small_image(way: tuple[str, tuple[str, ...] | None]) -> None:
    """Windows that cover the whole image, one row, one column; a stem with three channels."""
    torch.manual_seed(0)
    square = {
        "a": nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        "b": nn.Conv2d(3, 7, 4, 4),
        "c": nn.Conv2d(3, 3, 5, 1, 4, groups=3),
    }
    for size in ((4, 4), (1, 9), (30, 29)):
        layers = {k: m for k, m in square.items() if k != "b" or min(size) >= 4}
        compare(bundle(layers), way, torch.randn(2, 3, *size))


def test_deep_weights_are_taken_in_parts(way: tuple[str, tuple[str, ...] | None]) -> None:
    torch.manual_seed(0)
    model = bundle({"a": nn.Conv2d(700, 50, 3, padding=1), "b": nn.Conv2d(700, 48, 3, padding=1, bias=False)})
    compare(model, way, torch.randn(1, 700, 5, 6))


def test_other_ranks(way: tuple[str, tuple[str, ...] | None]) -> None:
    torch.manual_seed(0)
    one = {
        "plain": nn.Conv1d(24, 20, 3, padding=1),
        "strided": nn.Conv1d(24, 48, 5, 2, bias=False),
        "pointwise": nn.Conv1d(24, 30, 1),
        "depthwise": nn.Conv1d(24, 24, 4, padding=3, groups=24),
        "transposed": nn.ConvTranspose1d(24, 20, 4, 2, 1),
        "pooled": nn.Sequential(nn.Conv1d(24, 8, 3), nn.MaxPool1d(3, 2, 1)),
        "averaged": nn.Sequential(nn.Conv1d(24, 8, 3), nn.AvgPool1d(2)),
    }
    compare(bundle(one), way, torch.randn(2, 24, 17))
    three = {
        "plain": nn.Conv3d(6, 20, 3, padding=1),
        "strided": nn.Conv3d(6, 7, (1, 3, 2), (1, 2, 2), bias=False),
        "pointwise": nn.Conv3d(6, 20, 1),
        "depthwise": nn.Conv3d(6, 6, 3, padding=1, groups=6),
        "transposed": nn.ConvTranspose3d(6, 5, 2, 2),
        "pooled": nn.Sequential(nn.Conv3d(6, 8, 3), nn.MaxPool3d(2)),
        "averaged": nn.AvgPool3d(3, 2, 1),
    }
    compare(bundle(three), way, torch.randn(2, 6, 5, 6, 7))


def test_transposed(way: tuple[str, tuple[str, ...] | None]) -> None:
    torch.manual_seed(0)
    layers = {
        "plain": nn.ConvTranspose2d(20, 16, 3),
        "strided": nn.ConvTranspose2d(20, 18, 3, 2, 1, output_padding=1, bias=False),
        "groups": nn.ConvTranspose2d(20, 30, 4, 2, 1, groups=5),
        "depthwise": nn.ConvTranspose2d(20, 20, 4, 2, 1, groups=20),
        "dilated": nn.ConvTranspose2d(20, 7, 3, 3, dilation=2, output_padding=2),
        "pointwise": nn.ConvTranspose2d(20, 7, 1),
        "normed": nn.Sequential(nn.ConvTranspose2d(20, 30, 3, 2, groups=5), normed(30)),
    }
    compare(bundle(layers), way, torch.randn(2, 20, 5, 6))


def test_dynamic_sizes(way: tuple[str, tuple[str, ...] | None]) -> None:
    torch.manual_seed(0)
    layers = {
        "conv": nn.Conv2d(20, 50, 3, padding=1),
        "strided": nn.Sequential(nn.Conv2d(20, 48, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        "depthwise": nn.Conv2d(20, 20, 5, padding=2, groups=20),
        "pointwise": nn.Conv2d(20, 24, 1),
        "transposed": nn.ConvTranspose2d(20, 8, 2, 2),
        "average": nn.AvgPool2d(3, 2, 1),
    }
    dims = {0: planish.Dim("batch", 1, 9), 2: planish.Dim("h", 8, 40), 3: planish.Dim("w", 8, 40)}
    inputs = [torch.randn(n, 20, h, w) for n, h, w in ((2, 9, 14), (1, 8, 8), (7, 31, 40))]
    compare(bundle(layers), way, inputs[0], dynamic={"tensors.0": dims}, more=tuple(inputs[1:]))


POOLING: dict[str, nn.Module] = {
    "max": nn.MaxPool2d(3, 2, 1),
    "max_ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
    "max_dilated": nn.MaxPool2d((2, 3), 1, 1, dilation=2),
    "max_wide": nn.MaxPool2d(5, 1, 2),
    "average": nn.AvgPool2d(3, 2, 1),
    "average_inside": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "average_ceil": nn.AvgPool2d((2, 3), 2, 1, ceil_mode=True),
    "average_ceil_inside": nn.AvgPool2d((2, 3), 2, 1, ceil_mode=True, count_include_pad=False),
    "average_override": nn.AvgPool2d(3, 2, 1, divisor_override=5),
    "whole": nn.AdaptiveAvgPool2d(1),
    "adaptive": nn.AdaptiveAvgPool2d((3, 2)),
}


@pytest.mark.parametrize("channels_last", [False, True])
def test_pooling(way: tuple[str, tuple[str, ...] | None], channels_last: bool) -> None:
    """NaN and infinities stay where they are; behind a convolution the channels are last.

    Adaptive pooling is products with a matrix of shares, which spread what is not finite: finite values only.
    """
    torch.manual_seed(0)
    x, pools = torch.randn(2, 20, 11, 12), POOLING
    if not channels_last:
        x[0, 0, 3, 4], x[1, 1, 0, 0], x[0, 2, :, :] = float("nan"), float("inf"), float("-inf")
        pools = {k: p for k, p in POOLING.items() if k != "adaptive"}
    layers = {k: nn.Sequential(nn.Conv2d(20, 20, 1), p) if channels_last else p for k, p in pools.items()}
    compare(bundle(layers), way, x)


def test_nan_stays_in_a_channels_last_maximum() -> None:
    model = nn.Sequential(nn.Conv2d(1, 20, 1, bias=False), nn.MaxPool2d(2, 1)).eval()
    x = torch.randn(1, 1, 6, 6)
    for place in ((0, 0), (2, 3), (5, 5)):
        x[(0, 0, *place)] = float("nan")
    with torch.no_grad():
        assert torch.equal(planish.compile(model, (x,))(x).isnan(), model(x).isnan())


def test_a_weight_that_is_computed(way: tuple[str, tuple[str, ...] | None]) -> None:
    class Computed(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, w * 2, padding=1) + F.conv_transpose2d(x, w, padding=1)

    compare(Computed().eval(), way, torch.randn(2, 6, 7, 8), torch.randn(6, 6, 3, 3))


@settings(max_examples=12)
@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (3, 8), (16, 16), (24, 48), (32, 20)]),
    st.tuples(st.integers(1, 4), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 5), st.integers(0, 5)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.tuples(st.integers(9, 12), st.integers(9, 17)),
    st.booleans(),
)
def test_any_window(
    batch: int,
    channels: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    size: tuple[int, int],
    bias: bool,
) -> None:
    groups = groups if all(c % groups == 0 for c in channels) else 1
    torch.manual_seed(0)
    conv = nn.Conv2d(*channels, kernel, stride, padding, dilation, groups, bias)
    compare(nn.Sequential(conv, nn.Hardswish()).eval(), WAYS["cpu"], torch.randn(batch, channels[0], *size))


# Passes --------------------------------------------------------------------------------------------------------------


def normed(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    for p in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert p is not None
        nn.init.uniform_(p, 0.5, 1.5)
    return norm.requires_grad_(False)


def rewritten(model: nn.Module, *inputs: torch.Tensor, names: tuple[str, ...]) -> tuple[Program, Step]:
    program = capture(model.eval(), inputs)[0]
    after, steps = run_pipeline(program, passes.resolve(names), TARGETS["cpu-avx2"], check_values=True)
    return after, steps[-1]


def targets(program: Program) -> list[str]:
    return [str(n.target) for n in program.nodes() if n.op in ("call_function", "call_module")]


def test_a_norm_folds_into_the_weights() -> None:
    for layer in (nn.Conv2d(4, 6, 3, bias=False), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)):
        program, step = rewritten(nn.Sequential(layer, normed(6)), torch.randn(1, 4, 5, 5), names=("canonicalize",))
        assert targets(program) == ["aten.convolution.default"]
        assert step.rewrites["scale folded into weights"] == step.rewrites["shift folded into bias"] == 1


def test_a_norm_does_not_fold_into_a_layer_that_is_used_elsewhere() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 6, 3), normed(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.norm(y) * y

    _, step = rewritten(Shared(), torch.randn(1, 4, 5, 5), names=("canonicalize",))
    assert "scale folded into weights" not in step.rewrites
    assert any(r.reason == "convolution is used elsewhere too" for r in step.refusals)


class Block(nn.Module):
    """What a mobile network is made of: expansion, depthwise, gate, projection, shortcut, concatenation, padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), normed(16), nn.Hardswish())
        self.expand = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), normed(32), nn.SiLU())
        self.deep = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), normed(32), nn.ReLU6())
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1), nn.Sigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(32, 16, 1, bias=False), normed(16))
        self.head = nn.Linear(48, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.deep(self.expand(x))
        y = self.project(y * self.gate(y)) + x
        z = F.max_pool2d(F.pad(torch.cat([y, x, x[:, 8:], y[:, :8]], 1), [0, 1, 0, 1]), 2)
        return self.head(z.mean([2, 3]).flatten(1))


def test_no_permute_stays_between_convolutions() -> None:
    torch.manual_seed(0)
    program, _ = rewritten(Block(), torch.randn(2, 3, 18, 14), names=("canonicalize", "choose-layout"))
    permutes = [n for n in program.nodes() if n.target is aten.permute.default]
    assert [n.args[0].op for n in permutes] == ["placeholder"]
    assert not {"aten.convolution.default", "aten.max_pool2d.default", "aten.transpose.int"} & set(targets(program))
    _, again = rewritten_again(program)
    assert again.rewrites == {}


def rewritten_again(program: Program) -> tuple[Program, Step]:
    after, steps = run_pipeline(program, passes.resolve(("choose-layout",)), TARGETS["cpu-avx2"], check_values=True)
    return after, steps[-1]


def test_a_block_of_a_mobile_network(way: tuple[str, tuple[str, ...] | None]) -> None:
    torch.manual_seed(0)
    model = Block().eval()
    dims = {0: planish.Dim("batch", 1, 8)}
    compare(model, way, torch.randn(2, 3, 18, 14), dynamic={"x": dims}, more=(torch.randn(5, 3, 18, 14),))


def test_padding_of_the_input_becomes_the_convolutions() -> None:
    """Uneven zeros around the model's input do; other values, and zeros that something else reads, stay."""
    x, names = torch.randn(2, 3, 9, 8), ("canonicalize", "choose-layout")
    pad, stem = nn.ZeroPad2d((0, 1, 2, 1)), nn.Conv2d(3, 8, 3, 2)
    assert not any("pad" in t for t in targets(rewritten(nn.Sequential(pad, stem), x, names=names)[0]))
    ones = nn.Sequential(nn.ConstantPad2d(1, 1.0), stem)
    assert any("pad" in t for t in targets(rewritten(ones, x, names=names)[0]))
    read = bundle({"conv": nn.Sequential(pad, stem), "sum": nn.Sequential(pad, nn.Softmax(1))})
    assert any("pad" in t for t in targets(rewritten(read, x, names=names)[0]))


def test_what_blocks_a_permute_is_named() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + y

    _, step = rewritten(
        Mixed(), torch.randn(1, 3, 8, 8), torch.randn(1, 8, 8, 8), names=("canonicalize", "choose-layout")
    )
    assert [r.reason for r in step.refusals] == ["its operand y is not computed with the channels last"]


def test_a_model_without_convolutions_keeps_its_layout() -> None:
    _, step = rewritten(
        nn.Sequential(nn.MaxPool2d(2)), torch.randn(1, 3, 8, 8), names=("canonicalize", "choose-layout")
    )
    assert step.rewrites == {}


def test_patches_of_a_vision_transformer_stay_rows() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 24, 4, 4), nn.LayerNorm(24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x).flatten(2).transpose(1, 2))

    program, _ = rewritten(Patches(), torch.randn(2, 3, 16, 12), names=("canonicalize", "choose-layout"))
    kinds = targets(program)
    assert kinds.count("aten.permute.default") == 1
    assert "aten.transpose.int" not in kinds
