"""Multilevel Monte Carlo over time steps: many coarse paths, few fine ones.

The expectation on the finest grid telescopes over grids of about half as many steps,

    E g_0 = E g_L + sum_{l < L} E[g_l - g_{l+1}],

and each difference is estimated on paths of its own, simulated on both grids with the
same Brownian path: two steps of widths h, h' with normals z, z' become one step with

    (sqrt(h) z + sqrt(h') z') / sqrt(h + h'),

the last step of an odd number stays alone, and the start is the same.  The answer is
that of the finest grid, without bias, whatever the number of levels.

A difference has a variance of order h^2 for pathwise derivatives (Euler-Maruyama has
strong order one, where the noise does not depend on the state) and of order h in
general and for likelihood ratios, whose stochastic integrals converge like sqrt(h).
The least cost for a variance V_l and a cost of 1/h_l per path has n_l proportional to
sqrt(V_l h_l), h^{3/2} or h.  Numbers of paths that are estimated on the same paths
would bias the answer: they are fixed, n_l proportional to 2^{-exponent} from each grid
to the next finer one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sdebench.composite import Runner, some_paths
from sdebench.errors import ParameterError
from sdebench.estimator import Array, Sizes
from sdebench.estimators._wrapper import Wrapper
from sdebench.simulate.noise import Noise


def coarser(times: Array) -> Array:
    """Return every second time (and the last) of a grid."""
    return np.append(times[:-1:2], times[-1])


def coarser_noise(noise: Noise, times: Array) -> Noise:
    """Return the noise of the same Brownian paths on the grid `coarser`."""
    roots = np.sqrt(np.diff(times))[:, None, None]
    scaled = roots * noise.steps
    first = np.arange(0, len(scaled), 2)
    steps = np.add.reduceat(scaled, first) / np.sqrt(np.add.reduceat(roots**2, first))
    return noise._replace(steps=steps)


def allocation(n_paths: int, levels: int, exponent: float) -> list[int]:
    """Return the numbers of paths, finest grid first; they add up to ``n_paths``."""
    shares = 2.0 ** (exponent * np.arange(levels))
    counts = [int(share) for share in n_paths * shares[:-1] / shares.sum()]
    return [*counts, n_paths - sum(counts)]


@dataclass(frozen=True, kw_only=True)
class Multilevel(Wrapper):
    """Telescoping sum of an estimator over grids, with coupled paths.

    Parameters
    ----------
    estimator : the wrapped estimator, a specification.
    levels : number of grids, each with half as many steps as the one before.
    exponent : paths per grid grow as 2^exponent per halving of the steps.
    """

    source: ClassVar[str] = "Giles 2008, Operations Research 56, eqs. (10) to (12)"
    formula: ClassVar[str] = r"""\bar g = \frac{1}{n_L} \sum_{i} g_L^{(i)}
  + \sum_{l < L} \frac{1}{n_l} \sum_{i}
  \left( g_l^{(i, l)} - g_{l+1}^{(i, l)} \right)"""
    unbiased: ClassVar[str] = (
        "what the wrapped estimator is unbiased for, on the finest grid"
    )

    levels: int = 3
    exponent: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels < 2:
            raise ParameterError(f"levels = {self.levels} must be at least 2")
        if not 0.0 <= self.exponent < math.inf:
            raise ParameterError(f"exponent = {self.exponent} must be at least 0")

    def group_size(self, n_paths: int) -> int:
        return n_paths

    def not_applicable(self, n_paths: int) -> str | None:
        if allocation(n_paths, self.levels, self.exponent)[0] < 1:
            shares = 2.0 ** (self.exponent * np.arange(self.levels))
            return (
                f"{n_paths} paths leave none for the finest of {self.levels} grids; "
                f"use at least {math.ceil(shares.sum())}"
            )
        return super().not_applicable(n_paths)

    def not_applicable_to(self, sizes: Sizes) -> str | None:
        least = 2 ** (self.levels - 2) + 1
        if sizes.n_steps < least:
            return (
                f"{sizes.n_steps} steps cannot be halved {self.levels - 1} times; use "
                f"at least {least}"
            )
        return super().not_applicable_to(sizes)

    def run(self, runner: Runner) -> Array:
        counts = allocation(runner.n_paths, self.levels, self.exponent)
        estimate = np.zeros(self.n_statistics(runner.n_params))
        first, times = 0, runner.times
        for level, count in enumerate(counts):
            noise = some_paths(runner.noise(len(times) - 1), first, count)
            (rows,) = runner.run(self.inner, noise=noise, times=times, first=first)
            if level < self.levels - 1:
                noise, times = coarser_noise(noise, times), coarser(times)
                (coarse,) = runner.run(
                    self.inner, noise=noise, times=times, first=first
                )
                rows = rows - coarse
            estimate += rows.mean(axis=1)
            first += count
        return np.repeat(estimate[:, None], runner.n_paths, axis=1)
