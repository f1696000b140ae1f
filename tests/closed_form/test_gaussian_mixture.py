"""Gaussian mixtures against 50-digit arithmetic, quadrature and each other.

Every ``check_*`` function compares an answer with a second route that shares no
formula with the library: mpmath on the definition of the density, mpmath derivatives,
or the trapezoidal rule, which converges geometrically for Gaussian integrands.  The
mutation tests at the end feed the same functions wrong signs and lost factors.
"""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdebench.closed_form.gaussian_mixture import (
    GaussianMixture,
    gauss_hermite_nodes,
)
from sdebench.closed_form.quadratic import Quadratic
from sdebench.errors import ParameterError

mp.mp.dps = 50

KINDS = ("isotropic", "diagonal", "full")
# Float64 answers of well-conditioned sums of about a hundred terms.
ROUNDING = 1e-13


def make_mixture(kind, dim=2, n_components=3, seed=0, log_mass=0.7, spread=2.0):
    """Return a random mixture with standard deviations in [0.6, 1.2]."""
    rng = np.random.default_rng([seed, dim, n_components])
    means = spread * rng.standard_normal((n_components, dim))
    sd = rng.uniform(0.6, 1.2, (n_components, dim))
    logs = rng.standard_normal(n_components)
    logs += log_mass - np.log(np.sum(np.exp(logs)))
    if kind == "isotropic":
        return GaussianMixture(logs, means, sd[:, 0] ** 2)
    if kind == "diagonal":
        return GaussianMixture(logs, means, sd**2)
    turn = np.linalg.qr(rng.standard_normal((n_components, dim, dim)))[0]
    full = turn @ (sd[..., None] ** 2 * np.swapaxes(turn, 1, 2))
    return GaussianMixture(logs, means, 0.5 * (full + np.swapaxes(full, 1, 2)))


def make_quadratic(form, dim=2, seed=0, strength=1.0):
    """Return a quadratic whose K has eigenvalues in strength * [-0.4, 0.8]."""
    rng = np.random.default_rng([seed, dim, 77])
    linear = rng.standard_normal(dim)
    values = strength * rng.uniform(-0.4, 0.8, dim)
    if form == "number":
        K = values[0]
    elif form == "diagonal":
        K = values
    else:
        turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
        K = (turn * values) @ turn.T
        K = 0.5 * (K + K.T)
    return Quadratic(rng.standard_normal(), linear, K)


def points_for(mixture, n=4, seed=5, scale=1.5):
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((n, mixture.dim)) + mixture.means[0]


# ---- second routes --------------------------------------------------------------


def mp_log_density(mixture):
    """Return the 50-digit log density, from the definition."""
    full = mixture.as_full()
    parts = []
    for w, m, C in zip(full.log_weights, full.means, full.covariances, strict=True):
        matrix = mp.matrix(C.tolist())
        scale = mp.mpf(w) - mp.log(mp.det(2 * mp.pi * matrix)) / 2
        parts.append((scale, [mp.mpf(v) for v in m], matrix**-1))

    def log_density(*x):
        logs = []
        for scale, m, precision in parts:
            away = mp.matrix([mp.mpf(a) - b for a, b in zip(x, m, strict=True)])
            logs.append(scale - (away.T * precision * away)[0] / 2)
        top = max(logs)
        return top + mp.log(mp.fsum(mp.exp(value - top) for value in logs))

    return log_density


def mp_quad(function, mixture):
    """Integrate a 1-D function over the line, split at the components."""
    marks = sorted({float(m) for m in mixture.means[:, 0]})
    width = 16 * float(np.sqrt(np.max(mixture.as_full().covariances))) + 4
    nodes = np.linspace(marks[0] - width, marks[-1] + width, 13)
    return mp.quad(function, sorted([*nodes, *marks]))


def trapezoid(mixture, *functions, n=260, half=19.0):
    """Return integrals of p f over the plane (or line), f evaluated at (M, d)."""
    axis = np.linspace(-half, half, n if mixture.dim == 2 else 6 * n)
    grid = np.stack(np.meshgrid(*[axis] * mixture.dim, indexing="ij"), -1)
    x = grid.reshape(-1, mixture.dim)
    cell = (axis[1] - axis[0]) ** mixture.dim
    log_density = mixture.log_density(x)
    return [cell * np.sum(f(x, log_density)) for f in functions]


def log_normal(x, covariance):
    """Return log N(x; 0, covariance) from the definition."""
    C = np.atleast_2d(covariance)
    square = np.sum(x * np.linalg.solve(C, x[..., None])[..., 0], axis=-1)
    return -0.5 * square - 0.5 * np.linalg.slogdet(2 * np.pi * C)[1]


def assert_close(actual, expected, relative=ROUNDING, scale=1.0):
    """Compare with an error relative to the largest entry (at least ``scale``)."""
    expected = np.asarray(expected, dtype=float)
    size = max(scale, float(np.max(np.abs(expected))))
    assert np.shape(actual) == expected.shape
    assert np.max(np.abs(actual - expected)) <= relative * size


def check_log_density(mixture, log_density, points, relative=ROUNDING):
    exact = mp_log_density(mixture)
    assert_close(log_density(points), [float(exact(*p)) for p in points], relative)


