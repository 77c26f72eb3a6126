"""The weights blob: every constant at an aligned offset, in the layout its kernel reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from planish.backends.tvm import neon_tile
from planish.backends.tvm.integer_tile import (
    WIDTH,
    blocks,
    packed_codes,
    packed_numbers,
    packed_offsets,
    packed_size,
    packed_steps,
)
from planish.backends.tvm.quantized_depthwise import packed_pairs, signed_taps
from planish.backends.tvm.winograd_tile import PRODUCTS, matrices
from planish.formats import FORMATS
from planish.plan import ALIGN


def columns(weight: torch.Tensor, width: int, lanes: int) -> torch.Tensor:
    """A linear layer's weight [N, K] as column panels [N/width][K][width]; the last panel may be narrower.

    Its width is the rest of N rounded up to whole vectors, padded with zeros.
    """
    n, depth = weight.shape
    whole, rest = divmod(n, width)
    panels = weight[: whole * width].view(whole, width, depth).transpose(1, 2).reshape(-1)
    if not rest:
        return panels
    padded = torch.zeros(-(-rest // lanes) * lanes, depth, dtype=weight.dtype)
    padded[:rest] = weight[whole * width :]
    return torch.cat([panels, padded.t().reshape(-1)])


def taps(weight: torch.Tensor, groups: int, lanes: int) -> torch.Tensor:
    """A convolution's weight [O, C/groups, window...] as [window..., C/groups, O]."""
    return weight.flatten(2).permute(2, 1, 0).reshape(-1)


def window_columns(weight: torch.Tensor, width: int, lanes: int) -> torch.Tensor:
    """A convolution's weight [O, C, window...] as column panels whose rows are in the order [window..., C]."""
    return columns(weight.movedim(1, -1).flatten(1), width, lanes)


def winograd(weight: torch.Tensor, width: int, lanes: int) -> torch.Tensor:
    """A convolution's weight [O, C, 3, 3] as G g G^T, one matrix per product, in column panels.

    The order is [O/width][product][C][width]; the last panels may be narrower, as in ``columns``.
    """
    g = torch.tensor([[float(v) for v in row] for row in matrices()[1]], dtype=torch.float64)
    products = torch.einsum("pi,ocij,qj->pqoc", g, weight.double(), g).flatten(0, 1).to(weight.dtype)
    panels = [columns(block, width, lanes) for rows in products.split(width, dim=1) for block in rows]
    return torch.cat(panels)


def group_panels(weight: torch.Tensor, width: int, lanes: int) -> torch.Tensor:
    """A grouped convolution's weight [O, C/groups, window...] as one panel [window..., C/groups, width] per group.

    ``width`` is O/groups; the panels' rows are padded with zeros to whole vectors.
    """
    rows = weight.movedim(1, -1).unflatten(0, (-1, width)).flatten(2).transpose(1, 2)
    return torch.nn.functional.pad(rows, (0, -width % lanes)).reshape(-1)


def transposed_taps(weight: torch.Tensor, groups: int, lanes: int) -> torch.Tensor:
    """A transposed convolution's weight [C, O/groups, window...] as [window..., C/groups, O]."""
    each = weight.unflatten(0, (groups, -1)).flatten(3)
    return each.permute(3, 1, 0, 2).reshape(-1)


Layout = Callable[..., torch.Tensor]
LAYOUTS: dict[str, Layout] = {
    "plain": lambda t, width, lanes: t.contiguous().view(-1),
    "columns": columns,
    "window_columns": window_columns,
    "winograd": winograd,
    "group_panels": group_panels,
    "taps": taps,
    "transposed_taps": transposed_taps,
    "numbers": lambda t, width, lanes: packed_numbers(t),
    "steps": lambda t, width, lanes: packed_steps(t),
    "pairs": lambda t, width, lanes: packed_pairs(t, width),
    "signed taps": lambda t, width, lanes: signed_taps(t),
}
"""Layout name to packing function (tensors, width, lanes) -> flat tensor; with those of each integer format."""

