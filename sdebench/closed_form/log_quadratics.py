"""Log-sum-exp of diagonal quadratics: the algebra of tables and tilts.

A positive function sum_k exp l_k(x) with
l_k(x) = sum_j lin_kj x_j + quad_kj x_j^2 + const_k is stored as rows
``[lin (d), quad (d), const]`` of shape (..., K, 2d + 1).  Products of such functions
add rows; Gaussian integrals map rows to rows.  float64 throughout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from sdebench.errors import ParameterError

Array = NDArray[np.float64]


def split(rows: Array) -> tuple[Array, Array, Array]:
    """Return lin (..., K, d), quad (..., K, d) and const (..., K)."""
    dim = (rows.shape[-1] - 1) // 2
    return rows[..., :dim], rows[..., dim : 2 * dim], rows[..., -1]


def join(lin: Array, quad: Array, const: Array) -> Array:
    """Return rows from their three parts."""
    return np.concatenate([lin, quad, np.asarray(const)[..., None]], axis=-1)


def gaussian_rows(log_weights: Array, means: Array, variances: Array) -> Array:
    """Return the rows of sum_k exp(log_weight_k) N(x; mean_k, diag(variance_k)).

    Shapes (..., K), (..., K, d), (..., K, d); variances > 0.
    """
    const = log_weights - 0.5 * np.sum(
        np.log(2.0 * np.pi * variances) + means**2 / variances, axis=-1
    )
    return join(means / variances, -0.5 / variances, const)


def gaussian_parameters(rows: Array) -> tuple[Array, Array, Array]:
    """Return log weights (masses), means and variances of rows with quad < 0.

    Raises
    ------
    ParameterError
        If a row is not integrable, naming the eigenvalue of its precision.
    """
    lin, quad, const = split(rows)
    precision = -2.0 * quad
    if np.any(precision <= 0):
        bad = float(precision.min())
        raise ParameterError(
            f"the tilted density is not integrable: its precision has the eigenvalue "
            f"{bad:.6g}, which must be positive; lower the quadratic part of the reward"
        )
    variances = 1.0 / precision
    means = lin * variances
    masses = const + 0.5 * np.sum(
        np.log(2.0 * np.pi * variances) + means * lin, axis=-1
    )
    return masses, means, variances


def terms(rows: Array, x: Array) -> Array:
    """Return l_k(x), shape (..., K), for rows (K, 2d + 1) and x (..., d)."""
    lin, quad, const = split(rows)
    return x @ lin.T + (x * x) @ quad.T + const


def log_value(rows: Array, x: Array) -> Array:
    """Return log sum_k exp l_k(x), shape (...), for x (..., d)."""
    result: Array = logsumexp(terms(rows, x), axis=-1)
    return result


def weights(rows: Array, x: Array) -> Array:
    """Return the softmax weights of the terms at x, shape (..., K)."""
    values = terms(rows, x)
    result: Array = np.exp(values - logsumexp(values, axis=-1, keepdims=True))
    return result


def gradient(rows: Array, x: Array) -> Array:
    """Return the gradient of `log_value`, shape (..., d)."""
    lin, quad, _ = split(rows)
    gamma = weights(rows, x)
    return gamma @ lin + 2.0 * (gamma @ quad) * x


def hessian(rows: Array, x: Array) -> Array:
    """Return the Hessian of `log_value`, shape (..., d, d)."""
    lin, quad, _ = split(rows)
    gamma = weights(rows, x)
    slopes = lin + 2.0 * quad * x[..., None, :]
    mean = np.einsum("...k,...ki->...i", gamma, slopes)
    centred = slopes - mean[..., None, :]
    outer = np.einsum("...k,...ki,...kj->...ij", gamma, centred, centred)
    return outer + (2.0 * (gamma @ quad))[..., None] * np.eye(x.shape[-1])


def integrate_gaussian(
    rows: Array, scale: Array | float, offset: Array, variance: Array | float
) -> tuple[Array, tuple[Array, Array, Array]]:
    """Return the rows in x of E[sum_k exp l_k(Y)], Y = N(scale x + offset, variance).

    Parameters
    ----------
    rows : (..., K, 2d + 1)
    scale, variance : broadcast to (..., K, d); variance >= 0.
    offset : broadcasts to (..., K, d).

    Returns
    -------
    rows of the integral, and the tilted conditional law of Y given x and k:
    Y ~ N(gain x + shift, tilted variance), each (..., K, d).

    Raises
    ------
    ParameterError
        If 1 - 2 quad variance <= 0: the integral is infinite.

    Notes
    -----
    log int N(y; m, v) e^{l y + q y^2} dy
    = -1/2 log(1 - 2 q v) + (l m + q m^2 + l^2 v / 2) / (1 - 2 q v).
    """
    lin, quad, const = split(rows)
    variance = np.broadcast_to(variance, lin.shape)
    offset = np.broadcast_to(offset, lin.shape)
    scale = np.broadcast_to(scale, lin.shape)
    excess = 1.0 - 2.0 * quad * variance
    if np.any(excess <= 0):
        bad = float((excess / np.where(variance > 0, variance, np.inf)).min())
        raise ParameterError(
            f"the tilt is not integrable: precision 1/variance - 2 quad has the "
            f"eigenvalue {bad:.6g}, which must be positive; lower the quadratic part "
            "of the reward"
        )
    gain = scale / excess
    shift = (offset + lin * variance) / excess
    integral = join(
        (lin + 2.0 * quad * offset) * gain,
        quad * scale * gain,
        const
        + np.sum(
            -0.5 * np.log(excess)
            + (lin * offset + quad * offset**2 + 0.5 * lin**2 * variance) / excess,
            axis=-1,
        ),
    )
    return integral, (gain, shift, variance / excess)


def expectation_rows(
    features: Array, gain: Array, shift: Array, variance: Array
) -> Array:
    """Return the rows in x of E[phi_p(Y)], Y ~ N(gain x + shift, variance).

    features (P, 2d + 1); gain, shift, variance (..., K, d); result
    (P, ..., K, 2d + 1): each is one quadratic, not an exponent.
    """
    lin, quad, const = split(features)
    extra = (slice(None), *([None] * (gain.ndim - 1)))
    lin, quad, const = lin[extra], quad[extra], const[extra]
    return join(
        lin * gain + 2.0 * quad * gain * shift,
        quad * gain**2,
        const + np.sum(lin * shift + quad * (shift**2 + variance), axis=-1),
    )


def feature_covariance(
    features: Array, gamma: Array, mean: Array, variance: Array
) -> tuple[Array, Array]:
    """Return mean (..., P) and covariance (..., P, P) of phi under a mixture.

    gamma (..., K) weights; mean (..., K, d) and variance (K, d) of the components.
    Uses Cov(y, y^2) = 2 m v and Cov(y^2, y^2) = 4 m^2 v + 2 v^2 per coordinate;
    within and between components are added, so nothing cancels.
    """
    lin, quad, const = split(features)
    slope = lin[:, None, :] + 2.0 * quad[:, None, :] * mean[..., None, :, :]
    per_component = const[:, None] + np.sum(
        lin[:, None, :] * mean[..., None, :, :]
        + quad[:, None, :] * (mean**2 + variance)[..., None, :, :],
        axis=-1,
    )  # (..., P, K)
    within = np.einsum("...k,...pkj,...qkj,kj->...pq", gamma, slope, slope, variance)
    within = within + np.einsum(
        "...k,pj,qj,kj->...pq", gamma, quad, quad, 2.0 * variance**2
    )
    average = np.einsum("...k,...pk->...p", gamma, per_component)
    centred = per_component - average[..., None]
    between = np.einsum("...k,...pk,...qk->...pq", gamma, centred, centred)
    return average, within + between
