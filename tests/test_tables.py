"""Coefficient tables against the functions of the problem that fills them."""

from __future__ import annotations

import _checks as checks
import numpy as np
import pytest
import scipy.linalg

import sdebench
from sdebench.errors import NotApplicableError, ParameterError
from sdebench.linear_problem import LinearProblem
from sdebench.simulate.tables import LinearTables, SeparableTables, SineTables
from sdebench.tilting_problem import TiltingProblem

PROBLEMS = checks.all_problems()
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.label)


def with_scheme(problem, scheme):
    """Return the problem; skip the test if it has no such scheme, and says so."""
    if scheme not in problem.schemes:
        with pytest.raises(NotApplicableError, match=scheme):
            problem.tables(None, problem.time_grid(2), scheme)
        pytest.skip(f"{problem.name} has no scheme {scheme}")
    return problem


@every_problem
@pytest.mark.parametrize("point", [None, "zero", "halfway", "optimum", "random"])
def test_euler_maruyama_tables(problem, point):
    theta = checks.thetas(problem)[point] if point else None
    checks.check_tables(problem, theta)


@every_problem
@pytest.mark.parametrize("scheme", ["euler_maruyama", "exponential"])
def test_parameter_derivatives(problem, scheme):
    problem = with_scheme(checks.reduced(problem), scheme)
    checks.check_parameter_tables(problem, "halfway", n_steps=4, scheme=scheme)


@every_problem
def test_exponential_steps_compose(problem):
    with_scheme(problem, "exponential")
    checks.check_exponential_scheme(problem)


@checks.with_slow(PROBLEMS, lambda p: not p.family_holds_optimum)
def test_optimum_of_the_tables_is_the_optimal_control(problem):
    """At theta* the tables hold sqrt(h) u*, whatever the family calls it.

    A family without u* is at a distance from it there that no other member undercuts.
    """
    if not problem.family_holds_optimum:
        distances = {p: problem.truth.control_error(p) for p in problem.points}
        assert min(distances, key=distances.get) == "optimum"
        assert distances["optimum"] > 0.0
        return
    times = problem.time_grid(5)
    tables = problem.tables(problem.theta("optimum"), times)
    x = checks.visited(problem, n_times=1)[0][1]
    for n, h in enumerate(np.diff(times)):
        w = checks.table_step(tables, n, x)[2]
        wanted = np.sqrt(h) * problem.truth.control(x, times[n])
        np.testing.assert_allclose(w, wanted, atol=2e-12 * (1 + np.abs(wanted).max()))


@every_problem
def test_shapes_dtypes_and_layout(problem):
    n_steps, d, n_params = 3, problem.dim, problem.n_params
    tables = problem.tables(problem.theta("halfway"), problem.time_grid(n_steps))
    for name, array in tables._asdict().items():
        assert array.dtype == np.float64, name
        assert array.flags.c_contiguous, name
        assert np.all(np.isfinite(array)), name
    if isinstance(tables, SineTables):
        extended = d + len(tables.direction)
        assert tables.gain_derivative.shape == (n_params, n_steps, d, extended)
        assert tables.running_linear.shape == (n_steps, extended)
        assert tables.reward_constant.shape == (1,)
    elif isinstance(tables, LinearTables):
        n_maps = len(tables.feature_gain)
        assert tables.basis.shape == (n_params, n_maps, n_steps)
        assert tables.feature_gain.shape == (n_maps, n_steps, d, d)
        assert tables.reward_constant.shape == (1,)
    elif isinstance(tables, SeparableTables):
        degrees = tables.gain.shape[2]
        assert tables.gain_derivative.shape == (n_params, n_steps, d, degrees)
        assert tables.base.shape[:2] == tables.noise.shape == (n_steps, d)
        assert tables.running.shape[0] == n_steps
        assert len(tables.wave) in (0, n_steps)
        assert tables.variance.shape in ((0, 3), (d, 3))
    else:
        count = tables.tilted.shape[1]
        assert tables.tilted_derivative.shape == (n_params, n_steps, count, 2 * d + 1)
        assert tables.base_gain.shape == tables.noise.shape == (n_steps,)
        assert tables.start_cumulative[-1] == 1.0


