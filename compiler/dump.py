"""Dump directory: one runnable program per pass, what changed and why, and an index to read it by."""

from __future__ import annotations

import ctypes
import difflib
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
import msgspec
import safetensors.torch
import torch

import planish
from planish.assignment import Assignment
from planish.pipeline import Step
from planish.printer import DumpError, describe, program_text, short_source
from planish.program import Program
from planish.targets import Target

MANIFEST = "pipeline.json"
_FORMAT = "planish-dump"
_FILE_NAME = re.compile(r"(kernels/)?\w[\w.+-]*")


class StepRecord(msgspec.Struct, frozen=True):
    """One step in ``pipeline.json``; ``ms`` is the pass's own time."""

    name: str
    ms: float
    ops_before: int
    ops_after: int
    rewrites: dict[str, int]
    refusals: list[dict[str, str]]
    max_error: float | None
    changed: bool
    notes: list[dict[str, str]]


class Manifest(msgspec.Struct):
    """``pipeline.json``. ``files`` is everything planish wrote; ``complete`` is false while a compile runs or after it
    failed. ``state`` names the buffers that are the last inputs before a call, and the last outputs after it."""

    format: Literal["planish-dump"]
    version: Literal[1]
    planish: str
    torch: str
    target: str
    complete: bool
    dump_weights: bool
    dims: dict[str, tuple[int, int]]
    inputs: list[str]
    outputs: list[str]
    state: list[str]
    steps: list[StepRecord]
    kernels: list[str]
    files: list[str]


