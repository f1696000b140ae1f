"""What one core can do at best, measured beside the kernels in the same run.

The limits of the kernels follow from the work of one step of one path:

    K1 (linear, dense)        d t_normal + 4 d^2 / F
    K2 (mixture, K modes)     adds K t_exp + 4 K (d + 2) / F
    K3 (gradient)             adds 2 d^2 / F and 16 d bytes of memory traffic

with t_normal and t_exp the measured times per value and F the measured rate of fused
multiply-adds, so that every kernel is judged by the machine it runs on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from bench.timing import Timing, interleave
from sdebench.simulate.noise import fill_normals
from sdebench.simulate.tile import exp, lanes, load, store

BLOCK = 256
ROUNDS = 64
ROWS = 32
CHAINS = 12
LARGE = 1 << 24  # float64 numbers: 128 MiB, beyond the caches


@dataclass(frozen=True)
class Ceilings:
    """Rates of one core: nanoseconds per value, Gflop/s and GB/s."""

    normal_ns: float
    normal32_ns: float
    exp_ns: float
    fma_gflops: float
    copy_gbs: float
    read_gbs: float

    def simulate_ns(self, dim: int) -> float:
        """Limit of the linear family per path-step, ns: dense drift and feedback."""
        return dim * self.normal_ns + 4 * dim**2 / self.fma_gflops

    def mixture_ns(self, dim: int, modes: int) -> float:
        """Limit of a mixture of isotropic modes per path-step, ns."""
        products = 4 * modes * (dim + 2) / self.fma_gflops
        return dim * self.normal_ns + modes * self.exp_ns + products

    def gradient_ns(self, dim: int) -> float:
        """What a per-path gradient adds per path-step, ns."""
        return 2 * dim**2 / self.fma_gflops + 16 * dim / self.copy_gbs


@numba.njit(error_model="numpy")
def _noise(Z: Any, words: Any) -> None:
    for block in range(ROUNDS):
        fill_normals(Z, words, ROWS, BLOCK, 0, ROWS * block, 1, 2, 3)


@numba.njit(error_model="numpy")
def _exponentials(X: Any, Y: Any) -> None:
    for _ in range(ROUNDS):
        for i in range(X.shape[0]):
            for p in range(0, BLOCK, lanes(X)):
                store(Y, i, p, exp(load(X, i, p)))


@numba.njit(error_model="numpy")
def _fused(X: Any, n: int) -> None:
    a, b = load(X, 0, 0), load(X, 1, 0)
    y0 = y1 = y2 = y3 = y4 = y5 = y6 = y7 = y8 = y9 = y10 = y11 = b
    for _ in range(n):
        y0 = y0 * a + b
        y1 = y1 * a + b
        y2 = y2 * a + b
        y3 = y3 * a + b
        y4 = y4 * a + b
        y5 = y5 * a + b
        y6 = y6 * a + b
        y7 = y7 * a + b
        y8 = y8 * a + b
        y9 = y9 * a + b
        y10 = y10 * a + b
        y11 = y11 * a + b
    total = y0 + y1 + y2 + y3 + y4 + y5
    store(X, 2, 0, total + y6 + y7 + y8 + y9 + y10 + y11)


@numba.njit(error_model="numpy")
def _read(X: Any) -> None:
    total = load(X, 0, 0)
    other = total
    for p in range(0, X.shape[1], 2 * lanes(X)):
        total = total + load(X, 0, p)
        other = other + load(X, 0, p + lanes(X))
    store(X, 0, 0, total + other)


def ceiling_cases() -> dict[str, Callable[[], None]]:
    """Return the functions to time."""
    width = BLOCK + 16
    words = np.zeros((4, width), np.uint32)
    double, single = np.zeros((ROWS, width)), np.zeros((ROWS, width), np.float32)
    x, y = np.full((4, width), -0.7), np.zeros((4, width))
    chains = np.full((3, 16), 0.5)
    source, target = np.ones((1, LARGE)), np.ones((1, LARGE))
    return {
        "normal": lambda: _noise(double, words),
        "normal32": lambda: _noise(single, words),
        "exp": lambda: _exponentials(x, y),
        "fma": lambda: _fused(chains, 100_000),
        "copy": lambda: np.copyto(target, source),
        "read": lambda: _read(source),
    }


def ceilings(timings: dict[str, Timing]) -> Ceilings:
    """Turn the timings of `ceiling_cases` into rates (from the best of the repeats)."""
    best = {name: timing.best for name, timing in timings.items()}
    values = ROUNDS * ROWS * BLOCK
    return Ceilings(
        normal_ns=1e9 * best["normal"] / values,
        normal32_ns=1e9 * best["normal32"] / values,
        exp_ns=1e9 * best["exp"] / (ROUNDS * 4 * BLOCK),
        fma_gflops=1e-9 * 100_000 * CHAINS * 8 * 2 / best["fma"],
        copy_gbs=1e-9 * 16 * LARGE / best["copy"],
        read_gbs=1e-9 * 8 * LARGE / best["read"],
    )


def measure_ceilings(repeats: int) -> Ceilings:
    """Measure the ceilings alone."""
    return ceilings(interleave(ceiling_cases(), repeats))
