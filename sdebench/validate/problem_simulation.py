"""Checks of a problem's exact answers against simulated paths and built-in estimators.

The exact answers of continuous time are compared with Richardson values
2 s(2N) - s(N) of independent simulations, or with the answers of the N-step chain
where those exist.  ``alarm`` is the false-alarm rate of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sdebench import registry
from sdebench.errors import NotApplicableError
from sdebench.estimator import Estimator
from sdebench.linear_problem import LinearProblem
from sdebench.measure.cell import ROUNDING, make_request, refusal
from sdebench.measure.intervals import bias_test
from sdebench.problem import Problem
from sdebench.simulate.paths import Paths, simulate
from sdebench.simulate.tables import ONLY_TORCH
from sdebench.validate.problem_checks import (
    Array,
    Comparison,
    Theta,
    closest,
    require,
    require_zero,
)
from sdebench.validate.problem_second_route import control_gap, grid_dim
from sdebench.validate.sample import GROUP, collect
from sdebench.validate.statistics import least_credible_p_value

BACKEND_TOLERANCE = 1e-11
"""Difference of the two backends, relative to the largest statistic of a row."""
Statistic = Callable[[Paths, int], tuple[Any, Any]]


def starts(problem: Problem, n_paths: int, seed: int) -> Array:
    """Return X_0 (n, d): its noise does not depend on the number of steps."""
    run = simulate(problem, n_steps=1, n_paths=n_paths, seed=seed, keep_states=True)
    assert run.states is not None
    return run.states[0].T


def has_chain(problem: Problem) -> bool:
    """Return whether the answers of the N-step chain are exact as well."""
    return problem.truth.answer("log_normalizer", "zero", 12) is not None


def _require_optimum(problem: Problem) -> None:
    """Raise `NotApplicableError` where paths under u* cannot be simulated."""
    if not problem.family_holds_optimum:
        raise NotApplicableError("the control family does not hold u*")


def log_mean(values: Array) -> tuple[float, float, float]:
    """Return the log of the mean of exp(values), its SE, and the effective size."""
    shift = values.max()
    w = np.exp(values - shift)
    mean = w.mean()
    error = w.std(ddof=1) / np.sqrt(len(w)) / mean
    return np.log(mean) + shift, error, w.sum() ** 2 / np.sum(w**2)


def _levels(
    problem: Problem,
    point: str | None,
    n_steps: int,
    n_paths: int,
    seed: int,
    statistic: Statistic,
) -> tuple[Array, Array]:
    """Return a statistic and its SE at N and 2N steps, independent seeds: (2, ...)."""
    found = []
    for factor in (1, 2):
        run = simulate(
            problem,
            point=point,
            n_steps=factor * n_steps,
            n_paths=n_paths,
            seed=seed + factor,
        )
        found.append(statistic(run, seed + factor))
    values, errors = zip(*found, strict=True)
    return np.array(values), np.array(errors)


def _richardson(values: Array, errors: Array) -> tuple[Array, Array]:
    """Return 2 s(2N) - s(N) and its SE."""
    return 2.0 * values[1] - values[0], np.hypot(2.0 * errors[1], errors[0])


def check_feynman_kac(
    problem: Problem,
    importance: bool = True,
    n_paths: int = 2**15,
    n_steps: int = 64,
    seed: int = 100,
    smallest: float = 0.02,
    *,
    alarm: float,
) -> Comparison:
    """Log Z by Monte Carlo, under the base or under u* with importance weights.

    The mean weight of N steps is Z_N exactly whatever the control: it is compared with
    log_normalizer(N) where that exists, else with log Z after Richardson
    extrapolation, whose rest O(h^2) is far below the standard error.  There a second
    statistic divides each weight by h(X_0, t_0), which tests h at every start.

    Raises
    ------
    NotApplicableError
        If the effective share of the paths is below ``smallest``, or the noise would
        hide a control cost without its factor 1/2.
    """
    truth = problem.truth
    point = "optimum" if importance else None
    energies, sizes = [], []

    def overall(run: Paths, seed: int) -> tuple[float, float]:
        value, error, size = log_mean(run.log_weight)
        energies.append(run.control_cost.mean())
        sizes.append(size / n_paths)
        return value, error

    def given_start(run: Paths, seed: int) -> tuple[Any, Any]:
        value = truth.value(starts(problem, n_paths, seed), problem.time_span[0])
        pairs = [overall(run, seed), log_mean(run.log_weight + value)[:2]]
        return tuple(np.array(pairs).T)

    limit, chain = truth.log_normalizer(), has_chain(problem)
    statistic = overall if chain else given_start
    levels = _levels(problem, point, n_steps, n_paths, seed, statistic)
    if chain:
        gap, error = levels
        gap = gap - [truth.log_normalizer(k * n_steps) for k in (1, 2)]
        # Z_N itself must tend to Z at order one.
        fine = truth.log_normalizer(16 * n_steps), truth.log_normalizer(32 * n_steps)
        rest = abs(2.0 * fine[1] - fine[0] - limit)
        require(rest, 1e-4 * (1.0 + abs(limit)), "log Z_N tends to log Z: off by")
    else:
        gap, error = _richardson(*levels)
        gap = gap - [limit, 0.0]
    if min(sizes) < smallest:
        raise NotApplicableError(
            f"only {min(sizes):.2g} of the paths carry the weight, effective sample "
            f"size; {smallest:g} is needed for a test"
        )
    found = require_zero(gap, error, "log Z by Monte Carlo", alarm=alarm)
    # Power: half the control cost left out would move log Z by half of it.
    if importance and 10.0 * np.max(error) >= 0.5 * np.mean(energies):
        raise NotApplicableError("too few paths to see a missing 1/2 in the control")
    return found


def check_optimal_law(
    problem: Problem,
    n_paths: int = 2**14,
    n_steps: int = 192,
    seed: int = 200,
    *,
    alarm: float,
) -> Comparison:
    """Mean and covariance of X_T under u* against truth.tilted_moments(T)."""
    _require_optimum(problem)
    mean, covariance = problem.truth.tilted_moments(problem.time_span[1])
    upper = np.triu_indices(problem.dim)

    def moments(run: Paths, seed: int) -> tuple[Array, Array]:
        x = run.terminal.T - mean
        pairs = x[:, upper[0]] * x[:, upper[1]] - covariance[upper]
        rows = np.concatenate([x, pairs], axis=1)
        return rows.mean(axis=0), rows.std(axis=0, ddof=1) / np.sqrt(n_paths)

    levels = _levels(problem, "optimum", n_steps, n_paths, seed, moments)
    gap, error = _richardson(*levels)
    size = np.sqrt(np.diag(covariance))
    size[size == 0.0] = np.inf  # a pixel that is the same in all images
    # The floor stands for the rest h^2 of the extrapolation.
    start, end = problem.time_span
    floor = ((end - start) / n_steps) ** 2
    what = "law of X_T under u*"
    found = require_zero(gap, error, what, alarm=alarm, floor=floor)
    if np.max(error[: problem.dim] / size) >= 0.05:
        raise NotApplicableError("too few paths to see a shift of X_T")
    return found


def check_log_weights(
    problem: Problem,
    n_paths: int = 2**12,
    seed: int = 300,
    tolerance: float = 0.1,
    faster: float = 0.0,
) -> Comparison:
    """log_weight + V(X_0, t_0) tends to 0 at order 1 (grad V free of x) or 1/2.

    Root mean squares at N = 128 ... 1024.  The next term is of relative size
    sqrt(h), at most a few per cent on this ladder, and the root mean square of 4096
    paths is known to 2 %, on a factor 8 of h: 0.1 covers both.  ``faster`` is how much
    greater the order may be, as it is where terms of order 1 still dominate.
    """
    _require_optimum(problem)
    x = starts(problem, n_paths, seed)
    start = problem.time_span[0]
    value = problem.truth.value(x, start)
    states = x + np.linspace(0, 1, n_paths)[:, None]
    u = problem.truth.control(states, start)
    if problem.noise_depends_on_state:  # -grad V, the noise being diagonal
        u = u / np.diagonal(problem.diffusion_at(states, start), axis1=1, axis2=2)
    order = 1.0 if np.ptp(u, axis=0).max() < 1e-12 else 0.5
    ladder = np.array([128, 256, 512, 1024])
    size = []
    for n_steps in ladder:
        run = simulate(problem, n_steps=int(n_steps), n_paths=n_paths, seed=seed)
        given_start = run.log_weight + run.start_log_ratio
        size.append(float(np.sqrt(np.mean((given_start + value) ** 2))))
    if max(size) < 1e-11:
        return Comparison(max(size), 1e-11, "log-weights under u* against -V(X_0)")
    slope = -float(np.polyfit(np.log(ladder), np.log(size), 1)[0])
    what = f"order of the log-weights {slope:.3f}, expected {order}: off by"
    return require(max(order - slope, slope - order - faster), tolerance, what)


# ---- regret ------------------------------------------------------------------------


def check_regret(
    problem: Problem,
    theta: Theta,
    tolerance: float = 1e-10,
    *,
    alarm: float,
    **resolution: Any,
) -> Comparison:
    """J(theta) - J(u*) = 1/2 E_theta int |u_theta - u*|^2, by a route that fits.

    Plus the divergence of the start law from the optimal one, where theta moves it.

    Closed form for class L, quadrature for tilting problems with d <= 2
    (``resolution``: nodes and panels in time, refine in space), else simulation.
    """
    truth = problem.truth
    if isinstance(problem, LinearProblem):
        half = 0.5 * truth.control_error(theta) ** 2
    elif grid_dim(problem):
        half = 0.5 * control_gap(problem, problem.theta(theta), **resolution)  # type: ignore[arg-type]
    else:
        # whole paths are kept: fewer of them in many dimensions
        n_paths = max(2**13 * 10 // max(problem.dim, 10), 2**10)
        return check_regret_by_simulation(problem, theta, n_paths=n_paths, alarm=alarm)
    regret = truth.objective(theta) - truth.optimal_cost()
    regret -= truth.start_divergence(theta)
    scale = 1.0 + abs(truth.objective(theta))
    return require(abs(regret - half) / scale, tolerance, "regret identity")


def check_regret_by_simulation(
    problem: Problem,
    theta: Theta,
    n_paths: int = 2**13,
    n_steps: int = 64,
    seed: int = 400,
    *,
    alarm: float,
) -> Comparison:
    """The identity path by path: cost - V(X_0) - 1/2 sum h |u_theta - u*|^2, mean 0."""
    truth, theta = problem.truth, problem.theta(theta)
    regret = truth.objective(theta) - truth.optimal_cost()
    regret -= truth.start_divergence(theta)
    rows = []
    for factor in (1, 2):
        run = simulate(
            problem,
            point=theta,
            n_steps=factor * n_steps,
            n_paths=n_paths,
            seed=seed + factor,
            keep_states=True,
        )
        assert run.states is not None
        value = truth.value(run.states[0].T, run.times[0])
        excess = run.cost - run.start_log_ratio - value
        half = np.zeros(n_paths)
        for n, h in enumerate(np.diff(run.times)):
            x = run.states[n].T
            gap = truth.policy(x, run.times[n], theta) - truth.control(x, run.times[n])
            half += 0.5 * h * np.sum(gap**2, axis=-1)
        values = np.array([excess - half, excess - regret, half - regret])
        rows.append((values.mean(axis=1), values.std(axis=1, ddof=1)))
    means, spreads = (np.array(part) for part in zip(*rows, strict=True))
    estimate, error = _richardson(means, spreads / np.sqrt(n_paths))
    # The floor stands for the rest h^2 of the extrapolation.
    floor = (run.times[1] - run.times[0]) ** 2 * (1.0 + abs(regret))
    what = "regret identity by simulation"
    return require_zero(estimate, error, what, alarm=alarm, floor=floor)


# ---- backends and estimators -------------------------------------------------------


def check_backends(
    problem: Problem, n_steps: int = 7, n_paths: int = 300, seed: int = 5
) -> Comparison:
    """All built-in estimators in numba and in torch, path by path on the same noise.

    Those that cannot run on the problem, or have no kernel, are left out; so are
    regressions on more coordinates than they have paths.
    """
    if "numba" not in problem.backends:
        raise NotApplicableError(ONLY_TORCH)
    request = make_request(problem, n_steps=n_steps, n_paths=n_paths)
    every = [registry.estimator(name) for name in registry.estimator_names()]
    few = problem.dim >= GROUP
    chosen = [
        e
        for e in every
        if e.block_kernel is not None
        and refusal(request, e) is None
        and not (few and e.group_size(GROUP) > 1)
    ]
    theta, times = request.theta, request.times
    ours, theirs = (
        collect(
            problem,
            chosen,
            theta,
            times,
            n_paths=n_paths,
            backend=backend,
            dtype="float64",
            device="cpu",
            seed=seed,
        )
        for backend in ("numba", "torch")
    )
    found = []
    for a, b in zip(ours, theirs, strict=True):
        scale = np.max(np.abs(b.rows), axis=1, keepdims=True)
        error = np.abs(a.rows - b.rows) / np.where(scale > 0.0, scale, 1.0)
        what = f"{a.estimator.label} in numba and torch"
        found.append(require(error, BACKEND_TOLERANCE, what))
    return closest(found)


UNBIASED = ("pathwise", "reinforce", "adjoint_matching")
"""Built-in estimators without a bias of their own, whatever the number of paths."""


def check_estimators(
    problem: Problem,
    point: str = "halfway",
    n_paths: int = 2**15,
    n_steps: int = 64,
    seed: int = 500,
    *,
    alarm: float,
) -> Comparison:
    """Built-in unbiased estimators against the exact gradient that each estimates.

    Against the gradient of the N-step chain where it is exact, else Richardson values
    against continuous time, whose rest is allowed for by the square of the step.  The
    value compared is log10 of one over the p-value.
    """
    estimators = [registry.estimator(name) for name in UNBIASED]
    chain = has_chain(problem)
    steps = (n_steps,) if chain else (n_steps, 2 * n_steps)
    samples = [
        _contributions(problem, estimators, point, n, n_paths, seed + n) for n in steps
    ]
    found, unclear = [], []
    share = alarm / len(UNBIASED)
    for i, estimator in enumerate(estimators):
        rows = [sample[i] for sample in samples]
        combined = rows[0] if chain else 2.0 * rows[1] - rows[0]
        answer = problem.truth.answer(
            estimator.estimand, point, n_steps if chain else None
        )
        if answer is None:
            unclear.append(f"{estimator.name}: no exact answer")
        elif least_credible_p_value(combined) > share:
            unclear.append(f"{estimator.name}: heavy tails")
        else:
            start, end = problem.time_span
            rest = 0.0 if chain else ((end - start) / n_steps) ** 2
            found.append(_unbiased(estimator.name, combined, answer, rest, share))
    if not found:
        raise NotApplicableError(f"nothing to compare ({'; '.join(unclear)})")
    return closest(found)


def _contributions(
    problem: Problem,
    estimators: Sequence[Estimator],
    point: str,
    n_steps: int,
    n_paths: int,
    seed: int,
) -> list[Array]:
    """Return independent contributions (n, P) of every estimator."""
    samples = collect(
        problem,
        estimators,
        problem.theta(point),
        problem.time_grid(n_steps),
        n_paths=n_paths,
        backend=problem.backends[0],
        dtype="float64",
        device="cpu",
        seed=seed,
    )
    # In groups, since some compare the paths of one.
    found = [sample.contributions(GROUP)[0] for sample in samples]
    bad = [1.0 - np.isfinite(values).mean() for values in found]
    require(bad, 0.0, "share of the estimators' contributions that are not finite")
    return found


def _unbiased(
    name: str, rows: Array, answer: Array, rest: float, significance: float
) -> Comparison:
    """Compare the mean of samples (n, P) with the exact answer.

    ``rest`` is what the extrapolation leaves, relative to one plus the answer's norm.
    """
    covariance = np.atleast_2d(np.cov(rows, rowvar=False))
    size = 1.0 + float(np.linalg.norm(answer))
    tolerance = rest * size
    tolerance += ROUNDING["float64"] * (size + float(np.sqrt(covariance.max())))
    test = bias_test(rows.mean(axis=0), answer, covariance, len(rows), tolerance)
    error = float(np.sqrt(np.trace(covariance) / len(rows))) / size
    value = abs(float(np.log10(max(test.p_value, 1e-300))))
    what = f"{name}, known to {100 * error:.2g} %: -log10 p"
    return require(value, -float(np.log10(significance)), what)
