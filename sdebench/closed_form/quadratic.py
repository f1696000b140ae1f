"""Quadratic functions, the logarithms of exp-quadratic tilts.

    q(x) = constant + linear . x - 1/2 x^T K x

``K`` is symmetric, possibly indefinite, and kept in the cheapest of three forms: a
number (times the identity), a vector (a diagonal) or a matrix.  The same three forms
serve every matrix of the mixture algebra; the helpers at the end convert them.

The expanded square rounds terms of size K |x|^2, so values carry an absolute error of
about 1e-16 K |x|^2: measure a very sharp tilt (K |x|^2 above 1e4) as an observation,
by ``GaussianMixture.posterior``, which keeps its digits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdebench.errors import ParameterError

Array = NDArray[np.float64]

# Rounding in C = A B A^T is symmetric to a few units in the last place; anything
# larger is a mistake of the caller.
_SYMMETRY_TOLERANCE = 1e-12


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The function constant + linear . x - 1/2 x^T K x.

    Parameters
    ----------
    constant : the value at zero.
    linear : shape (d,), the gradient at zero.
    quadratic : K, **minus** the Hessian: a number (K = number times the identity),
        shape (d,) (a diagonal) or (d, d) (symmetric).

    Raises
    ------
    ParameterError
        A value that is not finite, a wrong shape or a matrix that is not symmetric.
    """

    constant: float
    linear: Array
    quadratic: Array = field(default_factory=lambda: np.zeros(()))

    # Without this numpy would swallow ``np.float64(2) * q`` as an object array.
    __array_ufunc__ = None

    def __post_init__(self) -> None:
        linear = frozen_array("linear", self.linear)
        if linear.ndim != 1 or linear.size == 0:
            raise ParameterError(f"linear has shape {linear.shape}; give (d,)")
        constant = float(self.constant)
        if not np.isfinite(constant):
            raise ParameterError(f"constant is {constant}; give a finite number")
        object.__setattr__(self, "constant", constant)
        object.__setattr__(self, "linear", linear)
        quadratic = operator("quadratic", self.quadratic, linear.size)
        if quadratic.ndim == 2:
            quadratic = symmetric("quadratic", quadratic)
        quadratic.setflags(write=False)
        object.__setattr__(self, "quadratic", quadratic)

    @classmethod
    def centered(
        cls, center: ArrayLike, quadratic: ArrayLike, constant: float = 0.0
    ) -> Quadratic:
        """Return constant - 1/2 (x - center)^T K (x - center)."""
        point = frozen_array("center", center)
        zero = cls(0.0, np.zeros_like(point), np.asarray(quadratic, dtype=float))
        linear = -zero.gradient(point)
        return cls(constant - 0.5 * float(point @ linear), linear, zero.quadratic)

    @classmethod
    def log_normal(cls, mean: ArrayLike, covariance: ArrayLike) -> Quadratic:
        """Return log N(x; mean, covariance); the covariance has any of the forms."""
        point = frozen_array("mean", mean)
        matrix = operator("covariance", covariance, point.size)
        if matrix.ndim == 2:
            matrix = symmetric("covariance", matrix)
            values, vectors = np.linalg.eigh(matrix)
        else:
            values = matrix * np.ones(point.size)
        if values.min() <= 0:
            raise ParameterError(
                f"covariance has the eigenvalue {values.min():.6g}; give a positive "
                "definite matrix"
            )
        precision: Array = (
            (vectors / values) @ vectors.T if matrix.ndim == 2 else 1 / matrix
        )
        log_scale = -0.5 * float(np.sum(np.log(2 * np.pi * values)))
        return cls.centered(point, precision, log_scale)

    @property
    def dim(self) -> int:
        """The number of variables d."""
        return self.linear.size

    @property
    def matrix(self) -> Array:
        """K as a full matrix, shape (d, d)."""
        return promote(self.quadratic[None], 2, self.dim)[0]

    def __call__(self, x: ArrayLike) -> Array:
        """Return q at points of shape (..., d) as an array of shape (...)."""
        points = np.asarray(x, dtype=float)
        curved = apply(self.quadratic, points)
        return self.constant + np.sum(points * (self.linear - 0.5 * curved), axis=-1)

    def gradient(self, x: ArrayLike) -> Array:
        """Return linear - K x at points of shape (..., d)."""
        return self.linear - apply(self.quadratic, np.asarray(x, dtype=float))

    def __add__(self, other: Quadratic) -> Quadratic:
        if not isinstance(other, Quadratic):
            return NotImplemented
        if other.dim != self.dim:
            raise ParameterError(
                f"quadratics of dimension {self.dim} and {other.dim} cannot be added"
            )
        rank = max(self.quadratic.ndim, other.quadratic.ndim)
        forms = (promote(q.quadratic[None], rank, q.dim)[0] for q in (self, other))
        return Quadratic(
            self.constant + other.constant, self.linear + other.linear, sum(forms)
        )

    def __mul__(self, factor: float) -> Quadratic:
        value = float(factor)
        return Quadratic(
            value * self.constant, value * self.linear, value * self.quadratic
        )

    __rmul__ = __mul__

    def __neg__(self) -> Quadratic:
        return -1.0 * self

    def __sub__(self, other: Quadratic) -> Quadratic:
        if not isinstance(other, Quadratic):
            return NotImplemented
        return self + (-other)


