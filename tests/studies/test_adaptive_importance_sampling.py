"""The study of several expectations: the law, the draws, and planted errors.

Intervals hold jointly with probability 99.9 %; seeds are fixed.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdebench import studies
from sdebench.studies import adaptive_importance_sampling as module
from sdebench.studies._study import agreement, count_agreeing

STUDY = studies.study("adaptive_importance_sampling")


@pytest.fixture(scope="module")
def evidence():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "N_DRAWS", 1 << 16)
        return STUDY.experiment(0, lambda done, total: None)


def test_all_numbers_agree(evidence):
    """Exact ones to the last digit, measured ones inside; false alarms 0.1 %."""
    found = evidence[evidence["part"] != "learned"]
    assert count_agreeing(found) == len(found) == 11
    table = STUDY.table(evidence)
    assert table["agreement"].isin(["equal", "inside", "–"]).all()
    assert "11 of 11 numbers agree" in STUDY.summary(evidence)
    assert all(axes.has_data() for axes in STUDY.figure(evidence).axes)


def test_the_grid_has_the_moments_of_the_normal_law():
    means, variances = module.closed_moments()
    phi, f = module.functions(module.GRID), module.law()
    np.testing.assert_allclose(phi @ f, means, atol=1e-12)
    np.testing.assert_allclose(phi**2 @ f - means**2, variances, rtol=1e-12)


def test_draws_have_no_bias_and_the_exact_variance():
    """Five standard errors of each mean."""
    means = module.closed_moments()[0]
    for scheme in module.schemes().values():
        values = scheme.draw(200_000, 5)
        errors = values.std(axis=0) / np.sqrt(len(values))
        assert np.all(np.abs(values.mean(axis=0) - means) < 5.0 * errors)


def test_coefficients_with_the_wrong_sign_are_seen():
    """A mutation: -beta in the numerator, +beta outside."""
    scheme = module.schemes()[module.TURNS]
    wrong = module.Scheme(scheme.ratio, -scheme.beta)
    assert wrong.variance() > 1.2 * scheme.variance()
    found = module.measured_variance(wrong, 0, 4)
    assert agreement(module.PRINTED[module.TURNS], found).startswith("outside")


def test_learned_coefficients_approach_the_best(evidence):
    learned = evidence[evidence["part"] == "learned"].set_index("pilot")["value"]
    best = module.schemes()[module.TURNS].variance()
    assert np.all(learned >= best)
    assert learned[3000] < 1.01 * best < learned[30]
