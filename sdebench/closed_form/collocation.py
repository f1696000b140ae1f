r"""A linear feedback in continuous time, evaluated by Gauss collocation.

With u(x, t) = K(t) x + k(t) and the state extended by a one, z = (x, 1), the closed
loop z' = B(t) z has the second moment matrix M = E z z^T and the cost-to-go
1/2 z^T S z + const.  On a short panel let Psi(t) be the transition matrix from its
left end.  Both Lyapunov equations become integrals,

    d/dt Psi^{-1} M Psi^{-T} = Psi^{-1} Sigma Psi^{-T},
    d/dt Psi^T S Psi = -Psi^T C Psi,        C = F + (K, k)^T (K, k),

so one linear solve per panel gives M and S at all of its Gauss nodes with the order
of the collocation, 16, and quadrature on the same nodes gives every integral.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import NDArray

from .quartic import stein_quadratic

Array = NDArray[np.float64]
MatrixFunction = Callable[[float], Array]

N_NODES = 16


class ClosedLoop(NamedTuple):
    """Constant coefficients of a class L problem, state extended by a one (D = d + 1).

    ``linear`` is (A, a), (d, D); ``noise`` is sigma, (d, m); ``running`` (D, D) and
    ``terminal`` (D, D) are the matrices of 1/2 z^T F z and of -r = 1/2 z^T Q z.
    ``quartic`` (d,) c adds 1/4 sum c_i x_i^4 to -r.
    """

    linear: Array
    noise: Array
    running: Array
    terminal: Array
    start: Array  # (D, D) E z_0 z_0^T
    quartic: Array


@lru_cache(maxsize=4)
def gauss_rule(count: int) -> tuple[Array, Array, Array]:
    """Return Gauss nodes c_i on [0, 1], weights, and a_ij = int_0^{c_i} l_j.

    The Lagrange polynomials l_j are expanded in Legendre polynomials, whose
    integrals are differences of neighbours; the matrix is exact to rounding.
    """
    nodes, weights = legendre.leggauss(count)
    values = legendre.legvander(nodes, count)
    before = np.column_stack((-np.ones(count), values[:, : count - 1]))
    # int_{-1}^x P_k = (P_{k+1}(x) - P_{k-1}(x)) / (2k + 1); P_{-1} stands for -1
    # so that the integral of P_0 = 1 is x + 1.
    integrals = 0.5 * (values[:, 1:] - before)
    matrix = integrals @ (values[:, :count] * weights[:, None]).T
    return 0.5 * (nodes + 1.0), 0.5 * weights, 0.5 * matrix


def transition(generators: Array, width: float) -> tuple[Array, Array]:
    """Return the transition matrices of z' = B z at the nodes and at the end.

    Parameters
    ----------
    generators : (s, D, D) B at the Gauss nodes of a panel.
    width : length of the panel.
    """
    count, dim, _ = generators.shape
    _, weights, matrix = gauss_rule(count)
    system = -width * np.einsum("ij,jab->iajb", matrix, generators)
    system = system.reshape(count * dim, count * dim)
    system[np.diag_indices_from(system)] += 1.0
    right = np.tile(np.eye(dim), (count, 1))
    inside = np.linalg.solve(system, right).reshape(count, dim, dim)
    end = np.eye(dim) + width * np.einsum("j,jab,jbc->ac", weights, generators, inside)
    return inside, end


class FeedbackEvaluation:
    """Second moments and adjoint regression functions of one feedback.

    Parameters
    ----------
    loop : the problem's coefficients.
    gain, bias : K(t) (m, d) and k(t) (m,).
    edges : increasing panel ends, first 0 and last T.
    cost_weight : factor of control and running cost; 0 leaves the reward alone.

    Attributes
    ----------
    times : (n, s) Gauss nodes of each panel.
    weights : (n, s) quadrature weights, summing to T.
    control : (n, s, m, D) the feedback (K, k) at the nodes.
    moments : (n, s, D, D) E z z^T at the nodes.
    final_moment : (D, D) E z_T z_T^T.
    terminal : (D, D) the loop's, with the quadratic that stands for a quartic cost.
    """

    def __init__(
        self,
        loop: ClosedLoop,
        gain: MatrixFunction,
        bias: MatrixFunction,
        edges: Array,
        cost_weight: float = 1.0,
    ) -> None:
        nodes, weights, self._matrix = gauss_rule(N_NODES)
        widths = np.diff(edges)
        self.loop, self.cost_weight = loop, cost_weight
        self.times = edges[:-1, None] + widths[:, None] * nodes
        self.weights = widths[:, None] * weights
        self._widths = widths
        self.control = self.at_nodes(
            lambda t: np.column_stack((np.asarray(gain(t)), np.asarray(bias(t))))
        )
        dim, size = loop.linear.shape
        generators = np.zeros((*self.times.shape, size, size))
        generators[..., :dim, :] = loop.linear + loop.noise @ self.control
        solved = [transition(b, w) for b, w in zip(generators, widths, strict=True)]
        self._inside = np.stack([inside for inside, _ in solved])
        self._end = np.stack([end for _, end in solved])
        self._inverse = np.linalg.inv(self._inside)
        self.moments, self.final_moment = self._propagate_moments()
        self.terminal = loop.terminal
        if np.any(loop.quartic):
            self.terminal = loop.terminal + self._quartic_terminal()

    def _quartic_terminal(self) -> Array:
        dim = len(self.loop.linear)
        mean = self.final_moment[:dim, dim]
        variance = np.diag(self.final_moment)[:dim] - mean**2
        Q, q, r = stein_quadratic(self.loop.quartic, mean, variance)
        return np.block(
            [[np.diag(Q), -q[:, None]], [-q[None], np.full((1, 1), -2 * r)]]
        )

    def at_nodes(self, function: MatrixFunction) -> Array:
        """Return ``function(t)`` at all nodes, with leading axes (n, s)."""
        values = [function(float(t)) for t in self.times.ravel()]
        stacked = np.asarray(values, dtype=np.float64)
        return stacked.reshape(*self.times.shape, *stacked.shape[1:])

    def _propagate_moments(self) -> tuple[Array, Array]:
        dim, size = self.loop.linear.shape
        covariance = np.zeros((size, size))
        covariance[:dim, :dim] = self.loop.noise @ self.loop.noise.T
        source = self._inverse @ covariance @ np.swapaxes(self._inverse, -1, -2)
        moments, moment = np.empty_like(self._inside), self.loop.start
        _, weights, matrix = gauss_rule(N_NODES)
        for i, width in enumerate(self._widths):
            inner = moment + width * np.einsum("ij,jab->iab", matrix, source[i])
            psi = self._inside[i]
            moments[i] = psi @ inner @ np.swapaxes(psi, -1, -2)
            total = moment + width * np.einsum("j,jab->ab", weights, source[i])
            moment = self._end[i] @ total @ self._end[i].T
        return moments, moment

    def objective(self) -> float:
        """Return J, the expected control and running cost minus the reward."""
        cost = self.loop.running + np.swapaxes(self.control, -1, -2) @ self.control
        running = np.einsum("ns,nsab,nsab->", self.weights, cost, self.moments)
        running *= self.cost_weight
        return 0.5 * float(running + np.sum(self.terminal * self.final_moment))

    def objective_scale(self) -> float:
        """Return the sum of the magnitudes of all terms of ``objective``."""
        control = np.abs(self.control)
        cost = np.abs(self.loop.running) + np.swapaxes(control, -1, -2) @ control
        moments = np.abs(self.moments)
        running = np.einsum("ns,nsab,nsab->", self.weights, cost, moments)
        terminal = np.sum(np.abs(self.terminal) * np.abs(self.final_moment))
        return 0.5 * float(running + terminal)

    def full_adjoint(self) -> Array:
        """Return (S, s) (n, s, d, D): the gradient S x + s of the cost-to-go.

        Sets ``start_adjoint`` (D, D), its first d rows (S, s) at the start.
        """
        cost = self.loop.running + np.swapaxes(self.control, -1, -2) @ self.control
        cost *= self.cost_weight
        dim = len(self.loop.linear)
        adjoint, self.start_adjoint = self._backward(
            self._inside, self._end, cost, self.terminal
        )
        return adjoint[..., :dim, :]

    def lean_adjoint(self) -> Array:
        """Return (S, s) (n, s, d, D) with E[lean adjoint | X_t = x] = S x + s.

        The lean adjoint is transported by the base drift alone, so the left factor
        of the integral is the transition matrix of A instead of the closed loop's.
        Sets ``start_adjoint`` (d, D), (S, s) at the start.
        """
        dim = len(self.loop.linear)
        drift = np.broadcast_to(self.loop.linear[:, :dim], (N_NODES, dim, dim))
        left = [transition(drift, width) for width in self._widths]
        inside = np.stack([a for a, _ in left])
        end = np.stack([b for _, b in left])
        running, terminal = self.loop.running[:dim], self.terminal[:dim]
        adjoint, self.start_adjoint = self._backward(inside, end, running, terminal)
        return adjoint

    def _backward(
        self, left: Array, left_end: Array, cost: Array, terminal: Array
    ) -> tuple[Array, Array]:
        """Return S at the nodes and the start: d/dt left^T S Psi = -left^T cost Psi."""
        source = np.swapaxes(left, -1, -2) @ cost @ self._inside
        left_inverse = np.swapaxes(np.linalg.inv(left), -1, -2)
        _, weights, matrix = gauss_rule(N_NODES)
        rest = weights - matrix
        adjoint, S = np.empty_like(source), terminal
        for i in reversed(range(len(self._widths))):
            width = self._widths[i]
            end = left_end[i].T @ S @ self._end[i]
            inner = end + width * np.einsum("ij,jab->iab", rest, source[i])
            adjoint[i] = left_inverse[i] @ inner @ self._inverse[i]
            S = end + width * np.einsum("j,jab->ab", weights, source[i])
        return adjoint, S

    def contract(self, adjoint: Array, derivative: Array) -> tuple[Array, Array]:
        """Return int E[(du_p)^T (u + sigma^T (S x + s))] dt and the terms' magnitude.

        Parameters
        ----------
        adjoint : (n, s, d, D) from ``full_adjoint`` or ``lean_adjoint``.
        derivative : (n, s, P, m, D) of the feedback in each parameter.
        """
        sigma, subscripts = self.loop.noise, "ns,nspua,nsub,nsba->p"
        residual = self.cost_weight * self.control + sigma.T @ adjoint
        value = np.einsum(
            subscripts, self.weights, derivative, residual, self.moments, optimize=True
        )
        size = np.abs(self.control) + np.abs(sigma.T) @ np.abs(adjoint)
        scale = np.einsum(
            subscripts,
            self.weights,
            np.abs(derivative),
            size,
            np.abs(self.moments),
            optimize=True,
        )
        return value, scale
