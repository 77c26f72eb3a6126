"""Every op of the CPU backend against eager PyTorch: dynamic sizes, special values, dtypes, broadcasting, views."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from families import LOWEST, MATRICES, Bundle, Family, Function, Tensors
from native import WEAKER
from torch.nn import functional as F

import planish
from planish.capture import capture

aten = torch.ops.aten

TINY = torch.finfo(torch.float32).tiny
INF, NAN = math.inf, math.nan


@dataclass(frozen=True)
class Way:
    """A target, and the passes to compile with (None: the default pipeline)."""

    target: str
    passes: tuple[str, ...] | None

    def __str__(self) -> str:
        return f"{self.target}-{'default' if self.passes is None else 'unfused'}"


WAYS = (Way("cpu", ()), *(Way(target, ()) for target in WEAKER), Way("cpu", None))


@pytest.fixture(scope="module", params=WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    """A target and pipeline."""
    return request.param


FAMILIES: dict[str, Family] = {}


@cache
def model_of(name: str) -> Bundle:
    torch.manual_seed(0)
    return Bundle(FAMILIES[name].functions)


@cache
def compiled(name: str, way: Way) -> planish.CompiledModel | Exception:
    """The compiled family, or why it does not compile: then each of its cases fails with that, after one try."""
    family = FAMILIES[name]
    model = model_of(name)
    example = family.make(*family.sizes[-1])
    try:
        return planish.compile(model, example, way.target, dynamic=family.dims(), passes=way.passes)
    except Exception as error:
        return error


@cache
def results(name: str, way: Way, sizes: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What eager and the compiled family return."""
    model, native = model_of(name), compiled(name, way)
    if isinstance(native, Exception):
        raise native
    inputs = FAMILIES[name].make(*sizes)
    with torch.no_grad():
        return model(*inputs), native(*inputs)


def check(family: str, case: str, way: Way) -> None:
    """Compare one function of a family with eager, at every size."""
    entry = FAMILIES[family]
    atol = next((a for prefix, a in entry.atol.items() if case.startswith(prefix)), TINY)
    for sizes in entry.sizes:
        want, got = (values[case] for values in results(family, way, sizes))
        exact = not want.is_floating_point()
        torch.testing.assert_close(
            got,
            want,
            rtol=0.0 if exact else entry.rtol,
            atol=0.0 if exact else atol,
            equal_nan=True,
            msg=lambda text, sizes=sizes: f"{case} at sizes {sizes}: {text}",
        )
        if case.startswith(SIGN_OF_ZERO):
            same = torch.signbit(got) == torch.signbit(want)
            assert bool((same | want.isnan()).all()), f"{case}: sign of zero differs from eager"


SIGN_OF_ZERO = ("neg", "abs", "mul_tensor", "div_tensor", "add_tensor", "reciprocal")


# Elementwise ---------------------------------------------------------------------------------------------------------

SPECIAL = [NAN, INF, -INF, 0.0, -0.0, 1e30, -1e30, 1e-30, -1e-30, 88.0, -88.0, 100.0, -100.0, 1e4, -1e4, 0.625, -0.625]
SIZES = ((1, 1), (3, 17), (5, 33))


