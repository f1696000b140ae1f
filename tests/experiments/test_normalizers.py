"""Cost of an error of log Z: the arithmetic, and variances that are known."""

from __future__ import annotations

import math

import pytest

from sdebench import registry
from sdebench.experiments import normalizers as module
from sdebench.experiments.experiment import exact
from sdebench.experiments.normalizers import Measured
from sdebench.measure.intervals import Interval

ERROR = 0.01


def rung(n_steps, bias, variance, effective=1.0):
    bias = bias if isinstance(bias, Interval) else exact(bias)
    return Measured(n_steps, bias, variance, 1e-7, effective)


# ---- from bias and variance to a cost ------------------------------------------------
def test_cost_without_bias_and_with_one():
    found = module.cost([rung(20, 0.0, 0.5)], ERROR)
    assert found.outcome == module.REACHED
    assert found.path_steps == pytest.approx(0.5 / 1e-4 * 20)
    assert found.seconds == pytest.approx(1e-7 * found.path_steps)
    biased = module.cost([rung(20, -0.006, 0.5)], ERROR)
    assert biased.path_steps == pytest.approx(0.5 / (1e-4 - 3.6e-5) * 20)


def test_the_cheapest_number_of_steps_counts():
    rungs = [rung(10, 0.02, 0.1), rung(20, 0.0099, 0.1), rung(40, 0.005, 0.1)]
    found = module.cost(rungs, ERROR)
    assert (found.outcome, found.n_steps) == (module.REACHED, 40)
    assert module.cost([rung(10, 0.0, 0.1), rung(20, 0.0, 0.1)], ERROR).n_steps == 10


def test_biased_at_every_number_of_steps():
    rungs = [rung(10, 0.06, 0.1), rung(20, Interval(0.03, 0.02, 0.04), 0.1)]
    found = module.cost(rungs, ERROR)
    assert (found.outcome, found.bias, found.n_steps) == (module.BIASED, 0.03, 20)
    assert math.isinf(found.path_steps)
    # more of an error is allowed
    assert module.cost(rungs, 0.05).outcome == module.REACHED


def test_what_is_not_resolved_is_a_lower_bound():
    wide = rung(10, Interval(0.004, -0.02, 0.02), 0.1)
    found = module.cost([wide], ERROR)
    assert found.outcome == module.AT_LEAST
    assert found.path_steps == pytest.approx(0.1 / 1e-4 * 10)
    few = module.cost([rung(10, 0.0, 0.1, effective=0.1)], ERROR)
    assert few.outcome == module.UNSEEN
    told = module.cost([rung(10, Interval(0.004, 0.001, 0.007), 0.1)], ERROR)
    assert told.path_steps == pytest.approx(0.1 / (1e-4 - 1.6e-5) * 10)
    # a sure number of steps is taken before a cheaper one that is not
    sure = rung(40, 0.0, 0.5)
    assert module.cost([wide, sure], ERROR).n_steps == 40


def test_no_variance_costs_a_path():
    assert module.cost([rung(7, 0.0, 0.0)], ERROR).path_steps == 7.0


# ---- what is measured ----------------------------------------------------------------
def test_every_estimator_of_log_z_takes_part():
    found = module.estimators()
    names = {
        name
        for name in registry.estimator_names()
        if registry.estimator(name).estimand == "log_normalizer"
    }
    assert {estimator.name for estimator in found} == names
    sampled = [e.control for e in found if e.name == "path_importance_sampling"]
    assert sorted(sampled) == ["none", "optimal", "theta"]


def test_problems_start_where_work_needs_them_to():
    found = {problem.name: problem for problem in module.problems(2048)}
    assert found["two_modes"].start == "marginal"
    assert "manufactured_sine" not in found  # 100 dimensions and 400 steps
    assert {"double_well", "forty_modes", "ou_quadratic_easy"} <= set(found)


@pytest.mark.parametrize(
    ("proposal", "variance"), [("zero", math.e - 1.0), ("optimal", 0)]
)
def test_variance_of_a_lognormal_weight(monkeypatch, proposal, variance):
    """r = x on Brownian motion: log W is normal with variance 1, or constant."""
    monkeypatch.setattr(module, "WORK", 1 << 20)
    problem = registry.problem("brownian_linear")
    estimator = registry.estimator("path_importance_sampling", proposal=proposal)
    found = module.measure(problem, estimator, 4, 0.999, 3)
    assert found.bias == exact(0.0)
    # 512 replicates know their variance to 6 %, more with this weight's tail
    assert found.variance == pytest.approx(variance, rel=0.4, abs=1e-20)
    assert found.effective > 0.99
    assert 0.0 < found.seconds < 1e-4


def test_bias_is_exact_where_the_mean_is_known(monkeypatch):
    monkeypatch.setattr(module, "WORK", 1 << 17)
    problem = registry.problem("gaussian_tilt")
    found = module.measure(problem, registry.estimator("jarzynski"), 12, 0.999, 0)
    assert found.bias.low == found.bias.high != 0.0
    assert found.bias.estimate == pytest.approx(-0.06, abs=0.002)
    free = module.measure(problem, registry.estimator("crooks"), 12, 0.999, 0)
    assert free.bias == exact(0.0)


def test_refusals_are_sentences():
    problem = registry.problem("forty_modes")
    found = module.measure(problem, registry.estimator("crooks"), 8, 0.999, 0)
    assert isinstance(found, str)
    assert "density" in found or "denoised" in found


def test_weights_without_a_variance_give_a_lower_bound(monkeypatch):
    """Of the funnel it is known; where no path has the weights it is seen."""
    monkeypatch.setattr(module, "WORK", 1 << 17)
    funnel = module.measure(
        registry.problem("funnel", dim=2),
        registry.estimator("path_importance_sampling"),
        8,
        0.999,
        0,
    )
    assert funnel.effective == 0.0
    assert module.cost([funnel], 0.01).outcome != module.REACHED
    steep = registry.problem("brownian_linear", slope=9.0)
    zero = registry.estimator("path_importance_sampling", proposal="zero")
    found = module.measure(steep, zero, 8, 0.999, 0)
    # E W^2 = e^81 Z^2, of which no sample tells; the bound is a number of paths
    assert 1e3 < found.variance < 1e10
    assert found.effective == 0.0
