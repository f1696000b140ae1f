"""Log-ratio of the policy's path law to the tilted one, along paths of any control.

With the noise y_n = z_n + v_n of the base process on paths of a control v,

    l = sum_n (w_n . y_n - 1/2 |w_n|^2 + f_n) - r(X_N) = log dP_theta/dP* - log Z,
    grad l = sum_n (dw_n/dtheta)^T (y_n - w_n),

the gradient with the path held fixed: the score of the policy.  Losses on l do not
depend on v at their minimum, where l is a constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sdebench.composite import CompositeEstimator, Runner
from sdebench.errors import unknown
from sdebench.estimator import Array
from sdebench.estimators._off_policy import OffPolicyScores
from sdebench.estimators._scores import Scores

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain

SAMPLING = {"current": "theta", "base": "none", "optimal": "optimal"}


@dataclass(frozen=True, kw_only=True)
class LogRatioEstimator(CompositeEstimator):
    """A loss on the log-ratio over paths of the control ``sampling``."""

    needs: ClassVar[frozenset[str]] = frozenset({"control_parameter_vjp"})

    sampling: str = "current"

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLING:
            raise unknown("sampling", self.sampling, SAMPLING)

    @property
    def control(self) -> str:
        return SAMPLING[self.sampling]

    @property
    def handles_state_dependent_noise(self) -> bool:
        return True

    def log_ratio(self, runner: Runner) -> tuple[Array, Array]:
        """Return l (n_paths,) and grad l (P, n_paths)."""
        count = runner.n_params
        if self.sampling == "current":
            (rows,) = runner.run(Scores())
            ratio = 0.0
        else:
            (rows,) = runner.run(OffPolicyScores(old=self.control))
            ratio = rows[count]
        control, running, martingale, reward = rows[-4:]
        # of the policy to the paths' law, of that to the base, of the base to the tilt
        ratio = ratio + (control + martingale) + (running - reward)
        return ratio, rows[:count]


@dataclass(frozen=True, kw_only=True)
class CentredLogRatio(LogRatioEstimator):
    """Sample covariance of l and grad l: the gradient of half the variance of l."""

    def n_statistics(self, n_params: int) -> int:
        return 2 * n_params + 1

    def not_applicable(self, n_paths: int) -> str | None:
        if n_paths < 2:
            return "a variance needs at least 2 paths per replicate"
        return None

    def target(self, policy: PolicyChain) -> Array:
        if self.sampling == "current":
            return policy.gradient()
        return policy.log_variance_gradient(self.sampling)

    def run(self, runner: Runner) -> Array:
        log_ratio, score = self.log_ratio(runner)
        return np.vstack([log_ratio * score, score, log_ratio])

    def combine(self, mean: Array, n_paths: int) -> Array:
        product, score = np.split(mean[:-1], 2)
        return (product - mean[-1] * score) * (n_paths / (n_paths - 1))
