"""planish.compile and the compiled model it returns."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.export import ExportedProgram

from planish import passes as registry
from planish.assignment import Assignment
from planish.backends import backend
from planish.backends.base import Executable, KernelTime, Unsupported
from planish.budget import Budget
from planish.capture import Dynamic, Signature, capture, check_inputs_kind, check_model, check_tensor
from planish.dump import Dump
from planish.errors import (
    BudgetError,
    CalibrationError,
    DimError,
    InputError,
    StateError,
    TargetError,
    UnknownNameError,
    UnsupportedOpsError,
)
from planish.fallback import Coverage, CutSegments, check_fallback, compile_segments
from planish.passes.precision import QuantizeMixed
from planish.passes.precision.calibration import check_calibration
from planish.pipeline import Pass, Step, run_pass, run_pipeline
from planish.plan import Call
from planish.program import Dim, Program, TensorSpec, evaluate
from planish.reuse import Fingerprint, fingerprint, remember, remembered
from planish.state import State, StateSpec, lend
from planish.targets import Target
from planish.verify import relative_error

if TYPE_CHECKING:
    from planish.backends.bundle.check import Check

log = logging.getLogger("planish")

BUNDLE_TOLERANCE = 1e-6
"""Of a bundle's outputs against those of the same kernels on this machine, as a part of their length."""

Inputs = tuple[Any, ...] | Mapping[str, Any]


def compile(
    model: torch.nn.Module | ExportedProgram,
    inputs: Inputs | None = None,
    target: str | Target = "cpu",
    *,
    dynamic: Dynamic | None = None,
    padding: str = "zero",
    passes: Sequence[str | Pass] | None = None,
    dump: str | Path | None = None,
    verify: bool = False,
    fallback: str = "error",
    calibration: Iterable[Inputs] | None = None,
    budget: Budget | None = None,
    pin: Mapping[str, str] | None = None,
    executor: Executor | None = None,
    cache: bool = True,
) -> CompiledModel:
    """Compile a model to one native function.

    Args:
        model: in eval mode, on the CPU. Weights changed later are not seen.
        inputs: example tensors, as a tuple or as a dict of keyword arguments. Without them the model is captured at
            the first call.
        target: a name from ``planish targets``, or a Target.
        dynamic: which axes of which inputs vary: ``{"input_ids": {0: planish.Dim("batch", 1, 64)}}``.
        padding: what outputs hold at padding, where an attention mask [batch, positions] lets the padding go:
            ``"zero"`` (eager computes numbers there that nobody needs), ``"nearest"`` the nearest token's values, or
            ``"exact"`` what eager computes, which keeps the padding in models that return it.
        passes: names or Pass objects instead of the default pipeline.
        dump: folder for every stage as a runnable program, with diffs, reasons and kernels.
        verify: compare the values before and after every pass in fp64.
        fallback: what to do with operators that have no native form: ``"error"`` lists them all in one error;
            ``"eager"`` runs those, and only those, in PyTorch. ``report()``, ``repr`` and the log name each of them.
        calibration: representative inputs, each like ``inputs``, for targets and passes with integer codes; they are
            run once. Without them scales are found at run time.
        budget: what the formats of the layers may cost; they are then chosen one by one, with ``calibration``.
        pin: formats of layers, by name or beginning of their names: ``{"lm_head": "w8a8", "encoder.layer.0": "fp"}``.
            Layers without a pin have the budget's choice, or fp32 where there is no budget.
        executor: where formats are tried, such as Dask's ``client.get_executor()``: see ``QuantizeMixed``.
        cache: reuse the result of an equal compile of the same, unchanged model in this process, and the scores of
            formats that an earlier compile with the same calibration left in the user's cache folder.

    Raises:
        CaptureError, ModelStateError, InputError, DimError, TargetError, UnknownNameError, UnsupportedOpsError,
            CalibrationError, BudgetError: see each class.
    """
    check_model(model)
    check_fallback(fallback)
    if inputs is not None:
        check_inputs_kind(inputs)
    parsed = Target.parse(target)
    pins = tuple((pin or {}).items())
    mixed = QuantizeMixed(budget, pins, cache=cache, executor=executor) if budget is not None or pins else None
    pipeline = registry.resolve(passes, padding, parsed, mixed)
    _check_quantiser(pipeline, mixed, calibration)
    if calibration is not None:
        calibration = _check_calibration(calibration, pipeline, parsed)
    compiled = CompiledModel(parsed, pipeline, dynamic, dump, verify, fallback, calibration)
    if inputs is None:
        compiled.wait_for_inputs(model)
        return compiled
    reuse = cache and dump is None and not verify and calibration is None
    key = fingerprint(model, inputs, parsed, dynamic, pipeline, fallback) if reuse else None
    if key is not None and (found := remembered(model, key)) is not None:
        compiled.adopt(found)
        return compiled
    compiled.capture_and_compile(model, inputs, key)
    return compiled


