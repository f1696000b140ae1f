"""Bounds of log Z by mean log-weights: exact values, the sandwich, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from _log_weights import GivenView, log_mean, quadratic_form
from _replicates import make_rows, make_settings

from sdebench import registry
from sdebench.closed_form.gaussian_mixture import GaussianMixture
from sdebench.closed_form.work import path_bounds
from sdebench.errors import ParameterError, UnknownNameError
from sdebench.measure import measure
from sdebench.measure.cell import make_request, refusal
from sdebench.simulate.noise import Noise, split_seed

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SIGMAS = 4.5
"""Standard errors; two dozen comparisons fail by chance with 2e-4."""
GAUSSIAN = (
    "gaussian_tilt",
    "gaussian_tilt:dim=2,mean=0.7,slope=0.5,rate=4.0",
    "gaussian_tilt:schedule=linear_flow,start_time=0.2",
)
PROPOSALS = ("zero", "given", "optimal")


def estimator_of(bound="none", weights="kernel_ratio", **options):
    return registry.estimator(
        "path_importance_sampling", bound=bound, weights=weights, **options
    )


def grid(problem, n_steps, power=1.3):
    """A grid that is not uniform: mixing up steps would show."""
    start, end = problem.time_span
    return problem.time_grid(
        start + (end - start) * np.linspace(0, 1, n_steps + 1) ** power
    )


def quadratic_of(problem, estimator, times, point="halfway"):
    """A, b, c of the log-weight 1/2 z A z + b z + c in all normals that it uses."""
    n_steps, dim = len(times) - 1, problem.dim
    size = (2 * n_steps + 2) * dim
    theta = {"given": problem.theta(point), "optimal": problem.theta_star, "zero": None}
    theta = theta[estimator.proposal]

    def values(points):
        count = len(points)
        normals = points.T.reshape(2 * n_steps + 2, dim, count)
        view = GivenView(
            problem.tables(theta, times),
            times,
            theta,
            key=split_seed(1),
            replicate=0,
            first_path=0,
            n_paths=count,
            given=Noise(normals[1 : n_steps + 1], normals[0], np.full(count, 0.5)),
        )
        own = normals[n_steps + 1 :].swapaxes(1, 2)
        view.own = np.concatenate([own, np.zeros_like(own[:1])])
        return estimator.statistics(view)[:, 0].numpy()

    return quadratic_form(values, size)


@pytest.mark.parametrize("n_steps", [1, 2, 5])
@pytest.mark.parametrize("spec", GAUSSIAN)
def test_targets_are_the_means_of_the_log_weights(spec, n_steps):
    """Moments of the chain against the trace of the estimator's own quadratic form."""
    problem = registry.problem(spec)
    times = grid(problem, n_steps)
    policy = problem.truth.policy_chain("overshoot", times)
    for proposal in PROPOSALS:
        for bound, weights in (
            ("lower", "girsanov"),
            ("lower", "kernel_ratio"),
            ("upper", "kernel_ratio"),
        ):
            estimator = estimator_of(bound, weights, proposal=proposal)
            A, _, c = quadratic_of(problem, estimator, times, "overshoot")
            mean = c + 0.5 * np.trace(A)
            np.testing.assert_allclose(estimator.target(policy), [mean], atol=1e-8)


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("spec", GAUSSIAN)
def test_kernel_ratios_are_unbiased_under_any_control(spec, n_steps):
    """By a determinant, against log Z of continuous time; no sampling."""
    problem = registry.problem(spec)
    times, exact = grid(problem, n_steps), problem.truth.log_normalizer()
    for proposal in PROPOSALS:
        form = quadratic_of(problem, estimator_of(proposal=proposal), times)
        assert log_mean(*form) == pytest.approx(exact, abs=1e-9)
        # and the inverse weights of tilted paths
        A, b, c = quadratic_of(problem, estimator_of("upper"), times)
        assert log_mean(-A, -b, -c) == pytest.approx(-exact, abs=1e-8)


def bounds_at(problem, point, n_steps):
    """Lower and upper bound at an evaluation point."""
    policy = problem.truth.policy_chain(point, n_steps)
    return path_bounds(policy.chain, policy.gain, policy.bias)


@pytest.mark.parametrize("spec", GAUSSIAN)
def test_log_z_is_between_the_bounds(spec):
    """At any number of steps and any control.

    At u* the gap closes like the step; not where X_0, which no control moves, remembers
    X_T: the flow of the last problem starts late.
    """
    problem = registry.problem(spec)
    exact = problem.truth.log_normalizer()
    for n_steps in (1, 4, 16, 64):
        for point in ("zero", "halfway", "optimum", "overshoot"):
            lower, upper = bounds_at(problem, point, n_steps)
            assert lower < exact < upper
    coarse, fine = (
        [abs(bound - exact) for bound in bounds_at(problem, "optimum", n)]
        for n in (400, 800)
    )
    if spec == GAUSSIAN[2]:
        assert np.all(np.divide(coarse, fine) < 1.1)
        return
    np.testing.assert_allclose(np.divide(coarse, fine), 2.0, atol=0.15)
    away = bounds_at(problem, "zero", 800)
    assert min(exact - away[0], away[1] - exact) > 10.0 * max(fine)


