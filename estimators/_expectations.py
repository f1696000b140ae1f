"""Exact expectations of estimators on affine chains, for their targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdebench.estimator import Array

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain


def second_moments(means: Array, covariances: Array) -> Array:
    """Return E[x x^T] (..., d, d)."""
    return covariances + means[..., :, None] * means[..., None, :]


def apply(matrices: NDArray[np.floating], vectors: NDArray[np.floating]) -> Array:
    """Return the products of stacked matrices and vectors."""
    return np.asarray(np.einsum("...ij,...j->...i", matrices, vectors))


def step_products(policy: PolicyChain, cross: Array, mean: Array) -> Array:
    """Return every step's E[(dw_n(x))^T v] (N, P).

    Parameters
    ----------
    cross, mean : E[v x^T] (N, m, d) and E[v] (N, m) of each step.
    """
    products = np.einsum("pnmd,nmd->np", policy.gain_derivative, cross)
    products += np.einsum("pnm,nm->np", policy.bias_derivative, mean)
    return np.asarray(products)
