"""Other engines' own 8-bit builds of an encoder, as contenders in this process: PyTorch's and ONNX Runtime's."""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from planish.models.base import LoadedModel

TORCH_INT8, ONNXRUNTIME_INT8 = "torch-dynamic-int8", "onnxruntime-int8"


def torch_dynamic(loaded: LoadedModel) -> Callable[..., Any] | str:
    """PyTorch's dynamic quantisation of linear layers, or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated: it is only measured here
            quantize: Any = import_module("torch.ao.quantization").quantize_dynamic
            return quantize(copy.deepcopy(loaded.model), {torch.nn.Linear}, dtype=torch.qint8)
    except (ImportError, RuntimeError) as error:
        return f"torch's dynamic quantisation failed: {str(error).splitlines()[0]}"


def onnxruntime(loaded: LoadedModel, threads: int) -> Callable[..., Any] | str:
    """ONNX Runtime's dynamic quantisation with its defaults, or why there is none.

    Args:
        loaded: the model, which is exported.
        threads: of ONNX Runtime.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        return f"packages {', '.join(missing)} are not installed (pip install 'planish[peers]')"
    runtime: Any = import_module("onnxruntime")
    quantize: Any = import_module("onnxruntime.quantization").quantize_dynamic
    with tempfile.TemporaryDirectory(prefix="planish-onnx-") as folder:
        exact, small = Path(folder, "exact.onnx"), Path(folder, "int8.onnx")
        logging.getLogger().setLevel(logging.ERROR)  # it advises against the very defaults that are measured
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _export(loaded, exact)
        quantize(str(exact), str(small))
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        session = runtime.InferenceSession(str(small), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def call(**batch: torch.Tensor) -> dict[str, torch.Tensor]:
        (states, *_) = session.run(None, {name: batch[name].numpy() for name in names})
        return {"last_hidden_state": torch.from_numpy(states)}

    return call


def _export(loaded: LoadedModel, file: Path) -> None:
    axes = {name: dict.fromkeys(dims, torch.export.Dim.DYNAMIC) for name, dims in loaded.dynamic.items()}
    export: Any = torch.onnx.export
    export(loaded.model, kwargs=loaded.inputs, f=str(file), dynamic_shapes=axes, dynamo=True, verbose=False)