def floats(a: int, b: int) -> Tensors:
    """Two [a, b] tensors: special values paired with each other, and normal ones."""
    g = torch.Generator().manual_seed(100 * a + b)
    x, y = (torch.randn(a * b, generator=g) * 3 for _ in range(2))
    special = torch.tensor(SPECIAL)
    count = min(a * b // 3, len(SPECIAL))
    x[:count], y[a * b - count :] = special[:count], special[:count]
    y[: count // 2] = special.roll(5)[: count // 2]
    return x.view(a, b), y.view(a, b)


FLOAT: dict[str, Function] = {
    "add_tensor": lambda x, y: x + y,
    "add_alpha": lambda x, y: torch.add(x, y, alpha=2.5),
    "add_scalar": lambda x, y: aten.add.Scalar(x, 1.5),
    "add_number": lambda x, y: x + 3,
    "sub_tensor": lambda x, y: x - y,
    "sub_scalar": lambda x, y: aten.sub.Scalar(x, 1.5),
    "rsub": lambda x, y: aten.rsub.Scalar(x, 1.0),
    "rsub_alpha": lambda x, y: aten.rsub.Scalar(x, 1.0, 3.0),
    "mul_tensor": lambda x, y: x * y,
    "mul_scalar": lambda x, y: aten.mul.Scalar(x, -0.5),
    "div_tensor": lambda x, y: x / y,
    "div_scalar": lambda x, y: aten.div.Scalar(x, 3.0),
    "number_div": lambda x, y: 1.0 / x,
    "maximum": lambda x, y: torch.maximum(x, y),
    "minimum": lambda x, y: torch.minimum(x, y),
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "exp": lambda x, y: x.exp(),
    "erf": lambda x, y: torch.erf(x),
    "tanh": lambda x, y: x.tanh(),
    "sigmoid": lambda x, y: x.sigmoid(),
    "silu": lambda x, y: F.silu(x),
    "relu": lambda x, y: F.relu(x),
    # Eager's value at infinity depends on whether the element falls into a whole vector.
    "gelu": lambda x, y: F.gelu(x.clamp(-1e30, 1e30)),
    "gelu_tanh": lambda x, y: F.gelu(x.clamp(-1e5, 1e5), approximate="tanh"),
    "sqrt": lambda x, y: x.sqrt(),
    "rsqrt": lambda x, y: x.rsqrt(),
    "reciprocal": lambda x, y: x.reciprocal(),
    "zero_times": lambda x, y: x * 0.0,
    "zero_over": lambda x, y: 0.0 / x,
    "minus_itself": lambda x, y: x - x,
    "minus_itself_half": lambda x, y: x.half() - x.half(),
    "equal_itself_half": lambda x, y: x.half() == x.half(),
    "pow_0": lambda x, y: x**0,
    "pow_1": lambda x, y: x**1,
    "pow_2": lambda x, y: x**2,
    "pow_3": lambda x, y: x**3.0,
    "pow_4": lambda x, y: x**4,
    "pow_half": lambda x, y: x**0.5,
    "pow_minus_half": lambda x, y: x**-0.5,
    "pow_minus_1": lambda x, y: x**-1,
    "pow_1.5": lambda x, y: x**1.5,
    "clamp": lambda x, y: x.clamp(-1.0, 1.0),
    "clamp_low": lambda x, y: x.clamp(min=0.25),
    "clamp_high": lambda x, y: x.clamp(max=0.25),
    "clamp_min": lambda x, y: aten.clamp_min.default(x, -0.5),
    "eq_tensor": lambda x, y: x == y,
    "eq_self": lambda x, y: x == x,
    "eq_scalar": lambda x, y: x == 0,
    "ne_tensor": lambda x, y: x != y,
    "ne_scalar": lambda x, y: x != 0.0,
    "lt_tensor": lambda x, y: x < y,
    "lt_scalar": lambda x, y: x < 1,
    "le_tensor": lambda x, y: x <= y,
    "le_scalar": lambda x, y: x <= INF,
    "gt_tensor": lambda x, y: x > y,
    "gt_scalar": lambda x, y: x > -1,
    "ge_tensor": lambda x, y: x >= y,
    "ge_scalar": lambda x, y: x >= -INF,
    "logical_and": lambda x, y: torch.logical_and(x, y),
    "logical_or": lambda x, y: torch.logical_or(x, y),
    "logical_not": lambda x, y: torch.logical_not(x),
    "not_less": lambda x, y: torch.logical_not(x < y),
    "not_equal": lambda x, y: torch.logical_not(x == y),
    "not_less_count": lambda x, y: (~(x < y)).long(),
    "not_greater": lambda x, y: ~(x > y),
    "less_or_not": lambda x, y: (x <= y) | (y < x),
    "where_not_less": lambda x, y: torch.where(torch.logical_not(x < y), 1.0, x),
    "where": lambda x, y: torch.where(x > y, x, y),
    "where_other": lambda x, y: aten.where.ScalarOther(x > 0, x, -1.0),
    "where_self": lambda x, y: aten.where.ScalarSelf(x > 0, -1.0, y),
    "where_lowest": lambda x, y: torch.where(x > 0, 0.0, LOWEST),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, -INF),
    "to_bool": lambda x, y: x.bool(),
    "to_int": lambda x, y: torch.where(x.abs() < 100, x, 0.0).int(),
    "to_int64": lambda x, y: torch.where(x.abs() < 1e18, x, 0.0).long(),
    "chain": lambda x, y: F.gelu((x + y).clamp(-1e5, 1e5)) * 0.5 + torch.tanh(y),
}
FAMILIES["float"] = Family(
    FLOAT,
    floats,
    SIZES,
    {"tensors.0": {0: "a", 1: "b"}, "tensors.1": {0: "a", 1: "b"}},
    atol={"erf": 1e-6, "gelu": 1e-6, "chain": 1e-6},
)


def integers(dtype: torch.dtype) -> Callable[[int, int], Tensors]:
    """Two [a, b] integer tensors, zeros and the type's limits among them."""

    def make(a: int, b: int) -> Tensors:
        g = torch.Generator().manual_seed(a + b)
        x, y = (torch.randint(-9, 10, (a, b), generator=g).to(dtype) for _ in range(2))
        if a * b > 2:
            limits = torch.iinfo(dtype)
            x.view(-1)[0], x.view(-1)[1], y.view(-1)[-1] = limits.max, limits.min, limits.max
        return x, y

    return make


INTEGER: dict[str, Function] = {
    "add": lambda x, y: x + y,
    "add_alpha": lambda x, y: torch.add(x, y, alpha=3),
    "add_large": lambda x, y: x.long() + (1 << 40),
    "sub": lambda x, y: x - y,
    "rsub": lambda x, y: 1 - x,
    "mul": lambda x, y: x * y,
    "true_div": lambda x, y: x / y,
    "where_greater": lambda x, y: torch.where(x > y, 1.0, 0.5),
    "where_equal": lambda x, y: torch.where(x == 3, 1.0, 0.5),
    "where_unequal": lambda x, y: torch.where(x != y, y.float(), 0.5),
    "equal_to_float": lambda x, y: (x == y).float() * 2,
    "not_equal": lambda x, y: torch.logical_not(x == y),
    "div_by_float": lambda x, y: x / 4.0,
    "add_float": lambda x, y: x + 0.5,
    "mul_of_float": lambda x, y: x * y.float(),
    "mix_with_int64": lambda x, y: x + y.long(),
    "maximum": lambda x, y: torch.maximum(x, y),
    "minimum": lambda x, y: torch.minimum(x, y),
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "relu": lambda x, y: F.relu(x),
    "pow": lambda x, y: x**3,
    "pow_0": lambda x, y: x**0,
    "clamp": lambda x, y: x.clamp(-3, 3),
    "clamp_min": lambda x, y: aten.clamp_min.default(x, 0),
    "eq": lambda x, y: x == y,
    "eq_scalar": lambda x, y: x == 3,
    "lt": lambda x, y: x < y,
    "lt_float": lambda x, y: x < 0.5,
    "ge_scalar": lambda x, y: x >= 0,
    "logical_and": lambda x, y: torch.logical_and(x, y),
    "logical_or": lambda x, y: torch.logical_or(x, y),
    "logical_not": lambda x, y: torch.logical_not(x),
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "bitwise_and": lambda x, y: torch.bitwise_and(x, y),
    "bitwise_or": lambda x, y: torch.bitwise_or(x, y),
    "where": lambda x, y: torch.where(x > y, x, y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, 7),
    "next_is_larger_int32": lambda x, y: x.int() + 1 > x.int(),
    "square_is_negative_int32": lambda x, y: x.int() * x.int() < 0,
    "minus_int32": lambda x, y: -x.int() < 0,
    "doubled_int32": lambda x, y: x.int() * 2 // 2,
    "less_int32": lambda x, y: x.int() - y.int() < 0,
    "widened": lambda x, y: (x + y).long(),
    "sum_as_int32": lambda x, y: x.sum(-1, dtype=torch.int32),
    "to_bool": lambda x, y: x.bool(),
    "to_float": lambda x, y: x.float(),
    "to_int32": lambda x, y: x.int(),
    "to_int16": lambda x, y: x.short(),
    "to_int8": lambda x, y: x.to(torch.int8),
    "to_uint8": lambda x, y: x.to(torch.uint8),
}
BOTH = {"tensors.0": {0: "a", 1: "b"}, "tensors.1": {0: "a", 1: "b"}}
for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
    FAMILIES[str(dtype).removeprefix("torch.")] = Family(INTEGER, integers(dtype), SIZES, BOTH)

BOOL: dict[str, Function] = {
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "bitwise_and": lambda x, y: torch.bitwise_and(x, y),
    "bitwise_or": lambda x, y: torch.bitwise_or(x, y),
    "logical_and": lambda x, y: torch.logical_and(x, y),
    "logical_or": lambda x, y: torch.logical_or(x, y),
    "logical_not": lambda x, y: torch.logical_not(x),
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "eq_false": lambda x, y: x == False,  # noqa: E712
    "to_float": lambda x, y: x.float(),
    "to_int64": lambda x, y: x.long(),
    "add": lambda x, y: x.long() + y,
    "mul": lambda x, y: x * y.float(),
    "mul_bools": lambda x, y: x * y,
    "where": lambda x, y: torch.where(x, 1.0, y.float()),
    "where_bools": lambda x, y: torch.where(x, y, torch.logical_not(y)),
    "rsub": lambda x, y: 1.0 - x.float(),
    "masked_fill": lambda x, y: x.masked_fill(y, True),
    "full_like": lambda x, y: torch.full_like(x, -1) & y,
    "sgn": lambda x, y: torch.sgn(x),
    "sign_uint8": lambda x, y: torch.sign(x.to(torch.uint8)),
}
FAMILIES["bool"] = Family(BOOL, lambda a, b: tuple(t > 0 for t in integers(torch.int64)(a, b)), SIZES, BOTH)


def broadcast_inputs(a: int, b: int) -> Tensors:
    g = torch.Generator().manual_seed(a)
    shapes: list[tuple[int, ...]] = [(2, a, b), (b,), (a, 1), (1, 1, 1), (), (2, 1, b)]
    return tuple(torch.randn(s, generator=g) for s in shapes)


BROADCAST: dict[str, Function] = {
    "row": lambda x, row, column, one, scalar, plane: x + row,
    "row_left": lambda x, row, column, one, scalar, plane: row - x,
    "column": lambda x, row, column, one, scalar, plane: x * column,
    "one": lambda x, row, column, one, scalar, plane: x / one,
    "scalar": lambda x, row, column, one, scalar, plane: x - scalar,
    "scalar_only": lambda x, row, column, one, scalar, plane: scalar * 2 + scalar,
    "plane": lambda x, row, column, one, scalar, plane: torch.maximum(x, plane),
    "outer": lambda x, row, column, one, scalar, plane: row + column,
    "all": lambda x, row, column, one, scalar, plane: torch.where(x > row, column, plane) + one * scalar,
    "compare": lambda x, row, column, one, scalar, plane: column > row,
    "wide": lambda x, row, column, one, scalar, plane: x.long() + scalar.int(),
}
FAMILIES["broadcast"] = Family(
    BROADCAST,
    broadcast_inputs,
    ((1, 1), (3, 17), (4, 33), (1, 16)),
    {"tensors.0": {1: "a", 2: "b"}, "tensors.1": {0: "b"}, "tensors.2": {0: "a"}, "tensors.5": {2: "b"}},
)


# Views, generators, gathers ------------------------------------------------------------------------------------------

VIEW: dict[str, Function] = {
    "reshape_merge": lambda x: x.reshape(x.shape[0] * x.shape[1], 6) + 1,
    "reshape_split": lambda x: x.reshape(x.shape[0], x.shape[1], 2, 3) + 1,
    "reshape_mixed": lambda x: x.reshape(x.shape[0] * 2, x.shape[1] * 3) + 1,
    "reshape_flat": lambda x: x.reshape(-1) + 1,
    "reshape_only": lambda x: x.reshape(x.shape[0], -1),
    "permute": lambda x: x.permute(2, 0, 1) + 1,
    "permute_only": lambda x: x.permute(1, -1, 0),
    "permute_then_reshape": lambda x: x.permute(0, 2, 1).reshape(-1, x.shape[1]) * 2,
    "transpose": lambda x: x.transpose(0, -1) + 1,
    "t": lambda x: aten.t.default(x[0]) * 1.5,
    "unsqueeze": lambda x: x.unsqueeze(0).unsqueeze(-1) + 1,
    "squeeze": lambda x: aten.squeeze.default(x[0, 0, :4].reshape(1, 4, 1)) + 1,
    "squeeze_dim": lambda x: x[:, :, 2:3].squeeze(-1) + 1,
    "squeeze_dims": lambda x: aten.squeeze.dims(x[:, :, 2:3].unsqueeze(0), [0, 3]) + 1,
    "squeeze_none": lambda x: x.squeeze(2) + 1,
    "expand": lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1) + 1,
    "expand_only": lambda x: x[:, :, :1].expand(-1, -1, 5),
    "expand_rank": lambda x: x[0, 0].expand(4, 6) + x[0, 0, 0],
    "slice": lambda x: x[:, :, 1:4] + 1,
    "slice_step": lambda x: x[:, :, 1::2] + 1,
    "slice_negative": lambda x: x[:, :, -3:-1] + 1,
    "slice_beyond": lambda x: x[:, :, 2:100] + 1,
    "slice_to_size": lambda x: x.new_ones(64)[: x.shape[1]] + 1,
    "slice_only": lambda x: x[:, :, 2:],
    "select": lambda x: x[:, 0] + x[:, -1],
    "select_only": lambda x: x[:, :, -2],
    "select_negative": lambda x: x.select(-1, -6) * 1,
    "scalar_result": lambda x: x[0, 0, 3] * 2,
}
FAMILIES["view"] = Family(
    VIEW,
    lambda a, b: (torch.randn(a, b, 6, generator=torch.Generator().manual_seed(b)),),
    ((1, 1), (3, 17), (2, 33)),
    {"tensors.0": {0: "a", 1: "b"}},
)

