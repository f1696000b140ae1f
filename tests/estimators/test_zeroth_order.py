"""Zeroth-order estimators: the algebra of directions exactly, then whole problems.

Random tests have fixed seeds; all p-values of this file together fail by chance with
probability at most FALSE_ALARM.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from _replicates import make_estimates, make_rows, make_settings
from scipy.stats import norm

from sdebench import registry
from sdebench.errors import ParameterError
from sdebench.estimators._smoothing import (
    draw_directions,
    expected_gradient,
    smoothed_gradients,
)
from sdebench.estimators.subspace_gradient import iterate_history, principal_projection
from sdebench.measure import measure
from sdebench.measure.intervals import bias_test

FALSE_ALARM = 1e-4
TESTS = 64
"""An upper bound on the number of p-values of this file."""
LIMIT = FALSE_ALARM / TESTS
LAWS = ("gaussian", "sphere", "rademacher")
FORMS = ("two_point", "forward", "one_point")
EXACT = ("damped_oscillator", "gaussian_tilt")
"""Problems with an exact N-step chain and a random start."""


# ---- directions on functions with known derivatives ---------------------------------
def direction_law(law, count):
    """Nodes and weights that integrate polynomials of degree 7 exactly."""
    if law == "rademacher":
        nodes = np.array(list(itertools.product((-1.0, 1.0), repeat=count)))
        return nodes, np.full(len(nodes), 1 / len(nodes))
    if law == "gaussian":
        points, weights = np.polynomial.hermite_e.hermegauss(4)
        weights = weights / weights.sum()
        nodes = np.array(list(itertools.product(points, repeat=count)))
        products = np.prod(list(itertools.product(weights, repeat=count)), axis=1)
        return nodes, products
    assert count == 2
    angles = 2 * np.pi * np.arange(16) / 16
    nodes = np.sqrt(2) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return nodes, np.full(16, 1 / 16)


def quadratic(count):
    """Value, gradient and Hessian at a point of a quadratic with no symmetry."""
    generator = np.random.default_rng(3)
    root = generator.standard_normal((count, count))
    hessian = root + root.T + np.diag(np.arange(count))
    gradient, theta = generator.standard_normal((2, count))

    def function(x):
        d = x - theta
        return np.array([1.7 + gradient @ d + 0.5 * d @ hessian @ d])

    return function, theta, gradient, hessian


def second_moment(law, form, smoothing, value, gradient, hessian):
    """E|g|^2 of one direction, by the formulas of the docstring."""
    count, size = len(gradient), gradient @ gradient
    trace, square = np.trace(hessian), np.trace(hessian @ hessian)
    first = {"gaussian": count + 2}.get(law, count) * size
    curved = {
        "gaussian": (count + 4) * (trace**2 + 2 * square),
        "sphere": count**2 / (count + 2) * (trace**2 + 2 * square),
        "rademacher": count
        * (trace**2 + 2 * square - 2 * np.sum(np.diag(hessian) ** 2)),
    }[law]
    if form == "two_point":
        return first
    total = first + smoothing**2 / 4 * curved
    if form == "forward":
        return total
    cross = {"gaussian": count + 2}.get(law, count)
    return total + count * value**2 / smoothing**2 + cross * value * trace


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("law", "count"), [*((law, 2) for law in LAWS), ("gaussian", 3)]
)
def test_mean_and_second_moment_on_a_quadratic(law, count, form):
    """No smoothing bias; the second moments by exact integration over directions."""
    function, theta, gradient, hessian = quadratic(count)
    nodes, weights = direction_law(law, count)
    smoothing = 0.7
    single = np.array(
        [
            smoothed_gradients(function, theta, z[None, :], smoothing, form)[:, 0]
            for z in nodes
        ]
    )
    np.testing.assert_allclose(weights @ single, gradient, rtol=1e-12, atol=1e-12)
    moment = weights @ np.sum(single**2, axis=1)
    expected = second_moment(law, form, smoothing, 1.7, gradient, hessian)
    np.testing.assert_allclose(moment, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("law", "excess"), [("gaussian", 3), ("sphere", 1), ("rademacher", 1)]
)
def test_several_directions_divide_the_excess(law, excess):
    """(P + n + 1)/n for Gaussian directions, (P + n - 1)/n for the others."""
    function, theta, gradient, _ = quadratic(2)
    nodes, weights = direction_law(law, 2)
    moment, mean = 0.0, 0.0
    for (i, a), (j, b) in itertools.product(enumerate(nodes), repeat=2):
        pair = smoothed_gradients(function, theta, np.array([a, b]), 1e-3, "two_point")
        moment += weights[i] * weights[j] * np.sum(pair**2)
        mean = mean + weights[i] * weights[j] * pair[:, 0]
    np.testing.assert_allclose(mean, gradient, rtol=1e-10)
    ratio = (2 + 2 + excess - 2) / 2
    np.testing.assert_allclose(moment, ratio * gradient @ gradient, rtol=1e-8)


def test_leaving_the_own_direction_out_is_unbiased():
    """The mean over all directions, the own one included, would shrink by 1 - 1/n."""
    function, theta, gradient, _ = quadratic(2)
    nodes, weights = direction_law("gaussian", 2)
    mean = 0.0
    for (i, a), (j, b) in itertools.product(enumerate(nodes), repeat=2):
        both = np.array([a, b])
        estimate = smoothed_gradients(
            function, theta, both, 0.3, "one_point", "leave_one_out"
        )
        mean = mean + weights[i] * weights[j] * estimate[:, 0]
    np.testing.assert_allclose(mean, gradient, rtol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_smoothing_bias_of_a_cubic(law):
    """mu^2/6 E[z (z.grad)^3 f] in closed form, and the target agrees exactly."""
    theta, smoothing = np.array([0.4, -0.3]), 0.5

    def function(x):
        return x[0] ** 3 + 2 * x[0] ** 2 * x[1] - x[0] * x[1] ** 2 + 3 * x[1]

    x, y = theta
    gradient = np.array([3 * x**2 + 4 * x * y - y**2, 2 * x**2 - 2 * x * y + 3])
    laplacian = np.array([6.0 - 2.0, 4.0])  # gradient of f_xx + f_yy
    own = np.array([6.0, 0.0])  # f_xxx, f_yyy
    bias = {
        "gaussian": laplacian / 2,
        "sphere": laplacian / 2 * 2 / 4,
        "rademacher": (3 * laplacian - 2 * own) / 6,
    }[law]
    exact = gradient + smoothing**2 * bias
    mine = expected_gradient(function, theta, smoothing, law)
    np.testing.assert_allclose(mine, exact, rtol=1e-12)
    nodes, weights = direction_law(law, 2)
    for form in FORMS:
        mean = sum(
            w
            * smoothed_gradients(
                lambda t: np.array([function(t)]), theta, z[None, :], smoothing, form
            )[:, 0]
            for z, w in zip(nodes, weights, strict=True)
        )
        np.testing.assert_allclose(mean, exact, rtol=1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_target_leaves_the_fourth_order(count):
    """Gaussian smoothing of exp(a.theta) is exact: a e^{a.theta + mu^2 |a|^2/2}."""
    a, theta = np.arange(1.0, count + 1), np.full(count, 0.1)
    errors = []
    for smoothing in (0.1, 0.05):
        mine = expected_gradient(
            lambda x: float(np.exp(a @ x)), theta, smoothing, "gaussian"
        )
        exact = a * np.exp(a @ theta + smoothing**2 * (a @ a) / 2)
        errors.append(np.max(np.abs(mine - exact)))
    assert 14 < errors[0] / errors[1] < 20


def test_rademacher_target_is_exact():
    theta = np.array([0.2, -0.1, 0.4])

    def function(x):
        return float(np.exp(x[0]) * np.cos(2 * x[1]) + np.sinh(x[2]) * x[0])

    nodes, weights = direction_law("rademacher", 3)
    exact = sum(
        w * z * function(theta + 0.8 * z) / 0.8
        for z, w in zip(nodes, weights, strict=True)
    )
    mine = expected_gradient(function, theta, 0.8, "rademacher")
    np.testing.assert_allclose(mine, exact, rtol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_directions_have_covariance_one(law):
    """All second moments within normal quantiles, by their known variances."""
    count, n_params = 40000, 3
    z = draw_directions(np.random.default_rng(5), law, count, n_params)
    assert z.shape == (count, n_params)
    fourth, mixed = {
        "gaussian": (3.0, 1.0),
        "sphere": (9 / 5, 3 / 5),
        "rademacher": (1.0, 1.0),
    }[law]
    limit = norm.isf(LIMIT / 12)
    for i, j in itertools.combinations_with_replacement(range(n_params), 2):
        spread = np.sqrt((fourth - 1.0 if i == j else mixed) / count)
        assert abs(np.mean(z[:, i] * z[:, j]) - (i == j)) <= limit * spread + 1e-12
    assert np.all(np.abs(z.mean(axis=0)) < limit / np.sqrt(count))
    if law != "gaussian":
        np.testing.assert_allclose(np.sum(z**2, axis=1), n_params, rtol=1e-12)


# ---- whole problems ---------------------------------------------------------
def exact_smoothed_gradient(problem, point, n_steps, smoothing, law, objective):
    """E[z J_N(theta + mu z)]/mu by 12-point Gauss-Hermite or over all signs."""
    truth, theta = problem.truth, problem.theta(point)
    value = truth.objective if objective == "control" else truth.reward_only_objective
    if law == "rademacher":
        nodes, weights = direction_law(law, len(theta))
    else:
        points, single = np.polynomial.hermite_e.hermegauss(12)
        single = single / single.sum()
        nodes = np.array(list(itertools.product(points, repeat=len(theta))))
        weights = np.prod(list(itertools.product(single, repeat=len(theta))), axis=1)
    values = np.array([value(theta + smoothing * z, n_steps) for z in nodes])
    return (weights * values) @ nodes / smoothing


OPTIONS = [
    {},
    {"form": "forward", "smoothing": 0.2},
    {"form": "one_point", "smoothing": 0.3, "n_directions": 8,
     "baseline": "leave_one_out"},
    {"directions": "rademacher", "smoothing": 0.2},
    {"directions": "sphere", "n_directions": 3},
    {"objective": "reward", "smoothing": 0.2, "group": 16},
]  # fmt: skip


def p_value(estimates, exact):
    covariance = np.atleast_2d(np.cov(estimates.T))
    return bias_test(estimates.mean(0), exact, covariance, len(estimates)).p_value


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(o, marks=pytest.mark.slow if i > 1 else ())
        for i, o in enumerate(OPTIONS)
    ],
    ids=str,
)
def test_unbiased_for_the_smoothed_gradient(options):
    """By quadrature of the exact objective; factors of the gradient would show."""
    problem, n_steps = registry.problem("gaussian_tilt"), 4
    estimator = registry.estimator("zeroth_order", **options)
    settings = make_settings(problem, n_steps=n_steps, n_paths=64, seed=11)
    estimates = make_estimates(problem, estimator, settings, 1500)
    law = "gaussian" if estimator.directions == "sphere" else estimator.directions
    exact = exact_smoothed_gradient(
        problem, "halfway", n_steps, estimator.smoothing, law, estimator.objective
    )
    assert p_value(estimates, exact) > LIMIT
    for factor in (0.5, 2.0, -1.0):
        assert p_value(estimates, factor * exact) < LIMIT


def test_the_smoothing_bias_is_seen_where_it_is_large():
    """At mu = 0.5 the mean is the smoothed gradient and clearly not the gradient."""
    problem, n_steps = registry.problem("damped_oscillator"), 4
    options = {"directions": "rademacher", "smoothing": 0.5, "n_directions": 8}
    row = measure(
        problem,
        registry.estimator("zeroth_order", **options),
        n_steps=n_steps,
        n_paths=64,
        n_replicates=1000,
        seed=12,
    ).row
    assert row["p_value_own"] > LIMIT
    assert row["verdict"] == "unbiased for its target"
    variance = np.square(row["std_error"]) * row["n_replicates"]
    gradient = problem.truth.gradient("halfway", n_steps)
    assert bias_test(row["mean"], gradient, variance, 1000).p_value < LIMIT


@pytest.mark.parametrize("objective", ["control", "reward"])
@pytest.mark.parametrize("spec", EXACT)
def test_target_is_the_smoothed_gradient_of_the_chain(spec, objective):
    """Against quadrature of the objective; it differs from the gradient by O(mu^2)."""
    problem, n_steps = registry.problem(spec), 3
    policy = problem.truth.policy_chain("halfway", n_steps)
    gradient = policy.gradient(reward_only=objective == "reward")
    scale = np.linalg.norm(gradient)
    for law in ("gaussian", "rademacher"):
        biases = []
        for smoothing in (0.1, 0.05):
            estimator = registry.estimator(
                "zeroth_order",
                objective=objective,
                directions=law,
                smoothing=smoothing,
            )
            exact = exact_smoothed_gradient(
                problem, "halfway", n_steps, smoothing, law, objective
            )
            mine = estimator.target(policy)
            biases.append(np.linalg.norm(exact - gradient))
            tolerance = 1e-10 if law == "rademacher" else 0.02 * biases[-1] / scale
            np.testing.assert_allclose(mine, exact, rtol=0, atol=tolerance * scale)
        assert 3.8 < biases[0] / biases[1] < 4.3


def test_common_random_numbers_make_directional_derivatives():
    """Two-point signs with shared noise: E|g|^2 = P E|mean pathwise gradient|^2.

    On the same paths, so that the difference has a small standard error; without the
    shared noise it would be far off, as 1/mu^2.
    """
    problem, count = registry.problem("brownian_linear"), 1500
    settings = make_settings(problem, n_steps=3, n_paths=8, seed=13)
    estimator = registry.estimator(
        "zeroth_order", directions="rademacher", smoothing=1e-4
    )
    mine = make_estimates(problem, estimator, settings, count)
    pathwise = make_estimates(problem, registry.estimator("pathwise"), settings, count)
    squares = np.sum(pathwise**2, 1)
    difference = np.sum(mine**2, 1) - problem.n_params * squares
    error = difference.std() / np.sqrt(count)
    assert abs(difference.mean()) < norm.isf(LIMIT / 2) * error
    assert np.mean(squares) > 2 * norm.isf(LIMIT / 2) * error  # P + 1 would show


def test_the_variance_of_one_point_grows_without_a_baseline():
    problem = registry.problem("gaussian_tilt")
    settings = make_settings(problem, n_steps=4, n_paths=16, seed=14)
    spread = {
        (smoothing, baseline): np.trace(
            np.cov(
                make_estimates(
                    problem,
                    registry.estimator(
                        "zeroth_order",
                        form="one_point",
                        smoothing=smoothing,
                        n_directions=2,
                        baseline=baseline,
                    ),
                    settings,
                    400,
                ).T
            )
        )
        for smoothing in (0.01, 0.001)
        for baseline in ("none", "leave_one_out")
    }
    # F-quantile of 400 replicates: ratios of variances are within a factor 2
    assert 50 < spread[0.001, "none"] / spread[0.01, "none"] < 200
    ratio = spread[0.001, "leave_one_out"] / spread[0.01, "leave_one_out"]
    assert 0.5 < ratio < 2
    assert spread[0.01, "leave_one_out"] < 0.1 * spread[0.01, "none"]


def test_groups_have_directions_of_their_own():
    """Rows are z z^T of the path's own derivative, with one z per group of paths."""
    problem = registry.problem("gaussian_tilt")
    settings = make_settings(problem, n_steps=4, n_paths=32)
    estimator = registry.estimator(
        "zeroth_order", group=8, directions="sphere", smoothing=1e-5
    )
    assert estimator.group_size(32) == 8
    (rows,) = make_rows(problem, estimator, settings)
    (pathwise,) = make_rows(problem, registry.estimator("pathwise"), settings)
    seen = set()
    for first in range(0, 32, 8):
        own = slice(first, first + 8)
        z = rows[:, first] / np.linalg.norm(rows[:, first])
        projected = problem.n_params * np.outer(z, z @ pathwise[:, own])
        scale = np.max(np.abs(projected))
        np.testing.assert_allclose(rows[:, own], projected, rtol=0, atol=1e-6 * scale)
        seen.add(round(abs(float(z[0])), 6))
    assert len(seen) == 4