def check_score(mixture, score, points, relative=ROUNDING):
    exact = mp_log_density(mixture)
    units = np.eye(mixture.dim, dtype=int)
    for p in points:
        slope = [float(mp.diff(exact, tuple(p), tuple(unit))) for unit in units]
        assert_close(score(p), slope, relative)


def mp_hessian(mixture, p):
    exact, dim = mp_log_density(mixture), mixture.dim
    units = np.eye(dim, dtype=int)
    return np.array(
        [[float(mp.diff(exact, tuple(p), tuple(a + b))) for a in units] for b in units]
    )


def check_jacobian(mixture, jacobian, points, relative=ROUNDING):
    for p in points:
        assert_close(jacobian(p), mp_hessian(mixture, p), relative)


def check_vjp(mixture, vjp, points, relative=ROUNDING):
    vectors = np.random.default_rng(9).standard_normal(points.shape)
    for p, v in zip(points, vectors, strict=True):
        assert_close(vjp(p, v), mp_hessian(mixture, p).T @ v, relative)


def check_tilt(mixture, quadratic, tilted):
    """Pointwise identity, and the mass by an integral of the definition."""
    x = points_for(mixture, 20)
    K, b = quadratic.matrix, quadratic.linear
    value = quadratic.constant + x @ b - 0.5 * np.einsum("ni,ij,nj->n", x, K, x)
    assert_close(tilted.log_density(x), mixture.log_density(x) + value)
    if mixture.dim == 1:
        exact = mp_log_density(mixture)
        c, b1, k1 = (mp.mpf(float(v)) for v in (quadratic.constant, b[0], K[0, 0]))
        mass = mp_quad(
            lambda s: mp.exp(exact(s) + c + b1 * s - k1 * s * s / 2), mixture
        )
        assert_close(tilted.log_mass(), float(mp.log(mass)))
    else:
        (mass,) = trapezoid(mixture, lambda y, log: np.exp(log + quadratic(y)))
        assert_close(tilted.log_mass(), np.log(mass), 1e-12)


def check_push_forward(mixture, matrix, offset, noise, pushed):
    """Density of A X + a + noise as an integral over x."""
    A = np.atleast_2d(matrix)
    for y in points_for(pushed, 3):
        (value,) = trapezoid(
            mixture,
            lambda x, log, y=y: np.exp(log + log_normal(y - x @ A.T - offset, noise)),
        )
        assert_close(pushed.log_density(y), np.log(value), 1e-12)


def check_posterior(mixture, matrix, noise, y, posterior, log_evidence):
    """Bayes' rule at points, with the evidence by an integral."""
    A = np.atleast_2d(matrix)
    (evidence,) = trapezoid(
        mixture, lambda x, log: np.exp(log + log_normal(y - x @ A.T, noise))
    )
    assert_close(log_evidence, np.log(evidence), 1e-12)
    x = points_for(mixture, 8)
    joint = mixture.log_density(x) + log_normal(y - x @ A.T, noise)
    assert_close(posterior.log_density(x), joint - np.log(evidence), 1e-12)


def check_moment(mixture, order, moment):
    weight = np.exp(-mixture.log_mass())
    for index in itertools.product(range(mixture.dim), repeat=order):
        (value,) = trapezoid(
            mixture,
            lambda x, log, i=index: weight * np.exp(log) * np.prod(x[:, i], axis=1),
        )
        assert_close(moment[index], value, 1e-12)


def check_quadratic_covariance(mixture, first, second, covariance):
    def mean_of(f):
        weight = np.exp(-mixture.log_mass())
        return trapezoid(mixture, lambda x, log: weight * np.exp(log) * f(x))[0]

    e1, e2 = mean_of(first), mean_of(second)
    value = mean_of(lambda x: (first(x) - e1) * (second(x) - e2))
    assert_close(covariance, value, 1e-12)


# ---- density and score ------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_density_score_and_jacobian(kind, dim):
    mixture = make_mixture(kind, dim)
    points = points_for(mixture, 2)
    check_log_density(mixture, mixture.log_density, points)
    check_score(mixture, mixture.score, points)
    check_jacobian(mixture, mixture.score_jacobian, points)
    check_vjp(mixture, mixture.score_vjp, points)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [40.0, 1e3])
def test_tails(kind, distance):
    # At 1e3 standard deviations the log density is -5e5: densities are 0 in float64.
    # There the log density has an absolute error of 1e-10; the score keeps all digits
    # because one component takes every such point.
    mixture = make_mixture(kind)
    angles = np.array([0.3, 2.0, 4.4])
    points = distance * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    check_log_density(mixture, mixture.log_density, points, 1e-14)
    check_score(mixture, mixture.score, points)
    check_jacobian(mixture, mixture.score_jacobian, points)
    check_vjp(mixture, mixture.score_vjp, points)
    share = mixture.responsibilities(points)
    assert_close(share.sum(axis=-1), np.ones(3))


def test_tail_between_equal_components():
    # 1e3 standard deviations out on the bisector both components share the point:
    # s = (0, -1e3), and the Jacobian has the variance 9 of +-3 along the first axis.
    mixture = GaussianMixture.isotropic([[3.0, 0.0], [-3.0, 0.0]], 1.0)
    point = np.array([0.0, 1e3])
    assert_close(mixture.responsibilities(point), [0.5, 0.5])
    assert_close(mixture.score(point), [0.0, -1e3])
    assert_close(mixture.score_jacobian(point), [[8.0, 0.0], [0.0, -1.0]])


