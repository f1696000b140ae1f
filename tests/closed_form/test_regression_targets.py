"""Noise of regression targets: nested quadrature, sampling, and known inequalities.

False alarms of the checks by sampling: `_checks.require_zero`, whose rate is stated
there.  Other tolerances are rounding and the bounds that the answers come with.
"""

from __future__ import annotations

from math import inf, log, pi, sqrt

import numpy as np
import pytest
from _checks import require_zero
from numpy.polynomial.legendre import leggauss
from scipy.integrate import quad

import sdebench
from sdebench.closed_form import regression_targets as module
from sdebench.closed_form.base_process import MemorylessBase, PinnedBase
from sdebench.closed_form.gaussian_mixture import GaussianMixture
from sdebench.closed_form.log_quadratics import gradient
from sdebench.closed_form.quadratic import Quadratic
from sdebench.closed_form.regression_targets import TARGETS, RegressionTargets
from sdebench.closed_form.schedule import (
    Cosine,
    LinearFlow,
    VarianceExploding,
    VariancePreserving,
)
from sdebench.errors import (
    NotApplicableError,
    NotExactError,
    ParameterError,
    UnknownNameError,
)
from sdebench.measure.intervals import Interval
from sdebench.studies._study import EQUAL, agreement

DATA = GaussianMixture.isotropic([[-1.5], [1.0]], [0.2, 0.4], [0.3, 0.7])
REWARD = Quadratic(-0.1, np.array([0.4]), np.array([0.8]))  # -0.4 (x - 0.5)^2
LAW = DATA.tilt(REWARD)
VARIANCES = LAW.covariances.ravel()
SCALAR = RegressionTargets(LAW, 0.6)  # the base variance is that of "adjoint" only


def precision(target: str) -> float:
    """Return m from the definitions, not from the module."""
    J = quad(lambda x: score(x) ** 2 * density(x), -8, 8, limit=400)[0]
    return {"conditional": inf, "target": 0.0, "novel": 1.0, "affine": J}.get(
        target, 1.0 / 0.6
    )


def density(x):
    weights, means = LAW.weights, LAW.means[:, 0]
    parts = np.subtract.outer(np.asarray(x), means) ** 2 / VARIANCES
    return (np.exp(-0.5 * parts) / np.sqrt(2 * pi * VARIANCES)) @ weights


def score(x):
    h = 1e-5
    return (np.log(density(x + h)) - np.log(density(x - h))) / (2 * h)


X = np.linspace(-6.0, 5.0, 2201)
P, G = density(X), score(X)


def label(target: str, alpha: float, beta: float, x_t):
    """Return the label on the grid X of x_1 for every x_t, (len(x_t), len(X))."""
    m = precision(target)
    c = 0.0 if m == inf else (alpha / beta) ** 2 / (m + (alpha / beta) ** 2)
    direct = -(np.asarray(x_t)[:, None] - alpha * X) / beta**2
    return c * G / alpha + (1 - c) * direct


def posterior(alpha: float, beta: float, x_t):
    """Return the joint density (len(x_t), len(X)) times the step of X."""
    away = (np.asarray(x_t)[:, None] - alpha * X) / beta
    return P * np.exp(-0.5 * away**2) / (beta * sqrt(2 * pi)) * (X[1] - X[0])


def nested_noise(target: str, rho: float) -> float:
    """beta^2 E Var(tau | x_t) by quadrature over x_t and x_1, beta = 1."""
    x_t = np.linspace(-6 * rho - 8, 5 * rho + 8, 1201)
    joint, tau = posterior(rho, 1.0, x_t), label(target, rho, 1.0, x_t)
    mass = np.maximum(joint.sum(axis=1), 1e-300)
    mean = (joint * tau).sum(axis=1) / mass
    square = (joint * (tau - mean[:, None]) ** 2).sum()
    return float(square * (x_t[1] - x_t[0]))


