r"""Truncated backpropagation through the last steps of a path.

The pathwise derivative is a sum over steps, g = sum_n g_n with
g_n = (dw_n/dtheta)^T (w_n + G_n^T lambda_{n+1}) and lambda of `pathwise`.  Leaving the
early steps out saves memory and is biased by the expectation of what is left out:

draft_k : g_n of the last K = n_last steps.
alignprop : of the last K steps, K uniform on 1, ..., N for each path, so that on
    average step n has weight P(K >= N - n) = (n + 1) / N.
russian_roulette : the same with every g_n divided by that probability: unbiased.

The other two differentiate the reward of the denoised prediction
D_n(x) = E[X_N | X_n = x] = p_n x + q_n base mean_n(x) + s_n w_n(x) through w_n alone:

draft_lv : at X_N noised anew, x = alpha X_N + beta eps at step N - 1, the mean of
    n_renoisings draws.
refl : at X_n of one step n, uniform on the late_share N last ones.

Both are gradients of another functional, E r(D) in place of E r(X_N), and exist where
the process has a denoiser.  Where a step or a length is drawn, all steps that may be
drawn are evaluated, and counted.  The expectations on affine chains are exact: the
first three by weights on the steps, the last two since D_n(x) = A_n x + a_n makes them
second moments of a Gaussian,

    E g_n = s_n E[(dK_n x + dk_n)^T (Q (A_n x + a_n) - q)].

References
----------
K. Clark, P. Vicol, K. Swersky, D. J. Fleet, "Directly fine-tuning diffusion models on
differentiable rewards", ICLR 2024, arXiv:2309.17400 (DRaFT-K, DRaFT-LV).
M. Prabhudesai, A. Goyal, D. Pathak, K. Fragkiadaki, "Aligning text-to-image diffusion
models with reward backpropagation", 2023, arXiv:2310.03739 (AlignProp).
J. Xu et al., "ImageReward", NeurIPS 2023, arXiv:2304.05977 (ReFL).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.errors import ParameterError, unknown
from sdebench.estimator import Array, Estimator, Sizes, estimand_of
from sdebench.estimators._expectations import apply, second_moments, step_products
from sdebench.estimators._truncated import (
    late_step_kernel,
    renoised_kernel,
    window_kernel,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.view import View

KERNELS: dict[str, Callable[..., None]] = {
    "draft_k": window_kernel,
    "alignprop": window_kernel,
    "russian_roulette": window_kernel,
    "draft_lv": renoised_kernel,
    "refl": late_step_kernel,
}
OPTION_OF = {
    "n_last": "draft_k",
    "n_renoisings": "draft_lv",
    "late_share": "refl",
}


@dataclass(frozen=True, kw_only=True)
class Truncated(Estimator):
    """Backpropagation through the last steps only: DRaFT, AlignProp, ReFL.

    Parameters
    ----------
    method : "draft_k", "alignprop", "russian_roulette", "draft_lv" or "refl".
    objective : "reward" for -E r(X_T), "control" for J (not draft_lv and refl).
    n_last : K of draft_k, the steps that are differentiated.
    n_renoisings : noised copies of X_N in draft_lv.
    late_share : share of the last steps that refl draws from.
    """

    source: ClassVar[str] = (
        "DRaFT: Clark et al. 2023, arXiv:2309.17400; AlignProp: Prabhudesai et al. "
        "2023, arXiv:2310.03739; ReFL: Xu et al. 2023, arXiv:2304.05977"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
g_n &= \left( \frac{\partial w_n}{\partial \theta} \right)^\top
  \left( w_n + G_n^\top \lambda_{n+1} \right) \\
g &= \sum_{n \ge N - K} g_n \quad \text{or} \quad
  \sum_{n \ge N - K} \frac{g_n}{P(K \ge N - n)} \\
D_n(x) &= E[X_N \mid X_n = x], \quad
  g = -\frac{\partial}{\partial \theta}\, r(D_n(x)) \text{ at fixed } x
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "the gradient of -E r(X_N) (or J_N) for russian_roulette; its terms of the "
        "last K steps for draft_k; all terms weighted by P(K >= N - n) for alignprop; "
        "the gradient of -E r(D_n(x)) at fixed law of x for draft_lv and refl"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = tuple(
        {"method": method} for method in KERNELS
    )

    method: str = "draft_k"
    objective: str = "reward"
    n_last: int = 1
    n_renoisings: int = 2
    late_share: float = 0.25

    def __post_init__(self) -> None:
        if self.method not in KERNELS:
            raise unknown("method", self.method, KERNELS)
        if self.estimand == "gradient" and self._denoises:
            raise ParameterError(
                f"method {self.method} differentiates the reward of a prediction, "
                "which has no control cost; use objective reward"
            )
        for name in ("n_last", "n_renoisings"):
            if getattr(self, name) < 1:
                raise ParameterError(
                    f"{name} {getattr(self, name)} must be a whole number >= 1"
                )
        if not 0.0 < self.late_share <= 1.0:
            raise ParameterError(f"late_share {self.late_share} must be in (0, 1]")
        for name, method in OPTION_OF.items():
            given = getattr(self, name) != type(self).__dataclass_fields__[name].default
            if given and self.method != method:
                raise ParameterError(
                    f"{name} is an option of method {method}; method {self.method} "
                    "does not use it"
                )

    def not_applicable_to(self, sizes: Sizes) -> str | None:
        if self.n_last > sizes.n_steps:
            return (
                f"n_last {self.n_last} is longer than the chain of {sizes.n_steps} "
                f"steps; use at most {sizes.n_steps}"
            )
        return None

    @property
    def estimand(self) -> str:  # type: ignore[override]
        return estimand_of(self.objective)

    @property
    def _costs(self) -> bool:
        return self.objective == "control"

    @property
    def _denoises(self) -> bool:
        return self.method in ("draft_lv", "refl")

    @property
    def needs_denoiser(self) -> bool:
        return self._denoises

    @property
    def handles_state_dependent_noise(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        derivatives = {"control_parameter_vjp", "reward_gradient"}
        if not self._denoises:
            derivatives |= {"drift_vjp", "control_vjp"}
        if self._costs:
            derivatives.add("running_cost_gradient")
        return frozenset(derivatives)

    def own_normals(self, n_steps: int) -> int:
        return self.n_renoisings if self.method == "draft_lv" else 1

    @property
    def block_kernel(self) -> Callable[..., None]:  # type: ignore[override]
        return KERNELS[self.method]

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        if self.method == "draft_lv":
            return ()
        if self.method == "refl":
            return (self.late_share,)
        fixed = self.method == "draft_k"
        lengths = (self.n_last, self.n_last) if fixed else (1, 0)
        return float(self._costs), *lengths, self.method == "russian_roulette"

    def _first_late(self, n_steps: int) -> int:
        """Return the first step that refl draws from."""
        return n_steps - math.ceil(self.late_share * n_steps)

    # ---- exact expectations ----------------------------------------------------
    def target(self, policy: PolicyChain) -> Array | None:
        n_steps = policy.chain.n_steps
        if self._denoises:
            return self._denoised_target(policy)
        weights = np.ones(n_steps)
        if self.method == "draft_k":
            weights[: n_steps - self.n_last] = 0.0
        elif self.method == "alignprop":
            weights = np.arange(1, n_steps + 1) / n_steps
        return policy.gradient(reward_only=not self._costs, step_weights=weights)

    def _denoised_target(self, policy: PolicyChain) -> Array:
        chain = policy.chain
        p, q, s, alpha, beta = np.asarray(chain.denoiser).T[:, :, None]
        means, covariances = chain.moments(policy.gain, policy.bias)
        x, spread = means[:-1], covariances[:-1]
        if self.method == "draft_lv":
            x, spread = alpha * means[-1], alpha[..., None] ** 2 * covariances[-1]
            spread = spread + beta[..., None] ** 2 * np.eye(chain.dim)
        slope = p[..., None] * np.eye(chain.dim) + q[..., None] * chain.transition
        slope = chain.reward_quadratic @ (slope + s[..., None] * policy.gain)
        shift = (q * chain.offset + s * policy.bias) @ chain.reward_quadratic
        shift = shift - chain.reward_linear
        cross = slope @ second_moments(x, spread) + shift[:, :, None] * x[:, None, :]
        mean = apply(slope, x) + shift
        terms = step_products(policy, s[..., None] * cross, s * mean)
        if self.method == "draft_lv":
            return terms[-1]
        return np.asarray(terms[self._first_late(chain.n_steps) :].mean(0))

    # ---- torch -----------------------------------------------------------------
    def statistics(self, view: View) -> Tensor:
        if self.method == "draft_lv":
            return self._renoised(view)
        if self.method == "refl":
            return self._late_step(view)
        return self._window(view)

    def _window(self, view: View) -> Tensor:
        paths, n_steps = view.rollout(), view.n_steps
        costate = -view.reward_gradient(paths.states[-1])
        gradient = costate.new_zeros(view.n_paths, view.n_params)
        longest = self.n_last if self.method == "draft_k" else n_steps
        length = None
        if self.method != "draft_k":
            length = _draw(view, 1, n_steps)
        for n in reversed(range(n_steps - longest, n_steps)):
            x, least = paths.states[n], n_steps - n
            v = view.noise_transpose(n, costate, x)
            if self._costs:
                v = v + paths.controls[n]
            weighted = v
            if length is not None:
                weighted = v * (length >= least)[:, None]
            if self.method == "russian_roulette":
                weighted = weighted * (n_steps / (n + 1))
            gradient = gradient + view.control_parameter_vjp(n, x, weighted)
            shock = paths.controls[n], paths.noises[n]
            costate = view.base_vjp(n, x, costate, *shock) + view.control_vjp(n, x, v)
            if self._costs:
                costate = costate + view.running_cost_gradient(n, x)
        return gradient

    def _late_step(self, view: View) -> Tensor:
        paths, first = view.rollout(), self._first_late(view.n_steps)
        chosen = _draw(view, first, view.n_steps - 1)
        gradient = view.start().new_zeros(view.n_paths, view.n_params)
        for n in range(first, view.n_steps):
            x = paths.states[n]
            after = paths.states[n + 1] - view.apply_noise(n, paths.noises[n])
            v = _denoised_slope(view, n, x, after) * (chosen == n)[:, None]
            gradient = gradient + view.control_parameter_vjp(n, x, v)
        return gradient

    def _renoised(self, view: View) -> Tensor:
        n = view.n_steps - 1
        alpha, beta = view.denoiser[n, 3:]
        end = view.rollout().states[-1]
        gradient = end.new_zeros(view.n_paths, view.n_params)
        for i in range(self.n_renoisings):
            x = alpha * end + beta * view.noise(view.n_steps + i)
            after = view.base_mean(n, x) + view.apply_noise(n, view.control(n, x))
            v = _denoised_slope(view, n, x, after)
            gradient = gradient + view.control_parameter_vjp(n, x, v)
        return gradient / self.n_renoisings


def _draw(view: View, first: int, last: int) -> Tensor:
    """Return whole numbers (n_paths,), uniform on first, ..., last."""
    import torch

    count = last - first + 1
    uniform = torch.special.ndtr(view.noise(view.n_steps)[:, 0].double())
    return first + (count * uniform).long().clamp(max=count - 1)


def _denoised_slope(view: View, n: int, x: Tensor, after: Tensor) -> Tensor:
    """Return the derivative of -r(D_n(x)) in w_n; ``after`` = base mean + G w."""
    p, q, s = view.denoiser[n, :3]
    return -s * view.reward_gradient(p * x + q * after)
