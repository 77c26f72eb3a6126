"""Writes a bundle: the kernels and the C code around them as a library, the weights, and data to check it by."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import sympy
import torch

from planish import __version__
from planish.backends.bundle import toolchain
from planish.backends.bundle.link import link
from planish.backends.bundle.sizes import in_c
from planish.backends.tvm.codegen import STATUS_FAILED
from planish.backends.tvm.cross import CrossExecutable
from planish.backends.tvm.expr import DIVISION_BY_ZERO
from planish.errors import InputError, StateError
from planish.plan import ALIGN, HEAD
from planish.program import Dim
from planish.targets import ARM_LEVELS, Target

STACK_BYTES = 512
"""TVM keeps smaller buffers on the stack; larger ones may be scratch memory."""

C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.bool: "uint8_t",
    torch.float16: "uint16_t",
    torch.bfloat16: "uint16_t",
}
"""Types of elements in memory; C has none for half precisions."""

AS_DOUBLE = {torch.float16: "from_half", torch.bfloat16: "from_bfloat16"}
"""Functions of the check that read half precisions."""

HWCAP = {
    "armv8": "(void)have, 1",
    "armv8-dotprod": "(have >> 20) & 1 /* ASIMDDP */",
    "armv7": "(have >> 12) & (have >> 16) & 1 /* NEON, VFPV4 */",
    "armv8-i8mm": "(have >> 20) & (have2 >> 13) & 1 /* ASIMDDP, I8MM */",
}
"""For each instruction-set level: C expression over the bits of HWCAP that says whether the processor has it."""


@dataclass(frozen=True)
class Golden:
    """Inputs, flat, with the sizes of the dims, and what the outputs are to be, but for a part of their length."""

    inputs: Sequence[torch.Tensor]
    dims: Mapping[str, int]
    outputs: Sequence[torch.Tensor]
    tolerance: float

    def allowed(self, output: int) -> float:
        """What counts for an output: of half precision, a few values may be rounded to a neighbour."""
        dtype = self.outputs[output].dtype
        return max(self.tolerance, torch.finfo(dtype).eps / 4) if dtype in AS_DOUBLE else self.tolerance


@dataclass(frozen=True)
class Bundle:
    """What a bundle is made from.

    Attributes:
        prefix: of all exported names.
        title: what the model is.
        target: what the code is for.
        executable: the code.
        dims: dynamic ones with their ranges.
        counts: those of them that are counted in a call, with their upper bounds.
        golden: what the bundle checks itself by.
    """

    prefix: str
    title: str
    target: Target
    executable: CrossExecutable
    dims: Mapping[str, Dim]
    counts: Mapping[str, int | sympy.Expr]
    golden: Golden

    def facts(self) -> dict[str, Any]:
        """What the templates say."""
        program, plan = self.executable.program, self.executable.plan
        outputs = list(dict.fromkeys(self.executable.outputs))
        at = [self.executable.outputs.index(o) for o in outputs]
        blob = self.executable.blob
        return {
            "prefix": self.prefix,
            "upper": self.prefix.upper(),
            "title": self.title,
            "version": __version__,
            "target": self.target.name,
            "isa": self.target.isa,
            "mcpu": self.target.mcpu,
            "tools": toolchain.prefix(ARM_LEVELS[self.target.isa]),
            "hwcap": HWCAP[self.target.isa],
            "threads": self.target.cores,
            "inputs": [str(s) for s in program.inputs],
            "outputs": [str(program.outputs[i]) for i in at],
            **self._dims(),
            "buffers": self._buffers(),
            "head": HEAD,
            "scratch": max(ALIGN, *(scratch_bytes(text) for text in self.executable.tir.values())),
            "pointers": len(program.inputs) + len(outputs) + 3,
            "calls": len(plan.calls),
            "status_failed": STATUS_FAILED,
            "status_division": DIVISION_BY_ZERO,
            "weights_bytes": blob.numel(),
            "weights_crc": f"{zlib.crc32(blob.numpy()):#010x}",
            "golden": [
                {
                    "name": program.outputs[i].name,
                    "bytes": self.golden.outputs[i].nbytes,
                    "elements": self.golden.outputs[i].numel(),
                    "ctype": C_TYPES[self.golden.outputs[i].dtype],
                    "as_double": AS_DOUBLE.get(self.golden.outputs[i].dtype, "(double)"),
                    "tolerance": self.golden.allowed(i),
                }
                for i in at
            ],
        }

    def _dims(self) -> dict[str, Any]:
        given, names = [name for name in self.dims if name not in self.counts], list(self.dims)
        sizes = self.golden.dims
        return {
            "dims": [{"name": n, "min": self.dims[n].min, "max": self.dims[n].max, "size": sizes[n]} for n in given],
            "all_dims": [
                {
                    "name": n,
                    "min": self.dims[n].min,
                    "max": self.dims[n].max,
                    "place": given.index(n) if n in given else 0,
                    "bound": in_c(self.counts[n], names) if n in self.counts else None,
                }
                for n in names
            ],
        }

    def _buffers(self) -> list[dict[str, Any]]:
        plan, names = self.executable.plan, list(self.dims)
        spans = plan.lifetimes()
        return [
            {
                "bytes": in_c(sympy.prod(buffer.shape) * buffer.itemsize, names),
                "first": spans.get(i, (0, 0))[0],
                "last": spans.get(i, (0, 0))[1],
            }
            for i, buffer in enumerate(plan.buffers)
            if buffer.kind == "arena"
        ]


TEMPLATES = {
    "model.c": "{}.c",
    "model.h": "{}.h",
    "model_check.c": "{}_check.c",
    "model.cmake": "{}.cmake",
    "README.md": "README.md",
}


def write_bundle(folder: Path, bundle: Bundle) -> None:
    """Write a folder that needs neither planish nor TVM.

    Args:
        folder: made if need be; files of the same names are replaced.
        bundle: what to write.

    Raises:
        InputError: the prefix is no C name.
        StateError: the model has a state.
        ToolchainError: there is no cross compiler, or it failed.
    """
    prefix, executable, golden = bundle.prefix, bundle.executable, bundle.golden
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", prefix):
        raise InputError(f"prefix {prefix!r} cannot begin C names", fix="use lower-case letters, digits and _")
    if executable.program.state:
        raise StateError("a model with a state cannot be saved as a bundle yet", fix="pass its buffers as inputs")
    facts = bundle.facts()
    loader = jinja2.FileSystemLoader(Path(__file__).resolve().parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    data = folder / "golden"
    data.mkdir(parents=True, exist_ok=True)
    for template, name in TEMPLATES.items():
        (folder / name.format(prefix)).write_text(environment.get_template(f"{template}.j2").render(facts))
    (folder / "weights.bin").write_bytes(executable.blob.numpy().tobytes())
    for stem, tensors in (("in", golden.inputs), ("out", golden.outputs)):
        for i, tensor in enumerate(tensors):
            (data / f"{stem}{i}.bin").write_bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    link(folder, prefix, ARM_LEVELS[bundle.target.isa], [o.code for o in executable.objects])
    manifest = {
        "model": bundle.title,
        "prefix": prefix,
        "planish": __version__,
        "target": bundle.target.name,
        "isa": bundle.target.isa,
        "mcpu": bundle.target.mcpu,
        "inputs": facts["inputs"],
        "outputs": facts["outputs"],
        "dims": {dim["name"]: [dim["min"], dim["max"]] for dim in facts["dims"]},
        "weights": {"bytes": facts["weights_bytes"], "crc32": facts["weights_crc"]},
        "sha256": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir()) if f.is_file()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


_ALLOCATION = re.compile(r"T\.alloc_buffer\(\((\d+),\)(?:, \"(\w+)\")?")


def scratch_bytes(tir: str) -> int:
    """At most so many bytes of scratch memory a kernel has at once, by its text."""
    total = 0
    for count, dtype in _ALLOCATION.findall(tir):
        bits = int(re.sub(r"\D", "", dtype or "float32") or 8)
        nbytes = int(count) * bits // 8
        total += -(-nbytes // ALIGN) * ALIGN if nbytes >= STACK_BYTES else 0
    return total
