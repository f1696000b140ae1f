from __future__ import annotations

import dataclasses

import mpmath
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from sdebench.closed_form.linear_quadratic import LinearQuadratic
from sdebench.errors import ParameterError

# a, p, q of SOC Matching (Domingo-Enrich et al. 2023), whose costs x^T P x carry no
# 1/2; F(0) and the optimal cost to seven decimals.
PUBLISHED = {
    "easy": ("0.2", "0.2", "0.1", 0.2925539, 5.5181517),
    "hard": ("1", "1", "0.5", 1.3134558, 27.2645274),
    "no_state_cost": ("0.5", "0", "0.25", 0.3655293, 8.0287915),
}


def published(a, p, q, dim=20):
    eye = np.eye(dim)
    return LinearQuadratic(
        drift_matrix=float(a) * eye,
        drift_offset=np.zeros(dim),
        diffusion=eye,
        running=2.0 * float(p) * eye,
        reward_quadratic=2.0 * float(q) * eye,
        reward_linear=np.zeros(dim),
        reward_constant=0.0,
        horizon=1.0,
        start_mean=np.zeros(dim),
        start_covariance=0.25 * eye,
    )


def general(dim=3, seed=0, horizon=1.3, scale=0.7, fixed=False, indefinite=False):
    """Return a problem without any symmetry, all offsets different from zero."""
    rng = np.random.default_rng(seed)

    def spd(size):
        root = rng.normal(size=(dim, dim))
        return size * root @ root.T / dim

    quadratic, running, start = spd(0.8), spd(0.6), spd(0.3)
    if indefinite:
        quadratic = quadratic - 0.35 * np.eye(dim)
        running = running - 0.2 * np.eye(dim)
    return LinearQuadratic(
        drift_matrix=scale * rng.normal(size=(dim, dim)),
        drift_offset=rng.normal(size=dim),
        diffusion=np.eye(dim) + 0.3 * rng.normal(size=(dim, dim)),
        running=running,
        reward_quadratic=quadratic,
        reward_linear=rng.normal(size=dim),
        reward_constant=0.37,
        horizon=horizon,
        start_mean=rng.normal(size=dim),
        start_covariance=0.0 * start if fixed else start,
    )


class Feedback:
    """A smooth linear feedback with P = 4 parameters; scale 0 leaves u = 0."""

    def __init__(self, problem, theta=(0.4, -0.7, 0.3, 0.5), seed=5):
        rng = np.random.default_rng(seed)
        dim = problem.dim
        self.theta = np.asarray(theta, dtype=float)
        self.maps = 0.5 * rng.normal(size=(4, dim, dim))
        self.shifts = rng.normal(size=(4, dim))
        self.rates = np.array([0.0, 1.0, 2.0, 3.0])

    def basis(self, t):
        return np.cos(self.rates * t + 0.3 * self.rates)

    def gain(self, t):
        return np.einsum("p,pij->ij", self.theta * self.basis(t), self.maps)

    def bias(self, t):
        return np.einsum("p,pi->i", self.theta * self.basis(t), self.shifts)

    def gain_derivative(self, t):
        return self.basis(t)[:, None, None] * self.maps

    def bias_derivative(self, t):
        return self.basis(t)[:, None] * self.shifts

    @property
    def pair(self):
        return self.gain, self.bias

    @property
    def all(self):
        return self.gain, self.bias, self.gain_derivative, self.bias_derivative


def optimal(problem):
    """Return u* of ``problem`` as gain and bias functions."""

    def gain(t):
        return -problem.diffusion.T @ problem.riccati(t).quadratic

    def bias(t):
        return -problem.diffusion.T @ problem.riccati(t).linear

    return gain, bias


def integrate(problem, function, initial, end=None, backward=False):
    """Solve an ODE over [0, end], from T down to ``end`` with ``backward``."""
    end = problem.horizon if end is None else end
    span = (problem.horizon, end) if backward else (0.0, end)
    solution = solve_ivp(
        function, span, initial, method="DOP853", rtol=1e-13, atol=1e-14
    )
    return solution.y[:, -1]


