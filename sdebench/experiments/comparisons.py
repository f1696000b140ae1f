"""Several estimators on the same noise, and what is said about two of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, log, sqrt

import joblib
import numpy as np
from threadpoolctl import threadpool_limits

from sdebench import registry
from sdebench.experiments.measuring import N_PATHS, Array, n_threads, settings_at
from sdebench.measure.engine import ReplicateMean
from sdebench.measure.intervals import Interval, bias_norm, t_quantile
from sdebench.measure.moments import Moments
from sdebench.measure.workers import GRID_SHIFT, make_worker
from sdebench.problem import Problem

LANES = 8
"""Parts of the replicates that run at once; the numbers do not depend on it."""


def replicate_values(
    problem: Problem,
    estimators: Sequence[str],
    point: str | Sequence[float],
    n_steps: int,
    n_replicates: int,
    seed: int,
) -> Array:
    """Return the estimates (estimators, replicates, parameters) of the same replicates.

    A replicate is a mean over `N_PATHS` paths; all estimators have its noise.  No exact
    answer takes part.
    """
    chosen = [registry.estimator(name) for name in estimators]
    settings = settings_at(problem, point, n_steps, seed)
    origin = n_steps << GRID_SHIFT
    values = np.empty((len(chosen), n_replicates, problem.n_params))

    def lane(number: int) -> None:
        worker = make_worker(problem, chosen, settings)
        for replicate in range(number, n_replicates, LANES):
            means = [ReplicateMean(estimator) for estimator in chosen]
            for first in range(0, N_PATHS, worker.size):
                count = min(worker.size, N_PATHS - first)
                rows, _, _ = worker.block(replicate, origin + first, count)
                for mean, part in zip(means, rows, strict=True):
                    mean.add(part, count)
            values[:, replicate] = [mean.value(N_PATHS) for mean in means]

    in_lanes(lane)
    return values


def in_lanes(lane: Callable[[int], None]) -> None:
    """Call ``lane(number)`` for the numbers of all lanes, in threads."""
    with threadpool_limits(1, user_api="blas"):
        lane_of = joblib.delayed(lane)
        joblib.Parallel(n_threads(), prefer="threads")(map(lane_of, range(LANES)))


def relative_bias(
    moments: Moments, answer: Array, level: float, scale: float
) -> Interval:
    """Return |E[estimate] - answer| / scale with its interval."""
    assert moments.covariance is not None
    gap = moments.mean - answer
    return bias_norm(gap, moments.covariance, moments.n, level, scale)


def variance_ratio(top: Array, bottom: Array, level: float) -> Interval:
    """Return the ratio of the traces of two covariances, of values on the same noise.

    Parameters
    ----------
    top, bottom : (n, parameters), row by row of the same noise.

    The logarithm of the ratio has the influence |y|^2 / trace of ``top`` less that of
    ``bottom``, y = value - mean: a Student interval of its mean.
    """
    squares = [np.sum((v - v.mean(axis=0)) ** 2, axis=1) for v in (top, bottom)]
    traces = [float(s.mean()) for s in squares]
    influence = squares[0] / traces[0] - squares[1] / traces[1]
    n = len(influence)
    reach = t_quantile(level, n - 1) * float(influence.std(ddof=1)) / sqrt(n)
    center = log(traces[0] / traces[1])
    return Interval(*(exp(center + r) for r in (0.0, -reach, reach)))


def quotient(top: Interval, bottom: Interval) -> Interval:
    """Return the quotient of two positive numbers whose intervals hold jointly."""
    return Interval(
        top.estimate / bottom.estimate, top.low / bottom.high, top.high / bottom.low
    )


def power(small: Interval, large: Interval, factor: float) -> Interval:
    """Return p with large = small factor^p, for a ``factor`` above 1."""
    ratio = quotient(large, small)
    return Interval(*(log(value) / log(factor) for value in ratio))
