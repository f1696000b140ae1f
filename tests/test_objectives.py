"""The reward-only objective, steps without noise and the denoised prediction.

Exact answers by a second route each; Monte Carlo where there is no other, with fixed
seeds: all z-tests of one function together fail by chance with at most FALSE_ALARM.
"""

from __future__ import annotations

import itertools

import _checks as checks
import numpy as np
import pytest
from scipy.stats import norm

import sdebench
from sdebench.closed_form import log_quadratics as lq
from sdebench.errors import (
    NotApplicableError,
    NotExactError,
    NumericalError,
    ParameterError,
)
from sdebench.grid_problem import GridProblem
from sdebench.simulate.paths import simulate

FALSE_ALARM = 1e-4
PROBLEMS = checks.all_problems()
POINTS = ("zero", "halfway", "optimum", "overshoot")


def has(problem, answer):
    try:
        answer(problem)
    except NotExactError:
        return False
    return True


def problems_with(condition):
    chosen = [p for p in PROBLEMS if condition(p)]
    return pytest.mark.parametrize("problem", chosen, ids=lambda p: p.label)


SUMS = {"jacobi_polynomial", "many_well"}


def slow_truth(problem):
    """Whether answers or paths take seconds: grids, fine quadratures, many images."""
    slow = {
        "forty_modes",
        "digits",
        "digits_classifier",
        "hjb_log",
        "manufactured_sine",
    }
    return isinstance(problem, GridProblem) or problem.name in slow | SUMS


def flows(problem):
    """Whether the problem has a probability flow."""
    times = problem.time_grid(2)
    try:
        problem.tables(None, times, "euler_maruyama", np.array([1.0, 0.0]))
    except NotApplicableError:
        return False
    return True


def has_reward_only_gradient(problem):
    # Known, where the answer takes seconds.
    return slow_truth(problem) or has(
        problem, lambda q: q.truth.reward_only_gradient("halfway")
    )


exact_reward = checks.with_slow(filter(has_reward_only_gradient, PROBLEMS), slow_truth)
exact_chain = problems_with(
    lambda p: has(p, lambda q: q.truth.policy_chain("halfway", 3))
)
flow_problems = problems_with(flows)
flow_chains = problems_with(
    lambda p: flows(p) and has(p, lambda q: q.truth.policy_chain("halfway", 3))
)


def differences(function, theta, step=1e-4):
    """Central differences of fourth order, (P,)."""
    slopes = []
    for direction in np.eye(len(theta)):
        near, far = (
            (function(theta + k * step * direction))
            - function(theta - k * step * direction)
            for k in (1, 2)
        )
        slopes.append((8.0 * near - far) / (12.0 * step))
    return np.array(slopes)


def has_chain_answers(problem):
    return has(problem, lambda q: q.truth.reward_only_objective("halfway", 7))


@pytest.mark.parametrize(
    ("problem", "n_steps"),
    [
        pytest.param(
            problem,
            n_steps,
            id=f"{problem.label}-{n_steps}",
            marks=pytest.mark.slow if slow_truth(problem) else (),
        )
        for problem in PROBLEMS
        for n_steps in (None, 7)
        if (has_chain_answers if n_steps else has_reward_only_gradient)(problem)
    ],
)
@pytest.mark.parametrize("point", POINTS)
def test_reward_only_gradient_is_the_derivative(problem, point, n_steps):
    truth = problem.truth
    theta = problem.theta(point)
    exact = truth.reward_only_gradient(theta, n_steps)
    try:
        found = differences(lambda t: truth.reward_only_objective(t, n_steps), theta)
    except NumericalError as edge:  # of the controls under which paths stay finite
        pytest.skip(str(edge))
    names = ("reward_only_gradient", "reward_only_objective")
    bound = 0.0 if n_steps else max(truth.error_bound(k, theta) for k in names)
    scale = 1.0 + np.max(np.abs(exact))
    np.testing.assert_allclose(exact, found, atol=1e-8 * scale + 1e4 * bound, rtol=0)


@exact_reward
def test_reward_only_objective_is_the_mean_reward(problem):
    """By simulation at two points; control cost and running cost are left out."""
    limit = norm.isf(FALSE_ALARM / (4 * len(PROBLEMS)))
    for point in ("halfway", "optimum"):
        chain = has(problem, lambda q, p=point: q.truth.policy_chain(p, 8))
        n_steps = 8 if chain else 400
        paths = simulate(problem, point=point, n_steps=n_steps, n_paths=1 << 14, seed=8)
        error = paths.reward.std(ddof=1) / np.sqrt(1 << 14)
        exact = problem.truth.reward_only_objective(point, n_steps if chain else None)
        gap = abs(-paths.reward.mean() - exact)
        # Without an exact chain the bias of 400 steps is allowed for: twice the change
        # from 200 steps.
        bias = 0.0
        if not chain:
            coarse = simulate(
                problem, point=point, n_steps=200, n_paths=1 << 14, seed=8
            )
            bias = 2.0 * abs(coarse.reward.mean() - paths.reward.mean()) + 2.0 * error
        assert gap <= limit * error + bias


