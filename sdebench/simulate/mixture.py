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

As sum a_k = 0, the part of (dlin_kp, dquad_kp, dconst_kp) that all k share needs no sum
over k.  Of the rest, each coefficient that is not zero for all k is contracted with
a_k and gamma_k first, and then multiplied by its feature of x and of v.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from sdebench.simulate.elementary import log
from sdebench.simulate.noise import fill_start_normals, fill_start_uniform
from sdebench.simulate.tables import Array, MixtureTables, noise_mask
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
    below: Scores  # what is subtracted from it, or no components
    derivative_shared: Array  # (N, P, F): d[lin, quad] of component 0
    derivative_constant: Array  # (N, P, K): dconst minus that of component 0
    derivative_rest: Array  # (N, M, K): the other d[lin, quad] that differ from it
    rest_parameter: Array  # (M,) p of each
    rest_feature: Array  # (M,) its feature
    start_cumulative: Array  # (Ks,)
    start_mean: Array  # (Ks, d)
    start_scale: Array  # (Ks, d)
    noisy: Array  # (N,) 1 or 0
    denoiser: Array  # (N or 0, 5)
    density: Scores  # of N + 1 times, or none
    end_cumulative: Array  # (Ke,)
    end_mean: Array  # (Ke, d)
    end_scale: Array  # (Ke, d)


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
    below: ScoresWork
    density: ScoresWork
    features: Array  # (F, .) of the state
    along: Array  # (F, .) of the direction
    rest: Array  # (M, .)
    rest_mean: Array  # (M, .)
    start: Array  # (d rounded up to 4, .)
    uniform: Array  # (B + PADDING,) float64
    words: Array  # (4, .) uint32
    zero: Array  # (max(K, F, M),)


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


def split_derivative(rows: Array, features: int, dim: int) -> tuple[Array, Array]:
    """Split rows (P, N, K, 2d + 1) into component 0 and differences from it.

    The first (P, N, F) has no constants, the second (P, N, K, F + 1) has them last.
    Differences of a few rounding errors are zero.
    """
    rows = np.concatenate([rows[..., :features], rows[..., 2 * dim :]], axis=3)
    rest = rows - rows[:, :, :1]
    largest = np.max(np.abs(rows), axis=2, keepdims=True)
    rest[np.abs(rest) <= 16.0 * np.finfo(rows.dtype).eps * largest] = 0.0
    return rows[:, :, 0, :features], rest


def prepare_mixture(tables: MixtureTables, dtype: DTypeLike) -> PreparedMixture:
    """Return the tables as the kernels want them, in ``dtype``."""

    def cast(array: Array) -> Array:
        return np.array(array, dtype, order="C")

    dim = tables.scale.shape[1]
    reward = tables.reward[None]
    derivative = tables.tilted_derivative
    density, below = tables.density, tables.reward_below[None]
    if len(density) == 0:
        density = np.zeros((0, 0, 2 * dim + 1))
    if below.size == 0:
        below = np.zeros((1, 0, 2 * dim + 1))
    quadratics = (tables.base, tables.tilted, reward, below, derivative, density)
    isotropic = all(is_isotropic(rows, dim) for rows in quadratics)
    shared, rest = split_derivative(derivative, dim + 1 if isotropic else 2 * dim, dim)
    parameter, feature = np.nonzero(np.any(rest[..., :-1] != 0.0, axis=(1, 2)))
    return PreparedMixture(
        derivative.shape[0],
        cast(tables.scale),
        cast(tables.offset),
        cast(tables.base_gain),
        cast(tables.noise),
        cast(tables.control_gain),
        make_scores(tables.base, dim, isotropic, dtype),
        make_scores(tables.tilted, dim, isotropic, dtype),
        make_scores(reward, dim, isotropic, dtype),
        make_scores(below, dim, isotropic, dtype),
        cast(shared.transpose(1, 0, 2)),
        cast(rest[..., -1].transpose(1, 0, 2)),
        cast(rest[parameter, :, :, feature].transpose(1, 0, 2)),
        np.array(parameter, np.int64),
        np.array(feature, np.int64),
        cast(tables.start_cumulative),
        cast(tables.start_mean),
        cast(tables.start_scale),
        cast(noise_mask(tables)),
        cast(tables.denoiser),
        make_scores(density, dim, isotropic, dtype),
        cast(tables.end_cumulative),
        cast(tables.end_mean),
        cast(tables.end_scale),
    )


