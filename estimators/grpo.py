"""Group-relative policy gradients, with noise everywhere or in a window of steps.

Paths come in groups of G.  The advantage A of a path is its reward minus the mean of
its group, divided by a standard deviation or not, and the estimate the mean of

    -A S,   S = sum_n (dw_n/dtheta)^T z_n over the steps n with noise.

=========  =====================================================================
version    sampler
=========  =====================================================================
flow_grpo  noise in every step, every path its own start
dance_grpo the same, but a group shares its start
mix_grpo   noise in a window of steps, the probability flow outside
g2rpo      noise in one step; a group shares its start, and with it all before the
           step; the advantages are averaged over several grids of the flow after it
=========  =====================================================================

The sampler's noise is the problem's own: Flow-GRPO's and DanceGRPO's schedules differ
by it, here by the choice of the problem.

Means.  With A = r - mean, each of the G rewards in the mean being a baseline for the
others, E[A S] = (1 - 1/G) E[r S]; given a shared start the argument is the same.
E[r S] differentiates the steps with noise only, at fixed law of the sampler: a partial
gradient, sum_n over the window of E[(dw_n/dtheta)^T G_n^T dr/dX_{n+1}], also with the
flow's steps depending on theta.  Dividing by the standard deviation of the group is
biased and has no closed form; as G grows the mean tends to that over std(r).  The mean
instead of the sum of the coordinates' log-probabilities divides by d.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.composite import CompositeEstimator, Runner
from sdebench.errors import NotExactError, ParameterError, unknown
from sdebench.estimator import Array, Sizes
from sdebench.estimators._groups import (
    advantages,
    check_group,
    check_log_probability,
    gradient_factor,
)
from sdebench.estimators._scores import Scores, WindowCosts, window_mask

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.simulate.noise import Noise

VERSIONS = ("flow_grpo", "dance_grpo", "mix_grpo", "g2rpo")
SHARED_START = ("dance_grpo", "g2rpo")
STANDARDIZATIONS = ("none", "group", "batch")


@dataclass(frozen=True, kw_only=True)
class GRPO(CompositeEstimator):
    """Policy gradient with group-relative advantages, in four versions.

    Parameters
    ----------
    version : "flow_grpo", "dance_grpo", "mix_grpo" or "g2rpo".
    group : >= 2 paths whose rewards are compared.
    standardize : divide by the standard deviation of the "group", of the "batch" (all
        paths), or "none".
    log_probability : "sum" or "mean" over the coordinates.
    leave_one_out : leave the path itself out of the mean.
    window_start, window : first step with noise, and their number ("mix_grpo"; one for
        "g2rpo").
    granularities : strides of the grids on which "g2rpo" follows the flow to the end.
    """

    estimand: ClassVar[str] = "reward_only_gradient"
    source: ClassVar[str] = (
        "Flow-GRPO arXiv:2505.05470, DanceGRPO arXiv:2505.07818, MixGRPO "
        "arXiv:2507.21802, G2RPO arXiv:2510.01982"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
A_i &= \frac{r_i - \frac{1}{G} \sum_{j=1}^{G} r_j}{\mathrm{std}_G(r)
  \ \text{or}\ 1} \\
g &= -\frac{1}{G} \sum_{i=1}^{G} A_i \sum_{n \in W} \left(
  \frac{\partial w_n}{\partial \theta} \right)^\top z_n
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "without standardization: 1 - 1/G times the part of the gradient of -E r(X_N) "
        "that goes through the steps with noise"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"control_parameter_vjp"})
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"standardize": "none"},
        {"version": "mix_grpo", "standardize": "none"},
        {"version": "g2rpo", "standardize": "none"},
    )

    version: str = "flow_grpo"
    group: int = 8
    standardize: str = "group"
    log_probability: str = "sum"
    leave_one_out: bool = False
    window_start: int = 0
    window: int = 2
    granularities: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise unknown("version", self.version, VERSIONS)
        if self.standardize not in STANDARDIZATIONS:
            raise unknown("standardize", self.standardize, STANDARDIZATIONS)
        check_group(self.group)
        check_log_probability(self.log_probability)
        if self.window_start < 0 or self.window < 1:
            raise ParameterError(
                f"window_start {self.window_start} and window {self.window} must be at "
                "least 0 and 1"
            )
        if not self.granularities or min(self.granularities) < 1:
            raise ParameterError(
                f"granularities {self.granularities} must be strides of at least 1"
            )
        if self.version != "g2rpo" and self.granularities != (1,):
            raise ParameterError(
                f"granularities belong to version g2rpo; {self.version} was given"
            )

    @property
    def _noisy(self) -> int:
        """Number of steps with noise, 0 for all."""
        return {"mix_grpo": self.window, "g2rpo": 1}.get(self.version, 0)

    @property
    def declared_bias(self) -> str:
        return "none" if self.standardize == "none" else "any"

    def noisy_steps(self, n_steps: int) -> Array | None:
        if not self._noisy:
            return None
        return window_mask(self.window_start, self._noisy, n_steps)

    def not_applicable_to(self, sizes: Sizes) -> str | None:
        end = self.window_start + self._noisy
        if self._noisy and end > sizes.n_steps:
            return (
                f"its window ends with step {end}, which is longer than the chain of "
                f"{sizes.n_steps} steps; use an earlier or smaller window"
            )
        return None

    def group_size(self, n_paths: int) -> int:
        return n_paths if self.standardize == "batch" else self.group

    def not_applicable(self, n_paths: int) -> str | None:
        if n_paths % self.group:
            return (
                f"it compares groups of {self.group} paths; n_paths = {n_paths} is no "
                "multiple"
            )
        return None

    def target(self, policy: PolicyChain) -> Array:
        """Return the mean without standardization; its effect counts as a bias."""
        if self.granularities != (1,):
            raise NotExactError("coarser grids after the noisy step are other chains")
        factor = gradient_factor(
            self.group, self.leave_one_out, self.log_probability, policy.chain.dim
        )
        mask = self.noisy_steps(policy.chain.n_steps)
        return factor * policy.gradient(reward_only=True, step_weights=mask)

    @property
    def handles_state_dependent_noise(self) -> bool:
        return True

    def run(self, runner: Runner) -> Array:
        noise = runner.noise()
        if self.version in SHARED_START:
            noise = share_start(noise, self.group)
        window = {"first": self.window_start, "count": self._noisy}
        (rows,) = runner.run(Scores(**window), noise=noise)
        advantage = np.zeros(runner.n_paths)
        for stride in self.granularities:
            reward = rows[-1]
            if stride > 1:
                times = self._coarse(runner.times, stride)
                coarse = noise._replace(steps=noise.steps[: len(times) - 1])
                (costs,) = runner.run(WindowCosts(**window), noise=coarse, times=times)
                reward = costs[-1]
            advantage = advantage + self._standardized(reward)
        scale = len(self.granularities)
        if self.log_probability == "mean":
            scale *= runner.dim
        return -advantage * rows[: runner.n_params] / scale

    def _standardized(self, reward: Array) -> Array:
        """Return the advantages (n,) of all paths."""
        advantage = advantages(reward, self.group, self.leave_one_out)
        if self.standardize == "none":
            return advantage
        members = reward.reshape(-1, self.group)
        axis = 1 if self.standardize == "group" else None
        spread = np.std(members, axis=axis, keepdims=True)
        # Without any spread all advantages are zero.
        spread = np.where(spread > 0.0, spread, 1.0)
        return (advantage.reshape(members.shape) / spread).ravel()

    def _coarse(self, times: Array, stride: int) -> Array:
        """Return the grid with only every ``stride``-th time after the noisy step."""
        after = self.window_start + 1
        kept = [*range(after), *range(after, len(times) - 1, stride), len(times) - 1]
        return np.asarray(times[kept])


def share_start(noise: Noise, group: int) -> Noise:
    """Return the noise with the start of every group's first path for all of it."""
    leader = np.arange(len(noise.uniforms)) // group * group
    return noise._replace(start=noise.start[:, leader], uniforms=noise.uniforms[leader])
