"""The CPU backend: lowers a Program through TVM to one native function and runs it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock

import tvm

from planish.backends.base import Unsupported
from planish.backends.tvm.codegen import ENTRY, ObjectCode, build_main, compile_module
from planish.backends.tvm.cross import CrossExecutable
from planish.backends.tvm.executable import TvmExecutable
from planish.backends.tvm.kernel import Module
from planish.backends.tvm.lower import Lowering, unsupported
from planish.backends.tvm.pack import build_blob
from planish.program import Program, constant
from planish.targets import Target


class TvmBackend:
    """Native code for CPUs."""

    name = "tvm"

    def unsupported(self, program: Program, target: Target) -> list[Unsupported]:
        """Every op that has no kernel."""
        return unsupported(program, target)

    def compile(self, program: Program, target: Target) -> TvmExecutable | CrossExecutable:
        """Kernels, plan, weights blob and machine code of a Program."""
        lowering = Lowering(program, target, Module(target))
        lowering.lower()
        constants = [
            (i, tuple(constant(program.module, n).detach() for n in nodes), layout, width)
            for i, nodes, layout, width in lowering.constants
        ]
        blob, offsets = build_blob(constants, target.lanes)
        main = build_main(program, lowering.plan, lowering.outputs, offsets)
        functions = lowering.module.functions | lowering.module.tiles | {ENTRY: main}
        tir = {name: func.script() for name, func in functions.items()}
        objects = _machine_code(lowering.module, main, tir)
        made = CrossExecutable if target.is_cross else TvmExecutable
        return made(program, lowering.plan, lowering.outputs, blob, objects, tir)


_cache: OrderedDict[bytes, list[ObjectCode]] = OrderedDict()
_cache_lock = Lock()
_CACHE_ENTRIES = 16


def _machine_code(module: Module, main: tvm.tirx.PrimFunc, tir: Mapping[str, str]) -> list[ObjectCode]:
    """Object code; modules of equal text for equal targets are compiled once in a process."""
    text = "\n".join([repr(module.target), *(f"{name}\n{text}" for name, text in tir.items())])
    key = hashlib.sha256(text.encode()).digest()
    with _cache_lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
    code = compile_module(module, main)
    with _cache_lock:
        _cache[key] = code
        while len(_cache) > _CACHE_ENTRIES:
            _cache.popitem(last=False)
    return code
