"""The grid reference against linear chains, finer grids, differences and Monte Carlo.

A pendulum without its sine is a linear-quadratic chain, where every answer is exact by
another route; with it, answers are compared with quadratures written from scratch.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from numpy.polynomial.hermite_e import hermegauss
from scipy.interpolate import RectBivariateSpline

import sdebench
from sdebench.closed_form import grid_chain
from sdebench.closed_form.affine_chain import AffineChain
from sdebench.closed_form.grid_chain import (
    Extrapolation,
    Grid,
    GridChain,
    ValueFunction,
    certify,
    clamp,
)
from sdebench.errors import ParameterError

GRID = Grid(25, 130, 9.0, 24)
THETA = np.array([1.1, -0.7, 0.9, -0.4])
PENDULUM = sdebench.problem("stochastic_pendulum")


def pendulum(n_steps=6, theta=THETA, **parameters):
    problem = dataclasses.replace(PENDULUM, **parameters)
    return problem.tables(theta, problem.time_grid(n_steps))


def rewarded(n_steps=6, theta=THETA, **parameters):
    """The same with a reward, and without the symmetry in the angle."""
    return pendulum(n_steps, theta, **parameters)._replace(
        reward_quadratic=np.diag([0.0, 0.3]),
        reward_linear=np.array([0.0, 0.4, 0.7, 0.5]),
        reward_constant=np.array([0.2]),
        start_mean=np.array([0.3, -0.2]),
    )


def without_sines(tables):
    """The velocity alone: the chain is affine in it, and f and r are quadratic."""
    cleared = tables._replace(
        transition=tables.transition.copy(),
        gain_derivative=tables.gain_derivative.copy(),
        running_linear=np.zeros_like(tables.running_linear),
        reward_linear=tables.reward_linear * [1.0, 1.0, 0.0, 0.0],
    )
    cleared.transition[:, 1, 2:] = 0.0
    cleared.gain_derivative[:, :, :, 2:] = 0.0
    return cleared._replace(
        gain=np.tensordot(THETA, cleared.gain_derivative, 1),
        bias=0.3 * np.sqrt(tables.running_constant)[:, None] * [0.0, 1.0],
    )


def on(tables, grid):
    return GridChain(tables, grid.widened(tables))


def affine(tables):
    chain = AffineChain(
        transition=tables.transition[:, :, :2],
        offset=tables.offset,
        noise=tables.noise,
        running=tables.running_quadratic,
        reward_quadratic=tables.reward_quadratic,
        reward_linear=tables.reward_linear[:2],
        reward_constant=tables.reward_constant[0],
        start_mean=tables.start_mean,
        start_covariance=tables.start_factor @ tables.start_factor.T,
    )
    derivatives = tables.gain_derivative[..., :2], tables.bias_derivative
    return chain, (tables.gain[:, :, :2], tables.bias), derivatives


@pytest.mark.parametrize("n_steps", [1, 5, 40])
def test_linear_quadratic_chain(n_steps):
    """Every answer against the exact recursions of means and covariances."""
    tables = without_sines(rewarded(n_steps))
    chain, control, derivatives = affine(tables)
    grid = on(tables, GRID)
    constant = tables.running_constant.sum()
    answers = grid.policy()
    assert answers.objective == pytest.approx(
        chain.objective(*control) + constant, rel=2e-9
    )
    wanted = chain.gradient(*control, *derivatives)
    np.testing.assert_allclose(answers.gradient, wanted, atol=1e-8)
    wanted = chain.gradient(*control, *derivatives, reward_only=True)
    np.testing.assert_allclose(answers.reward_only_gradient, wanted, atol=1e-8)
    wanted = chain.reward_only_objective(*control)
    assert answers.reward_only_objective == pytest.approx(wanted, rel=1e-8)
    wanted = chain.matching_gradient(*control, *derivatives)
    np.testing.assert_allclose(answers.matching_gradient, wanted, atol=1e-8)
    total, _ = grid.log_normalizer()
    assert total == pytest.approx(chain.log_normalizer() - constant, rel=2e-9)
    cost, controls = grid.optimal_control()
    assert cost == pytest.approx(chain.optimal_cost() + constant, rel=2e-9)
    gain, bias = chain.optimal_feedback()
    x = np.array([[0.4, 1.5], [-2.0, -0.7], [3.0, 0.0]])
    for n in (0, n_steps - 1):
        wanted = (x @ gain[n].T + bias[n])[:, 1]
        np.testing.assert_allclose(grid.control_at(controls, n, x), wanted, atol=1e-7)
    wanted = chain.control_distance(*control, gain, bias)
    assert grid.control_distance(controls) == pytest.approx(wanted, rel=1e-8)


def plain_expectations(tables, x):
    """J, E r and h at states x (m, 2) by splines on a grid of states, no Fourier."""
    nodes, weights = hermegauss(12)
    weights = weights / weights.sum()
    q, v = np.linspace(-12.0, 12.0, 481), np.linspace(-8.0, 8.0, 321)
    grid = np.stack(np.meshgrid(q, v, indexing="ij"), axis=-1)

    def extended(states):
        angle = states @ tables.direction.T + tables.phase
        return np.concatenate([states, np.sin(angle)], axis=-1)

    def quadratic(states, matrix):
        return 0.5 * np.einsum("...i,ij,...j->...", states, matrix, states)

    y = extended(grid)
    reward = y @ tables.reward_linear - quadratic(grid, tables.reward_quadratic)
    reward = reward + tables.reward_constant[0]
    cost, h = -reward, np.exp(reward)
    for n in reversed(range(len(tables.offset))):
        w = y @ tables.gain[n].T + tables.bias[n]
        base = y @ tables.transition[n].T + tables.offset[n]
        running = quadratic(grid, tables.running_quadratic[n])
        running = running + y @ tables.running_linear[n] + tables.running_constant[n]
        splines = [RectBivariateSpline(q, v, f, kx=5, ky=5) for f in (cost, h)]
        means = [np.zeros_like(cost), np.zeros_like(h)]
        for spline, pushed, mean in zip(splines, (w, 0.0 * w), means, strict=True):
            for z, weight in zip(nodes, weights, strict=True):
                to = base + (pushed + np.array([0.0, z])) @ tables.noise[n].T
                mean += weight * spline.ev(to[..., 0], to[..., 1])
        cost = 0.5 * np.sum(w**2, axis=-1) + running + means[0]
        h = np.exp(-running) * means[1]
    return tuple(
        RectBivariateSpline(q, v, f, kx=5, ky=5).ev(x[:, 0], x[:, 1]) for f in (cost, h)
    )


@pytest.mark.slow
def test_nonlinear_chain_against_splines():
    """J_N and log Z_N of a fixed start: another discretization, nothing shared."""
    tables = rewarded(4, horizon=1.0)._replace(start_factor=np.zeros((2, 2)))
    cost, h = plain_expectations(tables, tables.start_mean[None])
    chain = on(tables, Grid(49, 110, 9.0, 24))
    assert chain.policy().objective == pytest.approx(cost[0], rel=2e-7)
    assert chain.log_normalizer()[0] == pytest.approx(np.log(h[0]), rel=2e-7)
    # mutations: the control at the new angle, and the running cost of the next step
    mutant = tables._replace(gain=np.roll(tables.gain, 1, axis=0))
    moved = GridChain(mutant, chain.grid).policy().objective
    assert abs(moved - cost[0]) > 1e-4


def test_gradients_against_differences():
    """The gradients of J_N and of -E r are exact derivatives of the grid's own."""
    step = 1e-3

    def answers(theta):
        return on(rewarded(6, theta), Grid(33, 80, 9.0, 24)).policy()

    found = answers(THETA)
    for p, unit in enumerate(np.eye(4)):
        up, down = answers(THETA + step * unit), answers(THETA - step * unit)
        for name in ("objective", "reward_only_objective"):
            slope = (getattr(up, name) - getattr(down, name)) / (2.0 * step)
            gradient = getattr(found, name.replace("objective", "gradient"))[p]
            assert gradient == pytest.approx(slope, abs=2e-6)


