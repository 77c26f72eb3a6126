"""PyTorch's own tables of operators and modules with sample inputs, each sample compiled as a model of one call.

As a script it runs both tables and prints what became of them: ``python tests/op_db.py`` (``make test-full``).
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

import planish
from planish import verify
from planish.errors import CaptureError, PlanishError, UnsupportedOpsError

DTYPES = (torch.float32, torch.int64, torch.bool)

OUTSIDE = ("linalg.", "fft.", "special.", "signal.windows.", "masked.", "torch.ops.aten._")
"""Namespaces that need not be native; an unsupported op of them is a typed error all the same."""

OUTSIDE_NAMES = frozenset({"stft", "istft", "bernoulli", "multinomial", "normal", "cauchy", "exponential", "geometric"})
"""Also outside: transforms and random numbers by name."""

LINEAR_ALGEBRA = frozenset(
    {
        "cholesky",
        "cholesky_inverse",
        "cholesky_solve",
        "geqrf",
        "logdet",
        "lu",
        "lu_solve",
        "lu_unpack",
        "matrix_exp",
        "ormqr",
        "pca_lowrank",
        "pinverse",
        "qr",
        "svd",
        "svd_lowrank",
        "triangular_solve",
    }
)
"""Also outside: what has moved to ``linalg.``, by its older name."""

TIES = frozenset({"sort", "argsort", "topk", "kthvalue", "median", "nanmedian"})
"""Their last result is positions, and PyTorch does not say in which order equal elements come."""

TOLERANCE = 1e-4
"""max|difference| over max|reference|, fp32."""

SAMPLES = 3
"""Samples of an op and dtype in a whole run, spread over all there are."""


@dataclass(frozen=True)
class Outcome:
    """What became of one sample.

    Attributes:
        kind: ``native``, ``unsupported`` (a typed error), ``not exported``, ``wrong`` or ``crash``.
        detail: the error, or the difference.
    """

    op: str
    dtype: torch.dtype
    index: int
    kind: str
    detail: str = ""


def is_outside(name: str) -> bool:
    """Whether an entry of the table need not be native."""
    words = ("loss", "entropy", "rand", "rrelu", "fractional", "dropout", "bernoulli", "normal.", "empty")
    named = name.startswith(OUTSIDE) or name in OUTSIDE_NAMES | LINEAR_ALGEBRA
    return named or any(word in name.lower() for word in words)


def entries() -> dict[str, Any]:
    """Both tables by full name; modules are ``nn.Conv2d``, their functions ``nn.functional.conv2d``."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    ops = {f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name: op for op in op_db}
    return ops | {module.name: module for module in module_db}


