"""The standardized group gradient by other routes than its quadrature."""

from __future__ import annotations

import numpy as np
import pytest

from sdebench.closed_form.group_advantage import standardized_gradient
from sdebench.errors import ParameterError


def simulated(group_size, mean, scale, correction, n_groups):
    z = np.random.default_rng(3).normal(size=(group_size, n_groups))
    rewards = (mean + scale * z) ** 2
    centred = rewards - rewards.mean(axis=0)
    deviation = rewards.std(axis=0, ddof=correction)
    values = np.mean(centred * z / scale, axis=0) / deviation
    return values.mean(), values.std() / np.sqrt(n_groups)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize(("group_size", "mean"), [(3, 0.7), (4, 0.7), (12, -1.5)])
def test_simulated_groups(group_size, mean, correction):
    """Six means within 4 standard errors: a false alarm in 3000 runs; seeds fixed."""
    value, error = simulated(group_size, mean, 0.5, correction, 1 << 18)
    found = standardized_gradient(group_size, mean, 0.5, correction)
    assert abs(found - value) < 4.0 * error
    assert error < 2e-3


def test_finer_steps_change_nothing():
    coarse, fine = (
        standardized_gradient(6, 0.7, 0.5, step=step) for step in (1.0, 0.6)
    )
    assert coarse == pytest.approx(fine, abs=1e-5)


def test_large_groups_reach_the_limit():
    """2 m / std R, with a distance a/G + b/G^2: extrapolated from two, zero."""
    limit = 1.4 / np.sqrt(4 * 0.49 * 0.25 + 2 * 0.0625)
    few, some, many = (
        g * (limit - standardized_gradient(g, 0.7, 0.5)) for g in (100, 200, 400)
    )
    assert (some - many) / (few - some) == pytest.approx(0.5, abs=0.1)
    assert 0.5 < many < 1.0


def test_the_correction_is_a_factor():
    """std with divisor G - 1 is larger by (G / (G - 1))^(1/2), in every group."""
    with_one, without = (standardized_gradient(5, 0.7, 0.5, c) for c in (1, 0))
    assert with_one / without == pytest.approx(np.sqrt(4.0 / 5.0), rel=1e-5)


@pytest.mark.parametrize("given", [(2, 0.7, 0.5), (4, 0.7, 0.0)])
def test_values_out_of_range_are_refused(given):
    with pytest.raises(ParameterError, match="group of at least 3"):
        standardized_gradient(*given)
