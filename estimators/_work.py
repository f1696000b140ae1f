r"""Chains that follow the path of densities rho_t = p_t e^{lambda_t r}, and their work.

On a memoryless denoising process, sigma^2 = 2 eta, with velocity v = kappa x + eta s
and score s = grad log p_t, Langevin noise of strength eps = sigma^2 / 2 makes

    forward drift    v + eps (s + lambda grad r) = b + 1/2 sigma^2 lambda grad r,
    backward drift   v - eps (s + lambda grad r) = kappa x - 1/2 sigma^2 lambda grad r:

the base process under the control u = 1/2 sigma lambda grad r, and its noising with the
opposite push, which needs no network.  With g = sqrt(h) sigma the kernels of a step are

    F_n(x, x') = N(x'; base mean(x) + 1/2 g_n^2 lambda_n grad r(x), g_n^2 I),
    B_n(x', x) = N(x; a_n x' + 1/2 b_n lambda_{n+1} grad r(x'), b_n I),

a_n = alpha_n / alpha_{n+1}.  The variance b_n is g_n^2 too ("matched"), or that of the
exact noising of the base process, beta_n^2 - a_n^2 beta_{n+1}^2 ("noising"), which
differs by O(h^2) and is smaller.  The levels are lambda_n = (n / N)^power, so that
lambda_0 = 0 and lambda_N = 1 on every grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from sdebench.errors import unknown
from sdebench.estimator import Array, Estimator
from sdebench.simulate import primitives
from sdebench.simulate.tables import MixtureTables, Tables, starts_from_density
from sdebench.simulate.tile import (
    block_loop,
    clear,
    combine,
    glue,
    lanes,
    load,
    store,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View

ANNEALING = {"linear": 1, "quadratic": 2, "cubic": 3}
"""Exponents of the level lambda in the share of steps done."""
BACKWARD = ("matched", "noising")
"""Variances of the backward kernels."""


def levels(n_steps: int, power: int) -> Array:
    """Return lambda_n, (n_steps + 1,)."""
    share: Array = np.arange(n_steps + 1.0) / n_steps
    return share**power


def not_a_path_of_densities(tables: Tables, level: Array | None) -> str | None:
    """Return why rho_t is no path from the law of X_0 to the tilted law, or None.

    ``level`` : lambda_n, (N + 1,); None for paths that are integrable in between.
    """
    if not starts_from_density(tables):
        return (
            "its paths must start from the density p_t of the base process at the "
            "first time, and X_0 has another law here; denoising problems have the "
            "option start = marginal"
        )
    if level is None:
        return None
    assert isinstance(tables, MixtureTables)
    dim = tables.offset.shape[1]
    own = tables.density[:, :, None, dim:-1]
    precision = -2.0 * (
        own + level[:, None, None, None] * tables.reward[None, None, :, dim:-1]
    )
    least = precision.min(axis=(1, 2, 3))
    if np.all(least > 0.0):
        return None
    first = int(np.argmax(least <= 0.0))
    return (
        f"the intermediate density p_t e^(lambda r) is not integrable at step {first} "
        f"of {len(tables.offset)}, where its precision is {least[first]:.6g}: use "
        "another annealing or less curvature in the reward"
    )


class Steps(NamedTuple):
    """Coefficients: g_n, a_n, b_n, h kappa_n (N,) and lambda (N + 1,)."""

    noise: Array
    shrink: Array
    back: Array
    growth: Array
    level: Array


def steps_of(denoiser: Array, power: int, backward: str = "matched") -> Steps:
    """Return the coefficients from the tables' ``denoiser``, see `tables`."""
    by_state, by_mean, by_control, alpha, beta = denoiser.T
    noise, shrink = by_control / by_mean, alpha / np.append(alpha[1:], 1.0)
    back = noise**2
    if backward == "noising":
        back = beta**2 - (shrink * np.append(beta[1:], 0.0)) ** 2
    return Steps(
        noise,
        shrink,
        back,
        (1.0 / alpha - by_state) / by_mean - 1.0,
        levels(len(denoiser), power),
    )


