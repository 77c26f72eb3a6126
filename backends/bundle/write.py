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
from planish.backends.bundle.sizes import in_c
from planish.backends.tvm.codegen import STATUS_FAILED
from planish.backends.tvm.cross import CrossExecutable
from planish.backends.tvm.expr import DIVISION_BY_ZERO
from planish.errors import InputError, StateError
from planish.plan import ALIGN, HEAD
from planish.program import Dim, TensorSpec
from planish.targets import Target

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
}

HWCAP = {
    "armv8": "(void)have, 1",
    "armv8-dotprod": "(have >> 20) & 1 /* ASIMDDP */",
    "armv8-i8mm": "(have >> 20) & (have2 >> 13) & 1 /* ASIMDDP, I8MM */",
}
"""For each instruction-set level: C expression over the bits of HWCAP that says whether the processor has it."""

_FLAGS = ("-O2", "-fPIC", "-ffunction-sections", "-fdata-sections", "-pthread")


@dataclass(frozen=True)
class Golden:
    """Inputs, flat, with the sizes of the dims, and what the outputs are to be, but for a part of their length."""

    inputs: Sequence[torch.Tensor]
    dims: Mapping[str, int]
    outputs: Sequence[torch.Tensor]
    tolerance: float


def write_bundle(
    folder: Path,
    prefix: str,
    title: str,
    target: Target,
    executable: CrossExecutable,
    dims: Mapping[str, Dim],
    counts: Mapping[str, int | sympy.Expr],
    golden: Golden,
) -> None:
    """Write a folder that needs neither planish nor TVM.

    Args:
        folder: made if need be; files of the same names are replaced.
        prefix: of all exported names.
        title: what the model is.
        target: what the code is for.
        executable: the code.
        dims: dynamic ones with their ranges.
        counts: those of them that are counted in a call, with their upper bounds.
        golden: what the bundle checks itself by.

    Raises:
        InputError: the prefix is no C name.
        StateError: the model has a state.
        ToolchainError: there is no cross compiler, or it failed.
    """
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", prefix):
        raise InputError(f"prefix {prefix!r} cannot begin C names", fix="use lower-case letters, digits and _")
    if executable.program.state:
        raise StateError("a model with a state cannot be saved as a bundle yet", fix="pass its buffers as inputs")
    facts = _facts(prefix, title, target, executable, dims, counts, golden)
    loader = jinja2.FileSystemLoader(Path(__file__).resolve().parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    data = folder / "golden"
    data.mkdir(parents=True, exist_ok=True)
    names = {"model.c": f"{prefix}.c", "model.h": f"{prefix}.h", "model_check.c": f"{prefix}_check.c"}
    for template, name in names.items():
        (folder / name).write_text(environment.get_template(f"{template}.j2").render(facts))
    (folder / "weights.bin").write_bytes(executable.blob.numpy().tobytes())
    for stem, tensors in (("in", golden.inputs), ("out", golden.outputs)):
        for i, tensor in enumerate(tensors):
            (data / f"{stem}{i}.bin").write_bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    _link(folder, prefix, target, executable)
    manifest = {
        "model": title,
        "planish": __version__,
        "target": target.name,
        "isa": target.isa,
        "inputs": facts["inputs"],
        "outputs": facts["outputs"],
        "dims": {name: [dim.min, dim.max] for name, dim in dims.items() if name not in counts},
        "weights": {"bytes": executable.blob.numel(), "crc32": facts["weights_crc"]},
        "sha256": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir()) if f.is_file()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _facts(
    prefix: str,
    title: str,
    target: Target,
    executable: CrossExecutable,
    dims: Mapping[str, Dim],
    counts: Mapping[str, int | sympy.Expr],
    golden: Golden,
) -> dict[str, Any]:
    """What the templates say."""
    program, plan = executable.program, executable.plan
    spans, names = plan.lifetimes(), list(dims)
    given = [name for name in names if name not in counts]
    held = [i for i, b in enumerate(plan.buffers) if b.kind == "arena"]
    outputs = list(dict.fromkeys(executable.outputs))
    specs: list[TensorSpec] = [program.outputs[executable.outputs.index(o)] for o in outputs]
    wanted = [golden.outputs[executable.outputs.index(o)] for o in outputs]
    return {
        "prefix": prefix,
        "upper": prefix.upper(),
        "title": title,
        "version": __version__,
        "isa": target.isa,
        "hwcap": HWCAP[target.isa],
        "threads": target.cores,
        "inputs": [str(s) for s in program.inputs],
        "outputs": [str(s) for s in specs],
        "dims": [{"name": n, "min": dims[n].min, "max": dims[n].max, "size": golden.dims[n]} for n in given],
        "all_dims": [
            {
                "name": n,
                "min": dims[n].min,
                "max": dims[n].max,
                "place": given.index(n) if n in given else 0,
                "bound": in_c(counts[n], names) if n in counts else None,
            }
            for n in names
        ],
        "buffers": [
            {
                "bytes": in_c(sympy.prod(plan.buffers[b].shape) * plan.buffers[b].itemsize, names),
                "first": spans.get(b, (0, 0))[0],
                "last": spans.get(b, (0, 0))[1],
            }
            for b in held
        ],
        "head": HEAD,
        "scratch": max(ALIGN, *(scratch_bytes(text) for text in executable.tir.values())),
        "pointers": len(program.inputs) + len(outputs) + 3,
        "calls": len(plan.calls),
        "status_failed": STATUS_FAILED,
        "status_division": DIVISION_BY_ZERO,
        "weights_bytes": executable.blob.numel(),
        "weights_crc": f"{zlib.crc32(executable.blob.numpy()):#010x}",
        "golden": [
            {
                "name": spec.name,
                "bytes": t.numel() * t.element_size(),
                "elements": t.numel(),
                "ctype": C_TYPES[t.dtype],
                "tolerance": golden.tolerance,
            }
            for spec, t in zip(specs, wanted, strict=True)
        ],
    }


_ALLOCATION = re.compile(r"T\.alloc_buffer\(\((\d+),\)(?:, \"(\w+)\")?")


def scratch_bytes(tir: str) -> int:
    """At most so many bytes of scratch memory a kernel has at once, by its text."""
    total = 0
    for count, dtype in _ALLOCATION.findall(tir):
        bits = int(re.sub(r"\D", "", dtype or "float32") or 8)
        nbytes = int(count) * bits // 8
        total += -(-nbytes // ALIGN) * ALIGN if nbytes >= STACK_BYTES else 0
    return total


def _link(folder: Path, prefix: str, target: Target, executable: CrossExecutable) -> None:
    """``libPREFIX.a`` and ``libPREFIX.so``, which export names that begin with the prefix, and PREFIX_check."""
    cc, tools = toolchain.compiler(target)
    objects: list[str] = []
    for i, (code, _) in enumerate(executable.objects):
        (folder / f"code{i}.o").write_bytes(code)
        objects.append(f"code{i}.o")
    whole, keep = f"{prefix}.o", folder / "exports"
    keep.write_text("".join(f"{prefix}_{n}\n" for n in ("arena_bytes", "init", "run", "set_threads", "error")))
    toolchain.call([cc, *_FLAGS, "-c", f"{prefix}.c", "-o", "shim.o"], folder)
    toolchain.call([f"{tools}ld", "-r", "-o", whole, "shim.o", *objects], folder)
    toolchain.call([f"{tools}objcopy", f"--keep-global-symbols={keep.name}", whole], folder)
    (folder / f"lib{prefix}.a").unlink(missing_ok=True)
    toolchain.call([f"{tools}ar", "rcsD", f"lib{prefix}.a", whole], folder)
    linking = ("-shared", "-Wl,-z,max-page-size=4096", "-Wl,-z,noseparate-code", "-Wl,--gc-sections", "-s", "-pthread")
    toolchain.call([cc, *linking, "-o", f"lib{prefix}.so", whole, "-lm"], folder)
    toolchain.call(
        [cc, "-O2", "-o", f"{prefix}_check", f"{prefix}_check.c", f"lib{prefix}.a", "-lm", "-pthread"], folder
    )
    for name in ("shim.o", whole, keep.name, *objects):
        (folder / name).unlink()
