"""Counter-based Gaussian noise: every normal has an address, no generator has a state.

Philox4x32-10 [1]_ maps a counter of four 32-bit words and a key of two to four random
words.  Address of normal number q = step * d + i of a path:

- key = (k0, k1), the low and high half of the 64-bit seed;
- counter = (path low, path high, q // 4, replicate); word q % 4 belongs to q;
- the start X_0 takes block numbers 0x80000000 + i // 4 for its normals and
  0xC0000000 (word 0) for the uniform that selects a mixture component.

Words (0, 1) and (2, 3) each make a Box-Muller pair: the first gives the radius,
u = (w + 1/2) 2^-32, the second the angle, v = ((w >> 2) + 1/2) 2^-29 - 1 times pi/4,
whose quadrant is set by its two low bits: bit 1 flips the cosine, bit 0 swaps sine and
cosine.  |z| <= 6.77, since u >= 2^-33.

float64 and float32 use the same words; numba, numpy and torch give the same bits, for
any block size, number of threads and offset.

References
----------
.. [1] J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11, 2011.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload
from numpy.typing import DTypeLike, NDArray

from sdebench.errors import ParameterError
from sdebench.simulate import noise_numpy
from sdebench.simulate.elementary import (
    F32,
    HALF32,
    U32,
    U64,
    bits32,
    bits64,
    log_polynomial32,
    log_polynomial64,
    real32,
    real64,
    sincos_strict32,
    sincos_strict64,
    split32,
    split64,
)
from sdebench.simulate.jit import inline, inner, kernel
from sdebench.simulate.noise_numpy import BELOW_ONE32, START_BLOCK, UNIFORM_BLOCK

Array = NDArray[Any]


# Words -----------------------------------------------------------------------------


@inline
def philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Return the four words of Philox4x32-10; every argument is a uint32."""
    for _ in range(10):
        a = U64(0xD2511F53) * U64(c0)
        b = U64(0xCD9E8D57) * U64(c2)
        c0 = U32(b >> U64(32)) ^ c1 ^ k0
        c2 = U32(a >> U64(32)) ^ c3 ^ k1
        c1, c3 = U32(b), U32(a)
        k0 = U32(k0 + U32(0x9E3779B9))
        k1 = U32(k1 + U32(0xBB67AE85))
    return c0, c1, c2, c3


@inner
def _fill_words(W, first, stop, low, high, block, replicate, k0, k1):  # type: ignore[no-untyped-def]
    """Fill columns [first, stop); their path numbers share the upper half ``high``."""
    w0, w1, w2, w3 = W[0], W[1], W[2], W[3]
    for p in range(first, stop):
        w0[p], w1[p], w2[p], w3[p] = philox(
            U32(low + U32(p)), high, block, replicate, k0, k1
        )


@inline
def fill_words(W, B, p0, block, k0, k1, replicate):  # type: ignore[no-untyped-def]
    """W[j, p] = word j of block ``block`` of path p0 + p, for p in [0, B)."""
    low = U32(U64(p0) & U64(0xFFFFFFFF))
    high = U32(U64(p0) >> U64(32))
    blk, rep, a, b = U32(block), U32(replicate), U32(k0), U32(k1)
    w0, w1, w2, w3 = W[0], W[1], W[2], W[3]
    for p in range(B):
        w0[p], w1[p], w2[p], w3[p] = philox(U32(low + U32(p)), high, blk, rep, a, b)
    # a carry in that loop would cost 20 %: do again the columns beyond a wrap
    wrap = np.int64(4294967296) - np.int64(low)
    if wrap < B:
        _fill_words(W, wrap, B, low, U32(high + U32(1)), blk, rep, a, b)


# Box-Muller: short loops through L1 keep the out-of-order window full -----------------


@inner
def _radius64(W, Z, r, B):  # type: ignore[no-untyped-def]
    for j in range(0, 4, 2):
        word, radius = W[j], Z[r + j]
        for p in range(B):
            # (2 w + 1) 2^-33 = u, exact in the mantissa of a number in [2^19, 2^20)
            x = real64((U64(word[p]) << U64(1)) | U64(0x4120000000000001))
            f, k = split64(x - 524288.0)
            radius[p] = math.sqrt(-2.0 * log_polynomial64(f, k))


