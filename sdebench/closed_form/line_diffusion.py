r"""Certified answers for a diffusion on the line in a polynomial potential.

    dX = b(X) dt + u_theta(X) dt + dW,   X_0 = 0,   u_theta = sum_p theta_p phi_p,

with polynomials b and phi_p, and a polynomial terminal cost g.  With b + u = -Psi' and
Psi growing on both sides, the generator L = 1/2 d^2 - Psi' d is symmetric in
L^2(exp(-2 Psi)): for v = exp(-Psi) f

    exp(t L) f = exp(Psi) exp(-t H) v,   H = -1/2 d^2 + 1/2 (Psi'^2 - Psi''),

a Schroedinger operator, whose matrix in the basis of sinc functions at equidistant
points converges faster than any power of their spacing (Colbert and Miller 1992).  One
diagonalization of it gives every expectation in closed form in time:

    E g(X_T) = a exp(-Lambda T) g^,     E int q(X_t) dt = a (1 - exp(-Lambda T)) q^ /
    Lambda

where a is the row of the start.  With the cost-to-go C = E[g(X_T) + 1/2 int u^2 | X_t]
and the mean of the lean adjoint m, d_t m + L m + b' m = 0, m(T) = g',

    dJ/dtheta_p = E int phi_p (u + C') dt,
    matching gradient = E int phi_p (u + m) dt.

Every answer is repeated with fewer points in a shorter interval; the change is the
bound of its error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.polynomial import polynomial
from numpy.typing import NDArray

from sdebench.closed_form.grid_chain import PolicyAnswers
from sdebench.errors import NumericalError, ParameterError

Array = NDArray[np.float64]

HEIGHT = 38.0
"""Potential above its minimum at the ends of the interval: exp(-38) is 3e-17."""
LEVELS = FINE, COARSE = (1.0, 1.0), (0.87, 0.95)
"""Density of the points and length of the interval, of the answer and its check."""
DENSITY = 1.5
"""Points per half wave of the fastest motion, sqrt(2 E) with E the potential of H."""


def evaluate(coefficients: NDArray[Any], x: Array) -> Array:
    """Return the polynomial with these coefficients, lowest first, at x."""
    return np.asarray(polynomial.polyval(x, coefficients))


def exponential_integral(rate: Array, other: Array, time: float) -> Array:
    """Return int_0^T exp(-rate t - other (T - t)) dt."""
    gap = np.abs(rate - other)
    small = gap * time < 1e-12
    safe = np.where(small, 1.0, gap)
    ratio = np.where(small, time, -np.expm1(-safe * time) / safe)
    return np.asarray(np.exp(-np.minimum(rate, other) * time) * ratio)


class Motion:
    """The semigroup of one potential, on one grid.

    Parameters
    ----------
    drift : coefficients of b + u.
    resolution : density of the points and length of the interval, FINE or COARSE.

    Attributes
    ----------
    x : (n,) the points, the middle one at 0.
    weight : (n,) exp(Psi(0) - Psi).
    hamiltonian : (n, n) H.
    differentiate : (n, n) d/dx of a sum of sinc functions.
    """

    def __init__(self, drift: Array, resolution: tuple[float, float]) -> None:
        self.slope = -np.asarray(drift, float)  # Psi'
        potential = polynomial.polyint(self.slope)
        self.potential = potential
        ends = self._half_width(potential) * resolution[1]
        curved = polynomial.polyder(self.slope)
        fast = np.max(np.abs(evaluate(self.slope, np.linspace(-ends, ends, 201))))
        points = DENSITY * resolution[0] * fast * ends / np.pi
        half = max(int(np.ceil(points)), 40)
        self.x = np.linspace(-ends, ends, 2 * half + 1)
        self.spacing = float(self.x[1] - self.x[0])
        self.weight = np.exp(-evaluate(potential, self.x))
        self.force = evaluate(self.slope, self.x)  # Psi' at the points
        energy = 0.5 * (self.force**2 - evaluate(curved, self.x))
        n = np.arange(len(self.x))
        gap = n[:, None] - n
        sign = np.where(gap % 2 == 0, 1.0, -1.0)
        apart = np.where(gap == 0, 1, gap)
        kinetic = np.where(gap == 0, np.pi**2 / 3.0, 2.0 * sign / apart**2)
        self.hamiltonian = 0.5 * kinetic / self.spacing**2 + np.diag(energy)
        derivative = np.where(gap == 0, 0.0, sign / apart) / self.spacing
        self.differentiate = derivative
        self.middle = half

    @staticmethod
    def _half_width(potential: Array) -> float:
        """Return where the potential is HEIGHT above its minimum on both sides."""
        x = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 4000)])
        ends = []
        for side in (x, -x):
            values = evaluate(potential, side)
            lowest = np.minimum.accumulate(values)
            above = np.flatnonzero(values - lowest[-1] < HEIGHT)
            if lowest[-1] == values[-1] or values[-1] < HEIGHT:
                raise NumericalError(
                    "the control pushes the process out of every potential well, to "
                    "infinity; choose a theta closer to zero or to the optimum"
                )
            ends.append(side[min(above[-1] + 1, len(side) - 1)])
        return float(max(np.abs(ends)))

    @cached_property
    def modes(self) -> tuple[Array, Array]:
        """Eigenvalues (n,) and eigenvectors (n, n) of H."""
        rates, vectors = np.linalg.eigh(self.hamiltonian)
        return rates, vectors

    def derivative(self, f: Array) -> Array:
        """Return exp(-Psi) f' for v = exp(-Psi) f (n, m)."""
        return self.differentiate @ f + self.force[:, None] * f


