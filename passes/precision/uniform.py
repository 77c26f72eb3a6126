"""quantize-uniform: every linear layer in one format of integer codes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from planish.conv_ops import CONVOLUTION_LAST, Convolution
from planish.errors import CalibrationError, UnknownNameError
from planish.formats import LARGEST_CODE, Format, Quantized, WeightFormat, quantise
from planish.ops import LINEAR, QUANTIZED_CONVOLUTION, QUANTIZED_LINEAR, VIEWS, aten, has_constant_weight
from planish.passes.precision.calibration import Channels, observe
from planish.passes.precision.layer import Layer, convolution_reason
from planish.passes.precision.operand import Operand
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


EQUALISED = ("all", "tokens", "none")
"""Layers that ``QuantizeUniform`` can even out."""


@dataclass(frozen=True)
class QuantizeUniform(Pass):
    """Store the weights of layers as integer codes of one format, and multiply by codes of their inputs.

    before: ``y = linear(x, w, b)``
    after:  ``y = planish.quantized_linear(x, w_codes, w_scales, None, b, None, "w8a8")``

    before: ``y = planish.convolution(x, w, b, ...)``, with calibration
    after:  ``c = to_int8(clamp(round(x * factor), -127, 127)); y = planish.quantized_convolution(c, w_codes, ...)``

    Attributes:
        format: of every layer, as in ``planish.formats.Format.parse``; empty for the target's. Convolutions take its
            weights, and static scales.
        head: of layers whose result, or a view of it, the model returns; empty for ``format``, ``"fp"`` to leave them.
        embedding: of embedding tables, ``"fp"`` or ``"w8"``.
        outliers: input channels of each linear layer that stay fp32: those that matter most in calibration.
        equalise: even out the channels of inputs and weights, with calibration: of ``"all"`` layers, of ``"none"``, or
            of models on ``"tokens"``: a few images do not tell the ranges of a convolution's channels.
        per_tensor: one scale for all of a weight instead of one for each output feature; to compare.

    Without calibration each row's scale is found when it is computed. With it, formats with static scales are possible,
    convolutions become codes, biases are corrected by ``(W - Wq) E[x]`` (Data-Free Quantization), channels are evened
    out, and outliers are known. Codes that are made by static scales are stored instead of x where nothing else reads
    it: NaN among x becomes 0 there.
    """

    format: str = ""
    head: str = "w8a8"
    embedding: str = FP32
    outliers: int = 0
    equalise: str = "tokens"
    per_tensor: bool = False

    name: ClassVar[str] = "quantize-uniform"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    makes: ClassVar[frozenset[str]] = frozenset({"quantized"})
    tol: ClassVar[float] = float("inf")  # the change is what was asked for: the step reports it

    def run(self, program: Program, target: Target) -> Result:
        """Quantise every layer with a constant weight, in graph order."""
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
        """All layers, those that read one value together; then the embeddings."""
        if self.options.equalise not in EQUALISED:
            raise UnknownNameError(f"no layers {self.options.equalise!r} to equalise", fix=f"use one of {EQUALISED}")
        nodes = [n for n in self.program.nodes() if n.target in (LINEAR, CONVOLUTION_LAST) and self._is_eligible(n)]
        channels = self._statistics(nodes)
        together: dict[tuple[Any, ...], list[fx.Node]] = {}
        for node in nodes:
            together.setdefault((node.args[0], self._form(node).name), []).append(node)
        for group in together.values():
            self._quantise_all(group, channels.get(group[0]))
        if self.options.embedding not in (FP32, "w8"):
            raise UnknownNameError(f"no embedding format {self.options.embedding!r}", fix='use "fp" or "w8"')
        if self.options.embedding != FP32:
            for node in list(self.program.nodes()):
                if node.target is aten.embedding.default:
                    self._quantise_embedding(node)

    def _is_eligible(self, node: fx.Node) -> bool:
        if _is_head(node) and self.options.head == FP32:
            return self._refuse(node, "its result is the model's, which stays fp32")
        if not has_constant_weight(node) or node.args[1].meta["val"].dim() < 2:  # pyright: ignore
            return self._refuse(node, "its weight is computed in each call")
        if node.meta["val"].dtype is not torch.float32:
            return self._refuse(node, f"it computes in {node.meta['val'].dtype}, and integer kernels return fp32")
        if node.target is CONVOLUTION_LAST and (reason := convolution_reason(self.program, node)):
            return self._refuse(node, reason)
        layer = Layer.of(self.program, node)
        if layer.weight.shape[1] < LEAST_DEPTH and not layer.depthwise:
            return self._refuse(node, f"it has {layer.weight.shape[1]} input features: codes pay from {LEAST_DEPTH} on")
        if not layer.weight.isfinite().all():
            return self._refuse(node, "its weight holds NaN or infinity")
        return True

    def _refuse(self, node: fx.Node, reason: str) -> bool:
        self.result.refusals.append(Refusal.at(QuantizeUniform.name, node, reason))
        return False

    def _statistics(self, nodes: list[fx.Node]) -> dict[fx.Node, Channels]:
        if self.program.calibration:
            return observe(self.program, nodes)
        static = "a8-static" in (self.format.activation, self.head.activation)
        needs = "static scales" if static else "outliers in fp32"
        if static or self.options.outliers:
            raise CalibrationError(
                f"{QuantizeUniform.name} was asked for {needs} without calibration",
                why="they are found by running the model on representative inputs",
                fix="pass compile(..., calibration=[inputs, ...]), or use a format without -static and no outliers",
            )
        if nodes:
            text = "data-free: no calibration was given, so each row's scale is found when it is computed"
            self.result.notes.append(Note.at(QuantizeUniform.name, nodes[0], text))
        return {}

    def _form(self, node: fx.Node) -> Format:
        """The format of a layer; a depthwise convolution has few weights, which stay 8 bits."""
        form = self.head if _is_head(node) else self.format
        if node.target is not CONVOLUTION_LAST:
            return form
        return Format(WeightFormat(8) if Convolution.of(node).is_depthwise else form.weight, "a8-static")

    def _quantise_all(self, nodes: list[fx.Node], channels: Channels | None) -> None:
        """Layers that read the same value; its codes are made once where they are stored."""
        layers, x, form = [Layer.of(self.program, n) for n in nodes], nodes[0].args[0], self._form(nodes[0])
        is_linear, operand = nodes[0].target is LINEAR, None
        if channels is not None:
            weights = torch.cat([layer.by_channel() for layer in layers])
            outliers = self.options.outliers if is_linear else 0
            operand = Operand.of(channels, weights, form, outliers, equalise=self._equalises)
        codes = None
        if operand is not None and form.activation == "a8-static" and operand.outliers is None:
            codes_alone = set(x.users) == set(nodes)  # pyright: ignore
            if not is_linear or len(nodes) > 1 or codes_alone:
                codes = self._codes(x, operand, nodes[0])  # pyright: ignore
        for layer in layers:
            self._quantise(layer, operand, codes)

    @property
    def _equalises(self) -> bool:
        images = any(n.target in (CONVOLUTION_LAST, QUANTIZED_CONVOLUTION) for n in self.program.nodes())
        return self.options.equalise == "all" or (self.options.equalise == "tokens" and not images)

    def _codes(self, x: fx.Node, operand: Operand, before: fx.Node) -> fx.Node:
        """The codes of a value by its static scale, as elementwise ops: part of the kernel that computes it."""
        graph = self.program.module.graph
        factor = torch.ones(1) if operand.equaliser is None else operand.equaliser
        name = self._add(f"{x.name}_factor", factor / operand.scale)
        with graph.inserting_before(before):
            value = graph.call_function(aten.mul.Tensor, (x, graph.get_attr(name)))
            value = graph.call_function(aten.round.default, (value,))
            value = graph.call_function(aten.clamp.default, (value, -LARGEST_CODE, LARGEST_CODE))
            return graph.call_function(aten._to_copy.default, (value,), {"dtype": torch.int8})

    def _quantise(self, layer: Layer, operand: Operand | None, codes: fx.Node | None) -> None:
        node, form = layer.node, self._form(layer.node)
        outliers = None if operand is None else operand.outliers
        equaliser = None if operand is None else operand.equaliser
        key = (node.args[1].target, form.weight, id(operand) if operand else None)  # pyright: ignore
        if key not in self.stored:
            self.stored[key] = self._store(str(node.args[1].target), layer, form, operand)  # pyright: ignore
        graph = self.program.module.graph
        with graph.inserting_before(node):
            *held, outlier, exact = [n and graph.get_attr(n) for n in self.stored[key]]
            bias = layer.bias if operand is None else self._corrected_bias(layer, self.stored[key], form, operand)
            scale = None
            if operand is not None and form.activation == "a8-static":
                scale = graph.get_attr(self._add(f"{node.name}_input_scale", torch.tensor([operand.scale])))
            args = (codes or node.args[0], *held, bias, scale, form.name)
            if layer.node.target is CONVOLUTION_LAST:
                window = Convolution.of(node).window
                args = (*args, list(window.kernel), *node.args[3:6], node.args[8])
                new = graph.call_function(QUANTIZED_CONVOLUTION, args)  # pyright: ignore
            else:
                even = codes is None and equaliser is not None
                optional: list[Any] = [outlier, exact]
                optional += [graph.get_attr(self._add(f"{node.name}_equaliser", equaliser))] if even else []
                args = (*args, *(optional if even or outliers is not None else []))
                new = graph.call_function(QUANTIZED_LINEAR, args)  # pyright: ignore
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        self.result.rewrites[f"{layer.kind} as {form.name}"] += 1
        if operand is not None:
            self._report(new, operand.channels, outliers)

    def _store(self, name: str, layer: Layer, form: Format, operand: Operand | None) -> list[str | None]:
        """Constants of a weight: what a format holds, outliers and their weights; None for what there is not."""
        outliers = None if operand is None else operand.outliers
        equaliser = None if operand is None else operand.equaliser
        weight = layer.weight if equaliser is None else layer.times(layer.weight, 1 / equaliser)
        inner = weight if outliers is None else weight.index_fill(1, outliers, 0.0)
        held = quantise(inner, form.weight, one_scale=self.options.per_tensor)
        values = {**held.stored, "outliers": outliers}
        values["outlier_weight"] = None if outliers is None else layer.weight[:, outliers].T.contiguous()
        stem = name.replace(".", "_")
        return [None if v is None else self._add(f"{stem}_{n}", v) for n, v in values.items()]

    def _add(self, name: str, value: Tensor) -> str:
        return add_constant(self.program.module, name, value)

    def _corrected_bias(self, layer: Layer, stored: list[str | None], form: Format, operand: Operand) -> fx.Node:
        """The bias plus the mean of what rounding the weight takes away; at edges of images that is a little much."""
        module = self.program.module
        *held, outliers, exact = [None if n is None else getattr(module, n) for n in stored]
        rounded = Quantized(form.weight, *held).dequantise()
        if operand.equaliser is not None:
            rounded = layer.times(rounded, operand.equaliser)
        if outliers is not None:
            rounded = rounded.index_copy(1, outliers, exact.T)
        lost = layer.of_mean(layer.weight - rounded, operand.channels.mean)
        if layer.bias is not None:
            lost = lost + constant(module, layer.bias)
        return module.graph.get_attr(self._add(f"{layer.node.name}_corrected_bias", lost.contiguous()))

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
