"""How a budget is stated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engram_lab.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """The share of the sparse parameters that routed experts get, and what is held equal meanwhile."""

    rho: float | None = None
    """1 gives everything to experts, 0 keeps only as many as a token uses; None takes the network as
    written."""
    total_parameters: int | None = None
    """P_tot, token embedding and head not counted; the number of experts at rho = 1 is then the one that
    comes nearest. None means what the network has with its own number of experts and no memory."""
    mode: Literal["published", "strict"] = "published"
    """`published`: rows replace experts and the memory's projections come on top, as in every published
    point. `strict`: the projections are paid for, so that all cells have equal totals and FLOPs."""

    rows_step: int = 1
    """Rows per head, before the search for primes, are a multiple of this; `published` mode only. The
    published tables come in steps of half their vocabulary: 2,262,400 is 35, 7,239,680 is 112 x 64,640."""

    def __post_init__(self) -> None:
        if self.rho is not None and not 0 <= self.rho <= 1:
            percent = 2 <= self.rho <= 100
            hint = (
                f" Did you mean {self.rho / 100:g}?"
                if percent
                else f" The nearest is {float(self.rho > 1):g}."
            )
            raise UserError(f"budget.rho is {self.rho}: it must lie between 0 and 1.{hint}")
        if self.total_parameters is not None and self.total_parameters < 1:
            raise UserError(f"budget.total_parameters is {self.total_parameters}: it must be positive.")
        if self.mode not in ("published", "strict"):
            raise UserError(
                f"budget.mode is {self.mode!r}: choose 'published' or 'strict'."
                + nearest(str(self.mode), ("published", "strict"))
            )
        if self.rows_step < 1:
            raise UserError(f"budget.rows_step is {self.rows_step}: it must be at least 1.")
        if self.rows_step > 1 and self.mode == "strict":
            raise UserError(
                f"budget.rows_step is {self.rows_step}, but budget.mode 'strict' holds the total, which "
                "takes rows in any number: use 1, or mode 'published'."
            )