def test_matching_gradient_is_the_gradient_without_control():
    """The lean adjoint is the full one at theta = 0, and differs elsewhere."""
    grid = Grid(41, 110, 9.0, 24)
    base = on(rewarded(8, np.zeros(4)), grid).policy()
    np.testing.assert_allclose(base.matching_gradient, base.gradient, atol=1e-8)
    other = on(rewarded(8), grid).policy()
    assert np.max(np.abs(other.matching_gradient - other.gradient)) > 1e-2


def test_steps_without_noise():
    """A step whose noisy is 0 keeps its control and loses its noise."""
    tables = without_sines(rewarded(5))._replace(noisy=np.array([1.0, 0, 1, 0, 1]))
    chain, control, _ = affine(tables)
    quiet = tables.noise * tables.noisy[:, None, None]
    # The affine chain has one G: keep the control's push in the transition instead.
    closed = chain.transition + chain.noise @ control[0]
    drift = chain.offset + np.einsum("nij,nj->ni", chain.noise, control[1])
    mean, covariance = tables.start_mean, tables.start_factor @ tables.start_factor.T
    cost = tables.running_constant.sum()
    for n in range(5):
        second = covariance + np.outer(mean, mean)
        K, k = control[0][n], control[1][n]
        cost += 0.5 * (np.sum(K.T @ K * second) + 2.0 * k @ K @ mean + k @ k)
        cost += 0.5 * np.sum(tables.running_quadratic[n] * second)
        mean = closed[n] @ mean + drift[n]
        covariance = closed[n] @ covariance @ closed[n].T + quiet[n] @ quiet[n].T
    second = covariance + np.outer(mean, mean)
    cost += 0.5 * np.sum(tables.reward_quadratic * second)
    cost -= tables.reward_linear[:2] @ mean + tables.reward_constant[0]
    assert on(tables, GRID).policy().objective == pytest.approx(cost, rel=2e-9)
    noisy = on(tables._replace(noisy=np.ones(5)), GRID).policy().objective
    assert abs(noisy - cost) > 1e-3


