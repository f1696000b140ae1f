r"""SOC Matching: regression on labels with reparametrisation matrices M.

From X_{n+1} = x on, shift the states of a path by psi_k, k > n, with psi_{n+1} = delta
and psi_{k+1} = R_k psi_k, and correct by the density of the chain.  With the noise
y_k = z_k + v_k of the base process this gives, **exactly on the N-step chain and for
every R**, grad log h(x) = -E*[a_{n+1} | X_{n+1} = x], where

    a_N = -grad r(X_N),
    a_k = R_k^T a_{k+1} + grad f_k + (R_k - d base mean_k/dx)^T G_k^{-T} y_k.

As E*[y_n | X_n] = G_n^T E*[grad log h(X_{n+1}) | X_n] (Gaussian integration by parts),
the gradient of the regression,

    E*[ sum_n (dw_n/dtheta)^T (w_n + G_n^T a_{n+1}) ],

is that of the cross-entropy for every R; only its variance depends on R.  R_k = I is
M = 1, R_k = e^{-rate/N} the exponential M = e^{-rate (s - t)/T} of a uniform grid, and
with the Jacobian of the base the noise leaves the label: the lean adjoint
("SOCM-adjoint").  The matrices may depend on the path up to step k.  The Jacobian of
the step under the control theta, d base mean/dx + G dw/dx, gives

    a_k = (d base mean_k/dx)^T a_{k+1} + grad f_k + (dw_k/dx)^T (G_k^T a_{k+1} + y_k),

and at the optimal control of continuous time a_t = grad V(X_t) on every path: of the
label only the noise of its first step is left.  "learned" fits the R_k by least squares
to other paths (`sdebench.estimators._learned_matrices`).

Without the weights (unweighted SOCM) the optimal control is still a fixed point for
every R, but elsewhere the mean depends on R.  Two other losses need no weights.  With
the noise z of the paths and

    b_N = 0,   b_k = R_k^T b_{k+1} - (R_k - d mean_k/dx)^T G_k^{-T} z_k,

their labels are a_k = p_k + C_k b_k, where C_k is the cost from step k on.  Cost-SOCM
takes the whole cost and the mean of the *controlled* step,

    p_N = -grad r(X_N),   p_k = R_k^T p_{k+1} + grad f_k + (dw_k/dx)^T w_k,

so that the mean label is the gradient of the cost to go for every R, and that of the
loss the gradient of J_N.  Work-SOCM leaves the control out: no 1/2 |w|^2 in the cost,
the mean of the base step, no (dw_k/dx)^T w_k.  With the Jacobian it is the lean
adjoint; with another R and a feedback its mean depends on R, and the optimal control is
no fixed point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sdebench.composite import CompositeEstimator, Runner
from sdebench.errors import ParameterError, unknown
from sdebench.estimator import Array, Estimator, Sizes
from sdebench.estimators._learned_matrices import (
    FAMILIES,
    PATHS_PER_FEATURE,
    LearnedLabels,
    n_features,
)
from sdebench.estimators._matching_labels import MatchingLabels
from sdebench.estimators._proposals import PROPOSALS
from sdebench.estimators._tilted_weights import log_weight, normalized, weighted

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain

MATRICES = ("identity", "exponential", "jacobian", "controlled", "learned")
WEIGHTED_MATRICES = ("controlled", "learned")
"""Without weights the mean label depends on theta's slope, or on the paths fitted."""
WEIGHTS = ("importance", "none")
LOSSES = {
    "plain": "cross_entropy_gradient",
    "work": "matching_gradient",
    "cost": "gradient",
}
"""Estimand of each loss."""


