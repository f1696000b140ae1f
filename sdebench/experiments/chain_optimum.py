"""A problem whose control is a multiple of the optimal one of its N-step chain."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from sdebench.closed_form.linear_quadratic import LinearQuadratic
from sdebench.experiments.measuring import Array
from sdebench.linear_problem import LinearProblem, Profile


@dataclass(frozen=True, kw_only=True)
class ChainOptimum(LinearProblem):
    """A problem whose control is theta times the optimal one of its N-step chain.

    Parameters
    ----------
    base : the problem.
    n_steps : N, on a uniform grid.
    """

    base: LinearProblem
    n_steps: int

    def build(self) -> LinearQuadratic:
        return self.base.model

    @property
    def profiles(self) -> tuple[Profile, ...]:
        return (Profile("factor", 0, 0),)

    @property
    def theta_star(self) -> Array:
        return np.ones(1)

    def spatial_map(self, name: str, t: Array) -> tuple[Array, Array]:
        chain = self.base.truth.policy_chain("optimum", self.n_steps).chain
        gain, bias = chain.optimal_feedback()
        step = self.model.horizon / self.n_steps
        n = np.minimum(np.rint(t / step).astype(int), self.n_steps - 1)
        return gain[n] / sqrt(step), bias[n] / sqrt(step)
