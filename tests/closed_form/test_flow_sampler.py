"""Flow-GRPO's sampler: its variance in rational arithmetic, and its asymptotics.

The simulation of the sampler is in ``tests/claims/test_claims.py``.
"""

from __future__ import annotations

from fractions import Fraction

import mpmath
import numpy as np
import pytest

from sdebench.closed_form.flow_sampler import (
    order,
    order_of_next_term,
    terminal_variance_error,
)
from sdebench.errors import ParameterError


def rational_variance(noise_level: Fraction, n_steps: int, data: Fraction) -> Fraction:
    """Follow the published code, t from 1 to 0, x -> mean and noise, in fractions."""
    variance = Fraction(1)
    for k in range(n_steps):
        t, after = Fraction(n_steps - k, n_steps), Fraction(n_steps - k - 1, n_steps)
        dt = after - t
        sigma_squared = noise_level**2 * t / (1 - (after if k == 0 else t))
        velocity = (t - (1 - t) * data) / ((1 - t) ** 2 * data + t**2)
        factor = 1 + sigma_squared / (2 * t) * dt
        factor += velocity * (1 + sigma_squared * (1 - t) / (2 * t)) * dt
        variance = factor**2 * variance - sigma_squared * dt
    return variance


@pytest.mark.parametrize("noise_level", ["0", "7/10", "1", "3/2"])
@pytest.mark.parametrize("n_steps", [1, 2, 3, 10, 25])
@pytest.mark.parametrize("data", ["1/2", "2"])
def test_rational_arithmetic(noise_level, n_steps, data):
    eta, C = Fraction(noise_level), Fraction(data)
    exact = float(rational_variance(eta, n_steps, C) - C)
    found = terminal_variance_error(float(eta), n_steps, float(C))
    assert found == pytest.approx(exact, rel=1e-11, abs=1e-15)


def leading_constant(noise_level: float, data: float) -> float:
    """A of the module's docstring; the sum is a hypergeometric one."""
    b = mpmath.mpf(noise_level) ** 2 / 2
    series = mpmath.hyp3f2(1, 1, 1, 2 - b, 2 - b, 1) / mpmath.gamma(2 - b) ** 2
    total = mpmath.rgamma(1 - b) ** 2 + series
    return float(mpmath.mpf(data) ** (1 + b) * b**2 * total)


@pytest.mark.parametrize("data", [0.5, 3.0])
@pytest.mark.parametrize("noise_level", [0.3, 0.5, 0.7, 0.8])
def test_the_leading_term_is_known(noise_level, data):
    """error K^(eta^2) / A - 1 falls like K^(eta^2 - 1): extrapolated, it is zero."""
    A = leading_constant(noise_level, data)
    coarse, fine = (
        terminal_variance_error(noise_level, k, data) * k ** (noise_level**2) / A - 1.0
        for k in (1 << 14, 1 << 18)
    )
    factor = 16.0 ** (1.0 - noise_level**2)
    assert (factor * fine - coarse) / (factor - 1.0) == pytest.approx(0.0, abs=3e-4)


@pytest.mark.parametrize("data", [0.5, 3.0])
def test_the_logarithm_at_noise_level_one(data):
    """K error gains C^(3/2) / 4 log 2 per doubling."""
    scaled = [k * terminal_variance_error(1.0, k, data) for k in (1 << 16, 1 << 17)]
    gain = data**1.5 / 4.0 * np.log(2.0)
    assert scaled[1] - scaled[0] == pytest.approx(gain, rel=2e-3)


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 1.5])
def test_orders_at_many_steps(noise_level):
    errors = [terminal_variance_error(noise_level, 1 << j, 0.5) for j in (16, 17)]
    found = np.log2(abs(errors[0] / errors[1]))
    assert found == pytest.approx(order(noise_level), abs=0.01)


def test_orders_of_the_expansion():
    assert [order(eta) for eta in (0.0, 0.5, 1.0, 1.5)] == [1.0, 0.25, 1.0, 1.0]
    following = [order_of_next_term(eta) for eta in (0.0, 0.5, 1.0, 1.2, 1.5)]
    assert following == [2.0, 1.0, 1.0, 1.2**2, 2.0]


@pytest.mark.parametrize("given", [(-0.1, 10, 0.5), (0.7, 0, 0.5), (0.7, 10, 0.0)])
def test_values_out_of_range_are_refused(given):
    with pytest.raises(ParameterError, match="need noise_level >= 0"):
        terminal_variance_error(*given)
