"""Execution of a measurement: paths, statistics, accumulators; no judgement.

Replicates are dealt to a fixed number of lanes, each lane's replicates are processed
in order by one thread at a time, and lanes are merged in order, so that results are
bitwise independent of the number of threads.  Memory is one block of paths per thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdebench.errors import NumericalError
from sdebench.estimator import Estimator
from sdebench.measure.moments import LogMeanExp, StreamingMoments
from sdebench.measure.tails import TopValues, column_norms
from sdebench.measure.workers import GRID_SHIFT, Settings, Worker, make_worker
from sdebench.problem import Problem

Array = NDArray[np.float64]

LANES = 8
TOP_VALUES = 4096


@dataclass
class Accumulator:
    """Everything that is kept of one estimator, in memory independent of its samples.

    values : moments of the replicate values.
    contributions : moments of the groups' contributions, if they are independent.
    group : paths per contribution.
    top : the largest contributions (log-weights in the log domain).
    """

    estimator: Estimator
    n_params: int
    group: int
    values: StreamingMoments = field(init=False)
    contributions: StreamingMoments | None = field(init=False)
    top: TopValues = field(init=False)
    weights: LogMeanExp | None = field(init=False)
    seconds: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.is_weight = self.estimator.reduction == "log_mean_exp"
        size = 1 if self.estimator.estimand == "log_normalizer" else self.n_params
        self.values = StreamingMoments(size, LANES)
        independent = self.estimator.independent
        self.contributions = StreamingMoments(size, LANES) if independent else None
        self.weights = LogMeanExp(LANES) if self.is_weight else None
        self.top = TopValues(TOP_VALUES, LANES, absolute=not self.is_weight)
        self.seconds = [0.0] * LANES
        self._centre = np.zeros(size)

    def start(self, statistics: NDArray[Any], count: int, value: Array) -> None:
        """Take the shifts of the streaming moments from the first block."""
        statistics, count = group_means(statistics, count, self.group)
        if self.contributions is not None:
            self.contributions.set_shift(statistics, count)
        if not self.is_weight:
            # The median: with infinite variance a mean may be an outlier itself.
            rows = statistics[: self.n_params, :count].astype(np.float64)
            self._centre = np.nan_to_num(np.median(rows, axis=1))
        self.values.set_shift(np.nan_to_num(value)[:, None])

    def paths(self, lane: int, statistics: NDArray[Any], count: int) -> None:
        """Add the paths of one block."""
        if not self.is_weight:  # a mean of log-weights is not the log of a mean
            statistics, count = group_means(statistics, count, self.group)
        if self.contributions is not None:
            self.contributions.update(lane, statistics, count)
        if self.weights is not None:
            self.weights.update(lane, statistics[0], count)
            self.top.update(lane, statistics[0, :count])
        else:
            rows = statistics[: self.n_params]
            self.top.update(lane, column_norms(rows, self._centre, count))


def group_means(
    statistics: NDArray[Any], count: int, group: int
) -> tuple[NDArray[Any], int]:
    """Return the means (C, n) of consecutive groups of paths, and n."""
    if group == 1:
        return statistics, count
    groups = statistics[:, :count].reshape(len(statistics), count // group, group)
    return np.ascontiguousarray(groups.mean(axis=2)), count // group


class ReplicateMean:
    """The value of one replicate from its blocks."""

    def __init__(self, estimator: Estimator) -> None:
        self._estimator = estimator
        self._sum: Any = 0.0
        self._weights = LogMeanExp(1) if estimator.reduction != "mean" else None

    def add(self, statistics: NDArray[Any], count: int) -> None:
        """Add one block's statistics (C, >= count)."""
        if self._weights is not None:
            self._weights.update(0, statistics[0], count)
        else:
            self._sum = self._sum + statistics[:, :count].sum(axis=1, dtype=np.float64)

    def value(self, n_paths: int) -> Array:
        """Return the estimate of the replicate."""
        if self._weights is not None:
            return np.array([self._weights.finalize().log_mean])
        return np.asarray(self._estimator.combine(self._sum / n_paths, n_paths))


