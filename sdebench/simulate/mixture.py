"""Numba primitives of the mixture family (`MixtureTables`); formulas in tables.py.

For one mixture, with g_k = grad l_k, softmax weights gamma_k and score
s = sum gamma_k g_k, the products with a vector v are

    a_k = gamma_k (g_k . v - s . v)
    (ds/dx) v = sum a_k g_k + 2 (sum gamma_k quad_k) v
    (ds/dtheta_p)^T v = sum_k dlin_kp . (a_k x + gamma_k v)
                        + dquad_kp . (a_k x^2 + 2 gamma_k x v) + dconst_kp a_k

All sums over k are products with two small matrices: ``logit`` maps the features
[x; x^2] to l_k and [v; 2 x v] to g_k . v; ``moment``, [lin; 2 quad]^T, maps weights to
sums.  If every l_k is isotropic the d squares shrink to one row, |x|^2 and 2 x . v.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from sdebench.simulate.elementary import log
from sdebench.simulate.noise import fill_start_normals, fill_start_uniform
from sdebench.simulate.tables import Array, MixtureTables
from sdebench.simulate.tile import (
    PADDING,
    add_product,
    affine,
    block_loop,
    combine,
    exp,
    glue,
    lanes,
    larger,
    load,
    store,
)


class Scores(NamedTuple):
    """The tables of one mixture of K components per step; F features."""

    logit: Array  # (N, K, F)
    constant: Array  # (N, K)
    moment: Array  # (N, F, K)


class PreparedMixture(NamedTuple):
    """`MixtureTables` cast and transposed for the kernels."""

    n_parameters: int
    scale: Array  # (N, d)
    offset: Array  # (N, d)
    base_gain: Array  # (N,)
    noise: Array  # (N,)
    control_gain: Array  # (N,)
    base: Scores
    tilted: Scores
    reward: Scores
    derivative: Array  # (N, P, A): the A coefficients that depend on theta
    active_component: Array  # (A,) k of each
    active_column: Array  # (A,) column of the row [lin, quad, const]; 2d + 1: all quad
    start_cumulative: Array  # (Ks,)
    start_mean: Array  # (Ks, d)
    start_scale: Array  # (Ks, d)


class ScoresWork(NamedTuple):
    """State of one mixture at one step, for all paths of a block."""

    weight: Array  # (K, .) exp(l_k - top)
    top: Array  # (1, .)
    inverse: Array  # (1, .) 1 / sum of the weights
    moments: Array  # (F, .) mean of the rows of ``moment``
    score: Array  # (d, .)
    projection: Array  # (K, .) a_k


class MixtureWork(NamedTuple):
    """Scratch of one thread; every row is ``B + PADDING`` long."""

    adjoint: Array  # (d, .)
    adjoint_next: Array  # (d, .)
    direction: Array  # (d, .)
    base: ScoresWork
    tilted: ScoresWork
    reward: ScoresWork
    features: Array  # (F, .)
    scratch: Array  # (F, .)
    active: Array  # (A, .)
    start: Array  # (d rounded up to 4, .)
    uniform: Array  # (B + PADDING,) float64
    words: Array  # (4, .) uint32
    zero: Array  # (max(K, F),)


def is_isotropic(rows: Array, dim: int) -> bool:
    """Tell whether every quadratic of the rows is a multiple of |x|^2."""
    quad = rows[..., dim : 2 * dim]
    return bool(np.all(quad == quad[..., :1]))


def make_scores(rows: Array, dim: int, isotropic: bool, dtype: DTypeLike) -> Scores:
    """Split rows (N, K, 2d + 1) into the two matrices and the constants."""
    lin, quad = rows[..., :dim], rows[..., dim : dim + 1 if isotropic else 2 * dim]
    logit = np.concatenate([lin, quad], axis=2)
    moment = np.concatenate([lin, 2.0 * quad], axis=2).transpose(0, 2, 1)
    return Scores(
        np.array(logit, dtype, order="C"),
        np.array(rows[..., 2 * dim], dtype, order="C"),
        np.array(moment, dtype, order="C"),
    )


def prepare_mixture(tables: MixtureTables, dtype: DTypeLike) -> PreparedMixture:
    """Return the tables as the kernels want them, in ``dtype``."""

    def cast(array: Array) -> Array:
        return np.array(array, dtype, order="C")

    dim = tables.scale.shape[1]
    reward = tables.reward[None]
    isotropic = all(is_isotropic(r, dim) for r in (tables.base, tables.tilted, reward))
    derivative = tables.tilted_derivative
    n_parameters, n_steps, _, _ = derivative.shape
    if is_isotropic(derivative, dim):
        # one coefficient of |x|^2 instead of d equal ones
        square = derivative[..., dim : dim + 1]
        hidden = np.zeros_like(derivative[..., dim : 2 * dim])
        parts = (derivative[..., :dim], hidden, derivative[..., 2 * dim :], square)
        derivative = np.concatenate(parts, axis=3)
    component, column = np.nonzero(np.any(derivative != 0.0, axis=(0, 1)))
    active = derivative[:, :, component, column].transpose(1, 0, 2)
    if n_parameters == 0:
        active = np.zeros((n_steps, 0, component.size))
    return PreparedMixture(
        n_parameters,
        cast(tables.scale),
        cast(tables.offset),
        cast(tables.base_gain),
        cast(tables.noise),
        cast(tables.control_gain),
        make_scores(tables.base, dim, isotropic, dtype),
        make_scores(tables.tilted, dim, isotropic, dtype),
        make_scores(reward, dim, isotropic, dtype),
        cast(active),
        np.array(component, np.int64),
        np.array(column, np.int64),
        cast(tables.start_cumulative),
        cast(tables.start_mean),
        cast(tables.start_scale),
    )


def work_mixture(prepared: PreparedMixture, block: int) -> MixtureWork:
    """Allocate the scratch for blocks of ``block`` paths."""
    dtype = prepared.scale.dtype
    dim = prepared.scale.shape[1]
    features = prepared.tilted.logit.shape[2]
    width = block + PADDING

    def rows(count: int) -> Array:
        return np.zeros((count, width), dtype)

    def scores(mixture: Scores) -> ScoresWork:
        k = mixture.constant.shape[1]
        return ScoresWork(rows(k), rows(1), rows(1), rows(features), rows(dim), rows(k))

    three = (prepared.base, prepared.tilted, prepared.reward)
    longest = max(features, *(mixture.constant.shape[1] for mixture in three))
    return MixtureWork(
        rows(dim),
        rows(dim),
        rows(dim),
        scores(prepared.base),
        scores(prepared.tilted),
        scores(prepared.reward),
        rows(features),
        rows(features),
        rows(max(prepared.active_column.size, 1)),
        rows(-(-dim // 4) * 4),
        np.zeros(width),
        np.zeros((4, width), np.uint32),
        np.zeros(longest, dtype),
    )


# One mixture --------------------------------------------------------------------------


@block_loop
def state_features(X, d, FX, B):  # type: ignore[no-untyped-def]
    """FX = [x; x^2], or [x; |x|^2] if it has d + 1 rows."""
    if FX.shape[0] == 2 * d:
        for i in range(d):
            for p in range(0, B, lanes(X)):
                x = load(X, i, p)
                store(FX, i, p, x)
                store(FX, d + i, p, x * x)
    else:
        for p in range(0, B, lanes(X)):
            x = load(X, 0, p)
            total = x * x
            store(FX, 0, p, x)
            for i in range(1, d):
                x = load(X, i, p)
                total = total + x * x
                store(FX, i, p, x)
            store(FX, d, p, total)


@block_loop
def direction_features(X, a, U, b, V, d, FV, B):  # type: ignore[no-untyped-def]
    """FV = [v; 2 x v], or [v; 2 x . v], of v = a U + b V."""
    if FV.shape[0] == 2 * d:
        for i in range(d):
            for p in range(0, B, lanes(X)):
                v = a * load(U, i, p) + b * load(V, i, p)
                x = load(X, i, p)
                store(FV, i, p, v)
                store(FV, d + i, p, (x + x) * v)
    else:
        for p in range(0, B, lanes(X)):
            v = a * load(U, 0, p) + b * load(V, 0, p)
            total = v * load(X, 0, p)
            store(FV, 0, p, v)
            for i in range(1, d):
                v = a * load(U, i, p) + b * load(V, i, p)
                total = total + v * load(X, i, p)
                store(FV, i, p, v)
            store(FV, d, p, total + total)


@block_loop
def weigh(mixture, state, n, FX, B):  # type: ignore[no-untyped-def]
    """Softmax weights of the components."""
    E = state.weight
    affine(mixture.logit[n], FX.shape[0], mixture.constant[n], FX, E, B)
    for p in range(0, B, lanes(E)):
        top = load(E, 0, p)
        for k in range(1, E.shape[0]):
            top = larger(top, load(E, k, p))
        e = exp(load(E, 0, p) - top)
        store(E, 0, p, e)
        total = e
        for k in range(1, E.shape[0]):
            e = exp(load(E, k, p) - top)
            store(E, k, p, e)
            total = total + e
        store(state.top, 0, p, top)
        store(state.inverse, 0, p, 1.0 / total)


@block_loop
def score(mixture, state, n, FX, zero, B):  # type: ignore[no-untyped-def]
    """Fill the whole state: weights, moments and score (zero without components)."""
    S, M = state.score, state.moments
    d, features = S.shape[0], M.shape[0]
    K = state.weight.shape[0]
    if K == 0:
        return
    weigh(mixture, state, n, FX, B)
    affine(mixture.moment[n], K, zero, state.weight, M, B)
    for p in range(0, B, lanes(S)):
        inverse = load(state.inverse, 0, p)
        q = load(M, d, p) * inverse
        store(M, d, p, q)
        for i in range(d):
            if features == 2 * d and i > 0:
                q = load(M, d + i, p) * inverse
                store(M, d + i, p, q)
            store(S, i, p, load(M, i, p) * inverse + q * load(FX, i, p))


@block_loop
def project(mixture, state, n, FV, zero, B):  # type: ignore[no-untyped-def]
    """projection_k = gamma_k (g_k . v - s . v)."""
    A, S, E = state.projection, state.score, state.weight
    affine(mixture.logit[n], FV.shape[0], zero, FV, A, B)
    for p in range(0, B, lanes(A)):
        mean = load(S, 0, p) * load(FV, 0, p)
        for i in range(1, S.shape[0]):
            mean = mean + load(S, i, p) * load(FV, i, p)
        inverse = load(state.inverse, 0, p)
        for k in range(A.shape[0]):
            store(A, k, p, (load(E, k, p) * inverse) * (load(A, k, p) - mean))


@block_loop
def add_projected(mixture, state, n, X, FV, scratch, zero, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += (ds/dx) v after `project`."""
    d, features = state.score.shape[0], FV.shape[0]
    affine(mixture.moment[n], state.weight.shape[0], zero, state.projection, scratch, B)
    for p in range(0, B, lanes(X)):
        c = load(scratch, d, p)
        q = load(state.moments, d, p)
        for i in range(d):
            if features == 2 * d and i > 0:
                c = load(scratch, d + i, p)
                q = load(state.moments, d + i, p)
            y = load(scratch, i, p) + c * load(X, i, p) + q * load(FV, i, p)
            store(OUT, i, p, load(OUT, i, p) + y)


