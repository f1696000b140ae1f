r"""Escorted chains along rho_n = p_n e^{lambda_n r}: a field that carries the states.

A field c_n(x) = a_n + b_n x, per coordinate and in units of a step, moves the states
besides the Langevin noise of `_work`: forward before the step, backward after it,

    F_n(x, x') = N(x'; base mean(x) + 1/2 g_n^2 lambda_n grad r(x) + c_n(x), g_n^2 I),
    B_n(x', x) = N(x; a x' + 1/2 b lambda_{n+1} grad r(x') - c_n(x'), b I).

Each B_n is a density in x for every field, so that the mean of

    W = rho_N(X_N) / p_0(X_0) prod_n B_n(X_{n+1}, X_n) / F_n(X_n, X_{n+1})

is Z exactly for a field that does not know the paths: here one that was fitted on the
other half of them (cross-fitting).  Without time steps W is constant for the field that
transports the rho_t, div(rho_t w) = -d_t rho_t + rho_t d_t log Z_t - div(rho_t v): on
Gaussian problems it is affine.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from sdebench.composite import CompositeEstimator, Runner, some_paths
from sdebench.estimator import Array, Sizes
from sdebench.estimators._work import (
    Steps,
    WorkEstimator,
    add_end,
    flow_work,
    level,
    levels,
    push,
    step_back,
    step_growth,
    step_noise,
    step_shrink,
    steps_of,
)
from sdebench.simulate import primitives
from sdebench.simulate.noise import Noise
from sdebench.simulate.tile import (
    block_loop,
    clear,
    combine,
    glue,
    lanes,
    load,
    path_kernel,
    store,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View

PATHS_PER_UNKNOWN = 8
"""Paths that fit the field, at least, for every unknown of one regression."""


# ---- for kernels ---------------------------------------------------------------
@block_loop
def escort(FIELD, n, X, Y, B):  # type: ignore[no-untyped-def]
    """Y += c_n(x)."""
    for i in range(X.shape[0]):
        for p in range(0, B, lanes(X)):
            moved = FIELD[n, 0, i] + FIELD[n, 1, i] * load(X, i, p)
            store(Y, i, p, load(Y, i, p) + moved)


@glue
def escorted_step(prepared, work, FIELD, n, tilt, g, X, R, Z, Y, B):  # type: ignore[no-untyped-def]
    """Y = base mean(x) + tilt R + c_n(x) + g z; R = grad r(x)."""
    primitives.base_mean(prepared, work, n, X, Y, B)
    push(tilt, R, g, Z, Y, B)
    escort(FIELD, n, X, Y, B)


@block_loop
def add_escorted_ratio(FIELD, n, g, a, b, ours, X, Y, R, Z, BACK, OUT, B):  # type: ignore[no-untyped-def]
    """OUT[0] += log B_n(y, x) / F_n(x, y), BACK = x - backward mean(y).

    R = grad r(y), ours = lambda_{n+1}.
    """
    inverse, tilt = 1.0 / b, 0.5 * b * ours
    spread = 0.5 * X.shape[0] * np.log(g * g * inverse)
    for p in range(0, B, lanes(OUT)):
        total = load(OUT, 0, p) + spread
        for i in range(X.shape[0]):
            y, z = load(Y, i, p), load(Z, i, p)
            mean = a * y + tilt * load(R, i, p) - (FIELD[n, 0, i] + FIELD[n, 1, i] * y)
            back = load(X, i, p) - mean
            store(BACK, i, p, back)
            total = total + 0.5 * (z * z - inverse * (back * back))
        store(OUT, 0, p, total)


@block_loop
def add_scores(PROFILE, n, g, b, X, Y, Z, BACK, OUT, B):  # type: ignore[no-untyped-def]
    """Add the derivatives of log F_n and log B_n in the field's coefficients."""
    d, J = X.shape[0], PROFILE.shape[0]
    for j in range(J):
        ahead, behind = PROFILE[j, n] / g, -PROFILE[j, n] / b
        row, other = 1 + 2 * j * d, 1 + 2 * (J + j) * d
        for i in range(d):
            for p in range(0, B, lanes(OUT)):
                f, k = ahead * load(Z, i, p), behind * load(BACK, i, p)
                store(OUT, row + i, p, load(OUT, row + i, p) + f)
                s = load(OUT, row + d + i, p) + f * load(X, i, p)
                store(OUT, row + d + i, p, s)
                store(OUT, other + i, p, load(OUT, other + i, p) + k)
                s = load(OUT, other + d + i, p) + k * load(Y, i, p)
                store(OUT, other + d + i, p, s)