class Simulation:
    """Estimators with the same `shared_paths`: one forward pass, one noise."""

    def __init__(
        self, problem: Problem, estimators: Sequence[Estimator], settings: Settings
    ) -> None:
        self.problem, self.settings = problem, settings
        self.estimators = list(estimators)
        self.accumulators = [
            Accumulator(e, problem.n_params, e.group_size(settings.n_paths))
            for e in estimators
        ]
        self._done = 0
        self._warm()

    def _make(self) -> Worker:
        return make_worker(self.problem, self.estimators, self.settings)

    def _blocks(self, size: int) -> list[tuple[int, int]]:
        """Return first path number and size of the blocks of a replicate.

        Grids of different length get disjoint path numbers, so that the errors along a
        ladder of step counts are independent, as a fit of the order assumes.
        """
        paths = self.settings.n_paths
        origin = (len(self.settings.times) - 1) << GRID_SHIFT
        return [(origin + p, min(size, paths - p)) for p in range(0, paths, size)]

    def _warm(self) -> None:
        """Compile, and take the shifts from the first block, outside the clock."""
        worker = self._make()
        first, count = self._blocks(worker.size)[0]
        statistics, _, _ = worker.block(0, first, count)
        for accumulator, rows in zip(self.accumulators, statistics, strict=True):
            replicate = ReplicateMean(accumulator.estimator)
            replicate.add(rows, count)
            accumulator.start(rows, count, replicate.value(count))
        self._workers = [worker]

    def run(self, n_replicates: int, threads: int) -> None:
        """Add replicates until there are ``n_replicates`` in all."""
        while len(self._workers) < min(threads, LANES):
            self._workers.append(self._make())
        lanes = [
            range(self._done + (lane - self._done) % LANES, n_replicates, LANES)
            for lane in range(LANES)
        ]
        if threads <= 1:
            for lane in range(LANES):
                self._lane(self._workers[0], lane, lanes[lane])
        else:
            free = list(self._workers)

            def task(lane: int) -> None:
                worker = free.pop()
                try:
                    self._lane(worker, lane, lanes[lane])
                finally:
                    free.append(worker)

            with ThreadPoolExecutor(len(free)) as pool:
                list(pool.map(task, range(LANES)))
        self._done = n_replicates

    def _lane(self, worker: Worker, lane: int, replicates: range) -> None:
        values: list[list[Array]] = [[] for _ in self.estimators]
        blocks = self._blocks(worker.size)
        n_paths = self.settings.n_paths
        for replicate in replicates:
            means = [ReplicateMean(e) for e in self.estimators]
            for first, count in blocks:
                statistics, shared, own = worker.block(replicate, first, count)
                for i, accumulator in enumerate(self.accumulators):
                    accumulator.seconds[lane] += shared + own[i]
                    accumulator.paths(lane, statistics[i], count)
                    means[i].add(statistics[i], count)
            for i, mean in enumerate(means):
                values[i].append(mean.value(n_paths))
        for accumulator, found in zip(self.accumulators, values, strict=True):
            if found:
                accumulator.values.update(lane, np.ascontiguousarray(np.array(found).T))

    @property
    def n_replicates(self) -> int:
        """Replicates so far."""
        return self._done


def check_finite(accumulator: Accumulator) -> None:
    """Raise if an estimator produced NaN or overflowed."""
    parts = (accumulator.values, accumulator.contributions, accumulator.weights)
    bad = max(part.n_nonfinite for part in parts if part is not None)
    if bad and accumulator.is_weight:
        raise NumericalError(
            f"{accumulator.estimator.label}: in {bad} samples the log-weights are NaN "
            "or plus infinity, or all weights of a replicate vanish; use more time "
            "steps, float64, or another annealing"
        )
    if bad:
        raise NumericalError(
            f"{accumulator.estimator.label} returned NaN or infinity in {bad} "
            "samples; use more time steps, float64, or a theta closer to the optimum"
        )
