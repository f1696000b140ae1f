"""A family of normal laws of X_0 around a reference law N(m_0, L_0 L_0^T).

    X_0 = m_0 + L_0 (mu + (I + T) xi),      xi ~ N(0, I), T lower triangular

The parameters are mu (d,) and T, row by row.  The relative entropy to the reference
law, 1/2 (|mu|^2 + |I + T|_F^2 - d) - sum_i log(1 + T_ii), does not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from sdebench.errors import ParameterError

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class InitialLawFamily:
    """The laws of the module docstring.

    Parameters
    ----------
    mean : (d,) m_0.
    factor : (d, d) L_0, invertible.
    """

    mean: Array
    factor: Array

    @property
    def dim(self) -> int:
        """Return d."""
        return len(self.mean)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the parameters."""
        rows, columns = np.tril_indices(self.dim)
        return (
            *(f"initial_mean_{i}" for i in range(self.dim)),
            *(
                f"initial_factor_{i}_{j}"
                for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
            ),
        )

    def split(self, parameters: Array) -> tuple[Array, Array]:
        """Return mu (d,) and I + T (d, d).

        Raises
        ------
        ParameterError
            If a diagonal entry of I + T is not positive.
        """
        matrix = np.eye(self.dim)
        matrix[np.tril_indices(self.dim)] += parameters[self.dim :]
        least = float(np.min(np.diag(matrix)))
        if not least > 0.0:
            raise ParameterError(
                f"theta makes a diagonal entry 1 + T_ii = {least:.6g} of the initial "
                "law's factor; give initial_factor_i_i above -1"
            )
        return parameters[: self.dim], matrix

    def moments(self, parameters: Array) -> tuple[Array, Array]:
        """Return the mean (d,) of X_0 and the factor (d, d) of its covariance."""
        shift, matrix = self.split(parameters)
        return self.mean + self.factor @ shift, self.factor @ matrix

    def derivatives(self) -> tuple[Array, Array]:
        """Return the derivatives (n, d) of the mean and (n, d, d) of the factor."""
        d, (rows, columns) = self.dim, np.tril_indices(self.dim)
        count = d + len(rows)
        mean, factor = np.zeros((count, d)), np.zeros((count, d, d))
        mean[:d] = self.factor.T
        for p, (i, j) in enumerate(zip(rows, columns, strict=True), start=d):
            factor[p, :, j] = self.factor[:, i]
        return mean, factor

    def cost(self, parameters: Array) -> float:
        """Return the relative entropy to the reference law."""
        shift, matrix = self.split(parameters)
        square = shift @ shift + np.sum(matrix**2) - self.dim
        return float(0.5 * square - np.sum(np.log(np.diag(matrix))))

    def cost_gradient(self, parameters: Array) -> Array:
        """Return the gradient (n,) of ``cost``."""
        shift, matrix = self.split(parameters)
        slope = matrix - np.diag(1.0 / np.diag(matrix))
        return np.concatenate([shift, slope[np.tril_indices(self.dim)]])

    def parameters_of(self, mean: Array, covariance: Array) -> Array:
        """Return the parameters (n,) of the law N(mean, covariance)."""
        white = np.linalg.solve(self.factor, covariance)
        white = np.linalg.solve(self.factor, white.T)
        matrix = np.linalg.cholesky(0.5 * (white + white.T)) - np.eye(self.dim)
        shift = np.linalg.solve(self.factor, mean - self.mean)
        return np.concatenate([shift, matrix[np.tril_indices(self.dim)]])


def relative_entropy(
    mean: Array, covariance: Array, other_mean: Array, other_covariance: Array
) -> float:
    """Return the relative entropy of a normal law to another one."""
    other = scipy.linalg.cholesky(other_covariance, lower=True)
    own = scipy.linalg.cholesky(covariance, lower=True)
    ratio = scipy.linalg.solve_triangular(other, own, lower=True)
    gap = scipy.linalg.solve_triangular(other, mean - other_mean, lower=True)
    square = np.sum(ratio**2) + gap @ gap - len(mean)
    return float(0.5 * square - np.sum(np.log(np.diag(ratio))))


def expected_score(
    mean: Array,
    factor: Array,
    derivatives: tuple[Array, Array],
    other_mean: Array,
    other_covariance: Array,
) -> Array:
    """Return E d log p(X)/dtheta, (P,), of p = N(m, L L^T) with X of another law.

    Parameters
    ----------
    mean, factor : (d,) m and (d, d) L.
    derivatives : (P, d) of m and (P, d, d) of L.
    other_mean, other_covariance : (d,) and (d, d) of X.
    """
    # With z = L^-1 (x - m) the score is z . L^-1 (dm + dL z) - tr(L^-1 dL).
    inverse = np.linalg.inv(factor)
    shift = inverse @ (other_mean - mean)
    second = inverse @ other_covariance @ inverse.T + np.outer(shift, shift)
    moved, turned = derivatives[0] @ inverse.T, inverse @ derivatives[1]
    result: Array = moved @ shift + np.einsum("pij,ij->p", turned, second)
    return result - np.trace(turned, axis1=1, axis2=2)
