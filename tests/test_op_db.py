"""A sample of PyTorch's own table of operators; ``make test-full`` runs all of it."""

import pytest
from op_db import entries, is_outside, run

TABLE = {name: op for name, op in entries().items() if not is_outside(name) and not name.startswith("torch.ops.aten._")}
SAMPLE = sorted(TABLE)[::8]


@pytest.mark.parametrize("name", SAMPLE)
def test_never_wrong(name: str) -> None:
    """A sample is right, or a typed error says why it is not native."""
    found = list(run(name, TABLE[name], 1))
    assert not [o for o in found if o.kind in ("wrong", "crash")]


def test_most_of_the_sample_is_native() -> None:
    """The classification itself: sums, comparisons and gathers must not turn up as unsupported."""
    for name in ("sum", "eq", "gather", "softmax", "sort"):
        assert {o.kind for o in run(name, TABLE[name], 1)} == {"native"}
