"""How far 8 bits are from fp32 where codes use their whole range: ours and ONNX Runtime's default."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

WIDTH, LAYERS, ROWS = 512, 3, 64


def full_range() -> tuple[torch.nn.Sequential, torch.Tensor]:
    """A perceptron without biases and its input, whose weights and activations fill the range of their codes evenly.

    Sums of two products of bytes then often exceed int16.
    """
    generator = torch.Generator().manual_seed(0)
    layers: list[torch.nn.Module] = []
    for _ in range(LAYERS):
        layer = torch.nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        layer.weight.copy_(torch.rand(WIDTH, WIDTH, generator=generator) * 2 - 1)
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1]).eval(), torch.rand(ROWS, WIDTH, generator=generator)


def errors(compile_model: Callable[..., Any]) -> dict[str, float | str]:
    """``|got - want| / |want|`` of each engine that is installed, or why it is not there."""
    model, x = full_range()
    want = model(x)
    got: dict[str, Any] = {"planish w8a8": compile_model(model, (x,), target="cpu-int8")(x)}
    absent: dict[str, float | str] = {}
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        got["onnxruntime int8"] = _onnxruntime(model, x)
    else:
        absent["onnxruntime int8"] = "packages onnx and onnxruntime are not installed (pip install 'planish[peers]')"
    return {name: ((y - want).norm() / want.norm()).item() for name, y in got.items()} | absent


def _onnxruntime(model: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """The result of ONNX Runtime's dynamic quantisation with its defaults."""
    onnx: Any = import_module("onnx")
    runtime: Any = import_module("onnxruntime")
    quantization: Any = import_module("onnxruntime.quantization")
    make, arrays = onnx.helper, onnx.numpy_helper
    nodes, held, value = [], [], "x"
    for i, layer in enumerate(model):
        if isinstance(layer, torch.nn.Linear):
            held += [arrays.from_array(layer.weight.T.contiguous().numpy(), f"w{i}")]
            nodes += [make.make_node("MatMul", [value, f"w{i}"], [f"y{i}"])]
        else:
            nodes += [make.make_node("Relu", [value], [f"y{i}"])]
        value = f"y{i}"
    ends = [make.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [None, WIDTH]) for n in ("x", value)]
    graph = make.make_graph(nodes, "mlp", ends[:1], ends[1:], held)
    whole = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=10)
    with tempfile.TemporaryDirectory(prefix="planish-onnx-") as folder:
        exact, small = Path(folder, "exact.onnx"), Path(folder, "int8.onnx")
        onnx.save(whole, str(exact))
        quantization.quantize_dynamic(str(exact), str(small))
        (result,) = runtime.InferenceSession(str(small), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    return torch.from_numpy(np.asarray(result))