@dataclass(frozen=True, kw_only=True)
class SOCMatching(CompositeEstimator):
    """Gradient of the SOC Matching loss, weighted or not.

    Parameters
    ----------
    matrices : "identity", "exponential" (with ``rate``), "jacobian" (of the base),
        "controlled" (that of the step under the given control) or "learned" (from the
        other half of the paths); the last two need weights.
    family : of the learned matrices of each step, "full" or "diagonal".
    rate : of "exponential", over the whole horizon; 0 is "identity".
    weights : "importance", normalised by their mean, or "none" (unweighted SOCM).
    proposal : control of the simulated paths: "zero", "given" (the evaluation point's)
        or "optimal".
    loss : "plain", or "work" and "cost", which need weights "none" and proposal
        "given".
    """

    source: ClassVar[str] = (
        "Domingo-Enrich et al. 2023, arXiv:2312.02027; work and cost: "
        "Domingo-Enrich 2024, arXiv:2410.00345"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
a_N &= -\nabla r(X_N), \quad y_k = z_k + v_k \\
a_k &= R_k^\top a_{k+1} + \nabla f_k
  + \left( R_k - \frac{\partial \mu_k}{\partial x} \right)^\top G_k^{-\top} y_k \\
g &= \frac{\sum_m \alpha^{(m)} s^{(m)}}{\sum_m \alpha^{(m)}}, \quad
s = \sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top
  \left( w_n + G_n^\top a_{n+1} \right)
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "with weights and many paths, the gradient of KL(P* || P_theta) of the "
        "discretized process for all matrices; without weights, the regression on the "
        "mean label under the paths' law, and with the loss cost the gradient of J_N"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"matrices": "jacobian"},
        {"matrices": "controlled"},
        {"matrices": "learned"},
        {"weights": "none"},
        {"weights": "none", "loss": "work"},
    )

    matrices: str = "identity"
    rate: float = 1.0
    weights: str = "importance"
    proposal: str = "given"
    loss: str = "plain"
    family: str = "full"

    def __post_init__(self) -> None:
        for kind, allowed in (
            ("matrices", MATRICES),
            ("weights", WEIGHTS),
            ("proposal", PROPOSALS),
            ("loss", LOSSES),
            ("family", FAMILIES),
        ):
            if getattr(self, kind) not in allowed:
                raise unknown(kind, getattr(self, kind), allowed)
        if not (math.isfinite(self.rate) and self.rate >= 0.0):
            raise ParameterError(
                f"rate {self.rate!r} is not allowed; give a finite rate of at least 0"
            )
        on_policy = self.weights == "none" and self.proposal == "given"
        if self.loss != "plain" and not on_policy:
            raise ParameterError(
                f"the loss {self.loss} is a mean under the policy's own paths; give "
                'weights="none" and proposal="given"'
            )
        if self.matrices in WEIGHTED_MATRICES and not self._weighted:
            raise ParameterError(
                f"without weights the mean label depends on the matrices, and for "
                f'{self.matrices} ones it is not known; give weights="importance"'
            )

    @property
    def estimand(self) -> str:  # type: ignore[override]
        return LOSSES[self.loss]

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        slope = self.loss == "cost" or self.matrices == "controlled"
        own = {"control_vjp"} if slope else set()
        return MatchingLabels.needs - {"control_vjp"} | own

    @property
    def needs_invertible_noise(self) -> bool:
        return self.matrices not in ("jacobian", "controlled")

    @property
    def control(self) -> str:
        return PROPOSALS[self.proposal]

    @property
    def _weighted(self) -> bool:
        return self.weights == "importance"

    @property
    def declared_bias(self) -> str:
        return "1/n_paths" if self._weighted else "none"

    def n_statistics(self, n_params: int) -> int:
        return n_params + int(self._weighted)

    def group_size(self, n_paths: int) -> int:
        return n_paths if self._weighted else 1

    def not_applicable_to(self, sizes: Sizes) -> str | None:
        if self.matrices != "learned":
            return None
        count = n_features(sizes.dim, self.family)
        least = 2 * PATHS_PER_FEATURE * count
        if sizes.n_paths >= least:
            return None
        return (
            f"the {self.family} matrices of a step are a regression on {count} "
            f"features over half of {sizes.n_paths} paths; use at least {least}, or "
            "the diagonal family"
        )

    @property
    def independent(self) -> bool:
        return not self._weighted

    @property
    def has_target(self) -> bool:
        # With weights, or the whole cost, it is the estimand's own answer.
        return not self._weighted and self.loss != "cost"

    def target(self, policy: PolicyChain) -> Array | None:
        from sdebench.closed_form.soc_matching import conditional_label, label_gradient

        if not self.has_target:
            return None
        if self.proposal == "optimal":
            feedback = policy.optimal_gain, policy.optimal_bias
        else:
            factor = float(self.proposal == "given")
            feedback = factor * policy.gain, factor * policy.bias
        decay = None
        if self.matrices != "jacobian":
            decay = math.exp(-self._rate / policy.chain.n_steps)
        work = self.loss == "work"
        label = conditional_label(policy.chain, *feedback, work=work, decay=decay)
        return label_gradient(policy, *feedback, label)

    @property
    def _rate(self) -> float:
        return self.rate if self.matrices == "exponential" else 0.0

    def _labels(self) -> Estimator:
        """Return what the labels are asked for by."""
        if self.matrices == "learned":
            return LearnedLabels(old=self.control, family=self.family)
        kept = ("jacobian", "controlled")
        return MatchingLabels(
            old=self.control,
            loss=self.loss,
            matrices=self.matrices if self.matrices in kept else "decay",
            rate=self._rate,
        )

    def run(self, runner: Runner) -> Array:
        (rows,) = runner.run(self._labels())
        gradient = rows[: runner.n_params]
        if not self._weighted:
            return gradient
        return weighted(gradient, log_weight(rows[-4:]))

    def combine(self, mean: Array, n_paths: int) -> Array:
        return normalized(mean) if self._weighted else mean
