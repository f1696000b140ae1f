r"""Score matching on a tilted law: conditional, target, novel, or any affine mixture.

x_1 = X_N is the end of a path, noised again to every time of the grid with one normal
xi per path, x_n = alpha_n x_1 + beta_n xi.  With the tilted law p* of x_1, a label of
the score grad log p*_n of x_n is

    tau_n = c_n grad log p*(x_1) / alpha_n - (1 - c_n) xi / beta_n,
    grad log p* = grad log p_base + grad r,   c_n = rho_n^2 / (m + rho_n^2),

rho = alpha/beta: conditional score matching (c = 0), target score matching (c = 1),
novel score matching (m = 1), or another precision m; the precision of a Gaussian base
makes it the label of adjoint matching, and J/d with the Fisher information J of p* has
the least noise of all (`sdebench.closed_form.regression_targets`).  In noise units the
label of the control is G_n^T (tau_n - grad log p_base,n(x_n)), and

    gradient = sum_n (dw_n(x_n)/dtheta)^T (w_n(x_n) - G_n^T (tau_n - score_n(x_n)))

is that of the cross-entropy KL(P* || P_theta), up to the time step, if x_1 has the
tilted law, as under the optimal control.  With x_1 of the model itself it is not:
target and novel score matching still vanish in mean at the optimum, while conditional
score matching vanishes at every theta, as a model denoises its own samples.  Samples of
the model with the weights of their paths, normalised by their mean, have the tilted law
P*_N of the chain again (data weighted), with a bias of order 1/n_paths.

With one random time per sample, drawn in proportion to the weight of the cross-entropy,
the noise is finite for novel score matching and every 0 < m < infinity; it diverges for
conditional score matching, logarithmically towards the data, and for target score
matching, like 1/rho^2 towards the noise.  Here every path has all times of the grid,
and one xi.  The variance of their sum is at most (int eta |dscore/dtheta| sd(tau) dt)^2
in continuous time, which is finite for conditional score matching.

References
----------
Domingo-Enrich, Du and Albergo 2026, arXiv:2605.00229 (the common form);
A. Phillips et al., "Particle denoising diffusion sampler", ICML 2024, arXiv:2402.06320
(novel); V. De Bortoli et al., "Target score matching", 2024, arXiv:2402.08667;
P. Vincent, Neural Computation 2011 (conditional).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.errors import ParameterError, unknown
from sdebench.estimator import Array, Estimator
from sdebench.estimators._expectations import apply, second_moments, step_products
from sdebench.estimators._tilted_weights import normalized
from sdebench.simulate import primitives
from sdebench.simulate.tile import clear, combine, path_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.view import View

LABELS = ("conditional", "target", "novel", "affine")
DATA = {"optimal": "optimal", "theta": "theta", "weighted": "theta"}
"""The control of the paths of each ``data``."""


@path_kernel
def block_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    other: Any,
    other_work: Any,
    OWN: Any,
    conditional: bool,
    precision: float,
    OUT: Any,
) -> None:
    """Set OUT (>= P, B + PADDING) to the gradient of every path of a stored block."""
    N = W.shape[0]
    G, V, S = work.adjoint, work.direction, work.adjoint_next
    Y, CONTROL = other_work.adjoint, other_work.direction
    XI = OWN[0]
    clear(OUT, B)
    if not conditional:
        primitives.reward_gradient(prepared, work, X[N], G, B)
        primitives.base_score(prepared, work, N, X[N], S, B)
        combine(1.0, G, 1.0, S, G, B)
    for n in range(N):
        alpha, beta = prepared.denoiser[n, 3], prepared.denoiser[n, 4]
        share = alpha * alpha / (alpha * alpha + precision * beta * beta)
        combine(alpha, X[N], beta, XI, Y, B)
        primitives.base_score(prepared, work, n, Y, S, B)
        if conditional:
            combine(-1.0 / beta, XI, -1.0, S, V, B)
        else:
            combine(share / alpha, G, (share - 1.0) / beta, XI, V, B)
            combine(1.0, V, -1.0, S, V, B)
        primitives.noise_transpose(prepared, work, n, V, S, B)
        primitives.evaluate(other, other_work, n, Y, CONTROL, B)
        combine(1.0, CONTROL, -1.0, S, V, B)
        primitives.control_parameter_vjp(other, other_work, n, Y, V, OUT, 0, B)


@path_kernel
def weighted_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    other: Any,
    other_work: Any,
    count: int,
    OWN: Any,
    conditional: bool,
    precision: float,
    OUT: Any,
) -> None:
    """Set OUT (P + 1, .) to the weighted gradients and the weights of a replicate."""
    block_kernel(
        prepared,
        work,
        X,
        Z,
        W,
        totals,
        B,
        other,
        other_work,
        OWN,
        conditional,
        precision,
        OUT,
    )
    P = prepared.n_parameters
    largest = -np.inf
    for p in range(count):
        value = totals[3, p] - totals[1, p] - totals[2, p] - totals[0, p]
        OUT[P, p] = value
        largest = max(largest, value)
    for p in range(count):
        weight = np.exp(OUT[P, p] - largest)
        OUT[P, p] = weight
        for i in range(P):
            OUT[i, p] *= weight


@dataclass(frozen=True, kw_only=True)
class ScoreMatching(Estimator):
    """Regression of the control on score labels: conditional, target, novel, affine.

    Parameters
    ----------
    labels : "conditional", "target", "novel", or "affine" with the precision m.
    precision : m > 0 of labels affine; small m is target, large m conditional.
    data : what x_1 is taken from: paths of the "optimal" control, of "theta" (the
        model), or those "weighted" by the density of the tilted law.
    """

    estimand: ClassVar[str] = "cross_entropy_gradient"
    source: ClassVar[str] = (
        "Domingo-Enrich, Du and Albergo 2026, arXiv:2605.00229; novel: Phillips et al. "
        "2024, arXiv:2402.06320; target: De Bortoli et al. 2024, arXiv:2402.08667; "
        "conditional: Vincent 2011"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
x_n &= \alpha_n X_N + \beta_n \xi, \quad
  c_n = \frac{\alpha_n^2}{\alpha_n^2 + m \beta_n^2} \\
\tau_n &= \frac{c_n}{\alpha_n} \nabla (\log p_N + r)(X_N)
  - \frac{1 - c_n}{\beta_n} \xi \\
g &= \sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top
  \left( w_n - G_n^\top (\tau_n - \nabla \log p_n(x_n)) \right)
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "the stated sum with the law of X_N of the simulated chain, which tends to the "
        "gradient of the cross-entropy if that is the tilted law (data optimal, or "
        "weighted and many paths); with data theta it is no gradient, zero at the "
        "optimum, and for the conditional target at every theta"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"labels": "conditional"},
        {"labels": "target"},
        {"data": "theta"},
        {"data": "weighted"},
    )

    labels: str = "novel"
    precision: float = 1.0
    data: str = "optimal"

    def __post_init__(self) -> None:
        if self.labels not in LABELS:
            raise unknown("labels", self.labels, LABELS)
        if self.data not in DATA:
            raise unknown("data", self.data, DATA)
        if not 0.0 < self.precision < np.inf:
            raise ParameterError(
                f"precision {self.precision} must be positive and finite; the limits "
                "are labels target and conditional"
            )
        if self.precision != 1.0 and self.labels != "affine":
            raise ParameterError(
                f"precision is an option of labels affine; labels {self.labels} have "
                "one of their own"
            )

    @property
    def block_kernel(self) -> Callable[..., None]:  # type: ignore[override]
        return weighted_kernel if self._weighted else block_kernel

    @property
    def _weighted(self) -> bool:
        return self.data == "weighted"

    @property
    def declared_bias(self) -> str:
        return "1/n_paths" if self._weighted else "none"

    @property
    def independent(self) -> bool:
        return not self._weighted

    def n_statistics(self, n_params: int) -> int:
        return n_params + int(self._weighted)

    def group_size(self, n_paths: int) -> int:
        return n_paths if self._weighted else 1

    def combine(self, mean: Array, n_paths: int) -> Array:
        return normalized(mean) if self._weighted else mean

    @property
    def _conditional(self) -> bool:
        return self.labels == "conditional"

    @property
    def _precision(self) -> float:
        return 0.0 if self.labels == "target" else self.precision

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        needed = {"control_parameter_vjp", "base_density"}
        return frozenset(needed | (set() if self._conditional else {"reward_gradient"}))

    @property
    def needs_denoiser(self) -> bool:
        return True

    @property
    def control(self) -> str:
        return DATA[self.data]

    @property
    def other_control(self) -> str:
        return "theta"

    def own_normals(self, n_steps: int) -> int:
        return 1

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return self._conditional, self._precision

    def _shares(self, alpha: Array, beta: Array) -> Array:
        """Return the share of the target score in the label of every step."""
        if self._conditional:
            return np.zeros_like(alpha)
        return np.asarray(alpha**2 / (alpha**2 + self._precision * beta**2))

    def target(self, policy: PolicyChain) -> Array:
        chain, eye = policy.chain, np.eye(policy.chain.dim)
        if self._weighted:
            law = chain.tilted_moments()
        elif self.data == "optimal":
            law = chain.moments(policy.optimal_gain, policy.optimal_bias)
        else:
            law = chain.moments(policy.gain, policy.bias)
        mean, covariance = (part[-1] for part in law)
        alpha, beta = np.asarray(chain.denoiser)[:, 3:].T
        base_mean, base_variance = _base_law(policy)
        # grad log p*(x_1) = A x_1 + b; moments of v and x_n, step by step
        A = -eye / base_variance - chain.reward_quadratic
        b = base_mean / base_variance + chain.reward_linear
        share = self._shares(alpha, beta)
        by_data, by_noise = share / alpha, (1.0 - share) / beta
        second = second_moments(mean, covariance)
        x, raw = _outer(alpha, mean), _outer(alpha**2, second) + _outer(beta**2, eye)
        tau = _outer(by_data, A @ mean + b)
        tau_x = _outer(by_data * alpha, A @ second + np.outer(b, mean))
        tau_x = tau_x - _outer(by_noise * beta, eye)
        precision = 1.0 / (alpha**2 * base_variance + beta**2)
        score = -precision[:, None] * (x - _outer(alpha, base_mean))
        score_x = -precision[:, None, None] * raw + np.einsum(
            "n,i,nj->nij", precision * alpha, base_mean, x
        )
        transposed = np.swapaxes(chain.noise, 1, 2)
        v = apply(policy.gain, x) + policy.bias - apply(transposed, tau - score)
        v_x = policy.gain @ raw + policy.bias[:, :, None] * x[:, None, :]
        v_x = v_x - transposed @ (tau_x - score_x)
        return step_products(policy, v_x, v).sum(0)

    def statistics(self, view: View) -> Tensor:
        import torch

        assert view.other is not None
        data, xi = view.rollout().states[-1], view.noise(view.n_steps)
        gradient = data.new_zeros(view.n_paths, view.n_params)
        slope = None
        if not self._conditional:
            slope = view.reward_gradient(data) + view.base_score(view.n_steps, data)
        alphas, betas = view.denoiser[:, 3:].T
        shares = self._shares(alphas, betas)
        for n, (alpha, beta, share) in enumerate(
            zip(alphas, betas, shares, strict=True)
        ):
            x = float(alpha) * data + float(beta) * xi
            tau = -float((1.0 - share) / beta) * xi
            if slope is not None:
                tau = tau + float(share / alpha) * slope
            label = view.noise_transpose(n, tau - view.base_score(n, x))
            residual = view.other.control(n, x) - label
            gradient = gradient + view.other.control_parameter_vjp(n, x, residual)
        if not self._weighted:
            return gradient
        log_weights = view.rollout().log_weight
        weights = torch.exp(log_weights - log_weights.max())[:, None]
        return torch.cat([weights * gradient, weights], dim=1)


def _outer(factors: Array, array: Array) -> Array:
    """Return every factor times an array."""
    return np.asarray(np.multiply.outer(factors, array))


def _base_law(policy: PolicyChain) -> tuple[Array, float]:
    """Return mean and variance of the Gaussian X_N of the base in continuous time.

    The denoiser at a step is affine, with the slope alpha C / (alpha^2 C + beta^2).
    """
    chain = policy.chain
    n = chain.n_steps // 2
    p, q, _, alpha, beta = np.asarray(chain.denoiser)[n]
    slope = p + q * chain.transition[n, 0, 0]
    variance = slope * beta**2 / (alpha * (1.0 - alpha * slope))
    return q * chain.offset[n] / (1.0 - alpha * slope), float(variance)
