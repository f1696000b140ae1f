"""Expectations of an estimator on a small affine chain, exact by quadrature.

On an affine chain a path's gradient is a polynomial in its normals.  The product of
three-point Gauss-Hermite rules is exact for degree 5 in each normal, so that an
expectation has rounding errors only: no sampling, no tolerance to choose.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch

from sdebench import registry
from sdebench.simulate.noise import Noise, split_seed
from sdebench.view import View

NODES = np.sqrt(3.0) * np.array([-1.0, 0.0, 1.0])
WEIGHTS = np.array([1.0, 4.0, 1.0]) / 6.0


@functools.cache
def problem(spec):
    return registry.problem(spec)


def grid(chosen, n_steps, power=1.4):
    """A grid that is not uniform: mixing up steps would show."""
    start, end = chosen.time_span
    return chosen.time_grid(
        start + (end - start) * np.linspace(0, 1, n_steps + 1) ** power
    )


def steps_of(chosen):
    """The most steps that the quadrature of this file affords."""
    return 4 if chosen.dim == 1 else 3


def theta_of(chosen):
    return 0.7 * chosen.theta("optimum") + 0.15


def close(value, exact, scale=None, limit=1e-11):
    scale = np.max(np.abs(exact)) if scale is None else scale
    assert np.max(np.abs(np.asarray(value) - exact)) <= limit * scale


class GivenView(View):
    """A view whose own normals, (count, n_paths, dim), are given as well."""

    own = None

    def noise(self, step):
        if self.own is None or step < self.n_steps:
            return super().noise(step)
        return torch.tensor(self.own[step - self.n_steps])


def view_of(chosen, theta, times, estimator=None, noise=None, tables=None, **address):
    """A view of a problem at given noise, under the estimator's noisy steps."""
    noisy = None if estimator is None else estimator.noisy_steps(len(times) - 1)
    if tables is None:
        tables = (
            chosen.tables(theta, times)
            if noisy is None
            else chosen.tables(theta, times, "euler_maruyama", noisy)
        )
    options = {"key": split_seed(7), "replicate": 1, "first_path": 0, "n_paths": 5}
    if noise is not None:
        options["n_paths"] = noise.start.shape[1]
    return GivenView(tables, times, theta, given=noise, **(options | address))


def nodes(count):
    """Return the nodes (count, 3^count) and weights of the product rule."""
    points = np.array(list(itertools.product(NODES, repeat=count))).T
    weights = np.array(list(itertools.product(WEIGHTS, repeat=count))).prod(axis=1)
    return points, weights


def expectation(estimator, chosen, theta, times, own=None, own_normals=0):
    """Return E[statistics] of a torch estimator, exact to rounding.

    ``own`` : its own normals for all paths, or integrated over if ``own_normals``.
    """
    n_steps, dim = len(times) - 1, chosen.dim
    points, weights = nodes((n_steps + 1 + own_normals) * dim)
    points = points.reshape(-1, dim, len(weights))
    used = estimator.noisy_steps(n_steps)
    steps = points[1 : n_steps + 1] * np.reshape(
        1.0 if used is None else used, (-1, 1, 1)
    )
    noise = Noise(steps, points[0], np.full(len(weights), 0.5))
    view = view_of(chosen, theta, times, estimator, noise)
    if own_normals:
        view.own = points[n_steps + 1 :].swapaxes(1, 2)
    elif own is not None:
        view.own = np.broadcast_to(own, (len(own), len(weights), dim))
    return weights @ estimator.statistics(view).numpy()
