"""Regression of costates on polynomials of the state, in torch and in numba.

A slice is the sample (x, y) of states and labels (n, d) at one time.  The labels are
regressed on all monomials up to a degree of the standardized state
u = (x - mean) / scale, by least squares with a ridge that only keeps degenerate
samples solvable.  A monomial is a row of coordinates, one for each factor, where
coordinate d stands for the constant 1: its derivatives are sums over the factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdebench.errors import ParameterError
from sdebench.estimator import Sizes
from sdebench.simulate.jit import inner

if TYPE_CHECKING:
    from torch import Tensor

MOST = 5
"""Largest degree."""
PATHS_PER_FEATURE = 3
"""With fewer the fits of all steps together run away."""
RIDGE = 1e-12
"""Of the Gram matrix of standardized features."""
CONSTANT = 1e-12
"""A coordinate that varies less, relative to its mean, is a constant."""


def check_degree(degree: int) -> None:
    """Raise for a degree that is not allowed."""
    if isinstance(degree, bool) or degree not in range(1, MOST + 1):
        raise ParameterError(
            f"degree {degree!r} must be a whole number from 1 to {MOST}"
        )


def n_features(dim: int, degree: int) -> int:
    """Return the number of monomials."""
    return math.comb(dim + degree, degree)


def too_few_paths(degree: int, sizes: Sizes) -> str | None:
    """Return why a regression on the monomials is impossible, or None."""
    count = n_features(sizes.dim, degree)
    if sizes.n_paths >= PATHS_PER_FEATURE * count:
        return None
    return (
        f"the regression on {count} features (degree {degree}, dimension {sizes.dim}) "
        f"needs at least {PATHS_PER_FEATURE} paths per feature; n_paths = "
        f"{sizes.n_paths}"
    )


# ---- torch -------------------------------------------------------------------------
@dataclass
class Slice:
    """A fitted costate x -> phi(x) (n, d) of one time."""

    factors: Any  # (F, degree) numpy
    mean: Tensor  # (d,)
    scale: Tensor
    coefficients: Tensor  # (F, d)

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, degree: int) -> Slice:
        """Regress labels y (n, d) on the states x (n, d), in double precision."""
        import torch

        x, y = x.double(), y.double()
        scale = x.std(0, correction=0)
        mean = x.mean(0)
        scale = torch.where(scale > CONSTANT * mean.abs(), scale, 1.0)
        factors = factor_table.py_func(x.shape[1], degree)
        empty = torch.zeros(0, dtype=x.dtype, device=x.device)
        fitted = cls(factors, mean, scale, empty)
        features = fitted._parts(x).prod(2)
        gram = features.T @ features / len(x)
        gram.diagonal()[:-1].add_(RIDGE)  # the constant is the last feature
        fitted.coefficients = torch.linalg.solve(gram, features.T @ y / len(x))
        return fitted

    def _parts(self, x: Tensor) -> Tensor:
        """Return the factors' values (n, F, degree)."""
        u = (x.double() - self.mean) / self.scale
        return _pad(u, 1.0)[:, self.factors]

    def __call__(self, x: Tensor) -> Tensor:
        """Return phi(x), in the precision of x."""
        return (self._parts(x).prod(2) @ self.coefficients).to(x.dtype)

    def along(self, x: Tensor, v: Tensor) -> Tensor:
        """Return phi_x(x) v for directions v (n, d)."""
        parts = self._parts(x)
        slopes = _pad(v.double() / self.scale, 0.0)[:, self.factors]
        degree = parts.shape[2]
        total = parts.new_zeros(parts.shape[:2])
        for k in range(degree):
            total = total + slopes[:, :, k] * _without(parts, k)
        return (total @ self.coefficients).to(x.dtype)

    def trace(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Return tr(matrix phi_xx(x)) for a symmetric matrix (d, d)."""
        parts = self._parts(x)
        scaled = matrix.double() / (self.scale[:, None] * self.scale)
        padded = _pad(_pad(scaled, 0.0).T, 0.0)
        degree = parts.shape[2]
        total = parts.new_zeros(parts.shape[:2])
        for k in range(degree):
            for m in range(k + 1, degree):
                weight = 2.0 * padded[self.factors[:, k], self.factors[:, m]]
                total = total + weight * _without(parts, k, m)
        return (total @ self.coefficients).to(x.dtype)


def _pad(x: Tensor, value: float) -> Tensor:
    """Return x with one more column."""
    import torch

    return torch.cat([x, torch.full_like(x[:, :1], value)], dim=1)


def _without(parts: Tensor, *left_out: int) -> Tensor:
    """Return the product of all factors but these."""
    kept = [k for k in range(parts.shape[2]) if k not in left_out]
    return parts[:, :, kept].prod(2)


def gaussian_score(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return A, b of the score A x + b fitted to a sample (n, d).

    Implicit score matching, min E[1/2 |s|^2 + div s], on affine functions: that of
    the normal law with the sample's moments.
    """
    import torch

    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / len(x)
    covariance.diagonal().add_(RIDGE * covariance.trace() / x.shape[1])
    slope = -torch.linalg.inv(covariance)
    return slope, -slope @ mean


# ---- numba: one block is a whole replicate, columns are paths -----------------------
@inner
def factor_table(d, degree):  # type: ignore[no-untyped-def]
    """Return the factors (F, degree) of all monomials, the constant last."""
    count = 1
    for k in range(degree):
        count = count * (d + 1 + k) // (k + 1)
    table = np.zeros((count, degree), np.int64)
    for row in range(1, count):
        table[row] = table[row - 1]
        k = degree - 1
        while table[row, k] == d:
            k -= 1
        table[row, k:] = table[row, k] + 1
    return table


@inner
def standardize(X, count, mean, scale):  # type: ignore[no-untyped-def]
    """Set mean and scale (d,) of the first count columns of X."""
    for i in range(mean.shape[0]):
        total = 0.0
        for p in range(count):
            total += X[i, p]
        mean[i] = total / count
        square = 0.0
        for p in range(count):
            square += (X[i, p] - mean[i]) ** 2
        scale[i] = np.sqrt(square / count)
        if scale[i] <= CONSTANT * abs(mean[i]):
            scale[i] = 1.0


@inner
def fill_state(X, p, mean, scale, u):  # type: ignore[no-untyped-def]
    """Set u (d + 1,) to the standardized state of column p, and a last 1."""
    for i in range(mean.shape[0]):
        u[i] = (X[i, p] - mean[i]) / scale[i]
    u[mean.shape[0]] = 1.0


@inner
def fill_features(u, factors, row):  # type: ignore[no-untyped-def]
    """Set row (F,) to the monomials at u."""
    for f in range(factors.shape[0]):
        value = 1.0
        for k in range(factors.shape[1]):
            value *= u[factors[f, k]]
        row[f] = value


@inner
def fit_slice(X, Y, count, factors, mean, scale):  # type: ignore[no-untyped-def]
    """Standardize by X and return the coefficients (F, d) of the labels Y."""
    d, F = mean.shape[0], factors.shape[0]
    standardize(X, count, mean, scale)
    u, features = np.empty(d + 1), np.empty((count, F))
    labels = np.empty((count, d))
    for p in range(count):
        fill_state(X, p, mean, scale, u)
        fill_features(u, factors, features[p])
        for i in range(d):
            labels[p, i] = Y[i, p]
    gram = features.T @ features / count
    for f in range(F - 1):  # the constant is the last feature
        gram[f, f] += RIDGE
    return np.linalg.solve(gram, features.T @ labels / count)


@inner
def fill_slopes(u, v, factors, row):  # type: ignore[no-untyped-def]
    """Set row (F,) to the derivatives along v (d + 1,), standardized, last one 0."""
    degree = factors.shape[1]
    for f in range(factors.shape[0]):
        total = 0.0
        for k in range(degree):
            value = v[factors[f, k]]
            for m in range(degree):
                if m != k:
                    value *= u[factors[f, m]]
            total += value
        row[f] = total


@inner
def fill_traces(u, matrix, factors, row):  # type: ignore[no-untyped-def]
    """Set row (F,) to tr(matrix Hessian), matrix (d + 1, d + 1) standardized."""
    degree = factors.shape[1]
    for f in range(factors.shape[0]):
        total = 0.0
        for k in range(degree):
            for m in range(k + 1, degree):
                value = 2.0 * matrix[factors[f, k], factors[f, m]]
                for o in range(degree):
                    if o != k and o != m:
                        value *= u[factors[f, o]]
                total += value
        row[f] = total


@inner
def fill_values(X, count, factors, mean, scale, coefficients, OUT):  # type: ignore[no-untyped-def]
    """Set the first count columns of OUT (d, .) to phi of those of X."""
    d = mean.shape[0]
    u, row = np.empty(d + 1), np.empty(factors.shape[0])
    for p in range(count):
        fill_state(X, p, mean, scale, u)
        fill_features(u, factors, row)
        for i in range(d):
            total = 0.0
            for f in range(row.shape[0]):
                total += row[f] * coefficients[f, i]
            OUT[i, p] = total


@inner
def fit_gaussian_score(X, count, slope, offset):  # type: ignore[no-untyped-def]
    """Set slope (d, d) and offset (d,) to what `gaussian_score` returns."""
    d = offset.shape[0]
    mean, covariance = np.zeros(d), np.zeros((d, d))
    for i in range(d):
        for p in range(count):
            mean[i] += X[i, p]
        mean[i] /= count
    for i in range(d):
        for j in range(d):
            for p in range(count):
                covariance[i, j] += (X[i, p] - mean[i]) * (X[j, p] - mean[j])
            covariance[i, j] /= count
    ridge = RIDGE * np.trace(covariance) / d
    for i in range(d):
        covariance[i, i] += ridge
    slope[:] = -np.linalg.inv(covariance)
    offset[:] = -slope @ mean
