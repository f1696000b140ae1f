"""The same computations as users would write them in numpy, torch, jax and plain numba.

Every function takes the coefficient tables of `sdebench.simulate.tables`, and returns
a function without arguments that simulates ``n`` paths with fresh noise of its library
and returns the cost of each path (n,), or its gradient (P, n).  A diagonal matrix is
applied as a vector and a scalar one as a number: no peer does needless products.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[], Any]


def has_jax() -> bool:
    """Tell whether jax is installed."""
    return importlib.util.find_spec("jax") is not None


def jax_modules() -> tuple[Any, Any]:
    """Return jax, with float64 enabled, and jax.numpy."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    return jax, jnp


def compact(matrices: np.ndarray) -> np.ndarray:
    """Return (N, d, d) as it is, or as (N, 1, d) if every matrix is diagonal."""
    diagonal = np.diagonal(matrices, axis1=1, axis2=2)
    dense = np.any(matrices * (1.0 - np.eye(matrices.shape[1])))
    return matrices if dense else np.ascontiguousarray(diagonal[:, None, :])


def apply(matrix: Any, x: Any) -> Any:
    """Return the product of a matrix of `compact` with rows x (n, d)."""
    return x * matrix if matrix.shape[0] == 1 and x.shape[-1] > 1 else x @ matrix.T


def linear_arrays(tables: Any) -> tuple[np.ndarray, ...]:
    """Return M, c, G, K, k per step, compact."""
    return (
        compact(tables.transition),
        tables.offset,
        compact(tables.noise),
        compact(tables.gain),
        tables.bias,
    )


# ---- linear family -------------------------------------------------------------------
def linear_numpy(tables: Any, n: int) -> Run:
    """Vectorised over paths; normals of PCG64."""
    M, c, G, K, k = linear_arrays(tables)
    Q, q, r0 = tables.reward_quadratic, tables.reward_linear, tables.reward_constant[0]
    start, generator = tables.start_mean, np.random.default_rng(0)

    def run() -> np.ndarray:
        x = np.tile(start, (n, 1))
        energy = np.zeros(n)
        for i in range(len(c)):
            w = apply(K[i], x) + k[i]
            energy += np.einsum("ij,ij->i", w, w)
            w += generator.standard_normal(x.shape)
            x = apply(M[i], x) + c[i] + apply(G[i], w)
        return 0.5 * energy + 0.5 * ((x @ Q) * x).sum(1) - x @ q - r0

    return run


def linear_torch(tables: Any, n: int, dtype: str = "float64") -> Run:
    """Eager torch."""
    import torch

    torch.set_num_threads(1)
    kind = getattr(torch, dtype)

    def tensor(a: Any) -> Any:
        return torch.tensor(np.ascontiguousarray(a), dtype=kind)

    M, c, G, K, k = map(tensor, linear_arrays(tables))
    Q, q = tensor(tables.reward_quadratic), tensor(tables.reward_linear)
    start, r0 = tensor(tables.start_mean), float(tables.reward_constant[0])

    def plus(offset: Any, matrix: Any, x: Any) -> Any:
        if matrix.shape[0] == 1 and x.shape[1] > 1:
            return torch.addcmul(offset, x, matrix)
        return torch.addmm(offset, x, matrix.T)

    @torch.no_grad()
    def run() -> np.ndarray:
        x = start.expand(n, -1).clone()
        energy = torch.zeros(n, dtype=kind)
        for i in range(len(c)):
            w = plus(k[i], K[i], x)
            energy += (w * w).sum(1)
            w += torch.randn(x.shape, dtype=kind)
            x = plus(plus(c[i], M[i], x), G[i], w)
        cost = 0.5 * energy + 0.5 * ((x @ Q) * x).sum(1) - x @ q - r0
        return np.asarray(cost.numpy())

    return run


def linear_jax(tables: Any, n: int, dtype: str = "float64") -> Run:
    """One jitted scan over the steps."""
    jax, jnp = jax_modules()
    steps = tuple(jnp.asarray(a, dtype) for a in linear_arrays(tables))
    Q, q = (
        jnp.asarray(a, dtype) for a in (tables.reward_quadratic, tables.reward_linear)
    )
    start, r0 = jnp.asarray(tables.start_mean, dtype), float(tables.reward_constant[0])

    @jax.jit
    def simulate(key: Any) -> Any:
        def body(carry: Any, step: Any) -> Any:
            x, energy, key = carry
            M, c, G, K, k = step
            key, sub = jax.random.split(key)
            w = apply(K, x) + k
            energy += (w * w).sum(1)
            shock = w + jax.random.normal(sub, x.shape, dtype)
            return (apply(M, x) + c + apply(G, shock), energy, key), None

        first = (jnp.broadcast_to(start, (n, start.size)), jnp.zeros(n, dtype), key)
        (x, energy, _), _ = jax.lax.scan(body, first, steps)
        return 0.5 * energy + 0.5 * ((x @ Q) * x).sum(1) - x @ q - r0

    keys = iter(range(1 << 30))
    return lambda: np.asarray(simulate(jax.random.key(next(keys))))