GENERATE: dict[str, Function] = {
    "arange": lambda x: torch.arange(x.shape[1]),
    "arange_use": lambda x: x + torch.arange(x.shape[1]),
    "arange_float": lambda x: torch.arange(x.shape[1], dtype=torch.float32) * 0.5,
    "arange_start": lambda x: torch.arange(3, x.shape[1] + 3),
    "arange_dynamic_start": lambda x: torch.arange(x.shape[0], x.shape[0] + x.shape[1]) + 1,
    "arange_step": lambda x: torch.arange(1, 20, 3) + 0,
    "arange_step_float": lambda x: torch.arange(0.0, 2.0, 0.25) + 0,
    "arange_step_down": lambda x: torch.arange(9, -4, -2) + 0,
    "full": lambda x: torch.full((x.shape[1], 3), 2.5),
    "full_int": lambda x: torch.full((x.shape[1],), 7),
    "full_size": lambda x: torch.full((3,), x.shape[1]) + 1,
    "full_lowest": lambda x: torch.full((x.shape[1],), LOWEST),
    "full_bool": lambda x: torch.full((x.shape[1],), True),
    "full_like": lambda x: torch.full_like(x, -INF),
    "scalar_tensor": lambda x: torch.where(x > 0, x, aten.scalar_tensor.default(-1.5)),
    "ones": lambda x: torch.ones(x.shape[0], x.shape[1]),
    "ones_bool": lambda x: torch.ones(x.shape[1], dtype=torch.bool),
    "new_ones": lambda x: x.new_ones(x.shape[1], dtype=torch.int64),
    "ones_like": lambda x: torch.ones_like(x) + x,
    "zeros": lambda x: torch.zeros(x.shape[1], dtype=torch.int32),
    "new_zeros": lambda x: x.new_zeros(2, x.shape[1]),
    "zeros_like": lambda x: torch.zeros_like(x) - x,
    "causal": lambda x: torch.arange(x.shape[1])[None, :] <= torch.arange(x.shape[0])[:, None],
    "size_scaled": lambda x: x * x.shape[1],
}
FAMILIES["generate"] = Family(
    GENERATE,
    lambda a, b: (torch.randn(a, b, generator=torch.Generator().manual_seed(b)),),
    ((1, 1), (3, 17), (2, 33)),
    {"tensors.0": {0: "a", 1: "b"}},
)


