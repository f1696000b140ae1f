"""Weak order of a scheme from biases on a ladder of step sizes.

Model: bias_k = c h_k^p (1 + q h_k) + noise of known standard error, |q| h_max <= 1/2;
q = 0 unless the correction is asked for.  For given (p, q) the coefficient c is a
linear least-squares solution, so the weighted sum of squares is a function of p (and
q) alone.  The interval for p holds all p whose sum of squares, minimised over q, is
within the chi-square(1) quantile of the minimum (profile likelihood); with estimated
standard errors the squared Student quantile takes its place.

Vector biases are first projected on the direction of the bias at the largest step.
That direction is noisy: with v = b_1/|b_1| the inner products b_1.b_k have the
expectation beta_1.beta_k for k > 1, and for k = 1 after subtracting tr S_1; the noise
b_1 brings along beta_k only rescales c, and the product of the two noises adds
tr(S_1 S_k)/|b_1|^2 to the variance.  A known direction (the exact discretization bias)
can be given instead.

The noises of different steps are taken as independent: give each step its own seed.
"""

from __future__ import annotations

from math import inf, nan
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdebench.errors import ParameterError
from sdebench.measure.intervals import t_quantile

Array = NDArray[np.float64]
LOWEST, HIGHEST = 0.05, 8.0
"""Range of orders searched."""
RESOLVED = 1e-3
"""The bias is resolved if chance explains its size with at most this probability."""
CORRECTION = 0.5
"""Largest relative size of the correction at the largest step."""


class OrderFit(NamedTuple):
    """Weak order with its interval; p_value tests the fit (small: not a power law).

    Undetermined (order nan, low 0, high inf, coefficient nan): the biases are not
    resolved from zero, or every order in a range up to the search limit fits.
    """

    order: float
    low: float
    high: float
    coefficient: float
    p_value: float
    undetermined: bool


def fit_order(
    step_sizes: ArrayLike,
    bias: ArrayLike,
    std_error: ArrayLike,
    *,
    dof: float = inf,
    level: float = 0.95,
    correction: bool = False,
    direction: ArrayLike | None = None,
) -> OrderFit:
    """Fit the order p of bias ~ c h^p.

    Parameters
    ----------
    step_sizes : h_k > 0, shape (K,), at least two different (three with correction).
    bias : shape (K,) or (K, P).
    std_error : of the biases, shape (K,) or (K, P) (independent components), or the
        covariance matrices of the mean biases, shape (K, P, P).
    dof : degrees of freedom of the standard errors (replicates - 1), > 2.
    level : confidence level of the interval for the order.
    correction : also fit the next order, c h^p (1 + q h); wider but robust intervals.
    direction : shape (P,), project on this known direction instead of the data's.
    """
    h = np.asarray(step_sizes, dtype=np.float64)
    biases = np.asarray(bias, dtype=np.float64)
    errors = np.asarray(std_error, dtype=np.float64)
    if h.ndim != 1 or np.unique(h).size < 2 + correction or not np.all(h > 0.0):
        raise ParameterError(
            f"step sizes {h.tolist()}: need at least {2 + correction} different"
            " positive ones"
        )
    if biases.shape[0] != h.size or errors.shape[: biases.ndim] != biases.shape:
        raise ParameterError(
            f"{h.size} step sizes, biases of shape {biases.shape} and errors of shape"
            f" {errors.shape} do not fit together"
        )
    if dof <= 2.0:
        raise ParameterError(f"dof is {dof}; standard errors need more than 2")
    if biases.ndim == 2:
        scalar, variance = _project(h, biases, errors, direction)
    else:
        scalar, variance = biases, errors**2
    if not np.all(variance > 0.0):
        raise ParameterError("standard errors must be positive")
    return _fit(h, scalar, variance, dof, level, correction)


def _project(
    h: Array, biases: Array, errors: Array, direction: ArrayLike | None
) -> tuple[Array, Array]:
    """Return biases (K,) along one direction, and their variances (K,)."""
    if errors.ndim == 2:
        matrices = np.einsum("kp,pq->kpq", errors**2, np.eye(errors.shape[1]))
    else:
        matrices = errors
    if direction is not None:
        unit = np.asarray(direction, dtype=np.float64)
        unit = unit / np.linalg.norm(unit)
        return biases @ unit, np.einsum("p,kpq,q->k", unit, matrices, unit)
    first = int(np.argmax(h))
    length = float(np.linalg.norm(biases[first]))
    if length == 0.0:
        return np.zeros(h.size), np.einsum("kpp->k", matrices)
    unit = biases[first] / length
    scalar = biases @ unit
    along = np.einsum("p,kpq,q->k", unit, matrices, unit)
    scalar[first] -= (float(np.trace(matrices[first])) - along[first]) / length
    crossed = np.einsum("pq,kqp->k", matrices[first], matrices) / length**2
    # along the direction itself the product of the noises is part of the projection
    crossed -= along[first] * along / length**2
    return scalar, along + np.maximum(crossed, 0.0)


