"""The tilting family on its own: mixtures in any schedule, any theta, any start."""

from __future__ import annotations

import dataclasses

import mpmath
import numpy as np
import pytest

from sdebench.closed_form import log_quadratics as lq
from sdebench.closed_form.base_process import (
    ConstantNoiseBase,
    MemorylessBase,
    PinnedBase,
)
from sdebench.closed_form.schedule import (
    Cosine,
    LinearFlow,
    VarianceExploding,
    VariancePreserving,
)
from sdebench.closed_form.tilting import StartLaw, TiltingFamily
from sdebench.errors import NotExactError, NumericalError, ParameterError

FEATURES = np.array(
    [
        # lin_1, lin_2, quad_1, quad_2, const
        [1.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 0.0, 0.0, 0.3],
        [0.0, 0.0, -0.5, -0.5, 0.0],
        [0.2, 0.0, -0.3, 0.1, 0.0],
    ]
)
STAR = np.array([0.6, -0.4, 0.5, 0.3])
# exp of the reference reward: a sum of two exp-quadratics
REFERENCE = np.array([[0.3, 0.1, -0.1, -0.2, 0.0], [-0.5, 0.2, -0.05, 0.0, -0.4]])


def mixture(schedule, start_time=0.0):
    return MemorylessBase(
        schedule,
        np.log([0.2, 0.5, 0.3]),
        np.array([[1.0, -0.5], [-1.5, 0.3], [0.2, 2.0]]),
        np.array([[0.3, 0.6], [0.8, 0.5], [0.5, 0.4]]),
        start_time,
    )


def marginal_start(base):
    masses, means, variances = lq.gaussian_parameters(base.marginal(base.start_time))
    return StartLaw(np.exp(masses), means, np.sqrt(variances))


NORMAL = StartLaw(np.ones(1), np.array([[0.1, -0.2]]), np.array([[0.8, 1.1]]))
POINT = StartLaw(np.ones(1), np.array([[0.4, -0.7]]), np.zeros((1, 2)))
PAIR = StartLaw(
    np.array([0.3, 0.7]), np.array([[0.4, 0.1], [-1.0, 0.2]]), np.full((2, 2), 0.5)
)


def family(base, start, reference=REFERENCE, **options):
    return TiltingFamily(
        base=base,
        features=FEATURES,
        reference=reference,
        constant=0.2,
        theta_star=STAR,
        start=start,
        **options,
    )


VP = mixture(VariancePreserving(1.0, 3.0))
FAMILIES = {
    "vp, marginal": family(VP, marginal_start(VP), start_is_marginal=True),
    "vp, normal": family(VP, NORMAL),
    "vp, pair": family(VP, PAIR),
    "vp, point": family(VP, POINT),
    "flow, normal": family(mixture(LinearFlow(1.0), 0.1), NORMAL),
    "cosine, point": family(mixture(Cosine(2.0), 0.2), POINT),
    "ve, normal": family(mixture(VarianceExploding(1.0, 3.0)), NORMAL),
    "constant, two tilts": family(
        ConstantNoiseBase(LinearFlow(1.0), np.array([0.5, -0.3]), 0.6, 0.8), NORMAL
    ),
    "constant, affine": family(
        ConstantNoiseBase(Cosine(1.0), np.array([0.5, -0.3]), 0.6, 0.8),
        PAIR,
        REFERENCE[:1],
    ),
    "pinned": family(PinnedBase(np.array([0.4, -0.7]), 0.9, 1.5), POINT),
}
every = pytest.mark.parametrize("given", FAMILIES.values(), ids=FAMILIES.keys())
THETAS = [np.zeros(4), STAR, np.array([-0.5, 0.8, 0.9, -0.4])]


def slope(function, step=0.01):
    weights = np.array([5 / 6, -5 / 21, 5 / 84, -5 / 504, 1 / 1260])
    return (
        sum(
            c * (function(k * step) - function(-k * step))
            for k, c in enumerate(weights, 1)
        )
        / step
    )


def points(seed=0, count=10):
    return np.random.default_rng(seed).normal(size=(count, 2))


def times(given, *shares):
    base = given.base
    return [base.start_time + s * (base.horizon - base.start_time) for s in shares]


