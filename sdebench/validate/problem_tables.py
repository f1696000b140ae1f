"""Checks of the coefficient tables against the functions of the problem."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from scipy.special import logsumexp

from sdebench.closed_form import log_quadratics as lq
from sdebench.errors import NotApplicableError
from sdebench.problem import Problem
from sdebench.simulate.tables import (
    FunctionTables,
    LinearTables,
    MixtureTables,
    SeparableTables,
    SineTables,
    Tables,
    noise_depends_on_state,
)
from sdebench.validate.problem_checks import (
    Array,
    Comparison,
    Theta,
    closest,
    derivative,
    parameter_scale,
    require,
    visited,
)


def table_step(tables: Tables, n: int, x: Array) -> tuple[Array, Array, Array]:
    """Return base mean (m, d), noise matrix and w (m, d) of step n, in numpy.

    The noise matrix is (d, d), or (m, d, d) where it depends on the state.
    """
    if isinstance(tables, FunctionTables):
        family, states = _functions(tables, x)
        mean, w = family.base_mean(n, states), family.control(n, states)
        return mean.numpy(), tables.noise[n], w.numpy()
    if isinstance(tables, LinearTables):
        return (
            x @ tables.transition[n].T + tables.offset[n],
            tables.noise[n],
            x @ tables.gain[n].T + tables.bias[n],
        )
    if isinstance(tables, SineTables):
        y = _extended(tables, x)
        return (
            y @ tables.transition[n].T + tables.offset[n],
            tables.noise[n],
            y @ tables.gain[n].T + tables.bias[n],
        )
    if isinstance(tables, SeparableTables):
        y = _clipped(tables, x)
        noise = np.diag(tables.noise[n])
        if noise_depends_on_state(tables):
            noise = _noise_factor(tables, x)[:, :, None] * noise
        return (
            _polynomials(tables.base[n], y) + tables.beyond[n] * (x - y),
            noise,
            _polynomials(tables.gain[n], y) * _control_factor(tables, x),
        )
    base = _score(tables.base[n], x)
    mean = tables.scale[n] * x + tables.offset[n] + tables.base_gain[n] * base
    w = tables.control_gain[n] * (_score(tables.tilted[n], x) - base)
    return mean, tables.noise[n] * np.eye(x.shape[1]), w


def _functions(tables: FunctionTables, x: Array) -> tuple[Any, Any]:
    """Return the functions in torch and the states as a tensor."""
    import torch

    from sdebench.simulate.torch_family import torch_family

    return torch_family(tables, "float64", "cpu"), torch.tensor(x)


def _extended(tables: SineTables, x: Array) -> Array:
    """Return y (m, d + K) of the states x."""
    return np.hstack([x, np.sin(x @ tables.direction.T + tables.phase)])


def _clipped(tables: SeparableTables, x: Array) -> Array:
    """Return y (m, d) of the states x."""
    return np.clip(x, -tables.reach[0], tables.reach[0])


def _polynomials(coefficients: Array, y: Array) -> Array:
    """Return sum_j coefficients_ij y_i^j, (m, d)."""
    powers = y[:, :, None] ** np.arange(coefficients.shape[-1])
    return np.einsum("...ij,...ij->...i", powers, coefficients)


def _noise_factor(tables: SeparableTables, x: Array) -> Array:
    """Return s (m, d) of the states x."""
    return np.sqrt(np.maximum(_polynomials(tables.variance, x), 0.0))


def _control_factor(tables: SeparableTables, x: Array) -> Array | float:
    """Return the factor of the control at the states x."""
    return _noise_factor(tables, x) if tables.control_power[0] else 1.0


def _wave(tables: SeparableTables, n: int, s: Array) -> Array:
    """Return what the wave of step n costs at |x|^2 = s, (m,)."""
    (b,), (delay, *c) = tables.wave_power, tables.wave[n]
    q = s + delay
    p, first = q**b, b * q ** (b - 1.0)
    slope = first * np.cos(p)
    bend = (b - 1.0) * first / q * np.cos(p) - first**2 * np.sin(p)
    return c[0] * slope + s * (c[1] * bend + c[2] * slope**2)


def table_running_cost(tables: Tables, n: int, x: Array) -> Array:
    """Return the running cost of step n (m,), its length included."""
    if isinstance(tables, FunctionTables):
        family, states = _functions(tables, x)
        return np.asarray(family.running_cost(n, states))
    if isinstance(tables, MixtureTables):
        return np.zeros(len(x))
    if isinstance(tables, LinearTables):
        return 0.5 * np.einsum("ni,ij,nj->n", x, tables.running[n], x)
    if isinstance(tables, SeparableTables):
        cost = np.zeros(len(x))
        if tables.running.shape[1]:
            cost += _polynomials(tables.running[n], _clipped(tables, x)).sum(axis=1)
        if len(tables.wave):
            cost += _wave(tables, n, np.sum(x**2, axis=1))
        return cost
    linear = _extended(tables, x) @ tables.running_linear[n]
    quadratic = np.einsum("ni,ij,nj->n", x, tables.running_quadratic[n], x)
    return 0.5 * quadratic + linear + tables.running_constant[n]


def table_reward(tables: Tables, x: Array) -> Array:
    """Return r (m,)."""
    if isinstance(tables, FunctionTables):
        family, states = _functions(tables, x)
        return np.asarray(family.reward(states))
    if isinstance(tables, MixtureTables):
        value = lq.log_value(tables.reward, x)
        if len(tables.reward_below):
            value = value - lq.log_value(tables.reward_below, x)
        return value
    if isinstance(tables, SeparableTables):
        return _separable_reward(tables, x)
    y = x if isinstance(tables, LinearTables) else _extended(tables, x)
    quadratic = np.einsum("ni,ij,nj->n", x, tables.reward_quadratic, x)
    value = y @ tables.reward_linear - 0.5 * quadratic + tables.reward_constant
    if isinstance(tables, LinearTables) and len(tables.reward_quartic):
        value = value - 0.25 * x**4 @ tables.reward_quartic
    return value


def _separable_reward(tables: SeparableTables, x: Array) -> Array:
    y, s = _clipped(tables, x), np.sum(x**2, axis=1)
    value = tables.reward_wave * np.sin(s**tables.wave_power)
    value = value - tables.reward_log * np.log1p(s)
    others = np.sum(x[:, 1:] ** 2, axis=1)
    value = value - 0.5 * tables.reward_funnel * np.exp(-x[:, 0]) * others
    if len(tables.reward):
        value = value + _polynomials(tables.reward, y).sum(axis=1)
    if len(tables.reward_factor):
        logs = np.log(_polynomials(tables.reward_factor, y)).sum(axis=1)
        value = value + tables.reward_power * logs
    return value


def _softmax(rows: Array, x: Array) -> tuple[Array, Array]:
    """Return weights (m, K) and slopes (m, K, d) of the rows' log-sum-exp at x."""
    d = x.shape[1]
    exponent = _values(rows, x)
    weights = np.exp(exponent - logsumexp(exponent, axis=1, keepdims=True))
    return weights, rows[:, :d] + 2.0 * rows[:, d:-1] * x[:, None, :]


