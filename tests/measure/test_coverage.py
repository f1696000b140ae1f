"""Coverage of every interval on known laws, and mutations that the check must catch.

A check counts misses of a nominal 95 % interval in N draws and fails when there are
more than a binomial law with the allowed miss rate gives with probability
FALSE_ALARM / CHECKS; all tests here together fail by chance with probability below
FALSE_ALARM (the seeds are fixed, so in fact never or always).  The allowed rate is
5 %, except where stated: no interval for a variance can know a heavy tail that the
sample does not show.
"""

from __future__ import annotations

from itertools import repeat
from math import sqrt

import numpy as np
import pytest
from scipy.stats import binom, norm

from sdebench.measure.intervals import (
    bias_norm,
    bias_test,
    debiased_squared_norm,
    mean_squared_error,
    simultaneous_interval,
    stopping_levels,
    t_quantile,
    variance_interval,
)
from sdebench.measure.moments import sample_moments

FALSE_ALARM = 1e-3
CHECKS = 60


def most_misses(draws, rate=0.05):
    return binom.isf(FALSE_ALARM / CHECKS, draws, rate)


def gaussian(rng, shape):
    return rng.standard_normal(shape)


def student5(rng, shape):
    return rng.standard_t(5, shape) / sqrt(5 / 3)


def lognormal(rng, shape):
    square = np.exp(0.25)
    return (np.exp(0.5 * rng.standard_normal(shape)) - np.exp(0.125)) / sqrt(
        square * (square - 1)
    )


def product(rng, shape):
    return rng.standard_normal(shape) * rng.standard_normal(shape)


LAWS = [gaussian, student5, lognormal, product]
"""Standardised to mean 0 and variance 1."""


def roots(dim):
    """Square roots of covariances: isotropic, graded, and nearly one direction."""
    rng = np.random.default_rng(dim)
    q = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    graded = q * 2.0 ** -np.arange(dim)
    single = np.sqrt(0.05) * np.eye(dim) + np.outer(np.ones(dim), np.eye(dim)[0])
    return {"isotropic": np.eye(dim), "graded": graded, "single": single}


def misses_simultaneous(n, dim, draws, quantile=None, seed=0):
    rng = np.random.default_rng(seed)
    count = 0
    for _ in range(draws):
        x = rng.standard_normal((n, dim))
        error = x.std(axis=0, ddof=1) / sqrt(n)
        if quantile is None:
            low, high = simultaneous_interval(x.mean(axis=0), error, n - 1)
        else:
            low, high = (
                x.mean(axis=0) - quantile * error,
                x.mean(axis=0) + quantile * error,
            )
        count += bool(np.any((low > 0.0) | (high < 0.0)))
    return count


@pytest.mark.parametrize(("n", "dim"), [(8, 1), (8, 20), (64, 5)])
def test_simultaneous(n, dim):
    draws = 3000
    misses = misses_simultaneous(n, dim, draws)
    assert misses <= most_misses(draws)
    # independent components: Bonferroni loses almost nothing, so not too few either
    assert misses >= binom.ppf(FALSE_ALARM / CHECKS, draws, 0.042)


def test_mutations_of_the_quantile_are_caught():
    draws = 3000
    z = norm.ppf(0.975)
    assert misses_simultaneous(8, 1, draws, z) > most_misses(draws)
    without_bonferroni = t_quantile(0.95, 63)
    assert misses_simultaneous(64, 5, draws, without_bonferroni) > most_misses(draws)


def test_divisor_n_is_caught():
    """Mutation: a variance with divisor n, at n = 5."""
    rng = np.random.default_rng(1)
    draws, right, wrong = 6000, 0, 0
    for _ in range(draws):
        x = rng.standard_normal(5)
        for ddof in (0, 1):
            error = x.std(ddof=ddof) / sqrt(5)
            low, high = simultaneous_interval(x.mean(), error, 4)
            miss = not low[0] <= 0.0 <= high[0]
            right, wrong = right + miss * ddof, wrong + miss * (1 - ddof)
    assert right <= most_misses(draws)
    assert wrong > most_misses(draws)


@pytest.mark.parametrize(("n", "dim"), [(8, 1), (8, 6), (60, 6), (100, 20)])
def test_bias_test_size(n, dim):
    """P-values below 5 % and below 0.5 % are at most that frequent."""
    rng = np.random.default_rng(2)
    draws = 2000
    for root in roots(dim).values():
        p = np.empty(draws)
        for k in range(draws):
            x = gaussian(rng, (n, dim)) @ root.T
            p[k] = bias_test(x.mean(0), np.zeros(dim), np.cov(x.T), n).p_value
        assert np.sum(p < 0.05) <= most_misses(draws)
        assert np.sum(p < 0.005) <= most_misses(draws, 0.005)


@pytest.mark.parametrize(("n", "size"), [(60, 4), (12, 6)])
def test_bias_test_has_power(n, size):
    """A bias of ``size`` standard errors in one of 6 components is found."""
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(200):
        x = gaussian(rng, (n, 6))
        x[:, 2] += size / sqrt(n)
        found += bias_test(x.mean(0), np.zeros(6), np.cov(x.T), n).p_value < 0.05
    assert found > 160


def misses_norm(root, n, size, draws, law=gaussian, seed=4, wrong=False):
    """Misses of bias_norm; size is |b| in units of sqrt(trace/n)."""
    rng = np.random.default_rng(seed)
    dim = len(root)
    unit = np.linalg.eigh(root @ root.T)[1][:, -1]  # the noisiest direction
    scale = sqrt(np.trace(root @ root.T) / n)
    bias = size * scale * unit
    count = 0
    for _ in range(draws):
        x = bias + law(rng, (n, dim)) @ root.T
        covariance = np.atleast_2d(np.cov(x.T))
        if wrong:  # mutation: the radius of one component for all
            d = float(np.linalg.norm(x.mean(0)))
            q = t_quantile(0.95, n - 1) * sqrt(float(covariance.diagonal().max()) / n)
            low, high = d - q, d + q
        else:
            _, low, high = bias_norm(x.mean(0), covariance, n)
        count += not low <= np.linalg.norm(bias) <= high
    return count