def log_kernel_ratio(
    steps: Steps, n: int, x: Tensor, after: Tensor, slope: Tensor, z: Tensor
) -> Tensor:
    """Return log B_n(x', x) / F_n(x, x'), (n,).

    ``slope`` : grad r(x'); ``z`` : the noise of the step.
    """
    b = steps.back[n]
    back = x - (steps.shrink[n] * after + 0.5 * b * steps.level[n + 1] * slope)
    spread = 0.5 * x.shape[1] * np.log(steps.noise[n] ** 2 / b)
    ratio: Tensor = 0.5 * ((z * z).sum(1) - (back * back).sum(1) / b) + spread
    return ratio


def flow_work(steps: Steps, n: int, x: Tensor, mean: Tensor, slope: Tensor) -> Tensor:
    """Return h lambda v . grad r at x, (n,).

    ``mean`` : of the base step from x; ``slope`` : grad r(x).
    """
    flow = 0.5 * (mean - x + steps.growth[n] * x)  # h v
    work: Tensor = steps.level[n] * (flow * slope).sum(1)
    return work


# ---- the same for kernels ------------------------------------------------------
@glue
def level(n, N, power):  # type: ignore[no-untyped-def]
    """Return lambda_n."""
    return (n / N) ** power


@glue
def uniform(z):  # type: ignore[no-untyped-def]
    """Return the standard normal distribution function of z."""
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


@glue
def step_noise(prepared, n):  # type: ignore[no-untyped-def]
    """Return g_n."""
    return prepared.denoiser[n, 2] / prepared.denoiser[n, 1]


@glue
def step_shrink(prepared, n, N):  # type: ignore[no-untyped-def]
    """Return a_n."""
    after = 1.0
    if n + 1 < N:
        after = prepared.denoiser[n + 1, 3]
    return prepared.denoiser[n, 3] / after


@glue
def step_back(prepared, n, N, noising):  # type: ignore[no-untyped-def]
    """Return b_n."""
    if not noising:
        return step_noise(prepared, n) ** 2
    a, after = step_shrink(prepared, n, N), 0.0
    if n + 1 < N:
        after = prepared.denoiser[n + 1, 4]
    return prepared.denoiser[n, 4] ** 2 - (a * after) ** 2


@glue
def step_growth(prepared, n):  # type: ignore[no-untyped-def]
    """Return h kappa_n."""
    row = prepared.denoiser[n]
    return (1.0 / row[3] - row[0]) / row[1] - 1.0


@block_loop
def push(tilt, R, g, Z, Y, B):  # type: ignore[no-untyped-def]
    """Y += tilt R + g Z."""
    for i in range(Y.shape[0]):
        for p in range(0, B, lanes(Y)):
            y = load(Y, i, p) + tilt * load(R, i, p)
            store(Y, i, p, y + g * load(Z, i, p))