# ---- at one time --------------------------------------------------------------------
PUBLISHED = {
    "conditional": ("0.063", "1.30", "20.8"),
    "target": ("73.6", "9.19", "0.844"),
    "novel": ("0.145", "1.28", "0.357"),
}
"""Linear flow at t = 0.2, 0.5, 0.8; found to be those at x_t = 0.3."""


@pytest.mark.parametrize("target", PUBLISHED)
@pytest.mark.parametrize(("place", "t"), [(0, 0.2), (1, 0.5), (2, 0.8)])
def test_published_conditional_variances(target, place, t):
    found = SCALAR.noise_at(target, t / (1 - t), np.array([0.3 / t])).value
    exact = Interval(*[found / (1 - t) ** 2] * 3)
    assert agreement(PUBLISHED[target][place], exact) == EQUAL


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rho", [0.2, 1.0, 5.0])
def test_nested_quadrature(target, rho):
    value, bound = SCALAR.noise(target, rho)
    # finite differences of log p* in the second route
    assert value == pytest.approx(nested_noise(target, rho), rel=2e-6, abs=1e-8)
    assert bound < 1e-10 * max(1.0, value)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("t", [0.3, 0.7])
def test_at_a_point_by_quadrature(target, t):
    point = [-0.4]
    joint, tau = posterior(t, 1 - t, point), label(target, t, 1 - t, point)
    mean = (joint * tau).sum() / joint.sum()
    variance = (joint * (tau - mean) ** 2).sum() / joint.sum()
    found = SCALAR.noise_at(target, t / (1 - t), np.array(point) / t)
    assert found.value / (1 - t) ** 2 == pytest.approx(variance, rel=2e-6)
    # the mean is the score of the tilted marginal
    marginal = LAW.normalized().push_forward(t, 0.0, (1 - t) ** 2)
    assert mean == pytest.approx(float(marginal.score(np.array(point))[0]), rel=1e-6)


def test_the_best_combination_at_a_point():
    t, point = 0.4, np.array([0.2])
    rho = t / (1 - t)
    joint = posterior(t, 1 - t, point)[0]
    parts = [label(name, t, 1 - t, point)[0] for name in ("target", "conditional")]
    mean = [(joint * part).sum() / joint.sum() for part in parts]
    away = [part - value for part, value in zip(parts, mean, strict=True)]
    cov = [[(joint * a * b).sum() for a in away] for b in away]
    best = (cov[1][1] - cov[0][1]) / (cov[0][0] + cov[1][1] - 2 * cov[0][1])
    assert SCALAR.best_share(rho, point / t) == pytest.approx(best, rel=1e-6)


def test_the_affine_target_has_the_least_noise():
    for rho in (0.1, 0.7, 3.0, 20.0):
        least = SCALAR.noise("affine", rho)
        others = [SCALAR.noise(name, rho) for name in TARGETS[:4]]
        assert all(least.value <= v + b + least.bound for v, b in others)
        # the gap in the inequality of van Trees
        J, A = SCALAR.fisher_information.value, SCALAR.mean_square_error(rho).value
        gap = rho**2 * (A - 1.0 / (J + rho**2))
        assert least.value == pytest.approx(gap, abs=1e-10)


# ---- integrals ----------------------------------------------------------------------
@pytest.mark.parametrize("target", TARGETS)
def test_integral_by_nested_quadrature(target):
    nodes, weights = leggauss(12)
    low, high = log(0.3), log(4.0)
    logs = 0.5 * (low + high) + 0.5 * (high - low) * nodes
    values = [nested_noise(target, float(np.exp(v))) for v in logs]
    direct = 0.5 * (high - low) * float(weights @ values)
    value, bound = SCALAR.integral(target, 0.3, 4.0)
    assert value == pytest.approx(direct, rel=2e-6)
    assert bound < 1e-11


def gaussian_base(schedule, start_time=0.0):
    means, variances = np.zeros((1, 1)), np.full((1, 1), 2.0)
    return MemorylessBase(schedule, np.zeros(1), means, variances, start_time)