@block_loop
def add_hessian(mixture, state, n, X, FV, scratch, zero, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += (ds/dx) v, v the first d rows of FV."""
    if state.weight.shape[0] > 0:
        project(mixture, state, n, FV, zero, B)
        add_projected(mixture, state, n, X, FV, scratch, zero, OUT, B)


@block_loop
def control(e, S0, S1, W, B):  # type: ignore[no-untyped-def]
    """W = e (S1 - S0)."""
    for i in range(S1.shape[0]):
        for p in range(0, B, lanes(W)):
            store(W, i, p, e * (load(S1, i, p) - load(S0, i, p)))


@block_loop
def finish(a, c, b, g, X, S0, W, Z, Y, totals, B):  # type: ignore[no-untyped-def]
    """Y = a x + c + b s_0 + g (w + z), and the totals of the step."""
    for p in range(0, B, lanes(X)):
        square = load(totals, 0, p)
        martingale = load(totals, 2, p)
        for i in range(S0.shape[0]):
            w = load(W, i, p)
            z = load(Z, i, p)
            square = square + w * w
            martingale = martingale + w * z
            mean = (a[i] * load(X, i, p) + c[i]) + b * load(S0, i, p)
            store(Y, i, p, mean + g * (w + z))
        store(totals, 0, p, square)
        store(totals, 2, p, martingale)


@block_loop
def scale_rows(a, X, Y, B):  # type: ignore[no-untyped-def]
    """Y = a x."""
    for i in range(a.shape[0]):
        for p in range(0, B, lanes(X)):
            store(Y, i, p, a[i] * load(X, i, p))


@block_loop
def parameter_features(component, column, state, X, F, T, d, B):  # type: ignore[no-untyped-def]
    """T = what multiplies each active coefficient in (ds/dtheta)^T v, after `project`.

    F holds v in its first d rows.
    """
    for q in range(column.shape[0]):
        k, j = component[q], column[q]
        if j < d:
            for p in range(0, B, lanes(X)):
                a = load(state.projection, k, p)
                gamma = load(state.weight, k, p) * load(state.inverse, 0, p)
                store(T, q, p, a * load(X, j, p) + gamma * load(F, j, p))
        elif j < 2 * d:
            for p in range(0, B, lanes(X)):
                a = load(state.projection, k, p)
                gamma = load(state.weight, k, p) * load(state.inverse, 0, p)
                x = load(X, j - d, p)
                y = (a * x) * x + gamma * ((x + x) * load(F, j - d, p))
                store(T, q, p, y)
        elif j == 2 * d:
            for p in range(0, B, lanes(X)):
                store(T, q, p, load(state.projection, k, p))
        else:
            for p in range(0, B, lanes(X)):
                a = load(state.projection, k, p)
                gamma = load(state.weight, k, p) * load(state.inverse, 0, p)
                x = load(X, 0, p)
                squares = x * x
                cross = x * load(F, 0, p)
                for i in range(1, d):
                    x = load(X, i, p)
                    squares = squares + x * x
                    cross = cross + x * load(F, i, p)
                store(T, q, p, a * squares + gamma * (cross + cross))


# Primitives: see primitives.py --------------------------------------------------------


@block_loop
def start(prepared, work, X, B, p0, k0, k1, replicate):  # type: ignore[no-untyped-def]
    """X = mean_k + scale_k z of a random component k."""
    mean, scale = prepared.start_mean, prepared.start_scale
    cumulative, u, Z = prepared.start_cumulative, work.uniform, work.start
    components, d = mean.shape
    fill_start_normals(Z, work.words, Z.shape[0], B, p0, 0, k0, k1, replicate)
    if components > 1:
        fill_start_uniform(u, work.words, B, p0, k0, k1, replicate)
    for i in range(d):
        x, z = X[i], Z[i]
        for p in range(B):
            x[p] = mean[0, i] + scale[0, i] * z[p]
        for k in range(1, components):
            edge = cumulative[k - 1]
            for p in range(B):
                x[p] = mean[k, i] + scale[k, i] * z[p] if u[p] >= edge else x[p]


@glue
def refresh(prepared, work, n, X, B):  # type: ignore[no-untyped-def]
    """State of both mixtures."""
    state_features(X, work.direction.shape[0], work.features, B)
    score(prepared.base, work.base, n, work.features, work.zero, B)
    score(prepared.tilted, work.tilted, n, work.features, work.zero, B)


@glue
def refresh_control(prepared, work, n, X, B):  # type: ignore[no-untyped-def]
    """State of the tilted mixture."""
    state_features(X, work.direction.shape[0], work.features, B)
    score(prepared.tilted, work.tilted, n, work.features, work.zero, B)


@glue
def evaluate(prepared, work, n, X, W, B):  # type: ignore[no-untyped-def]
    """W = e (s_1 - s_0)."""
    refresh(prepared, work, n, X, B)
    control(prepared.control_gain[n], work.base.score, work.tilted.score, W, B)


@glue
def step(prepared, work, n, X, W, Z, Y, totals, B):  # type: ignore[no-untyped-def]
    """Y = a x + c + b s_0 + g (w + z)."""
    a, c = prepared.scale[n], prepared.offset[n]
    b, g = prepared.base_gain[n], prepared.noise[n]
    finish(a, c, b, g, X, work.base.score, W, Z, Y, totals, B)


@glue
def noise_transpose(prepared, work, n, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = g V."""
    g = prepared.noise[n]
    combine(g, V, g * 0, V, OUT, B)


@glue
def base_terms(prepared, work, n, X, b, A, e, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = scale A + (ds_0/dx) (b A + e V)."""
    d = work.direction.shape[0]
    F = work.features
    scale_rows(prepared.scale[n], A, OUT, B)
    if work.base.weight.shape[0] > 0:
        direction_features(X, b, A, e, V, d, F, B)
        add_hessian(prepared.base, work.base, n, X, F, work.scratch, work.zero, OUT, B)


@glue
def base_vjp(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = a V + b (ds_0/dx) V."""
    b = prepared.base_gain[n]
    base_terms(prepared, work, n, X, b, V, b * 0, V, OUT, B)


@glue
def control_vjp(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += e (ds_1/dx - ds_0/dx) V."""
    d = work.direction.shape[0]
    F, S, zero = work.features, work.scratch, work.zero
    e = prepared.control_gain[n]
    direction_features(X, e, V, e * 0, V, d, F, B)
    add_hessian(prepared.tilted, work.tilted, n, X, F, S, zero, OUT, B)
    direction_features(X, -e, V, e * 0, V, d, F, B)
    add_hessian(prepared.base, work.base, n, X, F, S, zero, OUT, B)


@glue
def control_parameter_vjp(prepared, work, n, X, V, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row + p] += e (ds_1/dtheta_p)^T V."""
    d = work.direction.shape[0]
    state, F, T = work.tilted, work.features, work.active
    e = prepared.control_gain[n]
    direction_features(X, e, V, e * 0, V, d, F, B)
    project(prepared.tilted, state, n, F, work.zero, B)
    component, column = prepared.active_component, prepared.active_column
    parameter_features(component, column, state, X, F, T, d, B)
    add_product(prepared.derivative[n], T, OUT, row, B)


@glue
def adjoint(prepared, work, n, X, A, V, NEXT, OUT, B):  # type: ignore[no-untyped-def]
    """NEXT = `base_vjp` of A + `control_vjp` of V; OUT: `control_parameter_vjp`."""
    e = prepared.control_gain[n]
    F, S, zero = work.features, work.scratch, work.zero
    base_terms(prepared, work, n, X, prepared.base_gain[n], A, -e, V, NEXT, B)
    # leaves the projection of e V on the tilted mixture, and its features
    control_parameter_vjp(prepared, work, n, X, V, OUT, 0, B)
    add_projected(prepared.tilted, work.tilted, n, X, F, S, zero, NEXT, B)


@glue
def running_cost(prepared, work, n, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """Nothing: there is none."""


@glue
def running_cost_gradient(prepared, work, n, X, OUT, B):  # type: ignore[no-untyped-def]
    """Nothing."""


@block_loop
def reward(prepared, work, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] = log sum_k exp l_k(x)."""
    state = work.reward
    state_features(X, work.direction.shape[0], work.features, B)
    weigh(prepared.reward, state, 0, work.features, B)
    out, top, inverse = OUT[row], state.top[0], state.inverse[0]
    for p in range(B):
        out[p] = top[p] - log(inverse[p])


@block_loop
def reward_gradient(prepared, work, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = score of the reward's mixture."""
    state_features(X, work.direction.shape[0], work.features, B)
    score(prepared.reward, work.reward, 0, work.features, work.zero, B)
    S = work.reward.score
    combine(1.0, S, 0.0, S, OUT, B)
