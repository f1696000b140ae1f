"""Gradients in the law of X_0, against differences of exact objectives."""

import dataclasses

import numpy as np
import pytest
from scipy.linalg import cholesky

import sdebench

SPECS = ("damped_oscillator", "lq_oscillator", "cubic_costate", "ddpm_chain:dim=2")
STEP = 1e-4


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n_steps", [None, 6])
def test_against_differences(spec, n_steps):
    problem = sdebench.problem(spec)
    truth, theta, d = problem.truth, problem.theta("halfway") + 0.1, problem.dim
    covariance = problem.model.start_covariance
    factor = cholesky(covariance, lower=True) if np.any(covariance) else covariance

    def objective(shift, change):
        """J from m_0 + shift and the factor L + change."""
        mean = problem.model.start_mean + shift
        moved = factor + change
        start = {"start_mean": mean, "start_covariance": moved @ moved.T}
        if n_steps is None:
            model = dataclasses.replace(problem.model, **start)
            law = truth._law(theta)
            slopes = truth._dgain, truth._dbias
            return model.policy_objective(*law, *slopes).objective
        policy = truth.policy_chain(theta, n_steps)
        chain = dataclasses.replace(policy.chain, **start)
        return chain.objective(policy.gain, policy.bias)

    mean, moment = truth.start_gradient(theta, n_steps)
    none = np.zeros((d, d))
    for i, e in enumerate(np.eye(d)):
        numeric = objective(STEP * e, none) - objective(-STEP * e, none)
        assert mean[i] == pytest.approx(numeric / (2 * STEP), abs=1e-6)
    if not np.any(factor):
        assert not np.any(moment)
        return
    by_factor = moment @ np.linalg.inv(factor).T
    for i in range(d):
        for j in range(d):
            change = np.zeros((d, d))
            change[i, j] = STEP
            numeric = objective(np.zeros(d), change) - objective(np.zeros(d), -change)
            assert by_factor[i, j] == pytest.approx(numeric / (2 * STEP), abs=1e-6)


@pytest.mark.parametrize("spec", ["damped_oscillator", "lq_oscillator"])
def test_the_tilted_start_removes_the_initial_value_bias(spec):
    """J(u*) + KL(tilted start | p_0) = -log Z, less than J(u*) from p_0."""
    problem = sdebench.problem(spec)
    model, truth = problem.model, problem.truth
    mean, covariance = model.tilted_start()
    moved = dataclasses.replace(model, start_mean=mean, start_covariance=covariance)
    inverse = np.linalg.inv(model.start_covariance)
    gap = mean - model.start_mean
    entropy = 0.5 * (
        np.trace(inverse @ covariance)
        + gap @ inverse @ gap
        - problem.dim
        - np.linalg.slogdet(inverse @ covariance)[1]
    )
    total = moved.optimal_cost() + entropy
    assert total == pytest.approx(-truth.log_normalizer(), rel=1e-12)
    assert total < truth.optimal_cost() - 0.01
