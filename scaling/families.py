"""A family of curves: its formula, its parameters and how it becomes a `Design` on given observations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from scaling.separable import Axis, Basis, Design, Slope

Derived = Callable[[np.ndarray, float], Mapping[str, float]]
"""(theta [d] in internal units, amplitude) -> further parameters that the formula names"""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A curve y = level + amplitude * h(x; theta) (+ jump at one x, + further free columns)."""

    name: str
    formula: str
    amplitude: str
    """Name of the coefficient of h; empty for a curve without shape."""
    axes: tuple[Axis, ...] = ()
    basis: Basis
    slope: Slope
    positive: bool = True
    """Keep the amplitude at or above zero."""
    jump_at: float | None = None
    """An x whose runs have a level of their own."""
    extra: tuple[tuple[str, Callable[[np.ndarray], np.ndarray]], ...] = ()
    """Further columns with a free coefficient."""
    derived: Derived | None = None
    check_only: bool = False
    """Shown for comparison, never part of a headline."""
    where: Callable[[np.ndarray], np.ndarray] | None = None
    """Which x the formula is defined for (all when None)."""

    @property
    def parameters(self) -> int:
        """Mean parameters of the curve, without blocks."""
        return 1 + bool(self.amplitude) + len(self.axes) + (self.jump_at is not None) + len(self.extra)

    @property
    def nuisance_names(self) -> tuple[str, ...]:
        """Names of the columns of `nuisance`, blocks excepted."""
        return ("level", *(("jump",) if self.jump_at is not None else ()), *(name for name, _ in self.extra))

    def nuisance(self, x: np.ndarray) -> np.ndarray:
        """Free columns [n, q] at x [n]: level, jump, others."""
        columns = [np.ones_like(x)]
        if self.jump_at is not None:
            columns.append((x == self.jump_at).astype(float))
        columns += [column(x) for _, column in self.extra]
        return np.stack(columns, axis=-1)

    def design(self, x: np.ndarray, root_weight: np.ndarray, blocks: np.ndarray) -> Design:
        """Observations x [n], square roots of weights [n], block columns [n, q'] (may have no column)."""
        return Design(
            basis=self.basis,
            slope=self.slope,
            axes=self.axes,
            x=x,
            nuisance=np.concatenate([self.nuisance(x), blocks], axis=1),
            root_weight=root_weight,
            positive=self.positive,
        )


def nothing(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A basis of zeros, for curves without shape."""
    return np.zeros((*theta.shape[:-1], len(x)))


def no_slope(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The derivative of a basis without parameters."""
    return np.zeros((*theta.shape[:-1], len(x), theta.shape[-1]))


CONSTANT = Family(name="constant", formula="c", amplitude="", basis=nothing, slope=no_slope)
"""No dependence on x at all."""