def test_responsibilities_are_component_shares():
    mixture = make_mixture("full")
    points = points_for(mixture, 6)
    shares = np.exp(
        mixture.log_component_densities(points) - mixture.log_density(points)[:, None]
    )
    assert_close(mixture.responsibilities(points), shares)
    single = [
        mp_log_density(GaussianMixture(w[None], m[None], C[None]))
        for w, m, C in zip(
            mixture.log_weights, mixture.means, mixture.covariances, strict=True
        )
    ]
    expected = [[float(f(*p)) for f in single] for p in points]
    assert_close(mixture.log_component_densities(points), expected)


def test_leading_shapes_and_blocks():
    # 40 components in d = 16 cut 300 points into blocks of 102.
    mixture = make_mixture("diagonal", dim=16, n_components=40)
    x = np.random.default_rng(0).standard_normal((3, 100, 16))
    one_by_one = np.array([[mixture.score(p) for p in row] for row in x])
    assert_close(mixture.score(x), one_by_one)
    assert mixture.log_density(x).shape == (3, 100)
    assert mixture.responsibilities(x).shape == (3, 100, 40)
    v = np.random.default_rng(1).standard_normal(16)
    jacobian = mixture.score_jacobian(x)
    assert_close(mixture.score_vjp(x, v), jacobian @ v)
    assert mixture.log_density(np.empty((0, 16))).shape == (0,)


# ---- kinds agree --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["isotropic", "diagonal"])
def test_kinds_agree(kind):
    cheap = make_mixture(kind)
    x, y = points_for(cheap, 5), points_for(cheap, 4, seed=6)
    q = make_quadratic("number" if kind == "isotropic" else "diagonal")
    other = make_quadratic("full", seed=3)
    matrix = np.array([[0.4, -0.3], [0.2, 0.9]])

    def answers(m):
        tilted = m.tilt(q)
        law = m.posterior(y, 0.7, 0.2)
        return [
            m.log_density(x),
            m.score(x),
            m.score_jacobian(x),
            m.score_vjp(x, y[0]),
            m.push_forward(0.7, 0.1, 0.2).log_density(x),
            m.push_forward([0.7, -0.3], [0.1, 0.4], [0.2, 0.3]).log_density(x),
            m.push_forward(matrix, 0.0, 0.2).log_density(x),
            tilted.log_density(x),
            tilted.log_weights,
            m.tilt(other).log_density(x),
            np.array([m.covariance_of_quadratics(q, other)]),
            np.array([m.covariance_of_quadratics(other, other)]),
            np.array([m.covariance_of_quadratics(q, q)]),
            np.array([m.expectation_quadratic(other)]),
            m.raw_moment(4),
            m.covariance(),
            law.log_weights,
            law.mean(),
            law.covariance(),
            law.expectation_quadratic(other),
            law.covariance_of_quadratics(q, other),
            m.tilt_derivative(q)[0],
            m.tilt_derivative(q)[1],
        ]

    forms = [cheap, cheap.as_full()] + ([cheap.as_diagonal()] * (kind == "isotropic"))
    for form in forms[1:]:
        for got, expected in zip(answers(form), answers(cheap), strict=True):
            assert_close(got, expected)


def test_kinds_are_kept():
    isotropic = make_mixture("isotropic")
    assert isotropic.tilt(make_quadratic("number")).kind == "isotropic"
    assert isotropic.tilt(make_quadratic("diagonal")).kind == "diagonal"
    assert isotropic.tilt(make_quadratic("full")).kind == "full"
    assert isotropic.push_forward(0.5, 1.0, 2.0).kind == "isotropic"
    assert isotropic.push_forward([0.5, 1.0], 0.0, 2.0).kind == "diagonal"
    assert isotropic.push_forward(0.5, 0.0, [1.0, 2.0]).kind == "diagonal"
    assert isotropic.push_forward(np.eye(2)).kind == "full"
    assert isotropic.condition(0.5, 0.1, np.zeros(2)).kind == "isotropic"
    diagonal = make_mixture("diagonal")
    assert diagonal.tilt(make_quadratic("number")).kind == "diagonal"
    assert diagonal.as_full().as_diagonal().kind == "diagonal"
    both = GaussianMixture.superposition([isotropic, diagonal])
    assert both.kind == "diagonal"
    assert_close(both.log_mass(), np.log(2) + 0.7)


# ---- push-forward and conditioning --------------------------------------------------

OBSERVATIONS = [
    (0.7, 0.3),
    (0.7, [0.3, 0.5]),
    ([0.7, -1.1], 0.3),
    ([[0.7, 0.2], [-0.5, 1.1]], [[0.5, 0.2], [0.2, 0.4]]),
    ([[0.7, -0.4]], 0.3),
]


def dense(value, dim):
    value = np.asarray(value, dtype=float)
    return value if value.ndim == 2 else value * np.eye(dim)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("matrix", "noise"), OBSERVATIONS)