def frozen_array(name: str, value: ArrayLike) -> Array:
    """Return a read-only float64 copy, or raise if an entry is not finite."""
    array = np.array(value, dtype=np.float64)
    if not np.isfinite(array).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ParameterError(
            f"{name} has the entry {array[index]} at {index}; give finite numbers"
        )
    array.setflags(write=False)
    return array


def operator(name: str, value: ArrayLike, dim: int) -> Array:
    """Return a finite square operator on R^dim: a number, (dim,) or (dim, dim)."""
    array = np.array(frozen_array(name, value))
    if array.shape not in ((), (dim,), (dim, dim)):
        raise ParameterError(
            f"{name} has shape {array.shape}; give a number, ({dim},) or ({dim}, {dim})"
        )
    return array


def symmetric(name: str, matrices: Array) -> Array:
    """Return the symmetric part of matrices (..., d, d) that are so up to rounding."""
    transposed = np.swapaxes(matrices, -1, -2)
    scale = np.max(np.abs(matrices), axis=(-1, -2), initial=0.0)
    gap = np.max(np.abs(matrices - transposed), axis=(-1, -2), initial=0.0)
    if np.any(gap > _SYMMETRY_TOLERANCE * scale):
        raise ParameterError(
            f"{name} is not symmetric (largest difference {np.max(gap):.3g}); give a "
            "symmetric matrix"
        )
    return np.asarray(0.5 * (matrices + transposed))


def apply(matrix: Array, x: Array) -> Array:
    """Return M x for points (..., d) and M a number, (d,) or (p, d)."""
    return np.asarray(x @ matrix.T if matrix.ndim == 2 else matrix * x)


def promote(matrices: Array, rank: int, dim: int) -> Array:
    """Return K operators, (K,), (K, d) or (K, d, d), with ``rank`` trailing axes."""
    result = matrices
    if result.ndim == 1 and rank > 0:
        result = np.repeat(result[:, None], dim, axis=1)
    if result.ndim == 2 and rank > 1:
        result = result[:, :, None] * np.eye(dim)
    return result


def diagonals(matrices: Array, dim: int) -> Array:
    """Return the diagonals (K, d) of K operators in any form."""
    if matrices.ndim == 3:
        return np.asarray(np.diagonal(matrices, axis1=1, axis2=2))
    return promote(matrices, 1, dim)


def trace_product(K: Array, covariances: Array, dim: int) -> Array:
    """Return tr(K C_k), shape (n_components,)."""
    if K.ndim == 2 and covariances.ndim == 3:
        return np.einsum("ij,kij->k", K, covariances)
    return diagonals(covariances, dim) @ diagonals(K[None], dim)[0]


def trace_product_pair(K1: Array, K2: Array, covariances: Array, dim: int) -> Array:
    """Return tr(K1 C_k K2 C_k), shape (n_components,)."""
    if covariances.ndim == 3:
        first = promote(K1[None], 2, dim) @ covariances
        second = promote(K2[None], 2, dim) @ covariances
        return np.einsum("kij,kji->k", first, second)
    spread = diagonals(covariances, dim)
    if K1.ndim < 2 or K2.ndim < 2:
        weights = diagonals(K1[None], dim)[0] * diagonals(K2[None], dim)[0]
        return (spread * spread) @ weights
    return np.sum((spread @ (K1 * K2)) * spread, axis=1)


def multiply(covariances: Array, vectors: Array) -> Array:
    """Return C_k v_k for vectors (..., K, d)."""
    if covariances.ndim == 3:
        return np.asarray((covariances @ vectors[..., None])[..., 0])
    spread = covariances[:, None] if covariances.ndim == 1 else covariances
    return np.asarray(spread * vectors)
