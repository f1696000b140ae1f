"""The study of Feynman-Kac correctors: limits by simulation, and a small run."""

from __future__ import annotations

import numpy as np
import pytest

from sdebench import studies
from sdebench.closed_form.density_powers import product
from sdebench.experiments.particles import Corrector
from sdebench.studies import feynman_kac_correctors as module

STUDY = studies.study("feynman_kac_correctors")
SIGMAS = 5.0
"""Standard errors; four comparisons, each by chance with 6e-7."""


@pytest.mark.parametrize("target", [module.ANNEALED, module.GUIDED])
def test_limits_by_simulation(target):
    """E W and E W x^2 of Riemann sums with 25 steps, and the variance of W."""
    n, n_steps, path = 40_000, 25, module.TARGETS[target]
    rng = np.random.default_rng(4)
    x = path.start_scale("matched") * rng.standard_normal((n, 1))
    noise = rng.standard_normal((n_steps, n, 1))
    found = Corrector(path, weights="riemann", threshold=None).run(x, noise)
    right = module.estimate(target, n_steps, "riemann")
    limit = module.answer(target).log_mass + right.error
    weights = np.exp(found.log_weights - limit)
    squares = weights * (found.states[:, 0] ** 2 - right.second)
    assert abs(weights.mean() - 1.0) < SIGMAS * weights.std() / np.sqrt(n)
    assert abs(squares.mean()) < SIGMAS * squares.std() / np.sqrt(n)
    assert weights.var() == pytest.approx(right.variance, rel=0.15)
    assert squares.var() == pytest.approx(right.second_variance, rel=0.35)
    # Power: without the discretization's error it would not agree.
    assert abs(np.expm1(right.error)) > 4.0 * weights.std() / np.sqrt(n)


def test_whole_powers_are_mixtures():
    for target, factors in (
        (module.SQUARED, (module.FIRST, module.FIRST)),
        (module.PRODUCT, (module.FIRST, module.OTHER)),
    ):
        law, found = product(factors), module.answer(target)
        assert law.log_mass() == pytest.approx(found.log_mass, abs=1e-12)


@pytest.mark.parametrize("target", list(module.TARGETS))
def test_the_nodes_reach_far_enough(target):
    """Integrands reach farthest at the fewest steps: twice the range is the same."""
    path, wide = module.TARGETS[target], np.linspace(-16.0, 16.0, 401)
    for order in (1.0, 2.0):
        args = path, module.STEPS[0], "riemann", order
        if module.finite_weight_moment(*args):
            near, far = (
                module.weighted_ends(*args, nodes)
                for nodes in (module.NODES[::2], wide)
            )
            np.testing.assert_allclose(near, far, rtol=1e-6)


@pytest.fixture(scope="module")
def evidence():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "N_STEPS", 20)
        patch.setattr(module, "N_PARTICLES", 128)
        patch.setattr(module, "N_REPLICATES", 4)
        patch.setattr(module, "STEPS", (50, 80))
        patch.setattr(module, "KERNEL_STEPS", (50,))
        patch.setattr(module, "PRINTED_STEPS", (50, 100))
        texts = {name: text[:2] for name, text in module.PRINTED_ERRORS.items()}
        patch.setattr(module, "PRINTED_ERRORS", texts)
        patch.setattr(module, "NODES", np.linspace(-8.0, 8.0, 121))
        yield STUDY.experiment(4, lambda done, total: None)


def test_small_run(evidence):
    table = STUDY.table(evidence)
    outcome = dict(zip(table["quantity"], table["agreement"], strict=True))
    assert outcome[f"{module.GUIDED}, K = 50: log Z error"] == "inside"
    assert outcome[f"{module.GUIDED}: exact E x²"] == "equal"
    assert len(table) == 9 + 20 + 4
    ours = dict(zip(table["quantity"], table["ours"], strict=True))
    assert ours[f"{module.GUIDED}: log Z error from N(0, 1)"] == "0.0000"
    never, *_, always = module.SCHEMES
    assert "effective" in ours[f"{module.PRODUCT}, {never}: mean errors"]
    assert "19.0 resamplings" in ours[f"{module.PRODUCT}, {always}: mean errors"]
    assert "comparisons agree" in STUDY.summary(evidence)
    assert all(axes.has_data() for axes in STUDY.figure(evidence).axes)


def test_weights_without_variance_have_no_effective_size(evidence):
    shares = evidence[evidence["kind"] == "share"].groupby("target")["value"].max()
    assert shares[module.SQUARED] == shares[module.PRODUCT] == 0.0
    assert shares[module.GUIDED] > 0.3