def test_observation(kind, matrix, noise):
    mixture = make_mixture(kind)
    A = dense(matrix, 2)
    B = dense(noise, A.shape[0])
    offset = np.array([0.3, -0.2])[: A.shape[0]]
    pushed = mixture.push_forward(matrix, offset, noise)
    check_push_forward(mixture, A, offset, B, pushed)
    y = np.array([0.4, -0.9])[: A.shape[0]]
    batch = mixture.posterior(np.stack([y, y + 1]), matrix, noise)
    single = mixture.condition(matrix, noise, y)
    check_posterior(mixture, A, B, y, single, batch.log_evidence[0])
    assert_close(single.log_mass(), 0.0)
    first = batch.at(0)
    assert_close(first.means, single.means)
    assert_close(first.log_weights, single.log_weights)
    assert_close(first.covariances, single.covariances)


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_is_denoising_by_tweedie(kind):
    # E[X | y] = (y + b s(y)) / a and Cov[X | y] = b/a^2 (I + b grad s(y)), with s the
    # score of the noised law: two formulas without a posterior.
    mixture = make_mixture(kind)
    a, b = 0.6, 0.35
    noised = mixture.push_forward(a, 0.0, b)
    y = points_for(mixture, 5)
    law = mixture.posterior(y, a, b)
    assert_close(law.mean(), (y + b * noised.score(y)) / a)
    expected = b / a**2 * (np.eye(2) + b * noised.score_jacobian(y))
    assert_close(law.covariance(), expected)
    assert_close(law.log_evidence, noised.log_density(y))
    # The law of total expectation, through a quadrature over y.
    q1, q2 = make_quadratic("full"), make_quadratic("diagonal", seed=2)
    w, nodes = gauss_hermite_nodes(noised, 40)
    given_y = mixture.posterior(nodes, a, b)
    e1, e2 = (given_y.expectation_quadratic(q) for q in (q1, q2))
    mean1, mean2 = w @ e1, w @ e2
    # The posterior mean is smooth, not polynomial: 40 nodes leave 1e-7.
    assert_close(mean1, mixture.expectation_quadratic(q1), 1e-6)
    total = w @ given_y.covariance_of_quadratics(q1, q2)
    total += w @ ((e1 - mean1) * (e2 - mean2))
    assert_close(total, mixture.covariance_of_quadratics(q1, q2), 1e-6)


@pytest.mark.parametrize("noise", [1e-12, 1e12])
@pytest.mark.parametrize("kind", KINDS)
def test_posterior_at_extreme_noise(kind, noise):
    mixture = make_mixture(kind)
    y = np.array([0.4, -0.9])
    law = mixture.condition(1.0, noise, y)
    # First order in the small ratio of the variances, whose square is below rounding.
    if noise < 1:
        assert_close(law.mean(), y, 1e-10)
        assert_close(law.as_full().covariances, [noise * np.eye(2)] * 3, 1e-10, noise)
    else:
        assert_close(law.means, mixture.means, 1e-10)
        assert_close(law.as_full().covariances, mixture.as_full().covariances, 1e-10)


# ---- tilts --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["number", "diagonal", "full"])
@pytest.mark.parametrize("dim", [1, 2])
def test_tilt(kind, form, dim):
    mixture = make_mixture(kind, dim)
    for seed in range(2):
        quadratic = make_quadratic(form, dim, seed)
        check_tilt(mixture, quadratic, mixture.tilt(quadratic))


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 10.0, 1e4])
def test_two_mode_table(beta):
    # 1/2 N(3, 1) + 1/2 N(-3, 1) under the reward -beta (x - 3)^2 / 2.
    mixture = GaussianMixture.isotropic([[3.0], [-3.0]], 1.0)
    tilted = mixture.tilt(Quadratic.centered([3.0], beta))
    closed = -math.log(0.5 / math.sqrt(1 + beta))
    closed -= math.log1p(math.exp(-18 * beta / (1 + beta)))
    assert_close(-tilted.log_mass(), closed, 4e-15)


@pytest.mark.parametrize(
    ("beta", "minus_log_z"),
    [
        (0.1, 0.56291828821111341),
        (1.0, 1.0395973686501947),
        (10.0, 1.8920947387309902),
    ],
)
def test_two_mode_table_by_integration(beta, minus_log_z):
    mixture = GaussianMixture.isotropic([[3.0], [-3.0]], 1.0)
    exact = mp_log_density(mixture)
    z = mp_quad(lambda x: mp.exp(exact(x) - mp.mpf(beta) * (x - 3) ** 2 / 2), mixture)
    assert_close(minus_log_z, -float(mp.log(z)), 1e-14)
    tilted = mixture.tilt(Quadratic.centered([3.0], beta))
    assert_close(-tilted.log_mass(), minus_log_z, 1e-14)


def test_tilt_by_a_mixture_of_exponentials():
    mixture = make_mixture("isotropic")
    quadratics = [make_quadratic(form, seed=i) for i, form in enumerate(("full",) * 3)]
    logs = np.array([0.2, -1.0, 0.5])
    tilted = mixture.tilt_mixture(quadratics, logs)
    assert tilted.n_components == 9

    def factor(x):
        return sum(np.exp(c + q(x)) for c, q in zip(logs, quadratics, strict=True))

    x = points_for(mixture, 10)
    assert_close(tilted.log_density(x), mixture.log_density(x) + np.log(factor(x)))
    (mass,) = trapezoid(mixture, lambda y, log: np.exp(log) * factor(y))
    assert_close(tilted.log_mass(), np.log(mass), 1e-12)