def test_girsanov_bound_is_on_the_chain_of_n_steps():
    """Minus the objective; with as many steps as one likes above log Z itself."""
    problem = registry.problem("lq_oscillator")
    for point in ("zero", "halfway", "optimum"):
        row = measure(
            problem,
            estimator_of("lower", "girsanov"),
            point=point,
            n_steps=6,
            n_paths=512,
            n_replicates=32,
            seed=3,
        ).row
        target = -problem.truth.objective(point, 6)
        assert row["target"] == pytest.approx([target], rel=1e-12)
        assert target < row["truth_discrete"][0]
        assert row["verdict"] == "unbiased for its target"
        assert abs(row["bias_own"][0]) < SIGMAS * row["std_error"][0]


@pytest.mark.parametrize("bound", ["lower", "upper"])
def test_measured_on_gaussian_problems(bound):
    problem = registry.problem(GAUSSIAN[1])
    row = measure(
        problem, estimator_of(bound), n_steps=8, n_paths=512, n_replicates=32, seed=3
    ).row
    assert row["verdict"] == "unbiased for its target"
    assert abs(row["bias_own"][0]) < SIGMAS * row["std_error"][0]
    sign = {"lower": -1.0, "upper": 1.0}[bound]
    assert sign * row["bias"][0] > 10.0 * row["std_error"][0]
    assert row["parameter_names"] == ["log_normalizer"]
    assert len(row["mean"]) == 1


@pytest.mark.parametrize("spec", ["four_modes", "two_modes:start=marginal"])
def test_measured_on_mixtures(spec):
    settings = {"n_steps": 24, "n_paths": 1024, "n_replicates": 16, "seed": 3}
    for point in ("zero", "optimum"):
        lower, upper = (
            measure(spec, estimator_of(bound), point=point, **settings).row
            for bound in ("lower", "upper")
        )
        exact = lower["truth"][0]
        assert lower["mean"][0] + SIGMAS * lower["std_error"][0] < exact
        assert upper["mean"][0] - SIGMAS * upper["std_error"][0] > exact
        assert lower["verdict"] == upper["verdict"] == "no exact target"
        weights = measure(spec, estimator_of(), point=point, **settings).row
        assert weights["target"] == weights["truth"]
        gap = weights["mean"][0] + 0.5 * weights["variance"] / 1024 - exact
        assert abs(gap) < SIGMAS * weights["std_error"][0]


def test_tilted_paths_have_the_tilted_marginals():
    """The noised tilted law at every time of the grid, and the noises of the chain."""
    problem, n_paths = registry.problem("four_modes"), 40_000
    times = problem.time_grid(4)
    theta = problem.theta("halfway")
    view = GivenView(
        problem.tables(theta, times),
        times,
        theta,
        key=split_seed(2),
        replicate=0,
        first_path=0,
        n_paths=n_paths,
    )
    states, noises = estimator_of("upper").tilted_paths(view)
    end, schedule = problem.truth.ideal_law(), problem.family.base.schedule
    for t, x in zip(times, states, strict=True):
        alpha, noise = schedule.alpha(t), schedule.variance(t)
        law = GaussianMixture(
            np.log(end.weights), alpha * end.means, alpha**2 * end.covariances + noise
        )
        # E grad log p under p is zero, E x . grad log p is -d, and not under others
        x = x.numpy()
        score = law.score(x)
        for values, mean in ((score, 0.0), (x * score, -1.0)):
            error = values.std(axis=0) / np.sqrt(n_paths)
            assert np.all(np.abs(values.mean(axis=0) - mean) < SIGMAS * error)
    for n, z in enumerate(noises):
        x = states[n]
        step = view.base_mean(n, x) + view.apply_noise(n, view.control(n, x) + z)
        torch.testing.assert_close(step, states[n + 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", ["gaussian_tilt:dim=2", "four_modes"])
def test_backends_agree_path_by_path(spec):
    problem = registry.problem(spec)
    settings = make_settings(problem, n_steps=7, n_paths=300)
    for estimator in (
        estimator_of(),
        estimator_of("lower"),
        estimator_of("upper"),
        estimator_of("upper", proposal="optimal"),
        estimator_of("lower", "girsanov"),
    ):
        mine = make_rows(problem, estimator, settings)
        other = dataclasses.replace(settings, backend="torch")
        theirs = make_rows(problem, estimator, other)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("two_modes", "X_0 has another law"),
        ("ou_linear", "denoised prediction"),
        ("forty_modes", "denoised prediction"),
        ("gaussian_tilt:noise=constant", "memoryless denoising"),
    ],
)
def test_refusals(spec, part):
    request = make_request(registry.problem(spec), n_steps=10)
    for bound in ("none", "lower", "upper"):
        assert part in refusal(request, estimator_of(bound))
    assert refusal(request, estimator_of("lower", "girsanov")) is None


def test_unknown_options():
    with pytest.raises(ParameterError, match="nothing samples that of the N-step"):
        estimator_of("upper", "girsanov")
    for options in ({"bound": "middle"}, {"weights": "exact"}, {"proposal": "best"}):
        with pytest.raises(
            (ParameterError, UnknownNameError), match=next(iter(options))
        ):
            registry.estimator("path_importance_sampling", **options)


def test_what_each_is_unbiased_for():
    said = {
        (bound, weights): estimator_of(bound, weights).unbiased
        for bound, weights in (
            ("none", "girsanov"),
            ("none", "kernel_ratio"),
            ("lower", "girsanov"),
            ("upper", "kernel_ratio"),
        )
    }
    assert said["none", "girsanov"].startswith("Z of the discretized process")
    assert said["none", "kernel_ratio"].startswith("Z of the continuous process")
    assert "log Z - KL(P || P*) of the discretized" in said["lower", "girsanov"]
    assert "log Z + KL(P* || P) of the continuous" in said["upper", "kernel_ratio"]
