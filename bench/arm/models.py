"""Whole models as bundles for ARM: sizes, instructions under qemu, and whether they compute what the host does."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planish import models
from planish.backends.bundle import toolchain
from planish.backends.bundle.check import check_bundle
from planish.backends.tvm.integer_tile import packed_size
from planish.bench.arm.emulator import Emulator
from planish.formats import Format
from planish.models.base import LoadedModel
from planish.ops import QUANTIZED
from planish.targets import ARM_LEVELS, ArmLevel


@dataclass(frozen=True)
class ModelRow:
    """A model as a bundle.

    Attributes:
        name: model and target.
        code_bytes: of the library but for its weights: code and read-only data.
        largest_kernel: bytes of the largest function among the tiles, and its name.
        weights_bytes: of ``weights.bin``.
        linear_bytes_per_weight: codes and scales of the layers on fewer than 8 bits, for each weight.
        arena_bytes: for the golden inputs.
        instructions: of all kernels in one call, in one thread: tiles, and the loops around them.
        by_kernel: those of the functions that take most; loops have no symbols of their own.
        rel_err: of each output, to what the host computes with the same kernels.
        to_eager: distance of the first output from eager's, as a part of its length.
    """

    name: str
    code_bytes: int
    largest_kernel: tuple[int, str]
    weights_bytes: int
    linear_bytes_per_weight: float | None
    arena_bytes: int
    instructions: int
    by_kernel: dict[str, int]
    rel_err: list[float]
    to_eager: float


class Block(torch.nn.Module):
    """A decoder's first layer: hidden states [1, seq, width] to hidden states."""

    def __init__(self, decoder: Any, length: int) -> None:
        super().__init__()
        self.layer = decoder.layers[0]
        cos, sin = decoder.rotary_emb(torch.zeros(1), torch.arange(length)[None])
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """With causal attention."""
        found = self.layer(hidden, position_embeddings=(self.cos, self.sin))
        return found[0] if isinstance(found, tuple) else found


TOKENS = 32


def _smollm2_block() -> tuple[torch.nn.Module, Any, Any]:
    loaded = models.load("smollm2")
    decoder: Any = loaded.model.model.model  # pyright: ignore
    ids = loaded.data.batches(1, 1, TOKENS)[0]["input_ids"]
    return Block(decoder, ids.shape[1]).eval(), (decoder.embed_tokens(ids),), None


def _loaded(name: str) -> Callable[[], tuple[torch.nn.Module, Any, Any]]:
    def load() -> tuple[torch.nn.Module, Any, Any]:
        loaded: LoadedModel = models.load(name)
        return loaded.model, loaded.inputs, loaded.dynamic

    return load


MODELS: Mapping[str, Callable[[], tuple[torch.nn.Module, Any, Any]]] = {
    "minilm": _loaded("minilm"),
    "efficientnet-lite0": _loaded("efficientnet-lite0"),
    "smollm2-block": _smollm2_block,
}
"""Name to what is compiled: model, inputs, dynamic dims."""


def measure_model(name: str, target: str, compile_model: Callable[..., Any], folder: Path) -> ModelRow:
    """A model's row.

    Raises:
        PlanishError: it does not compile, or a tool is missing or fails.
    """
    model, inputs, dynamic = MODELS[name]()
    compiled = compile_model(model, inputs, target=target, dynamic=dynamic)
    compiled.save(folder)
    level = ARM_LEVELS[compiled.target.isa]
    found = check_bundle(folder)
    counts = Emulator(folder, level).counts(_single_thread(folder, level)).functions
    kernels = {name for name, _, _ in compiled.sources()}
    own = {name: counts[name] for name in kernels & counts.keys()} | {"loops": counts["?"]}
    by_kernel = dict(sorted(own.items(), key=lambda item: -item[1]))
    text, read_only = _sections(folder / "libmodel.so", level)
    sizes = {name: size for name, size in _functions(folder / "libmodel.a", level).items() if name in kernels}
    return ModelRow(
        f"{name} {target}",
        text + read_only,
        max((size, name) for name, size in sizes.items() if name.startswith("planish_tile")),
        (folder / "weights.bin").stat().st_size,
        _bytes_per_weight(compiled),
        int(re.search(r"arena (\d+)", found.text)[1]),  # pyright: ignore
        sum(by_kernel.values()),
        dict(list(by_kernel.items())[:6]),
        list(found.off.values()),
        _distance(model, inputs, compiled),
    )


def _single_thread(folder: Path, level: ArmLevel) -> Path:
    """The check with the library that has no threads: the plugin's counters are not safe under several."""
    program = folder / "single_check"
    cc, _ = toolchain.compiler(level)
    toolchain.call([cc, "-O2", "-o", program, "model_check.c", "libmodel_single.a", "-lm"], folder)
    return program


def _distance(model: torch.nn.Module, inputs: Any, compiled: Any) -> float:
    """The rewritten graph's first output from eager's, as a part of its length."""
    with torch.inference_mode():
        want = model(*inputs) if isinstance(inputs, tuple) else model(**inputs)
        got = compiled(*inputs) if isinstance(inputs, tuple) else compiled(**inputs)
    want, got = (next(iter(v.values())) if isinstance(v, Mapping) else v for v in (want, got))
    return ((got - want).norm() / want.norm()).item()


def _sections(library: Path, level: ArmLevel) -> tuple[int, int]:
    """Bytes of code and of read-only data and tables of a library."""
    _, tools = toolchain.compiler(level)
    text = toolchain.call([f"{tools}size", "-A", library], library.parent)
    sizes = {name: int(size) for name, size in re.findall(r"^(\.\S+)\s+(\d+)", text, re.MULTILINE)}
    code = sum(sizes.get(name, 0) for name in (".text", ".plt", ".init", ".fini"))
    return code, sum(sizes.get(name, 0) for name in (".rodata", ".data", ".data.rel.ro", ".got"))


def _functions(library: Path, level: ArmLevel) -> dict[str, int]:
    """Bytes of each function of a library."""
    _, tools = toolchain.compiler(level)
    text = toolchain.call([f"{tools}nm", "-S", library], library.parent)
    return {name: int(size, 16) for size, name in re.findall(r"^\S+ (\S+) [tT] (\S+)$", text, re.MULTILINE)}


def _bytes_per_weight(compiled: Any) -> float | None:
    """Codes, steps and columns' scales of the layers on fewer than 8 bits, for each weight of theirs."""
    weights = nbytes = 0
    for graph in _graphs(compiled):
        for node in graph.nodes:
            form = Format.parse(str(node.args[7])).weight if node.target in QUANTIZED else None
            if form is None or form.bits == 8:
                continue
            n, depth = node.args[1].meta["val"].shape
            weights += n * depth
            nbytes += packed_size((n, depth), form) + 4 * n + (2 * n * form.groups(depth) if form.group else 0)
    return nbytes / weights if weights else None


def _graphs(compiled: Any) -> list[Any]:
    module = compiled._ready().executable.program.module
    return [m.graph for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
