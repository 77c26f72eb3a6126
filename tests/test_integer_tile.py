"""Integer tiles against int64 sums: every format, random codes and all extremes of one sign."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import tvm

from planish.backends.tvm import integer_tile
from planish.backends.tvm.codegen import object_code
from planish.formats import BITS, Format, Quantized, WeightFormat
from planish.targets import TARGETS, host_isa_levels

pytestmark = [
    pytest.mark.skipif("avx2" not in host_isa_levels(), reason="this machine lacks avx2"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]


@pytest.mark.parametrize("bits", BITS)
def test_packed_codes_take_their_bits_and_no_more(bits: int) -> None:
    form = WeightFormat(bits, 32)
    codes = torch.randint(0, 1 << bits, (48, 96), dtype=torch.uint8)
    packed = integer_tile.packed_codes(codes, form)
    assert packed.dtype is torch.uint8
    assert packed.numel() == integer_tile.packed_size((48, 96), form) == 48 * 96 * bits // 8
    ragged = integer_tile.packed_codes(codes[:41, :70], form)
    assert ragged.numel() == integer_tile.packed_size((41, 70), form) == packed.numel()
    if bits < 8:
        assert torch.equal(unpacked(packed, bits), codes)


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of 48 x 96, read as the docstring of ``packed_codes`` says."""
    codes = torch.zeros(48, 96, dtype=torch.uint8)
    panels = packed.view(3, 3, 2, bits, 8, 4)
    for k in range(96):
        unit, quad, place = k // 32, k % 32 // 4, k % 4
        first = shift = 0
        for width in integer_tile.planes(bits):
            each = 8 // width
            byte = panels[:, unit, :, first + quad // each, :, place].reshape(-1)
            codes[:, k] |= ((byte >> (quad % each * width)) & ((1 << width) - 1)) << shift
            first, shift = first + width, shift + width
    return codes


@pytest.mark.parametrize("bits", [6, 5, 4, 3, 2])
def test_sums_in_int16_cannot_overflow_and_twice_as_long_ones_could(bits: int) -> None:
    most = integer_tile.safe_quads(bits) * 2 * 127 * ((1 << bits) - 1)
    assert most < 1 << 15
    assert 2 * most >= 1 << 15 or integer_tile.safe_quads(bits) == integer_tile.QUADS


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    def build(functions: dict[str, tvm.tirx.PrimFunc]) -> ctypes.CDLL:
        folder = Path(tmp_path_factory.mktemp("tile"))
        variables = {tvm.ir.GlobalVar(name): func for name, func in functions.items()}
        (folder / "tile.o").write_bytes(object_code(variables, TARGETS["cpu-avx2"]).code)
        subprocess.run(["cc", "-shared", "-o", folder / "tile.so", folder / "tile.o"], check=True)
        return ctypes.CDLL(str(folder / "tile.so"))

    return build


FORMS = [
    WeightFormat(bits, group, symmetric)
    for bits in BITS
    for group, symmetric in ((32, True), (128, True), (None, True), (64, False), (None, False))
]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_a_tile_is_exact(form: WeightFormat, compiled: Callable[..., ctypes.CDLL]) -> None:
    width, most = integer_tile.WIDTH, integer_tile.tile_rows(form)
    functions = {
        f"tile{rows}{biased:d}": integer_tile.build_integer_tile(
            f"tile{rows}{biased:d}",
            Format(form),
            rows,
            width - 3 * biased,
            biased=biased,
            unpacked=biased and form.bits < 8,
        )
        for rows, biased in ((1, False), (most, True))
    }
    if form.bits < 8:
        functions["unpack"] = integer_tile.build_unpacking("unpack", form)
    library = compiled(functions)
    torch.manual_seed(form.bits)
    for depth in (32, 200, 576, 5000):
        for kind in ("random", "highest", "lowest"):
            of_a, of_b, numbers = operands(form, most, width, depth, kind)
            for rows, biased in ((1, False), (most, True)):
                got = call(library, of_a[:rows], of_b, numbers, biased)
                want = reference(of_a[:rows], of_b, numbers, biased)
                torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6 * want.abs().max().item())


def operands(
    form: WeightFormat, rows: int, width: int, depth: int, kind: str
) -> tuple[torch.Tensor, Quantized, dict[str, torch.Tensor]]:
    """Codes of A, B in its format, scales of the rows and a bias."""
    top = (1 << form.bits) - 1
    of_a = torch.randint(-127, 128, (rows, depth), dtype=torch.int8)
    codes = torch.randint(0, top + 1, (width, depth), dtype=torch.uint8)
    groups = form.groups(depth)
    scales = torch.randint(-127, 128, (width, groups)) if form.two_level else torch.rand(width, groups)
    if kind != "random":
        of_a[:] = 127 if kind == "highest" else -127
        codes[:] = top if kind == "highest" else 0
        scales[:] = 127 if form.two_level else scales
    least = None if form.symmetric else -torch.rand(width, groups).to(form.scale_dtype)
    held = Quantized(form, codes, scales.to(form.scale_dtype), least, torch.rand(width) if form.two_level else None)
    return of_a, held, {"rows": torch.rand(rows), "bias": torch.randn(width)}


