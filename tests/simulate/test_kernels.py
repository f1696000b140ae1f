"""Kernels against plain numpy loops, finite differences and exact moments."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sdebench.estimators import (
    adjoint_matching,
    path_importance_sampling,
    pathwise,
    reinforce,
)
from sdebench.simulate import primitives, tile
from sdebench.simulate.forward import forward, path_buffers
from sdebench.simulate.jit import kernel
from sdebench.simulate.primitives import prepare, workspace
from sdebench.simulate.tables import (
    LinearTables,
    MixtureTables,
    SeparableTables,
    SineTables,
)
from sdebench.simulate.tile import PADDING

KEY = (11, 22, 3)  # k0, k1, replicate


# Toy problems: the control is linear in theta ----------------------------------------


def linear_tables(d, N=7, *, full=True, seed=0, theta=None):
    """Dense tables, or all-diagonal ones; P = 5 parameters over S = 3 maps."""
    rng = np.random.default_rng(seed)
    P, S, h = 5, 3, 1 / N

    def matrices(*shape):
        value = rng.normal(size=(*shape, d, d)) / math.sqrt(d)
        return value if full else value * np.eye(d)

    eye = np.eye(d)
    E = matrices(S, N)
    E[1] = 0.7 * eye  # a scalar map
    E[2] = 0.0  # a constant
    e = rng.normal(size=(S, N, d))
    e[1] = 0.0
    basis = rng.normal(size=(P, S, N)) * math.sqrt(h)
    basis[0, 1:] = 0.0
    basis[4, 0] = 0.0
    theta = rng.normal(size=P) if theta is None else theta
    weights = np.einsum("p,psn->sn", theta, basis)
    F = matrices(N)
    F = h * F @ F.transpose(0, 2, 1)
    Q = matrices()
    return LinearTables(
        transition=eye + h * (matrices(N) - eye),
        offset=h * rng.normal(size=(N, d)),
        noise=math.sqrt(h) * (0.8 * eye + 0.2 * matrices(N)),
        gain=np.einsum("sn,snij->nij", weights, E),
        bias=np.einsum("sn,sni->ni", weights, e),
        feature_gain=E,
        feature_bias=e,
        basis=basis,
        running=F,
        reward_quadratic=Q @ Q.T,
        reward_linear=rng.normal(size=d),
        reward_constant=np.array([0.3]),
        start_mean=rng.normal(size=d),
        start_factor=0.5 * matrices(),
    )


def mixture_tables(d, N=5, *, K0=2, K1=3, isotropic=False, seed=0, theta=None):
    """Random quadratics; P = 4 parameters."""
    rng = np.random.default_rng(seed)
    P, h = 4, 1 / N

    def rows(*shape):
        value = rng.normal(size=(*shape, 2 * d + 1))
        value[..., d : 2 * d] = -0.1 - rng.uniform(size=(*shape, d))
        if isotropic:
            value[..., d : 2 * d] = value[..., d : d + 1]
        return value

    derivative = 0.3 * rows(P, N, K1)
    derivative[1, ..., d:] = 0.0
    derivative[:, :, 0, 0] = 0.0
    derivative[2, ..., : 2 * d] = 0.0
    theta = rng.normal(size=P) if theta is None else theta
    tilted = rows(N, K1) + np.einsum("p,pnkc->nkc", theta, derivative)
    return MixtureTables(
        scale=1.0 - h * rng.uniform(size=(N, d)),
        offset=h * rng.normal(size=(N, d)),
        base_gain=h * (1.0 + rng.uniform(size=N)),
        noise=math.sqrt(h) * (0.5 + rng.uniform(size=N)),
        control_gain=math.sqrt(h) * (0.5 + rng.uniform(size=N)),
        base=rows(N, K0),
        tilted=tilted,
        tilted_derivative=derivative,
        reward=rows(3),
        start_cumulative=np.array([0.2, 0.7, 1.0]),
        start_mean=rng.normal(size=(3, d)),
        start_scale=0.1 + rng.uniform(size=(3, d)),
    )


def sine_tables(d, N=6, *, K=2, seed=0, theta=None):
    """Dense tables; P = 3 parameters."""
    rng = np.random.default_rng(seed)
    P, D, h = 3, d + K, 1 / N

    def matrices(*shape):
        return rng.normal(size=shape) / math.sqrt(d)

    derivative = math.sqrt(h) * matrices(P, N, d, D)
    bias_derivative = math.sqrt(h) * rng.normal(size=(P, N, d))
    theta = rng.normal(size=P) if theta is None else theta
    F, Q = matrices(N, d, d), matrices(d, d)
    return SineTables(
        direction=2.0 * rng.normal(size=(K, d)),
        phase=3.0 * rng.normal(size=K),
        transition=np.eye(d, D) + h * matrices(N, d, D),
        offset=h * rng.normal(size=(N, d)),
        noise=math.sqrt(h) * (0.8 * np.eye(d) + 0.2 * matrices(N, d, d)),
        gain=np.tensordot(theta, derivative, 1),
        bias=np.tensordot(theta, bias_derivative, 1),
        gain_derivative=derivative,
        bias_derivative=bias_derivative,
        running_quadratic=h * F @ F.transpose(0, 2, 1),
        running_linear=h * matrices(N, D),
        running_constant=h * rng.normal(size=N),
        reward_quadratic=Q @ Q.T,
        reward_linear=rng.normal(size=D),
        reward_constant=np.array([0.3]),
        start_mean=rng.normal(size=d),
        start_factor=0.5 * matrices(d, d),
    )


def separable_tables(d, N=6, *, radial=False, reach=1.5, seed=0, theta=None):
    """Cubic polynomials, some states beyond the reach; P = 3 parameters."""
    rng = np.random.default_rng(seed)
    P, h = 3, 1 / N
    derivative = math.sqrt(h) * rng.normal(size=(P, N, d, 3))
    theta = rng.normal(size=P) if theta is None else theta
    base = h * rng.normal(size=(N, d, 4))
    base[:, :, 1] += 1.0
    factor = np.zeros((d, 5))
    factor[:, ::2] = 0.2 + rng.uniform(size=(d, 3))
    factor[:, 1] = 0.1
    empty = np.zeros((0, 0))
    return SeparableTables(
        reach=np.array([reach]),
        base=base,
        beyond=1.0 + h * rng.normal(size=(N, d)),
        noise=math.sqrt(h) * (0.5 + rng.uniform(size=(N, d))),
        gain=np.tensordot(theta, derivative, 1),
        gain_derivative=derivative,
        running=np.zeros((N, 0, 0)) if radial else h * rng.normal(size=(N, d, 4)),
        reward=empty if radial else rng.normal(size=(d, 5)),
        reward_factor=empty if radial else factor,
        reward_log=np.array([0.7 if radial else 0.0]),
        reward_wave=np.array([1.3 if radial else 0.0]),
        wave_power=np.array([0.4 if radial else 0.0]),
        wave=h * rng.uniform(0.5, 1.0, size=(N if radial else 0, 4)),
        start_mean=rng.normal(size=d),
        start_factor=0.5 * rng.normal(size=(d, d)) / math.sqrt(d),
    )


CASES = [
    *(("linear", {"d": d}) for d in (1, 2, 3, 5, 10, 20)),
    *(("linear", {"d": d, "full": False}) for d in (2, 5)),
    *(("mixture", {"d": d, "K0": k}) for d, k in ((1, 0), (2, 9), (3, 1), (5, 2))),
    ("mixture", {"d": 10, "K0": 9, "K1": 9, "isotropic": True}),
    ("mixture", {"d": 20, "K0": 0, "K1": 5}),
    ("mixture", {"d": 2, "K0": 2, "K1": 1, "isotropic": True}),
    *(("sine", {"d": d, "K": k}) for d, k in ((1, 1), (2, 2), (5, 3))),
    *(("separable", {"d": d, "radial": r}) for d, r in ((1, 0), (3, 0), (5, 1))),
]
IDS = [f"{f}-{'-'.join(f'{k}{v}' for k, v in o.items())}" for f, o in CASES]


def make(family, **options):
    makers = {
        "linear": linear_tables,
        "mixture": mixture_tables,
        "sine": sine_tables,
        "separable": separable_tables,
    }
    return makers[family](**options)


def n_parameters(family):
    return {"linear": 5, "mixture": 4, "sine": 3, "separable": 3}[family]


# Plain reference: one path at a time, x (d,) ----------------------------------------


def mixture_value(rows, x):
    """log sum exp and its gradient and Hessian at x, rows (K, 2d + 1)."""
    d = x.size
    if rows.shape[0] == 0:
        return 0.0, np.zeros(d), np.zeros((d, d)), np.zeros(0), np.zeros((0, d))
    lin, quad, const = rows[:, :d], rows[:, d : 2 * d], rows[:, 2 * d]
    logits = lin @ x + quad @ (x * x) + const
    value = np.logaddexp.reduce(logits)
    gamma = np.exp(logits - value)
    g = lin + 2 * quad * x
    s = gamma @ g
    hessian = (g - s).T @ (gamma[:, None] * g) + 2 * np.diag(gamma @ quad)
    return value, s, hessian, gamma, g


class Reference:
    """Formulas of tables.py, one state at a time."""

    def __init__(self, tables):
        self.t = tables
        self.linear = isinstance(tables, LinearTables)

    @property
    def shape(self):
        return self.t.offset.shape

    def control(self, n, x):
        t = self.t
        if self.linear:
            return t.gain[n] @ x + t.bias[n]
        s1, s0 = mixture_value(t.tilted[n], x)[1], mixture_value(t.base[n], x)[1]
        return t.control_gain[n] * (s1 - s0)

    def noise(self, n):
        d = self.shape[1]
        return self.t.noise[n] if self.linear else self.t.noise[n] * np.eye(d)

    def base(self, n, x):
        t = self.t
        if self.linear:
            return t.transition[n] @ x + t.offset[n]
        s0 = mixture_value(t.base[n], x)[1]
        return t.scale[n] * x + t.offset[n] + t.base_gain[n] * s0

    def base_jacobian(self, n, x):
        t = self.t
        if self.linear:
            return t.transition[n]
        return np.diag(t.scale[n]) + t.base_gain[n] * mixture_value(t.base[n], x)[2]

    def control_jacobian(self, n, x):
        t = self.t
        if self.linear:
            return t.gain[n]
        h1, h0 = mixture_value(t.tilted[n], x)[2], mixture_value(t.base[n], x)[2]
        return t.control_gain[n] * (h1 - h0)

    def control_parameters(self, n, x):
        """dw/dtheta, (P, d)."""
        t = self.t
        d = x.size
        if self.linear:
            maps = np.einsum("sij,j->si", t.feature_gain[:, n], x)
            return t.basis[:, :, n] @ (maps + t.feature_bias[:, n])
        _, _, _, gamma, g = mixture_value(t.tilted[n], x)
        out = []
        for row in t.tilted_derivative[:, n]:
            dl = row[:, :d] @ x + row[:, d : 2 * d] @ (x * x) + row[:, 2 * d]
            dg = row[:, :d] + 2 * row[:, d : 2 * d] * x
            out.append((gamma * (dl - gamma @ dl)) @ g + gamma @ dg)
        return t.control_gain[n] * np.array(out)

    def running(self, n, x):
        return 0.5 * x @ self.t.running[n] @ x if self.linear else 0.0

    def running_gradient(self, n, x):
        return self.t.running[n] @ x if self.linear else np.zeros_like(x)

    def reward(self, x):
        t = self.t
        if self.linear:
            quadratic = -0.5 * x @ t.reward_quadratic @ x
            return quadratic + t.reward_linear @ x + t.reward_constant[0]
        return mixture_value(t.reward, x)[0]

    def reward_gradient(self, x):
        t = self.t
        if self.linear:
            return t.reward_linear - t.reward_quadratic @ x
        return mixture_value(t.reward, x)[1]

    def path(self, x, z):
        """States, controls and totals of one path on the noise z (N, d)."""
        X, W, totals = [x], [], np.zeros(4)
        for n in range(self.shape[0]):
            w = self.control(n, x)
            totals[:3] += 0.5 * w @ w, self.running(n, x), w @ z[n]
            x = self.base(n, x) + self.noise(n) @ (w + z[n])
            X.append(x)
            W.append(w)
        totals[3] = self.reward(x)
        return np.array(X), np.array(W), totals


class SineReference(Reference):
    """The same of the sine family."""

    def extended(self, x):
        """Return y and dy/dx."""
        angle = self.t.direction @ x + self.t.phase
        slope = np.cos(angle)[:, None] * self.t.direction
        return np.append(x, np.sin(angle)), np.vstack([np.eye(x.size), slope])

    def control(self, n, x):
        return self.t.gain[n] @ self.extended(x)[0] + self.t.bias[n]

    def noise(self, n):
        return self.t.noise[n]

    def base(self, n, x):
        return self.t.transition[n] @ self.extended(x)[0] + self.t.offset[n]

    def base_jacobian(self, n, x):
        return self.t.transition[n] @ self.extended(x)[1]

    def control_jacobian(self, n, x):
        return self.t.gain[n] @ self.extended(x)[1]

    def control_parameters(self, n, x):
        maps = self.t.gain_derivative[:, n] @ self.extended(x)[0]
        return maps + self.t.bias_derivative[:, n]

    def running(self, n, x):
        t = self.t
        linear = t.running_linear[n] @ self.extended(x)[0]
        return 0.5 * x @ t.running_quadratic[n] @ x + linear + t.running_constant[n]

    def running_gradient(self, n, x):
        linear = self.t.running_linear[n] @ self.extended(x)[1]
        return self.t.running_quadratic[n] @ x + linear

    def reward(self, x):
        t = self.t
        linear = t.reward_linear @ self.extended(x)[0]
        return linear - 0.5 * x @ t.reward_quadratic @ x + t.reward_constant[0]

    def reward_gradient(self, x):
        linear = self.t.reward_linear @ self.extended(x)[1]
        return linear - self.t.reward_quadratic @ x


class SeparableReference(Reference):
    """The same of the separable family; derivatives of the wave by hand."""

    @property
    def shape(self):
        return self.t.beyond.shape

    def polynomials(self, rows, x):
        """Return values and slopes of the polynomials, (d,)."""
        reach = self.t.reach[0]
        y, within = np.clip(x, -reach, reach), np.abs(x) < reach
        values, slopes = np.zeros_like(x), np.zeros_like(x)
        for i, row in enumerate(rows):
            polynomial = np.polynomial.Polynomial(row)
            values[i] = polynomial(y[i])
            slopes[i] = polynomial.deriv()(y[i]) * within[i]
        return values, slopes

    def control(self, n, x):
        return self.polynomials(self.t.gain[n], x)[0]

    def noise(self, n):
        return np.diag(self.t.noise[n])

    def base(self, n, x):
        reach = self.t.reach[0]
        far = x - np.clip(x, -reach, reach)
        return self.polynomials(self.t.base[n], x)[0] + self.t.beyond[n] * far

    def base_jacobian(self, n, x):
        far = self.t.beyond[n] * (np.abs(x) >= self.t.reach[0])
        return np.diag(self.polynomials(self.t.base[n], x)[1] + far)

    def control_jacobian(self, n, x):
        return np.diag(self.polynomials(self.t.gain[n], x)[1])

    def control_parameters(self, n, x):
        rows = self.t.gain_derivative[:, n]
        return np.array([self.polynomials(row, x)[0] for row in rows])

    def wave(self, n, s):
        """The wave's cost at s; the second derivative by a complex step."""
        delay, *c = self.t.wave[n]
        q, b, tiny = s + delay, self.t.wave_power[0], 1e-30

        def first(q):
            return b * q ** (b - 1.0) * np.cos(q**b)

        second = first(q + 1j * tiny).imag / tiny
        return c[0] * first(q) + s * (c[1] * second + c[2] * first(q) ** 2)

    def running(self, n, x):
        if len(self.t.wave):
            return self.wave(n, x @ x)
        return self.polynomials(self.t.running[n], x)[0].sum()

    def running_gradient(self, n, x):
        if len(self.t.wave):
            s, h = x @ x, 0.01 * (x @ x + self.t.wave[n, 0])
            at = [self.wave(n, s + k * h) for k in range(-4, 5)]
            slope = np.array([3, -32, 168, -672, 0, 672, -168, 32, -3]) @ at
            return 2.0 * slope / (840 * h) * x
        return self.polynomials(self.t.running[n], x)[1]

    def reward(self, x):
        t, s = self.t, x @ x
        value = t.reward_wave[0] * np.sin(s ** t.wave_power[0])
        value -= t.reward_log[0] * np.log(1.0 + s)
        value += np.log(self.polynomials(t.reward_factor, x)[0][: len(t.reward)]).sum()
        return value + self.polynomials(t.reward, x)[0].sum()

    def reward_gradient(self, x):
        t, s = self.t, x @ x
        b = t.wave_power[0]
        slope = t.reward_wave[0] * np.cos(s**b) * b * s ** (b - 1.0)
        slope -= t.reward_log[0] / (1.0 + s)
        gradient = 2.0 * slope * x
        if len(t.reward):
            factor, pull = self.polynomials(t.reward_factor, x)
            gradient = gradient + pull / factor + self.polynomials(t.reward, x)[1]
        return gradient


