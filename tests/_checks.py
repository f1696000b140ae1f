"""The checks that every problem must pass, as functions that raise AssertionError.

Each takes a problem and reads only its functions, its truth and its tables, so that
mutation tests can hand in a problem that is wrong on purpose and see the check fail.
Deterministic checks return the largest relative error found.

False alarms of the statistical checks: every call spends ``ALARM`` and divides it by
its number of comparisons, so that fewer than 400 calls raise a false alarm with
probability below 1e-4 altogether.  Seeds are fixed.
"""

from __future__ import annotations

import copy
import dataclasses
from itertools import pairwise, product

import numpy as np
import pytest
from numpy.polynomial.legendre import leggauss
from scipy.integrate import solve_ivp
from scipy.special import logsumexp
from scipy.stats import norm

import sdebench
from sdebench.closed_form import log_quadratics as lq
from sdebench.errors import NotExactError
from sdebench.linear_problem import LinearProblem
from sdebench.simulate.tables import LinearTables
from sdebench.tilting_problem import TiltingProblem

ALARM = 1e-4 / 400

# Central difference of order ten.
TENTH = np.array([5 / 6, -5 / 21, 5 / 84, -5 / 504, 1 / 1260])


def derivative(function, step):
    """Return the derivative of ``function`` at 0."""
    terms = (
        c * (function(k * step) - function(-k * step)) for k, c in enumerate(TENTH, 1)
    )
    return sum(terms) / step


def z_limit(comparisons):
    return float(norm.isf(0.5 * ALARM / comparisons))


def require(error, tolerance, what):
    worst = float(np.max(error))
    assert worst <= tolerance, f"{what}: {worst:.3g} > {tolerance:.3g}"
    return worst


def require_zero(estimate, std_error, what, floor=1e-11):
    """z-test of every component; an SE below ``floor`` counts as ``floor``."""
    estimate, std_error = np.atleast_1d(estimate), np.atleast_1d(std_error)
    z = np.abs(estimate) / np.maximum(std_error, floor)
    limit = z_limit(z.size)
    assert np.all(z < limit), f"{what}: |z| = {z.max():.2f} > {limit:.2f}"
    return float(z.max())


def all_problems():
    """Return every problem of the catalogue with every one of its variants."""
    return [
        sdebench.problem(name, **variant)
        for name in sdebench.problem_names()
        for variant in type(sdebench.problem(name)).variants
    ]


def reduced(problem, dim=2):
    """Return the problem in few dimensions, where it has a ``dim`` parameter."""
    fields = {f.name for f in dataclasses.fields(problem)}
    if problem.dim > 3 and "dim" in fields:
        return dataclasses.replace(problem, dim=dim)
    return problem


def mutate(thing, **overrides):
    """Return a copy of a problem, truth or process with some members replaced."""
    cls = type(thing)
    namespace = {k: v for k, v in overrides.items() if callable(v)}
    mutant = copy.copy(thing)
    mutant.__dict__.update({k: v for k, v in overrides.items() if not callable(v)})
    object.__setattr__(
        mutant,
        "__class__",
        type(cls.__name__, (cls,), {"__module__": cls.__module__, **namespace}),
    )
    return mutant


