"""quantize-uniform: every linear layer in one format of integer codes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from planish.errors import CalibrationError, UnknownNameError
from planish.formats import LARGEST_CODE, Format, Quantized, quantise
from planish.ops import LINEAR, QUANTIZED_LINEAR, VIEWS, aten, has_constant_weight
from planish.passes.precision.calibration import Channels, observe
from planish.pipeline import Note, Pass, Refusal, Result
from planish.program import Program, add_constant, constant
from planish.rules import remove_dead
from planish.targets import Target

LEAST_DEPTH = 32
"""Fewest input features of a layer: with less, turning rows into codes costs more than the products save."""

NOTABLE = 20.0
"""A channel this many times as large as the median channel is an outlier that is reported (LLM.int8)."""

FP32 = "fp"
"""The format of what is left as it is."""


@dataclass(frozen=True)
class QuantizeUniform(Pass):
    """Store the weights of linear layers as integer codes of one format, and multiply by codes of their inputs.

    before: ``y = linear(x, w, b)``
    after:  ``y = planish.quantized_linear(x, w_codes, w_scales, None, b, None, "w8a8")``

    Attributes:
        format: of every layer, as in ``planish.formats.Format.parse``; empty for the target's.
        head: of layers whose result, or a view of it, the model returns; empty for ``format``, ``"fp"`` to leave them.
        embedding: of embedding tables, ``"fp"`` or ``"w8"``.
        outliers: input channels of each layer that stay fp32: the largest in calibration.

    Without calibration each row's scale is found when it is computed. With it, formats with static scales are possible,
    biases are corrected by ``(W - Wq) E[x]`` (Data-Free Quantization), and the outliers are known.
    """

    format: str = ""
    head: str = "w8a8"
    embedding: str = FP32
    outliers: int = 0

    name: ClassVar[str] = "quantize-uniform"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    makes: ClassVar[frozenset[str]] = frozenset({"quantized"})
    tol: ClassVar[float] = float("inf")  # the change is what was asked for: the step reports it

    def run(self, program: Program, target: Target) -> Result:
        """Quantise every linear layer with a constant weight, in graph order."""
        chosen = Format.parse(self.format or target.format)
        work = _Work(program, self, chosen, Format.parse(self.head) if self.head not in ("", FP32) else chosen)
        work.run()
        remove_dead(program.module)
        return work.result


@dataclass
class _Work:
    program: Program
    options: QuantizeUniform
    format: Format
    head: Format
    result: Result = field(default_factory=Result)
    stored: dict[tuple[Any, ...], list[str | None]] = field(default_factory=dict[Any, Any])

    def run(self) -> None:
        """All layers, then the embeddings."""
        layers = [n for n in self.program.nodes() if n.target is LINEAR and self._is_eligible(n)]
        channels = self._statistics(layers)
        for layer in layers:
            self._quantise(layer, channels.get(layer))
        if self.options.embedding not in (FP32, "w8"):
            raise UnknownNameError(f"no embedding format {self.options.embedding!r}", fix='use "fp" or "w8"')
        if self.options.embedding != FP32:
            for node in list(self.program.nodes()):
                if node.target is aten.embedding.default:
                    self._quantise_embedding(node)

    def _is_eligible(self, layer: fx.Node) -> bool:
        if _is_head(layer) and self.options.head == FP32:
            return self._refuse(layer, "its result is the model's, which stays fp32")
        if not has_constant_weight(layer) or layer.args[1].meta["val"].dim() != 2:  # pyright: ignore
            return self._refuse(layer, "its weight is computed in each call")
        if layer.meta["val"].dtype is not torch.float32:
            return self._refuse(layer, f"it computes in {layer.meta['val'].dtype}, and integer kernels return fp32")
        depth = int(layer.args[1].meta["val"].shape[1])  # pyright: ignore
        if depth < LEAST_DEPTH:
            return self._refuse(layer, f"it has {depth} input features: codes pay from {LEAST_DEPTH} on")
        if not constant(self.program.module, layer.args[1]).isfinite().all():  # pyright: ignore
            return self._refuse(layer, "its weight holds NaN or infinity")
        return True

    def _refuse(self, node: fx.Node, reason: str) -> bool:
        self.result.refusals.append(Refusal.at(QuantizeUniform.name, node, reason))
        return False

    def _statistics(self, layers: list[fx.Node]) -> dict[fx.Node, Channels]:
        if self.program.calibration:
            return observe(self.program, layers)
        static = "a8-static" in (self.format.activation, self.head.activation)
        needs = "static scales" if static else "outliers in fp32"
        if static or self.options.outliers:
            raise CalibrationError(
                f"{QuantizeUniform.name} was asked for {needs} without calibration",
                why="they are found by running the model on representative inputs",
                fix="pass compile(..., calibration=[inputs, ...]), or use a format without -static and no outliers",
            )
        if layers:
            text = "data-free: no calibration was given, so each row's scale is found when it is computed"
            self.result.notes.append(Note.at(QuantizeUniform.name, layers[0], text))
        return {}

    def _quantise(self, layer: fx.Node, channels: Channels | None) -> None:
        form = self.head if _is_head(layer) else self.format
        x, weight_node, bias_node = (*layer.args, None)[:3]
        weight = constant(self.program.module, weight_node).detach().float()  # pyright: ignore
        outliers = self._outliers(channels)
        key = (weight_node.target, form.weight, *([] if outliers is None else outliers.tolist()))  # pyright: ignore
        if key not in self.stored:
            self.stored[key] = self._store(str(weight_node.target), weight, form, outliers)  # pyright: ignore
        graph = self.program.module.graph
        with graph.inserting_before(layer):
            *held, outlier, exact = [n and graph.get_attr(n) for n in self.stored[key]]
            bias = self._corrected_bias(layer, bias_node, weight, self.stored[key], form, channels)
            scale = self._static_scale(layer, form, channels, outliers)
            args = (x, *held, bias, scale, form.name, *((outlier, exact) if outliers is not None else ()))
            new = graph.call_function(QUANTIZED_LINEAR, args)
        new.meta["val"] = layer.meta["val"]
        layer.replace_all_uses_with(new)
        self.result.rewrites[f"linear as {form.name}"] += 1
        if channels is not None:
            self._report(new, channels, outliers)

    def _store(self, name: str, weight: Tensor, form: Format, outliers: Tensor | None) -> list[str | None]:
        """Constants of a weight: what a format holds, outliers and their weights; None for what there is not."""
        inner = weight if outliers is None else weight.index_fill(1, outliers, 0.0)
        values = {**quantise(inner, form.weight).stored, "outliers": outliers}
        values["outlier_weight"] = None if outliers is None else weight[:, outliers].T.contiguous()
        stem = name.replace(".", "_")
        return [None if v is None else self._add(f"{stem}_{n}", v) for n, v in values.items()]

    def _add(self, name: str, value: Tensor) -> str:
        return add_constant(self.program.module, name, value)

    def _outliers(self, channels: Channels | None) -> Tensor | None:
        if channels is None or not self.options.outliers:
            return None
        count = min(self.options.outliers, len(channels.largest))
        return channels.largest.topk(count).indices.sort().values

    def _static_scale(
        self, layer: fx.Node, form: Format, channels: Channels | None, outliers: Tensor | None
    ) -> fx.Node | None:
        """The input's scale for all rows: its largest value in calibration over 127."""
        if form.activation != "a8-static" or channels is None:
            return None
        largest = channels.largest if outliers is None else channels.largest.index_fill(0, outliers, 0.0)
        scale = largest.max().clamp_min(torch.finfo(torch.float32).tiny * LARGEST_CODE) / LARGEST_CODE
        return self.program.module.graph.get_attr(self._add(f"{layer.name}_input_scale", scale.view(1)))

    def _corrected_bias(
        self,
        layer: fx.Node,
        bias: Any,
        weight: Tensor,
        stored: list[str | None],
        form: Format,
        channels: Channels | None,
    ) -> Any:
        """The bias plus the mean of what rounding the weight takes away; the bias itself without calibration."""
        if channels is None:
            return bias
        lost = (weight - self._dequantised(stored, form)) @ channels.mean
        if bias is not None:
            lost = lost + constant(self.program.module, bias)
        name = self._add(f"{layer.name}_corrected_bias", lost.contiguous())
        return self.program.module.graph.get_attr(name)

    def _dequantised(self, stored: list[str | None], form: Format) -> Tensor:
        """The weight that is multiplied, outliers included."""
        module = self.program.module
        *held, outliers, exact = [None if n is None else getattr(module, n) for n in stored]
        weight = Quantized(form.weight, *held).dequantise()
        return weight if outliers is None else weight.index_copy(1, outliers, exact.T)

    def _report(self, node: fx.Node, channels: Channels, outliers: Tensor | None) -> None:
        """A note on a layer whose input has a channel far above the others."""
        ratio = channels.against_median()
        channel = int(ratio.argmax())
        kept = "" if outliers is None else f"; {len(outliers)} channels stay fp32"
        if ratio[channel] < NOTABLE and not kept:
            return
        later = channels.later[channel] / channels.largest[channel]
        where = "at first tokens only" if later < 0.5 else "at all tokens"
        text = (
            f"channel {channel} of its input reaches {channels.largest[channel]:.3g}, {ratio[channel]:.1f} times the "
            f"median channel, {where}{kept}"
        )
        self.result.notes.append(Note.at("outlier", node, text))

    def _quantise_embedding(self, node: fx.Node) -> None:
        """before: ``embedding(w, ids)``
        after:  ``embedding(codes, ids).float() * embedding(scales, ids) + embedding(lowest, ids)``
        """
        table = node.args[0]
        assert isinstance(table, fx.Node)
        if table.op != "get_attr":
            self._refuse(node, "its table is computed in each call")
            return
        graph, stem = self.program.module.graph, str(table.target).replace(".", "_")
        form = Format.parse(self.options.embedding)
        key = (table.target, form.weight, "embedding")
        if key not in self.stored:
            held = quantise(constant(self.program.module, table).detach().float(), form.weight)
            values = {"rows": held.codes, "row_scales": held.scales, "row_lowest": held.lowest()}
            self.stored[key] = [self._add(f"{stem}_{n}", v) for n, v in values.items()]
        with graph.inserting_before(node):
            tables = [graph.get_attr(str(n)) for n in self.stored[key]]
            codes, scales, lowest = [graph.call_function(aten.embedding.default, (t, node.args[1])) for t in tables]
            value = graph.call_function(aten._to_copy.default, (codes,), {"dtype": torch.float32})
            value = graph.call_function(aten.mul.Tensor, (value, scales))
            new = graph.call_function(aten.add.Tensor, (value, lowest))
        node.replace_all_uses_with(new)
        self.result.rewrites[f"embedding as {form.name}"] += 1


def _is_head(layer: fx.Node) -> bool:
    """Whether the model returns the layer's result or a view of it."""
    users = list(layer.users)
    return any(u.op == "output" or (u.target in VIEWS and _is_head(u)) for u in users)
