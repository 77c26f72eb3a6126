"""Random graphs against eager; with ``--hypothesis-profile=full`` (``make test-full``) 1,000 in each part."""

import fuzz
import pytest
from fuzz_draw import graphs
from hypothesis import HealthCheck, given, reject, settings

from planish.errors import CaptureError, UnsupportedOpsError


@pytest.mark.parametrize("part", [0, 1])
@given(graph=graphs())
@settings(derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_like_eager(part: int, graph: fuzz.Graph) -> None:
    """Every graph that exports is right, whatever its ops, shapes, dtypes and strides."""
    try:
        fuzz.check(graph)
    except (CaptureError, UnsupportedOpsError, fuzz.IllConditioned):
        reject()
