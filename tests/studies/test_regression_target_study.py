"""The study of regression targets: a small run, and a mutation that it shows."""

from __future__ import annotations

import numpy as np
import pytest

from sdebench import studies
from sdebench.closed_form import regression_targets as closed_form
from sdebench.experiments import target_noise
from sdebench.studies import regression_targets as module

STUDY = studies.study("regression_targets")


def run(monkeypatch):
    monkeypatch.setattr(module, "N_REPLICATES", 64)
    monkeypatch.setattr(module, "N_DOT", 1 << 13)
    monkeypatch.setattr(target_noise, "N_SAMPLES", 64)
    return STUDY.experiment(4, lambda done, total: None)


def hold(evidence):
    return (evidence["low"] <= evidence["exact"]) & (
        evidence["exact"] <= evidence["high"]
    )


@pytest.mark.slow
def test_measured_numbers_hold_the_exact_ones(monkeypatch):
    """Joint level 99.9 %, one seed; conditional variances, integrals and rates."""
    evidence = run(monkeypatch)
    assert hold(evidence).all(), evidence[~hold(evidence)]
    assert len(STUDY.table(evidence)) == 30
    assert "42 of 42" in STUDY.summary(evidence)
    assert all(axes.has_data() for axes in STUDY.figure(evidence).axes)
    infinite = STUDY.table(evidence)["theory, all times"].str.startswith("infinite")
    assert set(STUDY.table(evidence)[infinite]["target"]) == {"CSM", "TSM"}


def test_labels_with_a_wrong_share_are_seen(monkeypatch):
    """A mutation of the sampled labels only: half of the precision m."""
    right = closed_form._share

    class Wrong(closed_form.RegressionTargets):
        def squared_errors(self, targets, *given):
            monkeypatch.setattr(closed_form, "_share", lambda m, rho: right(m / 2, rho))
            found = super().squared_errors(targets, *given)
            monkeypatch.setattr(closed_form, "_share", right)
            return found

    def laws():
        kept = target_noise.laws()
        return {k: Wrong(v.law, v.base_variance) for k, v in kept.items()}

    monkeypatch.setattr(module, "laws", laws)
    evidence = run(monkeypatch)
    wrong = evidence["target"].isin(["novel", "adjoint", "affine"])
    whole = evidence["kind"] == "integral"
    assert not hold(evidence)[wrong & whole].any()
    assert hold(evidence)[~wrong].all()


@pytest.mark.parametrize("name", target_noise.schedules())
def test_times_of_rho(name):
    noising = target_noise.Noising(target_noise.schedules()[name])
    for rho in (0.02, 1.0, 50.0):
        alpha, beta = noising.at(noising.time(rho))
        assert alpha / beta == pytest.approx(rho, rel=1e-8)


def test_uniform_times_on_the_linear_flow_have_finite_noise_at_the_data():
    """The remark on other densities of times: int eta^2 E Tr Cov dt converges."""
    base = target_noise.schedules()["linear flow"]
    targets = target_noise.laws()["two modes"]
    noising = target_noise.Noising(base)
    times = 1.0 - np.geomspace(1e-1, 1e-6, 11)
    found = [
        0.25
        * base.sigma(t) ** 4
        * targets.conditional_variance("conditional", *noising.at(t)).value
        for t in times
    ]
    assert found[-1] == pytest.approx(1.0, rel=1e-3)  # d, and no pole
