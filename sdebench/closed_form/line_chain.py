r"""Certified answers for one coordinate of a nonlinear chain, from X_0 = 0.

    X_{n+1} = mean_n(X_n) + g_n (w_n(X_n) + z_n),   z_n ~ N(0, 1)

with any functions of x, as one coordinate of `simulate.tables.SeparableTables` holds
them.  Answers come from backward recursions F_n(x) = c_n(x) + E F_{n+1}(X_{n+1}) at
equidistant points: the expectation is a trapezoidal sum over the same points, whose
error is exp(-2 pi^2 / density^-2) where F is smooth (Trefethen and Weideman 2014), with
``density`` points per standard deviation of the noise.  Derivatives in the control use
d/dw E F(m + g (w + z)) = E z F, so that gradients are exact derivatives of the sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from sdebench.closed_form.grid_chain import PolicyAnswers
from sdebench.errors import NumericalError
from sdebench.simulate.tables import SeparableTables, noise_mask

Array = NDArray[np.float64]

FAR = 8.5
"""Standard deviations of the noise in a sum; exp(-8.5^2 / 2) is 2e-16."""
NEWTON_STEPS = 40
NEWTON_TOLERANCE = 1e-11


class Resolution(NamedTuple):
    """Points per standard deviation of the noise, and those beyond the reach."""

    density: float
    margin: float


LEVELS = FINE, COARSE = Resolution(2.2, 8.0), Resolution(1.8, 7.0)


class Step(NamedTuple):
    """One step at all points; ``mean`` is of the base."""

    mean: Array
    noise: float
    spread: float
    control: Array
    features: Array


def polynomials(rows: Array, x: Array, reach: float) -> tuple[Array, Array]:
    """Return polynomials (..., J) of the clipped x, and their slopes, (..., n)."""
    count = rows.shape[-1]
    y, within = np.clip(x, -reach, reach), np.abs(x) < reach
    powers = y ** np.arange(count)[:, None]
    slopes = np.arange(1, count)[:, None] * powers[:-1] * within
    return rows @ powers, rows[..., 1:] @ slopes


@dataclass(frozen=True)
class LineChain:
    """Coordinate ``index`` of a chain of separable tables, without radial terms."""

    tables: SeparableTables
    index: int
    resolution: Resolution

    @cached_property
    def points(self) -> Array:
        """Equidistant points, the middle one at 0."""
        noise = self.tables.noise[:, self.index]
        limit = float(self.tables.reach[0]) + self.resolution.margin * noise.max()
        half = int(np.ceil(self.resolution.density * limit / noise.min()))
        return np.linspace(-limit, limit, 2 * half + 1)

    @property
    def n_steps(self) -> int:
        """Number of steps N."""
        return len(self.tables.noise)

    def _polynomials(self, rows: Array) -> tuple[Array, Array]:
        return polynomials(rows, self.points, float(self.tables.reach[0]))

    @cached_property
    def reward(self) -> tuple[Array, Array]:
        """The reward and its slope at the points."""
        return self._polynomials(self.tables.reward[self.index])

    def step(self, n: int) -> Step:
        """Return step n."""
        t, i = self.tables, self.index
        reach = float(t.reach[0])
        far = self.points - np.clip(self.points, -reach, reach)
        noise = float(t.noise[n, i])
        return Step(
            self._polynomials(t.base[n, i])[0] + t.beyond[n, i] * far,
            noise,
            noise * float(noise_mask(t)[n]),
            self._polynomials(t.gain[n, i])[0],
            self._polynomials(t.gain_derivative[:, n, i])[0],
        )

    def mean_slope(self, n: int) -> Array:
        """Return the derivative of the base mean of step n at the points."""
        t, i = self.tables, self.index
        within = np.abs(self.points) < t.reach[0]
        slope = self._polynomials(t.base[n, i])[1]
        return slope + np.where(within, 0.0, t.beyond[n, i])

    def kernel(self, mean: Array, spread: float, order: int = 1) -> list[Any]:
        """Return matrices of E F(y), E z F(y), ...: y = mean + spread z."""
        width = self.points[1] - self.points[0]
        z = (self.points - mean[:, None]) / spread
        density = np.where(np.abs(z) < FAR, np.exp(-0.5 * z * z), 0.0)
        density *= width / (spread * np.sqrt(2.0 * np.pi))
        moments = density, z * density, (z * z - 1.0) * density
        dense = len(self.points) < 200 or order == 2
        return [m if dense else csr_array(m) for m in moments[: order + 1]]

    def _steps(self, controlled: bool) -> Iterator[tuple[int, Step, list[Any]]]:
        """Yield the steps backward with their kernels; equal ones share theirs."""
        last: tuple[bytes, list[Any]] | None = None
        for n in reversed(range(self.n_steps)):
            step = self.step(n)
            mean = step.mean + step.noise * step.control if controlled else step.mean
            key = mean.tobytes() + np.float64(step.spread).tobytes()
            if last is None or last[0] != key:
                last = key, self.kernel(mean, step.spread)
            yield n, step, last[1]

    def at_start(self, values: Array) -> Array:
        """Return values (n, ...) at X_0 = 0."""
        return values[len(self.points) // 2]

    def policy(self) -> PolicyAnswers:
        """Return the answers for the tables' control."""
        reward, slope = self.reward
        count = len(self.tables.gain_derivative)
        cost, only = -reward, -reward
        blank = np.zeros((len(self.points), count))
        gradient, only_gradient, matching = blank, blank, blank
        adjoint = -slope
        for n, step, (plain, tilted) in self._steps(controlled=True):
            w, phi = step.control, step.features.T
            columns = [cost[:, None], only[:, None], adjoint[:, None]]
            columns += [gradient, only_gradient, matching]
            means = plain @ np.concatenate(columns, axis=1)
            pulls = tilted @ np.stack([cost, only], axis=1)
            parts = np.split(means, [1, 2, 3, 3 + count, 3 + 2 * count], axis=1)
            carried = parts[2][:, 0]
            push = (w + pulls[:, 0])[:, None]
            gradient = parts[3] + push * phi
            only_gradient = parts[4] + pulls[:, 1:] * phi
            matching = parts[5] + (w + step.noise * carried)[:, None] * phi
            cost, only = 0.5 * w**2 + parts[0][:, 0], parts[1][:, 0]
            adjoint = self.mean_slope(n) * carried
        return PolicyAnswers(
            objective=float(self.at_start(cost)),
            reward_only_objective=float(self.at_start(only)),
            gradient=self.at_start(gradient),
            reward_only_gradient=self.at_start(only_gradient),
            matching_gradient=self.at_start(matching),
        )

    def log_normalizer(self) -> float:
        """Return log E_base exp(r)."""
        level = np.exp(self.reward[0])
        for _, _, (plain, _) in self._steps(controlled=False):
            level = plain @ level
        return float(np.log(self.at_start(level)))

    def optimal_control(self) -> tuple[float, list[Array]]:
        """Return the least J_N over all feedbacks, and its N controls at the points.

        w minimizes 1/2 w^2 + E F(m + g (w + z)), by Newton's method at every point.
        """
        cost, controls = -self.reward[0], []
        w = np.zeros_like(cost)
        # near the kinks at the reach, where no path goes, there may be several minima
        central = np.abs(self.points) < 0.9 * self.tables.reach[0]
        for n in reversed(range(self.n_steps)):
            step = self.step(n)
            for _ in range(NEWTON_STEPS):
                kernels = self.kernel(step.mean + step.noise * w, step.spread, 2)
                # at the ends of the interval part of the noise falls outside
                mass = kernels[0].sum(axis=1)
                mass = np.where(mass > 0.0, mass, 1.0)
                value, slope, bend = (k @ cost / mass for k in kernels)
                change = (w + slope) / np.maximum(1.0 + bend, 0.5)
                if np.max(np.abs(change[central])) < NEWTON_TOLERANCE:
                    break
                w = w - np.clip(change, -1.0, 1.0)
            else:
                raise NumericalError(
                    f"the best control of step {n} was not found; take more time steps"
                )
            controls.append(w)
            cost = 0.5 * w**2 + value
        return float(self.at_start(cost)), controls[::-1]

    def control_distance(self, other: list[Array]) -> float:
        """Return E sum |w_n - w'_n|^2 under the own control, w' at the points."""
        distance = np.zeros_like(self.points)
        for n, step, (plain, _) in self._steps(controlled=True):
            distance = (step.control - other[n]) ** 2 + plain @ distance
        return float(self.at_start(distance))