class OneCall(torch.nn.Module):
    """A call of an op or module with its tensors as inputs and everything else as it was sampled."""

    def __init__(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.op = op
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.eval()

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The sampled inputs."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor))

    def forward(self, *tensors: torch.Tensor) -> Any:
        supply = iter(tensors)
        filled = [next(supply) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(filled, self.spec)
        return self.op(*args, **kwargs)


def calls(entry: Any, dtype: torch.dtype) -> Iterator[Callable[[], OneCall]]:
    """All samples of an entry; a module is made when its sample is."""
    if hasattr(entry, "sample_inputs"):
        for sample in entry.sample_inputs("cpu", dtype, requires_grad=False):
            yield lambda s=sample: OneCall(entry.op, (s.input, *s.args), s.kwargs)
        return
    options = {"device": "cpu", "dtype": dtype, "requires_grad": False, "training": False}
    for sample in entry.module_inputs_func(entry, **options):
        made, given = sample.constructor_input, sample.forward_input
        yield lambda m=made, g=given: OneCall(entry.module_cls(*m.args, **m.kwargs), g.args, g.kwargs)


def samples(entry: Any, dtype: torch.dtype, count: int) -> Iterator[tuple[int, OneCall, tuple[torch.Tensor, ...]]]:
    """At most ``count`` samples, spread over the table's own; the seed depends on the entry's name only."""
    torch.manual_seed(zlib.crc32(entry.name.encode()))
    every = list(itertools.islice(calls(entry, dtype), 200))
    for index in sorted({round(i * (len(every) - 1) / max(count - 1, 1)) for i in range(count)} if every else ()):
        model = every[index]()
        if model.tensors and all(t.layout is torch.strided for t in model.tensors):
            yield index, model, model.tensors


def outcome(name: str, dtype: torch.dtype, index: int, model: OneCall, tensors: tuple[torch.Tensor, ...]) -> Outcome:
    """Compile one sample and compare it with eager."""
    try:
        with torch.no_grad():
            want = pytree.tree_leaves(model(*(t.clone() for t in tensors)))
    except Exception as error:  # the table has samples that eager refuses
        return Outcome(name, dtype, index, "not exported", f"eager: {error}"[:200])
    try:
        compiled = planish.compile(model, tensors, cache=False)
        got = pytree.tree_leaves(compiled(*tensors))
    except CaptureError as error:
        return Outcome(name, dtype, index, "not exported", str(error)[:200])
    except UnsupportedOpsError as error:
        return Outcome(name, dtype, index, "unsupported", "; ".join(sorted({f"{o.op}: {o.reason}" for o in error.ops})))
    except PlanishError as error:
        return Outcome(name, dtype, index, "unsupported", str(error)[:200])
    except Exception as error:  # anything else is a defect
        return Outcome(name, dtype, index, "wrong", f"{type(error).__name__}: {str(error)[-300:]}")
    if (name in TIES and len(want) > 1) or name == "argsort":
        want, got = want[:-1], got[:-1]
    for w, g in zip(want, got, strict=True):
        if not isinstance(w, torch.Tensor):
            continue
        if (w.dtype, w.shape) != (g.dtype, g.shape):
            return Outcome(name, dtype, index, "wrong", f"{g.dtype}{list(g.shape)} for {w.dtype}{list(w.shape)}")
        error = 0.0 if "empty" in name else verify.relative_error(w, g)  # empty memory holds anything
        if not error <= (TOLERANCE if w.is_floating_point() else 0.0):
            return Outcome(name, dtype, index, "wrong", f"relative error {error:.1e}")
    return Outcome(name, dtype, index, "native")


def run(name: str, op: Any, count: int) -> Iterator[Outcome]:
    """The outcomes of an entry's samples in all dtypes of ``DTYPES`` that it takes."""
    for dtype in DTYPES:
        if dtype in op.dtypes:
            for index, model, tensors in samples(op, dtype, count):
                yield outcome(name, dtype, index, model, tensors)


def _work(names: list[str], queue: Any) -> None:
    torch.set_num_threads(1)
    table = entries()
    for name in names:
        queue.put(name)
        for found in run(name, table[name], SAMPLES):
            queue.put(found)
    queue.put(None)


def _whole(names: list[str]) -> list[Outcome]:
    """All outcomes, from a process that is started again after an op that ends it."""
    context = multiprocessing.get_context("spawn")
    found: list[Outcome] = []
    while names:
        queue, current = context.Queue(), names[0]
        worker = context.Process(target=_work, args=(names, queue))
        worker.start()
        deadline = time.monotonic() + 300
        while True:
            try:
                item = queue.get(timeout=5)
            except Exception:  # queue.Empty: is it still alive?
                if worker.is_alive() and time.monotonic() < deadline:
                    continue
                worker.kill()
                found.append(Outcome(current, torch.float32, -1, "crash", f"exit {worker.exitcode}"))
                names = names[names.index(current) + 1 :]
                break
            deadline = time.monotonic() + 300
            if item is None:
                return found
            if isinstance(item, str):
                current = item
            else:
                found.append(item)
    return found


def main() -> int:
    """Run both tables; 1 if a sample is wrong, or too few of what should be native is."""
    from concurrent.futures import ThreadPoolExecutor

    names = sys.argv[1:] or [n for n in entries() if not n.startswith("torch.ops.aten._")]
    with ThreadPoolExecutor(2) as pool:
        found = list(itertools.chain.from_iterable(pool.map(_whole, (names[0::2], names[1::2]))))
    for o in found:
        if o.kind not in ("native", "not exported"):
            print(f"{o.kind}: {o.op} {str(o.dtype).removeprefix('torch.')} #{o.index}: {o.detail}")
    print(f"{len(found)} samples:", dict(Counter(o.kind for o in found)))
    exported = {o.op for o in found if o.kind != "not exported" and not is_outside(o.op)}
    partly = {o.op for o in found if o.kind != "native" and o.kind != "not exported"}
    native = exported - partly
    share = len(native) / max(1, len(exported))
    print(f"{len(native)} of {len(exported)} exportable entries are native in all samples ({share:.1%})")
    return int(share < 0.9 or any(o.kind in ("wrong", "crash") for o in found))


if __name__ == "__main__":
    sys.exit(main())
