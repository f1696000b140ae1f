"""Adjoint sampling: its bridges, its limits, and what it refuses.

Backends, float32, needs and counts are tested for every estimator in
``tests/test_estimators.py``; seeds are fixed, the false-alarm rate of a comparison is
`_checks.ALARM`.
"""

from __future__ import annotations

import numpy as np
import pytest
from _checks import ALARM
from scipy.stats import norm

from sdebench import registry
from sdebench.errors import NotApplicableError, UnknownNameError
from sdebench.measure import measure, measure_group
from sdebench.simulate.noise import split_seed
from sdebench.view import View

pytestmark = pytest.mark.usefixtures("one_torch_thread")

MIXTURE = registry.problem("follmer_mixture")


def sample(spec, point, n_steps, seed, n_replicates=24, n_paths=8192):
    """Mean and covariance of the mean over replicates."""
    row = measure(
        MIXTURE,
        spec,
        point=point,
        n_steps=n_steps,
        n_paths=n_paths,
        n_replicates=n_replicates,
        seed=seed,
    ).row
    return np.array(row["mean"]), np.array(row["std_error"])


def extrapolated(spec, point, seed):
    """Richardson's value of 60 and 120 steps, its error, and a bound of the rest.

    The rest is of order h^2: at most a third of the change from 30 and 60 steps.
    """
    runs = {n: sample(spec, point, n, seed=seed + n) for n in (30, 60, 120)}
    values = [2.0 * runs[2 * n][0] - runs[n][0] for n in (30, 60)]
    error = np.sqrt(4.0 * runs[120][1] ** 2 + runs[60][1] ** 2)
    return values[1], error, np.abs(values[1] - values[0]) / 3.0


@pytest.mark.parametrize("point", ["halfway", "optimum"])
def test_ends_of_the_tilted_law_give_the_cross_entropy(point):
    exact = MIXTURE.truth.cross_entropy_gradient(point)
    value, error, rest = extrapolated("adjoint_sampling:data=optimal", point, 1)
    room = norm.isf(ALARM / 2 / len(exact)) * error + rest
    assert np.all(np.abs(value - exact) < room)
    if point == "halfway":  # a gradient of twice the size would be seen
        assert np.any(np.abs(exact) > room + 3.0 * error)


@pytest.mark.parametrize("point", ["halfway", "optimum"])
def test_the_model_is_a_mixture_of_bridges(point):
    """Its mean is that of adjoint matching on the model's own paths."""
    value, error, rest = extrapolated("adjoint_sampling", point, 2)
    own, own_error, own_rest = extrapolated("adjoint_matching", point, 3)
    spread = np.hypot(error, own_error)
    room = norm.isf(ALARM / 2 / len(value)) * spread + rest + own_rest
    assert np.all(np.abs(value - own) < room)
    if point == "halfway":
        assert np.any(np.abs(own) > room + 3.0 * spread)


def test_bridges_have_the_law_of_the_paths():
    """Moments of x_n given X_N, from the joint normal law of the base chain."""
    times, theta = MIXTURE.time_grid(8), MIXTURE.theta("zero")
    tables = MIXTURE.tables(None, times)
    variance = np.concatenate([[0.0], np.cumsum(tables.noise**2)])
    seen = []

    class Spy(View):
        """A view that keeps the states at which the control is asked for."""

        def control(self, step, x):
            seen.append(x.clone())
            return super().control(step, x)

    address = {"key": split_seed(4), "replicate": 0, "first_path": 0}
    n_paths = 40_000
    other = Spy(MIXTURE.tables(theta, times), times, theta, n_paths=n_paths, **address)
    base = View(tables, times, None, n_paths=n_paths, other=other, **address)
    registry.estimator("adjoint_sampling").statistics(base)
    end = base.rollout().states[-1]
    limit = norm.isf(ALARM / 2 / (8 * 2))
    for n, x in enumerate(seen):
        # cov(X_n, X_N) = nu_n and var(X_n) = nu_n under the base, in each coordinate
        for product, wanted in ((x * end, variance[n]), (x * x, variance[n])):
            values = product.mean(1)
            error = float(values.std() / np.sqrt(n_paths))
            assert abs(float(values.mean()) - wanted) <= limit * error + 1e-12


def test_less_noise_than_the_paths_of_the_model():
    """Both gradients of adjoint matching on the same ends: a number, not a law."""
    rows = measure_group(
        MIXTURE,
        [registry.estimator(n) for n in ("adjoint_sampling", "adjoint_matching")],
        point="halfway",
        n_paths=256,
        n_replicates=64,
    )
    ratio = rows[0].row["variance"] / rows[1].row["variance"]
    assert 0.2 < ratio < 5.0


def test_another_base_is_refused():
    for name in ("gaussian_tilt", "brownian_linear", "four_modes"):
        with pytest.raises(NotApplicableError, match="Brownian motion from a point"):
            measure(name, "adjoint_sampling", n_paths=8, n_replicates=2, n_steps=3)
    with pytest.raises(UnknownNameError, match="optimal"):
        registry.estimator("adjoint_sampling", data="model")
