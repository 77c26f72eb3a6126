"""The command line of the benchmarks; torch is imported after the threads are set."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from planish.bench.latency import MIN_ROUNDS
from planish.errors import PlanishError

app = typer.Typer(
    help="Measures eager, inductor and compiled on real inputs, interleaved.",
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
    """Measures eager, inductor and compiled on real inputs, interleaved."""


@app.command()
def encoder(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures to FILE")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="threads on every side")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=MIN_ROUNDS, help="timed rounds over all batches")] = 11,
) -> None:
    """MiniLM on 64 Lee background documents: 4 batches of 16, at most 256 tokens, padded."""
    count = threads if threads is not None else len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(count)  # read once, when the OpenMP runtime is loaded with torch
    from rich.console import Console

    import planish
    from planish.bench.encoder import Options, run
    from planish.bench.report import show

    progress = Console(stderr=True, highlight=False)
    result = run(Options(count, rounds), planish.compile, lambda phase: progress.print(f"- {phase}", markup=False))
    if json is not None:
        result.write(json)
    show(result.to_dict(), Console())
    if json is not None:
        typer.echo(f"written: {json}")