def test_product_and_ratio():
    first, second = make_mixture("diagonal"), make_mixture("full", seed=4)
    x = points_for(first, 10)
    product = first.times(second)
    assert_close(product.log_density(x), first.log_density(x) + second.log_density(x))
    wide = GaussianMixture.normal([0.5, -0.5], [[4.0, 0.5], [0.5, 3.0]], log_mass=0.3)
    ratio = first.divided_by(wide)
    assert_close(ratio.log_density(x), first.log_density(x) - wide.log_density(x))
    back = ratio.times(wide)
    assert_close(back.log_weights, first.log_weights)
    assert_close(back.means, first.means)
    assert_close(back.covariances, first.as_full().covariances)


@pytest.mark.parametrize("kind", KINDS)
def test_strong_tilts_keep_digits(kind):
    # A nearly deterministic tilt, against its convolution form in mpmath, and one that
    # leaves 1e-6 of the precision.
    mixture = make_mixture(kind, dim=1)
    K = 1e8
    sharp = mixture.tilt(Quadratic.centered([1.0], K))
    blurred = mp_log_density(mixture.push_forward(1.0, 0.0, 1 / K))
    mass = blurred(1) + mp.log(2 * mp.pi / K) / 2
    # The expanded square c + b x - K x^2 / 2 rounds terms of size K: 1e8 * 2e-16.
    assert_close(sharp.log_mass(), float(mass), 3e-16 * K)
    assert_close(np.diag(sharp.covariance()), [1 / K], 1e-7, 1 / K)
    precision = 1 / np.max(mixture.as_full().covariances)
    weak = mixture.tilt(Quadratic(0.0, np.zeros(1), -precision * (1 - 1e-6)))
    # The condition number of the subtraction is 1e6.
    assert_close(np.max(weak.as_full().covariances) * precision, 1e6, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["number", "diagonal", "full"])
def test_tilt_derivative(kind, form):
    mixture = make_mixture(kind)
    quadratic = make_quadratic(form)
    derivative = mixture.tilt_derivative(quadratic)
    rank = max(mixture.covariances.ndim, derivative[2].ndim)
    step = 1e-3

    def fields(e):
        tilted = mixture.tilt(e * quadratic)
        tilted = tilted.as_full() if rank == 3 else tilted
        return tilted.log_weights, tilted.means, tilted.covariances

    # Central differences of order four: truncation 1e-12, rounding 1e-13.
    f = {k: fields(k * step) for k in (-2, -1, 1, 2)}
    for i, exact in enumerate(derivative):
        slope = (8 * (f[1][i] - f[-1][i]) - (f[2][i] - f[-2][i])) / (12 * step)
        assert_close(exact, slope, 1e-10)


def test_log_normalizer_gradient_is_the_tilted_expectation():
    mixture = make_mixture("full")
    features = [make_quadratic("full", seed=i, strength=0.3) for i in range(2)]
    theta = np.array([0.4, -0.3])
    tilted = mixture.tilt(features[0] * theta[0] + features[1] * theta[1])
    law_weights = tilted.weights
    for phi in features:
        slope = law_weights @ tilted.tilt_derivative(phi)[0]
        assert_close(slope, tilted.expectation_quadratic(phi))


# ---- moments ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_raw_moments(kind, order):
    mixture = make_mixture(kind)
    moment = mixture.raw_moment(order)
    check_moment(mixture, order, moment)
    w, x = gauss_hermite_nodes(mixture, 4)
    axes = "abcd"[:order]
    spec = ",".join(["n", *(f"n{a}" for a in axes)]) + f"->{axes}"
    assert_close(moment, np.einsum(spec, w, *[x] * order))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "forms",
    list(itertools.product(["number", "diagonal", "full"], ["diagonal", "full"])),
)
def test_quadratic_moments(kind, forms):
    mixture = make_mixture(kind)
    first, second = (make_quadratic(form, seed=i) for i, form in enumerate(forms))
    covariance = mixture.covariance_of_quadratics(first, second)
    check_quadratic_covariance(mixture, first, second, covariance)
    assert_close(mixture.covariance_of_quadratics(second, first), covariance)
    weight = np.exp(-mixture.log_mass())
    (mean,) = trapezoid(mixture, lambda x, log: weight * np.exp(log) * first(x))
    assert_close(mixture.expectation_quadratic(first), mean, 1e-12)
    w, x = gauss_hermite_nodes(mixture, 6)
    away = [q(x) - w @ q(x) for q in (first, second)]
    assert_close(w @ (away[0] * away[1]), covariance)


