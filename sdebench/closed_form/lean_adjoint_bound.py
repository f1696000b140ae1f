r"""How large the lean adjoint can be along any path of a memoryless base.

The lean adjoint of the terminal cost g solves da/dt = -(grad b)^T a, a_T = grad g(X_T)
with b = kappa x + 2 eta grad log p_t.  If the data are strongly log-concave,
m I <= -Hess log p_T (<= M I), the noised law keeps

    m_t I <= -Hess log p_t <= M_t I,      m_t = m / (alpha^2 + m beta^2),

(the lower bound by Brascamp and Lieb, the upper one by Cramer and Rao, on the
posterior of X_T given X_t), and Gronwall's lemma gives, path by path and whatever the
control,

    |a_t| <= f_t |grad g(X_T)|,   f_t = exp int_t^T (kappa - 2 eta m_s) ds
                                      = alpha_t / (alpha_t^2 + m beta_t^2),

with equality where p_T is Gaussian with covariance I / m.

**The chain** of Euler-Maruyama steps has a_n = J_n a_{n+1} with the symmetric
J_n = (1 + h kappa) I + 2 h eta Hess log p_t at (t_n, X_n), whose eigenvalues lie
between 1 + h (kappa - 2 eta M_t) and 1 + h (kappa - 2 eta m_t).  Hence, for every path
and every step length,

    |a_n| <= prod_{k >= n} max(|1 + h (kappa - 2 eta m_t)|, |1 + h (kappa - 2 eta M_t)|)
             |grad g(X_N)|,

again with equality for that Gaussian; the product tends to f_t at order one in h.

For a mixture of Gaussians of one covariance v I and means in a set of diameter D,
-Hess log p = I / v - Cov(means | x) / v^2, and a covariance is at most D^2 / 4 in any
direction (Popoviciu), so that m = 1/v - D^2 / (4 v^2) and M = 1/v.  With two equal
components that m is attained, halfway between them.

Source: the bound is a contribution of Domingo-Enrich, Du and Albergo 2026,
arXiv:2605.00229, by its abstract; derivation, peaks and the chain's bound are ours.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import pdist

from sdebench.closed_form.log_quadratics import Array
from sdebench.closed_form.schedule import (
    Cosine,
    LinearFlow,
    Schedule,
    VarianceExploding,
    VariancePreserving,
)
from sdebench.errors import NotExactError, ParameterError


def least_curvature(means: Array, variance: float) -> float:
    """Return a lower bound m of -Hess log p of a mixture of N(mean_k, variance I).

    means (K, d).  At or below zero the bound on the lean adjoint does not hold.
    """
    diameter = float(pdist(means).max()) if len(means) > 1 else 0.0
    return 1.0 / variance - 0.25 * (diameter / variance) ** 2


def noised_curvature(schedule: Schedule, curvature: float, t: Array | float) -> Array:
    """Return m_t from m, or M_t from M; infinity stands for no upper bound."""
    alpha, variance = schedule.alpha(t), schedule.variance(t)
    return 1.0 / (alpha**2 / curvature + variance)


def bound(schedule: Schedule, curvature: float, t: Array | float) -> Array:
    """Return f_t = alpha / (alpha^2 + m beta^2).

    Raises
    ------
    ParameterError
        If m is not positive.
    """
    _check(curvature)
    alpha, variance = schedule.alpha(t), schedule.variance(t)
    return alpha / (alpha**2 + curvature * variance)


def peak(schedule: Schedule, curvature: float) -> tuple[float, float]:
    """Return the time at which f_t is largest, and f there.

    Raises
    ------
    NotExactError
        For a schedule that is not one of the catalogue's.
    """
    _check(curvature)
    horizon = schedule.horizon
    if isinstance(schedule, LinearFlow):
        time = horizon * np.sqrt(curvature / (1.0 + curvature))
    elif isinstance(schedule, VariancePreserving | Cosine):
        # alpha^2 + beta^2 = 1: f rises with alpha up to alpha^2 = m / (1 - m).
        square = curvature / (1.0 - curvature) if curvature < 0.5 else 1.0
        if isinstance(schedule, Cosine):
            time = 2.0 * horizon / np.pi * np.arcsin(np.sqrt(square))
        else:
            time = max(horizon + np.log(square) / schedule.rate, 0.0)
    elif isinstance(schedule, VarianceExploding):
        time = horizon
    else:
        raise NotExactError(
            f"the peak of the bound is not known for {type(schedule).__name__}; it is "
            "for vp, linear_flow, cosine and ve"
        )
    return float(time), float(bound(schedule, curvature, time))


def chain_bound(schedule: Schedule, least: float, most: float, times: Array) -> Array:
    """Return a bound of |a_n| / |grad g(X_N)| on Euler-Maruyama chains, (N + 1,).

    ``least`` and ``most`` are m and M; M may be infinite.

    Raises
    ------
    ParameterError
        If m is not positive.
    """
    _check(least)
    t, h = times[:-1], np.diff(times)
    growth, pull = 1.0 + h * schedule.kappa(t), 2.0 * h * schedule.eta(t)
    norms = [
        np.abs(growth - pull * noised_curvature(schedule, c, t)) for c in (least, most)
    ]
    steps = np.append(np.maximum(*norms), 1.0)
    result: Array = np.cumprod(steps[::-1])[::-1]
    return result


def _check(curvature: float) -> None:
    if not curvature > 0.0:
        raise ParameterError(
            f"the least curvature {curvature:g} of -log p must be positive: the bound "
            "on the lean adjoint needs a strongly log-concave law of the data"
        )
