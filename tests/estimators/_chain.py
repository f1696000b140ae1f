"""A scalar chain with exact means of estimators by Gauss-Hermite quadrature.

A path is a function of its few normals.  Where the estimator is a polynomial in them,
the quadrature over all of them gives its mean and variance to rounding, from the very
rows that the estimator returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from sdebench.closed_form.affine_chain import (
    AffineChain,
    PolicyChain,
    parameter_derivatives,
)
from sdebench.composite import CompositeEstimator, Runner
from sdebench.measure.workers import Settings, Simulations
from sdebench.simulate.noise import Noise
from sdebench.simulate.tables import LinearTables


@dataclass(frozen=True)
class ScalarChain:
    """X_{n+1} = theta X_n + scale z_n, or theta + scale z_n with ``shift``.

    Reward constant + linear x - quadratic x^2 / 2, running cost running x^2 / 2.
    """

    n_steps: int = 4
    scale: float = 0.7
    start_mean: float = 1.2
    start_scale: float = 0.0
    quadratic: float = 2.0
    linear: float = 0.0
    constant: float = 0.0
    running: float = 0.0
    shift: bool = False
    optimum: float = 0.5
    n_params: int = 1
    dim: int = 1

    @property
    def theta_star(self):
        return np.array([self.optimum])

    def tables(self, theta, times, scheme="euler_maruyama", noisy=None):
        n = len(times) - 1
        value = 0.0 if theta is None else float(theta[0])
        slope = np.ones((n, 1)) / self.scale
        gain = 0.0 * slope if self.shift else slope
        bias = slope if self.shift else 0.0 * slope
        return LinearTables(
            transition=np.zeros((n, 1, 1)),
            offset=np.zeros((n, 1)),
            noise=np.full((n, 1, 1), self.scale),
            gain=value * gain[..., None],
            bias=value * bias,
            feature_gain=gain[None, ..., None],
            feature_bias=bias[None],
            basis=np.ones((1, 1, n)),
            running=np.full((n, 1, 1), self.running),
            reward_quadratic=np.array([[self.quadratic]]),
            reward_linear=np.array([self.linear]),
            reward_constant=np.array([self.constant]),
            start_mean=np.array([self.start_mean]),
            start_factor=np.array([[self.start_scale]]),
            noisy=np.zeros(0) if noisy is None else noisy,
        )

    def policy(self, theta, n_steps=None, noisy=None) -> PolicyChain:
        times = np.arange((n_steps or self.n_steps) + 1.0)
        tables = self.tables([theta], times, noisy=noisy)
        best = self.tables(self.theta_star, times, noisy=noisy)
        return PolicyChain(
            AffineChain.from_tables(tables),
            tables.gain,
            tables.bias,
            *parameter_derivatives(tables),
            best.gain,
            best.bias,
            np.array([theta]),
            lambda moved: self.policy(float(moved[0]), n_steps, noisy),
        )


class GivenNoise(Runner):
    """A runner whose paths have the given noise."""

    def __init__(self, chain, theta, noise: Noise, backend="numba", seed=0):
        self.theta = np.array([theta])
        self.times = np.arange(chain.n_steps + 1.0)
        self.n_steps, self.n_params, self.dim = chain.n_steps, 1, 1
        self.n_paths = len(noise.uniforms)
        self._noise, self._seed = noise, seed
        settings = Settings(
            times=self.times,
            theta=self.theta,
            n_paths=self.n_paths,
            backend=backend,
            dtype="float64",
            device="cpu",
            seed=0,
        )
        self._simulations = Simulations(chain, settings, {})

    def rng(self):
        return np.random.default_rng(self._seed)

    def noise(self, n_steps=None):
        return self._noise

    def run(self, *estimators, noise=None, theta=None, times=None, first=0):
        return self._simulations.rows(
            estimators,
            self.theta,
            self.times if times is None else times,
            (0, 0, self.n_paths),
            self._noise if noise is None else noise,
        )


def rows(chain, estimator, theta, noise, **options):
    """Return the estimator's statistics (C, n_paths)."""
    runner = GivenNoise(chain, theta, noise, **options)
    if isinstance(estimator, CompositeEstimator):
        return estimator.run(runner)
    return runner.run(estimator)[0]


def grid(chain, nodes, group=1, noisy=None, start=False):
    """Return the noise of groups of paths at all nodes, and the groups' weights.

    noisy : steps with more than one node; default all.  start : whether X_0 has, too.
    """
    steps = range(chain.n_steps) if noisy is None else noisy
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    axes = (len(steps) + start) * group
    index = np.array(list(product(range(nodes), repeat=axes)))
    values = points[index].reshape(-1, len(steps) + start)  # one row per path
    z = np.zeros((chain.n_steps, 1, len(values)))
    for column, step in enumerate(steps):
        z[step, 0] = values[:, column]
    first = values[:, -1:].T if start else np.zeros((1, len(values)))
    noise = Noise(z, first, np.full(len(values), 0.5))
    return noise, np.prod(weights[index], axis=1)


def group_mean(statistics, weights):
    """Return mean and covariance of the groups' mean statistics."""
    size = statistics.shape[1] // len(weights)
    groups = statistics.reshape(len(statistics), -1, size).mean(2)
    mean = groups @ weights
    centred = groups - mean[:, None]
    return mean, (centred * weights) @ centred.T


def random_noise(chain, n_paths, seed):
    """Return ordinary noise."""
    generator = np.random.default_rng(seed)
    return Noise(
        generator.standard_normal((chain.n_steps, 1, n_paths)),
        generator.standard_normal((1, n_paths)),
        np.full(n_paths, 0.5),
    )
