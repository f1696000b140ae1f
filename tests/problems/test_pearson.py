"""Pearson diffusions by second routes: quadrature, ODE and PDE solvers, simulation."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.polynomial import chebyshev, polynomial
from numpy.polynomial.hermite_e import hermegauss
from scipy.integrate import quad, solve_ivp
from scipy.stats import ncx2, norm

import sdebench
from sdebench.closed_form import geometric
from sdebench.closed_form.square_root import _negative_probability
from sdebench.errors import NotExactError, ParameterError

GBM = sdebench.problem("geometric_brownian_power")
CIR = sdebench.problem("cir_exponential")
JACOBI = sdebench.problem("jacobi_polynomial")
PEARSON = GBM, CIR, JACOBI
THETA = np.array([0.7, -0.3])
SOLVER = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13}
FALSE_ALARM = 1e-5


# ---- geometric Brownian motion -------------------------------------------------------


@pytest.mark.parametrize("c", [0.3, 2.0, 8.9, 9.1, 14.0])
@pytest.mark.parametrize("power", [0.5, 2.0, 4.5])
def test_moments_of_a_shifted_normal_number(c, power):
    def mean(function, low=-12.0, high=12.0):
        options = {"epsabs": 1e-14, "epsrel": 1e-12, "limit": 400}
        points = [-c] if low < -c < high else None
        return quad(
            lambda z: function(c + z) * norm.pdf(z), low, high, points=points, **options
        )[0]

    level = mean(lambda y: abs(y) ** power)
    # d/dc E f(c + z) = E z f(c + z)
    slope = mean(lambda y: (y - c) * abs(y) ** power) / level
    found = geometric.log_power_mean(c, power)
    assert found == pytest.approx((np.log(level), slope), rel=1e-11, abs=1e-12)
    below = mean(lambda y: abs(y) ** power, -c - 12.0, -c) / level
    flip = geometric.tilted_flip(c, power)
    assert flip == pytest.approx(below, rel=1e-9, abs=1e-15)
    log = mean(lambda y: np.log(abs(y)))
    assert geometric.log_mean(c) == pytest.approx(log, abs=1e-12)
    slope = mean(lambda y: (y - c) * np.log(abs(y)))
    assert geometric.log_mean_slope(c) == pytest.approx(slope, abs=1e-11)


def test_a_chain_that_changes_its_sign():
    """Half of the paths are negative somewhere: three steps against simulation."""
    problem = sdebench.problem("geometric_brownian_power", volatility=1.5, power=1.0)
    theta, n_paths = np.array([0.6, 0.4]), 2**17
    options = {"n_steps": 3, "n_paths": n_paths, "seed": 4, "keep_states": True}
    run = sdebench.simulate(problem, point=theta, **options)
    assert np.mean(run.states[1:] < 0.0) > 0.1
    best = [
        problem.truth.discrete_control(x.T, n, 3) for n, x in enumerate(run.states[:3])
    ]
    times = problem.time_grid(3)
    own = [theta @ [1.0, 2.0 * t - 1.0] for t in times[:3]]
    gap = sum(
        h * (u - v[:, 0]) ** 2
        for h, u, v in zip(np.diff(times), own, best, strict=True)
    )
    truth = problem.truth
    for e, slope in zip(0.01 * np.eye(2), truth.gradient(theta, 3), strict=True):
        near, far = (
            truth.objective(theta + k * e, 3) - truth.objective(theta - k * e, 3)
            for k in (1, 2)
        )
        assert slope == pytest.approx((8.0 * near - far) / 0.12, abs=1e-7)
    checks = [
        (run.cost, truth.objective(theta, 3)),
        (-run.reward, truth.reward_only_objective(theta, 3)),
        (gap, truth.control_error(theta, 3) ** 2),
    ]
    base = sdebench.simulate(problem, point=None, **options)
    z_n = np.exp(truth.log_normalizer(3))
    checks.append((np.exp(base.reward), z_n))
    # E* of the direction (1, 0): P* is the base chain times |X_3| / Z
    noise = 0.0
    for n, h in enumerate(np.diff(times)):
        x, y = base.states[n, 0], base.states[n + 1, 0]
        zeta = (y - x * (1.0 + 0.1 * h)) / (1.5 * np.sqrt(h) * np.abs(x))
        noise = noise + np.sqrt(h) * (np.sqrt(h) * own[n] - zeta)
    weighted = np.exp(base.reward) / z_n * noise
    checks.append((weighted, truth.cross_entropy_gradient(theta, 3)[0]))
    limit = norm.ppf(1.0 - 0.5 * FALSE_ALARM / len(checks))
    for values, wanted in checks:
        error = values.std() / np.sqrt(n_paths)
        assert abs(values.mean() - wanted) < limit * error
        assert error < 0.03 * (1.0 + abs(wanted))


# ---- the square-root process ---------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.6])
def test_h_of_the_square_root_process_by_its_transition_density(t):
    """X_T given x is a scaled non-central chi-squared number."""
    left = 1.0 - t
    scale = CIR.xi**2 * -np.expm1(-CIR.rate * left) / (4.0 * CIR.rate)
    degrees = 4.0 * CIR.rate * CIR.level / CIR.xi**2
    for x in (0.7, 2.0, 3.1):
        law = ncx2(degrees, x * np.exp(-CIR.rate * left) / scale)
        low, high = law.ppf(1e-16), law.isf(1e-17)
        h = quad(
            lambda y, law=law: np.exp(-CIR.tilt * scale * y) * law.pdf(y),
            max(low * 0.5, 0.0),
            high,
            epsabs=0.0,
            epsrel=1e-10,
            limit=300,
        )[0]
        value = CIR.truth.value(np.array([x]), t)
        assert value == pytest.approx(-np.log(h), rel=1e-8)


def test_square_root_answers_by_an_ode_solver():
    """J by the mean of X_t; the matching gradient by E[X_t a_t], label by label."""
    line, truth = CIR.line, CIR.truth
    a, m, xi, tilt = CIR.rate, CIR.level, CIR.xi, CIR.tilt

    def k(t):
        return line.profiles(np.asarray(t)) @ THETA

    def mean(t, y):
        return [
            a * (m - y[0]) + xi**2 * k(t) * y[0],
            0.5 * xi**2 * k(t) ** 2 * y[0],
        ]

    found = solve_ivp(mean, (0.0, 1.0), [CIR.start, 0.0], dense_output=True, **SOLVER)
    end, energy = found.y[:, -1]
    assert truth.objective(THETA) == pytest.approx(tilt * end + energy, rel=1e-10)
    assert truth.reward_only_objective(THETA) == pytest.approx(tilt * end, rel=1e-10)

    def backward(t, y):
        # b, and the two components of int_t^T xi^2 mu (k + b) f
        b = y[0]
        pull = xi**2 * found.sol(t)[0] * (k(t) + b) * line.profiles(np.asarray(t))
        return [(a - 0.5 * xi**2 * k(t)) * b, *-pull]

    wanted = solve_ivp(backward, (1.0, 0.0), [tilt, 0.0, 0.0], **SOLVER).y[1:, -1]
    np.testing.assert_allclose(truth.matching_gradient(THETA), wanted, rtol=1e-9)


def nested(problem, theta):
    """All two-step noises (m, 2) with weights, and the chain's states from them."""
    z, weights = hermegauss(80)
    weights = weights / weights.sum()
    z = np.stack(np.meshgrid(z, z, indexing="ij"), axis=-1).reshape(-1, 2)
    weights = np.outer(weights, weights).ravel()
    h, xi = 0.5, problem.xi
    f = np.sqrt(h) * xi * problem.profiles(np.array([0.0, 0.5]))
    x = [np.full(len(z), problem.start)]
    w, direction, slope = [], [], []
    for n in range(2):
        # the farthest nodes, of weight below 1e-30, would be negative
        root = np.sqrt(np.maximum(x[n], 1e-3))
        w.append(root * (f[n] @ theta))
        direction.append(root[:, None] * f[n])
        shock = w[n] + z[:, n]
        drift = problem.rate * (problem.level - x[n])
        x.append(x[n] + h * drift + xi * np.sqrt(h) * root * shock)
        slope.append(1.0 - h * problem.rate + 0.5 * xi * np.sqrt(h) * shock / root)
    return z, weights, x, w, direction, slope


