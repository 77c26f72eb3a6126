"""Measured times of linear layers, as data: they decide a layer's blocking, and say what it takes in each format.

`planish doctor --tune` measures a table on this machine and keeps it in the user's cache folder. Where there is none
for this machine, the defaults that are shipped for its instruction-set level count. A table is part of what a model is
compiled from: a ``Target`` holds it, and its ``repr``, which the keys of compiled models contain, has its digest.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec
import platformdirs

from planish.errors import CostTableError, UnknownNameError

FP32 = "fp32"
"""Name of the format of layers that are not on integer codes."""

MOST_TILE_ROWS = 16
"""More rows of a tile have no registers at any level."""


@dataclass(frozen=True)
class Machine:
    """What times depend on.

    Attributes:
        processor: its name and model numbers.
        isa: instruction-set level of the code.
        l2_bytes: private second-level cache of a core in bytes.
        llc_bytes: last-level cache in bytes.
        threads: that share a layer's work.
    """

    processor: str
    isa: str
    l2_bytes: int
    llc_bytes: int
    threads: int


@dataclass(frozen=True, order=True)
class LayerCost:
    """What a layer ``x[M, K] @ w[N, K].T`` takes.

    Attributes:
        format: ``FP32``, or the layer's format as in ``Format.parse``.
        n: output features.
        k: input features.
        tile_rows: rows of its largest tile, the best of those measured.
        ms: pairs of M and the kernel's milliseconds, by M.
    """

    format: str
    n: int
    k: int
    tile_rows: int
    ms: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        """Raises ValueError where no layer could be so."""
        sizes = [0, *(m for m, _ in self.ms)]
        if not self.ms or any(b <= a for a, b in pairwise(sizes)):
            raise ValueError("ms needs pairs of M, from 1 on and growing, and milliseconds")
        if min(self.n, self.k) < 1 or not all(0 < ms < math.inf for _, ms in self.ms):
            raise ValueError("n, k and the milliseconds must be more than 0")
        if not 1 <= self.tile_rows <= MOST_TILE_ROWS:
            raise ValueError(f"tile_rows is {self.tile_rows}, not 1 to {MOST_TILE_ROWS}")

    def at(self, m: int) -> float:
        """Milliseconds for ``m`` rows: a power of m between two measured ones, as many FLOP/s beyond the outermost."""
        after = bisect_right(self.ms, m, key=lambda point: point[0])
        if after in (0, len(self.ms)):
            rows, ms = self.ms[max(0, after - 1)]
            return ms * (m / rows)
        (low, least), (high, most) = self.ms[after - 1], self.ms[after]
        return least * (most / least) ** (math.log(m / low) / math.log(high / low))

    def distance(self, n: int, k: int) -> float:
        """How far another shape is: 1 for one that is e times as wide or as deep."""
        return math.hypot(math.log(n / self.n), math.log(k / self.k))


@dataclass(frozen=True, repr=False)
class CostTable:
    """The layers that were measured on a machine, ordered by format, N and K."""

    machine: Machine
    layers: tuple[LayerCost, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for layers out of order or twice."""
        shapes = [(layer.format, layer.n, layer.k) for layer in self.layers]
        if any(b <= a for a, b in pairwise(shapes)):
            raise ValueError("layers must be ordered by format, n and k, each of them once")

    def __repr__(self) -> str:
        return f"CostTable({self.machine.isa}, {len(self.layers)} layers, {self.digest})"

    @property
    def digest(self) -> str:
        """The same for equal tables only."""
        return hashlib.sha256(self.encode()).hexdigest()[:32]

    @property
    def formats(self) -> tuple[str, ...]:
        """Those that were measured."""
        return tuple(dict.fromkeys(layer.format for layer in self.layers))

    def ms(self, form: str, m: int, n: int, k: int) -> float:
        """Milliseconds of a layer [M, K] by [N, K], from the throughput of the measured ones.

        Between the measured shapes it is a mean of the throughputs' logarithms in which a shape counts by its distance
        to the power of -4, so that the nearest decide. At M = 1 a layer reads its weights once: there GFLOP/s are GB/s
        times a constant of the format. More rows never take less time unless they did so when measured.

        Raises:
            UnknownNameError: no layer of that format was measured.
        """
        layers = self._of(form)
        if not layers:
            raise UnknownNameError(
                f"the cost table has no layer of format {form!r}", fix="use one of: " + ", ".join(self.formats)
            )
        weights, sums = 0.0, 0.0
        for layer in layers:
            distance = layer.distance(n, k)
            if not distance:
                return layer.at(m)
            weights += distance**-4
            sums += distance**-4 * math.log(layer.at(m) / (layer.n * layer.k))
        return n * k * math.exp(sums / weights)

    def tile_rows(self, form: str, n: int, k: int) -> int | None:
        """Rows of the largest tile of the nearest measured layer; None where none has that format."""
        nearest = min(self._of(form), key=lambda layer: layer.distance(n, k), default=None)
        return nearest and nearest.tile_rows

    def _of(self, form: str) -> list[LayerCost]:
        """Layers of a format; where the input's scale comes from makes no difference to the tiles."""
        return [layer for layer in self.layers if layer.format == form.removesuffix("-static")]

    def encode(self) -> bytes:
        """The file: JSON with a layer in a line."""
        machine, *layers = (msgspec.json.encode(part) for part in (self.machine, *self.layers))
        return b'{"machine": %s,\n"layers": [\n%s\n]}\n' % (machine, b",\n".join(layers))

    def save(self) -> Path:
        """Keep the table for this user's later compiles; returns the file, which is there whole or not at all.

        Raises:
            CostTableError: the file cannot be written.
        """
        path = user_file(self.machine)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                whole = Path(folder, path.name)
                whole.write_bytes(self.encode())
                whole.replace(path)
        except OSError as error:
            raise CostTableError(
                "the cost table cannot be written", where=str(path), why=str(error), fix="make its folder writable"
            ) from error
        return path