@dataclass(frozen=True)
class LineDiffusion:
    """The process and its costs; coefficients lowest first.

    force : (J,) b;  features : (P, J) phi;  cost : (J,) g;  horizon : T.
    """

    force: Array
    features: Array
    cost: Array
    horizon: float

    def drift(self, theta: Array | None) -> Array:
        """Return the coefficients of b + u."""
        if theta is None:
            return self.force
        return np.asarray(polynomial.polyadd(self.force, theta @ self.features))

    def policy(self, theta: Array, resolution: tuple[float, float]) -> PolicyAnswers:
        """Return the answers for a control on one grid."""
        motion = Motion(self.drift(theta), resolution)
        rates, vectors = motion.modes
        x, weight, horizon = motion.x, motion.weight, self.horizon
        control = evaluate(theta @ self.features, x)
        features = evaluate(self.features.T, x)  # (P, n)
        start = vectors[motion.middle]
        cost = vectors.T @ (weight * evaluate(self.cost, x))
        energy = vectors.T @ (weight * 0.5 * control**2)
        decay = np.exp(-rates * horizon)
        passed = exponential_integral(rates, np.zeros_like(rates), horizon)
        final = float(start @ (decay * cost))
        objective = final + float(start @ (passed * energy))
        # int exp(-rate_j t) C_k(t) dt for the two parts of C
        both = exponential_integral(rates[:, None], rates, horizon)
        spent = self._spent(rates, passed, both)
        slopes = motion.derivative(vectors)
        reward_only, gradient, matching = [], [], []
        base = np.diag(evaluate(polynomial.polyder(self.force), x))
        lean_rates, lean = np.linalg.eigh(motion.hamiltonian - base)
        across = exponential_integral(rates[:, None], lean_rates, horizon)
        adjoint = lean.T @ (weight * evaluate(polynomial.polyder(self.cost), x))
        for feature in features:
            pull = vectors.T @ (feature[:, None] * slopes) * start[:, None]
            own = vectors.T @ (weight * feature * control)
            direct = float(start @ (passed * own))
            reward = float(np.sum(pull * both, axis=0) @ cost)
            rest = float(np.sum(pull * spent, axis=0) @ energy)
            push = vectors.T @ (feature[:, None] * lean) * start[:, None]
            reward_only.append(reward)
            gradient.append(direct + reward + rest)
            matching.append(direct + float(np.sum(push * across, axis=0) @ adjoint))
        return PolicyAnswers(
            objective=objective,
            reward_only_objective=final,
            gradient=np.array(gradient),
            reward_only_gradient=np.array(reward_only),
            matching_gradient=np.array(matching),
        )

    def _spent(self, rates: Array, passed: Array, both: Array) -> Array:
        """Return int_0^T exp(-rate_j t) (1 - exp(-rate_k (T - t))) / rate_k dt."""
        # the constant mode, of rate zero, has no slope to multiply this
        slow = np.abs(rates) * self.horizon < 1e-8
        safe = np.where(slow, 1.0, rates)
        return np.where(slow, 0.0, (passed[:, None] - both) / safe)

    def log_h(self, resolution: tuple[float, float]) -> float:
        """Return log E exp(-g(X_T)) under the base process."""
        return -float(Value(self, resolution)(np.zeros(1), 0.0)[0][0])


class Value:
    """V(x, t) = -log E[exp(-g(X_T)) | X_t = x] and its slope."""

    def __init__(self, process: LineDiffusion, resolution: tuple[float, float]) -> None:
        self._process = process
        self._motion = Motion(process.force, resolution)
        rates, vectors = self._motion.modes
        level = self._motion.weight * np.exp(-evaluate(process.cost, self._motion.x))
        self._rates, self._vectors = rates, vectors
        self._level = vectors.T @ level

    def __call__(self, x: Array, t: float) -> tuple[Array, Array]:
        """Return V and dV/dx at x (n,)."""
        process, motion = self._process, self._motion
        left = process.horizon - t
        if left == 0.0:
            slope = evaluate(polynomial.polyder(process.cost), x)
            return evaluate(process.cost, x), slope
        level = self._vectors @ (np.exp(-self._rates * left) * self._level)
        # the derivative of a sum of sinc functions is one as well
        both = np.stack([level, motion.differentiate @ level], axis=1)
        value, slope = sinc_sums((x - motion.x[0]) / motion.spacing, both).T
        potential = evaluate(motion.potential, x)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = -potential - np.log(value)
        return found, -evaluate(motion.slope, x) - slope / value


def sinc_sums(s: Array, values: Array) -> Array:
    """Return sum_j values_j sin(pi (s - j)) / (pi (s - j)) at s (m,), (m, k).

    With one sine for each s: sin(pi (s - j)) is (-1)^j sin(pi s).
    """
    nearest = np.rint(s)
    rest = s - nearest
    rest = np.where(np.abs(rest) < 1e-30, 1e-30, rest)
    index = np.arange(len(values))
    signed = np.where(index % 2 == 0, 1.0, -1.0)[:, None] * values
    sine = np.where(nearest % 2 == 0, 1.0, -1.0) * np.sin(np.pi * rest) / np.pi
    gaps = (nearest[:, None] - index) + rest[:, None]
    return np.asarray(sine[:, None] * ((1.0 / gaps) @ signed))


def check_range(x: Array, limit: float) -> None:
    """Raise `ParameterError` for states where the reference is not accurate."""
    largest = float(np.max(np.abs(x), initial=0.0))
    if largest > limit:
        raise ParameterError(
            f"a coordinate of x is {largest:.3g} in absolute value, outside the "
            f"reference solution; give at most {limit:.3g}"
        )
