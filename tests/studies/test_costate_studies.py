"""Studies of costates: exact ones by another route, and small experiments.

Intervals hold jointly with probability 99.9 %; seeds are fixed.
"""

from __future__ import annotations

from math import exp

import numpy as np
import pytest
import scipy.linalg
import torch

from sdebench import studies
from sdebench.experiments import costates
from sdebench.experiments.costates import chain_costates, lean_labels, make_view
from sdebench.measure.intervals import Interval
from sdebench.problems.damped_oscillator import DampedOscillator
from sdebench.problems.lq_oscillator import LQOscillator
from sdebench.registry import problem
from sdebench.studies import costate_labels, time_reversed_bsde
from sdebench.studies._study import agreement, count_agreeing


def no_progress(done: int, total: int) -> None:
    pass


# ---- costates ----------------------------------------------------------------------
@pytest.mark.parametrize("n", [0, 3, 8])
def test_the_cubic_costate_of_a_chain_by_quadrature(n):
    """E[dX_8/dX_n X_8^3 | X_n = x] with the eight-step chain of the process."""
    cubic, h = problem("cubic_costate"), 1.0 / 8.0
    found = chain_costates(cubic.truth.policy_chain("zero", 8))[n]
    growth = (1.0 - 0.5 * h) ** (8 - n)
    variance = sum(h * (1.0 - 0.5 * h) ** (2 * k) for k in range(8 - n))
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    x = np.array([[-1.3], [0.4], [2.0]])
    ends = growth * x + np.sqrt(variance) * nodes
    exact = growth * (ends**3 @ weights) / weights.sum()
    values = found(torch.tensor(x)).numpy()[:, 0]
    np.testing.assert_allclose(values, exact, rtol=1e-12)


@pytest.mark.parametrize("name", ["cubic_costate", "damped_oscillator"])
def test_derivatives_of_exact_costates(name):
    phi = chain_costates(problem(name).truth.policy_chain("zero", 8))[2]
    d = problem(name).dim
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, d, generator=generator, dtype=torch.float64)
    v = torch.randn(5, d, generator=generator, dtype=torch.float64)
    step = 1e-4
    along = (phi(x + step * v) - phi(x - step * v)) / (2.0 * step)
    torch.testing.assert_close(phi.along(x, v), along, rtol=1e-6, atol=1e-6)
    eye = torch.eye(d, dtype=torch.float64)
    second = sum(phi(x + step * e) + phi(x - step * e) - 2.0 * phi(x) for e in eye)
    trace = phi.trace(x, eye)
    torch.testing.assert_close(trace, second / step**2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "point"), [("cubic_costate", "zero"), ("damped_oscillator", "overshoot")]
)
def test_lean_labels_average_to_the_costate(name, point):
    """E[(a_n - phi_n(X_n)) X_n] = 0: z-values of nine steps below 4.5.

    False alarms have the probability 1.2e-4; a costate of the wrong step is found.
    """
    chosen = problem(name)
    exact = chain_costates(chosen.truth.policy_chain(point, 8))
    view = make_view(chosen, point, 8, 20_000, 3, 0)

    def largest(shift):
        scores = []
        for n, (x, y) in lean_labels(view).items():
            rest = ((y - exact[min(n + shift, 8)](x)) * x).sum(1)
            error = float(rest.std()) / np.sqrt(len(rest))
            scores.append(abs(float(rest.mean())) / error if error > 1e-12 else 0.0)
        return max(scores)

    assert largest(0) < 4.5
    assert largest(1) > 6.0


def test_a_positive_mean():
    """Of 400 intervals at 99 % between 0 and 13 miss: 1.5e-5 false alarms."""
    rng = np.random.default_rng(2)
    found = [costates.positive_mean(rng.chisquare(4, 50), 0.99) for _ in range(400)]
    assert sum(not low < 4.0 < high for _, low, high in found) <= 13
    assert max(high / low for _, low, high in found) < 2.5


# ---- costate_labels ----------------------------------------------------------------
def test_sizes_by_simulation():
    rng = np.random.default_rng(4)
    start = 0.3 + rng.normal(size=1_000_000)
    end = exp(-0.5) * start + np.sqrt(1.0 - exp(-1.0)) * rng.normal(size=len(start))
    phi = costate_labels.exact_costate(0.0)(torch.tensor(start[:, None])).numpy()[:, 0]
    noise = exp(-0.5) * end**3 - phi
    found = costate_labels.exact_sizes()
    assert found["size"] == pytest.approx(np.sqrt(np.mean(phi**2)), rel=0.03)
    assert found["lean"] == pytest.approx(np.sqrt(np.mean(noise**2)), rel=0.03)


def test_measured_label_errors(monkeypatch):
    monkeypatch.setattr(costate_labels, "LADDER", (20, 40))
    monkeypatch.setattr(costate_labels, "N_REPLICATES", 8)
    study = studies.study("costate_labels")
    evidence = study.experiment(5, no_progress)
    measured = evidence[evidence["low"] < evidence["high"]]
    assert count_agreeing(measured) == len(measured) == 6
    names = {"aligned": "misaligned", "misaligned": "aligned"}
    for row in measured.itertuples():
        if row.kind in names:
            place = costate_labels.LADDER.index(int(row.n_steps))
            other = costate_labels.PRINTED[names[row.kind]][place]
            ours = Interval(row.value, row.low, row.high)
            assert agreement(other, ours).startswith("outside")
    assert all(axes.has_data() for axes in study.figure(evidence).axes)


# ---- time_reversed_bsde ------------------------------------------------------------
def test_the_costate_of_the_linear_test():
    """e^{A^T T} e^{A T}, whatever the noise level."""
    A = np.array([[0.0, 1.0], [-1.0, -0.5]])
    exact = scipy.linalg.expm(2.0 * A.T) @ scipy.linalg.expm(2.0 * A)
    for level in (time_reversed_bsde.NO_NOISE, 5.0):
        found = time_reversed_bsde.exact_slope(DampedOscillator(noise_level=level))
        np.testing.assert_allclose(found, exact, rtol=1e-10, atol=1e-12)


def test_the_costate_of_the_optimal_control():
    """At the optimal control the frozen costate is the gradient of the value."""
    lq, step = LQOscillator(), 1e-5
    found = time_reversed_bsde.exact_slope(lq)
    x = np.array([0.7, -1.1])
    slope = [
        (lq.truth.value(x + step * e, 0.0) - lq.truth.value(x - step * e, 0.0))
        / (2.0 * step)
        for e in np.eye(2)
    ]
    np.testing.assert_allclose(found @ x, slope, rtol=1e-7)


def test_a_small_riccati_study(monkeypatch):
    monkeypatch.setattr(time_reversed_bsde, "N_RUNS", 4)
    errors = {}
    for n_steps in (20, 40):
        found = costates.replicated(
            lambda r, k=n_steps: time_reversed_bsde.riccati_errors(r, k, 1000, 3), 4
        )
        errors[n_steps] = {name: values.mean() for name, values in found.items()}
    own = [errors[n][time_reversed_bsde.REVERSED] for n in (20, 40)]
    assert 2.5 < own[0] / own[1] < 6.5  # order dt^2 is 4
    assert own[1] < errors[40][time_reversed_bsde.LEAN]
