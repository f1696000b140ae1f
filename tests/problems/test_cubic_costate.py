"""The quartic terminal cost: exact answers by second routes."""

import mpmath
import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp

import sdebench
from sdebench.closed_form.quartic import stein_quadratic
from sdebench.errors import NotExactError, ParameterError
from sdebench.simulate.noise import Noise, split_seed
from sdebench.view import View

PROBLEM = sdebench.problem("cubic_costate")
TRUTH = PROBLEM.truth
THETA = np.array([0.4, -0.3, 0.2, 0.5])


def test_value_and_log_normalizer_to_50_digits():
    def log_mass(mean, variance):
        def density(y):
            return mpmath.exp(-((y - mean) ** 2) / (2 * variance) - y**4 / 4)

        points = [-mpmath.inf, -1, 0, 1, mpmath.inf]
        total = mpmath.quad(density, points)
        return float(mpmath.log(total / mpmath.sqrt(2 * mpmath.pi * variance)))

    with mpmath.workdps(50):
        for x, t in ((0.0, 0.0), (0.7, 0.2), (-2.5, 0.5), (3.0, 0.9)):
            growth = mpmath.exp(-mpmath.mpf(1 - t) / 2)
            wanted = -log_mass(growth * x, 1 - growth**2)
            assert TRUTH.value([x], t) == pytest.approx(wanted, rel=1e-12, abs=1e-14)
        wanted = log_mass(mpmath.exp(-0.5) * PROBLEM.start_mean, mpmath.mpf(1))
        assert TRUTH.log_normalizer() == pytest.approx(wanted, rel=1e-13)
        assert abs(TRUTH.log_normalizer() - wanted) <= TRUTH.error_bound(
            "log_normalizer"
        )


def test_objective_by_an_ode():
    """Mean and variance of the closed loop, and E x^4 = m^4 + 6 m^2 v + 3 v^2."""

    def slope(t, y):
        m, v, _ = y
        s = 2.0 * t - 1.0
        K, k = -(THETA[0] + THETA[1] * s), -(THETA[2] + THETA[3] * s)
        cost = 0.5 * (K**2 * (v + m**2) + 2 * K * k * m + k**2)
        return [(K - 0.5) * m + k, 2 * (K - 0.5) * v + 1.0, cost]

    options = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13}
    m, v, cost = solve_ivp(slope, (0.0, 1.0), [0.3, 1.0, 0.0], **options).y[:, -1]
    reward = 0.25 * (m**4 + 6 * m**2 * v + 3 * v**2)
    assert TRUTH.objective(THETA) == pytest.approx(cost + reward, rel=1e-10)
    assert TRUTH.reward_only_objective(THETA) == pytest.approx(reward, rel=1e-10)