@pytest.mark.parametrize("kind", ["isotropic", "graded", "single"])
@pytest.mark.parametrize("dim", [2, 12])
def test_norm_of_the_bias(kind, dim):
    draws = 1000
    for n in (8, 50):
        for size in (0.0, 0.7, 5.0):
            misses = misses_norm(roots(dim)[kind], n, size, draws)
            assert misses <= most_misses(draws), (n, size)


def test_norm_in_many_directions():
    """30 isotropic directions: the split, whose upper end rests on |e|^2 >= l."""
    for size in (0.4, 0.8):
        assert misses_norm(np.eye(30), 130, size, 250) <= most_misses(250), size


def test_norm_with_one_component_radius_is_caught():
    misses = misses_norm(np.eye(12), 50, 0.0, 1000, wrong=True)
    assert misses > most_misses(1000)


def variance_misses(law, n, dim, draws, seed=5, interval=variance_interval):
    rng = np.random.default_rng(seed)
    root = roots(dim)["graded"]
    trace = float(np.trace(root @ root.T))
    count = 0
    for _ in range(draws):
        got = interval(sample_moments(law(rng, (n, dim)) @ root.T))
        count += not got.low <= trace <= got.high
    return count


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dim", [1, 3])
def test_variance(law, dim):
    """7 % misses allowed at n = 1000, and at n = 32 for products of Gaussians."""
    draws = 1000
    rate = 0.05 if law is gaussian else 0.07
    assert variance_misses(law, 1000, dim, draws) <= most_misses(draws, rate)
    if law is gaussian:
        assert variance_misses(law, 16, dim, draws) <= most_misses(draws)
    if law is product:
        assert variance_misses(law, 32, dim, draws) <= most_misses(draws, 0.07)


def test_variance_interval_that_assumes_gaussian_values_is_caught():
    """Mutation: chi-square limits whatever the kurtosis."""
    from scipy.stats import chi2

    from sdebench.measure.intervals import Interval

    def wrong(moments):
        dof, trace = moments.n - 1, moments.trace
        return Interval(
            trace,
            trace * dof / chi2.isf(0.025, dof),
            trace * dof / chi2.isf(0.975, dof),
        )

    misses = variance_misses(student5, 1000, 1, 600, interval=wrong)
    assert misses > most_misses(600, 0.07)


@pytest.mark.parametrize("law", LAWS)
def test_mean_squared_error(law):
    """MSE of a replicate of 50 paths from 40 replicates, all paths in the moments."""
    rng = np.random.default_rng(6)
    draws, n_paths, n = 1000, 50, 2000
    root = roots(3)["graded"]
    trace = float(np.trace(root @ root.T))
    for size in (0.0, 0.2):
        bias = np.array([size, 0.0, 0.0])
        exact = size**2 + trace / n_paths
        misses = 0
        for _ in range(draws):
            moments = sample_moments(bias + law(rng, (n, 3)) @ root.T)
            square = debiased_squared_norm(moments.mean, moments.covariance, n)
            spread = variance_interval(moments)
            got = mean_squared_error(square, spread, n_paths)
            misses += not got.low <= exact <= got.high
        assert misses <= most_misses(draws), size


def sequential_misses(draws, levels, target, seed=7):
    """Looks at 8, 16, ... 1024 samples; misses of the interval at the last look taken.

    With a target, stop at that half-width (what a measurement does); without, at the
    first look that excludes the truth (the worst rule of all).
    """
    rng = np.random.default_rng(seed)
    misses = 0
    for _ in range(draws):
        x = rng.standard_normal(1024)
        for n, level in zip((8 << k for k in range(8)), levels(), strict=False):
            part = x[:n]
            half = t_quantile(level, n - 1) * part.std(ddof=1) / sqrt(n)
            missed = abs(part.mean()) > half
            if (half <= target) if target else missed:
                break
        misses += missed
    return misses


@pytest.mark.parametrize("target", [0.25, None])
def test_stopping(target):
    draws = 2000
    assert sequential_misses(draws, stopping_levels, target) <= most_misses(draws)


def test_stopping_without_spending_is_caught():
    """Mutation: every look at the full level."""
    draws = 2000
    assert sequential_misses(draws, lambda: repeat(0.95), None) > most_misses(draws)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_calibration(law):
    """Print and bound the coverage over laws, sizes and dimensions."""
    draws = 4000
    for dim in (1, 3, 12):
        for n in (8, 32, 128, 1000, 10_000):
            runs = draws if n < 1000 else max(300, draws * 1000 // n // 4)
            rate = variance_misses(law, n, dim, runs) / runs
            print(f"variance {law.__name__} dim {dim} n {n}: {1 - rate:.3f}")
            if n >= 1000 or law is gaussian:
                assert rate * runs <= most_misses(runs, 0.065)
        for kind, root in roots(dim).items():
            for n in (8, 32, 128):
                for size in (0.0, 0.5, 1.0, 3.0, 20.0):
                    rate = misses_norm(root, n, size, draws // 2, law) / (draws // 2)
                    print(
                        f"norm {law.__name__} {kind} {dim} {n} {size}: {1 - rate:.3f}"
                    )
                    if law is gaussian:
                        assert rate * draws // 2 <= most_misses(draws // 2)
