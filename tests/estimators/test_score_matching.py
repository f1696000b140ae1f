"""Score matching: exact expectations, its limits, least noise, and refusals.

Backends, float32, needs and counts are tested for every estimator in
``tests/test_estimators.py``; here the seeds are fixed and the false-alarm rate of one
comparison is `_checks.ALARM`.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from _checks import ALARM
from _expectation import view_of
from _replicates import make_rows, make_settings

from sdebench import registry
from sdebench.closed_form.log_quadratics import gradient
from sdebench.closed_form.regression_targets import RegressionTargets
from sdebench.errors import NotApplicableError, ParameterError, UnknownNameError
from sdebench.estimators import score_matching as module
from sdebench.measure import measure, measure_group
from sdebench.simulate.noise import Noise, split_seed
from sdebench.view import View

pytestmark = pytest.mark.usefixtures("one_torch_thread")

VARIANTS = [
    {"labels": labels, "data": data}
    for labels in ("conditional", "target", "novel")
    for data in ("optimal", "theta")
] + [{"labels": "affine", "precision": 3.0}]


def estimator(**options):
    return registry.estimator("score_matching", **options)


def gaussian(**options):
    return registry.problem("gaussian_tilt", **{"dim": 2, "mean": 0.3} | options)


def measured(problem, estimators, point, n_steps=6, backend="torch"):
    return [
        found.row
        for found in measure_group(
            problem,
            estimators,
            point=point,
            n_steps=n_steps,
            n_paths=1024,
            n_replicates=32,
            seed=3,
            backend=backend,
        )
    ]


def block_of(n_paths):
    return {
        "key": split_seed(9),
        "replicate": 0,
        "first_path": 0,
        "n_paths": n_paths,
    }


def exact(problem, options, point, n_steps):
    policy = problem.truth.policy_chain(point, n_steps)
    return estimator(**options).target(policy)


# ---- expectations -------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [{}, {"schedule": "linear_flow", "start_time": 0.1}],
)
def test_unbiased_for_its_target(options):
    problem = gaussian(**options)
    for point in ("zero", "overshoot"):
        for row in measured(problem, [estimator(**v) for v in VARIANTS], point):
            assert row["status"] == "ok", row["reason"]
            assert row["p_value_own"] > ALARM, row["estimator_label"]


def weighted_nodes(problem, options, point):
    """Rows and weights of a quadrature over all normals of paths of two steps."""
    chosen = estimator(data="weighted", **options)
    times = problem.time_grid(2)
    rules = [np.polynomial.hermite_e.hermegauss(n) for n in (30, 30, 30, 3)]
    index = np.indices([len(points) for points, _ in rules]).reshape(4, -1)
    # start, two steps, and xi
    values, weights = (
        np.array([rule[part][i] for rule, i in zip(rules, index, strict=True)])
        for part in (0, 1)
    )
    noise = Noise(values[1:3, None], values[:1], np.full(values.shape[1], 0.5))
    theta = problem.theta(point)
    arguments = {"estimator": chosen, "noise": noise}
    other = view_of(problem, theta, times, **arguments)
    view = view_of(problem, theta, times, other=other, **arguments)
    view.own = values[3:, :, None]
    return chosen.statistics(view).numpy().T, np.prod(weights, axis=0)


@pytest.mark.parametrize("labels", ["conditional", "target", "novel"])
def test_weighted_means_are_the_target(labels):
    """Weights are no polynomials: 30 nodes in each normal leave 1e-6."""
    problem = registry.problem("gaussian_tilt", mean=0.3)
    for point in ("halfway", "overshoot"):
        rows, weights = weighted_nodes(problem, {"labels": labels}, point)
        chosen = estimator(labels=labels, data="weighted")
        found = chosen.combine(rows @ weights, 1)
        target = exact(problem, {"labels": labels, "data": "weighted"}, point, 2)
        np.testing.assert_allclose(found, target, rtol=1e-6)
        # the law of the weights is neither that of the model nor of the optimal paths
        for data in ("theta", "optimal"):
            other = exact(problem, {"labels": labels, "data": data}, point, 2)
            assert np.linalg.norm(other - target) > 0.01 * np.linalg.norm(target)


def test_weighted_rows_are_those_of_the_model_times_their_weights():
    problem = gaussian()
    settings = {"backend": "numba", "n_paths": 64}
    settings = make_settings(problem, **settings)
    weighted, plain, costs = (
        make_rows(problem, chosen, settings)[0]
        for chosen in (
            estimator(data="weighted"),
            estimator(data="theta"),
            registry.estimator("path_importance_sampling"),
        )
    )
    weights = np.exp(costs[0] - costs[0].max())
    np.testing.assert_allclose(weighted[-1], weights, rtol=1e-12)
    np.testing.assert_allclose(weighted[:-1], weights * plain, rtol=1e-10, atol=1e-12)


def test_weighted_samples_have_the_tilt_for_a_fixed_point():
    """Conditional score matching stops there, and without weights everywhere."""
    problem = gaussian(rate=12.0)

    def sizes(point):
        options = {"labels": "conditional", "data": "weighted"}
        found = [np.linalg.norm(exact(problem, options, point, n)) for n in (200, 800)]
        return np.array(found) / np.linalg.norm(exact(problem, options, "zero", 200))

    assert sizes("optimum")[1] < 0.4 * sizes("optimum")[0] < 0.05
    assert sizes("halfway")[1] > 0.3


def wrong_labels(factor_tau, factor_score):
    """The estimator with scaled parts of its label: sign and factor mistakes."""

    class Wrong(module.ScoreMatching):
        def statistics(self, view):
            scores = view.base_score
            view.base_score = lambda n, x: factor_score * scores(n, x)
            slope = view.noise_transpose
            view.noise_transpose = lambda n, v: factor_tau * slope(n, v)
            return super().statistics(view)

    return Wrong


@pytest.mark.parametrize("factors", [(-1.0, 1.0), (0.5, 1.0), (1.0, -1.0), (1.0, 0.5)])
def test_wrong_signs_and_factors_are_refused(factors):
    wrong = dataclasses.make_dataclass(
        "Wrong", [], bases=(wrong_labels(*factors),), frozen=True, kw_only=True
    )(labels="conditional")
    (row,) = measured(gaussian(), [wrong], "halfway")
    assert row["p_value_own"] < ALARM


def test_tends_to_the_cross_entropy_gradient():
    """Order one in 1/N, and the extrapolation is the answer of continuous time.

    The memory of the start under VP is e^-5: u* starts from p_0, not its tilt.
    """
    problem = gaussian(rate=20.0)
    truth = problem.truth.cross_entropy_gradient("halfway")
    size = np.max(np.abs(truth))
    for options in VARIANTS:
        if options.get("data") == "theta":
            continue
        values = [exact(problem, options, "halfway", n) for n in (300, 600, 1200)]
        gaps = [np.max(np.abs(v - truth)) / size for v in values]
        if options["labels"] == "target":  # the noise end costs most
            assert gaps[2] < 0.6 * gaps[0]
            continue
        assert gaps[2] < 0.6 * gaps[1] < 0.4 * gaps[0], options
        assert np.max(np.abs(2 * values[2] - values[1] - truth)) < 5e-3 * size, options


def test_where_model_samples_stop():
    """Conditional: at every theta; the others at the optimum only; as N grows."""
    problem = gaussian(rate=12.0)
    scale = np.linalg.norm(problem.truth.cross_entropy_gradient("halfway"))

    def sizes(labels, point):
        options = {"labels": labels, "data": "theta"}
        values = [exact(problem, options, point, n) for n in (200, 800)]
        return [np.linalg.norm(v) / scale for v in values]

    for point in ("halfway", "overshoot", "optimum"):
        coarse, fine = sizes("conditional", point)
        assert fine < 0.05
        assert fine < 0.4 * coarse
    assert sizes("novel", "optimum")[1] < 0.05
    assert sizes("target", "optimum")[1] < 0.6 * sizes("target", "optimum")[0]
    for labels in ("novel", "target"):
        assert sizes(labels, "halfway")[1] > 0.5


def test_mixture_by_a_second_route():
    """two_modes at theta*, a block of paths: labels from the closed-form laws."""
    problem = registry.problem("two_modes")
    theta, times = problem.theta("halfway"), problem.time_grid(5)
    options = block_of(64)
    tables = problem.tables(problem.theta_star, times)
    other = View(problem.tables(theta, times), times, theta, **options)
    view = View(tables, times, problem.theta_star, other=other, **options)
    mine = estimator(labels="affine", precision=2.5).statistics(view).numpy()
    x_1, xi = view.rollout().states[-1].numpy(), view.noise(5).numpy()
    base, law = problem.family.base, problem.truth.ideal_law()
    total = 0.0
    for n, (t, after) in enumerate(pairwise(times)):
        alpha, _, variance = base.backward(t, base.horizon)
        beta, x = np.sqrt(variance), alpha * x_1 + np.sqrt(variance) * xi
        share = alpha**2 / (alpha**2 + 2.5 * variance)
        tau = share * law.score(x_1) / alpha - (1 - share) * xi / beta
        root = np.sqrt(after - t)
        u = base.sigma(t) * (tau - gradient(base.marginal(t), x))
        own = problem.truth.policy(x, t, theta)
        residual = torch.tensor(root * (own - u))
        total = total + other.control_parameter_vjp(n, torch.tensor(x), residual)
    np.testing.assert_allclose(mine, total.numpy(), rtol=1e-9, atol=1e-9)


# ---- noise --------------------------------------------------------------------------
def test_no_noise_with_the_precision_of_a_gaussian_tilted_law():
    """m = 1/C' of the tilted law: labels without noise, whatever xi and x_1."""
    problem = gaussian()
    best = RegressionTargets.of(problem).precision("affine")
    view_options = block_of(9)
    theta, times = problem.theta_star, problem.time_grid(6)
    tables = problem.tables(theta, times)
    other = View(tables, times, theta, **view_options)
    view = View(tables, times, theta, other=other, **view_options)
    found = estimator(labels="affine", precision=best).statistics(view)
    assert float(found.abs().max()) < 1e-10  # theta* is u*: nothing is left