class Dump:
    """Writes a dump directory step by step, so a pass that fails leaves the stages before it.

    Use it as ``run_pipeline(..., observe=dump)``, then call ``kernels`` and ``finish``. Two dumps of the same compile
    differ only in the milliseconds of ``pipeline.json`` and ``index.html``.

    Args:
        directory: created if missing; what is in it is replaced only if planish wrote it.
        dump_weights: store floating-point constants; False replaces them by seeded random numbers, and the files say
            so. Integer and boolean constants are stored in either case: they are indices and masks.

    Raises:
        DumpError: the directory holds something else, or cannot be written.
    """

    def __init__(self, directory: str | Path, *, dump_weights: bool = True) -> None:
        self.directory = Path(directory)
        self.dump_weights = dump_weights
        self._store = _Store(dump_weights)
        self._inputs: dict[str, str] = {}
        self._stem, self._text = "", ""
        self._diffs: list[list[str]] = []
        self._manifest = self._empty()
        _check_replaceable(self.directory)

    def __call__(self, step: Step, program: Program) -> None:
        """Write the program that ``step`` left; step ``captured`` starts the dump anew."""
        if step.name == "captured":
            self._begin(program)
        index = len(self._manifest.steps)
        stem = f"{index:02d}-{step.name}"
        names = [spec.name for spec in program.outputs]
        body = program_text(program, expression=self._store.expression, reserved=_RESERVED)
        text = program_text(program, sources=False, expression=self._store.expression, reserved=_RESERVED)
        files: dict[str, str] = {f"{stem}.py": _runnable(stem, body, self._inputs, _unique(names))}
        before, self._text = self._text, text
        diff = [] if index == 0 else _diff(before, text, self._stem, stem)
        if diff:
            files[f"{stem}.diff"] = "\n".join(diff) + "\n"
        refusals = [
            {"rule": r.rule, "node": r.node, "reason": r.reason, "where": short_source(r.where)} for r in step.refusals
        ]
        notes = [{"rule": n.rule, "node": n.node, "text": n.text, "where": short_source(n.where)} for n in step.notes]
        if refusals or notes:
            files[f"{stem}.why.txt"] = "\n".join([*map(_note, notes), *map(_why, refusals)])
        if program.assignment is not None:
            files["precision.json"] = program.assignment.encode().decode()
        self._stem = stem
        self._diffs.append(diff)
        record = StepRecord(
            step.name,
            step.ms,
            step.ops_before,
            step.ops_after,
            dict(step.rewrites),
            refusals,
            step.max_error,
            bool(diff),
            notes,
        )
        self._manifest.steps.append(record)
        self._write_tensors()
        self._write(files)

    def kernels(self, sources: Sequence[tuple[str, str, str]]) -> None:
        """Write each kernel's ``(name, TIR text, assembly)`` to ``kernels/``; an empty text is left out."""
        files: dict[str, str] = {}
        for name, tir, assembly in sources:
            self._manifest.kernels.append(name)
            files |= {f"kernels/{name}{end}": text for end, text in ((".tir.py", tir), (".s", assembly)) if text}
        self._write(files)

    def finish(self, target: Target, assignment: Assignment | None = None) -> None:
        """Mark the dump complete, write the assignment with what compiling added, let go of stored tensors."""
        self._manifest.target = target.name
        self._manifest.complete = True
        self._write({"precision.json": assignment.encode().decode()} if assignment else {})
        self._store = _Store(self.dump_weights)
        self._text = ""

    def _begin(self, program: Program) -> None:
        _check_replaceable(self.directory)
        old = _read_manifest(self.directory)
        for name in old.files if old else ():
            if _FILE_NAME.fullmatch(name):  # the manifest may be damaged: delete nothing outside the directory
                (self.directory / name).unlink(missing_ok=True)
        self._store = _Store(self.dump_weights)
        self._inputs, self._diffs = {}, []
        self._stem, self._text = "", ""
        self._manifest = self._empty()
        self._manifest.dims = {d.name: (d.min, d.max) for d in program.dims.values()}
        self._manifest.inputs = [str(spec) for spec in program.inputs]
        self._manifest.outputs = [str(spec) for spec in program.outputs]
        self._manifest.state = list(program.state)
        placeholders = [n.name for n in program.nodes() if n.op == "placeholder"]
        stored: dict[str, torch.Tensor] = {}
        for name, tensor in zip(placeholders, program.example, strict=True):
            core, layout = split_layout(tensor)
            stored[name] = core.clone()
            self._inputs[name] = layout
        self._write({}, {"inputs.safetensors": stored})

    def _empty(self) -> Manifest:
        return Manifest(
            _FORMAT,
            1,
            planish.__version__,
            str(torch.__version__),
            "",
            False,
            self.dump_weights,
            {},
            [],
            [],
            [],
            [],
            [],
            [],
        )

    def _write_tensors(self) -> None:
        if self._store.dirty or not (self.directory / "constants.safetensors").exists():
            self._write({}, {"constants.safetensors": self._store.separate()})
            self._store.dirty = False

    def _write(self, texts: dict[str, str], tensors: dict[str, dict[str, torch.Tensor]] | None = None) -> None:
        """Write files; they are listed in the manifest first, so a crash leaves no file that planish does not know."""
        bad = [name for name in [*texts, *(tensors or {})] if not _FILE_NAME.fullmatch(name)]
        if bad:
            raise DumpError(f"{bad[0]!r} cannot be a file of a dump", why="letters, digits, and . _ + - are allowed")
        known = set(self._manifest.files)
        self._manifest.files += [n for n in [*(tensors or {}), *texts, MANIFEST, "index.html"] if n not in known]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if any(name.startswith("kernels/") for name in texts):
                (self.directory / "kernels").mkdir(exist_ok=True)
            encoded = msgspec.json.format(msgspec.json.encode(self._manifest), indent=2)
            (self.directory / MANIFEST).write_bytes(encoded + b"\n")
            for name, values in (tensors or {}).items():
                # Renamed into place: a crash half-way must not take the constants of the earlier stages with it.
                part = self.directory / f"{name}.part"
                safetensors.torch.save_file(values, part)  # pyright: ignore
                part.chmod((self.directory / MANIFEST).stat().st_mode)  # safetensors makes files private
                part.replace(self.directory / name)
            for name, text in texts.items():
                (self.directory / name).write_text(text, encoding="utf-8")
            (self.directory / "index.html").write_text(_index(self._manifest, self._diffs), encoding="utf-8")
        except OSError as error:
            raise DumpError(
                f"the dump cannot be written to {self.directory}: {error}", fix="give a directory that can be written"
            ) from error