def riccati_ode(problem, time):
    A, a, F = problem.drift_matrix, problem.drift_offset, problem.running
    S, d = problem.diffusion @ problem.diffusion.T, problem.dim

    def right(_, y):
        P, p = y[: d * d].reshape(d, d), y[d * d : -1]
        return -np.concatenate(
            [
                (A.T @ P + P @ A - P @ S @ P + F).ravel(),
                (A - S @ P).T @ p + P @ a,
                [p @ a + 0.5 * np.trace(S @ P) - 0.5 * p @ S @ p],
            ]
        )

    end = np.concatenate(
        [
            problem.reward_quadratic.ravel(),
            -problem.reward_linear,
            [-problem.reward_constant],
        ]
    )
    y = integrate(problem, right, end, time, backward=True)
    return y[: d * d].reshape(d, d), y[d * d : -1], y[-1]


def policy_ode(problem, gain, bias):
    """Return J of a feedback, and E int |u|^2, by the moment equations."""
    A, a, F = problem.drift_matrix, problem.drift_offset, problem.running
    sigma, d = problem.diffusion, problem.dim

    def right(t, y):
        m, C = y[:d], y[d : d + d * d].reshape(d, d)
        K, k = gain(t), bias(t)
        B, second = A + sigma @ K, C + np.outer(m, m)
        mean = K @ m + k
        effort = mean @ mean + np.sum(K.T @ K * C)
        return np.concatenate(
            [
                B @ m + a + sigma @ k,
                (B @ C + C @ B.T + sigma @ sigma.T).ravel(),
                [0.5 * effort + 0.5 * np.sum(F * second)],
            ]
        )

    start = np.concatenate([problem.start_mean, problem.start_covariance.ravel(), [0]])
    y = integrate(problem, right, start)
    m, C = y[:d], y[d:-1].reshape(d, d)
    Q = problem.reward_quadratic
    reward = -0.5 * (m @ Q @ m + np.sum(Q * C)) + problem.reward_linear @ m
    return y[-1] - reward - problem.reward_constant, m, C


# ------------------------------------------------------------------ value function


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    a, p, q, slope, cost = PUBLISHED[name]
    problem = published(a, p, q)
    F = problem.riccati(0.0).quadratic / 2.0
    assert pytest.approx(F[0, 0] * np.eye(20), abs=1e-15) == F
    assert F[0, 0] == pytest.approx(slope, abs=5.1e-8)
    assert problem.optimal_cost() == pytest.approx(cost, abs=5.1e-8)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tanh_closed_form_in_fifty_digits(name):
    # q = a/2 in all three settings: F = a/2 + (k/2) tanh(k s), k^2 = a^2 + 2p.
    text = PUBLISHED[name][:3]
    problem = published(*text)
    with mpmath.workdps(50):
        a, p, _ = (mpmath.mpf(t) for t in text)
        k = mpmath.sqrt(a**2 + 2 * p)
        for time in (0, mpmath.mpf(1) / 4, mpmath.mpf(7) / 8, 1):
            s = 1 - time
            F = a / 2 + k / 2 * mpmath.tanh(k * s)
            rho = 20 * (a * s / 2 + mpmath.log(mpmath.cosh(k * s)) / 2)
            P, linear, constant = problem.riccati(float(time))
            assert P[3, 3] == pytest.approx(float(2 * F), rel=1e-14)
            assert np.all(linear == 0.0)
            assert constant == pytest.approx(float(rho), rel=1e-14, abs=1e-15)
        cost = 20 * (F_at_zero := a / 2 + k / 2 * mpmath.tanh(k)) / 4
        cost += 20 * (a / 2 + mpmath.log(mpmath.cosh(k)) / 2)
        # Z: 20 independent Gaussian integrals of exp(-F x^2 - rho/20)
        log_z = -10 * mpmath.log(1 + F_at_zero / 2)
        log_z -= 20 * (a / 2 + mpmath.log(mpmath.cosh(k)) / 2)
        assert problem.optimal_cost() == pytest.approx(float(cost), rel=1e-14)
        assert problem.log_normalizer() == pytest.approx(float(log_z), rel=1e-14)


