"""Simulate a problem's paths: the public face of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdebench import registry
from sdebench.errors import ParameterError
from sdebench.problem import Problem
from sdebench.simulate.noise import split_seed
from sdebench.simulate.tables import Tables, has_start_parameters, start_log_ratio

BLOCK = 256
TORCH_BLOCK = 1 << 14


@dataclass(frozen=True)
class Paths:
    """Simulated paths; the path index is the last axis of every array.

    Attributes
    ----------
    times : (n_steps + 1,) the grid.
    terminal : (dim, n_paths) X_N.
    control_cost : (n_paths,) sum of 1/2 |w_n|^2, the discretized 1/2 int |u|^2 dt.
    running_cost : (n_paths,) discretized int f dt.
    martingale : (n_paths,) sum of w_n . z_n, the discretized int u . dW.
    reward : (n_paths,) r(X_N).
    start_log_ratio : (n_paths,) log of the density of X_0 over that of the base
        process; zero where theta does not move the law of X_0.
    states : (n_steps + 1, dim, n_paths), or None unless kept.
    """

    times: NDArray[np.float64]
    terminal: NDArray[Any]
    control_cost: NDArray[Any]
    running_cost: NDArray[Any]
    martingale: NDArray[Any]
    reward: NDArray[Any]
    start_log_ratio: NDArray[Any]
    states: NDArray[Any] | None = None

    @property
    def cost(self) -> NDArray[Any]:
        """Cost of each path, (n_paths,); its mean is the discretized objective J_N."""
        cost = self.control_cost + self.running_cost - self.reward
        return cost + self.start_log_ratio

    @property
    def log_weight(self) -> NDArray[Any]:
        """Log of exp(r - sum f) dP_base/dP_u of each path, (n_paths,)."""
        given_start = self.reward - self.running_cost - self.martingale
        return given_start - self.control_cost - self.start_log_ratio


def simulate(
    problem: Problem | str,
    *,
    point: str | Sequence[float] | None = "optimum",
    n_steps: int | Sequence[float] | None = None,
    n_paths: int = 4096,
    dtype: str = "float64",
    scheme: str = "euler_maruyama",
    seed: int = 0,
    replicate: int = 0,
    threads: int = 1,
    keep_states: bool = False,
) -> Paths:
    """Simulate paths of a problem under the control at an evaluation point.

    Parameters
    ----------
    problem : object or specification such as ``"two_modes:beta=1"``.
    point : evaluation point or theta; None simulates the base process.
    n_steps : uniform steps, or the time grid; default: published.
    dtype : "float64" or "float32".
    scheme : "euler_maruyama" or "exponential".
    seed, replicate : address of the noise, with the path and step index.
    keep_states : return whole paths, n_steps + 1 times the memory.

    Returns
    -------
    Paths, the same bits for any ``threads``.
    """
    from sdebench.simulate.forward import forward, path_buffers
    from sdebench.simulate.primitives import prepare, workspace
    from sdebench.simulate.tile import LANES

    if isinstance(problem, str):
        problem = registry.problem(problem)
    if n_paths < 1 or threads < 1:
        raise ParameterError(
            f"n_paths {n_paths} and threads {threads} must be at least 1"
        )
    theta = None if point is None else problem.theta(point)
    times = problem.time_grid(n_steps)
    tables = problem.tables(theta, times, scheme)
    if "numba" not in problem.backends:
        return _simulate_torch(
            tables, times, n_paths, dtype, seed, replicate, keep_states
        )
    prepared = prepare(tables, dtype)
    keep_start = has_start_parameters(tables)
    key = split_seed(seed)
    size = min(BLOCK, -(-n_paths // LANES) * LANES)
    starts = range(0, n_paths, size)
    dim, steps = problem.dim, len(times) - 1
    totals = np.empty((4, n_paths), dtype)
    kept = steps + 1 if keep_states else 1
    states = np.empty((kept, dim, n_paths), dtype)
    log_ratio = np.zeros(n_paths, dtype)

    def work(first: int) -> None:
        scratch = workspace(prepared, size)
        buffers = path_buffers(prepared, size, store=keep_states or keep_start)
        for p0 in starts[first::threads]:
            count = min(size, n_paths - p0)
            forward(prepared, scratch, buffers, size, p0, *key, replicate)
            totals[:, p0 : p0 + count] = buffers.totals[:, :count]
            if keep_start:
                first_states = buffers.states[0, :, :count]
                log_ratio[p0 : p0 + count] = start_log_ratio(tables, first_states)
            if keep_states:
                states[:, :, p0 : p0 + count] = buffers.states[:, :, :count]
            else:
                last = buffers.states[steps % len(buffers.states)]
                states[0, :, p0 : p0 + count] = last[:, :count]

    if threads == 1:
        work(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    return Paths(
        times=times,
        terminal=states[-1],
        control_cost=totals[0],
        running_cost=totals[1],
        martingale=totals[2],
        reward=totals[3],
        start_log_ratio=log_ratio,
        states=states if keep_states else None,
    )


def _simulate_torch(
    tables: Tables,
    times: NDArray[np.float64],
    n_paths: int,
    dtype: str,
    seed: int,
    replicate: int,
    keep_states: bool,
) -> Paths:
    """Simulate a problem of torch functions."""
    from sdebench.view import View

    parts = []
    for first in range(0, n_paths, TORCH_BLOCK):
        view = View(
            tables,
            times,
            None,
            key=split_seed(seed),
            replicate=replicate,
            first_path=first,
            n_paths=min(TORCH_BLOCK, n_paths - first),
            dtype=dtype,
        )
        paths = view.rollout()
        costs = paths.control_cost, paths.running_cost, paths.martingale, paths.reward
        states = paths.states if keep_states else paths.states[-1:]
        parts.append(
            (np.array([x.numpy().T for x in states]), *(c.numpy() for c in costs))
        )
    kept, control, running, martingale, reward = (
        np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)
    )
    return Paths(
        times=times,
        terminal=kept[-1],
        control_cost=control,
        running_cost=running,
        martingale=martingale,
        reward=reward,
        start_log_ratio=np.zeros_like(reward),
        states=kept if keep_states else None,
    )