@exact_chain
@pytest.mark.parametrize("point", POINTS)
def test_chain_converges_to_continuous_time(problem, point):
    """First order: the errors at 200 to 1600 steps, by exact numbers."""
    truth = problem.truth
    ladder = [400, 800, 1600]
    errors = [
        truth.reward_only_gradient(point, n) - truth.reward_only_gradient(point)
        for n in ladder
    ]
    sizes = [np.linalg.norm(e) for e in errors]
    if max(sizes) < 1e-9 * (1.0 + np.linalg.norm(truth.reward_only_gradient(point))):
        return
    for coarse, fine in itertools.pairwise(errors):
        assert 1.7 < np.linalg.norm(coarse) / np.linalg.norm(fine) < 2.3


@exact_chain
@pytest.mark.parametrize("reward_only", [False, True])
def test_steps_add_up_and_each_is_a_derivative(problem, reward_only):
    """Weighting one step: the derivative when theta acts in that step alone."""
    n_steps = 4
    policy = problem.truth.policy_chain("halfway", n_steps)
    chain, theta = policy.chain, problem.theta("halfway")
    parts = [
        policy.gradient(reward_only=reward_only, step_weights=mask)
        for mask in np.eye(n_steps)
    ]
    whole = policy.gradient(reward_only=reward_only)
    # What theta does through the law of X_0 belongs to no step and to every part.
    start = policy.gradient(reward_only=reward_only, step_weights=np.zeros(n_steps))
    assert np.any(start) == problem.has_start_parameters
    parts = [part - start for part in parts]
    scale = 1.0 + np.max(np.abs(whole))
    np.testing.assert_allclose(np.sum(parts, axis=0), whole - start, atol=1e-12 * scale)
    for n in range(n_steps):

        def objective(moved, n=n):
            gain, bias = policy.gain.copy(), policy.bias.copy()
            there = problem.truth.policy_chain(moved, n_steps)
            gain[n], bias[n] = there.gain[n], there.bias[n]
            if reward_only:
                return chain.reward_only_objective(gain, bias)
            return chain.objective(gain, bias)

        found = differences(objective, theta)
        np.testing.assert_allclose(parts[n], found, atol=1e-7 * scale)


# ---- steps without noise ----------------------------------------------------
@flow_chains
def test_chain_without_noise_in_some_steps(problem):
    """Moments by the recursion against its definition, step by step."""
    mask = np.array([1.0, 0.0, 0.0, 1.0, 0.0])
    policy = problem.truth.policy_chain("halfway", 5, noisy=mask)
    chain = policy.chain
    mean, covariance = chain.start_mean, chain.start_covariance
    for n in range(5):
        closed = chain.transition[n] + chain.noise[n] @ policy.gain[n]
        mean = closed @ mean + chain.offset[n] + chain.noise[n] @ policy.bias[n]
        covariance = closed @ covariance @ closed.T
        if mask[n]:
            covariance = covariance + chain.noise[n] @ chain.noise[n].T
    means, covariances = chain.moments(policy.gain, policy.bias)
    np.testing.assert_allclose(means[-1], mean, atol=1e-13)
    np.testing.assert_allclose(covariances[-1], covariance, atol=1e-13)


@pytest.mark.parametrize(
    "point",
    [p if p == "halfway" else pytest.param(p, marks=pytest.mark.slow) for p in POINTS],
)
def test_flow_ends_in_the_law_of_the_policy(point):
    """E r(X_T) of the probability flow is that of the process, at first order.

    With a start that remembers nothing, alpha_0 = e^-15; at the catalogue's rate the
    flow starts in the base's law, which is the policy's up to alpha_0 = e^-3.
    """
    truth = sdebench.problem("gaussian_tilt:rate=30,mean=0.4").truth
    exact = truth.reward_only_objective(point)
    errors = []
    for n in (2000, 4000, 8000):
        policy = truth.policy_chain(point, n, noisy=np.zeros(n))
        value = policy.chain.reward_only_objective(policy.gain, policy.bias)
        errors.append(value - exact)
    assert abs(errors[0]) > 1e-4
    np.testing.assert_allclose(errors[0] / errors[1], 2.0, rtol=0.03)
    np.testing.assert_allclose(errors[1] / errors[2], 2.0, rtol=0.015)


