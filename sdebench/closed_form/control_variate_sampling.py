r"""Importance sampling of several expectations at once with control variates.

For I_j = E_f phi_j, j = 1, ..., J, draw all from one density g and use that f/g has
the known mean one:

    I_j_hat = mean[(phi_j(X) - beta_j) f(X)/g(X)] + beta_j,      X ~ g,

without bias for every fixed (g, beta).  With weights w_j the variance of one draw is

    S(g, beta) = sum_j w_j Var_j
               = E_f[(f/g) sum_j w_j (phi_j - beta_j)^2] - sum_j w_j (I_j - beta_j)^2.

Best g for given beta, by Cauchy and Schwarz: g ~ f q with
q^2 = sum_j w_j (phi_j - beta_j)^2, where S = (E_f q)^2 - sum_j w_j (I_j - beta_j)^2.
Best beta for given g, a quadratic:

    beta_j = (E_f[phi_j f/g] - I_j) / (E_f[f/g] - 1).

Neither step can raise S, so that they may be alternated.  For J = 1 and phi >= beta
(or <= beta) everywhere the best g leaves no variance at all.

The law f is given by points and probabilities: a quadrature rule, or a sample from f.

Source: 2212.00568 (adaptive importance sampling with control variates for multiple
expectations), by its abstract; the formulae are derived here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sdebench.closed_form.log_quadratics import Array
from sdebench.errors import ParameterError


class Optimum(NamedTuple):
    """Ratio g/f at the points (n,), beta (J,), S and the number of iterations."""

    ratio: Array
    beta: Array
    variance: float
    iterations: int


def _expectations(phi: Array, probabilities: Array) -> Array:
    if np.any(probabilities < 0.0) or abs(float(probabilities.sum()) - 1.0) > 1e-9:
        raise ParameterError(
            f"the probabilities sum to {float(probabilities.sum()):.9g}; they must be "
            "at least 0 and sum to 1"
        )
    return phi @ probabilities


def variance(
    phi: Array, probabilities: Array, weights: Array, ratio: Array, beta: Array
) -> float:
    """Return S: the weighted variance of one draw.

    Parameters
    ----------
    phi : (J, n) the functions at the points.
    probabilities : (n,) of the points under f.
    weights : (J,) of the expectations.
    ratio : (n,) g/f at the points, of mean one; it may vanish only where all phi_j
        are beta_j.
    beta : (J,) coefficients of the control variate.
    """
    means = _expectations(phi, probabilities)
    squares = weights @ (phi - beta[:, None]) ** 2
    reached = squares > 0.0
    second = np.sum((probabilities * squares)[reached] / ratio[reached])
    return float(second - weights @ (means - beta) ** 2)


def best_ratio(phi: Array, probabilities: Array, weights: Array, beta: Array) -> Array:
    """Return g/f (n,) of the best proposal for given coefficients.

    Raises
    ------
    ParameterError
        If all functions are constants equal to their coefficients.
    """
    root = np.sqrt(weights @ (phi - beta[:, None]) ** 2)
    level = float(root @ probabilities)
    if not level > 0.0:
        raise ParameterError(
            "every function equals its coefficient everywhere: there is no best "
            "proposal, and nothing to estimate"
        )
    return root / level


def best_beta(phi: Array, probabilities: Array, ratio: Array) -> Array:
    """Return the best coefficients (J,) for a given proposal.

    Raises
    ------
    ParameterError
        If g = f: the control variate f/g is a constant and has no coefficient.
    """
    means = _expectations(phi, probabilities)
    inverse = probabilities / ratio
    spread = float(inverse.sum()) - 1.0
    if not spread > 1e-12:
        raise ParameterError(
            "the proposal is the law itself: its density ratio is a constant, and no "
            "control variate"
        )
    return np.asarray((phi @ inverse - means) / spread)


def alternate(
    phi: Array,
    probabilities: Array,
    weights: Array,
    beta: Array | None = None,
    *,
    tolerance: float = 1e-12,
    most: int = 10_000,
) -> Optimum:
    """Alternate the two best answers from ``beta`` (default: 0) until S settles."""
    beta = np.zeros(len(phi)) if beta is None else np.asarray(beta, float)
    last, iteration = np.inf, 0
    while iteration < most:
        iteration += 1
        ratio = best_ratio(phi, probabilities, weights, beta)
        beta = best_beta(phi, probabilities, ratio)
        found = variance(phi, probabilities, weights, ratio, beta)
        if last - found <= tolerance * abs(found):
            break
        last = found
    return Optimum(ratio, beta, found, iteration)
