"""Curves for loss against the share rho of the sparse parameters that goes to routed experts.

Each family but the constant has its vertex rho* as first parameter, so a profile over that parameter is a
profile over the optimum. A vertex outside [0, 1] stands for a curve that is monotone there, whose optimum is
the nearer end. r0 = k / (E_1 - k) is the share of active experts, R = (k + rho (E_1 - k)) / E_1 =
(r0 + rho) / (1 + r0) the share of experts kept.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from scaling import boxcox
from scaling.families import CONSTANT, Family
from scaling.separable import Axis, Basis, Slope

FLOOR = 0.06
"""r0 where the table has neither `experts` nor `top_k`: 6 active of 106 experts, the published sparse base
model. It only matters for rho below about 3 r0.
"""

UNIT = (0.0, 1.0)
BEYOND = 1.2
"""How far beyond rho = 1 the vertex of a log curve is searched: there the memory term has vanished unless
m0 is larger than .2.
"""
VERTEX = Axis(name="rho*", grid=np.linspace(-1.0, 2.0, 151), edge=UNIT)
SHARE = Axis(name="rho*", grid=np.linspace(0.0, 1.0, 51), edge=UNIT)
SATURATION = Axis(name="m0", grid=np.log(np.geomspace(1e-4, 1e2, 25)), log=True, edge=(1.001e-4, 0.999e2))
"""m0 is the memory, as a share of the sparse budget, at which its return has halved; from a ten-thousandth
(a step at rho = 1) to a hundred budgets (a straight line).
"""
EXPONENT = Axis(name="lambda", grid=np.linspace(-0.9, 3.0, 9))
"""Above -1 both terms stay convex, so the curve keeps one minimum."""


def _quadratic(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    return (x - theta[..., :1]) ** 2


def _quadratic_slope(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    return -2 * (x - theta[..., :1])[..., None]


def _cubic(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    u = x - theta[..., :1]
    return u**2 + theta[..., 1:2] * u**3


def _cubic_slope(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    u = x - theta[..., :1]
    return np.stack([-2 * u - 3 * theta[..., 1:2] * u**2, u**3], axis=-1)


def _share_axis(floor: float, inside: int) -> Axis:
    """rho* from -r0, where experts return nothing, to beyond 1, where memory returns nothing."""
    step = 1.0 / (inside - 1)
    below = np.linspace(-floor, 0.0, 2 + int(floor / step))[:-1]
    above = np.arange(1.0, BEYOND + step, step)[1:]
    return Axis(name="rho*", grid=np.concatenate([below, np.linspace(0.0, 1.0, inside), above]), edge=UNIT)


def _balance(theta: np.ndarray, lam: np.ndarray | float, floor: float) -> tuple[np.ndarray, ...]:
    """Share w = g / (a + g) of the memory term by the first-order condition at rho*, and its derivatives by
    rho*, ln m0 and lambda.

    ln(g / a) = ln(m0 / (1 + r0)) + (lambda + 1) (ln(1 + (1 - rho*) / m0) - ln R(rho*)). At rho* = -r0 only
    memory is left, at rho* = 1 + m0 only experts: a vertex outside [0, 1] is a curve that is monotone on it.
    """
    rho, m0 = theta[..., :1], np.exp(theta[..., 1:2])
    tiny = 1e-12
    experts, memory = np.maximum(rho + floor, tiny), np.maximum(m0 + 1 - rho, tiny * m0)
    tilt = np.log(memory / m0) - np.log(experts / (1 + floor))
    log_ratio = np.clip(theta[..., 1:2] - np.log1p(floor) + (lam + 1) * tilt, -300.0, 300.0)
    share = 1 / (1 + np.exp(-log_ratio))
    steep = share * (1 - share)
    free = (rho + floor > tiny) & (m0 + 1 - rho > tiny * m0)
    by_rho = np.where(free, -steep * (lam + 1) * (1 / memory + 1 / experts), 0.0)
    by_m0 = np.where(free, steep * (1 - (lam + 1) * (1 - rho) / memory), 0.0)
    return share, by_rho, by_m0, steep * tilt


def _returns(floor: float) -> tuple[Basis, Slope]:
    """Experts' and memory's returns, of weights 1 - w and w; theta is (rho*, ln m0) or (rho*, ln m0, lambda).

    Without lambda both are logarithms.
    """

    def parts(theta: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, ...]:
        lam = theta[..., 2:3] if theta.shape[-1] == 3 else np.zeros_like(theta[..., :1])
        m0 = np.exp(theta[..., 1:2])
        kept = np.log((x + floor) / (1 + floor)) + 0 * m0
        return lam, m0, kept, np.log1p((1.0 - x) / m0)

    def basis(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        lam, _, kept, gain = parts(theta, x)
        share = _balance(theta, lam, floor)[0]
        if theta.shape[-1] == 2:
            return -(1 - share) * kept - share * gain
        return -(1 - share) * boxcox.z(kept, lam) - share * boxcox.z(gain, lam)

    def slope(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        lam, m0, kept, gain = parts(theta, x)
        share, by_rho, by_m0, by_lam = _balance(theta, lam, floor)
        less = (1.0 - x) / (m0 + 1.0 - x)
        if theta.shape[-1] == 2:
            trade = kept - gain
            return np.stack([trade * by_rho, trade * by_m0 + share * less], axis=-1)
        trade = boxcox.z(kept, lam) - boxcox.z(gain, lam)
        own = -(1 - share) * boxcox.dz_dalpha(kept, lam) - share * boxcox.dz_dalpha(gain, lam)
        return np.stack(
            [
                trade * by_rho,
                trade * by_m0 + share * boxcox.dz_dlog(gain, lam) * less,
                trade * by_lam + own,
            ],
            axis=-1,
        )

    return basis, slope


def _with_jump(family: Family) -> Family:
    return dataclasses.replace(
        family, name=f"{family.name}+jump", formula=f"{family.formula} + J 1[rho=1]", jump_at=1.0
    )


def allocation_families(floor: float = FLOOR) -> tuple[Family, ...]:
    """Every parametric allocation family, simplest first; `floor` is r0 = k / (E_1 - k)."""
    quadratic = Family(
        name="quadratic",
        formula="c + b (rho - rho*)^2",
        amplitude="b",
        axes=(VERTEX,),
        basis=_quadratic,
        slope=_quadratic_slope,
    )
    cubic = Family(
        name="cubic",
        formula="c + b (rho - rho*)^2 + b s (rho - rho*)^3",
        amplitude="b",
        axes=(SHARE, Axis(name="s", grid=np.linspace(-6.0, 6.0, 49))),
        basis=_cubic,
        slope=_cubic_slope,
        check_only=True,
    )
    basis, slope = _returns(floor)

    def returns(theta: np.ndarray, amplitude: float) -> dict[str, float]:
        lam = float(theta[2]) if len(theta) == 3 else 0.0
        share = float(_balance(theta, lam, floor)[0][0])
        return {"a": (1 - share) * amplitude, "g": share * amplitude}

    log_saturating = Family(
        name="log-saturating",
        formula="E - a ln R - g ln(1 + (1 - rho)/m0)",
        amplitude="a+g",
        axes=(_share_axis(floor, 51), SATURATION),
        basis=basis,
        slope=slope,
        derived=returns,
    )
    general = Family(
        name="box-cox",
        formula="E - a z_lambda(R) - g z_lambda(1 + (1 - rho)/m0)",
        amplitude="a+g",
        axes=(
            _share_axis(floor, 41),
            Axis(name="m0", grid=np.log(np.geomspace(1e-4, 1e2, 19)), log=True, edge=SATURATION.edge),
            EXPONENT,
        ),
        basis=basis,
        slope=slope,
        derived=returns,
    )
    return (
        CONSTANT,
        quadratic,
        _with_jump(quadratic),
        cubic,
        log_saturating,
        _with_jump(log_saturating),
        general,
        _with_jump(general),
    )
