"""Diffusions and chains on the line against linear theory, splines and differences."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

import sdebench
from sdebench.certified_truth import ROUNDING
from sdebench.closed_form import line_chain, line_diffusion
from sdebench.closed_form.affine_chain import AffineChain
from sdebench.closed_form.line_chain import LineChain
from sdebench.closed_form.line_diffusion import (
    LineDiffusion,
    Motion,
    Value,
    evaluate,
    exponential_integral,
    sinc_sums,
)
from sdebench.errors import NumericalError

# Linear: b = -0.7 x, u = -theta x, g = 0.4 + 0.3 x + 0.6 x^2, from 0
LINEAR = LineDiffusion(
    np.array([0.0, -0.7]), np.array([[0.0, -1.0]]), np.array([0.4, 0.3, 0.6]), 1.3
)
CUBIC = LineDiffusion(
    np.array([0.2, 1.5, 0.0, -0.8]),
    np.array([[0.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, -0.5]]),
    np.array([1.0, 0.2, -0.6, 0.1, 0.1]),
    0.8,
)
THETA = np.array([0.4, 0.7])


def linear_objective(theta, running=True):
    rate, horizon = 0.7 + theta, LINEAR.horizon
    variance = -np.expm1(-2.0 * rate * horizon) / (2.0 * rate)
    energy = 0.5 * theta**2 * (horizon - variance) / (2.0 * rate)
    return 0.4 + 0.6 * variance + (energy if running else 0.0)


def test_linear_process():
    """Ornstein-Uhlenbeck: J, its gradient, and log Z of a quadratic cost."""
    theta, step = 0.5, 1e-3
    found = LINEAR.policy(np.array([theta]), line_diffusion.FINE)
    assert found.objective == pytest.approx(linear_objective(theta), abs=1e-12)
    for name, running in (("gradient", True), ("reward_only_gradient", False)):
        at = [linear_objective(theta + k * step, running) for k in (-2, -1, 1, 2)]
        slope = (8.0 * (at[2] - at[1]) - (at[3] - at[0])) / (12.0 * step)
        assert getattr(found, name)[0] == pytest.approx(slope, abs=1e-10)
    # lean adjoint exp(-0.7 (T - t)) (1.2 X_T + 0.3), and X_t has mean 0
    t = np.linspace(0.0, LINEAR.horizon, 20001)
    rate = 0.7 + theta
    left = LINEAR.horizon - t
    variance = -np.expm1(-2.0 * rate * t) / (2.0 * rate)
    integrand = theta * variance
    integrand -= 1.2 * np.exp(-(0.7 + rate) * left) * variance
    exact = scipy.integrate.simpson(integrand, x=t)
    assert found.matching_gradient[0] == pytest.approx(exact, abs=1e-10)
    spread = -np.expm1(-1.4 * LINEAR.horizon) / 1.4
    precision = 1.0 / spread + 1.2
    exact = -0.4 + 0.5 * 0.3**2 / precision - 0.5 * np.log(precision * spread)
    assert LINEAR.log_h(line_diffusion.FINE) == pytest.approx(exact, abs=1e-12)


def test_value_of_a_linear_process():
    t, x = 0.5, np.linspace(-2.0, 2.0, 9)
    left = LINEAR.horizon - t
    growth, spread = np.exp(-0.7 * left), -np.expm1(-1.4 * left) / 1.4
    shrink = 1.0 / (1.0 + 1.2 * spread)
    mean = growth * x
    exact = 0.4 + shrink * (0.6 * mean**2 + 0.3 * mean - 0.5 * 0.3**2 * spread)
    exact = exact - 0.5 * np.log(shrink)
    value, slope = Value(LINEAR, line_diffusion.FINE)(x, t)
    np.testing.assert_allclose(value, exact, atol=1e-11)
    exact_slope = shrink * growth * (1.2 * mean + 0.3)
    np.testing.assert_allclose(slope, exact_slope, atol=1e-10)


def test_cubic_process_against_differences():
    step = 1e-3
    found = CUBIC.policy(THETA, line_diffusion.FINE)
    for p, unit in enumerate(np.eye(2)):
        at = {
            k: CUBIC.policy(THETA + k * step * unit, line_diffusion.FINE)
            for k in (-2, -1, 1, 2)
        }
        for name in ("objective", "reward_only_objective"):
            values = {k: getattr(answer, name) for k, answer in at.items()}
            slope = 8.0 * (values[1] - values[-1]) - (values[2] - values[-2])
            gradient = getattr(found, name.replace("objective", "gradient"))[p]
            assert gradient == pytest.approx(slope / (12.0 * step), abs=1e-9)
    free = CUBIC.policy(np.zeros(2), line_diffusion.FINE)
    np.testing.assert_allclose(free.matching_gradient, free.gradient, atol=1e-12)
    assert np.max(np.abs(found.matching_gradient - found.gradient)) > 1e-3


def test_bounds_cover_a_finer_grid():
    for process, theta in ((CUBIC, THETA), (LINEAR, np.array([0.5]))):
        every = [
            process.policy(theta, grid).stacked()
            for grid in (line_diffusion.FINE, line_diffusion.COARSE, (1.4, 1.1))
        ]
        bound = np.abs(every[0] - every[1]) + ROUNDING * 10
        assert np.all(np.abs(every[0] - every[2]) <= bound)
        assert np.max(bound) < 1e-11


def test_expectations_by_the_matrix_exponential():
    """exp(T L) by a dense exponential of the generator instead of its modes."""
    motion = Motion(CUBIC.force, line_diffusion.FINE)
    level = motion.weight * np.exp(-evaluate(CUBIC.cost, motion.x))
    moved = scipy.linalg.expm(-CUBIC.horizon * motion.hamiltonian) @ level
    wanted = np.log(moved[motion.middle])
    assert CUBIC.log_h(line_diffusion.FINE) == pytest.approx(wanted, abs=1e-11)


def test_a_control_without_wells_is_refused():
    with pytest.raises(NumericalError, match="infinity"):
        CUBIC.policy(np.array([0.0, -5.0]), line_diffusion.FINE)


def test_building_blocks():
    rates = np.array([0.0, 1e-9, 0.3, 40.0])
    found = exponential_integral(rates[:, None], rates, 1.7)
    t = np.linspace(0.0, 1.7, 200001)
    for j, a in enumerate(rates):
        for k, b in enumerate(rates):
            exact = scipy.integrate.simpson(np.exp(-a * t - b * (1.7 - t)), x=t)
            assert found[j, k] == pytest.approx(exact, rel=1e-9)
    values = np.random.default_rng(0).normal(size=(9, 2))
    s = np.array([-1.3, 0.0, 2.0, 3.25, 8.0, 7.999999999])
    wanted = np.sinc(s[:, None] - np.arange(9)) @ values
    np.testing.assert_allclose(sinc_sums(s, values), wanted, atol=1e-12)


# ---- chains --------------------------------------------------------------------------


def chain_of(n_steps, theta, resolution=line_chain.FINE, **parameters):
    problem = sdebench.problem("double_well", **{"dim": 1, **parameters})
    tables = problem.tables(np.asarray(theta), problem.time_grid(n_steps))
    return LineChain(tables, 0, resolution)


def linear_chain(n_steps, theta):
    """The chain with force 0.1 - 1.2 x, quadratic reward, and an affine control."""
    chain = chain_of(n_steps, theta)
    t, h = chain.tables, 1.0 / n_steps
    base, reward = np.zeros_like(t.base), np.zeros_like(t.reward)
    base[:, :, 1] = 1.0 - 1.2 * h
    base[:, :, 0] = 0.1 * h
    reward[:, 0], reward[:, 1], reward[:, 2] = -0.3, 0.2, -0.5
    slopes = t.gain_derivative.copy()
    slopes[1] = 0.0
    slopes[1, :, :, 0] = np.sqrt(h)
    gain = np.tensordot(theta, slopes, 1)
    # 9 within reach: what is beyond has probability below 1e-16
    tables = t._replace(
        reach=np.array([9.0]),
        base=base,
        reward=reward,
        gain=gain,
        gain_derivative=slopes,
    )
    return LineChain(tables, 0, line_chain.FINE)


@pytest.mark.parametrize("n_steps", [1, 6, 40])
def test_linear_quadratic_chain(n_steps):
    """Every answer against the exact recursions of means and covariances."""
    chain = linear_chain(n_steps, np.array([0.6, 0.3]))
    t = chain.tables
    affine = AffineChain(
        transition=t.base[:, :, 1:2],
        offset=t.base[:, :, 0],
        noise=t.noise[:, :, None],
        running=np.zeros((n_steps, 1, 1)),
        reward_quadratic=np.ones((1, 1)),
        reward_linear=np.array([0.2]),
        reward_constant=-0.3,
        start_mean=np.zeros(1),
        start_covariance=np.zeros((1, 1)),
    )
    control = t.gain[:, :, 1:2], t.gain[:, :, 0]
    moves = t.gain_derivative[..., 1:2], t.gain_derivative[..., 0]
    found = chain.policy()
    assert found.objective == pytest.approx(affine.objective(*control), rel=1e-11)
    exact = affine.reward_only_objective(*control)
    assert found.reward_only_objective == pytest.approx(exact, rel=1e-11)
    exact = affine.gradient(*control, *moves)
    np.testing.assert_allclose(found.gradient, exact, atol=1e-11)
    exact = affine.gradient(*control, *moves, reward_only=True)
    np.testing.assert_allclose(found.reward_only_gradient, exact, atol=1e-11)
    exact = affine.matching_gradient(*control, *moves)
    np.testing.assert_allclose(found.matching_gradient, exact, atol=1e-11)
    exact = affine.log_normalizer()
    assert chain.log_normalizer() == pytest.approx(exact, rel=1e-11)
    cost, controls = chain.optimal_control()
    assert cost == pytest.approx(affine.optimal_cost(), rel=1e-10)
    gain, bias = affine.optimal_feedback()
    inner = np.abs(chain.points) < 2.0
    wanted = gain[0, 0, 0] * chain.points + bias[0, 0]
    np.testing.assert_allclose(controls[0][inner], wanted[inner], atol=1e-9)
    exact = affine.control_distance(*control, gain, bias)
    assert chain.control_distance(controls) == pytest.approx(exact, rel=1e-9)
    # mutation: a control one step late
    late = t._replace(gain=2.0 * np.arange(1, n_steps + 1)[:, None, None] * t.gain)
    moved = LineChain(late, 0, line_chain.FINE).policy().objective
    assert abs(moved - found.objective) > 1e-3


def test_double_well_chain_against_splines():
    """J_N and log Z_N by Gauss-Hermite sums of spline values: nothing shared."""
    from numpy.polynomial.hermite_e import hermegauss
    from scipy.interpolate import CubicSpline

    chain = chain_of(5, [-2.0, 2.0])
    t = chain.tables
    nodes, weights = hermegauss(80)
    weights = weights / weights.sum()
    x = np.linspace(-12.0, 12.0, 24001)

    def polynomial(row, x):
        y = np.clip(x, -4.0, 4.0)
        return np.polynomial.polynomial.polyval(y, row)

    cost = -polynomial(t.reward[0], x)
    level = np.exp(-cost)
    for n in reversed(range(5)):
        w = polynomial(t.gain[n, 0], x)
        base = polynomial(t.base[n, 0], x) + x - np.clip(x, -4.0, 4.0)
        splines = [CubicSpline(x, f, extrapolate=False) for f in (cost, level)]
        to = [base + t.noise[n, 0] * w, base]
        means = [
            sum(
                a * np.nan_to_num(spline(mean + t.noise[n, 0] * z))
                for z, a in zip(nodes, weights, strict=True)
            )
            for spline, mean in zip(splines, to, strict=True)
        ]
        cost, level = 0.5 * w**2 + means[0], means[1]
    middle = len(x) // 2
    assert chain.policy().objective == pytest.approx(cost[middle], rel=3e-6)
    assert chain.log_normalizer() == pytest.approx(np.log(level[middle]), rel=3e-6)


def test_chain_tends_to_continuous_time_at_order_one():
    problem = sdebench.problem("double_well:dim=1")
    theta = np.array([-2.0, 2.5])
    line = LineDiffusion(*problem.kinds[0][:3], 1.0)
    exact = line.policy(theta, line_diffusion.FINE).stacked()
    gaps = [chain_of(n, theta).policy().stacked() - exact for n in (100, 200, 400)]
    # the ratio's distance from 2 halves with the step as well
    np.testing.assert_allclose(gaps[0] / gaps[1], 2.0, rtol=0.08)
    np.testing.assert_allclose(gaps[1] / gaps[2], 2.0, rtol=0.04)


def test_the_optimal_control_of_a_chain_is_the_best():
    chain = chain_of(8, [-2.0, 2.0])
    cost, controls = chain.optimal_control()
    assert cost < chain.policy().objective
    # J_N(w) - J_N(w*) >= 1/2 E |w - w*|^2 has no equality for a chain, but is close
    excess = chain.policy().objective - cost
    assert excess == pytest.approx(0.5 * chain.control_distance(controls), rel=0.4)
