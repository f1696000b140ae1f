"""Costs from a value function: problems with known costs are recovered from their V."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sdebench
from sdebench.closed_form.manufactured import ManufacturedCosts
from sdebench.errors import ParameterError


def of(problem, value):
    def drift(x, t):
        return torch.tensor(problem.drift(x.detach().numpy(), t))

    return ManufacturedCosts(value, drift, problem.diffusion, problem.time_span[1])


def states(problem, scale=1.0):
    rng = np.random.default_rng(2)
    return torch.tensor(scale * rng.normal(size=(4, problem.dim)))


def test_the_sine_in_100_dimensions():
    problem = sdebench.problem("manufactured_sine:amplitude=-1.5,power=0.7")

    def value(x, t):
        return -1.5 * torch.sin((1.0 - t + (x * x).sum(1)) ** 0.7)

    costs, x = of(problem, value), states(problem, 0.3)
    for t in (0.0, 0.6):
        wanted = problem.running_cost(x.numpy(), t)
        np.testing.assert_allclose(costs.running_cost(x, t), wanted, rtol=1e-11)
        wanted = problem.truth.control(x.numpy(), t)
        np.testing.assert_allclose(costs.control(x, t), wanted, rtol=1e-11)
    np.testing.assert_allclose(costs.reward(x), problem.reward(x.numpy()), rtol=1e-13)


def test_a_quadratic_value_function_with_drift_and_noise():
    """Riccati: V = 1/2 x^T P x + p x + rho by an ODE in time has the problem's f."""
    problem = sdebench.problem("damped_oscillator:damping=0.3,noise_level=0.7")
    t, step, x = 0.4, 1e-4, states(problem)
    corners = np.concatenate([np.zeros((1, 2)), np.eye(2), -np.eye(2), np.ones((1, 2))])

    def fit(time):
        """P, p, rho from six values of the exact quadratic V."""
        v = problem.truth.value(corners, time)
        rho, p = v[0], 0.5 * (v[1:3] - v[3:5])
        diagonal = v[1:3] + v[3:5] - 2.0 * rho
        cross = v[5] - rho - p.sum() - 0.5 * diagonal.sum()
        return np.array([[diagonal[0], cross], [cross, diagonal[1]]]), p, rho

    here, slopes = fit(t), []
    for before, after in zip(fit(t - step), fit(t + step), strict=True):
        slopes.append((after - before) / (2.0 * step))

    def value(x, time):
        P, p, rho = (
            torch.as_tensor(a) + torch.as_tensor(b) * (time[:, None, None] - t)
            for a, b in zip(here, slopes, strict=True)
        )
        quadratic = 0.5 * torch.einsum("ni,nij,nj->n", x, P, x)
        return quadratic + (p[:, 0] * x).sum(1) + rho[:, 0, 0]

    costs = of(problem, value)
    wanted = problem.running_cost(x.numpy(), t)
    np.testing.assert_allclose(costs.running_cost(x, t), wanted, atol=2e-6)
    wanted = problem.truth.control(x.numpy(), t)
    np.testing.assert_allclose(costs.control(x, t), wanted, atol=1e-9)


def test_wrong_factors_would_show():
    """Without the half of the trace, or with b of the wrong sign, f is another."""
    problem = sdebench.problem("manufactured_sine")

    def value(x, t):
        return -2.0 * torch.sin((1.0 - t + (x * x).sum(1)) ** 0.4)

    x = states(problem, 0.3)
    wanted = problem.running_cost(x.numpy(), 0.5)
    known = of(problem, value)
    double = ManufacturedCosts(
        value, known.drift, lambda t: np.sqrt(2.0) * np.eye(100), 1.0
    )
    assert np.min(np.abs(double.running_cost(x, 0.5).numpy() / wanted - 1.0)) > 0.1
    pushed = ManufacturedCosts(value, lambda x, t: x, problem.diffusion, 1.0)
    assert np.min(np.abs(pushed.running_cost(x, 0.5).numpy() - wanted)) > 0.01


def test_special_values():
    """A linear V has no second derivatives, one free of t no time derivative."""
    costs = ManufacturedCosts(
        lambda x, t: 2.0 * x[:, 0], lambda x, t: -x, lambda t: np.eye(2), 1.0
    )
    x = torch.tensor([[1.0, 3.0], [-2.0, 0.5]], dtype=torch.float64)
    np.testing.assert_allclose(costs.running_cost(x, 0.2), 2.0 + 2.0 * x[:, 0])
    with pytest.raises(ParameterError, match="return \\(2,\\)"):
        ManufacturedCosts(
            lambda x, t: x, lambda x, t: x, lambda t: np.eye(2), 1.0
        ).reward(x)
