"""Weak-order fit: exact data, coverage, robustness, and what cannot be determined."""

from __future__ import annotations

from math import isnan

import numpy as np
import pytest
from scipy.stats import binom

from sdebench.errors import ParameterError
from sdebench.measure import order as module
from sdebench.measure.order import fit_order

FALSE_ALARM = 1e-4
H = 1.0 / np.array([10.0, 20.0, 40.0, 80.0])


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("correction", [False, True])
def test_exact_data(order, correction):
    bias = -0.7 * H**order * (1 + 3.0 * H * correction)
    error = np.abs(bias) * 1e-7
    fit = fit_order(H, bias, error, correction=correction)
    assert fit.order == pytest.approx(order, abs=1e-5)
    assert fit.low <= order <= fit.high
    assert fit.high - fit.low < 1e-4
    assert fit.coefficient == pytest.approx(-0.7, rel=1e-3)
    assert not fit.undetermined


def test_two_steps_are_the_classic_ratio():
    fit = fit_order([0.1, 0.05], [0.4, 0.1], [1e-3, 1e-3])
    assert fit.order == pytest.approx(2.0, abs=1e-4)
    assert fit.p_value == 1.0


def count_covered(simulate, draws=600, **options):
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(draws):
        order, bias, error = simulate(rng)
        fit = fit_order(H, bias, error, **options)
        covered += fit.undetermined or fit.low <= order <= fit.high
    return covered, binom.ppf(FALSE_ALARM, draws, 0.95)


def scalar(rng, order=1.0, noise=0.05):
    bias = H**order
    error = noise * bias[0] * np.array([1.0, 0.7, 0.5, 0.3])
    return order, bias + error * rng.standard_normal(4), error


def test_coverage_scalar():
    covered, least = count_covered(scalar)
    assert covered >= least
    covered, least = count_covered(lambda rng: scalar(rng, 2.0, 0.02))
    assert covered >= least


def estimated(rng, n=9):
    order, _, error = scalar(rng)
    samples = H**order + error * np.sqrt(n) * rng.standard_normal((n, 4))
    return order, samples.mean(0), samples.std(0, ddof=1) / np.sqrt(n)


def test_coverage_with_estimated_errors():
    covered, least = count_covered(estimated, dof=8.0)
    assert covered >= least
    # mutation: nine replicates' errors taken as known
    covered, least = count_covered(estimated)
    assert covered < least


def vector(rng, dim=10, noise=0.12):
    direction = np.ones(dim) / np.sqrt(dim)
    root = noise * H[0] * np.diag(np.linspace(0.2, 2.0, dim))
    covariance = np.stack([root @ root.T * s for s in (1.0, 0.5, 0.25, 0.1)])
    noises = [rng.multivariate_normal(np.zeros(dim), c) for c in covariance]
    return 1.0, H[:, None] * direction + np.array(noises), covariance


def test_coverage_vector(monkeypatch):
    draws = 1500
    covered, least = count_covered(vector, draws)
    assert covered >= least
    # mutation: length of the first bias not debiased, its noise not counted
    right = module._project

    def wrong(h, biases, errors, direction):
        unit = biases[0] / np.linalg.norm(biases[0])
        return biases @ unit, np.einsum("p,kpq,q->k", unit, errors, unit)

    monkeypatch.setattr(module, "_project", wrong)
    covered, least = count_covered(vector, draws)
    assert covered < least
    monkeypatch.setattr(module, "_project", right)


def test_projection_is_unbiased():
    """|b_1| times the projections has the mean beta_1.beta_k, within 4 errors."""
    rng = np.random.default_rng(15)
    values = []
    for _ in range(2000):
        _, bias, covariance = vector(rng)
        scalar, _ = module._project(H, bias, covariance, None)
        values.append(scalar * np.linalg.norm(bias[0]))
    error = np.std(values, axis=0) / np.sqrt(2000)
    # subtracted is tr S - v'Sv: the part along v is noise of the length itself
    trace = np.trace(covariance[0])
    largest = np.linalg.eigvalsh(covariance[0])[-1]
    off = np.mean(values, axis=0) - H[0] * H
    assert np.all(np.abs(off[1:]) < 4 * error[1:])
    assert -4 * error[0] < off[0] < largest + 4 * error[0]
    assert trace > largest + 8 * error[0]


def test_forms_of_vector_errors():
    # independent components may be given by their standard errors
    rng = np.random.default_rng(12)
    _, bias, covariance = vector(rng, noise=0.02)
    errors = np.sqrt(np.einsum("kpp->kp", covariance))
    one, two = fit_order(H, bias, covariance), fit_order(H, bias, errors)
    assert one.order == pytest.approx(two.order, abs=1e-6)
    known = fit_order(H, bias, covariance, direction=np.ones(10))
    assert known.low < 1.0 < known.high


def test_norm_without_debiasing_is_refused():
    """Mutation: the plain norm of noisy vectors flattens the ladder."""

    def norms(rng):
        order, bias, covariance = vector(rng, noise=0.08)
        error = np.sqrt(np.einsum("kpp->k", covariance) / 10)
        return order, np.linalg.norm(bias, axis=1), error

    covered, least = count_covered(norms)
    assert covered < least


def curved(rng):
    bias = H * (1 + 4.0 * H)
    error = np.full(4, 2e-4)
    return 1.0, bias + error * rng.standard_normal(4), error


def test_correction_restores_coverage():
    covered, least = count_covered(curved, correction=True)
    assert covered >= least
    covered, least = count_covered(curved)
    assert covered < least


def test_goodness_of_fit():
    rng = np.random.default_rng(13)
    values = [fit_order(H, *scalar(rng, noise=0.01)[1:]).p_value for _ in range(400)]
    small = sum(value < 0.05 for value in values)
    assert small <= binom.isf(FALSE_ALARM, 400, 0.05)
    floor = H + 0.02  # a bias that stays
    assert fit_order(H, floor, np.full(4, 1e-4)).p_value < 1e-6


def test_undetermined():
    rng = np.random.default_rng(14)
    lost = [
        fit_order(H, 0.01 * rng.standard_normal(4), np.full(4, 0.01)).undetermined
        for _ in range(300)
    ]
    assert 300 - sum(lost) <= binom.isf(FALSE_ALARM, 300, 1e-3)
    # only the largest step resolved: any order above some limit fits
    coarse = fit_order(H, [0.1, 0.0, 0.0, 0.0], np.full(4, 0.01))
    assert coarse.undetermined
    assert isnan(coarse.order)
    assert fit_order(H, np.zeros((4, 3)), np.ones((4, 3))).undetermined


def test_misuse_is_refused():
    with pytest.raises(ParameterError, match="step sizes"):
        fit_order([0.1, 0.1], [1.0, 1.0], [1.0, 1.0])
    with pytest.raises(ParameterError, match="step sizes"):
        fit_order([0.1, 0.2], [1.0, 1.0], [1.0, 1.0], correction=True)
    with pytest.raises(ParameterError, match="fit together"):
        fit_order(H, np.ones(4), np.ones(3))
    with pytest.raises(ParameterError, match="positive"):
        fit_order(H, np.ones(4), np.zeros(4))
    with pytest.raises(ParameterError, match="dof"):
        fit_order(H, np.ones(4), np.ones(4), dof=1)