def visited(problem, n_times=5, n_each=6, n_steps=25, seed=3):
    """Return [(t, x (n, d))] where base paths and optimal paths live, ends excluded."""
    rng = np.random.default_rng(seed)
    steps = np.sort(rng.choice(np.arange(1, n_steps), n_times, replace=False))
    runs = [
        sdebench.simulate(
            problem, point=p, n_steps=n_steps, n_paths=64, keep_states=True
        )
        for p in (None, "optimum")
    ]
    picks = rng.choice(64, n_each // 2, replace=False)
    return [
        (runs[0].times[n], np.concatenate([r.states[n][:, picks].T for r in runs]))
        for n in steps
    ]


def starts(problem, n_paths, seed):
    """Return X_0 (n, d): its noise does not depend on the number of steps."""
    options = {"n_steps": 1, "n_paths": n_paths, "seed": seed, "keep_states": True}
    return sdebench.simulate(problem, **options).states[0].T


# ---- 1: the Hamilton-Jacobi-Bellman equation ---------------------------------------


def check_hjb(problem, tolerance=1e-8):
    """d_t V + b . grad V + 1/2 tr(sigma sigma^T Hess V) - 1/2 |u*|^2 + f = 0.

    First derivatives of V along t, along b and along the columns of sigma, and of u*
    along the columns of sigma, by differences of order ten: sigma may be singular.
    """
    errors = [_hjb_residual(problem, t, x, tolerance) for t, x in visited(problem)]
    return require(errors, tolerance, "HJB residual")


def _hjb_residual(problem, t, x, tolerance):
    truth, (start, end) = problem.truth, problem.time_span
    step_t = min(min(t - start, end - t) / 6, 0.003 * (end - start))
    step_x = 0.01
    b, sigma = problem.drift(x, t), problem.diffusion(t)
    u = truth.control(x, t)
    in_time = derivative(lambda s: truth.value(x, t + s), step_t)

    def slope_along(v):
        return derivative(lambda s: truth.value(x + s * v, t), step_x)

    def divergence_along(v, j):
        return derivative(lambda s: truth.control(x + s * v, t)[:, j], step_x)

    speed = np.linalg.norm(b, axis=-1, keepdims=True)
    drift = speed[:, 0] * slope_along(b / np.where(speed > 0, speed, 1.0))
    trace = np.zeros(len(x))
    for j, column in enumerate(sigma.T):
        size = np.linalg.norm(column)
        if size == 0:
            continue
        slope = size * slope_along(column / size)
        scale = np.max(np.abs(u)) + np.max(np.abs(slope)) + 1e-3
        require(np.abs(u[:, j] + slope) / scale, tolerance, "u* = -sigma^T grad V")
        trace -= size * divergence_along(column / size, j)
    control = 0.5 * np.sum(u**2, axis=-1)
    terms = [in_time, drift, 0.5 * trace, -control, problem.running_cost(x, t)]
    return np.max(np.abs(np.sum(terms, axis=0)) / np.sum(np.abs(terms), axis=0))


def check_terminal_condition(problem, tolerance=1e-10):
    x = np.concatenate([x for _, x in visited(problem)])
    reward = problem.reward(x)
    gap = np.abs(problem.truth.value(x, problem.time_span[1]) + reward)
    return require(gap / (1.0 + np.abs(reward)), tolerance, "V(x, T) = -r(x)")


# ---- 2: a second route to h, log Z and the moments ---------------------------------


def grid_dim(problem):
    """Return d of a tilting problem that quadrature on a grid can do, else 0."""
    small = isinstance(problem, TiltingProblem) and problem.dim <= 2
    return problem.dim if small else 0


class Grid:
    """Trapezoidal rules (spectrally accurate) for a tilting problem with d <= 2.

    It uses the density of X_T and the Gaussian kernel of X_s given X_t of the base,
    problem.reward, and the start law of the tables; no algebra of tilts.
    """

    def __init__(self, problem, theta=None):
        self.problem, self.base = problem, problem.family.base
        self.start, self.end = problem.time_span
        self.theta = problem.theta_star if theta is None else problem.theta(theta)
        tables = problem.tables(self.theta, problem.time_grid(1))
        self.weights = np.diff(tables.start_cumulative, prepend=0.0)
        self.means, self.scales = tables.start_mean, tables.start_scale
        self.is_point = not np.any(self.scales)
        laws = [lq.gaussian_parameters(self.base.terminal)[1:]]
        laws.append(problem.family.ideal_law(self.theta)[1:])
        laws.append((self.means, self.scales**2))
        self.low = min(np.min(m - 9.5 * np.sqrt(v)) for m, v in laws)
        self.high = max(np.max(m + 9.5 * np.sqrt(v)) for m, v in laws)
        self.width = min(np.sqrt(v[v > 0].min()) for _, v in laws if np.any(v > 0))

    def axis(self, width, low=None, high=None):
        low, high = self.low if low is None else low, self.high if low is None else high
        return np.linspace(low, high, int(np.ceil((high - low) / (0.62 * width))))

    def points(self, axis):
        mesh = np.meshgrid(*[axis] * self.problem.dim, indexing="ij")
        return np.stack(mesh, axis=-1)

    def kernels(self, x, s, t, axis):
        """Return, per coordinate, the density at x (n, d) of X_s given X_t = axis."""
        scale, offset, variance = self.base.backward(s, t)
        centre = scale * axis[:, None] + offset
        z = (x[:, None, :] - centre) / np.sqrt(variance)
        values = np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi * variance)
        return np.moveaxis(values, -1, 0)

    def apply(self, kernels, values):
        """Integrate values (n, ...) on the grid against the rows of the kernels."""
        if self.problem.dim == 1:
            return kernels[0] @ values
        return np.einsum("na,ab,nb->n", kernels[0], values, kernels[1], optimize=True)

    def spread(self, kernels, values):
        """Return the integral at every grid point: kernels on the grid itself."""
        if self.problem.dim == 1:
            return kernels[0] @ values
        return kernels[0] @ values @ kernels[1].T

    def _terminal(self, t):
        _, _, variance = self.base.backward(t, self.end)
        scale = self.base.backward(t, self.end)[0]
        narrow = 1.0 / np.sqrt(1.0 / self.width**2 + scale**2 / variance)
        axis = self.axis(narrow)
        y = self.points(axis)
        log_p = lq.log_value(self.base.terminal, y)
        log_r = self.problem.reward(y)
        if self.theta is not self.problem.theta_star:
            family = self.problem.family
            log_r = lq.log_value(family.reward_rows(self.theta), y)
        return axis, np.exp(log_p + log_r), np.exp(log_p)

    def h(self, x, t):
        """Return h_theta(x, t) (n,) for x (n, d)."""
        if self.is_point and t == self.start:
            return self._h_at_point()
        axis, tilted, plain = self._terminal(t)
        kernels = self.kernels(x, t, self.end, axis)
        return self.apply(kernels, tilted) / self.apply(kernels, plain)

    def _h_at_point(self):
        """Return h at the start point, where X_0 given X_T has no density."""
        scale, offset, variance = self.base.forward(self.start, self.end)
        axis = self.axis(1.0 / np.sqrt(1.0 / self.width**2 + 1.0 / variance))
        z = (axis[:, None] - scale * self.means[0] - offset) / np.sqrt(variance)
        density = np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi * variance)
        rewards = self.problem.reward(self.points(axis))
        cell = (axis[1] - axis[0]) ** self.problem.dim
        return cell * self.apply(density.T[:, None], np.exp(rewards))

    def h_grid(self, axis, t):
        if t == self.end:
            return np.exp(self.problem.reward(self.points(axis)))
        inner, tilted, plain = self._terminal(t)
        kernels = self.kernels(
            np.repeat(axis[:, None], self.problem.dim, 1), t, self.end, inner
        )
        return self.spread(kernels, tilted) / self.spread(kernels, plain)

    def start_density(self, axis):
        x = self.points(axis)[..., None, :]
        z = (x - self.means) / self.scales
        log_p = -0.5 * z**2 - np.log(np.sqrt(2.0 * np.pi) * self.scales)
        return np.exp(log_p.sum(-1)) @ self.weights

    def over_start(self, function):
        """Return E of function of h(X_0, t_0)."""
        if self.is_point:
            return float(function(self.h(self.means, self.start))[0])
        axis = self.axis(self.width)
        cell = (axis[1] - axis[0]) ** self.problem.dim
        values = function(self.h_grid(axis, self.start))
        return float(cell * np.sum(self.start_density(axis) * values))

    def law(self, t, log_h=None, refine=1.0):
        """Return an axis and the density of X_t under the control of theta.

        p_t(y) h(y, t) int k(x | y) p_start(x) / (p_{t_0}(x) h(x, t_0)) dx, the base
        being a Markov process with X_{t_0} | X_t = y distributed as k.
        ``log_h(x, t)`` replaces quadrature by a function (used for other theta);
        ``refine`` divides the spacing, for integrands rougher than the density.
        """
        dim = self.problem.dim

        def h(axis, s):
            if log_h is None:
                return self.h_grid(axis, s)
            return np.exp(log_h(self.points(axis), s))

        if self.is_point:
            mean, law = self.means, self.problem.truth.policy_marginal(t, self.theta)
            spread = np.sqrt(law.covariances)
            low = np.min(law.means - 9.5 * spread)
            axis = self.axis(
                spread.min() / refine, low, np.max(law.means + 9.5 * spread)
            )
            scale, offset, variance = self.base.forward(self.start, t)
            gap = self.points(axis) - (scale * mean[0] + offset)
            density = np.exp(-0.5 * np.sum(gap**2, -1) / variance)
            density /= (2.0 * np.pi * variance) ** (dim / 2)
            at_start = (
                self.h(mean, self.start)
                if log_h is None
                else np.exp(log_h(mean, self.start))
            )
            return axis, density * h(axis, t) / at_start[0]
        scale, _, variance = self.base.backward(self.start, t)
        sources = [self.width, np.sqrt(variance)]
        x_axis = self.axis(1.0 / np.sqrt(1 / sources[0] ** 2 + 1 / sources[1] ** 2))
        y_axis = self.axis(self.width / refine)
        prior = np.exp(
            lq.log_value(self.base.marginal(self.start), self.points(x_axis))
        )
        ratio = self.start_density(x_axis) / prior / h(x_axis, self.start)
        tensor = np.repeat(x_axis[:, None], dim, 1)
        kernels = [k.T for k in self.kernels(tensor, self.start, t, y_axis)]
        cell = (x_axis[1] - x_axis[0]) ** dim
        inner = cell * self.spread(kernels, ratio)
        outer = np.exp(lq.log_value(self.base.marginal(t), self.points(y_axis)))
        return y_axis, outer * h(y_axis, t) * inner

    def moments(self, t):
        """Return mass, mean (d,) and covariance (d, d) of X_t under the control."""
        axis, density = self.law(t)
        y, weights = self.points(axis).reshape(-1, self.problem.dim), density.ravel()
        weights = weights * (axis[1] - axis[0]) ** self.problem.dim
        mean = weights @ y
        return weights.sum(), mean, (weights * (y - mean).T) @ (y - mean)


