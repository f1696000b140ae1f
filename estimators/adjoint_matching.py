"""Adjoint matching: gradient of the matching loss with the lean or the full adjoint.

The lean adjoint a ignores the control,

    a_N = -grad r(X_N),   a_n = (d base mean_n/dx)^T a_{n+1} + grad f_n,

and the loss sum_n 1/2 |w_n + G_n^T a_{n+1}|^2 is differentiated with the path held
fixed:

    gradient = sum_n (dw_n/dtheta)^T (w_n + G_n^T a_{n+1}).

It vanishes in mean at the optimal control; elsewhere it is not the gradient of the
objective.  Basic adjoint matching takes the full adjoint, which differentiates the
control as well,

    a_n = (d base mean_n/dx)^T a_{n+1} + (dw_n/dx)^T (w_n + G_n^T a_{n+1}) + grad f_n,

and this is the costate of `pathwise`: the gradient of its loss is the pathwise gradient
of J_N, path by path.

Where the noise depends on the state, d base mean_n/dx is that of
base mean_n + G_n(x) (w_n + z_n) with w_n + z_n held fixed.

Where theta moves the law of X_0 as well, its part is (dX_0/dtheta)^T a_0 plus the
derivative of the relative entropy to the base process's law.

References
----------
C. Domingo-Enrich, M. Drozdzal, B. Karrer, R. T. Q. Chen, "Adjoint matching", ICLR 2025,
arXiv:2409.08861.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sdebench.errors import unknown
from sdebench.estimator import Estimator
from sdebench.simulate import primitives
from sdebench.simulate.tile import clear, combine, path_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View


@path_kernel
def block_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    full: bool,
    OUT: Any,
) -> None:
    """Set OUT (P, B + PADDING) to the matching gradient of every stored path."""
    N = W.shape[0]
    A, V, NEXT = work.adjoint, work.direction, work.adjoint_next
    clear(OUT, B)
    primitives.reward_gradient(prepared, work, X[N], A, B)
    combine(-1.0, A, 0.0, A, A, B)
    for n in range(N - 1, -1, -1):
        primitives.refresh(prepared, work, n, X[n], B)
        primitives.noise_transpose_at(prepared, work, n, X[n], A, V, B)
        combine(1.0, V, 1.0, W[n], V, B)
        if full:
            primitives.adjoint(prepared, work, n, X[n], A, V, NEXT, OUT, B)
        else:
            primitives.control_parameter_vjp(prepared, work, n, X[n], V, OUT, 0, B)
            primitives.base_vjp(prepared, work, n, X[n], A, NEXT, B)
        primitives.noise_vjp(prepared, work, n, X[n], W[n], Z[n], A, NEXT, B)
        primitives.running_cost_gradient(prepared, work, n, X[n], NEXT, B)
        A, NEXT = NEXT, A
    primitives.start_cost_gradient(prepared, work, 1.0, OUT, B)
    primitives.start_parameter_vjp(prepared, work, X[0], A, OUT, B)


ADJOINTS = {"lean": "matching_gradient", "full": "gradient"}
"""Estimand of each adjoint."""


@dataclass(frozen=True, kw_only=True)
class AdjointMatching(Estimator):
    """Gradient of the adjoint-matching loss: lean adjoint, or full for that of J.

    Parameters
    ----------
    adjoint : "lean", whose gradient is not that of J, or "full", basic adjoint
        matching, whose gradient equals the pathwise one.
    """

    source: ClassVar[str] = (
        "Domingo-Enrich et al. 2024, arXiv:2409.08861, eq. (37); full: basic adjoint "
        "matching, section 5"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
a_N &= -\nabla r(X_N), \quad v_n = w_n + G_n^\top a_{n+1} \\
a_n &= \left( \frac{\partial \mu_n}{\partial x} \right)^\top a_{n+1}
  + [\text{full}] \left( \frac{\partial w_n}{\partial x} \right)^\top v_n
  + \nabla f_n \\
g &= \sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top v_n
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "the gradient of the discretized adjoint-matching loss; with the lean adjoint "
        "it vanishes at the optimum and differs from the gradient of J elsewhere, with "
        "the full one it is the gradient of J_N"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"adjoint": "full"})
    block_kernel = staticmethod(block_kernel)

    adjoint: str = "lean"

    def __post_init__(self) -> None:
        if self.adjoint not in ADJOINTS:
            raise unknown("adjoint", self.adjoint, ADJOINTS)

    @property
    def estimand(self) -> str:  # type: ignore[override]
        return ADJOINTS[self.adjoint]

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        derivatives = {
            "drift_vjp",
            "control_parameter_vjp",
            "running_cost_gradient",
            "reward_gradient",
        }
        return frozenset(derivatives | ({"control_vjp"} if self._full else set()))

    @property
    def _full(self) -> bool:
        return self.adjoint == "full"

    @property
    def handles_initial_law(self) -> bool:
        return True

    @property
    def handles_state_dependent_noise(self) -> bool:
        return True

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return (self._full,)

    def statistics(self, view: View) -> Tensor:
        paths = view.rollout()
        adjoint = -view.reward_gradient(paths.states[-1])
        gradient = adjoint.new_zeros(view.n_paths, view.n_params)
        for n in reversed(range(view.n_steps)):
            x = paths.states[n]
            residual = paths.controls[n] + view.noise_transpose(n, adjoint, x)
            gradient = gradient + view.control_parameter_vjp(n, x, residual)
            shock = paths.controls[n], paths.noises[n]
            adjoint = view.base_vjp(n, x, adjoint, *shock)
            adjoint = adjoint + view.running_cost_gradient(n, x)
            if self._full:
                adjoint = adjoint + view.control_vjp(n, x, residual)
        if view.has_start_parameters:
            gradient = gradient + view.start_cost_gradient()
            gradient = gradient + view.start_parameter_vjp(paths.states[0], adjoint)
        return gradient
