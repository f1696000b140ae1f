"""The processes that are timed, and one way to run either backend on them.

Two problems exist only here, because the published ratios were taken on processes like
them: a linear one with dense drift and dense feedback but scalar noise, and a mixture
of nine components in two dimensions with one softmax per step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

import sdebench
from sdebench import linear_problem, tilting_problem
from sdebench.closed_form import base_process, linear_quadratic, log_quadratics, tilting

N_STEPS = 200
POINT = "halfway"


# The classes are private: asv would take the method ``time_grid`` for a benchmark.
@dataclass(frozen=True, kw_only=True)
class _DenseLinear(linear_problem.LinearProblem):
    """Dense drift matrix, dense feedback, scalar noise, quadratic reward."""

    dim: int = 2
    noise_level: float = 0.7

    def build(self) -> linear_quadratic.LinearQuadratic:
        generator = np.random.default_rng(20)
        dim, eye = self.dim, np.eye(self.dim)
        first, second = generator.standard_normal((2, dim, dim)) / np.sqrt(dim)
        return linear_quadratic.LinearQuadratic(
            drift_matrix=0.3 * first - eye,
            drift_offset=np.full(dim, 0.1),
            diffusion=self.noise_level * eye,
            running=0.0 * eye,
            reward_quadratic=eye + 0.3 * second @ second.T,
            reward_linear=np.full(dim, 0.5),
            reward_constant=0.0,
            horizon=1.0,
            start_mean=np.ones(dim),
            start_covariance=0.0 * eye,
        )


@dataclass(frozen=True, kw_only=True)
class _NineModeBridge(tilting_problem.TiltingProblem):
    """Brownian motion from a point to a mixture of nine modes in the plane."""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "linear", "quadratic"

    def build(self) -> tilting.TiltingFamily:
        dim = 2
        base = base_process.PinnedBase(np.zeros(dim), 1.0, 1.0)
        axis = np.array([-1.5, 0.0, 1.5])
        modes = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, dim)
        features = np.zeros((2, 2 * dim + 1))
        features[0, :dim] = 1.0 / np.sqrt(dim)
        features[1, dim:-1] = -0.5
        theta_star = np.array([0.5, 0.5])
        target = log_quadratics.gaussian_rows(
            np.log(np.arange(1.0, 10.0) / 45.0), modes, np.full((9, dim), 0.3)
        )
        return tilting.TiltingFamily(
            base=base,
            features=features,
            reference=target - base.terminal - theta_star @ features,
            constant=0.0,
            theta_star=theta_star,
            start=tilting.StartLaw(np.ones(1), np.zeros((1, dim)), np.zeros((1, dim))),
        )


def dense_linear(dim: int) -> Any:
    """Return the linear problem whose peers are timed."""
    return _DenseLinear(dim=dim)


def nine_mode_bridge() -> Any:
    """Return the mixture problem with one softmax of nine components per step."""
    return _NineModeBridge()


PROCESSES = ("linear_1", "linear_2", "linear_10", "linear_20", "mixture_9")


@cache
def process(name: str) -> Any:
    """Return the problem of a process name such as "linear_10"."""
    kind, _, size = name.partition("_")
    return dense_linear(int(size)) if kind == "linear" else nine_mode_bridge()


def runner(
    problem: Any,
    estimators: tuple[str, ...] = (),
    *,
    n_paths: int,
    n_steps: int = N_STEPS,
    backend: str = "numba",
    dtype: str = "float64",
) -> Callable[[], np.ndarray]:
    """Return a function that simulates paths block by block and runs the estimators.

    It returns the last estimator's statistics of the last block, (C, >= n).  The paths
    of a block are stored, as estimators need.  torch gets one thread, like the kernels.
    """
    from sdebench.measure.engine import NumbaWorker, Settings, TorchWorker

    if backend == "torch":
        import torch

        torch.set_num_threads(1)

    theta, times = problem.theta(POINT), problem.time_grid(n_steps)
    settings = Settings(
        times=times,
        theta=theta,
        n_paths=n_paths,
        backend=backend,
        dtype=dtype,
        device="cpu",
        seed=7,
    )
    kind = NumbaWorker if backend == "numba" else TorchWorker
    chosen = [sdebench.estimator(name) for name in estimators]
    worker = kind(problem.tables(theta, times), chosen, settings)

    def run() -> np.ndarray:
        rows: list[np.ndarray] = []
        for first in range(0, n_paths, worker.size):
            rows, _, _ = worker.block(0, first, min(worker.size, n_paths - first))
        return rows[-1] if rows else np.empty((0, 0))

    return run


def forward_only(
    problem: Any, n_paths: int, dtype: str = "float64", n_steps: int = N_STEPS
) -> Callable[[], None]:
    """Return a function that runs the forward kernel alone, on tables made before."""
    from sdebench.simulate.forward import forward, path_buffers
    from sdebench.simulate.paths import BLOCK
    from sdebench.simulate.primitives import prepare, workspace

    tables = problem.tables(problem.theta(POINT), problem.time_grid(n_steps))
    prepared = prepare(tables, dtype)
    scratch = workspace(prepared, BLOCK)
    buffers = path_buffers(prepared, BLOCK, store=False)

    def run() -> None:
        for first in range(0, n_paths, BLOCK):
            forward(prepared, scratch, buffers, BLOCK, first, 7, 0, 0)

    return run