def check_tilting_quadrature(problem, tolerance=1e-12, moments=1e-11):
    """h, log Z, J(u*) and the laws of X_t against quadrature (d <= 2)."""
    grid, truth = Grid(problem), problem.truth
    worst = 0.0
    for t, x in visited(problem, n_times=3):
        ratio = grid.h(x, t) / truth.h(x, t)
        worst = max(worst, require(np.abs(ratio - 1.0), tolerance, "h by quadrature"))
    gap = grid.over_start(lambda h: h) / np.exp(truth.log_normalizer()) - 1.0
    worst = max(worst, require(abs(gap), tolerance, "log Z by quadrature"))
    gap = grid.over_start(lambda h: -np.log(h)) - truth.optimal_cost()
    worst = max(worst, require(abs(gap), tolerance, "J(u*) by quadrature"))
    start, end = problem.time_span
    for share in (0.35, 1.0):
        t = start + share * (end - start)
        mass, mean, covariance = grid.moments(t)
        law = truth.tilted_marginal(t)
        scale = np.trace(law.covariance()) + law.mean() @ law.mean()
        error = [
            abs(mass - 1.0),
            np.max(np.abs(mean - law.mean())) / np.sqrt(scale),
            np.max(np.abs(covariance - law.covariance())) / scale,
        ]
        worst = max(worst, require(error, moments, f"law of X_t, t = {t:.3g}"))
    return worst


