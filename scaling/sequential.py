"""Which runs to make next: those that shrink the variance of rho* most.

By the information matrix, averaged over everything the data still allow (sequential c-optimal design:
Chernoff 1953).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling.allocation import AllocationFit
from scaling.curvefit import CurveFit
from scaling.errors import ScalingError


@dataclass(frozen=True, kw_only=True)
class NextRun:
    """One proposed run and what it is expected to do."""

    rho: float
    seed: int
    budget: float | None
    sd_ratio: float
    """Expected SD of rho* after this and the runs before it, over the SD now."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(self.__dict__)


def next_runs(
    fit: AllocationFit, count: int = 1, candidates: Sequence[float] | None = None
) -> tuple[NextRun, ...]:
    """The runs at `count` shares that shrink the variance of rho* most, one after the other.

    `candidates` are the rho that can be run; by default `shares_in_reach`. Where several seeds were run at
    several shares the sweep is paired: a share is then one that lacks some of these seeds, and it comes with
    all that it lacks, since one seed at one share alone would end the pairing of all. Otherwise, and where no
    such share is left, each of the `count` is one run with the next seed. Averages over the credible families
    with an optimum, weighted by AICc, and over their confidence regions, so a proposal does not rest on one
    estimate.
    """
    if count < 1:
        raise ScalingError(f"count is {count!r}; at least one run must be asked for.")
    options = shares_in_reach(fit) if candidates is None else np.asarray(candidates, dtype=float)
    if len(options) == 0 or options.min() < 0 or options.max() > 1:
        raise ScalingError("candidates must be shares in [0, 1].")
    options = options.round(9)
    members = [fit.model(name) for name in fit.optimum.members]
    members = [model for model in members if model.family.axes and model.params[model.family.amplitude] > 0]
    members = (
        members
        or [m for m in fit.models if m.fitted and m.family.axes and m.params[m.family.amplitude] > 0][:1]
    )
    if not members:
        raise ScalingError("No fitted curve has an optimum to sharpen; add runs at more values of rho first.")
    weights = np.array([math.exp(-0.5 * (model.delta_aicc or 0.0)) for model in members])
    states = [_information(model, options) for model in members]
    before = [inverse[:, 0, 0].copy() for inverse, _ in states]
    seeds, paired = _seeds(fit), _paired(fit)

    def ratios() -> np.ndarray:
        """SD of rho* after one more run at each candidate, over that before the first."""
        ratio = np.zeros(len(options))
        for weight, (inverse, rows), start in zip(weights / weights.sum(), states, before, strict=True):
            through = np.einsum("kij,kmj->kmi", inverse, rows)
            after = inverse[:, None, 0, 0] - through[:, :, 0] ** 2 / (
                1 + np.einsum("kmi,kmi->km", rows, through)
            )
            ratio += weight * np.sqrt(np.maximum(after, 0.0) / start[:, None]).mean(0)
        return ratio

    out = []
    for _ in range(count):
        lacking = np.array([bool(paired - seeds.get(rho, set())) for rho in options.tolist()])
        pick = int(np.where(lacking | ~lacking.any(), ratios(), math.inf).argmin())
        rho = float(options[pick])
        used = seeds.setdefault(rho, set())
        for seed in sorted(paired - used) or [max(used, default=-1) + 1]:
            used.add(seed)
            out.append(NextRun(rho=rho, seed=seed, budget=fit.budget, sd_ratio=float(ratios()[pick])))
            for index, (inverse, rows) in enumerate(states):
                row = rows[:, pick]
                through = np.einsum("kij,kj->ki", inverse, row)
                scale = 1 + np.einsum("ki,ki->k", row, through)
                outer = through[:, :, None] * through[:, None, :]
                states[index] = (inverse - outer / scale[:, None, None], rows)
    return tuple(out)


def shares_in_reach(fit: AllocationFit) -> np.ndarray:
    """Shares that can be run, increasing: hundredths, or where the runs say how many experts rho divides, the
    shares of whole experts nearest to them and those that were run.
    """
    hundredths = np.linspace(0, 1, 101)
    divided = fit.held.get("experts_divided")
    if divided is None:
        return hundredths
    whole = np.round(hundredths * divided) / divided
    return np.unique(np.concatenate([whole, fit.observations.x]).round(9))


def _seeds(fit: AllocationFit) -> dict[float, set[int]]:
    """Return the seeds run at every share; runs without one are numbered."""
    found: dict[float, set[int]] = {}
    for x, used in zip(fit.observations.x, fit.observations.seed, strict=True):
        here = found.setdefault(round(float(x), 9), set())
        here.add(int(used) if math.isfinite(used) else max(here, default=-1) + 1)
    return found


def _paired(fit: AllocationFit) -> set[int]:
    """Return the seeds that pair shares: those run at two or more, where there are several."""
    obs = fit.observations
    runs = {(x, int(seed)) for x, seed in zip(obs.x, obs.seed, strict=True) if math.isfinite(seed)}
    shares = Counter(seed for _, seed in runs)
    pairing = {seed for seed, count in shares.items() if count > 1}
    return pairing if len(pairing) > 1 else set()


def _information(model: CurveFit, options: np.ndarray, most: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Inverse information [K, p, p] at K points of the confidence region, and the rows of the candidates
    [K, m, p].
    """
    cloud = model.cloud[np.unique(np.linspace(0, len(model.cloud) - 1, most).astype(int))]
    cloud = cloud[(cloud[:, 0] > 0.005) & (cloud[:, 0] < 0.995)]
    cloud = np.concatenate([model.theta[None], cloud])
    family, design = model.family, model.design
    b = design.amplitude(design.weighted(model.obs.y), design.curves(cloud))
    b = np.maximum(b, 0.1 * model.params[family.amplitude])

    def rows(x: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        shape = family.basis(cloud, x)[..., None]
        slope = b[:, None, None] * family.slope(cloud, x)
        nuisance = np.broadcast_to(
            np.concatenate([family.nuisance(x), blocks], axis=1),
            (len(cloud), len(x), design.nuisance.shape[1]),
        )
        return np.concatenate([slope, shape, nuisance], axis=-1)

    own = rows(design.x, model.obs.blocks) * design.root_weight[:, None]
    matrix = np.einsum("kni,knj->kij", own, own)
    size = np.sqrt(np.einsum("kii->ki", matrix))
    size = np.where(size > 0, size, 1.0)
    scaled = matrix / (size[:, :, None] * size[:, None, :]) + 1e-9 * np.eye(matrix.shape[1])
    inverse = np.linalg.inv(scaled) / (size[:, :, None] * size[:, None, :])
    unit = math.sqrt(float(np.median(model.obs.weight)))
    return inverse, rows(options, np.zeros((len(options), model.obs.blocks.shape[1]))) * unit