def one_exponential(problem, digits, quadrature):
    """Return P, p, rho at time 0 in ``digits``, without composing steps.

    rho comes from Gauss quadrature of its equation, or from the identity
    rho = 1/2 int a^T l - 1/2 q^T x_T - c + 1/2 int tr(Sigma P) on the path from
    x_0 = 0, where a boundary layer of width 1/|A| would need too many nodes.
    """
    d, T = problem.dim, problem.horizon
    S = problem.diffusion @ problem.diffusion.T
    A, a, F = problem.drift_matrix, problem.drift_offset, problem.running
    with mpmath.workdps(digits):
        S, A, a, F, Q, q = (
            mpmath.matrix(m.tolist())
            for m in (S, A, a, F, problem.reward_quadratic, problem.reward_linear)
        )
        H = mpmath.zeros(2 * d + 2)
        last = 2 * d + 1
        H[:d, :d], H[:d, d : 2 * d], H[:d, last] = A, -S, a
        H[d : 2 * d, :d], H[d : 2 * d, d : 2 * d] = -F, -A.T
        H[2 * d, d : 2 * d] = a.T

        def solve(at):
            """Propagate (I; Q) and (0; -q; 0; 1) from T back to ``at``."""
            back = mpmath.expm(-H * (mpmath.mpf(T) - mpmath.mpf(at)))
            plain = back[: 2 * d, :d] + back[: 2 * d, d : 2 * d] * Q
            shifted = back[:, last] - back[:, d : 2 * d] * q
            P = plain[d:, :] * plain[:d, :] ** -1
            p = shifted[d : 2 * d, 0] - P * shifted[:d, 0]
            return back, plain[:d, :], shifted, P, p

        back, X, shifted, P, p = solve(0)
        trace = mpmath.log(mpmath.det(X)) + mpmath.mpf(T) * sum(
            A[i, i] for i in range(d)
        )
        if quadrature:
            nodes, weights = np.polynomial.legendre.leggauss(20)
            rho = mpmath.mpf(0)
            for node, weight in zip(nodes, weights, strict=True):
                slope = solve(T * (node + 1) / 2)[-1]
                rate = slope.T * a - slope.T * S * slope / 2
                rho += weight * T / 2 * rate[0]
        else:
            end = -(X**-1) * shifted[:d, 0]
            costate = Q * end - q
            # y_T - y_0 of the path that ends in ``end`` and starts in 0
            start = back[:, :d] * end + back[:, d : 2 * d] * costate + back[:, last]
            rho = (-start[2 * d, 0] - (q.T * end)[0]) / 2
        rho += trace / 2 - mpmath.mpf(problem.reward_constant)
        as_array = np.array(P.tolist(), dtype=float)
        return as_array, np.array(p.T.tolist()[0], dtype=float), float(rho)


@pytest.mark.parametrize(
    ("scale", "horizon", "indefinite", "tolerance"),
    [
        (0.7, 1.3, False, 1e-13),
        (0.7, 0.6, True, 1e-13),
        # growth of 1e17 to 1e70 in the plain exponential: only the composed form
        # survives; rounding of |A| T enters the value through tr A and log det
        (12.0, 2.0, False, 1e-12),
        (40.0, 2.0, False, 1e-12),
    ],
)
def test_against_one_exponential_in_many_digits(scale, horizon, indefinite, tolerance):
    problem = general(2, 1, horizon, scale, indefinite=indefinite)
    small = scale < 1.0
    expected = one_exponential(problem, 30 if small else 200, quadrature=small)
    for got, want in zip(problem.riccati(0.0), expected, strict=True):
        size = np.max(np.abs(want))
        assert np.max(np.abs(got - want)) <= tolerance * size


@pytest.mark.parametrize("scale", [12.0, 40.0])
def test_unstable_drift_without_running_cost(scale):
    # one long step would grow like e^{|A| T} in some directions and lose the others
    # to rounding: 1e-7 at the smaller drift, a singular matrix at the larger
    problem = general(2, 1, 2.0, scale)
    problem = dataclasses.replace(problem, running=np.zeros((2, 2)))
    expected = one_exponential(problem, 250, quadrature=False)
    for got, want in zip(problem.riccati(0.0), expected, strict=True):
        assert np.max(np.abs(got - want)) <= 1e-12 * np.max(np.abs(want))


