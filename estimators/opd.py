"""On-policy distillation of diffusion models: per-step KL to a teacher.

Student and teacher, here the optimal control u*, have Gaussian transitions of the same
covariance, so that the KL divergence of a step is 1/2 |w_n - w*_n|^2 at the student's
state.  No reward is needed.  With the states held fixed,

    detached = sum_n (dw_n/dtheta)^T (w_n - w*_n).

The KL divergence of the path laws, E sum_n 1/2 |w_n - w*_n|^2, also moves the states.
Its gradient adds the score of every step times what follows,

    full = detached + sum_n (dw_n/dtheta)^T z_n sum_{m > n} 1/2 |w_m - w*_m|^2.

In continuous time it is grad J, as J(u) = J(u*) + 1/2 E int |u - u*|^2 dt.  On the
chain w* is not the optimum of J_N, and the two gradients differ by O(h).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sdebench.errors import unknown
from sdebench.estimator import Array, Estimator
from sdebench.simulate import primitives
from sdebench.simulate.tile import block_loop, clear, lanes, load, path_kernel, store

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.view import View


@block_loop
def weigh_difference(W, TEACHER, Z, full, later, V, B):  # type: ignore[no-untyped-def]
    """V = w - w* + full later z;  later += 1/2 |w - w*|^2."""
    for p in range(0, B, lanes(V)):
        divergence = load(later, 0, p)
        weight = full * divergence
        for i in range(V.shape[0]):
            difference = load(W, i, p) - load(TEACHER, i, p)
            divergence = divergence + 0.5 * (difference * difference)
            store(V, i, p, difference + weight * load(Z, i, p))
        store(later, 0, p, divergence)


@path_kernel
def block_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    teacher: Any,
    teacher_work: Any,
    full: float,
    OUT: Any,
) -> None:
    """Set OUT (P, .) to the gradient of every path; ``full`` 1 or 0."""
    V, later, TEACHER = work.direction, work.adjoint, teacher_work.direction
    clear(OUT, B)
    clear(later, B)
    for n in range(W.shape[0] - 1, -1, -1):
        primitives.evaluate(teacher, teacher_work, n, X[n], TEACHER, B)
        weigh_difference(W[n], TEACHER, Z[n], full, later, V, B)
        primitives.refresh_control(prepared, work, n, X[n], B)
        primitives.control_parameter_vjp(prepared, work, n, X[n], V, OUT, 0, B)


GRADIENTS = ("detached", "full")


@dataclass(frozen=True, kw_only=True)
class OPD(Estimator):
    """On-policy distillation from the optimal control: KL divergence of every step.

    Parameters
    ----------
    gradient : "detached" (the states held fixed) or "full".
    """

    estimand: ClassVar[str] = "gradient"
    source: ClassVar[str] = "DiffusionOPD, arXiv:2605.15055"
    formula: ClassVar[str] = r"""\begin{aligned}
g_{\mathrm{detached}} &= \sum_n \left( \frac{\partial w_n}{\partial \theta}
  \right)^\top (w_n - w^*_n) \\
g_{\mathrm{full}} &= g_{\mathrm{detached}} + \sum_n \left(
  \frac{\partial w_n}{\partial \theta} \right)^\top z_n
  \sum_{m > n} \tfrac{1}{2} |w_m - w^*_m|^2
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "the gradient of the KL divergence from the chain under u* with the states "
        "held fixed (detached), or the whole gradient (full)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"control_parameter_vjp"})
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = tuple(
        {"gradient": gradient} for gradient in GRADIENTS
    )
    block_kernel = staticmethod(block_kernel)

    gradient: str = "detached"

    def __post_init__(self) -> None:
        if self.gradient not in GRADIENTS:
            raise unknown("gradient", self.gradient, GRADIENTS)

    @property
    def other_control(self) -> str:
        return "optimal"

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return (float(self.gradient == "full"),)

    def target(self, policy: PolicyChain) -> Array:
        return policy.distillation_gradient(detached=self.gradient == "detached")

    @property
    def handles_state_dependent_noise(self) -> bool:
        return True

    def statistics(self, view: View) -> Tensor:
        assert view.other is not None
        paths = view.rollout()
        gradient = paths.reward.new_zeros(view.n_paths, view.n_params)
        later = paths.reward.new_zeros(view.n_paths)
        for n in reversed(range(view.n_steps)):
            x = paths.states[n]
            difference = paths.controls[n] - view.other.control(n, x)
            v = difference
            if self.gradient == "full":
                v = difference + later[:, None] * paths.noises[n]
            gradient = gradient + view.control_parameter_vjp(n, x, v)
            later = later + 0.5 * (difference * difference).sum(1)
        return gradient
