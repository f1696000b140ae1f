"""The claim about modes that are lost: exact losses, planted evidence, a small run.

Intervals hold jointly with probability 99.9 %; seeds are fixed.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdebench import claims
from sdebench.claims import mode_seeking as module
from sdebench.closed_form.gaussian_mixture import GaussianMixture
from sdebench.registry import problem

CLAIM = claims.claim("mode_seeking")
FORTY = problem("forty_modes")
POINTS = {
    module.Tilts: 0.4 * FORTY.theta_star + 0.05,
    module.Weights: np.linspace(-1.5, 1.5, module.N_MODES),
    module.Gaussian: np.array([7.0, 12.0, 0.4]),
}
families = pytest.mark.parametrize("family", POINTS, ids=lambda f: f.__name__)
losses = pytest.mark.parametrize("name", module.LOSSES)


@pytest.fixture(scope="module")
def evidence():
    """Less patience and fewer nodes and paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PATIENCE", 12)
        patch.setattr(module, "GAUSSIAN_ITERATIONS", 30)
        patch.setattr(module.Gaussian, "nodes_per_axis", 81)
        patch.setattr(module.Weights, "order", 8)
        patch.setattr(module, "BLOCK", 1 << 12)
        patch.setattr(module, "N_BLOCKS", 2)
        patch.setattr(module, "KEPT", 14.0)
        yield CLAIM.experiment(0, lambda done, total: None)


# ---- losses ------------------------------------------------------------------------
@families
@losses
def test_gradients_against_differences(family, name):
    """Central differences; sums over nodes leave 1e-5 of free weights' overlaps."""
    built, at = family(FORTY), POINTS[family]
    gradient = built.loss(name, at).gradient
    step = 1e-4
    numeric = [
        (built.loss(name, at + step * e).value - built.loss(name, at - step * e).value)
        / (2.0 * step)
        for e in np.eye(len(at))
    ]
    tolerance = 2e-5 if family is module.Weights else 1e-6
    scale = 1.0 + np.linalg.norm(gradient)
    np.testing.assert_allclose(gradient, numeric, atol=tolerance * scale)


def divergence(law: GaussianMixture, other: GaussianMixture) -> float:
    """Second route: a sum over a fine grid in the plane."""
    axis = np.arange(-48.0, 48.0, 0.3)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    logs = law.log_density(x)
    return float(np.sum(np.exp(logs) * (logs - other.log_density(x))) * 0.3**2)


@families
def test_losses_are_the_divergences_of_the_laws(family):
    built, at = family(FORTY), POINTS[family]
    law, target = built.law(at), FORTY.truth.ideal_law()
    forward = divergence(law, target)
    assert built.loss(module.ON_POLICY, at).value == pytest.approx(forward, rel=2e-4)
    other = POINTS[family] * 0.9
    moved = divergence(target, built.law(other)) - divergence(target, law)
    name = module.CROSS_ENTROPY
    found = built.loss(name, other).value - built.loss(name, at).value
    assert found == pytest.approx(moved, rel=1e-3, abs=1e-6)


@families
def test_mode_weights_are_means_of_responsibilities(family):
    """100,000 draws; five standard errors of each weight, one percent of quadrature."""
    built, at = family(FORTY), POINTS[family]
    law, target = built.law(at).as_diagonal(), FORTY.truth.ideal_law()
    rng = np.random.default_rng(0)
    chosen = rng.choice(law.n_components, size=100_000, p=law.weights)
    noise = rng.standard_normal((100_000, 2))
    x = law.means[chosen] + np.sqrt(law.covariances[chosen]) * noise
    rows = target.responsibilities(x)
    errors = rows.std(axis=0) / np.sqrt(len(rows))
    gap = np.abs(rows.mean(axis=0) - built.weights(at))
    assert np.all(gap < 5.0 * errors + 1e-4)


def test_both_losses_vanish_at_the_target():
    """Up to what the sums over nodes leave where modes overlap."""
    for family, at in (
        (module.Tilts(FORTY), FORTY.theta_star),
        (module.Weights(FORTY), np.zeros(module.N_MODES)),
    ):
        for name in module.LOSSES:
            np.testing.assert_allclose(family.loss(name, at).gradient, 0.0, atol=2e-6)
        assert family.distance(at) < 1e-5


def test_missed_modes_have_no_gradient_of_the_objective():
    """The gradient vanishes with the weight; that of the cross-entropy is the debt."""
    family = module.Weights(FORTY)
    at = module._half_missing(FORTY)
    missed = FORTY.means[:, 0] > 0.0
    seeking = family.loss(module.ON_POLICY, at).gradient[missed]
    covering = family.loss(module.CROSS_ENTROPY, at).gradient[missed]
    assert np.all(np.abs(seeking) < 20.0 * module.MISSED)
    np.testing.assert_allclose(covering, -1.0 / module.N_MODES, rtol=0.02)


def test_descents_of_one_gaussian_are_monotone(monkeypatch):
    monkeypatch.setattr(module.Gaussian, "nodes_per_axis", 61)
    family = module.Gaussian(FORTY)
    at = module._no_control(FORTY)
    values = []
    for _ in range(6):
        values.append(family.loss(module.ON_POLICY, at).value)
        at = family.step(module.ON_POLICY, at)
    assert np.all(np.diff(values) < 0.0)


# ---- simulation --------------------------------------------------------------------
def test_the_sampler_is_the_control_of_its_law():
    """Its optimal control is the problem's own where the law is in the family."""
    theta = FORTY.theta("halfway")
    sampler = module.Sampler(problem=FORTY, law=module.Tilts(FORTY).law(theta))
    x = np.random.default_rng(0).normal(0.0, 15.0, (20, 2))
    for t in (0.2, 0.7, 0.95):
        ours = sampler.truth.control(x, t)
        np.testing.assert_allclose(ours, FORTY.truth.policy(x, t, theta), rtol=1e-9)


# ---- decisions ---------------------------------------------------------------------
def test_a_small_experiment_is_supported(evidence, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 14.0)
    assert CLAIM.decide(evidence).verdict == "supported"
    ends = evidence[evidence["part"] == "end"]
    assert np.all(ends["exact"] < ends["high"] + 1.0)
    assert np.all(ends["exact"] > ends["low"] - 1.0)
    assert all(axes.has_data() for axes in CLAIM.figure(evidence).axes)
    assert len(CLAIM.table(evidence)) == 3 * len(module.SETTINGS)
    assert "1 of 40 modes from a start that has" in CLAIM.summary(evidence)


def _set(frame, place, loss, value):
    frame = frame.copy()
    chosen = frame["part"].eq("end") & frame["loss"].eq(loss)
    chosen &= frame["setting"].eq(module.SETTINGS[place].said)
    frame.loc[chosen, ["value", "low", "high"]] = value
    return frame


@pytest.mark.parametrize(
    ("place", "loss", "value"),
    [
        (0, module.ON_POLICY, 60.0),
        (1, module.ON_POLICY, 60.0),
        (1, module.CROSS_ENTROPY, 60.0),
        (2, module.ON_POLICY, 2.0),
        (2, module.CROSS_ENTROPY, 50.0),
        (3, module.ON_POLICY, 25.0),
        (3, module.CROSS_ENTROPY, 95.0),
        (3, "start", 95.0),
    ],
)
def test_each_part_can_refute(evidence, place, loss, value):
    assert CLAIM.decide(_set(evidence, place, loss, value)).verdict == "refuted"


def test_wide_intervals_decide_nothing(evidence):
    assert CLAIM.decide(evidence.assign(low=0.0, high=100.0)).verdict == "undecided"
