"""Numba primitives of the separable family (`SeparableTables`); formulas in tables.py.

Polynomials of each coordinate by Horner's rule, at the clipped coordinate; functions of
|x|^2 once per path.  Noise that depends on the state has loops of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from sdebench.simulate.elementary import exp, log
from sdebench.simulate.noise import fill_start_normals
from sdebench.simulate.tables import TINY, Array, SeparableTables, noise_mask
from sdebench.simulate.tile import (
    PADDING,
    affine,
    block_loop,
    clear,
    fill,
    glue,
    inline,
    inside,
    lanes,
    larger,
    load,
    root,
    sincos,
    store,
)
from sdebench.simulate.tile import exp as exps


class PreparedSeparable(NamedTuple):
    """`SeparableTables` cast for the kernels."""

    n_parameters: int
    reach: Array  # (1,)
    base: Array  # (N, d, J)
    base_slope: Array  # (N, d, J - 1) coefficients of the derivative
    beyond: Array  # (N, d)
    offset: Array  # (N, d) the constants of the base mean
    noise: Array  # (N, d)
    gain: Array  # (N, d, J)
    gain_slope: Array  # (N, d, J - 1)
    gain_derivative: Array  # (N, P, d, J)
    running: Array  # (N, d or 0, J)
    running_slope: Array  # (N, d or 0, J - 1)
    reward: Array  # (d or 0, J)
    reward_slope: Array  # (d or 0, J - 1)
    reward_factor: Array  # (d or 0, J)
    factor_slope: Array  # (d or 0, J - 1)
    radial: Array  # (4,) reward_log, reward_wave, wave_power, reward_power
    wave: Array  # (N or 0, 4)
    variance: Array  # (d or 0, 3)
    control_power: Array  # (1,)
    funnel: Array  # (1,)
    start_mean: Array  # (d,)
    start_factor: Array  # (d, d)
    noisy: Array  # (N,) 1 or 0
    denoiser: Array  # (N or 0, 5)


class SeparableWork(NamedTuple):
    """Scratch of one thread; every row is ``B + PADDING`` long."""

    adjoint: Array  # (d, .)
    adjoint_next: Array  # (d, .)
    direction: Array  # (d, .)
    values: Array  # (d, .) polynomials
    slopes: Array  # (d, .) their derivatives
    radius: Array  # (4, .) s, a function of it, two derivatives
    start: Array  # (d rounded up to 4, .)
    words: Array  # (4, .) uint32
    zero: Array  # (d,)


def derivative(coefficients: Array) -> Array:
    """Return the coefficients of the derivatives, last axis one shorter."""
    count = max(coefficients.shape[-1], 1)
    return coefficients[..., 1:] * np.arange(1, count)


def prepare_separable(tables: SeparableTables, dtype: DTypeLike) -> PreparedSeparable:
    """Return the tables as the kernels want them, in ``dtype``."""

    def cast(array: Array) -> Array:
        return np.array(array, dtype, order="C")

    return PreparedSeparable(
        len(tables.gain_derivative),
        cast(tables.reach),
        cast(tables.base),
        cast(derivative(tables.base)),
        cast(tables.beyond),
        cast(tables.offset),
        cast(tables.noise),
        cast(tables.gain),
        cast(derivative(tables.gain)),
        cast(tables.gain_derivative.swapaxes(0, 1)),
        cast(tables.running),
        cast(derivative(tables.running)),
        cast(tables.reward),
        cast(derivative(tables.reward)),
        cast(tables.reward_factor),
        cast(derivative(tables.reward_factor)),
        cast(
            np.concatenate(
                [
                    tables.reward_log,
                    tables.reward_wave,
                    tables.wave_power,
                    tables.reward_power,
                ]
            )
        ),
        cast(tables.wave),
        cast(tables.variance),
        cast(tables.control_power),
        cast(tables.reward_funnel),
        cast(tables.start_mean),
        cast(tables.start_factor),
        cast(noise_mask(tables)),
        cast(tables.denoiser),
    )


def work_separable(prepared: PreparedSeparable, block: int) -> SeparableWork:
    """Allocate the scratch for blocks of ``block`` paths."""
    dtype = prepared.offset.dtype
    dim = prepared.offset.shape[1]

    def rows(count: int) -> Array:
        return np.zeros((count, block + PADDING), dtype)

    return SeparableWork(
        rows(dim),
        rows(dim),
        rows(dim),
        rows(dim),
        rows(dim),
        rows(4),
        rows(-(-dim // 4) * 4),
        np.zeros((4, block + PADDING), np.uint32),
        np.zeros(dim, dtype),
    )


# Operators --------------------------------------------------------------------------


@inline
def clip(x, reach):  # type: ignore[no-untyped-def]
    """Return the vector min(max(x, -reach), reach)."""
    below = 0.0 - larger(x, 0.0 - reach)
    return 0.0 - larger(below, 0.0 - reach)


@block_loop
def polynomials(A, reach, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT_i = sum_j A_ij y_i^j."""
    d, J = A.shape
    for i in range(d):
        for p in range(0, B, lanes(X)):
            y = clip(load(X, i, p), reach)
            total = fill(X, A[i, J - 1])
            for j in range(J - 2, -1, -1):
                total = total * y + A[i, j]
            store(OUT, i, p, total)