def linear_coefficients(problem):
    """Return A, a, F, Q, q, c of a linear-quadratic problem from its functions."""
    d, t = problem.dim, problem.time_span[0]
    eye, origin = np.eye(d), np.zeros((1, d))
    offset = problem.drift(origin, t)[0]
    matrix = (problem.drift(eye, t) - offset).T

    def hessian(function):
        pairs = eye[:, None] + eye[None]
        single = function(eye)
        value = function(pairs) - single[:, None] - single[None]
        return value + function(origin)[0]

    running = hessian(lambda x: problem.running_cost(x, t))
    quadratic = -hessian(problem.reward)
    linear = 0.5 * (problem.reward(eye) - problem.reward(-eye))
    return matrix, offset, running, quadratic, linear, problem.reward(origin)[0]


def check_linear_by_ode(problem, tolerance=1e-9):
    """V, log Z, moments, J and the matching gradient of class L by an ODE solver.

    DOP853 at rtol 1e-12: about 1e-10 is what such a solver keeps.
    """
    A, a, F, Q, q, c = linear_coefficients(problem)
    d, truth, (start, end) = problem.dim, problem.truth, problem.time_span
    noise = problem.diffusion(start)
    S = noise @ noise.T
    tables = problem.tables(None, problem.time_grid(1))
    m0, root = tables.start_mean, tables.start_factor
    options = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13, "dense_output": True}

    def split(y):
        return y[: d * d].reshape(d, d), y[d * d : d * d + d], y[d * d + d :]

    def riccati(t, y):
        P, p, _ = split(y)
        dP = -(A.T @ P + P @ A - P @ S @ P + F)
        dp = -((A - S @ P).T @ p + P @ a)
        drho = -(a @ p + 0.5 * np.sum(S * P) - 0.5 * p @ S @ p)
        return np.concatenate([dP.ravel(), dp, [drho]])

    final = np.concatenate([Q.ravel(), -q, [-c]])
    value = solve_ivp(riccati, (end, start), final, **options).sol
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, d))
    worst = 0.0
    for t in (start, 0.4 * end, 0.8 * end):
        P, p, rho = split(value(t))
        expected = 0.5 * np.einsum("ni,ij,nj->n", x, P, x) + x @ p + rho[0]
        error = np.abs(truth.value(x, t) - expected) / (1 + np.abs(expected))
        worst = max(worst, require(error, tolerance, "V by the Riccati equation"))
        expected = -(x @ P + p) @ noise
        error = np.abs(truth.control(x, t) - expected) / (1 + np.abs(expected))
        worst = max(worst, require(error, tolerance, "u* by the Riccati equation"))
    # log Z: the Gaussian integral over the start, in the eigenbasis of its factor.
    P, p, rho = split(value(start))
    inner = np.eye(d) + root.T @ P @ root
    slope = root.T @ (P @ m0 + p)
    log_z = -(0.5 * m0 @ P @ m0 + p @ m0 + rho[0])
    log_z += 0.5 * slope @ np.linalg.solve(inner, slope)
    log_z -= 0.5 * np.linalg.slogdet(inner)[1]
    gap = abs(log_z - truth.log_normalizer()) / (1 + abs(log_z))
    worst = max(worst, require(gap, tolerance, "log Z"))
    cost = 0.5 * m0 @ P @ m0 + p @ m0 + rho[0] + 0.5 * np.sum(P * (root @ root.T))
    gap = abs(cost - truth.optimal_cost()) / (1 + abs(cost))
    worst = max(worst, require(gap, tolerance, "J(u*)"))

    def moments(t, y, control):
        C, m, _ = split(y)
        K, k = control(t)
        closed, drift = A + noise @ K, a + noise @ k
        dC = closed @ C + C @ closed.T + S
        return np.concatenate([dC.ravel(), closed @ m + drift, [0.0]])

    def optimal(t):
        P, p, _ = split(value(t))
        return -noise.T @ P, -noise.T @ p

    def nothing(t):
        return np.zeros((d, d)), np.zeros(d)

    first = np.concatenate([(root @ root.T).ravel(), m0, [0.0]])
    for control, law in (
        (optimal, truth.tilted_marginal),
        (nothing, truth.base_marginal),
    ):
        flow = solve_ivp(moments, (start, end), first, args=(control,), **options).sol
        for t in (0.5 * end, end):
            C, m, _ = split(flow(t))
            scale = 1 + np.max(np.abs(C)) + np.max(np.abs(m))
            gap = max(
                np.max(np.abs(law(t).mean() - m)),
                np.max(np.abs(law(t).covariance() - C)),
            )
            worst = max(worst, require(gap / scale, tolerance, "moments"))
    return worst


# ---- 3 and 4: simulation -----------------------------------------------------------


def _log_mean(values):
    """Return the log of the mean of exp(values), its SE, and the effective size."""
    shift = values.max()
    w = np.exp(values - shift)
    mean = w.mean()
    error = w.std(ddof=1) / np.sqrt(len(w)) / mean
    return np.log(mean) + shift, error, w.sum() ** 2 / np.sum(w**2)


