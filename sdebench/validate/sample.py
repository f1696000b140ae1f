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
    make_tables,
    make_worker,
    shared_paths,
)
from sdebench.problem import Problem

Array = NDArray[np.float64]


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
        if self.estimator.independent and size == 1:
            return self.rows.T, 1
        return self.values(group), group


def settings_of(
    problem: Problem,
    estimator: Estimator,
    theta: Array,
    times: Array,
    *,
    n_paths: int,
    backend: str,
    dtype: str,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Any, Settings]:
    """Return the coefficient tables that an estimator simulates, and the settings."""
    settings = Settings(
        times=times,
        theta=theta,
        n_paths=n_paths,
        backend=backend,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    tables, _, used = make_tables(problem, estimator, settings)
    return tables, replace(settings, theta=used)


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
    settings = Settings(theta=theta, times=times, **{"device": "cpu"} | options)
    groups: dict[Hashable, list[int]] = {}
    for i, estimator in enumerate(estimators):
        key = shared_paths(estimator, len(times) - 1, settings.n_paths)
        groups.setdefault(key, []).append(i)
    for mine in groups.values():
        worker = make_worker(problem, [estimators[i] for i in mine], settings)
        if settings.backend == "numba":  # compile or load outside the clock
            worker.block(0, 0, min(settings.n_paths, worker.size))
        parts: list[list[Array]] = [[] for _ in mine]
        shared, own = 0.0, np.zeros(len(mine))
        for first in range(0, settings.n_paths, worker.size):
            count = min(worker.size, settings.n_paths - first)
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
