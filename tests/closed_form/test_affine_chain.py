from __future__ import annotations

import dataclasses

import mpmath
import numpy as np
import pytest
from scipy.stats import norm

from sdebench.closed_form.affine_chain import AffineChain, parameter_derivatives
from sdebench.closed_form.linear_quadratic import LinearQuadratic
from sdebench.errors import ParameterError
from sdebench.simulate.tables import LinearTables


def small_chain(n_steps=4, dim=2, seed=0, fixed=False):
    """Return a chain whose every coefficient differs from step to step."""
    rng = np.random.default_rng(seed)

    def spd(size, *lead):
        root = rng.normal(size=(*lead, dim, dim))
        return size * root @ np.swapaxes(root, -1, -2) / dim

    start = spd(0.4)
    return AffineChain(
        transition=np.eye(dim) + 0.4 * rng.normal(size=(n_steps, dim, dim)),
        offset=0.5 * rng.normal(size=(n_steps, dim)),
        noise=0.4 * np.eye(dim) + 0.2 * rng.normal(size=(n_steps, dim, dim)),
        running=spd(0.3, n_steps),
        reward_quadratic=spd(0.7),
        reward_linear=rng.normal(size=dim),
        reward_constant=0.21,
        start_mean=rng.normal(size=dim),
        start_covariance=0.0 * start if fixed else start,
    )


def small_feedback(chain, n_params=3, seed=1):
    """Return K, k and their derivatives; not the optimum of anything."""
    rng = np.random.default_rng(seed)
    n, d, m = chain.noise.shape
    dK = 0.4 * rng.normal(size=(n_params, n, m, d))
    dk = 0.5 * rng.normal(size=(n_params, n, m))
    theta = rng.normal(size=n_params)
    return (
        np.einsum("p,pnij->nij", theta, dK),
        np.einsum("p,pni->ni", theta, dk),
        dK,
        dk,
    )


class DensePaths:
    """The law of whole paths as one Gaussian vector, no recursion in reverse.

    A path is X_n = rows[n] v with v = (1, X_0 - m_0 scaled, z_0, ..., z_{N-1})
    standard normal after its first entry; every answer is a trace of products.
    """

    def __init__(self, chain, gain, bias):
        self.chain = chain
        n_steps, d, m = chain.noise.shape
        values, vectors = np.linalg.eigh(chain.start_covariance)
        size = 1 + d + n_steps * m
        row = np.zeros((d, size))
        row[:, 0] = chain.start_mean
        row[:, 1 : 1 + d] = vectors * np.sqrt(np.maximum(values, 0.0))
        self.states, self.controls = [row], []
        for n in range(n_steps):
            control = gain[n] @ row
            control[:, 0] += bias[n]
            driven = control.copy()
            start = 1 + d + n * m
            driven[:, start : start + m] += np.eye(m)
            row = chain.transition[n] @ row + chain.noise[n] @ driven
            row[:, 0] += chain.offset[n]
            self.states.append(row)
            self.controls.append(control)

    def quadratic(self):
        """Return B with running cost - reward = 1/2 v^T B v."""
        chain, X = self.chain, self.states
        B = sum(x.T @ F @ x for x, F in zip(X[:-1], chain.running, strict=True))
        B = B + X[-1].T @ chain.reward_quadratic @ X[-1]
        linear = chain.reward_linear @ X[-1]
        B[0] -= linear
        B[:, 0] -= linear
        B[0, 0] -= 2.0 * chain.reward_constant
        return B

    def objective(self):
        effort = sum(np.sum(w * w) for w in self.controls)
        return 0.5 * (effort + np.trace(self.quadratic()))

    def log_normalizer(self):
        """Return log E exp(-1/2 v^T B v), of the base when the control is zero."""
        B = self.quadratic()
        inner, cross = B[1:, 1:] + np.eye(len(B) - 1), B[1:, 0]
        solved = np.linalg.solve(inner, cross)
        return 0.5 * (cross @ solved - B[0, 0] - np.linalg.slogdet(inner)[1])

    def adjoint_gradient(self, dK, dk, lean, shift=1, sign=1.0):
        """Return E sum_n dw_n^T (w_n + G_n^T a_{n+1}) from path-wise linear adjoints.

        ``shift`` and ``sign`` are there to be wrong in the mutation tests.
        """
        chain, X, w = self.chain, self.states, self.controls
        n_steps = chain.n_steps
        adjoint = [None] * (n_steps + 1)
        end = chain.reward_quadratic @ X[-1]
        end[:, 0] -= sign * chain.reward_linear
        adjoint[n_steps] = end
        for n in reversed(range(n_steps)):
            a = chain.transition[n].T @ adjoint[n + 1] + chain.running[n] @ X[n]
            if not lean:
                gain = self.gain[n]
                a = a + gain.T @ (w[n] + chain.noise[n].T @ adjoint[n + 1])
            adjoint[n] = a
        total = np.zeros(len(dK))
        for n in range(n_steps):
            residual = w[n] + chain.noise[n].T @ adjoint[n + shift]
            for p in range(len(dK)):
                direction = dK[p, n] @ X[n]
                direction[:, 0] += dk[p, n]
                total[p] += np.sum(direction * residual)
        return total


