"""Variance loss: the variance of the weights of the tilted path law to the policy's.

Along paths of a control v, with the log-ratio l of `sdebench.estimators._log_ratio`,
the weights are a = e^{-l} = Z dP*/dP_theta, and 1/2 Var_v(a) is differentiated with the
paths held fixed,

    -Cov_v(a, a grad l).

Its size is Z^2.  It is divided by the squared mean of the weights, held fixed too: that
changes the length of the gradient and not its direction, and near the optimum makes it
that of the log-variance loss, as a = Z (1 - (l + log Z) + ...).  On policy it is
-(E*[(dP*/dP_theta) S] - E*[S]) with the score S.

The weights' second moment decides whether the gradient exists, and their fourth whether
it has a variance.  On an affine chain both are known exactly
(`sdebench.closed_form.path_quadratics`): e^{-l} has moments up to an order that
decreases with the distance of the two laws, and far from the optimum the loss is
infinite.  Where it is finite its variance grows exponentially with the cost.

The mean of the same sample leaves a bias of order 1/n_paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.composite import Runner
from sdebench.estimator import Array
from sdebench.estimators._log_ratio import LogRatioEstimator

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain


@dataclass(frozen=True, kw_only=True)
class Variance(LogRatioEstimator):
    """Gradient of half the variance of the path weights, relative to their mean.

    Parameters
    ----------
    sampling : control of the paths: "current" (the policy's), "base" or "optimal".
    """

    estimand: ClassVar[str] = "cross_entropy_gradient"
    source: ClassVar[str] = "Nüsken and Richter 2021, arXiv:2005.05409"
    formula: ClassVar[str] = r"""\begin{aligned}
\ell &= \sum_n \left( w_n \cdot y_n - \tfrac{1}{2} |w_n|^2 + f_n \right) - r(X_N),
  \quad a = e^{-\ell}, \quad y_n = z_n + v_n \\
g &= -\frac{1}{(M - 1) \, \bar a^2} \sum_{m=1}^{M} \left( a^{(m)} - \bar a \right)
  a^{(m)} \nabla_\theta \ell^{(m)}
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "with many paths, half the gradient of the variance of the weights under the "
        "paths' law over their squared mean held fixed, where they have a second moment"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"sampling": "optimal"},
    )

    @property
    def declared_bias(self) -> str:
        return "1/n_paths"

    def n_statistics(self, n_params: int) -> int:
        return 2 * n_params + 1

    def group_size(self, n_paths: int) -> int:
        return n_paths

    def not_applicable(self, n_paths: int) -> str | None:
        if n_paths < 2:
            return "a variance needs at least 2 paths per replicate"
        return None

    def target(self, policy: PolicyChain) -> Array:
        return policy.weight_variance_gradient(self.sampling)

    def run(self, runner: Runner) -> Array:
        log_ratio, score = self.log_ratio(runner)
        weights = np.exp(np.min(log_ratio) - log_ratio)
        # of mean one in a replicate: tails are compared across replicates
        weights = weights / np.mean(weights)
        return np.vstack([weights**2 * score, weights * score, weights])

    def combine(self, mean: Array, n_paths: int) -> Array:
        second, first = np.split(mean[:-1], 2)
        covariance = (second - mean[-1] * first) * (n_paths / (n_paths - 1))
        return np.asarray(-covariance / mean[-1] ** 2)
