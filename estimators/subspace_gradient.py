"""Zeroth-order gradient projected on the subspace that the iterates have explored.

ZOODiP keeps the last iterates of its optimization, finds the principal components of
their centred history, and projects the directions out of the gradient in which they
hardly moved: those beyond a share 1 - nu of the variance.  The variance of a
zeroth-order estimate grows with the dimension, so fewer directions are less noisy, but
what the gradient has outside of the subspace is lost.

Here the history is a training run that went straight from 0 to theta,

    theta_k = (k / tau) theta + spread xi_k,   k = 1, ..., tau,

with the same Gaussian xi for every replicate: the projection M is known, and so is the
expectation M grad J.  At theta = 0 the history is noise alone and nothing is projected
out.  The original history has as many coordinates as a token embedding and is
standardized first; that would make noise in a coordinate that does not move as
important as one that does, and is left out.

With n Gaussian directions, E|g|^2 -> (n + P + 1)/n |grad J|^2 without projection as
mu -> 0; ``normalize`` divides by sqrt((n + P - 1)/n), as the original does, which
shrinks the mean too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.composite import CompositeEstimator, Runner
from sdebench.errors import ParameterError
from sdebench.estimator import Array, estimand_of
from sdebench.estimators._smoothing import (
    check_perturbations,
    draw_directions,
    path_costs,
    smoothed_gradients,
    smoothed_target,
)

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain


def iterate_history(theta: Array, iterates: int, spread: float) -> Array:
    """Return the history (iterates, P) of the module docstring."""
    noise = np.random.default_rng(0).standard_normal((iterates, len(theta)))
    line = np.arange(1, iterates + 1)[:, None] / iterates * theta
    return line + spread * noise


def principal_projection(history: Array, discarded: float) -> Array:
    """Return the projection (P, P) on the leading principal components.

    The fewest that explain at least a share 1 - ``discarded`` of the variance.
    """
    centred = history - history.mean(axis=0)
    _, lengths, components = np.linalg.svd(centred, full_matrices=False)
    explained = np.cumsum(lengths**2) / np.sum(lengths**2)
    kept = 1 + int(np.sum(explained[:-1] < 1.0 - discarded))
    return np.asarray(components[:kept].T @ components[:kept])


@dataclass(frozen=True, kw_only=True)
class SubspaceGradient(CompositeEstimator):
    """Zeroth-order gradient on the principal subspace of an iterate history.

    Parameters
    ----------
    objective : "control" (J) or "reward" (-E r(X_T)).
    n_directions : Gaussian directions that are averaged.
    smoothing : mu, the size of the perturbation.
    iterates : tau, the length of the history.
    spread : standard deviation of the iterates about the straight line.
    discarded : nu, the share of the history's variance that may be projected out.
    normalize : whether to divide by sqrt((n_directions + P - 1)/n_directions).
    """

    source: ClassVar[str] = (
        'Seo et al. 2025, "Efficient personalization of quantized diffusion model '
        'without backpropagation" (ZOODiP), arXiv:2503.14868'
    )
    formula: ClassVar[str] = r"""\begin{aligned}
g &= M\, \frac{1}{n} \sum_{k=1}^{n} z_k\,
  \frac{c(\theta + \mu z_k) - c(\theta)}{\mu}, \quad z_k \sim N(0, I) \\
M &= \sum_{i \le m} v_i v_i^\top, \quad
  \frac{\lambda_1 + \dots + \lambda_m}{\lambda_1 + \dots + \lambda_P} \ge 1 - \nu
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "the gradient of the smoothed discretized objective, projected on the "
        "subspace: M grad J_N + O(mu^2)"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"normalize": True})

    objective: str = "control"
    n_directions: int = 2
    smoothing: float = 0.001
    iterates: int = 128
    spread: float = 0.001
    discarded: float = 0.001
    normalize: bool = False

    def __post_init__(self) -> None:
        estimand_of(self.objective)
        check_perturbations(self.n_directions, self.smoothing)
        if self.iterates < 2:
            raise ParameterError(f"iterates = {self.iterates} must be at least 2")
        if not 0.0 < self.spread < math.inf:
            raise ParameterError(
                f"spread = {self.spread} must be a positive number, e.g. 0.001"
            )
        if not 0.0 <= self.discarded < 1.0:
            raise ParameterError(f"discarded = {self.discarded} must be in [0, 1)")

    @property
    def estimand(self) -> str:  # type: ignore[override]
        return estimand_of(self.objective)

    def group_size(self, n_paths: int) -> int:
        return n_paths

    @property
    def handles_state_dependent_noise(self) -> bool:
        return True

    def target(self, policy: PolicyChain) -> Array:
        smoothed = smoothed_target(policy, self.objective, self.smoothing, "gaussian")
        return self._matrix(policy.theta) @ smoothed

    def run(self, runner: Runner) -> Array:
        directions = draw_directions(
            runner.rng(), "gaussian", self.n_directions, runner.n_params
        )
        rows = smoothed_gradients(
            path_costs(runner, self.objective, runner.noise()),
            runner.theta,
            directions,
            self.smoothing,
            "forward",
        )
        return self._matrix(runner.theta) @ rows

    def _matrix(self, theta: Array) -> Array:
        """Return the projection, divided by the norm's growth if wanted."""
        history = iterate_history(theta, self.iterates, self.spread)
        n, n_params = self.n_directions, len(theta)
        growth = math.sqrt((n_params + n - 1) / n) if self.normalize else 1.0
        return principal_projection(history, self.discarded) / growth