def _levels(problem, point, n_steps, n_paths, seed, statistic):
    """Return the Richardson value 2 s(2N) - s(N) and its SE, independent seeds."""
    values, errors = [], []
    for factor in (1, 2):
        run = sdebench.simulate(
            problem,
            point=point,
            n_steps=factor * n_steps,
            n_paths=n_paths,
            seed=seed + factor,
        )
        value, error = statistic(run, seed + factor, factor * n_steps)
        values.append(value)
        errors.append(error)
    return (
        2.0 * values[1] - values[0],
        np.sqrt(4.0 * np.square(errors[1]) + np.square(errors[0])),
    )


def check_feynman_kac(
    problem, importance=True, n_paths=2**15, n_steps=64, seed=100, smallest=0.02
):
    """log Z by Monte Carlo, under the base or under u* with importance weights.

    The mean weight of N steps is Z_N exactly whatever the control: it is compared with
    log_normalizer(N) where that exists, else with log Z after Richardson
    extrapolation, whose rest O(h^2) is far below the standard error.  There a second
    statistic divides each weight by h(X_0, t_0), which tests h at every start.
    """
    truth = problem.truth
    point = "optimum" if importance else None
    energies, sizes = [], []

    def overall(run, seed, n):
        value, error, size = _log_mean(run.log_weight)
        energies.append(run.control_cost.mean())
        sizes.append(size / n_paths)
        return value, error

    def given_start(run, seed, n):
        x = starts(problem, n_paths, seed)
        value = truth.value(x, problem.time_span[0])
        return _log_mean(run.log_weight + value)[:2]

    try:
        exact = [truth.log_normalizer(k * n_steps) for k in (1, 2)]
    except NotExactError:
        exact = None
    if exact is None:

        def both(run, seed, n):
            parts = [overall(run, seed, n), given_start(run, seed, n)]
            return tuple(np.array(part) for part in zip(*parts, strict=True))

        estimate, error = _levels(problem, point, n_steps, n_paths, seed, both)
        gap = estimate - [truth.log_normalizer(), 0.0]
    else:
        gap, error = [], []
        for k in (1, 2):
            run = sdebench.simulate(
                problem,
                point=point,
                n_steps=k * n_steps,
                n_paths=n_paths,
                seed=seed + k,
            )
            value, spread = overall(run, seed + k, k * n_steps)
            gap.append(value - exact[k - 1])
            error.append(spread)
        # Z_N itself must tend to Z at order one.
        limit = truth.log_normalizer()
        fine = truth.log_normalizer(16 * n_steps), truth.log_normalizer(32 * n_steps)
        rest = abs(2.0 * fine[1] - fine[0] - limit)
        require(rest, 1e-4 * (1.0 + abs(limit)), "log Z_N tends to log Z")
    if min(sizes) < smallest:
        pytest.skip(f"effective sample size {min(sizes):.2g} of the base paths")
    require_zero(gap, error, "log Z by Monte Carlo")
    if importance:
        # Power: half the control cost left out would move log Z by half of it.
        required = 0.5 * np.mean(energies)
        assert 10.0 * np.max(error) < required, "too few paths to see a missing 1/2"
    return float(np.max(error))


def check_optimal_law(problem, n_paths=2**14, n_steps=192, seed=200):
    """Mean and covariance of X_T under u* against truth.tilted_marginal(T)."""
    law = problem.truth.tilted_marginal(problem.time_span[1])
    mean, covariance = law.mean(), law.covariance()
    upper = np.triu_indices(problem.dim)

    def moments(run, seed, n):
        x = run.terminal.T - mean
        pairs = x[:, upper[0]] * x[:, upper[1]] - covariance[upper]
        rows = np.concatenate([x, pairs], axis=1)
        return rows.mean(axis=0), rows.std(axis=0, ddof=1) / np.sqrt(n_paths)

    gap, error = _levels(problem, "optimum", n_steps, n_paths, seed, moments)
    size = np.sqrt(np.diag(covariance))
    assert np.max(error[: problem.dim] / size) < 0.05, "too few paths"
    return require_zero(gap, error, "law of X_T under u*")


def check_log_weights(problem, n_paths=2**12, seed=300, tolerance=0.1):
    """log_weight + V(X_0, t_0) tends to 0 at order 1 (u* free of x) or 1/2.

    Root mean squares at N = 128 ... 1024.  The next term is of relative size
    sqrt(h), at most a few per cent on this ladder, and the root mean square of 4096
    paths is known to 2 %, on a factor 8 of h: 0.1 covers both.
    """
    x = starts(problem, n_paths, seed)
    value = problem.truth.value(x, problem.time_span[0])
    u = problem.truth.control(
        x + np.linspace(0, 1, n_paths)[:, None], problem.time_span[0]
    )
    order = 1.0 if np.ptp(u, axis=0).max() < 1e-12 else 0.5
    ladder = np.array([128, 256, 512, 1024])
    size = []
    for n_steps in ladder:
        run = sdebench.simulate(problem, n_steps=n_steps, n_paths=n_paths, seed=seed)
        size.append(np.sqrt(np.mean((run.log_weight + value) ** 2)))
    if max(size) < 1e-11:
        return np.inf
    slope = -np.polyfit(np.log(ladder), np.log(size), 1)[0]
    assert abs(slope - order) < tolerance, f"order {slope:.3f}, expected {order}"
    return slope


