"""How a random graph is drawn: one rule for each kind of line, and the strategy that chains them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fuzz import FLOATS, INTEGERS, SPELLED, Graph, Input, Weight, namespace
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

SIZES = (0, 1, 2, 3, 5, 7, 11, 17)
DTYPES = (*FLOATS, *INTEGERS, torch.bool)
LAYOUTS = ("plain", "plain", "transposed", "strided", "expanded", "shifted")
LARGEST = 20_000
"""Elements of a value; graphs with larger ones are not drawn."""

Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass(frozen=True)
class Value:
    """A value of the graph that is being drawn.

    Attributes:
        tensor: what it is for the drawn inputs.
        exact: every bit follows from the inputs, so a jump (rounding, order, a comparison) goes the same way natively.
    """

    name: str
    tensor: Tensor
    exact: bool


@dataclass
class Drawing:
    """The graph so far."""

    draw: Draw
    values: list[Value] = field(default_factory=list[Value])
    weights: list[Weight] = field(default_factory=list[Weight])
    lines: list[str] = field(default_factory=list[str])

    def one_of(self, *options: Any) -> Any:
        """One of the options; the first is the simplest."""
        return self.draw(st.sampled_from(options))

    def between(self, low: int, high: int) -> int:
        """An integer, ends included."""
        return self.draw(st.integers(low, max(low, high)))

    def axis(self, a: Tensor) -> int:
        """An axis, from the front or from the end."""
        return self.between(-a.dim(), a.dim() - 1)

    def axes(self, a: Tensor) -> list[int]:
        """Some axes, at least one."""
        return sorted(self.draw(st.sets(st.integers(0, a.dim() - 1), min_size=1)))

    def weight(self, *shape: int, dtype: torch.dtype, high: int = 0) -> str:
        """Name of a new constant."""
        self.weights.append(Weight(f"w{len(self.weights)}", shape, dtype, high))
        return self.weights[-1].name

    def other(self, a: Value, *, like: bool = False) -> Value:
        """A value that broadcasts with ``a`` (with ``like``: of its shape and dtype), maybe ``a`` itself."""
        fits = [v for v in self.values if v.exact >= a.exact and _fits(a.tensor, v.tensor, like=like)]
        return self.one_of(*reversed(fits))

    def add(self, rule: Rule, a: Value) -> None:
        """One more line; a draw that eager refuses is given up."""
        text = rule.write(self, a.name, a)
        name = f"v{len(self.values)}"
        weights = {w.name: w.make() for w in self.weights}
        try:
            result = eval(text, namespace() | weights | {v.name: v.tensor for v in self.values})
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError, ZeroDivisionError):
            assume(False)
            raise
        assume(isinstance(result, Tensor) and result.numel() <= LARGEST and result.dtype in DTYPES)
        used = {v for v in self.values if v.name in re.findall(r"v\d+", text)}
        exact = all(v.exact for v in used) and not (rule.rounds and result.is_floating_point())
        self.lines.append(f"{name} = {text}")
        self.values.append(Value(name, result, exact))


def _fits(a: Tensor, b: Tensor, *, like: bool) -> bool:
    if like:
        return a.shape == b.shape and a.dtype == b.dtype
    return all(1 in (m, n) or m == n for m, n in zip(reversed(a.shape), reversed(b.shape), strict=False))


@dataclass(frozen=True)
class Rule:
    """A kind of line.

    Attributes:
        write: the right-hand side, given the drawing and the operand's name and value.
        takes: which operands it is for.
        rounds: a float result may differ in its last bits.
        jumps: a small change of the operand may change the result by much, so it takes exact operands only.
    """

    write: Callable[[Drawing, str, Value], str]
    takes: Callable[[Tensor], bool] = lambda a: True
    rounds: bool = False
    jumps: bool = False


def is_float(a: Tensor) -> bool:
    return a.is_floating_point()


def is_number(a: Tensor) -> bool:
    return a.dtype is not torch.bool


def is_integer(a: Tensor) -> bool:
    return a.dtype in INTEGERS


def has_axis(a: Tensor) -> bool:
    return a.dim() > 0


def rank(low: int, high: int = 5) -> Callable[[Tensor], bool]:
    return lambda a: low <= a.dim() <= high


def floats(low: int, high: int = 5) -> Callable[[Tensor], bool]:
    """Floats of some ranks, and not empty."""
    return lambda a: a.is_floating_point() and low <= a.dim() <= high and a.numel() > 0


def _texts(*options: str) -> Callable[[Drawing, str, Value], str]:
    return lambda d, a, v: d.one_of(*options).replace("$", a)


# Lines with more to draw than their text ------------------------------------------------------------------------------


def _binary(d: Drawing, a: str, v: Value) -> str:
    b = d.other(v)
    options = ["{} + {}", "{} * {}", "torch.maximum({}, {})", "torch.minimum({}, {})"]
    if is_number(v.tensor) and is_number(b.tensor):
        options += ["{} - {}", "{} / {}"]
    return d.one_of(*options).format(a, b.name)


def _scalar(d: Drawing, a: str, v: Value) -> str:
    number = d.one_of(2, 1, 0, -1, 3) if is_integer(v.tensor) else d.one_of(2, 0.5, 1.0, -1, 3.0, 0)
    options = ["{} + {}", "{} * {}", "{} - {}", "{}.clamp(max={})", "{}.clamp_min({})", "torch.sub({1}, {0})"]
    text = d.one_of(*(o.replace("{}", "{0}", 1).replace("{}", "{1}", 1) for o in options[:-1]), "{1} - {0}")
    return text.format(a, number)


def _compare(d: Drawing, a: str, v: Value) -> str:
    b = d.one_of("1", "0", d.other(v).name)
    return f"{a} {d.one_of('==', '!=', '<', '<=', '>', '>=')} {b}"


def _where(d: Drawing, a: str, v: Value) -> str:
    conditions = [u for u in d.values if u.tensor.dtype is torch.bool and _fits(u.tensor, v.tensor, like=False)]
    condition = d.one_of(*(u.name for u in conditions)) if conditions else f"({d.other(v).name} != 0)"
    b = d.other(v)
    return d.one_of(
        f"torch.where({condition}, {a}, {b.name})",
        f"torch.where({condition}, 1, {a})",
        f"{a}.masked_fill({condition}, 0)",
    )


def _divide(d: Drawing, a: str, v: Value) -> str:
    b = d.one_of("3", "-2", d.other(v).name)
    return d.one_of(
        f"{a} // {b}",
        f"{a} % {b}",
        f"torch.fmod({a}, {b})",
        f"torch.div({a}, {b}, rounding_mode='trunc')",
    )


def _permute(d: Drawing, a: str, v: Value) -> str:
    return f"{a}.permute({d.draw(st.permutations(range(v.tensor.dim())))})"


def _reshape(d: Drawing, a: str, v: Value) -> str:
    first = d.between(0, v.tensor.dim() - 1)
    last = d.between(first, v.tensor.dim() - 1)
    size = v.tensor.shape[first]
    factors = [f for f in range(1, size + 1) if size % f == 0] or [1]
    return d.one_of(
        f"{a}.flatten({first}, {last})",
        f"{a}.reshape(-1)",
        f"{a}.unflatten({first}, (-1, {d.one_of(*factors)}))",
        f"{a}.unsqueeze({d.between(-1, v.tensor.dim())})",
        f"{a}.squeeze()",
        f"{a}.transpose({first}, {last}).flatten()",
    )


def _slice(d: Drawing, a: str, v: Value) -> str:
    axis = d.between(0, v.tensor.dim() - 1)
    size = v.tensor.shape[axis]
    start, stop = d.one_of("", d.between(-size, size)), d.one_of("", d.between(-size, size))
    step = d.one_of("", ":2", ":3")
    before = ":, " * axis
    text = f"{a}[{before}{start}:{stop}{step}]"
    return d.one_of(text, f"{a}.select({axis}, {d.between(-size, size - 1)})") if size else text


def _place(d: Drawing, a: str, v: Value) -> str:
    axis, shape = d.axis(v.tensor), v.tensor.shape
    ones = [-1 if s != 1 else d.one_of(1, 3, 2) for s in shape]
    return d.one_of(
        f"{a}.flip({d.axes(v.tensor)})",
        f"{a}.roll({d.between(-3, 4)}, {axis})",
        f"{a}.expand({[d.one_of(2, 1), *ones]})",
        f"{a}.repeat({[d.one_of(1, 2) for _ in shape]})",
        f"{a}.repeat_interleave({d.between(1, 3)}, {axis})",
        f"{a}.chunk(2, {axis})[-1]",
    )


def _square(d: Drawing, a: str, v: Value) -> str:
    return d.one_of(
        f"{a}.tril({d.between(-2, 2)})",
        f"{a}.triu({d.between(-2, 2)})",
        f"{a}.diagonal({d.between(-1, 1)}, -2, -1)",
        f"{a}.unfold(-1, {min(2, v.tensor.shape[-1])}, {d.between(1, 2)})",
    )


def _join(d: Drawing, a: str, v: Value) -> str:
    axis, b = d.axis(v.tensor), d.other(v, like=True).name
    return d.one_of(
        f"torch.cat([{a}, {b}], {axis})", f"torch.stack([{a}, {b}], {axis})", f"torch.cat([{b}, {a}, {a}], {axis})"
    )


def _pad(d: Drawing, a: str, v: Value) -> str:
    pads = [d.between(-1, 3) for _ in range(2 * d.between(1, min(2, v.tensor.dim())))]
    value = "" if v.tensor.dtype is torch.bool else f", value={d.one_of(0, 1, -2)}"
    return f"F.pad({a}, {pads}{value})"


def _pad_by_edge(d: Drawing, a: str, v: Value) -> str:
    pads = [d.between(0, 2) for _ in range(2 * (v.tensor.dim() - 2))]
    return f"F.pad({a}, {pads}, mode='{d.one_of('replicate', 'reflect', 'circular')}')"


def _reduce(*functions: str) -> Callable[[Drawing, str, Value], str]:
    """Functions of some axes, or of all."""

    def write(d: Drawing, a: str, v: Value) -> str:
        name = d.one_of(*functions)
        axes = d.axes(v.tensor) if v.tensor.dim() else []
        return d.one_of(f"{a}.{name}({axes}, keepdim={d.one_of(False, True)})", f"{a}.{name}()")

    return write


def _reduce_one(*functions: str) -> Callable[[Drawing, str, Value], str]:
    """Functions of one axis."""

    def write(d: Drawing, a: str, v: Value) -> str:
        name, result = f"{d.one_of(*functions)}.".split(".")[:2]
        keep = d.one_of("", ", keepdim=True")
        return f"{a}.{name}({d.axis(v.tensor)}{keep})" + (f".{result}" if result else "")

    return write


def _matmul(d: Drawing, a: str, v: Value) -> str:
    t, inner = v.tensor, v.tensor.shape[-1]
    width = d.one_of(3, 1, 16, 17)
    weight = d.weight(width, inner, dtype=t.dtype)
    options = [f"F.linear({a}, {weight})", f"{a} @ {weight}.t()"]
    if t.dim() > 1:
        options += [f"{a} @ {a}.transpose(-1, -2)", f"{a}.transpose(-1, -2) @ {a}"]
    if t.dim() == 3:
        options += [f"torch.bmm({a}, {a}.transpose(1, 2))", f"torch.einsum('bij,bkj->ik', {a}, {a})"]
    return d.one_of(*options)


def _convolve(d: Drawing, a: str, v: Value) -> str:
    t = v.tensor
    channels, dims = t.shape[1], t.dim() - 2
    groups = d.one_of(1, channels)
    out = groups * d.one_of(1, 2, 3)
    kernel = [d.one_of(1, 3, 2) for _ in range(dims)]
    options = f"stride={d.one_of(1, 2)}, padding={d.one_of(0, 1, 2)}, dilation={d.one_of(1, 2)}, groups={groups}"
    if d.one_of(False, False, True):
        weight = d.weight(channels, out // groups, *kernel, dtype=t.dtype)
        return f"F.conv_transpose{dims}d({a}, {weight}, {options})"
    weight = d.weight(out, channels // groups, *kernel, dtype=t.dtype)
    bias = d.one_of("None", d.weight(out, dtype=t.dtype))
    return f"F.conv{dims}d({a}, {weight}, {bias}, {options})"


def _pool(d: Drawing, a: str, v: Value) -> str:
    dims = v.tensor.dim() - 2
    size, stride, pad = d.between(1, 3), d.between(1, 3), d.between(0, 1)
    return d.one_of(
        f"F.max_pool{dims}d({a}, {size}, {stride}, {pad})",
        f"F.avg_pool{dims}d({a}, {size}, {stride}, {pad})",
        f"F.adaptive_avg_pool{dims}d({a}, {d.between(1, 4)})",
        f"F.interpolate({a}, scale_factor={d.one_of(2, 3)}, mode='nearest')",
    )


def _normalise(d: Drawing, a: str, v: Value) -> str:
    t, axis = v.tensor, d.axis(v.tensor)
    last = t.shape[-1]
    options = [
        f"{a}.softmax({axis})",
        f"{a}.log_softmax({axis})",
        f"F.layer_norm({a}, ({last},))",
        f"F.layer_norm({a}, ({last},), {d.weight(last, dtype=t.dtype)})",
        f"F.rms_norm({a}, ({last},))",
        f"{a}.logsumexp({axis})",
        f"F.normalize({a}, dim={axis})",
    ]
    if t.dim() > 2:
        channels = t.shape[1]
        weight = d.weight(channels, dtype=t.dtype)
        options += [
            f"F.group_norm({a}, 1, {weight})",
            f"F.batch_norm({a}, {weight}, {weight}.abs(), {weight}, {weight})",
            f"F.instance_norm({a})",
        ]
    return d.one_of(*options)


def _gather(d: Drawing, a: str, v: Value) -> str:
    t, axis = v.tensor, d.axis(v.tensor)
    size = t.shape[axis]
    some = d.weight(d.between(1, 5), dtype=torch.int64, high=size)
    like = d.weight(*t.shape, dtype=torch.int64, high=size)
    return d.one_of(
        f"{a}.index_select({axis}, {some})",
        f"{a}[{':, ' * (axis % t.dim())}{some}]",
        f"{a}.gather({axis}, {like})",
        f"torch.take_along_dim({a}, {like}, {axis})",
        f"{a}[{':, ' * (axis % t.dim())}-1 - {some}]",
    )


def _scatter(d: Drawing, a: str, v: Value) -> str:
    t, axis = v.tensor, d.axis(v.tensor)
    size = t.shape[axis]
    like = d.weight(*t.shape, dtype=torch.int64, high=size)
    b = d.other(v, like=True).name
    return d.one_of(
        f"{a}.scatter_add({axis}, {like}, {b})",
        f"{a}.scatter_reduce({axis}, {like}, {b}, 'amax')",
        f"{a}.index_add({axis}, {like}.flatten()[:{size}], {b})",
        f"{a}.scatter({axis}, {like}, 1)",
        f"{a}.index_fill({axis}, {like}.flatten()[:2], 1)",
    )


def _order(d: Drawing, a: str, v: Value) -> str:
    axis = d.axis(v.tensor)
    down = d.one_of(False, True)
    return d.one_of(
        f"{a}.sort({axis}, {down}).values",
        f"{a}.argsort(stable=True, dim={axis}, descending={down})",
        f"{a}.topk({d.between(0, min(3, v.tensor.shape[axis]))}, {axis}, {down}).values",
        f"{a}.cummax({axis}).values",
    )


def _scan(d: Drawing, a: str, v: Value) -> str:
    return f"{a}.{d.one_of('cumsum', 'cumprod')}({d.axis(v.tensor)})"


def _cast(d: Drawing, a: str, v: Value) -> str:
    return f"{a}.to({d.one_of('f32', 'f16', 'bf16')})"


def _cast_to_integer(d: Drawing, a: str, v: Value) -> str:
    """Floats are first moved into the range: outside it the result is not defined."""
    x = f"{a}.nan_to_num().clamp(-99, 99)" if v.tensor.is_floating_point() else a
    return f"{x}.to({d.one_of('i64', 'i32', 'boolean')})"


EXACT = ("-$", "$.abs()", "F.relu($)", "$.square()", "F.leaky_relu($)", "F.relu6($)", "$.sqrt()", "$.reciprocal()")
CURVES = ("exp", "tanh", "sigmoid", "erf", "sin", "cos", "rsqrt", "log1p", "expm1", "atan", "log2", "sinh", "exp2")
GATES = ("silu", "gelu", "softplus", "hardswish", "mish", "elu", "hardsigmoid", "logsigmoid", "selu")
STEPS = ("floor", "ceil", "round", "trunc", "sign", "isnan", "isinf", "signbit", "logical_not", "frac")

RULES: dict[str, Rule] = {
    "unary": Rule(_texts(*EXACT), is_float),
    "curve": Rule(
        _texts(*(f"$.{c}()" for c in CURVES), *(f"F.{g}($)" for g in GATES), "$ ** 3", "$ ** 0.5"),
        is_float,
        rounds=True,
    ),
    "step": Rule(_texts(*(f"$.{s}()" for s in STEPS)), is_float, jumps=True),
    "integer": Rule(
        _texts("-$", "$.abs()", "$ ** 2", "$.sign()", "~$", "$ & 3", "$ | 1", "$ ^ 5", "$ >> 1", "$ << 2"), is_integer
    ),
    "bool": Rule(_texts("~$", "$.logical_not()", "$ & ~$", "$ ^ True"), lambda a: a.dtype is torch.bool),
    "binary": Rule(_binary),
    "scalar": Rule(_scalar, is_number),
    "compare": Rule(_compare, jumps=True),
    "where": Rule(_where, jumps=True),
    "divide": Rule(_divide, is_number, jumps=True),
    "permute": Rule(_permute, rank(2)),
    "reshape": Rule(_reshape, has_axis),
    "slice": Rule(_slice, has_axis),
    "place": Rule(_place, has_axis),
    "square": Rule(_square, rank(2)),
    "join": Rule(_join, has_axis),
    "pad": Rule(_pad, has_axis),
    "edge": Rule(_pad_by_edge, floats(3, 4)),
    "sum": Rule(_reduce("sum", "mean", "amax", "amin", "var", "std"), floats(0), rounds=True),
    "count": Rule(_reduce("sum", "amax", "amin"), is_integer),
    "all": Rule(_reduce("any", "all"), jumps=True),
    "along": Rule(_reduce_one("max.values", "min.values", "prod"), floats(1), rounds=True),
    "position": Rule(
        _reduce_one("argmax", "argmin", "max.indices", "min.indices"),
        lambda a: is_number(a) and a.dim() > 0,
        jumps=True,
    ),
    "matmul": Rule(_matmul, floats(1), rounds=True),
    "convolve": Rule(_convolve, floats(3, 4), rounds=True),
    "pool": Rule(_pool, floats(3, 4), rounds=True),
    "norm": Rule(_normalise, floats(1), rounds=True),
    "gather": Rule(_gather, lambda a: has_axis(a) and a.numel() > 0),
    "scatter": Rule(_scatter, lambda a: has_axis(a) and is_number(a) and a.numel() > 0, rounds=True),
    "order": Rule(_order, lambda a: has_axis(a) and is_number(a), jumps=True),
    "scan": Rule(_scan, lambda a: has_axis(a) and is_number(a), rounds=True),
    "cast": Rule(_cast),
    "to_integer": Rule(_cast_to_integer, jumps=True),
}


@st.composite
def shapes(draw: Draw) -> tuple[int, ...]:
    """Ranks 0 to 4; an empty axis is rare, as all is empty after it."""
    size = st.sampled_from((3, 2, 5, 1, 7, 11, 17))
    ranks = draw(st.sampled_from((2, 3, 1, 4, 0)))
    shape = [draw(size) for _ in range(ranks)]
    if ranks and draw(st.integers(0, 19)) == 19:
        shape[draw(st.integers(0, ranks - 1))] = 0
    return tuple(shape) if math.prod(shape) <= LARGEST // 4 else tuple(min(s, 5) for s in shape)


@st.composite
def inputs(draw: Draw) -> Input:
    """One input."""
    dtype = draw(st.sampled_from((torch.float32, *DTYPES)))
    return Input(
        draw(shapes()),
        dtype,
        draw(st.sampled_from(LAYOUTS)),
        draw(st.integers(0, 3)) == 3,
        draw(st.integers(0, 2**16)),
    )


@st.composite
def graphs(draw: Draw) -> Graph:
    """A chain of two to six lines over one or two inputs, with at least the last value as a result."""
    given = [draw(inputs()) for _ in range(draw(st.integers(1, 2)))]
    d = Drawing(draw)
    d.values = [Value(f"v{i}", x.make(), True) for i, x in enumerate(given)]
    for _ in range(draw(st.integers(2, 6))):
        last = d.values[-1]
        a = d.one_of(last, last, last, *reversed(d.values))
        fitting = [n for n, rule in RULES.items() if rule.takes(a.tensor) and (a.exact or not rule.jumps)]
        d.add(RULES[d.one_of(*fitting)], a)
    computed = [v.name for v in d.values[len(given) :]]
    results = tuple(dict.fromkeys((computed[-1], d.one_of(*computed))))
    text = "\n".join(d.lines)
    weights = tuple(w for w in d.weights if re.search(rf"\b{w.name}\b", text))
    sizes = ()
    if given[0].shape and given[0].shape[0] > 1 and draw(st.integers(0, 3)) == 3:
        sizes = (draw(st.integers(1, 20)),)
    return Graph(tuple(given), tuple(d.lines), results, weights, sizes)


__all__ = ["RULES", "SPELLED", "graphs"]