def dense(chain, gain, bias):
    paths = DensePaths(chain, gain, bias)
    paths.gain = gain
    return paths


def zeros(chain):
    n, d, m = chain.noise.shape
    return np.zeros((n, m, d)), np.zeros((n, m))


CHAINS = [(4, 2, 0, False), (3, 3, 4, True), (1, 1, 2, False), (6, 1, 3, False)]


@pytest.mark.parametrize("shape", CHAINS)
def test_against_the_joint_law_of_the_path(shape):
    chain = small_chain(*shape)
    K, k, dK, dk = small_feedback(chain)
    paths = dense(chain, K, k)
    assert chain.objective(K, k) == pytest.approx(paths.objective(), rel=1e-13)
    for got, lean in ((chain.gradient, False), (chain.matching_gradient, True)):
        expected = paths.adjoint_gradient(dK, dk, lean)
        size = np.max(np.abs(expected))
        np.testing.assert_allclose(got(K, k, dK, dk), expected, atol=1e-13 * size)
    base = dense(chain, *zeros(chain))
    assert chain.log_normalizer() == pytest.approx(base.log_normalizer(), rel=1e-12)
    means, covariances = chain.moments(K, k)
    for n, row in enumerate(paths.states):
        np.testing.assert_allclose(means[n], row[:, 0], rtol=1e-13, atol=1e-14)
        spread = row[:, 1:] @ row[:, 1:].T
        np.testing.assert_allclose(covariances[n], spread, rtol=1e-12, atol=1e-14)


def test_joint_law_check_catches_mutations():
    chain = small_chain()
    K, k, dK, dk = small_feedback(chain)
    paths, base = dense(chain, K, k), dense(chain, *zeros(chain))
    mutants = {
        "sign of the reward": {"reward_linear": -chain.reward_linear},
        "missing half": {"reward_quadratic": 2.0 * chain.reward_quadratic},
        "running cost one step late": {"running": np.roll(chain.running, 1, axis=0)},
        "constant": {"reward_constant": -chain.reward_constant},
    }
    for change in mutants.values():
        mutant = dataclasses.replace(chain, **change)
        assert abs(mutant.objective(K, k) - paths.objective()) > 1e-3
        assert abs(mutant.log_normalizer() - base.log_normalizer()) > 1e-3
    full, lean = chain.gradient(K, k, dK, dk), chain.matching_gradient(K, k, dK, dk)
    for got, is_lean in ((full, False), (lean, True)):
        wrong = [
            paths.adjoint_gradient(dK, dk, not is_lean),
            paths.adjoint_gradient(dK, dk, is_lean, shift=0),
            paths.adjoint_gradient(dK, dk, is_lean, sign=-1.0),
        ]
        for other in wrong:
            assert np.max(np.abs(got - other)) > 1e-2 * np.max(np.abs(got))