def linear_numba(tables: Any, n: int) -> Run:
    """Plain numba, one path after the other, ``np.random.normal``."""
    import numba

    arrays = (
        *(tables.transition, tables.offset, tables.noise, tables.gain, tables.bias),
        *(tables.reward_quadratic, tables.reward_linear, tables.start_mean),
    )
    scalar = not np.any(tables.noise * (1.0 - np.eye(tables.noise.shape[1])))
    r0 = float(tables.reward_constant[0])

    @numba.njit(error_model="numpy")
    def simulate(M, c, G, K, k, Q, q, start, scalar, cost):  # type: ignore[no-untyped-def]
        steps, d = c.shape
        x, y, shock = np.empty(d), np.empty(d), np.empty(d)
        for p in range(cost.size):
            for i in range(d):
                x[i] = start[i]
            total = 0.0
            for n in range(steps):
                for i in range(d):
                    w, v = k[n, i], c[n, i]
                    for j in range(d):
                        w += K[n, i, j] * x[j]
                        v += M[n, i, j] * x[j]
                    total += 0.5 * w * w
                    shock[i] = w + np.random.normal()  # noqa: NPY002 (numba's own)
                    y[i] = v
                for i in range(d):
                    if scalar:
                        x[i] = y[i] + G[n, i, i] * shock[i]
                    else:
                        x[i] = y[i]
                        for j in range(d):
                            x[i] += G[n, i, j] * shock[j]
            for i in range(d):
                total -= q[i] * x[i]
                for j in range(d):
                    total += 0.5 * x[i] * Q[i, j] * x[j]
            cost[p] = total

    cost = np.empty(n)

    def run() -> np.ndarray:
        simulate(*arrays, scalar, cost)
        return cost - r0

    return run


# ---- mixtures ------------------------------------------------------------------------
def mixture_rows(rows: np.ndarray, dim: int) -> tuple[np.ndarray, ...]:
    """Return slopes (N, K, d), |x|^2 coefficients and constants (N, K), isotropic."""
    return rows[..., :dim], rows[..., dim], rows[..., -1]


def mixture_torch(tables: Any, n: int) -> Run:
    """Eager torch, softmax over the modes."""
    import torch

    torch.set_num_threads(1)
    dim = tables.scale.shape[1]
    tensor = torch.tensor
    base = tuple(tensor(np.array(a)) for a in mixture_rows(tables.base, dim))
    tilted = tuple(tensor(np.array(a)) for a in mixture_rows(tables.tilted, dim))
    reward = tuple(tensor(np.array(a)) for a in mixture_rows(tables.reward, dim))
    a, c, b, g, e = (
        tensor(t)
        for t in (
            *(tables.scale, tables.offset, tables.base_gain, tables.noise),
            tables.control_gain,
        )
    )
    cumulative = tensor(tables.start_cumulative)
    mean, scale = tensor(tables.start_mean), tensor(tables.start_scale)

    def logits(x: Any, lin: Any, quad: Any, const: Any) -> Any:
        square = (x * x).sum(1, keepdim=True)
        return torch.addmm(const, x, lin.T) + square * quad

    def score(x: Any, lin: Any, quad: Any, const: Any) -> Any:
        weights = torch.softmax(logits(x, lin, quad, const), 1)
        return weights @ lin + 2.0 * (weights @ quad)[:, None] * x

    @torch.no_grad()
    def run() -> np.ndarray:
        index = torch.searchsorted(cumulative, torch.rand(n, dtype=torch.float64))
        x = mean[index] + scale[index] * torch.randn(n, dim, dtype=torch.float64)
        energy = torch.zeros(n, dtype=torch.float64)
        for i in range(len(c)):
            difference = score(x, *(part[i] for part in tilted))
            drift = torch.addcmul(c[i], x, a[i])
            if base[0].shape[1]:
                own = score(x, *(part[i] for part in base))
                difference -= own
                drift += b[i] * own
            w = e[i] * difference
            energy += (w * w).sum(1)
            w += torch.randn(n, dim, dtype=torch.float64)
            x = drift + g[i] * w
        return np.asarray(0.5 * energy - torch.logsumexp(logits(x, *reward), 1))

    return run