@every
@pytest.mark.parametrize("theta", THETAS, ids=["zero", "star", "far"])
def test_hjb_at_every_theta(given, theta):
    """u_theta is the optimal control of the wrong reward: HJB holds for log h_theta."""
    x, base = points(), given.base
    for t in times(given, 0.1, 0.5, 0.9):
        step = min(0.002, 0.15 * (t - base.start_time), 0.15 * (base.horizon - t))
        sigma, u = base.sigma(t), given.control(x, t, theta)
        gradient = u / sigma
        hessian = given.log_h_hessian(x, t, theta)
        for j, e in enumerate(np.eye(2)):
            first = slope(lambda s, e=e, t=t: given.log_h(x + s * e, t, theta))
            second = slope(lambda s, e=e, t=t: given.control(x + s * e, t, theta))
            np.testing.assert_allclose(gradient[:, j], first, atol=1e-10)
            np.testing.assert_allclose(hessian[:, j], second / sigma, atol=1e-9)
        terms = np.array(
            [
                slope(lambda s, t=t: given.log_h(x, t + s, theta), step),
                np.sum(base.drift(x, t) * gradient, axis=1),
                0.5 * sigma**2 * np.trace(hessian, axis1=1, axis2=2),
                0.5 * np.sum(u**2, axis=1),
            ]
        )
        residual = np.abs(terms.sum(axis=0)) / np.abs(terms).sum(axis=0)
        assert residual.max() < 1e-9
    end = given.log_h(x, base.horizon, theta)
    wanted = lq.log_value(given.reward_rows(theta), x)
    np.testing.assert_allclose(end, wanted, atol=1e-12)


@every
def test_derivative_rows(given):
    """The rows' derivative in theta gives that of log h_theta."""
    x, theta = points(), THETAS[2]
    for t in times(given, 0.0, 0.6):
        _, tilted, derivative = given.tilt_rows(theta, t)
        gamma = lq.weights(tilted, x)
        for p, e in enumerate(np.eye(4)):
            values = lq.terms(derivative[p], x)
            wanted = slope(lambda s, e=e, t=t: given.log_h(x, t, theta + s * e))
            np.testing.assert_allclose(np.sum(gamma * values, 1), wanted, atol=1e-10)
            rows = slope(lambda s, e=e, t=t: given.tilt_rows(theta + s * e, t)[1])
            np.testing.assert_allclose(derivative[p], rows, atol=1e-10)


@every
@pytest.mark.parametrize("theta", THETAS, ids=["zero", "star", "far"])
def test_gradient_against_differences(given, theta):
    value, gradient, bound, _ = given.objective_and_gradient(theta)
    numeric = [
        slope(lambda s, e=e: given.objective_and_gradient(theta + s * e)[0])
        for e in np.eye(4)
    ]
    np.testing.assert_allclose(gradient, numeric, atol=1e-9 * (1 + abs(value)))
    assert 0 <= bound < 1e-11
    # grad J = E_{p_0} Cov(phi, phi | X_0) (theta - theta*)
    _, covariance = given.start_feature_law(theta)
    np.testing.assert_allclose(gradient, covariance @ (theta - STAR), atol=1e-12)
    assert np.linalg.eigvalsh(covariance)[0] > 0


@every
def test_optimum_is_a_minimum(given):
    least, gradient, _, _ = given.objective_and_gradient(STAR)
    np.testing.assert_array_equal(gradient, 0.0)
    for theta in (*THETAS, STAR + 1e-3):
        assert given.objective_and_gradient(theta)[0] >= least - 1e-13
    # Jensen: J(u*) >= -log Z, with equality from a point.
    gap = least + given.log_normalizer()[0]
    assert gap >= -1e-13
    if given.start.is_point:
        assert gap == pytest.approx(0.0, abs=1e-13)
    value, error = given.matching_gradient(STAR)
    np.testing.assert_array_equal(value, 0.0)
    assert error == 0.0


