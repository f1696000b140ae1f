r"""Drifts that are gradients of the log of a sum of exponentials (class B).

    dX = grad log phi(X) dt + dW,   phi(x) = sum_k w_k exp(a_k . x),   |a_k| = a

is Brownian motion under Doob's transform with phi(x) exp(-a^2 t / 2), so that

    p(y, t | x, s) = exp(-a^2 (t - s) / 2) phi(y) / phi(x) N(y; x, (t - s) I).

Benes' drift tanh x has phi = cosh.  From a point, X_t is Brownian motion with one of
the drifts a_k drawn at random, and X_s given X_t is the Brownian bridge.  Tilts by
exp-quadratics are integrals of exp-quadratics: h phi is a mixture of K of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from sdebench.closed_form import log_quadratics as lq
from sdebench.closed_form.base_process import BaseProcess
from sdebench.closed_form.log_quadratics import Array
from sdebench.closed_form.tilting import TiltingFamily
from sdebench.errors import ParameterError


@dataclass(frozen=True)
class BenesBase(BaseProcess):
    """grad log phi and a Brownian motion from a point.

    point : (d,);  directions : (K, d) a_k of equal length;  log_weights : (K,).
    """

    point: Array
    directions: Array
    log_weights: Array
    horizon: float = 1.0

    gaussian = False
    start_time = 0.0

    def __post_init__(self) -> None:
        lengths = np.sum(self.directions**2, axis=1)
        if not self.horizon > 0:
            raise ParameterError(f"horizon {self.horizon!r} must be positive")
        if np.ptp(lengths) > 1e-12 * lengths.max():
            raise ParameterError(
                f"the squared lengths of the directions are {lengths}; they must be "
                "equal, or phi is no eigenfunction of the Laplacian"
            )

    @property
    def dim(self) -> int:  # type: ignore[override]
        return len(self.point)

    @property
    def rate(self) -> float:
        """a^2 / 2, the growth of phi under Brownian motion."""
        return 0.5 * float(self.directions[0] @ self.directions[0])

    @property
    def phi_rows(self) -> Array:
        """The rows of phi, (K, 2d + 1)."""
        flat = np.zeros_like(self.directions)
        return np.column_stack([self.directions, flat, self.log_weights])

    @property
    def terminal(self) -> Array:  # type: ignore[override]
        return self.marginal(self.horizon)

    def sigma(self, t: float) -> float:
        return 1.0

    def drift(self, x: Array, t: float) -> Array:
        return lq.gradient(self.phi_rows, x)

    def marginal(self, t: float) -> Array:
        """Return the rows of the density of X_t, given the point."""
        logs = self.log_weights + self.directions @ self.point
        return lq.gaussian_rows(
            logs - logsumexp(logs),
            self.point + t * self.directions,
            np.full(self.directions.shape, t),
        )

    def backward(self, s: float, t: float) -> tuple[float, Array, float]:
        ratio = s / t
        return ratio, (1.0 - ratio) * self.point, s * (t - s) / t

    def linear_drift(self, t: float) -> tuple[float, Array]:
        return 0.0, np.zeros(self.dim)

    def linear_growth(self, s: float, t: float) -> float:
        return 1.0


@dataclass(frozen=True, eq=False)
class BenesFamily(TiltingFamily):
    """The tilting family on a `BenesBase`; the start is the base's point."""

    base: BenesBase

    def _tilted(
        self, theta: Array, t: float
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        pairs = self.base.phi_rows[:, None, :] + self.reward_rows(theta)[None]
        left = self.base.horizon - t
        rows, law = lq.integrate_gaussian(
            pairs.reshape(-1, pairs.shape[-1]), 1.0, np.zeros(self.base.dim), left
        )
        rows[:, -1] -= self.base.rate * left
        return rows, law

    def tilt_rows(self, theta: Array, t: float) -> tuple[Array, Array, Array]:
        tilted, (gain, shift, variance) = self._tilted(theta, t)
        derivative = lq.expectation_rows(self.features, gain, shift, variance)
        return self.base.phi_rows, tilted, derivative

    def transition(
        self, x: Array, t: float, theta: Array | None
    ) -> tuple[Array, Array, Array, Array]:
        source = self.base.phi_rows if theta is None else self._tilted(theta, t)[0]
        rows, (gain, shift, spread) = lq.integrate_gaussian(
            source, 1.0, np.zeros(self.base.dim), t - self.base.start_time
        )
        return lq.weights(rows, x), gain * x[:, None, :] + shift, spread, gain