COLUMNS = {torch.float32: "columns", torch.float16: "columns float16", torch.bfloat16: "columns bfloat16"}
"""Layouts of a linear layer's weight, by the type of its elements in memory."""

LAYOUTS |= {
    name: lambda t, width, lanes, dtype=dtype: columns(t.to(dtype), width, lanes) for dtype, name in COLUMNS.items()
}

CODES = {f"codes {form.name}": form for form in FORMATS}
OFFSETS = {f"offsets {form.name}": form for form in FORMATS}
LAYOUTS |= {name: lambda t, _, __, form=form: packed_codes(t, form) for name, form in CODES.items()}
LAYOUTS |= {name: lambda t, s, _, __, form=form: packed_offsets(t, s, form) for name, form in OFFSETS.items()}
NEON_CODES = {f"neon codes {form.name}": form for form in FORMATS}
NEON_COLUMNS = {f"neon columns {form.name}": form for form in FORMATS}
LAYOUTS |= {
    name: lambda t, columns, _, form=form: neon_tile.packed_codes(t, form, columns) for name, form in NEON_CODES.items()
}
LAYOUTS |= {name: lambda t, _, __, form=form: neon_tile.packed_columns(t, form) for name, form in NEON_COLUMNS.items()}
LAYOUTS["neon steps"] = lambda t, _, __: packed_numbers(t.short())


def packed_bytes(shape: Sequence[int], itemsize: int, layout: str, width: int, lanes: int) -> int:
    """Bytes of a constant in its layout."""
    if layout in CODES:
        return packed_size((shape[0], shape[1]), CODES[layout])
    if layout in OFFSETS:
        return 4 * -(-shape[0] // WIDTH) * WIDTH * blocks(OFFSETS[layout], shape[1])
    if layout in NEON_CODES:
        return packed_size((shape[0], shape[1]), NEON_CODES[layout])
    if layout in NEON_COLUMNS or layout == "neon steps":
        return (2 if layout == "neon steps" else 4) * -(-shape[0] // WIDTH) * WIDTH * math.prod(shape[1:])
    if layout == "pairs":
        lines = shape[1] // width
        return 2 * shape[0] * width * (lines + lines % 2)
    if layout in ("numbers", "steps"):
        shape = (-(-shape[0] // WIDTH) * WIDTH, *shape[1:], *([2] if layout == "steps" else []))
    elements = 1
    for s in shape:
        elements *= s
    if layout == "winograd":
        elements = elements * PRODUCTS // math.prod(shape[2:])
    if layout in (COLUMNS[torch.float16], COLUMNS[torch.bfloat16]):
        itemsize = 2
    if layout in (*COLUMNS.values(), "window_columns", "winograd"):
        n = shape[0]
        rest = n % width
        elements = (n - rest + -(-rest // lanes) * lanes) * (elements // n)
    if layout == "group_panels":
        elements = elements // width * (-(-width // lanes) * lanes)
    return elements * itemsize


def aligned(nbytes: int) -> torch.Tensor:
    """Uninitialised bytes whose address is a multiple of ``ALIGN``."""
    raw = torch.empty(nbytes + ALIGN, dtype=torch.uint8)
    start = -raw.data_ptr() % ALIGN
    return raw[start : start + nbytes]


def build_blob(
    constants: Sequence[tuple[int, tuple[torch.Tensor, ...], str, int]], lanes: int
) -> tuple[torch.Tensor, dict[int, int]]:
    """The blob and each constant's offset in it.

    Args:
        constants: (buffer index, tensors that are packed into one, layout, width).
        lanes: fp32 lanes of a vector.
    """
    offsets: dict[int, int] = {}
    size = 0
    for index, tensors, layout, width in constants:
        offsets[index] = size
        size += -(-packed_bytes(tensors[0].shape, tensors[0].element_size(), layout, width, lanes) // ALIGN) * ALIGN
    blob = aligned(max(size, ALIGN))
    for index, tensors, layout, width in constants:
        data = LAYOUTS[layout](*tensors, width, lanes).contiguous().view(torch.uint8)
        blob[offsets[index] : offsets[index] + data.numel()] = data
    return blob, offsets
