"""The noise of `sdebench.simulate.noise` on torch tensors, on any device.

`normal_rows` and `uniforms` use torch operations only and give the bits of the numba
kernels.  The functions for simulations, `torch_step_normals` and the like, take the
kernels' noise on a CPU, where they are about ten times faster.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from sdebench.simulate import noise
from sdebench.simulate.elementary import (
    log_formula32,
    log_torch,
    sincos32,
    sincos64,
    split_torch,
    sqrt_torch,
)
from sdebench.simulate.noise_numpy import BELOW_ONE32, START_BLOCK, UNIFORM_BLOCK

Key = tuple[int, int]
Device = torch.device | str

LOW = 0xFFFFFFFF
CHUNK = 1 << 16
"""Blocks made at once on a CPU: the intermediate tensors stay in the cache."""
CHUNK_DEVICE = 1 << 21
"""Blocks made at once on any other device."""
STEPS_DEVICE = 64
"""Steps made at once on a device: a step alone would pay 100 kernel launches."""


def philox(counter: list[torch.Tensor], k0: int, k1: int) -> list[torch.Tensor]:
    """Return the four words of Philox4x32-10; 32-bit numbers in int64 tensors.

    A product wraps modulo 2^64; its arithmetic shift by 32, masked, is the upper word.
    """
    c0, c1, c2, c3 = counter
    for r in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        key0, key1 = (k0 + r * 0x9E3779B9) & LOW, (k1 + r * 0xBB67AE85) & LOW
        c0, c1 = ((b >> 32) & LOW) ^ c1 ^ key0, b & LOW
        c2, c3 = ((a >> 32) & LOW) ^ c3 ^ key1, a & LOW
    return [c0, c1, c2, c3]


def block_words(
    key: Key,
    replicate: int,
    first_path: int,
    n_paths: int,
    first_block: int,
    n_blocks: int,
    device: Device = "cpu",
) -> list[torch.Tensor]:
    """Return the four words, each (n_blocks, n_paths), of consecutive blocks."""
    path = torch.arange(n_paths, device=device) + first_path
    block = (torch.arange(n_blocks, device=device) + first_block)[:, None]
    stream = torch.full((1, 1), replicate, dtype=torch.int64, device=device)
    return philox([path & LOW, path >> 32, block, stream], *key)


def radius(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return sqrt(-2 log u), u = (w + 1/2) 2^-32."""
    if dtype == torch.float64:
        return sqrt_torch(-2.0 * log_torch((w.to(dtype) + 0.5) * 2.0**-32))
    # t = u, or u - 1 if w >= 2^31: no cancellation for u close to 1
    signed = (w ^ 0x80000000) - 0x80000000
    t = (signed.to(dtype) + 0.5) * 2.0**-32
    f, k = split_torch(t + (signed < 0).to(dtype))
    f = torch.where(k == 0, t, f)
    return sqrt_torch(-2.0 * log_formula32(f, k))