@pytest.mark.parametrize(
    ("name", "answer"),
    [("pathwise", "gradient"), ("adjoint_matching", "matching_gradient")],
)
def test_chain_gradients_are_exact_means(name, answer):
    """Gauss-Hermite over all normals of 2 steps: exact, the rows are quartics."""
    times = PROBLEM.time_grid(2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    z = np.array(np.meshgrid(nodes, nodes, nodes)).reshape(3, 1, -1)
    weight = np.prod(np.meshgrid(weights, weights, weights), axis=0).ravel()
    noise = Noise(z[1:], z[0], np.full(len(weight), 0.5))
    tables = PROBLEM.tables(THETA, times)
    address = {"key": split_seed(7), "replicate": 0, "first_path": 0}
    view = View(tables, times, THETA, n_paths=len(weight), given=noise, **address)
    rows = sdebench.estimator(name).statistics(view).numpy()
    mean = weight @ rows / weight.sum()
    exact = getattr(TRUTH, answer)(THETA, 2)
    np.testing.assert_allclose(mean, exact, rtol=0, atol=1e-13)
    other = {"gradient": "matching_gradient"}.get(answer, "gradient")
    assert np.max(np.abs(getattr(TRUTH, other)(THETA, 2) - exact)) > 0.01


def test_matching_gradient_by_quadrature():
    """E[du (u + phi(t, X_t))] with the cubic costate, without control."""
    names = PROBLEM.parameter_names
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    weights = weights / weights.sum()

    def integrand(t):
        growth, late = np.exp(-0.5 * t), np.exp(-0.5 * (1.0 - t))
        x = 0.3 * growth + nodes  # the variance is 1 at all times
        phi = late * ((late * x) ** 3 + 3 * (1 - late**2) * late * x)
        return {"feedback": -(weights @ (x * phi)), "offset": -(weights @ phi)}

    exact = TRUTH.matching_gradient("zero")
    for name in ("feedback", "offset"):
        for power, suffix in ((0, ""), (1, "_slope")):
            wanted = quad(
                lambda t, n=name, p=power: (2 * t - 1) ** p * integrand(t)[n], 0, 1
            )[0]
            got = exact[names.index(name + suffix)]
            assert got == pytest.approx(wanted, rel=1e-11)


def test_theta_star_is_the_best_of_the_family_and_not_optimal():
    assert not PROBLEM.family_holds_optimum
    star = PROBLEM.theta_star
    least = TRUTH.objective(star)
    for direction in np.eye(4):
        for sign in (-0.01, 0.01):
            assert TRUTH.objective(star + sign * direction) > least
    assert least > TRUTH.optimal_cost() + 0.01
    assert TRUTH.optimal_cost() > -TRUTH.log_normalizer()
    with pytest.raises(NotExactError, match="quartic"):
        TRUTH.optimal_cost(10)


@pytest.mark.slow
def test_law_under_the_optimal_control_by_quadrature():
    """The integral over X_0 of start density, transition density and h(y) / h(x_0)."""
    t = 0.6
    growth = np.exp(-0.5 * t)
    variance = 1.0 - growth**2

    def density(y):
        def over_start(x):
            gap = (y - growth * x) ** 2 / variance + (x - 0.3) ** 2
            ratio = TRUTH.value([x], 0.0) - TRUTH.value([y], t)
            return np.exp(-0.5 * gap + ratio) / (2 * np.pi * np.sqrt(variance))

        return quad(over_start, -12, 12, epsabs=1e-12, limit=200)[0]

    law = TRUTH.tilted_marginal(t)
    for y in (-1.5, 0.1, 0.8):
        got = np.exp(law.log_density(np.array([[y]])))[0]
        assert got == pytest.approx(density(y), rel=1e-5)  # the spline's error
    assert TRUTH.tilted_marginal(0.0).mean() == pytest.approx(0.3, abs=1e-12)


def test_stein_quadratic_has_the_same_means():
    rng = np.random.default_rng(0)
    quartic, mean, variance = rng.uniform(0.2, 2.0, (3, 2))
    Q, q, r = stein_quadratic(quartic, mean, variance)
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    weights = weights / weights.sum()
    x = mean[:, None] + np.sqrt(variance)[:, None] * nodes
    c = quartic[:, None]
    np.testing.assert_allclose(3 * c * x**2 @ weights, Q[:, None] @ [1.0])
    np.testing.assert_allclose(c * x**3 @ weights, Q * mean - q)
    value = 0.5 * Q[:, None] * x**2 - q[:, None] * x
    np.testing.assert_allclose(
        np.sum(0.25 * c * x**4 @ weights), np.sum(value @ weights) - r
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curvature": 0.0}, "curvature"),
        ({"start_scale": -1.0}, "start_scale"),
        ({"horizon": 0.0}, "horizon"),
    ],
)
def test_wrong_parameters_are_refused(settings, message):
    with pytest.raises(ParameterError, match=message):
        sdebench.problem("cubic_costate", **settings)


def test_a_point_as_start_and_no_mean_reversion():
    point = sdebench.problem("cubic_costate", start_scale=0.0, rate=0.0)
    assert point.truth.optimal_cost() == pytest.approx(
        -point.truth.log_normalizer(), rel=1e-12
    )
    with pytest.raises(NotExactError, match="point"):
        point.truth.tilted_marginal(0.0)
