"""Likelihood ratios: exact means and variances, path by path, and refusals.

Most expectations are quadratures over all normals of a short chain, exact to rounding.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _chain import ScalarChain, grid, group_mean, random_noise, rows

from sdebench import registry
from sdebench.errors import (
    NotApplicableError,
    NotExactError,
    ParameterError,
    UnknownNameError,
)
from sdebench.estimator import Sizes
from sdebench.measure import measure
from sdebench.simulate.noise import Noise

THETA = 0.9
COSTS = ScalarChain(n_steps=3, quadratic=1.4, linear=0.3, running=0.8, start_scale=0.4)


def made(name, **options):
    return registry.estimator(name, **options)


def expectation(chain, estimator, noise, weights, theta=THETA, **options):
    """Exact mean and covariance of the mean statistics of a group."""
    return group_mean(rows(chain, estimator, theta, noise, **options), weights)


# ---- one step: x = theta + sigma z, reward -x^2 --------------------------------
ONE = ScalarChain(n_steps=1, shift=True, scale=0.6)
MEAN, SIGMA = 0.7, 0.6


@pytest.mark.parametrize(
    ("baseline", "variance"),
    [
        (0.0, MEAN**4 / SIGMA**2 + 14 * MEAN**2 + 15 * SIGMA**2),
        (MEAN**2 + SIGMA**2, 8 * MEAN**2 + 10 * SIGMA**2),
        (MEAN**2 + 3 * SIGMA**2, 8 * MEAN**2 + 6 * SIGMA**2),
    ],
)
def test_variance_of_one_step(baseline, variance):
    """No, the mean and the optimal baseline; the baseline as a part of the reward."""
    chain = ScalarChain(n_steps=1, shift=True, scale=SIGMA, constant=baseline)
    noise, weights = grid(chain, 8)
    estimator = made("reinforce", baseline="none", objective="reward")
    mean, covariance = expectation(chain, estimator, noise, weights, MEAN)
    assert mean[0] == pytest.approx(2 * MEAN, rel=1e-13)
    assert covariance[0, 0] == pytest.approx(variance, rel=1e-12)
    _, pathwise = expectation(chain, made("pathwise"), noise, weights, MEAN)
    assert pathwise[0, 0] == pytest.approx(4 * SIGMA**2, rel=1e-12)


def test_the_optimal_baseline_of_one_step_is_found():
    """E[c S^2] / E[S^2] from the rows of either half; combine() subtracts it."""
    noise, weights = grid(ONE, 8)
    estimator = made("reinforce", baseline="optimal", objective="reward")
    statistics = rows(ONE, estimator, MEAN, noise)
    even, odd = statistics[:4], statistics[4:]
    mean = (even + odd) @ weights
    assert mean[2] / mean[3] == pytest.approx(MEAN**2 + 3 * SIGMA**2, rel=1e-12)
    halves = np.concatenate([mean, mean]) / 2
    assert estimator.combine(halves, 2)[0] == pytest.approx(2 * MEAN, rel=1e-12)


# ---- reward-to-go ----------------------------------------------------------------
NOISE, WEIGHTS = grid(COSTS, 6, start=True)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("objective", ["control", "reward"])
@pytest.mark.parametrize("to_go", [False, True])
def test_reinforce_means_are_exact(objective, to_go, backend):
    if objective == "reward" and to_go:
        with pytest.raises(ParameterError, match="objective control"):
            made("reinforce", objective=objective, reward_to_go=to_go)
        return
    estimator = made(
        "reinforce", baseline="none", objective=objective, reward_to_go=to_go
    )
    mean, _ = expectation(COSTS, estimator, NOISE, WEIGHTS, backend=backend)
    exact = COSTS.policy(THETA).gradient(reward_only=objective == "reward")
    np.testing.assert_allclose(mean, exact, rtol=1e-11)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_reward_to_go_by_hand(backend):
    """Later costs only: the cost of a step is known before its noise."""
    noise = random_noise(COSTS, 8, seed=1)
    estimator = made("reinforce", baseline="none", reward_to_go=True)
    mine = rows(COSTS, estimator, THETA, noise, backend=backend)
    x, z = [1.2 + 0.4 * noise.start[0]], noise.steps[:, 0]
    for n in range(3):
        x.append(0.9 * x[n] + 0.7 * z[n])
    w = [0.9 * x[n] / 0.7 for n in range(3)]
    costs = [0.5 * w[n] ** 2 + 0.4 * x[n] ** 2 for n in range(3)]
    end = 0.7 * x[3] ** 2 - 0.3 * x[3]
    total = 0.0
    for n in range(3):
        total = total + x[n] / 0.7 * (w[n] + z[n] * (sum(costs[n + 1 :]) + end))
    np.testing.assert_allclose(mine[0], total, rtol=1e-12)


def test_reward_to_go_has_less_variance_here():
    """Exact variances; by how much depends on the problem."""
    variances = []
    for to_go in (False, True):
        estimator = made("reinforce", baseline="none", reward_to_go=to_go)
        variances.append(expectation(COSTS, estimator, NOISE, WEIGHTS)[1][0, 0])
    assert variances[1] < 0.7 * variances[0]


# ---- groups ----------------------------------------------------------------------
def test_published_facts_of_groups_of_four():
    """x ~ N(0.7, 0.25), reward x^2: 1.050 = (1 - 1/4) 1.4, and 1.499 standardized.

    The reward here is -x^2: the same numbers for the gradient of -E r.  The division
    is not smooth where all rewards agree: 16 nodes leave an error of 0.002.  With the
    standard deviation of samples, over G - 1, it would be 1.298.
    """
    chain = ScalarChain(n_steps=1, shift=True, scale=0.5)
    noise, weights = grid(chain, 16, group=4)
    for leave_one_out, value in ((False, 1.05), (True, 1.4)):
        estimator = made(
            "grpo", group=4, standardize="none", leave_one_out=leave_one_out
        )
        mean, _ = expectation(chain, estimator, noise, weights, 0.7)
        assert mean[0] == pytest.approx(value, rel=1e-12)
        assert estimator.target(chain.policy(0.7))[0] == pytest.approx(value)
    mean, _ = expectation(chain, made("grpo", group=4), noise, weights, 0.7)
    assert mean[0] == pytest.approx(1.4988, abs=2e-3)


def test_the_limit_of_standardization():
    """grad E r / std(r) = 1.786 for a large batch; false-alarm rate 1e-4 in all."""
    chain = ScalarChain(n_steps=1, shift=True, scale=0.5)
    noise = random_noise(chain, 1 << 17, seed=2)
    exact = 1.4 / np.sqrt(4 * 0.49 * 0.25 + 2 * 0.0625)
    assert exact == pytest.approx(1.786, abs=1e-3)
    for options in (
        {"group": 1 << 13, "standardize": "group"},
        {"group": 64, "standardize": "batch", "leave_one_out": True},
    ):
        values = rows(chain, made("grpo", **options), 0.7, noise)[0]
        error = values.std() / np.sqrt(len(values))
        assert abs(values.mean() - exact) < 4.1 * error  # p = 4e-5 each
        assert error < 0.01


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize(
    "options",
    [
        {"version": "flow_grpo"},
        {"version": "dance_grpo"},
        {"version": "mix_grpo", "window_start": 1, "window": 2},
        {"version": "g2rpo", "window_start": 1},
        {"version": "g2rpo", "window_start": 0, "leave_one_out": True},
    ],
)
def test_group_means_are_exact(options, backend):
    """Groups of two by quadrature, against the partial gradient of the masked chain."""
    steps = {"mix_grpo": 4, "g2rpo": 3}.get(options["version"], 2)
    chain = ScalarChain(n_steps=steps, quadratic=1.4, linear=0.3, start_scale=0.5)
    estimator = made("grpo", group=2, standardize="none", **options)
    mask = estimator.noisy_steps(steps)
    noisy = range(steps) if mask is None else np.flatnonzero(mask)
    noise, weights = grid(chain, 5, group=2, noisy=list(noisy), start=True)
    mean, _ = expectation(chain, estimator, noise, weights, backend=backend)
    target = estimator.target(chain.policy(THETA, noisy=mask))
    np.testing.assert_allclose(mean, target, rtol=1e-11)
    assert abs(target[0] - chain.policy(THETA).gradient(reward_only=True)[0]) > 0.1


def test_granularities_average_over_the_ends():
    """Three grids after the noisy step: the mean of the three chains' gradients."""
    chain = ScalarChain(n_steps=6, start_scale=0.5)
    options = {"version": "g2rpo", "window_start": 1, "granularities": (1, 2, 3)}
    estimator = made("grpo", group=2, standardize="none", **options)
    noise, weights = grid(chain, 5, group=2, noisy=[1], start=True)
    mean, _ = expectation(chain, estimator, noise, weights)
    # the scalar chain's steps do not depend on the grid: 6, 4 and 4 steps
    mask = estimator.noisy_steps(6)
    ends = [
        chain.policy(THETA, steps, noisy=mask[:steps]).gradient(
            reward_only=True, step_weights=mask[:steps]
        )
        for steps in (6, 4, 4)
    ]
    np.testing.assert_allclose(mean, 0.5 * np.mean(ends, axis=0), rtol=1e-11)
    with pytest.raises(NotExactError):
        estimator.target(chain.policy(THETA, noisy=mask))