@pytest.mark.parametrize("shape", CHAINS)
def test_gradient_against_differences(shape):
    chain = small_chain(*shape)
    K, k, dK, dk = small_feedback(chain)
    weights, h = [4 / 5, -1 / 5, 4 / 105, -1 / 280], 1e-2
    got = chain.gradient(K, k, dK, dk)
    for p in range(len(dK)):
        slope = sum(
            w
            * (
                chain.objective(K + j * h * dK[p], k + j * h * dk[p])
                - chain.objective(K - j * h * dK[p], k - j * h * dk[p])
            )
            for j, w in enumerate(weights, 1)
        )
        # eighth order: what is left is rounding, eps J / h
        assert got[p] == pytest.approx(slope / h, rel=1e-10, abs=1e-11)


def test_optimum_is_stationary_and_optimal():
    chain = small_chain()
    K, k = chain.optimal_feedback()
    # one parameter for every entry of every K_n and k_n
    n, d, m = chain.noise.shape
    count = n * m * (d + 1)
    unit = np.eye(count).reshape(count, n, m, d + 1)
    derivatives = unit[..., :d], unit[..., d]
    assert np.max(np.abs(chain.gradient(K, k, *derivatives))) < 1e-13
    assert np.max(np.abs(chain.matching_gradient(K, k, *derivatives))) < 1e-13
    assert chain.objective(K, k) == pytest.approx(chain.optimal_cost(), rel=1e-14)
    P, p, rho = chain.value_coefficients()
    tilted = chain.value_coefficients(tilted=True)
    np.testing.assert_array_equal(P, tilted[0])
    np.testing.assert_array_equal(p, tilted[1])
    # tr x > log det (1 + x): the best mean shift does not reach the tilted chain
    assert np.all(rho[:-1] > tilted[2][:-1])
    assert chain.optimal_cost() > -chain.log_normalizer()
    for gain, bias in ((1.01 * K, k), (K, -k), (np.roll(K, 1, axis=0), k)):
        assert np.max(np.abs(chain.gradient(gain, bias, *derivatives))) > 1e-4
        assert np.max(np.abs(chain.matching_gradient(gain, bias, *derivatives))) > 1e-4


def test_regret_is_the_weighted_control_error():
    # J_N - min J_N = 1/2 E sum (w - w*)^T (I + G^T P_{n+1} G) (w - w*)
    chain = small_chain(5, 2, 7)
    K, k, _, _ = small_feedback(chain)
    best_K, best_k = chain.optimal_feedback()
    P = chain.value_coefficients()[0]
    total = 0.0
    means, covariances = chain.moments(K, k)
    for n in range(chain.n_steps):
        G = chain.noise[n]
        gap = np.column_stack((K[n] - best_K[n], k[n] - best_k[n]))
        z = np.append(means[n], 1.0)
        second = np.outer(z, z)
        second[:-1, :-1] += covariances[n]
        total += np.trace(gap.T @ (np.eye(2) + G.T @ P[n + 1] @ G) @ gap @ second)
    regret = chain.objective(K, k) - chain.optimal_cost()
    assert regret == pytest.approx(0.5 * total, rel=1e-12)
    distance = chain.control_distance(K, k, best_K, best_k)
    assert 0.0 < distance < total
    assert chain.control_distance(K, k, K, k) == 0.0


def test_scalar_chain_in_fifty_digits():
    # x' = M x + c + G (w + z), two steps, with everything worked out by hand
    chain = AffineChain(
        transition=[[[1.1]], [[0.9]]],
        offset=[[0.2], [-0.3]],
        noise=[[[0.5]], [[0.7]]],
        running=[[[0.4]], [[0.6]]],
        reward_quadratic=[[1.3]],
        reward_linear=[0.8],
        reward_constant=0.1,
        start_mean=[0.35],
        start_covariance=[[0.0]],
    )
    with mpmath.workdps(50):
        M, c, G, F = (
            [mpmath.mpf(float(x.ravel()[n])) for n in range(2)]
            for x in (chain.transition, chain.offset, chain.noise, chain.running)
        )
        P, p, rho = mpmath.mpf(1.3), -mpmath.mpf(0.8), -mpmath.mpf(0.1)
        log_rho = rho
        for n in (1, 0):
            # minimise over w the value at x = 0, 1, -1, then interpolate
            weight = 1 + G[n] ** 2 * P

            def best(x, n=n, weight=weight, P=P, p=p):
                mean = M[n] * x + c[n]
                w = -G[n] * (P * mean + p) / weight
                y = mean + G[n] * w
                return w**2 / 2 + P * y**2 / 2 + p * y + F[n] * x**2 / 2

            plus, zero, minus = best(1), best(0), best(-1)
            rho += zero + G[n] ** 2 * P / 2
            log_rho += zero + mpmath.log(weight) / 2
            P, p = plus + minus - 2 * zero, (plus - minus) / 2
        x = mpmath.mpf(0.35)
        cost = P * x**2 / 2 + p * x + rho
        log_z = -(P * x**2 / 2 + p * x + log_rho)
    assert chain.optimal_cost() == pytest.approx(float(cost), rel=1e-14)
    assert chain.log_normalizer() == pytest.approx(float(log_z), rel=1e-14)