@inner
def _angle64(W, Z, r, B):  # type: ignore[no-untyped-def]
    for j in range(0, 4, 2):
        word, z0, z1 = W[j + 1], Z[r + j], Z[r + j + 1]
        for p in range(B):
            w = U64(word[p])
            # (4 (w >> 2) + 2) 2^-31 - 1 = v, likewise
            x = real64((w & U64(0xFFFFFFFC)) | U64(0x4140000000000002))
            s, c = sincos_strict64(x - 2097153.0)
            c = real64(bits64(c) ^ ((w & U64(2)) << U64(62)))
            swap = (w & U64(1)) != U64(0)
            radius = z0[p]
            z0[p] = radius * (s if swap else c)
            z1[p] = radius * (c if swap else s)


@inner
def _radius32(W, Z, r, B):  # type: ignore[no-untyped-def]
    for j in range(0, 4, 2):
        word, radius = W[j], Z[r + j]
        for p in range(B):
            # t = u, or u - 1 if w >= 2^31: no cancellation for u close to 1
            w = np.int32(word[p])
            t = (F32(w) + HALF32) * F32(2.0**-32)
            one = real32(U32(U32(w >> np.int32(31)) & U32(0x3F800000)))
            f, k = split32(t + one)
            f = t if k == F32(0.0) else f
            radius[p] = F32(math.sqrt(F32(-2.0) * log_polynomial32(f, k)))


@inner
def _angle32(W, Z, r, B):  # type: ignore[no-untyped-def]
    for j in range(0, 4, 2):
        word, z0, z1 = W[j + 1], Z[r + j], Z[r + j + 1]
        for p in range(B):
            w = word[p]
            # v = (4 (w >> 2) + 2 - 2^31) 2^-31 through a signed 32-bit integer
            v = F32(np.int32(U32((w | U32(3)) ^ U32(0x80000001)))) * F32(2.0**-31)
            s, c = sincos_strict32(v)
            c = real32(U32(bits32(c) ^ U32((w & U32(2)) << U32(30))))
            swap = (w & U32(1)) != U32(0)
            radius = z0[p]
            z0[p] = radius * (s if swap else c)
            z1[p] = radius * (c if swap else s)


def box_muller(W: Any, Z: Any, r: Any, B: Any) -> None:
    """Z[r : r + 4] = normals of the four rows of words W, in the dtype of Z."""
    raise NotImplementedError("box_muller is for numba kernels")


@overload(box_muller, jit_options={"nogil": True, "error_model": "numpy"})
def _box_muller_by_precision(W, Z, r, B):  # type: ignore[no-untyped-def]
    if Z.dtype == types.float64:

        def fill(W, Z, r, B):  # type: ignore[no-untyped-def]
            _radius64(W, Z, r, B)
            _angle64(W, Z, r, B)

    else:

        def fill(W, Z, r, B):  # type: ignore[no-untyped-def]
            _radius32(W, Z, r, B)
            _angle32(W, Z, r, B)

    return fill


# Fills: called inside kernels ---------------------------------------------------------


@inner
def _fill_blocks(Z, words, rows, B, p0, block0, k0, k1, replicate):  # type: ignore[no-untyped-def]
    block = np.int64(block0)
    for r in range(0, rows, 4):
        fill_words(words, B, p0, block, k0, k1, replicate)
        box_muller(words, Z, r, B)
        block += 1


@inner
def fill_normals(Z, words, rows, B, p0, q0, k0, k1, replicate):  # type: ignore[no-untyped-def]
    """Z[r, p] = normal number q0 + r of path p0 + p, for r < rows and p < B.

    Parameters
    ----------
    Z : (>= rows, >= B) float64 or float32, C-contiguous; columns from B on are kept.
    words : (4, >= B) uint32 scratch.
    rows, q0 : divisible by 4.
    p0 : first path.
    k0, k1 : key, 32 bits each.
    replicate : 32 bits.
    """
    _fill_blocks(Z, words, rows, B, p0, np.int64(q0) >> 2, k0, k1, replicate)


@inner
def fill_start_normals(Z, words, rows, B, p0, q0, k0, k1, replicate):  # type: ignore[no-untyped-def]
    """Z[r, p] = normal q0 + r of the start of path p0 + p: see `fill_normals`."""
    block = np.int64(START_BLOCK) + (np.int64(q0) >> 2)
    _fill_blocks(Z, words, rows, B, p0, block, k0, k1, replicate)


