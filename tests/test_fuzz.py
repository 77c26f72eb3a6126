"""Random graphs against eager; with ``--hypothesis-profile=full`` (``make test-full``) 1,000 in each part."""

from collections.abc import Callable

import fuzz
import pytest
import torch
from fuzz_draw import graphs
from hypothesis import HealthCheck, given, reject, settings

from planish.errors import CaptureError, UnsupportedOpsError


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", [0, 1])
@given(graph=graphs())
@settings(derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_like_eager(part: int, graph: fuzz.Graph) -> None:
    """Every graph that exports is right, whatever its ops, shapes, dtypes and strides."""
    try:
        fuzz.check(graph)
    except (CaptureError, UnsupportedOpsError, fuzz.IllConditioned):
        reject()


@pytest.mark.parametrize(
    ("broken", "message"),
    [(lambda x: x * 1.001, "off by"), (lambda x: x / 0, "other places"), (lambda x: x[:1], "for torch.float32")],
)
def test_a_wrong_result_is_found(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    given = fuzz.Input((3, 5), torch.float32, "transposed", False, 1)
    graph = fuzz.Graph((given,), ("v1 = v0.exp()",), ("v1",), (), ())
    monkeypatch.setattr(fuzz.planish, "compile", lambda model, *_, **__: lambda *t: tuple(map(broken, model(*t))))
    with pytest.raises(AssertionError, match=message):
        fuzz.check(graph)
