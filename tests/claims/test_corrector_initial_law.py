"""The claim about a corrector's initial law: quadrature, planted evidence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sdebench import claims
from sdebench.claims import corrector_initial_law as module

CLAIM = claims.claim("corrector_initial_law")


# ---- the exact answers -----------------------------------------------------------
@pytest.mark.parametrize("start", module.STARTS)
@pytest.mark.parametrize("power", [0.4, 0.8])
def test_one_step_by_quadrature_over_start_and_noise(power, start):
    """E W and E W X of one step of slow noising: the formula holds at every K."""
    rate = 0.8
    points, mass = np.polynomial.hermite_e.hermegauss(150)
    mass = mass / mass.sum()
    path = module.path_of(power, rate)
    x = path.start_scale(module.LAWS[start]) * points
    x, z = (part.reshape(-1, 1) for part in np.meshgrid(x, points, indexing="ij"))
    found = module.Corrector(path, threshold=None).run(x, z[None])
    weights, ends = np.exp(found.log_weights), found.states[:, 0]
    weights = np.outer(mass, mass).ravel() * weights
    answers = module.exact_answers(power, rate, start)
    assert weights.sum() / answers.normalizer == pytest.approx(answers.ratio, rel=1e-6)
    assert weights @ ends / weights.sum() == pytest.approx(answers.mean, abs=1e-6)


@pytest.mark.parametrize("power", module.POWERS)
def test_a_process_that_forgets_its_start(power):
    wrong = module.exact_answers(power, 30.0, "wrong")
    assert wrong.ratio == pytest.approx(module.memoryless_ratio(power), rel=1e-6)
    assert wrong.mean == pytest.approx(wrong.target, abs=1e-6)
    right = module.exact_answers(power, 1.0, "right")
    assert right.ratio == pytest.approx(1.0, abs=1e-12)
    assert right.mean == pytest.approx(right.target, abs=1e-12)
    slow = module.exact_answers(power, 1.0, "wrong")
    assert abs(slow.mean - slow.target) > 1e-3


def test_weights_of_gaussian_data_without_annealing(monkeypatch):
    """gamma = 1 and data N(0, 1): every kernel ratio is close to that of the ends."""
    monkeypatch.setattr(module, "MEANS", np.zeros(2))
    monkeypatch.setattr(module, "VARIANCES", np.ones(2))
    rng = np.random.default_rng(1)
    x, z = rng.standard_normal((500, 1)), rng.standard_normal((400, 500, 1))
    path = module.path_of(1.0, 2.0)
    logs = module.Corrector(path, threshold=None).run(x, z).log_weights
    assert logs.std() < 0.15
    assert abs(np.exp(logs).mean() - 1.0) < 5.0 * logs.std() / np.sqrt(500)


# ---- decisions that can change -----------------------------------------------------
@pytest.fixture(scope="module")
def evidence():
    """A small experiment, its intervals a fifth as wide and at the exact values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "N_PATHS", 1 << 15)
        frame = CLAIM.experiment(2, lambda done, total: None)
    share = frame["quantity"] == "effective share"
    centre = frame["exact"].where(~share, frame["value"])
    reach = 0.2 * (frame["high"] - frame["value"])
    return frame.assign(
        measured=frame["value"],
        reach=frame["high"] - frame["value"],
        value=centre,
        low=centre - reach,
        high=centre + reach,
    )


def test_simulated_numbers_hold_the_exact_ones(evidence):
    """All 24 at the joint level of 99.9 %."""
    known = evidence[evidence["exact"].notna()]
    assert len(known) == 24
    assert np.all(np.abs(known["measured"] - known["exact"]) < known["reach"])


def test_exact_evidence_is_supported(evidence):
    assert CLAIM.decide(evidence).verdict == "supported"


def _moved(frame, chosen, shift):
    frame = frame.copy()
    frame.loc[chosen, ["value", "low", "high"]] += shift
    return frame


def _right_is_biased(frame):
    chosen = frame["quantity"].eq("mean weight") & frame["start"].eq("right")
    return _moved(frame, chosen, 8.0)


def _wrong_is_unbiased(frame):
    chosen = frame["quantity"].eq("mean weight") & frame["start"].eq("wrong")
    frame = frame.copy()
    for name in ("value", "low", "high"):
        frame.loc[chosen, name] -= frame.loc[chosen, "exact"] - 100.0
    return frame


def _law_is_wrong(frame):
    return _moved(frame, frame["quantity"] == "mean", 0.1)


def _weights_tell(frame):
    chosen = frame["quantity"].eq("effective share") & frame["start"].eq("wrong")
    return _moved(frame, chosen, -0.3)


@pytest.mark.parametrize(
    "turn", [_right_is_biased, _wrong_is_unbiased, _law_is_wrong, _weights_tell]
)
def test_reversed_evidence_is_refuted(evidence, turn):
    assert CLAIM.decide(turn(evidence)).verdict == "refuted"


def test_wide_intervals_decide_nothing(evidence):
    wide = evidence.assign(low=-1e3, high=1e3)
    assert CLAIM.decide(wide).verdict == "undecided"


def test_text_table_and_figure(evidence):
    table = CLAIM.table(evidence)
    assert isinstance(table, pd.DataFrame)
    assert len(table) == 12
    assert list(table["exact"][table["initial law"] == "N(0, 1/γ)"]) == ["0.00"] * 6
    assert "24.99" in list(table["exact"])
    assert "γ = 0.4" in CLAIM.summary(evidence)
    assert all(axes.has_data() for axes in CLAIM.figure(evidence).axes)
