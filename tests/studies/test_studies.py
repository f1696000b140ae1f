"""The studies themselves: their formulae by another route, and small experiments.

Intervals hold jointly with probability 99.9 %; seeds are fixed.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from test_published import TWO_MODES

from sdebench import studies
from sdebench.experiments.files import read_evidence
from sdebench.measure.intervals import Interval
from sdebench.problems.two_modes import TwoModes
from sdebench.studies import (
    initial_law_toy,
    mixed_sampling,
    one_step_gaussian,
    path_kl,
)
from sdebench.studies._study import agreement, count_agreeing

RESULTS = Path(__file__).parents[2] / "results" / "studies"


def no_progress(done: int, total: int) -> None:
    pass


def hermite(dim: int):
    """Nodes (n, dim) and weights (n,) for normals, exact up to degree 15 in each."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    mass = [np.prod(w) for w in product(weights / weights.sum(), repeat=dim)]
    return np.array(list(product(nodes, repeat=dim))), np.array(mass)


# ---- committed results ------------------------------------------------------------
@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_committed_evidence_gives_the_committed_page(path):
    stored = json.loads(path.read_text("utf-8"))
    study = studies.study(path.stem)
    evidence = read_evidence(path.with_suffix(".csv"))
    assert study.table(evidence).to_dict("records") == stored["table"]
    assert study.summary(evidence) == stored["sentence"]
    assert stored["procedure"] == study.procedure
    page = (RESULTS / "README.md").read_text("utf-8")
    section = page[page.index(f"\n## {path.stem}\n") :].split("\n## ")[1]
    for row in stored["table"]:
        for text in row.values():
            assert text.replace("*", r"\*") in section


# ---- one_step_gaussian ------------------------------------------------------------
@pytest.mark.parametrize("name", list(one_step_gaussian.CASES)[:4])
@pytest.mark.parametrize(("theta", "sigma"), one_step_gaussian.SETTINGS)
def test_one_step_variances_by_quadrature(name, theta, sigma):
    case = one_step_gaussian.CASES[name]
    (z,), mass = hermite(1)[0].T, hermite(1)[1]
    x = theta + sigma * z
    values = (x**2 - case.baseline(theta, sigma)) * z / sigma
    if name == "pathwise":
        values = 2.0 * x
    mean = mass @ values
    assert mean == pytest.approx(2.0 * theta)
    exact = mass @ (values - mean) ** 2
    assert case.variance(theta, sigma) == pytest.approx(exact, rel=1e-12)


def test_leave_one_out_variance_of_two_paths_by_quadrature():
    theta, sigma = 0.8, 0.6
    nodes, mass = hermite(2)
    rewards, scores = (theta + sigma * nodes) ** 2, nodes / sigma
    values = 0.5 * np.diff(rewards)[:, 0] * np.diff(scores)[:, 0]
    mean = mass @ values
    assert mean == pytest.approx(2.0 * theta)
    exact = 2.0 * (mass @ (values - mean) ** 2)
    found = one_step_gaussian.leave_one_out_variance(theta, sigma, 2)
    assert found == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("name", list(one_step_gaussian.TRACES)[1:])
@pytest.mark.parametrize("dim", [1, 3])
def test_traces_by_quadrature(name, dim):
    case, sigma = one_step_gaussian.TRACES[name], one_step_gaussian.SIGMA
    z, mass = hermite(dim)
    rewards = np.sum(one_step_gaussian.MEAN + sigma * z, axis=1)
    values = (rewards - case.baseline(dim, sigma))[:, None] * z / sigma
    exact = mass @ np.sum((values - mass @ values) ** 2, axis=1)
    assert case.variance(dim, sigma) == pytest.approx(exact, rel=1e-12)


def test_measured_one_step_variances(monkeypatch):
    monkeypatch.setattr(one_step_gaussian, "DIMENSIONS", (1, 3))
    monkeypatch.setattr(one_step_gaussian, "MOST", 1 << 12)
    study = studies.study("one_step_gaussian")
    evidence = study.experiment(5, no_progress)
    assert count_agreeing(evidence) == len(evidence) == 21
    doubled = evidence.assign(value=2.0 * evidence["value"])
    doubled[["low", "high"]] *= 2.0
    assert count_agreeing(doubled) == 2  # the zeros of pathwise