@block_loop
def noise_of(tilt, g, X, MEAN, R, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = (x - mean - tilt R) / g."""
    inverse = 1.0 / g
    for i in range(X.shape[0]):
        for p in range(0, B, lanes(X)):
            gap = load(X, i, p) - load(MEAN, i, p) - tilt * load(R, i, p)
            store(OUT, i, p, inverse * gap)


@glue
def forward_step(prepared, work, n, tilt, g, X, R, Z, Y, B):  # type: ignore[no-untyped-def]
    """Y = base mean(x) + tilt R + g z; R = grad r(x)."""
    primitives.base_mean(prepared, work, n, X, Y, B)
    push(tilt, R, g, Z, Y, B)


@block_loop
def add_kernel_ratio(g, a, b, ours, X, Y, R, Z, OUT, B):  # type: ignore[no-untyped-def]
    """OUT[0] += log B_n(y, x) / F_n(x, y); R = grad r(y), ours = lambda_{n+1}."""
    inverse, tilt = 1.0 / b, 0.5 * b * ours
    spread = 0.5 * X.shape[0] * math.log(g * g * inverse)
    for p in range(0, B, lanes(OUT)):
        total = load(OUT, 0, p) + spread
        for i in range(X.shape[0]):
            z = load(Z, i, p)
            back = load(X, i, p) - (a * load(Y, i, p) + tilt * load(R, i, p))
            total = total + 0.5 * (z * z - inverse * (back * back))
        store(OUT, 0, p, total)


@block_loop
def add_riemann_work(growth, ours, rate, X, MEAN, R, REWARD, OUT, B):  # type: ignore[no-untyped-def]
    """OUT[0] += rate r + ours h v . R; R = grad r(x), REWARD[0] = r(x)."""
    for p in range(0, B, lanes(OUT)):
        total = load(REWARD, 0, p) * rate
        for i in range(X.shape[0]):
            x = load(X, i, p)
            flow = load(MEAN, i, p) - x + growth * x
            total = total + (0.5 * ours) * (flow * load(R, i, p))
        store(OUT, 0, p, load(OUT, 0, p) + total)


@block_loop
def add_row(a, ROWS, row, OUT, B):  # type: ignore[no-untyped-def]
    """OUT[0] += a ROWS[row]."""
    for p in range(0, B, lanes(OUT)):
        store(OUT, 0, p, load(OUT, 0, p) + a * load(ROWS, row, p))


@glue
def add_end(prepared, work, sign, n, reward, X, ROWS, OUT, B):  # type: ignore[no-untyped-def]
    """OUT[0] += sign (log p_n(x) + reward r(x))."""
    primitives.base_log_density(prepared, work, n, X, ROWS, 0, B)
    add_row(sign, ROWS, 0, OUT, B)
    if reward:
        primitives.reward(prepared, work, X, ROWS, 0, B)
        add_row(sign, ROWS, 0, OUT, B)


@glue
def add_forward_weight(prepared, work, N, power, noising, START, Z, ROWS, OUT, B):  # type: ignore[no-untyped-def]
    """OUT[0] += log W of every path of the forward chain of N steps from START."""
    A, NEXT, R = work.adjoint, work.adjoint_next, work.direction
    combine(1.0, START, 0.0, START, A, B)
    add_end(prepared, work, -1.0, 0, False, A, ROWS, OUT, B)
    clear(R, B)
    for n in range(N):
        g = step_noise(prepared, n)
        tilt = 0.5 * g * g * level(n, N, power)
        forward_step(prepared, work, n, tilt, g, A, R, Z[n], NEXT, B)
        primitives.reward_gradient(prepared, work, NEXT, R, B)
        a, b = step_shrink(prepared, n, N), step_back(prepared, n, N, noising)
        ours = level(n + 1, N, power)
        add_kernel_ratio(g, a, b, ours, A, NEXT, R, Z[n], OUT, B)
        A, NEXT = NEXT, A
    add_end(prepared, work, 1.0, N, True, A, ROWS, OUT, B)


# ---- what the estimators share --------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class WorkEstimator(Estimator):
    """log Z from chains that follow rho_n; they are simulated from the base's noise."""

    estimand: ClassVar[str] = "log_normalizer"
    reduction: ClassVar[str] = "log_mean_exp"

    annealing: str = "quadratic"

    def __post_init__(self) -> None:
        if self.annealing not in ANNEALING:
            raise unknown("annealing", self.annealing, ANNEALING)

    @property
    def control(self) -> str:
        return "none"

    @property
    def needs_denoiser(self) -> bool:
        return True

    @property
    def power(self) -> int:
        """The exponent of the level."""
        return ANNEALING[self.annealing]

    def n_statistics(self, n_params: int) -> int:
        return 1

    def not_applicable_on(self, tables: Tables, times: Array) -> str | None:
        level = levels(len(tables.offset), self.power)
        return not_a_path_of_densities(tables, level)


@dataclass(frozen=True, kw_only=True)
class KernelRatioEstimator(WorkEstimator):
    """log Z from ratios of backward and forward kernels, at any number of steps."""

    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"backward": "matched"})

    backward: str = "noising"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backward not in BACKWARD:
            raise unknown("backward", self.backward, BACKWARD)

    @property
    def discretization_free(self) -> bool:
        return True

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return self.power, self.backward == "noising"

    def forward_weights(self, view: View) -> Tensor:
        """Return log W of every path of the forward chain, (n,)."""
        steps = steps_of(view.denoiser, self.power, self.backward)
        x = view.start()
        slope = x.new_zeros(x.shape)  # its level is zero
        weight = -view.base_log_density(0, x)
        for n in range(view.n_steps):
            z, tilt = view.noise(n), 0.5 * steps.noise[n] ** 2 * steps.level[n]
            after = view.base_mean(n, x) + tilt * slope + view.apply_noise(n, z)
            slope = view.reward_gradient(after)
            weight = weight + log_kernel_ratio(steps, n, x, after, slope, z)
            x = after
        return weight + view.base_log_density(view.n_steps, x) + view.reward(x)