def test_quadratic_covariance_far_from_the_origin():
    # The same law and functions moved by 1e6: a difference of raw moments would lose
    # all digits (values of 1e12); the gradient at the means keeps 1e-10.
    mixture, q = make_mixture("full"), make_quadratic("full")
    shift = np.array([1e6, -2e6])
    K = q.matrix
    moved = Quadratic(0.0, q.linear + K @ shift, K)
    expected = mixture.covariance_of_quadratics(q, q)
    there = mixture.push_forward(1.0, shift)
    assert_close(there.covariance_of_quadratics(moved, moved), expected, 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_and_covariance(kind):
    mixture = make_mixture(kind, dim=3)
    first, second = mixture.raw_moment(1), mixture.raw_moment(2)
    assert_close(mixture.mean(), first)
    assert_close(mixture.covariance(), second - np.outer(first, first))


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_gauss_hermite_converges(dim):
    mixture = make_mixture("full", dim, seed=1)
    wave = np.arange(1.0, dim + 1) * 0.4
    # E exp(i wave.X) in closed form for an integrand that is no polynomial.
    phase = mixture.means @ wave
    decay = np.einsum("i,kij,j->k", wave, mixture.covariances, wave)
    exact = mixture.weights @ (np.cos(phase) * np.exp(-decay / 2))
    errors = []
    for order in (6, 12, 24):
        w, x = gauss_hermite_nodes(mixture, order)
        assert_close(w.sum(), 1.0)
        errors.append(abs(w @ np.cos(x @ wave) - exact))
    # The change under doubling bounds the error of the coarser rule.
    assert errors[1] < 0.1 * errors[0] + 1e-14
    assert errors[2] < 1e-13


def test_sampling():
    # Five first and second moments for three kinds: 15 two-sided comparisons at a
    # joint false-alarm rate of 1e-6 (z = 5.4), standard errors from exact moments.
    n = 40_000
    for kind in KINDS:
        mixture = make_mixture(kind)
        x = mixture.sample(np.random.default_rng(3), n)
        assert np.max(np.abs(moment_z_scores(mixture, x))) < 5.4
        assert np.max(np.abs(moment_z_scores(mixture, 1.05 * x))) > 5.4
    again = mixture.sample(np.random.default_rng(3), n)
    np.testing.assert_array_equal(x, again)


def moment_z_scores(mixture, x):
    n = len(x)
    mean, second = mixture.raw_moment(1), mixture.raw_moment(2)
    fourth = mixture.raw_moment(4)
    scores = list((x.mean(0) - mean) / np.sqrt(np.diag(mixture.covariance()) / n))
    for i, j in ((0, 0), (0, 1), (1, 1)):
        sd = np.sqrt((fourth[i, j, i, j] - second[i, j] ** 2) / n)
        scores.append((np.mean(x[:, i] * x[:, j]) - second[i, j]) / sd)
    return np.array(scores)


# ---- quadratics ---------------------------------------------------------------------


def test_quadratic_algebra():
    x = np.random.default_rng(0).standard_normal((5, 2))
    forms = [make_quadratic(f, seed=i) for i, f in enumerate(("number", "full"))]
    for a, b in itertools.product(forms, forms):
        assert_close((a + b)(x), a(x) + b(x))
        assert_close((a - b)(x), a(x) - b(x))
        assert_close((np.float64(2) * a * -0.5)(x), -a(x))
    exact = mp_log_density(GaussianMixture.normal([0.3, -1], [[2, 0.5], [0.5, 1]]))
    q = Quadratic.log_normal([0.3, -1], [[2, 0.5], [0.5, 1]])
    assert_close(q(x), [float(exact(*p)) for p in x])
    slope = [float(mp.diff(exact, tuple(x[0]), unit)) for unit in ((1, 0), (0, 1))]
    assert_close(q.gradient(x[0]), slope)
    centered = Quadratic.centered([1.0, 2.0], [3.0, 4.0], 0.5)
    assert_close(centered(np.array([2.0, 1.0])), 0.5 - 1.5 - 2.0)


# ---- refusals -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("covariances", "message"),
    [
        ([1.0, -0.25], "component 1 is not positive definite: eigenvalue -0.25"),
        ([[1.0, 2.0], [0.0, 1.0]], "component 1 .*eigenvalue 0;"),
        ([np.eye(2), [[1, 2], [2, 1]]], "component 1 .*eigenvalue -1;"),
        ([np.eye(2), [[1, 0.5], [0, 1]]], "covariances is not symmetric"),
        ([1.0, np.nan], r"covariances has the entry nan at \(1,\)"),
        ([1.0, 1.0, 1.0], r"covariances has shape \(3,\)"),
    ],
)
def test_refused_covariances(covariances, message):
    with pytest.raises(ParameterError, match=message):
        GaussianMixture(np.zeros(2), np.zeros((2, 2)), np.array(covariances))


@pytest.mark.parametrize("kind", KINDS)
def test_refused_tilts(kind):
    covariances = {
        "isotropic": np.array([0.5, 4.0]),
        "diagonal": np.array([[0.5, 0.5], [4.0, 1.0]]),
        "full": np.array([0.5 * np.eye(2), np.diag([4.0, 1.0])]),
    }[kind]
    mixture = GaussianMixture(np.zeros(2), np.zeros((2, 2)), covariances)
    for K in (-0.3, np.array([-0.3, 0.0]), np.diag([-0.3, 0.0])):
        with pytest.raises(
            ParameterError, match=r"component 1 is not integrable.*eigenvalue -0\.05"
        ):
            mixture.tilt(Quadratic(0.0, np.zeros(2), K))
        mixture.tilt(Quadratic(0.0, np.zeros(2), 0.8 * np.asarray(K)))
    with pytest.raises(ParameterError, match="not integrable"):
        mixture.tilt(Quadratic(0.0, np.zeros(2), -0.25))
    with pytest.raises(ParameterError, match="not integrable"):
        mixture.divided_by(GaussianMixture.normal(np.zeros(2), 3.0))
    with pytest.raises(ParameterError, match="2 components"):
        mixture.divided_by(mixture)