def test_refuses_what_cannot_be_integrated():
    one = {
        "transition": [[[1.0]]],
        "offset": [[0.0]],
        "noise": [[[1.0]]],
        "running": [[[0.0]]],
        "reward_linear": [0.0],
        "reward_constant": 0.0,
        "start_mean": [0.0],
    }
    convex = AffineChain(**one, reward_quadratic=[[-1.25]], start_covariance=[[0.0]])
    with pytest.raises(ParameterError, match=r"step 0 of 1.*eigenvalue -0\.25"):
        convex.log_normalizer()
    with pytest.raises(ParameterError, match="eigenvalue"):
        convex.optimal_feedback()
    # P_0 = -0.5 / (1 - 0.5) = -1 against a start variance of 1.2
    wide = AffineChain(**one, reward_quadratic=[[-0.5]], start_covariance=[[1.2]])
    with pytest.raises(ParameterError, match=r"eigenvalue -0\.2"):
        wide.log_normalizer()
    with pytest.raises(ParameterError, match="gain has shape"):
        wide.objective(np.zeros((2, 1, 1)), np.zeros((1, 1)))


# ------------------------------------------------------------------------- tables


def test_tables_give_the_same_chain():
    chain = small_chain(5, 2, 8)
    rng = np.random.default_rng(3)
    n, d, m = chain.noise.shape
    K, k, _, _ = small_feedback(chain)
    factor = np.linalg.cholesky(chain.start_covariance)
    tables = LinearTables(
        transition=chain.transition,
        offset=chain.offset,
        noise=chain.noise,
        gain=K,
        bias=k,
        feature_gain=rng.normal(size=(2, n, m, d)),
        feature_bias=rng.normal(size=(2, n, m)),
        basis=rng.normal(size=(3, 2, n)),
        running=chain.running,
        reward_quadratic=chain.reward_quadratic,
        reward_linear=chain.reward_linear,
        reward_constant=np.array([chain.reward_constant]),
        start_mean=chain.start_mean,
        start_factor=factor,
    )
    again = AffineChain.from_tables(tables)
    assert again.objective(K, k) == pytest.approx(chain.objective(K, k), rel=1e-14)
    dK, dk = parameter_derivatives(tables)
    expected = sum(tables.basis[1, s, 2] * tables.feature_gain[s, 2] for s in range(2))
    np.testing.assert_allclose(dK[1, 2], expected, rtol=1e-14, atol=1e-15)
    expected = sum(tables.basis[1, s, 2] * tables.feature_bias[s, 2] for s in range(2))
    np.testing.assert_allclose(dk[1, 2], expected, rtol=1e-14, atol=1e-15)


# -------------------------------------------------------------------- Monte Carlo

FALSE_ALARM = 1e-6


