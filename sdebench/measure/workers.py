"""Workers: one block of paths, simulated once, and every estimator's statistics.

A worker turns the address of a block (replicate, first path, number of paths) into rows
of statistics.  `NumbaWorker` and `TorchWorker` simulate one process under one control;
`CompositeWorker` lets a `CompositeEstimator` run several of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdebench.composite import CompositeEstimator, Runner, some_paths
from sdebench.estimator import Control, Estimator
from sdebench.problem import Problem
from sdebench.simulate.noise import Noise, block_noise, normals, split_seed
from sdebench.simulate.tables import Tables, start_states

Array = NDArray[np.float64]

BLOCK = 256
"""Paths per block: long enough to hide the loops' overhead, short enough for caches."""
WIDE_BLOCK, WIDE_DIM = 128, 8
"""From this dimension on stored paths of 256 columns leave the level-2 cache."""
TORCH_ELEMENTS = 1 << 19
"""States (paths x dim) that torch handles at a time."""
KEPT_TABLES = 16
"""Tables take milliseconds to make; perturbations of theta by signs are this few."""
GRID_SHIFT = 40
"""Grids of N steps use the path numbers from N 2^40 on, so that their noise differs."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a simulation needs besides the problem.

    theta : (P,) the evaluation point, whatever control is simulated.
    """

    times: Array
    theta: Array | None
    n_paths: int
    backend: str
    dtype: str
    device: str
    seed: int
    scheme: str = "euler_maruyama"


# One block of paths: statistics (C, >= count) of each estimator, and the seconds that
# the shared forward pass and each estimator took.
Block = tuple[list[NDArray[Any]], float, list[float]]


class Worker(Protocol):
    """Simulates blocks of at most ``size`` paths."""

    size: int
    counts: dict[str, int]

    def block(self, replicate: int, first_path: int, count: int) -> Block:
        """Return the statistics of a block."""


CONTROLS = ("theta", "none", "optimal")
"""What an `Estimator.control` may be, besides a factor of theta and parameters."""


def control_theta(
    control: Control, theta: Array | None, theta_star: Array
) -> Array | None:
    """Return the parameters of an `Estimator.control`; None is no control."""
    if isinstance(control, str):
        return {"theta": theta, "none": None, "optimal": theta_star}[control]
    if isinstance(control, tuple):
        return np.array(control)
    return None if theta is None else control * theta


def shared_paths(
    estimator: Estimator, n_steps: int, n_paths: int
) -> tuple[Hashable, ...]:
    """Return what estimators must have in common to be measured on the same paths."""
    noisy = estimator.noisy_steps(n_steps)
    return (
        isinstance(estimator, CompositeEstimator),
        estimator.control,
        estimator.other_control,
        None if noisy is None else tuple(noisy),
        estimator.group_size(n_paths),
    )


def make_tables(
    problem: Problem, estimator: Estimator, settings: Settings
) -> tuple[Tables, Tables | None, Array | None]:
    """Return an estimator's tables, those of its other control, and its theta."""
    noisy = estimator.noisy_steps(len(settings.times) - 1)

    def tables(control: Control) -> Tables:
        theta = control_theta(control, settings.theta, problem.theta_star)
        arguments = (theta, settings.times, settings.scheme)
        if noisy is None:
            return problem.tables(*arguments)
        return problem.tables(*arguments, noisy)

    other = estimator.other_control
    return (
        tables(estimator.control),
        None if other is None else tables(other),
        control_theta(estimator.control, settings.theta, problem.theta_star),
    )


def make_worker(
    problem: Problem, estimators: Sequence[Estimator], settings: Settings
) -> Worker:
    """Return a worker for estimators with the same `shared_paths`."""
    if isinstance(estimators[0], CompositeEstimator):
        return CompositeWorker(problem, estimators, settings)
    tables, other, theta = make_tables(problem, estimators[0], settings)
    kind = NumbaWorker if settings.backend == "numba" else TorchWorker
    return kind(tables, estimators, replace(settings, theta=theta), other)