def mixture_jax(tables: Any, n: int) -> Run:
    """One jitted scan over the steps, softmax over the modes."""
    jax, jnp = jax_modules()
    dim = tables.scale.shape[1]
    base = tuple(map(jnp.asarray, mixture_rows(tables.base, dim)))
    tilted = tuple(map(jnp.asarray, mixture_rows(tables.tilted, dim)))
    reward = tuple(map(jnp.asarray, mixture_rows(tables.reward, dim)))
    plain = tuple(
        jnp.asarray(t)
        for t in (
            *(tables.scale, tables.offset, tables.base_gain, tables.noise),
            tables.control_gain,
        )
    )
    cumulative = jnp.asarray(tables.start_cumulative)
    mean, scale = jnp.asarray(tables.start_mean), jnp.asarray(tables.start_scale)

    def logits(x: Any, lin: Any, quad: Any, const: Any) -> Any:
        return x @ lin.T + (x * x).sum(1, keepdims=True) * quad + const

    def score(x: Any, lin: Any, quad: Any, const: Any) -> Any:
        weights = jax.nn.softmax(logits(x, lin, quad, const), axis=1)
        return weights @ lin + 2.0 * (weights @ quad)[:, None] * x

    @jax.jit
    def simulate(key: Any) -> Any:
        def body(carry: Any, step: Any) -> Any:
            x, energy, key = carry
            (a, c, b, g, e), own_rows, tilted_rows = step
            key, sub = jax.random.split(key)
            difference = score(x, *tilted_rows)
            drift = a * x + c
            if base[0].shape[1]:
                own = score(x, *own_rows)
                difference, drift = difference - own, drift + b * own
            w = e * difference
            energy += (w * w).sum(1)
            return (
                drift + g * (w + jax.random.normal(sub, x.shape)),
                energy,
                key,
            ), None

        key, first, second = jax.random.split(key, 3)
        index = jnp.searchsorted(cumulative, jax.random.uniform(first, (n,)))
        x = mean[index] + scale[index] * jax.random.normal(second, (n, dim))
        carry = (x, jnp.zeros(n), key)
        (x, energy, _), _ = jax.lax.scan(body, carry, (plain, base, tilted))
        return 0.5 * energy - jax.nn.logsumexp(logits(x, *reward), axis=1)

    keys = iter(range(1 << 30))
    return lambda: np.asarray(simulate(jax.random.key(next(keys))))


# ---- per-path gradients --------------------------------------------------------------
def gradient_torch(tables: Any, theta: np.ndarray, n: int) -> Run:
    """Reverse-mode differentiation of the whole path, one copy of theta per path."""
    import torch

    torch.set_num_threads(1)
    M, c, G, E, e, basis = (
        torch.tensor(np.array(a))
        for a in (
            *(tables.transition, tables.offset, compact(tables.noise)),
            *(tables.feature_gain, tables.feature_bias, tables.basis),
        )
    )
    full = [bool(np.any(a * (1 - np.eye(a.shape[-1])))) for a in tables.feature_gain]
    some = [bool(np.any(a)) for a in tables.feature_gain]
    Q, q = torch.tensor(tables.reward_quadratic), torch.tensor(tables.reward_linear)
    start, values = torch.tensor(tables.start_mean), torch.tensor(np.array(theta))

    def run() -> np.ndarray:
        own = values.expand(n, -1).clone().requires_grad_(True)
        x = start.expand(n, -1)
        energy = torch.zeros(n, dtype=torch.float64)
        for i in range(len(c)):
            weights = own @ basis[:, :, i]
            w: Any = 0.0
            for s, dense in enumerate(full):
                feature = e[s, i].expand(n, -1)
                if dense:
                    feature = torch.addmm(e[s, i], x, E[s, i].T)
                elif some[s]:
                    feature = torch.addcmul(e[s, i], x, E[s, i].diagonal())
                w = w + weights[:, s, None] * feature
            energy = energy + (w * w).sum(1)
            shock = w + torch.randn(n, x.shape[1], dtype=torch.float64)
            moved = shock * G[i] if G.shape[1] == 1 else shock @ G[i].T
            x = torch.addmm(c[i], x, M[i].T) + moved
        cost = 0.5 * energy + 0.5 * ((x @ Q) * x).sum(1) - x @ q
        return np.asarray(torch.autograd.grad(cost.sum(), own)[0].T.numpy())

    return run


def gradient_jax(tables: Any, theta: np.ndarray, n: int) -> Run:
    """Jitted vmap of the gradient of one path."""
    jax, jnp = jax_modules()
    steps = tuple(
        map(
            jnp.asarray,
            (
                *(tables.transition, tables.offset, tables.noise),
                tables.feature_gain.swapaxes(0, 1),
                tables.feature_bias.swapaxes(0, 1),
                np.moveaxis(tables.basis, 2, 0),
            ),
        )
    )
    Q, q = jnp.asarray(tables.reward_quadratic), jnp.asarray(tables.reward_linear)
    start, values = jnp.asarray(tables.start_mean), jnp.asarray(theta)

    def cost(parameters: Any, key: Any) -> Any:
        noise = jax.random.normal(key, (len(tables.offset), start.size))

        def body(carry: Any, step: Any) -> Any:
            x, energy = carry
            (M, c, G, E, e, basis), z = step
            w = (parameters @ basis) @ (E @ x + e)
            return (M @ x + c + G @ (w + z), energy + 0.5 * (w @ w)), None

        (x, energy), _ = jax.lax.scan(body, (start, 0.0), (steps, noise))
        return energy + 0.5 * x @ Q @ x - q @ x

    every = jax.jit(jax.vmap(jax.grad(cost), in_axes=(None, 0)))
    keys = iter(range(1 << 30))

    def run() -> np.ndarray:
        batch = jax.random.split(jax.random.key(next(keys)), n)
        return np.asarray(every(values, batch)).T

    return run
