"""Numba primitives of the sine family (`SineTables`); formulas in tables.py.

Everything is linear in the extended state y = (x, sin(A x + b)), which `evaluate` and
`refresh` keep in ``work`` beside the slopes cos(A x + b).  Another nonlinearity than
the sine is another `extend`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from sdebench.simulate.noise import fill_start_normals
from sdebench.simulate.tables import Array, SineTables, noise_mask
from sdebench.simulate.tile import (
    PADDING,
    add_product,
    affine,
    block_loop,
    clear,
    fill,
    glue,
    lanes,
    load,
    sincos,
    store,
)


class PreparedSine(NamedTuple):
    """`SineTables` cast and transposed for the kernels; D = d + K."""

    n_parameters: int
    direction: Array  # (K, d)
    phase: Array  # (K,)
    transition: Array  # (N, d, D)
    transition_transposed: Array  # (N, D, d)
    offset: Array  # (N, d)
    noise: Array  # (N, d, d)
    noise_transposed: Array  # (N, d, d)
    gain: Array  # (N, d, D)
    gain_transposed: Array  # (N, D, d)
    bias: Array  # (N, d)
    gain_derivative: Array  # (N, P d, D)
    bias_derivative: Array  # (N, P d)
    running_quadratic: Array  # (N, d, d)
    running_linear: Array  # (N, D)
    running_constant: Array  # (N,)
    reward_quadratic: Array  # (d, d), of -r
    reward_linear: Array  # (D,), of -r
    reward_constant: Array  # (1,), of -r
    start_mean: Array  # (d,)
    start_factor: Array  # (d, d)
    noisy: Array  # (N,) 1 or 0
    denoiser: Array  # (N or 0, 5)


class SineWork(NamedTuple):
    """Scratch of one thread; every row is ``B + PADDING`` long."""

    adjoint: Array  # (d, .)
    adjoint_next: Array  # (d, .)
    direction: Array  # (d, .)
    extended: Array  # (D, .) y
    slope: Array  # (K, .) cos(A x + b)
    last_extended: Array  # (D, .) the same at the end of the paths
    last_slope: Array  # (K, .)
    along: Array  # (D, .) a direction times a matrix
    shocks: Array  # (d, .)
    features: Array  # (P d, .)
    start: Array  # (d rounded up to 4, .)
    words: Array  # (4, .) uint32
    zero: Array  # (D,)


def prepare_sine(tables: SineTables, dtype: DTypeLike) -> PreparedSine:
    """Return the tables as the kernels want them, in ``dtype``."""

    def cast(array: Array) -> Array:
        return np.array(array, dtype, order="C")

    def transposed(array: Array) -> Array:
        return cast(array.transpose(0, 2, 1))

    n_params, n_steps, dim, extended = tables.gain_derivative.shape
    gains = tables.gain_derivative.swapaxes(0, 1)
    biases = tables.bias_derivative.swapaxes(0, 1)
    return PreparedSine(
        n_params,
        cast(tables.direction),
        cast(tables.phase),
        cast(tables.transition),
        transposed(tables.transition),
        cast(tables.offset),
        cast(tables.noise),
        transposed(tables.noise),
        cast(tables.gain),
        transposed(tables.gain),
        cast(tables.bias),
        cast(gains.reshape(n_steps, n_params * dim, extended)),
        cast(biases.reshape(n_steps, n_params * dim)),
        cast(tables.running_quadratic),
        cast(tables.running_linear),
        cast(tables.running_constant),
        cast(tables.reward_quadratic),
        cast(-tables.reward_linear),
        cast(-tables.reward_constant),
        cast(tables.start_mean),
        cast(tables.start_factor),
        cast(noise_mask(tables)),
        cast(tables.denoiser),
    )


def work_sine(prepared: PreparedSine, block: int) -> SineWork:
    """Allocate the scratch for blocks of ``block`` paths."""
    dtype = prepared.offset.dtype
    sines, dim = prepared.direction.shape

    def rows(count: int) -> Array:
        return np.zeros((count, block + PADDING), dtype)

    return SineWork(
        rows(dim),
        rows(dim),
        rows(dim),
        rows(dim + sines),
        rows(sines),
        rows(dim + sines),
        rows(sines),
        rows(dim + sines),
        rows(dim),
        rows(prepared.bias_derivative.shape[1]),
        rows(-(-dim // 4) * 4),
        np.zeros((4, block + PADDING), np.uint32),
        np.zeros(dim + sines, dtype),
    )


# Operators --------------------------------------------------------------------------


@block_loop
def extend(direction, phase, X, Y, slope, B):  # type: ignore[no-untyped-def]
    """Y = (x, sin(A x + b)), slope = cos(A x + b)."""
    K, d = direction.shape
    for p in range(0, B, lanes(X)):
        for i in range(d):
            store(Y, i, p, load(X, i, p))
        for k in range(K):
            angle = fill(X, phase[k])
            for i in range(d):
                angle = angle + direction[k, i] * load(X, i, p)
            s, c = sincos(angle)
            store(Y, d + k, p, s)
            store(slope, k, p, c)


@block_loop
def add_pull(direction, slope, T, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += (dy/dx)^T t."""
    K, d = direction.shape
    for p in range(0, B, lanes(OUT)):
        for i in range(d):
            total = load(OUT, i, p) + load(T, i, p)
            for k in range(K):
                t = load(slope, k, p) * load(T, d + k, p)
                total = total + direction[k, i] * t
            store(OUT, i, p, total)


