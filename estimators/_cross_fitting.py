"""Control variates whose coefficients come from the other half of the paths."""

from __future__ import annotations

import numpy as np

from sdebench.estimator import Array

COLLINEAR = 1e-4
"""Relative singular values below this are rounding, in float32 too."""


def cross_fitted(rows: Array, covariates: Array) -> Array:
    """Return rows (C, n) minus their regression on mean-zero covariates (K, n).

    Even columns use the coefficients of the odd ones and the other way round.
    """
    left = np.empty_like(rows)
    size = np.linalg.norm(covariates, axis=1, keepdims=True)
    covariates = covariates / np.where(size > 0.0, size, 1.0)
    design = np.vstack([np.full(rows.shape[1], rows.shape[1] ** -0.5), covariates]).T
    halves = slice(0, None, 2), slice(1, None, 2)
    for own, other in (halves, halves[::-1]):
        fitted = np.linalg.lstsq(design[other], rows[:, other].T, rcond=COLLINEAR)[0]
        left[:, own] = rows[:, own] - fitted[1:].T @ covariates[:, own]
    return left
