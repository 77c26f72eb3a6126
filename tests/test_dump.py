"""The dump directory: its programs run alone, it is stable, and it never takes what is not its own."""

import filecmp
import json
import operator
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import fx

import planish
from planish.capture import capture
from planish.dump import Dump, content_hash, split_layout
from planish.ops import aten
from planish.pipeline import Pass, Refusal, Result, run_pipeline
from planish.printer import DumpError, program_text, short_source
from planish.program import Dim, Program, add_constant
from planish.targets import TARGETS, Target

TARGET = TARGETS["reference"]


class Small(torch.nn.Module):
    """Linear, GELU, layer norm and softmax, and constants of awkward kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(8, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.register_buffer("mask", torch.arange(16) % 3 == 0)
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("turned", torch.randn(16, 16).t())
        self.register_buffer("same", self.turned[:, 2:5])
        self.register_buffer("wide", torch.randn(1, 16).expand(16, 16))
        self.register_buffer("index", torch.tensor([3, 1, 2]))
        self.register_buffer("main", torch.randn(16))  # a name that the file itself defines

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.norm(torch.nn.functional.gelu(self.linear(x)))
        y = (y * self.scale).masked_fill(self.mask, -float("inf")).softmax(-1)
        y = y @ self.turned @ self.wide + self.main
        return y, (y @ self.same)[:, self.index[0] - self.index[1] : 3] + self.index


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(self.linear(x))


@dataclass(frozen=True)
class Double(Pass):
    """Replace ``gelu(x)`` by ``gelu(x) * 2 * 0.5``, and refuse the softmax."""

    name: ClassVar[str] = "double-gelu"

    def run(self, program: Program, target: Target) -> Result:
        """before: ``y = gelu(x)``; after: ``z = gelu(x); t = mul(z, 2.0); y = mul(t, half)``."""
        result = Result()
        graph = program.module.graph
        for node in list(graph.nodes):
            if node.target is aten.softmax.int:
                result.refusals.append(Refusal.at("double softmax", node, "it is <not> a gelu"))
            if node.target is not aten.gelu.default:
                continue
            name = add_constant(program.module, "half", torch.tensor(0.5))
            with graph.inserting_before(node):
                half = graph.create_node("get_attr", name, name=name)
                copy = graph.node_copy(node)
                two = graph.call_function(aten.mul.Tensor, (copy, 2.0))
                new = graph.call_function(aten.mul.Tensor, (two, half))
            copy.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            result.rewrites["gelu"] += 1
        return result


@dataclass(frozen=True)
class Idle(Pass):
    """Change nothing."""

    name: ClassVar[str] = "do-nothing"

    def run(self, program: Program, target: Target) -> Result:
        """before and after are the same."""
        return Result()


@pytest.fixture(scope="module")
def small() -> Program:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).t()  # not contiguous
    return capture(Small().eval(), (x,), {"x": {0: Dim("batch", 2, 16)}})[0]


def plain() -> Program:
    return capture(Plain().eval(), (torch.ones(2, 8),))[0]


def write(program: Program, directory: Path, *passes: Pass, dump_weights: bool = True) -> Program:
    dump = Dump(directory, dump_weights=dump_weights)
    last, _ = run_pipeline(program, passes, TARGET, observe=dump)
    dump.kernels([("linear_0", "def linear_0(): pass\n", "ret\n"), ("copy_1", "def copy_1(): pass\n", "")])
    dump.finish(TARGET)
    return last


def execute(file: Path, tmp_path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Run a stage alone, in a folder of its own and without planish's help; what it prints and saves."""
    saved = tmp_path / f"{file.stem}.safetensors"
    done = subprocess.run(
        [sys.executable, "-I", str(file), "--save", str(saved)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, load_file(saved)


def test_every_stage_runs_alone_and_gives_the_programs_values(small: Program, tmp_path: Path) -> None:
    folder = tmp_path / "dump"
    last = write(small, folder, Double(), Idle())
    printed = []
    for name, program in (("00-captured", small), ("02-do-nothing", last)):
        text, saved = execute(folder / f"{name}.py", tmp_path)
        printed.append(text)
        for spec, want in zip(program.outputs, program.run(*program.example), strict=True):
            assert torch.equal(saved[spec.name], want), spec
            assert f"{spec.name}: {want.dtype} {list(want.shape)} sha256 " in text
    assert printed[0] == printed[1]
    assert "import planish" not in (folder / "02-do-nothing.py").read_text()


def test_the_directory_holds_what_changed_and_why(small: Program, tmp_path: Path) -> None:
    write(small, tmp_path / "dump", Double(), Idle())
    names = sorted(p.relative_to(tmp_path / "dump").as_posix() for p in (tmp_path / "dump").rglob("*") if p.is_file())
    assert names == [
        "00-captured.py",
        "01-double-gelu.diff",
        "01-double-gelu.py",
        "01-double-gelu.why.txt",
        "02-do-nothing.py",
        "constants.safetensors",
        "index.html",
        "inputs.safetensors",
        "kernels/copy_1.tir.py",
        "kernels/linear_0.s",
        "kernels/linear_0.tir.py",
        "pipeline.json",
    ]
    diff = (tmp_path / "dump" / "01-double-gelu.diff").read_text()
    changed = [line for line in diff.splitlines() if line[0] in "+-"][2:]
    assert [line[0] for line in changed].count("-") <= 2
    assert any("torch.ops.aten.mul.Tensor" in line for line in changed)
    assert any(line.startswith("+half_1 = constant(") for line in changed)
    why = (tmp_path / "dump" / "01-double-gelu.why.txt").read_text()
    assert why.startswith("double softmax not done at softmax: it is <not> a gelu\n  at: ")
    assert "test_dump.py:" in why
    manifest = json.loads((tmp_path / "dump" / "pipeline.json").read_text())
    assert manifest["format"] == "planish-dump"
    assert manifest["complete"] is True
    assert manifest["target"] == "reference"
    assert [s["name"] for s in manifest["steps"]] == ["captured", "double-gelu", "do-nothing"]
    assert manifest["steps"][1]["rewrites"] == {"gelu": 1}
    assert sorted(manifest["files"]) == names


def test_the_index_is_offline_and_escapes(small: Program, tmp_path: Path) -> None:
    write(small, tmp_path / "dump", Double(), Idle())
    page = (tmp_path / "dump" / "index.html").read_text()
    assert "http" not in page
    assert "<script" not in page
    assert "it is &lt;not&gt; a gelu" in page
    assert "gelu &times; 1" in page
    assert page.count("<details>") == 2
    links = [part.split('"')[0] for part in page.split('<a href="')[1:]]
    assert links
    assert all((tmp_path / "dump" / link).is_file() for link in links)


def test_two_dumps_differ_only_in_milliseconds(small: Program, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(small, tmp_path / name, Double())
    files = [{p.relative_to(tmp_path / d).as_posix() for p in (tmp_path / d).rglob("*") if p.is_file()} for d in "ab"]
    assert files[0] == files[1]
    _, differ, errors = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files[0], shallow=False)
    assert set(differ) <= {"pipeline.json", "index.html"}
    assert not errors
    for file, word in (("pipeline.json", '"ms"'), ("index.html", " ms<")):
        pages = [(tmp_path / name / file).read_text().splitlines() for name in ("a", "b")]
        assert all(word in old and word in new for old, new in zip(*pages, strict=True) if old != new)
    everything = "".join(
        p.read_text() for p in (tmp_path / "a").rglob("*") if p.is_file() and p.suffix != ".safetensors"
    )
    assert "0x" not in everything
    assert str(tmp_path) not in everything


def test_each_constant_is_stored_once(small: Program, tmp_path: Path) -> None:
    write(small, tmp_path / "dump", Double())
    stored = load_file(tmp_path / "dump" / "constants.safetensors")
    # weight, bias, two of the norm, mask, scale (= half), turned, same, wide (one row of it), index, main
    assert len(stored) == 11
    assert sorted(t.numel() for t in stored.values())[0] == 1
    assert {t.dtype for t in stored.values()} == {torch.float32, torch.bool, torch.int64}
    assert max(t.numel() for t in stored.values()) == 256
    assert sum(t.numel() == 256 for t in stored.values()) == 1


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).t(),
        torch.randn(3, 1).expand(3, 5),
        torch.randn(6, 8)[1:4, ::2],
        torch.tensor(2.5),
        torch.zeros(0, 3),
        torch.arange(6).unfold(0, 3, 1),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.arange(4, dtype=torch.bfloat16),
        torch.tensor([True, False])[:1].expand(4, 1),
    ],
    ids=lambda t: f"{str(t.dtype)[6:]}{list(t.shape)}{t.stride()}",
)
def test_layout_expression_restores_values_and_strides(tensor: torch.Tensor) -> None:
    def strided(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
        return torch.empty_strided(values.shape, strides, dtype=values.dtype).copy_(values)

    core, layout = split_layout(tensor)
    assert core.is_contiguous()
    back = eval(layout.format("core"), {"core": core, "strided": strided})
    assert torch.equal(back, tensor)
    overlaps = tensor.shape == (4, 3) and tensor.stride() == (1, 1)
    assert overlaps or tensor.numel() <= 1 or back.stride() == tensor.stride()


def test_content_hash_tells_dtype_shape_and_values_apart() -> None:
    values = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.ones(4), torch.zeros(0)]
    assert len({content_hash(v) for v in values}) == len(values)
    assert content_hash(torch.ones(4)) == content_hash(torch.ones(4))


