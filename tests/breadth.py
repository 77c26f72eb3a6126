"""Functions of one kind of op each, to compare with eager: what the tail of models calls besides products and norms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Group:
    """Functions of the same inputs, compiled as one model, and how near eager they must come."""

    functions: dict[str, Callable[..., Any]]
    inputs: Callable[[], Tensors]
    tolerance: float = 1e-5


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal noise, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _image() -> Tensors:
    return (seeded(2, 8, 6, 10),)


def _integers() -> Tensors:
    x = (seeded(3, 40) * 20).to(torch.int64)
    rolled = x.roll(3, 1)
    return x, torch.where(rolled == 0, 7, rolled), (seeded(3, 40) * 3).abs().to(torch.int64)


def _holes() -> Tensors:
    x = seeded(5, 13)
    x[0, 3], x[1, 2:5], x[2], x[3, 7] = float("nan"), float("inf"), float("nan"), float("-inf")
    return x, (seeded(5, 13, seed=1) * 20).to(torch.int64)


def _placed() -> Tensors:
    ids = torch.randint(0, 6, (2, 8, 6, 10), generator=torch.Generator().manual_seed(1))
    return seeded(2, 8, 6, 10), ids


class Recurrent(torch.nn.Module):
    """All tensors that a recurrent module returns."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Tensors:
        out, state = self.inner(x)
        return (out, *state) if isinstance(state, tuple) else (out, state)


