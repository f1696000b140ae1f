r"""Crooks' identity under tilting: log Z from backward over forward kernels.

The chain runs forward along rho_n = p_n e^{lambda_n r} and is compared with a chain
that runs backward from rho_N = p_T e^r,

    log W = log rho_N(X_N) + sum_n log B_n(X_{n+1}, X_n)
            - log p_0(X_0) - sum_n log F_n(X_n, X_{n+1}),

with the kernels of `_work`.  As each B_n is a density in x, integrating W against the
forward chain leaves the integral of rho_N: E W = Z = E_{p_T} e^r exactly, at any number
of steps and for any levels lambda.  The steps only decide the spread of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sdebench.estimator import Array, Estimator
from sdebench.estimators._work import (
    ANNEALING,
    add_kernel_ratio,
    add_row,
    check_annealing,
    check_backward,
    forward_step,
    level,
    log_kernel_ratio,
    not_a_path_of_densities,
    step_back,
    step_noise,
    step_shrink,
    steps_of,
)
from sdebench.simulate import primitives
from sdebench.simulate.tables import Tables
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
    power: int,
    noising: bool,
    OUT: Any,
) -> None:
    """Set OUT (1, B + PADDING) to the log-weight of every path of its own chain."""
    N = W.shape[0]
    A, NEXT, R, ROWS = work.adjoint, work.adjoint_next, work.direction, work.start
    clear(OUT, B)
    combine(1.0, X[0], 0.0, X[0], A, B)
    primitives.base_log_density(prepared, work, 0, A, ROWS, 0, B)
    add_row(-1.0, ROWS, 0, OUT, B)
    clear(R, B)
    for n in range(N):
        g = step_noise(prepared, n)
        tilt = 0.5 * g * g * level(n, N, power)
        forward_step(prepared, work, n, tilt, g, A, R, Z[n], NEXT, B)
        primitives.reward_gradient(prepared, work, NEXT, R, B)
        a, b = step_shrink(prepared, n, N), step_back(prepared, n, N, noising)
        ours = level(n + 1, N, power)
        add_kernel_ratio(g, a, b, ours, A, NEXT, R, Z[n], OUT, B)
        A, NEXT = NEXT, A
    primitives.base_log_density(prepared, work, N, A, ROWS, 0, B)
    primitives.reward(prepared, work, A, ROWS, 1, B)
    add_row(1.0, ROWS, 0, OUT, B)
    add_row(1.0, ROWS, 1, OUT, B)


@dataclass(frozen=True, kw_only=True)
class Crooks(Estimator):
    """log Z from kernel-ratio weights, unbiased for Z at any number of steps.

    Parameters
    ----------
    annealing : level of the reward in the share of steps done, "linear", "quadratic"
        or "cubic".
    backward : variance of the backward kernels, that of the exact "noising" or
        "matched" to the forward ones: less spread with many steps, and with few of
        infinite variance.
    """

    estimand: ClassVar[str] = "log_normalizer"
    source: ClassVar[str] = (
        "Crooks 1999, Phys. Rev. E 60, 2721; kernel ratios as in annealed importance "
        "sampling, Neal 2001, and CMCD, arXiv:2307.01050; tilted: arXiv:2605.00229"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
\log W &= \log \frac{p_T(X_N)\, e^{r(X_N)}}{p_0(X_0)}
  + \sum_n \log \frac{B_n(X_{n+1}, X_n)}{F_n(X_n, X_{n+1})} \\
F_n(x, x') &= \mathcal{N}\left( x'; x + h \left( b_n
  + \tfrac{1}{2} \sigma_n^2 \lambda_n \nabla r \right)(x), h \sigma_n^2 I \right) \\
B_n(x', x) &= \mathcal{N}\left( x; \tfrac{\alpha_n}{\alpha_{n+1}} x'
  + \tfrac{1}{2} b_n \lambda_{n+1} \nabla r(x'), b_n I \right)
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "Z of the continuous process at any number of steps, before the logarithm, "
        "which biases by -Var(weight)/(2 n_paths Z^2)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"reward_gradient", "base_density"})
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"backward": "matched"})
    reduction: ClassVar[str] = "log_mean_exp"
    block_kernel = staticmethod(block_kernel)

    annealing: str = "quadratic"
    backward: str = "noising"

    def __post_init__(self) -> None:
        check_annealing(self.annealing)
        check_backward(self.backward)

    @property
    def control(self) -> str:
        return "none"

    @property
    def needs_denoiser(self) -> bool:
        return True

    @property
    def discretization_free(self) -> bool:
        return True

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return ANNEALING[self.annealing], self.backward == "noising"

    def n_statistics(self, n_params: int) -> int:
        return 1

    def not_applicable_on(self, tables: Tables, times: Array) -> str | None:
        return not_a_path_of_densities(tables, ANNEALING[self.annealing])

    def statistics(self, view: View) -> Tensor:
        power = ANNEALING[self.annealing]
        steps = steps_of(view.denoiser, power, self.backward)
        x = view.start()
        slope = x.new_zeros(x.shape)  # its level is zero
        weight = -view.base_log_density(0, x)
        for n in range(view.n_steps):
            z, tilt = view.noise(n), 0.5 * steps.noise[n] ** 2 * steps.level[n]
            after = view.base_mean(n, x) + tilt * slope + view.apply_noise(n, z)
            slope = view.reward_gradient(after)
            weight = weight + log_kernel_ratio(steps, n, x, after, slope, z)
            x = after
        end = view.base_log_density(view.n_steps, x) + view.reward(x)
        return (weight + end)[:, None]
