"""Inverted pendulum with noise on its velocity: no closed form, certified reference.

State (angle q from the upright position, velocity v), d = 2; q has period 2 pi.

Base      dq = v dt,  dv = (sin q - damping v) dt + noise_level (u dt + dW)
          X_0 ~ N(0, start_scale^2 I),  t in [0, T]
Cost      f = v^2 / 2 + 1 - cos q,  no reward at the end
Control   u_theta = -(theta_0 + theta_1 s) sin q - (theta_2 + theta_3 s) v on the
          velocity,  s = 2 t / T - 1

The first coordinate of noise and control acts on nothing.  The family does not hold the
optimal control: theta* is its best member, by the reference solution.

Source: the stochastic pendulum of Mei and Taghvaei 2026, arXiv:2603.20455 (damping
0.01, noise 0.5, T = 4, dt = 0.05).  There the initial states are optimized, without
control; the start law and the control family are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from sdebench.closed_form.grid_chain import Grid
from sdebench.errors import ParameterError
from sdebench.grid_problem import GridProblem
from sdebench.problem import (
    EULER,
    Array,
    as_states,
    as_time,
    check_euler_only,
)
from sdebench.simulate.tables import SineTables

OPTIMUM = (1.927665973607, -2.485495673599, 2.035955993246, -2.100730177338)
"""theta* of the default parameters; `GridProblem.best_parameters` found it."""


@dataclass(frozen=True, kw_only=True)
class StochasticPendulum(GridProblem):
    """Inverted pendulum, nonlinear drift, noise on the velocity alone.

    Parameters
    ----------
    noise_level : > 0, of the velocity.
    damping : >= 0, friction coefficient.
    start_scale : >= 0, standard deviation of angle and velocity at the start.
    horizon : T > 0.
    """

    default_steps: ClassVar[int] = 80
    source: ClassVar[str] = (
        "Mei and Taghvaei 2026, arXiv:2603.20455, stochastic pendulum; start law and "
        "control family are ours"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
dq_t &= v_t\,dt, \quad dv_t = (\sin q_t - \text{damping}\,v_t)\,dt
  + \sigma\,(u\,dt + dW_t) \\
X_0 &= (q_0, v_0) \sim \mathcal{N}(0, s^2 I), \quad r = 0, \quad
  f(q, v) = \tfrac{1}{2} v^2 + 1 - \cos q
\end{aligned}"""
    hardness: ClassVar[str] = (
        "Nonlinear and unstable: paths that start together fall to either side, and "
        "the noise reaches the angle only through the velocity."
    )

    noise_level: float = 0.5
    damping: float = 0.01
    start_scale: float = 0.5
    horizon: float = 4.0

    def __post_init__(self) -> None:
        if not (self.noise_level > 0 and self.horizon > 0):
            raise ParameterError(
                f"noise_level {self.noise_level} and horizon {self.horizon} must be "
                "positive"
            )
        if not (self.start_scale >= 0 and self.damping >= 0):
            raise ParameterError(
                f"start_scale {self.start_scale} and damping {self.damping} must not "
                "be negative"
            )

    @property
    def time_span(self) -> tuple[float, float]:
        return 0.0, self.horizon

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "angle", "angle_slope", "velocity", "velocity_slope"

    @cached_property
    def theta_star(self) -> Array:
        if self == StochasticPendulum():
            return np.array(OPTIMUM)
        return self.best_parameters(np.array(OPTIMUM))

    @property
    def grids(self) -> tuple[Grid, ...]:
        return self._grids(n_angles=49, density=12.0)

    @property
    def value_grids(self) -> tuple[Grid, ...]:
        return self._grids(n_angles=57, density=16.0)

    def _grids(self, n_angles: int, density: float) -> tuple[Grid, ...]:
        """Return a grid with ``density`` points per velocity, and one that is worse."""
        spread = math.sqrt(self.start_scale**2 + self.noise_level**2 * self.horizon)
        wide = 1.5 + 6.0 * spread
        narrow, coarse = wide - 1.2, 0.87 * density
        return (
            Grid(n_angles, round(density * wide), wide, 24),
            Grid(n_angles - 6, round(coarse * narrow), narrow, 16),
        )

    def drift(self, x: Array, t: float) -> Array:
        as_time(t, self.time_span)
        q, v = np.moveaxis(as_states(x, 2), -1, 0)
        return np.stack([v, np.sin(q) - self.damping * v], axis=-1)

    def diffusion(self, t: float) -> Array:
        as_time(t, self.time_span)
        return np.diag([0.0, self.noise_level])

    def running_cost(self, x: Array, t: float) -> Array:
        q, v = np.moveaxis(as_states(x, 2), -1, 0)
        return 0.5 * v**2 + 1.0 - np.cos(q)

    def reward(self, x: Array) -> Array:
        return np.zeros(as_states(x, 2).shape[:-1])

    def policy(self, x: Array, t: float, theta: Array) -> Array:
        q, v = np.moveaxis(x, -1, 0)
        s = 2.0 * t / self.horizon - 1.0
        u = -(theta[0] + theta[1] * s) * np.sin(q) - (theta[2] + theta[3] * s) * v
        return np.stack([np.zeros_like(u), u], axis=-1)

    def tables(
        self,
        theta: Array | None,
        times: Array,
        scheme: str = EULER,
        noisy: Array | None = None,
    ) -> SineTables:
        check_euler_only(scheme, noisy, len(times) - 1)
        # Columns of the extended state: q, v, sin q, sin(q + pi/2) = cos q.
        h, count = np.diff(times), len(times) - 1
        transition, running = np.zeros((count, 2, 4)), np.zeros((count, 2, 2))
        noise, linear = np.zeros((count, 2, 2)), np.zeros((count, 4))
        transition[:, 0, 0] = 1.0
        transition[:, 0, 1] = h
        transition[:, 1, 1] = 1.0 - h * self.damping
        transition[:, 1, 2] = h
        noise[:, 1, 1] = np.sqrt(h) * self.noise_level
        running[:, 1, 1] = h
        linear[:, 3] = -h
        gains = np.zeros((4, count, 2, 4))
        s = 2.0 * times[:-1] / self.horizon - 1.0
        for p, (column, profile) in enumerate(((2, 1.0), (2, s), (1, 1.0), (1, s))):
            gains[p, :, 1, column] = -np.sqrt(h) * profile
        weights = np.zeros(4) if theta is None else np.asarray(theta, float)
        return SineTables(
            direction=np.array([[1.0, 0.0], [1.0, 0.0]]),
            phase=np.array([0.0, 0.5 * np.pi]),
            transition=transition,
            offset=np.zeros((count, 2)),
            noise=noise,
            gain=np.tensordot(weights, gains, 1),
            bias=np.zeros((count, 2)),
            gain_derivative=gains,
            bias_derivative=np.zeros((4, count, 2)),
            running_quadratic=running,
            running_linear=linear,
            running_constant=h.copy(),
            reward_quadratic=np.zeros((2, 2)),
            reward_linear=np.zeros(4),
            reward_constant=np.zeros(1),
            start_mean=np.zeros(2),
            start_factor=self.start_scale * np.eye(2),
        )
