"""What every table and picture of fitted models says in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scaling.report.drawing import Array, Curve
from scaling.report.numbers import fixed, significant

if TYPE_CHECKING:
    from scaling.curvefit import CurveFit
    from scaling.joint_results import JointModel

SCORES = ("Δ AICc", "AICc", "RSS", "k")


def scores(model: CurveFit | JointModel) -> tuple[str, ...]:
    """Return the cells of the columns `SCORES`."""
    return (fixed(model.delta_aicc, 1), fixed(model.aicc, 1), significant(model.rss), str(model.k))


def formula(model: CurveFit) -> str:
    """Return a family's formula as people write it."""
    return model.formula.replace("rho", "ρ").replace("lambda", "λ").replace("alpha", "α")


def status(model: CurveFit) -> str:
    """Return what went wrong with a fit, or its status."""
    return "; ".join(model.notes) or model.status


def curve(model: CurveFit, x: Array) -> Curve:
    """Return a model's mean and its band over x, the band only where it is finite everywhere."""
    low, high = model.band(x)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        return Curve(name=model.name, x=x, mean=model.predict(x))
    return Curve(name=model.name, x=x, mean=model.predict(x), low=low, high=high)


def profile_f(fit: CurveFit, values: Array) -> tuple[Array, float]:
    """Return the profile F of a fit's only non-linear parameter at `values`, and its 95 % threshold."""
    assert len(fit.family.axes) == 1
    assert fit.rss is not None
    design = fit.design
    y = design.weighted(fit.obs.y)
    curves = design.curves(values[:, None])
    rest = y - design.amplitude(y, curves)[:, None] * curves
    variance = 1.0 if fit.obs.known or not fit.sd else fit.sd**2
    return ((rest * rest).sum(-1) - fit.rss) / variance, (fit.critical - fit.rss) / variance