def write_by_index(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``index_put`` with a tensor index."""
    y = x.clone()
    y[:, ids[0, :3, 0, 0]] = 1.0
    return y


def write_by_mask(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``index_put`` with a mask."""
    y = x.clone()
    y[x > 0] = 0
    return y


def write_slices(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Assignments to a slice and to a position."""
    y = x.clone()
    y[:, 2:4] = x[:, 4:6]
    y[:, :, 3] = 7
    y[..., 1::3] = x[..., 0::3][..., :3]
    return y


REAL = [
    "log1p",
    "expm1",
    "sin",
    "cos",
    "tan",
    "asinh",
    "atan",
    "sinh",
    "cosh",
    "floor",
    "ceil",
    "round",
    "trunc",
    "sign",
    "exp2",
    "erfc",
    "isnan",
    "isinf",
    "signbit",
    "square",
    "frac",
    "positive",
]

GROUPS: dict[str, Group] = {
    "reductions": Group(
        {
            "mean": lambda x: x.mean((2, 3), keepdim=True),
            "sum": lambda x: (x.sum(1), x.sum()),
            "prod": lambda x: x.prod(-1),
            "extrema": lambda x: (x.amax((1, 2)), x.amin(-1, keepdim=True), x.max(), x.min()),
            "positions": lambda x: (*x.max(1), *x.min(-1), x.argmin(), x.argmax(0)),
            "truth": lambda x: ((x > 0).any(), (x > 0).all(1), (x > 2).any(-1), (x > 0).any((0, 1))),
            "integers": lambda x: ((x > 0).sum(1), (x * 10).long().sum(), (x * 10).int().amax(-1)),
            "variance": lambda x: (x.std(-1), x.var((1, 2)), *torch.var_mean(x)),
            "norm": lambda x: (torch.linalg.vector_norm(x, dim=-1), torch.logsumexp(x, 1)),
            "histogram": lambda x: torch.histc(x, 7, -2, 2),
        },
        _image,
    ),
    "rows": Group(
        {
            "softmax": lambda x: (x.softmax(1), x.log_softmax(-1), x.log_softmax(0)),
            "cumsum": lambda x: (x.cumsum(1), x.cumsum(-1), (x * 3).long().cumsum(0)),
            "cumprod": lambda x: x.cumprod(2),
            "core_spelling": lambda x: torch.ops.aten._log_softmax(x, -1, False),
            "group_norm": lambda x: F.group_norm(x, 2, x[0, :, 0, 0], x[1, :, 0, 0]),
            "layer_norm": lambda x: F.layer_norm(x, (6, 10)),
            "instance_norm": lambda x: F.instance_norm(x),
            "batch_norm": lambda x: F.batch_norm(x, x[0, :, 0, 0], x[1, :, 0, 0].abs(), x[0, :, 1, 0]),
            "rms_norm": lambda x: F.rms_norm(x, (10,)),
        },
        _image,
    ),
    "joins": Group(
        {
            "cat": lambda x: (torch.cat([x, x * 2, x[:, :3]], 1), torch.cat([x, x + 1], -1)),
            "stack": lambda x: torch.stack([x, x.neg()], 2),
            "pad": lambda x: (F.pad(x, (1, 2)), F.pad(x, (1, 2, 3, -1), value=5.0)),
            "reflect": lambda x: (F.pad(x[0], (1, 1, 2, 2), mode="reflect"), F.pad(x[0], (2, 1), mode="replicate")),
            "split": lambda x: (*x.split(3, 1), *x.chunk(2, -1), *x.unbind(2)[:2]),
        },
        _image,
    ),
    "views": Group(
        {
            "flip": lambda x: x.flip(1, -1),
            "roll": lambda x: (x.roll(1, 2), x.roll((2, -1), (0, 3)), x.roll(7)),
            "triangles": lambda x: (x.tril(), x.triu(1)),
            "diagonal": lambda x: (x.diagonal(0, 2, 3), x.diagonal(-1, 3, 1)),
            "unfold": lambda x: x.unfold(3, 4, 2),
            "repeat": lambda x: (x.repeat(1, 2, 1, 1), x.repeat_interleave(2, 1)),
            "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
            "im2col": lambda x: F.unfold(x, 3, padding=1),
            "resize": lambda x: (F.interpolate(x, scale_factor=2, mode="bilinear"), F.interpolate(x, size=(3, 5))),
            "adaptive": lambda x: (F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, (3, 4))),
            "without_batch": lambda x: (F.max_pool2d(x[0], 2), F.avg_pool2d(x[0], 3, 2, 1), F.avg_pool1d(x[0, 0], 2)),
            "adaptive_max": lambda x: F.adaptive_max_pool2d(x, (4, 3), return_indices=True),
        },
        _image,
    ),
    "unary": Group(
        {name: getattr(torch, name) for name in REAL}
        | {
            "positive": lambda x: (x.abs().log(), x.abs().log2(), x.abs().log10(), (x.abs() + 1).acosh()),
            "unit": lambda x: (x.tanh().asin(), x.tanh().acos(), (x * 0.3).tanh().atanh()),
            "activations": lambda x: (F.softplus(x), F.hardswish(x), F.mish(x), F.elu(x), F.leaky_relu(x), F.relu6(x)),
        },
        _image,
    ),
    "binary": Group(
        {
            "remainder": lambda x: (x % 2, x % x.flip(0), torch.fmod(x, 0.7), torch.fmod(x, x.flip(0))),
            "floor": lambda x: (x // 0.7, torch.div(x, 0.3, rounding_mode="trunc"), x // x.flip(0)),
            "scalar_mode": lambda x: torch.ops.aten.div.Scalar_mode(x, 0.3, rounding_mode="floor"),
            "angles": lambda x: (torch.atan2(x, x.flip(0)), torch.hypot(x, x.flip(1))),
            "power": lambda x: (x.abs().pow(3.3), x.abs() ** x, 2.0**x, x**3, x.abs() ** -0.5),
            "choice": lambda x: (torch.where(x > 0, x, -x), x.clamp(min=x.flip(0)), x.clamp_max(0.3)),
            "signs": lambda x: torch.copysign(x, x.flip(0)),
            "skip_nan": lambda x: (torch.fmax(x, x.flip(0)), torch.fmin(x, x.flip(0))),
            "fill": lambda x: (x.masked_fill(x > 0, 2.0), x.masked_fill(x > 0, torch.tensor(1.5))),
            "lerp": lambda x: (torch.lerp(x, x.flip(0), 0.3), torch.addcmul(x, x, x, value=0.5)),
        },
        _image,
    ),
    "integers": Group(
        {
            "division": lambda a, b, s: (a // 3, a // b, a % b, torch.fmod(a, b), a % -5),
            "truncation": lambda a, b, s: torch.div(a, b, rounding_mode="trunc"),
            "bits": lambda a, b, s: (a & b, a | b, a ^ b, ~a, a << s, a >> s, a << 2, a >> 1),
            "aliases": lambda a, b, s: (torch.bitwise_and(a, b), torch.bitwise_or(a, b), torch.bitwise_xor(a, b)),
            "shifts": lambda a, b, s: (torch.bitwise_left_shift(a, s), torch.bitwise_right_shift(a, s)),
            "logic": lambda a, b, s: (torch.logical_xor(a, s), (a > 0) ^ (b > 0), torch.logical_and(a, s)),
            "order": lambda a, b, s: (a.sort(-1)[0], torch.argsort(a, dim=0, stable=True), a.maximum(b)),
        },
        _integers,
        0.0,
    ),
    "order": Group(
        {
            "sort": lambda x: (*x.sort(1), *x.sort(-1, descending=True)),
            "topk": lambda x: (*x.topk(3), *x.topk(2, 1, largest=False)),
        },
        lambda: (seeded(4, 33, 17),),
    ),
    "positions": Group(
        {
            "running": lambda x, i: (*x.cummax(1), *x.cummin(-1), *i.cummax(0), *(i > 0).cummax(1)),
            "log_sums": lambda x, i: (x.logcumsumexp(-1), (x * 40).logcumsumexp(0)),
            "medians": lambda x, i: (x.median(), *x.median(1), x.nanmedian(), *x.nanmedian(0, keepdim=True)),
            "kth": lambda x, i: x.kthvalue(2, 1)[0],
            "pooled": lambda x, i: (F.adaptive_avg_pool1d(x[None], 5), F.adaptive_max_pool1d(x[None], 5)),
            "search": lambda x, i: (
                torch.searchsorted(x.nan_to_num().sort(-1)[0], x),
                torch.bucketize(x, x[4].sort()[0], right=True),
            ),
        },
        _holes,
    ),
    "tail": Group(
        {
            "integer_products": lambda x, i: (i @ i.t(), F.linear(i[0], i, i[:, 0]), i.int() @ i.int().t()),
            "double_products": lambda x, i: (x.double() @ x.double().t(), x.softmax(0, dtype=torch.float64)),
            "addbmm": lambda x, i: torch.addbmm(x[:, :1], x[None], x.t()[None], beta=0.5, alpha=2),
            "strided_copies": lambda x, i: (x.t().index_fill(0, i[0, :2].abs(), 1.0), torch.lerp(x.t(), x.t(), x.t())),
            "integer_windows": lambda x, i: (
                F.conv1d(i[None], i[:2, None, :3].expand(-1, 5, -1), i[0, :2], stride=2, padding=1),
                F.conv_transpose1d(i[None, :4], i[:4, None, :3], stride=2, padding=1, output_padding=1, groups=2),
                F.avg_pool1d(i[None], 3, 2, 1),
                F.avg_pool2d(i[None, None], 3, 2, 1, count_include_pad=False),
            ),
            "double_windows": lambda x, i: (
                F.conv2d(x[None, None].double(), x[:4, None, :3, None].double(), dilation=2, padding=(2, 1)),
                F.avg_pool2d(x[None, None].double(), 2),
            ),
            "cut_factors": lambda x, i: torch.addmm(i[:, :5], i, i.t(), beta=0.6, alpha=2.6),
            "distances": lambda x, i: (torch.cdist(x, x.flip(0), p=1.0), torch.cdist(x, x.flip(0), p=3.0)),
            "bits": lambda x, i: (i ^ 5, (i > 0) ^ True, i & 3, i | 1),
            "all_of_axes": lambda x, i: ((x > 0).all((1,)), (x > 0).any((-1,))),
            "by_mask": lambda x, i: x.masked_scatter(x > 0, x.flip(0)),
            "put": lambda x, i: x.put(i.abs(), x, accumulate=True),
            "means": lambda x, i: (x.scatter_reduce(1, i.abs(), x, "mean"), i.scatter_reduce(1, i.abs(), i, "mean")),
            "without_self": lambda x, i: (
                x.scatter_reduce(1, i.abs(), x, "amax", include_self=False),
                x.index_reduce(1, i[0].abs(), x, "prod", include_self=False),
            ),
            "bilinear": lambda x, i: F.bilinear(x, x.flip(0), x[:3, :, None] * x[:3, None]),
            "rounded": lambda x, i: (
                x.round(decimals=2),
                (x * 300).round(decimals=-2),
                x.angle(),
                torch.copysign(i, -1),
            ),
            "gamma": lambda x, i: (x.abs().lgamma(), torch.nextafter(x, x.flip(0))),
        },
        lambda: (seeded(5, 13), (seeded(5, 13, seed=1) * 4).to(torch.int64)),
        5e-5,
    ),
    "scatter": Group(
        {
            "scatter": lambda x, i: (x.scatter(2, i[:, :, :1], x), x.scatter(2, i[:, :, :1], 1.0)),
            "add": lambda x, i: x.scatter_add(2, i, x),
            "reduce": lambda x, i: (x.scatter_reduce(2, i, x, "amax"), x.scatter_reduce(2, i, x, "prod")),
            "index": lambda x, i: (x[:, i[0, 0, 0], :, i[0, 0, 0]], x[i[0, 0, 0] % 2], x.index_select(1, i[0, 0, 0])),
            "by_index": write_by_index,
            "by_mask": write_by_mask,
            "slices": write_slices,
            "accumulate": lambda x, i: x.index_put((i[0, 0] % 2,), x[0, 0, 0, 0], accumulate=True),
        },
        _placed,
    ),
    "products": Group(
        {
            "bmm": lambda a, b: (a @ b, (a @ b).relu(), b.transpose(1, 2) @ a.transpose(1, 2)),
            "einsum": lambda a, b: torch.einsum("aij,ajk->ik", a, b),
            "linear": lambda a, b: (F.linear(a, b[0].t(), b[0, 0]), F.linear(a, b[1].t())),
            "addmm": lambda a, b: (torch.addmm(b[0, 0], a[0], b[0]), torch.baddbmm(a[:, :, :1], a, b, alpha=0.5)),
            "vectors": lambda a, b: (a[0] @ b[0, :, 0], torch.outer(a[0, 0], b[0, 0])),
        },
        lambda: (seeded(3, 37, 70), seeded(3, 70, 131, seed=1)),
    ),
    "attention": Group(
        {
            "grouped": lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
            "broadcast": lambda q, k: F.scaled_dot_product_attention(q[:, :2], k[:1], k),
            "matrix": lambda q, k: F.scaled_dot_product_attention(q[0, 0], k[0, 0], k[0, 0]),
        },
        lambda: (seeded(2, 8, 9, 16), seeded(2, 2, 11, 16, seed=1)),
    ),
    "recurrent": Group(
        {
            "lstm": Recurrent(torch.nn.LSTM(20, 17, num_layers=2, bidirectional=True, batch_first=True)),
            "lstm_plain": Recurrent(torch.nn.LSTM(20, 64, bias=False)),
            "gru": Recurrent(torch.nn.GRU(20, 17, bidirectional=True, batch_first=True)),
            "rnn": Recurrent(torch.nn.RNN(20, 17)),
        },
        lambda: (seeded(11, 7, 20),),
    ),
    "half": Group(
        {
            "elementwise": lambda x: (x * 2 + 1, x.exp(), x.sum(-1), x > 0.5),
            "linear": torch.nn.Linear(10, 6).half(),
            "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
        },
        lambda: (seeded(2, 8, 6, 10, dtype=torch.float16),),
        2e-3,
    ),
    "bfloat16": Group(
        {
            "elementwise": lambda x: (x * 2 + 1, x.exp(), x.sum(-1), x > 0.5, torch.cat([x, x * 3], -1)),
            "linear": torch.nn.Linear(10, 6).bfloat16(),
        },
        lambda: (seeded(2, 8, 6, 10, dtype=torch.bfloat16),),
        2e-2,
    ),
    "double": Group(
        {"elementwise": lambda x: (x * 2 + 1, x.exp(), x.sum(-1), x.sin(), F.gelu(x), x.tanh(), x.sigmoid())},
        lambda: (seeded(2, 8, 6, 10, dtype=torch.float64),),
        1e-14,
    ),
    "empty": Group(
        {
            "elementwise": lambda x: (x + 1, torch.cat([x, x], 1), x.softmax(-1)),
            "reductions": lambda x: (x.sum(-1), x.mean(0), x.sum()),
            "products": lambda x: (x @ x.transpose(0, 1), x.transpose(0, 1) @ x),
        },
        lambda: (seeded(0, 5),),
    ),
    "scalar": Group(
        {
            "elementwise": lambda x: (x + 1, x / 0, torch.stack([x, x])),
            "reductions": lambda x: (x.sum(-1), x.max(), x.argmax(), x.cumsum(0), x.softmax(-1)),
            "gathers": lambda x: (x.gather(0, (x * 0).long()), x.gather(0, torch.zeros(3, dtype=torch.int64))),
            "selected": lambda x: (x.index_select(0, (x * 0).long()), x.unfold(0, 1, 1), x.flip(0), x.roll(1)),
        },
        lambda: (torch.tensor(3.0),),
    ),
}
