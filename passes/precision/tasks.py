"""Independent pieces of work, one after the other or by an executor such as Dask's ``client.get_executor()``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track

T = TypeVar("T")

PIECES = 8
"""In how many tasks inputs are given to an executor: each is sent the model, so there are few."""


def run_all(
    what: str,
    task: Callable[..., T],
    arguments: Sequence[tuple[Any, ...]],
    executor: Executor | None,
    end: float = float("inf"),
) -> list[T]:
    """The results of a task for some arguments, in order: at least the first, and those that are there by the end.

    Tasks compute with as many threads as there are here, so that results do not depend on who computes them.

    Args:
        what: for the progress bar.
        task: a function of a module; with an executor it and its arguments are sent to other processes.
        arguments: of each task.
        executor: runs the tasks; None for one after the other.
        end: by ``time.perf_counter``.
    """
    if executor is None:
        results = (task(*of_one) for of_one in arguments)
        return list(_until(_progress(results, what, len(arguments)), end))
    futures = [executor.submit(_with_threads, torch.get_num_threads(), task, *of_one) for of_one in arguments]
    try:
        return list(_until(_progress((future.result() for future in futures), what, len(futures)), end))
    finally:
        for future in futures:
            future.cancel()


def pieces(items: Sequence[T], executor: Executor | None) -> list[list[T]]:
    """Items in order, one by one or, for an executor, in ``PIECES`` parts."""
    size = 1 if executor is None else -(-len(items) // PIECES)
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _with_threads(threads: int, task: Callable[..., T], *arguments: Any) -> T:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return task(*arguments)


def _until(results: Iterable[T], end: float) -> Iterator[T]:
    for result in results:
        yield result
        if time.perf_counter() > end:
            break


def _progress(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    console = Console(stderr=True)
    return track(items, what, total=total, console=console, transient=True, disable=not console.is_terminal)
