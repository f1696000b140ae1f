"""Intervals and tests: exact special cases, edges, and independent formulae."""

from __future__ import annotations

from itertools import islice
from math import inf, isnan, sqrt

import numpy as np
import pytest
from scipy import stats

from sdebench.errors import ParameterError
from sdebench.measure.intervals import (
    Interval,
    bias_norm,
    bias_test,
    debiased_squared_norm,
    efficiency,
    mean_squared_error,
    required_replicates,
    simultaneous_interval,
    stopping_levels,
    t_quantile,
    variance_interval,
)
from sdebench.measure.moments import StreamingMoments, sample_moments


def test_t_quantile_matches_distributions():
    assert t_quantile(0.95, 7) == pytest.approx(stats.t.ppf(0.975, 7), rel=1e-12)
    assert t_quantile(0.9, inf, 5) == pytest.approx(stats.norm.ppf(0.99), rel=1e-12)
    far = t_quantile(0.95, 30, 10**6)
    assert far == pytest.approx(stats.t.isf(2.5e-8, 30), rel=1e-9)
    for wrong in ((1.0, 5, 1), (0.95, 0, 1), (0.95, 5, 0)):
        with pytest.raises(ParameterError):
            t_quantile(*wrong)


def test_simultaneous_interval_widens_with_comparisons():
    low, high = simultaneous_interval([1.0, 2.0], [0.1, 0.0], 9)
    half = stats.t.ppf(1 - 0.05 / 4, 9) * 0.1
    np.testing.assert_allclose(low, [1.0 - half, 2.0], rtol=1e-12)
    np.testing.assert_allclose(high, [1.0 + half, 2.0], rtol=1e-12)
    wider, _ = simultaneous_interval([1.0, 2.0], [0.1, 0.0], 9, n_cells=10)
    assert wider[0] < low[0]


def test_one_component_is_the_t_test():
    x = np.random.default_rng(0).standard_normal(12)
    expected = stats.ttest_1samp(x, 0.3)
    got = bias_test(x.mean(), 0.3, [[x.var(ddof=1)]], 12)
    assert got.method == "max_t"
    assert got.p_value == pytest.approx(expected.pvalue, rel=1e-9)


def test_hotelling_is_invariant_and_max_t_is_the_fallback():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((60, 3)) @ rng.standard_normal((3, 3))
    matrix = np.array([[1.0, 2.0, 0.0], [0.0, 1.0, 5.0], [1.0, 0.0, 1.0]])
    one = bias_test(x.mean(0), np.full(3, 0.1), np.cov(x.T), 60)
    y = x @ matrix.T
    two = bias_test(y.mean(0), matrix @ np.full(3, 0.1), np.cov(y.T), 60)
    assert one.method == two.method == "hotelling"
    assert one.p_value == pytest.approx(two.p_value, rel=1e-6)
    few = bias_test(x[:11].mean(0), np.zeros(3), np.cov(x[:11].T), 11)
    assert few.method == "max_t"
    copied = np.column_stack([x, x[:, 0]])  # singular
    same = bias_test(copied.mean(0), np.zeros(4), np.cov(copied.T), 60)
    assert same.method == "max_t"
    assert bias_test(x.mean(0), np.zeros(3), x.var(0), 60).method == "max_t"


def test_zero_variance_is_decided_by_rounding():
    truth = np.array([1.0, -2.0])
    assert bias_test(truth, truth, np.zeros((2, 2)), 8).p_value == 1.0
    near = truth * (1 + 1e-14)
    assert bias_test(near, truth, np.zeros((2, 2)), 8).p_value == 1.0
    # spread at the level of rounding, systematic difference too: not a bias
    noise = np.eye(2) * 1e-32
    assert bias_test(near, truth, noise, 8).p_value == 1.0
    off = np.array([1.0, -2.0 + 1e-9])
    assert bias_test(off, truth, np.zeros((2, 2)), 8).p_value == 0.0
    assert bias_test(off, truth, noise, 8).p_value < 1e-6
    assert bias_test(off, truth, np.zeros((2, 2)), 8, tolerance=1e-8).p_value == 1.0
    # one component known exactly, one noisy
    mixed = bias_test([1.0, 0.1], [1.0, 0.0], np.diag([0.0, 1.0]), 50)
    assert mixed.p_value == pytest.approx(4 * stats.t.sf(0.1 * sqrt(50), 49), rel=1e-6)
    with pytest.raises(ParameterError):
        bias_test([1.0], [0.0], [[0.0]], 1)


def test_norm_of_one_component_is_the_t_interval():
    got = bias_norm([3.0], [[4.0]], 9)
    half = stats.t.ppf(0.975, 8) * 2.0 / 3.0
    assert got.low == pytest.approx(3.0 - half, rel=1e-9)
    assert got.high == pytest.approx(3.0 + half, rel=1e-9)
    assert bias_norm([0.1], [[4.0]], 9).low == 0.0
    halved = bias_norm([3.0], [[4.0]], 9, truth_norm=2.0)
    assert halved.high == pytest.approx(got.high / 2, rel=1e-12)
    wide = bias_norm([3.0], [[4.0]], 9, tolerance=0.5)
    assert wide.high == pytest.approx(got.high + 0.5, rel=1e-12)
    assert all(isnan(value) for value in bias_norm([3.0], [[4.0]], 9, truth_norm=0.0))
    # without variance the norm is known
    assert bias_norm([3.0, 4.0], np.zeros((2, 2)), 9) == (5.0, 5.0, 5.0)


