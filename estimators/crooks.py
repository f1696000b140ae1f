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

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sdebench.estimators._work import KernelRatioEstimator, add_forward_weight
from sdebench.simulate.tile import clear, path_kernel

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
    N, ROWS = W.shape[0], work.start
    clear(OUT, B)
    add_forward_weight(prepared, work, N, power, noising, X[0], Z, ROWS, OUT, B)


@dataclass(frozen=True, kw_only=True)
class Crooks(KernelRatioEstimator):
    """log Z from kernel-ratio weights, unbiased for Z at any number of steps.

    Parameters
    ----------
    annealing : level of the reward in the share of steps done, "linear", "quadratic"
        or "cubic".
    backward : variance of the backward kernels, that of the exact "noising" or
        "matched" to the forward ones: less spread with many steps, and with few of
        infinite variance.
    """

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
  + \tfrac{1}{2} c_n \lambda_{n+1} \nabla r(x'), c_n I \right)
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "Z of the continuous process at any number of steps, before the logarithm, "
        "which biases by -Var(weight)/(2 n_paths Z^2)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"reward_gradient", "base_density"})
    block_kernel = staticmethod(block_kernel)

    def statistics(self, view: View) -> Tensor:
        return self.forward_weights(view)[:, None]
