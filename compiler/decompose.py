"""Which exported ops are taken apart at capture, and into what.

The graph keeps the ops that planish has an index map, an expression or a kernel for (``ops.IR``). Every other op for
which PyTorch has a decomposition is replaced by it; the few below have one of ours, because PyTorch's returns several
tensors, fixes a layout or scatters one computation over many ops.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from planish.complex_pairs import KEPT
from planish.gathered_windows import WINDOWS
from planish.ops import COPIES, IR, RESHAPES, aten
from planish.tail import TAIL

Decomposition = Callable[..., Any]


CHECKED = frozenset(
    {
        aten.linalg_inv.default,
        aten.linalg_solve.default,
        aten.linalg_cholesky.default,
        aten.linalg_lu_factor.default,
        aten.linalg_ldl_factor.default,
        aten.linalg_tensorinv.default,
    }
)
"""Raise where a matrix is singular: PyTorch's decompositions make that an effect, which no graph of values has."""


def table() -> dict[Any, Decomposition]:
    """Op to decomposition, for ``ExportedProgram.run_decompositions``; ops of the IR are absent, so they stay whole."""
    entries: dict[Any, Decomposition] = dict(torch._decomp.global_decomposition_table["post_autograd"])
    core = torch.export.default_decompositions()
    entries |= {op: core[op] for op in core}
    ours = OURS | TAIL | WINDOWS
    entries |= {op: _of_reals(rule) for op, rule in ours.items()}
    entries |= _from_libraries()
    whole = IR - ours.keys() | RESHAPES | COPIES | CHECKED | KEPT
    return {op: f for op, f in entries.items() if isinstance(op, torch._ops.OpOverload) and op not in whole}