def test_the_square_root_chain_by_nested_quadrature():
    """Two steps: labels, costs and weights of paths as they are written down."""
    problem = sdebench.problem("cir_exponential", xi=0.15)
    truth, tilt = problem.truth, problem.tilt
    _, weights, x, w, direction, slope = nested(problem, THETA)
    cost = 0.5 * (w[0] ** 2 + w[1] ** 2) + tilt * x[2]
    assert truth.objective(THETA, 2) == pytest.approx(weights @ cost, rel=1e-12)
    gain = problem.xi * np.sqrt(0.5)
    labels = [tilt * slope[1], np.full_like(cost, tilt)]
    roots = [np.sqrt(np.maximum(x[n], 1e-3)) for n in range(2)]
    residual = [w[n] + gain * roots[n] * labels[n] for n in range(2)]
    wanted = sum((weights * residual[n]) @ direction[n] for n in range(2))
    np.testing.assert_allclose(truth.matching_gradient(THETA, 2), wanted, rtol=1e-10)
    # the tilted chain: base paths with weights exp(-tilt X_2)
    z, weights, x, _, direction, _ = nested(problem, np.zeros(2))
    tilted = weights * np.exp(-tilt * x[2])
    total = tilted.sum()
    assert truth.log_normalizer(2) == pytest.approx(np.log(total), rel=1e-12)
    wanted = sum(
        (tilted * (direction[n] @ THETA - z[:, n])) @ direction[n] for n in range(2)
    )
    found = truth.cross_entropy_gradient(THETA, 2)
    np.testing.assert_allclose(found, wanted / total, rtol=1e-10)
    # u*_N is E*[z_n | X_n]: at the start
    best = truth.discrete_control(np.array([problem.start]), 0, 2)[0]
    assert best * np.sqrt(0.5) == pytest.approx(tilted @ z[:, 0] / total, rel=1e-10)


