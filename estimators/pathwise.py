r"""Pathwise derivative: discrete adjoint of the whole path (backpropagation).

For one path with cost J = sum_n (1/2 |w_n|^2 + f_n) - r(X_N) and fixed noise,

    lambda_N = -grad r(X_N)
    v_n = w_n + G_n^T lambda_{n+1}
    dJ/dtheta = sum_n (dw_n/dtheta)^T v_n
    lambda_n = (d base mean_n/dx)^T lambda_{n+1} + (dw_n/dx)^T v_n + grad f_n,

the exact derivative of the discretised path, whose mean is the exact gradient of the
discretised objective.  Of the reward alone, w_n and f_n leave the costs.  Where the
noise depends on the state, d base mean_n/dx is that of base mean_n + G_n(x) (w_n + z_n)
with w_n + z_n held fixed.

Sticking the landing adds the martingale sum w_n . z_n to the cost, so that the cost is
the log-ratio of the path's density to the tilted one, and leaves out the score
sum (dw_n/dtheta)^T z_n of the path, of mean zero.  What remains of the martingale is
its derivative through the states,

    lambda_n = ... + (dw_n/dx)^T (v_n + z_n) + ...,

of mean zero too.  At the feedback u*_N that is optimal for an affine N-step chain it
makes lambda_n = grad V_n(X_n) on every path, so that

    gradient = sum_n (dw_n/dtheta)^T G_n^T P_{n+1} G_n z_n

with the Hessian P of the value function V: zero up to O(h), a variance of O(h^2), and
exactly zero where V is linear.  In continuous time it is zero at u*.

Where theta moves the law p_theta of X_0 as well, the gradient gains
(dX_0/dtheta)^T lambda_0 and the derivative of the relative entropy of p_theta to the
base process's p_0.  Sticking the landing takes log p_theta/p_0 at X_0 for the relative
entropy and leaves out its score: grad log p_theta/p_0 (X_0) is added to lambda_0, which
is zero at the optimum, where the ratio is e^{-V} / Z.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sdebench.errors import ParameterError
from sdebench.estimator import Estimator, estimand_of
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
    costs: float,
    martingale: bool,
    OUT: Any,
) -> None:
    """Set OUT (P, B + PADDING) to the gradient of every path of a stored block.

    ``costs`` : 1 with the costs w_n and f_n, 0 without.
    """
    N = W.shape[0]
    A, V, NEXT = work.adjoint, work.direction, work.adjoint_next
    clear(OUT, B)
    primitives.reward_gradient(prepared, work, X[N], A, B)
    combine(-1.0, A, 0.0, A, A, B)
    for n in range(N - 1, -1, -1):
        primitives.refresh(prepared, work, n, X[n], B)
        primitives.noise_transpose_at(prepared, work, n, X[n], A, V, B)
        combine(1.0, V, costs, W[n], V, B)
        if martingale:
            primitives.control_parameter_vjp(prepared, work, n, X[n], V, OUT, 0, B)
            primitives.base_vjp(prepared, work, n, X[n], A, NEXT, B)
            combine(1.0, V, 1.0, Z[n], V, B)
            primitives.control_vjp(prepared, work, n, X[n], V, NEXT, B)
        else:
            primitives.adjoint(prepared, work, n, X[n], A, V, NEXT, OUT, B)
        primitives.noise_vjp(prepared, work, n, X[n], W[n], Z[n], A, NEXT, B)
        if costs > 0.0:
            primitives.running_cost_gradient(prepared, work, n, X[n], NEXT, B)
        A, NEXT = NEXT, A
    if martingale:
        primitives.start_log_ratio_gradient(prepared, work, X[0], A, B)
    else:
        primitives.start_cost_gradient(prepared, work, costs, OUT, B)
    primitives.start_parameter_vjp(prepared, work, X[0], A, OUT, B)


@dataclass(frozen=True, kw_only=True)
class Pathwise(Estimator):
    """Pathwise derivative of the whole discretized path (full adjoint).

    Parameters
    ----------
    objective : "control" for J, "reward" for -E r(X_T).
    sticking_the_landing : add the martingale sum w_n . z_n to the cost with its score
        left out: the same mean, and in continuous time no variance at the optimum.
    """

    source: ClassVar[str] = (
        "backpropagation through the simulation; discrete adjoint of Domingo-Enrich "
        "et al. 2024, arXiv:2409.08861, section 5; sticking the landing: Roeder et al. "
        "2017, arXiv:1703.09194, on path space Xu et al. 2022, arXiv:2102.06559"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
\lambda_N &= -\nabla r(X_N), \quad v_n = w_n + G_n^\top \lambda_{n+1} \\
\lambda_n &= \left( \frac{\partial \mu_n}{\partial x} \right)^\top \lambda_{n+1}
  + \left( \frac{\partial w_n}{\partial x} \right)^\top \left( v_n
  + [\text{landing}]\, z_n \right) + \nabla f_n \\
g &= \sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top v_n
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "the gradient of the discretized objective, J_N or -E r(X_N), with or without "
        "sticking the landing"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"sticking_the_landing": True},
        {"objective": "reward"},
    )
    block_kernel = staticmethod(block_kernel)

    objective: str = "control"
    sticking_the_landing: bool = False

    def __post_init__(self) -> None:
        if self.estimand != "gradient" and self.sticking_the_landing:
            raise ParameterError(
                "sticking_the_landing needs objective control: without the control's "
                "cost the martingale cancels nothing"
            )

    @property
    def estimand(self) -> str:  # type: ignore[override]
        return estimand_of(self.objective)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        derivatives = {
            "drift_vjp",
            "control_vjp",
            "control_parameter_vjp",
            "reward_gradient",
        }
        if self.objective == "control":
            derivatives.add("running_cost_gradient")
        return frozenset(derivatives)

    @property
    def handles_initial_law(self) -> bool:
        return True

    @property
    def handles_state_dependent_noise(self) -> bool:
        return True

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return float(self.objective == "control"), self.sticking_the_landing

    def statistics(self, view: View) -> Tensor:
        paths, costs = view.rollout(), self.objective == "control"
        costate = -view.reward_gradient(paths.states[-1])
        gradient = costate.new_zeros(view.n_paths, view.n_params)
        for n in reversed(range(view.n_steps)):
            x = paths.states[n]
            v = view.noise_transpose(n, costate, x)
            if costs:
                v = v + paths.controls[n]
            gradient = gradient + view.control_parameter_vjp(n, x, v)
            if self.sticking_the_landing:
                v = v + paths.noises[n]
            shock = paths.controls[n], paths.noises[n]
            costate = view.base_vjp(n, x, costate, *shock) + view.control_vjp(n, x, v)
            if costs:
                costate = costate + view.running_cost_gradient(n, x)
        if not view.has_start_parameters:
            return gradient
        x = paths.states[0]
        if self.sticking_the_landing:
            costate = costate + view.start_log_ratio_gradient(x)
        elif costs:
            gradient = gradient + view.start_cost_gradient()
        return gradient + view.start_parameter_vjp(x, costate)