def test_coarse_grids_keep_the_noisy_step_and_the_end():
    estimator = made("grpo", version="g2rpo", window_start=1, granularities=(3,))
    times = np.linspace(0.0, 1.0, 9)
    np.testing.assert_array_equal(estimator._coarse(times, 3), times[[0, 1, 2, 5, 8]])
    np.testing.assert_array_equal(estimator._coarse(times, 4), times[[0, 1, 2, 6, 8]])


def test_a_group_shares_its_start():
    chain = ScalarChain(n_steps=2, start_scale=1.0)
    noise = random_noise(chain, 8, seed=3)
    silent = Noise(0.0 * noise.steps, noise.start, noise.uniforms)
    shared = made("grpo", version="dance_grpo", group=4, standardize="none")
    moved = made("grpo", group=4, standardize="none")
    steps = silent.steps.copy()
    steps[0, 0, :] = 1.0  # the same noise: paths of a group differ by their start
    same = silent._replace(steps=steps)
    assert np.max(np.abs(rows(chain, shared, THETA, same))) < 1e-14
    assert np.min(np.abs(rows(chain, moved, THETA, same))) > 1e-3


def test_mixed_sampling_in_the_harness():
    """The harness' own masked chain: own bias, p > 1e-4 over two cells."""
    for spec in (
        "grpo:version=mix_grpo,standardize=none,window_start=2",
        "grpo:version=g2rpo,standardize=none,window_start=3",
    ):
        row = measure(
            "gaussian_tilt:dim=2",
            spec,
            n_steps=6,
            n_paths=1024,
            n_replicates=64,
            seed=5,
        ).row
        assert row["p_value_own"] > 5e-5
        assert row["relative_bias_target"] > 0.3
        assert row["verdict"] == "unbiased for its target"


