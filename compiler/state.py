"""State: the buffers that a model changes from call to call, held outside the compiled model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import torch

from planish.errors import StateError, UnknownNameError
from planish.program import TensorSpec


@dataclass(frozen=True, eq=False)
class StateSpec:
    """Names of a compiled model's mutable buffers and their values at compile time; its identity is the model's."""

    names: tuple[str, ...]
    initial: tuple[torch.Tensor, ...]


class State:
    """Values of a model's mutable buffers, such as a KV cache: ``s = compiled.new_state(); compiled(x, state=s)``.

    A call updates the state in place; a call that fails leaves it as it was. One state serves one user at a time, and
    any number of states work at the same time.
    """

    def __init__(self, spec: StateSpec, tensors: Sequence[torch.Tensor]) -> None:
        self._spec = spec
        self._tensors = tuple(tensors)
        self._lock = Lock()

    @staticmethod
    def fresh(spec: StateSpec) -> State:
        """A state with the values that the buffers had when the model was compiled."""
        return State(spec, [t.clone() for t in spec.initial])

    def __repr__(self) -> str:
        specs = [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in zip(self.names, self._tensors, strict=True)]
        return f"State({', '.join(map(str, specs))})"

    @property
    def names(self) -> tuple[str, ...]:
        """The buffers' names in the model, such as ``attention.cache``."""
        return self._spec.names

    def __getitem__(self, name: str) -> torch.Tensor:
        """A copy of one buffer's value.

        Raises:
            UnknownNameError: there is no such buffer.
            StateError: a call is using the state.
        """
        if name not in self.names:
            raise UnknownNameError(f"the state has no buffer {name!r}", fix=f"its buffers are: {', '.join(self.names)}")
        with self._exclusive() as tensors:
            return tensors[self.names.index(name)].clone()

    def reset(self) -> None:
        """Go back to the values that the buffers had when the model was compiled."""
        with self._exclusive() as tensors, torch.inference_mode():
            for tensor, initial in zip(tensors, self._spec.initial, strict=True):
                tensor.copy_(initial)

    def clone(self) -> State:
        """An independent state with the same values."""
        with self._exclusive() as tensors:
            return State(self._spec, [t.clone() for t in tensors])

    @contextmanager
    def _exclusive(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """The tensors, for one user at a time."""
        if not self._lock.acquire(blocking=False):
            raise StateError(
                "the state is in use by another thread",
                why="a call updates its state in place",
                fix="give each thread a state of its own: compiled.new_state()",
            )
        try:
            yield self._tensors
        finally:
            self._lock.release()


@contextmanager
def lend(state: State | None, spec: StateSpec) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors of the state that was given to a call of a model.

    Raises:
        StateError: the model needs a state and got none, has none and got one, the state is another model's, or in use.
    """
    if not spec.names:
        raise StateError("the model has no state, and was given one", fix="call it without state=")
    if state is None:
        raise StateError(
            f"the model changes its buffers ({', '.join(spec.names)}) and was called without a state",
            why="what changes from call to call is held outside the compiled model, one state per user",
            fix="s = compiled.new_state() once, then compiled(..., state=s)",
        )
    if state._spec is not spec:
        raise StateError("the state is another model's", fix="use state=compiled.new_state() of this compiled model")
    with state._exclusive() as tensors:
        yield tensors