@path_kernel
def escorted_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    power: int,
    FIELD: Any,
    PROFILE: Any,
    OUT: Any,
) -> None:
    """Set OUT to the rows of `EscortedWeights`."""
    N, ROWS = W.shape[0], work.start
    A, NEXT, R = work.adjoint, work.adjoint_next, work.direction
    clear(OUT, B)
    combine(1.0, X[0], 0.0, X[0], A, B)
    add_end(prepared, work, -1.0, 0, False, A, ROWS, OUT, B)
    clear(R, B)  # its level is zero
    for n in range(N):
        g, tilt = step_noise(prepared, n), 0.5 * level(n, N, power)
        escorted_step(prepared, work, FIELD, n, tilt * g * g, g, A, R, Z[n], NEXT, B)
        primitives.reward_gradient(prepared, work, NEXT, R, B)
        a, b = step_shrink(prepared, n, N), step_back(prepared, n, N, True)
        ours = level(n + 1, N, power)
        add_escorted_ratio(FIELD, n, g, a, b, ours, A, NEXT, R, Z[n], ROWS, OUT, B)
        add_scores(PROFILE, n, g, b, A, NEXT, Z[n], ROWS, OUT, B)
        A, NEXT = NEXT, A
    add_end(prepared, work, 1.0, N, True, A, ROWS, OUT, B)


@block_loop
def store_terms(growth, g, ours, rate, X, MEAN, R, REWARD, OUT, row, B):  # type: ignore[no-untyped-def]
    """Rows from ``row``: x, grad log rho_n(x), rate r + ours h v . grad r."""
    d, inverse = X.shape[0], 1.0 / (g * g)
    for p in range(0, B, lanes(OUT)):
        total = load(REWARD, 0, p) * rate
        for i in range(d):
            x, r = load(X, i, p), load(R, i, p)
            drift, grown = load(MEAN, i, p) - x, growth * x
            store(OUT, row + i, p, x)
            store(OUT, row + d + i, p, inverse * (drift - grown) + ours * r)
            total = total + (0.5 * ours) * ((drift + grown) * r)
        store(OUT, row + 2 * d, p, total)


@path_kernel
def terms_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    power: int,
    FIELD: Any,
    OUT: Any,
) -> None:
    """Set OUT to the rows of `EscortedTerms`."""
    N, ROWS = W.shape[0], work.start
    A, NEXT, R = work.adjoint, work.adjoint_next, work.direction
    combine(1.0, X[0], 0.0, X[0], A, B)
    for n in range(N):
        g, ours = step_noise(prepared, n), level(n, N, power)
        rate, growth = power * level(n, N, power - 1) / N, step_growth(prepared, n)
        primitives.reward(prepared, work, A, ROWS, 0, B)
        primitives.reward_gradient(prepared, work, A, R, B)
        primitives.base_mean(prepared, work, n, A, NEXT, B)
        row = n * (2 * A.shape[0] + 1)
        store_terms(growth, g, ours, rate, A, NEXT, R, ROWS, OUT, row, B)
        push(0.5 * g * g * ours, R, g, Z[n], NEXT, B)
        escort(FIELD, n, A, NEXT, B)
        A, NEXT = NEXT, A


