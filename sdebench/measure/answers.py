"""The exact answers that an estimator is judged by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdebench.errors import NotExactError
from sdebench.estimator import Estimator
from sdebench.problem import Problem

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """Exact answers to one estimator's question; None where there is none.

    truth : of continuous time.
    discrete : of the N-step discretization; ``truth`` for an estimator that has none.
    target : what the estimator is unbiased for, on the same steps; ``discrete`` for
        most.
    error : bound on the error of ``truth``.
    """

    truth: Array | None
    discrete: Array | None
    target: Array | None
    error: float


def exact_answers(
    problem: Problem, estimator: Estimator, theta: Array, times: Array, scheme: str
) -> Answers:
    """Return the exact answers at an evaluation point, on a time grid."""
    truth, estimand = problem.truth, estimator.estimand
    continuous = truth.answer(estimand, theta)
    discrete = continuous
    if not estimator.discretization_free:
        discrete = truth.answer(estimand, theta, times, scheme)
    target = discrete
    if estimator.has_target and not estimator.discretization_free:
        try:
            noisy = estimator.noisy_steps(len(times) - 1)
            target = estimator.target(truth.policy_chain(theta, times, scheme, noisy))
        except NotExactError:
            target = None
    error = 0.0 if continuous is None else truth.error_bound(estimand, theta)
    return Answers(continuous, discrete, target, error)