@pytest.mark.parametrize("indefinite", [False, True])
@pytest.mark.parametrize("time", [0.0, 0.31, 1.0])
def test_riccati_equations(indefinite, time):
    problem = general(4, 2, 1.1, indefinite=indefinite)
    for got, want in zip(
        problem.riccati(time), riccati_ode(problem, time), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


def hjb_residual(problem, value, time, x):
    """Return the relative HJB residual; ``value`` maps t to (P, p, rho).

    The time derivative is the eighth-order central difference with step 1e-2, whose
    error is about 1e-2**8 / 630 times the ninth derivative of the coefficients.
    """
    weights = np.array([4 / 5, -1 / 5, 4 / 105, -1 / 280])
    h = 1e-2

    def at(t):
        P, p, rho = value(t)
        return 0.5 * np.einsum("bi,ij,bj->b", x, P, x) + x @ p + rho

    slope = (
        sum(
            w * (at(time + (i + 1) * h) - at(time - (i + 1) * h))
            for i, w in enumerate(weights)
        )
        / h
    )
    P, p, _ = value(time)
    gradient = x @ P + p
    terms = [
        slope,
        np.sum((x @ problem.drift_matrix.T + problem.drift_offset) * gradient, axis=1),
        np.full(len(x), 0.5 * np.trace(problem.diffusion.T @ P @ problem.diffusion)),
        -0.5 * np.sum((gradient @ problem.diffusion) ** 2, axis=1),
        0.5 * np.einsum("bi,ij,bj->b", x, problem.running, x),
    ]
    return np.max(np.abs(sum(terms)) / sum(np.abs(t) for t in terms))


@pytest.mark.parametrize("indefinite", [False, True])
def test_hjb_equation_and_terminal_condition(indefinite):
    problem = general(3, 3, 0.8, indefinite=indefinite)
    x = 2.0 * np.random.default_rng(1).normal(size=(50, 3))
    for time in (0.1, 0.35, 0.7):
        assert hjb_residual(problem, problem.riccati, time, x) < 1e-8
    reward = -0.5 * np.einsum("bi,ij,bj->b", x, problem.reward_quadratic, x)
    reward += x @ problem.reward_linear + problem.reward_constant
    np.testing.assert_allclose(problem.log_h(x, problem.horizon), reward, rtol=1e-14)
    control = problem.control(x, 0.2)
    P, p, _ = problem.riccati(0.2)
    np.testing.assert_allclose(control, -(x @ P + p) @ problem.diffusion, rtol=1e-14)


def test_hjb_check_catches_mutations():
    problem = general(3, 3, 0.8)
    x = 2.0 * np.random.default_rng(1).normal(size=(50, 3))
    exact = problem.riccati

    def half(t):
        P, p, rho = exact(t)
        return 0.5 * P, p, rho

    def flipped(t):
        P, p, rho = exact(t)
        return P, -p, rho

    nodes, weights = np.polynomial.legendre.leggauss(12)

    def noiseless(t):
        """Leave out 1/2 int tr(Sigma P)."""
        P, p, rho = exact(t)
        rest = problem.horizon - t
        Ps = problem.riccati_grid(t + 0.5 * rest * (nodes + 1.0))[0]
        noise = problem.diffusion @ problem.diffusion.T
        return P, p, rho - 0.25 * rest * np.einsum("n,nij,ij->", weights, Ps, noise)

    for mutant in (half, flipped, noiseless):
        assert hjb_residual(problem, mutant, 0.35, x) > 1e-4
    # a shift in time solves the same autonomous equation: the terminal condition
    # is what catches it
    shifted = problem.riccati(problem.horizon - 1e-3)
    assert np.max(np.abs(shifted.quadratic - problem.reward_quadratic)) > 1e-4
    # a missing 1/2 in the running cost or a wrong sign in the reward
    doubled = dataclasses.replace(problem, running=2.0 * problem.running)
    assert hjb_residual(problem, doubled.riccati, 0.35, x) > 1e-4


def test_grid_agrees_with_single_times_in_any_order():
    problem = general(3, 4)
    times = np.random.default_rng(0).permutation(np.linspace(0.0, 1.3, 41))
    P, p, rho = problem.riccati_grid(times.reshape(1, 41))
    assert P.shape == (1, 41, 3, 3)
    assert rho.shape == (1, 41)
    for i in (0, 7, 40):
        one = problem.riccati(times[i])
        np.testing.assert_allclose(P[0, i], one.quadratic, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(p[0, i], one.linear, rtol=1e-12, atol=1e-13)
        assert rho[0, i] == pytest.approx(one.constant, rel=1e-12)


def test_long_fine_grid_does_not_drift():
    problem = general(2, 4)
    P, _, rho = problem.riccati_grid(np.linspace(0.0, 1.3, 3001))
    one = problem.riccati(0.0)
    np.testing.assert_allclose(P[0], one.quadratic, rtol=1e-12)
    assert rho[0] == pytest.approx(one.constant, rel=1e-11)


def scalar(**changes):
    fields = {
        "drift_matrix": [[0.0]],
        "drift_offset": [0.0],
        "diffusion": [[1.0]],
        "running": [[0.0]],
        "reward_quadratic": [[0.0]],
        "reward_linear": [0.0],
        "reward_constant": 0.0,
        "horizon": 1.0,
        "start_mean": [0.0],
        "start_covariance": [[0.0]],
    }
    return LinearQuadratic(**{**fields, **changes})


def test_large_curvature_keeps_its_digits():
    # P = 1 / (1/Q + s): a nearly pinned end
    problem = scalar(reward_quadratic=[[1e12]])
    for time in (0.0, 0.5, 1.0 - 1e-6):
        expected = 1.0 / (1e-12 + (1.0 - time))
        assert problem.riccati(time).quadratic[0, 0] == pytest.approx(
            expected, rel=1e-9 if time > 0.9 else 1e-14
        )


@pytest.mark.parametrize("curvature", [1.5, 40.0, 1e6])
def test_refuses_a_reward_too_convex(curvature):
    # P = -k / (1 - k s) escapes at s = 1/k, whatever the step passes over
    problem = scalar(reward_quadratic=[[-curvature]])
    time = 1.0 - 1.0 / curvature
    with pytest.raises(ParameterError, match=f"t <= {time:.6g}.*eigenvalue"):
        problem.riccati(0.0)
    # an escape in the far past of the time asked for is no reason to refuse
    P = problem.riccati(1.0 - 0.5 / curvature).quadratic[0, 0]
    # rounding of a time close to T is all that is lost
    expected = -2.0 * curvature
    assert abs(P - expected) <= (1e-14 + 1e-15 * curvature) * curvature


def test_refuses_a_running_reward_too_convex():
    # A = 0, F = -w^2: P = -w tan(w s), escape at s = pi / (2 w)
    problem = scalar(running=[[-16.0]], horizon=2.0)
    time = 2.0 - np.pi / 8.0
    with pytest.raises(ParameterError, match=f"t <= {time:.6g}"):
        problem.riccati(0.0)
    P = problem.riccati(2.0 - 0.3).quadratic[0, 0]
    assert float(P) == pytest.approx(-4.0 * np.tan(1.2), rel=1e-13)
    # a concave reward postpones it: P = w tan(atan(Q / w) - w s)
    later = dataclasses.replace(problem, reward_quadratic=[[8.0]])
    expected = 4.0 * np.tan(np.arctan(2.0) - 4.0 * 0.6)
    P = later.riccati(2.0 - 0.6).quadratic[0, 0]
    assert float(P) == pytest.approx(expected, rel=1e-12)


def test_refuses_an_infinite_normalizer():
    # P(0) = -0.5 / (1 - 0.5) = -1: integrable against N(0, S_0) iff S_0 < 1
    fine = scalar(reward_quadratic=[[-0.5]], start_covariance=[[0.9]])
    # terminal law N(0, 1.9) tilted by exp(x^2 / 4)
    assert fine.log_normalizer() == pytest.approx(-0.5 * np.log(1 - 0.95), rel=1e-13)
    with pytest.raises(ParameterError, match=r"eigenvalue -0\.1"):
        scalar(reward_quadratic=[[-0.5]], start_covariance=[[1.1]]).log_normalizer()


@pytest.mark.parametrize(
    "changes",
    [
        {"horizon": 0.0},
        {"drift_matrix": [[0.0, 1.0]]},
        {"drift_offset": [np.nan]},
        {"start_covariance": [[-1.0]]},
        {"reward_constant": np.inf},
    ],
)
def test_refuses_bad_coefficients(changes):
    with pytest.raises(ParameterError):
        scalar(**changes)


def test_refuses_asymmetric_costs_and_times_outside():
    with pytest.raises(ParameterError, match="symmetric"):
        dataclasses.replace(general(), running=np.triu(np.ones((3, 3))))
    with pytest.raises(ParameterError, match="times"):
        scalar().riccati(1.1)


# ------------------------------------------------------------ moments, normalizers


@pytest.mark.parametrize("fixed", [False, True])
def test_moments_solve_their_equations(fixed):
    problem = general(3, 6, fixed=fixed)
    zero = np.zeros((3, 3)), np.zeros(3)
    _, m, C = policy_ode(problem, lambda t: zero[0], lambda t: zero[1])
    mean, covariance = problem.base_moments(problem.horizon)
    np.testing.assert_allclose(mean, m, rtol=2e-12, atol=1e-12)
    np.testing.assert_allclose(covariance, C, rtol=2e-12, atol=1e-12)
    _, m, C = policy_ode(problem, *optimal(problem))
    mean, covariance = problem.tilted_moments([0.0, 0.4, problem.horizon])
    np.testing.assert_allclose(mean[2], m, rtol=2e-12, atol=1e-12)
    np.testing.assert_allclose(covariance[2], C, rtol=2e-12, atol=1e-12)
    np.testing.assert_array_equal(mean[0], problem.start_mean)
    np.testing.assert_allclose(mean[1], problem.tilted_moments(0.4)[0], rtol=1e-13)


def test_base_moments_of_a_stiff_process_stay_finite():
    problem = scalar(drift_matrix=[[-900.0]], horizon=3.0, start_mean=[2.0])
    mean, covariance = problem.base_moments([1e-3, 3.0])
    assert mean[0, 0] == pytest.approx(2.0 * np.exp(-0.9), rel=1e-12)
    expected = -np.expm1(-1.8) / 1800.0
    assert covariance[0, 0, 0] == pytest.approx(expected, rel=1e-12)
    assert covariance[1, 0, 0] == pytest.approx(1.0 / 1800.0, rel=1e-12)


def terminal_tilt(problem):
    """Return log Z, mean and covariance of p_T e^r / Z by one Gaussian integral."""
    m, C = problem.base_moments(problem.horizon)
    Q, q = problem.reward_quadratic, problem.reward_linear
    inverse = np.linalg.inv(C)
    covariance = np.linalg.inv(inverse + Q)
    mean = covariance @ (inverse @ m + q)
    log_z = 0.5 * (
        mean @ np.linalg.solve(covariance, mean)
        - m @ inverse @ m
        - np.linalg.slogdet(np.eye(len(m)) + C @ Q)[1]
    )
    return log_z + problem.reward_constant, mean, covariance


def test_terminal_law_and_normalizer_without_running_cost():
    problem = dataclasses.replace(general(3, 7), running=np.zeros((3, 3)))
    log_z, mean, covariance = terminal_tilt(problem)
    assert problem.log_normalizer() == pytest.approx(log_z, rel=1e-12)
    # a random start that the end depends on: the initial-value bias
    assert np.max(np.abs(problem.tilted_moments(1.3)[0] - mean)) > 1e-2
    fixed = dataclasses.replace(problem, start_covariance=np.zeros((3, 3)))
    log_z, mean, covariance = terminal_tilt(fixed)
    got = fixed.tilted_moments(1.3)
    np.testing.assert_allclose(got[0], mean, rtol=1e-12)
    np.testing.assert_allclose(got[1], covariance, rtol=1e-11, atol=1e-13)
    assert fixed.log_normalizer() == pytest.approx(log_z, rel=1e-12)
    assert fixed.optimal_cost() == pytest.approx(-log_z, rel=1e-12)


def test_normalizer_check_catches_mutations():
    problem = dataclasses.replace(general(3, 7), running=np.zeros((3, 3)))
    log_z = terminal_tilt(problem)[0]
    q, Q = problem.reward_linear, problem.reward_quadratic
    for mutant in (
        dataclasses.replace(problem, reward_linear=-q),
        dataclasses.replace(problem, reward_quadratic=2.0 * Q),
        dataclasses.replace(problem, reward_constant=-problem.reward_constant),
        dataclasses.replace(problem, horizon=1.29),
    ):
        assert abs(mutant.log_normalizer() - log_z) > 1e-3
    # Jensen's gap of the random start: E V against -log E e^{-V}
    assert problem.optimal_cost() + log_z > 1e-2


# ------------------------------------------------------------------- other feedback


@pytest.mark.parametrize("fixed", [False, True])
def test_policy_objective_against_the_moment_equations(fixed):
    problem = general(3, 8, fixed=fixed)
    feedback = Feedback(problem)
    answer = problem.policy_objective(*feedback.all)
    expected = policy_ode(problem, *feedback.pair)[0]
    assert answer.error_bound < 1e-11 * abs(expected)
    # DOP853 at rtol 1e-13 has about 1e-12 of its own
    assert abs(answer.objective - expected) <= answer.error_bound + 2e-12 * expected


def central(function, theta, i, h=2e-2):
    """Return the eighth-order central difference of ``function`` in theta_i."""
    weights = [4 / 5, -1 / 5, 4 / 105, -1 / 280]
    unit = np.eye(len(theta))[i]
    return (
        sum(
            w * (function(theta + j * h * unit) - function(theta - j * h * unit))
            for j, w in enumerate(weights, 1)
        )
        / h
    )


def test_policy_gradient_against_differences_of_the_moment_equations():
    problem = general(2, 9, horizon=0.9)
    feedback = Feedback(problem)

    def objective(theta):
        return policy_ode(problem, *Feedback(problem, theta).pair)[0]

    answer = problem.policy_objective(*feedback.all)
    for i in range(4):
        expected = central(objective, feedback.theta, i)
        assert answer.gradient[i] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def matching_ode(problem, feedback):
    """Return the matching gradient by forward moments and the regression function.

    The lean adjoint is regressed through its joint law with X: with the transition
    matrices of A and of the closed loop, E[a_t | X_t] = S x + s, solved as an ODE
    from T down and read off at 24 Gauss nodes.
    """
    A, a, F = problem.drift_matrix, problem.drift_offset, problem.running
    sigma, d, T = problem.diffusion, problem.dim, problem.horizon

    def forward(t, y):
        m, C = y[:d], y[d:].reshape(d, d)
        B = A + sigma @ feedback.gain(t)
        return np.concatenate(
            [
                B @ m + a + sigma @ feedback.bias(t),
                (B @ C + C @ B.T + sigma @ sigma.T).ravel(),
            ]
        )

    def back(t, y):
        S, s = y[: d * d].reshape(d, d), y[d * d :]
        B, b = A + sigma @ feedback.gain(t), a + sigma @ feedback.bias(t)
        return -np.concatenate([(A.T @ S + S @ B + F).ravel(), A.T @ s + S @ b])

    nodes, weights = np.polynomial.legendre.leggauss(24)
    nodes, weights = 0.5 * T * (nodes + 1.0), 0.5 * T * weights
    options = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13}
    start = np.concatenate([problem.start_mean, problem.start_covariance.ravel()])
    end = np.concatenate([problem.reward_quadratic.ravel(), -problem.reward_linear])
    ahead = solve_ivp(forward, (0, T), start, t_eval=nodes, **options).y.T
    behind = solve_ivp(back, (T, 0), end, t_eval=nodes[::-1], **options).y.T[::-1]
    total = np.zeros(4)
    for t, w, y, z in zip(nodes, weights, ahead, behind, strict=True):
        m, C = y[:d], y[d:].reshape(d, d)
        R = feedback.gain(t) + sigma.T @ z[: d * d].reshape(d, d)
        e = feedback.bias(t) + sigma.T @ z[d * d :]
        for p in range(4):
            dK, dk = feedback.gain_derivative(t)[p], feedback.bias_derivative(t)[p]
            total[p] += w * (np.sum(dK * (R @ C)) + (dK @ m + dk) @ (R @ m + e))
    return total


def test_matching_gradient_against_the_adjoint_equation():
    problem = general(3, 10)
    feedback = Feedback(problem)
    answer = problem.matching_gradient(*feedback.all)
    # the dense output of DOP853 limits the reference to about 1e-9
    np.testing.assert_allclose(
        answer.gradient, matching_ode(problem, feedback), rtol=2e-8
    )
    full = problem.policy_objective(*feedback.all).gradient
    assert np.min(np.abs(answer.gradient - full)) > 1e-2


def test_both_gradients_vanish_at_the_optimum_and_nowhere_near():
    problem = general(3, 11)
    gain, bias = optimal(problem)
    directions = Feedback(problem)
    derivatives = directions.gain_derivative, directions.bias_derivative
    best = problem.policy_objective(gain, bias, *derivatives)
    lean = problem.matching_gradient(gain, bias, *derivatives)
    assert best.objective == pytest.approx(problem.optimal_cost(), rel=1e-12)
    assert np.max(np.abs(best.gradient)) <= best.error_bound < 1e-11
    assert np.max(np.abs(lean.gradient)) <= lean.error_bound < 1e-11
    assert problem.control_error(gain, bias).value < 1e-20
    # mutations: a gain 1 % off, the control of the reward with its sign flipped, of
    # a running cost without its 1/2, of a time later by one fiftieth
    mutants = [
        (lambda t: 1.01 * gain(t), bias),
        (gain, lambda t: -bias(t)),
        optimal(dataclasses.replace(problem, running=2.0 * problem.running)),
        (lambda t: gain(min(t + 0.026, 1.3)), bias),
    ]
    for mutant in mutants:
        moved = problem.policy_objective(*mutant, *derivatives, breaks=[1.274])
        pulled = problem.matching_gradient(*mutant, *derivatives, breaks=[1.274])
        assert np.max(np.abs(moved.gradient)) > 1e-4
        assert np.max(np.abs(pulled.gradient)) > 1e-4


@pytest.mark.parametrize("fixed", [False, True])
def test_regret_is_half_the_control_error(fixed):
    problem = general(3, 12, fixed=fixed)
    feedback = Feedback(problem)
    answer = problem.policy_objective(*feedback.all)
    error = problem.control_error(*feedback.pair)
    regret = answer.objective - problem.optimal_cost()
    slack = answer.error_bound + error.error_bound + 1e-12 * abs(answer.objective)
    assert abs(regret - 0.5 * error.value) <= slack
    assert slack < 1e-9 * regret


@pytest.mark.parametrize("scale", [0.7, 12.0])
def test_stiff_and_unstable_drift(scale):
    # eigenvalues of A up to -10 and +8 over a horizon of 2: the feedback 1 % above
    # the optimum is judged by the regret identity, the optimum by its own cost
    problem = general(2, 1, 2.0, scale)
    gain, bias = optimal(problem)
    directions = Feedback(problem)
    derivatives = directions.gain_derivative, directions.bias_derivative
    best = problem.policy_objective(gain, bias, *derivatives)
    cost = problem.optimal_cost()
    assert abs(best.objective - cost) <= best.error_bound < 1e-9 * cost
    assert np.max(np.abs(best.gradient)) <= best.error_bound

    def stronger(t):
        return 1.01 * gain(t)

    objective = problem.policy_objective(stronger, bias, *derivatives)
    error = problem.control_error(stronger, bias)
    slack = objective.error_bound + error.error_bound
    assert abs(objective.objective - cost - 0.5 * error.value) <= slack
    assert slack < 1e-6 * error.value


def test_breaks_of_the_feedback():
    problem = general(2, 13, horizon=1.0)
    third = 1.0 / 3.0

    def gain(t):
        return np.eye(2) * (-0.8 if t < third else 0.4)

    def bias(t):
        return np.zeros(2)

    def gain_derivative(t):
        return np.stack([np.eye(2) * (t < third), np.eye(2) * (t >= third)])

    def bias_derivative(t):
        return np.zeros((2, 2))

    functions = gain, bias, gain_derivative, bias_derivative
    told = problem.policy_objective(*functions, breaks=[third])
    assert told.error_bound < 1e-12
    # not told: less accurate, and the bound says so
    blind = problem.policy_objective(*functions)
    assert abs(blind.objective - told.objective) <= blind.error_bound
    assert np.max(np.abs(blind.gradient - told.gradient)) <= blind.error_bound
    assert blind.error_bound > 1e-6
