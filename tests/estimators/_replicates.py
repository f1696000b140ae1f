"""Rows and replicates of one estimator, for tests that need the numbers themselves."""

from __future__ import annotations

import numpy as np

from sdebench.measure.workers import GRID_SHIFT, Settings, make_worker


def make_settings(
    problem,
    *,
    point="halfway",
    n_steps=6,
    n_paths=64,
    backend="numba",
    dtype="float64",
    seed=7,
):
    """Settings of a simulation at an evaluation point."""
    return Settings(
        times=problem.time_grid(n_steps),
        theta=problem.theta(point),
        n_paths=n_paths,
        backend=backend,
        dtype=dtype,
        device="cpu",
        seed=seed,
    )


def make_rows(problem, estimator, settings, n_replicates=1):
    """Rows (n_replicates, C, n_paths) of an estimator, whatever the blocks."""
    worker = make_worker(problem, [estimator], settings)
    origin = (len(settings.times) - 1) << GRID_SHIFT
    found = []
    for replicate in range(n_replicates):
        parts = []
        for first in range(0, settings.n_paths, worker.size):
            count = min(worker.size, settings.n_paths - first)
            (rows,), _, _ = worker.block(replicate, origin + first, count)
            parts.append(np.array(rows[:, :count], np.float64))
        found.append(np.concatenate(parts, axis=1))
    return np.array(found)


def make_estimates(problem, estimator, settings, n_replicates):
    """Estimates (n_replicates, P)."""
    means = make_rows(problem, estimator, settings, n_replicates).mean(axis=2)
    return np.array([estimator.combine(mean, settings.n_paths) for mean in means])
