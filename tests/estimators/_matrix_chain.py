"""A chain of matrices with exact means of estimators by cubature.

A path is a function of its normals, and the rows of most estimators are polynomials in
them.  Nodes of a Gaussian law of the normals give the mean of such rows to rounding:
under the control of the paths that law is N(0, I), under P* another one, whose mean and
covariance come from dense matrices.
"""

from __future__ import annotations

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


class MatrixChain:
    """Random matrices at every step, P controls, all noise matrices invertible."""

    def __init__(self, n_steps=3, dim=2, n_params=2, seed=0):
        rng = np.random.default_rng(seed)
        eye = np.eye(dim)

        def square(size, *lead):
            root = rng.normal(size=(*lead, dim, dim))
            return size * root @ np.swapaxes(root, -1, -2) / dim

        self.n_steps, self.dim, self.n_params = n_steps, dim, n_params
        self.theta_star = np.full(n_params, 0.7)
        self.theta = np.linspace(-0.5, 1.3, n_params)
        self._base = {
            "transition": 0.8 * eye + 0.3 * rng.normal(size=(n_steps, dim, dim)),
            "offset": 0.4 * rng.normal(size=(n_steps, dim)),
            "noise": 0.6 * eye + 0.2 * rng.normal(size=(n_steps, dim, dim)),
            "running": square(0.2, n_steps),
            "reward_quadratic": square(0.5),
            "reward_linear": rng.normal(size=dim),
            "reward_constant": np.array([0.3]),
            "start_mean": rng.normal(size=dim),
            "start_factor": 0.3 * eye + 0.1 * rng.normal(size=(dim, dim)),
        }
        self._feature_gain = 0.4 * rng.normal(size=(n_params, n_steps, dim, dim))
        self._feature_bias = 0.5 * rng.normal(size=(n_params, n_steps, dim))
        self.times = np.linspace(0.0, 1.0, n_steps + 1)

    def tables(self, theta, times, scheme="euler_maruyama", noisy=None):
        value = np.zeros(self.n_params) if theta is None else np.asarray(theta)
        basis = np.zeros((self.n_params, self.n_params, self.n_steps))
        basis[np.diag_indices(self.n_params)] = 1.0
        return LinearTables(
            gain=np.tensordot(value, self._feature_gain, 1),
            bias=np.tensordot(value, self._feature_bias, 1),
            feature_gain=self._feature_gain,
            feature_bias=self._feature_bias,
            basis=basis,
            **self._base,
        )

    def policy(self, theta=None) -> PolicyChain:
        theta = self.theta if theta is None else theta
        tables = self.tables(theta, self.times)
        best = self.tables(self.theta_star, self.times)
        return PolicyChain(
            AffineChain.from_tables(tables),
            tables.gain,
            tables.bias,
            *parameter_derivatives(tables),
            best.gain,
            best.bias,
            theta,
            self.policy,
        )

    def feedback(self, control):
        """K and k of a control of the paths: "theta", "none" or "optimal"."""
        policy = self.policy()
        if control == "optimal":
            return policy.optimal_gain, policy.optimal_bias
        factor = float(control == "theta")
        return factor * policy.gain, factor * policy.bias

    @property
    def size(self):
        """The number of normals of a path, X_0 included."""
        return self.dim * (1 + self.n_steps)

    def tilted_law(self, control):
        """Mean and covariance of (s, z) under P*, z the noise of the paths' control.

        With the log-density e^{r - f} of P* to the base in (s, y), y = z + v.
        """
        tables = self.tables(None, self.times)
        n, d = self.n_steps, self.dim
        row = np.zeros((d, 1 + self.size))
        row[:, 0], row[:, 1 : 1 + d] = tables.start_mean, tables.start_factor
        precision, slope = np.eye(self.size), np.zeros(self.size)
        gain, bias = self.feedback(control)
        matrix, shift = np.eye(self.size), np.zeros(self.size)  # z = matrix y - shift
        for k in range(n + 1):
            F = tables.running[k] if k < n else tables.reward_quadratic
            precision += row[:, 1:].T @ F @ row[:, 1:]
            slope -= row[:, 1:].T @ F @ row[:, 0]
            if k == n:
                slope += row[:, 1:].T @ tables.reward_linear
                break
            part = slice(d + k * d, d + (k + 1) * d)
            matrix[part] -= gain[k] @ row[:, 1:]
            shift[part] = gain[k] @ row[:, 0] + bias[k]
            row = tables.transition[k] @ row
            row[:, 0] += tables.offset[k]
            row[:, 1:][:, part] += tables.noise[k]
        covariance = np.linalg.inv(precision)
        mean = matrix @ (covariance @ slope) - shift
        return mean, matrix @ covariance @ matrix.T

    def noise(self, values) -> Noise:
        """Turn rows (n, size) of normals (s, z) into the noise of n paths."""
        values = np.asarray(values)
        steps = values[:, self.dim :].reshape(-1, self.n_steps, self.dim)
        steps = np.ascontiguousarray(steps.transpose(1, 2, 0))
        start = np.ascontiguousarray(values[:, : self.dim].T)
        return Noise(steps, start, np.full(len(values), 0.5))

    def rows(self, estimator, values, backend="torch"):
        """Return the estimator's statistics (C, n) at rows (n, size) of normals."""
        runner = MatrixRunner(self, self.noise(values), backend)
        if isinstance(estimator, CompositeEstimator):
            return estimator.run(runner)
        return runner.run(estimator)[0]


class MatrixRunner(Runner):
    """A runner whose paths have the given noise."""

    def __init__(self, chain, noise, backend):
        self.theta, self.times = chain.theta, chain.times
        self.n_steps, self.n_params, self.dim = chain.n_steps, chain.n_params, chain.dim
        self.n_paths = len(noise.uniforms)
        self._noise = noise
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

    def run(self, *estimators):
        address = (0, 0, self.n_paths)
        return self._simulations.rows(
            estimators, self.theta, self.times, address, self._noise
        )


def third_degree(mean, covariance):
    """Return nodes (2 D, D) that average polynomials of degree three exactly."""
    size = len(mean)
    values, vectors = np.linalg.eigh(covariance)
    root = np.sqrt(size) * (vectors * np.sqrt(values)).T
    return np.concatenate([mean + root, mean - root])


def fifth_degree(size):
    """Return nodes (3^D, D) and weights for polynomials of degree five, N(0, I)."""
    points, weights = np.polynomial.hermite_e.hermegauss(3)
    index = np.array(list(product(range(3), repeat=size)))
    return points[index], np.prod(weights[index] / weights.sum(), axis=1)