@every
@pytest.mark.parametrize("theta", [None, *THETAS], ids=["base", "zero", "star", "far"])
def test_marginals_follow_the_controlled_equation(given, theta):
    """d/dt E x_i = E drift_i and d/dt E x_i^2 = 2 E x_i drift_i + sigma^2 under u."""
    base = given.base
    t = times(given, 0.6)[0]

    def moments(s):
        weights, means, variances, _ = given.marginal(s, theta)
        return weights @ means, weights @ (means**2 + variances)

    weights, means, variances, error = given.marginal(t, theta)
    assert weights.sum() == pytest.approx(1.0, rel=1e-12)
    assert error < 1e-11
    # The law on a grid: a sum of products of one-dimensional Gaussians.
    axis = np.linspace(-14.0, 14.0, 351)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    z = (axis[:, None, None] - means) / np.sqrt(variances)
    factors = np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi * variances)
    density = (factors[..., 0] * weights) @ factors[..., 1].T * (axis[1] - axis[0]) ** 2
    drift = base.drift(x, t)
    if theta is not None:
        drift = drift + base.sigma(t) * given.control(x, t, theta)
    first = np.einsum("ab,abi->i", density, drift)
    second = np.einsum("ab,abi->i", density, 2.0 * x * drift) + base.sigma(t) ** 2
    slopes = [
        slope(lambda s, i=i: moments(t + s)[i], 0.004 * base.horizon) for i in (0, 1)
    ]
    np.testing.assert_allclose(slopes[0], first, atol=1e-9)
    np.testing.assert_allclose(slopes[1], second, atol=1e-9)


@every
def test_marginal_at_both_ends(given):
    base = given.base
    for theta in (None, STAR):
        weights, means, variances, _ = given.marginal(base.start_time, theta)
        wanted = given.start.weights @ given.start.means
        np.testing.assert_allclose(weights @ means, wanted, atol=1e-13)
        if not given.start.is_point:
            assert np.all(variances > 0)
    # E^theta phi(X_T) by the marginal and by the start's conditional law
    weights, means, variances, _ = given.marginal(base.horizon, STAR)
    lin, quad, const = lq.split(FEATURES)
    law = (
        weights @ (means @ lin.T)
        + weights @ ((means**2 + variances) @ quad.T)
        + const * weights.sum()
    )
    np.testing.assert_allclose(law, given.start_feature_law(STAR)[0], atol=1e-11)


@pytest.mark.parametrize("name", ["vp, point", "cosine, point", "pinned"])
def test_from_a_point_the_terminal_law_is_the_tilted_law_given_the_start(name):
    """p_theta ~ p(x_T | x_0) e^r_theta, and log Z = log h(x_0)."""
    given = FAMILIES[name]
    base = given.base
    axis = np.linspace(-9.0, 9.0, 401)
    y = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    if base.gaussian:
        scale, offset, variance = base.forward(base.start_time, base.horizon)
        gap = y - scale * POINT.means[0] - offset
    else:
        scale, offset, variance = base.backward(base.start_time, base.horizon)
        gap = POINT.means[0] - scale * y - offset
    log_p = -0.5 * np.sum(gap**2, -1) / variance
    if not base.gaussian:
        log_p = log_p + lq.log_value(base.terminal, y)
    plain = np.exp(log_p)
    tilted = plain * np.exp(lq.log_value(given.reward_rows(STAR), y))
    assert np.log(tilted.sum() / plain.sum()) == pytest.approx(
        given.log_normalizer()[0], abs=1e-12
    )
    weights, means, variances, _ = given.marginal(base.horizon, STAR)
    density = tilted / tilted.sum()
    np.testing.assert_allclose(
        np.einsum("ab,abi->i", density, y), weights @ means, atol=1e-12
    )
    np.testing.assert_allclose(
        np.einsum("ab,abi->i", density, y**2),
        weights @ (means**2 + variances),
        atol=1e-11,
    )


def test_ideal_law_and_memoryless_normalizer_by_quadrature():
    given = FAMILIES["vp, marginal"]
    axis = np.linspace(-9.0, 9.0, 401)
    y = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    cell = (axis[1] - axis[0]) ** 2
    density = np.exp(
        lq.log_value(VP.terminal, y) + lq.log_value(given.reward_rows(STAR), y)
    )
    log_z = np.log(cell * density.sum())
    assert given.memoryless_log_normalizer() == pytest.approx(log_z, abs=1e-13)
    # From the base's own marginal log Z is that of p_T, whatever is remembered.
    assert given.log_normalizer()[0] == pytest.approx(log_z, abs=1e-12)
    weights, means, _ = given.ideal_law(STAR)
    mean = np.einsum("ab,abi->i", density, y) / density.sum()
    np.testing.assert_allclose(weights @ means, mean, atol=1e-13)


