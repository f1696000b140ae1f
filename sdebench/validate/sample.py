"""Samples of estimators on one cell: the same paths for all, kept in memory.

Measuring (`sdebench.measure`) streams; validation compares estimators path by path and
needs the joint sample.  One call simulates ``n_paths`` independent paths; estimators
that compare paths are evaluated on groups of ``group`` of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from sdebench.estimator import Estimator
from sdebench.measure.workers import (
    Settings,
    make_worker,
    shared_paths,
)
from sdebench.problem import Problem

Array = NDArray[np.float64]

GROUP = 64
"""Paths of a replicate, for estimators that compare or couple the paths of one."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one estimator returned on the paths of a cell.

    rows : (C, n_paths), the statistics of every path.
    seconds : spent in the estimator, and in the forward pass it shares.
    """

    estimator: Estimator
    rows: Array
    seconds: float
    shared_seconds: float

    @property
    def n_paths(self) -> int:
        """Number of paths."""
        return int(self.rows.shape[1])

    def values(self, group: int) -> Array:
        """Return the estimates (n_paths // group, P) of groups of paths."""
        count = self.n_paths // group
        parts = self.rows[:, : count * group].reshape(len(self.rows), count, group)
        if self.estimator.reduction == "log_mean_exp":
            return logsumexp(parts[0], axis=1)[:, None] - np.log(group)
        means = parts.mean(axis=2).T
        found = [self.estimator.combine(mean, group) for mean in means]
        return np.array(found, dtype=np.float64)

    def contributions(self, group: int) -> tuple[Array, int]:
        """Return independent samples (n, P) of the estimate, and the paths of each."""
        size = self.estimator.group_size(group)
        if self.estimator.independent:
            return (self.rows.T, 1) if size == 1 else (self.values(size), size)
        return self.values(group), group


def collect(
    problem: Problem,
    estimators: Sequence[Estimator],
    theta: Array,
    times: Array,
    **options: Any,
) -> list[Sample]:
    """Return a sample of every estimator on the same noise.

    Parameters
    ----------
    theta : (P,) of the evaluation point; times : the grid.
    options : n_paths, backend, dtype, device, seed as in `Settings`.
    """
    found: dict[int, Sample] = {}
    given: dict[str, Any] = {"device": "cpu", "seed": 0} | options
    whole = Settings(theta=theta, times=times, **given)
    groups: dict[Hashable, list[int]] = {}
    for i, estimator in enumerate(estimators):
        key = shared_paths(estimator, len(times) - 1, GROUP)
        groups.setdefault(key, []).append(i)
    for mine in groups.values():
        coupled = estimators[mine[0]].group_size(GROUP) > 1
        # What couples paths couples those of a replicate: replicates of GROUP paths.
        settings = replace(whole, n_paths=GROUP) if coupled else whole
        worker = make_worker(problem, [estimators[i] for i in mine], settings)
        if settings.backend == "numba":  # compile or load outside the clock
            worker.block(0, 0, min(settings.n_paths, worker.size))
        parts: list[list[Array]] = [[] for _ in mine]
        shared, own = 0.0, np.zeros(len(mine))
        for first in range(0, whole.n_paths, worker.size):
            count = min(worker.size, whole.n_paths - first)
            rows, forward, spent = worker.block(0, first, count)
            shared += forward
            own += spent
            for part, row in zip(parts, rows, strict=True):
                part.append(np.array(row[:, :count], dtype=np.float64))
        for i, part, seconds in zip(mine, parts, own, strict=True):
            found[i] = Sample(
                estimator=estimators[i],
                rows=np.concatenate(part, axis=1),
                seconds=float(seconds),
                shared_seconds=shared,
            )
    return [found[i] for i in range(len(estimators))]
