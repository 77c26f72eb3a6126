"""The command line of the benchmarks; torch is imported after the threads are set."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from planish.bench import MIN_ROUNDS
from planish.errors import PlanishError

app = typer.Typer(
    help="Measures what planish does, against eager and inductor.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line; an error of planish's prints without a traceback and exits with 1."""
    try:
        app()
    except PlanishError as error:
        typer.echo(str(error), err=True)
        sys.exit(1)


@app.callback()
def _group() -> None:  # pyright: ignore[reportUnusedFunction]  (keeps NAME an argument while there is one command)
    """Measures what planish does, against eager and inductor."""


@app.command()
def encoder(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures to FILE")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="threads on every side")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=MIN_ROUNDS, help="timed rounds over all batches")] = 11,
) -> None:
    """MiniLM on 64 Lee background documents: 4 batches of 16, at most 256 tokens, padded."""
    _measure("planish.bench.encoder", json, threads, rounds)


@app.command()
def padding(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures to FILE")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="threads on every side")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=MIN_ROUNDS, help="timed rounds over each set")] = 11,
) -> None:
    """MiniLM on batches a quarter to wholly full, on mixed lengths and on documents, with and without padding."""
    _measure("planish.bench.padding", json, threads, rounds)


@app.command()
def cnn(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures to FILE")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="threads on every side")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=MIN_ROUNDS, help="timed rounds over all images")] = 11,
) -> None:
    """EfficientNet-lite0 and ResNet-50 on ImageNet images, at batch 1 and 8."""
    _measure("planish.bench.suite", json, threads, rounds, suite="cnn")


@app.command()
def families_real(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures to FILE")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="threads on every side")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=MIN_ROUNDS, help="timed rounds over all documents")] = 11,
    only: Annotated[str | None, typer.Option("--only", metavar="NAMES", help="models, separated by commas")] = None,
) -> None:
    """Transformers at real shapes (ViT, Swin, ConvNeXt, MobileNet, BERT, GPT-2, Llama), at batch 1 and 8."""
    _measure("planish.bench.suite", json, threads, rounds, suite="families-real", only=_names(only))


@app.command()
def softmax(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures to FILE")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="threads on every side")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=MIN_ROUNDS, help="timed rounds")] = 11,
    only: Annotated[str | None, typer.Option("--only", metavar="KINDS", help="softmax, log_softmax or both")] = None,
) -> None:
    """Softmax and its logarithm over rows of 1K to 16M elements, with each of our schedules."""
    _measure("planish.bench.softmax", json, threads, rounds, only=_names(only))


@app.command()
def qgemm(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures to FILE")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="threads on every side")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=MIN_ROUNDS, help="timed rounds of each shape")] = 11,
    only: Annotated[str | None, typer.Option("--only", metavar="FORMATS", help="formats, separated by commas")] = None,
) -> None:
    """Linear layers on integer codes: every format at several shapes, against fp32 and the machine's limits."""
    _measure("planish.bench.qgemm", json, threads, rounds, only=_names(only))


@app.command()
def perplexity(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures to FILE")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="threads of the compiled models")] = None,
) -> None:
    """What 8-bit activations cost SmolLM2: static scales, scales for each token, and with outliers in fp32."""
    _measure("planish.bench.perplexity", json, threads, 0)


@app.command()
def precision(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures to FILE")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="threads of PyTorch")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="draws of inputs and probes")] = 3,
    only: Annotated[str | None, typer.Option("--only", metavar="NAMES", help="models, separated by commas")] = None,
) -> None:
    """How well scores foretell the loss of models' layers in few bits, and what assignments by them lose."""
    _measure("planish.bench.precision", json, threads, seeds, only=_names(only))


@app.command()
def arm(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures to FILE")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="threads of PyTorch")] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="NAMES", help="levels or models, by commas")] = None,
) -> None:
    """Code for ARM: instructions and modelled cycles of tiles, and models as bundles under qemu."""
    _measure("planish.bench.arm.suite", json, threads, 0, only=_names(only))


def _width() -> int | None:
    """Columns of the tables: those of the terminal, and as many as they need in a file."""
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH


FILE_WIDTH = 160


def _names(only: str | None) -> tuple[str, ...]:
    """The names of an ``--only`` option; none without one."""
    return tuple(name.strip() for name in only.split(",")) if only is not None else ()


def _measure(module: str, json: Path | None, threads: int | None, rounds: int, **own: Any) -> None:
    """Run the benchmark in ``module`` with its ``own`` options, write its figures and show them."""
    count = threads if threads is not None else len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(count)  # read once, when the OpenMP runtime is loaded with torch
    from rich.console import Console

    import planish
    from planish.bench.report import show

    bench: Any = import_module(module)
    progress = Console(stderr=True, highlight=False)
    options = bench.Options(threads=count, rounds=rounds, **own)
    result = bench.run(options, planish.compile, lambda phase: progress.print(f"- {phase}", markup=False))
    if json is not None:
        result.write(json)
    show(result.to_dict(), Console(width=_width()))
    if json is not None:
        typer.echo(f"written: {json}")


@app.command()
def families(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures to FILE")] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="NAMES", help="families, separated by commas")] = None,
) -> None:
    """Compile 86 families of transformers as tiny models, each in its own process, and check them against eager."""
    from rich.console import Console

    from planish.bench.families import FamilyRow, run
    from planish.bench.report import show_families
    from planish.models.families import FAMILIES, family

    names = [family(name).name for name in _names(only)] or list(FAMILIES)
    progress = Console(stderr=True, highlight=False)

    def done(row: FamilyRow) -> None:
        state = "matches" if row.match else f"{len(row.reasons)} reasons"
        progress.print(f"- {row.name}: {row.native_share:.0%} native, {state}", markup=False)

    result = run(names, done)
    if json is not None:
        result.write(json)
    show_families(result.to_dict(), Console(width=_width()))
    if json is not None:
        typer.echo(f"written: {json}")
