"""The noise of `sdebench.simulate.noise` in plain numpy: a second, readable route.

It follows the definition word for word and serves as the reference of the kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sdebench.simulate.elementary import (
    log_formula32,
    log_numpy,
    sincos32,
    sincos64,
    split_numpy,
)

Array = NDArray[Any]
Words = NDArray[np.uint64]

START_BLOCK = 0x80000000
"""Block numbers from here on belong to the start X_0."""
UNIFORM_BLOCK = 0xC0000000
"""The block whose word 0 selects the mixture component of X_0."""
BELOW_ONE32 = 1.0 - 2.0**-24
"""Largest float32 below 1."""

CHUNK = 1 << 16
"""Blocks made at once: the intermediate arrays stay in the cache."""

LOW = np.uint64(0xFFFFFFFF)
HALF_WORD = np.uint64(32)


def philox(counter: list[Words], k0: int, k1: int) -> list[Words]:
    """Return the four words of Philox4x32-10; 32-bit numbers in uint64 arrays."""
    c0, c1, c2, c3 = counter
    for r in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        key0 = np.uint64((k0 + r * 0x9E3779B9) & 0xFFFFFFFF)
        key1 = np.uint64((k1 + r * 0xBB67AE85) & 0xFFFFFFFF)
        c0, c1 = (b >> HALF_WORD) ^ c1 ^ key0, b & LOW
        c2, c3 = (a >> HALF_WORD) ^ c3 ^ key1, a & LOW
    return [c0, c1, c2, c3]


def block_words(
    key: tuple[int, int],
    replicate: int,
    first_path: int,
    n_paths: int,
    first_block: int,
    n_blocks: int,
) -> list[Words]:
    """Return the four words, each (n_blocks, n_paths), of consecutive blocks."""
    path = np.arange(n_paths, dtype=np.uint64) + np.uint64(first_path)
    block = np.arange(n_blocks, dtype=np.uint64)[:, None] + np.uint64(first_block)
    stream = np.full((1, 1), replicate, np.uint64)
    return philox([path & LOW, path >> HALF_WORD, block, stream], *key)


def radius(w: Words, dtype: np.dtype[Any]) -> Array:
    """Return sqrt(-2 log u), u = (w + 1/2) 2^-32."""
    if dtype == np.float64:
        return np.sqrt(-2.0 * log_numpy((w.astype(np.float64) + 0.5) * 2.0**-32))
    # t = u, or u - 1 if w >= 2^31: no cancellation for u close to 1
    signed = w.astype(np.uint32).view(np.int32)
    t = (signed.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    f, k = split_numpy(t + (signed < 0).astype(np.float32))
    f = np.where(k == 0, t, f)
    return np.sqrt(np.float32(-2.0) * log_formula32(f, k))


def direction(w: Words, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Return cosine and sine of the angle in word w."""
    odd = (w >> np.uint64(2)).astype(np.int64) * 4 + (2 - 2**31)
    v = odd.astype(dtype) * dtype.type(2.0**-31)
    s, c = sincos64(v) if dtype == np.float64 else sincos32(v)
    c = np.where((w & np.uint64(2)) != 0, -c, c)
    swap = (w & np.uint64(1)) != 0
    return np.where(swap, s, c), np.where(swap, c, s)


def normal_rows(
    key: tuple[int, int],
    replicate: int,
    first_path: int,
    n_paths: int,
    first_block: int,
    n_blocks: int,
    dtype: DTypeLike = np.float64,
) -> Array:
    """Return the normals (4 n_blocks, n_paths) of consecutive blocks."""
    dtype = np.dtype(dtype)
    out = np.empty((n_blocks, 4, n_paths), dtype)
    step = max(1, CHUNK // n_paths)
    for i in range(0, n_blocks, step):
        for p in range(0, n_paths, CHUNK):
            part = out[i : i + step, :, p : p + CHUNK]
            w = block_words(
                key,
                replicate,
                first_path + p,
                part.shape[2],
                first_block + i,
                part.shape[0],
            )
            for j in (0, 2):
                r, (c, s) = radius(w[j], dtype), direction(w[j + 1], dtype)
                part[:, j], part[:, j + 1] = r * c, r * s
    return out.reshape(4 * n_blocks, n_paths)


def uniforms(
    key: tuple[int, int],
    replicate: int,
    first_path: int,
    n_paths: int,
    dtype: DTypeLike = np.float64,
) -> Array:
    """Return the start uniforms (n_paths,)."""
    w = block_words(key, replicate, first_path, n_paths, UNIFORM_BLOCK, 1)[0][0]
    u = (w.astype(np.float64) + 0.5) * 2.0**-32
    single = np.dtype(dtype) == np.float32
    return np.minimum(u, BELOW_ONE32).astype(np.float32) if single else u
