"""Bounds on the lean adjoint: quadrature, maximization, and arbitrary states.

No test here is stochastic: the bounds must hold along any path.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

from sdebench.closed_form import log_quadratics as lq
from sdebench.closed_form.lean_adjoint_bound import (
    bound,
    chain_bound,
    least_curvature,
    noised_curvature,
    peak,
)
from sdebench.closed_form.schedule import (
    Cosine,
    LinearFlow,
    Schedule,
    VarianceExploding,
    VariancePreserving,
)
from sdebench.errors import NotExactError, ParameterError

SCHEDULES = [
    VariancePreserving(1.0, 4.0),
    VariancePreserving(2.0, 0.3),
    LinearFlow(1.0),
    LinearFlow(2.5),
    Cosine(1.3),
    VarianceExploding(1.0, 3.0),
]
every = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
curvatures = pytest.mark.parametrize("curvature", [0.05, 0.25, 0.5, 1.0, 4.0])


@every
@curvatures
def test_the_bound_is_gronwalls_integral(schedule, curvature):
    """Second route: exp of the integral of kappa - 2 eta m_t, by quadrature."""

    def rate(t):
        m = curvature / (schedule.alpha(t) ** 2 + curvature * schedule.variance(t))
        return float(schedule.kappa(t) - 2.0 * schedule.eta(t) * m)

    for share in (0.1, 0.5, 0.9):
        t = share * schedule.horizon
        exponent, _ = quad(rate, t, schedule.horizon, epsabs=1e-13, epsrel=1e-13)
        assert bound(schedule, curvature, t) == pytest.approx(np.exp(exponent), 1e-10)
    assert bound(schedule, curvature, schedule.horizon) == pytest.approx(1.0, 1e-14)


@every
@curvatures
def test_the_peak_by_maximization(schedule, curvature):
    time, height = peak(schedule, curvature)
    grid = np.linspace(1e-9, 1.0, 2001) * schedule.horizon
    values = bound(schedule, curvature, grid)
    start = grid[np.argmax(values)]
    found = minimize_scalar(
        lambda t: -float(bound(schedule, curvature, t)),
        bounds=(max(start - 1e-3, 0.0), min(start + 1e-3, schedule.horizon)),
        method="bounded",
        options={"xatol": 1e-12},
    )
    assert height >= values.max() - 1e-14
    assert height == pytest.approx(-found.fun, rel=1e-6)
    assert bound(schedule, curvature, time) == pytest.approx(height, rel=1e-14)


def test_the_peaks_that_are_known():
    """Rectified flow: 1.2071 at m = 1, 1.6180 at m = 1/4; VP: 1/(2 sqrt(m (1 - m)))."""
    flow = LinearFlow(1.0)
    assert peak(flow, 1.0)[1] == pytest.approx(0.5 * (1.0 + np.sqrt(2.0)), rel=1e-14)
    assert peak(flow, 0.25)[1] == pytest.approx(0.5 * (1.0 + np.sqrt(5.0)), rel=1e-14)
    noise = VariancePreserving(1.0, 20.0)
    for m in (0.1, 0.3, 0.49):
        height = 0.5 / np.sqrt(m * (1.0 - m))
        assert peak(noise, m)[1] == pytest.approx(height, rel=1e-13)
    assert peak(noise, 0.5) == peak(noise, 3.0) == (1.0, 1.0)


@every
def test_the_scaled_peak_knows_no_schedule(schedule):
    """max of beta f = 1/(2 sqrt m), where alpha^2 / beta^2 = m."""
    m = 0.7
    t = schedule.horizon * (1.0 - np.geomspace(1e-6, 1.0, 200_001))
    scaled = np.sqrt(schedule.variance(t)) * bound(schedule, m, t)
    reached = schedule.alpha(0.0) ** 2 <= m * schedule.variance(0.0)
    if reached:
        assert scaled.max() == pytest.approx(0.5 / np.sqrt(m), rel=1e-8)
    else:
        assert scaled.max() < 0.5 / np.sqrt(m)


# ---- curvature ---------------------------------------------------------------------
def mixture(means, variance, weights=None):
    count, dim = means.shape
    weights = np.full(count, 1.0 / count) if weights is None else weights
    return lq.gaussian_rows(np.log(weights), means, np.full((count, dim), variance))


def test_the_curvature_of_two_components_is_attained_halfway():
    means = np.array([[-0.6, 0.2], [0.3, -0.5]])
    m = least_curvature(means, 0.8)
    curved = -lq.hessian(mixture(means, 0.8), means.mean(axis=0)[None])[0]
    assert np.linalg.eigvalsh(curved)[0] == pytest.approx(m, rel=1e-13)
    assert least_curvature(means[:1], 0.8) == 1.25
    assert least_curvature(3.0 * means, 0.8) < 0.0


@pytest.mark.parametrize("schedule", SCHEDULES[:-1], ids=repr)
def test_curvatures_of_noised_mixtures_lie_between_the_bounds(schedule):
    """Eigenvalues of -Hess log p_t at 2000 places, unequal weights."""
    rng = np.random.default_rng(3)
    means, variance = rng.uniform(-0.5, 0.5, (5, 2)), 0.9
    weights = rng.dirichlet(np.ones(5))
    m = least_curvature(means, variance)
    assert m > 0.0
    for share in (0.15, 0.5, 0.8, 1.0):
        t = share * schedule.horizon
        alpha, noise = float(schedule.alpha(t)), float(schedule.variance(t))
        rows = mixture(alpha * means, alpha**2 * variance + noise, weights)
        values = np.linalg.eigvalsh(-lq.hessian(rows, rng.normal(0, 2, (2000, 2))))
        assert values.min() >= float(noised_curvature(schedule, m, t)) - 1e-12
        most = float(noised_curvature(schedule, 1.0 / variance, t))
        assert values.max() <= most + 1e-12


# ---- the chain ---------------------------------------------------------------------
def grid(schedule, n_steps, start=0.06):
    return np.linspace(start * schedule.horizon, schedule.horizon, n_steps + 1)


def lean_adjoints(schedule, means, variance, times, states, last):
    """a_n (N + 1, n, d) along arbitrary states, by Jacobians from differences."""
    adjoints = [last]
    for n in range(len(times) - 2, -1, -1):
        t, h = times[n], times[n + 1] - times[n]
        alpha, noise = float(schedule.alpha(t)), float(schedule.variance(t))
        rows = mixture(alpha * means, alpha**2 * variance + noise)

        def mean_step(x, t=t, h=h, rows=rows):
            pull = 2.0 * h * float(schedule.eta(t))
            return (1 + h * float(schedule.kappa(t))) * x + pull * lq.gradient(rows, x)

        step = 1e-5
        columns = [
            np.sum(
                (mean_step(states[n] + step * e) - mean_step(states[n] - step * e))
                * adjoints[-1],
                axis=-1,
            )
            / (2.0 * step)
            for e in np.eye(states.shape[-1])
        ]
        adjoints.append(np.stack(columns, axis=-1))
    return np.array(adjoints[::-1])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("n_steps", [3, 40])
def test_no_path_of_the_chain_is_above_its_bound(schedule, n_steps):
    """Arbitrary states: the bound holds path by path, not only for likely ones."""
    rng = np.random.default_rng(1)
    means, variance = np.array([[0.5, 0.1], [-0.4, 0.0], [0.1, -0.6]]), 0.7
    times = grid(schedule, n_steps)
    states = rng.normal(0.0, 0.7, (n_steps + 1, 400, 2))
    last = rng.normal(size=(400, 2))
    found = lean_adjoints(schedule, means, variance, times, states, last)
    limit = chain_bound(
        schedule, least_curvature(means, variance), 1.0 / variance, times
    )
    ratio = np.linalg.norm(found, axis=-1) / np.linalg.norm(last, axis=-1)
    assert np.all(ratio <= limit[:, None] * (1.0 + 1e-6))
    # not vacuous: the largest ratio comes near, and half the curvature's rate fails
    if n_steps == 40:
        assert np.max(ratio / limit[:, None]) > 0.5


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_gaussian_attains_the_bound(schedule):
    """a_n = product of the Jacobians of the marginals' linear drift; order one in h."""
    rng = np.random.default_rng(2)
    means, variance = np.array([[0.3]]), 1.6
    times = grid(schedule, 30)
    states, last = rng.normal(size=(31, 50, 1)), rng.normal(size=(50, 1))
    found = lean_adjoints(schedule, means, variance, times, states, last)
    limit = chain_bound(schedule, 1.0 / variance, 1.0 / variance, times)
    expected = np.broadcast_to(limit[:, None], (31, 50))
    np.testing.assert_allclose(np.abs(found / last)[..., 0], expected, rtol=1e-7)
    gaps = []
    for n_steps in (400, 800):
        times = grid(schedule, n_steps)
        chain = chain_bound(schedule, 1.0 / variance, 1.0 / variance, times)
        gaps.append(np.max(np.abs(chain / bound(schedule, 1.0 / variance, times) - 1)))
    if gaps[0] > 1e-10:
        assert np.log2(gaps[0] / gaps[1]) == pytest.approx(1.0, abs=0.1)


