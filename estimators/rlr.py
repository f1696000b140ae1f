"""RLR: a mix of first-, half- and zeroth-order terms, one for every step.

The gradient of -E r(X_N) is a sum over steps, -sum_n E[(dw_n/dtheta)^T G_n^T
lambda_{n+1}] with the pathwise derivative lambda of the reward.  There are three kinds
of terms for its summands: at the last step the summand itself (first order); at any
step -r (dw_n/dtheta)^T z_n (zeroth order, REINFORCE); and for a block of steps
a, ..., b the derivative of the mean of X_{b+1} through the block, times the score of
z_b and -r (half order).  The sum is unbiased if every step is covered once, for every
fixed place of the block, and so for one chosen by other paths.  The paper counts the
sampling steps backwards, 1 for the last; its index set covers step 1 twice, by the
first-order term and by a zeroth-order one or the block.
"printed" keeps that, "corrected" keeps step 1 out of both.

The half-order term divides the score by the noise of a single step: G_n must be
invertible, and its variance grows like the inverse of that noise squared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.composite import CompositeEstimator, Runner
from sdebench.errors import ParameterError, unknown
from sdebench.estimator import Array, Sizes
from sdebench.estimators._groups import advantages
from sdebench.estimators._rlr_terms import RLRTerms

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain

COVERAGES = ("corrected", "printed")
TERMS = ("all", "half_order", "zeroth_order")
BASELINES = ("none", "leave_one_out")
PLACEMENTS = ("uniform", "adaptive")
PLACES = 4
"""Places of the block that adaptive placement compares."""


@dataclass(frozen=True, kw_only=True)
class RLR(CompositeEstimator):
    """Recursive likelihood ratio: first-, half- and zeroth-order terms together.

    Parameters
    ----------
    block : number of steps of the half-order block; 0 for none.
    start : first step of the block; -1: chosen by ``placement``.
    placement : "uniform", drawn anew for every replicate, or "adaptive": each half of
        the paths uses the place, of `PLACES` evenly spaced ones, whose terms varied
        least on the other half.
    coverage : "corrected" (every step once) or "printed" (the last step twice).
    terms : "all", "half_order" (the block alone) or "zeroth_order" (REINFORCE).
    baseline : "leave_one_out" (the mean reward of the other paths) or "none".
    """

    estimand: ClassVar[str] = "reward_only_gradient"
    source: ClassVar[str] = "arXiv:2502.00639, section 4"
    formula: ClassVar[str] = r"""\begin{aligned}
g &= -\left( \frac{\partial w_{N-1}}{\partial \theta} \right)^\top G_{N-1}^\top
  \nabla r(X_N) - (r - b) \left( \sum_{n=a}^{a+h-1}
  \left( \frac{\partial w_n}{\partial \theta} \right)^\top G_n^\top \lambda_{n+1}
  + \sum_{n \notin \text{block},\, n < N-1}
  \left( \frac{\partial w_n}{\partial \theta} \right)^\top z_n \right) \\
