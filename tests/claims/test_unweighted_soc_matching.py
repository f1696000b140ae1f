"""The claim about SOC Matching without weights: second routes, planted evidence."""

from __future__ import annotations

import numpy as np
import pytest

from sdebench import claims, registry
from sdebench.claims import unweighted_soc_matching as module
from sdebench.closed_form.soc_matching import conditional_label

CLAIM = claims.claim("unweighted_soc_matching")


@pytest.fixture(scope="module")
def evidence():
    """Small: two problems, one without a simulation, two of the matrices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PROBLEMS", ("ddpm_chain", "gaussian_tilt"))
        patch.setattr(module, "MATRICES", ("identity", "jacobian"))
        yield CLAIM.experiment(5, lambda done, total: None)


def test_a_small_experiment_is_supported(evidence):
    """False alarms have the probability 0.1 %."""
    assert CLAIM.decide(evidence).verdict == "supported"


def _turned(frame, kind, loss, **values):
    frame = frame.copy()
    chosen = frame["kind"].eq(kind) & frame["loss"].eq(loss)
    if loss == "work":
        chosen &= frame["matrices"].eq("identity")
    frame.loc[chosen, list(values)] = list(values.values())
    return frame


def _work_is_fixed(frame):
    return _turned(frame, "fixed point", "work", value=1e-12)


def _unweighted_is_not(frame):
    return _turned(frame, "fixed point", "plain", value=2.0)


def _distance_vanishes(frame):
    chosen = frame["kind"].eq("fixed point") & frame["value"].gt(module.ROUNDING)
    return frame.assign(
        value=frame["value"].where(~chosen, 300.0 / frame["n_steps"] ** 0.5)
    )


def _mean_of_work_vanishes(frame):
    return _turned(frame, "simulated", "work", value=0.0, low=-0.1, high=0.1)


def _mean_of_unweighted_does_not(frame):
    return _turned(frame, "simulated", "plain", value=-1.0, low=-1.1, high=-0.9)


@pytest.mark.parametrize(
    "turn",
    [
        _work_is_fixed,
        _unweighted_is_not,
        _distance_vanishes,
        _mean_of_work_vanishes,
        _mean_of_unweighted_does_not,
    ],
)
def test_reversed_evidence_is_refuted(evidence, turn):
    assert CLAIM.decide(turn(evidence)).verdict == "refuted"


def test_wide_intervals_decide_nothing(evidence):
    wide = evidence.copy()
    wide.loc[wide["kind"] == "simulated", ["low", "high"]] = -50.0, 50.0
    assert CLAIM.decide(wide).verdict == "undecided"


def test_the_figure_and_the_table(evidence):
    assert all(axes.has_data() for axes in CLAIM.figure(evidence).axes)
    table = CLAIM.table(evidence).set_index(["problem", "loss", "matrices"])
    row = table.loc[("ddpm_chain", "unweighted", "identity")]
    assert row["distance of the fixed point"] == "0 %"
    assert row["exact"] == "0.00 %"
    work = table.loc[("gaussian_tilt", "Work-SOCM", "identity")]
    assert work["gradient at the best feedback, simulated"] == "–"
    assert float(work["excess cost"].removesuffix(" %")) > 50.0


def test_the_simulated_means_are_the_exact_ones(evidence):
    simulated = evidence[evidence["kind"] == "simulated"]
    assert len(simulated) == 4
    assert np.all(simulated["low"] <= simulated["exact"])
    assert np.all(simulated["exact"] <= simulated["high"])


@pytest.mark.parametrize("loss", module.LOSSES)
def test_damped_iteration_stops_at_the_fixed_point(loss):
    """Another route: regress on the mean label of the last feedback, and repeat."""
    problem, n_steps = registry.problem("ou_quadratic_hard", dim=1), 6
    chain = problem.truth.policy_chain("optimum", n_steps).chain
    gain, bias = (0.0 * part for part in chain.optimal_feedback())
    work = loss == "work"
    for _ in range(400):
        S, s = conditional_label(chain, gain, bias, work=work)
        closed, drift = chain.closed_loop(gain, bias)
        transposed = np.swapaxes(chain.noise, 1, 2)
        target = -transposed @ S[1:] @ closed
        level = -np.einsum(
            "nij,nj->ni", transposed, np.einsum("nij,nj->ni", S[1:], drift) + s[1:]
        )
        gain, bias = 0.7 * gain + 0.3 * target, 0.7 * bias + 0.3 * level
    found = module.fixed_feedback(chain, work=work)
    np.testing.assert_allclose(gain, found[0], atol=1e-9)
    np.testing.assert_allclose(bias, found[1], atol=1e-9)
