"""Digits: the data, what the tilt does to them, and points without a density."""

from __future__ import annotations

import dataclasses

import _checks as checks
import numpy as np
import pytest
from scipy.special import logsumexp

import sdebench
from sdebench import registry
from sdebench.closed_form import log_quadratics as lq
from sdebench.errors import NotApplicableError, NotExactError, ParameterError
from sdebench.measure import measure, measure_group
from sdebench.problems import _digits
from sdebench.problems.digits import Digits
from sdebench.problems.digits_classifier import DigitsClassifier
from sdebench.simulate.torch_family import torch_family

SMALL = {"dim": 4, "n_images": 12}


@pytest.fixture(scope="module")
def images():
    return Digits(**SMALL)


@pytest.fixture(scope="module")
def points():
    return DigitsClassifier(**SMALL)


# ---- the data -----------------------------------------------------------------------


def test_images_are_those_of_scikit_learn():
    pixels, labels = _digits.images(64)
    assert pixels.shape == (1797, 64)
    assert pixels.min() == -1.0
    assert pixels.max() == 1.0
    assert list(labels[:10]) == list(range(10))
    assert pixels.sum() == pytest.approx(-44793.25)


@pytest.mark.parametrize(
    ("dim", "shape"),
    [(2, (2, 1)), (3, (3, 1)), (4, (2, 2)), (16, (4, 4)), (64, (8, 8))],
)
def test_coarse_images_average_fine_ones(dim, shape):
    assert _digits.shape(dim) == shape
    fine, coarse = _digits.images(64)[0], _digits.images(dim)[0]
    if 64 % dim == 0:
        np.testing.assert_allclose(coarse.mean(axis=1), fine.mean(axis=1), atol=1e-14)
    first = fine[7].reshape(8, 8)[: -(-8 // shape[0]), : -(-8 // shape[1])]
    assert coarse[7, 0] == pytest.approx(first.mean(), abs=1e-14)


def test_the_classifier_is_at_its_optimum():
    """The gradient of the penalized likelihood, by its formula, is zero."""
    model, (x, labels) = _digits.classifier(64), _digits.images(64)
    p = np.exp(model.log_probabilities(x))
    gap = p - np.eye(10)[labels]
    slope = 0.01 * gap.T @ x + model.weights
    assert np.max(np.abs(slope)) < 1e-9
    assert np.max(np.abs(gap.sum(axis=0))) < 1e-8
    assert np.mean(p.argmax(axis=1) == labels) > 0.93
    np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=1e-13)


# ---- digits -------------------------------------------------------------------------


def test_exact_denoiser(images):
    """(x + beta^2 score) / alpha is the softmax average over all images."""
    base, t = images.family.base, 0.6
    x = np.random.default_rng(0).normal(size=(5, 4))
    spread = t**2 * images.variance + (1.0 - t) ** 2
    means = images.family.base.means
    gap = x[:, None] - t * means
    weights = np.exp(-0.5 * np.sum(gap**2, axis=2) / spread)
    weights /= weights.sum(axis=1, keepdims=True)
    each = means + t * images.variance / spread * gap
    expected = np.einsum("nk,nki->ni", weights, each)
    score = lq.gradient(base.marginal(t), x)
    np.testing.assert_allclose((x + (1 - t) ** 2 * score) / t, expected, atol=1e-13)


def test_checks_in_few_dimensions(images):
    checks.check_hjb(images, tolerance=1e-10)
    checks.check_gradient(images, checks.thetas(images)["random"])
    checks.check_tables(images, "halfway")
    checks.check_parameter_tables(images, "halfway")
    checks.check_feynman_kac(images, n_paths=2**13, n_steps=64)
    checks.check_optimal_law(images, n_paths=2**13, n_steps=64)
    plane = dataclasses.replace(images, dim=2)
    checks.check_tilting_quadrature(plane)
    checks.check_regret_by_simulation(plane, "halfway", n_paths=2**10)


def test_a_random_start_has_log_z_but_no_objective_in_many_dimensions():
    random = Digits(start="marginal")
    family = random.family
    masses = lq.gaussian_parameters(family.tilt_rows(random.theta_star, 0.1)[1])[0]
    assert random.truth.log_normalizer() == pytest.approx(logsumexp(masses), rel=1e-13)
    with pytest.raises(NotExactError, match="64 dimensions"):
        random.truth.objective("zero")
    plane = Digits(start="marginal", dim=2, n_images=12)
    checks.check_tilting_quadrature(plane)


# ---- torch in large mixtures -------------------------------------------------------


def naive(rows, x, v):
    """Score and Hessian product with the tensor (paths, components, dimensions)."""
    d = x.shape[1]
    gamma = lq.weights(rows, x)
    slopes = rows[:, :d] + 2.0 * rows[:, d:-1] * x[:, None]
    score = np.einsum("nk,nki->ni", gamma, slopes)
    along = np.einsum("nki,ni->nk", slopes - score[:, None], v)
    product = np.einsum("nk,nki->ni", gamma * along, slopes - score[:, None])
    return score, product + 2.0 * (gamma @ rows[:, d:-1]) * v


@pytest.mark.parametrize("shared", [True, False])
def test_products_of_matrices_are_the_sums(images, shared):
    import torch

    tables = images.tables(images.theta("halfway"), images.time_grid(6))
    if not shared:
        other = tables.base.copy()
        other[:, 0, 4:8] *= 1.5
        tables = tables._replace(base=other)
    family = torch_family(tables, "float64", "cpu")
    rng = np.random.default_rng(1)
    x, v = rng.normal(size=(2, 9, 4))
    for n in range(6):
        mean = family.base_mean(n, torch.tensor(x)).numpy()
        product = family.base_vjp(n, torch.tensor(x), torch.tensor(v)).numpy()
        score, hessian = naive(tables.base[n], x, v)
        expected = tables.scale[n] * x + tables.offset[n] + tables.base_gain[n] * score
        np.testing.assert_allclose(mean, expected, atol=1e-12)
        expected = tables.scale[n] * v + tables.base_gain[n] * hessian
        np.testing.assert_allclose(product, expected, atol=1e-11)


# ---- points and a classifier --------------------------------------------------------


def test_h_is_the_posterior_mean_of_the_tilt(points):
    """sum_k omega_k e^{r(x_k)} from the definition, for the reward and a control."""
    x = np.random.default_rng(2).normal(size=(6, 4))
    data = points.family.base.means
    for t in (0.2, 0.5, 0.9):
        gap = np.sum((x[:, None] - t * data) ** 2, axis=2)
        omega = np.exp(-0.5 * gap / (1.0 - t) ** 2)
        omega /= omega.sum(axis=1, keepdims=True)
        expected = omega @ np.exp(points.reward(data))
        np.testing.assert_allclose(points.truth.h(x, t), expected, rtol=1e-11)
    model = points.classifier
    scores = data @ model.weights.T + model.biases
    logs = scores - logsumexp(scores, axis=1, keepdims=True)
    expected = 0.7 * logs[:, 3] + 0.3 * logs[:, 8]
    np.testing.assert_allclose(points.reward(data), expected, atol=1e-13)


def test_checks_of_points(points):
    checks.check_hjb(points, tolerance=1e-9)
    checks.check_gradient(points, checks.thetas(points)["random"])
    checks.check_tables(points, "halfway")
    checks.check_parameter_tables(points, "halfway")
    checks.check_feynman_kac(points, n_paths=2**13, n_steps=64)
    checks.check_optimal_law(points, n_paths=2**13, n_steps=64)
    checks.check_regret_by_simulation(points, "halfway", n_paths=2**10)


def test_the_end_is_discrete(points):
    law = points.truth.tilted_marginal(1.0)
    weights = np.exp(law.log_weights)
    assert weights.sum() == pytest.approx(1.0, rel=1e-13)
    np.testing.assert_allclose(law.mean(), weights @ law.means, rtol=1e-13)
    with pytest.raises(NotExactError, match="discrete"):
        law.log_density(law.means)
    with pytest.raises(NotExactError, match="point"):
        points.truth.tilted_marginal(0.1)


@pytest.mark.parametrize("n_steps", [50, 400])
def test_the_last_step_lands_near_an_image(points, n_steps):
    """Within about 3 h in each number; at 400 steps far closer than two images are."""
    run = sdebench.simulate(points, n_steps=n_steps, n_paths=2000, seed=1)
    data = points.family.base.means
    gap = np.abs(run.terminal.T[:, None] - data)
    nearest = np.sqrt(np.mean(gap**2, axis=2)).min(axis=1)
    h = 0.9 / n_steps
    assert 1.0 * h < np.sqrt(np.mean(nearest**2)) < 3.5 * h


def test_only_estimators_without_derivatives_apply(points):
    every = [registry.estimator(name) for name in registry.estimator_names()]
    rows = measure_group(points, every, n_steps=4, n_paths=32, n_replicates=2)
    for estimator, measured in zip(every, rows, strict=True):
        derives = estimator.needs - {"control_parameter_vjp"}
        if measured.row["status"] == "ok":
            assert not derives & {"reward_gradient", "drift_vjp", "control_vjp"}
    by_name = {e.name: m.row for e, m in zip(every, rows, strict=True)}
    assert by_name["reinforce"]["status"] == "ok"
    assert by_name["cross_entropy"]["status"] == "ok"
    with pytest.raises(NotApplicableError, match="no derivatives"):
        measure(points, "pathwise", n_steps=4, n_paths=32, n_replicates=2)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["digits", "digits_classifier"])
