"""The claim about work identities: exact means, planted evidence, a small run."""

from __future__ import annotations

import numpy as np
import pytest

from sdebench import claims
from sdebench.claims import work_identities as module
from sdebench.closed_form.work import log_weight_moments
from sdebench.measure.intervals import Interval
from sdebench.registry import problem

CLAIM = claims.claim("work_identities")


@pytest.fixture(scope="module")
def evidence():
    """Small: two problems, on which fewer paths decide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PROBLEMS", module.PROBLEMS[:2])
        patch.setattr(module, "STEPS", (8, 16, 32))
        patch.setattr(module, "RANGE", (8, 32))
        patch.setattr(module, "N_REPLICATES", 1 << 12)
        yield CLAIM.experiment(3, lambda done, total: None)


def test_a_small_experiment_is_supported(evidence):
    """False alarms have the probability 0.1 %."""
    assert CLAIM.decide(evidence).verdict == "supported"


def _moved(frame, estimator, factor=1.0, shift=0.0):
    chosen = frame["estimator"].eq(estimator) & frame["kind"].eq("simulated")
    frame = frame.copy()
    ends = ["value", "low", "high"]
    frame.loc[chosen, ends] = factor * frame.loc[chosen, ends] + shift
    return frame


def _crooks_is_biased(frame):
    return _moved(frame, module.CROOKS, shift=4.0)


def _riemann_is_unbiased(frame):
    return _moved(frame, module.JARZYNSKI, factor=0.1)


def _riemann_stays(frame):
    return _moved(frame, module.JARZYNSKI, factor=0.0, shift=10.0)


def _riemann_is_of_order_two(frame):
    frame = frame.copy()
    chosen = frame["estimator"].eq(module.JARZYNSKI)
    ends = ["value", "low", "high"]
    factor = 8.0 / frame.loc[chosen, "n_steps"].to_numpy()
    frame.loc[chosen, ends] = factor[:, None] * frame.loc[chosen, ends]
    return frame


def _another_mean(frame):
    chosen = frame["kind"].eq("exact")
    frame = frame.copy()
    frame.loc[chosen, "value"] -= 3.0
    return frame


@pytest.mark.parametrize(
    "turn",
    [
        _crooks_is_biased,
        _riemann_is_unbiased,
        _riemann_stays,
        _riemann_is_of_order_two,
        _another_mean,
    ],
)
def test_reversed_evidence_is_refuted(evidence, turn):
    assert CLAIM.decide(turn(evidence)).verdict == "refuted"


def test_wide_intervals_decide_nothing(evidence):
    wide = evidence.assign(low=-50.0, high=1e6)
    assert CLAIM.decide(wide).verdict == "undecided"


def test_text_table_and_figure(evidence):
    table = CLAIM.table(evidence)
    assert list(table["N"]) == ["8", "16", "32"] * 2
    exact = table["Riemann sum, exact bias, %"]
    assert list(exact[3:]) == ["–"] * 3
    assert float(exact[0]) == pytest.approx(-9.71, abs=0.005)
    assert "four_modes" not in CLAIM.summary(evidence)
    assert all(axes.has_data() for axes in CLAIM.figure(evidence).axes)


def test_order_of_a_bias():
    found = module.order(Interval(8.0, 7.0, 9.0), Interval(2.0, 1.0, 3.0), 4.0)
    assert found.estimate == pytest.approx(1.0)
    assert found.low == pytest.approx(np.log(7.0 / 3.0) / np.log(4.0))
    assert found.high == pytest.approx(np.log(9.0) / np.log(4.0))
    open_end = module.order(Interval(8.0, 7.0, 9.0), Interval(0.1, 0.0, 0.2), 4.0)
    assert open_end.high == np.inf
    assert module.size(Interval(-2.0, -3.0, -1.0)) == (2.0, 1.0, 3.0)
    assert module.size(Interval(-2.0, -3.0, 1.0)) == (2.0, 0.0, 3.0)


def test_simulated_means_on_a_mixture_are_those_of_quadrature(evidence):
    """Both estimators on two_modes, by iterated integrals of their formulae."""
    name = module.PROBLEMS[1]
    chosen = problem(name)
    exact = chosen.truth.log_normalizer()
    for n_steps in (8, 16):
        rows = evidence[evidence["problem"].eq(name) & evidence["n_steps"].eq(n_steps)]
        rows = rows.set_index("estimator")
        for estimator in module.ESTIMATORS:
            first, second = iterated_moments(chosen, n_steps, estimator)
            excess = 100.0 * np.expm1(first - exact)
            row = rows.loc[estimator]
            assert row["low"] < excess < row["high"]
            share = np.exp(2.0 * first - second)
            assert row["share"] == pytest.approx(share, rel=0.05)
            if estimator == module.CROOKS:
                assert abs(excess) < 1e-8


def iterated_moments(chosen, n_steps, estimator):
    """log E W and log E W^2 on two_modes."""
    base, nodes = chosen.family.base, np.linspace(-10.0, 10.0, 801)
    column, times = nodes[:, None], chosen.time_grid(n_steps)
    reward = chosen.reward(column)
    slope = np.gradient(reward, nodes, edge_order=2)  # exact: r is quadratic
    h = times[1] - times[0]
    level = (np.arange(n_steps + 1) / n_steps) ** 2
    noise = np.sqrt(h) * np.array([base.sigma(t) for t in times[:-1]])
    drift = np.array([chosen.drift(column, t)[:, 0] for t in times[:-1]])
    push = 0.5 * np.outer(noise**2 * level[:-1], slope)
    means = nodes + h * drift + push
    logs = [chosen.truth.base_marginal(t).log_density(column) for t in times]

    def riemann(n):
        flow = 0.5 * (drift[n] + base.schedule.kappa(times[n]) * nodes)
        return (h * (2.0 * times[n] * reward + level[n] * flow * slope))[:, None]

    def ratio(n):
        scale, _, variance = base.backward(times[n], times[n + 1])
        back = scale * nodes + 0.5 * variance * level[n + 1] * slope
        gap = (column - back) ** 2 / variance
        ahead = (nodes - means[n][:, None]) ** 2 / noise[n] ** 2
        end = reward if n == n_steps - 1 else 0.0
        spread = np.log(noise[n] ** 2 / variance)
        density = logs[n + 1] + end - logs[n][:, None]
        return 0.5 * (ahead - gap + spread) + density

    weight = ratio if estimator == module.CROOKS else riemann
    return log_weight_moments(nodes, logs[0], means, noise, weight)