@pytest.mark.parametrize("name", ["vp, normal", "vp, pair", "constant, two tilts"])
def test_start_expectations_by_trapezoid(name):
    """Gauss-Hermite over the start against 321^2 points, spectrally accurate."""
    given = FAMILIES[name]
    start, t = given.start, given.base.start_time
    axis = np.linspace(-9.0, 9.0, 321)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    z = (x[:, None] - start.means) / start.scales
    density = np.exp(-0.5 * np.sum(z**2, -1)) / (2 * np.pi * start.scales.prod(1))
    density = density @ start.weights * (axis[1] - axis[0]) ** 2
    assert density.sum() == pytest.approx(1.0, abs=1e-13)
    for theta in (STAR, THETAS[2]):
        log_h = given.log_h(x, t, theta)
        got = given.log_normalizer(theta)[0]
        assert got == pytest.approx(np.log(density @ np.exp(log_h)), abs=1e-12)
    least = given.objective_and_gradient(STAR)[0]
    assert least == pytest.approx(-density @ given.log_h(x, t, STAR), abs=1e-12)


def test_value_in_fifty_digits():
    """log h and u of a one-dimensional mixture against mpmath quadrature."""
    base = MemorylessBase(
        VariancePreserving(1.0, 4.0),
        np.log([0.5, 0.5]),
        np.array([[3.0], [-3.0]]),
        np.ones((2, 1)),
    )
    beta, t, x = 0.125, 0.25, 0.75
    given = TiltingFamily(
        base=base,
        features=np.array([[1.0, 0.0, 0.0], [0.0, -0.5, 0.0]]),
        reference=np.zeros((1, 3)),
        constant=-4.5 * beta,
        theta_star=beta * np.array([3.0, 1.0]),
        start=StartLaw(np.ones(1), np.zeros((1, 1)), np.ones((1, 1))),
    )
    with mpmath.workdps(50):
        alpha = mpmath.exp(-2 * (1 - mpmath.mpf(t)))

        def log_h(x):
            def integral(tilt):
                def density(y):
                    prior = sum(mpmath.exp(-((y - m) ** 2) / 2) for m in (3, -3))
                    kernel = mpmath.exp(-((x - alpha * y) ** 2) / (2 * (1 - alpha**2)))
                    return prior * kernel * mpmath.exp(-tilt * (y - 3) ** 2 / 2)

                return mpmath.quad(density, [-15, -6, -3, 0, 3, 6, 15])

            return mpmath.log(integral(mpmath.mpf(beta)) / integral(0))

        exact = log_h(mpmath.mpf(x))
        step = mpmath.mpf(10) ** -12
        slope_x = (log_h(x + step) - log_h(x - step)) / (2 * step)
    point = np.array([[x]])
    got = given.log_h(point, t, given.theta_star)[0]
    assert got == pytest.approx(float(exact), rel=1e-14)
    control = given.control(point, t, given.theta_star)[0, 0]
    assert control == pytest.approx(2.0 * float(slope_x), rel=1e-13)


def test_far_states_and_strong_tilts_stay_finite():
    given = FAMILIES["vp, normal"]
    x = np.array([[40.0, -60.0], [-300.0, 200.0]])
    strong = np.array([50.0, -30.0, 200.0, 0.0])
    for theta in (STAR, strong):
        assert np.all(np.isfinite(given.log_h(x, 0.3, theta)))
        assert np.all(np.isfinite(given.control(x, 0.3, theta)))
    value, gradient, bound, _ = given.objective_and_gradient(strong)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert bound < 1e-9 * abs(value)


# ---- errors ------------------------------------------------------------------------


def test_a_tilt_that_is_not_integrable_names_the_eigenvalue():
    theta = np.array([0.0, 0.0, -5.0, 0.0])
    for name in ("vp, normal", "constant, affine", "pinned"):
        with pytest.raises(ParameterError, match="eigenvalue -") as caught:
            FAMILIES[name].objective_and_gradient(theta)
        assert "\n" not in str(caught.value)
    # The precision of a component of p_T e^r: 1/C - 2 quad + theta_3.
    lowest = min(np.min(1 / VP.variances - 2 * row[2:4] - 5.0) for row in REFERENCE)
    with pytest.raises(ParameterError, match=f"{lowest:.6g}"):
        FAMILIES["vp, normal"].log_h(points(), 0.5, theta)


def test_overflow_is_an_error_not_a_number():
    huge = dataclasses.replace(
        FAMILIES["vp, normal"], theta_star=np.array([1e200, 0.0, 0.0, 0.0])
    )
    with pytest.raises(NumericalError, match="overflows"), np.errstate(all="ignore"):
        huge.objective_and_gradient(np.array([1e200, 1e200, 0.0, 0.0]))


