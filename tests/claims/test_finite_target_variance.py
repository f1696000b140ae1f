"""The claim on finite gradient noise: a small run, and planted evidence."""

from __future__ import annotations

import numpy as np
import pytest

from sdebench import claims
from sdebench.claims import finite_target_variance as module
from sdebench.closed_form.lean_adjoint_noise import lean_adjoint_noise
from sdebench.experiments import target_noise

CLAIM = claims.claim("finite_target_variance")


@pytest.fixture(scope="module")
def evidence():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "N_REPLICATES", 160)
        patch.setattr(target_noise, "N_SAMPLES", 160)
        patch.setattr(module, "LADDER", (25, 50, 100, 200))
        patch.setattr(module, "SIMULATED", 25)
        patch.setattr(module, "SHRINKS", 0.8)
        yield CLAIM.experiment(6, lambda done, total: None)


def test_a_small_experiment_is_supported(evidence):
    """False alarms have the probability 0.1 %; before N = 400 the ladder is steeper."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHRINKS", 0.8)
        decision = CLAIM.decide(evidence)
    assert decision.verdict == "supported", [
        c for c in decision.checks if c.outcome != "holds"
    ]
    assert "gaps in logarithmic Sobolev" in decision.sentence


def _set(frame, kind, value):
    frame = frame.copy()
    frame.loc[frame["kind"] == kind, ["value", "low", "high"]] = value
    return frame


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("growth", 0.0),
        ("power", -1.0),
        ("factor", 50.0),
        ("constant", 200.0),
        ("outer", 30.0),
        ("increment", 1.1),
        ("simulated", 10.0),
    ],
)
def test_other_numbers_refute(evidence, kind, value):
    assert CLAIM.decide(_set(evidence, kind, value)).verdict == "refuted"


def test_wide_intervals_decide_nothing(evidence):
    measured = evidence["low"] < evidence["high"]
    wide = evidence.assign(
        low=evidence["low"].where(~measured, -1e9),
        high=evidence["high"].where(~measured, 1e9),
    )
    wide = wide[wide["kind"] != "increment"]
    assert CLAIM.decide(wide).verdict == "undecided"


def test_the_figure_and_the_table(evidence):
    assert all(axes.has_data() for axes in CLAIM.figure(evidence).axes)
    table = CLAIM.table(evidence).set_index(["tilted law", "target"])
    assert table.loc[("Gaussian", "CSM"), "all ρ"] == "∞"
    assert table.loc[("Gaussian", "best affine"), "VP"] == "0 (exact)"


def test_schedules_agree_and_are_exact(evidence):
    """Joint level 99.9 %: every measured sum holds the exact one."""
    sums = evidence[evidence["kind"].isin(["sum", "inner sum"])]
    sums = sums[sums["high"] > sums["low"]]
    assert (sums["low"] <= sums["exact"]).all()
    assert (sums["exact"] <= sums["high"]).all()
    assert len(sums) == 2 * 3 * 2 * 5 - 2 * 3


def test_path_noise_is_that_of_the_chain(monkeypatch):
    """On modes close together, 16 replicates: within 5 standard errors."""
    problem = module.registry.problem("two_modes", distance=1.0)
    monkeypatch.setattr(module.registry, "problem", lambda name: problem)
    monkeypatch.setattr(module, "SIMULATED", 20)
    found = np.array([module.path_noise(r, 3)["noise"] for r in range(16)])
    grid = problem.time_grid(20)
    exact = lean_adjoint_noise(problem.tables(problem.theta("optimum"), grid)).value
    assert abs(found.mean() - exact) < 5.0 * found.std(ddof=1) / 4.0