@dataclass(frozen=True)
class Choice:
    """The table for a machine, which one it is in words, and what is wrong with the user's, if anything."""

    table: CostTable
    origin: str
    problem: CostTableError | None = None


def choose_table(machine: Machine) -> Choice:
    """The user's table for this machine if there is one that can be read, else the shipped defaults."""
    problem, file = None, user_file(machine)
    if os.path.exists(file):  # unlike Path.exists, False where a folder on the way may not be entered
        try:
            return Choice(_read(file, machine), "measured on this machine")
        except CostTableError as error:
            problem = error
    table = shipped_table(machine.isa)
    unmeasured = "" if table.machine.isa == machine.isa else f" ({machine.isa} is not measured)"
    return Choice(table, f"shipped defaults for {table.machine.isa}{unmeasured}", problem)


def shipped_table(isa: str) -> CostTable:
    """The defaults for an instruction-set level: those of AVX2 where none were measured.

    Raises:
        CostTableError: the installation is damaged.
    """
    file = Path(__file__).with_name("data") / f"costs-{isa}.json"
    return _read(file if file.exists() else file.with_name("costs-avx2.json"))


def user_file(machine: Machine) -> Path:
    """Where this user's table for a machine is."""
    name = hashlib.sha256(repr(machine).encode()).hexdigest()[:16]
    return platformdirs.user_cache_path("planish") / f"costs-{machine.isa}-{name}.json"


def _read(file: Path, machine: Machine | None = None) -> CostTable:
    """A table from its file; with ``machine``, it is the user's and must be for that one."""
    try:
        table = msgspec.json.decode(file.read_bytes(), type=CostTable)
        if machine not in (None, table.machine):
            raise ValueError(f"it describes another machine: {table.machine}")
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        remedy = "run `planish doctor --tune` to measure it again, or remove the file to use the shipped defaults"
        raise CostTableError(
            "the cost table cannot be used",
            where=str(file),
            why=str(error),
            fix=remedy if machine else "install planish again",
        ) from error
    return table
