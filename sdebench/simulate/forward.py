"""Simulation of one block of paths, for every process family."""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import numpy as np

from sdebench.simulate import primitives
from sdebench.simulate.noise import fill_normals
from sdebench.simulate.primitives import Prepared
from sdebench.simulate.tables import Array
from sdebench.simulate.tile import (
    LANES,
    PADDING,
    clear,
    glue,
    lanes,
    load,
    path_kernel,
    store,
)

CHUNK_BYTES = 32768
"""Noise made at a time: it should still be in the L1 or L2 cache when it is used."""


class Buffers(NamedTuple):
    """The paths of one block; slot of step n: n modulo the number of slots."""

    states: Array  # (N + 1 or 2, d, B + PADDING) X_n
    normals: Array  # (N or one chunk, rounded up, d, B + PADDING) z_n
    normal_rows: Array  # the same memory, one row per coordinate
    controls: Array  # (N or 1, d, B + PADDING) w_n
    totals: Array  # (4, B + PADDING)
    words: Array  # (4, B + PADDING) uint32 scratch
    chunk: int  # steps whose noise is made at a time


def path_buffers(prepared: Prepared, block: int, store: bool = True) -> Buffers:
    """Allocate buffers for blocks of ``block`` paths.

    Parameters
    ----------
    block : int
        Paths per block, a multiple of 16.  256 is right on every machine seen.
    store : bool
        Keep whole paths, as estimators need; otherwise only the last state (slot N
        modulo 2) and the totals survive, and the memory does not grow with N.
    """
    if block < 1 or block % LANES:
        msg = f"block must be a positive multiple of {LANES}, got {block}"
        raise ValueError(msg)
    n_steps, dim = prepared.offset.shape
    dtype = prepared.offset.dtype
    width = block + PADDING
    unit = 4 // gcd(dim, 4)  # steps per whole number of random blocks
    padded = -(-n_steps // unit) * unit
    chunk = max(CHUNK_BYTES // (dim * block * dtype.itemsize) // unit, 1) * unit
    chunk = min(chunk, padded)
    normals = np.zeros((padded if store else chunk, dim, width), dtype)
    return Buffers(
        np.zeros((n_steps + 1 if store else 2, dim, width), dtype),
        normals,
        normals.reshape(-1, width),
        np.zeros((n_steps if store else 1, dim, width), dtype),
        np.zeros((4, width), dtype),
        np.zeros((4, width), np.uint32),
        chunk,
    )


@glue
def finish(prepared, work, X, totals, B):  # type: ignore[no-untyped-def]
    """Complete the totals of a block whose last states are X."""
    for p in range(0, B, lanes(totals)):
        store(totals, 0, p, 0.5 * load(totals, 0, p))
    primitives.reward(prepared, work, X, totals, 3, B)


@path_kernel
def forward(
    prepared: Any,
    work: Any,
    buffers: Buffers,
    B: int,
    p0: int,
    k0: int,
    k1: int,
    replicate: int,
) -> None:
    """Simulate paths p0, ..., p0 + B - 1 into ``buffers``.

    ``totals`` becomes [sum 1/2 |w_n|^2, running cost, sum w_n . z_n, r(X_N)].

    Parameters
    ----------
    prepared, work : from `prepare` and `workspace`.
    buffers : from `path_buffers`, for the same block.
    B : int
        Paths per block; at most the ``block`` of the buffers, a multiple of 16.
    p0 : int
        Index of the first path: part of the address of its noise.
    k0, k1 : int
        Low and high half of the 64-bit seed.
    replicate : int
        Independent repetition, below 2^32.
    """
    X, Z, W, totals = buffers.states, buffers.normals, buffers.controls, buffers.totals
    d = X.shape[1]
    N = prepared.offset.shape[0]
    clear(totals, B)
    primitives.start(prepared, work, X[0], B, p0, k0, k1, replicate)
    first = 0
    for n0 in range(0, N, buffers.chunk):
        steps = min(buffers.chunk, N - n0)
        rows = (steps * d + 3) // 4 * 4
        first = n0 % Z.shape[0]
        block = buffers.normal_rows[first * d :]
        fill_normals(block, buffers.words, rows, B, p0, n0 * d, k0, k1, replicate)
        for n in range(n0, n0 + steps):
            x = X[n % X.shape[0]]
            y = X[(n + 1) % X.shape[0]]
            w, z = W[n % W.shape[0]], Z[first + n - n0]
            if prepared.noisy[n] == 0.0:
                clear(z, B)
            primitives.evaluate(prepared, work, n, x, w, B)
            primitives.running_cost(prepared, work, n, x, totals, 1, B)
            primitives.step(prepared, work, n, x, w, z, y, totals, B)
    finish(prepared, work, X[N % X.shape[0]], totals, B)


@path_kernel
def replay(prepared: Any, work: Any, buffers: Buffers, B: int) -> None:
    """Simulate the paths whose start and noise stand in ``buffers`` already.

    The buffers must keep whole paths; otherwise as `forward`.
    """
    X, Z, W, totals = buffers.states, buffers.normals, buffers.controls, buffers.totals
    clear(totals, B)
    for n in range(W.shape[0]):
        if prepared.noisy[n] == 0.0:
            clear(Z[n], B)
        primitives.evaluate(prepared, work, n, X[n], W[n], B)
        primitives.running_cost(prepared, work, n, X[n], totals, 1, B)
        primitives.step(prepared, work, n, X[n], W[n], Z[n], X[n + 1], totals, B)
    finish(prepared, work, X[W.shape[0]], totals, B)