def test_refused_arguments():
    mixture = make_mixture("full")
    refused = [
        (
            lambda: GaussianMixture.from_weights([1, 0], np.zeros((2, 1)), 1.0),
            "weights",
        ),
        (lambda: GaussianMixture([0.0, np.inf], np.zeros((2, 1)), np.ones(2)), "inf"),
        (lambda: GaussianMixture([0.0], np.zeros((2, 1)), np.ones(2)), "log_weights"),
        (lambda: GaussianMixture([0.0], np.zeros(1), np.ones(1)), "means has shape"),
        (lambda: mixture.log_density(np.zeros(3)), "points have shape"),
        (lambda: mixture.as_diagonal(), "component 2 is not diagonal"),
        (lambda: mixture.push_forward(np.eye(3)), "matrix has shape"),
        (lambda: mixture.push_forward(1.0, np.zeros(3)), "offset has shape"),
        (lambda: mixture.push_forward(1.0, 0.0, -0.1), "eigenvalue -0.1"),
        (lambda: mixture.push_forward(0.0), "not positive definite"),
        (lambda: mixture.posterior(np.zeros(2), 1.0, 0.0), "give positive"),
        (lambda: mixture.tilt(make_quadratic("full", 3)), "dimension 3 on a mixture"),
        (lambda: mixture.raw_moment(5), "order 5"),
        (lambda: make_mixture("isotropic", 99).raw_moment(4), "more than"),
        (lambda: gauss_hermite_nodes(make_mixture("full", 4), 3), "dimension 4"),
        (lambda: gauss_hermite_nodes(mixture, 0), "order 0"),
        (lambda: GaussianMixture.superposition([]), "no mixtures"),
        (lambda: mixture.tilt_mixture([make_quadratic("full")], [0, 1]), "log_coeff"),
        (lambda: Quadratic(np.inf, np.zeros(2)), "constant"),
        (lambda: Quadratic(0.0, np.zeros(2), np.zeros(3)), "quadratic has shape"),
        (lambda: Quadratic(0.0, np.zeros(2), [[0, 1], [0, 0]]), "not symmetric"),
        (lambda: Quadratic.log_normal(np.zeros(2), -1.0), "eigenvalue -1"),
    ]
    for call, message in refused:
        with pytest.raises(ParameterError, match=message):
            call()


def test_values_are_immutable():
    means = np.zeros((1, 2))
    mixture = GaussianMixture(np.zeros(1), means, np.ones(1))
    means[0, 0] = 5.0
    assert mixture.means[0, 0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        mixture.means[0, 0] = 1.0


# ---- properties ---------------------------------------------------------------------

cases = st.builds(
    lambda kind, dim, n, seed: make_mixture(kind, dim, n, seed),
    st.sampled_from(KINDS),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 10_000),
)
forms = st.sampled_from(["number", "diagonal", "full"])
seeds = st.integers(0, 10_000)
property_test = settings(derandomize=True, max_examples=40, deadline=None)


def assert_same_law(first, second, relative=1e-11):
    a, b = first.as_full(), second.as_full()
    assert_close(a.log_weights, b.log_weights, relative)
    assert_close(a.means, b.means, relative)
    assert_close(a.covariances, b.covariances, relative)


@property_test
@given(cases, forms, forms, seeds)
def test_tilts_add(mixture, form1, form2, seed):
    q1 = make_quadratic(form1, mixture.dim, seed, 0.5)
    q2 = make_quadratic(form2, mixture.dim, seed + 1, 0.5)
    both = mixture.tilt(q1 + q2)
    assert_same_law(mixture.tilt(q1).tilt(q2), both)
    assert_same_law(both.tilt(-(q1 + q2)), mixture)
    # Masses multiply: Z(q1 + q2) / Z(q1) is the mass of q2 on the normalized tilt.
    step = mixture.tilt(q1).normalized().tilt(q2).log_mass()
    assert_close(mixture.tilt(q1).log_mass() + step, both.log_mass(), 1e-11)


@property_test
@given(cases, seeds)
def test_push_forwards_compose(mixture, seed):
    rng = np.random.default_rng(seed)
    d = mixture.dim
    A1, A2 = rng.standard_normal((2, d, d)) + 2 * np.eye(d)
    a1, a2 = rng.standard_normal((2, d))
    b1, b2 = rng.uniform(0.1, 1, 2)
    B = A2 @ A2.T * b1 + b2 * np.eye(d)
    twice = mixture.push_forward(A1, a1, b1).push_forward(A2, a2, b2)
    assert_same_law(twice, mixture.push_forward(A2 @ A1, A2 @ a1 + a2, B))
    assert_close(twice.log_mass(), mixture.log_mass())


@property_test
@given(cases, seeds)
def test_observing_is_tilting(mixture, seed):
    """The posterior is the normalized tilt by the log likelihood."""
    rng = np.random.default_rng(seed)
    y = rng.standard_normal(mixture.dim)
    a, b = rng.uniform(0.3, 1.5, 2)
    tilted = mixture.tilt(
        Quadratic.centered(y / a, a * a / b)
        + Quadratic(-0.5 * mixture.dim * np.log(2 * np.pi * b), np.zeros(mixture.dim))
    )
    law = mixture.posterior(y, a, b)
    assert_close(law.log_evidence, tilted.log_mass(), 1e-11)
    assert_same_law(law.at(()), tilted.normalized())


