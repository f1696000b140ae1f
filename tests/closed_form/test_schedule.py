"""Noise schedules against differences, quadrature and their published formulae."""

from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest
from numpy.polynomial.legendre import leggauss

from sdebench.closed_form.schedule import (
    SCHEDULES,
    Cosine,
    LinearFlow,
    Schedule,
    VarianceExploding,
    VariancePreserving,
    make_schedule,
)
from sdebench.errors import ParameterError, UnknownNameError

EXAMPLES = [
    VariancePreserving(1.0, 4.0),
    VariancePreserving(2.5, 0.7),
    LinearFlow(1.0),
    LinearFlow(3.0),
    Cosine(1.0),
    Cosine(0.4),
    VarianceExploding(1.0, 10.0),
    VarianceExploding(2.0, 1.5),
]
every = pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)


def interior(schedule, count=7):
    return schedule.horizon * np.linspace(0.1, 0.95, count)


def slope(function, t, step):
    weights = np.array([5 / 6, -5 / 21, 5 / 84, -5 / 504, 1 / 1260])
    return (
        sum(
            c * (function(t + k * step) - function(t - k * step))
            for k, c in enumerate(weights, 1)
        )
        / step
    )


@every
def test_slopes_against_differences(schedule):
    t, step = interior(schedule), 0.005 * schedule.horizon
    for function, derivative in (
        (schedule.alpha, schedule.alpha_slope),
        (schedule.variance, schedule.variance_slope),
    ):
        scale = 1.0 + np.max(np.abs(derivative(t)))
        error = np.abs(slope(function, t, step) - derivative(t)) / scale
        assert error.max() < 1e-11


@every
def test_ends(schedule):
    """alpha rises to 1 and the noise variance falls to 0, exactly."""
    assert schedule.alpha(schedule.horizon) == 1.0
    assert schedule.variance(schedule.horizon) == pytest.approx(0.0, abs=1e-30)
    t = schedule.horizon * np.linspace(0.0, 1.0, 101)
    assert np.all(np.diff(schedule.alpha(t)) >= 0)
    assert np.all(np.diff(schedule.variance(t)) < 0)
    assert np.all(schedule.eta(t[1:]) >= 0)
    assert np.isfinite(np.sqrt(2.0 * schedule.eta(schedule.horizon)))


@every
def test_eta_is_half_the_growth_of_the_signal_to_noise_ratio(schedule):
    """eta = beta^2 d/dt log(alpha / beta), kappa = d/dt log alpha."""
    t, step = interior(schedule), 0.002 * schedule.horizon

    def log_ratio(s):
        return np.log(schedule.alpha(s)) - 0.5 * np.log(schedule.variance(s))

    eta = schedule.variance(t) * slope(log_ratio, t, step)
    np.testing.assert_allclose(schedule.eta(t), eta, rtol=1e-8)
    kappa = slope(lambda s: np.log(schedule.alpha(s)), t, step)
    np.testing.assert_allclose(schedule.kappa(t), kappa, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rate", [1.0, 6.0])
def test_memoryless_noise_levels(rate):
    """sigma^2 = 2 eta: the rate (VP), 2 (1 - t)/t (linear flow), scale^2 / T (VE)."""
    t = np.linspace(0.1, 1.0, 10)
    vp = 2.0 * VariancePreserving(1.0, rate).eta(t)
    np.testing.assert_allclose(vp, rate, rtol=1e-14)
    flow = 2.0 * LinearFlow(1.0).eta(t)
    np.testing.assert_allclose(flow, 2.0 * (1.0 - t) / t, rtol=1e-13, atol=1e-15)
    ve = 2.0 * VarianceExploding(2.0, rate).eta(t)
    np.testing.assert_allclose(ve, rate**2 / 2.0, rtol=1e-14)
    cosine = 2.0 * Cosine(1.0).eta(t)
    closed = np.pi / np.tan(0.5 * np.pi * t)
    np.testing.assert_allclose(cosine, closed, rtol=1e-12, atol=1e-14)


def test_vp_and_cosine_preserve_the_variance():
    t = np.linspace(0.0, 1.0, 11)
    for schedule in (VariancePreserving(1.0, 3.0), Cosine(1.0)):
        total = schedule.alpha(t) ** 2 + schedule.variance(t)
        np.testing.assert_allclose(total, 1.0, rtol=1e-15)


@every
@pytest.mark.parametrize("data_variance", [0.05, 1.0, 7.0])
def test_integral_of_the_inverse_variance(schedule, data_variance):
    nodes, weights = leggauss(100)
    for share in ((0.0, 1.0), (0.2, 0.7), (0.99, 1.0)):
        a, b = (s * schedule.horizon for s in share)
        panels = np.linspace(a, b, 9)
        total = 0.0
        for left, right in itertools.pairwise(panels):
            t = left + 0.5 * (right - left) * (nodes + 1.0)
            q = schedule.alpha(t) ** 2 * data_variance + schedule.variance(t)
            total += 0.5 * (right - left) * np.sum(weights / q)
        got = schedule.inverse_variance_integral(a, b, data_variance)
        assert got == pytest.approx(total, rel=1e-11)


def test_integral_in_fifty_digits():
    with mpmath.workdps(50):
        value = mpmath.quad(
            lambda t: 1 / (t**2 * mpmath.mpf("0.3") + (1 - t) ** 2), [0, 0.5, 1]
        )
    got = LinearFlow(1.0).inverse_variance_integral(0.0, 1.0, 0.3)
    assert got == pytest.approx(float(value), rel=1e-15)
    # int_0^1 dt / q = pi / (2 sqrt C) on the linear flow
    assert got == pytest.approx(np.pi / (2.0 * np.sqrt(0.3)), rel=1e-15)


def test_vp_noise_keeps_its_digits_near_the_data():
    schedule = VariancePreserving(1.0, 6.0)
    gap = 2.0**-40  # exactly representable: T - t is exact
    with mpmath.workdps(50):
        exact = -mpmath.expm1(-6 * mpmath.mpf(gap))
    assert schedule.variance(1.0 - gap) == pytest.approx(float(exact), rel=1e-15)


def test_by_name():
    assert make_schedule("vp", 2.0, 3.0) == VariancePreserving(2.0, 3.0)
    assert make_schedule("ve", 1.0, 3.0) == VarianceExploding(1.0, 3.0)
    assert make_schedule("linear_flow", 2.0, 3.0) == LinearFlow(2.0)
    assert make_schedule("cosine", 2.0, 3.0) == Cosine(2.0)
    assert set(SCHEDULES) == {"vp", "linear_flow", "cosine", "ve"}
    for name, cls in SCHEDULES.items():
        assert isinstance(make_schedule(name, 1.0, 1.0), cls)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make_schedule("linear", 1.0, 1.0), UnknownNameError, "linear_flow"),
        (lambda: make_schedule("vp", 0.0, 1.0), ParameterError, "horizon"),
        (lambda: make_schedule("vp", float("nan"), 1.0), ParameterError, "horizon"),
        (lambda: make_schedule("vp", 1.0, -1.0), ParameterError, "rate"),
        (lambda: make_schedule("ve", 1.0, 0.0), ParameterError, "scale"),
        (lambda: make_schedule("cosine", -1.0, 1.0), ParameterError, "horizon"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_base_class_is_abstract():
    schedule = Schedule(1.0)
    for method in ("alpha", "variance", "alpha_slope", "variance_slope"):
        with pytest.raises(NotImplementedError):
            getattr(schedule, method)(0.5)
    with pytest.raises(NotImplementedError):
        schedule.inverse_variance_integral(0.0, 1.0, 1.0)
