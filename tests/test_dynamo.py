"""``torch.compile(..., backend="planish")``: graphs, constants, dynamic shapes, and errors that keep their class."""

import copy
import logging
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import planish
from planish import dynamo
from planish.errors import CaptureError, InputError, ModelStateError, UnsupportedOpsError


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=dynamo.backend, **options)


def _mlp() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Dropout(), torch.nn.Linear(32, 4)
    ).eval()


class Block(torch.nn.Module):
    """A transformer block with a mask buffer."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(2))
        self.up, self.down = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)
        self.register_buffer("shift", torch.full((width,), 0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, w = x.shape
        q, k, v = (
            self.qkv(self.norms[0](x))[..., i * w : (i + 1) * w].reshape(b, s, self.heads, -1).transpose(1, 2)
            for i in range(3)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, w))
        return x + self.down(F.gelu(self.up(self.norms[1](x)))) + self.shift


def test_the_entry_point_names_the_backend() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["torch_dynamo_backends"]["planish"].partition(":")
    assert getattr(import_module(module), name) is planish.dynamo.backend


def test_an_mlp_is_one_graph(caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = _mlp(), torch.randn(3, 16), torch.randn(3, 16)
    before = dynamo.graphs()
    with torch.inference_mode(), caplog.at_level(logging.INFO, "planish.dynamo"):
        compiled = _compiled(model)
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(y), model(y))
    assert dynamo.graphs() == before + 1
    assert [r.getMessage() for r in caplog.records if r.name == "planish.dynamo"] == [
        f"torch.compile made {before + 1} graph(s) so far; this one has 4 operators, 1 inputs and 4 constants"
    ]


def test_a_transformer_at_dynamic_shapes_is_one_graph() -> None:
    torch.manual_seed(1)
    model = Block().eval()
    before = dynamo.graphs()
    with torch.no_grad():
        compiled = _compiled(model, dynamic=True)
        for shape in ((2, 7), (5, 33), (3, 8)):
            x = torch.randn(*shape, 32)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert dynamo.graphs() == before + 1


def test_a_size_beyond_the_bound_compiles_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo, "SMALLEST_BOUND", 8)
    model = _mlp()
    with torch.no_grad():
        compiled = _compiled(model, dynamic=True)
        for rows in (3, 100, 5):
            x = torch.randn(rows, 16)
            torch.testing.assert_close(compiled(x), model(x))


def test_a_graph_break_makes_two_graphs() -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x).relu()
            torch._dynamo.graph_break()
            return self.second(y)

    model, x = Broken().eval(), torch.randn(5, 8)
    before = dynamo.graphs()
    with torch.no_grad():
        torch.testing.assert_close(_compiled(model)(x), model(x))
    assert dynamo.graphs() == before + 2


def test_outputs_may_be_sizes_and_structures() -> None:
    class Named(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
            return {"sum": x + y, "rows": x.shape[0], "pair": (x * 2, y.reshape(-1))}

    model = Named().eval()
    with torch.no_grad():
        compiled = _compiled(model, dynamic=True)
        for rows in (3, 6):
            x, y = torch.randn(rows, 4), torch.randn(rows, 4)
            torch.testing.assert_close(compiled(x, y=y), model(x, y))


def test_other_weights_are_not_taken_for_the_bound_ones() -> None:
    def apply(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x)

    one = torch.nn.Linear(8, 8).eval()
    two = copy.deepcopy(one)
    x = torch.randn(4, 8)
    compiled = _compiled(apply)
    with torch.no_grad():
        two.weight += 1
        for model in (one, two, one):
            torch.testing.assert_close(compiled(model, x), model(x))
        one.bias.mul_(3)
        torch.testing.assert_close(compiled(one, x), one(x))


def test_training_is_refused_with_our_error() -> None:
    model, x = _mlp(), torch.randn(3, 16)
    with pytest.raises(ModelStateError, match=r"asks for gradients[\s\S]*inference_mode"):
        _compiled(model)(x)
    with torch.no_grad(), pytest.raises(ModelStateError, match=r"training=True[\s\S]*model\.eval\(\)"):
        _compiled(copy.deepcopy(model).train())(x)
    with torch.no_grad():
        torch.testing.assert_close(_compiled(model)(x), model(x))


def test_a_number_that_varies_is_refused_and_a_fixed_one_compiles() -> None:
    def scaled(x: torch.Tensor, n: int) -> torch.Tensor:
        return x * n

    x = torch.randn(3, 4)
    with torch.no_grad():
        with pytest.raises(InputError, match=r"'l_n_' is a number that varies[\s\S]*dynamic=False"):
            _compiled(scaled, dynamic=True)(x, 7)
        torch._dynamo.reset()
        torch.testing.assert_close(_compiled(scaled, dynamic=False)(x, 7), x * 7)


def test_unsupported_operators_keep_their_class_and_list() -> None:
    def strange(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(x)[1] + torch.fft.fft(x).abs()

    with torch.no_grad(), pytest.raises(UnsupportedOpsError) as caught:
        _compiled(strange)(torch.eye(4))
    assert {"aten.linalg_qr.default", "aten._fft_r2c.default"} <= {op.op for op in caught.value.ops}


def test_the_fallback_is_an_option_and_no_other() -> None:
    def strange(x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x * 2) + 1

    x = torch.randn(4, 4)
    with torch.no_grad():
        torch.testing.assert_close(_compiled(strange, options={"fallback": "eager"})(x), strange(x))
        torch._dynamo.reset()
        with pytest.raises(InputError, match=r"'speed'[\s\S]*\"fallback\""):
            _compiled(strange, options={"speed": 9})(x)


def test_an_input_that_requires_grad_runs_without_gradients() -> None:
    model, x = _mlp(), torch.randn(3, 16, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(_compiled(model)(x), model(x))


# Models that write to their buffers ----------------------------------------------------------------------------------


class Recorder(torch.nn.Module):
    """Writes to a cache, counts, keeps the last row, and returns a buffer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(2, 8, 4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("turned", torch.zeros(4, 3).t())
        self.loose = torch.zeros(4)

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.cache.index_copy_(1, at, x)
        self.count += 1
        self.turned.add_(x[0])
        self.loose.copy_(x[0, 0])
        return self.cache.sum(1) + self.count, self.turned


def test_buffers_are_written_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the module is the same object with eager's new value, and nothing is compiled again for it."""
    model = Recorder().eval()
    eager = copy.deepcopy(model)
    before = {name: id(tensor) for name, tensor in model.named_buffers()}
    compiles: list[Any] = []
    compile_once = planish.api.compile
    monkeypatch.setattr(dynamo.api, "compile", lambda *a, **k: compiles.append(a) or compile_once(*a, **k))
    with torch.no_grad():
        compiled = _compiled(model)
        for step in range(4):
            x, at = torch.randn(2, 1, 4), torch.tensor([step])
            version = model.cache._version
            got, want = compiled(x, at), eager(x, at)
            torch.testing.assert_close(got, want)
            assert model.cache._version > version, "whoever keeps the buffer's values must see that they changed"
            if step == 2:
                model.cache.zero_()
                eager.cache.zero_()
            for name, tensor in eager.named_buffers():
                torch.testing.assert_close(model.get_buffer(name), tensor)
            torch.testing.assert_close(model.loose, eager.loose)
    assert {name: id(tensor) for name, tensor in model.named_buffers()} == before
    assert got[1] is model.turned
    assert len(compiles) == 1


def test_an_input_may_be_a_buffer_that_is_written() -> None:
    class Feedback(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("h", torch.ones(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.h.copy_(x.flip(0) * 2)
            return self.h + 1

    model = Feedback().eval()
    model.h.copy_(torch.randn(4, 4))
    eager = copy.deepcopy(model)
    with torch.inference_mode():
        compiled = _compiled(model)
        for _ in range(3):
            torch.testing.assert_close(compiled(model.h), eager(eager.h))
            torch.testing.assert_close(model.h, eager.h)


def test_a_later_graph_sees_what_an_earlier_one_wrote() -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.add_(x)
            torch._dynamo.graph_break()
            return self.total * 2

    model = Broken().eval()
    eager = copy.deepcopy(model)
    with torch.no_grad():
        compiled = _compiled(model)
        for _ in range(3):
            x = torch.randn(4)
            torch.testing.assert_close(compiled(x), eager(x))


def test_writing_to_an_input_is_refused() -> None:
    with torch.no_grad(), pytest.raises(CaptureError, match="writes to its input"):
        _compiled(lambda x: x.add_(1) * 2)(torch.zeros(4))
