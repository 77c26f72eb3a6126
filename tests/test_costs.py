"""Cost tables: files, look-ups between what was measured, which table counts, and that kernels and keys follow it."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import planish
from planish import reuse
from planish.backends.base import KernelTime
from planish.backends.tvm.microkernel import gemm_tile
from planish.bench import tune
from planish.bench.qgemm import Layer
from planish.costs import FP32, CostTable, LayerCost, Machine, choose_table, shipped_table
from planish.errors import CostTableError, UnknownNameError
from planish.formats import Format, quantise
from planish.targets import TARGETS, Target, host_isa_levels

HERE = Machine("a processor", "avx2", 512 << 10, 16 << 20, 2)
TABLE = CostTable(
    HERE,
    (
        LayerCost(FP32, 384, 384, 4, ((1, 0.012), (64, 0.23), (256, 0.93))),
        LayerCost(FP32, 1536, 384, 4, ((1, 0.042), (64, 0.8), (256, 3.2))),
        LayerCost("w4a8-g32", 384, 384, 4, ((1, 0.006), (64, 0.1), (256, 0.44))),
        LayerCost("w4a8-g32", 3072, 768, 6, ((1, 0.06), (64, 1.6), (256, 5.6))),
    ),
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "planish"


def test_a_table_is_read_as_it_was_written(cache: Path) -> None:
    path = TABLE.save()
    assert path.parent == cache
    assert list(cache.iterdir()) == [path]
    choice = choose_table(HERE)
    assert choice.table == TABLE
    assert path.read_bytes() == choice.table.encode()
    assert (choice.origin, choice.problem) == ("measured on this machine", None)


def test_a_table_of_another_machine_does_not_count(cache: Path) -> None:
    TABLE.save()
    for other in (replace(HERE, threads=4), replace(HERE, processor="another"), replace(HERE, l2_bytes=1 << 20)):
        assert choose_table(other).table == shipped_table("avx2")
    assert choose_table(replace(HERE, threads=4)).origin == "shipped defaults for avx2"


def test_what_was_not_measured_is_said(cache: Path) -> None:
    choice = choose_table(replace(HERE, isa="avx512"))
    assert choice.table == shipped_table("avx2")
    assert choice.origin == "shipped defaults for avx2 (avx512 is not measured)"


DAMAGED = {
    "cut": (lambda text: text[:100], "truncated"),
    "type": (lambda text: text.replace('"tile_rows":4', '"tile_rows":"four"'), r"tile_rows"),
    "field": (lambda text: text.replace('"k":384,', ""), "missing required field `k`"),
    "rows": (lambda text: text.replace('"tile_rows":4', '"tile_rows":0'), "tile_rows is 0"),
    "time": (lambda text: text.replace("0.93", "-0.93"), "more than 0"),
    "order": (lambda text: text.replace("[1,0.012]", "[100,0.012]"), "growing"),
    "layers": (lambda text: text.replace('"n":1536', '"n":38'), "ordered"),
    "machine": (lambda text: text.replace("a processor", "another"), "another machine"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_table_is_named_and_the_defaults_count(damage: str, cache: Path) -> None:
    change, why = DAMAGED[damage]
    path = TABLE.save()
    path.write_text(change(path.read_text()))
    choice = choose_table(HERE)
    assert choice.table == shipped_table("avx2")
    assert isinstance(choice.problem, CostTableError)
    assert re.search(why, choice.problem.why)
    assert choice.problem.where == str(path)
    assert "planish doctor --tune" in choice.problem.fix
    assert "remove the file" in choice.problem.fix


def test_a_damaged_table_does_not_stop_a_compile(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine = Target.host().machine
    path = replace(TABLE, machine=machine).save()
    path.write_text("{")
    x = torch.randn(3, 8)
    model = torch.nn.Linear(8, 8).eval()
    with caplog.at_level(logging.WARNING, "planish"):
        torch.testing.assert_close(planish.compile(model, (x,))(x), model(x))
    assert "shipped defaults for" in caplog.text
    assert str(path) in caplog.text


def test_a_table_that_cannot_be_written_is_an_error(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(CostTableError, match=r"cannot be written(.|\n)*fix"):
        TABLE.save()


def test_measured_points_are_exact() -> None:
    for layer in TABLE.layers:
        for m, ms in layer.ms:
            assert TABLE.ms(layer.format, m, layer.n, layer.k) == ms


def test_between_points_of_m_time_is_a_power_of_it() -> None:
    assert TABLE.ms(FP32, 8, 384, 384) == pytest.approx((0.012 * 0.23) ** 0.5)
    assert TABLE.ms(FP32, 128, 384, 384) == pytest.approx((0.23 * 0.93) ** 0.5)
    assert TABLE.ms(FP32, 1024, 384, 384) == pytest.approx(4 * 0.93)


def test_between_shapes_throughput_is_a_mean_of_the_nearest() -> None:
    small, large = 0.23 / (384 * 384), 0.8 / (1536 * 384)
    assert TABLE.ms(FP32, 64, 768, 384) == pytest.approx(768 * 384 * (small * large) ** 0.5)
    near = TABLE.ms(FP32, 64, 400, 384) / (400 * 384)
    assert near == pytest.approx(small, rel=1e-3)
    assert min(small, large) < TABLE.ms(FP32, 64, 5000, 5000) / 5000**2 < max(small, large)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 9000), st.integers(1, 9000))
def test_more_rows_never_take_less(m: int, more: int, n: int, k: int) -> None:
    low, high = sorted((m, more))
    for form in TABLE.formats:
        assert TABLE.ms(form, low, n, k) <= TABLE.ms(form, high, n, k) * (1 + 1e-12)


def test_formats() -> None:
    assert TABLE.ms("w4a8-g32-static", 64, 384, 384) == TABLE.ms("w4a8-g32", 64, 384, 384)
    with pytest.raises(UnknownNameError, match=r"'w3a8'(.|\n)*fp32, w4a8-g32"):
        TABLE.ms("w3a8", 1, 384, 384)
    assert TABLE.tile_rows("w3a8", 384, 384) is None


def test_the_shipped_table_has_every_format_on_every_shape() -> None:
    table = shipped_table("avx2")
    assert table.machine.isa == "avx2"
    shapes = {(layer.format, layer.n, layer.k) for layer in table.layers}
    assert shapes == {(form, n, k) for form in tune.FORMATS for n, k in tune.GRID.shapes}
    for layer in table.layers:
        assert [m for m, _ in layer.ms] == list(tune.GRID.rows)
        assert sorted(ms for _, ms in layer.ms) == [ms for _, ms in layer.ms]


@pytest.mark.parametrize("name", [t.name for t in TARGETS.values() if t.isa and t.isa in ("host", *host_isa_levels())])
def test_targets_have_a_table(name: str) -> None:
    table = Target.parse(name).costs
    assert table is not None
    assert table.tile_rows("w4a8-g32", 384, 384) in tune.TILE_ROWS


def with_rows(tile_rows: int) -> Target:
    """This machine with a table of one layer."""
    return replace(Target.host(), costs=CostTable(HERE, (LayerCost("w4a8-g32", 32, 64, tile_rows, ((1, 1.0),)),)))


def test_tiles_are_those_of_the_nearest_layer() -> None:
    assert TABLE.tile_rows("w4a8-g32", 384, 384) == 4
    assert TABLE.tile_rows("w4a8-g32", 500, 500) == 4
    assert TABLE.tile_rows("w4a8-g32", 4096, 4096) == 6
    torch.manual_seed(0)
    layer = Layer(quantise(torch.randn(48, 64), Format.parse("w4a8-g32").weight), "w4a8-g32").eval()
    x, results = torch.randn(13, 64), []
    for rows in tune.TILE_ROWS:
        compiled = planish.compile(layer, (x,), with_rows(rows))
        tiles = [re.match(r"planish_tile_w4_g32_(\d+)x", name) for name, _, _ in compiled.sources()]
        assert max(int(found[1]) for found in tiles if found) == rows
        results.append(compiled(x))
    assert torch.equal(*results)


def test_layers_of_one_kernel_may_have_different_tiles() -> None:
    def quantized(n: int, k: int) -> Layer:
        return Layer(quantise(torch.randn(n, k), Format.parse("w4a8-g32").weight), "w4a8-g32")

    torch.manual_seed(0)
    model, x = torch.nn.Sequential(quantized(96, 64), torch.nn.ReLU(), quantized(64, 96)).eval(), torch.randn(301, 64)
    results = []
    for first, second in ((4, 6), (6, 4)):
        layers = (LayerCost("w4a8-g32", 64, 96, second, ((1, 1.0),)), LayerCost("w4a8-g32", 96, 64, first, ((1, 1.0),)))
        compiled = planish.compile(model, (x,), replace(Target.host(), costs=CostTable(HERE, layers)))
        assert [time.shape for time in compiled.kernels((x,), repeats=1)] == [(301, 96, 64, 64, 96)]
        results.append(compiled(x))
    assert torch.equal(*results)


def test_a_compile_is_reused_for_an_equal_table_only() -> None:
    layer, x = torch.nn.Linear(8, 8).eval(), torch.randn(3, 8)
    keys = [reuse.fingerprint(layer, (x,), target, None, [], "error") for target in map(with_rows, (4, 4, 6))]
    assert keys[0] == keys[1] != keys[2]
    slower = replace(TABLE, layers=(replace(TABLE.layers[0], ms=((1, 0.5),)), *TABLE.layers[1:]))
    assert repr(slower) != repr(TABLE)


@pytest.mark.parametrize(("times", "best"), [((1.0, 1.0, 9.0), 6), ((0.99, 0.99, 0.5), 6), ((0.9, 0.9, 9.0), 4)])
def test_tune_changes_a_blocking_for_a_clear_gain_only(times: tuple[float, ...], best: int) -> None:
    """Six rows are usual; at one row the tile is the same."""
    grid = tune.Grid(rows=(1, 64))
    samples: dict[tune.Key, list[float]] = {}
    for m in grid.rows:
        samples["w4a8-g32", 384, 384, 6, m] = [1.0, 1.0, 1.0]
        samples["w4a8-g32", 384, 384, 4, m] = list(times) if m > 1 else [0.1, 0.1, 0.1]
    assert tune._best("w4a8-g32", 384, 384, grid, samples) == best


def test_a_time_of_nothing_is_no_measurement() -> None:
    assert tune._ms([0.3, 0.12345, -1.0]) == 0.1235
    with pytest.raises(CostTableError, match=r"busy(.|\n)*idle"):
        tune._ms([0.1, 0.0, -0.1])


class Timed:
    """What tune is given in place of a compiled model: times by M, less with four rows where N is 512."""

    def __init__(self, _model: Any, _inputs: Any, target: Target, *, dynamic: Any, cache: bool) -> None:
        assert not cache
        assert target.costs is not None
        self.costs = target.costs
        self.dims = dynamic

    def kernels(self, xs: tuple[torch.Tensor, ...], repeats: int) -> list[KernelTime]:
        assert repeats
        assert len(xs) == len(self.dims) == 2
        shapes = [(xs[0].shape[0], 512, xs[0].shape[1]), (xs[1].shape[0], 256, xs[1].shape[1])]
        four = [self.costs.tile_rows("w4a8-g32", n, k) == 4 and n == 512 for _, n, k in shapes]
        return [KernelTime("", "", s, s[0] * (0.5 if f else 1.0), 0, 1) for s, f in zip(shapes, four, strict=True)]


def test_tune_measures_the_grid() -> None:
    grid = tune.Grid(rows=(1, 8), shapes=((512, 128), (256, 512)), formats=("w4a8-g32", FP32), rounds=2)
    target, phases, threads = Target.host(), list[str](), torch.get_num_threads()
    table = tune.run(grid, target, Timed, phases.append)
    assert torch.get_num_threads() == threads
    assert table.machine == target.machine
    usual = gemm_tile(target, 256).rows, gemm_tile(target, 512).rows
    assert table.layers == (
        LayerCost(FP32, 256, 512, usual[0], ((1, 1.0), (8, 8.0))),
        LayerCost(FP32, 512, 128, usual[1], ((1, 1.0), (8, 8.0))),
        LayerCost("w4a8-g32", 256, 512, 6, ((1, 1.0), (8, 8.0))),
        LayerCost("w4a8-g32", 512, 128, 4, ((1, 0.5), (8, 4.0))),
    )
    assert phases[:2] == ["compiling layers in w4a8-g32", "compiling layers in fp32"]
    assert phases[2:] == ["measuring, round 1 of 2", "measuring, round 2 of 2"]
    columns, rows = tune.as_rows(table)
    assert columns == ["format", "N x K", "tile rows", "GFLOP/s at 1", "GFLOP/s at 8"]
    assert [row[:2] for row in rows] == [[t.format, f"{t.n} x {t.k}"] for t in table.layers]