@dataclass(frozen=True)
class Compiled:
    """The immutable result of compiling for one signature."""

    executable: Executable
    signature: Signature
    inputs: tuple[TensorSpec, ...]
    dims: dict[str, Dim]
    counts: Mapping[str, int | sympy.Expr]
    steps: tuple[Step, ...]
    state: StateSpec
    coverage: Coverage | None
    """What runs in PyTorch; None where nothing does."""
    assignment: Assignment | None = None

    @property
    def calls(self) -> list[Call]:
        """Every kernel call."""
        return [call for plan in self.executable.plans for call in plan.calls]

    def state_updates(self) -> list[str]:
        """How each buffer of the state gets its new value."""
        native = [how for plan in self.executable.plans for how in plan.state_updates()]
        return native or ["computed apart, then copied"] * len(self.state.names)


class CompiledModel:
    """A compiled model, called like the original; safe to call from many threads at once."""

    def __init__(
        self,
        target: Target,
        pipeline: Sequence[Pass],
        dynamic: Dynamic | None,
        dump: str | Path | None,
        verify: bool,
        fallback: str,
        calibration: Sequence[Inputs] | None = None,
    ) -> None:
        self.target = target
        self._calibration = calibration
        self._pipeline, self._dynamic, self._dump, self._verify = tuple(pipeline), dynamic, dump, verify
        self._fallback = fallback
        self._compiled: Compiled | None = None
        self._model: torch.nn.Module | ExportedProgram | None = None
        self._lock = Lock()

    def __repr__(self) -> str:
        if self._compiled is None:
            return f"CompiledModel(target={self.target.name!r}, compiled at the first call)"
        inputs = ", ".join(map(str, self._compiled.inputs))
        coverage = f", {self._compiled.coverage}" if self._compiled.coverage else ""
        calls = len(self._compiled.calls)
        return f"CompiledModel(target={self.target.name!r}, {inputs}, {calls} kernel calls{coverage})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model would return for these arguments.

        A model that writes to its buffers takes a ``state`` besides them (see ``new_state``), and updates it. An output
        that is such a buffer is a copy of it.

        Raises:
            InputError, DimError, ModelStateError: an argument does not fit what was compiled.
            StateError: the state is missing, another model's, not wanted, or in use by another thread.
        """
        # A model may have an argument of the name "state": the type tells them apart.
        state = kwargs.pop("state") if isinstance(kwargs.get("state"), State) else None
        compiled = self._compiled or self._compile_at_first_call(args, kwargs)
        if state is None and not compiled.state.names:
            return _run(compiled, args, kwargs, ())
        with lend(state, compiled.state) as buffers:
            return _run(compiled, args, kwargs, buffers)

    def new_state(self) -> State:
        """The model's buffers as they were when it was compiled, for one user: ``compiled(x, state=s)`` updates them.

        Raises:
            StateError: the model does not write to its buffers.
        """
        spec = self._ready().state
        if not spec.names:
            raise StateError("the model has no state", why="its forward writes to no buffer", fix="call it without one")
        return State.fresh(spec)

    def state_names(self) -> tuple[str, ...]:
        """Names of the buffers that the model writes to."""
        return self._ready().state.names

    def state_over(self, tensors: Sequence[torch.Tensor]) -> State:
        """A state held in the caller's own tensors, one per name of ``state_names``: calls update them in place."""
        return State(self._ready().state, tensors)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The passes that ran."""
        return self._ready().steps

    @property
    def assignment(self) -> Assignment | None:
        """The format of each layer and why it has it, where there was a budget or pins."""
        return self._ready().assignment

    def explain(self, name: str) -> str:
        """Why layers have their formats: of the layer of that name, or of all whose names begin with it.

        Raises:
            UnknownNameError: there is no such layer, or formats were not chosen layer by layer.
        """
        assignment = self.assignment
        if assignment is None:
            raise UnknownNameError("formats were not chosen layer by layer", fix="compile with budget= or pin=")
        return assignment.explain(name)

    def report(self) -> str:
        """Passes, kernels and sizes as text."""
        compiled = self._ready()
        lines = [repr(self), f"weights {compiled.executable.weights_bytes() / 1e6:.1f} MB"]
        lines += [f"state {n}: {how}" for n, how in zip(compiled.state.names, compiled.state_updates(), strict=True)]
        for step in compiled.steps:
            error = "" if step.max_error is None else f", max error {step.max_error:.1e}"
            rewrites = ", ".join(f"{n} {name}" for name, n in step.rewrites.items())
            lines.append(f"{step.name}: {step.ops_before} -> {step.ops_after} ops, {step.ms:.0f} ms{error}; {rewrites}")
        lines += [compiled.assignment.table()] if compiled.assignment else []
        lines += [f"  {n.rule} at {n.node}: {n.text}" for step in compiled.steps for n in step.notes]
        lines += [f"  refused {r.rule} at {r.node}: {r.reason}" for step in compiled.steps for r in step.refusals]
        lines += [f"kernel {call.kernel}: {call.node} {list(map(str, call.shape))}" for call in compiled.calls]
        return "\n".join(lines)

    def kernels(self, inputs: Inputs, repeats: int = 20) -> list[KernelTime]:
        """Each kernel timed alone on real data (median of ``repeats``)."""
        compiled = self._ready()
        tensors = compiled.signature.flatten(*_as_call(inputs))
        buffers = [t.clone() for t in compiled.state.initial]
        return compiled.executable.kernels(tensors, check_inputs(compiled, tensors), buffers, repeats)

    def memory(self, inputs: Inputs) -> dict[str, int]:
        """Bytes for these inputs: the arena, the sum of intermediates without reuse, and the weights.

        Over all native segments; a value between a segment and PyTorch is a tensor of its own and not counted.
        """
        compiled = self._ready()
        dims = check_inputs(compiled, compiled.signature.flatten(*_as_call(inputs)))
        plans = compiled.executable.plans
        return {
            "arena_bytes": sum(plan.arena(dims)[1] for plan in plans),
            "intermediates_bytes": sum(plan.buffers[b].nbytes(dims) for plan in plans for b in plan.lifetimes()),
            "weights_bytes": compiled.executable.weights_bytes(),
        }

    def sources(self) -> list[tuple[str, str, str]]:
        """Generated code as (name, TIR text, assembly text)."""
        return self._ready().executable.sources()

    def save(self, folder: str | Path, prefix: str = "model") -> None:
        """Write a bundle for the target's machine: a C library, its header, the weights and a program that checks it.

        Args:
            folder: made if need be.
            prefix: of all names that the library exports.

        Raises:
            TargetError: the model was compiled for this machine.
            InputError, StateError, ToolchainError: see ``planish.backends.bundle.write_bundle``.
        """
        from planish.backends.bundle.write import Bundle, Golden, write_bundle
        from planish.backends.tvm.backend import TvmBackend
        from planish.backends.tvm.cross import CrossExecutable

        compiled = self._ready()
        executable = compiled.executable
        if not isinstance(executable, CrossExecutable):
            raise TargetError(
                f"a model compiled for {self.target.name!r} cannot be saved yet", fix="compile it for an ARM target"
            )
        inputs = executable.program.example
        dims = check_inputs(compiled, inputs)
        twin = TvmBackend().compile(executable.program, self.target.twin)
        golden = Golden(inputs, dims, twin(inputs, dims, ()), BUNDLE_TOLERANCE)
        title = f"{prefix} for {self.target.name}"
        write_bundle(
            Path(folder), Bundle(prefix, title, self.target, executable, compiled.dims, compiled.counts, golden)
        )

    def check(self, runner: str = "qemu", cpu: str | None = None) -> Check:
        """Save a bundle, and run its own check: does its code compute what the host does?

        Args:
            runner: ``"qemu"``: in qemu-user, on this machine.
            cpu: processor as qemu names it; None for one that has the code's instructions and no more.

        Raises:
            UnknownNameError: there is no such runner.
            PlanishError: see ``save``, and ``planish.backends.bundle.check.check_bundle``.
        """
        from planish.backends.bundle.check import check_bundle

        if runner != "qemu":
            raise UnknownNameError(f"unknown runner {runner!r}", fix="use 'qemu'")
        with tempfile.TemporaryDirectory(prefix="planish-") as folder:
            self.save(folder)
            return check_bundle(Path(folder), cpu)

    def trim(self) -> None:
        """Give memory kept for later calls back."""
        if self._compiled is not None:
            self._compiled.executable.trim()

    def wait_for_inputs(self, model: torch.nn.Module | ExportedProgram) -> None:
        """Keep the model until the first call, which brings the inputs to capture it with."""
        self._model = model

    def adopt(self, compiled: Compiled) -> None:
        """Use the result of an equal compile."""
        self._compiled = compiled

    def capture_and_compile(
        self, model: torch.nn.Module | ExportedProgram, inputs: Inputs, key: Fingerprint | None
    ) -> Compiled:
        """Capture, run the passes, lower; remember the result under ``key``."""
        program, signature = capture(model, inputs, self._dynamic)
        if self._calibration is not None:
            program.calibration = _calibration(signature, program, self._calibration)
        observer = Dump(Path(self._dump)) if self._dump is not None else None
        engine, coverage, pipeline = backend(self.target.backend), None, self._pipeline
        if self._fallback == "eager" and engine.unsupported(program, self.target):
            # sizes between native segments and PyTorch follow from the inputs' shapes; a count of tokens does not
            pipeline = tuple(p for p in pipeline if "packed" not in p.makes)
        program, steps = run_pipeline(program, pipeline, self.target, check_values=self._verify, observe=observer)
        missing = engine.unsupported(program, self.target)
        if missing and self._fallback == "eager":
            cut = CutSegments(engine)
            program, step = run_pass(program, cut, self.target, check_values=self._verify, observe=observer)
            steps.append(step)
            coverage = Coverage.of(program)
            log.warning("%s", coverage)
            executable = compile_segments(program, engine, self.target)
        else:
            _check_supported(missing, self.target)
            executable = engine.compile(program, self.target)
        count = program.arguments
        state = StateSpec(program.state, program.example[count:])
        inputs = program.inputs[:count]
        compiled = Compiled(
            executable,
            signature,
            inputs,
            program.dims,
            program.counts,
            tuple(steps),
            state,
            coverage,
            program.assignment,
        )
        if compiled.assignment is not None:
            error = _compiler_error(compiled, program)
            compiled = replace(compiled, assignment=replace(compiled.assignment, compiler_error=error))
        if observer is not None:
            observer.kernels(executable.sources())
            observer.finish(self.target, compiled.assignment)
        self._compiled = compiled
        if key is not None:
            remember(model, key, compiled)
        return compiled

    def _compile_at_first_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Compiled:
        with self._lock:
            if self._compiled is None:
                assert self._model is not None
                if args and kwargs:
                    raise InputError(
                        "the first call mixes positional and keyword arguments",
                        why="it captures the model",
                        fix="pass all tensors by position or all by keyword",
                    )
                self.capture_and_compile(self._model, args or kwargs, None)
                self._model = None
            assert self._compiled is not None
            return self._compiled

    def _ready(self) -> Compiled:
        if self._compiled is None:
            raise InputError(
                "the model is not compiled yet",
                why="it is captured at the first call",
                fix="call it once, or give compile() its inputs",
            )
        return self._compiled


def _check_quantiser(pipeline: Sequence[Pass], mixed: QuantizeMixed | None, calibration: object) -> None:
    """Raise where a budget has no pass that keeps it, or no data to choose by."""
    if mixed is None:
        return
    if mixed not in pipeline:
        raise BudgetError(
            "a budget or pins were given, but no pass of passes=[...] uses them",
            fix=f"leave passes out, or add {QuantizeMixed.name!r} to them",
        )
    if calibration is None:
        raise CalibrationError(
            "a budget or pins were given without calibration",
            why="which layers bear few bits is found by running the model on representative inputs",
            fix="pass compile(..., calibration=[inputs, ...])",
        )


def _check_calibration(calibration: Iterable[Inputs], pipeline: Sequence[Pass], target: Target) -> list[Inputs]:
    """The calibration inputs as a list."""
    if not any("quantized" in p.makes for p in pipeline):
        raise CalibrationError(
            f"calibration inputs were given, but nothing in the pipeline for {target.name!r} uses them",
            fix="use target='cpu-int8' or 'cpu-int4', or a QuantizeUniform pass in passes=[...]",
        )
    if isinstance(calibration, (Mapping, torch.Tensor)) or not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"calibration is a {type(calibration).__name__}",
            why="it is a collection of inputs, each a tuple or dict like inputs",
            fix="for one batch write calibration=[inputs]",
        )
    batches = list(calibration)
    for number, batch in enumerate(batches):
        check_inputs_kind(batch, f"calibration batch {number}")
    return batches


def _calibration(
    signature: Signature, program: Program, batches: Sequence[Inputs]
) -> tuple[tuple[torch.Tensor, ...], ...]:
    """The calibration inputs as flat tensors, checked like a call's."""
    specs = program.inputs[: program.arguments]
    flat: list[tuple[torch.Tensor, ...]] = []
    for number, batch in enumerate(batches):
        try:
            flat.append(tuple(signature.flatten(*_as_call(batch))))
            check_tensors(specs, flat[-1])
        except (InputError, DimError) as error:
            raise CalibrationError(f"calibration batch {number}: {error.what}", why=error.why, fix=error.fix) from None
    check_calibration([spec.name for spec in specs], flat)
    return tuple(flat)


