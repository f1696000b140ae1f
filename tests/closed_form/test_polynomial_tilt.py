"""Polynomial tilts of Ornstein-Uhlenbeck processes by moments, ODEs and differences."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.polynomial import polynomial
from scipy.integrate import solve_ivp

import sdebench
from sdebench.closed_form.affine_chain import AffineChain
from sdebench.closed_form.polynomial_tilt import (
    PolynomialTilt,
    generator,
    normal_rule,
    step_matrix,
)
from sdebench.errors import NotExactError, ParameterError

P = np.array([0.4, 0.2, 0.5, -0.6, 0.3])
THETA = np.array([0.3, 0.2, -0.4, 0.25])


def profiles(t):
    return np.stack([np.ones_like(t), 2.0 * t / 1.3 - 1.0], axis=-1)


LINE = PolynomialTilt(0.6, P, 1.3, (0.3, 0.4), profiles)
TIMES = 1.3 * np.linspace(0.0, 1.0, 8) ** 1.4


def normal_moment(function, mean, variance):
    z, w = normal_rule(0.05)
    return w @ function(mean + np.sqrt(variance) * z)


@pytest.mark.parametrize("t", [0.0, 0.7, 1.3])
def test_h_by_moments_of_the_transition(t):
    """The matrix exponential against Gaussian moments of p."""
    growth = np.exp(-0.6 * (1.3 - t))
    spread = -np.expm1(-1.2 * (1.3 - t)) / 1.2
    for x in (-1.7, 0.2, 2.4):
        wanted = normal_moment(lambda y: polynomial.polyval(y, P), growth * x, spread)
        assert polynomial.polyval(x, LINE.h(t)) == pytest.approx(wanted, rel=1e-12)


def test_generator_and_step():
    x = np.linspace(-2.0, 2.0, 9)
    first, second = polynomial.polyder(P), polynomial.polyder(P, 2)
    wanted = -0.6 * x * polynomial.polyval(x, first)
    wanted += 0.5 * polynomial.polyval(x, second)
    moved = polynomial.polyval(x, generator(0.6, 5) @ P)
    np.testing.assert_allclose(moved, wanted, atol=1e-13)
    wanted = [
        normal_moment(lambda y: polynomial.polyval(y, P), 0.8 * a, 0.3) for a in x
    ]
    moved = polynomial.polyval(x, step_matrix(0.8, 0.3, 5) @ P)
    np.testing.assert_allclose(moved, wanted, rtol=1e-12)


def test_log_normalizer_of_the_chain():
    """E p(X_N) by one Gaussian: the chain without control is affine."""
    factor, variance = 1.0, 0.0
    for h in np.diff(TIMES):
        factor, variance = factor * (1 - 0.6 * h), (1 - 0.6 * h) ** 2 * variance + h
    for x in (-1.0, 0.7):
        wanted = normal_moment(lambda y: polynomial.polyval(y, P), factor * x, variance)
        found = polynomial.polyval(x, LINE.chain_h(TIMES))
        assert found == pytest.approx(wanted, rel=1e-12)


def answers(theta, chain):
    return LINE.chain(theta, TIMES, 0.05) if chain else LINE.policy(theta, 10, 0.05)


@pytest.mark.parametrize("chain", [False, True])
def test_gradients_are_derivatives(chain):
    found, step = answers(THETA, chain), 1e-3
    for p, unit in enumerate(np.eye(4)):
        at = {k: answers(THETA + k * step * unit, chain) for k in (-2, -1, 1, 2)}
        for name in ("objective", "reward_only_objective"):
            values = {k: getattr(a, name) for k, a in at.items()}
            quotient = 8.0 * (values[1] - values[-1]) - (values[2] - values[-2])
            gradient = getattr(found, name.replace("objective", "gradient"))[p]
            assert gradient == pytest.approx(quotient / (12.0 * step), abs=1e-9)
    free = answers(np.zeros(4), chain)
    np.testing.assert_allclose(free.matching_gradient, free.gradient, atol=1e-13)
    assert np.max(np.abs(found.matching_gradient - found.gradient)) > 1e-2


def test_objective_by_an_ode_solver():
    def moments(t, y):
        m, c = y[:2]
        k, b = profiles(np.array(t)) @ THETA[:2], profiles(np.array(t)) @ THETA[2:]
        cost = 0.5 * (k**2 * (c + m**2) - 2 * k * b * m + b**2)
        return [-(0.6 + k) * m + b, 1.0 - 2 * (0.6 + k) * c, cost]

    tight = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13}
    m, c, cost = solve_ivp(moments, (0.0, 1.3), [0.3, 0.4, 0.0], **tight).y[:, -1]
    final = -normal_moment(lambda y: np.log(polynomial.polyval(y, P)), m, c)
    found = answers(THETA, chain=False)
    assert found.objective == pytest.approx(cost + final, abs=1e-10)
    assert found.reward_only_objective == pytest.approx(final, abs=1e-10)


def test_matching_gradient_of_the_chain_by_the_quadratic_of_equal_moments():
    """A quadratic reward with the same E r' and E r'' has the same gradients."""
    h, rho = np.diff(TIMES), profiles(TIMES[:-1])
    k, b, root = rho @ THETA[:2], rho @ THETA[2:], np.sqrt(h)
    m, c = 0.3, 0.4
    for n in range(len(h)):
        m = (1 - h[n] * (0.6 + k[n])) * m + h[n] * b[n]
        c = (1 - h[n] * (0.6 + k[n])) ** 2 * c + h[n]
    first, second = (
        normal_moment(function, m, c)
        for function in (
            lambda y: (
                polynomial.polyval(y, polynomial.polyder(P)) / polynomial.polyval(y, P)
            ),
            lambda y: (
                polynomial.polyval(y, polynomial.polyder(P, 2))
                / polynomial.polyval(y, P)
                - (
                    polynomial.polyval(y, polynomial.polyder(P))
                    / polynomial.polyval(y, P)
                )
                ** 2
            ),
        )
    )
    chain = AffineChain(
        transition=(1 - 0.6 * h)[:, None, None],
        offset=np.zeros((len(h), 1)),
        noise=root[:, None, None],
        running=np.zeros((len(h), 1, 1)),
        reward_quadratic=np.array([[-second]]),
        reward_linear=np.array([first - second * m]),
        reward_constant=0.0,
        start_mean=np.array([0.3]),
        start_covariance=np.array([[0.4]]),
    )
    moves = root[:, None] * rho
    flat = np.zeros_like(moves)
    slopes = np.concatenate([-moves, flat], 1).T, np.concatenate([flat, moves], 1).T
    control = (-root * k)[:, None, None], (root * b)[:, None]
    feedback = (*control, slopes[0][:, :, None, None], slopes[1][:, :, None])
    found = answers(THETA, chain=True)
    for name, wanted in (
        ("gradient", chain.gradient(*feedback)),
        ("matching_gradient", chain.matching_gradient(*feedback)),
        ("reward_only_gradient", chain.gradient(*feedback, reward_only=True)),
    ):
        np.testing.assert_allclose(getattr(found, name), wanted, atol=1e-11)