BASES = {
    "vp": gaussian_base(VariancePreserving(1.0, 6.0)),
    "linear_flow": gaussian_base(LinearFlow(2.0), 0.05),
    "cosine": gaussian_base(Cosine(1.0), 0.05),
    "ve": gaussian_base(VarianceExploding(1.0, 3.0)),
    "foellmer": PinnedBase(np.zeros(1), 1.3, 1.5),
}


@pytest.mark.parametrize("schedule", BASES)
@pytest.mark.parametrize("target", ["conditional", "target", "novel"])
def test_every_schedule_has_the_same_integral(schedule, target):
    """int eta E Tr Cov dt in the schedule's own time, eta = sigma^2 / 2."""
    base = BASES[schedule]
    first, last = 0.2 * base.horizon, 0.8 * base.horizon
    nodes, weights = leggauss(24)
    times = 0.5 * (first + last) + 0.5 * (last - first) * nodes

    def at(t):
        alpha, _, variance = base.backward(t, base.horizon)
        return float(alpha), sqrt(float(variance))

    direct = 0.0
    for t, weight in zip(times, weights, strict=True):
        found = SCALAR.conditional_variance(target, *at(t)).value
        direct += 0.5 * (last - first) * weight * 0.5 * base.sigma(t) ** 2 * found
    ends = [alpha / beta for alpha, beta in (at(first), at(last))]
    assert SCALAR.integral(target, *ends).value == pytest.approx(direct, rel=1e-9)


@pytest.mark.parametrize("k", [-0.4, 0.3, 1.0, 5.0])
def test_gaussian_base_and_quadratic_reward(k):
    targets = RegressionTargets(GaussianMixture.normal([0.7], 1 / (1 + k)), 1.0)
    expected = 0.5 * (k - log(1 + k))
    assert targets.integral("adjoint").value == pytest.approx(expected, abs=1e-14)
    assert targets.integral("novel").value == pytest.approx(expected, abs=1e-14)
    assert targets.integral("affine").value == pytest.approx(0.0, abs=1e-14)
    assert targets.noise("affine", 0.8).value == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("dim", [1, 2])
def test_mixture_formulae_on_a_gaussian(dim):
    """Two equal components are one Gaussian; both paths of the code agree."""
    mean, spread = np.array([0.3, -1.0])[:dim], np.array([0.5, 0.8])[:dim]
    one = RegressionTargets(GaussianMixture.normal(mean, spread), 0.7)
    two = RegressionTargets(
        GaussianMixture.from_weights([0.4, 0.6], [mean, mean], [spread, spread]), 0.7
    )
    for target in TARGETS:
        for rho in (0.05, 1.0, 30.0):
            expected, (value, bound) = one.noise(target, rho), two.noise(target, rho)
            assert abs(value - expected.value) <= bound + expected.bound, (target, rho)
        expected, (value, bound) = (t.integral(target, 0.1, 20.0) for t in (one, two))
        assert abs(value - expected.value) <= bound + expected.bound, target


@pytest.mark.parametrize("name", ["follmer", "scalar"])
def test_logarithmic_sobolev_gap(name):
    """E|grad log(p*/q)|^2/(2m) - KL(p* || q), q = N(0, I/m), by quadrature."""
    if name == "follmer":
        problem = sdebench.problem("follmer_mixture", dim=1, noise_level=1.2)
        targets, target = RegressionTargets.of(problem), "adjoint"
        law, m = problem.truth.ideal_law(), 1.0 / 1.2**2
    else:
        targets, target, law, m = SCALAR, "novel", LAW.normalized(), 1.0

    def integrand(x):
        point = np.array([x])
        value = float(law.log_density(point))
        gap = value - 0.5 * log(m / (2 * pi)) + 0.5 * m * x * x
        slope = float(law.score(point)[0]) + m * x
        return np.exp(value) * (slope**2 / (2 * m) - gap)

    expected = quad(integrand, -12, 12, limit=600, epsabs=1e-12)[0]
    assert targets.integral(target).value == pytest.approx(expected, rel=1e-9)


