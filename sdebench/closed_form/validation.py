"""Checks of matrices that a user or a problem passes in."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdebench.errors import ParameterError

Array = NDArray[np.float64]


def check_array(
    name: str, value: ArrayLike, shape: tuple[int, ...], *, symmetric: bool = False
) -> Array:
    """Return ``value`` as a read-only float64 copy of ``shape``.

    Raises
    ------
    ParameterError
        On another shape, a value that is not finite, or asymmetry where
        ``symmetric`` asks for a symmetric matrix over the last two axes.
    """
    array = np.array(value, dtype=np.float64)
    if array.shape != shape:
        raise ParameterError(f"{name} has shape {array.shape}; it must have {shape}")
    if not np.all(np.isfinite(array)):
        raise ParameterError(f"{name} must be finite")
    if symmetric:
        gap = np.max(np.abs(array - np.swapaxes(array, -1, -2)), initial=0.0)
        if gap > 1e-12 * np.max(np.abs(array), initial=1.0):
            raise ParameterError(f"{name} must be symmetric; it differs by {gap:.3g}")
        array = 0.5 * (array + np.swapaxes(array, -1, -2))
    array.flags.writeable = False
    return array


def check_covariance(name: str, value: ArrayLike, dim: int) -> Array:
    """Return a covariance (dim, dim); it may be singular, zero means a point."""
    array = check_array(name, value, (dim, dim), symmetric=True)
    lowest = float(np.linalg.eigvalsh(array)[0])
    if lowest < -1e-12 * max(1.0, float(np.max(np.abs(array)))):
        raise ParameterError(
            f"{name} must be positive semi-definite; it has the eigenvalue {lowest:.6g}"
        )
    return array
