r"""Controlled Monte Carlo diffusions: an escorting field fitted by path-space losses.

The field c_n(x) = (1/N) sum_j phi_j(n) (a_j + b_j x), Legendre polynomials phi_j of the
share of steps done, escorts the chains of `_escort`.  With
l = -log W = log P_F / P_B + const and the scores S_F, S_B of the forward and backward
path densities at fixed states, v_n the variance of the exact noising, the gradients of
the two losses in the coefficients are

    kl             KL(P_F || P_B) = E l:        E[(l - E l) S_F] + E[S_F - S_B],
    log_variance   1/2 Var l, states detached:  Cov(l, S_F - S_B),

neither of which differentiates through the states (E S_F = 0 takes noise away from the
first).  Both step by the inverse of Cov(S_F - S_B), the curvature of both losses where
l is constant, and by no more than moves l by one standard deviation: a fixed point is
a zero of the loss' gradient, whatever the curvature.  At the optimum log_variance has
no noise left, as l is constant; kl keeps that of S_F - S_B.

The field is fitted on one half of the paths and used on the other, both ways, so that
the weights are unbiased for Z whatever the fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sdebench.composite import Runner
from sdebench.errors import ParameterError, unknown
from sdebench.estimator import Array
from sdebench.estimators._escort import EscortedEstimator, EscortedWeights, Half

LOSSES = ("kl", "log_variance")
REACH = 1.0
"""Of one round, in standard deviations of l: longer steps trust too few paths."""
RIDGE = 1e-9
"""Of the curvature's mean diagonal: against directions that no path moves in."""


def profiles(degree: int, n_steps: int) -> Array:
    """Return phi_j / N in the middle of every step, (degree + 1, n_steps)."""
    share = (np.arange(n_steps) + 0.5) / n_steps
    values = np.polynomial.legendre.legvander(2.0 * share - 1.0, degree).T
    return np.asarray(values / n_steps, np.float64)


def loss_gradient(loss: str, rows: Array) -> tuple[Array, Array]:
    """Return gradient (P,) and curvature (P, P) of a loss.

    Parameters
    ----------
    rows : of `EscortedWeights`, (1 + 2 P, n).
    """
    ratio = -(rows[0] - rows[0].mean())
    forward, backward = np.split(rows[1:], 2)
    slopes = forward - backward
    mean = slopes.mean(axis=1)
    slopes = slopes - mean[:, None]
    degrees = len(ratio) - 1.0
    curvature = slopes @ slopes.T / degrees
    if loss == "log_variance":
        return slopes @ ratio / degrees, curvature
    return forward @ ratio / degrees + mean, curvature


@dataclass(frozen=True, kw_only=True)
class ControlledMonteCarloDiffusion(EscortedEstimator):
    """log Z from escorted paths, their field fitted by KL or by log-variance.

    Parameters
    ----------
    loss : that fits the field, "kl" or "log_variance".
    degree : of its polynomials in time, >= 0.
    rounds : of simulating with the field and improving it, >= 1.
    annealing : level of the reward in the share of steps done, "linear", "quadratic"
        or "cubic".
    """

    source: ClassVar[str] = (
        "Vargas et al. 2024, arXiv:2307.01050 (CMCD); log-variance: Richter et al. "
        "2020, arXiv:2010.10436; tilted: arXiv:2605.00229"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
\log W &= \log \frac{p_T(X_N)\, e^{r(X_N)}}{p_0(X_0)}
  + \sum_n \log \frac{B_n(X_{n+1}, X_n)}{F_n(X_n, X_{n+1})} \\
F_n(x, x') &= \mathcal{N}\left( x'; x + h \left( b_n
  + \tfrac{1}{2} \sigma_n^2 \lambda_n \nabla r \right)(x) + c_n(x),
  h \sigma_n^2 I \right) \\
B_n(x', x) &= \mathcal{N}\left( x; \tfrac{\alpha_n}{\alpha_{n+1}} x'
  + \tfrac{1}{2} v_n \lambda_{n+1} \nabla r(x') - c_n(x'), v_n I \right) \\
c &= \mathrm{argmin}\ \mathrm{E}[-\log W]\ \text{or}\ \mathrm{Var}[\log W]
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "Z of the continuous process at any number of steps and whatever the fit, "
        "before the logarithm, which biases by O(1/n_paths)"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"loss": "kl"})

    loss: str = "log_variance"
    degree: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        if self.degree < 0:
            raise ParameterError(f"degree {self.degree} must be at least 0")
        if self.rounds < 1:
            raise ParameterError(f"rounds {self.rounds} must be at least 1")

    def unknowns(self, dim: int) -> int:
        return 2 * (self.degree + 1) * dim

    def fit(self, runner: Runner, paths: Half) -> Array:
        profile = profiles(self.degree, runner.n_steps)
        found = np.zeros(self.unknowns(runner.dim))

        def fields() -> Array:
            shaped = found.reshape(len(profile), 2, runner.dim)
            return np.einsum("jn,jkd->nkd", profile, shaped)

        for _ in range(self.rounds):
            inner = EscortedWeights(
                annealing=self.annealing, fields=fields(), profile=profile
            )
            gradient, curvature = loss_gradient(self.loss, paths.run(runner, inner))
            ridge = RIDGE * np.trace(curvature) / len(found) * np.eye(len(found))
            step = np.linalg.solve(curvature + ridge, gradient)
            length = np.sqrt(gradient @ step)
            found = found - step / max(1.0, length / REACH)
        return fields()

    def run(self, runner: Runner) -> Array:
        return self.cross_fitted(runner)
