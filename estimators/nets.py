r"""Non-equilibrium transport sampling: least squares for the continuity equation.

Along rho_t = p_t e^{lambda_t r} with normalizers e^{F_t} the field w transports the
densities if and only if

    lambda' r + lambda v . grad r + div w + w . grad log rho_t - F' = 0

at all x and t, whatever law x has: base score and velocity suffice, without the
divergence of v.  With a field that is affine in every coordinate, w = a + b x with
div w = sum_i b_i exactly, the squared residual over simulated states is a linear least
squares problem in (a, b, F') at every step by itself.  The estimate is

    free_energy   F_1, the sum of the fitted F' h over the steps, or
    weights       the mean weight of `_escort` under the field of the other half.

On Gaussian problems the features hold the solution and the residual is zero: F_1 is the
left Riemann sum of E_{rho_t}[lambda' r + lambda v . grad r] for every set of paths,
without variance, and off by O(h).  Elsewhere the fitted F_1 has a bias of its own that
more paths or steps do not remove, while the weights have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.composite import Runner
from sdebench.errors import ParameterError, unknown
from sdebench.estimator import Array
from sdebench.estimators._escort import EscortedEstimator, EscortedTerms, Half

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain

ESTIMATES = ("free_energy", "weights")


def fit_continuity(
    x: Array, score: Array, work: Array
) -> tuple[Array, Array, float, Array]:
    """Return a (d,), b (d,), F and the residuals (n,) of the least squares problem.

    Parameters
    ----------
    x, score : states and grad log rho there, (d, n).
    work : lambda' r + lambda v . grad r, (n,).
    """
    features = np.vstack([score, 1.0 + x * score, -np.ones_like(work)]).T
    found = np.full(features.shape[1], np.nan)
    if np.all(np.isfinite(features)) and np.all(np.isfinite(work)):
        found = np.linalg.lstsq(features, -work, rcond=None)[0]
    shift, slope = np.split(found[:-1], 2)
    return shift, slope, float(found[-1]), work + features @ found


@dataclass(frozen=True, kw_only=True)
class NonEquilibriumTransport(EscortedEstimator):
    """log Z from a field and free energies that solve the continuity equation.

    Parameters
    ----------
    estimate : "free_energy", the fitted F_1, or "weights" of escorted paths.
    rounds : of simulating with the field and fitting it anew, >= 1.
    annealing : level of the reward in the share of steps done, "linear", "quadratic"
        or "cubic".
    """

    source: ClassVar[str] = (
        "Albergo and Vanden-Eijnden 2024, arXiv:2410.02711 (NETS); tilted: "
        "arXiv:2605.00229"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
(w_n, F_n') &= \mathrm{argmin} \sum_m \left( \lambda_n' r + \lambda_n v_n \cdot \nabla r
  + \mathrm{div}\, w + w \cdot \nabla \log \rho_n - F' \right)^2(X_n^{(m)}) \\
\log Z &\approx \sum_n h F_n', \quad w_n(x) = a_n + b_n x
\end{aligned}"""
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"estimate": "weights"})

    estimate: str = "free_energy"
    rounds: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimate not in ESTIMATES:
            raise unknown("estimate", self.estimate, ESTIMATES)
        if self.rounds < 1:
            raise ParameterError(f"rounds {self.rounds} must be at least 1")

    @property
    def unbiased(self) -> str:  # type: ignore[override]
        if self.discretization_free:
            return (
                "Z of the continuous process at any number of steps and whatever the "
                "fit, before the logarithm, which biases by O(1/n_paths)"
            )
        return (
            "on Gaussian problems the left Riemann sum of exact expectations, which "
            "differs from log Z by O(h); elsewhere the features do not hold the field"
        )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        density = {"base_density"} if self.discretization_free else set()
        return frozenset({"reward_gradient"} | density)

    @property
    def discretization_free(self) -> bool:
        return self.estimate == "weights"

    @property
    def declared_bias(self) -> str:
        return "none" if self.discretization_free else "any"

    def unknowns(self, dim: int) -> int:
        return 2 * dim + 1

    def target(self, policy: PolicyChain) -> Array:
        """Return the left Riemann sum of exact expectations under rho_n."""
        from sdebench.closed_form.work import expected_work

        return np.array([expected_work(policy.chain, self.power)])

    def fitted(self, runner: Runner, paths: Half) -> tuple[Array, Array]:
        """Return the field (N, 2, d) and the free energies (N,) of some paths."""
        count, dim = runner.n_steps, runner.dim
        fields, energies = np.zeros((count, 2, dim)), np.zeros(count)
        for _ in range(self.rounds):
            inner = EscortedTerms(annealing=self.annealing, fields=fields)
            rows = paths.run(runner, inner).reshape(count, 2 * dim + 1, -1)
            fields = np.empty_like(fields)
            for n, row in enumerate(rows):
                parts = row[:dim], row[dim:-1], row[-1]
                fields[n, 0], fields[n, 1], energies[n], _ = fit_continuity(*parts)
        return fields, energies

    def fit(self, runner: Runner, paths: Half) -> Array:
        return self.fitted(runner, paths)[0]

    def run(self, runner: Runner) -> Array:
        if self.discretization_free:
            return self.cross_fitted(runner)
        _, energies = self.fitted(runner, Half(0, runner.noise()))
        return np.full((1, runner.n_paths), energies.sum())
