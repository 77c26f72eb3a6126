"""From TIR functions to machine code: our own list of TVM passes, with a plain C ABI and no TVM runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.script.ir_builder import tirx as T

from planish.backends.tvm.builder import Expr, function, i32
from planish.backends.tvm.kernel import Module
from planish.backends.tvm.lower import STATUS
from planish.plan import Plan, count_word
from planish.program import Program
from planish.targets import ARM_LEVELS, Target

ENTRY = "planish_main"
"""C name of the model's function."""

STATUS_FAILED = 2
"""Status word after a kernel failed; for the others see ``expr.py``."""


def llvm_target(target: Target) -> tvm.target.Target:
    """TVM's description of a CPU target."""
    described: dict[str, Any] = {"kind": "llvm", "mcpu": target.mcpu}
    if target.is_cross:
        level = ARM_LEVELS[target.isa]
        described |= {"mtriple": level.triple, "mattr": list(level.features)}
        described |= {"mfloat-abi": "hard"} if level.arch == "arm" else {}
    return tvm.target.Target(described)


def lowering_passes() -> tvm.transform.Pass:
    """What kernels written without blocks need, and no more.

    ``MakePackedAPI`` is left out: every function already takes plain pointers and int32 sizes and returns an int32.
    """
    t = tirx.transform
    return tvm.transform.Sequential(
        [
            s_tir.transform.StmtSimplify(),
            t.FlattenBuffer(),
            t.VectorizeLoop(True),
            t.StorageRewrite(),
            t.UnrollLoop(),
            s_tir.transform.StmtSimplify(),
            t.LowerTVMBuiltin(),
            t.LowerIntrin(),
        ]
    )


def build_main(program: Program, plan: Plan, outputs: list[int], offsets: dict[int, int]) -> tirx.PrimFunc:
    """The model's function: kernel calls in order.

    ``planish_main(input*, ..., output*, ..., weights, arena, table, dim, ..., first, last)`` runs the calls with
    ``first <= index < last``, up to the first that fails. ``table`` holds the byte offset in the arena of every arena
    buffer, in order of the plan; ``offsets`` the offset of every constant in the weights blob. The status word, the
    arena's first, says what went wrong (TVM can return nothing but 0 from here). A counted dim is read from the arena's
    head, where a kernel has left it. Inputs are the state's buffers too, which the calls at the end update, or restore
    after a failure.
    """
    arena_slots = {b: slot for slot, b in enumerate(i for i, b in enumerate(plan.buffers) if b.kind == "arena")}
    with function(ENTRY) as f:
        tensors = [i for i, b in enumerate(plan.buffers) if b.kind in ("input", "state")] + list(dict.fromkeys(outputs))
        types = ["uint8"] * (len(tensors) + 2) + ["int64"]
        (*tensor_pointers, weights, arena, table), (*dims, first, last) = f.parameters(types, len(program.dims) + 2)
        given = dict(zip(tensors, tensor_pointers, strict=True))

        def address(buffer: int) -> Expr:
            if buffer == STATUS:
                return T.address_of(arena[0])
            if buffer in given:
                return T.address_of(given[buffer][0])
            if buffer in offsets:
                return T.address_of(weights[tirx.const(offsets[buffer], "int64")])
            return T.address_of(arena[table[arena_slots[buffer]]])

        def count(name: str) -> Expr:
            first_byte = 4 * count_word(program, name)
            return T.reinterpret("int32", arena[T.ramp(first_byte, 1, 4)])

        code, written = T.alloc_buffer((1,), "int32"), T.alloc_buffer((1,), "int32")
        T.buffer_store(code, i32(0), [0])
        undone = {call.undoes for call in plan.calls if call.undoes is not None}
        if undone:
            T.buffer_store(written, i32(-1), [0])
        for index, call in enumerate(plan.calls):
            wanted = tirx.And(first <= i32(index), i32(index) < last)
            failed = tirx.NE(arena[0], tirx.const(0, "uint8"))
            if call.undoes is not None:
                wanted = tirx.And(wanted, tirx.And(failed, i32(call.undoes) <= written[0]))
            else:
                wanted = tirx.And(wanted, tirx.Not(failed) if call.commits else tirx.EQ(code[0], i32(0)))
            with T.If(wanted), T.Then():
                pointers = [address(b) for b in call.operands]
                sizes = [count(n) if n in program.counts else d for n, d in zip(program.dims, dims, strict=True)]
                T.buffer_store(code, T.call_extern("int32", call.kernel, *pointers, *sizes), [0])
                if index in undone:
                    T.buffer_store(written, i32(index), [0])
                with T.If(tirx.NE(code[0], i32(0))), T.Then():
                    T.buffer_store(arena, tirx.const(STATUS_FAILED, "uint8"), [0])
    assert f.func is not None
    return f.func


def compile_module(module: Module, main: tirx.PrimFunc) -> list[ObjectCode]:
    """Object code of the kernels with the model's function, and of the tiles."""
    kernels = {name: func.with_attr("global_symbol", name) for name, func in module.functions.items()}
    functions = {tvm.ir.GlobalVar(name): func for name, func in (kernels | {ENTRY: main}).items()}
    tiles = {tvm.ir.GlobalVar(name): func for name, func in module.tiles.items()}
    return [object_code(f, module.target) for f in (functions, tiles) if f]


Functions = Mapping[tvm.ir.GlobalVar, tirx.PrimFunc]


@dataclass(frozen=True, eq=False)
class ObjectCode:
    """Machine code of functions.

    Attributes:
        code: as an object file.
        functions: what it was made from.
        target: what it is for.
    """

    code: bytes
    functions: Functions
    target: Target

    @cached_property
    def assembly(self) -> str:
        """As text; the functions are compiled once more for it, when it is asked for."""
        return _compiled(self.functions, self.target).inspect_source("asm")


def object_code(functions: Functions, target: Target) -> ObjectCode:
    """Compile functions."""
    code = _compiled(functions, target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code.o"
        code.write_to_file(str(path), "o")
        return ObjectCode(path.read_bytes(), functions, target)


def _compiled(functions: Functions, target: Target) -> Any:
    llvm = llvm_target(target)
    lowered = lowering_passes()(tirx.transform.BindTarget(llvm)(tvm.IRModule(dict(functions))))
    return tvm.get_global_func("target.build.llvm")(lowered, llvm)
