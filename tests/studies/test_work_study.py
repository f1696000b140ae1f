"""The study of work identities: exact numbers by another route, and a small run."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from sdebench import studies
from sdebench.studies import work_identities as module
from sdebench.studies._study import agreement

STUDY = studies.study("work_identities")
FALSE_ALARM = 1e-4
SIGMAS = 5.0
"""Standard errors; four comparisons below, each by chance with 6e-7."""


def test_log_z_by_quadrature():
    def density(x):
        point = np.array([x])
        return np.exp(module.law(point, 1.0).log_density + module.reward(point)[0])[0]

    assert np.log(quad(density, -9, 9, points=[-1.5, 1.0])[0]) == pytest.approx(
        module.log_z(), abs=1e-10
    )


def test_score_and_velocity_solve_the_continuity_equation():
    """d_t log p + dv/dx + v s = 0, by differences; s is the slope of log p."""
    x, t, step = np.linspace(-3.0, 3.0, 13), 0.4, 1e-5
    here = module.law(x, t)
    up, down = module.law(x + step, t), module.law(x - step, t)
    slope = (up.log_density - down.log_density) / (2.0 * step)
    np.testing.assert_allclose(here.score, slope, atol=1e-7)
    late, early = module.law(x, t + step), module.law(x, t - step)
    rate = (late.log_density - early.log_density) / (2.0 * step)
    divergence = (up.velocity - down.velocity) / (2.0 * step)
    rest = rate + divergence + here.velocity * here.score
    np.testing.assert_allclose(rest, 0.0, atol=1e-6)


@pytest.mark.parametrize("n_steps", [5, 10])
def test_more_nodes_change_nothing(n_steps, monkeypatch):
    for method in ("Jarzynski", "Crooks"):
        found = module.exact_moments(method, n_steps)
        with monkeypatch.context() as patch:
            patch.setattr(module, "NODES", np.linspace(-10.0, 10.0, 901))
            more = module.exact_moments(method, n_steps)
        np.testing.assert_allclose(found, more, rtol=1e-9)
        if method == "Crooks":
            assert found[0] == pytest.approx(1.0, abs=1e-10)


def test_both_directions_estimate_z():
    """E_F W = Z and E_B 1/W = 1/Z, from simulated paths."""
    n, z = 40_000, np.exp(module.log_z())
    forward = np.exp(module.simulated_work(20, n, True, 1)) / z
    backward = np.exp(-module.simulated_work(20, n, False, 2)) * z
    for values in (forward, backward):
        error = values.std() / np.sqrt(n)
        assert error < 0.02
        assert abs(values.mean() - 1.0) < SIGMAS * error


def test_acceptance_ratio_of_gaussian_works():
    """Forward works N(log Z - s^2/2, s^2) and backward ones N(log Z + s^2/2, s^2)."""
    rng, n, s, log_z = np.random.default_rng(3), 20_000, 1.3, -0.7
    values = []
    for _ in range(40):
        forward = log_z - 0.5 * s**2 + s * rng.standard_normal(n)
        backward = log_z + 0.5 * s**2 + s * rng.standard_normal(n)
        values.append(module.acceptance_ratio(forward, backward, 0.95))
    centre = np.array([v.estimate for v in values])
    spread = centre.std(ddof=1)
    assert abs(centre.mean() - log_z) < SIGMAS * spread / np.sqrt(40)
    reach = np.mean([v.high - v.estimate for v in values]) / 1.96
    # a standard deviation of 40 values is known to 11 %
    assert reach == pytest.approx(spread, rel=0.5)


@pytest.fixture(scope="module")
def evidence():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "N_PATHS", 1 << 14)
        patch.setattr(module, "N_BATCHES", 2)
        patch.setattr(module, "BATCH", 10_000)
        patch.setattr(module, "CURVE", (4, 5, 8, 20))
        yield STUDY.experiment(4, lambda done, total: None)


def test_small_run(evidence):
    table = STUDY.table(evidence)
    assert len(table) == 15
    outcome = dict(zip(table["quantity"], table["agreement"], strict=True))
    assert outcome["log Z"] == "equal"
    for n_steps in module.STEPS:
        quantity = f"K = {n_steps}: {module.QUANTITIES['Crooks']}"
        assert outcome[quantity] == "equal"
    measured = "K = 20: log Z by the acceptance ratio of both directions"
    assert outcome[measured] == "inside"
    assert "comparisons agree" in STUDY.summary(evidence)
    assert all(axes.has_data() for axes in STUDY.figure(evidence).axes)


def test_densities_of_the_work_cross_at_log_z(evidence):
    """The interval of the log-ratio of every bin holds w - log Z, up to its width."""
    rows = evidence[evidence["kind"] == "work"]
    table = rows.pivot(index="work", columns="method", values=["value", "low", "high"])
    half = 0.5 * (module.BINS[1] - module.BINS[0])
    low = np.log(table["low"]["backward"] / table["high"]["forward"])
    high = np.log(table["high"]["backward"] / table["low"]["forward"])
    line = table.index.to_numpy() - module.log_z()
    assert np.all(low < line + half)
    assert np.all(high > line - half)
    # Power: with the sign of the work reversed, or log Z off by 0.3, they would not.
    assert np.any(high < line + 0.3 - half)
    assert np.any(low > -line + half)


def test_agreement_marks_the_sampled_effective_size(evidence):
    rows = evidence[evidence["kind"] == "comparison"]
    chosen = rows[rows["quantity"].str.startswith("K = 5: effective")].iloc[0]
    assert chosen["value"] == pytest.approx(0.0843, abs=1e-4)
    assert agreement("0.39", module.exact(chosen["value"])) != "equal"
