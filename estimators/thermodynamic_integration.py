r"""Thermodynamic integration: log Z as an integral of expectations along a path.

Between neighbours of a path of densities rho_0 = p_0, ..., rho_N = p_T e^r
(`_annealing`) lies rho_n e^{mu Delta_n}, Delta_n = log rho_{n+1} / rho_n, on which

    log Z_{n+1} - log Z_n = int_0^1 E_mu[Delta_n] dmu.

The derivative of the integrand is Var_mu[Delta_n] and its second one the third cumulant
of Delta_n, so that the trapezoidal rule

    sum_n 1/2 (E_{rho_n}[Delta_n] + E_{rho_{n+1}}[Delta_n])

is off by 1/12 sum_n kappa_3(Delta_n) to leading order, O(1/N^2): no derivative in time
of p_t is needed, and no divergence.

The expectations are averages over annealed states: "weighted" with the weights of
annealed importance sampling up to the level, consistent however badly the moves mix, or
"plain", which lags behind rho_n unless they mix within a level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.errors import unknown
from sdebench.estimator import Array
from sdebench.estimators._annealing import (
    AnnealingEstimator,
    anneal,
    annealed_density,
)
from sdebench.estimators._work import add_row
from sdebench.simulate.tile import clear, combine, glue, path_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.view import View

EXPECTATIONS = ("weighted", "plain")


@glue
def expectation(VALUES, LOGS, weighted, count):  # type: ignore[no-untyped-def]
    """Return the mean of VALUES[0] over paths with the log-weights LOGS[0]."""
    top = np.float64(LOGS[0, 0])
    for p in range(1, count):
        top = max(top, np.float64(LOGS[0, p]))
    total, mean = 0.0, 0.0
    for p in range(count):
        share = 1.0
        if weighted:
            share = math.exp(np.float64(LOGS[0, p]) - top)
        total += share
        mean += share * np.float64(VALUES[0, p])
    return mean / total


@path_kernel
def block_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    count: int,
    OWN: Any,
    power: int,
    KNOTS: Any,
    geometric: bool,
    langevin: bool,
    moves: int,
    step: float,
    weighted: bool,
    OUT: Any,
) -> None:
    """Set OUT (1, B + PADDING) to the integral from all paths of a replicate."""
    N, A, ROWS = W.shape[0], work.adjoint, work.start
    HERE, AHEAD, GAP, integral = ROWS[0:1], ROWS[1:2], ROWS[3:4], 0.0
    path = power, KNOTS, geometric
    clear(OUT, B)
    combine(1.0, X[0], 0.0, X[0], A, B)
    annealed_density(prepared, work, 0, N, *path, A, ROWS, 0, B)
    for n in range(1, N + 1):
        annealed_density(prepared, work, n, N, *path, A, ROWS, 1, B)
        combine(1.0, AHEAD, -1.0, HERE, GAP, B)
        integral += 0.5 * expectation(GAP, OUT, weighted, count)
        add_row(1.0, ROWS, 3, OUT, B)
        combine(1.0, AHEAD, 0.0, AHEAD, HERE, B)
        anneal(prepared, work, n, N, path, langevin, moves, step, Z[n - 1], OWN, B)
        annealed_density(prepared, work, n - 1, N, *path, A, ROWS, 1, B)
        combine(1.0, HERE, -1.0, AHEAD, GAP, B)
        integral += 0.5 * expectation(GAP, OUT, weighted, count)
    for p in range(B):
        OUT[0, p] = integral


@dataclass(frozen=True, kw_only=True)
class ThermodynamicIntegration(AnnealingEstimator):
    """log Z by the trapezoidal rule over expectations along annealed densities.

    Parameters
    ----------
    expectations : "weighted" by annealed importance sampling, or "plain" averages.
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
        "Kirkwood 1935, J. Chem. Phys. 3, 300; Gelman and Meng 1998, Statistical "
        "Science 13, 163; the rule between neighbours is ours"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
\log Z &= \sum_{n<N} \int_0^1 \mathrm{E}_{\rho_n^{1-\mu} \rho_{n+1}^{\mu}} [\Delta_n]\,
  d\mu \approx \sum_{n<N} \tfrac{1}{2} \left( \mathrm{E}_{\rho_n} [\Delta_n]
  + \mathrm{E}_{\rho_{n+1}} [\Delta_n] \right) \\
\Delta_n &= \log \frac{\rho_{n+1}}{\rho_n}, \quad \rho_n = p_n e^{\lambda_n r}
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "with many paths per replicate, the trapezoidal sum over exact expectations, "
        "which differs from log Z by O(1/N^2); plain averages lag behind besides"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"path": "geometric"},
        {"expectations": "plain"},
    )
    block_kernel = staticmethod(block_kernel)

    expectations: str = "weighted"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expectations not in EXPECTATIONS:
            raise unknown("expectations", self.expectations, EXPECTATIONS)

    @property
    def declared_bias(self) -> str:
        # that of weighted expectations is of order 1/n_paths, but all paths of a
        # replicate make one number, from which that of fewer paths cannot be told
        return "any"

    @property
    def kernel_options(self) -> tuple[Any, ...]:
        return *super().kernel_options, self.expectations == "weighted"

    def group_size(self, n_paths: int) -> int:
        return n_paths

    def not_applicable(self, n_paths: int) -> str | None:
        if n_paths < 2:
            return "an expectation needs at least 2 paths per replicate"
        return None

    def target(self, policy: PolicyChain) -> Array:
        """Return the trapezoidal sum over exact expectations."""
        from sdebench.closed_form.work import annealed_gaussians, trapezoidal_log_ratio

        rows = annealed_gaussians(
            policy.chain, self.all_levels(policy.chain.n_steps), self.path
        )
        return np.array([trapezoidal_log_ratio(rows)])

    def statistics(self, view: View) -> Tensor:
        import torch

        x = view.start()
        here = self.log_density(view, 0, x)
        weight, integral = x.new_zeros(view.n_paths), x.new_zeros(())

        def mean(values: Tensor) -> Tensor:
            if self.expectations == "plain":
                return values.mean()
            return (torch.softmax(weight, 0) * values).sum()

        for n in range(1, view.n_steps + 1):
            ahead = self.log_density(view, n, x)
            integral = integral + 0.5 * mean(ahead - here)
            weight = weight + ahead - here
            x, here = self.moved(view, n, x, ahead)
            integral = integral + 0.5 * mean(here - self.log_density(view, n - 1, x))
        return integral.expand(view.n_paths, 1)
