"""Reinforce adjoint matching on Gaussians: its flow as a differential equation."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from sdebench.closed_form.reinforce_adjoint import ReinforceAdjoint
from sdebench.errors import NotExactError, ParameterError
from sdebench.measure.intervals import Interval
from sdebench.studies._study import EQUAL, agreement

PUBLISHED = {
    0.1: ("0.9128", "0.9091"),
    0.5: ("0.7035", "0.6667"),
    1.0: ("0.5671", "0.5000"),
    2.0: ("0.4263", "0.3333"),
}


@pytest.mark.parametrize("k", PUBLISHED)
def test_published_variances(k):
    problem = ReinforceAdjoint(curvature=k)
    for printed, law in zip(
        PUBLISHED[k], (problem.fixed_point(), problem.tilted()), strict=True
    ):
        assert agreement(printed, Interval(law[1], law[1], law[1])) == EQUAL


PROBLEMS = [
    ReinforceAdjoint(0.3, 0.7, 0.9, 1.3),
    ReinforceAdjoint(-0.5, 1.6, 0.4, -0.15),
    ReinforceAdjoint(0.2, 0.7, 0.9, 0.0),
]


def flow(problem, mean, variance):
    """Integrate dn/drho = D_ref + Cov(r, x_1 | x_t), the covariance by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    weights = weights / weights.sum()

    def denoiser(law, rho, n):
        return (law[0] + rho * law[1] * n) / (1.0 + rho**2 * law[1])

    def slope(rho, n):
        spread = variance / (1.0 + rho**2 * variance)
        x_1 = denoiser((mean, variance), rho, n) + sqrt(spread) * nodes[:, None]
        reward = problem.slope * x_1 - 0.5 * problem.curvature * x_1**2
        label = weights @ (reward * (x_1 - weights @ x_1))
        return denoiser((problem.mean, problem.variance), rho, n) + label

    last = 3e3
    found = solve_ivp(
        slope, (0.0, last), [0.0, 1.0], method="LSODA", rtol=1e-10, atol=1e-12
    )
    low, high = found.y[:, -1] / last
    return low, (high - low) ** 2


@pytest.mark.parametrize("problem", PROBLEMS)
def test_one_step_is_the_flow(problem):
    mean, variance = flow(problem, 0.2, 0.5)
    after = problem.step(0.2, 0.5)
    assert after[0] == pytest.approx(mean, rel=1e-5)
    assert after[1] == pytest.approx(variance, rel=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_fixed_point_stays(problem):
    fixed = problem.fixed_point()
    np.testing.assert_allclose(problem.step(*fixed), fixed, rtol=1e-10)
    gap = abs(fixed[1] / problem.tilted()[1] - 1.0)
    assert gap < 1e-12 if problem.curvature == 0.0 else gap > 1e-3


def test_a_linear_reward_is_met_exactly():
    problem = PROBLEMS[2]
    np.testing.assert_allclose(problem.fixed_point(), problem.tilted(), rtol=1e-10)


def test_an_implicit_euler_step_of_the_tilt():
    """Of first order in the reward: the gap to the tilt is of second order."""
    gaps = []
    for k in (0.02, 0.01):
        problem = ReinforceAdjoint(0.4, 0.8, 10.0 * k, k)
        gaps.append(np.subtract(problem.fixed_point(), problem.tilted()))
    np.testing.assert_allclose(gaps[0] / gaps[1], 4.0, rtol=0.05)


def test_refusals():
    with pytest.raises(ParameterError, match=r"variance -1\.0"):
        ReinforceAdjoint(variance=-1.0)
    with pytest.raises(ParameterError, match="no tilted law"):
        ReinforceAdjoint(curvature=-1.5)
    with pytest.raises(NotExactError, match="below -1/e"):
        ReinforceAdjoint(curvature=-0.4).fixed_point()
