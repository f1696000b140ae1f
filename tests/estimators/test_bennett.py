"""Bennett's acceptance ratio: exact backward works, both backends, many replicates."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from _log_weights import log_mean, quadratic, quadratic_form, view_at
from _replicates import make_rows, make_settings

from sdebench import registry
from sdebench.measure import measure
from sdebench.measure.cell import make_request, refusal
from sdebench.simulate.noise import split_seed
from sdebench.studies.work_identities import acceptance_ratio
from sdebench.view import View

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SIGMAS = 4.5
"""Standard errors; a dozen comparisons fail by chance with 1e-4."""


def bennett(**options):
    return registry.estimator("bennett", **options)


def works(problem, estimator, n_steps, n_paths=20_000):
    times = problem.time_grid(n_steps)
    view = View(
        problem.tables(None, times),
        times,
        None,
        key=split_seed(8),
        replicate=0,
        first_path=0,
        n_paths=n_paths,
    )
    return (part.numpy() for part in estimator.works(view))


@pytest.mark.parametrize("backward", ["noising", "matched"])
@pytest.mark.parametrize("n_steps", [1, 2, 5])
def test_backward_works_have_the_inverse_mean(n_steps, backward):
    """E_B 1/W = 1/Z by a determinant, and E_B 1 = E_F W / Z; no sampling."""
    problem = registry.problem("gaussian_tilt", dim=2, mean=0.7, rate=4.0)
    start, end = problem.time_span
    times = start + (end - start) * np.linspace(0.0, 1.0, n_steps + 1) ** 1.3
    estimator = bennett(backward=backward)
    size = 2 * (n_steps + 1)

    def backward_works(points):
        view = view_at(problem, times, np.zeros((len(points), size)))
        own = points.T.reshape(n_steps + 1, 2, len(points)).swapaxes(1, 2)
        view.own = np.concatenate([own, np.zeros_like(own[:1])])
        return estimator.works(view)[1].numpy()

    exact = problem.truth.log_normalizer()
    A, b, c = quadratic_form(backward_works, size)
    assert log_mean(-A, -b, -c) == pytest.approx(-exact, abs=1e-10)

    # The second moment of W forward is its mean backward, times Z.
    crooks = registry.estimator("crooks", backward=backward)
    forward = quadratic(problem, crooks, times)
    second = log_mean(*forward, order=2) - exact
    assert log_mean(A, b, c) == pytest.approx(second, abs=1e-9)


@pytest.mark.parametrize("spec", ["two_modes:start=marginal", "four_modes"])
def test_both_directions_on_mixtures(spec):
    """E_F W = Z and E_B 1/W = 1/Z, and the acceptance ratio lies in its interval."""
    problem = registry.problem(spec)
    exact = problem.truth.log_normalizer()
    forward, backward = works(problem, bennett(), 24)
    for ratio in (np.exp(forward - exact), np.exp(exact - backward)):
        error = ratio.std() / np.sqrt(len(ratio))
        assert error < 0.05
        assert abs(ratio.mean() - 1.0) < SIGMAS * error
    found = acceptance_ratio(forward, backward, 0.9999)
    assert found.low < exact < found.high
    assert found.high - found.low < 0.15


def test_samples_are_those_of_the_tilted_law():
    problem = registry.problem("nine_modes")
    times = problem.time_grid(3)
    view = view_at(problem, times, np.zeros((40_000, 8)))
    generator = torch.Generator().manual_seed(4)
    normals = torch.randn(40_000, 2, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(40_000, generator=generator, dtype=torch.float64)
    x = view.tilted_sample(normals, uniforms).numpy()
    law = problem.truth.ideal_law()
    mean = law.weights @ law.means
    error = x.std(axis=0) / np.sqrt(len(x))
    assert np.all(np.abs(x.mean(axis=0) - mean) < SIGMAS * error)
    # E grad log of a density is zero under it, and under no other mean
    score = law.score(x)
    error = score.std(axis=0) / np.sqrt(len(x))
    assert np.all(np.abs(score.mean(axis=0)) < SIGMAS * error)
    assert view.used == {"tilted_samples"}


@pytest.mark.parametrize("spec", ["gaussian_tilt:dim=2", "four_modes"])
def test_backends_agree(spec):
    problem = registry.problem(spec)
    settings = make_settings(problem, n_steps=7, n_paths=200)
    for options in ({}, {"backward": "matched", "annealing": "linear"}):
        mine = make_rows(problem, bennett(**options), settings, 3)
        other = dataclasses.replace(settings, backend="torch")
        theirs = make_rows(problem, bennett(**options), other, 3)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-9)
        assert np.all(np.ptp(mine, axis=2) == 0.0)


def test_ratio_is_the_root_of_the_balance():
    problem = registry.problem("four_modes")
    estimator = bennett()
    times = problem.time_grid(6)
    options = {"key": split_seed(8), "replicate": 0, "first_path": 0, "n_paths": 300}
    tables = problem.tables(None, times)
    value = estimator.statistics(View(tables, times, None, **options))[:, 0]
    forward, backward = works(problem, estimator, 6, 300)
    c = acceptance_ratio(forward, backward, 0.9).estimate
    np.testing.assert_allclose(value.numpy(), c, atol=1e-9)


def test_measured_against_log_z():
    """The bias falls with the number of paths; the spread is below that of Crooks."""
    settings = {"n_steps": 12, "n_paths": 4096, "n_replicates": 64, "seed": 9}
    for spec in ("gaussian_tilt", "four_modes"):
        row = measure(spec, bennett(), **settings).row
        error = row["std_error"][0]
        assert abs(row["mean"][0] - row["truth"][0]) < SIGMAS * error
        assert row["verdict"] == "unbiased"
        crooks = measure(spec, "crooks", **settings).row
        assert error < 0.8 * crooks["std_error"][0]


def test_refusals():
    assert "at least 2" in refusal(make_request("four_modes", n_paths=1), bennett())
    assert "another law" in refusal(make_request("two_modes"), bennett())
    assert "denoised" in refusal(make_request("ou_linear"), bennett())
