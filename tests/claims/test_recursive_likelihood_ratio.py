"""The claim about RLR: planted evidence, a small run, and the ratio of variances."""

from __future__ import annotations

import numpy as np
import pytest

from sdebench import claims
from sdebench.claims import recursive_likelihood_ratio as module
from sdebench.experiments.comparisons import (
    power,
    quotient,
    replicate_values,
    variance_ratio,
)
from sdebench.experiments.measuring import sample
from sdebench.measure.intervals import Interval
from sdebench.registry import problem

CLAIM = claims.claim("recursive_likelihood_ratio")


@pytest.fixture(scope="module")
def evidence():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PROBLEMS", ("ddpm_chain", "brownian_linear"))
        patch.setattr(module, "BLOCKS", (0, 2))
        patch.setattr(module, "N_REPLICATES", 512)
        return CLAIM.experiment(0, lambda done, total: None)


def as_claimed(frame):
    """The evidence that the paper's statement needs."""
    frame = frame.copy()
    frame.loc[frame["kind"] == "bias", ["value", "low", "high"]] = 0.5
    frame.loc[frame["kind"] == "ratio", ["value", "low", "high"]] = 0.5
    return frame


def test_printed_coverage_is_refuted_and_corrected_is_not(evidence):
    """The harness finds the doubled last step on both problems."""
    checks = CLAIM.decide(evidence).checks
    outcomes = {check.quantity: check.outcome for check in checks}
    for where in ("ddpm_chain, N = 4", "brownian_linear, N = 20"):
        assert outcomes[f"{where}: bias, printed"] == "fails"
        assert outcomes[f"{where}: bias, corrected"] != "fails"
    assert CLAIM.decide(evidence).verdict == "refuted"
    assert all(axes.has_data() for axes in CLAIM.figure(evidence).axes)
    assert len(CLAIM.table(evidence)) == 2


def test_evidence_as_claimed_is_supported(evidence):
    assert CLAIM.decide(as_claimed(evidence)).verdict == "supported"


@pytest.mark.parametrize("kind", ["bias", "ratio"])
def test_each_part_can_refute(evidence, kind):
    frame = as_claimed(evidence)
    chosen = frame["kind"].eq(kind)
    if kind == "ratio":
        chosen &= frame["block"].eq(module.BLOCK)
        chosen &= frame["reference"].eq(module.HALF_ORDER)
    frame.loc[chosen, ["value", "low", "high"]] = 4.0
    assert CLAIM.decide(frame).verdict == "refuted"


def test_wide_intervals_decide_nothing(evidence):
    wide = evidence.assign(low=0.0, high=1e6)
    assert CLAIM.decide(wide).verdict == "undecided"


def test_the_exact_bias_is_the_share_of_the_last_step():
    chain = problem("ddpm_chain")
    policy = chain.truth.policy_chain(module.POINT, 4)
    gradient = policy.gradient(reward_only=True)
    last = policy.gradient(reward_only=True, step_weights=np.array([0.0, 0, 0, 1]))
    percent = 100.0 * np.linalg.norm(last) / np.linalg.norm(gradient)
    found = module.exact_bias(chain, module.PRINTED, 4)
    assert found == pytest.approx(percent, rel=1e-12)
    assert percent > 50.0
    assert module.exact_bias(chain, module.CORRECTED, 4) < 1e-10


# ---- comparisons on the same noise -------------------------------------------------
def test_the_ratio_of_variances_covers_at_its_level():
    """400 ratios at level 95 %; fewer than 90 % or more than 99 % have p < 1e-5."""
    rng = np.random.default_rng(0)
    hits, widths = 0, []
    for _ in range(400):
        common = rng.standard_normal((300, 2))
        top = 2.0 * common + 0.5 * rng.standard_normal((300, 2))
        found = variance_ratio(top, common, 0.95)
        hits += found.low < 4.25 < found.high
        widths.append(found.high / found.low)
    assert 0.90 <= hits / 400 <= 0.99
    assert np.mean(widths) < 1.2  # the common noise helps: unpaired it is 1.4


def test_values_have_the_moments_of_the_engine():
    """The same replicates by another route, for coupled and independent paths."""
    chain, names = problem("ddpm_chain"), ["pathwise", "rlr:block=0"]
    for name in names:
        values = replicate_values(chain, [name], "halfway", 4, 16, 3)[0]
        ((moments, n_paths),) = sample(chain, [name], "halfway", 4, 16, 3)
        np.testing.assert_allclose(values.mean(axis=0), moments.mean, rtol=1e-10)
        if n_paths > 1:
            trace = values.var(axis=0, ddof=1).sum()
            assert trace == pytest.approx(moments.trace, rel=1e-9)


def test_estimators_share_their_noise():
    values = replicate_values(
        problem("brownian_linear"),
        ["pathwise", "pathwise:sticking_the_landing=true"],
        "halfway",
        8,
        4,
        0,
    )
    np.testing.assert_allclose(values[0], values[1], rtol=1e-12)


def test_powers_and_quotients():
    small, large = Interval(2.0, 1.0, 4.0), Interval(8.0, 4.0, 16.0)
    assert quotient(large, small) == (4.0, 1.0, 16.0)
    assert power(small, large, 4.0) == pytest.approx((1.0, 0.0, 2.0))