def simulate(chain, K, k, dK, dk, n_paths, shift=1, sign=1.0):
    """Return per-path gradients, full and lean, (2, n_paths, P), and the costs."""
    rng = np.random.default_rng(20)
    n_steps, d, m = chain.noise.shape
    factor = np.linalg.cholesky(chain.start_covariance)
    x = chain.start_mean + rng.normal(size=(n_paths, d)) @ factor.T
    states, controls = [x], []
    for n in range(n_steps):
        w = x @ K[n].T + k[n]
        z = rng.normal(size=(n_paths, m))
        x = x @ chain.transition[n].T + chain.offset[n] + (w + z) @ chain.noise[n].T
        states.append(x)
        controls.append(w)
    Q, q = chain.reward_quadratic, sign * chain.reward_linear
    cost = 0.5 * np.einsum("bi,ij,bj->b", x, Q, x) - x @ q
    cost -= chain.reward_constant
    for n in range(n_steps):
        cost += 0.5 * np.sum(controls[n] ** 2, axis=1)
        state = states[n]
        cost += 0.5 * np.einsum("bi,ij,bj->b", state, chain.running[n], state)
    rows = np.zeros((2, n_paths, len(dK)))
    for lean in (0, 1):
        adjoint = [x @ Q - q]
        for n in reversed(range(n_steps)):
            ahead = adjoint[0]
            a = ahead @ chain.transition[n] + states[n] @ chain.running[n]
            if not lean:
                a += (controls[n] + ahead @ chain.noise[n]) @ K[n]
            adjoint.insert(0, a)
        for n in range(n_steps):
            residual = controls[n] + adjoint[n + shift] @ chain.noise[n]
            for p in range(len(dK)):
                direction = states[n] @ dK[p, n].T + dk[p, n]
                rows[lean, :, p] += np.sum(direction * residual, axis=1)
    return rows, cost


def alarm(samples, exact, comparisons):
    """Return whether a mean is further off than chance, at FALSE_ALARM in total."""
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    limit = norm.isf(FALSE_ALARM / (2 * comparisons))
    return bool(np.any(np.abs(samples.mean(axis=0) - exact) > limit * error))


def test_monte_carlo():
    chain = small_chain(4, 2, 11)
    K, k, dK, dk = small_feedback(chain)
    rows, cost = simulate(chain, K, k, dK, dk, 100_000)
    full, lean = chain.gradient(K, k, dK, dk), chain.matching_gradient(K, k, dK, dk)
    comparisons = 2 * len(dK) + 1
    assert not alarm(rows[0], full, comparisons)
    assert not alarm(rows[1], lean, comparisons)
    assert not alarm(cost, chain.objective(K, k), comparisons)
    # the same threshold sees the usual mistakes
    assert alarm(rows[1], full, comparisons)
    assert alarm(rows[0], lean, comparisons)
    for mistake in ({"shift": 0}, {"sign": -1.0}):
        wrong, wrong_cost = simulate(chain, K, k, dK, dk, 100_000, **mistake)
        assert alarm(wrong[0], full, comparisons)
        assert alarm(wrong[1], lean, comparisons)
        if "sign" in mistake:
            assert alarm(wrong_cost, chain.objective(K, k), comparisons)


# -------------------------------------------------------- discrete and continuous


def romberg(function, first=16, levels=8):
    """Return the limit of a function of N with an expansion in 1/N, and its change."""
    row = []
    for level in range(levels):
        new = [np.asarray(function(first * 2**level))]
        for i, old in enumerate(row):
            new.append(new[i] + (new[i] - old) / (2 ** (i + 1) - 1))
        change = np.max(np.abs(new[-1] - row[-1])) if row else np.inf
        row = new
    return row[-1], change


def continuous(seed=0):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(2, 2))
    return LinearQuadratic(
        drift_matrix=0.5 * rng.normal(size=(2, 2)),
        drift_offset=rng.normal(size=2),
        diffusion=np.eye(2) + 0.2 * rng.normal(size=(2, 2)),
        running=0.3 * root @ root.T,
        reward_quadratic=np.array([[0.8, 0.2], [0.2, 0.5]]),
        reward_linear=rng.normal(size=2),
        reward_constant=-0.4,
        horizon=1.0,
        start_mean=rng.normal(size=2),
        start_covariance=np.array([[0.3, 0.1], [0.1, 0.2]]),
    )


FEATURES = 0.4 * np.random.default_rng(9).normal(size=(3, 2, 3))
THETA = np.array([0.6, -0.8, 0.5])


def basis(t):
    return np.array([1.0, np.cos(t), np.exp(-t)])


