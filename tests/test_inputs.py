"""Bad input to compile and to a compiled model: a clear error or a correct result, never a crash."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import planish
from planish import Dim
from planish.errors import DimError, InputError, ModelStateError, PlanishError


class Tiny(torch.nn.Module):
    """Embedding, a projection of x, their masked sum: three inputs that share dims."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(30, 24)
        self.project = torch.nn.Linear(10, 24)

    def forward(self, ids: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.tanh(self.table(ids) + self.project(x))
        return out if mask is None else torch.where(mask[:, :, None], out, 0.0)


DYNAMIC = {
    "ids": {0: Dim("batch", 1, 8), 1: Dim("seq", 2, 16)},
    "x": {0: Dim("batch", 1, 8), 1: Dim("seq", 2, 16)},
    "mask": {0: Dim("batch", 1, 8), 1: Dim("seq", 2, 16)},
}


def example(batch: int = 3, seq: int = 5) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(batch * 100 + seq)
    return {
        "ids": torch.randint(0, 30, (batch, seq), generator=g),
        "x": torch.randn(batch, seq, 10, generator=g),
        "mask": torch.rand(batch, seq, generator=g) > 0.3,
    }


@pytest.fixture(scope="module")
def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture(scope="module")
def compiled(model: Tiny) -> planish.CompiledModel:
    return planish.compile(model, example(), dynamic=DYNAMIC)


def same(cm: planish.CompiledModel, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        torch.testing.assert_close(cm(**inputs), model(**inputs), rtol=1e-5, atol=2e-6)


# Calls that must be refused: what to change in the inputs, the error, and words that its message must have.
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], type[PlanishError], tuple[str, ...]]] = {
    "dtype": (lambda i: i | {"x": i["x"].double()}, InputError, ("'x'", "float64", "float32")),
    "half": (lambda i: i | {"x": i["x"].half()}, InputError, ("'x'", "float16", "float32")),
    "int32_ids": (lambda i: i | {"ids": i["ids"].int()}, InputError, ("'ids'", "int32", "int64")),
    "int_mask": (lambda i: i | {"mask": i["mask"].long()}, InputError, ("'mask'", "int64", "bool")),
    "rank_low": (lambda i: i | {"x": i["x"][0]}, InputError, ("'x'", "[5, 10]")),
    "rank_high": (lambda i: i | {"x": i["x"][None]}, InputError, ("'x'", "[1, 3, 5, 10]")),
    "fixed_size": (lambda i: i | {"x": i["x"][:, :, :9]}, InputError, ("'x'", "size 9", "axis 2", "10")),
    "over_bound": (lambda i: example(3, 17), DimError, ("'seq'", "17", "2..16")),
    "under_bound": (lambda i: example(3, 1), DimError, ("'seq'", "is 1", "2..16")),
    "batch_over": (lambda i: example(9, 5), DimError, ("'batch'", "9", "1..8")),
    "empty_batch": (lambda i: example(0, 5), DimError, ("'batch'", "is 0", "1..8")),
    "unequal": (lambda i: i | {"x": example(2, 5)["x"]}, DimError, ("batch", "3", "2", "'x'")),
    "meta": (lambda i: i | {"x": i["x"].to("meta")}, InputError, ("'x'", "meta", "CPU")),
    "sparse": (lambda i: i | {"x": i["x"].to_sparse()}, InputError, ("'x'", "sparse")),
    "grad": (lambda i: i | {"x": i["x"].requires_grad_()}, ModelStateError, ("'x'", "requires grad", "detach")),
    "list": (lambda i: i | {"x": i["x"].tolist()}, InputError, ("structure", "x")),
    "numpy": (lambda i: i | {"x": i["x"].numpy()}, InputError, ("'x'", "tensor", "ndarray")),
    "number": (lambda i: i | {"x": 1.0}, InputError, ("'x'", "tensor", "float")),
    "none": (lambda i: i | {"x": None}, InputError, ("'x'", "tensor", "None")),
    "missing": (lambda i: {n: i[n] for n in ("ids", "mask")}, InputError, ("structure", "x")),
    "missing_optional": (lambda i: {n: i[n] for n in ("ids", "x")}, InputError, ("structure", "mask")),
    "extra": (lambda i: i | {"y": i["x"]}, InputError, ("y",)),
    "token_beyond": (lambda i: i | {"ids": i["ids"].clone().fill_(30)}, InputError, ("index", "token id")),
    "token_negative": (lambda i: i | {"ids": i["ids"] - 100}, InputError, ("index", "token id")),
    "token_minus_one": (lambda i: i | {"ids": i["ids"] * 0 - 1}, InputError, ("index", "token id")),
    "token_huge": (lambda i: i | {"ids": i["ids"] + (1 << 32)}, InputError, ("index", "token id")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, compiled: planish.CompiledModel, model: Tiny) -> None:
    change, kind, words = REFUSED[case]
    with pytest.raises(PlanishError) as caught:
        compiled(**change(example()))
    assert type(caught.value) is kind
    assert [word for word in words if word not in str(caught.value)] == []
    same(compiled, model, example())  # a refused call leaves nothing behind


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy whose address is one element off every multiple of 64 bytes."""
    items = tensor.numpy()
    raw = np.empty(items.nbytes + 64 + items.itemsize, dtype=np.uint8)
    start = -raw.ctypes.data % 64 + items.itemsize
    view = raw[start : start + items.nbytes].view(items.dtype).reshape(items.shape)
    view[...] = items
    found = torch.from_numpy(view)
    assert found.data_ptr() % 64 == items.itemsize
    return found


# Calls in unusual layouts that must give what eager gives.
ACCEPTED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as_is": lambda t: t,
    "unaligned": unaligned,
    "slice_of_larger": lambda t: torch.cat([t, t, t])[1 : 1 + t.shape[0]],
    "odd_slice": lambda t: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every_second": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "negative_bit": lambda t: torch.zeros_like(t) if t.dtype is torch.bool else torch._neg_view(-t),
    "inference": lambda t: torch.zeros(t.shape, dtype=t.dtype).copy_(t),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(case: str, compiled: planish.CompiledModel, model: Tiny) -> None:
    inputs = {name: ACCEPTED[case](t) for name, t in example(4, 7).items()}
    same(compiled, model, inputs)


def test_by_position_and_in_inference_mode(compiled: planish.CompiledModel, model: Tiny) -> None:
    inputs = example(2, 9)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(*inputs.values()), model(*inputs.values()), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(
            compiled(inputs["ids"], x=inputs["x"], mask=inputs["mask"]), model(**inputs), rtol=1e-5, atol=2e-6
        )


def test_outputs_need_no_grad_and_are_contiguous(compiled: planish.CompiledModel) -> None:
    out = compiled(**example())
    assert not out.requires_grad
    assert out.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_tensors(shape: tuple[int, int]) -> None:
    """A fixed size of 0 gives eager's empty result."""

    class Add(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, x.reshape(-1) * 2

    model = Add().eval()
    x = torch.zeros(shape)
    got = planish.compile(model, (x,))(x)
    assert [t.shape for t in got] == [t.shape for t in model(x)]


# compile() itself ----------------------------------------------------------------------------------------------------


def compile_with(model: torch.nn.Module, **changes: Any) -> planish.CompiledModel:
    return planish.compile(model, **({"inputs": example(), "dynamic": DYNAMIC} | changes))


def test_training_mode() -> None:
    with pytest.raises(ModelStateError, match=r"training mode(.|\n)*model\.eval\(\)"):
        compile_with(Tiny())
    partly = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()).eval()
    partly[1].train()
    with pytest.raises(ModelStateError, match="'1'"):
        planish.compile(partly, (torch.zeros(1, 2),))


def test_example_requires_grad(model: Tiny) -> None:
    with pytest.raises(ModelStateError, match=r"'x' requires grad(.|\n)*detach"):
        compile_with(model, inputs=example() | {"x": torch.zeros(3, 5, 10, requires_grad=True)})


def test_example_on_another_device(model: Tiny) -> None:
    with pytest.raises(InputError, match="'x' is on meta"):
        compile_with(model, inputs=example() | {"x": torch.zeros(3, 5, 10, device="meta")})


def test_parameter_or_buffer_on_another_device() -> None:
    other = Tiny().eval()
    other.project.to("meta")
    with pytest.raises(ModelStateError, match=r"'project\.weight' is on meta(.|\n)*model\.cpu\(\)"):
        compile_with(other)
    norm = torch.nn.BatchNorm1d(4).eval()
    norm.running_mean = norm.running_mean.to("meta")
    with pytest.raises(ModelStateError, match="'running_mean' is on meta"):
        planish.compile(norm, (torch.zeros(2, 4),))


BAD_DIMS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "bare_string": ({"x": {0: "batch"}}, ("dynamic['x'][0]", "'batch'", "planish.Dim('batch', 1, 256)")),
    "number": ({"x": {0: 8}}, ("dynamic['x'][0]", "8", "planish.Dim")),
    "torch_dim": ({"x": {0: torch.export.Dim("batch")}}, ("dynamic['x'][0]", "planish.Dim")),
    "unknown_input": ({"y": {0: Dim("batch", 1, 8)}}, ("'y'", "ids, mask, x")),
    "axis": ({"x": {3: Dim("batch", 1, 8)}}, ("axis 3", "[3, 5, 10]")),
    "negative_axis": ({"x": {-1: Dim("batch", 1, 16)}}, ("axis -1", "[3, 5, 10]")),
    "example_over": ({"x": {0: Dim("batch", 1, 2)}}, ("'x'", "size 3", "axis 0", "1..2")),
    "example_under": ({"x": {0: Dim("batch", 4, 8)}}, ("'x'", "size 3", "axis 0", "4..8")),
    "two_ranges": ({"x": {0: Dim("b", 1, 8)}, "ids": {0: Dim("b", 1, 9)}}, ("'b'", "two ranges")),
    "two_sizes": ({"x": {0: Dim("b", 1, 8), 1: Dim("b", 1, 8)}}, ("'b'", "sizes")),
}


