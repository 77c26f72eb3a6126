"""Bundles for ARM: built with a cross compiler, run under qemu."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import planish
from planish.backends.bundle import toolchain
from planish.backends.bundle.check import check_bundle
from planish.backends.bundle.elf import localised
from planish.backends.bundle.sizes import in_c
from planish.backends.tvm.backend import TvmBackend
from planish.costs import FP32
from planish.errors import InputError, TargetError, ToolchainError, UnknownNameError, UnsupportedOpsError
from planish.passes import default_pipeline
from planish.passes.precision import QuantizeUniform
from planish.passes.precision.sites import MENU
from planish.program import dim_symbol
from planish.targets import ARM_LEVELS, Target

pytestmark = pytest.mark.needs_arm

DYNAMIC = {"input": {0: planish.Dim("rows", 1, 64)}}


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128)]
    return nn.Sequential(*first, nn.Linear(128, 70), nn.Linear(70, 33), nn.Softmax(-1)).eval()


def data(rows: int, depth: int = 64) -> torch.Tensor:
    return torch.randn(rows, depth, generator=torch.Generator().manual_seed(1))


def compiled(target: str, **options: Any) -> planish.CompiledModel:
    return planish.compile(perceptron(), (data(13),), target=target, dynamic=DYNAMIC, **options)


LEVEL = ARM_LEVELS["armv8-dotprod"]


def check(folder: Path, *words: str, cpu: str = "cortex-a76") -> subprocess.CompletedProcess[str]:
    command = [*toolchain.emulator(LEVEL), "-cpu", cpu, "./model_check", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def off_by(text: str) -> list[float]:
    """Differences that a check printed, as parts of the outputs' lengths."""
    return [float(line.split("off by ")[1].split()[0]) for line in text.splitlines() if "off by" in line]


@pytest.mark.parametrize("target", ["arm", "arm-int8", "arm-int4", "arm-int2", "arm-int4:cortex-a55"])
def test_a_bundle_computes_what_the_host_does(target: str, tmp_path: Path) -> None:
    call = compiled(target)
    call.save(tmp_path)
    found = check_bundle(tmp_path)
    assert found.passed, found.text
    assert list(found.off) == ["softmax"]
    x = call._compiled.executable.program.example  # pyright: ignore
    golden = torch.from_numpy(np.fromfile(tmp_path / "golden" / "out0.bin", np.float32)).view(13, 33)
    assert (golden - call(*x)).norm() < (1e-5 if target == "arm" else 0.02) * golden.norm()
    facts = json.loads((tmp_path / "manifest.json").read_text())
    assert facts["dims"] == {"rows": [1, 64]}
    assert facts["weights"]["bytes"] == (tmp_path / "weights.bin").stat().st_size


@pytest.mark.parametrize("level", ["armv8", "armv8-i8mm", "armv7"])
@pytest.mark.parametrize("form", ["", "-int8", "-int4"])
def test_every_level_on_a_processor_that_has_no_more(level: str, form: str) -> None:
    found = compiled(level + form).check()
    assert found.passed, found.text


def test_a_library_refuses_lesser_processors(tmp_path: Path) -> None:
    compiled("armv8-i8mm-int4").save(tmp_path)
    assert "this processor lacks an instruction set of the code: armv8-i8mm" in check(tmp_path).stderr


FORMS = ["w8a8", *(f"w{bits}a8{group}" for bits in (6, 5, 4, 3, 2) for group in ("-g32", "-g128", ""))]


