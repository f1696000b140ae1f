"""Benes' drift: its transition density, and tilts by plain quadrature on the line."""

from __future__ import annotations

import numpy as np
import pytest

import sdebench
from sdebench.closed_form import log_quadratics as lq
from sdebench.closed_form.benes import BenesBase
from sdebench.errors import ParameterError

LINE = sdebench.problem("benes_quadratic:dim=1,rate=1.3,target=0.8,horizon=1.2")
Y = np.linspace(-14.0, 14.0, 8001)


def density(x, t):
    """exp(-a^2 t / 2) cosh(a y) / cosh(a x) N(y; x, t)."""
    a = LINE.rate
    normal = np.exp(-0.5 * (Y - x) ** 2 / t) / np.sqrt(2.0 * np.pi * t)
    return np.exp(-0.5 * a**2 * t) * np.cosh(a * Y) / np.cosh(a * x) * normal


def test_transition_density_solves_the_forward_equation():
    """d_t p = -(a tanh(a y) p)' + 1/2 p'' by differences, and its mass is one."""
    x, t, h = 0.4, 0.7, 1e-3
    step = Y[1] - Y[0]
    p = density(x, t)
    assert p.sum() * step == pytest.approx(1.0, abs=1e-12)
    in_time = (density(x, t + h) - density(x, t - h)) / (2.0 * h)
    flux = np.gradient(LINE.rate * np.tanh(LINE.rate * Y) * p, step)
    bend = np.gradient(np.gradient(p, step), step)
    np.testing.assert_allclose(in_time[2:-2], (0.5 * bend - flux)[2:-2], atol=2e-5)


def test_base_law_is_the_transition_density():
    total = np.exp(lq.log_value(LINE.family.base.marginal(0.9), Y[:, None]))
    np.testing.assert_allclose(total, density(0.0, 0.9), atol=1e-13)


def test_value_and_control_by_quadrature():
    step = Y[1] - Y[0]
    reward = LINE.reward(Y[:, None])
    for t in (0.0, 0.5, 1.1):
        for x in (-1.7, 0.0, 2.2):
            h = [
                np.sum(density(x + s, LINE.horizon - t) * np.exp(reward)) * step
                for s in (-1e-3, 0.0, 1e-3)
            ]
            point = np.array([[x]])
            value = LINE.truth.value(point, t)[0]
            assert value == pytest.approx(-np.log(h[1]), abs=1e-11)
            slope = (np.log(h[2]) - np.log(h[0])) / 2e-3
            assert LINE.truth.control(point, t)[0, 0] == pytest.approx(slope, abs=1e-5)
    wanted = np.log(np.sum(density(0.0, LINE.horizon) * np.exp(reward)) * step)
    assert LINE.truth.log_normalizer() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("point", ["zero", "halfway", "overshoot"])
def test_objective_by_quadrature_of_the_tilted_law(point):
    """J = E[r_theta - r] - log Z_theta under the law of X_T tilted by r_theta."""
    step, theta = Y[1] - Y[0], LINE.theta(point)
    p = density(0.0, LINE.horizon)
    features = np.stack([Y, -0.5 * Y**2])
    tilt = p * np.exp(theta @ features)
    mass = tilt.sum() * step
    gap = theta @ features - LINE.reward(Y[:, None])
    wanted = np.sum(tilt * gap) * step / mass - np.log(mass)
    assert LINE.truth.objective(point) == pytest.approx(wanted, abs=1e-12)
    mean = np.sum(tilt * gap) * step / mass
    moments = features @ tilt * step / mass
    covariance = (features * (gap - mean)) @ tilt * step / mass
    np.testing.assert_allclose(LINE.truth.gradient(point), covariance, atol=1e-12)
    assert np.all(np.isfinite(moments))


def test_products_are_sums_in_every_dimension():
    """V of a product reward is a sum over coordinates: target 0 splits."""
    one = sdebench.problem("benes_quadratic:dim=1,target=0.0").truth
    three = sdebench.problem("benes_quadratic:dim=3,target=0.0").truth
    x = np.random.default_rng(0).normal(size=(6, 3))
    total = sum(one.value(x[:, i : i + 1], 0.4) for i in range(3))
    np.testing.assert_allclose(three.value(x, 0.4), total, atol=1e-12)
    control = np.concatenate([one.control(x[:, i : i + 1], 0.4) for i in range(3)], 1)
    np.testing.assert_allclose(three.control(x, 0.4), control, atol=1e-12)


def test_exact_starts_elsewhere():
    """From another point the weights of the drifts are those of phi there."""
    base = BenesBase(np.array([0.5]), np.array([[1.0], [-1.0]]), np.log([0.5, 0.5]))
    masses = lq.gaussian_parameters(base.marginal(0.8))[0]
    wanted = np.exp([0.5, -0.5]) / (2.0 * np.cosh(0.5))
    np.testing.assert_allclose(np.exp(masses), wanted)


def test_refusals():
    with pytest.raises(ParameterError, match="equal"):
        BenesBase(np.zeros(1), np.array([[1.0], [-2.0]]), np.zeros(2))
    for spec in ("dim=0", "dim=9", "rate=0", "horizon=-1"):
        with pytest.raises(ParameterError, match=spec.partition("=")[0]):
            sdebench.problem(f"benes_quadratic:{spec}")
    with pytest.raises(ParameterError, match="eigenvalue"):
        sdebench.problem("benes_quadratic:beta=-2")
