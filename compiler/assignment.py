"""Which format each layer of a model has, what that costs, and why: what ``quantize-mixed`` decides.

As JSON it replays the decision: ``planish.compile(..., pin=planish.Assignment.load("precision.json").pins)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from planish.errors import BudgetError, UnknownNameError


@dataclass(frozen=True)
class LayerChoice:
    """The format of layers that read the same value.

    Attributes:
        name: of the layers.
        format: as in ``Format.parse``, with ``+8`` for 8 input channels in fp32; or ``"fp"``.
        loss: predicted, of these layers alone; None without a budget, where nothing is probed.
        sigma: its standard error over the inputs.
        bytes: of their weights.
        ms: of their kernels by the cost table; None where the target has none.
        runner_up: what comes next, empty where there is nothing else.
        why: in words.
    """

    name: str
    format: str
    loss: float | None
    sigma: float | None
    bytes: int
    ms: float | None
    runner_up: str
    why: str


@dataclass(frozen=True)
class Point:
    """The least loss that some bytes allow."""

    bytes: int
    bits: float
    loss: float


@dataclass(frozen=True)
class Assignment:
    """A format for each layer.

    Attributes:
        measure: how outputs are compared: ``kl``, ``cosine``.
        layers: in graph order.
        predicted_loss: of all of them together; None without a budget.
        measured_loss: the same, by running the model on some calibration inputs.
        bytes: of all of them.
        bits: of a weight, on average, with scales.
        ms: of their kernels for a calibration batch by the cost table; None where the target has none.
        ms_fp32: the same with all of them in fp32.
        minimised: ``loss``, or ``bytes`` or ``ms`` where the budget limits the loss.
        limits: of the budget.
        gap: of what was minimised to the least that can be; relative.
        is_optimal: False where the deadline ended the search.
        prices: what one more unit of a limit takes off what was minimised.
        front: the least loss for other sizes.
        processor: whose cost table it was; for ARM with what was assumed, as its times are modelled.
        compiler_error: largest difference of the compiled model's outputs from those of the same codes in PyTorch, over
            the outputs' largest magnitude, for the example inputs: no part of the loss, which is what codes
            do; None where the model was not compiled. Values that round to other codes count: on MiniLM a change of
            1e-6 in the first layer makes as much.
    """

    measure: str
    layers: tuple[LayerChoice, ...]
    predicted_loss: float | None
    measured_loss: float
    bytes: int
    bits: float
    ms: float | None
    ms_fp32: float | None
    minimised: str
    limits: Mapping[str, float]
    gap: float
    is_optimal: bool
    prices: Mapping[str, float]
    front: tuple[Point, ...]
    processor: str = ""
    compiler_error: float | None = None

    @property
    def pins(self) -> dict[str, str]:
        """What replays it as ``compile(..., pin=)``."""
        return {layer.name: layer.format for layer in self.layers}

    def explain(self, name: str) -> str:
        """Why layers have their formats: of the layer of that name, or of all whose names begin with it.

        Raises:
            UnknownNameError: there is no such layer.
        """
        found = [layer for layer in self.layers if covers(name, layer.name)]
        if not found:
            raise UnknownNameError(f"no layer {name!r}", fix="use one of: " + ", ".join(la.name for la in self.layers))
        return "\n".join(
            f"{la.name}: {la.format}, "
            + ("" if la.loss is None else f"loss {la.loss:.3g} ± {la.sigma:.1g}, ")
            + f"{la.bytes / 1e3:,.1f} kB"
            + ("" if la.ms is None else f", {la.ms:.3g} ms")
            + f"; {_next(la)}"
            for la in found
        )

    def table(self) -> str:
        """All layers, and what they come to, as text."""
        width = max((len(la.name) for la in self.layers), default=0)
        lines = [f"  {'layer':{width}}  {'format':12} {'loss':>9} {'±':>8} {'kB':>9} {'ms':>8}  runner-up"]
        for la in self.layers:
            ms = "" if la.ms is None else f"{la.ms:.3g}"
            loss = f"{'':18}" if la.loss is None else f"{la.loss:9.2e} {la.sigma:8.1e}"
            lines.append(f"  {la.name:{width}}  {la.format:12} {loss} {la.bytes / 1e3:9,.1f} {ms:>8}  {_next(la)}")
        ms = "" if self.ms is None else f", {self.ms:.3g} ms by the cost table ({self.ms_fp32:.3g} in fp32)"
        ms += f" of {self.processor}" if ms and self.processor else ""
        proof = f"within {self.gap:.1e} of the proved bound" if self.is_optimal else f"deadline hit, gap {self.gap:.1e}"
        proof = "as pinned" if self.predicted_loss is None else proof
        lines.append(f"  {self.bits:.2f} bits per weight, {self.bytes / 1e6:,.2f} MB{ms}; {proof}")
        predicted = "" if self.predicted_loss is None else f"{self.predicted_loss:.3e} predicted, "
        lines.append(f"  loss ({self.measure}): {predicted}{self.measured_loss:.3e} measured")
        if self.compiler_error is not None:
            lines.append(f"  compiled code against the same codes in PyTorch: {self.compiler_error:.1e} of the outputs")
        for name, price in self.prices.items():
            gain = price * self.limits[name] / 100
            lines.append(
                f"  {name}: at most {self.limits[name]:.6g}; 1 % more takes {gain:.2g} off the {self.minimised}"
            )
        return "\n".join(lines)

    def encode(self) -> bytes:
        """As JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @staticmethod
    def load(path: str | Path) -> Assignment:
        """An assignment from its file.

        Raises:
            BudgetError: there is no such file, or it is not an assignment.
        """
        try:
            return msgspec.json.decode(Path(path).read_bytes(), type=Assignment)
        except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
            raise BudgetError(
                "no assignment can be read", where=str(path), why=str(error), fix="give the precision.json of a dump"
            ) from error


def _next(layer: LayerChoice) -> str:
    return f"{layer.runner_up}: {layer.why}" if layer.runner_up else layer.why


def covers(prefix: str, name: str) -> bool:
    """Whether the name of layers begins with a prefix, of whole parts; of ``a.b|c#2``, ``a.b`` or ``a.c`` does."""
    first, *others = name.partition("#")[0].split("|")
    stem = first.rpartition(".")[0]
    names = [first, *(other if "." in other or not stem else f"{stem}.{other}" for other in others)]
    return name == prefix or any(n == prefix or n.startswith(prefix + ".") for n in names)