class _Store:
    """Constants by content hash, each held once however many stages and names read it."""

    def __init__(self, weights: bool) -> None:
        self.weights = weights
        self.tensors: dict[str, torch.Tensor] = {}
        self.dirty = False
        # Keyed by address, which the held tensor keeps valid; the version tells a tensor that was changed in place.
        self._known: dict[tuple[Any, ...], tuple[torch.Tensor, str]] = {}

    def expression(self, name: str, tensor: torch.Tensor) -> str:
        """The call that loads the tensor in a stage's file."""
        version = 0 if tensor.is_inference() else tensor._version  # a constant that was made in inference mode has none
        place = (tensor.data_ptr(), version, tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if place not in self._known:
            self._known[place] = (tensor, self._add(name, tensor))
        return self._known[place][1]

    def _add(self, name: str, tensor: torch.Tensor) -> str:
        core, layout = split_layout(tensor)
        key = content_hash(core)
        if not self.weights and (core.is_floating_point() or core.is_complex()):
            return layout.format(f'random_constant("{key}", {tuple(core.shape)}, {core.dtype})')
        if core.dtype not in safetensors.torch._TYPES.values():  # pyright: ignore
            raise DumpError(
                f"constant {name!r} has dtype {core.dtype}, which the safetensors format cannot store",
                fix="compile without dump",
            )
        if key not in self.tensors:
            self.tensors[key] = core
            self.dirty = True
        return layout.format(f'constant("{key}")')

    def separate(self) -> dict[str, torch.Tensor]:
        """The tensors, none of which shares storage with another (safetensors refuses those)."""
        seen: set[int] = set()
        result: dict[str, torch.Tensor] = {}
        for key, tensor in self.tensors.items():
            storage = tensor.untyped_storage()
            whole = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
            seen.add(storage.data_ptr())
            result[key] = tensor if whole else tensor.clone()
        return result


_RESERVED = frozenset(
    {"argparse", "ctypes", "hashlib", "Path", "planish", "load_file", "save_file", "FOLDER", "STORED", "OUTPUTS"}
) | {"constant", "random_constant", "strided", "inputs", "main", "forward"}
"""Global names of a stage's file; a constant of the program that has one of them is renamed."""

_IMPORTS = """
import argparse
import ctypes
import hashlib
import math
import operator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).resolve().parent
STORED = load_file(FOLDER / "constants.safetensors")


def constant(key):
    \"\"\"The tensor stored under its content hash.\"\"\"
    return STORED[key]
"""

_OURS = "import planish.ops  # registers torch.ops.planish\n"

_STRIDED = """

def strided(values, strides):
    \"\"\"The values in the memory layout they had in the model.\"\"\"
    return torch.empty_strided(values.shape, strides, dtype=values.dtype).copy_(values)
"""

_RANDOM = """

def random_constant(key, shape, dtype):
    \"\"\"Random numbers in place of a weight that was not dumped; the same weight always gets the same ones.\"\"\"
    wide = torch.complex64 if dtype.is_complex else torch.float32
    values = torch.randn(shape, generator=torch.Generator().manual_seed(int(key[:15], 16)), dtype=wide)
    return (values / max(1, shape[-1] if shape else 1) ** 0.5).to(dtype)
"""

_MAIN = """

def main():
    \"\"\"Run forward on the dumped inputs and print every output's shape and hash.\"\"\"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", metavar="FILE", help="write the outputs as safetensors")
    args = parser.parse_args()
    with torch.no_grad():
        outputs = dict(zip(OUTPUTS, forward(*inputs()), strict=True))
    for name, value in outputs.items():
        value = value.contiguous()
        raw = ctypes.string_at(value.data_ptr(), value.nbytes) if value.numel() else b""
        print(f"{name}: {value.dtype} {list(value.shape)} sha256 {hashlib.sha256(raw).hexdigest()}")
    if args.save:
        save_file({name: value.contiguous().clone() for name, value in outputs.items()}, args.save)


if __name__ == "__main__":
    main()
"""


def _runnable(stem: str, body: str, inputs: dict[str, str], outputs: Sequence[str]) -> str:
    """A stage's file: the program between the code that loads its tensors and the code that runs it."""
    random, ours = "random_constant(" in body, "torch.ops.planish." in body
    lines = [
        f'"""The program at step {stem}, written by planish.',
        "",
        f"Run: python {stem}.py [--save outputs.safetensors]",
        "It reads constants.safetensors and inputs.safetensors beside it, and needs only torch and safetensors"
        + (", and planish for its operators." if ours else "."),
    ]
    if random:
        lines.append("The weights were not dumped: every floating-point constant is seeded random numbers.")
    imports = _IMPORTS
    if ours:
        imports = imports.replace("import torch\n", _OURS + "import torch\n")
    for module in ("math", "operator"):
        if f"{module}." not in body:
            imports = imports.replace(f"import {module}\n", "")
    loads = [f"        {layout.format(f'stored[{name!r}]')}," for name, layout in inputs.items()]
    lines += [
        '"""',
        imports + (_STRIDED if "strided(" in body + "".join(loads) else "") + (_RANDOM if random else ""),
        "",
        "def inputs():",
        '    """The tensors that the model was captured with."""',
        '    stored = load_file(FOLDER / "inputs.safetensors")',
        "    return [",
        *loads,
        "    ]",
        "",
        "",
        f"OUTPUTS = {list(outputs)}",
        "",
        body.rstrip("\n"),
        _MAIN.rstrip("\n"),
    ]
    return "\n".join(lines) + "\n"


def _unique(names: Sequence[str]) -> list[str]:
    """Names of output tensors; one that is returned twice gets a number."""
    unique: list[str] = []
    for name in names:
        count = sum(other == name or other.startswith(f"{name}.") for other in unique)
        unique.append(f"{name}.{count}" if count else name)
    return unique


def _diff(before: str, after: str, old: str, new: str) -> list[str]:
    return list(difflib.unified_diff(before.splitlines(), after.splitlines(), old, new, lineterm=""))


def _why(refusal: dict[str, str]) -> str:
    return f"{refusal['rule']} not done at {refusal['node']}: {refusal['reason']}{_at(refusal)}\n"


def _note(note: dict[str, str]) -> str:
    return f"{note['rule']} at {note['node']}: {note['text']}{_at(note)}\n"


def _at(entry: dict[str, str]) -> str:
    return f"\n  at: {entry['where']}" if entry["where"] else ""


class _Head(msgspec.Struct):
    """The part of a manifest that tells whose the directory is; any version of the format has it."""

    format: Literal["planish-dump"]
    files: list[str]


def _read_manifest(directory: Path) -> _Head | None:
    try:
        return msgspec.json.decode((directory / MANIFEST).read_bytes(), type=_Head)
    except (OSError, msgspec.DecodeError):
        return None


def _check_replaceable(directory: Path) -> None:
    """Raise unless the directory is missing, empty, or a dump."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise DumpError(
            f"dump={str(directory)!r} is a file", fix="give a directory that is new, empty or an older dump"
        )
    if any(directory.iterdir()) and _read_manifest(directory) is None:
        raise DumpError(
            f"dump={str(directory)!r} holds files that are not a dump",
            why=f"planish replaces only what it wrote itself, which it knows by {MANIFEST}",
            fix="give a directory that is new, empty or an older dump",
        )


def _index(manifest: Manifest, diffs: Sequence[Sequence[str]]) -> str:
    kinds = {"+": "add", "-": "del", "@": "hunk"}
    marked = [[(kinds.get(line[:1], ""), line) for line in diff] for diff in diffs]
    loader = jinja2.FileSystemLoader(Path(__file__).resolve().parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    rows = list(zip(manifest.steps, marked, strict=True))
    return environment.get_template("dump.html.j2").render(manifest=manifest, rows=rows, files=set(manifest.files))


def split_layout(tensor: torch.Tensor) -> tuple[torch.Tensor, str]:
    """The contiguous values of a tensor, and the expression (``{}`` being them) that has the tensor's memory layout.

    Kernels may round differently on another layout, so a transposed weight must load as one. Expanded dims are stored
    once. A tensor whose elements overlap otherwise (``unfold``) loads contiguous: no copy can have its layout.
    """
    tensor = tensor.detach().resolve_conj().resolve_neg()
    core = tensor
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            core = core.narrow(axis, 0, 1)
    layout, reach = "{}", 1
    for stride, size in sorted((st, si) for st, si in zip(core.stride(), core.shape, strict=True) if si > 1):
        if stride < reach:
            return tensor.contiguous(), "{}"
        reach += (size - 1) * stride
    if not core.is_contiguous():
        layout = f"strided({{}}, {core.stride()})"
    if core.shape != tensor.shape:
        layout += f".expand({tuple(tensor.shape)})"
    return core.contiguous(), layout


def content_hash(tensor: torch.Tensor) -> str:
    """Hex digest of a contiguous tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(describe(tensor.dtype, tensor.shape).encode())
    if tensor.numel():
        digest.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return digest.hexdigest()[:16]