@block_loop
def finish(W, Z, shocks, totals, B):  # type: ignore[no-untyped-def]
    """Set shocks = w + z, and add to the totals of the step."""
    for p in range(0, B, lanes(W)):
        square = load(totals, 0, p)
        martingale = load(totals, 2, p)
        for i in range(shocks.shape[0]):
            w = load(W, i, p)
            z = load(Z, i, p)
            square = square + w * w
            martingale = martingale + w * z
            store(shocks, i, p, w + z)
        store(totals, 0, p, square)
        store(totals, 2, p, martingale)


@block_loop
def add_dots(features, V, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row + p] += features_p . v."""
    d = V.shape[0]
    for q in range(features.shape[0] // d):
        for p in range(0, B, lanes(V)):
            total = load(OUT, row + q, p)
            for i in range(d):
                total = total + load(features, q * d + i, p) * load(V, i, p)
            store(OUT, row + q, p, total)


@block_loop
def add_cost(F, f, constant, Y, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] += 1/2 x^T F x + f . y + constant."""
    d = F.shape[0]
    for p in range(0, B, lanes(Y)):
        total = load(OUT, row, p) + constant
        for i in range(f.shape[0]):
            total = total + f[i] * load(Y, i, p)
        for i in range(d):
            half = 0.5 * load(Y, i, p)
            for j in range(d):
                total = total + F[i, j] * (half * load(Y, j, p))
        store(OUT, row, p, total)


