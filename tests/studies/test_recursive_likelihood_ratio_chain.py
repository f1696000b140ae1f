"""RLR on four steps: quadrature by another route, and a small run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sdebench import studies
from sdebench.measure.intervals import Interval
from sdebench.registry import estimator
from sdebench.studies import recursive_likelihood_ratio_chain as module
from sdebench.studies._study import INSIDE, agreement

STUDY = studies.study("recursive_likelihood_ratio_chain")


def no_progress(done: int, total: int) -> None:
    pass


def test_the_gradient_by_hand():
    """d/da of a^8 x^2 + sigma^2 sum a^(2k), by finite differences."""

    def mean(a):
        return a**8 * 1.2**2 + 0.49 * np.sum(a ** np.arange(0.0, 8.0, 2.0))

    exact = (mean(0.9 + 1e-6) - mean(0.9 - 1e-6)) / 2e-6
    for name, case in module.CASES.items():
        found, _ = module.exact_moments(case)
        if name != "RLR as printed":
            assert found == pytest.approx(exact, rel=1e-8), name
    printed, _ = module.exact_moments(module.CASES["RLR as printed"])
    last_share = 2.0 * (mean_square(3) * 0.9)  # E 2 x_4 x_3
    assert printed == pytest.approx(exact + last_share, rel=1e-8)


def mean_square(n):
    return 0.9 ** (2 * n) * 1.2**2 + 0.49 * np.sum(0.9 ** (2.0 * np.arange(n)))


def test_more_nodes_change_nothing(monkeypatch):
    found = [module.exact_moments(case) for case in module.CASES.values()]
    monkeypatch.setattr(module, "N_NODES", 8)
    more = [module.exact_moments(case) for case in module.CASES.values()]
    np.testing.assert_allclose(found, more, rtol=1e-11)


def test_every_estimator_is_known():
    for case in module.CASES.values():
        assert estimator(case.estimator).estimand == "reward_only_gradient"


def _small(monkeypatch):
    monkeypatch.setattr(module, "N_REPLICATES", 1 << 10)
    return STUDY.experiment(2, no_progress)


def test_simulated_numbers_hold_the_exact_ones(monkeypatch):
    """Joint level 99.9 %, one seed; the figure and the texts are drawn."""
    evidence = _small(monkeypatch)
    keyed = evidence.set_index(["case", "what", "simulated"]).sort_index()
    for case, what, simulated in keyed.index:
        if simulated:
            truth = keyed.loc[(case, what, False), "value"]
            row = keyed.loc[(case, what, True)]
            assert row["low"] < truth < row["high"], (case, what)
    assert STUDY.figure(evidence).axes[0].has_data()
    assert "13.109" in STUDY.summary(evidence)
    assert len(STUDY.table(evidence)) == len(evidence) == 22


def test_a_wrong_index_set_is_seen(monkeypatch):
    """A mutation: RLR simulated as printed under the corrected one's name."""
    name = "RLR, steps 2 and 3 in the block"
    options = "block=2,start=1,coverage=printed"
    changed = dataclasses.replace(module.CASES[name], options=options)
    monkeypatch.setitem(module.CASES, name, changed)
    evidence = _small(monkeypatch)
    rows = evidence[evidence["case"].eq(name) & evidence["simulated"]]
    row = rows[rows["what"] == "mean"].iloc[0]
    ours = Interval(row["value"], row["low"], row["high"])
    assert agreement(row["printed"], ours) != INSIDE
