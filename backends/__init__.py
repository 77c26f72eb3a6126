"""Backends: ways to run a Program. ``backend(name)`` imports one lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planish.backends.base import Backend

NAMES = ("reference", "tvm")


def backend(name: str) -> Backend:
    """The backend ``name`` of a Target."""
    if name == "reference":
        from planish.backends.reference import ReferenceBackend

        return ReferenceBackend()
    from planish.backends.tvm.backend import TvmBackend

    return TvmBackend()
