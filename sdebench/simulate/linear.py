"""Numba primitives of the linear family (`LinearTables`); formulas in tables.py.

Every matrix of a table is treated as what it is: zero, diagonal or full, constant or
changing in time; the kernels branch on that once per step and block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from sdebench.simulate.noise import fill_start_normals
from sdebench.simulate.tables import Array, LinearTables, noise_mask, start_law
from sdebench.simulate.tile import (
    PADDING,
    add_product,
    affine,
    block_loop,
    fill,
    glue,
    lanes,
    load,
    store,
)

ZERO, DIAGONAL, FULL = 0, 1, 2
# numba would compile one more version of a helper for every value of a Python integer
TRANSITION, GAIN, NOISE, RUNNING, REWARD, START, FEATURES = np.arange(7)
FIRST = np.int64(0)


class PreparedLinear(NamedTuple):
    """`LinearTables` cast, transposed and sorted for the kernels.

    The matrices are stacked, in the order TRANSITION, ..., START, feature maps; few
    large arrays, since every field costs compile time.
    """

    n_parameters: int
    kind: Array  # (O,) ZERO, DIAGONAL or FULL
    stride: Array  # (O,) 0 if the matrix is the same at every step, else 1
    slot: Array  # (O,) place of a full matrix
    diagonal: Array  # (O, N, d)
    matrix: Array  # (slots, N, d, d) the full ones
    transposed: Array  # (slots, N, d, d)
    offset: Array  # (N, d) c_n
    bias: Array  # (N, d) k_n
    feature_bias: Array  # (S, N, d)
    pair_parameter: Array  # (Q,) p of each pair (p, s) whose basis is not all zero
    pair_feature: Array  # (Q,) s
    pair_basis: Array  # (N, Q)
    reward_linear: Array  # (d,)
    reward_constant: Array  # (1,)
    reward_quartic: Array  # (d or 0,)
    start_mean: Array  # (d,)
    noisy: Array  # (N,) 1 or 0
    denoiser: Array  # (N or 0, 5)
    # of `tables.StartLaw`; empty where theta does not move X_0
    start_derivative: Array  # (2, P, d, d + 1) derivative, whitened
    start_maps: Array  # (2, d, d) inverse, ratio
    start_shifts: Array  # (2, d) -inverse m, ratio_shift
    start_constants: Array  # (2, P) gradient of the relative entropy, trace


class LinearWork(NamedTuple):
    """Scratch of one thread; every row is ``B + PADDING`` long."""

    adjoint: Array  # (d, .)
    adjoint_next: Array  # (d, .)
    direction: Array  # (d, .)
    scratch: Array  # (d, .)
    products: Array  # (S, .)
    start: Array  # (d rounded up to 4, .)
    words: Array  # (4, .) uint32
    zero: Array  # (d,)


def prepare_linear(tables: LinearTables, dtype: DTypeLike) -> PreparedLinear:
    """Return the tables as the kernels want them, in ``dtype``."""
    n_steps, dim = tables.offset.shape
    matrices: list[Array] = [
        tables.transition,
        tables.gain,
        tables.noise,
        tables.running,
        tables.reward_quadratic[None],
        tables.start_factor[None],
        *tables.feature_gain,
    ]
    kind = np.zeros(len(matrices), np.int64)
    stride, slot = np.zeros_like(kind), np.zeros_like(kind)
    diagonal = np.zeros((len(matrices), n_steps, dim), dtype)
    full: list[Array] = []
    for k, matrix in enumerate(matrices):
        if np.all(matrix == matrix[:1]):
            matrix = matrix[:1]
        else:
            stride[k] = 1
        diagonal[k, : len(matrix)] = np.diagonal(matrix, axis1=1, axis2=2)
        if np.any(matrix * (1.0 - np.eye(dim))):
            kind[k], slot[k] = FULL, len(full)
            full.append(matrix)
        elif np.any(matrix):
            kind[k] = DIAGONAL
    stack = np.zeros((max(len(full), 1), n_steps, dim, dim), dtype)
    for place, matrix in zip(stack, full, strict=False):
        place[: len(matrix)] = matrix

    def cast(array: Array) -> Array:
        return np.array(array, dtype, order="C")

    parameter, feature = np.nonzero(np.any(tables.basis != 0.0, axis=2))
    law = start_law(tables)
    start_mean = tables.start_mean[: len(law.inverse)]
    return PreparedLinear(
        tables.basis.shape[0],
        kind,
        stride,
        slot,
        diagonal,
        stack,
        cast(stack.transpose(0, 1, 3, 2)),
        cast(tables.offset),
        cast(tables.bias),
        cast(tables.feature_bias),
        np.array(parameter, np.int64),
        np.array(feature, np.int64),
        cast(tables.basis[parameter, feature].T),
        cast(tables.reward_linear),
        cast(tables.reward_constant),
        cast(tables.reward_quartic),
        cast(tables.start_mean),
        cast(noise_mask(tables)),
        cast(tables.denoiser),
        cast(np.stack([law.derivative, law.whitened])),
        cast(np.stack([law.inverse, law.ratio])),
        cast(np.stack([-law.inverse @ start_mean, law.ratio_shift])),
        cast(np.stack([tables.start_cost_gradient, law.trace])),
    )


def work_linear(prepared: PreparedLinear, block: int) -> LinearWork:
    """Allocate the scratch for blocks of ``block`` paths."""
    dtype = prepared.offset.dtype
    dim = prepared.offset.shape[1]
    maps = prepared.feature_bias.shape[0]

    def rows(count: int) -> Array:
        return np.zeros((count, block + PADDING), dtype)

    return LinearWork(
        rows(dim),
        rows(dim),
        rows(dim),
        rows(dim),
        rows(max(maps, 1)),
        rows(-(-dim // 4) * 4),
        np.zeros((4, block + PADDING), np.uint32),
        np.zeros(dim, dtype),
    )


# Operators --------------------------------------------------------------------------


@block_loop
def act(kind, diagonal, matrix, b, X, Y, B):  # type: ignore[no-untyped-def]
    """Y = A X + b; Y is not X."""
    d = b.shape[0]
    if kind == FULL:
        affine(matrix, d, b, X, Y, B)
    else:
        for i in range(d):
            a, c = diagonal[i], b[i]
            for p in range(0, B, lanes(X)):
                store(Y, i, p, a * load(X, i, p) + c)


@block_loop
def add_act(kind, diagonal, matrix, X, Y, B):  # type: ignore[no-untyped-def]
    """Y += A X."""
    if kind == FULL:
        add_product(matrix, X, Y, 0, B)
    elif kind == DIAGONAL:
        for i in range(diagonal.shape[0]):
            a = diagonal[i]
            for p in range(0, B, lanes(X)):
                store(Y, i, p, load(Y, i, p) + a * load(X, i, p))


@block_loop
def add_dot(factor, X, Y, d, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] += factor x . y."""
    for p in range(0, B, lanes(X)):
        total = load(X, 0, p) * load(Y, 0, p)
        for i in range(1, d):
            total = total + load(X, i, p) * load(Y, i, p)
        store(OUT, row, p, load(OUT, row, p) + factor * total)


