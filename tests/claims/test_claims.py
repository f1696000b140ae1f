"""The claims themselves: closed forms by another route, and decisions that can change.

The committed evidence in ``results/claims`` must give the committed verdict; reversed
evidence must be refuted, and evidence with wide intervals must decide nothing.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import solve_ivp
from scipy.optimize import minimize

from sdebench import claims
from sdebench.claims import (
    discrete_optimum,
    flow_grpo_sampler_order,
    lean_adjoint,
    memoryless_noise,
    variance_and_dimension,
)
from sdebench.registry import problem

RESULTS = Path(__file__).parents[2] / "results" / "claims"
NAMES = claims.claim_names()


def committed(name: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / f"{name}.csv")


# ---- committed results ------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_committed_evidence_gives_the_committed_decision(name):
    claim = claims.claim(name)
    stored = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    evidence = committed(name)
    decision = claim.decide(evidence)
    assert decision.verdict == stored["verdict"]
    assert decision.sentence == stored["sentence"]
    assert [c.quantity for c in decision.checks] == [
        c["quantity"] for c in stored["checks"]
    ]
    assert claim.table(evidence).to_dict("records") == stored["table"]
    assert (claim.statement, claim.decision_rule) == (
        stored["statement"],
        stored["decision_rule"],
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_the_committed_decision(name):
    stored = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    page = (RESULTS / "README.md").read_text("utf-8")
    section = page[page.index(f"\n## {name}\n") :].split("\n## ")[1]
    assert f"Verdict: **{stored['verdict']}**" in section
    assert f"]({name}.png)" in section
    assert (RESULTS / f"{name}.png").is_file()
    for row in stored["table"]:
        for text in row.values():
            assert str(text).replace("*", r"\*") in section


# ---- decisions that can change ----------------------------------------------------
def _realized_fully(frame):
    frame.loc[frame["noise"] == "constant", ["value", "low", "high"]] = 100.0
    return frame


def _memoryless_misses(frame):
    frame.loc[frame["noise"] == "memoryless", ["value", "low", "high"]] = 79.0
    return frame


def _lean_is_right_everywhere(frame):
    frame.loc[frame["right"] == False, ["value", "low", "high"]] = 0.1  # noqa: E712
    return frame


def _lean_is_wrong_at_the_optimum(frame):
    chosen = (frame["kind"] == "simulated") & (frame["point"] == "optimum")
    frame.loc[chosen, ["value", "low", "high"]] = 20.0
    return frame


def _lean_is_wrong_at_zero(frame):
    frame.loc[frame["point"] == "zero", ["value", "low", "high"]] = 20.0
    return frame


def _lean_differs_in_continuous_time(frame):
    frame.loc[frame["right"] == True, "continuous"] = 0.5  # noqa: E712
    return frame


def _difference_stays(frame):
    frame.loc[frame["kind"] == "ladder", "exact"] = 0.3
    return frame


def _estimators_swapped(frame):
    names = {"pathwise": "reinforce:baseline=leave_one_out"}
    names |= {value: key for key, value in names.items()}
    return frame.assign(estimator=frame["estimator"].replace(names))


def _closed_form_doubled(frame):
    return frame.assign(closed_form=2.0 * frame["closed_form"])


def _no_distance(frame):
    return frame.assign(distance=0.0)


def _gradient_vanishes(frame):
    return frame.assign(value=0.01, low=0.0, high=0.02)


def _distance_falls_like_a_root(frame):
    return frame.assign(distance=frame["n_steps"] ** -0.5)


def _order_one_always(frame):
    return frame.assign(error=1.0 / frame["n_steps"])


def _order_one_half(frame):
    chosen = (frame["kind"] == "exact") & (frame["noise_level"] == 0.7)
    frame.loc[chosen, "error"] = frame["n_steps"] ** -0.5
    return frame


def _another_sampler(frame):
    chosen = frame["kind"] == "simulated"
    frame.loc[chosen, ["value", "low", "high"]] *= 1.03
    return frame


REVERSED = [
    ("flow_grpo_sampler_order", _order_one_always),
    ("flow_grpo_sampler_order", _order_one_half),
    ("flow_grpo_sampler_order", _another_sampler),
    ("memoryless_noise", _realized_fully),
    ("memoryless_noise", _memoryless_misses),
    ("lean_adjoint", _lean_is_right_everywhere),
    ("lean_adjoint", _lean_is_wrong_at_the_optimum),
    ("lean_adjoint", _lean_is_wrong_at_zero),
    ("lean_adjoint", _lean_differs_in_continuous_time),
    ("lean_adjoint", _difference_stays),
    ("variance_and_dimension", _estimators_swapped),
    ("variance_and_dimension", _closed_form_doubled),
    ("discrete_optimum", _no_distance),
    ("discrete_optimum", _gradient_vanishes),
    ("discrete_optimum", _distance_falls_like_a_root),
]


@pytest.mark.parametrize(("name", "turn"), REVERSED)
def test_reversed_evidence_is_refuted(name, turn):
    assert claims.claim(name).decide(turn(committed(name))).verdict == "refuted"


@pytest.mark.parametrize("name", NAMES)
def test_wide_intervals_decide_nothing(name):
    evidence = committed(name)
    measured = evidence["value"].notna()
    evidence.loc[measured, "low"] = 1e-9 * evidence["value"].abs()[measured] + 1e-12
    evidence.loc[measured, "high"] = 1e6 + evidence["value"][measured]
    negative = measured & (evidence["value"] < 0.0)
    evidence.loc[negative, "low"] = evidence["value"][negative] - 1e6
    assert claims.claim(name).decide(evidence).verdict == "undecided"


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_drawn_from_evidence_alone(name):
    figure = claims.claim(name).figure(committed(name))
    assert all(axes.has_data() for axes in figure.axes)


# ---- closed forms by another route ------------------------------------------------
@pytest.mark.parametrize("reward", ["linear", "quadratic"])
@pytest.mark.parametrize("noise", [0.2, 1.0, 2.0])
def test_terminal_moments_solve_the_control_problem(reward, noise):
    """Riccati equation backwards, moments forwards, by an ODE solver."""
    k, b = (0.0, 1.0) if reward == "linear" else (1.0, 0.0)

    def rate(t):  # of the base drift: (q' - sigma^2) / (2 q), q = t^2 + (1 - t)^2
        q = t**2 + (1.0 - t) ** 2
        return (4.0 * t - 2.0 - noise**2) / (2.0 * q)

    def backward(t, y):
        P, p = y
        return [
            -2.0 * rate(t) * P + noise**2 * P**2,
            -(rate(t) - noise**2 * P) * p,
        ]

    tight = {"rtol": 1e-11, "atol": 1e-13, "dense_output": True}
    value = solve_ivp(backward, (1.0, 0.0), [k, -b], **tight).sol

    def forward(t, y):
        P, p = value(t)
        closed = rate(t) - noise**2 * P
        return [closed * y[0] - noise**2 * p, 2.0 * closed * y[1] + noise**2]

    mean, variance = solve_ivp(forward, (0.0, 1.0), [0.0, 1.0], **tight).y[:, -1]
    exact = memoryless_noise.terminal_moment(reward, noise)
    assert (mean if reward == "linear" else variance) == pytest.approx(exact, rel=1e-8)


def test_the_published_example_of_the_bias():
    share = memoryless_noise.terminal_moment("linear", 1.0)
    assert share == pytest.approx(1.0 - np.exp(-np.pi / 2.0), rel=1e-14)
    variance = memoryless_noise.terminal_moment("quadratic", 1.0)
    assert variance == pytest.approx(0.50673, abs=5e-6)


def test_memoryless_start_is_late_by_little():
    exact = memoryless_noise.build("linear", None).truth.tilted_marginal(1.0)
    assert exact.mean()[0] == pytest.approx(1.0, abs=5e-4)


@pytest.mark.parametrize("reward", ["linear", "quadratic"])
@pytest.mark.parametrize("noise", [1.0, None])
def test_simulated_moments_hold_the_closed_form(reward, noise, monkeypatch):
    """Joint level 99.9 % over ten; four are looked at, with one seed.

    Four and eight steps are off by several percent before the extrapolation; the
    memoryless process needs more at its start.
    """
    if noise is not None:
        monkeypatch.setattr(memoryless_noise, "N_STEPS", 4)
    monkeypatch.setattr(memoryless_noise, "BLOCK", 1 << 15)
    monkeypatch.setattr(memoryless_noise, "N_BLOCKS", 2)
    monkeypatch.setattr(memoryless_noise, "N_PATHS", 1 << 16)
    built = memoryless_noise.build(reward, noise)
    found = memoryless_noise.simulated_moment(built, reward, seed=3)
    exact = (
        memoryless_noise.tilted_moment(reward)
        if noise is None
        else memoryless_noise.terminal_moment(reward, noise)
    )
    assert found.low < exact < found.high
    assert found.high - found.low < 0.15


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("baseline", [True, False])
def test_one_step_variance_by_quadrature(dim, baseline):
    """Gauss-Hermite in every coordinate; exact for these polynomials."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    weights = weights / weights.sum()
    z = np.array(list(product(nodes, repeat=dim)))
    mass = np.prod(list(product(weights, repeat=dim)), axis=1)
    w = np.full(dim, 0.5)  # halfway to u* = q = 1
    cost = 0.5 * w @ w - np.sum(w + z, axis=1)
    constant = mass @ cost if baseline else 0.0
    rows = (cost - constant)[:, None] * z + w  # du/dtheta is one
    mean = mass @ rows
    assert mean == pytest.approx(np.full(dim, -0.5))
    relative = mass @ np.sum((rows - mean) ** 2, axis=1) / (mean @ mean)
    exact = variance_and_dimension.one_step_variance(dim, baseline)
    assert relative == pytest.approx(exact, rel=1e-12)