# ---- 5: gradients ------------------------------------------------------------------


def thetas(problem, seed=5):
    """Return the named points and one random theta near the line through them."""
    star = problem.theta_star
    rng = np.random.default_rng(seed)
    random = star * rng.uniform(0.4, 1.3, len(star)) + rng.uniform(0, 0.1, len(star))
    return {**problem.points, "random": random}


def check_gradient(
    problem, theta, n_steps=None, tolerance=1e-9, step=0.01, directions=None
):
    """The gradient of J, or of J_N, against differences of order ten of J.

    ``directions`` random directions, or every component.
    """
    truth, theta = problem.truth, problem.theta(theta)
    gradient = truth.gradient(theta, n_steps)
    axes = np.eye(len(theta))
    if directions:
        axes = np.random.default_rng(8).normal(size=(directions, len(theta)))
        axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    numeric = [
        derivative(lambda s, e=e: truth.objective(theta + s * e, n_steps), step)
        for e in axes
    ]
    scale = 1.0 + abs(truth.objective(theta, n_steps)) + np.linalg.norm(gradient)
    error = np.abs(axes @ gradient - numeric) / scale
    return require(error, tolerance, "gradient against differences")


def check_stationary(problem, tolerance=1e-10):
    """Both gradients vanish at theta*, and J(theta*) = J(u*)."""
    truth = problem.truth
    scale = 1.0 + np.linalg.norm(truth.gradient("zero")) + abs(truth.optimal_cost())
    errors = [
        np.max(np.abs(truth.gradient("optimum"))),
        np.max(np.abs(truth.matching_gradient("optimum"))),
        abs(truth.objective("optimum") - truth.optimal_cost()),
    ]
    return require(np.array(errors) / scale, tolerance, "theta* is stationary")


def check_discrete_order(problem, theta, quantity="gradient"):
    """The N-step answer tends to the continuous one at order one.

    The defect D(h) = c h + O(h^2); D(h)/D(h/2) - 2 is O(h), below 0.1 at N = 256.
    """
    method = getattr(problem.truth, quantity)
    exact = method(theta)
    defects = [np.linalg.norm(method(theta, n) - exact) for n in (256, 512)]
    scale = 1.0 + np.linalg.norm(exact)
    if defects[0] < 1e-11 * scale:
        return np.inf
    ratio = np.log2(defects[0] / defects[1])
    assert abs(ratio - 1.0) < 0.07, f"{quantity}_N: order {ratio:.3f}, expected 1"
    return ratio


def check_matching_by_ode(problem, theta, tolerance=1e-8):
    """J and the matching gradient of class L from moment and adjoint equations.

    E[a_t | X_t = x] = S x + s with -S' = A^T S + S (A + sigma K) + F, lean adjoint.
    """
    A, a, F, Q, q, c = linear_coefficients(problem)
    theta = problem.theta(theta)
    d, (start, end) = problem.dim, problem.time_span
    noise = problem.diffusion(start)
    tables = problem.tables(None, problem.time_grid(1))
    root = tables.start_factor
    options = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13}

    def law(t):
        gains, biases = problem.feedback(np.array([t]))
        K = np.einsum("p,pij->ij", theta, gains[:, 0])
        return K, theta @ biases[:, 0], gains[:, 0], biases[:, 0]

    def split(y):
        return y[: d * d].reshape(d, d), y[d * d : d * d + d], y[d * d + d :]

    def adjoint(t, y):
        S, s, _ = split(y)
        K, k, _, _ = law(t)
        dS = -(A.T @ S + S @ (A + noise @ K) + F)
        ds = -(A.T @ s + S @ (a + noise @ k))
        return np.concatenate([dS.ravel(), ds])

    back = solve_ivp(
        adjoint,
        (end, start),
        np.concatenate([Q.ravel(), -q]),
        dense_output=True,
        **options,
    ).sol

    def forward(t, y):
        C, m, _ = split(y)
        K, k, dK, dk = law(t)
        S, s, _ = split(back(t))
        closed = A + noise @ K
        second = C + np.outer(m, m)
        R, e = K + noise.T @ S, k + noise.T @ s
        slope = np.einsum("pij,ij->p", dK, R @ second + np.outer(e, m))
        slope += dk @ (R @ m + e)
        cost = np.sum((K @ second + 2 * np.outer(k, m)) * K) + k @ k
        rate = 0.5 * (cost + np.sum(F * second))
        dC = closed @ C + C @ closed.T + noise @ noise.T
        return np.concatenate([dC.ravel(), closed @ m + a + noise @ k, [rate], slope])

    first = np.concatenate(
        [(root @ root.T).ravel(), tables.start_mean, np.zeros(1 + len(theta))]
    )
    C, m, sums = split(solve_ivp(forward, (start, end), first, **options).y[:, -1])
    objective = sums[0] + 0.5 * np.sum(Q * (C + np.outer(m, m))) - q @ m - c
    truth = problem.truth
    scale = 1.0 + abs(objective) + np.linalg.norm(sums[1:])
    errors = [abs(truth.objective(theta) - objective)]
    errors += list(np.abs(truth.matching_gradient(theta) - sums[1:]))
    return require(np.array(errors) / scale, tolerance, "J, matching gradient by ODE")