@block_loop
def finish_diagonal(a, c, scale, X, W, Z, Y, totals, B):  # type: ignore[no-untyped-def]
    """Y = a x + c + scale (w + z), and the totals of the step."""
    for p in range(0, B, lanes(X)):
        square = load(totals, 0, p)
        martingale = load(totals, 2, p)
        for i in range(scale.shape[0]):
            w = load(W, i, p)
            z = load(Z, i, p)
            square = square + w * w
            martingale = martingale + w * z
            y = (a[i] * load(X, i, p) + c[i]) + scale[i] * (w + z)
            store(Y, i, p, y)
        store(totals, 0, p, square)
        store(totals, 2, p, martingale)


@block_loop
def finish(scale, W, Z, Y, shocks, totals, B):  # type: ignore[no-untyped-def]
    """Y += scale (w + z), shocks = w + z, and the totals of the step."""
    for p in range(0, B, lanes(Y)):
        square = load(totals, 0, p)
        martingale = load(totals, 2, p)
        for i in range(scale.shape[0]):
            w = load(W, i, p)
            z = load(Z, i, p)
            shock = w + z
            square = square + w * w
            martingale = martingale + w * z
            store(shocks, i, p, shock)
            store(Y, i, p, load(Y, i, p) + scale[i] * shock)
        store(totals, 0, p, square)
        store(totals, 2, p, martingale)


