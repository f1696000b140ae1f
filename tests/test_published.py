"""Numbers that were published, or derived by others before this code existed."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from scipy.integrate import quad, solve_ivp
from scipy.special import logsumexp
from scipy.stats import norm

import sdebench

# ---- the fine-tuning toy of TR-BSDE ------------------------------------------------

# beta, J(u*) from N(0, 1), -log Z of the ideal tilt, -log E h from N(0, 1).
TWO_MODES = [
    (0.02, 0.17286, 0.17088, 0.17053),
    (0.05, 0.37553, 0.36381, 0.36319),
    (0.125, 0.66889, 0.62511, 0.62449),
    (1.0 / 6.0, 0.75289, 0.69658, 0.69605),
    (1.0, 1.11712, 1.03960, 1.03903),
]


@pytest.mark.parametrize(("beta", "cost", "ideal", "log_z"), TWO_MODES)
def test_two_modes(beta, cost, ideal, log_z):
    problem = sdebench.problem("two_modes", beta=beta)
    truth = problem.truth
    assert truth.optimal_cost() == pytest.approx(cost, abs=6e-6)
    assert -truth.log_normalizer() == pytest.approx(log_z, abs=6e-6)
    minus = -problem.family.memoryless_log_normalizer()
    assert minus == pytest.approx(ideal, abs=6e-6)
    closed = -np.log(0.5 / np.sqrt(1 + beta) * (1 + np.exp(-18 * beta / (1 + beta))))
    assert minus == pytest.approx(closed, rel=1e-13)
    assert truth.initial_value_bias() == pytest.approx(minus - -truth.log_normalizer())
    # From its own marginal log Z is the ideal one, though J(u*) is not.
    own = sdebench.problem("two_modes", beta=beta, start="marginal").truth
    assert -own.log_normalizer() == pytest.approx(closed, rel=1e-13)
    assert own.optimal_cost() > closed


@pytest.mark.parametrize("beta", [0.02, 1.0])
def test_two_modes_by_adaptive_quadrature(beta):
    """From the definition: X_0 given X_T = y is N(e^-2 y, 1 - e^-4), scipy.quad."""
    alpha, variance = np.exp(-2.0), -np.expm1(-4.0)

    def h(x):
        def density(y, tilt):
            prior = 0.5 * (norm.pdf(y, 3) + norm.pdf(y, -3))
            return (
                prior
                * norm.pdf(x, alpha * y, np.sqrt(variance))
                * np.exp(-0.5 * tilt * (y - 3.0) ** 2)
            )

        options = {"limit": 200, "epsabs": 0, "epsrel": 1e-12, "points": [-3, 0, 3]}
        top, bottom = (quad(density, -14, 14, (b,), **options)[0] for b in (beta, 0))
        return top / bottom

    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    values = np.array([h(x) for x in nodes])
    weights = weights / weights.sum()
    truth = sdebench.problem("two_modes", beta=beta).truth
    assert truth.optimal_cost() == pytest.approx(-weights @ np.log(values), rel=1e-9)
    assert truth.log_normalizer() == pytest.approx(np.log(weights @ values), rel=1e-9)
    np.testing.assert_allclose(truth.h(nodes[:, None], 0.0), values, rtol=1e-9)


# ---- quadratic Ornstein-Uhlenbeck settings of SOC Matching -------------------------

SOC_MATCHING = {
    # F(0), its value by the authors' Euler scheme of 50 steps, int F, J(u*) at d = 20
    "ou_quadratic_easy": (0.2925539, 0.2931544, 0.2027691, 5.5181517),
    "ou_quadratic_hard": (1.3134558, 1.3172378, 1.0348624, 27.2645274),
    "ou_quadratic_no_state_cost": (0.3655293, 0.3657651, 0.3100573, 8.0287915),
}


@pytest.mark.parametrize("name", SOC_MATCHING)
def test_soc_matching_table(name):
    start, euler, integral, cost = SOC_MATCHING[name]
    problem = sdebench.problem(name)
    truth, d = problem.truth, 20
    assert problem.dim == d
    x = np.eye(1, d)
    # V = F |x|^2 + d int F and u* = -2 F x
    slope = truth.value(x, 0.0)[0] - truth.value(0 * x, 0.0)[0]
    assert slope == pytest.approx(start, abs=6e-8)
    assert truth.control(x, 0.0)[0, 0] == pytest.approx(-2 * start, abs=1.2e-7)
    assert truth.value(0 * x, 0.0)[0] == pytest.approx(d * integral, abs=20 * 6e-8)
    assert truth.optimal_cost() == pytest.approx(cost, abs=6e-8)
    a, p, q = problem.rate, problem.state_cost, problem.terminal_cost
    assert q == a / 2
    k = np.sqrt(a * a + 2 * p)
    for t in (0.0, 0.3, 1.0):
        closed = a / 2 + k / 2 * np.tanh(k * (1 - t))
        assert truth.control(x, t)[0, 0] == pytest.approx(-2 * closed, rel=1e-13)
    # The published "ground truth" is the Riccati equation by 50 Euler steps.
    F = q
    for _ in range(50):
        F -= (-2 * a * F + 2 * F**2 - p) / 50
    assert pytest.approx(euler, abs=6e-8) == F
    assert 0.0005 < abs(F / start - 1) < 0.004


@pytest.mark.parametrize(
    ("name", "share"), [("ou_quadratic_easy", 2.343), ("ou_quadratic_hard", 3.060)]
)
def test_distance_of_the_discrete_optimum(name, share):
    """u*_N against u* at 50 steps, in % of u*, on the chain's optimal paths."""
    problem = sdebench.problem(name)
    truth, n_steps = problem.truth, 50
    tables = problem.tables(problem.theta_star, problem.time_grid(n_steps))
    x = np.eye(1, problem.dim)
    # Every coordinate is the same scalar chain: gains and the variance recursion.
    best = np.array(
        [truth.discrete_control(x, n, n_steps)[0, 0] for n in range(n_steps)]
    )
    root = np.sqrt(1.0 / n_steps)
    continuous = tables.gain[:, 0, 0] / root
    variance, gap, size = problem.start_scale**2, 0.0, 0.0
    for n in range(n_steps):
        gap += (best[n] - continuous[n]) ** 2 * variance
        size += continuous[n] ** 2 * variance
        closed = 1 + problem.rate / n_steps + best[n] / n_steps
        variance = closed**2 * variance + 1.0 / n_steps
    assert 100 * np.sqrt(gap / size) == pytest.approx(share, abs=6e-4)


