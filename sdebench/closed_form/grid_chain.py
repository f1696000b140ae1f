r"""Certified answers for a nonlinear chain in the plane: an angle and its velocity.

    q' = q + a_n v,     v' = m_n(q, v) + G_n (w + z),    z ~ N(0, 1)

is one step of a second-order system dq = v dt, dv = force dt + sigma (u dt + dW), as
`simulate.tables.SineTables` holds it; every function has period 2 pi in the angle q.
Answers come from backward recursions F_n(q, v) = c_n + E F_{n+1}(q', v') on a grid,
Fourier in q and Chebyshev in v.  Noise acts on v alone, and q' depends on v alone, so
one step is three products with matrices of one dimension:

    1. smooth      S(y, m) = E F(y, m + G z)            Gauss-Hermite
    2. push        K(y, v) = S(y, m(y - a v, v))        Chebyshev interpolation
    3. rotate      F'(q, v) = K(q + a v, v)             Fourier shift

Each converges faster than any power of the grid's spacing.  Velocities beyond the grid
are kept inside by a smooth clamp of the mean; that is the error of the box.

`certify` repeats an answer on a coarser grid in a smaller box and returns what that
changes as the bound of its error; `Extrapolation` removes the time step by Richardson's
deferred approach to the limit, with the last correction as its share of the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, comb
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.polynomial import chebyshev
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray
from scipy.special import ndtr

from sdebench.errors import ParameterError

if TYPE_CHECKING:
    from sdebench.simulate.tables import SineTables

Array = NDArray[np.float64]

ROUNDING = 1e-12
"""Relative error of a recursion that refining the grid does not show."""
CLAMP_WIDTH = 0.4
"""Width of the smooth clamp, in velocities."""
START_WIDTH = 6.5
"""Standard deviations of the start law in its quadrature, a trapezoidal rule."""
NEWTON_STEPS = 12
NEWTON_TOLERANCE = 1e-10


def polynomials(s: Array, count: int) -> Array:
    """Return T_0, ..., T_{count-1} at s in [-1, 1], on a new last axis."""
    values = np.empty((count, *np.shape(s)))
    values[0], values[1] = 1.0, s
    for k in range(2, count):
        np.multiply(values[k - 1], 2.0 * s, out=values[k])
        values[k] -= values[k - 2]
    return np.moveaxis(values, 0, -1)


@dataclass(frozen=True)
class Grid:
    """Resolution in space.

    Parameters
    ----------
    n_angles : odd number of equidistant angles.
    n_velocities : Chebyshev points in [-half_width, half_width].
    half_width : largest velocity.
    n_nodes : Gauss-Hermite nodes per step; the start takes four times as many per axis.
    """

    n_angles: int
    n_velocities: int
    half_width: float
    n_nodes: int

    def widened(self, tables: SineTables) -> Grid:
        """Return the grid with room beyond its box for the noise of these tables."""
        room = 1.0 + self.nodes[0][-1] * np.max(tables.noise) / self.half_width
        return replace(
            self,
            n_velocities=ceil(room * self.n_velocities),
            half_width=float(room * self.half_width),
        )

    @cached_property
    def angles(self) -> Array:
        """The angles (n_angles,)."""
        return 2.0 * np.pi * np.arange(self.n_angles) / self.n_angles

    @cached_property
    def points(self) -> Array:
        """Chebyshev points in [-1, 1]."""
        count = self.n_velocities
        return np.cos(np.pi * (np.arange(count) + 0.5) / count)

    @cached_property
    def velocities(self) -> Array:
        """The velocities (n_velocities,)."""
        return self.half_width * self.points

    @cached_property
    def to_coefficients(self) -> Array:
        """Matrix from values at the points to Chebyshev coefficients."""
        matrix = (2.0 / self.n_velocities) * polynomials(
            self.points, self.n_velocities
        ).T
        matrix[0] *= 0.5
        return matrix

    @cached_property
    def differentiate(self) -> Array:
        """Matrix from the coefficients of a function on [-1, 1] to its derivative's."""
        eye = np.eye(self.n_velocities)
        return np.vstack([chebyshev.chebder(eye), np.zeros((1, self.n_velocities))])

    @cached_property
    def nodes(self) -> tuple[Array, Array]:
        """Gauss-Hermite nodes and weights of a standard normal."""
        return normal_rule(self.n_nodes)

    def rotation(self, advance: float) -> NDArray[np.complex128]:
        """Return the factors (n_frequencies, n_velocities) of a shift of q by a v."""
        frequencies = np.arange((self.n_angles + 1) // 2)
        return np.exp(1j * advance * np.outer(frequencies, self.velocities))

    def angle_rows(self, q: Array) -> Array:
        """Return the interpolation weights of the angles at q (m,), (m, n_angles)."""
        k = np.arange(1, (self.n_angles + 1) // 2)
        at, grid = np.outer(q, k), np.outer(k, self.angles)
        total = np.cos(at) @ np.cos(grid) + np.sin(at) @ np.sin(grid)
        return (1.0 + 2.0 * total) / self.n_angles

    def velocity_rows(self, v: Array, slope: bool = False) -> Array:
        """Return the weights of the velocities at v (m,), or of the derivative."""
        rows = polynomials(v / self.half_width, self.n_velocities)
        if slope:
            rows = rows @ self.differentiate / self.half_width
        return rows @ self.to_coefficients

    def interpolate(self, values: Array, x: Array, slope: bool = False) -> Array:
        """Return a function given on the grid at states x (m, 2), or its v-slope."""
        rows = self.angle_rows(x[:, 0]) @ values
        return np.einsum("ij,ij->i", rows, self.velocity_rows(x[:, 1], slope))


def rotate(values: Array, factors: NDArray[np.complex128]) -> Array:
    """Return K(q + a v, v) for K (n, m, ...), with the factors of `Grid.rotation`."""
    spectrum = np.fft.rfft(values, axis=0)
    spectrum *= factors.reshape(factors.shape + (1,) * (values.ndim - 2))
    return np.fft.irfft(spectrum, n=len(values), axis=0)


def normal_rule(count: int) -> tuple[Array, Array]:
    """Return nodes and weights of the Gauss rule for a standard normal."""
    nodes, weights = hermegauss(count)
    return nodes, weights / weights.sum()


def clamp(y: Array, limit: float) -> tuple[Array, Array]:
    """Return E clip(y + width z, -limit, limit), z ~ N(0, 1), and its derivative.

    The identity, up to e^{-d^2/2} at d widths from the limit, and inside it everywhere.
    """
    above, below = (limit - y) / CLAMP_WIDTH, (-limit - y) / CLAMP_WIDTH
    inside = ndtr(above) - ndtr(below)
    density = np.exp(-0.5 * above**2) - np.exp(-0.5 * below**2)
    edge = CLAMP_WIDTH * density / np.sqrt(2.0 * np.pi)
    value = y * inside - edge + limit * (ndtr(-above) - ndtr(below))
    return value, inside


class Step(NamedTuple):
    """One step on the grid of (y, v), where the old angle is y - a v."""

    rotation: NDArray[np.complex128]  # (n_frequencies, n_velocities)
    mean: Array  # (n, m) m_n, without control
    mean_slope: Array  # (n, m, 2) in (q, v)
    advance: float  # a_n
    noise: float  # G_n, of the control
    spread: float  # G_n, of the noise: 0 in a step without
    control: Array  # (n, m) w
    features: Array  # (n, m, P) dw/dtheta
    running: Array  # (n, m)
    running_slope: Array  # (n, m, 2)


@dataclass(frozen=True, kw_only=True)
class PolicyAnswers:
    """Expectations of one chain under its own control, from the start law.

    Attributes
    ----------
    objective : J_N.
    reward_only_objective : -E r(X_N).
    gradient : (P,) of J_N.
    reward_only_gradient : (P,) of -E r(X_N).
    matching_gradient : (P,) expectation of the adjoint-matching gradient.
    """

    objective: float
    reward_only_objective: float
    gradient: Array
    reward_only_gradient: Array
    matching_gradient: Array

    def stacked(self) -> Array:
        """Return all numbers, in the order of the attributes."""
        objectives = [[self.objective, self.reward_only_objective]]
        gradients = (self.gradient, self.reward_only_gradient, self.matching_gradient)
        return np.concatenate([*objectives, *gradients])

    @classmethod
    def unstacked(cls, values: Array) -> PolicyAnswers:
        """Return the answers from `stacked`."""
        gradients = np.split(values[2:], 3)
        return cls(
            objective=float(values[0]),
            reward_only_objective=float(values[1]),
            gradient=gradients[0],
            reward_only_gradient=gradients[1],
            matching_gradient=gradients[2],
        )


@dataclass(frozen=True, eq=False)
class GridChain:
    """The chain of the module docstring on one grid.

    Parameters
    ----------
    tables : coefficients of the chain, control included.
    grid : resolution in space.

    Raises
    ------
    ParameterError
        If the tables are not those of an angle and its velocity.
    """

    tables: SineTables
    grid: Grid
    _smoothing: dict[tuple[float, float], Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        t = self.tables
        whole = np.concatenate([t.direction[:, 0] % 1.0, t.transition[:, 0, 0] - 1.0])
        zero = (
            whole,
            t.transition[:, 0, 2:],
            t.transition[:, 1, 0],
            t.offset[:, 0],
            t.noise[:, 0],
            t.noise[:, :, 0],
            t.gain[:, 0],
            t.gain[:, 1, 0],
            t.bias[:, 0],
            t.gain_derivative[:, :, :, 0],
            t.running_quadratic[:, 0],
            t.running_linear[:, 0],
            t.reward_quadratic[0],
            t.reward_linear[:1],
        )
        if t.offset.shape[1] != 2 or any(np.any(part) for part in zero):
            raise ParameterError(
                "the chain does not fit the grid; give an angle of period 2 pi that "
                "moves with its velocity, and noise and control on the velocity alone"
            )

    @property
    def n_steps(self) -> int:
        """Return N."""
        return len(self.tables.offset)

    # ---- the chain on the grid ------------------------------------------------------
    def _extended(self, x: Array) -> tuple[Array, Array]:
        """Return y = (x, sin(A x + b)) and dy/dx (..., 2 + K, 2)."""
        t = self.tables
        phase = x @ t.direction.T + t.phase
        slope = np.cos(phase)[..., None] * t.direction
        eye = np.broadcast_to(np.eye(2), (*x.shape, 2))
        values = np.concatenate([x, np.sin(phase)], axis=-1)
        return values, np.concatenate([eye, slope], axis=-2)

    def _step(self, n: int) -> Step:
        t, grid = self.tables, self.grid
        advance = float(t.transition[n, 0, 1])
        y, v = np.meshgrid(grid.angles, grid.velocities, indexing="ij")
        x = np.stack([y - advance * v, v], axis=-1)
        values, slopes = self._extended(x)
        push, linear = t.transition[n, 1], t.running_linear[n]
        noise = float(t.noise[n, 1, 1])
        return Step(
            rotation=grid.rotation(advance),
            mean=values @ push + t.offset[n, 1],
            mean_slope=np.einsum("k,...kj->...j", push, slopes),
            advance=advance,
            noise=noise,
            spread=self._spread(n),
            control=values @ t.gain[n, 1] + t.bias[n, 1],
            features=values @ t.gain_derivative[:, n, 1].T + t.bias_derivative[:, n, 1],
            running=self._quadratic(x, t.running_quadratic[n])
            + values @ linear
            + t.running_constant[n],
            running_slope=x @ t.running_quadratic[n]
            + np.einsum("k,...kj->...j", linear, slopes),
        )

    @staticmethod
    def _quadratic(x: Array, matrix: Array) -> Array:
        return 0.5 * np.einsum("...i,ij,...j->...", x, matrix, x)

    def _steps(self) -> Iterator[tuple[int, Step]]:
        """Yield the steps from the last to the first; equal ones are made once."""
        t = self.tables
        step, made = None, -1
        per_step = (
            t.transition,
            t.offset,
            t.noise,
            t.gain,
            t.bias,
            t.running_quadratic,
            t.running_linear,
            t.running_constant,
            t.noisy,
        )
        per_parameter = (t.gain_derivative, t.bias_derivative)
        for n in reversed(range(self.n_steps)):
            same = step is not None and all(
                [np.array_equal(a[n], a[made]) for a in per_step if len(a)]
                + [np.array_equal(a[:, n], a[:, made]) for a in per_parameter]
            )
            if not same:
                step, made = self._step(n), n
            assert step is not None
            yield n, step

    def _spread(self, n: int) -> float:
        """Return the standard deviation of the noise of step n."""
        noisy = self.tables.noisy
        return float(self.tables.noise[n, 1, 1]) if not len(noisy) or noisy[n] else 0.0

    def _limit(self, spread: float) -> float:
        """Return the largest clamped mean: no node of the noise leaves the grid."""
        return self.grid.half_width - spread * float(self.grid.nodes[0][-1])

    def _smooth(self, limit: float, spread: float) -> Array:
        """Return the matrix from values of F to coefficients of E F(m + spread z).

        The result is a function of m in [-limit, limit].
        """
        key = (limit, spread)
        if key not in self._smoothing:
            grid = self.grid
            nodes, weights = grid.nodes if spread else normal_rule(1)
            at = (limit * grid.points[:, None] + spread * nodes) / grid.half_width
            values = np.einsum("jqk,q->jk", polynomials(at, grid.n_velocities), weights)
            self._smoothing[key] = grid.to_coefficients @ values @ grid.to_coefficients
        return self._smoothing[key]

    def _start(self) -> tuple[Array, Array]:
        """Return states (m, 2) and weights (m,) of a quadrature of the start law."""
        t = self.tables
        nodes = np.linspace(-START_WIDTH, START_WIDTH, 4 * self.grid.n_nodes)
        weights = np.exp(-0.5 * nodes**2)
        weights /= weights.sum()
        z = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
        x = t.start_mean + z @ t.start_factor.T
        return x, np.outer(weights, weights).ravel()

    def _reward(self) -> tuple[Array, Array]:
        """Return r and its gradient on the grid."""
        t, grid = self.tables, self.grid
        x = np.stack(np.meshgrid(grid.angles, grid.velocities, indexing="ij"), axis=-1)
        values, slopes = self._extended(x)
        reward = values @ t.reward_linear - self._quadratic(x, t.reward_quadratic)
        slope = np.einsum("k,...kj->...j", t.reward_linear, slopes)
        return reward + t.reward_constant[0], slope - x @ t.reward_quadratic

    def _mean_at_start(self, values: Array) -> Array:
        """Return the mean (...) over the start law of functions (n, m, ...)."""
        x, weights = self._start()
        velocity = weights[:, None] * self.grid.velocity_rows(x[:, 1])
        return np.tensordot(self.grid.angle_rows(x[:, 0]).T @ velocity, values, 2)

    def _expect(self, values: Array, step: Step, n_slopes: int) -> tuple[Array, Array]:
        """Return E F' after the step's control, and d/dw of the first ``n_slopes``."""
        limit = self._limit(step.spread)
        mean, inside = clamp(step.mean + step.noise * step.control, limit)
        coefficients = np.matmul(self._smooth(limit, step.spread), values)
        slopes = np.matmul(self.grid.differentiate, coefficients[..., :n_slopes])
        both = np.concatenate([coefficients, slopes], axis=-1)
        basis = polynomials(mean / limit, self.grid.n_velocities)
        result = np.matmul(basis, both)
        push = (step.noise / limit) * inside[..., None]
        return result[..., : values.shape[-1]], push * result[..., values.shape[-1] :]

    # ---- one control ----------------------------------------------------------------
    def policy(self) -> PolicyAnswers:
        """Return J_N, its gradients and the mean adjoint-matching gradient.

        The cost-to-go C, the expected reward R and their derivatives go backward,

            C_p = E C'_p + dw_p (w + d/dw E C'),   R_p = E R'_p + dw_p d/dw E R',

        beside the mean of the lean adjoint, a = (d mean/dx)^T E a' + grad f, and of the
        matching gradient, M_p = E M'_p + dw_p (w + G E a'_v).
        """
        reward, reward_slope = self._reward()
        n_params = len(self.tables.gain_derivative)
        rows = 2 if np.any(reward) else 1  # cost, and reward where there is one
        own = np.eye(rows)[0]
        cost = np.stack([np.zeros_like(reward), reward], axis=-1)[..., :rows]
        slope = np.zeros((*reward.shape, rows * n_params))
        adjoint, matching = -reward_slope, np.zeros((*reward.shape, n_params))
        cuts = np.cumsum([rows, rows * n_params, 2])
        for _, step in self._steps():
            fields = np.concatenate([cost, slope, adjoint, matching], axis=-1)
            means, along = self._expect(fields, step, n_slopes=rows)
            cost, slope, adjoint, matching = np.split(means, cuts, axis=-1)
            w, features = step.control[..., None], step.features
            cost = cost + own * (0.5 * w**2 + step.running[..., None])
            pull = (own * w + along)[..., None] * features[..., None, :]
            slope = slope + pull.reshape(slope.shape)
            matching = matching + (w + step.noise * adjoint[..., 1:]) * features
            carried = step.mean_slope * adjoint[..., 1:] + step.running_slope
            carried[..., 0] += adjoint[..., 0]
            carried[..., 1] += step.advance * adjoint[..., 0]
            fields = np.concatenate([cost, slope, carried, matching], axis=-1)
            fields = rotate(fields, step.rotation)
            cost, slope, adjoint, matching = np.split(fields, cuts, axis=-1)
        parts = [self._mean_at_start(part) for part in (cost, slope, matching)]
        costs, slopes = parts[0], parts[1].reshape(rows, n_params)
        return PolicyAnswers(
            objective=float(costs[0] - costs[1:].sum()),
            reward_only_objective=-float(costs[1:].sum()),
            gradient=slopes[0] - slopes[1:].sum(axis=0),
            reward_only_gradient=-slopes[1:].sum(axis=0),
            matching_gradient=parts[2],
        )

    def control_distance(self, other: Sequence[Array]) -> float:
        """Return E sum_n |w_n - w'_n|^2 under the own control w.

        Parameters
        ----------
        other : N controls on the grid, as `optimal_control` returns them.
        """
        distance = np.zeros((self.grid.n_angles, self.grid.n_velocities))
        for n, step in self._steps():
            rest = self._expect(distance[..., None], step, n_slopes=0)[0][..., 0]
            distance = rotate(rest + (step.control - other[n]) ** 2, step.rotation)
        return float(self._mean_at_start(distance))

    # ---- the best control -----------------------------------------------------------
    def optimal_control(self) -> tuple[float, list[Array]]:
        """Return the least J_N over all feedbacks, and its N controls.

        w_n minimizes 1/2 w^2 + E F_{n+1}(y, m + G (w + z)), by Newton's method at every
        point; it is given at (y, v), y = q + a v the new angle: see `control_at`.

        F has ridges; exp(1/2 a v^2 - F) is smooth, and so is it with E F for F.
        """
        grid, curvatures, controls = self.grid, self.curvatures(), []
        v = grid.velocities
        level = np.exp(self._reward()[0] + 0.5 * curvatures[-1] * v**2)
        w = np.zeros_like(level)
        for n, step in self._steps():
            a = curvatures[n + 1]
            series, limit = self._smooth_log(level, step.spread)
            constant = 0.5 * a * step.spread**2 + step.running
            for _ in range(NEWTON_STEPS):
                mean = step.mean + step.noise * w
                kept, inside = clamp(mean, limit)
                basis = polynomials(kept / limit, grid.n_velocities)
                height, first, second = np.moveaxis(np.matmul(basis, series), -1, 0)
                first, second = first / height, second / height
                cost = 0.5 * (w**2 + a * mean**2) - np.log(height) + constant
                slope = w + step.noise * (a * mean - inside * first)
                bend = a - inside**2 * (second - first**2)
                change = slope / (1.0 + step.noise**2 * bend)
                if np.max(np.abs(change)) < NEWTON_TOLERANCE:
                    break
                w = w - change
            controls.append(w)
            level = np.exp(0.5 * curvatures[n] * v**2 - cost)
            level = rotate(level, step.rotation)
        return self._mean_value(level, curvatures[0]), controls[::-1]

    def _smooth_log(self, level: Array, spread: float) -> tuple[Array, float]:
        """Return the series of exp(E log level(m + spread z)), and of its derivatives.

        Coefficients (n, m, 3) on [-limit, limit], and the limit.
        """
        grid, limit = self.grid, self._limit(spread)
        nodes, weights = grid.nodes if spread else normal_rule(1)
        at = limit * grid.points[:, None] + spread * nodes
        rows = grid.velocity_rows(at.ravel())
        logs = np.log(level @ rows.T).reshape(len(level), *at.shape) @ weights
        first = np.exp(logs) @ grid.to_coefficients.T
        second = first @ grid.differentiate.T / limit
        third = second @ grid.differentiate.T / limit
        return np.stack([first, second, third], axis=-1), limit

    def _mean_value(self, level: Array, curvature: float) -> float:
        """Return the mean over the start law of 1/2 a v^2 - log level."""
        values, weights = self._start_values(level, curvature)
        return float(weights @ values)

    def _start_values(self, level: Array, curvature: float) -> tuple[Array, Array]:
        x, weights = self._start()
        # Far out g may fall below its interpolation error, of either sign: the weights
        # there are tiny, and the bound sees the change from grid to grid.
        logs = np.log(np.abs(self.grid.interpolate(level, x)))
        return 0.5 * curvature * x[:, 1] ** 2 - logs, weights

    def control_at(self, controls: Sequence[Array], n: int, x: Array) -> Array:
        """Return the control of step n at states x (m, 2), in noise units, (m,)."""
        advance = float(self.tables.transition[n, 0, 1])
        ahead = np.stack([x[:, 0] + advance * x[:, 1], x[:, 1]], axis=-1)
        return self.grid.interpolate(controls[n], ahead)

    # ---- the tilted chain -----------------------------------------------------------
    def curvatures(self) -> Array:
        """Return the curvature in v of the value without the angle's forces, (N + 1,).

        Taken out of the value, it leaves a function that is easy to interpolate.
        """
        t = self.tables
        values = np.empty(self.n_steps + 1)
        values[-1] = t.reward_quadratic[1, 1]
        for n in reversed(range(self.n_steps)):
            gain, square = t.transition[n, 1, 1], self._spread(n) ** 2
            ahead = values[n + 1] / (1.0 + values[n + 1] * square)
            values[n] = t.running_quadratic[n, 1, 1] + gain**2 * ahead
        return values

    def tilted(self, curvatures: Array, keep: Sequence[int] = (0,)) -> list[Array]:
        """Return g_n on the grid for the steps to keep, in their order.

        -log E_base[exp(r - sum f) | X_n = x] = 1/2 a_n v^2 - log g_n(x), with any
        ``curvatures`` a (N + 1,).
        """
        grid = self.grid
        v = grid.velocities
        level = np.exp(self._reward()[0] + 0.5 * curvatures[-1] * v**2)
        found = {self.n_steps: level}
        for n, step in self._steps():
            a, square = curvatures[n + 1], step.spread**2
            shrink = 1.0 / (1.0 + a * square)
            spread = step.spread * np.sqrt(shrink)
            limit = self._limit(step.spread)
            mean = clamp(shrink * step.mean, limit)[0]
            basis = polynomials(mean / limit, grid.n_velocities)
            series = level @ self._smooth(limit, spread).T
            level = np.einsum("ijk,ik->ij", basis, series)
            exponent = 0.5 * curvatures[n] * v**2 - 0.5 * a * shrink * step.mean**2
            level = level * np.exp(exponent - step.running) * np.sqrt(shrink)
            level = rotate(level, step.rotation)
            if n in keep:
                found[n] = level
        return [found[n] for n in keep]

    def log_normalizer(self) -> tuple[float, float]:
        """Return log E_base exp(r - sum f), and the mean of the log given X_0."""
        curvatures = self.curvatures()
        (level,) = self.tilted(curvatures)
        values, weights = self._start_values(level, curvatures[0])
        least = values.min()
        total = np.log(weights @ np.exp(least - values)) - least
        return float(total), -float(weights @ values)


# ---- continuous time ---------------------------------------------------------------


class ValueFunction:
    """V(x, t) = -log h(x, t) in continuous time, and its slope in v.

    At equidistant times exp(1/2 a(t) v^2 - V) is extrapolated to step zero at every
    point of the grid; between them V is interpolated at the states asked for.

    Parameters
    ----------
    tables : the base chain's tables on a time grid.
    span : start and end.
    grid : resolution in space.
    n_times : number of intervals between the times.
    refinements : steps per interval, increasing.
    """

    WINDOW = 10

    def __init__(
        self,
        tables: Callable[[Array], SineTables],
        span: tuple[float, float],
        grid: Grid,
        n_times: int,
        refinements: tuple[int, ...],
    ) -> None:
        self.times = np.linspace(*span, n_times + 1)
        self.grid = grid = grid.widened(tables(self.times))
        finest = np.linspace(*span, refinements[-1] * n_times + 1)
        curvatures = GridChain(tables(finest), grid).curvatures()
        levels = []
        for m in refinements:
            times = np.linspace(*span, m * n_times + 1)
            chain = GridChain(tables(times), grid)
            bend = np.interp(times, finest, curvatures)
            levels.append(chain.tilted(bend, range(0, len(times), m)))
        weights = Extrapolation(refinements).weights
        self._levels = np.einsum("k,k...->...", weights, np.array(levels))
        self._curvatures = np.interp(self.times, finest, curvatures)

    def _window(self, t: float) -> tuple[Array, slice]:
        """Return the weights of the nearest times, and which they are."""
        width = self.times[1] - self.times[0]
        nearest = round((t - self.times[0]) / width)
        if abs(t - self.times[nearest]) < 1e-12 * width:
            return np.ones(1), slice(nearest, nearest + 1)
        first = int((t - self.times[0]) / width) - self.WINDOW // 2 + 1
        first = min(max(first, 0), len(self.times) - self.WINDOW)
        chosen = slice(first, first + self.WINDOW)
        gaps = t - self.times[chosen]
        weights = barycentric_weights(self.WINDOW) / gaps
        return weights / weights.sum(), chosen

    def _at(self, x: Array, t: float, slope: bool) -> Array:
        """Return V or dV/dv at states x (..., 2)."""
        fastest = np.max(np.abs(x[..., 1]), initial=0.0)
        if fastest > self.grid.half_width:
            raise ParameterError(
                f"velocity {fastest:.3g} is outside the reference solution; give at "
                f"most {self.grid.half_width:.3g} in absolute value"
            )
        grid, states = self.grid, x.reshape(-1, 2)
        weights, chosen = self._window(t)
        bends, v = self._curvatures[chosen, None], states[:, 1]
        rows = grid.angle_rows(states[:, 0]) @ self._levels[chosen]
        level = np.einsum("kij,ij->ki", rows, grid.velocity_rows(v))
        if slope:
            slopes = np.einsum("kij,ij->ki", rows, grid.velocity_rows(v, slope=True))
            found = bends * v - slopes / level
        else:
            found = 0.5 * bends * v**2 - np.log(level)
        return (weights @ found).reshape(x.shape[:-1])

    def value(self, x: Array, t: float) -> Array:
        """Return V at states x (..., 2)."""
        return self._at(x, t, slope=False)

    def slope(self, x: Array, t: float) -> Array:
        """Return dV/dv at states x (..., 2)."""
        return self._at(x, t, slope=True)


def barycentric_weights(count: int) -> Array:
    """Return those of equidistant points."""
    return np.array([(-1.0) ** k * comb(count - 1, k) for k in range(count)])


# ---- error bounds ------------------------------------------------------------------


class Certified(NamedTuple):
    """An answer and a bound of its error, component by component."""

    value: Array
    error: Array


def certify(
    answer: Callable[[Grid], Array], grids: Sequence[Grid], amplification: float = 1.0
) -> Certified:
    """Return the answer of the first grid, and how far the other grids change it.

    Parameters
    ----------
    answer : of a grid.
    grids : the best one, and others that are worse in every respect: coarser, in a
        smaller box, with fewer nodes.  As all of these converge geometrically, the
        error of the best is far below the change.
    amplification : of rounding errors, by what the answer does with the recursions.
    """
    value, *others = (np.atleast_1d(answer(grid)) for grid in grids)
    change = np.sum([np.abs(value - other) for other in others], axis=0)
    size = 1.0 + float(np.max(np.abs(value)))
    return Certified(value, change + ROUNDING * amplification * size)


@dataclass(frozen=True)
class Extrapolation:
    """Richardson's extrapolation to step zero over ``levels``, numbers of steps."""

    levels: tuple[int, ...]

    @staticmethod
    def _weights(levels: Sequence[int]) -> Array:
        """Return the weights of the value at h = 0 of the polynomial through 1/N."""
        h = 1.0 / np.asarray(levels, dtype=np.float64)
        gaps = h[:, None] - h
        np.fill_diagonal(gaps, 1.0)
        ratios = -h[None, :] / gaps
        np.fill_diagonal(ratios, 1.0)
        return np.asarray(np.prod(ratios, axis=1))

    @cached_property
    def weights(self) -> Array:
        """Weights of the levels in the limit."""
        return self._weights(self.levels)

    @cached_property
    def correction(self) -> Array:
        """Weights of the change that the coarsest level makes."""
        return self.weights - np.append(0.0, self._weights(self.levels[1:]))

    def limit(
        self, answer: Callable[[int, Grid], Array], grids: Sequence[Grid]
    ) -> Certified:
        """Return the limit of the answers of N steps, with its bound.

        The bound adds the change by the last correction to that by the grids.
        """

        def both(grid: Grid) -> Array:
            values = np.stack([np.atleast_1d(answer(n, grid)) for n in self.levels])
            return np.stack([self.weights @ values, self.correction @ values])

        result = certify(both, grids, float(np.sum(np.abs(self.weights))))
        return Certified(result.value[0], result.error[0] + np.abs(result.value[1]))
