"""Capture: what models may look like, what the graph looks like then, and what is refused."""

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import planish
from planish import Dim
from planish.capture import capture
from planish.errors import CaptureError, DimError, InputError, UnsupportedOpsError
from planish.ops import aten

BATCH, SEQ = Dim("batch", 1, 8), Dim("seq", 1, 16)
Tensors = tuple[torch.Tensor, ...]


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


class Two(torch.nn.Module):
    """Two inputs of the same sizes."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x + y).softmax(-1)


TWO_DIMS = {"x": {0: BATCH, 1: SEQ}, "y": {0: BATCH, 1: SEQ}}


# Dynamic dims --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [(1, 1), (1, 5), (3, 5), (8, 16)], ids=str)
def test_dynamic_by_name(example: tuple[int, int]) -> None:
    """Whatever the example's sizes are, 1 among them, every size in range works."""
    model = Two().eval()
    x = torch.randn(*example, 6)
    cm = planish.compile(model, (x, x), dynamic=TWO_DIMS, passes=[])
    for batch, seq in ((1, 1), (1, 16), (8, 1), (2, 3), (8, 16)):
        a, b = torch.randn(batch, seq, 6), torch.randn(batch, seq, 6)
        close(cm(a, b), model(a, b))
    program, _ = capture(model, (x, x), TWO_DIMS)
    assert [str(s) for s in program.inputs] == ["x: float32[batch, seq, 6]", "y: float32[batch, seq, 6]"]
    assert [str(s).split(": ")[1] for s in program.outputs] == ["float32[batch, seq, 6]"]
    assert program.dims == {"batch": BATCH, "seq": SEQ}
    assert [t.shape for t in program.example] == [x.shape, x.shape]


def test_one_tensor_passed_twice() -> None:
    """Examples that are one object, or the model's own buffer, are different inputs all the same."""

    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(3))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x - 2 * y + self.table

    model = Shared().eval()
    for example in ((model.table, model.table), (torch.zeros(3),) * 2):
        a, b = torch.randn(3), torch.randn(3)
        close(planish.compile(model, example, passes=[], cache=False)(a, b), model(a, b))


def test_equal_sizes_stay_two_dims() -> None:
    model = Two().eval()
    x = torch.randn(4, 4, 6)
    cm = planish.compile(model, (x, x), dynamic=TWO_DIMS)
    a = torch.randn(2, 9, 6)
    close(cm(a, a), model(a, a))


def test_a_range_of_one_size_is_static() -> None:
    program, _ = capture(Two().eval(), (torch.randn(3, 2),) * 2, {"x": {0: Dim("b", 3, 3)}})
    assert program.dims == {}
    assert program.inputs[0].shape == (3, 2)


def test_sizes_in_the_result() -> None:
    """Outputs whose size is arithmetic on dims, and an int made of them."""

    class Sizes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
            return x.reshape(-1) + 1, x.shape[0] * x.shape[1], x.shape[1] + 2

    cm = planish.compile(Sizes().eval(), (torch.zeros(2, 3),), dynamic={"x": {0: BATCH, 1: SEQ}}, passes=[])
    flat, product, longer = cm(torch.zeros(5, 7))
    assert (flat.shape, product, longer) == ((35,), 35, 9)
    assert type(product) is int


def test_fixed_dim_is_named() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(3, -1) + torch.ones(3, 10)

    with pytest.raises(CaptureError, match="batch"):
        planish.compile(Fixed().eval(), (torch.zeros(3, 10),), dynamic={"x": {0: BATCH}})


