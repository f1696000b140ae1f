"""Moment and variance losses: exact means, moments of the weights, refusals.

Expectations are quadratures over all normals of a short chain.  With weights e^{-l}
they are no polynomials: the nodes are many enough for the tolerance.
"""

from __future__ import annotations

import numpy as np
import pytest
from _chain import ScalarChain, grid, random_noise, rows
from _matrix_chain import MatrixChain

from sdebench import registry
from sdebench.closed_form.path_quadratics import (
    log_ratio,
    moment_gradient,
    weight_tail_index,
    weight_variance_gradient,
)
from sdebench.errors import NotExactError, ParameterError, UnknownNameError
from sdebench.measure import measure

THETA, VALUE = 0.35, 0.7
BACKENDS = ("torch", "numba")
SAMPLINGS = ("current", "base", "optimal")
CHAIN = ScalarChain(
    n_steps=2,
    scale=0.8,
    start_mean=0.7,
    start_scale=0.4,
    quadratic=0.6,
    linear=0.5,
    constant=0.3,
    running=0.2,
    optimum=0.2,
)
NOISE, WEIGHTS = grid(CHAIN, 30, start=True)
MANY = 10**12
"""Paths for which the factor M / (M - 1) of a sample is one."""

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def made(name, **options):
    return registry.estimator(name, **options)


def mean_of(estimator, theta=THETA, backend="torch", chain=CHAIN):
    statistics = rows(chain, estimator, theta, NOISE, backend=backend)
    return estimator.combine(statistics @ WEIGHTS, MANY)


def log_ratios(sampling, theta=THETA):
    """The log-ratio at all nodes, from the rows of the log-variance loss."""
    return rows(CHAIN, made("log_variance", sampling=sampling), theta, NOISE)[-1]


def given(sampling="current", value=VALUE):
    return made("moment", initial_value="given", value=value, sampling=sampling)


# ---- means ---------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_means_are_exact(sampling, backend):
    policy = CHAIN.policy(THETA)
    for estimator in (given(sampling), made("moment", sampling=sampling)):
        exact = estimator.target(policy)
        found = mean_of(estimator, backend=backend)
        np.testing.assert_allclose(found, exact, rtol=1e-10)
    estimator = made("variance", sampling=sampling)
    found = mean_of(estimator, backend=backend)
    np.testing.assert_allclose(found, estimator.target(policy), rtol=1e-7)


@pytest.mark.parametrize("sampling", ["base", "optimal"])
def test_gradients_are_differences_of_the_losses(sampling):
    """1/2 E(l - y_0)^2, and 1/2 Var(e^-l) over the squared mean at THETA."""
    step = 2e-5
    shifted = [log_ratios(sampling, THETA + k * step) for k in (1, -1)]
    moments = [0.5 * WEIGHTS @ (ratio - VALUE) ** 2 for ratio in shifted]
    policy = CHAIN.policy(THETA)
    feedback = policy.sampled_feedback(sampling)
    slope = (moments[0] - moments[1]) / (2 * step)
    exact = moment_gradient(policy, *feedback, VALUE)[0]
    assert exact == pytest.approx(slope, rel=1e-6)
    level = WEIGHTS @ np.exp(-log_ratios(sampling))
    variances = [
        0.5 * (WEIGHTS @ np.exp(-2.0 * ratio) - (WEIGHTS @ np.exp(-ratio)) ** 2)
        for ratio in shifted
    ]
    slope = (variances[0] - variances[1]) / (2 * step * level**2)
    exact = weight_variance_gradient(policy, *feedback)[0]
    assert exact == pytest.approx(slope, rel=1e-6)


def test_the_mean_log_ratio_is_the_objective_on_policy():
    """E l = J_N, the reward's constant included, from three routes."""
    policy = CHAIN.policy(THETA)
    ratio, scores = log_ratio(policy, policy.gain, policy.bias)
    assert ratio.mean == pytest.approx(policy.objective(), rel=1e-12)
    assert WEIGHTS @ log_ratios("current") == pytest.approx(ratio.mean, rel=1e-12)
    assert scores[0].mean == pytest.approx(0.0, abs=1e-12)


def test_the_given_value_matters_off_policy_and_for_the_variance():
    """A constant baseline on policy; elsewhere the gradient moves by -y E[grad l]."""
    policy = CHAIN.policy(THETA)
    exact = policy.gradient()
    best = float(WEIGHTS @ log_ratios("current"))
    spread = {}
    for value in (best, best + 3.0, best - 3.0):
        found = rows(CHAIN, given(value=value), THETA, NOISE)[0]
        assert found @ WEIGHTS == pytest.approx(exact[0], rel=1e-10)
        spread[value] = found**2 @ WEIGHTS
    assert min(spread, key=spread.get) == best
    for sampling in ("base", "optimal"):
        means = [given(sampling, v).target(policy)[0] for v in (0.0, 1.0, 2.0)]
        moved = np.diff(means)
        assert moved[0] == pytest.approx(moved[1], rel=1e-9)
        assert abs(moved[0]) > 0.005 * abs(means[0])
        mean = float(WEIGHTS @ log_ratios(sampling))
        learned = made("moment", sampling=sampling).target(policy)
        assert given(sampling, mean).target(policy) == pytest.approx(learned, rel=1e-9)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_learned_value_is_the_mean_of_the_others(sampling):
    """Path by path the rows of log_variance; its estimate by leaving each path out."""
    noise = random_noise(CHAIN, 7, 5)
    both = [
        rows(CHAIN, made(name, sampling=sampling), THETA, noise)
        for name in ("moment", "log_variance")
    ]
    np.testing.assert_array_equal(*both)
    _, score, ratio = both[0]
    others = (ratio.sum() - ratio) / 6
    direct = np.mean((ratio - others) * score)
    estimate = made("moment").combine(both[0].mean(axis=1), 7)
    assert estimate[0] == pytest.approx(direct, rel=1e-12)


