"""Many-Well: its published normalizer, its law, and what a coarse rule would miss."""

from __future__ import annotations

import _checks as checks
import numpy as np
import pytest

import sdebench
from sdebench.errors import NotExactError, ParameterError
from sdebench.problems import many_well
from sdebench.problems.many_well import ManyWell


@pytest.fixture(scope="module")
def plane():
    return ManyWell(dim=2)


def density(problem, axis, well):
    """Target of one coordinate at equidistant points, by its definition."""
    log_rho = -(axis**4) + 6.0 * axis**2 + 0.5 * axis if well else -0.5 * axis**2
    return np.exp(log_rho)


def test_the_normalizer_is_the_published_one(plane):
    """164.695675 at d = 32, and two trapezoidal sums for a pair."""
    assert ManyWell(dim=32).truth.log_normalizer() == pytest.approx(
        164.695675, abs=1e-6
    )
    axis = np.linspace(-9.0, 9.0, 6001)
    sums = [np.sum(density(plane, axis, w)) * 0.003 for w in (True, False)]
    expected = np.log(sums[0] * sums[1])
    assert plane.truth.log_normalizer() == pytest.approx(expected, rel=1e-13)
    other = ManyWell(dim=2, rate=0.4, horizon=2.5)
    assert other.truth.log_normalizer() == pytest.approx(expected, rel=1e-13)


def test_h_carries_the_mass_of_the_target(plane):
    """int h(x, t) p_t(x) dx = int rho, coordinate by coordinate."""
    t, axis, width = 0.6, np.linspace(-9.0, 9.0, 1801), 0.01
    x = np.stack([axis, axis], axis=1)
    growth = np.exp(-plane.rate * (plane.horizon - t))
    variance, left = plane.variance_left(0.0), plane.variance_left(t)
    now = (variance - left) / growth**2  # of X_t
    law = np.exp(-0.5 * axis**2 / now) / np.sqrt(2.0 * np.pi * now)
    log_h = plane.truth._sides(x, t)[0]
    for i, well in enumerate((True, False)):
        mass = np.sum(law * np.exp(log_h[:, i])) * width
        expected = np.sum(density(plane, axis, well)) * width
        assert mass == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("importance", [True, False], ids=["optimum", "base"])
def test_normalizer_by_simulation(plane, importance):
    """In the plane, where weights are good enough for a test."""
    checks.check_feynman_kac(plane, importance, n_paths=2**14, n_steps=64)


def test_regret_by_simulation(plane):
    checks.check_regret_by_simulation(plane, "halfway", n_paths=2**10, n_steps=32)


@pytest.mark.slow
def test_the_stored_optimum_is_the_least(plane):
    found = many_well._best(plane)
    np.testing.assert_allclose(many_well.OPTIMUM, found, rtol=1e-9)
    longer = ManyWell(dim=2, horizon=2.0)
    checks.check_stationary(longer)
    assert longer.theta_star[1] < plane.theta_star[1]


def test_chain_answers_are_sums_over_pairs(plane):
    wide = ManyWell(dim=8)
    for quantity in ("objective", "gradient", "matching_gradient"):
        one, four = (getattr(p.truth, quantity)("halfway", 9) for p in (plane, wide))
        np.testing.assert_allclose(four, 4.0 * np.asarray(one), rtol=1e-12)
    odd = ManyWell(dim=3).truth
    axis = np.linspace(-9.0, 9.0, 6001)
    well = np.log(np.sum(density(plane, axis, True)) * 0.003)
    expected = plane.truth.log_normalizer() + well
    assert odd.log_normalizer() == pytest.approx(expected, rel=1e-13)
    with pytest.raises(NotExactError, match="optimum"):
        plane.truth.optimal_cost(9)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"dim": 1}, "at least 2"),
        ({"rate": 0.0}, "rate"),
        ({"horizon": -1.0}, "horizon"),
        ({"horizon": 0.5}, "infinite variance"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line(parameters, message):
    with pytest.raises(ParameterError, match=message) as caught:
        sdebench.problem("many_well", **parameters)
    assert "\n" not in str(caught.value)
