"""quantize-uniform: every linear layer in one format of integer codes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from planish.conv_ops import CONVOLUTION_LAST, Convolution
from planish.errors import CalibrationError, UnknownNameError
from planish.formats import Format, WeightFormat
from planish.ops import LINEAR, QUANTIZED_CONVOLUTION, aten
from planish.passes.precision.calibration import Channels, observe
from planish.passes.precision.layer import Layer, layers, reason, returns
from planish.passes.precision.operand import Operand
from planish.passes.precision.rewrite import Rewriter
from planish.passes.precision.treatment import FP32
from planish.pipeline import Note, Pass, Refusal, Result
from planish.program import Program, source_line
from planish.rules import remove_dead
from planish.targets import Target

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
    convolutions become codes, codes of less than 8 bits, or of weights with outliers, and their scales make up for each
    other's errors (GPTQ; with ``per_tensor`` codes alone), biases are corrected by
    ``(W - Wq) E[x]`` (Data-Free Quantization), channels are evened out, and outliers are known. Codes
    that are made by static scales are stored instead of x where nothing else reads it: NaN among x becomes 0 there.
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

    def run(self) -> None:
        """All layers, those that read one value together; then the embeddings."""
        if self.options.equalise not in EQUALISED:
            raise UnknownNameError(f"no layers {self.options.equalise!r} to equalise", fix=f"use one of {EQUALISED}")
        if self.options.embedding not in (FP32, "w8"):
            raise UnknownNameError(f"no embedding format {self.options.embedding!r}", fix='use "fp" or "w8"')
        nodes = [n for n in layers(self.program) if self._is_eligible(n)]
        channels = self._statistics(nodes)
        together: dict[tuple[Any, ...], list[fx.Node]] = {}
        for node in nodes:
            together.setdefault((node.args[0], self._form(node).name), []).append(node)
        rewriter = Rewriter(self.program, QuantizeUniform.name, self.result, self.options.per_tensor)
        for group in together.values():
            form = self._form(group[0])
            rewriter.quantise_all(group, form, self._operand(group, form, channels.get(group[0])))
        if self.options.embedding != FP32:
            for node in list(self.program.nodes()):
                if node.target is aten.embedding.default:
                    rewriter.quantise_embedding(node, Format.parse(self.options.embedding))

    def _is_eligible(self, node: fx.Node) -> bool:
        stays = "its result is the model's, which stays fp32"
        why = stays if self.options.head == FP32 and returns(node) else reason(self.program, node)
        if why is not None:
            self.result.refusals.append(Refusal.at(QuantizeUniform.name, node, why))
        return why is None

    def _statistics(self, nodes: list[fx.Node]) -> dict[fx.Node, Channels]:
        if self.program.calibration:
            found = observe(self.program, nodes)
            return {node: seen for node, seen in found.items() if self._was_reached(node, seen)}
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

    def _was_reached(self, node: fx.Node, seen: Channels) -> bool:
        """Whether calibration ran rows through a layer; where it did not, only formats without static scales do."""
        if seen.rows:
            return True
        text = "calibration never reached it"
        if self._form(node).activation == "a8-static":
            raise CalibrationError(
                f"{node.name}: {text}, so its scale is not known",
                where=source_line(node),
                fix="add inputs that reach it, or use a format without -static",
            )
        self.result.notes.append(Note.at(QuantizeUniform.name, node, f"{text}: its scales are found row by row"))
        return False

    def _form(self, node: fx.Node) -> Format:
        """The format of a layer; a depthwise convolution has few weights, which stay 8 bits."""
        form = self.head if returns(node) else self.format
        if node.target is not CONVOLUTION_LAST:
            return form
        return Format(WeightFormat(8) if Convolution.of(node).is_depthwise else form.weight, "a8-static")

    def _operand(self, nodes: list[fx.Node], form: Format, channels: Channels | None) -> Operand | None:
        if channels is None:
            return None
        outliers = self.options.outliers if nodes[0].target is LINEAR else 0
        weights = torch.cat([Layer.of(self.program, node).by_channel() for node in nodes])
        return Operand.of(channels, weights, form, outliers, equalise=self._equalises)

    @property
    def _equalises(self) -> bool:
        images = any(n.target in (CONVOLUTION_LAST, QUANTIZED_CONVOLUTION) for n in self.program.nodes())
        return self.options.equalise == "all" or (self.options.equalise == "tokens" and not images)