@every_problem
@pytest.mark.parametrize("scheme", ["euler_maruyama", "exponential"])
def test_a_given_grid_is_used(problem, scheme):
    """A uniform grid given as numbers, and one that is not uniform."""
    with_scheme(problem, scheme)
    start, end = problem.time_span
    uniform = problem.time_grid(4)
    theta = problem.theta("halfway")
    given = problem.tables(theta, problem.time_grid(list(uniform)), scheme)
    for a, b in zip(problem.tables(theta, uniform, scheme), given, strict=True):
        np.testing.assert_array_equal(a, b)
    times = start + (end - start) * np.array([0.0, 0.1, 0.4, 0.9, 1.0])
    tables = problem.tables(theta, problem.time_grid(times), scheme)
    x = checks.visited(problem, n_times=1)[0][1]
    for n in range(4):
        # A step depends on its own two ends only.
        pair = problem.tables(theta, times[n : n + 2], scheme)
        for got, wanted in zip(
            checks.table_step(tables, n, x), checks.table_step(pair, 0, x), strict=True
        ):
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)
    run = sdebench.simulate(problem, n_steps=times, n_paths=4)
    np.testing.assert_array_equal(run.times, times)


@pytest.mark.parametrize(
    "spec", ["ou_linear:spread=0.4", "damped_oscillator", "ou_quadratic_hard:dim=3"]
)
def test_exponential_scheme_of_a_linear_base_is_exact(spec):
    """The chain without control has the base's moments at every grid point."""
    problem = sdebench.problem(spec)
    times = problem.time_grid([0.0, 0.11, 0.5, 0.52, problem.time_span[1]])
    tables = problem.tables(None, times, "exponential")
    mean = tables.start_mean
    covariance = tables.start_factor @ tables.start_factor.T
    for n in range(4):
        M, G = tables.transition[n], tables.noise[n]
        mean = M @ mean + tables.offset[n]
        covariance = M @ covariance @ M.T + G @ G.T
        law = problem.truth.base_marginal(times[n + 1])
        np.testing.assert_allclose(mean, law.mean(), atol=1e-13)
        np.testing.assert_allclose(covariance, law.covariance(), atol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        "gaussian_tilt:mean=0.4",
        "gaussian_tilt:schedule=linear_flow,start_time=0.05,mean=0.4",
        "gaussian_tilt:schedule=linear_flow,noise=constant,mean=0.4",
        "gaussian_tilt:schedule=cosine,noise=constant,mean=0.4",
        "gaussian_tilt:schedule=ve,rate=2.0,mean=0.4",
        "follmer_mixture",
    ],
)
def test_exponential_scheme_of_a_gaussian_base_is_exact(spec):
    problem = sdebench.problem(spec)
    times = problem.time_grid(4)
    tables = problem.tables(None, times, "exponential")
    mean, variance = tables.start_mean[0], tables.start_scale[0] ** 2
    for n in range(4):
        mean = tables.scale[n] * mean + tables.offset[n]
        variance = tables.scale[n] ** 2 * variance + tables.noise[n] ** 2
        law = problem.truth.base_marginal(times[n + 1])
        np.testing.assert_allclose(mean, law.mean(), atol=1e-13)
        np.testing.assert_allclose(variance, np.diag(law.covariance()), rtol=1e-12)