def test_own_parameters_split_the_control():
    setting = variance_and_dimension.SETTINGS["own parameters"]
    own, shared = setting.problem(dim=3), problem("ou_quadratic_easy", dim=3)
    x = np.array([0.3, -1.0, 2.0])
    together = own.truth.policy(x, 0.4, np.ones(3))
    assert together == pytest.approx(shared.truth.control(x, 0.4), rel=1e-12)
    first = own.truth.policy(x, 0.4, [1.0, 0.0, 0.0])
    assert first == pytest.approx(together * [1.0, 0.0, 0.0])
    assert own.truth.gradient("optimum") == pytest.approx(0.0, abs=1e-12)


def test_measured_one_step_variances():
    setting = variance_and_dimension.SETTINGS["one step"]
    found = variance_and_dimension.relative_variances(setting, 8, seed=5)
    pathwise, none, left_out, _ = found
    assert pathwise == (0.0, 0.0, 0.0)
    for interval, baseline in ((none, False), (left_out, True)):
        exact = variance_and_dimension.one_step_variance(8, baseline)
        assert interval.low < exact < interval.high


def test_the_exponent_of_a_power():
    small, large = (
        variance_and_dimension.Interval(v, 0.9 * v, 1.1 * v)
        for v in (3.0, 3.0 * 8.0**1.5)
    )
    found = variance_and_dimension.exponent(small, large)
    assert found.estimate == pytest.approx(1.5)
    assert found.low < 1.5 < found.high


