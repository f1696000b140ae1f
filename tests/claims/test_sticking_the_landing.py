"""The claim about sticking the landing: closed form, planted evidence, a small run."""

from __future__ import annotations

import numpy as np
import pytest

from sdebench import claims
from sdebench.claims import sticking_the_landing as module
from sdebench.problems.ddpm_chain import DDPMChain
from sdebench.problems.ou_quadratic_easy import OUQuadraticEasy
from sdebench.registry import problem

CLAIM = claims.claim("sticking_the_landing")


@pytest.fixture(scope="module")
def evidence():
    """Small: three problems, whose intervals are set to a tenth of the value."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "AFFINE", ("brownian_linear", "ou_linear", "ddpm_chain"))
        patch.setattr(module, "MIXTURES", ())
        patch.setattr(module, "LADDER", (32, 128, 512))
        patch.setattr(module, "RANGE", (128, 512))
        patch.setattr(module, "N_REPLICATES", {True: 128, False: 128})
        patch.setattr(module, "N_PAIRED", 1 << 10)
        patch.setattr(module, "CHAIN_STEPS", (8,))
        yield CLAIM.experiment(3, lambda done, total: None)


def test_a_small_experiment_is_supported(evidence):
    """False alarms have the probability 0.1 %."""
    assert CLAIM.decide(evidence).verdict == "supported"


def _set(frame, chosen, value):
    frame = frame.copy()
    frame.loc[chosen, ["value", "low", "high"]] = value
    return frame


def _landing_stays(frame):
    chosen = frame["kind"].eq("variance") & frame["estimator"].eq(module.LANDING)
    return _set(frame, chosen, 0.1)


def _pathwise_vanishes(frame):
    names = {module.PATHWISE: module.LANDING, module.LANDING: module.PATHWISE}
    return frame.assign(estimator=frame["estimator"].replace(names))


def _means_differ(frame):
    return _set(frame, frame["kind"] == "mean", 10.0)


def _closed_form_doubled(frame):
    return frame.assign(exact=2.0 * frame["exact"])


@pytest.mark.parametrize(
    "turn", [_landing_stays, _pathwise_vanishes, _means_differ, _closed_form_doubled]
)
def test_reversed_evidence_is_refuted(evidence, turn):
    assert CLAIM.decide(turn(evidence)).verdict == "refuted"


def test_wide_intervals_decide_nothing(evidence):
    wide = evidence.assign(low=1e-12, high=1e6)
    assert CLAIM.decide(wide).verdict == "undecided"


def test_the_figure_and_the_table(evidence):
    assert all(axes.has_data() for axes in CLAIM.figure(evidence).axes)
    table = CLAIM.table(evidence).set_index("problem")
    assert table.loc["ou_linear", "optimal control"] == "open-loop"
    assert table.loc["ddpm_chain", "optimal control"] == "feedback"


def test_variance_at_the_optimum_of_two_steps_by_quadrature():
    """All noise by Gauss-Hermite: zero mean, and the variance of the closed form."""
    chain = module.ChainOptimum(base=DDPMChain(n_steps=2), n_steps=2)
    policy = chain.truth.policy_chain("optimum", 2)
    K, P = policy.gain[:, 0, 0], policy.chain.value_coefficients()[0][:, 0, 0]
    a, s, start = 0.9, 0.7, 1.2
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    weights = weights / weights.sum()
    z0, z1 = np.meshgrid(nodes, nodes, indexing="ij")
    mass = np.outer(weights, weights)
    x1 = (a + s * K[0]) * start + s * z0
    x2 = (a + s * K[1]) * x1 + s * z1
    # the costate with the martingale, by hand
    last = 2.0 * x2
    v1 = K[1] * x1 + s * last
    first = a * last + K[1] * (v1 + z1)
    rows = K[1] * x1 * v1 + K[0] * start * (K[0] * start + s * first)
    mean = np.sum(mass * rows)
    assert mean == pytest.approx(0.0, abs=1e-12)
    exact = np.sum(mass * rows**2)
    assert module.chain_variance(chain) == pytest.approx(exact, rel=1e-10)
    assert P[2] == pytest.approx(2.0)


def test_the_control_is_that_of_the_chain():
    base, n_steps = OUQuadraticEasy(dim=2), 12
    chain = module.ChainOptimum(base=base, n_steps=n_steps)
    policy = chain.truth.policy_chain("optimum", n_steps)
    gain, bias = policy.chain.optimal_feedback()
    np.testing.assert_allclose(policy.gain, gain, atol=1e-14)
    np.testing.assert_allclose(policy.bias, bias, atol=1e-14)
    gradient = chain.truth.gradient("optimum", n_steps)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-12)


def test_the_families_hold_the_optimal_control():
    """On every problem of the claim, at three times."""
    for name in module.AFFINE + module.MIXTURES:
        built = problem(name)
        start, end = built.time_span
        x = np.linspace(-1.0, 1.0, 3 * built.dim).reshape(3, built.dim)
        for share in (0.1, 0.5, 0.9):
            t = start + share * (end - start)
            ours = built.truth.policy(x, t, built.theta("optimum"))
            optimal = built.truth.control(x, t)
            np.testing.assert_allclose(ours, optimal, rtol=1e-8, atol=1e-9)