# ---- bounds --------------------------------------------------------------------------


@pytest.mark.slow
def test_bounds_cover_the_change_to_a_finer_grid():
    grids = Grid(33, 72, 8.0, 20), Grid(27, 58, 7.0, 14)
    fine = Grid(65, 160, 10.0, 32)
    for theta in (np.zeros(4), THETA):
        tables = pendulum(40, theta)
        parts = (
            lambda chain: chain.policy().stacked(),
            lambda chain: np.array(chain.log_normalizer()),
            lambda chain: np.array(chain.optimal_control()[0]),
        )
        for part in parts:
            found = certify(lambda g, f=part, t=tables: f(on(t, g)), grids)
            best = np.atleast_1d(part(on(tables, fine)))
            assert np.all(np.abs(found.value - best) <= found.error)
            assert np.max(found.error) < 0.1 * (1.0 + np.max(np.abs(best)))


def test_extrapolation():
    """Exact for polynomials in 1/N; the bound covers the rest of what is not one."""
    rule = Extrapolation((4, 6, 8, 12))
    answer = rule.limit(
        lambda n, grid: np.array([2.0 + 3.0 / n - 5.0 / n**3, math.exp(1.0 / n)]),
        (GRID, GRID),
    )
    assert answer.value[0] == pytest.approx(2.0, abs=1e-12)
    assert answer.error[0] > abs(answer.value[0] - 2.0)
    assert 0.0 < abs(answer.value[1] - 1.0) <= answer.error[1] < 1e-3


@pytest.mark.slow
def test_continuous_answers_against_a_finer_ladder():
    """The published bounds against three more doublings of the coarsest level."""
    truth, theta = PENDULUM.truth, PENDULUM.theta("halfway")
    grid = PENDULUM.grids[0]
    levels = Extrapolation((48, 64, 96, 128, 192))
    rows = [
        on(PENDULUM.tables(theta, PENDULUM.time_grid(n)), grid).policy()
        for n in levels.levels
    ]
    finer = levels.weights @ np.array([row.stacked() for row in rows])
    gap = np.linalg.norm(finer[2:6] - truth.gradient(theta))
    assert gap <= truth.error_bound("gradient", theta) < 1e-6
    assert abs(finer[0] - truth.objective(theta)) <= 1e-6


@pytest.mark.slow
def test_published_optimum():
    """The gradient at theta* is zero up to its bound, and the Hessian is positive."""
    truth = PENDULUM.truth
    bound = truth.error_bound("gradient", "optimum")
    assert np.linalg.norm(truth.gradient("optimum")) < 0.01 * bound < 1e-6
    best = truth.objective("optimum", 80)
    for unit in np.eye(4):
        for sign in (0.3, -0.3):
            assert truth.objective(PENDULUM.theta_star + sign * unit, 80) > best
    assert truth.objective("optimum") > truth.optimal_cost() + 0.1


@pytest.mark.slow
def test_other_parameters_have_their_own_optimum():
    problem = dataclasses.replace(PENDULUM, noise_level=0.7, horizon=1.0)
    truth, scale = problem.truth, np.linalg.norm(problem.truth.gradient("zero"))
    assert np.linalg.norm(truth.gradient("optimum")) < 1e-4 * scale