def test_chain_tends_to_continuous_time_at_order_one():
    exact = answers(THETA, chain=False).stacked()
    gaps = [
        LINE.chain(THETA, 1.3 * np.linspace(0.0, 1.0, n + 1), 0.05).stacked() - exact
        for n in (400, 800)
    ]
    rest = np.abs(2.0 * gaps[1] - gaps[0])
    assert np.max(rest) < 0.01 * np.max(np.abs(gaps[0]))
    assert np.max(rest / np.abs(gaps[0])) < 0.1


def test_problem():
    problem = sdebench.problem("ou_polynomial")
    truth = problem.truth
    assert truth.optimal_cost() > -truth.log_normalizer() + 0.1  # X_0 is random
    with pytest.raises(NotExactError, match="mixture"):
        truth.tilted_marginal(0.5)
    mean = truth.base_marginal(0.5).mean()
    np.testing.assert_allclose(mean, 0.3 * np.exp(-0.25), rtol=1e-12)
    for spec in ("dim=0", "floor=0", "start_scale=-1", "horizon=0"):
        with pytest.raises(ParameterError, match=spec.partition("=")[0]):
            sdebench.problem(f"ou_polynomial:{spec}")
    point = sdebench.problem("ou_polynomial:start_scale=0,dim=2").truth
    assert point.optimal_cost() == pytest.approx(-point.log_normalizer(), rel=1e-12)
    with pytest.raises(NotExactError, match="point"):
        point.base_marginal(0.0)
