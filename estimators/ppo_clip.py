"""Clipped surrogate of proximal policy optimization, and its gradient.

The paths come from an older policy with parameters old_factor theta.  With the ratio
rho_n of the two densities of step n, or of the whole path, and the advantage A of a
path, the reward relative to the mean of its group, the surrogate

    min(rho A, clip(rho, 1 - clip, 1 + clip) A)

of every step or of the path is maximized.  Its gradient keeps the steps with
rho <= 1 + clip if A > 0 and those with rho >= 1 - clip if A < 0.  With the score s_n at
theta and minus signs, since -E r is minimized:

    gradient = -sum_n A rho_n s_n 1{step n is kept}.

In the first epoch the policies agree, rho = 1, and this is REINFORCE whatever the clip.
The ratio of the path without a clip is importance sampling, which is exact.  The ratio
of a step corrects the law of that step's noise only, not of the states that it meets.
The released codes of Flow-GRPO and its relatives average the log-probability over the
coordinates: the ratio to the power 1/d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.composite import CompositeEstimator, Runner
from sdebench.errors import ParameterError, unknown
from sdebench.estimator import Array
from sdebench.estimators._groups import (
    advantages,
    check_group,
    check_log_probability,
    gradient_factor,
)
from sdebench.estimators._off_policy import ClippedScores, OffPolicyScores

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain

RATIOS = ("step", "path")


@dataclass(frozen=True, kw_only=True)
class PPOClip(CompositeEstimator):
    """Gradient of the clipped surrogate of proximal policy optimization.

    Parameters
    ----------
    clip : >= 0; 0 for no clip.
    old_factor : the paths come from parameters old_factor theta; 1: first epoch.
    ratio : "step", as in the codes for diffusion models, or "path".
    log_probability : "sum" or "mean" over the coordinates.
    group : >= 2 paths, whose mean reward is the baseline.
    leave_one_out : leave the path itself out of that mean.
    """

    estimand: ClassVar[str] = "reward_only_gradient"
    source: ClassVar[str] = (
        "Schulman et al. 2017, arXiv:1707.06347, eq. (7); for diffusion models Black "
        "et al. 2023, arXiv:2305.13301, section 4.3"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
\rho_n &= \frac{p_\theta(X_{n+1} \mid X_n)}{p_{\mathrm{old}}(X_{n+1} \mid X_n)},
  \quad A = r(X_N) - \bar r \\
g &= -\nabla_\theta \sum_n \min \left( \rho_n A,\,
  \mathrm{clip}(\rho_n, 1 - \epsilon, 1 + \epsilon) A \right)
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "the gradient of -E r(X_N) of the N-step chain in the first epoch (old_factor "
        "1), and with the ratio of the path without a clip; with the ratio of a step "
        "that of a surrogate, which a clip biases"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"control_parameter_vjp"})
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"old_factor": 0.9},
        {"old_factor": 0.9, "ratio": "path", "clip": 0.0},
    )

    clip: float = 0.2
    old_factor: float = 1.0
    ratio: str = "step"
    log_probability: str = "sum"
    group: int = 8
    leave_one_out: bool = True

    def __post_init__(self) -> None:
        if self.ratio not in RATIOS:
            raise unknown("ratio", self.ratio, RATIOS)
        if not 0.0 <= self.clip < math.inf:
            raise ParameterError(
                f"clip {self.clip} must be a number >= 0; 0 stands for no clip"
            )
        if not math.isfinite(self.old_factor):
            raise ParameterError(f"old_factor {self.old_factor} must be finite")
        check_group(self.group)
        check_log_probability(self.log_probability)

    @property
    def control(self) -> float:
        return self.old_factor

    @property
    def declared_bias(self) -> str:
        free = self.clip == 0.0 and self.log_probability == "sum"
        return "none" if free or self.old_factor == 1.0 else "any"

    def group_size(self, n_paths: int) -> int:
        return self.group

    def target(self, policy: PolicyChain) -> Array:
        """Return the mean without clip and powers of the ratio: they count as bias."""
        factor = gradient_factor(
            self.group, self.leave_one_out, self.log_probability, policy.chain.dim
        )
        if self.ratio == "path" or self.old_factor == 1.0:
            return factor * policy.gradient(reward_only=True)
        return factor * step_surrogate(policy, self.old_factor)

    @property
    def handles_state_dependent_noise(self) -> bool:
        return True

    def run(self, runner: Runner) -> Array:
        mean_over = runner.dim if self.log_probability == "mean" else 1
        clip = self.clip or math.inf
        count = runner.n_params
        if self.ratio == "step":
            (rows,) = runner.run(
                ClippedScores(old=self.old_factor, clip=clip, mean_over=mean_over)
            )
            low, high = rows[:count], rows[count : 2 * count]
        else:
            (rows,) = runner.run(OffPolicyScores(old=self.old_factor))
            ratio = np.exp(rows[count] / mean_over)
            low = rows[:count] * ratio * (ratio <= 1.0 + clip)
            high = rows[:count] * ratio * (ratio >= 1.0 - clip)
        advantage = advantages(rows[-1], self.group, self.leave_one_out)
        return -advantage * np.where(advantage > 0.0, low, high) / mean_over


def step_surrogate(policy: PolicyChain, old_factor: float) -> Array:
    """Return the gradient (P,) of sum_n E_old[-rho_n r] on an affine chain.

    Each term is that of a policy that differs from the old one in step n only.
    """
    old = policy.at(old_factor * policy.theta)
    total = np.zeros(len(policy.theta))
    for n, only in enumerate(np.eye(policy.chain.n_steps)):
        gain, bias = old.gain.copy(), old.bias.copy()
        gain[n], bias[n] = policy.gain[n], policy.bias[n]
        mixed = policy._replace(gain=gain, bias=bias)
        total += mixed.gradient(reward_only=True, step_weights=only)
    return total