def test_lean_difference_by_finite_differences():
    """The exact difference against derivatives of the exact objective."""
    hard = problem("ou_quadratic_hard", dim=1)
    theta = hard.theta("halfway")
    step = 1e-5
    full = [
        (
            hard.truth.objective(theta + step * e, 20)
            - hard.truth.objective(theta - step * e, 20)
        )
        / (2.0 * step)
        for e in np.eye(len(theta))
    ]
    gap = np.linalg.norm(hard.truth.matching_gradient(theta, 20) - full)
    percent = 100.0 * gap / np.linalg.norm(hard.truth.gradient(theta))
    assert lean_adjoint.difference(hard, "halfway", 20) == pytest.approx(percent, 1e-6)


@pytest.mark.parametrize(
    ("name", "point", "open_loop"),
    [
        ("ou_quadratic_easy", "zero", True),
        ("ou_quadratic_easy", "halfway", False),
        ("gaussian_tilt", "optimum", False),
        ("ou_linear", "overshoot", True),
        ("brownian_linear", "optimum", True),
    ],
)
def test_open_loop_controls_are_told_apart(name, point, open_loop):
    built = problem(name)
    assert lean_adjoint.is_open_loop(built, built.theta(point)) is open_loop


def test_discrete_optimum_by_minimization():
    """Three steps in one dimension, minimized over the three gains."""
    n_steps, h = 3, 1.0 / 3.0
    built = problem("ou_quadratic_hard", dim=1)

    def second_moments(gains):
        moments = [0.25]
        for gain in gains:
            moments.append((1.0 + h + h * gain) ** 2 * moments[-1] + h)
        return np.array(moments)

    def cost(gains):
        moments = second_moments(gains)
        running = 0.5 * gains**2 + built.state_cost
        return h * running @ moments[:-1] + built.terminal_cost * moments[-1]

    best = minimize(cost, -np.ones(n_steps), tol=1e-14).x
    times = np.arange(n_steps) * h
    optimal = np.array([built.truth.control([[1.0]], t)[0, 0] for t in times])
    moments = second_moments(optimal)[:-1]
    distance = np.sqrt((optimal - best) ** 2 @ moments / (optimal**2 @ moments))
    found = discrete_optimum.exact_answers(built, n_steps)
    assert found["distance"] == pytest.approx(100.0 * distance, rel=1e-5)
    regret = (cost(optimal) - cost(best)) / (cost(np.zeros(n_steps)) - cost(best))
    assert found["regret"] == pytest.approx(100.0 * regret, rel=1e-6)
    assert found["least_cost"] == pytest.approx(cost(best), rel=1e-10)