def test_discrete_optimum_by_scalar_dynamic_programming():
    """u*_N = -sqrt(h)^-1 (1 + h P')^-1 sqrt(h) P' (1 + h a) x, P' the next value."""
    problem = sdebench.problem("ou_quadratic_hard", dim=2)
    a, n_steps = problem.rate, 50
    h, P = 1.0 / n_steps, 2.0 * problem.terminal_cost
    x = np.array([[0.7, -1.1]])
    for n in reversed(range(n_steps)):
        gain = -P * (1 + h * a) / (1 + h * P)
        got = problem.truth.discrete_control(x, n, n_steps)
        np.testing.assert_allclose(got, gain * x, rtol=1e-12)
        P = 2 * problem.state_cost * h + P * (1 + h * a) ** 2 / (1 + h * P)


# ---- the initial-value bias of constant noise --------------------------------------


@pytest.mark.parametrize(("sigma", "realized"), [(1.0, 79.2), (0.2, 6.1)])
def test_constant_noise_realizes_part_of_a_linear_reward(sigma, realized):
    problem = sdebench.problem(
        "gaussian_tilt",
        schedule="linear_flow",
        noise="constant",
        noise_level=sigma,
        variance=1.0,
        slope=0.7,
        curvature=0.0,
    )
    law = problem.truth.tilted_marginal(1.0)
    share = law.mean()[0] / 0.7  # the tilted law has mean slope * variance
    assert 100 * share == pytest.approx(realized, abs=0.05)
    assert share == pytest.approx(-np.expm1(-np.pi * sigma**2 / 2), rel=1e-13)
    assert law.covariance()[0, 0] == pytest.approx(1.0, rel=1e-13)
    assert problem.truth.ideal_law().mean()[0] == pytest.approx(0.7)


def test_constant_noise_widens_a_quadratic_tilt():
    problem = sdebench.problem(
        "gaussian_tilt",
        schedule="linear_flow",
        noise="constant",
        variance=1.0,
        slope=0.0,
        curvature=1.0,
    )
    variance = problem.truth.tilted_marginal(1.0).covariance()[0, 0]
    assert variance == pytest.approx(0.50673, abs=6e-6)
    assert problem.truth.ideal_law().covariance()[0, 0] == pytest.approx(0.5)
    square = np.exp(-np.pi / 2)  # Phi^2, X_T = Phi X_0 + noise of variance 1 - Phi^2
    noise = 1 - square
    closed = square / (1 + noise) ** 2 + noise / (1 + noise)
    assert variance == pytest.approx(closed, rel=1e-13)


# ---- the damped oscillator of TR-BSDE ----------------------------------------------


