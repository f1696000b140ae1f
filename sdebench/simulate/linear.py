"""Numba primitives of the linear family (`LinearTables`); formulas in tables.py.

Every matrix of a table is an `Operator`, stored as what it is: zero, diagonal or full,
constant or changing in time; the kernels branch on that once per step and block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from sdebench.simulate.jit import inner
from sdebench.simulate.noise import fill_start_normals
from sdebench.simulate.tables import Array, LinearTables
from sdebench.simulate.tile import (
    PADDING,
    add_product,
    affine,
    fill,
    lanes,
    load,
    store,
)

ZERO, DIAGONAL, FULL = 0, 1, 2


class Operator(NamedTuple):
    """A square matrix per step; ``stride`` is 0 if it is the same at every step."""

    kind: int
    stride: int
    diagonal: Array  # (N or 1, d)
    matrix: Array  # (N or 1, d, d), empty unless full
    transposed: Array  # (N or 1, d, d), empty unless full


class PreparedLinear(NamedTuple):
    """`LinearTables` cast, transposed and sorted for the kernels."""

    n_parameters: int
    transition: Operator
    offset: Array  # (N, d)
    gain: Operator
    bias: Array  # (N, d)
    noise: Operator
    feature_kind: Array  # (S,)
    feature_diagonal: Array  # (S, N, d)
    feature_gain: Array  # (S, N, d, d); (S, 1, 1, 1) if no map is full
    feature_bias: Array  # (S, N, d)
    pair_parameter: Array  # (Q,) p of each pair (p, s) whose basis is not all zero
    pair_feature: Array  # (Q,) s
    pair_basis: Array  # (N, Q)
    running: Operator
    reward: Operator
    reward_linear: Array  # (d,)
    reward_constant: Array  # (1,)
    start: Operator
    start_mean: Array  # (d,)


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


def make_operator(matrix: Array, dtype: DTypeLike) -> Operator:
    """Find the structure of a stack of matrices (N, d, d)."""
    constant = bool(np.all(matrix == matrix[:1]))
    if constant:
        matrix = matrix[:1]
    diagonal = np.diagonal(matrix, axis1=1, axis2=2)
    off_diagonal = matrix * (1.0 - np.eye(matrix.shape[1]))
    kind = FULL if np.any(off_diagonal) else DIAGONAL if np.any(diagonal) else ZERO
    stack = matrix if kind == FULL else np.zeros((1, 1, 1))
    return Operator(
        kind,
        0 if constant else 1,
        np.array(diagonal, dtype, order="C"),
        np.array(stack, dtype, order="C"),
        np.array(stack.transpose(0, 2, 1), dtype, order="C"),
    )


def prepare_linear(tables: LinearTables, dtype: DTypeLike) -> PreparedLinear:
    """Return the tables as the kernels want them, in ``dtype``."""

    def cast(array: Array) -> Array:
        return np.array(array, dtype, order="C")

    features = [make_operator(matrix, dtype) for matrix in tables.feature_gain]
    kinds = np.array([feature.kind for feature in features], np.int64)
    gain = tables.feature_gain
    parameter, feature = np.nonzero(np.any(tables.basis != 0.0, axis=2))
    return PreparedLinear(
        tables.basis.shape[0],
        make_operator(tables.transition, dtype),
        cast(tables.offset),
        make_operator(tables.gain, dtype),
        cast(tables.bias),
        make_operator(tables.noise, dtype),
        kinds,
        cast(np.diagonal(gain, axis1=2, axis2=3)),
        cast(gain if np.any(kinds == FULL) else np.zeros((len(kinds), 1, 1, 1))),
        cast(tables.feature_bias),
        np.array(parameter, np.int64),
        np.array(feature, np.int64),
        cast(tables.basis[parameter, feature].T),
        make_operator(tables.running, dtype),
        make_operator(tables.reward_quadratic[None], dtype),
        cast(tables.reward_linear),
        cast(tables.reward_constant),
        make_operator(tables.start_factor[None], dtype),
        cast(tables.start_mean),
    )


def work_linear(prepared: PreparedLinear, block: int) -> LinearWork:
    """Allocate the scratch for blocks of ``block`` paths."""
    dtype = prepared.offset.dtype
    dim = prepared.offset.shape[1]
    maps = prepared.feature_kind.shape[0]

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


@inner
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


@inner
def add_act(kind, diagonal, matrix, X, Y, B):  # type: ignore[no-untyped-def]
    """Y += A X."""
    if kind == FULL:
        add_product(matrix, X, Y, 0, B)
    elif kind == DIAGONAL:
        for i in range(diagonal.shape[0]):
            a = diagonal[i]
            for p in range(0, B, lanes(X)):
                store(Y, i, p, load(Y, i, p) + a * load(X, i, p))


@inner
def add_form(kind, diagonal, matrix, factor, X, scratch, OUT, row, zero, B):  # type: ignore[no-untyped-def]
    """OUT[row] += factor x^T A x."""
    if kind == ZERO:
        return
    act(kind, diagonal, matrix, zero, X, scratch, B)
    for p in range(0, B, lanes(X)):
        total = load(X, 0, p) * load(scratch, 0, p)
        for i in range(1, zero.shape[0]):
            total = total + load(X, i, p) * load(scratch, i, p)
        store(OUT, row, p, load(OUT, row, p) + factor * total)


# Primitives: see primitives.py --------------------------------------------------------


@inner
def start(prepared, work, X, B, p0, k0, k1, replicate):  # type: ignore[no-untyped-def]
    A = prepared.start
    if A.kind != ZERO:
        rows = work.start.shape[0]
        fill_start_normals(work.start, work.words, rows, B, p0, 0, k0, k1, replicate)
    act(A.kind, A.diagonal[0], A.matrix[0], prepared.start_mean, work.start, X, B)


@inner
def evaluate(prepared, work, n, X, W, B):  # type: ignore[no-untyped-def]
    A = prepared.gain
    m = n * A.stride
    r = m if A.kind == FULL else 0
    act(A.kind, A.diagonal[m], A.matrix[r], prepared.bias[n], X, W, B)


@inner
def refresh(prepared, work, n, X, B):  # type: ignore[no-untyped-def]
    pass


@inner
def refresh_control(prepared, work, n, X, B):  # type: ignore[no-untyped-def]
    pass


@inner
def step(prepared, work, n, X, W, Z, Y, totals, B):  # type: ignore[no-untyped-def]
    M, G = prepared.transition, prepared.noise
    d = prepared.offset.shape[1]
    c = prepared.offset[n]
    m = n * M.stride
    g = n * G.stride
    if M.kind == FULL or G.kind == FULL:
        r = m if M.kind == FULL else 0
        act(M.kind, M.diagonal[m], M.matrix[r], c, X, Y, B)
        scale = G.diagonal[g]
        for p in range(0, B, lanes(X)):
            square = load(totals, 0, p)
            martingale = load(totals, 2, p)
            for i in range(d):
                w = load(W, i, p)
                z = load(Z, i, p)
                square = square + w * w
                martingale = martingale + w * z
                if G.kind == FULL:
                    store(work.scratch, i, p, w + z)
                else:
                    store(Y, i, p, load(Y, i, p) + scale[i] * (w + z))
            store(totals, 0, p, square)
            store(totals, 2, p, martingale)
        if G.kind == FULL:
            add_product(G.matrix[g], work.scratch, Y, 0, B)
    else:
        a, scale = M.diagonal[m], G.diagonal[g]
        for p in range(0, B, lanes(X)):
            square = load(totals, 0, p)
            martingale = load(totals, 2, p)
            for i in range(d):
                w = load(W, i, p)
                z = load(Z, i, p)
                square = square + w * w
                martingale = martingale + w * z
                y = (a[i] * load(X, i, p) + c[i]) + scale[i] * (w + z)
                store(Y, i, p, y)
            store(totals, 0, p, square)
            store(totals, 2, p, martingale)


@inner
def noise_transpose(prepared, work, n, V, OUT, B):  # type: ignore[no-untyped-def]
    A = prepared.noise
    m = n * A.stride
    r = m if A.kind == FULL else 0
    act(A.kind, A.diagonal[m], A.transposed[r], work.zero, V, OUT, B)


@inner
def base_vjp(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    A = prepared.transition
    m = n * A.stride
    r = m if A.kind == FULL else 0
    act(A.kind, A.diagonal[m], A.transposed[r], work.zero, V, OUT, B)


@inner
def control_vjp(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    A = prepared.gain
    m = n * A.stride
    r = m if A.kind == FULL else 0
    add_act(A.kind, A.diagonal[m], A.transposed[r], V, OUT, B)


@inner
def control_parameter_vjp(prepared, work, n, X, V, OUT, row, B):  # type: ignore[no-untyped-def]
    d = prepared.offset.shape[1]
    T = work.products
    for s in range(prepared.feature_kind.shape[0]):
        kind = prepared.feature_kind[s]
        a, b = prepared.feature_diagonal[s, n], prepared.feature_bias[s, n]
        if kind == FULL:
            affine(prepared.feature_gain[s, n], d, b, X, work.scratch, B)
        for p in range(0, B, lanes(X)):
            total = fill(X, b[0] * 0)
            for i in range(d):
                if kind == FULL:
                    y = load(work.scratch, i, p)
                elif kind == DIAGONAL:
                    y = a[i] * load(X, i, p) + b[i]
                else:
                    y = fill(X, b[i])
                total = total + y * load(V, i, p)
            store(T, s, p, total)
    for q in range(prepared.pair_parameter.shape[0]):
        r = row + prepared.pair_parameter[q]
        s = prepared.pair_feature[q]
        c = prepared.pair_basis[n, q]
        for p in range(0, B, lanes(X)):
            store(OUT, r, p, load(OUT, r, p) + c * load(T, s, p))


@inner
def adjoint(prepared, work, n, X, A, V, NEXT, OUT, B):  # type: ignore[no-untyped-def]
    control_parameter_vjp(prepared, work, n, X, V, OUT, 0, B)
    base_vjp(prepared, work, n, X, A, NEXT, B)
    control_vjp(prepared, work, n, X, V, NEXT, B)


@inner
def running_cost(prepared, work, n, X, OUT, row, B):  # type: ignore[no-untyped-def]
    A = prepared.running
    m = n * A.stride
    r = m if A.kind == FULL else 0
    S, zero = work.scratch, work.zero
    add_form(A.kind, A.diagonal[m], A.matrix[r], 0.5, X, S, OUT, row, zero, B)


@inner
def running_cost_gradient(prepared, work, n, X, OUT, B):  # type: ignore[no-untyped-def]
    A = prepared.running
    m = n * A.stride
    r = m if A.kind == FULL else 0
    add_act(A.kind, A.diagonal[m], A.matrix[r], X, OUT, B)


@inner
def reward(prepared, work, X, OUT, row, B):  # type: ignore[no-untyped-def]
    A = prepared.reward
    q = prepared.reward_linear
    for p in range(0, B, lanes(X)):
        total = fill(X, prepared.reward_constant[0])
        for i in range(q.shape[0]):
            total = total + q[i] * load(X, i, p)
        store(OUT, row, p, total)
    S, zero = work.scratch, work.zero
    add_form(A.kind, A.diagonal[0], A.matrix[0], -0.5, X, S, OUT, row, zero, B)


@inner
def reward_gradient(prepared, work, X, OUT, B):  # type: ignore[no-untyped-def]
    A = prepared.reward
    act(A.kind, A.diagonal[0], A.matrix[0], work.zero, X, OUT, B)
    for i in range(work.zero.shape[0]):
        q = prepared.reward_linear[i]
        for p in range(0, B, lanes(X)):
            store(OUT, i, p, q - load(OUT, i, p))