# ---- simulations with a given field ---------------------------------------------
@dataclass(frozen=True, kw_only=True)
class EscortedWeights(WorkEstimator):
    """Log-weights of escorted paths: not an estimator, but what composites ask for.

    Rows: log W (1), and for J temporal profiles its derivatives at fixed states, those
    of sum log F_n (2 J d) and of sum log B_n (2 J d), in the coefficients of
    c_n = sum_j profile_jn (a_j + b_j x), ordered (j, a or b, coordinate).

    Parameters
    ----------
    fields : (N, 2, d) a_n and b_n.
    profile : (J, N).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reward_gradient", "base_density"})
    block_kernel = staticmethod(escorted_kernel)

    fields: Array = field(compare=False)
    profile: Array = field(compare=False)

    @property
    def kernel_options(self) -> tuple[Any, ...]:
        return self.power, self.fields, self.profile

    def n_statistics(self, n_params: int) -> int:
        return 1 + 4 * len(self.profile) * self.fields.shape[2]

    def statistics(self, view: View) -> Tensor:
        import torch

        steps = steps_of(view.denoiser, self.power, "noising")
        x = view.start()
        fields, profile = x.new_tensor(self.fields), x.new_tensor(self.profile.T)
        slope = torch.zeros_like(x)  # its level is zero
        weight = -view.base_log_density(0, x)
        size = 2 * len(self.profile) * view.dim
        ahead, behind = x.new_zeros(2, view.n_paths, size)
        for n in range(view.n_steps):
            z, g, b = view.noise(n), steps.noise[n], steps.back[n]
            after = view.base_mean(n, x) + 0.5 * g**2 * steps.level[n] * slope
            after = after + fields[n, 0] + fields[n, 1] * x + view.apply_noise(n, z)
            slope = view.reward_gradient(after)
            back = escorted_gap(steps, n, x, after, slope, fields[n])
            spread = 0.5 * view.dim * np.log(g**2 / b)
            square = (z * z).sum(1) - (back * back).sum(1) / b
            weight = weight + 0.5 * square + spread
            for total, factor, v, state in (
                (ahead, 1.0 / g, z, x),
                (behind, -1.0 / b, back, after),
            ):
                part = torch.cat([v, v * state], 1)
                total += factor * torch.einsum("j,pi->pji", profile[n], part).flatten(1)
            x = after
        weight = weight + view.base_log_density(view.n_steps, x) + view.reward(x)
        return torch.cat([weight[:, None], ahead, behind], 1)


def escorted_gap(
    steps: Steps, n: int, x: Tensor, after: Tensor, slope: Tensor, c: Tensor
) -> Tensor:
    """Return x minus the mean of B_n(after, .); ``slope`` : grad r(after)."""
    tilt = 0.5 * steps.back[n] * steps.level[n + 1]
    mean = steps.shrink[n] * after + tilt * slope - (c[0] + c[1] * after)
    return x - mean


@dataclass(frozen=True, kw_only=True)
class EscortedTerms(WorkEstimator):
    """Terms of the continuity equation along escorted paths, for composites.

    Rows, for every step: x (d), grad log rho_n(x) (d), and what the field has to make
    up for, h (lambda' r + lambda v . grad r)(x) (1).

    Parameters
    ----------
    fields : (N, 2, d) a_n and b_n.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reward_gradient"})
    block_kernel = staticmethod(terms_kernel)

    fields: Array = field(compare=False)

    @property
    def kernel_options(self) -> tuple[Any, ...]:
        return self.power, self.fields

    def n_statistics(self, n_params: int) -> int:
        return len(self.fields) * (2 * self.fields.shape[2] + 1)

    def statistics(self, view: View) -> Tensor:
        import torch

        power, count = self.power, view.n_steps
        steps = steps_of(view.denoiser, power)
        rates = power * levels(count, power - 1) / count
        x, rows = view.start(), []
        fields = x.new_tensor(self.fields)
        for n in range(count):
            slope, mean = view.reward_gradient(x), view.base_mean(n, x)
            work = rates[n] * view.reward(x) + flow_work(steps, n, x, mean, slope)
            score = (mean - x - steps.growth[n] * x) / steps.noise[n] ** 2
            rows += [x, score + steps.level[n] * slope, work[:, None]]
            tilt = 0.5 * steps.noise[n] ** 2 * steps.level[n]
            x = mean + tilt * slope + fields[n, 0] + fields[n, 1] * x
            x = x + view.apply_noise(n, view.noise(n))
        return torch.cat(rows, 1)


# ---- what the estimators share --------------------------------------------------
class Half(NamedTuple):
    """Some paths of a block: the number of the first, and their noise."""

    first: int
    noise: Noise

    def run(self, runner: Runner, inner: WorkEstimator) -> Array:
        """Return the statistics (C, n) of these paths."""
        return runner.run(inner, noise=self.noise, first=self.first)[0]


@dataclass(frozen=True, kw_only=True)
class EscortedEstimator(WorkEstimator, CompositeEstimator):
    """log Z from paths escorted by a field that was fitted on others."""

    needs: ClassVar[frozenset[str]] = frozenset({"reward_gradient", "base_density"})

    rounds: int = 3

    @abstractmethod
    def fit(self, runner: Runner, paths: Half) -> Array:
        """Return the field (N, 2, d) fitted on some paths."""

    @abstractmethod
    def unknowns(self, dim: int) -> int:
        """Return the number of coefficients of one regression."""

    @property
    def discretization_free(self) -> bool:
        return True

    def group_size(self, n_paths: int) -> int:
        return n_paths

    def not_applicable(self, n_paths: int) -> str | None:
        if n_paths < 2:
            return "it fits its field on one half of the paths and weighs the other"
        return None

    def not_applicable_to(self, sizes: Sizes) -> str | None:
        count = self.unknowns(sizes.dim)
        if sizes.n_paths // 2 >= PATHS_PER_UNKNOWN * count:
            return None
        return (
            f"its field has {count} coefficients in dimension {sizes.dim}, for which "
            f"each half of the paths must hold {PATHS_PER_UNKNOWN * count}; n_paths = "
            f"{sizes.n_paths}"
        )

    def halves(self, runner: Runner) -> tuple[Half, Half]:
        """Return the two halves of a block's paths."""
        noise, middle = runner.noise(), runner.n_paths // 2
        return (
            Half(0, some_paths(noise, 0, middle)),
            Half(middle, some_paths(noise, middle, runner.n_paths - middle)),
        )

    def cross_fitted(self, runner: Runner) -> Array:
        """Return the log-weights (1, n_paths) under the other half's field."""
        one, two = self.halves(runner)
        parts = []
        for mine, other in ((one, two), (two, one)):
            fields = self.fit(runner, other)
            inner = EscortedWeights(
                annealing=self.annealing,
                fields=fields,
                profile=np.zeros((0, runner.n_steps)),
            )
            parts.append(mine.run(runner, inner))
        return np.concatenate(parts, axis=1)