@inner
def fill_start_uniform(U, words, B, p0, k0, k1, replicate):  # type: ignore[no-untyped-def]
    """U[p] = the uniform in (0, 1) that selects the start component of path p0 + p.

    Use float64 if the component must not depend on the dtype of the paths.
    """
    fill_words(words, B, p0, UNIFORM_BLOCK, k0, k1, replicate)
    w = words[0]
    limit = 1.0 if U.itemsize == 8 else BELOW_ONE32
    for p in range(B):
        U[p] = min((np.float64(w[p]) + 0.5) * 2.0**-32, limit)


# Entry points -------------------------------------------------------------------------


@kernel
def _normals_kernel(out, Z, words, p0, block0, k0, k1, replicate):  # type: ignore[no-untyped-def]
    """Fill out (rows, n_paths), rows divisible by 4, through the scratch Z, words."""
    rows, n_paths = out.shape
    width, height = words.shape[1], Z.shape[0]
    for first in range(0, n_paths, width):
        B = min(width, n_paths - first)
        for r in range(0, rows, height):
            n = min(height, rows - r)
            block = block0 + (r >> 2)
            _fill_blocks(Z, words, n, B, p0 + first, block, k0, k1, replicate)
            for i in range(n):
                source, target = Z[i], out[r + i]
                for p in range(B):
                    target[first + p] = source[p]


@kernel
def _uniforms_kernel(out, words, p0, k0, k1, replicate):  # type: ignore[no-untyped-def]
    fill_start_uniform(out, words, out.shape[0], p0, k0, k1, replicate)


def normal_rows(
    key: tuple[int, int],
    replicate: int,
    first_path: int,
    n_paths: int,
    first_block: int,
    n_blocks: int,
    dtype: DTypeLike = np.float64,
) -> Array:
    """Return the normals (4 n_blocks, n_paths) of consecutive blocks, made by numba."""
    out = np.empty((4 * n_blocks, n_paths), dtype)
    scratch, words = np.empty((32, 528), dtype), np.empty((4, 512), np.uint32)
    _normals_kernel(out, scratch, words, first_path, first_block, *key, replicate)
    return out


def uniforms(
    key: tuple[int, int],
    replicate: int,
    first_path: int,
    n_paths: int,
    dtype: DTypeLike = np.float64,
) -> Array:
    """Return the start uniforms (n_paths,), made by numba."""
    out = np.empty(n_paths, dtype)
    words = np.empty((4, n_paths), np.uint32)
    _uniforms_kernel(out, words, first_path, *key, replicate)
    return out


# Public interface ---------------------------------------------------------------------


class Noise(NamedTuple):
    """All random numbers of a block of n paths, the path index last.

    steps (N, d, n) and start (d, n) standard normals; uniforms (n,) in (0, 1).
    """

    steps: Array
    start: Array
    uniforms: Array


def block_noise(
    seed: int, replicate: int, first_path: int, n_paths: int, n_steps: int, dim: int
) -> Noise:
    """Return the noise that a simulation of these paths uses: see `normals`."""
    address = seed, replicate, first_path, n_paths
    return Noise(
        normals(*address, 0, n_steps, dim).swapaxes(1, 2),
        start_normals(*address, dim).T,
        start_uniforms(*address),
    )


def split_seed(seed: int) -> tuple[int, int]:
    """Return the key (k0, k1), the low and the high half of a 64-bit seed.

    Raises
    ------
    ParameterError
        If the seed is not an integer in [0, 2^64).
    """
    seed = _integer("seed", seed, 0, 2**64 - 1)
    return seed & 0xFFFFFFFF, seed >> 32


