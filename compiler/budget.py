"""What an assignment of formats may cost."""

from __future__ import annotations

from dataclasses import dataclass

from planish.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """Limits of an assignment of formats; at least one, and each over 0.

    With ``loss`` the assignment with the fewest bytes (or the least time, where only ``bits`` or ``bytes`` is limited
    besides) is sought, otherwise the one with the least loss.

    Attributes:
        bits: of a weight, on average over all layers that can have a format, with scales and minimums.
        bytes: of those layers' weights together.
        ms: milliseconds of those layers together for the example inputs, by the target's cost table.
        ms_one_row: the same for inputs of one row, as when a decoder makes one token.
        loss: the most that outputs may differ by, as the report measures it.
    """

    bits: float | None = None
    bytes: float | None = None
    ms: float | None = None
    ms_one_row: float | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        """Raises BudgetError."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise BudgetError(
                "the budget is empty", fix="write planish.Budget(bits=4.25), bytes=, ms=, ms_one_row= or loss="
            )
        for name, value in given.items():
            if not value > 0:
                raise BudgetError(
                    f"the budget's {name} is {value}", why="nothing costs so little", fix="give a number over 0"
                )
        if self.bits is not None and self.bytes is not None:
            raise BudgetError("the budget has bits and bytes", why="both limit the size", fix="give one of them")