def gather_inputs(a: int, b: int) -> Tensors:
    g = torch.Generator().manual_seed(b)
    return (
        torch.randn(50, 20, generator=g),
        torch.randint(0, 50, (a, b), generator=g),
        torch.randint(0, 20, (b,), generator=g),
        torch.randint(-50, 50, (a, b), generator=g),
        torch.randn(a, b, 20, generator=g),
    )


GATHER: dict[str, Function] = {
    "embedding": lambda w, ids, columns, signed, x: F.embedding(ids, w),
    "embedding_int32": lambda w, ids, columns, signed, x: F.embedding(ids.int(), w) + x,
    "embedding_sum": lambda w, ids, columns, signed, x: F.embedding(ids, w) + F.embedding(ids * 0 + 3, w),
    "embedding_positions": lambda w, ids, columns, signed, x: F.embedding(torch.arange(ids.shape[1]), w) + x,
    "index": lambda w, ids, columns, signed, x: w[ids],
    "index_negative": lambda w, ids, columns, signed, x: w[signed] * 2,
    "index_second": lambda w, ids, columns, signed, x: x[:, :, columns] + 1,
    "index_pair": lambda w, ids, columns, signed, x: w[ids, columns],
    "index_grid": lambda w, ids, columns, signed, x: w[columns[:, None], columns[None, :]],
    "index_middle": lambda w, ids, columns, signed, x: x[:, columns * 0] + 1,
    "gather": lambda w, ids, columns, signed, x: torch.gather(x, 2, columns[None, :, None].expand(x.shape[0], -1, 2)),
    "gather_rows": lambda w, ids, columns, signed, x: torch.gather(w, 1, columns[None, :].expand(50, -1)),
    "index_select": lambda w, ids, columns, signed, x: torch.index_select(w, 1, columns),
    "index_select_first": lambda w, ids, columns, signed, x: torch.index_select(w, 0, columns) + 1,
    "index_bool": lambda w, ids, columns, signed, x: (w > 0)[ids],
    "index_ints": lambda w, ids, columns, signed, x: ids.reshape(-1)[columns * 0],
}
FAMILIES["gather"] = Family(
    GATHER,
    gather_inputs,
    ((1, 1), (3, 17), (2, 33)),
    {
        "tensors.1": {0: "a", 1: "b"},
        "tensors.2": {0: "b"},
        "tensors.3": {0: "a", 1: "b"},
        "tensors.4": {0: "a", 1: "b"},
    },
)


