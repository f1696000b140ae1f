"""The claim about truncated backpropagation: its exact means, decisions, small runs.

Intervals hold jointly with probability 99.9 %; seeds are fixed.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdebench import claims
from sdebench.claims import truncated_backpropagation as module
from sdebench.experiments.measuring import sample
from sdebench.registry import problem

CLAIM = claims.claim("truncated_backpropagation")


@pytest.fixture(scope="module")
def evidence():
    """Simulated with few paths, and the intervals set to what many would give."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "N_REPLICATES", 16)
        frame = CLAIM.experiment(0, lambda done, total: None)
    simulated = frame["kind"] == "simulated"
    value = frame["exact"].where(frame["against"] == module.GRADIENT, 0.0)
    frame.loc[simulated, "value"] = value[simulated]
    frame.loc[simulated, "low"] = np.maximum(value - 0.5, 0.0)[simulated]
    frame.loc[simulated, "high"] = (value + 0.5)[simulated]
    return frame


def rows(frame, estimator, against=module.GRADIENT):
    return frame["estimator"].eq(estimator) & frame["against"].eq(against)


def set_to(frame, chosen, value):
    frame = frame.copy()
    frame.loc[chosen, ["value", "low", "high"]] = value
    return frame


def test_true_evidence_is_supported(evidence):
    assert CLAIM.decide(evidence).verdict == "supported"
    assert all(axes.has_data() for axes in CLAIM.figure(evidence).axes)


def _roulette_biased(frame):
    return set_to(frame, rows(frame, module.ROULETTE), 5.0)


def _roulette_biased_exactly(frame):
    return frame.assign(exact=frame["exact"] + 1e-3)


def _alignprop_unbiased(frame):
    return set_to(frame, rows(frame, "truncated:method=alignprop"), 0.1)


def _half_the_steps_are_enough(frame):
    return set_to(frame, rows(frame, "truncated:n_last=25"), 0.1)


def _refl_unbiased(frame):
    chosen = frame["estimator"].eq("truncated:method=refl")
    return frame.assign(exact=frame["exact"].mask(chosen, 0.0))


def _another_mean(frame):
    return set_to(frame, rows(frame, "truncated:n_last=5", module.OWN), 3.0)


@pytest.mark.parametrize(
    "turn",
    [
        _roulette_biased,
        _roulette_biased_exactly,
        _alignprop_unbiased,
        _half_the_steps_are_enough,
        _refl_unbiased,
        _another_mean,
    ],
)
def test_reversed_evidence_is_refuted(evidence, turn):
    assert CLAIM.decide(turn(evidence)).verdict == "refuted"


def test_wide_intervals_decide_nothing(evidence):
    wide = evidence.assign(low=0.0, high=1e6)
    assert CLAIM.decide(wide).verdict == "undecided"


def test_one_step_of_backpropagation_by_finite_differences():
    """The last step's share: the control of that step alone is moved."""
    chain = problem("ddpm_chain", n_steps=5)
    policy = chain.truth.policy_chain(module.POINT, 5)
    step = 1e-5
    shares = []
    for i in range(chain.n_params):
        costs = []
        for sign in (1.0, -1.0):
            gain, bias = policy.gain.copy(), policy.bias.copy()
            gain[-1] += sign * step * policy.gain_derivative[i, -1]
            bias[-1] += sign * step * policy.bias_derivative[i, -1]
            costs.append(policy.chain.reward_only_objective(gain, bias))
        shares.append((costs[0] - costs[1]) / (2.0 * step))
    found = module.exact_mean(chain, "truncated", 5)
    np.testing.assert_allclose(found, shares, rtol=1e-7)
    gradient = policy.gradient(reward_only=True)
    percent = 100.0 * np.linalg.norm(shares - gradient) / np.linalg.norm(gradient)
    assert module.exact_bias(chain, "truncated", 5) == pytest.approx(percent, rel=1e-6)


def test_the_whole_length_is_unbiased():
    tilt = problem("gaussian_tilt")
    assert module.exact_bias(tilt, module.draft(20), 20) < 1e-10
    assert module.exact_bias(tilt, module.ROULETTE, 20) < 1e-10
    assert module.exact_bias(tilt, module.draft(19), 20) > 1e-3


def _small(monkeypatch, roulette=module.ROULETTE):
    monkeypatch.setattr(module, "PROBLEMS", ("ou_quadratic_easy:dim=1",))
    monkeypatch.setattr(module, "N_REPLICATES", 256)
    monkeypatch.setattr(module, "MARGIN", 12.0)
    monkeypatch.setattr(module, "SHARES", (0.02, 0.5))
    monkeypatch.setattr(module, "sample", _sample_with(roulette))
    steps = []
    found = CLAIM.experiment(1, lambda *done: steps.append(done))
    assert steps[-1][0] == steps[-1][1]
    return CLAIM.decide(found).verdict


def _sample_with(roulette):
    def sampled(built, names, *arguments):
        names = [roulette if name == module.ROULETTE else name for name in names]
        return sample(built, names, *arguments)

    return sampled


def test_a_small_experiment_is_supported(monkeypatch):
    assert _small(monkeypatch) == "supported"


def test_a_roulette_without_weights_is_found(monkeypatch):
    """A mutation: the simulated roulette is AlignProp, its exact mean stays."""
    assert _small(monkeypatch, "truncated:method=alignprop") == "refuted"


def test_names():
    assert module.name_of("truncated") == "DRaFT-1"
    assert module.name_of(module.draft(12)) == "DRaFT-12"
    assert module.name_of(module.ROULETTE) == "Russian roulette"