def feature(t):
    """Return dK (P, d, d) and dk (P, d) at time t."""
    maps = basis(t)[:, None, None] * FEATURES
    return maps[..., :2], maps[..., 2]


def answers(problem, n_steps):
    times = np.linspace(0.0, problem.horizon, n_steps + 1)
    chain = AffineChain.euler_maruyama(problem, times)
    scale = np.sqrt(problem.horizon / n_steps)
    maps = [feature(t) for t in times[:-1]]
    dK = scale * np.stack([m for m, _ in maps], axis=1)
    dk = scale * np.stack([s for _, s in maps], axis=1)
    K, k = np.einsum("p,pnij->nij", THETA, dK), np.einsum("p,pni->ni", THETA, dk)
    best = chain.optimal_feedback()
    P, p, rho = chain.value_coefficients()
    return np.concatenate(
        [
            [chain.optimal_cost(), chain.log_normalizer(), chain.objective(K, k)],
            chain.gradient(K, k, dK, dk),
            chain.matching_gradient(K, k, dK, dk),
            [chain.control_distance(K, k, *best)],
            P[0].ravel(),
            p[0],
            rho[:1],
            chain.moments(*best)[1][-1].ravel(),
        ]
    )


def limits(problem):
    def pick(part, contract):
        return lambda t: contract(feature(t)[part])

    functions = (
        pick(0, lambda maps: np.einsum("p,pij->ij", THETA, maps)),
        pick(1, lambda maps: THETA @ maps),
        pick(0, lambda maps: maps),
        pick(1, lambda maps: maps),
    )
    policy = problem.policy_objective(*functions)
    P, p, rho = problem.riccati(0.0)
    return np.concatenate(
        [
            [problem.optimal_cost(), problem.log_normalizer(), policy.objective],
            policy.gradient,
            problem.matching_gradient(*functions).gradient,
            [problem.control_error(*functions[:2]).value],
            P.ravel(),
            p,
            [rho],
            problem.tilted_moments(1.0)[1].ravel(),
        ]
    )


def test_chain_converges_to_the_continuous_problem():
    problem = continuous()
    exact = limits(problem)
    limit, change = romberg(lambda n: answers(problem, n))
    assert change < 1e-10
    np.testing.assert_allclose(limit, exact, rtol=1e-11, atol=1e-11)
    # first order: the error halves, and it is there at all
    coarse, fine = answers(problem, 256) - exact, answers(problem, 512) - exact
    np.testing.assert_allclose(coarse / fine, 2.0, atol=0.1)


@pytest.mark.parametrize(
    ("a", "p", "q", "distance"), [(0.2, 0.2, 0.1, 2.3e-2), (1.0, 1.0, 0.5, 3.1e-2)]
)
def test_distance_of_the_discrete_optimum(a, p, q, distance):
    # SOC Matching's quadratic problems at their 50 steps.  Relative L2 norm:
    # sqrt(E sum |u*_N - u*|^2 / E sum |u*|^2) over the chain's optimal paths.
    dim, n_steps = 20, 50
    eye = np.eye(dim)
    problem = LinearQuadratic(
        drift_matrix=a * eye,
        drift_offset=np.zeros(dim),
        diffusion=eye,
        running=2.0 * p * eye,
        reward_quadratic=2.0 * q * eye,
        reward_linear=np.zeros(dim),
        reward_constant=0.0,
        horizon=1.0,
        start_mean=np.zeros(dim),
        start_covariance=0.25 * eye,
    )
    times = np.linspace(0.0, 1.0, n_steps + 1)
    chain = AffineChain.euler_maruyama(problem, times)
    P, linear, _ = problem.riccati_grid(times[:-1])
    scale = np.sqrt(1.0 / n_steps)
    exact = -scale * P, -scale * linear
    best_K, best_k = chain.optimal_feedback()
    gap = chain.control_distance(best_K, best_k, *exact)
    # |u*|^2 over the same paths, whose mean is zero
    means, covariances = chain.moments(best_K, best_k)
    size = np.einsum("nij,nik,njk->", exact[0], exact[0], covariances[:-1])
    assert np.all(means == 0.0)
    assert np.sqrt(gap / size) == pytest.approx(distance, abs=5e-4)
