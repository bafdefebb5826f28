"""Probabilities and quantiles of F and Student's t.

Written out because importing scipy.special takes longer than fitting ten runs. All of it is the regularised
incomplete beta function I_x(a, b) by its continued fraction (modified Lentz: Press et al., Numerical Recipes
6.4), with the gamma functions in front taken as one difference, so that large degrees of freedom lose no
digits.
"""

from __future__ import annotations

import math
from functools import lru_cache

_TINY = 1e-300
_ROUNDING = 1e-16
_STEPS = 200_000
"""Steps of the fraction at most; it needs about the root of the larger degrees of freedom."""


@lru_cache(maxsize=4096)
def f_cdf(between: float, within: float, value: float) -> float:
    """P(F <= value) for F of `between` and `within` degrees of freedom."""
    if not value > 0 or math.isinf(value):
        return 1.0 if value > 0 else 0.0
    return _beta(between / 2, within / 2, between * float(value), within)


@lru_cache(maxsize=4096)
def f_quantile(between: float, within: float, probability: float) -> float:
    """Value that F of `between` and `within` degrees of freedom stays below with `probability`.

    Newton's method on the logarithm of the upper tail against ln v, v = within / (within + between F); the
    tail is concave there, so that the steps close in from one side.
    """
    a, b, tail = within / 2, between / 2, 1 - probability
    log_v = math.log(a / (a + b))
    for _ in range(200):
        v = math.exp(log_v)
        rest = -math.expm1(log_v)
        upper = _beta(a, b, v, rest)
        slope = math.exp(_log_front(a, b, v, rest) - math.log(rest)) / upper
        step = (math.log(upper) - math.log(tail)) / slope
        log_v = min(log_v - max(min(step, 20.0), -20.0), log_v / 2)
        if abs(step) <= 4 * _ROUNDING * (1 + abs(log_v)):
            break
    return -math.expm1(log_v) / math.exp(log_v) * within / between


@lru_cache(maxsize=4096)
def t_cdf(dof: float, value: float) -> float:
    """P(t <= value) for Student's t; that of the normal when `dof` is infinite."""
    if math.isinf(dof):
        return 0.5 * math.erfc(-value / math.sqrt(2))
    square = float(value) ** 2 if abs(value) < 1e150 else 1e300
    tail = 0.5 * _beta(dof / 2, 0.5, dof, square)
    return tail if value < 0 else 1 - tail


@lru_cache(maxsize=256)
def chi_squared_quantile(probability: float) -> float:
    """Value that chi-squared of one degree of freedom stays below with `probability`."""
    low, high = 0.0, 40.0
    while high - low > 1e-15 * high:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if math.erf(middle / math.sqrt(2)) < probability else (low, middle)
    return high * high


def _beta(a: float, b: float, x: float, y: float) -> float:
    """I_{x / (x + y)}(a, b); both parts are given, so that neither is lost beside the other."""
    x, y = x / (x + y), y / (x + y)
    if x <= 0 or y <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - math.exp(_log_front(b, a, y, x)) / b * _fraction(b, a, y)
    return math.exp(_log_front(a, b, x, y)) / a * _fraction(a, b, x)


def _log_front(a: float, b: float, x: float, y: float) -> float:
    """ln(x^a y^b / B(a, b)), x + y = 1."""
    powers = a * (math.log1p(-y) if y < 0.5 else math.log(x)) + b * (
        math.log1p(-x) if x < 0.5 else math.log(y)
    )
    large, small = max(a, b), min(a, b)
    if large < 20:
        return powers + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    # ln Gamma(large + small) - ln Gamma(large) by Stirling, without the parts that cancel
    total = large + small
    ratio = (large - 0.5) * math.log1p(small / large) + small * math.log(total) - small
    return powers + ratio + _stirling(total) - _stirling(large) - math.lgamma(small)


def _stirling(x: float) -> float:
    """What Stirling's formula leaves out of ln Gamma(x), for x >= 20."""
    return (1 / 12 - (1 / 360 - (1 / 1260 - 1 / (1680 * x * x)) / (x * x)) / (x * x)) / x


def _fraction(a: float, b: float, x: float) -> float:
    d = 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > _TINY else _TINY)
    c, value = 1.0, d
    for m in range(1, _STEPS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 + term * d
            d = 1 / (d if abs(d) > _TINY else _TINY)
            c = 1 + term / c
            c = c if abs(c) > _TINY else _TINY
            change = c * d
            value *= change
        if abs(change - 1) <= _ROUNDING:
            break
    return value