# Rows and reductions -------------------------------------------------------------------------------------------------


def rows(a: int, b: int) -> Tensors:
    """x [a, b] normal; hidden [4, b] with rows of -inf, some -inf, finfo.min and NaN; and a fixed-width [a, 48]."""
    g = torch.Generator().manual_seed(b)
    hidden = torch.randn(4, b, generator=g)
    hidden[0] = -INF
    hidden[1, 1:] = -INF
    hidden[2] = LOWEST
    hidden[3, -1] = NAN
    return torch.randn(a, b, generator=g) * 5, hidden, torch.randn(a, 50, generator=g) * 3 + 2


class Norm(torch.nn.Module):
    """LayerNorm of the fixed-width input, with random weight and bias as asked."""

    def __init__(self, *, affine: bool, bias: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(50, eps, elementwise_affine=affine, bias=bias)
        for p in self.norm.parameters():
            torch.nn.init.normal_(p)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
        return self.norm(wide)


ROW: dict[str, Function] = {
    "softmax": lambda x, hidden, wide: x.softmax(-1),
    "softmax_hidden": lambda x, hidden, wide: hidden.softmax(1),
    "softmax_to_float": lambda x, hidden, wide: torch.softmax(x, -1, dtype=torch.float32) * 2,
    "_softmax": lambda x, hidden, wide: aten._softmax.default(x, -1, False),
    "softmax_of_sum": lambda x, hidden, wide: (x + x * 0.5).softmax(-1),
    "layer_norm": lambda x, hidden, wide: F.layer_norm(wide, (50,)),
    "layer_norm_affine": Norm(affine=True),
    "layer_norm_no_bias": Norm(affine=True, bias=False, eps=1e-12),
    "layer_norm_large_mean": lambda x, hidden, wide: F.layer_norm(wide + 300.0, (50,)),
    "layer_norm_constant": lambda x, hidden, wide: F.layer_norm(wide * 0 + 3.0, (50,)),
    "sum": lambda x, hidden, wide: x.sum(-1),
    "sum_keep": lambda x, hidden, wide: x.sum(1, keepdim=True),
    "sum_hidden": lambda x, hidden, wide: hidden.sum(-1),
    "mean": lambda x, hidden, wide: x.mean(-1),
    "mean_keep": lambda x, hidden, wide: wide.mean(-1, keepdim=True),
    "mean_square": lambda x, hidden, wide: (x * x).mean(-1, keepdim=True).sqrt(),
    "amax": lambda x, hidden, wide: x.amax(-1),
    "amax_keep": lambda x, hidden, wide: x.amax(1, keepdim=True) - 1,
    "amax_hidden": lambda x, hidden, wide: hidden.amax(-1),
    "sum_of_vector": lambda x, hidden, wide: x[0].sum(0),
    "softmax_of_vector": lambda x, hidden, wide: x[0].softmax(0),
}
FAMILIES["row"] = Family(
    ROW,
    rows,
    ((1, 1), (3, 17), (2, 33), (5, 16)),
    {"tensors.0": {0: "a", 1: "b"}, "tensors.1": {1: "b"}, "tensors.2": {0: "a"}},
    rtol=1e-5,
    atol={"softmax": 1e-7, "_softmax": 1e-7, "layer_norm_large": 2e-4, "layer_norm": 3e-6, "sum": 2e-5, "mean": 2e-6},
)


FAMILIES |= MATRICES

CASES = [(family, case) for family, entry in FAMILIES.items() for case in entry.functions]


@pytest.mark.parametrize(("family", "case"), CASES, ids=[f"{f}-{c}" for f, c in CASES])
def test_like_eager(family: str, case: str, way: Way) -> None:
    check(family, case, way)


def test_every_entry_has_a_case() -> None:
    """The captured graphs of the families and groups call every op that the graph keeps whole."""
    from breadth import GROUPS

    from planish.ops import CONVOLUTION, IR, POOLS, RECURRENCES, SORTS

    called: set[Any] = set()
    for name, family in FAMILIES.items():
        program, _ = capture(model_of(name), family.make(*family.sizes[-1]), family.dims())
        called |= {node.target for node in program.nodes()}
    for group in GROUPS.values():
        program, _ = capture(Bundle(group.functions), group.inputs())
        called |= {node.target for node in program.nodes()}
    tables = IR | RECURRENCES | SORTS
    missing = sorted(str(op) for op in tables - called - POOLS - {CONVOLUTION})  # those are in test_conv.py
    assert not missing, f"no test calls {missing}"


@pytest.mark.parametrize("token", [-1, 50, 1 << 40, -(1 << 40)])
@pytest.mark.parametrize("case", ["embedding", "index_select", "gather", "index"])
def test_index_out_of_range(case: str, token: int, way: Way) -> None:
    """What eager refuses is an InputError, also in a kernel that reads the same table by other indices."""
    if case == "index" and token == -1:
        return  # counts from the end, as in eager
    native = compiled("gather", way)
    if isinstance(native, Exception):
        raise native
    table, ids, columns, signed, x = gather_inputs(2, 5)
    broken = {"embedding": ids, "index": signed, "index_select": columns, "gather": columns}[case]
    broken.view(-1)[-1] = token
    with pytest.raises(planish.errors.InputError, match="outside the table"):
        native(table, ids, columns, signed, x)
    good = gather_inputs(2, 5)
    torch.testing.assert_close(native(*good)["index"], good[0][good[1]])  # the next call is right again


DIVISIONS: dict[str, Function] = {
    "floor": lambda x, y: x // y,
    "remainder": lambda x, y: x % y,
    "fmod": lambda x, y: torch.fmod(x, y) + 1,
    "truncated": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "by_sum": lambda x, y: x // (y + y),
}


def test_integer_division_by_zero(way: Way) -> None:
    """An integer divided by 0 is an InputError, as eager raises; the next call is right again."""
    x, y = torch.arange(-20, 20), torch.arange(1, 41)
    zero = torch.where(y == 33, 0, y)
    for name, function in DIVISIONS.items():
        model = Bundle({name: function})
        native = planish.compile(model, (x, y), way.target, passes=way.passes)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            model(x, zero)
        with pytest.raises(planish.errors.InputError, match="divided by 0"):
            native(x, zero)
        assert torch.equal(native(x, y)[name], model(x, y)[name])