def test_what_is_not_exact_says_so():
    with pytest.raises(NotExactError, match="matching gradient"):
        FAMILIES["vp, normal"].matching_gradient(np.zeros(4))
    base = MemorylessBase(
        VariancePreserving(1.0, 3.0),
        np.log([0.5, 0.5]),
        np.array([np.ones(4), -np.ones(4)]),
        np.ones((2, 4)),
    )
    given = TiltingFamily(
        base=base,
        features=np.eye(1, 9),
        reference=np.zeros((1, 9)),
        constant=0.0,
        theta_star=np.ones(1),
        start=StartLaw(np.ones(1), np.zeros((1, 4)), np.ones((1, 4))),
    )
    with pytest.raises(NotExactError, match="4 dimensions"):
        given.objective_and_gradient(np.zeros(1))


# ---- the algebra of exponents ------------------------------------------------------


def test_gaussian_integral_of_rows():
    rows = np.array([[0.4, -0.3, 0.2], [1.0, 0.25, -0.1]])
    scale, offset, variance = 0.7, np.array([0.3]), 0.6
    got, (gain, shift, spread) = lq.integrate_gaussian(rows, scale, offset, variance)
    x, y = np.linspace(-2, 2, 5)[:, None], np.linspace(-18, 18, 1201)
    kernel = np.exp(-0.5 * (y - scale * x - offset) ** 2 / variance)
    kernel *= (y[1] - y[0]) / np.sqrt(2 * np.pi * variance)
    values = np.exp(lq.terms(rows, y[:, None]))
    np.testing.assert_allclose(np.exp(lq.terms(got, x)), kernel @ values, rtol=1e-12)
    mean = kernel @ (values * y[:, None]) / (kernel @ values)
    np.testing.assert_allclose(mean, x * gain[:, 0] + shift[:, 0], atol=1e-12)
    square = kernel @ (values * y[:, None] ** 2) / (kernel @ values) - mean**2
    np.testing.assert_allclose(square, np.tile(spread[:, 0], (5, 1)), atol=1e-11)


def test_feature_covariance_by_quadrature():
    gamma = np.array([[0.3, 0.7]])
    means = np.array([[[0.5, -1.0], [-0.2, 0.4]]])
    variances = np.array([[0.4, 0.9], [1.2, 0.3]])
    average, covariance = lq.feature_covariance(FEATURES, gamma, means, variances)
    nodes, w = np.polynomial.hermite_e.hermegauss(8)
    w = w / w.sum()
    grid = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    rule = (gamma[0][:, None] * np.outer(w, w).ravel()).ravel()
    x = (means[0][:, None] + np.sqrt(variances)[:, None] * grid).reshape(-1, 2)
    phi = lq.terms(FEATURES, x)
    mean = rule @ phi
    np.testing.assert_allclose(average[0], mean, rtol=1e-13)
    centred = phi - mean
    np.testing.assert_allclose(covariance[0], (rule * centred.T) @ centred, atol=1e-13)


def test_start_rules():
    """Cubature is exact to degree three, Gauss-Hermite far beyond."""
    x, w = PAIR.cubature()
    nodes, weights = PAIR.nodes(6)
    mean = PAIR.weights @ PAIR.means
    second = PAIR.weights @ (PAIR.means**2 + PAIR.scales**2)
    for points_, mass in ((x, w), (nodes, weights)):
        assert mass.sum() == pytest.approx(1.0)
        np.testing.assert_allclose(mass @ points_, mean, atol=1e-14)
        np.testing.assert_allclose(mass @ points_**2, second, atol=1e-14)
    cubic = PAIR.weights @ (PAIR.means**3 + 3 * PAIR.means * PAIR.scales**2)
    np.testing.assert_allclose(w @ x**3, cubic, atol=1e-14)
    assert POINT.is_point
    assert not NORMAL.is_point


def test_shapes_of_rows():
    rows = lq.join(np.ones((3, 2)), -np.ones((3, 2)), np.zeros(3))
    assert rows.shape == (3, 5)
    for part, size in zip(lq.split(rows), ((3, 2), (3, 2), (3,)), strict=True):
        assert part.shape == size
    masses, means, variances = lq.gaussian_parameters(rows)
    np.testing.assert_allclose(lq.gaussian_rows(masses, means, variances), rows)
    with pytest.raises(ParameterError, match="eigenvalue -2"):
        lq.gaussian_parameters(-rows)
