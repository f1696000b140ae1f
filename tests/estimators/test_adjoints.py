"""The adjoint family: pathwise, adjoint matching, continuous adjoint, AdjointDPM.

Expectations are exact (see `_expectation`), so that most tests have rounding errors
only.  Each was seen to fail when the estimator is changed as its docstring says.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _expectation import (
    close,
    expectation,
    grid,
    problem,
    steps_of,
    theta_of,
    view_of,
)

from sdebench import registry
from sdebench.errors import ParameterError, UnknownNameError
from sdebench.measure import measure, measure_group

FALSE_ALARM = 1e-4
"""Of the one statistical test in this file, divided by its number of comparisons."""
LINEAR = ("brownian_linear", "damped_oscillator")
TILTED = (
    "gaussian_tilt:mean=0.3",
    "gaussian_tilt:schedule=linear_flow,start_time=0.05",
    "gaussian_tilt:schedule=cosine,start_time=0.1,mean=-0.4",
)
SMALL = (*LINEAR, "ou_linear:dim=2", "ou_quadratic_easy:dim=2", *TILTED)
ANY = ("damped_oscillator", "ou_quadratic_easy:dim=3", "two_modes", "four_modes")


def slopes(view, path_cost):
    """Return d path_cost / d theta by automatic differentiation, (n_paths, P).

    ``path_cost(view, x, zero, n)`` returns the next state and the cost of a step.
    """
    with torch.enable_grad():
        x, cost, zeros, states = view.start(), 0.0, [], []
        for n in range(view.n_steps):
            zeros.append(torch.zeros_like(x, requires_grad=True))
            states.append(x.detach())
            x, more = path_cost(view, x, zeros[n], n)
            cost = cost + more
        found = torch.autograd.grad((cost - view.reward(x)).sum(), zeros)
    return sum(view.control_parameter_vjp(n, states[n], v) for n, v in enumerate(found))


# ---- pathwise: the reward alone, sticking the landing -----------------------
@pytest.mark.parametrize("spec", ANY)
def test_pathwise_of_the_reward_is_its_derivative(spec):
    """Fails with the sign of r, with costs left in, with w_n for G^T lambda."""
    chosen = problem(spec)
    view = view_of(chosen, theta_of(chosen), grid(chosen, 5))

    def reward_only(view, x, zero, n):
        w = view.control(n, x) + zero
        return view.base_mean(n, x) + view.apply_noise(n, w + view.noise(n)), 0.0

    mine = registry.estimator("pathwise", objective="reward").statistics(view)
    reference = slopes(view, reward_only)
    close(mine.numpy(), reference.numpy(), limit=1e-10)


@pytest.mark.parametrize("spec", ANY)
def test_sticking_the_landing_differentiates_the_log_density_ratio(spec):
    """log of the path's density under w_theta over the tilted one, theta inside w held.

    With zeta = w + z the increment in noise units, that log-ratio is
    sum (w . zeta - 1/2 |w|^2 + f) - r.  Fails with z_n in the parameter product, with
    2 z_n or -z_n in the state product.
    """
    chosen = problem(spec)
    view = view_of(chosen, theta_of(chosen), grid(chosen, 5))

    def log_ratio(view, x, zero, n):
        held = view.control(n, x)
        zeta = held + zero + view.noise(n)
        cost = (held * zeta).sum(1) - 0.5 * (held * held).sum(1)
        cost = cost + view.running_cost(n, x)
        return view.base_mean(n, x) + view.apply_noise(n, zeta), cost

    mine = registry.estimator("pathwise", sticking_the_landing=True).statistics(view)
    reference = slopes(view, log_ratio)
    close(mine.numpy(), reference.numpy(), limit=1e-10)


@pytest.mark.parametrize("spec", SMALL)
@pytest.mark.parametrize(
    "options", [{}, {"sticking_the_landing": True}, {"objective": "reward"}]
)
def test_pathwise_has_the_exact_mean(spec, options):
    chosen, estimator = problem(spec), registry.estimator("pathwise", **options)
    theta, times = theta_of(chosen), grid(chosen, steps_of(chosen))
    exact = chosen.truth.answer(estimator.estimand, theta, times)
    close(expectation(estimator, chosen, theta, times), exact)


def at_discrete_optimum(chosen, times):
    """Return the tables with the optimal feedback of the chain, and P of its value."""
    chain = chosen.truth.policy_chain("optimum", times).chain
    gain, bias = chain.optimal_feedback()
    tables = chosen.tables(chosen.theta_star, times)._replace(gain=gain, bias=bias)
    return tables, chain.value_coefficients()[0]


@pytest.mark.parametrize("spec", ["ou_linear", *LINEAR, "ou_quadratic_easy:dim=3"])
def test_sticking_the_landing_at_the_optimum_of_the_chain(spec):
    """Path by path sum (dw_n)^T G^T P_{n+1} G z_n, zero for linear rewards.

    The costate is the gradient of the value function without noise.  Fails without the
    martingale, with half or twice of it, with z_{n-1} or P_n.
    """
    chosen = problem(spec)
    times = grid(chosen, 6)
    tables, P = at_discrete_optimum(chosen, times)
    view = view_of(chosen, chosen.theta_star, times, tables=tables)
    paths = view.rollout()
    exact = 0.0
    for n, z in enumerate(paths.noises):
        v = view.apply_noise(n, z) @ torch.tensor(P[n + 1])
        v = view.noise_transpose(n, v)
        exact = exact + view.control_parameter_vjp(n, paths.states[n], v)
    plain = registry.estimator("pathwise").statistics(view).numpy()
    landed = registry.estimator("pathwise", sticking_the_landing=True)
    mine = landed.statistics(view).numpy()
    scale = np.max(np.abs(chosen.truth.gradient("zero", times)))
    close(mine, exact.numpy(), scale)
    if not np.any(chosen.model.reward_quadratic) and not np.any(chosen.model.running):
        close(mine, 0.0, scale)
    else:
        assert mine.std() > 1e-3 * scale  # not a comparison of zeros
        assert np.max(np.abs(plain - mine)) > 1e-3 * scale


@pytest.mark.parametrize("spec", ["ou_quadratic_easy:dim=2", "gaussian_tilt"])
def test_sticking_the_landing_loses_its_variance_with_the_step(spec):
    """At u* the variance is O(h^2); without the martingale it converges to a limit.

    With a quarter of the step a variance of O(h^2) is 16 times smaller, one of O(h) 4
    times, a constant is not: the limits are the geometric means 8 and 2.  4096 paths
    know a variance to a few per cent.
    """
    chosen = problem(spec)
    group = [
        registry.estimator("pathwise", sticking_the_landing=True),
        registry.estimator("pathwise"),
    ]
    rows = [
        [
            m.row["variance"]
            for m in measure_group(
                chosen,
                group,
                point="optimum",
                n_steps=n_steps,
                n_paths=512,
                n_replicates=8,
                seed=1,
                backend="torch",
            )
        ]
        for n_steps in (40, 160)
    ]
    landed, plain = np.array(rows[0]) / np.array(rows[1])
    assert landed > 8.0
    assert 0.5 < plain < 2.0


def test_sticking_the_landing_needs_the_control_cost():
    with pytest.raises(ParameterError, match="objective control"):
        registry.estimator("pathwise", objective="reward", sticking_the_landing=True)
    with pytest.raises(UnknownNameError, match="objective"):
        registry.estimator("pathwise", objective="rewards")


# ---- adjoint matching -------------------------------------------------------
@pytest.mark.parametrize("spec", ANY)
def test_full_adjoint_matching_is_pathwise(spec):
    """Path by path, bit for bit in exact arithmetic; the lean one is not."""
    chosen = problem(spec)
    view = view_of(chosen, theta_of(chosen), grid(chosen, 6))
    full = registry.estimator("adjoint_matching", adjoint="full")
    assert full.estimand == "gradient"
    reference = registry.estimator("pathwise").statistics(view).numpy()
    close(full.statistics(view).numpy(), reference, limit=1e-12)
    lean = registry.estimator("adjoint_matching").statistics(view).numpy()
    assert np.max(np.abs(lean - reference)) > 1e-3 * np.max(np.abs(reference))


@pytest.mark.parametrize("spec", SMALL)
@pytest.mark.parametrize("adjoint", ["lean", "full"])
def test_adjoint_matching_has_the_exact_mean(spec, adjoint):
    chosen = problem(spec)
    estimator = registry.estimator("adjoint_matching", adjoint=adjoint)
    theta, times = theta_of(chosen), grid(chosen, steps_of(chosen))
    exact = chosen.truth.answer(estimator.estimand, theta, times)
    close(expectation(estimator, chosen, theta, times), exact)


def test_adjoint_matching_knows_two_adjoints():
    with pytest.raises(UnknownNameError, match="lean"):
        registry.estimator("adjoint_matching", adjoint="leaner")


# ---- continuous adjoint -----------------------------------------------------
@pytest.mark.parametrize("spec", [*SMALL, "cubic_costate"])
def test_continuous_adjoint_has_the_mean_of_its_target(spec):
    """Fails with X_n or step n + 1 in either of them, and with a_n for a_{n+1}."""
    chosen, estimator = problem(spec), registry.estimator("continuous_adjoint")
    theta, times = theta_of(chosen), grid(chosen, steps_of(chosen))
    policy = chosen.truth.policy_chain(theta, times)
    target = estimator.target(policy)
    close(expectation(estimator, chosen, theta, times), target)
    gap = np.linalg.norm(target - policy.gradient())
    assert gap > 1e-3 * np.linalg.norm(target)  # it is another number


@pytest.mark.parametrize("spec", SMALL)
def test_continuous_adjoint_is_of_first_order(spec):
    """Exact numbers; its distance from the gradient of J_N and of J halves with h."""
    chosen, estimator = problem(spec), registry.estimator("continuous_adjoint")
    theta = theta_of(chosen)
    gaps = []
    for n_steps in (400, 800):
        policy = chosen.truth.policy_chain(theta, n_steps)
        target = estimator.target(policy)
        gradients = (policy.gradient(), chosen.truth.gradient(theta))
        gaps.append([np.linalg.norm(target - g) for g in gradients])
    ratio = np.array(gaps[0]) / gaps[1]
    np.testing.assert_allclose(ratio, 2.0, rtol=0.1)
    assert gaps[1][1] < 0.02 * np.linalg.norm(chosen.truth.gradient("zero"))


# ---- AdjointDPM -------------------------------------------------------------
@pytest.mark.parametrize("states", ["stored", "reconstructed"])
@pytest.mark.parametrize("spec", TILTED)
def test_adjoint_dpm_has_the_mean_of_its_target(spec, states):
    """Fails with X_n for y_{n+1}, with step n + 1, without 1/2 of the control."""
    chosen = problem(spec)
    estimator = registry.estimator("adjoint_dpm", states=states)
    theta, times = theta_of(chosen), grid(chosen, 4)
    policy = chosen.truth.policy_chain(theta, times, noisy=np.zeros(4))
    close(expectation(estimator, chosen, theta, times), estimator.target(policy))


@pytest.mark.parametrize("spec", ["gaussian_tilt", "two_modes", "four_modes"])
def test_stored_states_give_the_derivative_of_the_flow(spec):
    """Difference quotients of r(X_N) of the noiseless chain, path by path."""
    chosen = problem(spec)
    estimator = registry.estimator("adjoint_dpm", states="stored")
    theta, times, step = theta_of(chosen), grid(chosen, 6), 1e-3

    def rewards(moved):
        return view_of(chosen, moved, times, estimator).rollout().reward

    mine = estimator.statistics(view_of(chosen, theta, times, estimator))
    for p, direction in enumerate(np.eye(chosen.n_params)):
        at = {k: -rewards(theta + k * step * direction) for k in (-2, -1, 1, 2)}
        quotient = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)
        scale = float(mine.abs().max() + at[1].abs().max())
        close(mine[:, p].numpy(), quotient.numpy(), scale, 3e-8)


@pytest.mark.parametrize("spec", ["gaussian_tilt:mean=0.3", "two_modes"])
def test_reversal_error_is_of_first_order(spec):
    chosen, gaps = problem(spec), []
    for n_steps in (200, 400):
        times = chosen.time_grid(n_steps)
        stored, reconstructed = (
            registry.estimator("adjoint_dpm", states=states)
            .statistics(view_of(chosen, theta_of(chosen), times, estimator))
            .numpy()
            for states in ("stored", "reconstructed")
            for estimator in [registry.estimator("adjoint_dpm", states=states)]
        )
        gaps.append(np.linalg.norm(stored - reconstructed) / np.linalg.norm(stored))
    np.testing.assert_allclose(gaps[0] / gaps[1], 2.0, rtol=0.1)
    assert 1e-4 < gaps[1] < 0.1


def gaussian_flow(n_steps, theta, states):
    """Paths of the flow of a Gaussian, its ratio s = beta / alpha, and gradients."""
    chosen = problem("gaussian_tilt:variance=0.8,slope=0.4,curvature=0.6")
    times = chosen.time_grid(n_steps)
    estimator = registry.estimator("adjoint_dpm", states=states)
    view = view_of(chosen, np.array([0.0, theta]), times, estimator)
    schedule = chosen.family.base.schedule
    alpha, s = schedule.alpha(times), np.sqrt(schedule.variance(times))
    x = np.array([x[:, 0].numpy() for x in view.rollout().states])
    gradient = estimator.statistics(view)[:, 1].numpy()
    slope = -view.reward_gradient(view.rollout().states[-1])[:, 0].numpy()
    return x / alpha[:, None], (s / alpha)[:, None], slope, gradient


@pytest.mark.parametrize("states", ["stored", "reconstructed"])
def test_adjoint_dpm_converges_to_the_gaussian_closed_form(states):
    """y(s) = y_0 sqrt((C + s^2)/(C + s_0^2)) and its derivative in C, at first order.

    The flow of the tilted Gaussian of variance C = 1 / (1/0.8 + theta); spec section
    5.1 in y = x / alpha, s = beta / alpha.
    """
    theta, errors = 0.9, []
    C = 1.0 / (1.0 / 0.8 + theta)
    for n_steps in (400, 800):
        y, s, slope, gradient = gaussian_flow(n_steps, theta, states)
        exact = y[0] * np.sqrt((C + s**2) / (C + s[0] ** 2))
        # s ends in 0: y_end = y_0 sqrt(C / (C + s_0^2)), and dC/dtheta = -C^2
        by_variance = 0.5 * y[0] * s[0] ** 2 * (C + s[0] ** 2) ** -1.5 / np.sqrt(C)
        total = -(C**2) * slope * by_variance
        errors.append(
            (np.linalg.norm(y - exact), np.linalg.norm(gradient - total))
            / np.array([np.linalg.norm(exact), np.linalg.norm(total)])
        )
    assert np.all(errors[1] < 0.05)
    # the norm over all times grows with sqrt(n_steps) in both parts of the quotient
    np.testing.assert_allclose(errors[0] / errors[1], 2.0, rtol=0.15)


def test_adjoint_equations_of_the_gaussian_flow():
    """dL/dC = int a d(eps)/dC ds along the closed y(s), a(s) is the explicit dL/dC."""
    C, s0, y0, slope = 0.7, 4.0, 1.3, -0.8
    s, weights = np.polynomial.legendre.leggauss(60)
    s, weights = 0.5 * s0 * (1.0 - s), -0.5 * s0 * weights  # from s_0 to 0
    y = y0 * np.sqrt((C + s**2) / (C + s0**2))
    a = slope * np.sqrt(C / (C + s**2))
    integral = weights @ (a * -s * y / (C + s**2) ** 2)
    explicit = slope * 0.5 * y0 * s0**2 * (C + s0**2) ** -1.5 / np.sqrt(C)
    np.testing.assert_allclose(integral, explicit, rtol=1e-12)


def test_flow_and_sde_agree_up_to_the_memory_of_the_start():
    """Their gradients differ by O(alpha_0) as h -> 0; alpha_0 = e^(-rate/2)."""
    gaps = []
    for rate in (4.0, 6.0, 8.0):
        chosen = problem(f"gaussian_tilt:rate={rate}")
        exact = chosen.truth.reward_only_gradient("halfway")
        flow = [
            registry.estimator("adjoint_dpm", states="stored").target(
                chosen.truth.policy_chain("halfway", n, noisy=np.zeros(n))
            )
            for n in (1000, 2000)
        ]
        limit = 2.0 * flow[1] - flow[0]  # error of the flow's Euler steps: O(h^2)
        gaps.append(np.linalg.norm(limit - exact) / np.linalg.norm(exact))
    ratios = np.array(gaps[:-1]) / gaps[1:]
    np.testing.assert_allclose(ratios, np.exp(1.0), rtol=0.1)
    assert gaps[0] < 0.1


@pytest.mark.parametrize("spec", ["ou_linear", "follmer_mixture"])
def test_adjoint_dpm_is_refused_without_a_probability_flow(spec):
    from sdebench.errors import NotApplicableError

    with pytest.raises(NotApplicableError, match="memoryless denoising base"):
        measure(spec, "adjoint_dpm", n_steps=4, n_paths=16, n_replicates=2)
    with pytest.raises(UnknownNameError, match="stored"):
        registry.estimator("adjoint_dpm", states="store")


# ---- the harness judges them ------------------------------------------------
@pytest.mark.slow
def test_the_harness_tells_targets_from_gradients():
    """p-values of four cells at FALSE_ALARM altogether; distances are exact."""
    specs = ("continuous_adjoint", "adjoint_dpm", "adjoint_dpm:states=stored")
    rows = [
        m.row
        for problem_spec in ("gaussian_tilt", "ou_quadratic_easy:dim=2")
        for m in measure_group(
            problem_spec, specs, n_steps=5, n_paths=512, n_replicates=32, seed=4
        )
    ]
    judged = [row for row in rows if row["status"] == "ok"]
    assert len(judged) == 4
    for row in judged:
        assert row["verdict"] == "unbiased for its target"
        assert row["p_value_own"] > FALSE_ALARM / len(judged)
        assert row["relative_bias_target"] > 0.01
