"""Layers and embeddings rewritten to codes: what every quantising pass does once it knows the treatments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from planish.conv_ops import CONVOLUTION_LAST, Convolution
from planish.formats import LARGEST_CODE, Format, Quantized, quantise
from planish.ops import LINEAR, QUANTIZED_CONVOLUTION, QUANTIZED_LINEAR, aten
from planish.passes.precision.calibration import Channels
from planish.passes.precision.codes import held_weights, rounded_weight
from planish.passes.precision.layer import Layer
from planish.passes.precision.operand import Operand
from planish.pipeline import Note, Refusal, Result
from planish.program import Program, add_constant, constant

NOTABLE = 20.0
"""A channel this many times as large as the median channel is an outlier that is reported (LLM.int8)."""


@dataclass
class Rewriter:
    """Rewrites layers of a program to codes.

    Attributes:
        program: is rewritten.
        name: of the pass, in refusals.
        result: gets what was done.
        per_tensor: one scale for all of a weight.
    """

    program: Program
    name: str
    result: Result
    per_tensor: bool = False
    _stored: dict[tuple[Any, ...], list[str | None]] = field(default_factory=dict[Any, Any])

    def quantise_all(self, nodes: Sequence[fx.Node], form: Format, operand: Operand | None) -> None:
        """Layers that read the same value; its codes are made once where they are stored.

        Args:
            nodes: linear layers or ``planish::convolution`` with a constant weight, all with the same first argument.
            form: of all of them.
            operand: what calibration says of the value they read; None without it.
        """
        layers, x = [Layer.of(self.program, n) for n in nodes], nodes[0].args[0]
        codes = None
        if operand is not None and form.activation == "a8-static" and operand.outliers is None:
            codes_alone = set(x.users) == set(nodes)  # pyright: ignore
            if nodes[0].target is not LINEAR or len(nodes) > 1 or codes_alone:
                codes = self._codes(x, operand, nodes[0])  # pyright: ignore
        for layer in layers:
            self._quantise(layer, form, operand, codes)

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

    def _quantise(self, layer: Layer, form: Format, operand: Operand | None, codes: fx.Node | None) -> None:
        node = layer.node
        outliers = None if operand is None else operand.outliers
        equaliser = None if operand is None else operand.equaliser
        key = (node.args[1].target, form.weight, operand)  # pyright: ignore
        if key not in self._stored:
            self._stored[key] = self._store(str(node.args[1].target), layer, form, operand)  # pyright: ignore
        graph = self.program.module.graph
        with graph.inserting_before(node):
            *held, outlier, exact = [n and graph.get_attr(n) for n in self._stored[key]]
            bias = layer.bias if operand is None else self._corrected_bias(layer, self._stored[key], form, operand)
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
            self._report(new, layer.name, operand.channels, outliers)

    def _store(self, name: str, layer: Layer, form: Format, operand: Operand | None) -> list[str | None]:
        """Constants of a weight: what a format holds, outliers and their weights; None for what there is not."""
        outliers = None if operand is None else operand.outliers
        ((held,),) = held_weights([layer], [(form, operand)], per_tensor=self.per_tensor)
        values = {**held.stored, "outliers": outliers}
        values["outlier_weight"] = None if outliers is None else layer.weight[:, outliers].T.contiguous()
        stem = name.replace(".", "_")
        return [None if v is None else self._add(f"{stem}_{n}", v) for n, v in values.items()]

    def _add(self, name: str, value: Tensor) -> str:
        return add_constant(self.program.module, name, value)

    def _corrected_bias(self, layer: Layer, stored: list[str | None], form: Format, operand: Operand) -> fx.Node:
        """The bias plus the mean of what rounding the weight takes away; at edges of images that is a little much."""
        module = self.program.module
        *held, _, _ = [None if n is None else getattr(module, n) for n in stored]
        rounded = rounded_weight(layer, Quantized(form.weight, *held), operand)
        lost = layer.of_mean(layer.weight - rounded, operand.channels.mean)
        if layer.bias is not None:
            lost = lost + constant(module, layer.bias)
        return module.graph.get_attr(self._add(f"{layer.node.name}_corrected_bias", lost.contiguous()))

    def _report(self, node: fx.Node, name: str, channels: Channels, outliers: Tensor | None) -> None:
        """A note on a layer whose input has a channel far above the others."""
        ratio = channels.against_median()
        channel = int(ratio.argmax())
        kept = "" if outliers is None else f"; {len(outliers)} channels stay fp32"
        if ratio[channel] < NOTABLE and not kept:
            return
        later = channels.later[channel] / channels.largest[channel]
        where = "at first tokens only" if later < 0.5 else "at all tokens"
        text = (
            f"{name}: channel {channel} of its input reaches {channels.largest[channel]:.3g}, "
            f"{ratio[channel]:.1f} times the median channel, {where}{kept}"
        )
        self.result.notes.append(Note.at("outlier", node, text))

    def quantise_embedding(self, node: fx.Node, form: Format) -> None:
        """before: ``embedding(w, ids)``
        after:  ``embedding(codes, ids).float() * embedding(scales, ids) + embedding(lowest, ids)``
        """
        table = node.args[0]
        assert isinstance(table, fx.Node)
        if table.op != "get_attr":
            self.result.refusals.append(Refusal.at(self.name, node, "its table is computed in each call"))
            return
        graph, stem = self.program.module.graph, str(table.target).replace(".", "_")
        key = (table.target, form.weight, "embedding")
        if key not in self._stored:
            held = quantise(constant(self.program.module, table).detach().float(), form.weight)
            values = {"rows": held.codes, "row_scales": held.scales, "row_lowest": held.lowest()}
            self._stored[key] = [self._add(f"{stem}_{n}", v) for n, v in values.items()]
        with graph.inserting_before(node):
            tables = [graph.get_attr(str(n)) for n in self._stored[key]]
            codes, scales, lowest = [graph.call_function(aten.embedding.default, (t, node.args[1])) for t in tables]
            value = graph.call_function(aten._to_copy.default, (codes,), {"dtype": torch.float32})
            value = graph.call_function(aten.mul.Tensor, (value, scales))
            new = graph.call_function(aten.add.Tensor, (value, lowest))
        node.replace_all_uses_with(new)
        self.result.rewrites[f"embedding as {form.name}"] += 1