def test_all_images(spec):
    """1,797 images in 64 dimensions: exact answers, and an estimator against them."""
    problem = sdebench.problem(spec, n_images=1797)
    checks.check_gradient(problem, "halfway")
    checks.check_stationary(problem)
    found = measure(
        problem, "reinforce", n_steps=32, n_paths=64, n_replicates=8, dtype="float32"
    )
    assert found.row["status"] == "ok"
    assert found.row["verdict"] != "biased"


@pytest.mark.parametrize(
    ("spec", "parameters", "message"),
    [
        ("digits", {"n_images": 1798}, "n_images 1798"),
        ("digits", {"n_images": 1}, "n_images 1 "),
        ("digits", {"dim": 11}, "dim 11"),
        ("digits", {"dim": 1}, "dim 1 "),
        ("digits", {"variance": 0.0}, "variance"),
        ("digits", {"sharp": -30.0}, "not integrable"),
        ("digits", {"start_time": 0.0}, "start_time"),
        ("digits_classifier", {"digit": 8}, "two different"),
        ("digits_classifier", {"other": 10}, "two different"),
        ("digits_classifier", {"n_images": 0}, "n_images 0"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line(spec, parameters, message):
    with pytest.raises(ParameterError, match=message) as caught:
        sdebench.problem(spec, **parameters)
    assert "\n" not in str(caught.value)