def test_the_variance_of_target_labels_is_largest():
    rows = measured(gaussian(), [estimator(**v) for v in VARIANTS[::2]], "optimum", 40)
    found = {row["estimator_label"]: row["variance"] for row in rows}
    target = found.pop("score_matching:labels=target")
    assert all(target > 10.0 * value for value in found.values())


def test_all_times_of_a_path_keep_conditional_labels_finite():
    """The sum over a path's times on ever finer grids, up to the data."""
    problem = gaussian(schedule="linear_flow", start_time=0.1)
    chosen = [estimator(labels="conditional")]
    coarse, fine = (
        measured(problem, chosen, "optimum", n)[0]["variance"] for n in (25, 100)
    )
    assert fine < 1.15 * coarse


# ---- refusals -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"labels": "novell"}, UnknownNameError, "did you mean novel"),
        ({"data": "base"}, UnknownNameError, "data"),
        ({"labels": "affine", "precision": 0.0}, ParameterError, "labels target"),
        ({"precision": 2.0}, ParameterError, "option of labels affine"),
    ],
)
def test_bad_options(options, error, said):
    with pytest.raises(error, match=said):
        estimator(**options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ou_linear", {}),
        ("follmer_mixture", {}),
        ("gaussian_tilt", {"schedule": "linear_flow", "noise": "constant"}),
    ],
)
def test_refused_where_the_base_has_no_score_at_data(name, options):
    problem = registry.problem(name, **options)
    with pytest.raises(NotApplicableError, match="only memoryless denoising problems"):
        measure(problem, estimator(), n_steps=4, n_replicates=4)