@block_loop
def feature_product(kind, a, E, b, X, V, scratch, T, s, B):  # type: ignore[no-untyped-def]
    """T[s] = (E x + b) . v."""
    d = b.shape[0]
    if kind == FULL:
        affine(E, d, b, X, scratch, B)
        for p in range(0, B, lanes(X)):
            total = load(scratch, 0, p) * load(V, 0, p)
            for i in range(1, d):
                total = total + load(scratch, i, p) * load(V, i, p)
            store(T, s, p, total)
    elif kind == DIAGONAL:
        for p in range(0, B, lanes(X)):
            total = (a[0] * load(X, 0, p) + b[0]) * load(V, 0, p)
            for i in range(1, d):
                total = total + (a[i] * load(X, i, p) + b[i]) * load(V, i, p)
            store(T, s, p, total)
    else:
        for p in range(0, B, lanes(X)):
            total = b[0] * load(V, 0, p)
            for i in range(1, d):
                total = total + b[i] * load(V, i, p)
            store(T, s, p, total)


@block_loop
def spread(parameter, feature, basis, T, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row + p] += sum_s basis T[s] over the pairs (p, s)."""
    for q in range(parameter.shape[0]):
        r, s, c = row + parameter[q], feature[q], basis[q]
        for p in range(0, B, lanes(T)):
            store(OUT, r, p, load(OUT, r, p) + c * load(T, s, p))


@block_loop
def start_product(D, Z, V, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row + q] += v . D[q] (1, z)."""
    d = D.shape[1]
    for q in range(D.shape[0]):
        for p in range(0, B, lanes(V)):
            total = load(OUT, row + q, p)
            for i in range(d):
                moved = fill(V, D[q, i, 0])
                for j in range(d):
                    moved = moved + D[q, i, j + 1] * load(Z, j, p)
                total = total + moved * load(V, i, p)
            store(OUT, row + q, p, total)


@block_loop
def weigh_rows(C, X, Y, d, B):  # type: ignore[no-untyped-def]
    """Y = c x with the first row of C."""
    for p in range(0, B, lanes(X)):
        c = load(C, 0, p)
        for i in range(d):
            store(Y, i, p, c * load(X, i, p))


@block_loop
def add_constants(factor, c, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row + q] += factor c[q]."""
    for q in range(c.shape[0]):
        for p in range(0, B, lanes(OUT)):
            store(OUT, row + q, p, load(OUT, row + q, p) + factor * c[q])


@block_loop
def subtract_weighted(c, C, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row + q] -= c[q] times the first row of C."""
    for q in range(c.shape[0]):
        for p in range(0, B, lanes(OUT)):
            store(OUT, row + q, p, load(OUT, row + q, p) - c[q] * load(C, 0, p))


# Primitives: see primitives.py --------------------------------------------------------


@glue
def apply(prepared, k, n, b, X, Y, B):  # type: ignore[no-untyped-def]
    """Y = A X + b, A matrix k of step n."""
    m, s = n * prepared.stride[k], prepared.slot[k]
    A = prepared.matrix[s, m]
    act(prepared.kind[k], prepared.diagonal[k, m], A, b, X, Y, B)