# ---- initial_law_toy --------------------------------------------------------------
def test_the_printed_numbers_are_those_of_the_published_table():
    for beta, fixed, ideal, any_law in TWO_MODES:
        line = initial_law_toy.PRINTED[beta].split()
        printed = dict(zip(initial_law_toy.COLUMNS, map(float, line), strict=True))
        found = (printed["fixed"], printed["ideal"], printed["any law"])
        assert found == (fixed, ideal, any_law)


def test_the_cost_of_a_start():
    """The catalogue's start costs J(u*); the best Gaussian one is a minimum."""
    problem = TwoModes(beta=0.5)
    fixed = initial_law_toy.cost_of_start(problem, 0.0, 1.0)
    assert fixed == pytest.approx(problem.truth.optimal_cost(), rel=1e-12)
    best = initial_law_toy.least_costs(0.5)
    assert best["any law"] < best["Gaussian"] < best["fixed"]
    for mean, scale in ((0.01, 0.0), (-0.01, 0.0), (0.0, 0.01), (0.0, -0.01)):
        near = (best["mu"] + mean, best["s"] + scale)
        assert initial_law_toy.cost_of_start(problem, *near) > best["Gaussian"]


def test_the_cost_of_a_start_by_quadrature():
    problem, mean, scale = TwoModes(beta=1.0), 0.4, 0.9
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    x = mean + scale * nodes
    values = problem.truth.value(x[:, None], 0.0)
    divergence = 0.5 * (x**2 - nodes**2) - np.log(scale)
    exact = weights @ (values + divergence) / weights.sum()
    found = initial_law_toy.cost_of_start(problem, mean, scale)
    assert found == pytest.approx(exact, rel=1e-9)


# ---- mixed_sampling ---------------------------------------------------------------
def test_the_group_gradients_by_simulation(monkeypatch):
    monkeypatch.setattr(mixed_sampling, "N_GROUPS", 1 << 19)
    found = mixed_sampling.simulated_gradients(4)
    exact = {False: mixed_sampling.mean_only(4), True: mixed_sampling.standardized(4)}
    for standardize, answer in exact.items():
        interval = found[standardize]
        assert interval.low < answer < interval.high
        assert interval.high - interval.low < 0.013  # 1.500 and 1.298 are apart


# ---- path_kl ----------------------------------------------------------------------
def divergence(student: float, states: float) -> float:
    """Return the path KL of a student on the states of another student."""
    total, second = 0.0, 1.0
    for _ in range(path_kl.N_STEPS):
        gap = student - path_kl.TEACHER
        total += gap**2 * second / (2.0 * path_kl.NOISE**2)
        second = states**2 * second + path_kl.NOISE**2
    return total


@pytest.mark.parametrize("factor", [0.2, 0.6, 0.9])
def test_path_kl_gradients_by_finite_differences(factor):
    step = 1e-5
    whole, detached = (
        (divergence(factor + step, f(1)) - divergence(factor - step, f(-1)))
        / (2.0 * step)
        for f in (lambda sign: factor + sign * step, lambda sign: factor)
    )
    assert path_kl.exact_gradient("whole", factor) == pytest.approx(whole, rel=1e-8)
    found = path_kl.exact_gradient("detached", factor)
    assert found == pytest.approx(detached, rel=1e-8)


def test_simulated_path_kl_gradients(monkeypatch):
    monkeypatch.setattr(path_kl, "N_REPLICATES", 1 << 9)
    study = studies.study("path_kl")
    evidence = study.experiment(6, no_progress)
    assert count_agreeing(evidence) == len(evidence) == 10
    swapped = evidence["kind"].map({"whole": "detached", "detached": "whole"})
    for row in evidence.assign(kind=swapped).itertuples():
        printed = path_kl.PRINTED[row.kind, row.factor]
        ours = Interval(row.value, row.low, row.high)
        assert agreement(printed, ours) not in ("equal", "inside")
    figure = study.figure(evidence)
    assert all(axes.has_data() for axes in figure.axes)
