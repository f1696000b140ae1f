"""The study of the cost of log Z: a small run, its table and its figure."""

from __future__ import annotations

import pytest

from sdebench import registry, studies
from sdebench.experiments import normalizers
from sdebench.studies import log_normalizer_cost as module

STUDY = studies.study("log_normalizer_cost")
PROBLEMS = ("brownian_linear", "gaussian_tilt", "forty_modes")
ESTIMATORS = (
    "crooks",
    "jarzynski",
    "path_importance_sampling",
    "path_importance_sampling:proposal=optimal",
)


@pytest.fixture(scope="module")
def evidence():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalizers, "WORK", 1 << 18)
        patch.setattr(normalizers, "FACTORS", (0.25, 0.5))
        patch.setattr(
            normalizers,
            "problems",
            lambda most: [registry.problem(p) for p in PROBLEMS],
        )
        patch.setattr(
            normalizers,
            "estimators",
            lambda: [registry.estimator(e) for e in ESTIMATORS],
        )
        yield STUDY.experiment(2, lambda done, total: None)


def test_small_run(evidence):
    rows = evidence.set_index(["problem", "estimator", "of"]).sort_index()
    assert set(rows.loc["forty_modes", "crooks"]["outcome"]) == {module.REFUSED}
    # log Z = 0: no relative error of it
    assert set(rows.loc["forty_modes"].reset_index()["of"]) == {module.OF_Z}
    biased = rows.loc["gaussian_tilt", "jarzynski", module.OF_Z]
    assert biased["outcome"] == module.BIASED
    assert biased["bias"] == pytest.approx(-0.0258, abs=1e-3)
    free = rows.loc["gaussian_tilt", "crooks", module.OF_Z]
    assert free["outcome"] == module.REACHED
    # without bias the cost goes with the inverse square of the error
    other = rows.loc["brownian_linear", "path_importance_sampling"]
    ratio = other["path_steps"][module.OF_LOG_Z] / other["path_steps"][module.OF_Z]
    assert ratio == pytest.approx(0.5**-2)
    best = rows.loc["brownian_linear", ESTIMATORS[-1], module.OF_Z]
    assert best["oracle"]
    assert best["path_steps"] == best["n_steps"]


def test_table_summary_and_figure(evidence):
    table = STUDY.table(evidence)
    assert len(table) == 5
    assert list(table.columns[2:]) == list(ESTIMATORS)
    first = table[table["problem"] == "gaussian_tilt"].iloc[0]
    assert first["jarzynski"] == "bias −2.6 %"
    assert first["crooks"].endswith(" s")
    assert table["crooks"].iloc[-1] == "–"
    assert set(table["crooks"][table["problem"] == "brownian_linear"]) == {"–"}
    text = STUDY.summary(evidence)
    assert "stop at their bias" in text
    assert "proposal=optimal" not in text
    assert all(axes.has_data() for axes in STUDY.figure(evidence).axes)