def test_without_weights_the_files_say_so_and_run(small: Program, tmp_path: Path) -> None:
    folder = tmp_path / "dump"
    write(small, folder, Idle(), dump_weights=False)
    stored = load_file(folder / "constants.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bool, torch.int64}
    first, values = execute(folder / "00-captured.py", tmp_path)
    last, _ = execute(folder / "01-do-nothing.py", tmp_path)
    assert first == last
    assert not torch.equal(values[small.outputs[0].name], small.run(*small.example)[0])
    assert "weights were not dumped" in (folder / "00-captured.py").read_text()
    assert "Weights were not dumped" in (folder / "index.html").read_text()


def test_a_directory_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DumpError, match="not a dump"):
        Dump(tmp_path)
    (tmp_path / "pipeline.json").write_text('{"format": "other", "files": ["notes.txt"]}')
    with pytest.raises(DumpError, match="not a dump"):
        Dump(tmp_path)
    with pytest.raises(DumpError, match="is a file"):
        Dump(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_older_dump_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    program = plain()
    folder = tmp_path / "dump"
    write(program, folder, Double(), Idle())
    (folder / "saved.safetensors").write_text("mine")
    manifest = json.loads((folder / "pipeline.json").read_text())
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    manifest["files"] += ["../outside.txt", str(outside)]
    (folder / "pipeline.json").write_text(json.dumps(manifest))
    write(program, folder)
    assert not (folder / "01-double-gelu.py").exists()
    assert (folder / "saved.safetensors").exists()
    assert outside.exists()


def test_a_pass_that_fails_leaves_the_stages_before_it(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Broken(Pass):
        """Fail."""

        name: ClassVar[str] = "break-down"

        def run(self, program: Program, target: Target) -> Result:
            """Raise."""
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(plain(), tmp_path / "dump", Double(), Broken())
    execute(tmp_path / "dump" / "01-double-gelu.py", tmp_path)
    assert "did not finish" in (tmp_path / "dump" / "index.html").read_text()
    Dump(tmp_path / "dump")  # an unfinished dump may be replaced


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DumpError, match="cannot be written"):
        write(plain(), tmp_path / "file" / "dump")


def test_the_largest_error_is_shown_where_values_were_checked(tmp_path: Path) -> None:
    dump = Dump(tmp_path / "dump")
    run_pipeline(plain(), [Double()], TARGET, check_values=True, observe=dump)
    dump.finish(TARGET)
    steps = json.loads((tmp_path / "dump" / "pipeline.json").read_text())["steps"]
    assert [s["max_error"] for s in steps] == [None, 0.0]
    page = (tmp_path / "dump" / "index.html").read_text()
    assert "not checked" in page
    assert "0.0e+00" in page


def test_a_kernel_name_cannot_leave_the_directory(tmp_path: Path) -> None:
    dump = Dump(tmp_path / "dump")
    run_pipeline(plain(), [], TARGET, observe=dump)
    with pytest.raises(DumpError, match="cannot be a file of a dump"):
        dump.kernels([("../evil", "x", "")])


def fuse(program: Program) -> Program:
    """By hand: linear and gelu in a group that holds a constant of its own; the result is used as a tuple."""
    program = program.clone()
    graph = fx.Graph()
    x, weight, bias = (graph.placeholder(n) for n in ("x", "weight", "bias"))
    linear = graph.call_function(aten.linear.default, (x, weight, bias))
    gelu = graph.call_function(aten.gelu.default, (linear,))
    one = graph.get_attr("one")
    scaled = graph.call_function(aten.mul.Tensor, (gelu, one))
    graph.output((scaled, linear))
    group = fx.GraphModule({"one": torch.ones(())}, graph, class_name="fused_linear_gelu_1")
    program.module.add_module("fused_linear_gelu_1", group)
    outer = program.module.graph
    by_target = {n.target: n for n in outer.nodes}
    first, second = by_target[aten.linear.default], by_target[aten.gelu.default]
    with outer.inserting_before(first):
        call = outer.call_module("fused_linear_gelu_1", first.args)
        call.meta["val"] = (second.meta["val"], first.meta["val"])
        value = outer.call_function(operator.getitem, (call, 0))
        value.meta["val"] = second.meta["val"]
    second.replace_all_uses_with(value)
    outer.erase_node(second)
    outer.erase_node(first)
    program.module.recompile()
    return program


def test_a_fused_group_is_a_function(tmp_path: Path) -> None:
    program = plain()
    fused = fuse(program)
    text = program_text(fused, sources=False)
    assert text == (
        "fused_linear_gelu_1_one = ...  # float32[]\n"
        "linear_weight = ...  # float32[16, 8]\n"
        "linear_bias = ...  # float32[16]\n"
        "\n\n"
        "def fused_linear_gelu_1(x, weight, bias):\n"
        "    linear_default = torch.ops.aten.linear.default(x, weight, bias)\n"
        "    gelu_default = torch.ops.aten.gelu.default(linear_default)\n"
        "    mul_tensor = torch.ops.aten.mul.Tensor(gelu_default, fused_linear_gelu_1_one)\n"
        "    return (mul_tensor, linear_default)\n"
        "\n\n"
        "def forward(x):\n"
        "    # x: float32[2, 8]\n"
        "    fused_linear_gelu_1_out = fused_linear_gelu_1(x, linear_weight, linear_bias)"
        "  # (float32[2, 16], float32[2, 16])\n"
        "    getitem = fused_linear_gelu_1_out[0]  # float32[2, 16]\n"
        "    return (getitem,)\n"
    )
    write(fused, tmp_path / "dump")
    _, saved = execute(tmp_path / "dump" / "00-captured.py", tmp_path)
    # not bit by bit: PyTorch's GEMM may round otherwise where the weights lie at another alignment
    torch.testing.assert_close(saved[program.outputs[0].name], program.run(*program.example)[0])


def test_arguments_of_every_kind_print_as_python() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(aten.sym_size.int, (x, 0))
    half = graph.call_function(operator.floordiv, (size, 2))
    less = graph.call_function(operator.neg, (half,))
    most = graph.call_function(torch.sym_max, (less, size))
    full = graph.call_function(aten.full.default, ([most, 1], -float("inf")), {"dtype": torch.bfloat16})
    graph.call_function(aten.index.Tensor, (full, [None, x]), {})
    graph.call_function(aten.empty.memory_format, ([size],), {"layout": torch.strided, "device": torch.device("cpu")})
    graph.output((full,))
    program = replace(plain(), module=fx.GraphModule({}, graph), dims={})
    assert program_text(program).splitlines()[1:] == [
        "    sym_size_int = torch.ops.aten.sym_size.int(x, 0)",
        "    floordiv = sym_size_int // 2",
        "    neg = -floordiv",
        "    sym_max = torch.sym_max(neg, sym_size_int)",
        '    full_default = torch.ops.aten.full.default([sym_max, 1], float("-inf"), dtype=torch.bfloat16)',
        "    index_tensor = torch.ops.aten.index.Tensor(full_default, [None, x])",
        "    empty_memory_format = torch.ops.aten.empty.memory_format([sym_size_int], "
        'layout=torch.strided, device=torch.device("cpu"))',
        "    return (full_default,)",
    ]


def test_what_has_no_spelling_is_an_error() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(subprocess.run, (x,)),))
    program = replace(plain(), module=fx.GraphModule({}, graph))
    with pytest.raises(DumpError, match="cannot be written as Python"):
        program_text(program)


def test_source_lines_do_not_hold_the_machines_folders() -> None:
    file = Path(torch.__file__).parent / "nn" / "modules" / "linear.py"
    assert short_source(f"{file}:12 in forward: x") == "torch/nn/modules/linear.py:12 in forward: x"
    assert short_source("<string>:3 in f") == "<string>:3 in f"
    assert short_source("") == ""


def test_constants_that_were_made_in_inference_mode(tmp_path: Path) -> None:
    model, x = torch.nn.Linear(64, 64).eval(), torch.randn(4, 64)
    with torch.inference_mode():
        planish.compile(model, (x,), target="cpu-int8", dump=tmp_path / "dump")
    assert (tmp_path / "dump" / "constants.safetensors").exists()
