"""Mode weights of samples: exact on drawn mixtures, and intervals that cover.

Seeds are fixed; every statistical bound states its false-alarm rate.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdebench.closed_form.gaussian_mixture import GaussianMixture
from sdebench.experiments.mode_weights import (
    effective_share,
    mode_weights,
    total_variation,
    total_variation_interval,
)

TARGET = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[-2.0], [0.0], [1.0]])
MIXTURE = GaussianMixture.from_weights(TARGET, MEANS, np.full((3, 1), 0.5))


def draws(weights, n, seed):
    rng = np.random.default_rng(seed)
    component = rng.choice(3, size=n, p=weights)
    return MEANS[component] + np.sqrt(0.5) * rng.standard_normal((n, 1))


def test_total_variation():
    assert total_variation(TARGET, TARGET) == 0.0
    assert total_variation(np.array([0.0, 0.0, 1.0]), TARGET) == pytest.approx(0.8)


def test_overlapping_modes_keep_their_weights():
    """Responsibilities, unlike nearest means, leave no bias; 5 standard errors."""
    n = 100_000
    found, influence = mode_weights(MIXTURE.responsibilities(draws(TARGET, n, 0)))
    errors = influence.std(axis=0) / np.sqrt(n)
    assert np.all(np.abs(found - TARGET) < 5.0 * errors)
    assert found.sum() == pytest.approx(1.0, rel=1e-12)
    nearest = np.argmin(np.abs(draws(TARGET, n, 0) - MEANS.T), axis=1)
    shares = np.bincount(nearest, minlength=3) / n
    assert np.max(np.abs(shares - TARGET) / errors) > 20.0


def test_importance_weights_restore_the_target():
    """From equal weights of the modes, by the ratio of the densities; 5 errors."""
    n, equal = 100_000, np.full(3, 1.0 / 3.0)
    x = draws(equal, n, 1)
    proposal = GaussianMixture.from_weights(equal, MEANS, np.full((3, 1), 0.5))
    log_weights = MIXTURE.log_density(x) - proposal.log_density(x)
    rows = MIXTURE.responsibilities(x)
    found, influence = mode_weights(rows, 7.0 + log_weights)
    errors = influence.std(axis=0) / np.sqrt(n)
    assert np.all(np.abs(found - TARGET) < 5.0 * errors)
    assert np.max(np.abs(mode_weights(rows)[0] - TARGET) / errors) > 20.0
    share = effective_share(log_weights)
    exact = 1.0 / np.mean(np.exp(2.0 * log_weights))
    assert share == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("weights", [TARGET, np.array([0.9, 0.05, 0.05])])
def test_the_interval_covers_at_its_level(weights):
    """300 intervals at 90 %: fewer than 80 % covering has p < 1e-7."""
    rng = np.random.default_rng(4)
    exact = mode_weights(MIXTURE.responsibilities(draws(weights, 400_000, 5)))[0]
    truth, hits, widths = total_variation(exact, TARGET), 0, []
    for seed in rng.integers(2**31, size=300):
        rows = MIXTURE.responsibilities(draws(weights, 400, int(seed)))
        found = total_variation_interval(*mode_weights(rows), TARGET, 0.9)
        hits += found.low <= truth <= found.high
        widths.append(found.high - found.low)
    assert hits >= 240
    assert np.mean(widths) < 0.2


def test_one_mode_for_all_draws_has_no_error():
    rows = np.tile([0.0, 0.0, 1.0], (10, 1))
    found = total_variation_interval(*mode_weights(rows), TARGET, 0.9)
    assert found == pytest.approx((0.8, 0.8, 0.8))
