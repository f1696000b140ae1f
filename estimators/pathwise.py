"""Pathwise derivative: discrete adjoint of the whole path (backpropagation).

For one path with cost J = sum_n (1/2 |w_n|^2 + f_n) - r(X_N) and fixed noise,

    lambda_N = -grad r(X_N)
    v_n = w_n + G_n^T lambda_{n+1}
    dJ/dtheta = sum_n (dw_n/dtheta)^T v_n
    lambda_n = (d base mean_n/dx)^T lambda_{n+1} + (dw_n/dx)^T v_n + grad f_n,

the exact derivative of the discretised path, whose mean is the exact gradient of the
discretised objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sdebench.estimator import Estimator
from sdebench.simulate import primitives
from sdebench.simulate.tile import clear, combine, path_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View


@path_kernel
def block_kernel(
    prepared: Any, work: Any, X: Any, Z: Any, W: Any, totals: Any, B: int, OUT: Any
) -> None:
    """Set OUT (P, B + PADDING) to the gradient of every path of a stored block."""
    N = W.shape[0]
    A, V, NEXT = work.adjoint, work.direction, work.adjoint_next
    clear(OUT, B)
    primitives.reward_gradient(prepared, work, X[N], A, B)
    combine(-1.0, A, 0.0, A, A, B)
    for n in range(N - 1, -1, -1):
        primitives.refresh(prepared, work, n, X[n], B)
        primitives.noise_transpose(prepared, work, n, A, V, B)
        combine(1.0, V, 1.0, W[n], V, B)
        primitives.adjoint(prepared, work, n, X[n], A, V, NEXT, OUT, B)
        primitives.running_cost_gradient(prepared, work, n, X[n], NEXT, B)
        A, NEXT = NEXT, A


@dataclass(frozen=True, kw_only=True)
class Pathwise(Estimator):
    """Pathwise derivative of the whole discretized path (full adjoint)."""

    estimand: ClassVar[str] = "gradient"
    source: ClassVar[str] = (
        "backpropagation through the simulation; discrete adjoint of Domingo-Enrich "
        "et al. 2024, arXiv:2409.08861, section 5"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
\lambda_N &= -\nabla r(X_N), \quad v_n = w_n + G_n^\top \lambda_{n+1} \\
\lambda_n &= \left( \frac{\partial \mu_n}{\partial x} \right)^\top \lambda_{n+1}
  + \left( \frac{\partial w_n}{\partial x} \right)^\top v_n + \nabla f_n \\
g &= \sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top v_n
\end{aligned}"""
    unbiased: ClassVar[str] = "the gradient of the discretized objective J_N"
    needs: ClassVar[frozenset[str]] = frozenset(
        {
            "drift_vjp",
            "control_vjp",
            "control_parameter_vjp",
            "running_cost_gradient",
            "reward_gradient",
        }
    )
    block_kernel = staticmethod(block_kernel)

    def statistics(self, view: View) -> Tensor:
        paths = view.rollout()
        costate = -view.reward_gradient(paths.states[-1])
        gradient = costate.new_zeros(view.n_paths, view.n_params)
        for n in reversed(range(view.n_steps)):
            x = paths.states[n]
            v = paths.controls[n] + view.noise_transpose(n, costate)
            gradient = gradient + view.control_parameter_vjp(n, x, v)
            costate = (
                view.base_vjp(n, x, costate)
                + view.control_vjp(n, x, v)
                + view.running_cost_gradient(n, x)
            )
        return gradient
