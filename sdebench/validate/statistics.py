"""Tests behind the verdict on an estimator, each at a stated false-alarm rate.

*Bias of one cell.*  n independent samples of a vector, `bias_test` against the exact
N-step answer; where there is none, the paired difference from a built-in estimator of
the same answer, on the same paths.  An estimate log(mean w) of log Z is tested before
the logarithm, E[w/Z] = 1, which holds for every number of paths.  A declared bias of
order 1/n is removed by Richardson extrapolation, 2 v_n - v_{n/2}, from the same paths.

Where the samples are so skewed that normal theory cannot carry a small p-value, it is
raised to the least one that it can, and to 1 if that is above `WORTHLESS`: a raised
p-value is still below a with probability at most a.

*All cells.*  Every cell has noise of its own, so that the p-values p_1 … p_m are
independent.  The estimator is called biased if m min p < a/2 (Bonferroni: finds a large
bias in one cell) or if the chi-squared(2m) tail of -2 sum log p is below a/2 (Fisher
1925: finds a small bias in many), so that a correct one is called biased with
probability at most a.

*Power.*  With noncentrality n delta^2 / nu, nu the largest eigenvalue of the
covariance, Hotelling's test at level a/(2m) finds a bias of norm delta in the least
favourable direction with probability `POWER`.  The test of the largest |t| finds one of
norm c |s|, s the standard errors of the P components, c = z_{a/(4mP)} + z_{1-POWER}
(upper quantiles): some component is then at least c standard errors off.

*Ratio of variances.*  log(tr S_1/tr S_2) of two estimators on the same paths has the
influence function |x - m_1|^2/tr S_1 - |y - m_2|^2/tr S_2, whose sample variance gives
the interval (delta method); the built-in compared with was chosen on other paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import chi2, f, ncf, norm

from sdebench.measure.intervals import BiasTest, Interval, bias_test, t_quantile

Array = NDArray[np.float64]
POWER = 0.9
ACCURACY = 0.5
"""Largest relative error of a p-value; a heavy tail hides its skewness from the sample,
and with 1 the weights of uncontrolled paths were called biased too often."""
WORTHLESS = 0.01
"""A cell that cannot carry a p-value this small says nothing of the bias."""


class GlobalTest(NamedTuple):
    """p_value of "unbiased in all cells", from Bonferroni's and Fisher's."""

    p_value: float
    smallest: float
    combined: float


def global_test(p_values: Sequence[float]) -> GlobalTest:
    """Combine the independent p-values of all cells.

    The p-value is at most a with probability at most a if every cell is unbiased.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.size == 0:
        return GlobalTest(1.0, 1.0, 1.0)
    if np.isnan(p).any():
        raise ValueError("a p-value is not a number")
    smallest = min(1.0, p.size * float(p.min()))
    with np.errstate(divide="ignore"):
        combined = float(chi2.sf(-2.0 * np.log(p).sum(), 2 * p.size))
    return GlobalTest(min(1.0, 2.0 * min(smallest, combined)), smallest, combined)


def mean_test(
    samples: Array, answer: Array, tolerance: float
) -> tuple[BiasTest, Array, Array]:
    """Test the mean of samples (n, P) against the answer; also mean and covariance."""
    mean = samples.mean(axis=0)
    covariance = np.atleast_2d(np.cov(samples, rowvar=False))
    test = bias_test(mean, answer, covariance, len(samples), tolerance)
    return test, mean, covariance


def least_credible_p_value(samples: Array) -> float:
    """Return the p-value below which normal theory says nothing of samples (n, P).

    Edgeworth: at the quantile z the tail of the t-statistic is off by a relative
    |skewness| z^3 / (6 sqrt(n)), which must be below `ACCURACY`.
    """
    deviations = samples - samples.mean(axis=0)
    spread = np.sqrt((deviations**2).mean(axis=0))
    usable = spread > 0.0
    skewness = ((deviations[:, usable] / spread[usable]) ** 3).mean(axis=0)
    largest = float(np.abs(skewness).max(initial=0.0))
    if largest == 0.0:
        return 0.0
    cube = 6.0 * ACCURACY * np.sqrt(len(samples)) / largest
    return float(2.0 * norm.sf(cube ** (1.0 / 3.0)))


def credible(p_value: float, least: float) -> float:
    """Return a p-value that skewed samples can carry."""
    if p_value >= least:
        return p_value
    return least if least <= WORTHLESS else 1.0


def detectable_bias(
    covariance: Array, n: int, significance: float, method: str
) -> float:
    """Return the norm of a bias that is found with probability `POWER`.

    In the least favourable direction; infinite where n <= P.  ``method`` is that of
    `bias_test`.
    """
    size = len(covariance)
    if method != "hotelling":
        quantile = norm.isf(0.5 * significance / size) + norm.isf(1.0 - POWER)
        return float(quantile * np.sqrt(np.trace(covariance) / n))
    variance = float(np.linalg.eigvalsh(covariance)[-1])
    if variance <= 0.0:
        return 0.0
    if n <= size:
        return np.inf
    critical = f.isf(significance, size, n - size)

    def missing(root: float) -> float:
        return float(ncf.sf(critical, size, n - size, root**2)) - POWER

    high = 1.0
    while missing(high) < 0.0:
        high *= 2.0
    return float(brentq(missing, 0.0, high)) * float(np.sqrt(variance / n))


def variance_ratio(one: Array, two: Array, level: float = 0.95) -> Interval:
    """Return tr Cov(one) / tr Cov(two) with its interval, samples (n, P) in pairs."""
    squares = [((x - x.mean(axis=0)) ** 2).sum(axis=1) for x in (one, two)]
    first, second = (float(s.mean()) for s in squares)
    if second == 0.0:
        return Interval(1.0, 1.0, 1.0) if first == 0.0 else Interval(*[np.inf] * 3)
    if first == 0.0:
        return Interval(0.0, 0.0, 0.0)
    influence = squares[0] / first - squares[1] / second
    error = float(influence.std(ddof=1)) / np.sqrt(len(one))
    reach = np.exp(t_quantile(level, len(one) - 1) * error)
    ratio = first / second
    return Interval(ratio, ratio / reach, ratio * reach)