# ---- proximal policy optimization ------------------------------------------------
@pytest.mark.parametrize("ratio", ["step", "path"])
@pytest.mark.parametrize("clip", [0.0, 1e-4])
def test_the_first_epoch_is_reinforce(ratio, clip):
    """Path by path, whatever the clip, with and without the mean log-probability."""
    noise = random_noise(COSTS, 64, seed=6)
    options = {"group": 8, "leave_one_out": False}
    plain = rows(COSTS, made("grpo", standardize="none", **options), THETA, noise)
    first = rows(COSTS, made("ppo_clip", ratio=ratio, clip=clip, **options), 0.9, noise)
    np.testing.assert_allclose(first, plain, rtol=1e-11, atol=1e-11)


def surrogate_gradients(chain, theta, old, noise, group, clip, ratio):
    """Gradient of every path's surrogate by automatic differentiation."""
    slope = torch.full((len(noise.uniforms),), theta, dtype=torch.float64)
    slope.requires_grad_(True)
    start = torch.tensor(chain.start_mean + chain.start_scale * noise.start[0])
    x, log_ratios = [start], []
    for n in range(chain.n_steps):
        after = old * x[n] + chain.scale * torch.tensor(noise.steps[n, 0])
        densities = [
            -0.5 * ((after - a * x[n]) / chain.scale) ** 2 for a in (slope, old)
        ]
        log_ratios.append(densities[0] - densities[1])
        x.append(after)
    reward = chain.linear * x[-1] - 0.5 * chain.quadratic * x[-1] ** 2
    members = reward.reshape(-1, group)
    advantage = (members - members.mean(1, keepdim=True)).reshape(-1)
    if ratio == "path":
        log_ratios = [sum(log_ratios)]
    low, high = (1 - clip, 1 + clip) if clip else (0.0, np.inf)
    total = 0.0
    for log_ratio in log_ratios:
        rho = torch.exp(log_ratio)
        total = total + torch.minimum(
            rho * advantage, torch.clamp(rho, low, high) * advantage
        )
    (gradient,) = torch.autograd.grad(total.sum(), slope)
    return -gradient.numpy()


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("ratio", ["step", "path"])
@pytest.mark.parametrize("clip", [0.0, 0.05, 0.3])
def test_the_gradient_of_the_clipped_surrogate(ratio, clip, backend):
    """By automatic differentiation of min(rho A, clip(rho) A) of every path."""
    noise = random_noise(COSTS, 64, seed=7)
    estimator = made(
        "ppo_clip", ratio=ratio, clip=clip, old_factor=0.8, leave_one_out=False
    )
    mine = rows(COSTS, estimator, THETA, noise, backend=backend)[0]
    reference = surrogate_gradients(COSTS, THETA, 0.8 * THETA, noise, 8, clip, ratio)
    np.testing.assert_allclose(mine, reference, rtol=1e-10, atol=1e-10)
    free = surrogate_gradients(COSTS, THETA, 0.8 * THETA, noise, 8, 0.0, ratio)
    clipped = np.mean(np.abs(free - reference) > 1e-6)
    assert (0.05 < clipped < 0.95) == (clip > 0)


