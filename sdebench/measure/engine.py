"""Execution of a measurement: paths, statistics, accumulators; no judgement.

Replicates are dealt to a fixed number of lanes, each lane's replicates are processed
in order by one thread at a time, and lanes are merged in order, so that results are
bitwise independent of the number of threads.  Memory is one block of paths per thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdebench.errors import NumericalError
from sdebench.estimator import Estimator
from sdebench.measure.moments import LogMeanExp, StreamingMoments
from sdebench.measure.tails import TopValues, column_norms
from sdebench.simulate.noise import split_seed
from sdebench.simulate.tables import Tables

Array = NDArray[np.float64]

LANES = 8
BLOCK = 256
"""Paths per block: long enough to hide the loops' overhead, short enough for caches."""
WIDE_BLOCK, WIDE_DIM = 128, 8
"""From this dimension on stored paths of 256 columns leave the level-2 cache."""
TOP_VALUES = 4096
TORCH_ELEMENTS = 1 << 19
"""States (paths x dim) that torch handles at a time."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a simulation needs besides the tables."""

    times: Array
    theta: Array | None
    n_paths: int
    backend: str
    dtype: str
    device: str
    seed: int


# One block of paths: statistics (C, >= count) of each estimator, and the seconds that
# the shared forward pass and each estimator took.
Block = tuple[list[NDArray[Any]], float, list[float]]