@block_loop
def add_sum(A, reach, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] += sum_ij A_ij y_i^j."""
    d, J = A.shape
    for p in range(0, B, lanes(X)):
        out = load(OUT, row, p)
        for i in range(d):
            y = clip(load(X, i, p), reach)
            total = fill(X, A[i, J - 1])
            for j in range(J - 2, -1, -1):
                total = total * y + A[i, j]
            out = out + total
        store(OUT, row, p, out)


@block_loop
def add_slopes(A, reach, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT_i += sum_j A_ij y_i^j within the reach; A of a derivative."""
    d, J = A.shape
    for i in range(d):
        for p in range(0, B, lanes(X)):
            x = load(X, i, p)
            y = clip(x, reach)
            total = fill(X, 0.0)
            for j in range(J - 1, -1, -1):
                total = total * y + A[i, j]
            change = inside(x, reach, total, fill(X, 0.0))
            store(OUT, i, p, load(OUT, i, p) + change)


@block_loop
def add_slope_products(A, reach, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT_i += (sum_j A_ij y_i^j) v_i within the reach; A of a derivative."""
    d, J = A.shape
    for i in range(d):
        for p in range(0, B, lanes(X)):
            x = load(X, i, p)
            y = clip(x, reach)
            total = fill(X, 0.0)
            for j in range(J - 1, -1, -1):
                total = total * y + A[i, j]
            change = inside(x, reach, total, fill(X, 0.0))
            store(OUT, i, p, load(OUT, i, p) + change * load(V, i, p))


@block_loop
def add_far(beyond, reach, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT_i += m_i v_i beyond the reach."""
    for i in range(beyond.shape[0]):
        for p in range(0, B, lanes(X)):
            slope = inside(load(X, i, p), reach, fill(X, 0.0), fill(X, beyond[i]))
            store(OUT, i, p, load(OUT, i, p) + slope * load(V, i, p))


@block_loop
def move(A, beyond, noise, reach, X, W, Z, Y, totals, B):  # type: ignore[no-untyped-def]
    """Y = base mean(x) + g (w + z), and add to the totals of the step."""
    d, J = A.shape
    for p in range(0, B, lanes(X)):
        square = load(totals, 0, p)
        martingale = load(totals, 2, p)
        for i in range(d):
            x = load(X, i, p)
            w = load(W, i, p)
            z = load(Z, i, p)
            y = clip(x, reach)
            total = fill(X, A[i, J - 1])
            for j in range(J - 2, -1, -1):
                total = total * y + A[i, j]
            square = square + w * w
            martingale = martingale + w * z
            store(Y, i, p, total + beyond[i] * (x - y) + noise[i] * (w + z))
        store(totals, 0, p, square)
        store(totals, 2, p, martingale)


@inline
def noise_factor(v, i, x):  # type: ignore[no-untyped-def]
    """Return the vectors s and ds/dx of coordinate i, zero without variance."""
    variance = larger(v[i, 0] + (v[i, 1] + v[i, 2] * x) * x, 0.0)
    inverse = 1.0 / root(larger(variance, TINY))
    s = variance * inverse
    slope = 0.5 * (v[i, 1] + (2.0 * v[i, 2]) * x) * (s * inverse * inverse)
    return s, slope


@block_loop
def times_noise_factor(v, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT_i = s_i v_i (OUT may be V)."""
    for i in range(v.shape[0]):
        for p in range(0, B, lanes(X)):
            s = noise_factor(v, i, load(X, i, p))[0]
            store(OUT, i, p, s * load(V, i, p))


@block_loop
def shake(beyond, noise, v, reach, X, W, Z, Y, totals, B):  # type: ignore[no-untyped-def]
    """Y += m (x - y) + g s (w + z), and add to the totals of the step."""
    for p in range(0, B, lanes(X)):
        square = load(totals, 0, p)
        martingale = load(totals, 2, p)
        for i in range(v.shape[0]):
            x = load(X, i, p)
            w = load(W, i, p)
            z = load(Z, i, p)
            s = noise_factor(v, i, x)[0]
            square = square + w * w
            martingale = martingale + w * z
            far = beyond[i] * (x - clip(x, reach))
            store(Y, i, p, load(Y, i, p) + far + noise[i] * s * (w + z))
        store(totals, 0, p, square)
        store(totals, 2, p, martingale)


@block_loop
def add_noise_slopes(g, v, X, W, Z, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT_i += g_i s_i' (w_i + z_i) v_i."""
    for i in range(v.shape[0]):
        for p in range(0, B, lanes(X)):
            slope = noise_factor(v, i, load(X, i, p))[1]
            shock = load(W, i, p) + load(Z, i, p)
            change = g[i] * slope * shock * load(V, i, p)
            store(OUT, i, p, load(OUT, i, p) + change)


@block_loop
def add_factor_slopes(A, v, reach, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT_i += s_i' (sum_j A_ij y_i^j) v_i."""
    d, J = A.shape
    for i in range(d):
        for p in range(0, B, lanes(X)):
            x = load(X, i, p)
            y = clip(x, reach)
            total = fill(X, A[i, J - 1])
            for j in range(J - 2, -1, -1):
                total = total * y + A[i, j]
            change = noise_factor(v, i, x)[1] * total * load(V, i, p)
            store(OUT, i, p, load(OUT, i, p) + change)


@block_loop
def add_parameter_products(E, reach, X, V, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row + q] += sum_i (sum_j E_qij y_i^j) v_i."""
    P, d, J = E.shape
    for p in range(0, B, lanes(X)):
        for q in range(P):
            out = load(OUT, row + q, p)
            for i in range(d):
                y = clip(load(X, i, p), reach)
                total = fill(X, E[q, i, J - 1])
                for j in range(J - 2, -1, -1):
                    total = total * y + E[q, i, j]
                out = out + total * load(V, i, p)
            store(OUT, row + q, p, out)


@block_loop
def square_length(X, R, delay, power, B):  # type: ignore[no-untyped-def]
    """R[0] = s, R[1] = q = s + delay, R[2] = q^power."""
    for p in range(0, B, lanes(X)):
        total = fill(X, 0.0)
        for i in range(X.shape[0]):
            x = load(X, i, p)
            total = total + x * x
        store(R, 0, p, total)
        store(R, 1, p, total + (delay + TINY))
    for p in range(B):
        R[2, p] = exp(power * log(R[1, p]))


@inline
def wave_slopes(q, height, power):  # type: ignore[no-untyped-def]
    """Return three derivatives of sin(q^power), and its sine; height = q^power."""
    sine, cosine = sincos(height)
    first = power * height / q
    second = (power - 1.0) * first / q
    third = (power - 2.0) * second / q
    square = first * first
    return (
        first * cosine,
        second * cosine - square * sine,
        (third - square * first) * cosine - 3.0 * first * second * sine,
        sine,
    )


@block_loop
def add_wave_cost(c, power, R, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] += c1 psi' + s (c2 psi'' + c3 psi'^2)."""
    for p in range(0, B, lanes(R)):
        slopes = wave_slopes(load(R, 1, p), load(R, 2, p), power)
        first, second = slopes[0], slopes[1]
        rest = c[2] * second + c[3] * first * first
        total = c[1] * first + load(R, 0, p) * rest
        store(OUT, row, p, load(OUT, row, p) + total)


@block_loop
def add_wave_cost_gradient(c, power, R, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += the gradient of `add_wave_cost`."""
    for p in range(0, B, lanes(R)):
        slopes = wave_slopes(load(R, 1, p), load(R, 2, p), power)
        first, second, third = slopes[0], slopes[1], slopes[2]
        pull = (c[1] + c[2]) * second + c[3] * first * first
        twice = 2.0 * c[3] * first * second
        pull = 2.0 * (pull + load(R, 0, p) * (c[2] * third + twice))
        for i in range(X.shape[0]):
            store(OUT, i, p, load(OUT, i, p) + pull * load(X, i, p))


@inline
def decay(x):  # type: ignore[no-untyped-def]
    """Return exp(-x), of an argument that `exps` can take: at most 80."""
    return exps(0.0 - larger(x, -80.0))


@block_loop
def add_funnel(f, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] -= 1/2 f e^{-x_0} times the squares of the others."""
    for p in range(0, B, lanes(X)):
        total = fill(X, 0.0)
        for i in range(1, X.shape[0]):
            x = load(X, i, p)
            total = total + x * x
        pull = (0.5 * f) * decay(load(X, 0, p))
        store(OUT, row, p, load(OUT, row, p) - pull * total)


@block_loop
def add_funnel_gradient(f, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += the gradient of `add_funnel`."""
    for p in range(0, B, lanes(X)):
        total = fill(X, 0.0)
        pull = f * decay(load(X, 0, p))
        for i in range(1, X.shape[0]):
            x = load(X, i, p)
            total = total + x * x
            store(OUT, i, p, load(OUT, i, p) - pull * x)
        store(OUT, 0, p, load(OUT, 0, p) + 0.5 * pull * total)


# Primitives: see primitives.py --------------------------------------------------------


@block_loop
def start(prepared, work, X, B, p0, k0, k1, replicate):  # type: ignore[no-untyped-def]
    """X = m_0 + L_0 z."""
    Z, L = work.start, prepared.start_factor
    fill_start_normals(Z, work.words, Z.shape[0], B, p0, 0, k0, k1, replicate)
    affine(L, L.shape[1], prepared.start_mean, Z, X, B)


@glue
def refresh(prepared, work, n, X, B):  # type: ignore[no-untyped-def]
    """Nothing: every product starts from x."""


@glue
def refresh_control(prepared, work, n, X, B):  # type: ignore[no-untyped-def]
    """Nothing."""


@glue
def evaluate(prepared, work, n, X, W, B):  # type: ignore[no-untyped-def]
    """W = polynomials K, times the factor of the noise."""
    polynomials(prepared.gain[n], prepared.reach[0], X, W, B)
    if prepared.control_power[0] > 0.0:
        times_noise_factor(prepared.variance, X, W, W, B)


@glue
def step(prepared, work, n, X, W, Z, Y, totals, B):  # type: ignore[no-untyped-def]
    """Y = base mean(x) + g s (w + z)."""
    M, m, g = prepared.base[n], prepared.beyond[n], prepared.noise[n]
    reach, v = prepared.reach[0], prepared.variance
    if v.shape[0] > 0:
        polynomials(M, reach, X, Y, B)
        shake(m, g, v, reach, X, W, Z, Y, totals, B)
    else:
        move(M, m, g, reach, X, W, Z, Y, totals, B)


@block_loop
def scale_rows(g, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT_i = g_i V_i."""
    for i in range(g.shape[0]):
        for p in range(0, B, lanes(V)):
            store(OUT, i, p, g[i] * load(V, i, p))


@glue
def noise_transpose(prepared, work, n, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = g V, of noise that does not depend on the state."""
    scale_rows(prepared.noise[n], V, OUT, B)


@glue
def noise_transpose_at(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = g s V."""
    scale_rows(prepared.noise[n], V, OUT, B)
    if prepared.variance.shape[0] > 0:
        times_noise_factor(prepared.variance, X, OUT, OUT, B)


@glue
def noise_vjp(prepared, work, n, X, W, Z, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += g s' (w + z) V."""
    if prepared.variance.shape[0] > 0:
        g, v = prepared.noise[n], prepared.variance
        add_noise_slopes(g, v, X, W, Z, V, OUT, B)


@glue
def base_vjp(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT_i = (d mean_i / dx_i) v_i."""
    reach = prepared.reach[0]
    clear(OUT, B)
    add_slope_products(prepared.base_slope[n], reach, X, V, OUT, B)
    add_far(prepared.beyond[n], reach, X, V, OUT, B)


@glue
def control_vjp(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT_i += (dw_i / dx_i) v_i."""
    reach, slope, v = prepared.reach[0], prepared.gain_slope[n], prepared.variance
    if prepared.control_power[0] > 0.0:
        times_noise_factor(v, X, V, work.values, B)
        add_slope_products(slope, reach, X, work.values, OUT, B)
        add_factor_slopes(prepared.gain[n], v, reach, X, V, OUT, B)
    else:
        add_slope_products(slope, reach, X, V, OUT, B)


@glue
def control_parameter_vjp(prepared, work, n, X, V, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row + p] += (polynomials E_p, times the factor of the noise) . v."""
    E, reach = prepared.gain_derivative[n], prepared.reach[0]
    if prepared.control_power[0] > 0.0:
        times_noise_factor(prepared.variance, X, V, work.values, B)
        add_parameter_products(E, reach, X, work.values, OUT, row, B)
    else:
        add_parameter_products(E, reach, X, V, OUT, row, B)


@glue
def adjoint(prepared, work, n, X, A, V, NEXT, OUT, B):  # type: ignore[no-untyped-def]
    """The three products."""
    control_parameter_vjp(prepared, work, n, X, V, OUT, 0, B)
    base_vjp(prepared, work, n, X, A, NEXT, B)
    control_vjp(prepared, work, n, X, V, NEXT, B)


@glue
def running_cost(prepared, work, n, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] += sum_ij F_ij y_i^j and the wave's."""
    if prepared.running.shape[1] > 0:
        add_sum(prepared.running[n], prepared.reach[0], X, OUT, row, B)
    if prepared.wave.shape[0] > 0:
        c, power = prepared.wave[n], prepared.radial[2]
        square_length(X, work.radius, c[0], power, B)
        add_wave_cost(c, power, work.radius, OUT, row, B)


@glue
def running_cost_gradient(prepared, work, n, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += gradient."""
    if prepared.running.shape[1] > 0:
        add_slopes(prepared.running_slope[n], prepared.reach[0], X, OUT, B)
    if prepared.wave.shape[0] > 0:
        c, power = prepared.wave[n], prepared.radial[2]
        square_length(X, work.radius, c[0], power, B)
        add_wave_cost_gradient(c, power, work.radius, X, OUT, B)


@block_loop
def reward(prepared, work, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] = r(x)."""
    reach, R, radial = prepared.reach[0], work.radius, prepared.radial
    for p in range(0, B, lanes(X)):
        store(OUT, row, p, 0.0)
    if prepared.reward.shape[0] > 0:
        add_sum(prepared.reward, reach, X, OUT, row, B)
    if prepared.reward_factor.shape[0] > 0:
        polynomials(prepared.reward_factor, reach, X, work.values, B)
        for i in range(X.shape[0]):
            for p in range(B):
                OUT[row, p] += radial[3] * log(work.values[i, p])
    if radial[0] != 0.0 or radial[1] != 0.0:
        square_length(X, R, reach * 0, radial[2], B)
        for p in range(B):
            OUT[row, p] -= radial[0] * log(R[0, p] + 1)
        for p in range(0, B, lanes(X)):
            sine = wave_slopes(load(R, 1, p), load(R, 2, p), radial[2])[3]
            store(OUT, row, p, load(OUT, row, p) + radial[1] * sine)
    if prepared.funnel[0] != 0.0:
        add_funnel(prepared.funnel[0], X, OUT, row, B)


@block_loop
def reward_gradient(prepared, work, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = gradient of r(x)."""
    reach, R, radial = prepared.reach[0], work.radius, prepared.radial
    clear(OUT, B)
    if prepared.reward.shape[0] > 0:
        add_slopes(prepared.reward_slope, reach, X, OUT, B)
    if prepared.reward_factor.shape[0] > 0:
        polynomials(prepared.reward_factor, reach, X, work.values, B)
        clear(work.slopes, B)
        add_slopes(prepared.factor_slope, reach, X, work.slopes, B)
        for i in range(X.shape[0]):
            for p in range(0, B, lanes(X)):
                ratio = load(work.slopes, i, p) / load(work.values, i, p)
                store(OUT, i, p, load(OUT, i, p) + radial[3] * ratio)
    if radial[0] != 0.0 or radial[1] != 0.0:
        square_length(X, R, reach * 0, radial[2], B)
        for p in range(0, B, lanes(X)):
            slope = wave_slopes(load(R, 1, p), load(R, 2, p), radial[2])[0]
            pull = radial[1] * slope - radial[0] / (1.0 + load(R, 0, p))
            for i in range(X.shape[0]):
                store(OUT, i, p, load(OUT, i, p) + 2.0 * pull * load(X, i, p))
    if prepared.funnel[0] != 0.0:
        add_funnel_gradient(prepared.funnel[0], X, OUT, B)
