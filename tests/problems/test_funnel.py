"""Neal's funnel: h against the law of its bridges, u* and J against exact samples."""

from __future__ import annotations

import _checks as checks
import numpy as np
import pytest
from scipy.special import logsumexp

import sdebench
from sdebench.errors import ParameterError
from sdebench.problems.funnel import NealFunnel


@pytest.fixture(scope="module")
def problem():
    return NealFunnel()


def log_normal(x, mean, variance):
    return -0.5 * (x - mean) ** 2 / variance - 0.5 * np.log(2.0 * np.pi * variance)


def log_h_by_bridges(problem, x, t, count=40_001):
    """log p*_t(x) / p_t(x), p*_t the Brownian bridges to the funnel, by a fine sum."""
    share = t / problem.horizon
    loose = problem.horizon * share * (1.0 - share)
    y = np.linspace(-40.0, 40.0, count)
    spread = share**2 * np.exp(y) + loose
    logs = log_normal(y, 0.0, problem.spread**2) + log_normal(x[0], share * y, loose)
    squares, n = np.sum(x[1:] ** 2), problem.dim - 1
    logs += -0.5 * squares / spread - 0.5 * n * np.log(2.0 * np.pi * spread)
    total = logsumexp(logs) + np.log(80.0 / (count - 1))
    return total - np.sum(log_normal(x, 0.0, t))


@pytest.mark.parametrize("t", [0.02, 0.3, 0.7, 0.97])
@pytest.mark.parametrize("size", [0.5, 1.0, 3.0])
def test_h_against_bridges(problem, t, size):
    x = size * np.sqrt(t) * np.random.default_rng(1).normal(size=problem.dim)
    expected = log_h_by_bridges(problem, x, t)
    got = -problem.truth.value(x, t)
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)


def samples(problem, count, seed):
    """Exact samples of the funnel."""
    z = np.random.default_rng(seed).normal(size=(count, problem.dim))
    z[:, 0] *= problem.spread
    z[:, 1:] *= np.exp(0.5 * z[:, :1])
    return z


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_control_points_to_where_the_funnel_is(problem, t):
    """Brownian base: (T - t) u*(x, t) = E*[X_T - x | X_t = x], on exact bridges.

    Projected on bounded functions of X_t; a wrong u* is off by its own size.
    """
    count = 40_000
    end = samples(problem, count, 11)
    z = np.random.default_rng(12).normal(size=end.shape)
    x = t * end + np.sqrt(t * (1.0 - t)) * z
    gap = (end - x) - (1.0 - t) * problem.truth.control(x, t)
    tests = [np.ones(count), np.tanh(x[:, 0]), np.tanh(x[:, 1])]
    bounded = 1.0 / (1.0 + np.sum(x[:, 1:] ** 2, axis=1))  # else fourth moments fail
    rows = [gap[:, i] * psi * bounded for i in (0, 1, 5) for psi in tests]
    errors = [row.std(ddof=1) / np.sqrt(count) for row in rows]
    checks.require_zero([row.mean() for row in rows], errors, "u* on bridges")
    wrong = (gap[:, 0] + 0.1 * (end - x)[:, 0]) * bounded * tests[1]
    assert abs(wrong.mean()) > 6.0 * wrong.std() / np.sqrt(count)


def test_objective_by_exact_sampling(problem):
    """-E r(X_T) under the affine control: X_T is Gaussian, its moments by differences.

    d/dm and d/dc of -E r are the means of the slopes, Gaussian integration by parts.
    """
    truth, steps = problem.truth, 40
    theta = problem.theta("halfway")
    tables = problem.tables(theta, problem.time_grid(steps))
    mean, variance = np.zeros(problem.dim), np.zeros(problem.dim)
    for n in range(steps):
        g = tables.noise[n]
        factor = 1.0 + g * tables.gain[n, :, 1]
        mean = factor * mean + g * tables.gain[n, :, 0]
        variance = factor**2 * variance + g**2
    z, w = np.polynomial.hermite_e.hermegauss(60)
    w = w / w.sum()
    first = mean[0] + np.sqrt(variance[0]) * z
    # given x_0 the reward is linear in the squares of the others
    x = np.zeros((60, problem.dim))
    x[:, 0] = first
    x[:, 1:] = np.sqrt(variance[1:])
    expected = -(w @ problem.reward(x))
    got = truth.reward_only_objective(theta, steps)
    assert got == pytest.approx(expected, rel=1e-12)


def test_the_law_of_the_end_needs_no_steps(problem):
    assert problem.truth.log_normalizer() == problem.truth.log_normalizer(3) == 0.0
    origin = np.zeros((1, problem.dim))
    assert problem.truth.value(origin, 0.0)[0] == pytest.approx(0.0, abs=1e-13)
    with pytest.raises(ParameterError, match="infinite"):
        problem.truth.value(origin + 0.1, 0.0)


def test_weights_have_the_tail_index_one(problem):
    """E[e^{q r}; |x_0| < 6] by sums: for q > 1 it grows with the box without bound."""

    def mass(power, box):
        x0 = np.linspace(-6.0, 6.0, 241)
        xi = np.linspace(-box, box, 40 * box + 1)
        grid = np.stack(np.meshgrid(x0, xi, indexing="ij"), axis=-1)
        plane = NealFunnel(dim=2)
        law = np.sum(log_normal(grid, 0.0, 1.0), axis=-1)
        return logsumexp(power * plane.reward(grid) + law)

    assert mass(1.0, 80) == pytest.approx(mass(1.0, 160), abs=0.01)
    assert mass(1.2, 160) > mass(1.2, 80) + 100.0


def test_other_parameters():
    checks.check_hjb(NealFunnel(dim=3), tolerance=1e-10)
    other = NealFunnel(dim=4, spread=1.5, horizon=2.0)
    checks.check_hjb(other, tolerance=1e-10)
    checks.check_gradient(other, "halfway")
    checks.check_stationary(other)
    checks.check_tables(other, "halfway")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"dim": 1}, "dim 1"), ({"spread": 0.0}, "spread"), ({"horizon": 0.0}, "horizon")],
)
def test_wrong_parameters_are_refused_in_one_line(parameters, message):
    with pytest.raises(ParameterError, match=message) as caught:
        sdebench.problem("funnel", **parameters)
    assert "\n" not in str(caught.value)
