"""The numba kernels of `truncated`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sdebench.simulate import primitives
from sdebench.simulate.jit import kernel
from sdebench.simulate.tile import block_loop, clear, combine, glue, path_kernel


@block_loop
def draw(Z, first, last, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = whole numbers, uniform on first, ..., last, from normals Z."""
    count = last - first + 1
    for p in range(B):
        uniform = 0.5 * math.erfc(-np.float64(Z[p]) / math.sqrt(2.0))
        OUT[p] = first + min(int(count * uniform), count - 1)


@block_loop
def select(NUMBER, first, last, factor, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = factor V on the paths whose number is first, ..., last, else 0."""
    for i in range(V.shape[0]):
        for p in range(B):
            chosen = first <= NUMBER[p] and NUMBER[p] <= last
            OUT[i, p] = factor * V[i, p] if chosen else 0.0


@path_kernel
def window_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    OWN: Any,
    costs: float,
    shortest: int,
    longest: int,
    roulette: bool,
    OUT: Any,
) -> None:
    """Set OUT to the derivative through the last K steps of every path.

    K uniform on shortest, ..., longest (0: the whole chain); with ``roulette`` every
    step is divided by its probability.
    """
    N = W.shape[0]
    A, V, NEXT, length = work.adjoint, work.direction, work.adjoint_next, OWN[0, 0]
    longest = longest if longest > 0 else N
    draw(length, shortest, longest, length, B)
    clear(OUT, B)
    primitives.reward_gradient(prepared, work, X[N], A, B)
    combine(-1.0, A, 0.0, A, A, B)
    for n in range(N - 1, N - 1 - longest, -1):
        least = N - n  # steps from here to the end
        weight = 1.0
        if roulette:
            weight = (longest - shortest + 1) / min(
                longest - least + 1, longest - shortest + 1
            )
        primitives.refresh(prepared, work, n, X[n], B)
        primitives.noise_transpose_at(prepared, work, n, X[n], A, V, B)
        combine(1.0, V, costs, W[n], V, B)
        select(length, least, N, weight, V, NEXT, B)
        primitives.control_parameter_vjp(prepared, work, n, X[n], NEXT, OUT, 0, B)
        primitives.base_vjp(prepared, work, n, X[n], A, NEXT, B)
        primitives.noise_vjp(prepared, work, n, X[n], W[n], Z[n], A, NEXT, B)
        primitives.control_vjp(prepared, work, n, X[n], V, NEXT, B)
        if costs > 0.0:
            primitives.running_cost_gradient(prepared, work, n, X[n], NEXT, B)
        A, NEXT = NEXT, A


@glue
def denoised_slope(prepared, work, n, X, AFTER, Z, V, A, B):  # type: ignore[no-untyped-def]
    """V = derivative of -r(E[X_N | X_n = x]) in w_n, from the step x -> AFTER."""
    p, q, s = prepared.denoiser[n, 0], prepared.denoiser[n, 1], prepared.denoiser[n, 2]
    primitives.noise_transpose(prepared, work, n, Z, V, B)  # G z: G is a number
    combine(1.0, AFTER, -1.0, V, V, B)
    combine(p, X, q, V, V, B)
    primitives.reward_gradient(prepared, work, V, A, B)
    combine(-s, A, 0.0, A, V, B)


@path_kernel
def late_step_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    OWN: Any,
    late_share: float,
    OUT: Any,
) -> None:
    """Set OUT to the derivative through the prediction at one random late step."""
    N = W.shape[0]
    A, V, chosen = work.adjoint, work.direction, OWN[0, 0]
    first = N - math.ceil(late_share * N)
    draw(chosen, first, N - 1, chosen, B)
    clear(OUT, B)
    for n in range(first, N):
        denoised_slope(prepared, work, n, X[n], X[n + 1], Z[n], V, A, B)
        select(chosen, n, n, 1.0, V, V, B)
        primitives.refresh_control(prepared, work, n, X[n], B)
        primitives.control_parameter_vjp(prepared, work, n, X[n], V, OUT, 0, B)


@kernel  # no `path_kernel`: it allocates
def renoised_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    OWN: Any,
    OUT: Any,
) -> None:
    """Set OUT to the mean derivative through the last step from noised X_N."""
    n = W.shape[0] - 1
    count = OWN.shape[0]
    A, V, AFTER = work.adjoint, work.direction, work.adjoint_next
    unused = np.empty_like(totals)
    alpha, beta = prepared.denoiser[n, 3], prepared.denoiser[n, 4]
    clear(OUT, B)
    for i in range(count):
        noised = OWN[i]
        combine(alpha, X[n + 1], beta, noised, noised, B)
        primitives.evaluate(prepared, work, n, noised, V, B)
        primitives.step(prepared, work, n, noised, V, Z[n], AFTER, unused, B)
        denoised_slope(prepared, work, n, noised, AFTER, Z[n], V, A, B)
        combine(1.0 / count, V, 0.0, V, V, B)
        primitives.control_parameter_vjp(prepared, work, n, noised, V, OUT, 0, B)
