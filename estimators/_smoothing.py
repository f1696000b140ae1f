"""Differences of a function along random directions: what zeroth-order methods share.

With directions z of covariance I, a smoothing mu and a function f of theta,

    two_point   z (f(theta + mu z) - f(theta - mu z)) / (2 mu)
    forward     z (f(theta + mu z) - f(theta)) / mu
    one_point   z (f(theta + mu z) - b) / mu

have the same mean, E[z f(theta + mu z)] / mu, which for Gaussian z is the gradient of
the smoothed function E f(theta + mu z): grad f + mu^2/2 grad Laplacian f + O(mu^4).
The directions are "gaussian", uniform on the "sphere" of radius sqrt(P), or
"rademacher", independent signs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from sdebench.composite import PathCosts, Runner
from sdebench.errors import ParameterError
from sdebench.estimator import Array

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.simulate.noise import Noise

DIRECTIONS = ("gaussian", "sphere", "rademacher")
FORMS = ("two_point", "forward", "one_point")


def draw_directions(
    rng: np.random.Generator, law: str, count: int, n_params: int
) -> Array:
    """Return ``count`` independent directions (count, P) of covariance I."""
    if law == "rademacher":
        return np.asarray(2.0 * rng.integers(0, 2, (count, n_params)) - 1.0)
    directions = rng.standard_normal((count, n_params))
    if law == "sphere":
        lengths = np.linalg.norm(directions, axis=1, keepdims=True)
        directions *= np.sqrt(n_params) / lengths
    return directions


def smoothed_gradients(
    values: Callable[[Array], Array],
    theta: Array,
    directions: Array,
    smoothing: float,
    form: str,
    baseline: str = "none",
) -> Array:
    """Return the mean over the directions of the module's formula, (P, n).

    Parameters
    ----------
    values : f, from theta (P,) to n numbers, one per path.
    theta : (P,).
    directions : (K, P).
    smoothing : mu.
    form : of `FORMS`.
    baseline : of "one_point": "none" or "leave_one_out", f averaged over the other
        directions.
    """
    count = len(directions)
    slopes = np.array([values(theta + smoothing * z) for z in directions])
    if form == "two_point":
        behind = np.array([values(theta - smoothing * z) for z in directions])
        slopes = 0.5 * (slopes - behind)
    elif form == "forward":
        slopes -= values(theta)
    elif baseline == "leave_one_out":
        slopes = (slopes - slopes.mean(axis=0)) * (count / (count - 1))
    return np.einsum("kp,kn->pn", directions, slopes) / (count * smoothing)


def expected_gradient(
    function: Callable[[Array], float], theta: Array, smoothing: float, law: str
) -> Array:
    """Return E[z f(theta + mu z)] / mu of a smooth function, (P,).

    The mean over all signs is exact for "rademacher".  For the others the cubature of
    degree 5 on the sphere (signs and coordinate axes) leaves O(mu^4).
    """
    count = len(theta)
    corners = np.array(list(itertools.product((-1.0, 1.0), repeat=count)))
    nodes, weights = corners, np.full(len(corners), 1.0 / len(corners))
    radius = 1.0
    if law != "rademacher":
        axes = np.sqrt(count) * np.vstack([np.eye(count), -np.eye(count)])
        on_axes = 2.0 / (count + 2)
        nodes = np.vstack([corners, axes])
        weights = np.append(
            (1.0 - on_axes) * weights, np.full(2 * count, on_axes / (2 * count))
        )
    if law == "gaussian":  # the rest of the weight lies at z = 0
        radius = np.sqrt((count + 2) / count)
        weights = weights / radius**2
    values = [function(theta + smoothing * radius * z) for z in nodes]
    return (weights * values) @ (radius * nodes) / smoothing


def check_perturbations(n_directions: int, smoothing: float) -> None:
    """Raise unless there is a direction and a finite positive smoothing."""
    if n_directions < 1:
        raise ParameterError(f"n_directions = {n_directions} must be at least 1")
    if not 0.0 < smoothing < math.inf:
        raise ParameterError(
            f"smoothing = {smoothing} must be a positive number, e.g. 0.01"
        )


def path_costs(
    runner: Runner, objective: str, noise: Noise, first: int = 0
) -> Callable[[Array], Array]:
    """Return the cost of every path as a function of theta, at the same noise.

    ``first`` : the path of the block with which the noise begins.
    """

    def costs(theta: Array) -> Array:
        (rows,) = runner.run(PathCosts(), theta=theta, noise=noise, first=first)
        control, running, _, reward = rows
        return -reward if objective == "reward" else control + running - reward

    return costs


def smoothed_target(
    policy: PolicyChain, objective: str, smoothing: float, law: str
) -> Array:
    """Return `expected_gradient` of the objective of an N-step chain, (P,)."""

    def value(theta: Array) -> float:
        return policy.at(theta).objective(reward_only=objective == "reward")

    return expected_gradient(value, policy.theta, smoothing, law)