# ---- 6: regret ---------------------------------------------------------------------


def check_regret(problem, theta, tolerance=1e-10, **resolution):
    """J(theta) - J(u*) = 1/2 E_theta int |u_theta - u*|^2 by closed form or quadrature.

    ``resolution``: nodes and panels in time, refine in space.
    """
    truth = problem.truth
    regret = truth.objective(theta) - truth.optimal_cost()
    scale = 1.0 + abs(truth.objective(theta))
    if isinstance(problem, LinearProblem):
        half = 0.5 * truth.control_error(theta) ** 2
    elif grid_dim(problem):
        half = 0.5 * _control_gap(problem, problem.theta(theta), **resolution)
    else:
        return check_regret_by_simulation(problem, theta)
    return require(abs(regret - half) / scale, tolerance, "regret identity")


def _control_gap(problem, theta, nodes=20, panels=2, refine=8.0):
    """E_theta int |u_theta - u*|^2 dt: Gauss-Legendre in time, a grid in space."""
    truth, family = problem.truth, problem.family
    start, end = problem.time_span
    points, weights = leggauss(nodes)
    edges = np.linspace(start, end, panels + 1)
    total = 0.0
    for left, right in pairwise(edges):
        half = 0.5 * (right - left)
        for point, weight in zip(points, weights, strict=True):
            t = left + half * (point + 1.0)
            grid = Grid(problem, theta)
            axis, density = grid.law(
                t, lambda x, s: family.log_h(x, s, theta), refine=refine
            )
            y = grid.points(axis)
            gap = truth.policy(y, t, theta) - truth.control(y, t)
            cell = (axis[1] - axis[0]) ** problem.dim
            total += half * weight * cell * np.sum(density * np.sum(gap**2, axis=-1))
    return total


def check_regret_by_simulation(problem, theta, n_paths=2**13, n_steps=64, seed=400):
    """The identity path by path: cost - V(X_0) - 1/2 sum h |u_theta - u*|^2, mean 0."""
    truth, theta = problem.truth, problem.theta(theta)
    regret = truth.objective(theta) - truth.optimal_cost()
    rows = []
    for factor in (1, 2):
        run = sdebench.simulate(
            problem,
            point=theta,
            n_steps=factor * n_steps,
            n_paths=n_paths,
            seed=seed + factor,
            keep_states=True,
        )
        excess = run.cost - truth.value(run.states[0].T, run.times[0])
        half = np.zeros(n_paths)
        for n, h in enumerate(np.diff(run.times)):
            x = run.states[n].T
            gap = truth.policy(x, run.times[n], theta) - truth.control(x, run.times[n])
            half += 0.5 * h * np.sum(gap**2, axis=-1)
        values = np.array([excess - half, excess - regret, half - regret])
        error = values.std(axis=1, ddof=1) / np.sqrt(n_paths)
        rows.append((values.mean(axis=1), error))
    (coarse, e1), (fine, e2) = rows
    error = np.sqrt(4 * e2**2 + e1**2)
    # The floor stands for the rest h^2 of the extrapolation.
    floor = (run.times[1] - run.times[0]) ** 2 * (1.0 + abs(regret))
    what = "regret identity by simulation"
    return require_zero(2 * fine - coarse, error, what, floor)


# ---- tables ------------------------------------------------------------------------


def table_step(tables, n, x):
    """Return base mean (m, d), noise matrix (d, d) and w (m, d) of step n, in numpy."""
    if isinstance(tables, LinearTables):
        return (
            x @ tables.transition[n].T + tables.offset[n],
            tables.noise[n],
            x @ tables.gain[n].T + tables.bias[n],
        )
    d = x.shape[1]

    def score(rows):
        if len(rows) == 0:
            return np.zeros_like(x)
        exponent = x @ rows[:, :d].T + x**2 @ rows[:, d:-1].T + rows[:, -1]
        gamma = np.exp(exponent - logsumexp(exponent, axis=1, keepdims=True))
        slopes = rows[:, :d] + 2.0 * rows[:, d:-1] * x[:, None, :]
        return np.einsum("nk,nki->ni", gamma, slopes)

    base = score(tables.base[n])
    mean = tables.scale[n] * x + tables.offset[n] + tables.base_gain[n] * base
    w = tables.control_gain[n] * (score(tables.tilted[n]) - base)
    return mean, tables.noise[n] * np.eye(d), w


