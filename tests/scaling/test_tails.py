"""Tail probabilities against scipy's."""

import math

import pytest
from scipy import special

from scaling.tails import chi_squared_quantile, f_cdf, f_quantile, t_cdf

DOFS = (1, 2, 3, 6, 9.5, 30, 100, 1e4, 1e6)


@pytest.mark.parametrize("within", DOFS)
@pytest.mark.parametrize("between", [1, 2, 7, 40, 1000])
def test_f(between, within):
    for value in (0.0, 1e-6, 0.3, 1.0, 1.7, 12.0, 300.0):
        assert f_cdf(between, within, value) == pytest.approx(special.fdtr(between, within, value), rel=1e-10)
    for probability in (0.5, 0.8, 0.95, 0.99, 0.999):
        value = f_quantile(between, within, probability)
        assert value == pytest.approx(special.fdtri(between, within, probability), rel=1e-9)
        assert f_cdf(between, within, value) == pytest.approx(probability, rel=1e-11)


@pytest.mark.parametrize("dof", [*DOFS, 1e9])
def test_t_far_into_its_tail(dof):
    for value in (-40.0, -5.0, -1.0, -1e-3, 0.0, 0.4, 2.0, 8.0):
        assert t_cdf(dof, value) == pytest.approx(special.stdtr(dof, value), rel=1e-8, abs=1e-300)
    assert t_cdf(dof, -1e200) == pytest.approx(0.0, abs=1e-140)
    assert t_cdf(math.inf, -1.96) == pytest.approx(special.ndtr(-1.96), rel=1e-13)


def test_chi_squared():
    for probability in (0.5, 0.8, 0.95, 0.999):
        assert chi_squared_quantile(probability) == pytest.approx(
            special.chdtri(1, 1 - probability), rel=1e-12
        )