@property_test
@given(cases, forms, forms, seeds)
def test_tilted_covariance_is_the_derivative_of_the_mean(mixture, form1, form2, seed):
    """d/de E_tilted[q1] under tilt(e q2) at 0 is Cov(q1, q2)."""
    q1 = make_quadratic(form1, mixture.dim, seed)
    q2 = make_quadratic(form2, mixture.dim, seed + 1)
    h = 1e-3
    e = {k: mixture.tilt(k * h * q2).expectation_quadratic(q1) for k in (-2, -1, 1, 2)}
    slope = (8 * (e[1] - e[-1]) - (e[2] - e[-2])) / (12 * h)
    exact = mixture.covariance_of_quadratics(q1, q2)
    # Truncation h^4 times a fifth derivative; the scale is that of the fluctuations.
    size = np.sqrt(
        mixture.covariance_of_quadratics(q1, q1)
        * mixture.covariance_of_quadratics(q2, q2)
    )
    assert abs(exact) <= size * (1 + 1e-12)
    assert abs(slope - exact) <= 1e-6 * max(1.0, size)


# ---- mutations: the checks must fail on wrong formulas -------------------------------


def fails(check, *args):
    with pytest.raises(AssertionError):
        check(*args)


@pytest.mark.parametrize("kind", KINDS)
def test_checks_catch_wrong_scores(kind):
    m = make_mixture(kind)
    x = points_for(m, 1)
    fails(check_log_density, m, lambda p: m.normalized().log_density(p), x)
    fails(check_log_density, m, lambda p: m.log_density(p) + 1e-12 * m.dim, x)
    fails(check_score, m, lambda p: -m.score(p), x)
    fails(check_score, m, lambda p: 0.5 * m.score(p), x)
    outer = np.multiply.outer
    fails(
        check_jacobian,
        m,
        lambda p: m.score_jacobian(p) + outer(m.score(p), m.score(p)),
        x,
    )
    fails(check_jacobian, m, lambda p: -m.score_jacobian(p), x)
    fails(check_vjp, m, lambda p, v: m.score_vjp(p, -v), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 2])
def test_checks_catch_wrong_tilts(kind, dim):
    m, q = make_mixture(kind, dim), make_quadratic("number", dim)
    c, b, K = q.constant, q.linear, q.quadratic
    right = m.tilt(q)
    for wrong in (
        m.tilt(Quadratic(c, -b, K)),
        m.tilt(Quadratic(c, b, -0.5 * K)),
        m.tilt(Quadratic(c, b, 2 * K)),
        m.tilt(Quadratic(0.0, b, K)),
        right.normalized(),
        # The log-determinant without its 1/2.
        GaussianMixture(
            right.log_weights + 0.5 * np.log(right.weights), right.means, m.covariances
        ),
        right.scaled(1e-11),
    ):
        fails(check_tilt, m, q, wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_checks_catch_wrong_observations(kind):
    m = make_mixture(kind)
    A, B, y = 0.7 * np.eye(2), 0.3 * np.eye(2), np.array([0.4, -0.9])
    evidence = m.posterior(y, 0.7, 0.3).log_evidence
    right = m.condition(0.7, 0.3, y)
    fails(check_push_forward, m, A, 0.0, B, m.push_forward(-0.7, 0.0, 0.3))
    fails(check_push_forward, m, A, 0.0, B, m.push_forward(0.7, 0.0, 0.15))
    fails(check_push_forward, m, A, 0.1, B, m.push_forward(0.7, -0.1, 0.3))
    fails(check_posterior, m, A, B, y, m.condition(0.7, 0.3, -y), evidence)
    fails(check_posterior, m, A, B, y, m.condition(0.7, 0.09, y), evidence)
    fails(check_posterior, m, A, B, y, right, evidence - m.log_mass())
    unweighted = GaussianMixture(
        m.normalized().log_weights, right.means, right.covariances
    )
    fails(check_posterior, m, A, B, y, unweighted, evidence)


@pytest.mark.parametrize("kind", KINDS)
def test_checks_catch_wrong_moments(kind):
    m = make_mixture(kind)
    q1, q2 = make_quadratic("full"), make_quadratic("diagonal", seed=1)
    right = m.covariance_of_quadratics(q1, q2)
    C, K1, K2 = m.as_full().covariances, q1.matrix, q2.matrix
    trace = m.weights @ np.einsum("ij,kjl,ln,kni->k", K1, C, K2, C)
    values = [q(m.means) - 0.5 * np.einsum("ij,kij->k", q.matrix, C) for q in (q1, q2)]
    between = m.weights @ np.prod([v - m.weights @ v for v in values], axis=0)
    for wrong in (
        right + 0.5 * trace,
        right - between,
        -right,
        m.covariance_of_quadratics(q1, Quadratic(0.0, q2.linear, -q2.quadratic)),
        right * (1 + 1e-10),
    ):
        fails(check_quadratic_covariance, m, q1, q2, wrong)
    for order in (2, 3, 4):
        pure = np.einsum(
            "k," + ",".join(f"k{a}" for a in "abcd"[:order]) + "->" + "abcd"[:order],
            m.weights,
            *[m.means] * order,
        )
        fails(check_moment, m, order, pure)
        fails(check_moment, m, order, np.exp(m.log_mass()) * m.raw_moment(order))
