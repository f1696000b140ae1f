"""Non-adapted adjoint: the lean adjoint of forward paths, regressed on the state.

Along every simulated path

    a_N = -grad r(X_N),   a_n = (d base mean_n/dx)^T a_{n+1} + grad f_n,

depends on the future of the path.  Its regression on features of X_n, at every step,
gives the costate phi_n, and the gradient is that of adjoint matching with phi_{n+1}
for a_{n+1}.  It is what time-reversed BSDEs are compared with: the same regression
with noisier labels.

Where the noise depends on the state, d base mean_n/dx is that of
base mean_n + G_n(x) (w_n + z_n) with w_n + z_n held fixed.

Where theta moves the law of X_0 as well, phi_0(X_0) gives its part.

References
----------
The comparator "PNAA" of Y. Mei, A. Taghvaei, arXiv:2603.20455.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.estimator import Estimator, Sizes
from sdebench.estimators._costate_regression import (
    Slice,
    check_degree,
    factor_table,
    fill_values,
    fit_slice,
    too_few_paths,
)
from sdebench.simulate import primitives
from sdebench.simulate.jit import kernel
from sdebench.simulate.tile import clear, combine

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View


@kernel
def block_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    count: int,
    degree: int,
    OUT: Any,
) -> None:
    """Set OUT (P, B + PADDING) to the gradient of every path of a whole replicate."""
    N, d = W.shape[0], W.shape[1]
    A, V, NEXT = work.adjoint, work.direction, work.adjoint_next
    phi = np.zeros_like(X[N])
    factors = factor_table(d, degree)
    mean, scale = np.empty(d), np.empty(d)
    clear(OUT, B)
    primitives.reward_gradient(prepared, work, X[N], A, B)
    combine(-1.0, A, 0.0, A, A, B)
    combine(1.0, A, 0.0, A, phi, B)
    for n in range(N - 1, -1, -1):
        if n < N - 1:
            coefficients = fit_slice(X[n + 1], A, count, factors, mean, scale)
            fill_values(X[n + 1], count, factors, mean, scale, coefficients, phi)
        primitives.refresh(prepared, work, n, X[n], B)
        primitives.noise_transpose_at(prepared, work, n, X[n], phi, V, B)
        combine(1.0, V, 1.0, W[n], V, B)
        primitives.control_parameter_vjp(prepared, work, n, X[n], V, OUT, 0, B)
        primitives.base_vjp(prepared, work, n, X[n], A, NEXT, B)
        primitives.noise_vjp(prepared, work, n, X[n], W[n], Z[n], A, NEXT, B)
        primitives.running_cost_gradient(prepared, work, n, X[n], NEXT, B)
        A, NEXT = NEXT, A
    if primitives.has_start_parameters(prepared):
        coefficients = fit_slice(X[0], A, count, factors, mean, scale)
        fill_values(X[0], count, factors, mean, scale, coefficients, phi)
        primitives.start_cost_gradient(prepared, work, 1.0, OUT, B)
        primitives.start_parameter_vjp(prepared, work, X[0], phi, OUT, B)


@dataclass(frozen=True, kw_only=True)
class NonAdaptedAdjoint(Estimator):
    """Lean adjoint along forward paths, regressed on the state.

    Parameters
    ----------
    degree : of the polynomials that the costate is regressed on.
    """

    estimand: ClassVar[str] = "matching_gradient"
    source: ClassVar[str] = "Mei and Taghvaei 2026, arXiv:2603.20455, comparator"
    formula: ClassVar[str] = r"""\begin{aligned}
a_N &= -\nabla r(X_N), \quad
  a_n = \left( \frac{\partial \mu_n}{\partial x} \right)^\top a_{n+1}
  + \nabla f_n \\
\varphi_n &= \mathrm{argmin}_{\varphi} \sum | \varphi(X_n) - a_n |^2 \\
g &= \sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top
  \left( w_n + G_n^\top \varphi_{n+1} \right)
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "with many paths, where the costate is a polynomial of the degree, the "
        "gradient of the discretized adjoint-matching loss"
    )
    needs: ClassVar[frozenset[str]] = frozenset(
        {
            "drift_vjp",
            "control_parameter_vjp",
            "running_cost_gradient",
            "reward_gradient",
        }
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"degree": 3})
    block_kernel = staticmethod(block_kernel)

    degree: int = 1

    def __post_init__(self) -> None:
        check_degree(self.degree)

    @property
    def declared_bias(self) -> str:
        return "any"

    @property
    def handles_initial_law(self) -> bool:
        return True

    @property
    def handles_state_dependent_noise(self) -> bool:
        return True

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return (self.degree,)

    def group_size(self, n_paths: int) -> int:
        return n_paths

    def not_applicable_to(self, sizes: Sizes) -> str | None:
        return too_few_paths(self.degree, sizes)

    def statistics(self, view: View) -> Tensor:
        paths = view.rollout()
        adjoint = -view.reward_gradient(paths.states[-1])
        gradient = adjoint.new_zeros(view.n_paths, view.n_params)
        for n in reversed(range(view.n_steps)):
            x, later = paths.states[n], paths.states[n + 1]
            phi = adjoint
            if n < view.n_steps - 1:
                phi = Slice.fit(later, adjoint, self.degree)(later)
            direction = paths.controls[n] + view.noise_transpose(n, phi, x)
            gradient = gradient + view.control_parameter_vjp(n, x, direction)
            shock = paths.controls[n], paths.noises[n]
            adjoint = view.base_vjp(n, x, adjoint, *shock)
            adjoint = adjoint + view.running_cost_gradient(n, x)
        if view.has_start_parameters:
            x = paths.states[0]
            phi = Slice.fit(x, adjoint, self.degree)(x)
            gradient = gradient + view.start_cost_gradient()
            gradient = gradient + view.start_parameter_vjp(x, phi)
        return gradient
