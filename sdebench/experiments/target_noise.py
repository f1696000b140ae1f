"""Noise of regression targets by sampling the tilted law and its noising exactly.

No formula for the noise takes part: x_1 is drawn from p*, x_t from its noising at a
random time of the schedule, and |tau - grad log p*_t(x_t)|^2 is weighted with
eta = sigma^2 / 2.  Times are uniform within strata, whose ends are spaced evenly in
log(rho), rho = alpha / beta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log, sqrt

import numpy as np
from scipy.optimize import brentq

from sdebench.closed_form.base_process import (
    BaseProcess,
    MemorylessBase,
    PinnedBase,
)
from sdebench.closed_form.gaussian_mixture import GaussianMixture
from sdebench.closed_form.quadratic import Quadratic
from sdebench.closed_form.regression_targets import RegressionTargets
from sdebench.closed_form.schedule import LinearFlow, VariancePreserving
from sdebench.experiments.costates import positive_mean
from sdebench.experiments.experiment import exact
from sdebench.experiments.measuring import Array
from sdebench.measure.intervals import Interval

BASE_VARIANCE = 0.5
"""Variance of the base N(0, BASE_VARIANCE), from which the lean adjoint comes."""
N_STRATA = 12
"""Strata between two of the given rho."""
N_SAMPLES = 256
"""Samples per stratum and replicate."""

NEGLIGIBLE = 1e-20
"""Mean square of labels without noise, by rounding."""

LABELS = {
    "conditional": "CSM",
    "target": "TSM",
    "novel": "NSM",
    "adjoint": "AM",
    "affine": "best affine",
}
"""Names of the targets in tables and figures."""


def _base(schedule: VariancePreserving | LinearFlow, start_time: float) -> BaseProcess:
    means, variances = np.zeros((1, 1)), np.full((1, 1), BASE_VARIANCE)
    return MemorylessBase(schedule, np.zeros(1), means, variances, start_time)


def schedules() -> dict[str, BaseProcess]:
    """Return base processes that end in N(0, BASE_VARIANCE), one per schedule."""
    return {
        "VP": _base(VariancePreserving(1.0, 10.0), 0.0),
        "linear flow": _base(LinearFlow(), 1e-3),
        "Föllmer": PinnedBase(np.zeros(1), sqrt(BASE_VARIANCE)),
    }


def laws() -> dict[str, RegressionTargets]:
    """Return a Gaussian tilted law, r = x - x^2/2, and one with two modes.

    The mixture is 0.3 N(-1.5, 0.2) + 0.7 N(1, 0.4) tilted by -0.4 (x - 0.5)^2.
    """
    base = GaussianMixture.normal([0.0], BASE_VARIANCE)
    mixture = GaussianMixture.isotropic([[-1.5], [1.0]], [0.2, 0.4], [0.3, 0.7])
    tilted = {
        "Gaussian": base.tilt(Quadratic(0.0, np.ones(1), np.ones(1))),
        "two modes": mixture.tilt(Quadratic.centered([0.5], [0.8])),
    }
    return {name: RegressionTargets(law, BASE_VARIANCE) for name, law in tilted.items()}


@dataclass(frozen=True)
class Noising:
    """The noising x_t = alpha_t x_1 + beta_t xi of a base process."""

    base: BaseProcess

    def at(self, t: float) -> tuple[float, float]:
        """Return alpha and beta."""
        alpha, _, variance = self.base.backward(t, self.base.horizon)
        return float(alpha), sqrt(float(variance))

    def time(self, rho: float) -> float:
        """Return the time at which alpha / beta is rho."""

        def gap(t: float) -> float:
            alpha, beta = self.at(t)
            return log(alpha / beta) - log(rho)

        span = self.base.horizon - self.base.start_time
        ends = 1e-9 * span, (1.0 - 1e-9) * span
        low, high = (self.base.start_time + end for end in ends)
        return float(brentq(gap, low, high, xtol=1e-14, rtol=1e-14))


def weighted_noise(
    targets: RegressionTargets,
    base: BaseProcess,
    names: Sequence[str],
    edges: Sequence[float],
    n_replicates: int,
    rng: np.random.Generator,
) -> Array:
    """Return samples of int eta E Tr Cov(tau | x_t) dt between neighbouring edges.

    Parameters
    ----------
    edges : rho, increasing.

    Returns
    -------
    (len(names), len(edges) - 1, n_replicates); replicates are independent.
    """
    noising = Noising(base)
    found = np.zeros((len(names), len(edges) - 1, n_replicates))
    for place, ends in enumerate(pairwise(edges)):
        times = [noising.time(rho) for rho in np.geomspace(*ends, N_STRATA + 1)]
        for first, last in pairwise(times):
            for replicate in range(n_replicates):
                t = rng.uniform(first, last)
                x_1 = targets.law.sample(rng, N_SAMPLES)
                xi = rng.standard_normal(x_1.shape)
                errors = targets.squared_errors(names, *noising.at(t), x_1, xi)
                weight = 0.5 * base.sigma(t) ** 2 * (last - first)
                found[:, place, replicate] += weight * errors.mean(axis=1)
    return found


def noise_at(
    targets: RegressionTargets,
    names: Sequence[str],
    alpha: float,
    beta: float,
    n_samples: int,
    rng: np.random.Generator,
) -> Array:
    """Return samples (len(names), n_samples) of |tau - grad log p*_t(x_t)|^2."""
    x_1 = targets.law.sample(rng, n_samples)
    xi = rng.standard_normal(x_1.shape)
    return targets.squared_errors(names, alpha, beta, x_1, xi)


def mean_noise(values: Array, level: float) -> Interval:
    """Return the mean of independent values with its interval; rounding is zero."""
    if values.mean() < NEGLIGIBLE:
        return exact(0.0)
    return positive_mean(values, level)