@every_problem
def test_exponential_scheme_responds_to_the_control_as_euler_does(problem):
    """G w = integral of (flow) sigma u: the push of a frozen control, to order h^2.

    And |w|^2 <= h |u|^2 + O(h^2): noise units measure the relative entropy.
    """
    with_scheme(problem, "exponential")
    theta, (start, end) = problem.theta("halfway"), problem.time_span
    x = checks.visited(problem, n_times=1)[0][1]
    gaps = []
    for h in (0.01, 0.005):
        times = start + 0.4 * (end - start) + np.array([0.0, h])
        pushes = []
        for scheme in ("euler_maruyama", "exponential"):
            _, noise, w = checks.table_step(problem.tables(theta, times, scheme), 0, x)
            pushes.append(w @ noise.T)
        gaps.append(np.max(np.abs(pushes[0] - pushes[1])) / np.max(np.abs(pushes[0])))
    assert gaps[0] < 0.1
    assert gaps[1] < 0.6 * gaps[0] + 1e-13


def test_exponential_response_against_matrix_integrals():
    """w = G^-1 int exp(A s) ds sigma u, by Simpson's rule on 2000 panels."""
    problem = sdebench.problem("ou_linear", dim=3, spread=0.4)
    A, sigma = problem.model.drift_matrix, problem.model.diffusion
    h = 0.25
    nodes = np.linspace(0.0, h, 401)
    weights = np.full(401, 2.0)
    weights[1::2], weights[[0, -1]] = 4.0, 1.0
    integral = np.einsum(
        "n,nij->ij", weights * h / 1200, [scipy.linalg.expm(A * s) for s in nodes]
    )
    tables = problem.tables(problem.theta("halfway"), np.array([0.0, h]), "exponential")
    x = np.eye(3)
    _, noise, w = checks.table_step(tables, 0, x)
    u = problem.truth.policy(x, 0.0, "halfway")
    np.testing.assert_allclose(w @ noise.T, u @ (integral @ sigma).T, atol=1e-12)


@every_problem
def test_simulated_chain_is_the_table(problem):
    """One step of the kernels: mean over paths from the tables, z-test."""
    theta = problem.theta("halfway")
    n_paths = 2**13
    options = {"n_steps": 1, "n_paths": n_paths, "seed": 9, "keep_states": True}
    run = sdebench.simulate(problem, point=theta, **options)
    tables = problem.tables(theta, problem.time_grid(1))
    mean, noise, w = checks.table_step(tables, 0, run.states[0].T)
    # Noise may not reach every coordinate: the others move as the mean does.
    inverse = np.linalg.pinv(noise)  # (d, d), or one of each path
    reached = inverse @ noise

    def times(matrix, v):
        return (matrix @ v[..., None])[..., 0]

    shocks = times(inverse, run.states[1].T - mean)
    np.testing.assert_allclose(
        mean + times(noise, shocks),
        run.states[1].T,
        atol=1e-12 * np.abs(mean).max(),
    )
    z = shocks - times(reached, w)
    np.testing.assert_allclose(run.control_cost, 0.5 * np.sum(w * w, 1), rtol=1e-9)
    np.testing.assert_allclose(
        run.martingale, np.sum(w * z, axis=1), atol=1e-8 * (1 + np.abs(w).max() ** 2)
    )
    np.testing.assert_allclose(run.reward, problem.reward(run.terminal.T), atol=1e-9)
    variance = np.diagonal(reached.reshape(-1, *noise.shape[-2:])[0])  # 1 or 0
    checks.require_zero(z.mean(axis=0), n_paths**-0.5 * variance, "noise")
    checks.require_zero(
        (z**2).mean(axis=0) - variance, (2 / n_paths) ** 0.5 * variance, "noise"
    )


def test_both_classes_of_problems_are_in_the_catalogue():
    kinds = [isinstance(p, TiltingProblem) for p in checks.all_problems()]
    others = [isinstance(p, LinearProblem) for p in checks.all_problems()]
    assert any(kinds)
    assert any(others)


@pytest.mark.parametrize(
    "steps", [0, -3, True, [0.0, 0.5], [0.0, 0.5, 1.000009], [0.0, 0.6, 0.5, 1.0]]
)
def test_a_wrong_grid_is_refused(steps):
    problem = sdebench.problem("two_modes")
    with pytest.raises(ParameterError, match="not allowed; give"):
        problem.time_grid(steps)
