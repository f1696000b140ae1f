"""Confidence intervals and tests for the bias, the variance and their consequences.

Everything starts from n independent samples of a vector (replicate values, or per-path
values where the estimator is a plain mean): mean m, covariance S, and the moments of
the norm.  Below, e = m - E[m] is the error of the mean, d = m - truth, b the true bias.

* Components: Student t quantiles at level 1 - (1 - level)/comparisons (Bonferroni: no
  assumption on the dependence between components or cells).
* One p-value for all components: Hotelling's T^2 where n > 4 P and the correlation
  matrix is well conditioned, else the Bonferroni p-value of the largest |t|.
* Norm of the error: n|e|^2/tr S is close to F(nu, (n-1) nu) with Box's degrees of
  freedom nu = (tr S)^2/tr S^2 (Box 1954; exact for one component and for isotropic
  covariance).  The plug-in nu is too small on average, which widens intervals.
* Means of positive quantities (total variance, mean squared error): gamma law with
  the relative variance v of one sample, so 2n/v degrees of freedom; ``_positive_mean``.

Units: those of the values; relative quantities have none.  All inputs are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, inf, isfinite, nan, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdebench.errors import ParameterError
from sdebench.measure.moments import Moments

Array = NDArray[np.float64]
ROUNDING = 2.0**-40
"""Rounding allowed in a float64 estimate, relative to its largest component (9e-13)."""
WORST_CONDITION = 1e8
"""Largest condition number of a correlation matrix that is inverted."""


class Interval(NamedTuple):
    """An estimate with the ends of its confidence interval."""

    estimate: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """Return the interval of ``factor`` > 0 times the quantity."""
        return Interval(*(factor * value for value in self))


class BiasTest(NamedTuple):
    """p-value of "the bias is zero"; method is "hotelling", "max_t" or "exact"."""

    p_value: float
    method: str
    statistic: float


def t_quantile(level: float, dof: float, comparisons: int = 1) -> float:
    """Two-sided Student quantile, simultaneous over ``comparisons`` (Bonferroni).

    ``dof`` may be infinite (Gaussian quantile) and must be positive.
    """
    from scipy.special import ndtri, stdtrit

    if not 0.0 < level < 1.0 or dof <= 0.0 or comparisons < 1:
        raise ParameterError(
            f"level {level}, dof {dof}, comparisons {comparisons}: need 0 < level < 1,"
            " dof > 0 and comparisons >= 1"
        )
    tail = (1.0 - level) / (2.0 * comparisons)
    return -float(stdtrit(dof, tail) if isfinite(dof) else ndtri(tail))


def simultaneous_interval(
    mean: ArrayLike,
    std_error: ArrayLike,
    dof: float,
    level: float = 0.95,
    n_cells: int = 1,
) -> tuple[Array, Array]:
    """Intervals that cover all P components of all cells at once.

    Parameters
    ----------
    mean, std_error : shape (P,).
    dof : degrees of freedom of the standard errors, n - 1.
    level : probability that every component of every cell is covered.
    n_cells : number of cells (each of P components) that share the level.

    Returns
    -------
    low, high : shape (P,).
    """
    center = np.atleast_1d(np.asarray(mean, dtype=np.float64))
    quantile = t_quantile(level, dof, center.size * n_cells)
    half = quantile * np.asarray(std_error, dtype=np.float64)
    return center - half, center + half


def rounding_tolerance(
    mean: ArrayLike, truth: ArrayLike, relative: float = ROUNDING
) -> float:
    """Absolute difference that rounding explains: relative times the largest entry.

    The default suits float64 paths of up to some thousands of steps; 2**-14 suits
    float32 paths.
    """
    return relative * float(max(np.max(np.abs(mean)), np.max(np.abs(truth))))


def _shrunk(difference: Array, tolerance: float) -> Array:
    """Move each difference towards zero by the tolerance, at most to zero."""
    return np.sign(difference) * np.maximum(np.abs(difference) - tolerance, 0.0)


def bias_test(
    mean: ArrayLike,
    truth: ArrayLike,
    covariance: ArrayLike,
    n: int,
    tolerance: float | None = None,
) -> BiasTest:
    """Test whether a mean of n samples has the expectation ``truth``.

    The hypothesis is |bias| <= tolerance in every component (default:
    ``rounding_tolerance``; add the error bound of an approximate truth).  A component
    of zero variance is so accepted within the tolerance (p = 1) and refused beyond
    it (p = 0).  Hotelling's test is used only where the tolerance is negligible.

    Parameters
    ----------
    mean, truth : shape (P,).
    covariance : of one sample, shape (P, P), or the variances (P,).
    n : number of samples behind mean and covariance.
    """
    from scipy.special import fdtrc, stdtr

    mean = np.atleast_1d(np.asarray(mean, dtype=np.float64))
    covariance = np.asarray(covariance, dtype=np.float64)
    variance = (
        np.diag(covariance) if covariance.ndim == 2 else np.atleast_1d(covariance)
    )
    if tolerance is None:
        tolerance = rounding_tolerance(mean, truth)
    difference = _shrunk(mean - np.asarray(truth, dtype=np.float64), tolerance)
    error = np.sqrt(np.maximum(variance, 0.0) / max(n, 1))
    size = mean.size
    if not difference.any():
        return BiasTest(1.0, "exact", 0.0)
    if n < 2:
        raise ParameterError(f"n is {n}: a bias test needs at least 2 samples")
    if np.any((error == 0.0) & (difference != 0.0)):
        return BiasTest(0.0, "exact", inf)
    if (
        covariance.ndim == 2
        and size > 1
        and n > 4 * size
        and tolerance <= 0.01 * error.min()
    ):
        scale = np.sqrt(variance)
        correlation = covariance / np.outer(scale, scale)
        values = np.linalg.eigvalsh(correlation)
        if values[0] * WORST_CONDITION > values[-1]:
            reduced = difference / scale
            square = n * float(reduced @ np.linalg.solve(correlation, reduced))
            ratio = square * (n - size) / (size * (n - 1))
            return BiasTest(float(fdtrc(size, n - size, ratio)), "hotelling", square)
    moved = difference != 0.0
    largest = float(np.max(np.abs(difference[moved]) / error[moved]))
    p_value = min(1.0, 2.0 * size * float(stdtr(n - 1, -largest)))
    return BiasTest(p_value, "max_t", largest)


def _box(covariance: Array) -> tuple[float, float, float]:
    """Trace, Box's degrees of freedom and largest eigenvalue of a covariance.

    From variances alone (1-D) the worst case is taken: all the variance in one
    direction has the heaviest tail of the norm (Szekely and Bakirov 2003).
    """
    if covariance.ndim < 2:
        trace = float(np.sum(covariance))
        return trace, 1.0, trace
    trace = float(np.trace(covariance))
    square = float(np.sum(covariance**2))
    if square == 0.0:
        return 0.0, 1.0, 0.0
    return trace, trace**2 / square, float(np.linalg.eigvalsh(covariance)[-1])


def bias_norm(
    difference: ArrayLike,
    covariance: ArrayLike,
    n: int,
    level: float = 0.95,
    truth_norm: float = 1.0,
    tolerance: float = 0.0,
) -> Interval:
    """Interval for |b|, or |b| / truth_norm, near zero bias too.

    The estimate is sqrt(max(0, |d|^2 - tr S/n)).  Two intervals are at hand, both
    conservative for Gaussian means:

    ball: |d| -+ q with q the radius of the ball that holds e with probability level;
    split: |d|^2 = |b|^2 + 2 b.e + |e|^2, with |b.e| <= |b| c, c^2 = t^2 lambda_max/n,
    and |e|^2 in [l, u]; the four events share 1 - level.

    The ball is short for few effective directions, the split for many.  The choice
    compares their upper ends at d^2 = tr S/n: it looks at S alone, which (for Gaussian
    data) is independent of d, so it does not spoil the coverage.

    Parameters
    ----------
    difference : mean - truth, shape (P,).
    covariance : of one sample, shape (P, P), or variances (P,): treated as if all
        components moved together.
    n : number of samples behind the mean.
    truth_norm : divisor, for the relative bias; 0 gives nan.
    tolerance : bound on the norm of the truth's own error and of rounding.
    """
    from scipy.special import fdtri

    if truth_norm == 0.0:
        return Interval(nan, nan, nan)
    if n < 2:
        raise ParameterError(f"n is {n}: a bias interval needs at least 2 samples")
    matrix = np.asarray(covariance, dtype=np.float64)
    square = float(np.sum(np.asarray(difference, dtype=np.float64) ** 2))
    length = sqrt(square)
    trace, nu, largest = _box(matrix)
    spread = trace / n
    alpha = 1.0 - level
    radius = sqrt(spread * float(fdtri(nu, (n - 1) * nu, level)))
    along = t_quantile(1.0 - alpha / 2.0, n - 1) * sqrt(largest / n)
    under = spread * float(fdtri(nu, (n - 1) * nu, alpha / 4.0))
    over = spread * float(fdtri(nu, (n - 1) * nu, 1.0 - alpha / 4.0))
    split_end = along + sqrt(max(along**2 + spread - under, 0.0))
    if sqrt(spread) + radius <= split_end:
        low, high = length - radius, length + radius
    else:
        high = along + sqrt(max(along**2 + square - under, 0.0))
        low = sqrt(along**2 + max(square - over, 0.0)) - along
    estimate = sqrt(max(square - spread, 0.0))
    return Interval(estimate, max(low - tolerance, 0.0), high + tolerance).scaled(
        1.0 / truth_norm
    )


def debiased_squared_norm(
    difference: ArrayLike,
    covariance: ArrayLike,
    n: int,
    level: float = 0.95,
    tolerance: float = 0.0,
) -> Interval:
    """Unbiased estimate |d|^2 - tr S/n of |b|^2 (may be negative), and its interval.

    The interval is that of ``bias_norm``, squared.
    """
    matrix = np.asarray(covariance, dtype=np.float64)
    norm = bias_norm(difference, matrix, n, level, tolerance=tolerance)
    trace = _box(matrix)[0]
    square = float(np.sum(np.asarray(difference, dtype=np.float64) ** 2))
    return Interval(square - trace / n, norm.low**2, norm.high**2)


def _positive_mean(
    mean: float, second: float, n: int, level: float, most: float = inf
) -> Interval:
    """Interval for the mean of n positive values with second moment ``second``.

    Gamma approximation: mean * chi^2_f / f, f = 2n/v, v = second/mean^2 - 1.  A sample
    that happens to miss its rare large values has mean and v too small together, so f
    is divided by 1 + kappa/sqrt(n) for the lower end and 1 + 2 kappa/sqrt(n) for the
    upper one, kappa = v + 1.  The factors were calibrated on Gaussian, Student (5, 8),
    exponential, lognormal and product laws; they tend to 1.  ``most`` bounds f by what
    the covariance allows (Gaussian law, unknown mean).
    """
    from scipy.special import chdtri

    if mean <= 0.0 or not isfinite(second):
        return Interval(mean, mean, mean) if mean == 0.0 else Interval(nan, nan, nan)
    kappa = max(second / mean**2, 1.0)
    # all values equal: the gamma law has collapsed
    free = 2.0 * n / max(kappa - 1.0, 1e-300)
    loss = kappa / sqrt(n)
    below = min(free / (1.0 + loss), most)
    above = min(free / (1.0 + 2.0 * loss), most)
    alpha = 1.0 - level

    def factor(dof: float, tail: float) -> float:
        if dof > 1e12:  # the interval is narrower than 1e-5
            return 1.0
        quantile = float(chdtri(dof, tail))
        return dof / quantile if quantile > 0.0 else inf

    return Interval(
        mean,
        mean * factor(below, alpha / 2.0),
        mean * factor(above, 1.0 - alpha / 2.0),
    )


def variance_interval(
    moments: Moments, level: float = 0.95, scale: float = 1.0
) -> Interval:
    """Interval for the trace of the covariance of one sample, times ``scale``.

    ``scale`` makes the variance per path of replicate values (n_paths) or the relative
    variance (1/|truth|^2).  Needs the covariance and the norm moments.  At n = 8 and
    heavy tails (lognormal, products of Gaussians) the interval is too short: no
    interval knows the tail that eight samples do not show.
    """
    if moments.covariance is None or moments.norm_fourth is None:
        raise ParameterError("variance_interval needs moments with covariance")
    if moments.n < 2:
        raise ParameterError("n is 1: a variance needs at least 2 samples")
    nu = _box(moments.covariance)[1]
    biased = 1.0 - 1.0 / moments.n
    interval = _positive_mean(
        moments.trace * biased,
        moments.norm_fourth,
        moments.n,
        level,
        most=(moments.n - 1) * nu,
    )
    return interval.scaled(scale / biased)


def mean_squared_error(
    squared_bias: Interval, variance: Interval, n_paths: int
) -> Interval:
    """MSE |b|^2 + V/n_paths of one replicate of n_paths paths, with its interval.

    The two intervals are combined by recovered variances (Zou and Donner 2008): the
    delta method for a sum, keeping each term's own asymmetry.

    Parameters
    ----------
    squared_bias : from ``debiased_squared_norm``.
    variance : per path, from ``variance_interval``, at the same level.
    """
    bias = max(squared_bias.estimate, 0.0)
    part = variance.scaled(1.0 / n_paths)
    estimate = bias + part.estimate
    down = np.hypot(max(bias - squared_bias.low, 0.0), part.estimate - part.low)
    up = np.hypot(max(squared_bias.high - bias, 0.0), part.high - part.estimate)
    return Interval(estimate, max(estimate - float(down), 0.0), estimate + float(up))


def efficiency(error: Interval, cost: float) -> Interval:
    """Return 1/(MSE * cost) of one replicate; infinite where the MSE is zero.

    ``cost`` in evaluations or seconds of the same replicate; its own error is ignored.
    """

    def inverse(value: float) -> float:
        return 1.0 / (value * cost) if value * cost > 0.0 else inf

    return Interval(inverse(error.estimate), inverse(error.high), inverse(error.low))


def required_replicates(
    target: float,
    std_error: ArrayLike,
    n: int,
    level: float = 0.95,
    comparisons: int = 1,
) -> int:
    """Return the replicates after which the half-width should be ``target``.

    Parameters
    ----------
    target : wanted half-width of the widest component's interval, > 0.
    std_error : present standard errors, shape (P,), from n replicates.
    level, comparisons : of the interval at the next look.
    """
    if target <= 0.0:
        raise ParameterError(f"target half-width is {target}; it must be positive")
    spread = float(np.max(std_error)) * sqrt(n)
    need = 2
    while True:  # the quantile falls with n: from below this settles in a few rounds
        width = t_quantile(level, need - 1, comparisons) * spread
        if width <= target * sqrt(need):
            return need
        normal = t_quantile(level, inf, comparisons) * spread
        need = max(ceil((normal / target) ** 2), need + max(need // 64, 1))


def stopping_levels(level: float = 0.95) -> Iterator[float]:
    """Yield the confidence level of look 1, 2, ... of a sequential measurement.

    Look k spends (1 - level)/(k (k + 1)) of the error probability; the sum over all
    looks is 1 - level.  Hence the interval at whichever look the run stops, decided
    from the data or by the budget, covers with probability at least ``level``.
    Double the replicates between looks: the price is then a quantile of 2.6 instead
    of 2.0 at the third look.
    """
    look = 1
    while True:
        yield 1.0 - (1.0 - level) / (look * (look + 1))
        look += 1
