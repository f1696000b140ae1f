"""Mode weights of forty modes: the exact law against paths, and what is not seen.

Intervals hold jointly with probability 99.9 %; seeds are fixed.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdebench import studies
from sdebench.experiments.experiment import interval_of, records
from sdebench.studies import mode_weights as module

STUDY = studies.study("mode_weights")


@pytest.fixture(scope="module")
def evidence():
    """Fewer paths, and 128 steps instead of 16 for the comparison."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", (8, 128))
        patch.setattr(module, "N_BLOCKS", {2: 2, 50: 1})
        patch.setattr(module, "BLOCK", 1 << 11)
        yield STUDY.experiment(0, lambda done, total: None)


def test_simulated_paths_have_the_exact_weights(evidence):
    """With 128 steps the discretization is far inside the intervals."""
    laws = evidence[evidence["route"] == module.EXACT].set_index(["dim", "of"])["value"]
    fine = evidence[evidence["n_steps"].eq(128) & evidence["route"].eq(module.PATHS)]
    for row in records(fine):
        _, low, high = interval_of(row)
        assert low - 1.0 <= laws[row.dim, row.of] <= high + 1.0
        assert high - low < 31.0  # 2048 paths: nothing else would be seen
    assert laws[2, "optimum"] == pytest.approx(0.0, abs=1e-9)
    assert laws[2, "zero"] > 60.0


def test_importance_sampling_finds_the_target_where_it_has_paths(evidence):
    weighted = evidence[evidence["route"] == module.IMPORTANCE].set_index(
        ["dim", "n_steps", "of"]
    )
    base = weighted.loc[(2, 128, "base (u = 0)")]
    assert base["effective"] > module.SEEN
    assert base["low"] == 0.0  # the target is inside
    assert base["kept"] >= 36
    lost = weighted.loc[(50, 128, "base (u = 0)")]
    assert lost["effective"] < 0.01
    assert lost["kept"] < 10


def test_numbers_without_an_interval_say_so(evidence):
    table = STUDY.table(evidence)
    unseen = table["effective"].ne("–") & evidence["effective"].lt(module.SEEN)
    assert unseen.any()
    assert table["total variation"][unseen].str.contains("no interval").all()
    assert not table["total variation"][~unseen].str.contains("no interval").any()
    assert "importance sampling" in STUDY.summary(evidence)
    assert all(axes.has_data() for axes in STUDY.figure(evidence).axes)


def test_log_weights_are_those_of_the_target():
    """Under u* the weights are nearly constant: e^(-V_0) = 1, log Z = 0."""
    problem = module.problems()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 512)
        _, logs = module.sample(problem, "optimum", 256, 0)
    assert np.std(logs) < 0.5
    assert abs(np.mean(logs)) < 0.1
