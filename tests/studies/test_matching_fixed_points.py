"""The study of fixed points: a small run, and a mutation that it shows."""

from __future__ import annotations

import numpy as np
import pytest

from sdebench import registry, studies
from sdebench.studies import matching_fixed_points as module

STUDY = studies.study("matching_fixed_points")
FEW = ("adjoint matching", "CSM", "CSM, own samples", "reinforce adjoint matching")


@pytest.fixture(scope="module")
def evidence():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LADDER", (40, 80, 160))
        patch.setattr(module, "N_REPLICATES", 32)
        patch.setattr(module, "METHODS", {k: module.METHODS[k] for k in FEW})
        yield STUDY.experiment(3, lambda done, total: None)


def test_methods_stop_at_the_tilt_beside_it_or_anywhere(evidence):
    found = evidence.set_index("method")
    for name in ("adjoint matching", "CSM"):
        row = found.loc[name]
        stops = [row["theta_1"], row["theta_2"]]
        np.testing.assert_allclose(stops, 1.0, atol=0.02)
        np.testing.assert_allclose([row["mean"], row["variance"]], 1 / 3, atol=5e-3)
    beside = found.loc["reinforce adjoint matching"]
    assert beside["theta_1"] == pytest.approx(0.853, abs=0.01)
    assert beside["theta_2"] == pytest.approx(0.891, abs=0.01)
    assert (found.loc[["CSM, own samples"], "limit"] < 5e-3).all()


def test_simulations_agree_with_the_exact_means(evidence):
    """Joint level 99.9 %: no interval of a distance excludes zero."""
    assert (evidence["low"] == 0.0).all()


def test_the_figure_and_the_table(evidence, monkeypatch):
    monkeypatch.setattr(module, "LADDER", (40, 80, 160))
    assert STUDY.figure(evidence).axes[0].has_data()
    assert len(STUDY.table(evidence)) == 6
    assert "2 of 3 methods stop at the tilt" in STUDY.summary(evidence)


def test_extrapolation():
    values = [3.0 + 2.0 / n - 5.0 / n**2 for n in (10, 20, 40)]
    assert module.extrapolated(np.array(values)) == pytest.approx(3.0)


def test_a_shifted_mean_stops_elsewhere(monkeypatch):
    """A mutation of the exact mean: the root moves."""
    problem = module.build()
    estimator = registry.estimator("score_matching:labels=conditional")
    right = module.stop(problem, estimator, 80)
    kept = module.mean_gradient

    def shifted(problem, estimator, theta, n_steps):
        return kept(problem, estimator, theta, n_steps) + np.array([0.01, 0.0])

    monkeypatch.setattr(module, "mean_gradient", shifted)
    assert np.max(np.abs(module.stop(problem, estimator, 80) - right)) > 0.01
