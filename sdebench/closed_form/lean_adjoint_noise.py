r"""Noise of the lean adjoint on a scalar chain with a mixture as base.

On such a base the lean adjoint depends on the whole path,

    a_N = -r'(X_N),   a_n = mu_n'(X_n) a_{n+1},   X_{n+1} = mu_n(X_n) + g_n (w_n + z_n),

but its first two conditional moments given X_n do not: they follow the recursions of
the chain under the optimal control w = w*, E[a_n | x] = mu_n'(x) E[E[a_{n+1}] | x] and
E[a_n^2 | x] = mu_n'(x)^2 E[E[a_{n+1}^2] | x].  Hence, exactly on the chain,

    E sum_n 1/2 (w_n + g_n a_{n+1})^2,

the noise of the regression int eta E Var(tau | X_t) dt of adjoint matching at the
optimum.  The integrals over a step's noise are trapezoidal sums, whose error falls
exponentially in the points per standard deviation.
"""

from __future__ import annotations

import numpy as np

from sdebench.closed_form import log_quadratics as lq
from sdebench.closed_form.log_quadratics import Array
from sdebench.closed_form.regression_targets import Bounded
from sdebench.errors import NotExactError
from sdebench.simulate.tables import MixtureTables

_SPACINGS = (1.5, 2.0)
"""Points per standard deviation of the least noisy step: a rule and a finer one.

And four times as many per standard deviation of the narrowest mode.
"""
_REACH = 8.0


def lean_adjoint_noise(tables: MixtureTables) -> Bounded:
    """Return the noise of the lean adjoint under the control of the tables.

    The error bound is the change from a coarser and shorter grid.

    Raises
    ------
    NotExactError
        In more than one dimension, or for a fixed start.
    """
    if tables.offset.shape[1] > 1 or np.any(tables.start_scale <= 0.0):
        raise NotExactError(
            "the noise of the lean adjoint on a mixture base is exact for scalar "
            "problems with a random start"
        )
    coarse, fine = (_noise(tables, spacing) for spacing in _SPACINGS)
    return Bounded(fine, abs(fine - coarse))


def _noise(tables: MixtureTables, spacing: float) -> float:
    x = _grid(tables, spacing)
    states = x[:, None]
    first = -lq.gradient(tables.reward, states)[:, 0]
    second, total = first**2, np.zeros_like(x)
    for n in reversed(range(len(tables.offset))):
        g = tables.noise[n]
        score, slope = np.zeros_like(x), tables.scale[n, 0]
        if tables.base.shape[1]:
            score = lq.gradient(tables.base[n], states)[:, 0]
            curvature = lq.hessian(tables.base[n], states)[:, 0, 0]
            slope = slope + tables.base_gain[n] * curvature
        w = tables.control_gain[n] * (lq.gradient(tables.tilted[n], states)[:, 0])
        w -= tables.control_gain[n] * score
        mean = tables.scale[n, 0] * x + tables.offset[n, 0]
        mean = mean + tables.base_gain[n] * score + g * w
        step = np.exp(-0.5 * ((x - mean[:, None]) / g) ** 2)
        step /= step.sum(axis=1, keepdims=True)
        first, second, total = step @ first, step @ second, step @ total
        total += 0.5 * (w**2 + 2.0 * g * w * first + g**2 * second)
        first, second = slope * first, slope**2 * second
    weights = np.diff(tables.start_cumulative, prepend=0.0)
    away = (states - tables.start_mean[:, 0]) / tables.start_scale[:, 0]
    density = np.exp(-0.5 * away**2) @ (weights / tables.start_scale[:, 0])
    return float(density @ total / density.sum())


def _grid(tables: MixtureTables, spacing: float) -> Array:
    """Return points that hold the law of every step."""
    _, means, variances = lq.gaussian_parameters(tables.density[-1])
    means = np.append(means, tables.start_mean)
    scales = np.append(np.sqrt(variances), tables.start_scale)
    reach = (_REACH + spacing) * scales
    step = float(min(tables.noise.min(), 0.25 * scales.min())) / spacing
    return np.arange(np.min(means - reach), np.max(means + reach), step)