def direction(w: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of the angle in word w."""
    v = ((w >> 2) * 4 + (2 - 2**31)).to(dtype) * 2.0**-31
    s, c = sincos64(v) if dtype == torch.float64 else sincos32(v)
    c = torch.where((w & 2) != 0, -c, c)
    swap = (w & 1) != 0
    return torch.where(swap, s, c), torch.where(swap, c, s)


def normal_rows(
    key: Key,
    replicate: int,
    first_path: int,
    n_paths: int,
    first_block: int,
    n_blocks: int,
    dtype: torch.dtype = torch.float64,
    device: Device = "cpu",
) -> torch.Tensor:
    """Return the normals (4 n_blocks, n_paths) of consecutive blocks."""
    out = torch.empty((n_blocks, 4, n_paths), dtype=dtype, device=device)
    chunk = CHUNK if out.device.type == "cpu" else CHUNK_DEVICE
    step = max(1, chunk // n_paths)
    for i in range(0, n_blocks, step):
        for p in range(0, n_paths, chunk):
            part = out[i : i + step, :, p : p + chunk]
            n, _, m = part.shape
            w = block_words(
                key, replicate, first_path + p, m, first_block + i, n, device
            )
            for j in (0, 2):
                r, (c, s) = radius(w[j], dtype), direction(w[j + 1], dtype)
                part[:, j], part[:, j + 1] = r * c, r * s
    return out.reshape(4 * n_blocks, n_paths)


def uniforms(
    key: Key,
    replicate: int,
    first_path: int,
    n_paths: int,
    dtype: torch.dtype = torch.float64,
    device: Device = "cpu",
) -> torch.Tensor:
    """Return the start uniforms (n_paths,)."""
    w = block_words(key, replicate, first_path, n_paths, UNIFORM_BLOCK, 1, device)
    u = (w[0][0].to(torch.float64) + 0.5) * 2.0**-32
    return u if dtype == torch.float64 else u.clamp(max=BELOW_ONE32).to(dtype)


# For simulations ----------------------------------------------------------------------


def torch_step_normals(
    key: Key,
    replicate: int,
    first_path: int,
    n_paths: int,
    step: int,
    dim: int,
    dtype: torch.dtype = torch.float64,
    device: Device = "cpu",
) -> torch.Tensor:
    """Return the normals (n_paths, dim) of one step, a tensor of the caller's own.

    Neighbouring steps are made together and the last chunks are remembered, so that
    asking for one step after the other, up or down, makes every normal once.
    """
    device = torch.device(device)
    n = steps_per_chunk(n_paths, dim, device)
    make = _chunk if n > 1 else _chunk.__wrapped__
    chunk = step // n
    rows = make(key, replicate, first_path, n_paths, chunk, n, dim, dtype, device)
    i = step % n * dim
    return rows[i : i + dim].T.clone(memory_format=torch.contiguous_format)


def steps_per_chunk(n_paths: int, dim: int, device: torch.device) -> int:
    """Return the number of steps made together; they fill whole blocks of four."""
    unit = 4 // math.gcd(4, dim)
    if device.type == "cpu":
        return unit
    fit = min(STEPS_DEVICE, 4 * CHUNK_DEVICE // (n_paths * dim))
    return unit * max(1, fit // unit)


def torch_start_normals(
    key: Key,
    replicate: int,
    first_path: int,
    n_paths: int,
    dim: int,
    dtype: torch.dtype = torch.float64,
    device: Device = "cpu",
) -> torch.Tensor:
    """Return the normals (n_paths, dim) of the start X_0."""
    blocks = -(-dim // 4)
    rows = _fast_rows(
        key, replicate, first_path, n_paths, START_BLOCK, blocks, dtype, device
    )
    return rows[:dim].T.contiguous()


def torch_start_uniforms(
    key: Key,
    replicate: int,
    first_path: int,
    n_paths: int,
    dtype: torch.dtype = torch.float64,
    device: Device = "cpu",
) -> torch.Tensor:
    """Return the uniforms (n_paths,) that select the component of X_0."""
    return uniforms(key, replicate, first_path, n_paths, dtype, device)


def _fast_rows(
    key: Key,
    replicate: int,
    first_path: int,
    n_paths: int,
    block: int,
    n_blocks: int,
    dtype: torch.dtype,
    device: Device,
) -> torch.Tensor:
    """Return `normal_rows`, from the numba kernel if the device is a CPU."""
    if torch.device(device).type != "cpu":
        return normal_rows(
            key, replicate, first_path, n_paths, block, n_blocks, dtype, device
        )
    name = "float64" if dtype == torch.float64 else "float32"
    rows = noise.normal_rows(key, replicate, first_path, n_paths, block, n_blocks, name)
    return torch.from_numpy(rows)


@lru_cache(maxsize=2)
def _chunk(
    key: Key,
    replicate: int,
    first_path: int,
    n_paths: int,
    index: int,
    n_steps: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Return the normals (n_steps * dim, n_paths) of the steps of chunk ``index``."""
    n_blocks = n_steps * dim // 4
    return _fast_rows(
        key,
        replicate,
        first_path,
        n_paths,
        index * n_blocks,
        n_blocks,
        dtype,
        device,
    )