def _values(rows: Array, x: Array) -> Array:
    d = x.shape[1]
    return x @ rows[:, :d].T + x**2 @ rows[:, d:-1].T + rows[:, -1]


def _score(rows: Array, x: Array) -> Array:
    if len(rows) == 0:
        return np.zeros_like(x)
    return np.einsum("nk,nki->ni", *_softmax(rows, x))


def _score_size(tables: Tables, n: int, x: Array) -> float:
    """Return the largest score of a mixture, in noise units; 0 of other tables."""
    if not isinstance(tables, MixtureTables):
        return 0.0
    return float(np.max(np.abs(tables.control_gain[n] * _score(tables.tilted[n], x))))


def check_tables(
    problem: Problem, theta: Theta, n_steps: int = 12, tolerance: float = 1e-12
) -> Comparison:
    """Euler-Maruyama tables against the problem's own drift, diffusion and policy."""
    times = problem.time_grid(n_steps)
    tables = problem.tables(None if theta is None else problem.theta(theta), times)
    x = visited(problem, n_times=1, n_each=16)[0][1]
    found = []
    for n in range(n_steps):
        t, h = times[n], times[n + 1] - times[n]
        mean, noise, w = table_step(tables, n, x)
        u = np.zeros_like(x)
        if theta is not None:
            u = problem.truth.policy(x, t, theta)
        for name, got, wanted in (
            ("x + h b(x, t)", mean, x + h * problem.drift(x, t)),
            ("sqrt(h) sigma", noise, np.sqrt(h) * problem.diffusion_at(x, t)),
            ("sqrt(h) u_theta(x, t)", w, np.sqrt(h) * u),
        ):
            # w is a difference of scores, which rounding errors are relative to
            scale = 1e-3 + np.max(np.abs(wanted)) + 1e-2 * _score_size(tables, n, x)
            what = f"tables at step {n} against {name}"
            found.append(require(np.abs(got - wanted) / scale, tolerance, what))
        cost = table_running_cost(tables, n, x)
        error = np.abs(cost - h * problem.running_cost(x, t)).max()
        limit = tolerance * (1 + np.abs(cost).max())
        found.append(require(error, limit, f"running cost in the tables, step {n}"))
    reward = table_reward(tables, x)
    wanted = problem.reward(x)
    error = np.abs(reward - wanted) / (1 + np.abs(wanted))
    return closest([*found, require(error, tolerance, "reward in the tables")])