def _of_reals(ours: Decomposition) -> Decomposition:
    """Ours take ops apart for kernels, which compute real numbers: an op on complex ones stays whole."""

    def decompose(*args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        return NotImplemented if any(t.is_complex() for t in tensors) else ours(*args, **kwargs)

    return decompose


@contextmanager
def symbolic_steps() -> Generator[None]:
    """While active, torch.export traces LSTMs and GRUs by our decompositions, so that their number of steps can vary.

    PyTorch's own unroll the steps while they are traced, which fixes their number, although the op then stays whole.

    before: ``CaptureError``: the code specialized "seq" to be a constant.
    after: ``planish::lstm_layer`` or ``planish::gru_layer`` over as many steps as the input has.
    """
    with _tracing:
        theirs = {op: op.py_kernels[_TRACED] for op in (aten.lstm.input, aten.gru.input)}
        try:
            for op, unrolled in theirs.items():
                _trace_by(op, _or_else(OURS[op], unrolled))
            yield
        finally:
            for op, unrolled in theirs.items():
                _trace_by(op, unrolled)


_TRACED = torch._C.DispatchKey.CompositeImplicitAutograd
_tracing = RLock()
"""The tracing rules of torch are one for the process."""


def _trace_by(op: Any, rule: Decomposition) -> None:
    """Make ``rule`` the op's in both tables that tracing reads; the second is the one in inference mode."""
    del op.py_kernels[_TRACED]
    op.py_impl(_TRACED)(rule)
    torch._decomp.global_decomposition_table["post_autograd"][op] = rule


def _or_else(ours: Decomposition, theirs: Decomposition) -> Decomposition:
    """Ours where it applies."""

    def rule(*args: Any) -> Any:
        found = ours(*args)
        return theirs(*args) if found is NotImplemented else found

    return rule


def _last(dim: int, rank: int) -> bool:
    return rank == 0 or dim % rank == rank - 1


def _from_libraries() -> dict[Any, Decomposition]:
    """Operators that model libraries register: the ones of those that have been imported."""
    grouped = getattr(getattr(torch.ops.transformers, "grouped_mm_fallback", None), "default", None)
    return {} if grouped is None else {grouped: torch.ops.planish.grouped_mm}


def _to_end(x: Tensor, dim: int) -> Tensor:
    return x if _last(dim, x.dim()) else x.transpose(dim, -1)


def _softmax(op: Any) -> Decomposition:
    """A softmax of fp64, which has no kernel, is spelled out; others are rows."""
    rows = _on_last_axis(op)

    def decompose(x: Tensor, dim: int, *args: Any, dtype: torch.dtype | None = None) -> Any:
        result = next((a for a in (dtype, *args) if isinstance(a, torch.dtype)), x.dtype)
        if result is not torch.float64:
            return rows(x, dim, *args, **({} if dtype is None else {"dtype": dtype}))
        x = x.double()
        x = x - x.amax(dim, keepdim=True)
        total = x.exp().sum(dim, keepdim=True)
        return x - total.log() if "log" in str(op) else x.exp() / total

    return decompose


def _on_last_axis(op: Any) -> Decomposition:
    """A row op on another axis: that axis is moved to the end and back.

    before: ``softmax(x, 1)`` of a rank-3 tensor
    after:  ``transpose(softmax(transpose(x, 1, -1), -1), 1, -1)``
    """

    def decompose(x: Tensor, dim: int, *args: Any, **kwargs: Any) -> Any:
        if x.dim() and _last(dim, x.dim()):
            return NotImplemented
        if not x.dim():
            return op(x.reshape(1), -1, *args, **kwargs).reshape(())
        return op(x.transpose(dim, -1), -1, *args, **kwargs).transpose(dim, -1)

    return decompose


def _merge_axes(x: Tensor, dims: list[int]) -> Tensor:
    """``x`` with the axes ``dims`` merged into one last axis."""
    rest = [d for d in range(x.dim()) if d not in dims]
    moved = x.permute(*rest, *dims) if rest + dims != list(range(x.dim())) else x
    size = 1
    for d in dims:
        size = size * x.shape[d]
    return moved.reshape([*(x.shape[d] for d in rest), size])


def _reduction(op: Any, *, list_dim: bool = True, kept: bool = True) -> Decomposition:
    """A reduction over any axes becomes ``op`` over the last axis, which is left whole where it is ``kept``.

    before: ``mean(x, [2, 3], keepdim=True)`` of a rank-4 tensor
    after:  ``reshape(mean(reshape(x, [n, c, h*w]), [-1]), [n, c, 1, 1])``
    """

    def decompose(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
        listed = [] if dim is None else [dim] if isinstance(dim, int) else list(dim)
        dims = sorted(d % x.dim() for d in listed) if listed and x.dim() else list(range(x.dim()))
        if kept and x.dim() and listed and dims == [x.dim() - 1] and not keepdim and dtype is None:
            return NotImplemented
        if dtype is not None:
            x = x.to(dtype)
        rows = _merge_axes(x, dims) if x.dim() else x.reshape(1)
        result = op(rows, [-1] if list_dim else -1)
        result = result if dtype is None else result.to(dtype)  # sums of 32 bits have 64
        if keepdim:
            result = result.reshape([1 if d in dims else x.shape[d] for d in range(x.dim())])
        return result

    return decompose


def _whole(op: Any, *, list_dim: bool = True) -> Decomposition:
    """A reduction of all elements: ``sum(x)`` becomes ``sum(reshape(x, [-1]), [-1])``."""

    def decompose(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        result = op((x if dtype is None else x.to(dtype)).reshape(-1), [-1] if list_dim else -1)
        return result if dtype is None else result.to(dtype)

    return decompose


def _extremum(value: Any, position: Any) -> Decomposition:
    """``max(x, dim)`` becomes the pair of ``amax`` and ``argmax``."""

    def decompose(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
        at = position(_ordered(x), dim if x.dim() else None, keepdim)
        return value(x, [dim] if x.dim() else [], keepdim), at

    return decompose


def _ordered(x: Tensor) -> Tensor:
    """What is compared: bools as bytes."""
    return x.to(torch.uint8) if x.dtype is torch.bool else x


def _argsort(x: Tensor, dim: int, descending: bool) -> tuple[Tensor, Tensor]:
    if not x.dim():
        return x.clone(), torch.zeros((), dtype=torch.int64)
    moved = _to_end(x, dim)
    order = torch.ops.planish.argsort(_ordered(moved), descending)
    return _to_end(moved.gather(-1, order), dim), _to_end(order, dim)


def _sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    return _argsort(x, dim, descending)


def _stable_sort(x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    return _argsort(x, dim, descending)


def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    """``topk`` becomes the positions of the best and a gather of their values."""
    if not x.dim():
        return x.clone(), torch.zeros((), dtype=torch.int64)
    moved = _to_end(x, dim)
    order = torch.ops.planish.argtopk(_ordered(moved), k, largest)
    return _to_end(moved.gather(-1, order), dim), _to_end(order, dim)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Any:
    """Inference: one multiplication and one addition per channel, of which ``canonicalize`` folds what it can.

    before: ``batch_norm(x, w, b, mean, var)``
    after:  ``x * s + t`` with s = w / sqrt(var + eps), t = b - mean s
    """
    if training:
        return NotImplemented
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = [-1] + [1] * (x.dim() - 2)
    return x * scale.reshape(shape) + shift.reshape(shape)


def _no_training_batch_norm(x: Tensor, *args: Any) -> Any:
    weight, bias, mean, var, momentum, eps = args
    empty = x.new_empty(0)
    return _batch_norm(x, weight, bias, mean, var, False, momentum, eps), empty, empty


def _variance(x: Tensor, dim: Any = None, correction: Any = 1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Variance and mean: the mean first, then the mean square of the differences."""
    dims = sorted(d % x.dim() for d in dim) if dim and x.dim() else list(range(x.dim()))
    count = 1
    for d in dims:
        count = count * x.shape[d]
    mean = x.mean(dims, keepdim=True)
    squares = ((x - mean) * (x - mean)).sum(dims, keepdim=keepdim)
    freedom = torch.sym_max(count - correction, 0) if not isinstance(count, int) else max(count - correction, 0)
    return squares / freedom, mean if keepdim else x.mean(dims)


def _var_mean(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _variance(x, dim, 1 if correction is None else correction, keepdim)


def _var(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return _variance(x, dim, 1 if correction is None else correction, keepdim)[0]


def _std(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return _var(x, dim, correction=correction, keepdim=keepdim).sqrt()


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    """Rows of one group each are normalised as by ``layer_norm``, then scaled per channel."""
    rows = x.reshape(x.shape[0], groups, -1)
    out = torch.ops.aten.layer_norm(rows, [rows.shape[-1]], None, None, eps).reshape(x.shape)
    shape = [-1] + [1] * (x.dim() - 2)
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Any:
    """A norm over several axes becomes one over the last: they are merged.

    before: ``layer_norm(x, [c, h, w])``
    after:  ``reshape(layer_norm(reshape(x, [n, c*h*w]), [c*h*w]))``
    """
    if len(shape) == 1:
        return NotImplemented
    size = 1
    for s in shape:
        size = size * s
    lead = list(x.shape[: x.dim() - len(shape)])
    flat = [None if p is None else p.reshape(size) for p in (weight, bias)]
    return torch.ops.aten.layer_norm(x.reshape([*lead, size]), [size], *flat, eps).reshape(x.shape)


def _split(x: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
    """Pieces as slices."""
    pieces: list[Tensor] = []
    start = 0
    for size in sizes:
        pieces.append(torch.ops.aten.slice(x, dim, start, start + size))
        start = start + size
    return pieces


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """One batch of ``bmm``; a linear layer where the second operand is constant (``canonicalize``)."""
    return torch.ops.aten.bmm(a.unsqueeze(0), b.unsqueeze(0)).squeeze(0)


def _added(bias: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    """``beta bias + alpha product``; of integers both factors are integers, as PyTorch cuts them."""
    if not product.is_floating_point():
        beta, alpha = int(beta), int(alpha)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else product + (bias if beta == 1 else bias * beta)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _added(bias, _mm(a, b), beta, alpha)


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _added(bias, torch.ops.aten.bmm(a, b), beta, alpha)


def _lstm(
    x: Tensor,
    hx: list[Tensor],
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Layers and directions, each a linear layer over all time steps and ``planish::lstm_layer``."""
    h0, c0 = hx
    x = x.transpose(0, 1) if batch_first else x
    supply, last_h, last_c = iter(params), [], []
    per = 4 if has_biases else 2
    projected = len(params) != per * num_layers * (1 + bidirectional)
    if projected:
        return NotImplemented
    for layer in range(num_layers):
        outputs: list[Tensor] = []
        for direction in range(1 + bidirectional):
            w_ih, w_hh, *biases = (next(supply) for _ in range(per))
            at, size = layer * (1 + bidirectional) + direction, w_hh.shape[1]
            gates = torch.ops.aten.linear(x, w_ih, biases[0] + biases[1] if biases else None)
            states = torch.ops.planish.lstm_layer(gates, w_hh, h0[at], c0[at], bool(direction))
            outputs.append(states[..., :size])
            final = states[0 if direction else -1]
            last_h.append(final[:, :size])
            last_c.append(final[:, size:])
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    return x.transpose(0, 1) if batch_first else x, torch.stack(last_h), torch.stack(last_c)


def _gru(
    x: Tensor,
    hx: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """Layers and directions, each a linear layer over all time steps and ``planish::gru_layer``."""
    x = x.transpose(0, 1) if batch_first else x
    supply, last = iter(params), []
    per = 4 if has_biases else 2
    for layer in range(num_layers):
        outputs: list[Tensor] = []
        for direction in range(1 + bidirectional):
            w_ih, w_hh, *biases = (next(supply) for _ in range(per))
            at = layer * (1 + bidirectional) + direction
            b_ih, b_hh = biases or (None, torch.zeros(w_hh.shape[0], dtype=w_hh.dtype))
            gates = torch.ops.aten.linear(x, w_ih, b_ih)
            states = torch.ops.planish.gru_layer(gates, w_hh, b_hh, hx[at], bool(direction))
            outputs.append(states)
            last.append(states[0 if direction else -1])
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    return x.transpose(0, 1) if batch_first else x, torch.stack(last)


def _attention(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Grouped and broadcast heads are spelled out, and attention over a single matrix gets a batch.

    before: ``attention(q [b, 8, s, d], k [b, 2, t, d], v, enable_gqa=True)``
    after:  ``attention(q, reshape(expand(k, [b, 2, 4, t, d]), [b, 8, t, d]), …)``
    """
    if dropout_p:
        return NotImplemented
    op = torch.ops.aten.scaled_dot_product_attention
    if q.dim() < 3:
        mask = None if attn_mask is None else attn_mask.unsqueeze(0)
        return op(q[None], key[None], value[None], mask, 0.0, is_causal, scale=scale).squeeze(0)
    if enable_gqa:
        key, value = (_repeat_heads(t, q.shape[-3] // t.shape[-3]) for t in (key, value))
        return op(q, key, value, attn_mask, 0.0, is_causal, scale=scale)
    lead = torch.broadcast_shapes(q.shape[:-2], key.shape[:-2], value.shape[:-2])
    if any(tuple(t.shape[:-2]) != tuple(lead) for t in (q, key, value)):
        q, key, value = (t.expand(*lead, *t.shape[-2:]) for t in (q, key, value))
        return op(q, key, value, attn_mask, 0.0, is_causal, scale=scale)
    return NotImplemented


def _repeat_heads(x: Tensor, times: int) -> Tensor:
    wide = x.unsqueeze(-3).expand(*x.shape[:-2], times, *x.shape[-2:])
    return wide.reshape(*x.shape[:-3], x.shape[-3] * times, *x.shape[-2:])


def _index_put(x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """One value written by a mask is a choice.

    before: ``x[mask] = 0``
    after:  ``where(mask, 0, x)``
    """
    mask = indices[0]
    masked = len(indices) == 1 and mask is not None and mask.dtype is torch.bool and not accumulate
    if not masked or (values.dim() and tuple(values.shape) != (1,)):
        return NotImplemented
    mask = mask.reshape([*mask.shape, *([1] * (x.dim() - mask.dim()))])
    return torch.where(mask, values.reshape(()), x)


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What ``x`` holds after ``x.copy_(source)``."""
    return source.to(x.dtype).expand(x.shape)


def _empty(size: list[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """Uninitialised memory has no value to keep; zeros make the result the same every time."""
    return torch.zeros(size, dtype=dtype)


def _empty_like(x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.zeros(x.shape, dtype=dtype or x.dtype)


def _new_empty(x: Tensor, size: list[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.zeros(size, dtype=dtype or x.dtype)


def _histogram(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    """Counts as a ``scatter_add`` of ones; without a given range it would depend on the values, and is left whole."""
    if not min < max:
        return NotImplemented
    flat = x.reshape(-1)
    inside = (flat >= min) & (flat <= max)
    place = ((flat - min) / (max - min) * bins).to(torch.int64).clamp(0, bins - 1)
    ones = inside.to(x.dtype)
    return torch.zeros([bins], dtype=x.dtype).scatter_add(0, torch.where(inside, place, 0), ones)


OURS: dict[Any, Decomposition] = {
    aten.histc.default: _histogram,
    aten.copy.default: _copy,
    aten.empty.memory_format: _empty,
    aten.empty_like.default: _empty_like,
    aten.new_empty.default: _new_empty,
    aten.softmax.int: _softmax(aten.softmax.int),
    aten.log_softmax.int: _softmax(aten.log_softmax.int),
    aten._softmax.default: _softmax(aten._softmax.default),
    aten._log_softmax.default: _softmax(aten._log_softmax.default),
    aten.cumsum.default: _on_last_axis(aten.cumsum.default),
    aten.cumprod.default: _on_last_axis(aten.cumprod.default),
    aten.logcumsumexp.default: _on_last_axis(aten.logcumsumexp.default),
    aten.sum.dim_IntList: _reduction(aten.sum.dim_IntList),
    aten.mean.dim: _reduction(aten.mean.dim),
    aten.amax.default: _reduction(aten.amax.default),
    aten.amin.default: _reduction(aten.amin.default),
    aten.prod.dim_int: _reduction(aten.prod.dim_int, list_dim=False),
    aten.any.dim: _reduction(aten.any.dim, list_dim=False),
    aten.any.dims: _reduction(aten.any.dim, list_dim=False, kept=False),
    aten.all.dim: _reduction(aten.all.dim, list_dim=False),
    aten.all.dims: _reduction(aten.all.dim, list_dim=False, kept=False),
    aten.argmax.default: _reduction(aten.argmax.default, list_dim=False),
    aten.argmin.default: _reduction(aten.argmin.default, list_dim=False),
    aten.sum.default: _whole(aten.sum.dim_IntList),
    aten.mean.default: _whole(aten.mean.dim),
    aten.prod.default: _whole(aten.prod.dim_int, list_dim=False),
    aten.any.default: _whole(aten.any.dim, list_dim=False),
    aten.all.default: _whole(aten.all.dim, list_dim=False),
    aten.max.default: _whole(aten.amax.default),
    aten.min.default: _whole(aten.amin.default),
    aten.max.dim: _extremum(aten.amax.default, aten.argmax.default),
    aten.min.dim: _extremum(aten.amin.default, aten.argmin.default),
    aten.sort.default: _sort,
    aten.sort.stable: _stable_sort,
    aten.topk.default: _topk,
    aten.batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _no_training_batch_norm,
    aten.var.correction: _var,
    aten.std.correction: _std,
    aten.var_mean.correction: _var_mean,
    aten.group_norm.default: _group_norm,
    aten.layer_norm.default: _layer_norm,
    aten.split_with_sizes.default: _split,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _baddbmm,
    aten.scaled_dot_product_attention.default: _attention,
    aten.index_put.default: _index_put,
    aten.lstm.input: _lstm,
    aten.gru.input: _gru,
}
"""Our own. One that returns ``NotImplemented`` leaves the op whole: then it has the form that a kernel takes."""