def work_mixture(prepared: PreparedMixture, block: int) -> MixtureWork:
    """Allocate the scratch for blocks of ``block`` paths."""
    dtype = prepared.scale.dtype
    dim = prepared.scale.shape[1]
    features = prepared.tilted.logit.shape[2]
    width = block + PADDING

    def rows(count: int) -> Array:
        return np.zeros((count, width), dtype)

    mixtures = (
        prepared.base,
        prepared.tilted,
        prepared.reward,
        prepared.below,
        prepared.density,
    )
    most = max(mixture.constant.shape[1] for mixture in mixtures)
    projection = rows(most)  # of one mixture at a time

    def scores(mixture: Scores) -> ScoresWork:
        k = mixture.constant.shape[1]
        return ScoresWork(
            rows(k), rows(1), rows(1), rows(features), rows(dim), projection
        )

    rest = prepared.rest_feature.size
    longest = max(features, rest, *(mixture.constant.shape[1] for mixture in mixtures))
    return MixtureWork(
        rows(dim),
        rows(dim),
        rows(dim),
        scores(prepared.base),
        scores(prepared.tilted),
        scores(prepared.reward),
        scores(prepared.below),
        scores(prepared.density),
        rows(features),
        rows(features),
        rows(rest),
        rows(rest),
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
def project(mixture, state, n, FV, B):  # type: ignore[no-untyped-def]
    """projection_k = gamma_k (g_k . v - s . v)."""
    A, S, E, G = state.projection, state.score, state.weight, mixture.logit[n]
    K, features = G.shape
    whole = K - K % 3
    for p in range(0, B, lanes(A)):
        mean = load(S, 0, p) * load(FV, 0, p)
        for i in range(1, S.shape[0]):
            mean = mean + load(S, i, p) * load(FV, i, p)
        inverse = load(state.inverse, 0, p)
        mean = 0.0 - mean
        for k in range(0, whole, 3):
            y0, y1, y2 = mean, mean, mean
            for j in range(features):
                v = load(FV, j, p)
                y0 = y0 + G[k, j] * v
                y1 = y1 + G[k + 1, j] * v
                y2 = y2 + G[k + 2, j] * v
            store(A, k, p, (load(E, k, p) * inverse) * y0)
            store(A, k + 1, p, (load(E, k + 1, p) * inverse) * y1)
            store(A, k + 2, p, (load(E, k + 2, p) * inverse) * y2)
        for k in range(whole, K):
            y0 = mean
            for j in range(features):
                y0 = y0 + G[k, j] * load(FV, j, p)
            store(A, k, p, (load(E, k, p) * inverse) * y0)


@block_loop
def add_projected(mixture, state, n, X, FV, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += (ds/dx) v after `project`."""
    A, M, Q = state.projection, mixture.moment[n], state.moments
    d = state.score.shape[0]
    features, K = M.shape
    if features == 2 * d or d == 1:
        for i in range(d):
            for p in range(0, B, lanes(X)):
                a = load(A, 0, p)
                y, c = M[i, 0] * a, M[d + i, 0] * a
                for k in range(1, K):
                    a = load(A, k, p)
                    y = y + M[i, k] * a
                    c = c + M[d + i, k] * a
                y = y + c * load(X, i, p) + load(Q, d + i, p) * load(FV, i, p)
                store(OUT, i, p, load(OUT, i, p) + y)
    else:
        for p in range(0, B, lanes(X)):
            a = load(A, 0, p)
            y0, y1, c = M[0, 0] * a, M[1, 0] * a, M[d, 0] * a
            for k in range(1, K):
                a = load(A, k, p)
                y0 = y0 + M[0, k] * a
                y1 = y1 + M[1, k] * a
                c = c + M[d, k] * a
            q = load(Q, d, p)
            y0 = y0 + c * load(X, 0, p) + q * load(FV, 0, p)
            y1 = y1 + c * load(X, 1, p) + q * load(FV, 1, p)
            store(OUT, 0, p, load(OUT, 0, p) + y0)
            store(OUT, 1, p, load(OUT, 1, p) + y1)
            for i in range(2, d):
                y = c * load(X, i, p) + q * load(FV, i, p)
                for k in range(K):
                    y = y + M[i, k] * load(A, k, p)
                store(OUT, i, p, load(OUT, i, p) + y)


@block_loop
def add_hessian(mixture, state, n, X, FV, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += (ds/dx) v, v the first d rows of FV."""
    if state.weight.shape[0] > 0:
        project(mixture, state, n, FV, B)
        add_projected(mixture, state, n, X, FV, OUT, B)


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
def add_rest(parameter, feature, T, M, inverse, FX, FV, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row + parameter] += T FX[feature] + M inverse FV[feature] for every T, M."""
    for r in range(parameter.shape[0]):
        i, j = row + parameter[r], feature[r]
        for p in range(0, B, lanes(OUT)):
            y = load(OUT, i, p) + load(T, r, p) * load(FX, j, p)
            mean = load(M, r, p) * load(inverse, 0, p)
            store(OUT, i, p, y + mean * load(FV, j, p))


@block_loop
def component_states(cumulative, mean, scale, u, Z, X, B):  # type: ignore[no-untyped-def]
    """X = mean_k + scale_k z of the component k that holds the uniform u."""
    components, d = mean.shape
    for i in range(d):
        x, z = X[i], Z[i]
        for p in range(B):
            x[p] = mean[0, i] + scale[0, i] * z[p]
        for k in range(1, components):
            edge = cumulative[k - 1]
            for p in range(B):
                x[p] = mean[k, i] + scale[k, i] * z[p] if u[p] >= edge else x[p]


# Primitives: see primitives.py --------------------------------------------------------


@block_loop
def start(prepared, work, X, B, p0, k0, k1, replicate):  # type: ignore[no-untyped-def]
    """X = mean_k + scale_k z of a random component k."""
    mean, scale = prepared.start_mean, prepared.start_scale
    cumulative, u, Z = prepared.start_cumulative, work.uniform, work.start
    fill_start_normals(Z, work.words, Z.shape[0], B, p0, 0, k0, k1, replicate)
    if mean.shape[0] > 1:
        fill_start_uniform(u, work.words, B, p0, k0, k1, replicate)
    component_states(cumulative, mean, scale, u, Z, X, B)


@glue
def refresh(prepared, work, n, X, B):  # type: ignore[no-untyped-def]
    """State of both mixtures."""
    state_features(X, work.direction.shape[0], work.features, B)
    score(prepared.tilted, work.tilted, n, work.features, work.zero, B)
    score(prepared.base, work.base, n, work.features, work.zero, B)


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
def noise_transpose_at(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """The same at every state."""
    noise_transpose(prepared, work, n, V, OUT, B)


@glue
def base_terms(prepared, work, n, X, b, A, e, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = scale A + (ds_0/dx) (b A + e V)."""
    d = work.direction.shape[0]
    F = work.along
    scale_rows(prepared.scale[n], A, OUT, B)
    if work.base.weight.shape[0] > 0:
        direction_features(X, b, A, e, V, d, F, B)
        add_hessian(prepared.base, work.base, n, X, F, OUT, B)


@glue
def base_vjp(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = a V + b (ds_0/dx) V."""
    b = prepared.base_gain[n]
    base_terms(prepared, work, n, X, b, V, b * 0, V, OUT, B)


@glue
def control_vjp(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += e (ds_1/dx - ds_0/dx) V."""
    d = work.direction.shape[0]
    F = work.along
    e = prepared.control_gain[n]
    direction_features(X, e, V, e * 0, V, d, F, B)
    add_hessian(prepared.tilted, work.tilted, n, X, F, OUT, B)
    direction_features(X, -e, V, e * 0, V, d, F, B)
    add_hessian(prepared.base, work.base, n, X, F, OUT, B)


@glue
def control_parameter_vjp(prepared, work, n, X, V, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row + p] += e (ds_1/dtheta_p)^T V."""
    d = work.direction.shape[0]
    state, F, zero = work.tilted, work.along, work.zero
    K, a, T, M = state.weight.shape[0], state.projection, work.rest, work.rest_mean
    e, rest = prepared.control_gain[n], prepared.derivative_rest[n]
    direction_features(X, e, V, e * 0, V, d, F, B)
    project(prepared.tilted, state, n, F, B)
    add_product(prepared.derivative_shared[n], F, OUT, row, B)
    add_product(prepared.derivative_constant[n], a, OUT, row, B)
    if rest.shape[0] > 0:
        parameter, feature = prepared.rest_parameter, prepared.rest_feature
        affine(rest, K, zero, a, T, B)
        affine(rest, K, zero, state.weight, M, B)
        inverse, FX = state.inverse, work.features
        add_rest(parameter, feature, T, M, inverse, FX, F, OUT, row, B)


@glue
def adjoint(prepared, work, n, X, A, V, NEXT, OUT, B):  # type: ignore[no-untyped-def]
    """NEXT = `base_vjp` of A + `control_vjp` of V; OUT: `control_parameter_vjp`."""
    e = prepared.control_gain[n]
    F = work.along
    base_terms(prepared, work, n, X, prepared.base_gain[n], A, -e, V, NEXT, B)
    # leaves the projection of e V on the tilted mixture, and its features
    control_parameter_vjp(prepared, work, n, X, V, OUT, 0, B)
    add_projected(prepared.tilted, work.tilted, n, X, F, NEXT, B)


@glue
def running_cost(prepared, work, n, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """Nothing: there is none."""


@glue
def running_cost_gradient(prepared, work, n, X, OUT, B):  # type: ignore[no-untyped-def]
    """Nothing."""


@block_loop
def reward(prepared, work, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] = log sum_k exp l_k(x), minus the same of ``below``."""
    state, below = work.reward, work.below
    state_features(X, work.direction.shape[0], work.along, B)
    weigh(prepared.reward, state, 0, work.along, B)
    out, top, inverse = OUT[row], state.top[0], state.inverse[0]
    for p in range(B):
        out[p] = top[p] - log(inverse[p])
    if below.weight.shape[0] > 0:
        weigh(prepared.below, below, 0, work.along, B)
        for p in range(B):
            out[p] -= below.top[0, p] - log(below.inverse[0, p])


@block_loop
def reward_gradient(prepared, work, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = score of the reward's mixture, minus that of ``below``."""
    state_features(X, work.direction.shape[0], work.along, B)
    score(prepared.reward, work.reward, 0, work.along, work.zero, B)
    S = work.reward.score
    combine(1.0, S, 0.0, S, OUT, B)
    if work.below.weight.shape[0] > 0:
        score(prepared.below, work.below, 0, work.along, work.zero, B)
        combine(1.0, OUT, -1.0, work.below.score, OUT, B)


@block_loop
def shift(a, c, b, X, S, Y, B):  # type: ignore[no-untyped-def]
    """Y = a x + c + b s."""
    for i in range(S.shape[0]):
        for p in range(0, B, lanes(X)):
            mean = a[i] * load(X, i, p) + c[i]
            store(Y, i, p, mean + b * load(S, i, p))


@glue
def base_mean(prepared, work, n, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = a x + c + b s_0(x)."""
    state_features(X, work.direction.shape[0], work.features, B)
    score(prepared.base, work.base, n, work.features, work.zero, B)
    a, c, b = prepared.scale[n], prepared.offset[n], prepared.base_gain[n]
    shift(a, c, b, X, work.base.score, OUT, B)


@block_loop
def base_log_density(prepared, work, n, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] = log sum_k exp l_k(x) of the density."""
    state = work.density
    state_features(X, work.direction.shape[0], work.along, B)
    weigh(prepared.density, state, n, work.along, B)
    out, top, inverse = OUT[row], state.top[0], state.inverse[0]
    for p in range(B):
        out[p] = top[p] - log(inverse[p])


@glue
def base_score(prepared, work, n, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = score of the density."""
    state_features(X, work.direction.shape[0], work.along, B)
    score(prepared.density, work.density, n, work.along, work.zero, B)
    S = work.density.score
    combine(1.0, S, 0.0, S, OUT, B)


@block_loop
def tilted_sample(prepared, work, u, Z, X, B):  # type: ignore[no-untyped-def]
    """X = mean_k + scale_k z of the tilted law."""
    mean, scale = prepared.end_mean, prepared.end_scale
    component_states(prepared.end_cumulative, mean, scale, u, Z, X, B)
