"""Exponential means of quadratic log-weights, exact on Gaussian chains.

On a Gaussian problem a log-weight is a quadratic function of the normals of its path.
Its coefficients come from its values at a few points, the mean of its exponential from
a determinant: no sampling, and no formula of the estimator takes part.
"""

from __future__ import annotations

import numpy as np
import torch

from sdebench.simulate.noise import Noise, split_seed
from sdebench.view import View


class GivenView(View):
    """A view whose own normals, (count, n_paths, dim), are given as well."""

    own = None

    def noise(self, step):
        if self.own is None or step < self.n_steps:
            return super().noise(step)
        return torch.tensor(self.own[step - self.n_steps])


def view_at(problem, times, points):
    """A view whose paths have the normals ``points`` (n, (N + 1) d): start, steps."""
    count, n_steps = len(points), len(times) - 1
    normals = points.T.reshape(n_steps + 1, problem.dim, count)
    noise = Noise(normals[1:], normals[0], np.full(count, 0.5))
    return GivenView(
        problem.tables(None, times),
        times,
        None,
        key=split_seed(1),
        replicate=0,
        first_path=0,
        n_paths=count,
        given=noise,
    )


def quadratic(problem, estimator, times):
    """Return A, b, c of the log-weight 1/2 z A z + b z + c in the normals z."""

    def values(points):
        view = view_at(problem, times, points)
        return estimator.statistics(view)[:, 0].numpy()

    return quadratic_form(values, len(times) * problem.dim)


def quadratic_form(function, count):
    """Return A, b, c of a quadratic function of points (n, count)."""
    eye = np.eye(count)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    crossed = [eye[i] + eye[j] for i, j in pairs]
    points = np.array([np.zeros(count), *eye, *-eye, *crossed])
    values = function(points)
    c, up, down = values[0], values[1 : count + 1], values[count + 1 : 2 * count + 1]
    A = np.diag(up + down - 2.0 * c)
    for (i, j), value in zip(pairs, values[2 * count + 1 :], strict=True):
        A[i, j] = A[j, i] = value - up[i] - up[j] + c
    return A, 0.5 * (up - down), c


def log_mean(A, b, c, order=1):
    """Return log E exp(order (1/2 z A z + b z + c)), or infinity."""
    precision = np.eye(len(b)) - order * A
    if np.linalg.eigvalsh(precision)[0] <= 0.0:
        return np.inf
    shift = order**2 * b @ np.linalg.solve(precision, b)
    return order * c + 0.5 * shift - 0.5 * np.linalg.slogdet(precision)[1]


def effective_share(A, b, c):
    """Return (E W)^2 / E W^2."""
    return np.exp(2.0 * log_mean(A, b, c) - log_mean(A, b, c, order=2))


def is_quadratic(problem, estimator, times, seed=3):
    """Whether the form gives the log-weight at random points as well."""
    A, b, c = quadratic(problem, estimator, times)
    points = np.random.default_rng(seed).standard_normal((5, len(b)))
    values = estimator.statistics(view_at(problem, times, points))[:, 0]
    form = 0.5 * np.einsum("ni,ij,nj->n", points, A, points) + points @ b + c
    return torch.allclose(values, torch.tensor(form), rtol=1e-9, atol=1e-9)
