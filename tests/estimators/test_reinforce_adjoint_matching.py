"""Reinforce adjoint matching: exact expectations, where it vanishes, and refusals.

The seeds are fixed and the false-alarm rate of one comparison is `_checks.ALARM`.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from _checks import ALARM
from scipy.integrate import quad

from sdebench import registry
from sdebench.closed_form.reinforce_adjoint import ReinforceAdjoint
from sdebench.errors import NotApplicableError
from sdebench.estimators import reinforce_adjoint_matching as module
from sdebench.measure import measure, measure_group

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ESTIMATOR = registry.estimator("reinforce_adjoint_matching")


def gaussian(**options):
    return registry.problem("gaussian_tilt", **{"rate": 12.0} | options)


def p_value(problem, estimator, point):
    (found,) = measure_group(
        problem,
        [estimator],
        point=point,
        n_steps=6,
        n_paths=2560,
        n_replicates=32,
        seed=4,
        backend="torch",
    )
    assert found.row["status"] == "ok", found.row["reason"]
    return found.row["p_value_own"]


def exact(problem, point, n_steps):
    return ESTIMATOR.target(problem.truth.policy_chain(point, n_steps))


PROBLEMS = [
    {"dim": 2, "mean": 0.3, "rate": 6.0},
    {"schedule": "linear_flow", "start_time": 0.1},
]


@pytest.mark.parametrize("options", PROBLEMS)
@pytest.mark.parametrize("point", ["zero", "overshoot"])
def test_unbiased_for_its_target(options, point):
    assert p_value(gaussian(**options), ESTIMATOR, point) > ALARM


class Wrong(module.ReinforceAdjointMatching):
    """The label of the reward's wrong sign."""

    def statistics(self, view):
        paths = view.rollout()
        paths.reward = -paths.reward
        return super().statistics(view)


def test_a_wrong_sign_is_refused():
    assert p_value(gaussian(**PROBLEMS[0]), Wrong(), "overshoot") < ALARM


def test_at_the_tilt_a_linear_reward_leaves_nothing_and_a_quadratic_one_does():
    scale = np.linalg.norm(gaussian().truth.matching_gradient("zero"))
    linear = gaussian(curvature=0.0)
    sizes = [np.linalg.norm(exact(linear, "optimum", n)) / scale for n in (200, 800)]
    assert sizes[1] < 0.3 * sizes[0] < 0.02
    # the regression pulls the variance up: the quadratic parameter's gradient is > 0
    centered = gaussian(slope=0.0)
    values = [exact(centered, "optimum", n)[1] for n in (500, 1000, 2000)]
    once = [2.0 * fine - coarse for coarse, fine in pairwise(values)]
    limit = (4.0 * once[1] - once[0]) / 3.0
    assert limit == pytest.approx(in_continuous_time(centered), rel=0.02)
    assert limit > 0.0
    known = ReinforceAdjoint(variance=0.5)
    assert known.step(*known.tilted())[1] > 1.05 * known.tilted()[1]


def in_continuous_time(problem):
    """int E (du/dtheta_2)^T (u* - u_label) dt, all of them linear in x_t."""
    base, P, k = problem.family.base, 0.5, 1.0
    B = P / (1.0 + k * P)

    def slope(t):
        alpha, _, square = base.backward(t, 1.0)
        q = alpha**2 * B + square
        own, spread = alpha * B / q, B * square / q
        label = alpha * P / (alpha**2 * P + square) - k * spread * own
        moved = -(B**2) * alpha * square / q**2
        return base.sigma(t) ** 2 * (alpha / square) ** 2 * moved * (own - label) * q

    return quad(slope, 0.0, 1.0 - 1e-9, epsabs=1e-9)[0]


def test_without_a_quadratic_part_it_is_adjoint_matching():
    """At an open-loop control the model's covariance is the tilt's."""
    problem = gaussian(curvature=0.0)
    theta = [0.4, 0.0]
    lean = [problem.truth.matching_gradient(theta, n) for n in (400, 800)]
    ours = [exact(problem, theta, n) for n in (400, 800)]
    gaps = [np.linalg.norm(a - b) for a, b in zip(ours, lean, strict=True)]
    assert gaps[1] < 0.6 * gaps[0] < 0.05 * np.linalg.norm(lean[1])


def test_a_constant_of_the_reward_adds_what_falls_like_one_over_n():
    def change(n_steps):
        policy = gaussian().truth.policy_chain("halfway", n_steps)
        shifted = dataclasses.replace(policy.chain, reward_constant=1.0)
        moved = policy._replace(chain=shifted)
        return np.linalg.norm(ESTIMATOR.target(moved) - ESTIMATOR.target(policy))

    assert change(800) < 0.3 * change(200)
    assert change(200) < 0.1


def test_refused_without_a_denoiser():
    with pytest.raises(NotApplicableError, match="denoised prediction"):
        measure(registry.problem("ou_linear"), ESTIMATOR, n_steps=4, n_replicates=4)
