"""What an allocation fit returns: frozen results whose `to_dict` is the stable JSON schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scaling.curvefit import CurveFit, Interval
from scaling.errors import ScalingError
from scaling.frame import Excluded
from scaling.observations import Observations
from scaling.ushape import UShape


@dataclass(frozen=True, kw_only=True)
class AllocationModel(CurveFit):
    """One family with its optimum."""

    rho: float | None
    """Where the fitted curve is lowest; None when that is outside [0, 1] or the curve has no shape."""
    interval: Interval
    """Profile-F interval of rho*; an end is None where the end of [0, 1] is not refused."""
    over_one: float | None
    """Mean loss at rho = 1 (jump included) minus the loss at rho*, nats."""
    over_one_interval: Interval

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **self.summary(),
            "rho": self.rho,
            "interval": list(self.interval),
            "loss_at_one_minus_optimum": self.over_one,
            "loss_at_one_minus_optimum_interval": list(self.over_one_interval),
        }


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The headline: rho* of the best family, and the union of the intervals of all credible families."""

    rho: float | None
    """Named only where the loss is U-shaped by its test and the interval is bounded on both sides."""
    interval: Interval
    """An end is None where an optimum at that end of [0, 1] is not refused. Where the loss is U-shaped by its
    test, an end that a credible family leaves open is `ushape.turn_bounds`'s.
    """
    confidence: float
    model: str | None
    members: tuple[str, ...]
    """Families with delta AICc below `allocation.CREDIBLE`."""
    edge_members: tuple[str, ...]
    """Those of them whose curve is lowest at an end of [0, 1]; their intervals hold that end."""
    reason: str
    """Why rho is None, or what the number rests on."""

    @property
    def identified(self) -> bool:
        """Whether the data name an optimum."""
        return self.rho is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "rho": self.rho,
            "interval": list(self.interval),
            "confidence": self.confidence,
            "model": self.model,
            "members": list(self.members),
            "edge_members": list(self.edge_members),
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """Every rho whose fitted loss is within `epsilon` of the lowest: how much the exact optimum matters."""

    interval: tuple[float, float] | None
    epsilon: float | None
    """One SD between seeds, nats."""
    epsilon_source: str
    model: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "interval": None if self.interval is None else list(self.interval),
            "epsilon": self.epsilon,
            "epsilon_source": self.epsilon_source,
            "model": self.model,
        }


@dataclass(frozen=True, kw_only=True)
class Valley:
    """The falling-then-rising step curve that fits best: no formula behind it, and no interval."""

    rho: tuple[float, ...]
    loss: tuple[float, ...]
    bottom: tuple[float, float]
    """First and last position of the lowest step."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"name": "valley", "rho": list(self.rho), "loss": list(self.loss), "bottom": list(self.bottom)}


@dataclass(frozen=True, kw_only=True)
class AllocationFit:
    """Everything one allocation sweep says. `to_dict` is the stable JSON schema."""

    budget: float | None
    """Median training FLOPs of the runs."""
    n: int
    cells: int
    """Distinct rho."""
    optimum: Optimum
    models: tuple[AllocationModel, ...]
    valley: Valley | None
    u_shape: UShape
    plateau: Plateau
    held: Mapping[str, Any]
    """What the fit took as given: r0 and where it came from, blocks, noise, weights."""
    excluded: tuple[Excluded, ...]
    observations: Observations = field(repr=False, compare=False)

    def model(self, name: str) -> AllocationModel:
        """The family called `name`."""
        for model in self.models:
            if model.name == name:
                return model
        raise ScalingError(
            f"There is no allocation family {name!r}; there are {[m.name for m in self.models]}."
        )

    @property
    def best(self) -> AllocationModel | None:
        """The credible family with the lowest AICc."""
        return None if self.optimum.model is None else self.model(self.optimum.model)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; see docs/scaling.md for the schema."""
        return {
            "kind": "allocation",
            "budget": self.budget,
            "n": self.n,
            "cells": self.cells,
            "optimum": self.optimum.to_dict(),
            "models": [model.to_dict() for model in self.models],
            "valley": None if self.valley is None else self.valley.to_dict(),
            "u_shape": self.u_shape.to_dict(),
            "plateau": self.plateau.to_dict(),
            "held": dict(self.held),
            "excluded": [item.to_dict() for item in self.excluded],
        }
