"""Mode weights of a sampler on a mixture, and how far they are from the mixture's.

The weight of mode k under a law p is E_p[gamma_k(X)], with gamma_k(x) the
responsibility of the mode for x under the target mixture: it is defined for every p,
sums to one, and is the mode's own weight under the target.  The distance is the total
variation 1/2 sum_k |weight_k - target_k|, which is 0 for the target and tends to 1 as
all mass goes to modes of no weight.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from scipy.special import fdtri

from sdebench.closed_form.log_quadratics import Array
from sdebench.measure.intervals import Interval


def total_variation(weights: Array, target: Array) -> float:
    """Return 1/2 sum |weights - target|."""
    return 0.5 * float(np.sum(np.abs(weights - target)))


def mode_weights(
    responsibilities: Array, log_weights: Array | None = None
) -> tuple[Array, Array]:
    """Return the mode weights (K,) of a sample and the influence of each draw (n, K).

    Parameters
    ----------
    responsibilities : (n, K) of the target at the draws.
    log_weights : (n,) importance weights, normalized by their sum; default: none.

    The weights' error is the mean of the influence, to first order in 1/n where there
    are importance weights.
    """
    if log_weights is None:
        mean = responsibilities.mean(axis=0)
        return mean, responsibilities - mean
    scaled = np.exp(log_weights - log_weights.max())
    scaled /= scaled.mean()
    mean = scaled @ responsibilities / len(scaled)
    return mean, scaled[:, None] * (responsibilities - mean)


def total_variation_interval(
    weights: Array, influence: Array, target: Array, level: float
) -> Interval:
    """Return the total variation between mode weights and the target, with interval.

    |e|_1 <= sqrt(K) |e|_2 for the error e of the weights, and |e|_2 has Box's law (see
    `sdebench.measure.intervals`): conservative, and valid for any number of modes whose
    weights are estimated from the same draws.
    """
    n, count = influence.shape
    covariance = influence.T @ influence / (n - 1)
    trace, square = float(np.trace(covariance)), float(np.sum(covariance**2))
    value = total_variation(weights, target)
    if square == 0.0:
        return Interval(value, value, value)
    nu = trace**2 / square
    radius = sqrt(trace / n * float(fdtri(nu, (n - 1) * nu, level)))
    reach = 0.5 * sqrt(count) * radius
    return Interval(value, max(value - reach, 0.0), min(value + reach, 1.0))


def effective_share(log_weights: Array) -> float:
    """Return the effective sample size of importance weights over their number."""
    scaled = np.exp(log_weights - log_weights.max())
    return float(scaled.sum() ** 2 / (len(scaled) * np.sum(scaled**2)))
