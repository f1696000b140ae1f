r"""Annealed importance sampling: log Z from Metropolis moves along a path of densities.

X_0 is drawn from rho_0 = p_0, and X_n moves X_{n-1} by a chain that leaves rho_n
invariant (`_annealing`); the weights

    log W = sum_{n=1}^{N} log rho_n(X_{n-1}) - log rho_{n-1}(X_{n-1})

have the mean int rho_N = Z exactly, at any number of levels and however badly the moves
mix: integrating out X_0, X_1, ... in turn, the invariance of a move carries rho_n over
to the next state.  Levels and moves only decide the spread of W.

No path is simulated: the steps of the base process are the levels, and their noise
makes the proposals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sdebench.estimators._annealing import (
    AnnealingEstimator,
    anneal,
    annealed_density,
)
from sdebench.estimators._work import add_row
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
    OWN: Any,
    power: int,
    KNOTS: Any,
    geometric: bool,
    langevin: bool,
    moves: int,
    step: float,
    OUT: Any,
) -> None:
    """Set OUT (1, B + PADDING) to the log-weight of every annealed path."""
    N, A, ROWS = W.shape[0], work.adjoint, work.start
    path = power, KNOTS, geometric
    clear(OUT, B)
    combine(1.0, X[0], 0.0, X[0], A, B)
    annealed_density(prepared, work, 0, N, *path, A, ROWS, 0, B)
    for n in range(1, N + 1):
        add_row(-1.0, ROWS, 0, OUT, B)
        annealed_density(prepared, work, n, N, *path, A, ROWS, 0, B)
        add_row(1.0, ROWS, 0, OUT, B)
        if n < N:
            anneal(prepared, work, n, N, path, langevin, moves, step, Z[n - 1], OWN, B)


@dataclass(frozen=True, kw_only=True)
class AnnealedImportanceSampling(AnnealingEstimator):
    """log Z from Metropolis moves along annealed densities, unbiased for Z.

    Parameters
    ----------
    annealing : level of the reward in the share of steps done, "linear", "quadratic"
        or "cubic".
    levels : from 0 to 1, instead of ``annealing``: at equidistant shares of the steps,
        with linear interpolation.
    path : of densities, the base process' "marginals" p_n e^(lambda r), or "geometric",
        p_0^(1 - lambda) (p_T e^r)^lambda.
    kernel : that leaves them invariant, "mala" or "random_walk".
    moves : per level, >= 1.
    step : length of the proposals, in units of N^(1/2) times the noise of a step of the
        base process, > 0.
    """

    source: ClassVar[str] = (
        "Neal 2001, Statistics and Computing 11, 125, equations 3-9; MALA: Roberts and "
        "Tweedie 1996"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
\log W &= \sum_{n=1}^{N} \log \frac{\rho_n(X_{n-1})}{\rho_{n-1}(X_{n-1})}, \quad
  X_0 \sim \rho_0 = p_0, \quad \rho_n = p_n e^{\lambda_n r} \\
X_n &\sim K_n(X_{n-1}, \cdot), \quad \rho_n K_n = \rho_n, \quad
  \log Z \approx \log \frac{1}{M} \sum_{m=1}^{M} W^{(m)}
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "Z of the continuous process at any number of levels, before the logarithm, "
        "which biases by -Var(weight)/(2 n_paths Z^2)"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"path": "geometric", "kernel": "random_walk", "moves": 2},
    )
    block_kernel = staticmethod(block_kernel)

    @property
    def discretization_free(self) -> bool:
        return True

    def statistics(self, view: View) -> Tensor:
        x = view.start()
        here = self.log_density(view, 0, x)
        weight = x.new_zeros(view.n_paths)
        for n in range(1, view.n_steps + 1):
            ahead = self.log_density(view, n, x)
            weight = weight + ahead - here
            if n < view.n_steps:
                x, here = self.moved(view, n, x, ahead)
        return weight[:, None]
