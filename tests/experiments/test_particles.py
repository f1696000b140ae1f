"""Particles along a path: resampling, and means that are known exactly."""

from __future__ import annotations

import numpy as np
import pytest

from sdebench.closed_form.density_powers import (
    DensityPath,
    quadrature_moments,
    weighted_ends,
)
from sdebench.closed_form.gaussian_mixture import GaussianMixture
from sdebench.errors import ParameterError, UnknownNameError
from sdebench.experiments.particles import Corrector, ancestors
from sdebench.measure.intervals import t_quantile

FALSE_ALARM = 1e-4
A = GaussianMixture.isotropic([[-1.5], [1.0]], [0.2, 0.4], [0.3, 0.7])
C = GaussianMixture.isotropic([[-1.2], [1.4]], [0.3, 0.3], [0.6, 0.4])
NODES = np.linspace(-8.0, 8.0, 401)
PATH = DensityPath([A, C], [2.0, -1.0], rate=2.0)


@pytest.mark.parametrize("scheme", ["systematic", "stratified"])
def test_expected_copies_are_shares(scheme):
    """By midpoints of the uniforms; the mean over strata is that of one u for all."""
    logs, points = 2.0 * np.random.default_rng(1).standard_normal(7), 4000
    shares = np.exp(logs) / np.exp(logs).sum()
    copies = np.zeros(7)
    for u in (np.arange(points) + 0.5) / points:
        drawn = np.full(1 if scheme == "systematic" else 7, u)
        copies += np.bincount(ancestors(logs, drawn), minlength=7)
    np.testing.assert_allclose(copies / points, 7.0 * shares, atol=14.0 / points)


CASES = [
    {"threshold": None},
    {"threshold": 1.0},
    {"threshold": 0.9, "resampling": "stratified"},
    {"threshold": 1.0, "weights": "riemann"},
]


@pytest.mark.parametrize("options", CASES)
def test_mean_weight_with_sixteen_particles(options):
    """E Z-hat is that of the weights without resampling, known exactly.

    No z-score beyond a level of 1e-4 for all four together.
    """
    n_steps, n_replicates = 5, 500
    corrector = Corrector(PATH, **options)
    right = quadrature_moments(PATH, 1.0, NODES).log_mass
    riemann = weighted_ends(PATH, n_steps, "riemann", 1.0, NODES).log_mass
    wrong = riemann
    if "weights" in options:
        right, wrong = riemann, right
    rng = np.random.default_rng(3)
    x = PATH.start_scale("matched") * rng.standard_normal((n_replicates, 16, 1))
    noise = rng.standard_normal((n_replicates, n_steps, 16, 1))
    uniforms = rng.random((n_replicates, n_steps, 16))
    found, count = np.empty(n_replicates), 0
    for i in range(n_replicates):
        cloud = corrector.run(x[i], noise[i], uniforms[i])
        found[i], count = cloud.log_normalizer - right, count + cloud.n_resampled
    values = np.exp(found)
    error = values.std(ddof=1) / np.sqrt(n_replicates)
    reach = t_quantile(1.0 - FALSE_ALARM, n_replicates - 1, len(CASES)) * error
    assert abs(values.mean() - 1.0) < reach
    assert (count > n_replicates) == (options["threshold"] is not None)
    # Power: the other discretization's mean would be noticed.
    assert abs(np.expm1(wrong - right)) > 2.0 * reach


def test_bad_input():
    with pytest.raises(ParameterError, match=r"threshold 1\.5 must be a share .*0, 1"):
        Corrector(PATH, threshold=1.5)
    with pytest.raises(ParameterError, match="threshold 0 must be"):
        Corrector(PATH, threshold=0)
    with pytest.raises(UnknownNameError, match="resampling 'residual'"):
        Corrector(PATH, resampling="residual")
    with pytest.raises(UnknownNameError, match="weights 'left'"):
        Corrector(PATH, weights="left")