def normals(
    seed: int,
    replicate: int,
    first_path: int,
    n_paths: int,
    first_step: int,
    n_steps: int,
    dim: int,
    *,
    backend: str = "numba",
    dtype: str = "float64",
    device: str = "cpu",
) -> Any:
    """Return the standard normals that drive the given steps of the given paths.

    Parameters
    ----------
    seed : in [0, 2^64).
    replicate : in [0, 2^32); every replicate has noise of its own.
    first_path, n_paths : paths first_path, ..., first_path + n_paths - 1 < 2^63.
    first_step, n_steps : steps; (first_step + n_steps) * dim <= 2^33.
    dim : dimension of the noise.
    backend : ``"numba"``, ``"numpy"`` or ``"torch"``; all give the same bits.
    dtype : ``"float64"`` or ``"float32"``, made from the same random words.
    device : where torch makes them; ``"cpu"`` for the others.

    Returns
    -------
    array or tensor of shape (n_steps, n_paths, dim)
        In memory the path index is the fastest: a view of (n_steps, dim, n_paths).

    Raises
    ------
    ParameterError
        If an argument is outside its range.
    """
    address = _address(seed, replicate, first_path, n_paths)
    dim = _integer("dim", dim, 1, 2**33)
    first_step = _integer("first_step", first_step, 0, 2**33)
    n_steps = _integer("n_steps", n_steps, 1, 2**33)
    q0, q1 = first_step * dim, (first_step + n_steps) * dim
    if q1 > 2**33:
        raise ParameterError(
            f"(first_step + n_steps) * dim = {q1} is too large; "
            "a path has at most 2**33 normals"
        )
    block = q0 // 4
    rows = _rows(address, block, -(-q1 // 4) - block, backend, dtype, device)
    skip = q0 - 4 * block
    rows = rows[skip : skip + q1 - q0]
    return rows.reshape(n_steps, dim, n_paths).swapaxes(1, 2)


def start_normals(
    seed: int,
    replicate: int,
    first_path: int,
    n_paths: int,
    dim: int,
    *,
    backend: str = "numba",
    dtype: str = "float64",
    device: str = "cpu",
) -> Any:
    """Return the standard normals (n_paths, dim) of the start X_0: see `normals`."""
    address = _address(seed, replicate, first_path, n_paths)
    dim = _integer("dim", dim, 1, 2**32)
    blocks = -(-dim // 4)
    return _rows(address, START_BLOCK, blocks, backend, dtype, device)[:dim].T


def start_uniforms(
    seed: int,
    replicate: int,
    first_path: int,
    n_paths: int,
    *,
    backend: str = "numba",
    dtype: str = "float64",
    device: str = "cpu",
) -> Any:
    """Return the uniforms (n_paths,) in (0, 1) that select the component of X_0."""
    address = _address(seed, replicate, first_path, n_paths)
    _check_output(backend, dtype, device)
    if backend == "numba":
        return uniforms(*address, np.dtype(dtype))
    if backend == "numpy":
        return noise_numpy.uniforms(*address, np.dtype(dtype))
    import torch

    from sdebench.simulate import noise_torch

    precision = torch.float64 if dtype == "float64" else torch.float32
    return noise_torch.uniforms(*address, precision, device)


Address = tuple[tuple[int, int], int, int, int]


def _rows(
    address: Address, block: int, n_blocks: int, backend: str, dtype: str, device: str
) -> Any:
    """Return the normals (4 n_blocks, n_paths) of consecutive blocks."""
    _check_output(backend, dtype, device)
    if backend == "numba":
        return normal_rows(*address, block, n_blocks, np.dtype(dtype))
    if backend == "numpy":
        return noise_numpy.normal_rows(*address, block, n_blocks, np.dtype(dtype))
    import torch

    from sdebench.simulate import noise_torch

    precision = torch.float64 if dtype == "float64" else torch.float32
    return noise_torch.normal_rows(*address, block, n_blocks, precision, device)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    """Return ``value`` as an int in [low, high]."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise ParameterError(
            f"{name} must be an integer from {low} to {high}; got {value!r}"
        )
    return number


def _address(seed: int, replicate: int, first_path: int, n_paths: int) -> Address:
    key = split_seed(seed)
    replicate = _integer("replicate", replicate, 0, 2**32 - 1)
    first_path = _integer("first_path", first_path, 0, 2**63 - 2)
    n_paths = _integer("n_paths", n_paths, 1, 2**63 - 1 - first_path)
    return key, replicate, first_path, n_paths


def _check_output(backend: str, dtype: str, device: str) -> None:
    if backend not in ("numba", "numpy", "torch"):
        raise ParameterError(
            f"backend must be 'numba', 'numpy' or 'torch'; got {backend!r}"
        )
    if dtype not in ("float64", "float32"):
        raise ParameterError(f"dtype must be 'float64' or 'float32'; got {dtype!r}")
    if backend != "torch" and str(device) != "cpu":
        raise ParameterError(
            f"device must be 'cpu' for backend {backend!r}; got {device!r}"
        )
