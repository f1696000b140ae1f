"""Measurements that several experiments share."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import joblib
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from sdebench import registry
from sdebench.errors import NotExactError
from sdebench.experiments.experiment import LEVEL
from sdebench.measure.engine import Simulation, check_finite
from sdebench.measure.intervals import Interval, bias_norm, t_quantile
from sdebench.measure.moments import Moments
from sdebench.measure.workers import Settings
from sdebench.problem import Problem

Array = NDArray[np.float64]

N_PATHS = 256
PILOT = 64
"""Replicates of the pilot run, on noise of its own."""


def n_threads() -> int:
    """Return the threads to simulate with; the numbers do not depend on it."""
    return int(joblib.cpu_count())


def exact_chain_problems() -> list[Problem]:
    """Return the problems whose N-step chain is affine, with u* in reach.

    Where the control family does not hold u*, its best member is no optimum.
    """
    problems = map(registry.problem, registry.problem_names())
    return [p for p in problems if p.family_holds_optimum and _has_affine_chain(p)]


def _has_affine_chain(problem: Problem) -> bool:
    try:
        problem.truth.policy_chain("optimum", 1)
    except NotExactError:
        return False
    return True


def gradient_scale(problem: Problem, point: str) -> float:
    """Return the norm of the exact gradient; at the optimum that at the point zero."""
    place = "zero" if point == "optimum" else point
    return float(np.linalg.norm(problem.truth.gradient(place)))


def settings_at(
    problem: Problem, point: str | Sequence[float], n_steps: int, seed: int
) -> Settings:
    """Return the settings of all simulations: numba, float64, `N_PATHS` paths."""
    return Settings(
        times=problem.time_grid(n_steps),
        theta=problem.theta(point),
        n_paths=N_PATHS,
        backend="numba",
        dtype="float64",
        device="cpu",
        seed=seed,
    )


def sample(
    problem: Problem,
    estimators: Sequence[str],
    point: str | Sequence[float],
    n_steps: int,
    n_replicates: int,
    seed: int,
) -> list[tuple[Moments, int]]:
    """Return each estimator's moments of independent samples, and paths per sample.

    A sample is one path, or a replicate of `N_PATHS` where an estimator couples paths.
    No exact answer takes part.
    """
    chosen = [registry.estimator(name) for name in estimators]
    settings = settings_at(problem, point, n_steps, seed)
    simulation = Simulation(problem, chosen, settings)
    with threadpool_limits(1, user_api="blas"):
        simulation.run(n_replicates, n_threads())
    found = []
    for accumulator in simulation.accumulators:
        check_finite(accumulator)
        if accumulator.contributions is not None:
            found.append((accumulator.contributions.finalize(), accumulator.group))
        else:
            found.append((accumulator.values.finalize(), N_PATHS))
    return found


def mean_interval(moments: Moments, level: float) -> Interval:
    """Return the mean of a single component with its interval."""
    error = float(np.sqrt(moments.trace / moments.n))
    reach = t_quantile(level, moments.n - 1) * error
    value = float(moments.mean[0])
    return Interval(value, value - reach, value + reach)


def distance(
    problem: Problem,
    estimator: str,
    point: str,
    n_steps: int,
    answer: Array,
    *,
    half_width: float,
    n_intervals: int,
    seed: int,
) -> Interval:
    """Return |E[estimate] - answer| relative to `gradient_scale`, with its interval.

    A pilot on other noise sets the number of replicates, so that the interval reaches
    about ``half_width`` to either side; it is one of ``n_intervals`` that hold jointly
    with probability `LEVEL`.  The estimator's paths are independent.
    """
    level = 1.0 - (1.0 - LEVEL) / n_intervals
    scale = gradient_scale(problem, point)
    arguments = (problem, [estimator], point, n_steps)
    pilot, _ = sample(*arguments, PILOT, seed ^ 1)[0]
    reach = t_quantile(level, pilot.n - 1) / (half_width * scale)
    replicates = max(PILOT, ceil(pilot.trace * reach**2 / N_PATHS))
    moments, _ = sample(*arguments, replicates, seed)[0]
    assert moments.covariance is not None
    gap = moments.mean - answer
    return bias_norm(gap, moments.covariance, moments.n, level, scale)


def extrapolated(
    coarse: tuple[float, float],
    fine: tuple[float, float],
    n_samples: int,
    n_intervals: int,
) -> Interval:
    """Return Richardson's value of N and 2 N steps on independent noise.

    Parameters
    ----------
    coarse, fine : a mean and its squared standard error, with N and with 2 N steps.
    n_samples : behind each of them.
    n_intervals : that hold jointly at `LEVEL`.
    """
    value = 2.0 * fine[0] - coarse[0]
    error = np.sqrt(4.0 * fine[1] + coarse[1])
    reach = float(t_quantile(LEVEL, n_samples - 1, n_intervals) * error)
    return Interval(value, value - reach, value + reach)