def _compiler_error(compiled: Compiled, program: Program) -> float:
    """How far compiled code is from its program in PyTorch: see ``Assignment.compiler_error``."""
    count = program.arguments
    tensors, buffers = program.example[:count], [t.clone() for t in program.example[count:]]
    want = program.run(*tensors, *(t.clone() for t in buffers))
    got = compiled.executable(tensors, check_inputs(compiled, tensors), buffers)
    return max((relative_error(w, g) for w, g in zip(want, got, strict=False)), default=0.0)  # then comes the state


def _run(compiled: Compiled, args: tuple[Any, ...], kwargs: Mapping[str, Any], buffers: Sequence[torch.Tensor]) -> Any:
    tensors = compiled.signature.flatten(args, kwargs)
    dims = check_inputs(compiled, tensors)
    return compiled.signature.unflatten(compiled.executable(tensors, dims, buffers), dims)


def _as_call(inputs: Inputs) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    return ((), inputs) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def _check_supported(missing: Sequence[Unsupported], target: Target) -> None:
    if not missing:
        return
    lines = [f"{u.op} ({u.node}): {u.reason}" + (f"\n      at {u.where}" if u.where else "") for u in missing]
    error = UnsupportedOpsError(
        f"no lowering for {len(missing)} operator(s) on target {target.name!r}:\n    " + "\n    ".join(lines),
        why="planish does not run parts of a model in PyTorch silently",
        fix="rewrite those lines with supported operators, run them in PyTorch with fallback='eager', or use "
        "target='reference' to check the rest",
    )
    error.ops = tuple(missing)
    raise error