@block_loop
def add_cost_gradient(direction, F, f, Y, slope, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += F x + (dy/dx)^T f."""
    K, d = direction.shape
    for p in range(0, B, lanes(OUT)):
        for i in range(d):
            total = load(OUT, i, p) + f[i]
            for j in range(d):
                total = total + F[i, j] * load(Y, j, p)
            for k in range(K):
                total = total + (direction[k, i] * f[d + k]) * load(slope, k, p)
            store(OUT, i, p, total)


# Primitives: see primitives.py --------------------------------------------------------


@block_loop
def start(prepared, work, X, B, p0, k0, k1, replicate):  # type: ignore[no-untyped-def]
    """X = m_0 + L_0 z."""
    Z, L = work.start, prepared.start_factor
    fill_start_normals(Z, work.words, Z.shape[0], B, p0, 0, k0, k1, replicate)
    affine(L, L.shape[1], prepared.start_mean, Z, X, B)


@glue
def refresh(prepared, work, n, X, B):  # type: ignore[no-untyped-def]
    """Extend the state."""
    Y, slope = work.extended, work.slope
    extend(prepared.direction, prepared.phase, X, Y, slope, B)


@glue
def refresh_control(prepared, work, n, X, B):  # type: ignore[no-untyped-def]
    """Extend the state."""
    refresh(prepared, work, n, X, B)


@glue
def evaluate(prepared, work, n, X, W, B):  # type: ignore[no-untyped-def]
    """W = K y + k."""
    refresh(prepared, work, n, X, B)
    Y = work.extended
    affine(prepared.gain[n], Y.shape[0], prepared.bias[n], Y, W, B)


@glue
def step(prepared, work, n, X, W, Z, Y, totals, B):  # type: ignore[no-untyped-def]
    """Y = M y + c + G (w + z)."""
    extended, shocks = work.extended, work.shocks
    M, c = prepared.transition[n], prepared.offset[n]
    affine(M, extended.shape[0], c, extended, Y, B)
    finish(W, Z, shocks, totals, B)
    add_product(prepared.noise[n], shocks, Y, 0, B)


@glue
def noise_transpose(prepared, work, n, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = G^T V."""
    G = prepared.noise_transposed[n]
    affine(G, G.shape[1], work.zero, V, OUT, B)


@glue
def noise_transpose_at(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """The same at every state."""
    noise_transpose(prepared, work, n, V, OUT, B)


@glue
def base_vjp(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = (dy/dx)^T M^T V."""
    M, along = prepared.transition_transposed[n], work.along
    affine(M, M.shape[1], work.zero, V, along, B)
    clear(OUT, B)
    add_pull(prepared.direction, work.slope, along, OUT, B)


@glue
def control_vjp(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += (dy/dx)^T K^T V."""
    K, along = prepared.gain_transposed[n], work.along
    affine(K, K.shape[1], work.zero, V, along, B)
    add_pull(prepared.direction, work.slope, along, OUT, B)


@glue
def control_parameter_vjp(prepared, work, n, X, V, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row + p] += (E y + e) . v."""
    E, e, Y = prepared.gain_derivative[n], prepared.bias_derivative[n], work.extended
    affine(E, Y.shape[0], e, Y, work.features, B)
    add_dots(work.features, V, OUT, row, B)


@glue
def adjoint(prepared, work, n, X, A, V, NEXT, OUT, B):  # type: ignore[no-untyped-def]
    """NEXT = (dy/dx)^T (M^T A + K^T V); OUT: `control_parameter_vjp`."""
    control_parameter_vjp(prepared, work, n, X, V, OUT, 0, B)
    base_vjp(prepared, work, n, X, A, NEXT, B)
    control_vjp(prepared, work, n, X, V, NEXT, B)


@glue
def running_cost(prepared, work, n, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] += 1/2 x^T F x + f . y + f0."""
    F, f = prepared.running_quadratic[n], prepared.running_linear[n]
    add_cost(F, f, prepared.running_constant[n], work.extended, OUT, row, B)


@glue
def running_cost_gradient(prepared, work, n, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += F x + (dy/dx)^T f."""
    F, f = prepared.running_quadratic[n], prepared.running_linear[n]
    add_cost_gradient(prepared.direction, F, f, work.extended, work.slope, OUT, B)


@block_loop
def reward(prepared, work, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] = -(1/2 x^T Q x - q . y - r0)."""
    Y, Q, q = work.last_extended, prepared.reward_quadratic, prepared.reward_linear
    extend(prepared.direction, prepared.phase, X, Y, work.last_slope, B)
    for p in range(0, B, lanes(X)):
        store(OUT, row, p, 0.0)
    add_cost(Q, q, prepared.reward_constant[0], Y, OUT, row, B)
    for p in range(0, B, lanes(X)):
        store(OUT, row, p, 0.0 - load(OUT, row, p))


@block_loop
def reward_gradient(prepared, work, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = -(Q x - (dy/dx)^T q)."""
    Y, slope = work.last_extended, work.last_slope
    Q, q = prepared.reward_quadratic, prepared.reward_linear
    extend(prepared.direction, prepared.phase, X, Y, slope, B)
    clear(OUT, B)
    add_cost_gradient(prepared.direction, Q, q, Y, slope, OUT, B)
    for i in range(OUT.shape[0]):
        for p in range(0, B, lanes(X)):
            store(OUT, i, p, 0.0 - load(OUT, i, p))