def test_norm_in_many_directions_is_short():
    """In 200 isotropic directions the ball would end at 2 sqrt(200/n)."""
    n, dim = 10**6, 200
    difference = np.random.default_rng(2).standard_normal(dim) / sqrt(n)
    got = bias_norm(difference, np.eye(dim), n)
    assert got.low == 0.0
    assert got.high * sqrt(n) < 12.0
    blind = bias_norm(difference, np.ones(dim), n)
    assert blind.high > got.high


def test_squared_norm_is_unbiased():
    """Mean over 4000 draws within 4 standard errors (false alarm 6e-5)."""
    rng = np.random.default_rng(3)
    bias, root = np.array([0.3, 0.0, -0.1]), rng.standard_normal((3, 3))
    values = []
    for _ in range(4000):
        x = bias + rng.standard_normal((10, 3)) @ root.T
        got = debiased_squared_norm(x.mean(0), np.cov(x.T), 10)
        assert got.low <= max(got.estimate, 0.0) <= got.high
        values.append(got.estimate)
    error = np.std(values) / sqrt(4000)
    assert abs(np.mean(values) - bias @ bias) < 4 * error


def test_variance_interval_edges():
    constant = sample_moments(np.full((9, 2), 0.5))
    assert variance_interval(constant) == (0.0, 0.0, 0.0)
    x = np.random.default_rng(4).standard_normal((400, 3))
    moments = sample_moments(x)
    got = variance_interval(moments)
    assert got.estimate == pytest.approx(x.var(axis=0, ddof=1).sum(), rel=1e-12)
    assert got.low < got.estimate < got.high
    assert variance_interval(moments, scale=7.0).low == pytest.approx(7 * got.low)
    plain = StreamingMoments(3, with_covariance=False)
    plain.set_shift(x.T)
    plain.update(0, x.T)
    with pytest.raises(ParameterError):
        variance_interval(plain.finalize())
    with pytest.raises(ParameterError):
        variance_interval(sample_moments(x[:1]))
    # two values: mean and spread known from one number, an honest upper end
    pair = variance_interval(sample_moments(np.array([[0.0], [1.0]])))
    chi = stats.chi2.ppf([0.025, 0.975], 1)
    assert pair.high >= 0.5 / chi[0] * (1 - 1e-9)
    assert pair.low <= 0.5 / chi[1] * (1 + 1e-9)


def test_two_point_law_has_no_variance_noise():
    """Values -1 and 1: |y|^2 is constant, the variance is known at once."""
    x = np.tile([-1.0, 1.0], 500)[:, None]
    got = variance_interval(sample_moments(x))
    # the cap of a Gaussian law remains: 999 degrees of freedom
    assert got.high / got.estimate == pytest.approx(1.094, abs=0.01)


def test_mse_and_efficiency():
    bias, variance = Interval(0.04, 0.01, 0.09), Interval(8.0, 6.0, 12.0)
    got = mean_squared_error(bias, variance, 100)
    assert got.estimate == pytest.approx(0.12)
    assert got.low == pytest.approx(0.12 - sqrt(0.03**2 + 0.02**2))
    assert got.high == pytest.approx(0.12 + sqrt(0.05**2 + 0.04**2))
    negative = mean_squared_error(Interval(-0.01, 0.0, 0.02), variance, 100)
    assert negative.estimate == pytest.approx(0.08)
    best = efficiency(got, 50.0)
    assert best.estimate == pytest.approx(1 / 6.0)
    assert best.low < best.estimate < best.high
    assert efficiency(Interval(0.0, 0.0, 0.0), 50.0).estimate == inf


def test_required_replicates_reaches_the_target():
    for n, error, target in ((8, 0.3, 0.01), (8, 0.3, 1.0), (100, 1e-3, 1e-4)):
        need = required_replicates(target, [error, error / 2], n, comparisons=2)
        future = error * sqrt(n / need) * t_quantile(0.95, need - 1, 2)
        assert future <= target
        less = max(2, int(need * 0.95) - 1)
        before = error * sqrt(n / less) * t_quantile(0.95, less - 1, 2)
        assert need <= 3 or before > target
    assert required_replicates(0.1, 0.0, 8) == 2
    with pytest.raises(ParameterError):
        required_replicates(0.0, 0.1, 8)


def test_stopping_levels_spend_the_error_once():
    spent = [1.0 - level for level in islice(stopping_levels(0.95), 1000)]
    assert spent[:3] == pytest.approx([0.025, 0.05 / 6, 0.05 / 12])
    assert sum(spent) < 0.05
    assert sum(spent) == pytest.approx(0.05, rel=2e-3)