def test_the_bound_of_negative_states():
    """Two rough steps: what truncation changes, by one quadrature, is below it."""
    problem = sdebench.problem("cir_exponential", xi=0.9, start=0.8, level=0.8)
    line, times = problem.line, problem.time_grid(2)
    theta, h, xi = np.array([1.0, 0.2]), 0.5, 0.9
    k = line.profiles(times[:-1]) @ theta
    z = np.linspace(-9.0, 9.0, 400_001)
    weights = norm.pdf(z) * (z[1] - z[0])

    def objective(kept):
        w = np.sqrt(h) * xi * np.sqrt(0.8) * k[0]
        x = 0.8 + xi * np.sqrt(h * 0.8) * (w + z)
        part = kept(x)
        after = x + h * (0.8 - x) + h * xi**2 * k[1] * part
        later = 0.5 * h * xi**2 * k[1] ** 2 * part + problem.tilt * after
        return 0.5 * w**2 + weights @ later

    change = abs(objective(lambda x: np.maximum(x, 0.0)) - objective(lambda x: x))
    bound = line.chain_error(theta, times)
    assert 1e-6 < change < bound
    w = np.sqrt(h) * xi * np.sqrt(0.8) * k[0]
    negative = norm.cdf(-(0.8 / (xi * np.sqrt(h * 0.8)) + w))
    steps = np.diff(times)
    chernoff = _negative_probability(line, k[:1].tobytes(), steps[:1].tobytes())
    assert negative < chernoff < 10.0 * negative
    assert problem.truth.answer("gradient", theta, 2) is None
    with pytest.raises(NotExactError, match="take more steps") as caught:
        problem.truth.gradient(theta, 2)
    assert "\n" not in str(caught.value)


# ---- the Jacobi diffusion ------------------------------------------------------------


def moments(problem, horizon, count):
    """E X_T^k, k = 0, ..., count, of the base process by an ODE solver."""
    powers = np.arange(count + 1.0)
    a, m, square = problem.rate, problem.level, problem.noise_level**2

    def right(t, y):
        fall = np.concatenate([[0.0], y[:-1]])
        gain = a * m * powers + 0.5 * square * powers * (powers - 1.0)
        return gain * fall - (a * powers + 0.5 * square * powers * (powers - 1.0)) * y

    start = problem.start**powers
    return solve_ivp(right, (0.0, horizon), start, **SOLVER).y[:, -1]


def test_the_stored_optimum_of_jacobi_is_the_least():
    assert np.linalg.norm(JACOBI.truth.gradient("optimum")) < 1e-12


def test_jacobi_h_and_tilted_moments_by_the_moments_of_the_base():
    p = np.array(JACOBI.coefficients)
    found = moments(JACOBI, 1.0, 4)
    tilted = [p @ found[k : k + 3] for k in range(3)]
    value = JACOBI.truth.value(np.array([JACOBI.start]), 0.0)
    assert value == pytest.approx(-np.log(tilted[0]), rel=1e-10)
    mean, covariance = JACOBI.truth.tilted_moments(1.0)
    assert mean[0] == pytest.approx(tilted[1] / tilted[0], rel=1e-10)
    spread = tilted[2] / tilted[0] - mean[0] ** 2
    assert covariance[0, 0] == pytest.approx(spread, rel=1e-9)


