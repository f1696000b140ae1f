r"""A quartic terminal cost g(x) = 1/4 sum_i c_i x_i^4 on Gaussian processes.

Under an affine control X_T ~ N(m, S) is Gaussian, and Stein's lemma replaces g by the
quadratic with the same E g, E grad g and E Hessian g, for which

    E grad g(X_T) X_t^T,   d E g(X_T) / d(m, S)

are the same: objectives, gradients and adjoints averaged against affine functions of
X_t are those of the linear-quadratic problem with this terminal cost.

The optimal control is not affine.  In one dimension log E exp(-g(Y)) of a Gaussian Y
and the mean of Y^3 under the tilted law are trapezoidal sums around the mode of an
entire integrand, which converge faster than any power of the spacing (Trefethen and
Weideman 2014).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdebench.errors import NotExactError, ParameterError

from .validation import check_array

Array = NDArray[np.float64]

HALF_WIDTH = 10.0
"""Range of the sums in standard deviations; exp(-10^2 / 2) is 2e-22."""
N_NODES = 256
"""An even number of intervals; half of them give the bound of the error."""


def check_quartic(given: NDArray[np.floating] | None, dim: int) -> Array:
    """Return c (dim,), zero where nothing or nothing to sum is given.

    Raises
    ------
    ParameterError
        For a wrong shape or negative values.
    """
    if given is None or not len(given):
        return np.zeros(dim)
    quartic = check_array("reward_quartic", given, (dim,))
    if np.any(quartic < 0.0):
        raise ParameterError(
            f"reward_quartic {quartic} must not be negative: the reward minus "
            "x^4 / 4 times it could not be tilted with"
        )
    return quartic


def require_quadratic(quartic: Array) -> None:
    """Raise `NotExactError` if there is a quartic term."""
    if np.any(quartic):
        raise NotExactError(
            "a quartic reward has no quadratic value function: its control, value and "
            "the optimum of its N-step chain are not in closed form"
        )


def stein_quadratic(
    quartic: Array, mean: Array, variance: Array
) -> tuple[Array, Array, float]:
    """Return the quadratic equivalent to g under a Gaussian law.

    Parameters
    ----------
    quartic : c (d,).
    mean, variance : (d,) of X_T; only the diagonal of its covariance matters.

    Returns
    -------
    Q (d,), q (d,), r : g is replaced by 1/2 sum Q x^2 - q . x - r.
    """
    square = mean**2
    return (
        3.0 * quartic * (square + variance),
        2.0 * quartic * mean**3,
        0.75 * float(quartic @ (variance**2 + 2.0 * square * variance - square**2)),
    )


class Tilt(NamedTuple):
    """log E exp(-c Y^4 / 4) and the tilted mean of Y^3, with a bound on their errors.

    log_mass, cube : (n,).
    error_bound : twice the change from half the number of nodes, and rounding.
    """

    log_mass: Array
    cube: Array
    error_bound: float


def tilt(curvature: float, mean: Array, variance: float) -> Tilt:
    """Tilt Y ~ N(mean, variance), mean (n,), by exp(-curvature y^4 / 4).

    The sums are over y = mean + sqrt(variance) z, z equidistant around the mode; the
    potential is convex with second derivative at least 1 in z.
    """
    mean, root = np.asarray(mean, float)[:, None], np.sqrt(variance)
    z = np.zeros_like(mean)
    for _ in range(80):  # Newton's steps from the mean fall monotonically
        y = mean + root * z
        slope = z + curvature * root * y * y * y
        z = z - slope / (1.0 + 3.0 * curvature * variance * y * y)
    nodes = z + np.linspace(-HALF_WIDTH, HALF_WIDTH, N_NODES + 1)
    y = mean + root * nodes
    square = y * y
    exponent = -0.5 * nodes * nodes - 0.25 * curvature * square * square
    top = exponent.max(axis=1)
    weights = np.exp(exponent - top[:, None])
    moments = weights, weights * square * y

    def sums(every: int) -> tuple[Array, Array]:
        mass, cube = (part[:, ::every].sum(axis=1) for part in moments)
        spacing = 2.0 * HALF_WIDTH / N_NODES * every
        return top + np.log(mass * spacing / np.sqrt(2.0 * np.pi)), cube / mass

    fine, coarse = sums(1), sums(2)
    change = max(
        float(np.max(np.abs(a - b))) for a, b in zip(fine, coarse, strict=True)
    )
    scale = 1.0 + max(float(np.max(np.abs(a))) for a in fine)
    return Tilt(*fine, 2.0 * change + 16.0 * float(np.finfo(float).eps) * scale)


class GridLaw:
    """A law on the line by its log-density at equidistant nodes.

    Parameters
    ----------
    nodes : (n,) equidistant, wide enough that nothing is left outside.
    log_density : (n,), normalized up to the error of the sums.
    """

    def __init__(self, nodes: Array, log_density: Array) -> None:
        self.nodes, self._log_density = nodes, log_density
        self._weights = np.exp(log_density) * (nodes[1] - nodes[0])

    def mean(self) -> Array:
        """Return the mean (1,)."""
        return np.atleast_1d(self._weights @ self.nodes)

    def covariance(self) -> Array:
        """Return the variance (1, 1)."""
        return np.atleast_2d(self._weights @ (self.nodes - self.mean()[0]) ** 2)

    def log_density(self, x: Array) -> Array:
        """Return the log-density at x (..., 1), interpolated by a cubic spline."""
        from scipy.interpolate import CubicSpline

        return np.asarray(CubicSpline(self.nodes, self._log_density)(x[..., 0]))