def test_affine_integral_is_the_gap_in_stams_inequality():
    J, H = SCALAR.fisher_information.value, SCALAR.entropy().value
    power = np.exp(2 * H) / (2 * pi * np.e)
    expected = 0.5 * log(J * power)
    assert expected > 0
    assert SCALAR.integral("affine").value == pytest.approx(expected, rel=1e-11)


def test_rates_of_the_infinite_integrals():
    assert SCALAR.integral("conditional") == (inf, 0.0)
    assert SCALAR.integral("target") == (inf, 0.0)
    data = [SCALAR.integral("conditional", 1.0, r).value for r in (30.0, 3000.0)]
    assert data[1] - data[0] == pytest.approx(log(100.0), rel=1e-2)
    J = SCALAR.fisher_information.value
    noise = [SCALAR.integral("target", r, 1.0).value * r**2 for r in (0.1, 0.01)]
    assert noise[1] == pytest.approx(0.5 * J, rel=1e-3)
    assert abs(noise[1] - 0.5 * J) < abs(noise[0] - 0.5 * J)
    # the other end of each is finite
    assert SCALAR.integral("conditional", 0.0, 1.0).value < inf
    assert SCALAR.integral("target", 1.0, inf).value < inf


# ---- by exact sampling --------------------------------------------------------------
PROBLEMS = {
    "gaussian_tilt": {"dim": 3, "mean": 0.5},
    "gaussian_tilt:linear_flow": {"schedule": "linear_flow", "start_time": 0.05},
    "two_modes": {},
    "four_modes": {},
    "nine_modes": {},
    "follmer_mixture": {},
}


def build(name):
    return sdebench.problem(name.partition(":")[0], **PROBLEMS[name])


def draw(problem, t, seed, n=1 << 15):
    """Return alpha, beta and samples x_1, xi of the tilted law."""
    rng = np.random.default_rng(seed)
    alpha, _, variance = problem.family.base.backward(t, problem.time_span[1])
    x_1 = problem.truth.ideal_law().sample(rng, n)
    return float(alpha), sqrt(float(variance)), x_1, rng.standard_normal(x_1.shape)


def zero_mean(samples, what):
    error = samples.std(axis=0, ddof=1) / sqrt(len(samples))
    require_zero(samples.mean(axis=0), error, what)


def _names(problem):
    gaussian = problem.family.base.gaussian
    return [name for name in TARGETS if gaussian or name != "adjoint"]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("share", [0.15, 0.5, 0.9])
def test_sampled_noise(name, share):
    problem = build(name)
    targets = RegressionTargets.of(problem)
    start, end = problem.time_span
    alpha, beta, x_1, xi = draw(problem, start + share * (end - start), 5)
    gaps, names = [], _names(problem)
    found = targets.squared_errors(names, alpha, beta, x_1, xi)
    for target, errors in zip(names, found, strict=True):
        value, bound = targets.conditional_variance(target, alpha, beta)
        assert bound <= 1e-9 * max(value, 1.0)
        if value > 1e-12:
            gaps.append(errors / value - 1.0)
        else:
            np.testing.assert_allclose(errors, 0.0, atol=1e-18 + 1e-12 / beta**2)
    zero_mean(np.stack(gaps, axis=1), "noise over its closed form, less one")