@pytest.mark.slow
def test_n_step_answers_by_simulation():
    """J_N, gradient and log Z_N by plain Monte Carlo at 20 steps.

    7 comparisons at 4.8 standard errors: false-alarm rate 1.2e-5.
    """
    truth, n_paths = PENDULUM.truth, 2**17
    run = sdebench.simulate(PENDULUM, point="halfway", n_steps=20, n_paths=n_paths)

    def score(values, wanted):
        return abs(values.mean() - wanted) / (values.std() / math.sqrt(n_paths))

    cost = score(run.cost, truth.objective("halfway", 20))
    assert cost < 4.8
    weights = np.exp(run.log_weight)
    assert score(weights, np.exp(truth.log_normalizer(20))) < 4.8
    # mutation: the answer of continuous time is seen to be another
    assert score(run.cost, truth.objective("halfway")) > 4.8
    result = sdebench.measure(
        PENDULUM, "pathwise", point="halfway", n_steps=20, n_replicates=256
    )
    z = (np.array(result.mean) - truth.gradient("halfway", 20)) / result.std_error
    assert np.all(np.abs(z) < 4.8)
    z = (np.array(result.mean) - truth.gradient("halfway")) / result.std_error
    assert np.max(np.abs(z)) > 4.8


@pytest.mark.slow
def test_discrete_optimum():
    """u*_N costs J*_N when simulated, more than -log Z_N and less than theta*."""
    truth = PENDULUM.truth
    least = truth.optimal_cost(20)
    assert -truth.log_normalizer(20) < least < truth.objective("optimum", 20)
    assert truth.control_error("zero", 20) > truth.control_error("optimum", 20) > 0.0
    x = np.array([[0.5, 0.2], [-0.5, -0.2], [2.0, 1.0]])
    u = truth.discrete_control(x, 0, 20)
    assert np.all(u[:, 0] == 0.0)
    assert u[0, 1] == pytest.approx(-u[1, 1], abs=1e-5)  # odd
    limit = truth.control(x, 0.0)
    finer = truth.discrete_control(x, 0, 40)
    assert np.max(np.abs(2.0 * finer - u - limit)) < np.max(np.abs(u - limit))


# ---- parts ---------------------------------------------------------------------------


def test_interpolation_is_spectral():
    x = np.random.default_rng(2).uniform(-2.0, 2.0, size=(50, 2))

    def function(q, v):
        return np.exp(np.sin(q)) * np.cos(0.7 * v + 0.2)

    values = function(*np.meshgrid(GRID.angles, GRID.velocities, indexing="ij"))
    np.testing.assert_allclose(GRID.interpolate(values, x), function(*x.T), atol=1e-12)
    slope = -0.7 * np.exp(np.sin(x[:, 0])) * np.sin(0.7 * x[:, 1] + 0.2)
    np.testing.assert_allclose(
        GRID.interpolate(values, x, slope=True), slope, atol=1e-11
    )


def test_clamp():
    y = np.linspace(-20.0, 20.0, 401)
    value, slope = clamp(y, 5.0)
    assert np.all(np.abs(value) <= 5.0)
    inside = np.abs(y) < 5.0 - 7.0 * grid_chain.CLAMP_WIDTH
    np.testing.assert_allclose(value[inside], y[inside], atol=1e-8)
    np.testing.assert_allclose(np.gradient(value, y)[1:-1], slope[1:-1], atol=5e-3)


@pytest.mark.parametrize(
    ("field", "index"),
    [
        ("noise", (0, 0, 0)),
        ("transition", (0, 1, 0)),
        ("gain", (0, 0, 1)),
        ("reward_linear", (0,)),
        ("direction", (0, 0)),
    ],
)
def test_other_processes_are_refused(field, index):
    tables = pendulum(2)
    changed = getattr(tables, field).copy()
    changed[index] += 0.5
    with pytest.raises(ParameterError, match="does not fit the grid"):
        GridChain(tables._replace(**{field: changed}), GRID)


def test_value_function_outside_its_box():
    value = ValueFunction(
        lambda times: PENDULUM.tables(None, times),
        PENDULUM.time_span,
        Grid(25, 60, 6.0, 12),
        n_times=12,
        refinements=(1, 2),
    )
    with pytest.raises(ParameterError, match="velocity 17 is outside"):
        value.value(np.array([[0.0, -17.0]]), 1.0)
    assert np.all(value.value(np.array([[0.3, 1.0]]), 4.0) == pytest.approx(0.0))