def _misfit(
    orders: Array, ratio: Array, bias: Array, weight: Array, correction: bool
) -> tuple[Array, Array]:
    """Weighted sum of squares per order, c and q eliminated, and the best q.

    With correction the unconstrained minimum is a 2 x 2 linear problem; where its q is
    out of bounds, the minimum lies on a bound (the sum is convex in c and c q).
    """
    total = np.sum(weight * bias**2)
    plain = ratio ** orders[:, None]

    def along(q: float) -> Array:
        shape = plain * (1.0 + q * ratio)
        top = np.sum(weight * bias * shape, axis=1)
        return total - top**2 / np.sum(weight * shape**2, axis=1)

    if not correction:
        return along(0.0), np.zeros(orders.size)
    ends = np.stack([along(-CORRECTION), along(CORRECTION)])
    value, slope = ends.min(axis=0), CORRECTION * (2.0 * ends.argmin(axis=0) - 1.0)
    next_plain = plain * ratio
    aa = np.sum(weight * plain**2, axis=1)
    ab = np.sum(weight * plain * next_plain, axis=1)
    bb = np.sum(weight * next_plain**2, axis=1)
    ra = np.sum(weight * bias * plain, axis=1)
    rb = np.sum(weight * bias * next_plain, axis=1)
    determinant = aa * bb - ab**2
    with np.errstate(invalid="ignore", divide="ignore"):
        c = (bb * ra - ab * rb) / determinant
        e = (aa * rb - ab * ra) / determinant
        q = e / c
        inside = np.abs(q) <= CORRECTION
    free = total - c * ra - e * rb
    return np.where(inside, free, value), np.where(inside, q, slope)


def _fit(
    h: Array, bias: Array, variance: Array, dof: float, level: float, correction: bool
) -> OrderFit:
    from scipy.special import chdtrc

    # the square of a Student variable has mean dof/(dof - 2), not 1
    inflation = 1.0 if dof == inf else dof / (dof - 2.0)
    weight = 1.0 / (variance * inflation)
    ratio = h / h.max()

    def misfit(orders: Array) -> tuple[Array, Array]:
        return _misfit(orders, ratio, bias, weight, correction)

    grid = np.linspace(LOWEST, HIGHEST, 531)
    profile = misfit(grid)[0]
    order, step = float(grid[np.argmin(profile)]), float(grid[1] - grid[0])
    for _ in range(4):
        near = order + np.linspace(-step, step, 41)
        values, slopes = misfit(near)
        best = int(np.argmin(values))
        order, least, slope = float(near[best]), float(values[best]), slopes[best]
        step /= 20.0
    freedom = h.size - 2 - correction
    p_value = float(chdtrc(freedom, max(least, 0.0))) if freedom > 0 else 1.0
    threshold = least + t_quantile(level, dof) ** 2 / inflation
    lost = OrderFit(nan, 0.0, inf, nan, p_value, True)
    resolved = chdtrc(h.size, np.sum(weight * bias**2)) <= RESOLVED
    inside = grid[profile <= threshold]
    low_in = min(order, float(inside.min(initial=order)))
    high_in = max(order, float(inside.max(initial=order)))
    outside_low, outside_high = grid[grid < low_in], grid[grid > high_in]
    if not resolved or outside_low.size == 0 or outside_high.size == 0:
        return lost

    def crossing(inner: float, outer: float) -> float:
        for _ in range(4):
            points = np.linspace(inner, outer, 65)
            out = np.flatnonzero(misfit(points)[0] > threshold)
            first = max(int(out[0]), 1) if out.size else 64
            inner, outer = float(points[first - 1]), float(points[first])
        return inner

    shape = ratio**order * (1.0 + slope * ratio)
    scale = float(np.sum(weight * bias * shape) / np.sum(weight * shape**2))
    return OrderFit(
        order=order,
        low=crossing(low_in, float(outside_low[-1])),
        high=crossing(high_in, float(outside_high[0])),
        coefficient=scale / float(h.max()) ** order,
        p_value=p_value,
        undetermined=False,
    )
