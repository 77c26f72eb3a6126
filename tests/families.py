"""Families of functions to compare with eager: the harness, and those around matrix products and attention."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

import planish

Function = Callable[..., torch.Tensor]
Tensors = tuple[torch.Tensor, ...]

LOWEST = torch.finfo(torch.float32).min
INF = float("inf")


class Bundle(torch.nn.Module):
    """Many small functions of the same inputs as one model: one export and one compile for all of them."""

    def __init__(self, functions: Mapping[str, Function]) -> None:
        super().__init__()
        self.functions = dict(functions)
        modules = {name: f for name, f in functions.items() if isinstance(f, torch.nn.Module)}
        self.inner = torch.nn.ModuleDict(modules)
        self.eval()

    def forward(self, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: f(*tensors) for name, f in self.functions.items()}


@dataclass(frozen=True)
class Family:
    """Functions, the sizes of the inputs to try, and how to make inputs for sizes."""

    functions: Mapping[str, Function]
    make: Callable[..., Tensors]
    sizes: tuple[tuple[int, ...], ...]
    dynamic: Mapping[str, Mapping[int, str]]
    rtol: float = 2e-6
    atol: Mapping[str, float] = field(default_factory=dict[str, float])

    def dims(self) -> dict[str, dict[int, planish.Dim]]:
        most = max(max(s) for s in self.sizes)
        return {n: {a: planish.Dim(d, 1, most) for a, d in axes.items()} for n, axes in self.dynamic.items()}


MATRICES: dict[str, Family] = {}

WIDTHS = (1, 7, 16, 48, 50, 96, 100)
MULTIPLIED = {1: "linear1", 3: "linear3", 40: "linear40"}


class Linear(torch.nn.Module):
    """A linear layer of its one input."""

    def __init__(self, depth: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(depth, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


for depth, name in MULTIPLIED.items():
    MATRICES[name] = Family(
        {f"{width}_{bias}": Linear(depth, width, bias=bias) for width in WIDTHS for bias in (True, False)},
        lambda m, depth=depth: (torch.randn(m, depth, generator=torch.Generator().manual_seed(m)),),
        tuple((m,) for m in (1, 7, 8, 9, 64, 130, 600)),
        {"tensors.0": {0: "m"}},
        rtol=1e-5,
        atol={"": 3e-6},
    )


class LinearOf(torch.nn.Module):
    """A linear layer of a view of [a, b, 40], and what may follow it."""

    def __init__(self, before: Function, after: Function | None = None, depth: int = 40, width: int = 20) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(depth, width)
        self.before, self.after = before, after or (lambda y, x: y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.linear(self.before(x)), x)


LINEAR_OF: dict[str, Function] = {
    "plain": LinearOf(lambda x: x),
    "select": LinearOf(lambda x: x[:, 0]),
    "select_last": LinearOf(lambda x: x[:, -1]),
    "select_first_axis": LinearOf(lambda x: x[-1]),
    "vector": LinearOf(lambda x: x[0, 0]),
    "slice": LinearOf(lambda x: x[:, :, 8:24], depth=16),
    "slice_step": LinearOf(lambda x: x[:, :, ::2], depth=20),
    "transposed": LinearOf(lambda x: x.transpose(0, 1)),
    "columns": LinearOf(lambda x: x[:, :, :3].reshape(-1, 3).t()[:, :1], depth=1),
    "heads": LinearOf(lambda x: x.reshape(x.shape[0], x.shape[1], 4, 10).transpose(1, 2), depth=10),
    "merged_heads": LinearOf(
        lambda x: x.reshape(x.shape[0], x.shape[1], 4, 10).permute(0, 1, 3, 2).reshape(x.shape[0], x.shape[1], 40)
    ),
    "expanded": LinearOf(lambda x: x[:, :1].expand(-1, x.shape[1], -1)),
    "gelu_before": LinearOf(lambda x: F.gelu(x)),
    "gelu_after": LinearOf(lambda x: x, lambda y, x: F.gelu(y)),
    "residual": LinearOf(lambda x: x, lambda y, x: y + x[:, :, :20]),
    "residual_norm": LinearOf(lambda x: x, lambda y, x: F.layer_norm(y + x, (40,)), width=40),
    "softmax_after": LinearOf(lambda x: x, lambda y, x: y.softmax(-1)),
    "sum_after": LinearOf(lambda x: x, lambda y, x: y.sum(-1)),
    "twice": LinearOf(lambda x: x, lambda y, x: y * y.tanh()),
    "viewed_after": LinearOf(lambda x: x, lambda y, x: y.reshape(*x.shape[:2], 2, 10).transpose(1, 2)),
    "row_added": LinearOf(lambda x: x, lambda y, x: y + x[:1, :1, :20]),
}
MATRICES["linear_of"] = Family(
    LINEAR_OF,
    lambda a, b: (torch.randn(a, b, 40, generator=torch.Generator().manual_seed(b)),),
    ((1, 1), (3, 17), (2, 300), (1, 33)),
    {"tensors.0": {0: "a", 1: "b"}},
    rtol=1e-5,
    atol={"": 5e-6},
)


def attention_inputs(depth: int) -> Callable[[int, int, int], Tensors]:
    """q [b, 2, q, depth], k and v [b, 2, k, depth]; key mask (first item sees no key), additive and per-query masks."""

    def make(b: int, q: int, k: int) -> Tensors:
        g = torch.Generator().manual_seed(1000 * q + k)
        tensors = [torch.randn(b, 2, n, depth, generator=g) for n in (q, k, k)]
        keep = torch.rand(b, 1, 1, k, generator=g) > 0.4
        keep[0] = False
        keep[1:, ..., 0] = True
        additive = torch.where(keep, 0.0, LOWEST) + torch.randn(b, 1, 1, k, generator=g)
        by_query = torch.randn(b, 2, q, k, generator=g) * 3
        by_query[0, 0, 0] = -INF
        return (*tensors, keep, additive, by_query)

    return make


def attend(mask: Callable[..., torch.Tensor | None], **options: float | bool) -> Function:
    return lambda q, k, v, *masks: F.scaled_dot_product_attention(q, k, v, mask(*masks), **options)  # pyright: ignore


def attend_projected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
    """Heads cut out of one row and put back, as in a transformer."""
    rows, keys = (t.transpose(1, 2).reshape(t.shape[0], t.shape[2], -1) * 1 for t in (q, k))
    heads = [t.reshape(t.shape[0], t.shape[1], 2, -1).transpose(1, 2) for t in (rows, keys)]
    out = F.scaled_dot_product_attention(heads[0], heads[1], v, masks[0])
    return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


ATTENTION: dict[str, Function] = {
    "no_mask": attend(lambda keep, additive, by_query: None),
    "key_mask": attend(lambda keep, additive, by_query: keep),
    "key_mask_expanded": attend(lambda keep, additive, by_query: keep.expand(-1, -1, by_query.shape[2], -1)),
    "additive": attend(lambda keep, additive, by_query: additive),
    "by_query": attend(lambda keep, additive, by_query: by_query),
    "by_query_bool": attend(lambda keep, additive, by_query: by_query > 0),
    "made_of_two": attend(lambda keep, additive, by_query: torch.where(keep, 0.0, -INF) + by_query),
    "causal": attend(lambda keep, additive, by_query: None, is_causal=True),
    "scaled": attend(lambda keep, additive, by_query: keep, scale=0.3),
    "projected": attend_projected,
    "one_head": lambda q, k, v, *masks: F.scaled_dot_product_attention(q[:, 0], k[:, 1], v[:, 0]),
    "narrow_values": lambda q, k, v, *masks: F.scaled_dot_product_attention(q, k, v[..., :9], masks[0]),
}
for depth in (16, 20, 32, 64, 80):
    MATRICES[f"attention{depth}"] = Family(
        ATTENTION if depth in (20, 32) else {n: ATTENTION[n] for n in ("key_mask", "by_query", "causal", "projected")},
        attention_inputs(depth),
        ((1, 1, 1), (2, 17, 17), (3, 5, 33), (2, 33, 7), (2, 70, 100)),
        {
            "tensors.0": {0: "b", 2: "q"},
            "tensors.1": {0: "b", 2: "k"},
            "tensors.2": {0: "b", 2: "k"},
            "tensors.3": {0: "b", 3: "k"},
            "tensors.4": {0: "b", 3: "k"},
            "tensors.5": {0: "b", 2: "q", 3: "k"},
        },
        rtol=2e-5,
        atol={"": 3e-6},
    )