def reference_of(tables):
    kinds = {SineTables: SineReference, SeparableTables: SeparableReference}
    return kinds.get(type(tables), Reference)(tables)


# Runs ---------------------------------------------------------------------------------


def simulate(tables, B=32, dtype=np.float64, store=True, p0=0, key=KEY):
    prepared = prepare(tables, dtype)
    work = workspace(prepared, B)
    buffers = path_buffers(prepared, B, store)
    forward(prepared, work, buffers, B, p0, *key)
    return prepared, work, buffers


def statistics(module, run, rows, B, *options):
    prepared, work, b = run
    out = np.zeros((rows, B + PADDING), b.totals.dtype)
    args = (b.states, b.normals, b.controls, b.totals, B, *options, out)
    module.block_kernel(prepared, work, *args)
    return out[:, :B]


def close(actual, expected, dtype=np.float64):
    """Equal to 1e-12 (float64) or 1e-5 (float32) of the size of the array."""
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    scale = 1.0 + np.max(np.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


@kernel
def all_primitives(prepared, work, n, X, V, A, Z, B, ROWS, STATES, GRADIENTS):
    primitives.evaluate(prepared, work, n, X, STATES[0], B)
    primitives.step(prepared, work, n, X, STATES[0], Z, STATES[1], ROWS, B)
    primitives.noise_transpose(prepared, work, n, V, STATES[2], B)
    primitives.base_vjp(prepared, work, n, X, V, STATES[3], B)
    primitives.control_vjp(prepared, work, n, X, V, STATES[4], B)
    primitives.running_cost_gradient(prepared, work, n, X, STATES[5], B)
    primitives.reward_gradient(prepared, work, X, STATES[6], B)
    primitives.running_cost(prepared, work, n, X, ROWS, 1, B)
    primitives.reward(prepared, work, X, ROWS, 3, B)
    primitives.adjoint(prepared, work, n, X, A, V, STATES[7], GRADIENTS, B)
    P = prepared.n_parameters
    primitives.refresh_control(prepared, work, n, X, B)
    primitives.control_parameter_vjp(prepared, work, n, X, V, GRADIENTS, P, B)


@pytest.mark.parametrize(
    "dtype", [np.float64, pytest.param(np.float32, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("family", "options"), CASES, ids=IDS)
def test_primitives(family, options, dtype):
    tables = make(family, **options)
    reference = reference_of(tables)
    prepared = prepare(tables, dtype)
    d, B, n, P = reference.shape[1], 48, 3, prepared.n_parameters
    work = workspace(prepared, B)
    rng = np.random.default_rng(5)
    X, V, A, Z = rng.normal(size=(4, d, B + PADDING)).astype(dtype)
    rows = np.zeros((4, B + PADDING), dtype)
    states = np.zeros((8, d, B + PADDING), dtype)
    states[4] = states[5] = 1.0  # these two add
    gradients = np.zeros((2 * P, B + PADDING), dtype)
    all_primitives(prepared, work, n, X, V, A, Z, B, rows, states, gradients)
    expected = np.zeros((8, d, B))
    expected_rows = np.zeros((4, B))
    expected_gradients = np.zeros((2 * P, B))
    for p in range(B):
        x, v, a, z = (array[:, p].astype(float) for array in (X, V, A, Z))
        w = reference.control(n, x)
        base, control = reference.base_jacobian(n, x), reference.control_jacobian(n, x)
        G = reference.noise(n)
        expected[:, :, p] = [
            w,
            reference.base(n, x) + G @ (w + z),
            G.T @ v,
            base.T @ v,
            1.0 + control.T @ v,
            1.0 + reference.running_gradient(n, x),
            reference.reward_gradient(x),
            base.T @ a + control.T @ v,
        ]
        running, reward = reference.running(n, x), reference.reward(x)
        expected_rows[:, p] = w @ w, running, w @ z, reward
        gradient = reference.control_parameters(n, x) @ v
        expected_gradients[:, p] = np.concatenate([gradient, gradient])
    close(states[:, :, :B], expected, dtype)
    close(rows[:, :B], expected_rows, dtype)
    close(gradients[:, :B], expected_gradients, dtype)


@pytest.mark.parametrize(
    "dtype", [np.float64, pytest.param(np.float32, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("family", "options"), CASES, ids=IDS)
def test_forward(family, options, dtype):
    tables = make(family, **options)
    reference = reference_of(tables)
    N, _ = reference.shape
    _, _, b = simulate(tables, 32, dtype)
    for p in range(32):
        x, z = b.states[0, :, p].astype(float), b.normals[:N, :, p].astype(float)
        X, W, totals = reference.path(x, z)
        close(b.states[:, :, p], X, dtype)
        close(b.controls[:, :, p], W, dtype)
        close(b.totals[:, p], totals, dtype)


def test_start_states():
    """The start follows its law: each moment within 4.9 standard errors.

    24 comparisons, false-alarm rate 2.3e-5.
    """
    count = 8192
    every = linear_tables(3), mixture_tables(3), sine_tables(3), separable_tables(3)
    for tables in every:
        run = simulate(tables, count)
        x = run[2].states[0, :, :count].T
        if not isinstance(tables, MixtureTables):
            mean = tables.start_mean
            second = np.diag(tables.start_factor @ tables.start_factor.T) + mean**2
        else:
            weight = np.diff(tables.start_cumulative, prepend=0.0)
            mean = weight @ tables.start_mean
            second = weight @ (tables.start_mean**2 + tables.start_scale**2)
        for sample, exact in ((x, mean), (x**2, second)):
            error = sample.std(axis=0) / math.sqrt(count)
            assert np.all(np.abs(sample.mean(axis=0) - exact) < 4.9 * error)


@pytest.mark.parametrize("family", ["linear", "mixture", "sine", "separable"])
@pytest.mark.parametrize("d", [1, 2, 3, 5])
@pytest.mark.parametrize("N", [1, 6, 7, 401])
def test_ring_buffers_and_block_size(family, d, N):
    """Storing or not, and 64 or 256 paths at a time, give the same paths."""
    tables = make(family, d=d, N=N)
    stored = simulate(tables, 256)[2]
    ring = simulate(tables, 256, store=False)[2]
    np.testing.assert_array_equal(ring.totals, stored.totals)
    np.testing.assert_array_equal(ring.states[N % 2], stored.states[N])
    for p0 in (0, 192):
        small = simulate(tables, 64, p0=p0)[2]
        part = slice(p0, p0 + 64)
        np.testing.assert_array_equal(small.totals[:, :64], stored.totals[:, part])
        np.testing.assert_array_equal(
            small.states[:, :, :64], stored.states[:, :, part]
        )


def test_buffers_reject_odd_blocks():
    prepared = prepare(linear_tables(1), np.float64)
    with pytest.raises(ValueError, match="multiple of 16"):
        path_buffers(prepared, 100)


# Estimators ---------------------------------------------------------------------------


def costs(tables, B):
    totals = simulate(tables, B)[2].totals[:, :B]
    return totals[0] + totals[1] - totals[3]


def finite_difference(family, options, theta, B):
    """Central differences of the path costs on the same noise, (P, B)."""
    step = 1e-5
    rows = []
    for k in range(theta.size):
        up, down = theta.copy(), theta.copy()
        up[k] += step
        down[k] -= step
        plus = costs(make(family, **options, theta=up), B)
        minus = costs(make(family, **options, theta=down), B)
        rows.append((plus - minus) / (2 * step))
    return np.array(rows)


@pytest.mark.parametrize(("family", "options"), CASES, ids=IDS)
def test_pathwise_is_the_derivative(family, options):
    theta = np.random.default_rng(7).normal(size=n_parameters(family))
    tables = make(family, **options, theta=theta)
    run = simulate(tables, 32)
    gradient = statistics(pathwise, run, theta.size, 32, 1.0, False)
    expected = finite_difference(family, options, theta, 32)
    scale = 1.0 + np.abs(expected)
    assert np.max(np.abs(gradient - expected) / scale) < 1e-6
    # mutation: the lean adjoint is another thing
    lean = statistics(adjoint_matching, run, theta.size, 32, False)
    assert np.max(np.abs(lean - expected) / scale) > 1e-3


@pytest.mark.parametrize(
    ("family", "options", "dtype"),
    [(*case, np.float64) for case in CASES]
    # in the other families float32 is left to the primitives: each compiles for seconds
    + [
        pytest.param(*case, np.float32, marks=pytest.mark.slow)
        for case in CASES
        if case[0] == "linear"
    ],
)
def test_estimators_against_loops(family, options, dtype):
    tables = make(family, **options)
    reference = reference_of(tables)
    N = reference.shape[0]
    B = 32
    run = simulate(tables, B, dtype)
    P, b = run[0].n_parameters, run[2]
    full, lean = np.zeros((2, P, B))
    S, D = np.zeros((2, P, B))
    for p in range(B):
        X, W, Z = (
            array[:, :, p].astype(float) for array in (b.states, b.controls, b.normals)
        )
        lam = a = -reference.reward_gradient(X[N])
        for n in reversed(range(N)):
            dw, x = reference.control_parameters(n, X[n]), X[n]
            base, f = reference.base_jacobian(n, x), reference.running_gradient(n, x)
            v = W[n] + reference.noise(n).T @ lam
            full[:, p] += dw @ v
            lam = base.T @ lam + reference.control_jacobian(n, x).T @ v + f
            lean[:, p] += dw @ (W[n] + reference.noise(n).T @ a)
            a = base.T @ a + f
            S[:, p] += dw @ Z[n]
            D[:, p] += dw @ W[n]
    control, running, martingale, reward = b.totals[:, :B].astype(float)
    c = control + running - reward
    g = c * S + D
    even = np.arange(B) % 2 == 0
    split = [m * r for m in (even, ~even) for r in (g, S, g * S, S**2)]
    for module, expected, mode in (
        (pathwise, full, (1.0, False)),
        (adjoint_matching, lean, (False,)),
        (reinforce, g, (0, 1.0, 0)),
        (reinforce, np.concatenate([g, S, c * S, c[None]]), (1, 1.0, 0)),
        (reinforce, np.concatenate(split), (2, 1.0, 0)),
        (path_importance_sampling, (reward - running - martingale - control)[None], ()),
    ):
        rows = statistics(module, run, len(expected), B, *mode)
        # products of long sums lose a few more bits than a primitive
        relaxed = 1.0 if dtype == np.float64 else 0.1
        close(relaxed * rows, relaxed * expected, dtype)


@pytest.mark.parametrize("family", ["linear", "mixture", "sine", "separable"])
def test_pathwise_and_reinforce_agree(family):
    """Same mean gradient: each of at most 5 differences within 4.9 standard errors.

    15 comparisons over the families, false-alarm rate 1.5e-5; dropping the direct part
    of the score function is found.
    """
    tables = make(family, d=2)
    blocks, B = 64, 256
    prepared = prepare(tables, np.float64)
    P = prepared.n_parameters
    work, b = workspace(prepared, B), path_buffers(prepared, B)
    first = np.zeros((P, B + PADDING))
    second = np.zeros((3 * P + 1, B + PADDING))
    pairs = []
    for block in range(blocks):
        forward(prepared, work, b, B, block * B, *KEY)
        args = (prepared, work, b.states, b.normals, b.controls, b.totals, B)
        pathwise.block_kernel(*args, 1.0, False, first)
        reinforce.block_kernel(*args, 1, 1.0, 0, second)
        pairs.append((first[:, :B].copy(), second[:, :B].copy()))
    path = np.concatenate([q[0] for q in pairs], axis=1)
    score = np.concatenate([q[1] for q in pairs], axis=1)

    def distance(rows):
        difference = path - rows
        error = difference.std(axis=1) / math.sqrt(difference.shape[1])
        return np.abs(difference.mean(axis=1)) / error

    assert np.all(distance(score[:P]) < 4.9)
    # c S alone lacks D
    assert np.max(distance(score[2 * P : 3 * P])) > 4.9


# Exact moments of a linear chain ------------------------------------------------------


def exact_totals(t: LinearTables):
    """Mean totals by the recursion of mean and covariance of the chain."""
    mean, cov = t.start_mean, t.start_factor @ t.start_factor.T
    control = running = 0.0
    for n in range(t.offset.shape[0]):
        K, F, G = t.gain[n], t.running[n], t.noise[n]
        w = K @ mean + t.bias[n]
        control += 0.5 * (w @ w + np.trace(K @ cov @ K.T))
        running += 0.5 * (mean @ F @ mean + np.trace(F @ cov))
        M = t.transition[n] + G @ K
        mean = t.transition[n] @ mean + t.offset[n] + G @ w
        cov = M @ cov @ M.T + G @ G.T
    Q = t.reward_quadratic
    reward = -0.5 * (mean @ Q @ mean + np.trace(Q @ cov)) + t.reward_linear @ mean
    return np.array([control, running, 0.0, reward + t.reward_constant[0]])


@pytest.mark.parametrize("d", [1, 2, 5])
def test_mean_totals_of_linear_chain(d):
    """Each of 12 means within 4.9 standard errors: false-alarm rate 1.2e-5."""
    tables = linear_tables(d)
    B, blocks = 256, 64
    prepared = prepare(tables, np.float64)
    work, b = workspace(prepared, B), path_buffers(prepared, B, store=False)
    rows = []
    for block in range(blocks):
        forward(prepared, work, b, B, block * B, *KEY)
        rows.append(b.totals[:, :B].copy())
    sample = np.concatenate(rows, axis=1)
    error = sample.std(axis=1) / math.sqrt(sample.shape[1])
    exact = exact_totals(tables)
    assert np.all(np.abs(sample.mean(axis=1) - exact) < 4.9 * error)
    # mutations: a missing 1/2 and a shifted time index must be seen
    assert abs(2 * sample[0].mean() - exact[0]) > 4.9 * error[0]
    later = exact_totals(tables._replace(gain=np.roll(tables.gain, 1, axis=0)))
    assert np.max(np.abs(sample.mean(axis=1) - later) / error) > 4.9


# Vectors ------------------------------------------------------------------------------


@kernel
def products(A, b, X, Y, B):
    tile.affine(A, A.shape[1], b, X, Y, B)
    tile.add_product(A, X, Y, 0, B)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_tile_products(dtype):
    for rows, d in itertools.product((1, 2, 3, 4, 7, 12), (1, 2, 5)):
        rng = np.random.default_rng(0)
        A = rng.normal(size=(rows, d)).astype(dtype)
        b = rng.normal(size=rows).astype(dtype)
        X = rng.normal(size=(d, 32 + PADDING)).astype(dtype)
        Y = np.zeros((rows, 32 + PADDING), dtype)
        products(A, b, X, Y, 32)
        expected = 2 * A.astype(float) @ X.astype(float) + b[:, None]
        close(Y[:, :32], expected[:, :32], dtype)
        assert not Y[:, 32:].any()


@kernel
def exponential(X, B):
    for p in range(0, B, tile.lanes(X)):
        tile.store(X, 0, p, tile.exp(tile.load(X, 0, p)))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_vector_exponential(dtype):
    low = -700.0 if dtype == np.float64 else -80.0
    x = np.linspace(low, 0.0, 4096 + PADDING, dtype=dtype)[None].copy()
    expected = np.exp(x.astype(np.longdouble))
    exponential(x, 4096)
    error = np.abs(x / expected - 1)[0, :4096]
    assert np.max(error) < 1.5 * np.finfo(dtype).eps
    x[0] = -np.inf
    exponential(x, 4096)
    assert np.all(x[0, :4096] < 1e-30)


@kernel
def sine_and_cosine(X, Y, B):
    for p in range(0, B, tile.lanes(X)):
        s, c = tile.sincos(tile.load(X, 0, p))
        tile.store(Y, 0, p, s)
        tile.store(Y, 1, p, c)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_vector_sine_and_cosine(dtype):
    """Errors of at most 4 rounding errors of 1 + |x|, quadrants included."""
    x = np.linspace(-40.0, 40.0, 4096 + PADDING)
    x[:9] = np.pi / 4 * np.arange(-4, 5)
    x = x.astype(dtype)[None].copy()
    y = np.zeros((2, 4096 + PADDING), dtype)
    sine_and_cosine(x, y, 4096)
    angle = x[0, :4096].astype(np.longdouble)
    limit = 4.0 * np.finfo(dtype).eps * (1.0 + np.abs(angle))
    for row, exact in zip(y[:, :4096], (np.sin(angle), np.cos(angle)), strict=True):
        assert np.all(np.abs(row - exact) < limit)
