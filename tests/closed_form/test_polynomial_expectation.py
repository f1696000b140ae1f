"""log E e^{p(Y)} against 30-digit quadrature, narrow and wide, far out and inside."""

from __future__ import annotations

import mpmath as mp
import numpy as np
import pytest

from sdebench.closed_form.polynomial_expectation import (
    COARSE,
    PolynomialExpectation,
)
from sdebench.errors import ParameterError

WELLS = (0.3, 0.5, 6.4, 0.0, -1.0)
"""Modes at -1.8 and 1.8, ten above the saddle between them."""


def reference(coefficients, mean, variance):
    """Value and slope in the mean, by a rule that knows where the mass may be."""
    with mp.workdps(30):
        s = mp.sqrt(variance)

        def term(y):
            p = sum(c * y**k for k, c in enumerate(coefficients))
            return mp.exp(p - (y - mean) ** 2 / (2 * variance)) / (
                s * mp.sqrt(2 * mp.pi)
            )

        def slope(y):
            change = sum(k * c * y ** (k - 1) for k, c in enumerate(coefficients) if k)
            return change * term(y)

        if variance < 0.05:
            edges = [mean + s * k for k in range(-40, 41, 2)]
        else:
            edges = [mp.mpf(k) / 2 for k in range(-14, 15)]
        total = mp.quad(term, edges)
        return float(mp.log(total)), float(mp.quad(slope, edges) / total)


@pytest.mark.parametrize(
    ("mean", "variance"),
    [(0.0, 1.2), (1.3, 0.9), (-6.0, 0.5), (4.0, 0.03), (2.0, 1e-4), (0.05, 1e-7)],
)
def test_against_many_digits(mean, variance):
    integral = PolynomialExpectation(WELLS)
    value, slope = integral(np.array([mean]), variance)
    expected = reference(WELLS, mean, variance)
    assert value[0] == pytest.approx(expected[0], rel=1e-13, abs=1e-13)
    assert slope[0] == pytest.approx(expected[1], rel=1e-12, abs=1e-12)
    again = integral(np.array([mean]), variance, COARSE)
    assert again[0][0] == pytest.approx(value[0], rel=1e-13, abs=1e-13)


def test_no_variance_and_a_quadratic():
    x = np.linspace(-3.0, 3.0, 7)
    integral = PolynomialExpectation((0.2, 0.5, -0.7))
    value, slope = integral(x, 0.0)
    np.testing.assert_allclose(value, 0.2 + 0.5 * x - 0.7 * x**2, atol=1e-14)
    np.testing.assert_allclose(slope, 0.5 - 1.4 * x, atol=1e-14)
    value, slope = integral(x, 0.8)
    excess = 1.0 + 1.4 * 0.8  # of completing the square
    expected = 0.2 - 0.5 * np.log(excess)
    expected = expected + (0.5 * x - 0.7 * x**2 + 0.125 * 0.8) / excess
    np.testing.assert_allclose(value, expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(slope, (0.5 - 1.4 * x) / excess, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("given", [(1.0, 2.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0, -1.0)])
def test_exponents_that_do_not_fall_are_refused(given):
    with pytest.raises(ParameterError, match="does not fall"):
        PolynomialExpectation(given)