@pytest.mark.parametrize("name", PROBLEMS)
def test_labels_have_the_score_as_conditional_mean(name):
    """E (tau - grad log p*_t) psi(x_t) = 0 for psi = 1, x, x^2; u* is the truth's."""
    problem = build(name)
    targets = RegressionTargets.of(problem)
    start, end = problem.time_span
    t = start + 0.4 * (end - start)
    alpha, beta, x_1, xi = draw(problem, t, 11)
    x_t, law = alpha * x_1 + beta * xi, problem.truth.ideal_law()
    marginal = law.push_forward(alpha, 0.0, beta**2)
    base, few = problem.family.base, x_t[:100]
    control = marginal.score(few) - gradient(base.marginal(t), few)
    control *= base.sigma(t)
    np.testing.assert_allclose(control, problem.truth.control(few, t), atol=1e-9)
    for target in _names(problem):
        m = targets.precision(target)
        c = 0.0 if m == inf else alpha**2 / (m * beta**2 + alpha**2)
        tau = c * law.score(x_1) / alpha - (1 - c) * xi / beta
        error = (tau - marginal.score(x_t))[:, :1]
        first = x_t[:, :1]
        products = np.concatenate([error, error * first, error * first**2], axis=1)
        if np.max(np.abs(error)) > 1e-9:
            zero_mean(products, f"{target}: label less the score")


def test_the_lean_adjoint_is_the_combination_path_by_path():
    problem = sdebench.problem("gaussian_tilt", dim=2, mean=-0.4)
    alpha, beta, x_1, xi = draw(problem, 0.6, 3, n=8)
    m, law = 1.0 / 0.5, problem.truth.ideal_law()
    x_t, c = alpha * x_1 + beta * xi, alpha**2 / (alpha**2 + m * beta**2)
    tau = c * law.score(x_1) / alpha - (1 - c) * xi / beta
    base = problem.truth.base_marginal(0.6).score(x_t)
    slope = 1.0 - x_1  # grad r, slope = curvature = 1
    growth, _, _ = problem.family.base.forward(0.6, 1.0)
    np.testing.assert_allclose(tau, base + growth * slope, rtol=1e-10)
    assert RegressionTargets.of(problem).precision("adjoint") == pytest.approx(m)


@pytest.mark.parametrize(
    "broken",
    [
        lambda m, rho: rho / (m + rho) if m < inf else 0.0,
        lambda m, rho: m / (m + rho**2) if m < inf else 1.0,
        lambda m, rho: rho**2 / (2 * m + rho**2) if m < inf else 0.0,
    ],
)
def test_a_wrong_share_is_seen(broken, monkeypatch):
    """A mutation of the targets' weights: sampling with the right ones disagrees."""
    rng = np.random.default_rng(1)
    x_1 = LAW.sample(rng, 1 << 15)
    xi = rng.standard_normal(x_1.shape)
    errors = SCALAR.squared_errors(["novel"], 0.7, 0.6, x_1, xi)[0]
    monkeypatch.setattr(module, "_share", broken)
    value = SCALAR.conditional_variance("novel", 0.7, 0.6).value
    with pytest.raises(AssertionError):
        zero_mean((errors / value - 1.0)[:, None], "noise")


# ---- refusals -----------------------------------------------------------------------
def test_refusals():
    with pytest.raises(NotApplicableError, match="Gaussian base only"):
        RegressionTargets(LAW).noise("adjoint", 1.0)
    with pytest.raises(UnknownNameError, match="target"):
        SCALAR.noise("targets", 1.0)
    with pytest.raises(ParameterError, match=r"base_variance 0\.0"):
        RegressionTargets(LAW, 0.0)
    with pytest.raises(ParameterError, match=r"rho 0\.0"):
        SCALAR.noise("novel", 0.0)
    with pytest.raises(ParameterError, match=r"rho_min 2\.0 and rho_max 1\.0"):
        SCALAR.integral("novel", 2.0, 1.0)
    three = GaussianMixture.isotropic(np.eye(3), 1.0)
    with pytest.raises(NotExactError, match="3 dimensions"):
        RegressionTargets(three).noise("conditional", 1.0)
    narrow = GaussianMixture.isotropic([[0.0], [1e4]], 1e-6)
    with pytest.raises(NotExactError, match="too narrow"):
        RegressionTargets(narrow).entropy()