@pytest.mark.parametrize("case", BAD_DIMS)
def test_bad_dims(case: str, model: Tiny) -> None:
    dynamic, words = BAD_DIMS[case]
    with pytest.raises(DimError) as caught:
        compile_with(model, dynamic=dynamic)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("dynamic", ["batch", {"x": "batch"}, {"x": Dim("batch", 1, 8)}, {"x": ["batch"]}])
def test_dims_that_are_no_mapping(dynamic: Any, model: Tiny) -> None:
    """A bare string for all of an input's axes, or for everything."""
    with pytest.raises(DimError, match=r"planish\.Dim\("):
        compile_with(model, dynamic=dynamic)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("b", 0, 4), ("b", 5, 4), ("b", -1, 4), ("no name", 1, 4), (3, 1, 4)]
)
def test_bad_dim(name: Any, low: int, high: int) -> None:
    with pytest.raises(DimError):
        Dim(name, low, high)


@pytest.mark.parametrize("inputs", [torch.zeros(3), 3, "x"], ids=["tensor", "number", "string"])
def test_inputs_that_are_no_tuple(inputs: Any) -> None:
    """A lone tensor is a frequent slip; taken as a tuple it would be its rows."""
    with pytest.raises(InputError, match=r"inputs(.|\n)*tuple"):
        planish.compile(torch.nn.Tanh().eval(), inputs)


def test_model_that_is_none() -> None:
    with pytest.raises(InputError, match=r"model(.|\n)*nn\.Module"):
        planish.compile(lambda x: x, (torch.zeros(3),))  # pyright: ignore


def test_not_compiled_yet(model: Tiny) -> None:
    cm = planish.compile(model)
    for use in (cm.report, cm.sources, lambda: cm.memory(example()), lambda: cm.steps):
        with pytest.raises(InputError, match="not compiled yet"):
            use()