@pytest.mark.parametrize(
    "spec",
    [
        "zeroth_order",
        "zeroth_order:form=one_point,directions=sphere,group=32",
        "subspace_gradient",
    ],
)
@pytest.mark.parametrize("name", EXACT)
def test_numba_and_torch_give_the_same_rows(name, spec):
    problem, estimator = registry.problem(name), registry.estimator(spec)
    ours, theirs = (
        make_rows(
            problem,
            estimator,
            make_settings(problem, n_steps=5, n_paths=96, backend=backend),
        )
        for backend in ("numba", "torch")
    )
    scale = np.max(np.abs(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"directions": "cauchy"}, "unknown directions"),
        ({"form": "three_point"}, "unknown form"),
        ({"objective": "loss"}, "unknown objective"),
        ({"n_directions": 0}, "n_directions = 0"),
        ({"smoothing": 0.0}, "smoothing = 0.0"),
        ({"group": -1}, "group = -1"),
        ({"baseline": "leave_one_out"}, "belongs to form one_point"),
        ({"baseline": "leave_one_out", "form": "one_point"}, "at least 2"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(Exception, match=words):
        registry.estimator("zeroth_order", **options)


# ---- the subspace of an iterate history -------------------------------------
def test_projection_keeps_the_explained_variance():
    generator = np.random.default_rng(8)
    axes, _ = np.linalg.qr(generator.standard_normal((4, 4)))
    scales = np.array([10.0, 3.0, 0.1, 0.01])
    history = 5.0 + generator.standard_normal((4000, 4)) * scales @ axes.T
    for discarded, rank in ((0.2, 1), (0.01, 2), (1e-5, 3), (0.0, 4)):
        matrix = principal_projection(history, discarded)
        np.testing.assert_allclose(matrix @ matrix, matrix, atol=1e-12)
        np.testing.assert_allclose(np.trace(matrix), rank, atol=1e-12)
        np.testing.assert_allclose(
            matrix, axes[:, :rank] @ axes[:, :rank].T, atol=0.1 if rank < 4 else 1e-12
        )


def test_history_is_the_training_path():
    theta = np.array([0.5, 0.2, 0.0])
    history = iterate_history(theta, 128, 1e-9)
    np.testing.assert_allclose(history[-1], theta, atol=1e-7)
    np.testing.assert_allclose(history[63], theta / 2, atol=1e-7)
    line = np.outer(theta, theta) / (theta @ theta)
    matrix = principal_projection(iterate_history(theta, 128, 1e-3), 1e-3)
    np.testing.assert_allclose(matrix, line, atol=0.01)
    at_zero = principal_projection(iterate_history(0.0 * theta, 128, 1e-3), 1e-3)
    np.testing.assert_allclose(at_zero, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "spec",
    ["brownian_linear", pytest.param("damped_oscillator", marks=pytest.mark.slow)],
)
def test_subspace_gradient_is_unbiased_for_the_projected_gradient(spec, normalize):
    """And not for the gradient, nor with the other normalization."""
    problem, n_steps = registry.problem(spec), 4
    estimator = registry.estimator("subspace_gradient", normalize=normalize)
    count = problem.n_params
    assert np.trace(estimator._matrix(problem.theta("halfway"))) == pytest.approx(
        1 / np.sqrt((count + 1) / 2) if normalize else 1
    )
    settings = make_settings(problem, n_steps=n_steps, n_paths=64, seed=15)
    estimates = make_estimates(problem, estimator, settings, 4000)
    target = estimator.target(problem.truth.policy_chain("halfway", n_steps))
    assert p_value(estimates, target) > LIMIT
    assert p_value(estimates, problem.truth.gradient("halfway", n_steps)) < LIMIT
    wrong = np.sqrt((count + 1) / 2) ** (1 if normalize else -1)
    assert p_value(estimates, wrong * target) < LIMIT


def test_subspace_gradient_keeps_everything_at_the_start_of_training():
    problem = registry.problem("gaussian_tilt")
    row = measure(
        problem,
        "subspace_gradient",
        point="zero",
        n_steps=4,
        n_paths=64,
        n_replicates=1000,
        seed=16,
    ).row
    assert row["p_value_own"] > LIMIT
    assert row["relative_bias_target"] < 1e-4
    variance = np.square(row["std_error"]) * 1000
    half = 0.5 * problem.truth.gradient("zero", 4)
    assert bias_test(row["mean"], half, variance, 1000).p_value < LIMIT


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"iterates": 1}, "iterates = 1"),
        ({"spread": 0.0}, "spread = 0.0"),
        ({"discarded": 1.0}, "discarded = 1.0"),
        ({"n_directions": 0}, "n_directions = 0"),
    ],
)
def test_wrong_options_of_the_subspace_are_refused(options, words):
    with pytest.raises(ParameterError, match=words):
        registry.estimator("subspace_gradient", **options)
