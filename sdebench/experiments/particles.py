"""Particles that follow a path of products of powers, weighted and resampled.

The densities, the steps and the weights are those of
`sdebench.closed_form.density_powers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

from sdebench.closed_form.density_powers import WEIGHTS, Array, DensityPath
from sdebench.errors import unknown
from sdebench.estimators.feynman_kac_corrector import check_resampling


class Particles(NamedTuple):
    """States (n, d) and log-weights (n,) at the end, and how often was resampled.

    The mean of the weights estimates int rho_1, resampling included.
    """

    states: Array
    log_weights: Array
    n_resampled: int

    @property
    def log_normalizer(self) -> float:
        """The logarithm of the mean weight."""
        return float(logsumexp(self.log_weights) - np.log(len(self.log_weights)))

    def mean(self, values: Array) -> float:
        """Return the weighted mean of values (n,)."""
        shares = np.exp(self.log_weights - logsumexp(self.log_weights))
        return float(shares @ values)


def ancestors(log_weights: Array, uniforms: Array) -> Array:
    """Return the particles that n new ones copy: number i at (U_i + i) / n.

    One uniform makes the resampling systematic, n of them stratified.
    """
    n = len(log_weights)
    passed = np.cumsum(np.exp(log_weights - log_weights.max()))
    places = (np.arange(n) + uniforms) * (passed[-1] / n)
    found: Array = np.searchsorted(passed, places, side="right").clip(max=n - 1)
    return found


@dataclass(frozen=True)
class Corrector:
    """A Feynman-Kac corrector.

    Parameters
    ----------
    path : of densities.
    weights : "kernel_ratio", unbiased at any number of steps, or "riemann".
    resampling : "systematic" or "stratified".
    threshold : in (0, 1]: resample below this effective share; None: never.
    """

    path: DensityPath
    weights: str = "kernel_ratio"
    resampling: str = "systematic"
    threshold: float | None = 0.5

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise unknown("weights", self.weights, WEIGHTS)
        check_resampling(
            self.resampling, 1.0 if self.threshold is None else self.threshold
        )

    def run(
        self, x: Array, noises: Sequence[Array] | Array, uniforms: Array | None = None
    ) -> Particles:
        """Return the particles that start from x (n, d).

        Parameters
        ----------
        noises : (N, n, d) standard normals, one row for each step.
        uniforms : (N, n), for resampling.
        """
        path, h = self.path, 1.0 / len(noises)
        here, total, count = path.at(x, 0.0), 0.0, 0
        logs = path.log_start_weight(x)
        for n, z in enumerate(noises):
            after = path.step_mean(x, here, h) + np.sqrt(path.rate * h) * z
            there = path.at(after, (n + 1) * h)
            if self.weights == "riemann":
                logs = logs + path.log_riemann(here, there.powers, h)
            else:
                logs = logs + path.log_kernel_ratio(x, after, here, there, h)
            x, here = after, there
            if self._enough(logs) or n + 1 == len(noises):
                continue
            assert uniforms is not None
            drawn = uniforms[n, :1] if self.resampling == "systematic" else uniforms[n]
            source = ancestors(logs, drawn)
            total += float(logsumexp(logs)) - np.log(len(logs))
            x, logs, count = x[source], np.zeros(len(logs)), count + 1
            here = here._replace(logs=here.logs[:, source])
            here = here._replace(scores=here.scores[:, source])
        return Particles(x, logs + total, count)

    def _enough(self, logs: Array) -> bool:
        if self.threshold is None:
            return True
        share = np.exp(2.0 * logsumexp(logs) - logsumexp(2.0 * logs)) / len(logs)
        return bool(share >= self.threshold)
