"""Targets: names, what the machine can run, and that code for each level runs here."""

import dataclasses
import re

import pytest
import torch

import planish
from planish import targets
from planish.errors import TargetError, UnknownNameError
from planish.targets import TARGETS, Target


def test_names_are_keys() -> None:
    assert all(name == target.name for name, target in TARGETS.items())
    assert {"cpu", "cpu-avx2", "cpu-avx512", "reference"} <= TARGETS.keys()
    assert all(target.doc for target in TARGETS.values())


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UnknownNameError, match="unknown target 'cpuu'") as caught:
        Target.parse("cpuu")
    assert all(name in str(caught.value) for name in TARGETS)
    with pytest.raises(UnknownNameError):
        planish.compile(torch.nn.Linear(2, 2).eval(), (torch.zeros(1, 2),), "gpu0")


def test_targets_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TARGETS["cpu"].isa = "avx2"  # pyright: ignore


def test_a_target_parses_to_itself() -> None:
    target = dataclasses.replace(TARGETS["reference"], name="mine")
    assert Target.parse(target) is target


@pytest.mark.parametrize(
    ("levels", "isa", "lanes"), [(("avx2",), "avx2", 8), (("avx2", "avx512"), "avx512", 16)], ids=["avx2", "avx512"]
)
def test_host_takes_the_best_level(
    levels: tuple[str, ...], isa: str, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "host_isa_levels", lambda: levels)
    assert Target.host().isa == isa
    cpu = Target.parse("cpu")
    assert (cpu.name, cpu.isa, cpu.lanes, cpu.backend) == ("cpu", isa, lanes, "tvm")
    assert cpu.l2_bytes > 0


def test_missing_level_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "host_isa_levels", lambda: ("avx2",))
    with pytest.raises(TargetError, match=r"needs AVX512(.|\n)*offers: avx2(.|\n)*target='cpu'"):
        Target.parse("cpu-avx512")
    monkeypatch.setattr(targets, "host_isa_levels", lambda: ())
    with pytest.raises(TargetError, match=r"needs AVX2(.|\n)*none of the supported"):
        Target.parse("cpu-avx2")
    with pytest.raises(TargetError, match=r"neither AVX2(.|\n)*target='reference'"):
        Target.parse("cpu")
    assert Target.parse("reference").backend == "reference"


@pytest.mark.parametrize("name", TARGETS)
def test_code_runs_here(name: str) -> None:
    """Code of each level the machine has runs on it, AVX2 code on an AVX-512 machine too, within its registers."""
    isa = TARGETS[name].isa
    if TARGETS[name].is_arm:
        pytest.skip("test_arm.py runs its code in an emulator")
    if isa not in ("", "host", *targets.host_isa_levels()):
        pytest.skip(f"this machine lacks {isa}, which target {name} needs")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.GELU(), torch.nn.LayerNorm(50)).eval()
    x = torch.randn(9, 40)
    cm = planish.compile(model, (x,), name)
    loose = {"": 3e-6, "w8a8": 0.1, "w4a8-g32": 0.6}[TARGETS[name].format]
    torch.testing.assert_close(cm(x), model(x), rtol=1e-5, atol=loose)
    assembly = "".join(text for _, _, text in cm.sources())
    assert bool(re.search(r"%zmm\d", assembly)) == (cm.target.isa == "avx512")
    assert bool(re.search(r"%ymm\d", assembly)) or cm.target.isa != "avx2"


def test_the_assembly_of_a_kernel_holds_the_bodies_of_its_parallel_loops() -> None:
    cm = planish.compile(torch.nn.Softmax(-1).eval(), (torch.randn(64, 100),))
    text = next(assembly for name, _, assembly in cm.sources() if name == "softmax_0")
    assert re.search(r"^\.L__tvm_parallel_lambda\S*:$", text, re.MULTILINE)
    assert "vmaxps" in text
    assert ".loc" not in text