def test_the_sample_covariance_of_the_weights():
    """By the definition, with M - 1; rewards of thousands only move the shift."""
    noise = random_noise(CHAIN, 9, 6)
    estimator = made("variance")
    statistics = rows(CHAIN, estimator, THETA, noise)
    ratio = rows(CHAIN, made("log_variance"), THETA, noise)[-1]
    score = statistics[1] / statistics[2]
    weights = np.exp(-ratio)
    exact = -np.cov(weights, weights * score)[0, 1] / weights.mean() ** 2
    found = estimator.combine(statistics.mean(axis=1), 9)
    assert found[0] == pytest.approx(exact, rel=1e-10)
    for constant in (-2000.0, 2000.0):
        far = ScalarChain(**(CHAIN.__dict__ | {"constant": constant}))
        moved = rows(far, estimator, THETA, noise)
        np.testing.assert_allclose(moved, statistics, rtol=1e-8)


# ---- moments of the weights ----------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_the_tail_index_of_the_weights(seed):
    """a^s N(0, I) has the precision s L + (1 - s) I, L that of the noise under P*."""
    case = MatrixChain(seed=seed)
    policy = case.policy()
    found = weight_tail_index(policy, policy.gain, policy.bias)
    _, covariance = case.tilted_law("theta")
    least = np.linalg.eigvalsh(np.linalg.inv(covariance))[0]
    expected = np.inf if least >= 1.0 else 1.0 / (1.0 - least)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found > 1.0  # the mean of the weights is Z
    if found > 2.0:
        assert np.all(np.isfinite(made("variance").target(policy)))
    else:
        with pytest.raises(NotExactError, match="no moment of order 2"):
            made("variance").target(policy)


def test_where_the_loss_is_infinite_there_is_no_target():
    """A stronger feedback, on paths without any: of finite and of infinite variance."""
    for theta, finite in ((THETA, True), (0.75, False)):
        policy = CHAIN.policy(theta)
        index = weight_tail_index(policy, *policy.sampled_feedback("base"))
        assert (index > 2.0) == finite
        if finite:
            made("variance", sampling="base").target(policy)
            continue
        with pytest.raises(NotExactError, match="no moment of order 2"):
            made("variance", sampling="base").target(policy)


def test_relative_variance_is_the_log_variance_near_the_optimum():
    """Brownian motion with a linear reward: l is constant at the optimum."""
    problem = registry.problem("brownian_linear", dim=1)
    gaps = []
    for distance in (0.04, 0.02):
        theta = (1.0 + distance) * problem.theta_star
        policy = problem.truth.policy_chain(theta, 5)
        mine, other = (
            made(name).target(policy)[:2] for name in ("variance", "log_variance")
        )
        gaps.append(np.linalg.norm(mine - other) / np.linalg.norm(other))
    assert gaps[1] < 0.6 * gaps[0] < 0.1


@pytest.mark.parametrize("name", ["moment", "variance"])
def test_no_variance_where_the_log_ratio_is_constant(name):
    row = measure(
        "brownian_linear:dim=2",
        made(name),
        point="optimum",
        n_steps=5,
        n_paths=16,
        n_replicates=8,
        backend="torch",
    ).row
    assert np.max(np.abs(row["mean"])) < 1e-13
    assert row["variance"] < 1e-26


def test_the_verdict_where_the_loss_is_infinite():
    """Never "unbiased": the second moment of the weights is infinite there."""
    settings = {"n_steps": 6, "n_replicates": 64, "seed": 2, "backend": "torch"}
    problem = registry.problem("ou_quadratic_hard", dim=2)
    policy = problem.truth.policy_chain("zero", 6)
    assert weight_tail_index(policy, policy.gain, policy.bias) > 4.0
    far = problem.truth.policy_chain("overshoot", 6)
    assert weight_tail_index(far, *far.sampled_feedback("base")) < 2.0
    row = measure(
        problem, made("variance", sampling="base"), point="overshoot", **settings
    ).row
    assert row["target"] is None
    assert row["verdict"] in ("infinite variance suspected", "no exact target")


# ---- what is refused -----------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "error", "match"),
    [
        ("moment", {"initial_value": "mean"}, UnknownNameError, "learned"),
        ("moment", {"value": 1.0}, ParameterError, 'initial_value="given"'),
        ("moment", {"value": float("nan")}, ParameterError, "finite"),
        ("moment", {"sampling": "zero"}, UnknownNameError, "optimal"),
        ("variance", {"sampling": "zero"}, UnknownNameError, "optimal"),
    ],
)
def test_wrong_options_are_refused(name, options, error, match):
    with pytest.raises(error, match=match):
        made(name, **options)


def test_one_path_has_no_variance():
    for spec, refused in (
        ("moment", True),
        ("moment:initial_value=given", False),
        ("variance", True),
    ):
        assert (made(spec).refusal(1, "numba") is not None) == refused
