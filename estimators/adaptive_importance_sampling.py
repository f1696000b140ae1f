r"""Adaptive importance sampling of the cross-entropy gradient with control variates.

The gradient is a ratio of expectations under the law f = P_theta of the policy's paths,

    I_j / I_0,   I_0 = E_f[alpha] = Z,   I_j = E_f[alpha s_j],   alpha = Z dP*/df,

with minus the score s of the policy.  All are estimated from one sample X ~ g, whose
density ratio f/g has the known mean one:

    I_j_hat = mean[(phi_j(X) - beta_j) f(X)/g(X)] + beta_j,   phi = (alpha, alpha s).

1.  A first sample from f.  The best proposal g ~ f q, q^2 = sum_j (phi_j - beta_j)^2
    over Var phi_j, and the best beta for it are found in turns
    (`sdebench.closed_form.control_variate_sampling`), and this law on the sample is
    projected on the problem's own controls: one Newton step of its cross-entropy,
    theta' = theta + F^{-1} E_g[S] with F = E_f[S S^T], no longer than a given relative
    entropy, 1/2 |theta' - theta|_F^2, and halved while the problem refuses it.
2.  A fresh sample from g = P_theta'.  Half of it uses the best beta of the other half
    for this g, the regression of phi f/g on f/g.

Given theta' every I_j_hat is unbiased: theta' comes from other paths, and each beta
from other paths than it multiplies.  The ratio leaves a bias of order 1/n_paths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sdebench.closed_form.control_variate_sampling import best_beta, best_ratio
from sdebench.composite import CompositeEstimator, Runner, some_paths
from sdebench.errors import ParameterError
from sdebench.estimator import Array, Sizes
from sdebench.estimators._cross_fitting import cross_fitted
from sdebench.estimators._off_policy import OffPolicyScores
from sdebench.estimators._scores import Scores
from sdebench.estimators._tilted_weights import log_weight, normalized

TURNS = 20
"""Of proposal and coefficients; what is left of S after them is far below 1 %."""
HALVINGS = 5
RIDGE = 1e-6
"""Of the information matrix, relative to its mean eigenvalue."""
PATHS_PER_PARAMETER = 2
"""Of the first sample."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveImportanceSampling(CompositeEstimator):
    """Cross-entropy gradient from one adapted sample for numerators and denominator.

    Parameters
    ----------
    pilot : share of the paths in the first sample, between 0 and 1.
    divergence : largest relative entropy of the adapted law to the policy's, about; 0
        for no adaptation.
    control_variate : whether f/g is used as one.
    """

    estimand: ClassVar[str] = "cross_entropy_gradient"
    source: ClassVar[str] = "arXiv:2212.00568, by its abstract; on paths: derived here"
    formula: ClassVar[str] = r"""\begin{aligned}
\log \alpha &= r(X_N) - \sum_n \left( f_n + w_n \cdot z_n
  + \tfrac{1}{2} |w_n|^2 \right), \quad
s = -\sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top z_n \\
\hat I_j &= \beta_j + \frac{1}{M} \sum_{m=1}^{M} (\varphi_j - \beta_j)
  \frac{dP_\theta}{dP_{\theta'}}(X^{(m)}), \quad
  \varphi = (\alpha, \alpha s), \quad X^{(m)} \sim P_{\theta'} \\
g_j &= \hat I_j / \hat I_0
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "given theta', numerators and denominator of the gradient of KL(P* || P_theta) "
        "of the discretized process, before the ratio, which has a bias of order "
        "1/n_paths"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"control_parameter_vjp"})
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"control_variate": False},
    )

    pilot: float = 0.25
    divergence: float = 0.5
    control_variate: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.pilot < 1.0:
            raise ParameterError(
                f"pilot {self.pilot!r} must be a share of the paths between 0 and 1"
            )
        if not 0.0 <= self.divergence < math.inf:
            raise ParameterError(
                f"divergence {self.divergence!r} must be finite and at least 0"
            )

    @property
    def declared_bias(self) -> str:
        return "1/n_paths"

    @property
    def handles_state_dependent_noise(self) -> bool:
        return True

    def n_statistics(self, n_params: int) -> int:
        return n_params + 1

    def group_size(self, n_paths: int) -> int:
        return n_paths

    def _first(self, n_paths: int) -> int:
        """Return the number of paths of the first sample."""
        return round(self.pilot * n_paths)

    def not_applicable_to(self, sizes: Sizes) -> str | None:
        first = self._first(sizes.n_paths)
        least = PATHS_PER_PARAMETER * (sizes.n_params + 1)
        if min(first, sizes.n_paths - first) >= least:
            return None
        return (
            f"its samples of {first} and {sizes.n_paths - first} paths are too few to "
            f"adapt to {sizes.n_params} parameters; each needs at least {least}"
        )

    def run(self, runner: Runner) -> Array:
        first, noise = self._first(runner.n_paths), runner.noise()
        (rows,) = runner.run(Scores(), noise=some_paths(noise, 0, first))
        score = rows[: runner.n_params]
        move = self.adapted_move(score, log_weight(rows[-4:]))
        fresh = some_paths(noise, first, runner.n_paths - first)
        for halving in range(HALVINGS + 1):
            moved = runner.theta + (move * 0.5**halving if halving < HALVINGS else 0.0)
            try:
                (rows,) = runner.run(
                    OffPolicyScores(old=tuple(moved)), noise=fresh, first=first
                )
                break
            except ParameterError:
                if halving == HALVINGS:
                    raise
        estimates = np.zeros((runner.n_params + 1, runner.n_paths))
        estimates[:, first:] = self.expectations(rows)
        return estimates

    def adapted_move(self, score: Array, log_weights: Array) -> Array:
        """Return theta' - theta (P,) from scores (P, n) and log-weights of the policy.

        Zero where the best proposal is the policy's own law.
        """
        weights = np.exp(log_weights - np.max(log_weights))
        functions = np.vstack([weights, -weights * score])
        spread = np.var(functions, axis=1)
        law = np.full(len(weights), 1.0 / len(weights))
        inverse = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0.0)
        beta = np.zeros(len(functions))
        try:
            for _ in range(TURNS):
                ratio = best_ratio(functions, law, inverse, beta)
                beta = best_beta(functions, law, ratio)
        except ParameterError:
            return np.zeros(len(score))
        information = score @ score.T / len(law)
        size = np.trace(information) / len(score)
        information += RIDGE * size * np.eye(len(score))
        move = np.linalg.solve(information, score @ (ratio * law))
        divergence = 0.5 * float(move @ information @ move)
        if divergence > self.divergence:
            move *= math.sqrt(self.divergence / divergence)
        return np.asarray(move)

    def expectations(self, rows: Array) -> Array:
        """Return I_j_hat and I_0_hat (P + 1, n) path by path, up to a common factor.

        From the rows of `OffPolicyScores`.
        """
        weights = np.exp(log_weight(rows[-4:]) - np.max(log_weight(rows[-4:])))
        weights = weights / np.mean(weights)
        functions = np.vstack([-weights * rows[:-5], weights])
        if not self.control_variate:
            return functions
        return cross_fitted(functions, np.expm1(rows[-5:-4]))

    def combine(self, mean: Array, n_paths: int) -> Array:
        return normalized(mean)
