"""On-policy distillation: the published example, both gradients, and their limit."""

from __future__ import annotations

import numpy as np
import pytest
from _chain import ScalarChain, grid, group_mean, random_noise, rows

from sdebench import registry
from sdebench.errors import UnknownNameError

EXAMPLE = ScalarChain(n_steps=6, scale=0.8, start_mean=0.0, start_scale=1.0)
"""x' = a x + 0.8 z, six steps from N(0, 1), teacher a = 0.5."""


def opd(gradient):
    return registry.estimator("opd", gradient=gradient)


def divergence(a, chain=EXAMPLE):
    """KL divergence of the path laws by the recursion of E x^2."""
    second, total = chain.start_scale**2 + chain.start_mean**2, 0.0
    for _ in range(chain.n_steps):
        total += 0.5 * ((a - chain.optimum) / chain.scale) ** 2 * second
        second = a**2 * second + chain.scale**2
    return total


@pytest.mark.parametrize(
    ("a", "full", "detached", "digits"),
    [(0.9, 11.185, 7.041, 5e-4), (0.6, 1.0026, 0.9375, 5e-5)],
)
def test_the_example(a, full, detached, digits):
    policy = EXAMPLE.policy(a)
    exact = policy.distillation_gradient(detached=False)[0]
    assert exact == pytest.approx(full, abs=digits)
    frozen = policy.distillation_gradient(detached=True)[0]
    assert frozen == pytest.approx(detached, abs=digits)
    step = 1e-4
    slope = (divergence(a + step) - divergence(a - step)) / (2 * step)
    assert exact == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("gradient", ["detached", "full"])
def test_means_are_exact(gradient, backend):
    """Three steps and the start by quadrature, against the closed form."""
    chain = ScalarChain(n_steps=3, scale=0.8, start_mean=0.3, start_scale=1.0)
    noise, weights = grid(chain, 6, start=True)
    statistics = rows(chain, opd(gradient), 0.9, noise, backend=backend)
    mean, _ = group_mean(statistics, weights)
    exact = chain.policy(0.9).distillation_gradient(detached=gradient == "detached")
    np.testing.assert_allclose(mean, exact, rtol=1e-12)


def test_at_the_teacher_both_vanish_on_every_path():
    noise = random_noise(EXAMPLE, 32, seed=1)
    for gradient in ("detached", "full"):
        values = rows(EXAMPLE, opd(gradient), EXAMPLE.optimum, noise)
        assert np.max(np.abs(values)) < 1e-15


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_the_detached_gradient_has_no_noise_of_its_own(backend):
    """Given the states it is fixed: the last step's noise does not matter."""
    noise = random_noise(EXAMPLE, 32, seed=2)
    other = noise.steps.copy()
    other[-1] = 0.0
    moved = noise._replace(steps=other)
    for gradient in ("detached", "full"):
        first = rows(EXAMPLE, opd(gradient), 0.9, noise, backend=backend)
        second = rows(EXAMPLE, opd(gradient), 0.9, moved, backend=backend)
        np.testing.assert_array_equal(first, second)
    other[0] = 0.0
    changed = rows(EXAMPLE, opd("detached"), 0.9, noise._replace(steps=other))
    assert np.all(changed != rows(EXAMPLE, opd("detached"), 0.9, noise))


@pytest.mark.parametrize("spec", ["ou_quadratic_easy:dim=2", "damped_oscillator"])
def test_the_full_gradient_tends_to_that_of_the_objective(spec):
    """First order in the step; the detached one does not."""
    problem = registry.problem(spec)
    exact = problem.truth.gradient("halfway")
    distances = {True: [], False: []}
    for n_steps in (200, 400):
        policy = problem.truth.policy_chain("halfway", n_steps)
        for detached, found in distances.items():
            gradient = policy.distillation_gradient(detached=detached)
            found.append(np.linalg.norm(gradient - exact) / np.linalg.norm(exact))
    assert distances[False][0] < 0.05
    ratio = distances[False][0] / distances[False][1]
    assert ratio == pytest.approx(2.0, abs=0.1)
    assert distances[True][1] > 0.9 * distances[True][0]


def test_wrong_options_are_refused():
    with pytest.raises(UnknownNameError, match="detached"):
        opd("frozen")
