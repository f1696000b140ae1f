"""Variances by family: growth, tables, and small runs of both studies."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sdebench import registry, studies
from sdebench.studies import (
    _families,
    variance_and_dimension_families,
    variance_and_steps,
)


def no_progress(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def small():
    """Three step numbers and three dimensions with few paths; a family was slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_families, "LEAST", 16)
        patch.setattr(_families, "MOST", 16)
        patch.setattr(_families, "SLOW", dict.fromkeys(_families.SLOW, 16))
        patch.setattr(variance_and_steps, "LADDER", (4, 16))
        patch.setattr(variance_and_steps, "COST_STEPS", 16)
        patch.setattr(variance_and_steps, "PROBLEMS", ("gaussian_tilt",))
        patch.setattr(variance_and_dimension_families, "DIMENSIONS", (1, 2, 4))
        patch.setattr(variance_and_dimension_families, "REGRESSION_MOST", 2)
        patch.setattr(variance_and_dimension_families, "N_STEPS", 8)
        names = "variance_and_steps", "variance_and_dimension_families"
        found = {}
        for name in names:
            study = studies.study(name)
            evidence = study.experiment(0, no_progress)
            found[name] = evidence, study.table(evidence), study.summary(evidence)
            assert all(axes.has_data() for axes in study.figure(evidence).axes)
        return found


def test_every_family_is_an_estimator_of_something():
    for family, spec in _families.FAMILIES.items():
        assert registry.estimator(spec).label == spec
        assert _families.estimate_of(family)
    assert _families.estimate_of("RLR") == "−∇E r"
    assert _families.estimate_of("adjoint matching") == "lean adjoint"


@pytest.mark.parametrize("exponent", [-2.0, 0.0, 0.7])
def test_the_growth_of_a_power(exponent):
    sizes = np.array([4, 8, 16, 32, 64, 128, 256])
    value = np.where(sizes < 16, 1.0, sizes**exponent)
    rows = pd.DataFrame({"n_steps": sizes, "value": value})
    rows = rows.assign(low=0.9 * value, high=1.1 * value)
    found = _families.growth(rows, "n_steps")
    assert found is not None
    assert found.estimate == pytest.approx(exponent, abs=1e-12)
    assert found.low < exponent < found.high


def test_nothing_has_no_growth():
    rows = pd.DataFrame({"dim": [1, 2], "value": 0.0, "low": 0.0, "high": 0.0})
    assert _families.growth(rows, "dim") is None


@pytest.mark.slow
def test_tables_have_all_families(small):
    for evidence, table, sentence in small.values():
        assert len(table) == len(_families.FAMILIES)
        assert set(evidence["kind"]) == {"variance", "cost"}
        assert sentence.endswith(".")
    _, table, _ = small["variance_and_dimension_families"]
    by_name = table.set_index("estimator")
    assert by_name.loc["time-reversed BSDE", "halfway, d = 4"] == "–"
    assert by_name.loc["pathwise", "halfway, d = 4"] != "–"
    distilled = by_name.loc["on-policy distillation"]
    assert distilled["optimum, d = 4"] == "0 (exact)"


def test_costs_are_those_of_the_steps(small):
    """16 steps: one drift each; full adjoint: drift, control and parameter."""
    evidence, _, _ = small["variance_and_steps"]
    cost = evidence[evidence["kind"] == "cost"].set_index("family")
    assert cost.loc["pathwise", "drift"] == 16
    assert cost.loc["pathwise", "derivatives"] == 48
    assert cost.loc["adjoint matching", "derivatives"] == 32
    assert cost.loc["zeroth order", "drift"] == 32
    assert (cost["reward"] >= 1).all()


def test_variances_are_relative_to_the_gradient():
    """One linear step: the variance of REINFORCE is known, that of pathwise is zero.

    Joint level 99.9 %, one seed; relative to |grad J| and not to its square it would
    be outside.
    """
    line = registry.problem("brownian_linear", dim=3)
    families = {"plain": "reinforce:baseline=none", "path": "pathwise"}
    rows = list(_families.variances(line, 1, 0.9995, 4, families))
    plain, path = (r for r in rows if r["point"] == "halfway")
    square = float(np.sum(line.truth.gradient("halfway") ** 2))
    assert square != pytest.approx(1.0, rel=0.3)
    rng = np.random.default_rng(0)
    values = _one_step_rows(line, rng.standard_normal((400_000, 3)))
    trace = values.var(axis=0).sum() / square
    assert plain["low"] < trace < plain["high"]
    assert path["high"] == pytest.approx(0.0, abs=1e-20)


def _one_step_rows(line, z):
    """Rows of the likelihood ratio of one step from the tables, in numpy."""
    tables = line.tables(line.theta("halfway"), line.time_grid(1))
    w = tables.bias[0]
    slope = np.einsum("psn,sni->pi", tables.basis, tables.feature_bias)
    x = tables.start_mean + tables.offset[0] + (w + z) @ tables.noise[0].T
    cost = 0.5 * w @ w - x @ tables.reward_linear - tables.reward_constant
    return cost[:, None] * (z @ slope.T) + slope @ w