@pytest.mark.parametrize("noise_level", [0.5, 1.0, 5.0])
def test_costate_of_the_uncontrolled_oscillator(noise_level):
    """The matching gradient at zero control from phi = e^(A^T s) e^(A s) x.

    It is E int (du/dtheta)^T sigma^T phi(X_t, t) dt over base paths, with
    du/dtheta = (1, s) times u*, and -x: closed in the second moments of X_t.
    """
    problem = sdebench.problem("damped_oscillator", noise_level=noise_level)
    A = np.array([[0.0, 1.0], [-1.0, -0.5]])
    nodes, weights = np.polynomial.legendre.leggauss(40)
    total = np.zeros(3)
    for node, weight in zip(nodes, weights, strict=True):
        t = node + 1.0
        flow = scipy.linalg.expm(A * (2.0 - t))
        phi = flow.T @ flow
        second = (
            solve_ivp(
                lambda _, y: (
                    A @ y.reshape(2, 2)
                    + y.reshape(2, 2) @ A.T
                    + noise_level**2 * np.eye(2)
                ).ravel(),
                (0.0, t),
                np.eye(2).ravel(),
                method="DOP853",
                rtol=1e-11,
                atol=1e-12,
            )
            .y[:, -1]
            .reshape(2, 2)
        )
        optimal = problem.truth.control(np.eye(2), t).T  # u* = optimal @ x
        for p, gain in enumerate((optimal, node * optimal, -np.eye(2))):
            total[p] += weight * noise_level * np.sum(gain * (phi @ second))
    got = problem.truth.matching_gradient("zero")
    np.testing.assert_allclose(got, total, rtol=1e-9, atol=1e-9 * np.abs(total).max())
    # Without control the value's second moment is the same matrix: V is quadratic in
    # it for weak noise only, which is how the noise level enters u*.
    strong = sdebench.problem("damped_oscillator", noise_level=1e-4)
    flow = scipy.linalg.expm(2.0 * A)
    x = np.array([[0.3, -0.8]])
    np.testing.assert_allclose(
        strong.truth.control(x, 0.0)[0] / -1e-4, flow.T @ flow @ x[0], rtol=1e-6
    )


# ---- one line each -----------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 3])
def test_brownian_linear(dim):
    problem = sdebench.problem(
        "brownian_linear", dim=dim, slope=0.6, sigma=0.5, horizon=2.0
    )
    log_z = dim * 0.36 * 0.25 * 2.0 / 2
    assert problem.truth.log_normalizer() == pytest.approx(log_z, rel=1e-14)
    assert problem.truth.log_normalizer(3) == pytest.approx(log_z, rel=1e-13)
    control = problem.truth.control(np.zeros((2, dim)), 0.7)
    np.testing.assert_allclose(control, 0.3, rtol=1e-14)


def test_ou_linear_control_is_a_matrix_exponential():
    problem = sdebench.problem("ou_linear")
    A, sigma = problem.model.drift_matrix, problem.model.diffusion
    x = np.ones((2, 10))
    for t in (0.0, 0.4, 1.0):
        closed = -sigma.T @ scipy.linalg.expm(A.T * (1 - t)) @ np.ones(10)
        np.testing.assert_allclose(problem.truth.control(x, t)[1], closed, rtol=1e-12)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    speeds = [np.sum(problem.truth.control(x[:1], 0.5 * (s + 1)) ** 2) for s in nodes]
    # Deterministic control from a point: log Z = 1/2 int |u*|^2 since E r = 0.
    log_z = 0.25 * weights @ speeds
    assert problem.truth.log_normalizer() == pytest.approx(log_z, rel=1e-12)


@pytest.mark.parametrize("log_mass", [0.0, -0.7])
@pytest.mark.parametrize("dim", [1, 2, 6])
def test_follmer_samples_its_target(dim, log_mass):
    problem = sdebench.problem("follmer_mixture", dim=dim, log_mass=log_mass)
    truth = problem.truth
    assert truth.log_normalizer() == pytest.approx(log_mass, abs=1e-13)
    assert truth.optimal_cost() == pytest.approx(-log_mass, abs=1e-13)
    law = truth.tilted_marginal(1.0)
    modes = 2.0 * np.ones(dim) / np.sqrt(dim)
    np.testing.assert_allclose(law.mean(), -modes / 3, atol=1e-13)
    spread = 0.5 * np.eye(dim) + 8 / 9 * np.outer(modes, modes)
    np.testing.assert_allclose(law.covariance(), spread, atol=1e-12)
    # r = log(nu / p_T), p_T = N(0, I)
    x = np.random.default_rng(2).normal(size=(5, dim))
    parts = [
        np.log(w) + np.sum(norm.logpdf(x, s * modes, np.sqrt(0.5)), axis=1)
        for w, s in ((1 / 3, 1), (2 / 3, -1))
    ]
    log_ratio = logsumexp(parts, axis=0) - np.sum(norm.logpdf(x), axis=1) + log_mass
    np.testing.assert_allclose(problem.reward(x), log_ratio, rtol=1e-12)


def test_vp_gaussian_tilt_by_hand():
    """alpha_0^2 = e^-6, C = 1/2, r = x - x^2/2: every number from two formulas."""
    problem = sdebench.problem("gaussian_tilt")
    truth, alpha2 = problem.truth, np.exp(-6.0)
    q = alpha2 * 0.5 + 1 - alpha2
    phi, noise = np.sqrt(alpha2) * 0.5 / q, 0.5 * (1 - alpha2) / q
    x = np.array([[0.4], [-1.3]])
    m = phi * x[:, 0]
    log_h = -0.5 * np.log1p(noise) + (m - m**2 / 2 + noise / 2) / (1 + noise)
    np.testing.assert_allclose(truth.value(x, 0.0), -log_h, rtol=1e-13)
    control = np.sqrt(6.0) * phi * (1 - m) / (1 + noise)
    np.testing.assert_allclose(truth.control(x, 0.0)[:, 0], control, rtol=1e-12)
    closed = -0.5 * np.log(1.5) + 0.5 * 0.5 / 1.5
    assert truth.log_normalizer() == pytest.approx(closed, rel=1e-13)
