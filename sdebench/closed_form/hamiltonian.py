r"""Propagators of a linear Hamiltonian system, composed without overflow.

For dX = (A X + a) dt + sigma dW with running cost 1/2 x^T F x the function

    S(x, l) = -log E[ exp(-int_s^t 1/2 X^T F X du - l^T X_t) | X_s = x ]

is quadratic.  With x_s, l_s the start and x_t, l_t the end of a solution of

    x' = A x + a - Sigma l,     l' = -F x - A^T l,     y' = a^T l

it reads S = 1/2 x^T P x + x^T E^T l - 1/2 l^T G l + e^T x + g^T l + c + v/2, where

    x_t = E x_s - G l_t + g,    l_s = P x_s + E^T l_t + e,    v = int tr(Sigma P) du.

Under the measure weighted by the running cost, X_t | X_s = x is N(E x + g, G).
E, G and P come from one matrix exponential of a short step; longer steps follow by
composition, in which only I + G P is inverted.  exp(H (t - s)) itself, whose entries
grow like exp(|A| (t - s)) in both directions, is never formed.  The composition is
the structure-preserving doubling of Chu, Fan, Lin & Wang (2004), here with the
affine, constant and noise terms.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from sdebench.errors import ParameterError

Array = NDArray[np.float64]


class EscapeError(ArithmeticError):
    """I + G P is not positive definite: the value is infinite inside the step."""

    def __init__(self, eigenvalue: float):
        super().__init__(eigenvalue)
        self.eigenvalue = eigenvalue


class Value(NamedTuple):
    """A quadratic function 1/2 x^T P x + p^T x + rho."""

    quadratic: Array  # (d, d)
    linear: Array  # (d,)
    constant: float


class Step(NamedTuple):
    """The coefficients of S over one interval; names as in the module docstring."""

    carry: Array  # (d, d) E
    spread: Array  # (d, d) G, symmetric, positive semi-definite
    factor: Array  # (d, d) L with L L^T = G
    quadratic: Array  # (d, d) P
    shift: Array  # (d,)   g
    linear: Array  # (d,)   e
    constant: float  # c
    trace: float  # v


def symmetric(matrix: Array) -> Array:
    """Return the symmetric part, over the last two axes."""
    return 0.5 * (matrix + np.swapaxes(matrix, -1, -2))


def psd_factor(matrix: Array) -> Array:
    """Return L (d, d) with L L^T = ``matrix``, which may be singular.

    Eigenvalues that rounding made negative count as zero.
    """
    values, vectors = np.linalg.eigh(matrix)
    root: Array = vectors * np.sqrt(np.maximum(values, 0.0))
    return root


def apply(step: Step, value: Value) -> Value:
    """Return the value at the start of ``step`` from the value at its end.

    Raises
    ------
    EscapeError
        When the value becomes infinite in between.  G grows with the length of the
        step, so a positive definite I + L^T P L at its start proves that there was
        no escape anywhere inside.
    """
    P, p, rho = value
    E, G, L = step.carry, step.spread, step.factor
    curvature = np.linalg.eigvalsh(symmetric(L.T @ P @ L))
    if curvature[0] <= -1.0:
        raise EscapeError(1.0 + float(curvature[0]))
    # (I + P G)^{-1} P is symmetric; solving keeps accuracy where P is large, which
    # the Woodbury form P - P L (I + L^T P L)^{-1} L^T P would cancel away.
    dim = len(p)
    solved = np.linalg.solve(
        np.eye(dim) + P @ G, np.column_stack((P, p + P @ step.shift))
    )
    costate = solved[:, dim]
    position = step.shift - G @ costate
    constant = 0.5 * (costate @ G @ costate + position @ P @ position) + p @ position
    return Value(
        symmetric(step.quadratic + E.T @ solved[:, :dim] @ E),
        step.linear + E.T @ costate,
        float(
            step.constant
            + rho
            + constant
            + 0.5 * (step.trace + np.sum(np.log1p(curvature)))
        ),
    )


def double(step: Step) -> Step:
    """Return the step of twice the length."""
    E, G = step.carry, step.spread
    value = apply(step, Value(step.quadratic, step.linear, 0.0))
    inverse = np.linalg.inv(np.eye(len(E)) + G @ step.quadratic)
    spread = symmetric(G + E @ inverse @ G @ E.T)
    middle = inverse @ (step.shift - G @ step.linear)
    L = step.factor
    curvature = np.linalg.eigvalsh(symmetric(L.T @ step.quadratic @ L))
    trace = 2.0 * step.trace + float(np.sum(np.log1p(curvature)))
    return Step(
        carry=E @ inverse @ E,
        spread=spread,
        factor=psd_factor(spread),
        quadratic=value.quadratic,
        shift=E @ middle + step.shift,
        linear=value.linear,
        # ``apply`` counts the constant of the first half and both halves' noise.
        constant=step.constant + value.constant - 0.5 * (trace - step.trace),
        trace=trace,
    )


def log_expectation(
    value: Value, mean: NDArray[np.floating], covariance: NDArray[np.floating]
) -> float:
    """Return log E exp(-V(X)) for X ~ N(mean, covariance), covariance may be singular.

    Raises
    ------
    ParameterError
        When the integral is infinite: I + L^T P L, L L^T = covariance, is not
        positive definite.
    """
    P, p, rho = value
    L = psd_factor(np.asarray(covariance, dtype=np.float64))
    values, vectors = np.linalg.eigh(symmetric(L.T @ P @ L))
    if values[0] <= -1.0:
        raise ParameterError(
            "the normalizer is infinite: the start law does not integrate exp(-V), "
            f"1 + (S_0 P) has the eigenvalue {1.0 + values[0]:.6g}; make the start "
            "covariance or the reward's curvature smaller"
        )
    slope = vectors.T @ (L.T @ (P @ mean + p))
    at_mean = 0.5 * mean @ P @ mean + p @ mean + rho
    gain = np.sum(slope**2 / (1.0 + values)) - np.sum(np.log1p(values))
    return float(0.5 * gain - at_mean)


class HamiltonianFlow:
    """Steps of any width for constant coefficients, with a small cache.

    Parameters
    ----------
    drift : (d, d) matrix A.
    offset : (d,) vector a.
    covariance : (d, d) matrix Sigma = sigma sigma^T.
    running : (d, d) symmetric matrix F.
    """

    _cache_size = 512

    def __init__(
        self, drift: Array, offset: Array, covariance: Array, running: Array
    ) -> None:
        dim = len(offset)
        H = np.zeros((2 * dim + 2, 2 * dim + 2))
        x, costate = slice(0, dim), slice(dim, 2 * dim)
        H[x, x] = drift
        H[x, costate] = -covariance
        H[x, -1] = offset
        H[costate, x] = -running
        H[costate, costate] = -drift.T
        H[-2, costate] = offset
        self.dim = dim
        self._generator = H
        self._norm = float(np.linalg.norm(H[: 2 * dim, : 2 * dim], 1))
        self._drift_trace = float(np.trace(drift))
        self._cache: dict[float, tuple[Step, int]] = {}

    def steps(self, width: float) -> tuple[Step, int]:
        """Return a step and how many of them make up ``width`` (a power of two).

        Steps are doubled while E stays of order one and I + G P well away from
        singular: beyond that a long step would lose the digits of the modes that
        decay, or hide an escape.
        """
        if width not in self._cache:
            if len(self._cache) >= self._cache_size:
                self._cache.clear()
            self._cache[width] = self._build(width)
        return self._cache[width]

    def _build(self, width: float) -> tuple[Step, int]:
        halvings = max(0, int(np.ceil(np.log2(max(2.0 * self._norm * width, 1.0)))))
        step, count = self._short(width / 2**halvings), 2**halvings
        while count > 1 and np.linalg.norm(step.carry, 2) <= 4.0:
            L = step.factor
            if np.linalg.eigvalsh(symmetric(L.T @ step.quadratic @ L))[0] < -0.5:
                break
            step, count = double(step), count // 2
        return step, count

    def _short(self, width: float) -> Step:
        dim = self.dim
        flow = scipy.linalg.expm(self._generator * width)
        x, costate = slice(0, dim), slice(dim, 2 * dim)
        back = np.linalg.inv(flow[costate, costate])
        spread = symmetric(-flow[x, costate] @ back)
        linear = -back @ flow[costate, -1]
        return Step(
            carry=back.T,
            spread=spread,
            factor=psd_factor(spread),
            quadratic=symmetric(-back @ flow[costate, x]),
            shift=flow[x, -1] + spread @ flow[costate, -1],
            linear=linear,
            constant=0.5 * float(flow[-2, costate] @ linear + flow[-2, -1]),
            # int tr(Sigma P) = width tr A + log det of the backward x-flow E^{-1}
            trace=width * self._drift_trace - float(np.linalg.slogdet(back)[1]),
        )