def check_parameter_tables(
    problem: Problem,
    theta: Theta,
    n_steps: int = 6,
    scheme: str = "euler_maruyama",
    tolerance: float = 1e-9,
    step: float = 0.02,
) -> Comparison:
    """dw/dtheta from the tables against differences of w in theta."""
    theta, times = problem.theta(theta), problem.time_grid(n_steps)
    tables = problem.tables(theta, times, scheme)
    x = visited(problem, n_times=1, n_each=8)[0][1]
    step *= parameter_scale(problem)
    found = []
    for n, p in product(range(n_steps), range(problem.n_params)):
        unit = np.eye(problem.n_params)[p]

        def control(s: float, n: int = n, unit: Array = unit) -> Array:
            return table_step(problem.tables(theta + s * unit, times, scheme), n, x)[2]

        got = _control_derivative(tables, n, p, x)
        wanted = derivative(control, step)
        error = np.abs(got - wanted) / (1e-2 + np.max(np.abs(wanted)))
        found.append(require(error, tolerance, f"dw/dtheta_{p} at step {n}"))
    return closest(found)


def _control_derivative(tables: Tables, n: int, p: int, x: Array) -> Array:
    """Return dw_n/dtheta_p (m, d)."""
    if isinstance(tables, FunctionTables):
        one = tables._replace(theta=np.eye(len(tables.theta))[p])
        return table_step(one, n, x)[2]
    if isinstance(tables, LinearTables):
        basis = tables.basis[p, :, n]
        gain = np.einsum("s,sij->ij", basis, tables.feature_gain[:, n])
        return x @ gain.T + basis @ tables.feature_bias[:, n]
    if isinstance(tables, SineTables):
        gain = tables.gain_derivative[p, n]
        return _extended(tables, x) @ gain.T + tables.bias_derivative[p, n]
    if isinstance(tables, SeparableTables):
        derivative = _polynomials(tables.gain_derivative[p, n], _clipped(tables, x))
        return derivative * _control_factor(tables, x)
    d = x.shape[1]
    change = tables.tilted_derivative[p, n]
    gamma, slopes = _softmax(tables.tilted[n], x)
    moved = _values(change, x)
    slope_change = change[:, :d] + 2.0 * change[:, d:-1] * x[:, None, :]
    weights = gamma * (moved - np.sum(gamma * moved, axis=1, keepdims=True))
    total = np.einsum("nk,nki->ni", weights, slopes)
    total = total + np.einsum("nk,nki->ni", gamma, slope_change)
    return tables.control_gain[n] * total


def check_exponential_scheme(problem: Problem, tolerance: float = 1e-12) -> Comparison:
    """Two half steps of the linear part compose to one whole step, noise included.

    Raises
    ------
    NotApplicableError
        If the problem has no such scheme.
    """
    coarse = problem.time_grid(4)
    fine = np.sort(np.concatenate([coarse, 0.5 * (coarse[1:] + coarse[:-1])]))
    zero = problem.theta("zero")
    try:
        whole: Any = problem.tables(zero, coarse, "exponential")
        parts: Any = problem.tables(zero, fine, "exponential")
    except np.linalg.LinAlgError:
        raise NotApplicableError(
            "the noise of one step does not reach every direction"
        ) from None
    found = []
    for n in range(4):
        if isinstance(whole, LinearTables):
            pairs = _linear_pairs(whole, parts, n)
        else:
            levels = [
                tables.control_gain * tables.noise / _levels_of(problem, times)
                for tables, times in ((whole, coarse), (parts, fine))
            ]
            pairs = _mixture_pairs(whole, parts, levels, n)
        for got, wanted in pairs:
            error = np.abs(got - wanted) / (1e-3 + np.max(np.abs(wanted)))
            found.append(require(error, tolerance, f"exponential step {n}"))
    return closest(found)


def _linear_pairs(whole: Any, parts: Any, n: int) -> list[tuple[Array, Array]]:
    """Return the coefficients of step n, and those of its two halves composed."""
    i, j = 2 * n, 2 * n + 1
    M, c, G = parts.transition, parts.offset, parts.noise
    carried = M[j] @ G[i] @ G[i].T @ M[j].T
    return [
        (whole.transition[n], M[j] @ M[i]),
        (whole.offset[n], M[j] @ c[i] + c[j]),
        (whole.noise[n] @ whole.noise[n].T, carried + G[j] @ G[j].T),
    ]


def _mixture_pairs(
    whole: Any, parts: Any, levels: list[Array], n: int
) -> list[tuple[Array, Array]]:
    """The same for a mixture; ``levels`` are the responses to the control."""
    i, j = 2 * n, 2 * n + 1
    a, c, g, b = parts.scale, parts.offset, parts.noise, parts.base_gain
    return [
        (whole.scale[n], a[j] * a[i]),
        (whole.offset[n], a[j] * c[i] + c[j]),
        (whole.noise[n] ** 2, a[j, 0] ** 2 * g[i] ** 2 + g[j] ** 2),
        (whole.base_gain[n], a[j, 0] * b[i] + b[j]),
        (levels[0][n], a[j, 0] * levels[1][i] + levels[1][j]),
    ]


def _levels_of(problem: Problem, times: Array) -> Array:
    return np.array([problem.diffusion(t)[0, 0] for t in times[:-1]])
