"""Densities and scores of base processes: tables, view and kernels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from sdebench import registry
from sdebench.measure.cell import make_request, refusal
from sdebench.simulate import primitives
from sdebench.simulate.noise import split_seed
from sdebench.simulate.primitives import prepare, workspace
from sdebench.simulate.tables import has_density, starts_from_density
from sdebench.simulate.tile import PADDING, path_kernel
from sdebench.view import View

pytestmark = pytest.mark.usefixtures("one_torch_thread")

MARGINAL = (
    "gaussian_tilt:dim=3",
    "gaussian_tilt:schedule=linear_flow,start_time=0.05",
    "gaussian_tilt:schedule=linear_flow,noise=constant",
    "two_modes:start=marginal",
    "four_modes",
    "nine_modes",
)
"""Problems whose X_0 has the density of the base process."""
N_STEPS, N_PATHS = 5, 7


def grid(problem):
    """A grid that is not uniform: mixing up times would show."""
    start, end = problem.time_span
    return problem.time_grid(
        start + (end - start) * np.linspace(0, 1, N_STEPS + 1) ** 1.4
    )


def view_of(problem, n_paths=N_PATHS):
    theta, times = problem.theta("halfway"), grid(problem)
    return View(
        problem.tables(theta, times),
        times,
        theta,
        key=split_seed(3),
        replicate=0,
        first_path=0,
        n_paths=n_paths,
    )


def states(problem, count=N_PATHS):
    return 1.5 * np.random.default_rng(4).standard_normal((count, problem.dim))


@pytest.mark.parametrize("spec", [*MARGINAL, "two_modes"])
def test_density_and_score_are_those_of_the_marginal_law(spec):
    """At all N + 1 times, against `GaussianMixture`, which shares no code."""
    problem = registry.problem(spec)
    # p_t does not depend on the start; the law of X_t from another start is not p_t
    own = registry.problem("two_modes", start="marginal")
    law_of = own if spec == "two_modes" else problem
    view, x = view_of(problem), states(problem)
    for n, t in enumerate(view.times):
        law = law_of.truth.base_marginal(t)
        density = view.base_log_density(n, torch.tensor(x)).numpy()
        np.testing.assert_allclose(density, law.log_density(x), rtol=1e-11, atol=1e-11)
        score = view.base_score(n, torch.tensor(x)).numpy()
        np.testing.assert_allclose(score, law.score(x), rtol=1e-10, atol=1e-11)
    assert view.counts["density_evaluations"] == N_PATHS * (N_STEPS + 1)
    assert view.counts["drift_evaluations"] == N_PATHS * (N_STEPS + 1)
    assert view.used == {"base_density"}


@pytest.mark.parametrize("spec", ["gaussian_tilt:dim=2", "four_modes"])
def test_score_holds_half_of_the_drift_with_noise(spec):
    """Base mean = x + h (kappa x + 2 eta score), and kappa is in the denoiser."""
    problem = registry.problem(spec)
    view, x = view_of(problem), torch.tensor(states(problem))
    for n, (s, t) in enumerate(pairwise(view.times)):
        kappa = float(problem.family.base.schedule.kappa(s))
        square = (t - s) * problem.family.base.sigma(s) ** 2
        mean = x + (t - s) * kappa * x + square * view.base_score(n, x)
        torch.testing.assert_close(view.base_mean(n, x), mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", MARGINAL)
def test_start_is_told_from_its_density(spec):
    problem = registry.problem(spec)
    tables = problem.tables(None, grid(problem))
    assert starts_from_density(tables)
    moved = tables._replace(start_mean=tables.start_mean + 1e-3)
    assert not starts_from_density(moved)
    wider = tables._replace(start_scale=1.001 * tables.start_scale)
    assert not starts_from_density(wider)


@pytest.mark.parametrize(
    ("spec", "density"),
    [("two_modes", True), ("follmer_mixture", False), ("ou_linear", False)],
)
def test_other_starts_and_no_densities(spec, density):
    problem = registry.problem(spec)
    tables = problem.tables(None, grid(problem))
    assert has_density(tables) == density
    assert not starts_from_density(tables)


def test_estimators_that_need_a_density_are_refused_without_one():
    class Needy(type(registry.estimator("path_importance_sampling"))):
        needs = frozenset({"base_density"})

    for spec in ("follmer_mixture", "ou_linear"):
        reason = refusal(make_request(registry.problem(spec)), Needy())
        assert reason.startswith("it needs the density of the base process")
    assert refusal(make_request(registry.problem("two_modes")), Needy()) is None


@path_kernel
def kernel(prepared, work, X, MEAN, DENSITY, SCORE, B):
    """Base means of all steps, densities and scores of all times."""
    for n in range(MEAN.shape[0]):
        primitives.base_mean(prepared, work, n, X, MEAN[n], B)
    for n in range(SCORE.shape[0]):
        primitives.base_log_density(prepared, work, n, X, DENSITY, n, B)
        primitives.base_score(prepared, work, n, X, SCORE[n], B)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("spec", ["gaussian_tilt:dim=2", "four_modes", "nine_modes"])
def test_kernels_agree_with_the_view(spec, dtype):
    problem, B = registry.problem(spec), 32
    view = view_of(problem, B)
    x = states(problem, B)
    prepared = prepare(problem.tables(view.theta, view.times), dtype)
    width, d = B + PADDING, problem.dim
    X = np.zeros((d, width), dtype)
    X[:, :B] = x.T
    mean = np.zeros((N_STEPS, d, width), dtype)
    density = np.zeros((N_STEPS + 1, width), dtype)
    score = np.zeros((N_STEPS + 1, d, width), dtype)
    kernel(prepared, workspace(prepared, B), X, mean, density, score, B)
    limit = {"float64": 1e-12, "float32": 2e-5}[dtype]
    given = torch.tensor(x)

    def close(mine, exact):
        scale = np.max(np.abs(exact.numpy()))
        assert np.max(np.abs(mine.T - exact.numpy())) <= limit * scale

    for n in range(N_STEPS):
        close(mean[n, :, :B], view.base_mean(n, given))
    for n in range(N_STEPS + 1):
        close(density[n, :B], view.base_log_density(n, given))
        close(score[n, :, :B], view.base_score(n, given))