def test_another_path_at_size_one() -> None:
    """A graph that is right for every size but 1 is refused, not wrong."""

    class Squeezes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.squeeze(0) * 2

    class Branches(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[0] == 1 else x + 1

    for model in (Squeezes(), Branches()):
        with pytest.raises(CaptureError, match=r"size 1(.|\n)*start the range of batch at 2"):
            planish.compile(model.eval(), (torch.randn(3, 4),), dynamic={"x": {0: BATCH}}, passes=[])
        cm = planish.compile(model.eval(), (torch.ones(3, 4),), dynamic={"x": {0: Dim("batch", 2, 8)}}, passes=[])
        x = torch.randn(5, 4)
        close(cm(x), model(x))


# How models are called -----------------------------------------------------------------------------------------------


class Nested(torch.nn.Module):
    """Dicts, tuples and lists in and out, with constants among them."""

    def forward(
        self, pair: tuple[torch.Tensor, torch.Tensor], more: dict[str, Any], *, factor: float = 2.0, mode: str = "add"
    ) -> dict[str, Any]:
        a, b = pair
        c = a + b if mode == "add" else a - b
        return {
            "sum": c * factor,
            "nested": (more["z"] - 1, [a * more["k"], None]),
            "rows": a.shape[0],
            "mode": mode,
            "same": c,
        }


def nested_call(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    g = torch.Generator().manual_seed(batch)
    pair = (torch.randn(batch, 3, generator=g), torch.randn(batch, 3, generator=g))
    return (pair, {"z": torch.randn(2, generator=g), "k": 3}), {"factor": 0.5}


@pytest.fixture(scope="module")
def nested() -> planish.CompiledModel:
    (pair, more), options = nested_call(3)
    dynamic = {"pair.0": {0: BATCH}, "pair.1": {0: BATCH}}
    return planish.compile(Nested().eval(), {"pair": pair, "more": more, **options}, dynamic=dynamic, passes=[])


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_nested_structures(batch: int, nested: planish.CompiledModel) -> None:
    args, kwargs = nested_call(batch)
    want = Nested()(*args, **kwargs)
    got = nested(*args, **kwargs)
    assert got.keys() == want.keys()
    assert (got["rows"], got["mode"], got["nested"][1][1]) == (batch, "add", None)
    assert isinstance(got["nested"], tuple)
    assert isinstance(got["nested"][1], list)
    close(
        [got["sum"], got["same"], got["nested"][0], got["nested"][1][0]],
        [want["sum"], want["same"], want["nested"][0], want["nested"][1][0]],
    )


def test_constants_must_not_change(nested: planish.CompiledModel) -> None:
    (pair, more), kwargs = nested_call(3)
    with pytest.raises(InputError, match=r"'more\.k' is 4 \(int\)(.|\n)*captured with 3(.|\n)*constants"):
        nested(pair, more | {"k": 4}, **kwargs)
    with pytest.raises(InputError, match=r"'factor' is 0\.25"):
        nested(pair, more, factor=0.25)
    with pytest.raises(InputError, match=r"'factor' is a float32 tensor"):
        nested(pair, more, factor=torch.tensor(0.5))
    with pytest.raises(InputError, match="structure"):
        nested(pair, more)  # the default is another value than the captured one
    with pytest.raises(InputError, match=r"structure|mode"):
        nested(pair, more, mode="sub", **kwargs)
    with pytest.raises(InputError, match="structure"):
        nested(list(pair), more, **kwargs)


def test_star_arguments() -> None:
    class Stars(torch.nn.Module):
        def forward(
            self, first: torch.Tensor, /, second: torch.Tensor, *rest: torch.Tensor, **named: torch.Tensor
        ) -> torch.Tensor:
            total = first - second
            for i, t in enumerate(rest):
                total = total + (i + 2) * t
            return total * named["scale"] / named["by"]

    model = Stars().eval()
    x = [torch.randn(2, 3) for _ in range(15)]  # eleven in *rest: rest.10 sorts after rest.9
    args, named = x[:13], {"by": x[13].exp(), "scale": x[14]}
    cm = planish.compile(_Partial(model), (x[0], x[1]), passes=[])
    close(cm(x[0], x[1]), model(x[0], x[1], scale=torch.ones(1), by=torch.ones(1)))

    class Rest(torch.nn.Module):
        def forward(self, first: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            return first + sum((i + 2) * t for i, t in enumerate(rest))

    rest = Rest().eval()
    close(planish.compile(rest, tuple(args), passes=[])(*args), rest(*args))

    class Named(torch.nn.Module):
        def forward(self, x: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
            return x * named["scale"] / named["by"]

    keywords = Named().eval()
    inputs = {"x": x[0], **named}
    cm = planish.compile(keywords, inputs, dynamic={n: {0: BATCH} for n in inputs}, passes=[])
    longer = {n: torch.cat([t, t]) for n, t in inputs.items()}
    close(cm(**longer), keywords(**longer))
    close(cm(longer["x"], scale=longer["scale"], by=longer["by"]), keywords(**longer))


class _Partial(torch.nn.Module):
    """Calls a model with star arguments, some of them of its own."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.inner(a, b, scale=torch.ones(1), by=torch.ones(1))


def test_capture_at_the_first_call() -> None:
    model = Two().eval()
    cm = planish.compile(model, dynamic=TWO_DIMS)
    assert "compiled at the first call" in repr(cm)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    close(cm(x, y), model(x, y))
    assert "float32[batch, seq]" in repr(cm)
    x = torch.randn(2, 9)
    close(cm(y=x, x=x), model(x, x))
    by_name = planish.compile(model)
    close(by_name(x=x, y=x), model(x, x))


def test_first_call_that_mixes_positions_and_names() -> None:
    model = Two().eval()
    x = torch.randn(2, 9)
    cm = planish.compile(model)
    with pytest.raises(InputError, match=r"first call mixes(.|\n)*all tensors by position"):
        cm(x, y=x)
    close(cm(x, x), model(x, x))
    close(cm(x, y=x), model(x, x))


def test_exported_program() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU()).eval()
    b = torch.export.Dim("b", min=1, max=16)
    exported = torch.export.export(model, (torch.randn(3, 4),), dynamic_shapes=({0: b},))
    cm = planish.compile(exported, (torch.randn(3, 4),), passes=[])
    for n in (1, 3, 16):
        x = torch.randn(n, 4)
        close(cm(x), model(x))
    with pytest.raises(DimError, match=r"17(.|\n)*16"):
        cm(torch.randn(17, 4))


def test_weights_changed_later_are_not_seen() -> None:
    model = torch.nn.Linear(4, 3).eval()
    x = torch.randn(2, 4)
    cm, want = planish.compile(model, (x,)), model(x).detach()
    with torch.no_grad():
        model.weight.zero_()
    close(cm(x), want)
    again = planish.compile(model, (x,))
    close(again(x), model(x).detach())


def test_reuse_sees_every_change() -> None:
    """An equal compile is reused; a changed weight, plain attribute, constant, dim or pass list is not."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = 2.0
            self.table = torch.ones(3000)  # no buffer; its repr is shortened

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor + self.table

    model = Scaled().eval()
    x = torch.randn(2, 3000)

    def fresh(**options: Any) -> object:
        return planish.compile(model, (x,), **options)._compiled

    first = fresh()
    assert fresh() is first
    assert fresh(cache=False) is not first
    model.factor = 3.0
    assert fresh() is not first
    close(planish.compile(model, (x,))(x), x * 3 + 1)
    model.table[1500] = 7.0
    close(planish.compile(model, (x,))(x), model(x))
    last = fresh()
    assert fresh(passes=[]) is not last
    assert fresh(dynamic={"x": {0: BATCH}}) is not last


@dataclass
class Output:
    """A result class of the user's."""

    value: torch.Tensor
    double: torch.Tensor | None = None


def test_dataclass_output() -> None:
    torch.export.register_dataclass(Output, serialized_type_name="test_capture.Output")

    class Makes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Output:
            return Output(x + 1)

    x = torch.randn(3)
    got = planish.compile(Makes().eval(), (x,), passes=[])(x)
    assert isinstance(got, Output)
    assert got.double is None
    close(got.value, x + 1)


@pytest.mark.needs_weights
def test_transformers_model_output() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = BertModel(config).eval()
    g = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(0, 50, (2, 7), generator=g),
        "attention_mask": torch.ones(2, 7, dtype=torch.int64),
    }
    inputs["attention_mask"][1, 4:] = 0
    cm = planish.compile(model, inputs, dynamic={n: {0: BATCH, 1: SEQ} for n in inputs}, padding="exact")
    with torch.no_grad():
        want, got = model(**inputs), cm(**inputs)
    assert type(got) is type(want)
    assert got.keys() == want.keys()
    close(got.last_hidden_state, want.last_hidden_state)
    close(got[1], want.pooler_output)


# Inputs and outputs of every kind ------------------------------------------------------------------------------------


def test_kinds_of_inputs_and_outputs() -> None:
    """Bool and integer tensors in and out; inputs, constants and views as outputs; one tensor returned twice."""

    class Kinds(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(6.0))

        def forward(self, flags: torch.Tensor, ids: torch.Tensor, x: torch.Tensor, unused: torch.Tensor) -> Tensors:
            total = ids + flags.long()
            return (
                flags,
                total,
                torch.logical_not(flags),
                x,
                self.table,
                x.reshape(-1),
                x.t(),
                total,
                ids.to(torch.int32),
            )

    model = Kinds().eval()
    inputs = (torch.tensor([[True, False]]), torch.tensor([[1 << 40, -3]]), torch.randn(3, 2), torch.zeros(1))
    for passes in ([], None):
        cm = planish.compile(model, inputs, passes=passes)
        got, want = cm(*inputs), model(*inputs)
        torch.testing.assert_close(list(got), list(want), rtol=0, atol=0)
        pointers = [t.data_ptr() for t in got]
        assert not set(pointers) & {t.data_ptr() for t in (*inputs, model.table)}
        got[3].fill_(5)
        torch.testing.assert_close(list(cm(*inputs)), list(want), rtol=0, atol=0)


def test_model_without_tensor_work() -> None:
    class Same(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    x = torch.randn(3)
    assert torch.equal(planish.compile(Same().eval(), (x,))(x), x)


# What the graph looks like -------------------------------------------------------------------------------------------


def test_clean_graph() -> None:
    class Noisy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = torch.nn.Dropout(0.1)
            self.linear = torch.nn.Linear(6, 6)
            self.norm = torch.nn.LayerNorm(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.drop(self.linear(x)).to(torch.float32).contiguous()
            y = y.clone().view(x.shape[0], x.shape[1], 2, 3).transpose(1, 2).contiguous().view(x.shape[0], 2, -1)
            y = F.gelu(y).detach() + F.silu(y)
            y += 1.0
            unused = y.exp()  # noqa: F841
            heads = y.reshape(x.shape[0], 2, x.shape[1], 3)
            out = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.0)
            return self.norm(out.transpose(1, 2).reshape(x.shape).softmax(-1))

    model = Noisy().eval()
    x = torch.randn(2, 3, 6)
    program, _ = capture(model, (x,), {"x": {0: BATCH, 1: SEQ}})
    targets = [n.target for n in program.nodes() if n.op == "call_function"]
    noise = {
        "clone",
        "contiguous",
        "detach",
        "dropout",
        "view",
        "_unsafe_view",
        "_assert_tensor_metadata",
        "_to_copy",
        "exp",
        "alias",
    }
    assert {str(t).split(".")[1] for t in targets} & noise == set()
    whole = {"linear", "scaled_dot_product_attention", "gelu", "silu", "softmax", "layer_norm", "reshape"}
    assert whole <= {str(t).split(".")[1] for t in targets}
    assert not any(t._schema.is_mutable for t in targets if hasattr(t, "_schema"))
    assert all(n.users or n.op in ("placeholder", "output") for n in program.nodes())
    assert {n.name for n in program.nodes() if n.op == "get_attr"} == {
        "linear_weight",
        "linear_bias",
        "norm_weight",
        "norm_bias",
    }
    close(program.run(x)[0], model(x))
    y = torch.randn(5, 4, 6)
    close(program.run(y)[0], model(y))


# Refusals ------------------------------------------------------------------------------------------------------------


class InPlace(torch.nn.Module):
    """Changes its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1)


class Branch(torch.nn.Module):
    """Control flow that depends on data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


@pytest.mark.parametrize(
    ("model", "words"),
    [(InPlace(), "x"), (Branch(), "data-dependent")],
    ids=["input", "branch"],
)
def test_refused_models(model: torch.nn.Module, words: str) -> None:
    with pytest.raises(CaptureError, match=words) as caught:
        planish.compile(model.eval(), (torch.ones(3),))
    assert "fix:" in str(caught.value)


class Unsupported(torch.nn.Module):
    """Two ops without kernels, and one for another reason."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.special.bessel_j0(x)  # bent here
        y = y + torch.special.bessel_y1(y)  # bent again
        return y + torch.view_as_real(torch.fft.fft(x))[..., 0]  # transformed here


def test_all_unsupported_ops_in_one_error() -> None:
    with pytest.raises(UnsupportedOpsError) as caught:
        planish.compile(Unsupported().eval(), (torch.randn(3, 4),))
    text = str(caught.value)
    lines, start = inspect.getsourcelines(Unsupported.forward)
    for op, comment in (
        ("bessel_j0", "bent here"),
        ("bessel_y1", "bent again"),
        ("complex64", "transformed here"),
        ("_fft_r2c", "transformed here"),
    ):
        number = start + next(i for i, line in enumerate(lines) if comment in line)
        assert op in text
        assert f"{__file__}:{number}" in text
        assert comment in text
    assert "'reference'" in text
    cm = planish.compile(Unsupported().eval(), (torch.randn(3, 4),), "reference")
    x = torch.linspace(0.1, 2, 12).view(3, 4)  # some of the functions have no value below 0
    close(cm(x), Unsupported()(x))


def test_weights_from_inputs_and_ops_of_several_results() -> None:
    class Weighted(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.linear(x, w)

    class Split(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = x.chunk(2, -1)
            return a * b

    for passes in ([], None):
        x, w = torch.randn(2, 6), torch.randn(4, 6)
        close(planish.compile(Weighted().eval(), (x, w), passes=passes)(x, w), Weighted()(x, w))
        close(planish.compile(Split().eval(), (x,), passes=passes)(x), Split()(x))


def test_reshape_not_view() -> None:
    program, _ = capture(torch.nn.Flatten().eval(), (torch.randn(2, 3, 4),))
    assert [n.target for n in program.nodes() if n.op == "call_function"] == [aten.reshape.default]


@pytest.mark.parametrize("other", "qkv")
def test_attention_broadcasts(other: str) -> None:
    """The kernel reads each operand for every (batch, head): a broadcast one is expanded first."""

    class Attend(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    inputs = {name: torch.randn(1 if name == other else 2, 2, 5, 16) for name in "qkv"}
    for passes in ([], None):
        compiled = planish.compile(Attend().eval(), inputs, passes=passes)
        close(compiled(**inputs), Attend()(**inputs))