def test_jacobi_answers_by_collocation():
    """The equations of J, its derivatives and b on Chebyshev points, an ODE in time.

    With a larger floor, so that few points resolve log p.
    """
    problem = sdebench.problem("jacobi_polynomial", floor=0.3)
    n, square = 30, problem.noise_level**2
    y = np.cos(np.pi * (np.arange(n) + 0.5) / n)
    x = 0.5 * (y + 1.0)
    vandermonde = chebyshev.chebvander(y, n - 1)
    inverse = np.linalg.inv(vandermonde)
    first = chebyshev.chebval(y, chebyshev.chebder(np.eye(n))).T @ inverse * 2.0
    second = chebyshev.chebval(y, chebyshev.chebder(np.eye(n), 2)).T @ inverse * 4.0
    variance = square * x * (1.0 - x)
    features = np.stack([np.full(n, 2.0), 4.0 * x - 2.0]) / problem.noise_level
    q = THETA @ features
    drift = problem.rate * (problem.level - x) + variance * q
    generator = drift[:, None] * first + 0.5 * variance[:, None] * second
    half = 0.5 * square * (1.0 - 2.0 * x)
    p = problem.coefficients
    tilt = polynomial.polyval(x, p)
    reward_slope = polynomial.polyval(x, polynomial.polyder(p)) / tilt

    def backward(t, flat):
        C, C0, C1, b, m0, m1, only = flat.reshape(7, n)
        slope = first @ C
        rates = [generator @ C + 0.5 * variance * q**2]
        for part, f in zip((C0, C1), features, strict=True):
            rates.append(generator @ part + variance * f * (q + slope))
        rates.append(generator @ b + (half * q - problem.rate) * b + half * (first @ b))
        for part, f in zip((m0, m1), features, strict=True):
            rates.append(generator @ part + variance * f * (q + b))
        rates.append(generator @ only)
        return np.concatenate(rates)

    zero = np.zeros(n)
    final = np.concatenate(
        [-np.log(tilt), zero, zero, -reward_slope, zero, zero, -np.log(tilt)]
    )
    options = {"method": "Radau", "rtol": 1e-10, "atol": 1e-12}
    found = solve_ivp(backward, (0.0, 1.0), final, **options).y[:, -1].reshape(7, n)
    at = chebyshev.chebvander(np.array([2.0 * problem.start - 1.0]), n - 1)[0] @ inverse
    truth = problem.truth
    wanted = np.concatenate(
        [
            [truth.objective(THETA)],
            truth.gradient(THETA),
            truth.matching_gradient(THETA),
            [truth.reward_only_objective(THETA)],
        ]
    )
    np.testing.assert_allclose(
        (found @ at)[[0, 1, 2, 4, 5, 6]], wanted, rtol=0, atol=1e-9
    )


# ---- all of them ---------------------------------------------------------------------


@pytest.mark.parametrize("problem", PEARSON, ids=lambda p: p.name)
def test_coordinates_are_independent(problem):
    """Answers of three coordinates are three times those of one; so are the tables."""
    wide = sdebench.problem(problem.name, dim=3)
    for name in ("gradient", "matching_gradient", "reward_only_gradient"):
        one, three = (getattr(p.truth, name)(THETA) for p in (problem, wide))
        np.testing.assert_allclose(three, 3.0 * one, rtol=1e-13)
    np.testing.assert_allclose(wide.theta_star, problem.theta_star, rtol=1e-7)
    x = np.full((2, 3), 0.4)
    assert wide.truth.value(x, 0.2) == pytest.approx(
        3.0 * problem.truth.value(x[:, :1], 0.2)
    )
    if problem is not JACOBI:
        row = sdebench.measure(
            wide, "pathwise", n_steps=6, n_paths=256, n_replicates=128, seed=5
        )
        assert row.p_value_own > FALSE_ALARM


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cir_exponential:xi=0", "xi"),
        ("cir_exponential:rate=-1", "rate"),
        ("cir_exponential:dim=0", "dim"),
        ("cir_exponential:start=0", "start"),
        ("geometric_brownian_power:volatility=0", "volatility"),
        ("geometric_brownian_power:power=-1", "power"),
        ("geometric_brownian_power:horizon=0", "horizon"),
        ("jacobi_polynomial:floor=0", "floor"),
        ("jacobi_polynomial:start=1", "start"),
        ("jacobi_polynomial:level=1.2", "level"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line(spec, message):
    with pytest.raises(ParameterError, match=message) as caught:
        sdebench.problem(spec)
    assert "\n" not in str(caught.value)
