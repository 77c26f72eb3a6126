"""Reuse of compiled models within a process: the same model, unchanged, compiled again for the same inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils import _pytree as pytree

from planish.pipeline import Pass
from planish.targets import Target

Fingerprint = bytes
_results: WeakKeyDictionary[torch.nn.Module, dict[Fingerprint, Any]] = WeakKeyDictionary()
_lock = Lock()


def fingerprint(
    model: Any,
    inputs: tuple[Any, ...] | Mapping[str, Any],
    target: Target,
    dynamic: Mapping[str, Mapping[int, Any]] | None,
    pipeline: Sequence[Pass],
    fallback: str,
) -> Fingerprint | None:
    """Hash of all that decides the result: every weight's bytes, the modules' code and plain attributes, the inputs'
    shapes and constants, target, dims, passes and fallback. None where the model is no nn.Module."""
    if not isinstance(model, torch.nn.Module):
        return None
    digest = hashlib.sha256()
    tensors: list[tuple[str, torch.Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        code = getattr(getattr(module.forward, "__func__", module.forward), "__code__", None)
        digest.update(f"{name}:{type(module)!r}:{code!r}:{plain!r}\n".encode())
        # The repr of a large tensor leaves out most of its values.
        hidden = [v for v in pytree.tree_leaves(plain) if isinstance(v, torch.Tensor)]
        tensors += [(f"{name}.{i}", v) for i, v in enumerate(hidden)]
    for name, tensor in tensors:
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    leaves, spec = pytree.tree_flatten(dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs))
    described = [
        f"{v.dtype}{tuple(v.shape)}{v.requires_grad}{v.device}" if isinstance(v, torch.Tensor) else repr(v)
        for v in leaves
    ]
    digest.update(f"{spec}{described}{target!r}{dynamic!r}{pipeline!r}{fallback}{torch.is_grad_enabled()}".encode())
    return digest.digest()


def remembered(model: torch.nn.Module, key: Fingerprint) -> Any:
    """The result of an equal compile, or None."""
    with _lock:
        return _results.get(model, {}).get(key)


def remember(model: Any, key: Fingerprint, result: Any) -> None:
    """Keep a result as long as the model lives; only the latest per model."""
    with _lock:
        _results[model] = {key: result}