@glue
def apply_transposed(prepared, k, n, b, X, Y, B):  # type: ignore[no-untyped-def]
    """Y = A^T X + b."""
    m, s = n * prepared.stride[k], prepared.slot[k]
    A = prepared.transposed[s, m]
    act(prepared.kind[k], prepared.diagonal[k, m], A, b, X, Y, B)


@block_loop
def start(prepared, work, X, B, p0, k0, k1, replicate):  # type: ignore[no-untyped-def]
    """X = m_0 + L_0 z."""
    Z = work.start
    if prepared.kind[START] != ZERO:
        rows = Z.shape[0]
        fill_start_normals(Z, work.words, rows, B, p0, 0, k0, k1, replicate)
    apply(prepared, START, FIRST, prepared.start_mean, Z, X, B)


@glue
def has_start_parameters(prepared):  # type: ignore[no-untyped-def]
    """Whether the tables hold derivatives of X_0."""
    return prepared.start_constants.shape[1] > 0


@glue
def start_cost_gradient(prepared, work, factor, OUT, B):  # type: ignore[no-untyped-def]
    """OUT[p] += factor d(relative entropy)/dtheta_p."""
    add_constants(factor, prepared.start_constants[0], OUT, 0, B)


@glue
def start_parameter_vjp(prepared, work, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT[p] += V . (dm + dL z), z = L^-1 (x - m)."""
    if has_start_parameters(prepared):
        d, Z = work.zero.shape[0], work.scratch
        affine(prepared.start_maps[0], d, prepared.start_shifts[0], X, Z, B)
        start_product(prepared.start_derivative[0], Z, V, OUT, 0, B)


@glue
def start_score(prepared, work, X, C, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row + p] += c (z . L^-1 (dm + dL z) - tr(L^-1 dL))."""
    if has_start_parameters(prepared):
        d, Z = work.zero.shape[0], work.scratch
        affine(prepared.start_maps[0], d, prepared.start_shifts[0], X, Z, B)
        weigh_rows(C, Z, work.start, d, B)
        start_product(prepared.start_derivative[1], Z, work.start, OUT, row, B)
        subtract_weighted(prepared.start_constants[1], C, OUT, row, B)


@glue
def start_log_ratio_gradient(prepared, work, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += ratio x + ratio_shift."""
    if has_start_parameters(prepared):
        add_product(prepared.start_maps[1], X, OUT, 0, B)
        add_constants(1.0, prepared.start_shifts[1], OUT, 0, B)


@glue
def evaluate(prepared, work, n, X, W, B):  # type: ignore[no-untyped-def]
    """W = K x + k."""
    apply(prepared, GAIN, n, prepared.bias[n], X, W, B)


@glue
def refresh(prepared, work, n, X, B):  # type: ignore[no-untyped-def]
    """Nothing: products need no state."""


@glue
def refresh_control(prepared, work, n, X, B):  # type: ignore[no-untyped-def]
    """Nothing."""


@glue
def step(prepared, work, n, X, W, Z, Y, totals, B):  # type: ignore[no-untyped-def]
    """Y = M x + c + G (w + z)."""
    c = prepared.offset[n]
    m, g = n * prepared.stride[TRANSITION], n * prepared.stride[NOISE]
    scale = prepared.diagonal[NOISE, g]
    if prepared.kind[NOISE] == FULL:
        apply(prepared, TRANSITION, n, c, X, Y, B)
        finish(work.zero, W, Z, Y, work.scratch, totals, B)
        add_product(prepared.matrix[prepared.slot[NOISE], g], work.scratch, Y, 0, B)
    elif prepared.kind[TRANSITION] == FULL:
        apply(prepared, TRANSITION, n, c, X, Y, B)
        finish(scale, W, Z, Y, work.scratch, totals, B)
    else:
        a = prepared.diagonal[TRANSITION, m]
        finish_diagonal(a, c, scale, X, W, Z, Y, totals, B)


@glue
def noise_transpose(prepared, work, n, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = G^T V."""
    apply_transposed(prepared, NOISE, n, work.zero, V, OUT, B)


@glue
def noise_transpose_at(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """The same at every state."""
    noise_transpose(prepared, work, n, V, OUT, B)


@glue
def base_vjp(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = M^T V."""
    apply_transposed(prepared, TRANSITION, n, work.zero, V, OUT, B)


@glue
def control_vjp(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += K^T V."""
    m, s = n * prepared.stride[GAIN], prepared.slot[GAIN]
    A = prepared.transposed[s, m]
    add_act(prepared.kind[GAIN], prepared.diagonal[GAIN, m], A, V, OUT, B)


@glue
def control_parameter_vjp(prepared, work, n, X, V, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row + p] += sum_s basis (E x + e) . v."""
    T, basis = work.products, prepared.pair_basis[n]
    for s in range(prepared.feature_bias.shape[0]):
        k = FEATURES + s
        m, b = n * prepared.stride[k], prepared.feature_bias[s, n]
        a, E = prepared.diagonal[k, m], prepared.matrix[prepared.slot[k], m]
        feature_product(prepared.kind[k], a, E, b, X, V, work.scratch, T, s, B)
    spread(prepared.pair_parameter, prepared.pair_feature, basis, T, OUT, row, B)


@glue
def adjoint(prepared, work, n, X, A, V, NEXT, OUT, B):  # type: ignore[no-untyped-def]
    """NEXT = M^T A + K^T V; OUT: `control_parameter_vjp`."""
    control_parameter_vjp(prepared, work, n, X, V, OUT, 0, B)
    base_vjp(prepared, work, n, X, A, NEXT, B)
    control_vjp(prepared, work, n, X, V, NEXT, B)


@glue
def add_quadratic(prepared, work, k, n, factor, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] += factor x^T A x."""
    if prepared.kind[k] != ZERO:
        apply(prepared, k, n, work.zero, X, work.scratch, B)
        add_dot(factor, X, work.scratch, work.zero.shape[0], OUT, row, B)


@glue
def running_cost(prepared, work, n, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] += 1/2 x^T F x."""
    add_quadratic(prepared, work, RUNNING, n, 0.5, X, OUT, row, B)


@glue
def running_cost_gradient(prepared, work, n, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += F x."""
    m, s = n * prepared.stride[RUNNING], prepared.slot[RUNNING]
    A = prepared.matrix[s, m]
    add_act(prepared.kind[RUNNING], prepared.diagonal[RUNNING, m], A, X, OUT, B)


@block_loop
def reward(prepared, work, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] = -1/2 x^T Q x + q^T x + r0 - 1/4 sum_i c_i x_i^4."""
    q, c = prepared.reward_linear, prepared.reward_quartic
    for p in range(0, B, lanes(X)):
        total = fill(X, prepared.reward_constant[0])
        for i in range(q.shape[0]):
            total = total + q[i] * load(X, i, p)
        for i in range(c.shape[0]):
            square = load(X, i, p) * load(X, i, p)
            total = total - (0.25 * c[i]) * (square * square)
        store(OUT, row, p, total)
    add_quadratic(prepared, work, REWARD, FIRST, -0.5, X, OUT, row, B)


@block_loop
def reward_gradient(prepared, work, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = q - Q x - c x^3, the cube by coordinate."""
    apply(prepared, REWARD, FIRST, work.zero, X, OUT, B)
    for i in range(work.zero.shape[0]):
        q = prepared.reward_linear[i]
        for p in range(0, B, lanes(X)):
            store(OUT, i, p, q - load(OUT, i, p))
    for i in range(prepared.reward_quartic.shape[0]):
        c = prepared.reward_quartic[i]
        for p in range(0, B, lanes(X)):
            x = load(X, i, p)
            store(OUT, i, p, load(OUT, i, p) - c * (x * x * x))
