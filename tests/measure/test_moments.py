"""Streaming moments against two-pass formulae in extended precision."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from math import inf, isnan

import numpy as np
import pytest

from sdebench.errors import ParameterError
from sdebench.measure import moments as module
from sdebench.measure.moments import (
    LogMeanExp,
    Moments,
    StreamingMoments,
    merge,
    sample_moments,
)


def reference(values):
    """Two passes in extended precision over rows of samples."""
    x = np.asarray(values, dtype=np.longdouble)
    y = x - x.mean(axis=0)
    norm = (y**2).sum(axis=1)
    return {
        "mean": x.mean(axis=0),
        "variance": (y**2).sum(axis=0) / (len(x) - 1),
        "third": (y**3).mean(axis=0),
        "fourth": (y**4).mean(axis=0),
        "covariance": y.T @ y / (len(x) - 1),
        "norm_third": (norm[:, None] * y).mean(axis=0),
        "norm_fourth": (norm**2).mean(),
    }


def compare(result: Moments, values, digits=1e-11):
    """Compare in units of the standard deviation; 1e-11 is far above rounding."""
    exact = reference(values)
    s = np.sqrt(np.max(exact["variance"]))
    powers = {"mean": 1, "variance": 2, "third": 3, "fourth": 4, "covariance": 2}
    powers |= {"norm_third": 3, "norm_fourth": 4}
    for name, power in powers.items():
        got = getattr(result, name)
        error = np.max(np.abs(got - exact[name]))
        assert error <= digits * s**power * max(1, np.size(result.mean)), name


def stream(values, block=256, padding=16, n_lanes=8, dtype=np.float64, threads=1):
    n, dim = values.shape
    blocks = []
    for first in range(0, n, block):
        part = values[first : first + block].T
        padded = np.full((dim, part.shape[1] + padding), np.nan, dtype=dtype)
        padded[:, : part.shape[1]] = part
        blocks.append((padded, part.shape[1]))
    result = StreamingMoments(dim, n_lanes)
    result.set_shift(*blocks[0])

    def work(lane):
        for padded, count in blocks[lane::n_lanes]:
            result.update(lane, padded, count)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(n_lanes)))
    return result.finalize()


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8])
def test_matches_two_passes(dim):
    rng = np.random.default_rng(dim)
    values = rng.standard_normal((1000, dim)) ** 3 @ rng.standard_normal((dim, dim))
    compare(stream(values), values)
    compare(sample_moments(values), values)


def test_large_offset_keeps_digits():
    # at 1e6 standard deviations raw power sums have no digit of the fourth moment
    rng = np.random.default_rng(0)
    values = 1e6 + rng.standard_normal((20_000, 3))
    compare(stream(values), values, digits=1e-9)
    raw = (values**4).mean(axis=0) - 4 * values.mean(axis=0) * (values**3).mean(axis=0)
    raw += 6 * values.mean(axis=0) ** 2 * (values**2).mean(axis=0)
    raw -= 3 * values.mean(axis=0) ** 4
    assert np.max(np.abs(raw - reference(values)["fourth"])) > 1.0


def test_float32_is_accumulated_in_float64():
    rng = np.random.default_rng(1)
    values = rng.standard_normal((5000, 4)).astype(np.float32)
    compare(stream(values, dtype=np.float32), values.astype(np.float64))


def test_same_bits_for_any_number_of_threads():
    values = np.random.default_rng(2).standard_normal((5000, 7))
    one, four = stream(values), stream(values, threads=4)
    for name in ("mean", "variance", "third", "fourth", "covariance", "norm_third"):
        assert np.array_equal(getattr(one, name), getattr(four, name)), name
    assert one.norm_fourth == four.norm_fourth


def test_merge_equals_one_run():
    rng = np.random.default_rng(3)
    values = rng.standard_exponential((3000, 4)) + np.arange(4.0)
    values[:1000] += 5.0  # different shifts and means
    both = merge(stream(values[:1000]), stream(values[1000:]))
    compare(both, values)
    single = merge(sample_moments(values[:1]), sample_moments(values[1:]))
    compare(single, values)


def test_merge_mutation_is_seen(monkeypatch):
    """Leaving out the cross term of the third moment must show."""
    right = module._moved

    def wrong(move, first, second, trace, third, fourth):
        return right(move, first, 0.0 * second, trace, third, fourth)

    values = np.random.default_rng(3).standard_exponential((300, 2))
    values[:100] += 5.0
    parts = sample_moments(values[:100]), sample_moments(values[100:])
    monkeypatch.setattr(module, "_moved", wrong)
    with pytest.raises(AssertionError):
        compare(merge(*parts), values)


def test_without_covariance():
    values = np.random.default_rng(4).standard_normal((500, 3))
    result = StreamingMoments(3, with_covariance=False)
    result.set_shift(values.T)
    result.update(2, values.T)  # not contiguous: copied
    got = result.finalize()
    assert got.covariance is None
    assert got.norm_fourth is None
    np.testing.assert_allclose(got.variance, values.var(axis=0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(got.std_error, np.sqrt(got.variance / 500), rtol=1e-15)
    assert merge(got, got).covariance is None


def test_constant_samples_have_zero_variance():
    result = sample_moments(np.full((50, 2), 0.1))
    assert np.all(result.variance == 0.0)
    assert result.trace == 0.0
    assert np.all(np.isnan(result.kurtosis))


def test_nonfinite_samples_are_counted():
    values = np.random.default_rng(5).standard_normal((600, 3))
    values[10, 1] = np.nan
    values[400, :] = np.inf
    values[401, 0] = -np.inf
    block = np.ascontiguousarray(values.T)
    result = StreamingMoments(3)
    result.set_shift(block)
    assert np.all(np.isfinite(result.shift))
    result.update(0, block)
    assert result.n_nonfinite == 3
    assert result.finalize().n_nonfinite == 3


def test_overflow_of_a_power_is_not_a_bad_sample():
    values = np.array([[1e90], [-1e90], [0.0]])
    result = sample_moments(values)
    assert result.n_nonfinite == 0
    assert np.isfinite(result.variance).all()


def test_misuse_is_refused():
    result = StreamingMoments(2)
    with pytest.raises(ParameterError, match="set_shift"):
        result.update(0, np.zeros((2, 4)))
    with pytest.raises(ParameterError, match="no samples"):
        result.finalize()
    result.set_shift(np.zeros((2, 4)))
    with pytest.raises(ParameterError, match="shape"):
        result.update(0, np.zeros((3, 4)))
    with pytest.raises(ParameterError, match="shape"):
        result.update(0, np.zeros((2, 4)), 5)
    result.update(0, np.zeros((2, 4)))
    with pytest.raises(ParameterError, match="after the first"):
        result.set_shift(np.zeros((2, 4)))
    with pytest.raises(ParameterError):
        StreamingMoments(0)


@pytest.mark.parametrize("offset", [0.0, 800.0, -800.0])
def test_log_mean_exp(offset):
    rng = np.random.default_rng(6)
    values = rng.standard_normal(3000) * 2.0
    values[7] = -inf  # a weight of zero counts as a sample
    result = LogMeanExp(n_lanes=3)
    for k, part in enumerate(np.array_split(values + offset, 10)):
        result.update(k % 3, part)
    got = result.finalize()
    weights = np.exp(values)
    assert got.n == 3000
    assert got.log_mean == pytest.approx(np.log(weights.mean()) + offset, rel=1e-13)
    kish = weights.sum() ** 2 / (weights**2).sum()
    assert got.effective == pytest.approx(kish, rel=1e-12)
    relative = weights.std(ddof=1) / weights.mean() / np.sqrt(3000)
    assert got.std_error == pytest.approx(relative, rel=1e-9)
    assert got.log_max == values.max() + offset


def test_log_mean_exp_edges():
    empty = LogMeanExp()
    with pytest.raises(ParameterError):
        empty.finalize()
    nothing = LogMeanExp()
    nothing.update(0, np.full(5, -inf))
    assert nothing.finalize().log_mean == -inf
    bad = LogMeanExp()
    bad.update(0, np.array([0.0, np.nan, inf]))
    bad.update(1, np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32), 2)
    assert bad.n_nonfinite == 2
    assert isnan(bad.finalize().log_mean)
