"""Real pretrained models with their tokenizer, data and quality metric: ``planish.models.load("minilm")``.

Importing this package loads neither torch nor transformers: a model's module is imported when it is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from planish.models.registry import MODELS, ModelRow, load

if TYPE_CHECKING:
    from planish.models.base import LoadedModel

__all__ = ["MODELS", "LoadedModel", "ModelRow", "load"]


def __getattr__(name: str) -> object:
    """Load ``LoadedModel``, whose module needs torch, on first use; raises AttributeError for any other name."""
    if name == "LoadedModel":
        from planish.models.base import LoadedModel

        return LoadedModel
    raise AttributeError(f"module 'planish.models' has no attribute {name!r}")