def sums(form: WeightFormat, of_a: torch.Tensor) -> torch.Tensor:
    """Sum of A's codes, int64 [rows, groups]."""
    parts = of_a.long().split(form.group or of_a.shape[1], 1)
    return torch.stack([p.sum(1) for p in parts], 1)


def reference(of_a: torch.Tensor, of_b: Quantized, numbers: dict[str, torch.Tensor], biased: bool) -> torch.Tensor:
    """The tile's result from int64 sums, in fp64."""
    group, steps = of_b.format.group or of_a.shape[1], of_b.scales.double()
    steps = steps if of_b.channels is None else steps * of_b.channels.double()[:, None]
    middle = 1 << (of_b.format.bits - 1) if of_b.format.symmetric else 0
    products = zip(of_a.long().split(group, 1), (of_b.codes.long() - middle).split(group, 1), strict=True)
    total = sum(steps[:, g] * (a @ b.T) for g, (a, b) in enumerate(products))
    if of_b.minimums is not None:
        total = total + sums(of_b.format, of_a).double() @ of_b.minimums.double().T
    total = total * numbers["rows"][: len(of_a), None].double()
    return total + numbers["bias"] if biased else total


def call(
    library: ctypes.CDLL, of_a: torch.Tensor, of_b: Quantized, numbers: dict[str, torch.Tensor], biased: bool
) -> torch.Tensor:
    """Run the tile; with a bias its last vector is stored in part, and what follows must stay as it was."""
    form, (rows, depth), width = of_b.format, of_a.shape, len(of_b.codes)
    exact = integer_tile.sums_in_integers(form)
    shifted = of_a.short() + (integer_tile.SHIFT if exact else 0)
    dtype = getattr(torch, integer_tile.activation_dtype(form))
    padded = torch.nn.functional.pad(shifted, (0, -depth % 32)).to(dtype).contiguous()
    groups = form.groups(depth)
    packed = integer_tile.packed_codes(of_b.codes, form)
    if biased and form.bits < 8:
        tight, packed = packed, torch.empty(width * padded.shape[1], dtype=torch.uint8)
        sizes = (ctypes.c_void_p(tight.data_ptr()), ctypes.c_void_p(packed.data_ptr()), padded.shape[1] // 32)
        assert library.unpack(*sizes) == 0
    result = torch.full((rows, width), 7.0)
    tensors = [padded, packed]
    if exact:
        tensors += [integer_tile.packed_offsets(of_b.codes, of_b.scales, form)]
        tensors += [integer_tile.packed_steps(of_b.scales)] if form.group else []
        tensors += [integer_tile.packed_numbers(of_b.scales if of_b.channels is None else of_b.channels)]
    else:
        tensors += [integer_tile.packed_numbers(n) for n in (of_b.scales, of_b.minimums) if n is not None]
        tensors += [(sums(form, of_a) * integer_tile.sum_factor(form)).int().contiguous()]
    tensors += [numbers["rows"][:rows].contiguous(), result] + ([numbers["bias"]] if biased else [])
    lda = padded.shape[1] * padded.element_size() // 4
    sizes = [lda, groups, width, padded.shape[1] // 32]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    assert getattr(library, f"tile{rows}{biased:d}")(*pointers, *map(ctypes.c_int, sizes)) == 0
    if biased:
        assert (result[:, width - 3 :] == 7.0).all()
        result[:, width - 3 :] = reference(of_a, of_b, numbers, biased).float()[:, width - 3 :]
    return result


@pytest.mark.parametrize("form", [f for f in FORMS if integer_tile.sums_in_integers(f)], ids=lambda f: f.name)
def test_sums_of_a_block_fit_int32(form: WeightFormat) -> None:
    """From the start that the shift needs to the last unit, whatever the codes and scales."""
    units, middle, scale = integer_tile.units_of_block(form), 1 << (form.bits - 1), 127 if form.group else 1
    products = 255 * middle * scale * integer_tile.UNIT * units
    offset = 128 * middle * scale * integer_tile.UNIT * units
    assert products + offset < 1 << 31
    assert integer_tile.blocks(form, integer_tile.UNIT * units) == 1
    assert integer_tile.blocks(form, integer_tile.UNIT * units + 1) == 2