\lambda_{a+h} &= G_{a+h-1}^{-\top} z_{a+h-1}, \quad
\lambda_n = \left( \frac{\partial \mu_n}{\partial x}
  + G_n \frac{\partial w_n}{\partial x} \right)^\top \lambda_{n+1}
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "the gradient of -E r(X_N) of the N-step chain if every step is covered once; "
        "otherwise each step's part times the expected number of its terms"
    )
    needs: ClassVar[frozenset[str]] = RLRTerms.needs
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"coverage": "printed"},
        {"terms": "half_order"},
    )

    block: int = 2
    start: int = -1
    placement: str = "uniform"
    coverage: str = "corrected"
    terms: str = "all"
    baseline: str = "leave_one_out"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("coverage", COVERAGES),
            ("terms", TERMS),
            ("baseline", BASELINES),
            ("placement", PLACEMENTS),
        ):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if self.block < 0 or self.start < -1:
            raise ParameterError(
                f"block {self.block} and start {self.start} must be at least 0 and -1"
            )
        if self.placement == "adaptive" and self.start >= 0:
            raise ParameterError(
                f"start {self.start} fixes the place of the block; leave out placement "
                "adaptive, or start"
            )
        if self.placement == "adaptive" and self.terms == "half_order":
            raise ParameterError(
                "placement adaptive needs terms that cover every step at every place; "
                "terms half_order cover the block alone"
            )
        if self.terms == "half_order" and self.block == 0:
            raise ParameterError("terms half_order needs a block of at least 1 step")

    # ---- which step has which term ------------------------------------------------
    @property
    def _block(self) -> int:
        return 0 if self.terms == "zeroth_order" else self.block

    def _last_is_free(self) -> bool:
        """Whether block and zeroth-order terms may hold the last step."""
        return self.terms != "all" or self.coverage == "printed"

    def _starts(self, n_steps: int) -> range:
        """Return the possible first steps of the block; none if it does not fit."""
        if self._block == 0:
            return range(1)
        stop = n_steps - (not self._last_is_free())
        starts = range(stop - self._block + 1)
        return starts if self.start < 0 else starts[self.start : self.start + 1]

    def _terms(self, start: int, n_steps: int) -> RLRTerms:
        zeroth = n_steps - (not self._last_is_free())
        return RLRTerms(
            start=start,
            block=self._block,
            zeroth=0 if self.terms == "half_order" else zeroth,
            first_order=self.terms == "all",
        )

    def multiplicity(self, n_steps: int) -> Array:
        """Return the expected number of terms of every step, (n_steps,)."""
        count = np.zeros(n_steps)
        starts = self._starts(n_steps)
        for start in starts:
            terms = self._terms(start, n_steps)
            covered = np.arange(n_steps) < terms.zeroth
            covered[start : start + terms.block] = True
            count += covered / len(starts)
            count[-1] += terms.first_order / len(starts)
        return count

    # ---- the estimator ------------------------------------------------------------
    def not_applicable_to(self, sizes: Sizes) -> str | None:
        if self._starts(sizes.n_steps):
            return None
        place = "" if self.start < 0 else f" from step {self.start} on"
        return (
            f"a block of {self._block} steps{place} does not fit into the chain of "
            f"{sizes.n_steps} steps, of which it may not hold the last with terms all "
            "and coverage corrected; use a smaller block"
        )

    @property
    def needs_invertible_noise(self) -> bool:
        return self._block > 0

    @property
    def _adaptive(self) -> bool:
        return self.placement == "adaptive" and self._block > 0

    def group_size(self, n_paths: int) -> int:
        coupled = self.baseline != "none" or (self.start < 0 and self._block > 0)
        return n_paths if coupled else 1

    def not_applicable(self, n_paths: int) -> str | None:
        if self.baseline != "none" and n_paths < 2:
            return f"baseline {self.baseline} needs at least 2 paths per replicate"
        if self._adaptive and n_paths < 4:
            return "placement adaptive needs at least 4 paths per replicate"
        return None

    def target(self, policy: PolicyChain) -> Array:
        weights = self.multiplicity(policy.chain.n_steps)
        return policy.gradient(reward_only=True, step_weights=weights)

    def run(self, runner: Runner) -> Array:
        starts = self._starts(runner.n_steps)
        if self._adaptive:
            return self._chosen_by_the_other_half(runner, starts)
        start = int(runner.rng().choice(starts)) if len(starts) > 1 else starts[0]
        return self._gradients(*self._parts(runner, start))

    def _parts(self, runner: Runner, start: int) -> tuple[Array, Array]:
        """Return the first-order term (P, n), and terms (P, n) and reward (1, n)."""
        (rows,) = runner.run(self._terms(start, runner.n_steps))
        count = len(rows) // 2
        return rows[count:-1], np.concatenate([rows[:count], rows[-1:]])

    def _gradients(self, first: Array, weighted: Array) -> Array:
        reward = weighted[-1]
        if self.baseline == "leave_one_out":
            reward = advantages(reward, len(reward), leave_one_out=True)
        return -first - reward * weighted[:-1]

    def _chosen_by_the_other_half(self, runner: Runner, starts: range) -> Array:
        """Return the rows with a place that does not depend on a path's own noise."""
        even = np.linspace(0, len(starts) - 1, min(PLACES, len(starts)))
        parts = [self._parts(runner, starts[round(i)]) for i in even]
        halves = np.array_split(np.arange(runner.n_paths), 2)
        chosen = np.empty((runner.n_params, runner.n_paths))
        for own, other in (halves, halves[::-1]):
            # with a baseline of the other half alone, which owes nothing to this one
            spread = [
                self._gradients(first[:, other], weighted[:, other]).var(axis=1).sum()
                for first, weighted in parts
            ]
            chosen[:, own] = self._gradients(*parts[np.argmin(spread)])[:, own]
        return chosen
