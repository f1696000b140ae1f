"""Cross-entropy: gradient of KL(P* || P_theta), P* the tilted path law.

Along paths of a control v the noise of the base process is y_n = z_n + v_n, and the
score of the policy is sum_n (dw_n/dtheta)^T (y_n - w_n).  Minus its mean under P* is
the gradient,

    -E*[score] = E* sum_n (dw_n/dtheta)^T (w_n - y_n),

and E* is a weighted mean over the paths, with weights alpha = dP*/dP_v up to Z.  Given
X_n the mean of y_n under P* is the optimal control w*_n of the chain, so that the
gradient vanishes there.  The paths may have any control; where alpha is constant it is
a plain mean.

The weights are normalised by their own mean, which leaves a bias of order 1/n_paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sdebench.composite import CompositeEstimator, Runner
from sdebench.errors import unknown
from sdebench.estimator import Array
from sdebench.estimators._off_policy import OffPolicyScores
from sdebench.estimators._proposals import PROPOSALS
from sdebench.estimators._scores import Scores
from sdebench.estimators._tilted_weights import log_weight, normalized, weighted


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(CompositeEstimator):
    """Gradient of the relative entropy of the tilted path law to the policy's.

    Parameters
    ----------
    proposal : control of the simulated paths: "zero", "given" (the evaluation point's)
        or "optimal".
    """

    estimand: ClassVar[str] = "cross_entropy_gradient"
    source: ClassVar[str] = (
        "Zhang et al. 2014, SIAM J. Sci. Comput. 36; Nüsken and Richter 2021, "
        "arXiv:2005.05409"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
\log \alpha &= r(X_N) - \sum_n \left( f_n + v_n \cdot z_n
  + \tfrac{1}{2} |v_n|^2 \right), \quad y_n = z_n + v_n \\
s &= \sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top
  \left( w_n - y_n \right) \\
g &= \frac{\sum_{m=1}^{M} \alpha^{(m)} s^{(m)}}{\sum_{m=1}^{M} \alpha^{(m)}}
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "with many paths, the gradient of KL(P* || P_theta) of the discretized "
        "process, for every control of the paths"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"control_parameter_vjp"})
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"proposal": "zero"},
        {"proposal": "optimal"},
    )

    proposal: str = "given"

    def __post_init__(self) -> None:
        if self.proposal not in PROPOSALS:
            raise unknown("proposal", self.proposal, PROPOSALS)

    @property
    def control(self) -> str:
        return PROPOSALS[self.proposal]

    @property
    def declared_bias(self) -> str:
        return "1/n_paths"

    def n_statistics(self, n_params: int) -> int:
        return n_params + 1

    def group_size(self, n_paths: int) -> int:
        return n_paths

    @property
    def handles_state_dependent_noise(self) -> bool:
        return True

    def run(self, runner: Runner) -> Array:
        if self.proposal == "given":
            (rows,) = runner.run(Scores())
        else:
            (rows,) = runner.run(OffPolicyScores(old=self.control))
        return weighted(-rows[: runner.n_params], log_weight(rows[-4:]))

    def combine(self, mean: Array, n_paths: int) -> Array:
        return normalized(mean)