@flow_problems
def test_flow_step_is_a_step_of_the_probability_flow(problem):
    """v + sigma u / 2 = kappa x + eta (grad log p + (s* - s)), by the base's pieces."""
    family = problem.family
    base, times = family.base, problem.time_grid(50)
    theta = problem.theta("halfway")
    tables = problem.tables(theta, times, "euler_maruyama", np.zeros(50))
    x = np.linspace(-1.0, 1.0, 3 * problem.dim).reshape(3, problem.dim)
    for n in (0, 17, 49):
        t, h = times[n], times[n + 1] - times[n]
        score = lq.gradient(base.marginal(t), x)
        tilt = problem.truth.policy(x, t, theta) / base.sigma(t)
        eta = 0.5 * base.sigma(t) ** 2
        kappa = float(base.schedule.kappa(t))
        expected = x + h * (kappa * x + eta * (score + tilt))
        base_score = lq.gradient(tables.base[n], x) if tables.base.shape[1] else 0.0
        mean = tables.scale[n] * x + tables.offset[n] + tables.base_gain[n] * base_score
        control = tables.control_gain[n] * (
            lq.gradient(tables.tilted[n], x) - base_score
        )
        np.testing.assert_allclose(
            mean + tables.noise[n] * control, expected, rtol=1e-12, atol=1e-12
        )


def test_simulated_steps_without_noise_have_none():
    """Both backends: the states follow the mean, and the noise buffer is zero."""
    from sdebench.measure.workers import Settings, make_worker

    problem = sdebench.problem("two_modes")
    mask = np.array([0.0, 1.0, 0.0, 0.0])

    class Masked(type(sdebench.estimator("pathwise"))):
        def noisy_steps(self, n_steps):
            return mask

    settings = Settings(
        times=problem.time_grid(4),
        theta=problem.theta("halfway"),
        n_paths=32,
        backend="numba",
        dtype="float64",
        device="cpu",
        seed=3,
    )
    worker = make_worker(problem, [Masked()], settings)
    worker.block(0, 0, 32)
    normals = worker._buffers.normals[:4, :, :32]
    assert not np.any(normals[mask == 0.0])
    assert np.all(np.std(normals[1], axis=1) > 0.5)


def test_steps_without_noise_are_refused_where_there_is_no_flow():
    for spec in ("ou_linear", "follmer_mixture", "gaussian_tilt:noise=constant"):
        problem = sdebench.problem(spec)
        times = problem.time_grid(4)
        with pytest.raises(NotApplicableError, match="probability flow"):
            problem.tables(None, times, "euler_maruyama", np.zeros(4))
    problem = sdebench.problem("two_modes")
    for mask in (np.zeros(3), np.full(4, 0.5)):
        with pytest.raises(ParameterError, match="noisy must hold 4"):
            problem.tables(None, problem.time_grid(4), "euler_maruyama", mask)
    with pytest.raises(ParameterError, match="euler_maruyama"):
        problem.tables(None, problem.time_grid(4), "exponential", np.zeros(4))


# ---- the denoised prediction ------------------------------------------------
@flow_problems
@pytest.mark.parametrize("point", ["zero", "halfway", "optimum"])
def test_denoised_prediction_is_the_posterior_mean(problem, point):
    """Against the mean of X_T given X_t under the law p_theta of the policy."""
    times = problem.time_grid(20)
    theta = problem.theta(point)
    tables = problem.tables(theta, times)
    family = problem.family
    x = np.linspace(-1.5, 1.5, 4 * problem.dim).reshape(4, problem.dim)
    for n in (0, 9, 19):
        rows, (gain, shift, _) = family._tilted(theta, times[n])
        weights = lq.weights(rows, x)
        means = gain * x[:, None, :] + shift
        expected = np.sum(weights[:, :, None] * means, axis=1)
        base_score = lq.gradient(tables.base[n], x) if tables.base.shape[1] else 0.0
        mean = tables.scale[n] * x + tables.offset[n] + tables.base_gain[n] * base_score
        w = tables.control_gain[n] * (lq.gradient(tables.tilted[n], x) - base_score)
        p, q, s = tables.denoiser[n][:3]
        np.testing.assert_allclose(
            p * x + q * mean + s * w, expected, rtol=1e-9, atol=1e-9
        )


def test_problems_without_a_denoiser_have_none():
    for spec in ("ou_linear", "follmer_mixture"):
        problem = sdebench.problem(spec)
        assert problem.tables(None, problem.time_grid(3)).denoiser.shape[0] == 0