def test_means_of_the_ratios():
    """Ratio of the path: exact.  Of the step: only that step is under theta."""
    chain = ScalarChain(n_steps=2, quadratic=1.4, linear=0.3)
    noise, weights = grid(chain, 14, group=2)
    options = {"group": 2, "clip": 0.0, "old_factor": 0.9}
    policy, old = chain.policy(THETA), chain.policy(0.9 * THETA)
    gradient = policy.gradient(reward_only=True)[0]
    path = made("ppo_clip", ratio="path", **options)
    mean, _ = expectation(chain, path, noise, weights)
    assert mean[0] == pytest.approx(gradient, rel=1e-5)
    surrogate = 0.0
    for n, weight in enumerate(np.eye(2)):
        gain = old.gain.copy()
        gain[n] = policy.gain[n]
        mixed = policy._replace(gain=gain)
        surrogate += mixed.gradient(reward_only=True, step_weights=weight)[0]
    step = made("ppo_clip", ratio="step", **options)
    mean, _ = expectation(chain, step, noise, weights)
    assert mean[0] == pytest.approx(surrogate, rel=1e-5)
    assert step.target(policy)[0] == pytest.approx(surrogate, rel=1e-12)
    assert path.target(policy)[0] == pytest.approx(gradient, rel=1e-12)
    assert abs(surrogate - gradient) > 0.05 * gradient


def test_the_mean_log_probability_divides_by_the_dimension():
    """Path by path in the first epoch, and in the ratio's power afterwards."""
    problem = registry.problem("brownian_linear", dim=3)
    pairs = [
        ("grpo", {"standardize": "none"}),
        ("ppo_clip", {}),
        ("ppo_clip", {"ratio": "path"}),
    ]
    for name, options in pairs:
        found = [
            measure(
                problem,
                made(name, log_probability=kind, **options),
                n_steps=3,
                n_paths=64,
                n_replicates=4,
                seed=8,
            ).row
            for kind in ("sum", "mean")
        ]
        np.testing.assert_allclose(
            found[0]["mean"], 3 * np.array(found[1]["mean"]), rtol=1e-12
        )
        np.testing.assert_allclose(
            found[0]["target"], 3 * np.array(found[1]["target"]), rtol=1e-12
        )


# ---- log-variance ----------------------------------------------------------------
@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("sampling", ["current", "base", "optimal"])
def test_log_variance_means_are_exact(sampling, backend):
    """Covariance of log-ratio and its derivative by quadrature; closed form."""
    estimator = made("log_variance", sampling=sampling)
    statistics = rows(COSTS, estimator, THETA, NOISE, backend=backend)
    many = 10**12  # the factor n / (n - 1) is that of samples
    mean = estimator.combine(statistics @ WEIGHTS, many)
    policy = COSTS.policy(THETA)
    np.testing.assert_allclose(mean, estimator.target(policy), rtol=1e-10)
    gradient = policy.gradient()[0]
    assert (abs(mean[0] / gradient - 1) < 1e-9) == (sampling == "current")


