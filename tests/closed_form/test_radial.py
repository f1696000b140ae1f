"""Isotropic Gaussian processes with costs of |x|^2 against matrices and mpmath."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.stats import chi2

from sdebench.closed_form.affine_chain import AffineChain
from sdebench.closed_form.radial import (
    RadialProcess,
    chi_square,
    log_mean_reciprocal,
)

THETA = np.array([0.4, -0.3])


def profiles(t):
    return np.stack([np.ones_like(t), 2.0 * t / 1.2 - 1.0], axis=-1)


def process(dim=3, running=True, quadratic=False):
    """Costs f = t (1 + s)^(1/2) and g = ln(1 + s), or f = t s and g = s / 2."""
    f = (lambda s, t: t * np.sqrt(1.0 + s), lambda s, t: 0.5 * t / np.sqrt(1.0 + s))
    g = (np.log1p, lambda s: 1.0 / (1.0 + s))
    if quadratic:
        f = (lambda s, t: t * s, lambda s, t: t + 0.0 * s)
        g = (lambda s: 0.5 * s, lambda s: 0.5 + 0.0 * s)
    return RadialProcess(dim, 1.3, 1.2, profiles, f if running else None, g)


@pytest.mark.parametrize("dim", [1, 2, 7, 100])
def test_law_of_chi_square(dim):
    nodes, weights = chi_square(dim)
    assert weights.sum() == pytest.approx(1.0, abs=1e-13)
    assert weights @ nodes == pytest.approx(dim, rel=1e-13)
    assert weights @ nodes**2 == pytest.approx(dim * (dim + 2), rel=1e-13)
    coarse = chi_square(dim, 0.8)
    for function in (np.log1p, lambda s: s**0.2, lambda s: np.sin(s**0.4)):
        a, b = weights @ function(nodes), coarse[1] @ function(coarse[0])
        assert a == pytest.approx(b, abs=1e-12)
    exact = chi2(dim).expect(lambda s: np.sqrt(1.0 + s), epsabs=1e-11)
    assert weights @ np.sqrt(1.0 + nodes) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("dim", [1, 2, 100])
@pytest.mark.parametrize(
    ("s", "variance"),
    [(0.0, 2.0), (0.0, 1e-9), (150.0, 1.0), (3.0, 0.01), (400.0, 0.0)],
)
def test_mean_reciprocal(dim, s, variance):
    """Against mpmath, and its slope against differences."""
    with mpmath.workdps(30):

        def integrand(v):
            spread = 1 + 2 * variance * v
            return mpmath.exp(-v - v * s / spread) * spread ** (-mpmath.mpf(dim) / 2)

        edges = [0, 0.001, 0.01, 0.1, 1, 10, mpmath.inf]
        exact = float(mpmath.log(mpmath.quad(integrand, edges)))
    value, slope = log_mean_reciprocal(np.array([s]), variance, dim)
    assert value[0] == pytest.approx(exact, rel=1e-14, abs=1e-14)
    h = 1e-3 * (1.0 + s)
    at = log_mean_reciprocal(s + h * np.array([-2, -1, 1, 2]), variance, dim)[0]
    quotient = (8.0 * (at[2] - at[1]) - (at[3] - at[0])) / (12.0 * h)
    assert slope[0] == pytest.approx(quotient, rel=1e-8)
    coarse = log_mean_reciprocal(np.array([s]), variance, dim, 0.8)
    np.testing.assert_allclose([value, slope], coarse, rtol=1e-12, atol=1e-14)


def test_mean_reciprocal_by_simulation():
    """5 comparisons at 4.9 standard errors: false-alarm rate 5e-6."""
    rng = np.random.default_rng(4)
    x = np.array([1.5, -0.5, 0.2])
    for variance in (0.05, 0.4, 1.0, 2.0, 5.0):
        y = x + np.sqrt(variance) * rng.normal(size=(200_000, 3))
        values = 1.0 / (1.0 + np.sum(y**2, axis=1))
        exact = np.exp(log_mean_reciprocal(np.array([x @ x]), variance, 3)[0][0])
        assert abs(values.mean() - exact) < 4.9 * values.std() / np.sqrt(len(values))


def test_continuous_time_against_an_ode_solver():
    """Variance, costs and both costates by DOP853."""
    one, (f, slope), (g, g_slope) = process(), process().running, process().cost
    nodes, weights = chi_square(3)
    sigma = one.noise_level

    def forward(t, y):
        c, k = y[0], profiles(np.array(t)) @ THETA
        cost = weights @ f(c * nodes, t)
        return [sigma**2 - 2 * sigma * k * c, 1.5 * k**2 * c + cost]

    tight = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13, "dense_output": True}
    path = solve_ivp(forward, (0.0, 1.2), [0.0, 0.0], **tight)
    last, spent = path.y[:, -1]
    found = one.policy(THETA, 12, 1.0)
    final = weights @ g(last * nodes)
    assert found.objective == pytest.approx(spent + final, abs=1e-10)
    assert found.reward_only_objective == pytest.approx(final, abs=1e-10)

    def backward(t, y):
        c, rho = path.sol(t)[0], profiles(np.array(t))
        k, pull = rho @ THETA, (weights * nodes) @ slope(c * nodes, t)
        full, lean, alone = y[:3]
        changes = [
            2 * sigma * k * full - 1.5 * k**2 - pull,
            sigma * k * lean - pull,
            2 * sigma * k * alone,
        ]
        direct = 3.0 * k * c
        return np.concatenate(
            [
                changes,
                rho * (direct - 2 * sigma * c * full),
                rho * (direct - 2 * sigma * c * lean),
                rho * (-2 * sigma * c * alone),
            ]
        )

    end = (weights * nodes) @ g_slope(last * nodes)
    start = np.concatenate([np.full(3, end), np.zeros(6)])
    y = -solve_ivp(backward, (1.2, 0.0), start, **tight).y[3:, -1]
    np.testing.assert_allclose(found.gradient, y[:2], atol=1e-9)
    np.testing.assert_allclose(found.matching_gradient, y[2:4], atol=1e-9)
    np.testing.assert_allclose(found.reward_only_gradient, y[4:], atol=1e-9)


@pytest.mark.parametrize("n_steps", [None, 5])
def test_gradients_are_derivatives(n_steps):
    one, step = process(), 1e-3
    times = None if n_steps is None else 1.2 * np.linspace(0, 1, n_steps + 1) ** 1.5

    def answers(theta):
        if times is None:
            return one.policy(theta, 12, 1.0)
        return one.chain(theta, times, 1.0)

    found = answers(THETA)
    for p, unit in enumerate(np.eye(2)):
        at = {k: answers(THETA + k * step * unit) for k in (-2, -1, 1, 2)}
        for name in ("objective", "reward_only_objective"):
            values = {k: getattr(a, name) for k, a in at.items()}
            quotient = 8.0 * (values[1] - values[-1]) - (values[2] - values[-2])
            gradient = getattr(found, name.replace("objective", "gradient"))[p]
            assert gradient == pytest.approx(quotient / (12.0 * step), abs=1e-10)
    free = answers(np.zeros(2))
    np.testing.assert_allclose(free.matching_gradient, free.gradient, atol=1e-13)
    assert np.max(np.abs(found.matching_gradient - found.gradient)) > 1e-3


def test_quadratic_chain_against_the_affine_one():
    """Costs |x|^2 make it linear-quadratic: all recursions in matrices."""
    one, times = process(dim=2, quadratic=True), 1.2 * np.linspace(0, 1, 8) ** 1.3
    h, eye = np.diff(times), np.eye(2)
    rho = profiles(times[:-1])
    root = np.sqrt(h)[:, None, None]
    chain = AffineChain(
        transition=np.broadcast_to(eye, (7, 2, 2)).copy(),
        offset=np.zeros((7, 2)),
        noise=1.3 * root * eye,
        running=2.0 * (h * times[:-1])[:, None, None] * eye,
        reward_quadratic=eye,
        reward_linear=np.zeros(2),
        reward_constant=0.0,
        start_mean=np.zeros(2),
        start_covariance=np.zeros((2, 2)),
    )
    gain, bias = -root * (rho @ THETA)[:, None, None] * eye, np.zeros((7, 2))
    slopes = -root * rho.T[:, :, None, None] * eye, np.zeros((2, 7, 2))
    found = one.chain(THETA, times, 1.0)
    assert found.objective == pytest.approx(chain.objective(gain, bias), rel=1e-12)
    for name, wanted in (
        ("gradient", chain.gradient(gain, bias, *slopes)),
        ("reward_only_gradient", chain.gradient(gain, bias, *slopes, reward_only=True)),
        ("matching_gradient", chain.matching_gradient(gain, bias, *slopes)),
    ):
        np.testing.assert_allclose(getattr(found, name), wanted, atol=1e-12)
    # mutation: profiles at the ends of the steps
    late = one.chain(np.array([0.4 - 0.1, -0.3]), times, 1.0)
    assert abs(late.objective - found.objective) > 1e-3