def check_tables(problem, theta, n_steps=12, tolerance=1e-12):
    """Euler-Maruyama tables against the problem's own drift, diffusion and policy."""
    times = problem.time_grid(n_steps)
    tables = problem.tables(None if theta is None else problem.theta(theta), times)
    x = visited(problem, n_times=1, n_each=16)[0][1]
    worst = 0.0
    for n in range(n_steps):
        t, h = times[n], times[n + 1] - times[n]
        mean, noise, w = table_step(tables, n, x)
        u = np.zeros_like(x)
        if theta is not None:
            u = problem.truth.policy(x, t, theta)
        for got, wanted in (
            (mean, x + h * problem.drift(x, t)),
            (noise, np.sqrt(h) * problem.diffusion(t)),
            (w, np.sqrt(h) * u),
        ):
            scale = 1e-3 + np.max(np.abs(wanted))
            error = np.abs(got - wanted) / scale
            worst = max(worst, require(error, tolerance, f"tables at step {n}"))
        if isinstance(tables, LinearTables):
            cost = 0.5 * np.einsum("ni,ij,nj->n", x, tables.running[n], x)
            error = np.abs(cost - h * problem.running_cost(x, t)).max()
            require(error, tolerance * (1 + np.abs(cost).max()), "running cost")
    if isinstance(tables, LinearTables):
        reward = -0.5 * np.einsum("ni,ij,nj->n", x, tables.reward_quadratic, x)
        reward = reward + x @ tables.reward_linear + tables.reward_constant
    else:
        reward = lq.log_value(tables.reward, x)
    wanted = problem.reward(x)
    error = np.abs(reward - wanted) / (1 + np.abs(wanted))
    return max(worst, require(error, tolerance, "reward in the tables"))


def check_parameter_tables(
    problem, theta, n_steps=6, scheme="euler_maruyama", tolerance=1e-9
):
    """dw/dtheta from the tables against differences of w in theta."""
    theta, times = problem.theta(theta), problem.time_grid(n_steps)
    tables = problem.tables(theta, times, scheme)
    x = visited(problem, n_times=1, n_each=8)[0][1]
    d, step = problem.dim, 0.02
    worst = 0.0
    for n, p in product(range(n_steps), range(problem.n_params)):
        unit = np.eye(problem.n_params)[p]

        def control(s, n=n, unit=unit):
            return table_step(problem.tables(theta + s * unit, times, scheme), n, x)[2]

        if isinstance(tables, LinearTables):
            basis = tables.basis[p, :, n]
            gain = np.einsum("s,sij->ij", basis, tables.feature_gain[:, n])
            got = x @ gain.T + basis @ tables.feature_bias[:, n]
        else:
            rows, change = tables.tilted[n], tables.tilted_derivative[p, n]
            exponent = x @ rows[:, :d].T + x**2 @ rows[:, d:-1].T + rows[:, -1]
            gamma = np.exp(exponent - logsumexp(exponent, axis=1, keepdims=True))
            moved = x @ change[:, :d].T + x**2 @ change[:, d:-1].T + change[:, -1]
            slopes = rows[:, :d] + 2.0 * rows[:, d:-1] * x[:, None, :]
            slope_change = change[:, :d] + 2.0 * change[:, d:-1] * x[:, None, :]
            average = np.sum(gamma * moved, axis=1, keepdims=True)
            weights = gamma * (moved - average)
            got = np.einsum("nk,nki->ni", weights, slopes)
            got = got + np.einsum("nk,nki->ni", gamma, slope_change)
            got = tables.control_gain[n] * got
        wanted = derivative(control, step)
        error = np.abs(got - wanted) / (1e-2 + np.max(np.abs(wanted)))
        worst = max(worst, require(error, tolerance, f"dw/dtheta_{p} at step {n}"))
    return worst


def check_exponential_scheme(problem, tolerance=1e-12):
    """Two half steps of the linear part compose to one whole step, noise included."""
    coarse = problem.time_grid(4)
    fine = np.sort(np.concatenate([coarse, 0.5 * (coarse[1:] + coarse[:-1])]))
    whole = problem.tables(problem.theta("zero"), coarse, "exponential")
    parts = problem.tables(problem.theta("zero"), fine, "exponential")
    worst = 0.0
    for n in range(4):
        i, j = 2 * n, 2 * n + 1
        if isinstance(whole, LinearTables):
            M, c, G = parts.transition, parts.offset, parts.noise
            pairs = [
                (whole.transition[n], M[j] @ M[i]),
                (whole.offset[n], M[j] @ c[i] + c[j]),
                (
                    whole.noise[n] @ whole.noise[n].T,
                    M[j] @ G[i] @ G[i].T @ M[j].T + G[j] @ G[j].T,
                ),
            ]
        else:
            a, c, g = parts.scale, parts.offset, parts.noise
            level = [
                tables.control_gain * tables.noise / sigma
                for tables, sigma in (
                    (whole, _levels_of(problem, coarse)),
                    (parts, _levels_of(problem, fine)),
                )
            ]
            pairs = [
                (whole.scale[n], a[j] * a[i]),
                (whole.offset[n], a[j] * c[i] + c[j]),
                (whole.noise[n] ** 2, a[j, 0] ** 2 * g[i] ** 2 + g[j] ** 2),
                (
                    whole.base_gain[n],
                    a[j, 0] * parts.base_gain[i] + parts.base_gain[j],
                ),
                (level[0][n], a[j, 0] * level[1][i] + level[1][j]),
            ]
        for got, wanted in pairs:
            error = np.abs(got - wanted) / (1e-3 + np.max(np.abs(wanted)))
            worst = max(worst, require(error, tolerance, f"exponential step {n}"))
    return worst


def _levels_of(problem, times):
    return np.array([problem.diffusion(t)[0, 0] for t in times[:-1]])