def block_size(wanted: int, estimators: Sequence[Estimator], settings: Settings) -> int:
    """Return the paths per block: about ``wanted``, in whole groups, not too many."""
    from sdebench.simulate.tile import LANES

    groups = {estimator.group_size(settings.n_paths) for estimator in estimators}
    unit = math.lcm(*groups, LANES)
    least = -(-settings.n_paths // LANES) * LANES
    return min(max(wanted // unit, 1) * unit, least)


class NumbaWorker:
    """Buffers and scratch of one thread."""

    def __init__(
        self,
        tables: Tables,
        estimators: Sequence[Estimator],
        settings: Settings,
        other_tables: Tables | None = None,
    ) -> None:
        from sdebench.simulate.forward import path_buffers
        from sdebench.simulate.primitives import workspace
        from sdebench.simulate.tile import LANES

        wanted = BLOCK if tables.offset.shape[1] < WIDE_DIM else WIDE_BLOCK
        self.size = block_size(wanted, estimators, settings)
        self.counts: dict[str, int] = {}  # the view counts: `TorchWorker`
        self._columns = LANES
        self._settings = settings
        self.use(tables, other_tables, settings.theta)
        self._work = workspace(self._prepared, self.size)
        self._other_work = (
            None if self._other is None else workspace(self._other, self.size)
        )
        self._buffers = path_buffers(self._prepared, self.size)
        self._key = split_seed(settings.seed)
        self.serve(estimators)

    def serve(self, estimators: Sequence[Estimator]) -> None:
        """Go on with other estimators, of the same `shared_paths`."""
        width = self._buffers.totals.shape[1]
        n_params, dtype = self._prepared.n_parameters, self._settings.dtype
        self._estimators = estimators
        self._out = [
            np.zeros((e.n_statistics(n_params), width), dtype) for e in estimators
        ]

    def use(
        self, tables: Tables, other_tables: Tables | None, theta: Array | None
    ) -> None:
        """Go on with other parameters; the shapes must be the same."""
        from sdebench.simulate.primitives import prepare

        dtype = self._settings.dtype
        self._tables = tables
        self._prepared = prepare(tables, dtype)
        self._other = None if other_tables is None else prepare(other_tables, dtype)

    def block(
        self, replicate: int, first_path: int, count: int, noise: Noise | None = None
    ) -> Block:
        """Simulate ``count`` paths and return every estimator's statistics.

        ``noise`` : of the paths, instead of that at their address.
        """
        if not 0 < count <= self.size:
            raise ValueError(f"a block holds 1 to {self.size} paths, not {count}")
        buffers = self._buffers
        size = -(-count // self._columns) * self._columns
        clock = time.perf_counter()
        self._simulate(replicate, first_path, count, size, noise)
        shared = time.perf_counter() - clock
        own = []
        for estimator, out in zip(self._estimators, self._out, strict=True):
            kernel = estimator.block_kernel
            assert kernel is not None
            arguments: list[Any] = []
            if self._other is not None:
                arguments += [self._other, self._other_work]
            if estimator.group_size(self._settings.n_paths) > 1:
                arguments.append(count)
            if own_normals := estimator.own_normals(len(buffers.states) - 1):
                address = replicate, first_path, size
                arguments.append(self._own_normals(own_normals, *address))
            clock = time.perf_counter()
            kernel(
                self._prepared,
                self._work,
                buffers.states,
                buffers.normals,
                buffers.controls,
                buffers.totals,
                size,
                *arguments,
                *estimator.kernel_options,
                out,
            )
            own.append(time.perf_counter() - clock)
        return self._out, shared, own

    def _own_normals(
        self, count: int, replicate: int, first_path: int, size: int
    ) -> NDArray[Any]:
        """Return the normals of ``count`` steps after the last, (count, d, width)."""
        n_steps, dim, width = self._buffers.states.shape
        address = self._settings.seed, replicate, first_path, size
        drawn = normals(
            *address, n_steps - 1, count, dim, dtype=self._settings.dtype
        ).swapaxes(1, 2)
        out = np.zeros((count, dim, width), self._settings.dtype)
        out[:, :, :size] = drawn
        return out

    def _simulate(
        self,
        replicate: int,
        first_path: int,
        count: int,
        size: int,
        noise: Noise | None,
    ) -> None:
        from sdebench.simulate.forward import forward, replay

        buffers = self._buffers
        if noise is None:
            address = (first_path, *self._key, replicate)
            forward(self._prepared, self._work, buffers, size, *address)
            return
        n_steps = len(noise.steps)
        buffers.normals[:n_steps, :, :count] = noise.steps
        buffers.normals[:n_steps, :, count:size] = 0.0
        start = start_states(self._tables, noise.start, noise.uniforms)
        buffers.states[0, :, :count] = start
        buffers.states[0, :, count:size] = start[:, :1]
        replay(self._prepared, self._work, buffers, size)


class TorchWorker:
    """The torch implementation of the same block."""

    def __init__(
        self,
        tables: Tables,
        estimators: Sequence[Estimator],
        settings: Settings,
        other_tables: Tables | None = None,
    ) -> None:
        self._settings, self._estimators = settings, estimators
        self.use(tables, other_tables, settings.theta)
        wanted = max(BLOCK, TORCH_ELEMENTS // self._family.dim // BLOCK * BLOCK)
        size = block_size(wanted, estimators, settings)
        self.size = min(size, settings.n_paths)
        self.counts: dict[str, int] = {}
        self._key = split_seed(settings.seed)

    def serve(self, estimators: Sequence[Estimator]) -> None:
        """Go on with other estimators, of the same `shared_paths`."""
        self._estimators = estimators

    def use(
        self, tables: Tables, other_tables: Tables | None, theta: Array | None
    ) -> None:
        """Go on with other parameters."""
        from sdebench.simulate.torch_family import torch_family

        where = (self._settings.dtype, self._settings.device)
        self._tables, self._other_tables, self._theta = tables, other_tables, theta
        self._family = torch_family(tables, *where)
        if self._other_tables is not None:
            self._other_family = torch_family(self._other_tables, *where)

    def block(
        self, replicate: int, first_path: int, count: int, noise: Noise | None = None
    ) -> Block:
        """Simulate ``count`` paths and return every estimator's statistics.

        ``noise`` : of the paths, instead of that at their address.
        """
        import torch

        from sdebench.view import View

        settings = self._settings
        options: dict[str, Any] = {
            "key": self._key,
            "replicate": replicate,
            "first_path": first_path,
            "n_paths": count,
            "dtype": settings.dtype,
            "device": settings.device,
            "given": noise,
        }
        clock = time.perf_counter()
        with torch.no_grad():
            other = None
            if self._other_tables is not None:
                tables, family = self._other_tables, self._other_family
                other = View(tables, settings.times, None, family=family, **options)
            view = View(
                self._tables,
                settings.times,
                self._theta,
                family=self._family,
                other=other,
                **options,
            )
            view.rollout()
            self._wait()
            shared = time.perf_counter() - clock
            rows, own = [], []
            for estimator in self._estimators:
                clock = time.perf_counter()
                mine = view.share()
                statistics = estimator.statistics(mine)
                self._wait()
                own.append(time.perf_counter() - clock)
                rows.append(np.ascontiguousarray(statistics.cpu().numpy().T))
                add_counts(self.counts, mine.counts)
        return rows, shared, own

    def _wait(self) -> None:
        if self._settings.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()


def add_counts(total: dict[str, int], counts: dict[str, int]) -> None:
    """Add evaluations to a running total."""
    for name, value in counts.items():
        total[name] = total.get(name, 0) + value


class CompositeWorker:
    """Gives composite estimators a `Runner` for every block."""

    def __init__(
        self, problem: Problem, estimators: Sequence[Estimator], settings: Settings
    ) -> None:
        self._estimators, self._settings = estimators, settings
        self.size = min(block_size(BLOCK, estimators, settings), settings.n_paths)
        self.counts: dict[str, int] = {}
        self._simulations = Simulations(problem, settings, self.counts)

    def __del__(self) -> None:
        _LENT.pop(id(self), None)

    def serve(self, estimators: Sequence[Estimator]) -> None:
        """Go on with other estimators, of the same `shared_paths`."""
        self._estimators = estimators

    def block(self, replicate: int, first_path: int, count: int) -> Block:
        """Return every estimator's statistics of ``count`` paths."""
        rows, own = [], []
        _LENT[id(self)] = self._simulations
        for estimator in self._estimators:
            assert isinstance(estimator, CompositeEstimator)
            clock = time.perf_counter()
            runner = BlockRunner(id(self), replicate, first_path, count)
            rows.append(np.ascontiguousarray(estimator.run(runner)))
            own.append(time.perf_counter() - clock)
        return rows, 0.0, own


class Simulations:
    """The workers that composite estimators use, made once and kept."""

    def __init__(
        self, problem: Problem, settings: Settings, counts: dict[str, int]
    ) -> None:
        self.problem, self.settings, self.counts = problem, settings, counts
        self._workers: dict[Hashable, tuple[Any, Hashable]] = {}
        self._kept: dict[Hashable, tuple[Tables, Tables | None, Array | None]] = {}

    def rows(
        self,
        estimators: Sequence[Estimator],
        theta: Array,
        times: Array,
        address: tuple[int, int, int],
        noise: Noise,
    ) -> list[Array]:
        """Return the statistics (C, count) of the block at ``address``."""
        replicate, first_path, count = address
        shared = {shared_paths(e, len(times) - 1, count) for e in estimators}
        if len(shared) != 1:
            raise ValueError("run() needs estimators that share their paths")
        composite, control, *rest = shared.pop()
        # one worker for all parameters that estimators choose for themselves
        kind = "given" if isinstance(control, tuple) else control
        key = (composite, kind, *rest, times.tobytes(), count)
        mark = theta.tobytes(), control
        settings = replace(self.settings, theta=theta, times=times, n_paths=count)
        if key not in self._workers:
            worker: Any = make_worker(self.problem, estimators, settings)
        else:
            worker, old = self._workers[key]
            worker.serve(estimators)
            if old != mark:
                worker.use(*self._tables(estimators[0], settings))
        self._workers[key] = worker, mark
        found: list[list[Array]] = [[] for _ in estimators]
        for first in range(0, count, worker.size):
            size = min(worker.size, count - first)
            own = some_paths(noise, first, size)
            rows, _, _ = worker.block(replicate, first_path + first, size, own)
            for kept, row in zip(found, rows, strict=True):
                kept.append(np.array(row[:, :size], dtype=np.float64))
        add_counts(self.counts, worker.counts)
        worker.counts.clear()
        return [np.concatenate(kept, axis=1) for kept in found]

    def _tables(
        self, estimator: Estimator, settings: Settings
    ) -> tuple[Tables, Tables | None, Array | None]:
        """Return what `make_tables` does; the last `KEPT_TABLES` are kept."""
        assert settings.theta is not None
        key = (estimator, settings.theta.tobytes(), settings.times.tobytes())
        if key not in self._kept:
            if len(self._kept) == KEPT_TABLES:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = make_tables(self.problem, estimator, settings)
        return self._kept[key]


_LENT: dict[int, Simulations] = {}
"""Simulations by number: a runner holds the number, so that it leads to no truth."""


class BlockRunner(Runner):
    """The `Runner` of one block; ``lender`` is the key of its simulations."""

    def __init__(
        self, lender: int, replicate: int, first_path: int, count: int
    ) -> None:
        simulations = _LENT[lender]
        problem, settings = simulations.problem, simulations.settings
        assert settings.theta is not None
        self.theta = np.array(settings.theta)
        self.times = np.array(settings.times)
        self.n_steps, self.n_params = len(self.times) - 1, problem.n_params
        self.dim, self.n_paths = problem.dim, count
        self._lender, self._seed = lender, settings.seed
        self._replicate = replicate
        self._first = first_path

    def rng(self) -> np.random.Generator:
        entropy = (self._seed, self._replicate, self._first)
        return np.random.default_rng(entropy)

    def noise(self, n_steps: int | None = None) -> Noise:
        steps = self.n_steps if n_steps is None else n_steps
        address = self._address(steps)
        return block_noise(self._seed, *address, steps, self.dim)

    def normals(self, count: int) -> Array:
        # numbers that no step of these paths uses
        first = (self.n_steps * self.dim + 3) // 4 * 4
        address = self._address(self.n_steps)
        return np.asarray(normals(self._seed, *address, first, count, 1)[:, :, 0])

    def _address(self, n_steps: int) -> tuple[int, int, int]:
        first = self._first
        if n_steps != self.n_steps:  # another grid: see `GRID_SHIFT`
            first = (n_steps << GRID_SHIFT) + first % (1 << GRID_SHIFT)
        return self._replicate, first, self.n_paths

    def run(
        self,
        *estimators: Estimator,
        noise: Noise | None = None,
        theta: Array | None = None,
        times: Array | None = None,
        first: int = 0,
    ) -> list[Array]:
        times = self.times if times is None else times
        n_steps = len(times) - 1
        noise = self.noise(n_steps) if noise is None else noise
        replicate, origin, _ = self._address(n_steps)
        return _LENT[self._lender].rows(
            estimators,
            self.theta if theta is None else theta,
            times,
            (replicate, origin + first, len(noise.uniforms)),
            noise,
        )


def count_evaluations(
    problem: Problem, estimator: Estimator, settings: Settings
) -> dict[str, float]:
    """Return the evaluations per path, counted by a view on the torch functions."""
    from sdebench.view import COUNTERS

    group = estimator.group_size(settings.n_paths)
    paths = group if group > 1 else 2
    changed = replace(settings, backend="torch", device="cpu", n_paths=paths)
    worker = make_worker(problem, [estimator], changed)
    first = (len(settings.times) - 1) << GRID_SHIFT
    worker.block(0, first, paths)
    return {name: worker.counts.get(name, 0) / paths for name in COUNTERS}
