"""The claim on reinforce adjoint matching: a small run, and planted evidence."""

from __future__ import annotations

import numpy as np
import pytest

from sdebench import claims
from sdebench.claims import reinforce_adjoint_matching as module
from sdebench.closed_form.reinforce_adjoint import ReinforceAdjoint

CLAIM = claims.claim("reinforce_adjoint_matching")


@pytest.fixture(scope="module")
def evidence():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CURVATURES", (0.5, 1.0))
        patch.setattr(module, "N_SAMPLES", 1 << 12)
        patch.setattr(module, "N_ROUNDS", 24)
        patch.setattr(module, "N_SETTLED", 12)
        yield CLAIM.experiment(2, lambda done, total: None)


def test_a_small_experiment_is_supported(evidence):
    """False alarms have the probability 0.1 %."""
    assert CLAIM.decide(evidence).verdict == "supported"


def test_a_method_that_reaches_the_tilt_refutes(evidence):
    settled = evidence["kind"] == "settled"
    reached = evidence.copy()
    for name in ("value", "low", "high"):
        reached.loc[settled, name] = reached.loc[settled, "tilt"]
    assert CLAIM.decide(reached).verdict == "refuted"


@pytest.mark.parametrize(("kind", "value"), [("moved", 0.3), ("linear", 0.01)])
def test_other_numbers_refute(evidence, kind, value):
    changed = evidence.copy()
    changed.loc[changed["kind"] == kind, ["value", "low", "high"]] = value
    assert CLAIM.decide(changed).verdict == "refuted"


def test_wide_intervals_decide_nothing(evidence):
    measured = evidence["kind"].isin(["settled", "moved"])
    wide = evidence.assign(
        low=evidence["low"].where(~measured, 0.0),
        high=evidence["high"].where(~measured, 9.0),
    )
    assert CLAIM.decide(wide).verdict == "undecided"


def test_one_round_is_the_map_and_half_the_reward_is_not():
    """A mutation of the labels; five standard errors of 32 runs."""
    rng = np.random.default_rng(1)
    right = module.next_variance
    runs = [right(np.full(32, 0.7), 0.5 * 1.0, rng) for _ in range(8)]
    answer = ReinforceAdjoint(curvature=1.0).step(0.0, 0.7)[1]
    values = np.mean(runs, axis=0)
    error = values.std(ddof=1) / np.sqrt(32)
    assert abs(values.mean() - answer) > 10.0 * error
    runs = [right(np.full(32, 0.7), 1.0, rng) for _ in range(8)]
    values = np.mean(runs, axis=0)
    assert abs(values.mean() - answer) < 5.0 * values.std(ddof=1) / np.sqrt(32)


def test_the_figure_and_the_table(evidence):
    assert all(axes.has_data() for axes in CLAIM.figure(evidence).axes)
    table = CLAIM.table(evidence).set_index("k")
    assert table.loc["1", "W(k)/k"] == "0.5671"
    assert "0.5671" in CLAIM.summary(evidence)