def test_an_upper_curvature_matters_for_long_steps_only():
    """One step from 1/2 on the linear flow: 2 - m_t, or M_t - 2 if that is larger."""
    flow, times = LinearFlow(), np.array([0.5, 1.0])
    m, M = 0.5, 100.0
    low, high = m / (0.25 + 0.25 * m), M / (0.25 + 0.25 * M)
    assert chain_bound(flow, m, m, times)[0] == pytest.approx(2.0 - low, rel=1e-14)
    assert chain_bound(flow, m, M, times)[0] == pytest.approx(high - 2.0, rel=1e-14)
    short = grid(flow, 400)
    without = chain_bound(flow, m, m, short)
    np.testing.assert_allclose(chain_bound(flow, m, 20.0, short), without, rtol=1e-14)
    assert np.isfinite(chain_bound(flow, m, np.inf, short)).all()


# ---- bad input ---------------------------------------------------------------------
@pytest.mark.parametrize("curvature", [0.0, -0.3])
def test_data_that_are_not_log_concave_are_refused(curvature):
    schedule = LinearFlow()
    for call in (
        lambda: bound(schedule, curvature, 0.5),
        lambda: peak(schedule, curvature),
        lambda: chain_bound(schedule, curvature, 1.0, np.array([0.5, 1.0])),
    ):
        with pytest.raises(ParameterError, match="log-concave") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_an_unknown_schedule_has_no_peak():
    class Other(Schedule):
        pass

    with pytest.raises(NotExactError, match="Other"):
        peak(Other(), 1.0)