def check_inputs(compiled: Compiled, tensors: Sequence[torch.Tensor]) -> dict[str, int]:
    """Check dtype, rank, sizes and ranges of the input tensors; returns the size of each dynamic dim.

    Raises:
        InputError, DimError: naming the input, the dim and its range.
    """
    return _in_range(compiled, check_tensors(compiled.inputs, tensors))


def check_tensors(specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor]) -> dict[str, int]:
    """Check dtype, rank and sizes of the input tensors; returns the size of each dynamic dim.

    Raises:
        InputError, DimError: naming the input and the dim.
    """
    dims: dict[str, int] = {}
    for spec, tensor in zip(specs, tensors, strict=True):
        if tensor.requires_grad or not tensor.is_cpu or tensor.layout is not torch.strided:
            check_tensor(spec.name, tensor)
        if tensor.dtype is not spec.dtype:
            raise InputError(
                f"input {spec.name!r} is {tensor.dtype}, compiled for {spec.dtype}", fix=f"pass x.to({spec.dtype})"
            )
        shape = tensor.shape
        if len(shape) != len(spec.shape):
            raise InputError(f"input {spec.name!r} has shape {list(shape)}", why=f"it was compiled as {spec}")
        for axis, (size, want) in enumerate(zip(shape, spec.shape, strict=True)):
            if isinstance(want, int):
                if size != want:
                    raise InputError(
                        f"input {spec.name!r} has size {size} on axis {axis}, compiled for {want}",
                        fix=f"compile with dynamic={{{spec.name!r}: {{{axis}: planish.Dim(...)}}}}",
                    )
            elif dims.setdefault(str(want), size) != size and want.is_Symbol:
                raise DimError(
                    f"dim {want} is {dims[str(want)]} in one input and {size} on axis {axis} of {spec.name!r}",
                    why="equal names are equal sizes",
                )
    return dims


def _in_range(compiled: Compiled, dims: dict[str, int]) -> dict[str, int]:
    """The sizes in order; a dim that is counted in the call gets its upper bound, for which memory is laid out."""
    sizes: dict[str, int] = {}
    for name, dim in compiled.dims.items():
        if name in compiled.counts:
            sizes[name] = evaluate(compiled.counts[name], sizes)
            continue
        size = dims[name]
        if not dim.min <= size <= dim.max:
            raise DimError(
                f"dim {name!r} is {size}, compiled for {dim.min}..{dim.max}",
                fix="pass a size in the range, or compile with "
                f"planish.Dim({name!r}, {min(dim.min, size)}, {max(dim.max, size)})",
            )
        sizes[name] = size
    return sizes