@pytest.mark.parametrize("sampling", ["base", "optimal"])
def test_log_variance_is_half_a_variance(sampling):
    """The closed form against differences of 1/2 Var(l), l from the rows."""
    estimator = made("log_variance", sampling=sampling)

    def half_variance(theta):
        ratio = rows(COSTS, estimator, theta, NOISE)[-1]
        return 0.5 * (WEIGHTS @ ratio**2 - (WEIGHTS @ ratio) ** 2)

    step = 1e-4
    slope = (half_variance(THETA + step) - half_variance(THETA - step)) / (2 * step)
    exact = COSTS.policy(THETA).log_variance_gradient(sampling)[0]
    assert exact == pytest.approx(slope, rel=1e-6)


def test_the_sample_covariance_is_unbiased():
    """Two paths by quadrature, the factor n / (n - 1) = 2."""
    chain = ScalarChain(n_steps=2, quadratic=1.4, linear=0.3)
    noise, weights = grid(chain, 6, group=2)
    estimator = made("log_variance")
    statistics = rows(chain, estimator, THETA, noise)
    pairs = statistics.reshape(len(statistics), -1, 2).mean(2)
    values = np.array([estimator.combine(pair, 2)[0] for pair in pairs.T])
    exact = chain.policy(THETA).gradient()[0]
    assert values @ weights == pytest.approx(exact, rel=1e-11)


@pytest.mark.parametrize("sampling", ["current", "base", "optimal"])
def test_no_variance_where_the_log_ratio_is_constant(sampling):
    """The optimum of Brownian motion with a linear reward, on every grid."""
    row = measure(
        "brownian_linear:dim=2",
        made("log_variance", sampling=sampling),
        point="optimum",
        n_steps=5,
        n_paths=16,
        n_replicates=8,
    ).row
    assert np.max(np.abs(row["mean"])) < 1e-13
    assert row["variance"] < 1e-26
    other = measure(
        "brownian_linear:dim=2",
        "reinforce",
        point="optimum",
        n_paths=16,
        n_replicates=8,
    ).row
    assert other["variance"] > 0.1


# ---- refusals --------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("grpo", {"group": 1}, ParameterError, "at least 2"),
        ("grpo", {"version": "grpo"}, UnknownNameError, "flow_grpo"),
        ("grpo", {"standardize": "all"}, UnknownNameError, "batch"),
        ("grpo", {"log_probability": "max"}, UnknownNameError, "mean"),
        ("grpo", {"window": 0}, ParameterError, "at least 0 and 1"),
        ("grpo", {"granularities": (1, 2)}, ParameterError, "g2rpo"),
        ("grpo", {"granularities": ()}, ParameterError, "strides"),
        ("ppo_clip", {"group": 1}, ParameterError, "at least 2"),
        ("ppo_clip", {"clip": -0.1}, ParameterError, "no clip"),
        ("ppo_clip", {"ratio": "token"}, UnknownNameError, "step"),
        ("ppo_clip", {"old_factor": np.inf}, ParameterError, "finite"),
        ("log_variance", {"sampling": "target"}, UnknownNameError, "optimal"),
    ],
)
def test_wrong_options_are_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        made(name, **options)


def test_settings_that_do_not_fit_are_refused():
    sizes = Sizes(n_paths=8, n_steps=4, dim=1, n_params=1)
    for options in ({"window": 5}, {"window_start": 3}):
        mixed = made("grpo", version="mix_grpo", **options)
        assert "longer than the chain of 4" in mixed.not_applicable_to(sizes)
    for first, fits in ((3, True), (4, False)):
        single = made("grpo", version="g2rpo", window_start=first)
        assert (single.not_applicable_to(sizes) is None) == fits
    with pytest.raises(NotApplicableError, match="longer than the chain"):
        measure("two_modes", "grpo:version=mix_grpo,window=9", n_steps=4, n_paths=8)
    for spec, n_paths in (("grpo", 12), ("ppo_clip", 12), ("log_variance", 1)):
        assert made(spec).refusal(n_paths, "numba") is not None
    batch = made("grpo", standardize="batch")
    assert batch.refusal(12, "numba") is not None
    assert batch.refusal(16, "numba") is None
