"""Zeroth-order gradient: differences of the objective along random directions of theta.

Every path of a replicate is simulated at theta + mu z, theta - mu z or theta with the
same noise (common random numbers), so that a difference of the path's costs is a
directional derivative and its variance does not grow as mu shrinks.  The forms and
directions are those of `sdebench.estimators._smoothing`; n directions are averaged.

On a quadratic without noise, with gradient g, Hessian H, P = dim theta, the second
moment of one direction is

==========  =====================  ==================================================
directions  two_point              forward: in addition mu^2/4 times
==========  =====================  ==================================================
gaussian    (P + 2) |g|^2          (P + 4) ((tr H)^2 + 2 tr H^2)
sphere      P |g|^2                P^2/(P + 2) ((tr H)^2 + 2 tr H^2)
rademacher  P |g|^2                P ((tr H)^2 + 2 tr H^2 - 2 sum_i H_ii^2)
==========  =====================  ==================================================

and n directions divide its excess over |g|^2 by n.  The one-point form of Gaussian
directions adds P f^2/mu^2 + (P + 2) f tr H to the forward one: without a baseline its
variance grows as 1/mu^2.

One set of directions serves a group of paths, by default the whole replicate: every
new theta needs new coefficient tables, which cost as much as many paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.composite import CompositeEstimator, Runner, some_paths
from sdebench.errors import ParameterError, unknown
from sdebench.estimator import Array, estimand_of
from sdebench.estimators._smoothing import (
    DIRECTIONS,
    FORMS,
    check_perturbations,
    draw_directions,
    path_costs,
    smoothed_gradients,
    smoothed_target,
)

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain

BASELINES = ("none", "leave_one_out")


@dataclass(frozen=True, kw_only=True)
class ZerothOrder(CompositeEstimator):
    """Gradient from differences of the cost along random directions of theta.

    Parameters
    ----------
    objective : "control" (J) or "reward" (-E r(X_T)).
    directions : "gaussian", "sphere" or "rademacher" (SPSA).
    form : "two_point" (central), "forward" or "one_point".  Evolution strategies with
        mirrored sampling are the two-point form with several Gaussian directions.
    n_directions : directions that are averaged.
    smoothing : mu, the size of the perturbation.
    baseline : of the one-point form: "none" or "leave_one_out", the mean over the
        other directions.
    group : paths that share their directions; 0 is the whole replicate.
    """

    source: ClassVar[str] = (
        "Spall 1992 (SPSA); Nesterov and Spokoiny 2017 (Gaussian smoothing); Salimans "
        "et al. 2017, arXiv:1703.03864 (evolution strategies)"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
g &= \frac{1}{n} \sum_{k=1}^{n} z_k\,
  \frac{c(\theta + \mu z_k) - c(\theta - \mu z_k)}{2 \mu}, \quad
  E z_k = 0, \ E z_k z_k^\top = I \\
c &= \sum_n \left( \tfrac{1}{2} |w_n|^2 + f_n \right) - r(X_N)
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "E[z J_N(theta + mu z)]/mu, the gradient of the smoothed discretized "
        "objective; it differs from the gradient by O(mu^2) and not at all if J_N is "
        "quadratic"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"directions": "rademacher"},
        {
            "directions": "rademacher",
            "form": "one_point",
            "n_directions": 8,
            "smoothing": 0.1,
            "baseline": "leave_one_out",
        },
    )

    objective: str = "control"
    directions: str = "gaussian"
    form: str = "two_point"
    n_directions: int = 1
    smoothing: float = 0.01
    baseline: str = "none"
    group: int = 0

    def __post_init__(self) -> None:
        estimand_of(self.objective)
        for name, allowed in (
            ("directions", DIRECTIONS),
            ("form", FORMS),
            ("baseline", BASELINES),
        ):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        check_perturbations(self.n_directions, self.smoothing)
        if self.group < 0:
            raise ParameterError(f"group = {self.group} must be at least 0")
        if self.baseline != "none" and self.form != "one_point":
            raise ParameterError(
                f"baseline {self.baseline} belongs to form one_point; a difference "
                f"such as form {self.form} has subtracted it already"
            )
        if self.baseline != "none" and self.n_directions < 2:
            raise ParameterError(
                f"baseline {self.baseline} compares directions; n_directions = "
                f"{self.n_directions} must be at least 2"
            )

    @property
    def estimand(self) -> str:  # type: ignore[override]
        return estimand_of(self.objective)

    def group_size(self, n_paths: int) -> int:
        return self.group or n_paths

    def target(self, policy: PolicyChain) -> Array:
        return smoothed_target(policy, self.objective, self.smoothing, self.directions)

    @property
    def handles_state_dependent_noise(self) -> bool:
        return True

    def run(self, runner: Runner) -> Array:
        rng, noise = runner.rng(), runner.noise()
        size = self.group_size(runner.n_paths)
        rows = []
        for first in range(0, runner.n_paths, size):
            own = some_paths(noise, first, size)
            values = path_costs(runner, self.objective, own, first)
            directions = draw_directions(
                rng, self.directions, self.n_directions, runner.n_params
            )
            rows.append(
                smoothed_gradients(
                    values,
                    runner.theta,
                    directions,
                    self.smoothing,
                    self.form,
                    self.baseline,
                )
            )
        return np.concatenate(rows, axis=1)
