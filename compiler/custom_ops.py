"""The ``planish::`` operators: what the graph needs whole and ATen has only with several results, or not at all.

Each has a plain-PyTorch reference, so a graph with them runs in eager, and a shape function.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("planish::argsort", mutates_args=())
def argsort(x: Tensor, descending: bool) -> Tensor:
    """Positions of each row's elements in order, equal ones in the order they stand in; int64, shape of ``x``."""
    return torch.argsort(x, dim=-1, descending=descending, stable=True)


@argsort.register_fake
def _(x: Tensor, descending: bool) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int64, device=x.device)


@torch.library.custom_op("planish::argtopk", mutates_args=())
def argtopk(x: Tensor, k: int, largest: bool) -> Tensor:
    """Positions of each row's ``k`` largest (or smallest) elements, best first, equal ones in order; int64 [..., k]."""
    return torch.argsort(x, dim=-1, descending=largest, stable=True)[..., :k].contiguous()


@argtopk.register_fake
def _(x: Tensor, k: int, largest: bool) -> Tensor:
    return torch.empty((*x.shape[:-1], k), dtype=torch.int64, device=x.device)


@torch.library.custom_op("planish::argcummax", mutates_args=())
def argcummax(x: Tensor, largest: bool) -> Tensor:
    """Position of each row's largest (or smallest) element so far, the last of equal ones; int64, shape of ``x``."""
    return (torch.cummax if largest else torch.cummin)(x, -1)[1]


@argcummax.register_fake
def _(x: Tensor, largest: bool) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int64, device=x.device)


@torch.library.custom_op("planish::softmax", mutates_args=())
def softmax(x: Tensor, schedule: str, limit: int) -> Tensor:
    """Softmax of each row, by the schedule that ``rewrite-softmax`` chose.

    Args:
        x: [..., N].
        schedule: ``three-pass``, ``two-pass``, or ``two-pass-stream``, whose stores go past the caches.
        limit: rows of up to so many elements take the three passes whatever the schedule says; for rows whose length
            is known only at run time.
    """
    return torch.softmax(x, -1)


@softmax.register_fake
def _(x: Tensor, schedule: str, limit: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("planish::log_softmax", mutates_args=())
def log_softmax(x: Tensor, schedule: str, limit: int) -> Tensor:
    """Logarithm of the softmax of each row; the arguments are those of ``planish::softmax``."""
    return torch.log_softmax(x, -1)


@log_softmax.register_fake
def _(x: Tensor, schedule: str, limit: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("planish::softmax_statistics", mutates_args=())
def softmax_statistics(x: Tensor, schedule: str, limit: int) -> Tensor:
    """Of each row the largest number, and the sum of exp(x - maximum): [..., 2].

    With them ``exp(x - maximum) / sum`` is the softmax at any place. A row that holds NaN or +inf, or nothing but -inf,
    has a NaN as sum, and so as softmax. The other arguments are those of ``planish::softmax``.
    """
    top = x.masked_fill(x.isnan(), -torch.inf).amax(-1, keepdim=True)
    return torch.cat([top, (x - top).exp().sum(-1, keepdim=True)], -1)


@softmax_statistics.register_fake
def _(x: Tensor, schedule: str, limit: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], 2))


@torch.library.custom_op("planish::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows that are sorted by group, each times its group's matrix: the experts of a mixture.

    Args:
        x: [S, K].
        weight: [E, K, N].
        ends: [E] integers, the row after each group's last; rows after the last group give 0.
    """
    out = x.new_zeros(x.shape[0], weight.shape[2])
    start = 0
    for group, end in enumerate(ends.tolist()):
        out[start:end] = x[start:end] @ weight[group]
        start = end
    return out


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2]))


@torch.library.custom_op("planish::lstm_layer", mutates_args=())
def lstm_layer(gates: Tensor, weight: Tensor, h: Tensor, c: Tensor, reverse: bool) -> Tensor:
    """One direction of one LSTM layer over all time steps.

    Args:
        gates: [T, N, 4H], what the input and both biases contribute to the gates i, f, g, o.
        weight: [4H, H], recurrent.
        h: [N, H], first hidden state.
        c: [N, H], first cell state.
        reverse: go from the last time step to the first.

    Returns:
        [T, N, 2H]: hidden and cell state after each step. i, f, o are sigmoids, g is a tanh;
        c' = f c + i g and h' = o tanh(c') (Hochreiter and Schmidhuber 1997, in PyTorch's gate order).
    """
    steps = range(gates.shape[0])
    states: list[Tensor] = []
    for t in reversed(steps) if reverse else steps:
        i, f, g, o = (gates[t] + h @ weight.t()).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(torch.cat([h, c], -1))
    return torch.stack(states[::-1] if reverse else states)


@lstm_layer.register_fake
def _(gates: Tensor, weight: Tensor, h: Tensor, c: Tensor, reverse: bool) -> Tensor:
    return gates.new_empty((gates.shape[0], gates.shape[1], 2 * h.shape[-1]))


@torch.library.custom_op("planish::gru_layer", mutates_args=())
def gru_layer(gates: Tensor, weight: Tensor, bias: Tensor, h: Tensor, reverse: bool) -> Tensor:
    """One direction of one GRU layer over all time steps.

    Args:
        gates: [T, N, 3H], what the input and its bias contribute to the gates r, z, n.
        weight: [3H, H], recurrent.
        bias: [3H], recurrent.
        h: [N, H], first hidden state.
        reverse: go from the last time step to the first.

    Returns:
        [T, N, H]: hidden state after each step, h' = (1 - z) n + z h with n = tanh(x_n + r h_n) (Cho et al. 2014).
    """
    steps = range(gates.shape[0])
    states: list[Tensor] = []
    for t in reversed(steps) if reverse else steps:
        (xr, xz, xn), (hr, hz, hn) = gates[t].chunk(3, -1), (h @ weight.t() + bias).chunk(3, -1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        n = (xn + r * hn).tanh()
        h = n + z * (h - n)
        states.append(h)
    return torch.stack(states[::-1] if reverse else states)


@gru_layer.register_fake
def _(gates: Tensor, weight: Tensor, bias: Tensor, h: Tensor, reverse: bool) -> Tensor:
    return gates.new_empty((gates.shape[0], gates.shape[1], h.shape[-1]))
