"""Forty modes: the modes, their exact weights, and the scale of the noise."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from scipy.spatial.distance import pdist

import sdebench
from sdebench.closed_form import log_quadratics as lq
from sdebench.closed_form.seeded import seeded_uniforms
from sdebench.errors import ParameterError
from sdebench.problems.forty_modes import N_MODES, SEED, FortyModes


@pytest.fixture(scope="module")
def plane():
    return sdebench.problem("forty_modes")


def test_the_modes_are_drawn_once_and_for_all(plane):
    """Digits that every version must keep: they are what results are of."""
    rounded = np.round(plane.means, 6).astype("<f8").tobytes()
    assert hashlib.sha256(rounded).hexdigest()[:16] == "22c43c45260ce1c4"
    assert plane.means.shape == (N_MODES, 2)
    assert np.abs(plane.means).max() < 40.0


def test_the_seed_is_the_first_that_separates_the_modes(plane):
    """At least four standard deviations between any two."""
    closest = [
        pdist(80.0 * seeded_uniforms(seed, (N_MODES, 2))).min()
        for seed in range(SEED + 1)
    ]
    assert closest[-1] == pytest.approx(pdist(plane.means).min(), rel=1e-12)
    assert closest[-1] >= 4.0 > max(closest[:-1])
    many = sdebench.problem("forty_modes", dim=50, half_width=2.0)
    assert pdist(many.means).min() > 8.0


def test_mode_weights_of_the_family(plane):
    """w_k(theta) ~ E_{N_k} exp((theta - theta*)^T phi), by quadrature in each."""
    theta = plane.theta("halfway")
    away = (theta - plane.theta_star) @ plane.family.features
    z, w = np.polynomial.hermite_e.hermegauss(12)
    z = np.stack(np.meshgrid(z, z, indexing="ij"), axis=-1).reshape(-1, 2)
    w = np.outer(w, w).ravel() / w.sum() ** 2
    x = plane.means[:, None] + z
    expected = np.exp(lq.terms(away[None], x)[..., 0]) @ w
    weights = plane.family.ideal_law(theta)[0]
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-12)
    optimum = plane.family.ideal_law(plane.theta_star)[0]
    np.testing.assert_allclose(optimum, 1.0 / N_MODES, rtol=1e-10)


@pytest.mark.parametrize("dim", [2, 50])
def test_the_start_misses_modes(dim):
    problem = sdebench.problem("forty_modes", **FortyModes.variants[dim == 50])
    assert problem.dim == dim
    weights = problem.family.ideal_law(problem.theta("zero"))[0]
    assert np.sum(weights < 0.1 / N_MODES) >= 15
    assert 0.5 * np.abs(weights - 1.0 / N_MODES).sum() > 0.6


def test_the_objective_is_the_divergence_of_the_laws(plane):
    """J(theta) + log Z = KL(p_theta | nu), by a sum over a fine grid."""
    axis = np.arange(-46.0, 46.0, 0.25)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    target = plane.truth.ideal_law()
    law = plane.truth.policy_marginal(1.0, "zero")
    log_p, log_nu = law.log_density(x), target.log_density(x)
    total = np.sum(np.exp(log_p) * (log_p - log_nu)) * 0.25**2
    assert plane.truth.objective("zero") == pytest.approx(total, rel=1e-9)
    heavy = sdebench.problem("forty_modes", log_mass=1.3)
    assert heavy.truth.log_normalizer() == pytest.approx(1.3, rel=1e-12)
    assert heavy.truth.objective("zero") == pytest.approx(total - 1.3, rel=1e-9)


def test_no_step_is_noisier_than_what_is_left_allows(plane):
    """At the default steps one step loses a seventh of the remaining noise at most."""
    base = plane.family.base
    times = plane.time_grid()
    assert base.sigma(1.0) == pytest.approx(np.sqrt(plane.variance))
    for s, t in pairwise(times):
        step = (t - s) * base.sigma(s) ** 2
        assert step < 0.15 * (base.forward(s, 1.0)[2] + plane.variance)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"dim": 1}, "dim 1"),
        ({"half_width": 0.0}, "half_width"),
        ({"variance": -1.0}, "variance"),
        ({"horizon": 0.0}, "horizon"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line(parameters, message):
    with pytest.raises(ParameterError, match=message) as caught:
        sdebench.problem("forty_modes", **parameters)
    assert "\n" not in str(caught.value)