class NumbaWorker:
    """Buffers and scratch of one thread."""

    def __init__(
        self, tables: Tables, estimators: Sequence[Estimator], settings: Settings
    ) -> None:
        from sdebench.simulate.forward import path_buffers
        from sdebench.simulate.primitives import prepare, workspace
        from sdebench.simulate.tile import LANES as COLUMNS

        block = BLOCK if tables.offset.shape[1] < WIDE_DIM else WIDE_BLOCK
        self.size = min(block, -(-settings.n_paths // COLUMNS) * COLUMNS)
        self._columns = COLUMNS
        self._prepared = prepare(tables, settings.dtype)
        self._work = workspace(self._prepared, self.size)
        self._buffers = path_buffers(self._prepared, self.size)
        self._estimators = estimators
        self._key = split_seed(settings.seed)
        width = self._buffers.totals.shape[1]
        n_params = self._prepared.n_parameters
        self._out = [
            np.zeros((e.n_statistics(n_params), width), settings.dtype)
            for e in estimators
        ]

    def block(self, replicate: int, first_path: int, count: int) -> Block:
        """Simulate ``count`` paths and return every estimator's statistics."""
        from sdebench.simulate.forward import forward

        if not 0 < count <= self.size:
            raise ValueError(f"a block holds 1 to {self.size} paths, not {count}")
        buffers = self._buffers
        size = -(-count // self._columns) * self._columns
        clock = time.perf_counter()
        forward(
            self._prepared,
            self._work,
            buffers,
            size,
            first_path,
            *self._key,
            replicate,
        )
        shared = time.perf_counter() - clock
        own = []
        for estimator, out in zip(self._estimators, self._out, strict=True):
            kernel = estimator.block_kernel
            assert kernel is not None
            clock = time.perf_counter()
            kernel(
                self._prepared,
                self._work,
                buffers.states,
                buffers.normals,
                buffers.controls,
                buffers.totals,
                size,
                *estimator.kernel_options,
                out,
            )
            own.append(time.perf_counter() - clock)
        return self._out, shared, own


class TorchWorker:
    """The torch implementation of the same block."""

    def __init__(
        self, tables: Tables, estimators: Sequence[Estimator], settings: Settings
    ) -> None:
        from sdebench.simulate.torch_family import torch_family

        self._tables, self._settings = tables, settings
        self._estimators = estimators
        self._family = torch_family(tables, settings.dtype, settings.device)
        dim = self._family.dim
        self.size = max(BLOCK, TORCH_ELEMENTS // dim // BLOCK * BLOCK)
        self.size = min(self.size, settings.n_paths)
        self._key = split_seed(settings.seed)

    def block(self, replicate: int, first_path: int, count: int) -> Block:
        """Simulate ``count`` paths and return every estimator's statistics."""
        import torch

        from sdebench.view import View

        settings = self._settings
        clock = time.perf_counter()
        with torch.no_grad():
            view = View(
                self._tables,
                settings.times,
                settings.theta,
                key=self._key,
                replicate=replicate,
                first_path=first_path,
                n_paths=count,
                dtype=settings.dtype,
                device=settings.device,
                family=self._family,
            )
            view.rollout()
            self._wait()
            shared = time.perf_counter() - clock
            rows, own = [], []
            for estimator in self._estimators:
                clock = time.perf_counter()
                statistics = estimator.statistics(view.share())
                self._wait()
                own.append(time.perf_counter() - clock)
                rows.append(np.ascontiguousarray(statistics.cpu().numpy().T))
        return rows, shared, own

    def _wait(self) -> None:
        if self._settings.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()


@dataclass
class Accumulator:
    """Everything that is kept of one estimator, in memory independent of its samples.

    values : moments of the replicate values.
    contributions : moments of the per-path contributions, if they are independent.
    top : the largest per-path contributions (log-weights in the log domain).
    """

    estimator: Estimator
    n_params: int
    values: StreamingMoments = field(init=False)
    contributions: StreamingMoments | None = field(init=False)
    top: TopValues = field(init=False)
    weights: LogMeanExp | None = field(init=False)
    seconds: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.is_weight = self.estimator.reduction == "log_mean_exp"
        size = 1 if self.is_weight else self.n_params
        self.values = StreamingMoments(size, LANES)
        independent = self.estimator.independent
        self.contributions = StreamingMoments(size, LANES) if independent else None
        self.weights = LogMeanExp(LANES) if self.is_weight else None
        self.top = TopValues(TOP_VALUES, LANES, absolute=not self.is_weight)
        self.seconds = [0.0] * LANES
        self._centre = np.zeros(size)

    def start(self, statistics: NDArray[Any], count: int, value: Array) -> None:
        """Take the shifts of the streaming moments from the first block."""
        if self.contributions is not None:
            self.contributions.set_shift(statistics, count)
        if not self.is_weight:
            # The median: with infinite variance a mean may be an outlier itself.
            rows = statistics[: self.n_params, :count].astype(np.float64)
            self._centre = np.nan_to_num(np.median(rows, axis=1))
        self.values.set_shift(np.nan_to_num(value)[:, None])

    def paths(self, lane: int, statistics: NDArray[Any], count: int) -> None:
        """Add the paths of one block."""
        if self.contributions is not None:
            self.contributions.update(lane, statistics, count)
        if self.weights is not None:
            self.weights.update(lane, statistics[0], count)
            self.top.update(lane, statistics[0, :count])
        else:
            rows = statistics[: self.n_params]
            self.top.update(lane, column_norms(rows, self._centre, count))


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
    """Estimators that share one control, hence one forward pass and its noise."""

    def __init__(
        self,
        tables: Tables,
        estimators: Sequence[Estimator],
        settings: Settings,
        n_params: int,
    ) -> None:
        self.tables, self.settings = tables, settings
        self.estimators = list(estimators)
        self.accumulators = [Accumulator(e, n_params) for e in estimators]
        kind = NumbaWorker if settings.backend == "numba" else TorchWorker
        self._make: Callable[[], NumbaWorker | TorchWorker] = lambda: kind(
            tables, self.estimators, settings
        )
        self._done = 0
        self._warm()

    def _blocks(self, size: int) -> list[tuple[int, int]]:
        """Return first path number and size of the blocks of a replicate.

        Grids of different length get disjoint path numbers, so that the errors along a
        ladder of step counts are independent, as a fit of the order assumes.
        """
        paths = self.settings.n_paths
        origin = (len(self.settings.times) - 1) << 40
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

    def _lane(
        self, worker: NumbaWorker | TorchWorker, lane: int, replicates: range
    ) -> None:
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
    if bad:
        raise NumericalError(
            f"{accumulator.estimator.label} returned NaN or infinity in {bad} "
            "samples; use more time steps, float64, or a theta closer to the optimum"
        )


def count_evaluations(
    tables: Tables, estimator: Estimator, settings: Settings
) -> dict[str, float]:
    """Return the evaluations per path, counted by a view on the torch function."""
    import torch

    from sdebench.view import View

    paths = 2
    view = View(
        tables,
        settings.times,
        settings.theta,
        key=split_seed(settings.seed),
        replicate=0,
        first_path=0,
        n_paths=paths,
        dtype=settings.dtype,
    )
    with torch.no_grad():
        estimator.statistics(view)
    return {name: value / paths for name, value in view.counts.items()}