def test_published_distances():
    """maths.md, section 3: 2.3 % and 3.1 % at 50 steps."""
    for name, percent in (("ou_quadratic_easy", 2.3), ("ou_quadratic_hard", 3.1)):
        found = discrete_optimum.exact_answers(problem(name), 50)
        assert found["distance"] == pytest.approx(percent, abs=0.06)


@pytest.mark.parametrize(
    ("name", "exact"), [("brownian_linear", True), ("ou_linear", False)]
)
def test_exact_schemes_are_told_apart(name, exact):
    assert discrete_optimum.has_exact_scheme(problem(name)) is exact


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_the_simulated_sampler_has_the_variance_of_the_recursion(
    noise_level, monkeypatch
):
    """Joint level 99.9 % over eight; two are looked at, with one seed.

    Noise levels 0.2 apart or a wrong guard at t = 1 are far outside.
    """
    monkeypatch.setattr(flow_grpo_sampler_order, "N_PATHS", 1 << 17)
    found = flow_grpo_sampler_order.simulated_variance(noise_level, 5, seed=4)
    error = flow_grpo_sampler_order.terminal_variance_error(noise_level, 5)
    assert found.low < 0.5 + error < found.high
    other = flow_grpo_sampler_order.terminal_variance_error(noise_level + 0.2, 5)
    assert not found.low < 0.5 + other < found.high


@pytest.mark.parametrize("module", [lean_adjoint, discrete_optimum])
def test_small_experiments_are_supported(module, monkeypatch):
    """Two problems of one dimension; false alarms have the probability 0.1 %."""
    small = [problem("brownian_linear"), problem("ou_quadratic_hard", dim=1)]
    monkeypatch.setattr(module, "exact_chain_problems", lambda: small)
    claim = claims.claim(module.__name__.rpartition(".")[2])
    steps: list[tuple[int, int]] = []
    evidence = claim.experiment(1, lambda *done: steps.append(done))
    assert claim.decide(evidence).verdict == "supported"
    assert steps[-1][0] == steps[-1][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_whole_experiments_decide_as_committed(name):
    claim = claims.claim(name)
    stored = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    evidence = claim.experiment(20, lambda done, total: None)
    assert claim.decide(evidence).verdict == stored["verdict"]