class Layers(nn.Module):
    """Linear layers of unlike rows and depths: no multiple of a group, more than one block of sums."""

    sizes = ((7, 100), (64, 1500), (1, 1500))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(depth, 37) for _, depth in self.sizes)

    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each of its own input."""
        return tuple(layer(x) for layer, x in zip(self.layers, (a, b, c), strict=True))


LEVELS = [("arm", form) for form in FORMS]
LEVELS += [(level, form) for level in ("armv8", "armv8-i8mm", "armv7") for form in ("w8a8", "w4a8-g32", "w3a8")]


@pytest.mark.parametrize(("level", "form"), LEVELS)
def test_every_format_and_tile(level: str, form: str, tmp_path: Path) -> None:
    """With a row and a column whose products are largest."""
    model, inputs = Layers().eval().requires_grad_(False), [data(*size) for size in Layers.sizes]
    for layer, x in zip(model.layers, inputs, strict=True):
        layer.weight[3] = 1.0
        x[0] = 1.0
    passes = default_pipeline(QuantizeUniform(form, head=form))
    planish.compile(model, tuple(inputs), target=level, passes=passes).save(tmp_path)
    found = check_bundle(tmp_path)
    assert found.passed, found.text
    assert len(found.off) == 3
    for i, (layer, x) in enumerate(zip(model.layers, inputs, strict=True)):  # pyright: ignore
        golden = torch.from_numpy(np.fromfile(tmp_path / "golden" / f"out{i}.bin", np.float32)).view(len(x), 37)
        assert (golden - layer(x)).norm() < (2.0 if "w2" in form else 0.5) * layer(x).norm()


def test_formats_without_a_kernel_are_refused() -> None:
    for form in ("w4a8-g32-min", "w8a8-g32"):
        passes = default_pipeline(QuantizeUniform(form, head=form))
        with pytest.raises(UnsupportedOpsError, match="has no kernel for ARM"):
            planish.compile(perceptron(), (data(13),), target="arm", passes=passes)


def test_a_softmax_longer_than_the_caches(tmp_path: Path) -> None:
    x = torch.randn(2, 1 << 20, generator=torch.Generator().manual_seed(1))
    planish.compile(nn.Softmax(-1).eval(), (x,), target="arm").save(tmp_path)
    done = check(tmp_path)
    assert done.returncode == 0, done.stderr
    assert off_by(done.stdout)[0] < 1e-6


def test_sizes_are_those_of_the_plan(tmp_path: Path) -> None:
    call = compiled("arm-int4")
    call.save(tmp_path)
    (plan,) = call._compiled.executable.plans  # pyright: ignore
    arena = int(check(tmp_path).stdout.split("arena ")[1].split()[0])
    assert arena % 64 == 0
    assert arena > plan.arena({"rows": 13})[1]


def test_errors_have_messages(tmp_path: Path) -> None:
    compiled("arm-int4").save(tmp_path)
    done = check(tmp_path, cpu="cortex-a53")
    assert done.returncode == 2
    assert "model_init: this processor lacks an instruction set of the code: armv8-dotprod" in done.stderr
    weights = (tmp_path / "weights.bin").read_bytes()
    for spoilt in (weights[:-64], bytes([weights[0] ^ 1]) + weights[1:]):
        (tmp_path / "weights.bin").write_bytes(spoilt)
        assert "the weights are not those of this model" in check(tmp_path).stderr


MAIN = """
#include "one.h"
#include "two.h"
#include <stdio.h>
#include <stdlib.h>
static void *load(const char *path, size_t *n) {
  FILE *f = fopen(path, "rb"); void *p = aligned_alloc(64, 1 << 20); *n = fread(p, 1, 1 << 20, f); return p;
}
#define USE(P, DIM) do { \\
  size_t n; void *w = load(#P "/weights.bin", &n); const int64_t dims[] = {DIM}, many[] = {65}; \\
  int64_t need = P##_arena_bytes(dims); void *arena = aligned_alloc(64, need); P##_t *m; \\
  const void *in[] = {load(#P "/golden/in0.bin", &(size_t){0}), NULL, NULL}; \\
  void *out[] = {aligned_alloc(64, 1 << 14), NULL}; \\
  printf("%d ", P##_arena_bytes(many) < 0); \\
  printf("%d ", P##_init(&m, arena, 64, w, n)); \\
  printf("%d ", P##_init(&m, arena, need, w, n)); \\
  printf("%d ", P##_run(m, in, out, many)); \\
  printf("%d ", P##_set_threads(m, 0)); \\
  P##_set_threads(m, 2); \\
  in[1] = in[0], printf("%d ", P##_run(m, in, out, dims)), in[1] = NULL; \\
  printf("%d ", P##_run(m, in + 1, out, dims)); \\
  int code = P##_run(m, in, out, dims); \\
  float *want = load(#P "/golden/out0.bin", &n), *got = out[0], off = 0; \\
  for (size_t i = 0; i < n / 4; i++) off = off > want[i] - got[i] ? off : want[i] - got[i]; \\
  printf("%d %d\\n", code, off < 1e-5); } while (0)
int main(void) { USE(one, 13); USE(two, 13); return 0; }
"""


def test_two_models_in_a_program(tmp_path: Path) -> None:
    for name, target in (("one", "arm-int4"), ("two", "arm")):
        compiled(target).save(tmp_path / name, prefix=name)
    (tmp_path / "main.c").write_text(MAIN)
    cc, tools = toolchain.compiler(LEVEL)
    threaded, single = ([f"one/libone{end}", f"two/libtwo{end}"] for end in ("", "_single"))
    for libraries in ([f"{name}.a" for name in threaded], [f"{name}.a" for name in single]):
        toolchain.call([cc, "-Ione", "-Itwo", "main.c", *libraries, "-o", "main", "-lm", "-pthread"], tmp_path)
        text = toolchain.call([*toolchain.emulator(LEVEL), "-cpu", "cortex-a76", "./main"], tmp_path)
        assert text == "1 3 0 5 9 11 11 0 1\n" * 2
    shared = [f"./{name}.so" for name in threaded]
    toolchain.call([cc, "-Ione", "-Itwo", "main.c", *shared, "-o", "main"], tmp_path)
    text = toolchain.call([*toolchain.emulator(LEVEL), "-cpu", "cortex-a76", "./main"], tmp_path)
    assert text == "1 3 0 5 9 11 11 0 1\n" * 2
    assert _names(f"{tools}nm", tmp_path / "one/libone.a") == _names(f"{tools}nm", tmp_path / "one/libone_single.a")
    used = toolchain.call([f"{tools}nm", "-u", single[0] + ".so", "-D"], tmp_path)
    assert "pthread" not in used
    exported = toolchain.call([f"{tools}nm", "-D", "--defined-only", "one/libone.so"], tmp_path)
    assert {line.split()[-1] for line in exported.splitlines()} == {
        f"one_{n}" for n in ("arena_bytes", "error", "init", "run", "set_threads")
    }


def test_code_for_more_than_a_processor_has_traps_if_forced(tmp_path: Path) -> None:
    compiled("arm-int4").save(tmp_path)
    assert not check_bundle(tmp_path, "cortex-a53").passed
    (tmp_path / "lie.c").write_text("unsigned long getauxval(unsigned long what) { return what ? ~0ul : 0; }")
    cc, _ = toolchain.compiler(LEVEL)
    flags = ["-static", "-o", "model_check"]
    toolchain.call([cc, "model_check.c", "lie.c", "libmodel_single.a", *flags, "-lm"], tmp_path)
    assert check_bundle(tmp_path, "cortex-a76").passed
    forced = check_bundle(tmp_path, "cortex-a53")
    assert "stopped by signal 4" in forced.text


@pytest.mark.parametrize("threads", ["", "-DONE_SINGLE_THREAD"])
def test_the_c_code_under_sanitizers(threads: str, tmp_path: Path) -> None:
    """With the kernels of the host's twin: ASan and UBSan see all that the shim and the check do with memory."""
    for name in ("one", "two"):
        call = compiled("arm-int4")
        call.save(tmp_path / name, prefix=name)
        twin = TvmBackend().compile(call._compiled.executable.program, call.target.twin)  # pyright: ignore
        for i, each in enumerate(twin.objects):
            (tmp_path / name / f"code{i}.o").write_bytes(each.code)
        codes = [f"code{i}.o" for i in range(len(twin.objects))]
        shim = ["gcc", *SANITIZED, *([threads] if threads and name == "one" else []), "-c", f"{name}.c"]
        toolchain.call([*shim, "-o", "shim.o"], tmp_path / name)
        toolchain.call(["ld", "-r", "-o", "whole.o", "shim.o", *codes], tmp_path / name)
        toolchain.call(["objcopy", "--wildcard", f"--keep-global-symbol={name}_*", "whole.o"], tmp_path / name)
        program = ["gcc", *SANITIZED, f"{name}_check.c", "whole.o", "-o", "host_check", "-lm", "-pthread"]
        toolchain.call(program, tmp_path / name)
        text = toolchain.call(["./host_check", ".", "3"], tmp_path / name)
        assert "passed" in text
    (tmp_path / "main.c").write_text(MAIN)
    both = ["main.c", "one/whole.o", "two/whole.o"]
    toolchain.call(["gcc", *SANITIZED, "-Ione", "-Itwo", *both, "-o", "main", "-lm", "-pthread"], tmp_path)
    unfreed = ["env", "ASAN_OPTIONS=detect_leaks=0"]
    assert toolchain.call([*unfreed, "./main"], tmp_path) == "1 3 0 5 9 11 11 0 1\n" * 2


SANITIZED = ("-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def test_a_budget_by_modelled_times(tmp_path: Path) -> None:
    """The bundle's output differs from the model's by what the report foretells."""
    batches = [(torch.randn(13, 64, generator=torch.Generator().manual_seed(i)),) for i in range(8)]
    slow = compiled("arm:cortex-a55", budget=planish.Budget(bits=8.5), calibration=batches).assignment
    call = compiled("arm:cortex-a55", budget=planish.Budget(ms=0.95 * slow.ms), calibration=batches)
    chosen = call.assignment
    assert chosen.ms <= 0.95 * slow.ms < chosen.ms_fp32
    assert "ms by the cost table" in chosen.table()
    assert "of cortex-a76, modelled at 2 GHz and 10 GB/s" in chosen.table()
    call.save(tmp_path)
    found = check_bundle(tmp_path)
    assert found.passed, found.text
    golden = torch.from_numpy(np.fromfile(tmp_path / "golden" / "out0.bin", np.float32)).view(13, 33)
    loss = 1 - torch.cosine_similarity(golden, perceptron()(data(13)), dim=1).mean().item()
    assert loss == pytest.approx(chosen.predicted_loss, rel=0.5)


@pytest.mark.parametrize("isa", ARM_LEVELS)
def test_every_level_has_a_cost_table(isa: str) -> None:
    costs = Target.parse(ARM_LEVELS[isa].target).costs
    assert costs is not None
    assert costs.machine.isa == isa
    assert {FP32, *MENU} == set(costs.formats)


def test_zig_links_where_there_is_no_gcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.shutil, "which", lambda name, which=shutil.which: _but_gcc(name, which))
    compiled("arm-int4").save(tmp_path)
    found = check_bundle(tmp_path)
    assert found.passed, found.text
    names = _names("aarch64-linux-gnu-nm", tmp_path / "libmodel.a")
    assert names == {f"model_{n}" for n in ("arena_bytes", "error", "init", "run", "set_threads")}
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ToolchainError, match=r"no C compiler for(.|\n)*looked for arm.*gcc and for zig(.|\n)*planish"):
        compiled("armv7").save(tmp_path)


def _but_gcc(name: str, which: Callable[[str], str | None]) -> str | None:
    return None if name.endswith("gcc") else which(name)


def _names(nm: str, library: Path) -> set[str]:
    """What a static library exports."""
    text = toolchain.call([nm, "--defined-only", "-g", library], library.parent)
    return {line.split()[-1] for line in text.splitlines() if len(line.split()) == 3}


def test_only_object_files_have_their_symbols_made_local() -> None:
    with pytest.raises(ToolchainError, match="no relocatable"):
        localised(b"\x7fELF and so on, but no object file", {"main"})


@pytest.mark.parametrize("level", ["arm", "armv7"])
@pytest.mark.parametrize(("channels", "window", "stride"), [(40, 3, 1), (21, 5, 2)])
def test_depthwise_layers_on_codes(level: str, channels: int, window: int, stride: int) -> None:
    model = nn.Sequential(nn.Conv2d(channels, channels, window, stride, window // 2, groups=channels), nn.ReLU()).eval()
    x = torch.randn(2, channels, 9, 11)
    cm = planish.compile(model, (x,), target=f"{level}-int8", calibration=[(x,)])
    assert "kernel depthwise_w8a8" in cm.report()
    assert (cm(x) - model(x)).norm() < 0.02 * model(x).norm()
    assert max(off_by(cm.check(runner="qemu").text)) <= 1e-6


@pytest.mark.parametrize("level", ["arm", "armv7"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_half_precision(level: str, dtype: torch.dtype) -> None:
    model, x = perceptron().to(dtype), data(13).to(dtype)
    cm = planish.compile(model, (x,), target=level)
    assert (cm(x) - model(x)).float().norm() < 4 * torch.finfo(dtype).eps * model(x).float().norm()
    assert max(off_by(cm.check(runner="qemu").text)) <= torch.finfo(dtype).eps / 4


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot begin C names"):
        compiled("arm").save(tmp_path, prefix="my-model")
    reference = planish.compile(perceptron(), (data(13),), target="reference")
    with pytest.raises(TargetError, match="cannot be saved yet"):
        reference.save(tmp_path)


def test_sizes_in_c() -> None:
    rows, width = dim_symbol("rows"), dim_symbol("width")
    assert in_c(12, ()) == "INT64_C(12)"
    assert in_c(4 * rows**2 + width, ("rows", "width")) == "INT64_C(4)*(d[0])*(d[0]) + d[1]"
    with pytest.raises(UnknownNameError, match="cannot be written in C"):
        in_c(rows / 3, ("rows",))


def test_arm_targets_parse_on_any_machine() -> None:
    assert Target.parse("arm-int4").is_arm
    assert Target.parse("arm-int4").lanes == 4


def test_processors() -> None:
    tuned = Target.parse("arm-int4:cortex-a55")
    assert (tuned.name, tuned.mcpu, tuned.l2_bytes) == ("arm-int4", "cortex-a55", 128 << 10)
    with pytest.raises(UnknownNameError, match=r"unknown processor 'cortex-a99'(.|\n)*neoverse-n1"):
        Target.parse("arm-int4:cortex-a99")
    with pytest.raises(TargetError, match="needs armv8-dotprod, which cortex-a53 does not have"):
        Target.parse("arm:cortex-a53")
    with pytest.raises(TargetError, match="only ARM targets can"):
        Target.parse("cpu:cortex-a55")


def test_bundles_are_checked_from_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from planish.cli import app

    with pytest.raises(InputError, match="holds no bundle"):
        check_bundle(tmp_path)
    compiled("arm-int4").save(tmp_path)
    words = ["bundle", "check", str(tmp_path)]
    found = CliRunner().invoke(app, [*words, "--cpu", "neoverse-n1"])
    assert found.exit_code == 0
    assert "passed" in found.output
    assert CliRunner().invoke(app, [*words, "--cpu", "cortex-a53"]).exit_code == 1
    with pytest.raises(ToolchainError, match="no processor 'cortex-b1'"):
        check_bundle(tmp_path, "cortex-b1")
    with pytest.raises(UnknownNameError, match="unknown runner"):
        compiled("arm").check("board")
