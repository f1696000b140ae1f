"""Importance sampling of several expectations: best answers by other routes.

Stochastic checks have fixed seeds and are at least five standard errors wide.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from sdebench.closed_form.control_variate_sampling import (
    alternate,
    best_beta,
    best_ratio,
    variance,
)
from sdebench.errors import ParameterError


@pytest.fixture
def finite():
    """A law on six points, two functions."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 6)), rng.dirichlet(np.ones(6)), np.array([0.7, 1.9])


def direct_variance(phi, f, w, ratio, beta):
    """Second route: the variance of (phi_j - beta_j) f/g + beta_j under g."""
    g = f * ratio
    values = (phi - beta[:, None]) / ratio + beta[:, None]
    means = values @ g
    return float(w @ ((values - means[:, None]) ** 2 @ g))


def test_the_variance_is_that_of_the_estimator(finite):
    phi, f, w = finite
    rng = np.random.default_rng(1)
    ratio = rng.uniform(0.3, 2.0, 6)
    ratio /= f @ ratio
    beta = np.array([0.4, -1.2])
    found = variance(phi, f, w, ratio, beta)
    assert found == pytest.approx(direct_variance(phi, f, w, ratio, beta), rel=1e-12)
    # and the estimator has the mean I, whatever g and beta
    values = (phi - beta[:, None]) / ratio + beta[:, None]
    np.testing.assert_allclose(values @ (f * ratio), phi @ f, rtol=1e-12)


def test_the_best_proposal_by_minimization(finite):
    phi, f, w = finite
    beta = np.array([0.3, 0.1])

    def value(logs):
        ratio = np.exp(logs)
        return variance(phi, f, w, ratio / (f @ ratio), beta)

    found = minimize(value, np.zeros(6), tol=1e-12)
    best = best_ratio(phi, f, w, beta)
    assert f @ best == pytest.approx(1.0, rel=1e-12)
    assert variance(phi, f, w, best, beta) == pytest.approx(found.fun, rel=1e-7)
    root = np.sqrt(w @ (phi - beta[:, None]) ** 2)
    formula = (f @ root) ** 2 - w @ (phi @ f - beta) ** 2
    assert variance(phi, f, w, best, beta) == pytest.approx(formula, rel=1e-12)


def test_the_best_coefficients_by_minimization(finite):
    phi, f, w = finite
    ratio = np.array([0.5, 2.0, 1.0, 0.7, 1.4, 0.9])
    ratio /= f @ ratio
    found = minimize(lambda b: variance(phi, f, w, ratio, b), np.zeros(2), tol=1e-12)
    np.testing.assert_allclose(best_beta(phi, f, ratio), found.x, atol=1e-6)


def test_turns_never_raise_the_variance(finite):
    phi, f, w = finite
    beta, last = np.array([3.0, -5.0]), np.inf
    for _ in range(30):
        ratio = best_ratio(phi, f, w, beta)
        between = variance(phi, f, w, ratio, beta)
        beta = best_beta(phi, f, ratio)
        after = variance(phi, f, w, ratio, beta)
        assert after <= between * (1 + 1e-12) <= last * (1 + 1e-12)
        last = after
    assert alternate(phi, f, w).variance <= last * (1.0 + 1e-6)


@pytest.mark.parametrize("beta", [0.0, -3.0])
def test_one_function_above_its_coefficient_has_no_variance(beta):
    f = np.array([0.2, 0.5, 0.3])
    phi, w, given = np.array([[1.0, 0.4, 2.5]]), np.ones(1), np.array([beta])
    ratio = best_ratio(phi, f, w, given)
    assert variance(phi, f, w, ratio, given) == pytest.approx(0.0, abs=1e-14)
    values = (phi - beta) / ratio + beta
    np.testing.assert_allclose(values[0], (phi @ f)[0], rtol=1e-13)  # every draw is I


ONE, TWO, HALVES = np.ones(1), np.ones((1, 2)), np.full(2, 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_beta(TWO, HALVES, np.ones(2)), "the law itself"),
        (lambda: best_ratio(TWO, HALVES, ONE, ONE), "nothing to estimate"),
        (lambda: best_beta(TWO, np.ones(2), np.array([0.5, 1.5])), "sum to 2"),
    ],
)
def test_wrong_input_is_refused_in_one_line(call, message):
    with pytest.raises(ParameterError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
