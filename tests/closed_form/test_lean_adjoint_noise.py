"""Noise of the lean adjoint on a scalar chain: sampled paths, and the Gaussian base.

The stochastic check has the false-alarm rate of `_checks.require_zero`.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from _checks import require_zero

import sdebench
from sdebench.closed_form import log_quadratics as lq
from sdebench.closed_form.affine_chain import AffineChain
from sdebench.closed_form.lean_adjoint_noise import lean_adjoint_noise
from sdebench.closed_form.regression_targets import RegressionTargets
from sdebench.errors import NotExactError


def tables(problem, n_steps):
    theta = problem.theta("optimum")
    return problem.tables(theta, problem.time_grid(n_steps))


def sampled_noise(given, n_paths, seed):
    """Simulate the chain in numpy; the Jacobian by differences of the step's mean."""
    rng = np.random.default_rng(seed)
    index = np.searchsorted(given.start_cumulative, rng.random(n_paths))
    x = given.start_mean[index, 0] + given.start_scale[index, 0] * rng.standard_normal(
        n_paths
    )

    def base_mean(n, at):
        score = lq.gradient(given.base[n], at[:, None])[:, 0]
        return given.scale[n, 0] * at + given.offset[n, 0] + given.base_gain[n] * score

    states, controls = [x], []
    for n, g in enumerate(given.noise):
        slope = [
            lq.gradient(r[n], x[:, None])[:, 0] for r in (given.tilted, given.base)
        ]
        controls.append(given.control_gain[n] * (slope[0] - slope[1]))
        x = base_mean(n, x) + g * (controls[-1] + rng.standard_normal(n_paths))
        states.append(x)
    adjoint = -lq.gradient(given.reward, x[:, None])[:, 0]
    total = np.zeros(n_paths)
    for n in reversed(range(len(controls))):
        total += 0.5 * (controls[n] + given.noise[n] * adjoint) ** 2
        h = 1e-5
        jacobian = base_mean(n, states[n] + h) - base_mean(n, states[n] - h)
        adjoint = jacobian / (2 * h) * adjoint
    return total


@pytest.mark.parametrize("n_steps", [4, 12])
def test_sampled_paths(n_steps):
    # modes close together: labels without heavy tails
    problem = sdebench.problem("two_modes", distance=1.0, beta=0.5)
    given = tables(problem, n_steps)
    value, bound = lean_adjoint_noise(given)
    assert bound < 1e-8 * value
    samples = sampled_noise(given, 1 << 17, 3)
    error = samples.std() / sqrt(len(samples))
    require_zero([samples.mean() - value], [error], "noise of the lean adjoint")


def test_a_single_gaussian_by_moments_of_the_chain():
    problem = sdebench.problem("gaussian_tilt", mean=0.3)
    n_steps = 10
    policy = problem.truth.policy_chain("optimum", n_steps)
    chain: AffineChain = policy.chain
    means, covariances = chain.moments(policy.gain, policy.bias)
    Q, q = chain.reward_quadratic[0, 0], chain.reward_linear[0]
    g, M = chain.noise[:, 0, 0], chain.transition[:, 0, 0]
    total = 0.0
    for n in range(n_steps):
        growth = np.prod(M[n + 1 :])  # a_{n+1} = growth (Q X_N - q)
        slope, level = 1.0, 0.0
        for k in range(n, n_steps):
            slope *= M[k] + g[k] * policy.gain[k, 0, 0]
            level = (M[k] + g[k] * policy.gain[k, 0, 0]) * level
            level += chain.offset[k, 0] + g[k] * policy.bias[k, 0]
        end = covariances[-1, 0, 0] - slope**2 * covariances[n, 0, 0]  # of X_N | X_n
        a = policy.gain[n, 0, 0] + g[n] * growth * Q * slope
        b = policy.bias[n, 0] + g[n] * growth * (Q * level - q)
        square = (a * means[n, 0] + b) ** 2 + a**2 * covariances[n, 0, 0]
        total += 0.5 * (square + (g[n] * growth * Q) ** 2 * end)
    found = lean_adjoint_noise(tables(problem, n_steps))
    assert found.value == pytest.approx(total, rel=1e-9)


def test_chains_tend_to_the_closed_form():
    """Order one in 1/N: extrapolated from 400 and 800 steps."""
    problem = sdebench.problem("gaussian_tilt", rate=8.0)
    alpha, _, variance = problem.family.base.backward(0.0, 1.0)
    limit = RegressionTargets.of(problem).integral("adjoint", alpha / sqrt(variance))
    coarse, fine = (lean_adjoint_noise(tables(problem, n)).value for n in (200, 400))
    assert 2.0 * fine - coarse == pytest.approx(limit.value, rel=0.01)
    assert abs(fine / limit.value - 1.0) > 0.05


def test_refusals():
    for name in ("four_modes", "follmer_mixture"):
        problem = sdebench.problem(name)
        with pytest.raises(NotExactError, match="scalar problems"):
            lean_adjoint_noise(tables(problem, 2))
