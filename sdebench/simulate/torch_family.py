"""The process families as batched torch functions over the coefficient tables.

States are (n_paths, dim).  Every method is the torch twin of a numba primitive on the
same table; with the same noise both agree path by path to rounding.  All are
differentiable torch operations, so autograd through x works as well.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sdebench.simulate.tables import (
    TINY,
    LinearTables,
    MixtureTables,
    SeparableTables,
    SineTables,
    StartLaw,
    Tables,
    start_law,
)


class TorchFamily(Protocol):
    """One step of a process family, n the step index; vjp means J^T v."""

    n_steps: int
    n_params: int
    dim: int

    def start(self, normals: Tensor, uniforms: Tensor) -> Tensor:
        """Return X_0 (n, d) from normals (n, d) and uniforms (n,)."""

    def control(self, n: int, x: Tensor) -> Tensor:
        """Return w_n(x) (n, d), the control in noise units."""

    def base_mean(self, n: int, x: Tensor) -> Tensor:
        """Return the mean of the base transition from x."""

    def apply_noise(self, n: int, v: Tensor) -> Tensor:
        """Return G_n v."""

    def noise_transpose(self, n: int, v: Tensor) -> Tensor:
        """Return G_n^T v."""

    def base_vjp(self, n: int, x: Tensor, v: Tensor) -> Tensor:
        """Return (d base mean / dx)^T v."""

    def control_vjp(self, n: int, x: Tensor, v: Tensor) -> Tensor:
        """Return (dw_n / dx)^T v."""

    def control_parameter_vjp(self, n: int, x: Tensor, v: Tensor) -> Tensor:
        """Return (dw_n / dtheta)^T v, (n, P)."""

    def running_cost(self, n: int, x: Tensor) -> Tensor:
        """Return the running cost of step n, (n,)."""

    def running_cost_gradient(self, n: int, x: Tensor) -> Tensor:
        """Return its gradient in x."""

    def reward(self, x: Tensor) -> Tensor:
        """Return r(x), (n,)."""

    def reward_gradient(self, x: Tensor) -> Tensor:
        """Return grad r(x)."""


class TorchLinear:
    """`LinearTables` in torch."""

    def __init__(self, tables: LinearTables, dtype: torch.dtype, device: str) -> None:
        self._t: Any = LinearTables._make(
            torch.tensor(a, dtype=dtype, device=device) for a in tables
        )
        self.n_steps, self.dim = tables.offset.shape
        self.n_params = len(tables.basis)
        self._has_running = bool(np.any(tables.running))
        self._law: Any = StartLaw._make(
            torch.tensor(a, dtype=dtype, device=device) for a in start_law(tables)
        )

    def start(self, normals: Tensor, uniforms: Tensor) -> Tensor:
        return self._t.start_mean + normals @ self._t.start_factor.T

    # ---- where theta moves the law of X_0 --------------------------------------------
    def _start_noise(self, x: Tensor) -> Tensor:
        return (x - self._t.start_mean) @ self._law.inverse.T

    def _start_product(self, derivative: Tensor, z: Tensor, v: Tensor) -> Tensor:
        """Return v . derivative[p] (1, z), (n, P)."""
        moved = derivative[:, None, :, 0] + z @ derivative[:, :, 1:].mT  # (P, n, d)
        return (moved * v).sum(2).T

    def start_parameter_vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return (dX_0/dtheta)^T v, (n, P), at X_0 = x."""
        return self._start_product(self._law.derivative, self._start_noise(x), v)

    def start_score(self, x: Tensor) -> Tensor:
        """Return d log p_theta(x)/dtheta, (n, P)."""
        z = self._start_noise(x)
        return self._start_product(self._law.whitened, z, z) - self._law.trace

    def start_cost_gradient(self) -> Tensor:
        """Return the gradient (P,) of the relative entropy to the reference law."""
        gradient: Tensor = self._t.start_cost_gradient
        return gradient

    def start_log_ratio_gradient(self, x: Tensor) -> Tensor:
        """Return the gradient in x of log p_theta/p_0, (n, d)."""
        return x @ self._law.ratio.T + self._law.ratio_shift

    def control(self, n: int, x: Tensor) -> Tensor:
        return self._t.bias[n] + x @ self._t.gain[n].T

    def base_mean(self, n: int, x: Tensor) -> Tensor:
        return self._t.offset[n] + x @ self._t.transition[n].T

    def apply_noise(self, n: int, v: Tensor) -> Tensor:
        return v @ self._t.noise[n].T

    def noise_transpose(self, n: int, v: Tensor) -> Tensor:
        return v @ self._t.noise[n]

    def base_vjp(self, n: int, x: Tensor, v: Tensor) -> Tensor:
        return v @ self._t.transition[n]

    def control_vjp(self, n: int, x: Tensor, v: Tensor) -> Tensor:
        return v @ self._t.gain[n]

    def control_parameter_vjp(self, n: int, x: Tensor, v: Tensor) -> Tensor:
        t = self._t
        maps = x @ t.feature_gain[:, n].mT + t.feature_bias[:, n, None, :]  # (S, b, d)
        return (maps * v).sum(2).T @ t.basis[:, :, n].T

    def running_cost(self, n: int, x: Tensor) -> Tensor:
        if not self._has_running:
            return x.new_zeros(len(x))
        return 0.5 * ((x @ self._t.running[n]) * x).sum(1)

    def running_cost_gradient(self, n: int, x: Tensor) -> Tensor:
        if not self._has_running:
            return torch.zeros_like(x)
        return x @ self._t.running[n]

    def reward(self, x: Tensor) -> Tensor:
        quadratic = 0.5 * ((x @ self._t.reward_quadratic) * x).sum(1)
        value = self._t.reward_constant[0] + x @ self._t.reward_linear - quadratic
        if len(self._t.reward_quartic):
            value = value - 0.25 * (x**4 @ self._t.reward_quartic)
        return value

    def reward_gradient(self, x: Tensor) -> Tensor:
        slope = self._t.reward_linear - x @ self._t.reward_quadratic
        if len(self._t.reward_quartic):
            slope = slope - self._t.reward_quartic * x**3
        return slope


class _LogQuadratics:
    """sum_k exp l_k at a batch of states: weights, their average slope, products.

    Sums over k are products with the rows' matrices, as in the numba kernels; a
    quadratic part that all k ``share`` drops out of the weights.
    """

    def __init__(self, rows: Tensor, x: Tensor, share: bool = False) -> None:
        dim = x.shape[1]
        self._x, self._lin, self._share = x, rows[:, :dim], share
        self._quad = rows[:1, dim:-1] if share else rows[:, dim:-1]
        self._constant = rows[:, -1]
        self.exponents = self._along(x, x * x) + self._constant
        self.weights = torch.softmax(self.exponents, dim=1)
        self._curvature = 2.0 * self._averaged_quad(self.weights)
        self.score = self.weights @ self._lin + self._curvature * x

    def _along(self, v: Tensor, square: Tensor) -> Tensor:
        """Return lin_k . v + quad_k . square (n, K), without what all k share."""
        found = v @ self._lin.T
        return found if self._share else found + square @ self._quad.T

    def _averaged_quad(self, weights: Tensor) -> Tensor:
        return self._quad if self._share else weights @ self._quad

    def log_value(self) -> Tensor:
        """Return log sum_k exp l_k, (n,)."""
        found = torch.logsumexp(self.exponents, dim=1)
        if self._share:
            found = found + (self._x * self._x) @ self._quad[0]
        return found

    def projection(self, v: Tensor) -> Tensor:
        """Return gamma_k (grad l_k . v - score . v), (n, K); its sum over k is 0."""
        along = self._along(v, 2.0 * self._x * v)
        mean = (self.weights * along).sum(1, keepdim=True)
        return self.weights * (along - mean)

    def hessian_product(self, v: Tensor) -> Tensor:
        """Return (Hessian of the log) v; the Hessian is symmetric."""
        spread = self.projection(v)
        result = spread @ self._lin + self._curvature * v
        if not self._share:
            result = result + 2.0 * self._x * (spread @ self._quad)
        return result


def _alike(rows: np.ndarray, first: int, last: int) -> bool:
    """Tell whether columns of rows (..., K, 2d + 1) are the same for all k.

    Differences of a few rounding errors count as none.
    """
    part = rows[..., first:last]
    if part.size == 0:
        return True
    limit = 16.0 * np.finfo(np.float64).eps * np.max(np.abs(part), axis=-2)
    return bool(np.all(np.abs(part - part[..., :1, :]) <= limit[..., None, :]))


class TorchMixture:
    """`MixtureTables` in torch."""

    def __init__(self, tables: MixtureTables, dtype: torch.dtype, device: str) -> None:
        self._t: Any = MixtureTables._make(
            torch.tensor(a, dtype=dtype, device=device) for a in tables
        )
        self.n_steps, self.dim = tables.offset.shape
        self.n_params = len(tables.tilted_derivative)
        self._has_base = tables.base.shape[1] > 0
        self._last: tuple[int, Tensor, int, Any, Any] | None = None
        end = 2 * self.dim
        self._share = {
            name: _alike(getattr(tables, name), self.dim, end)
            for name in ("base", "tilted", "density")
        }
        self._varying = [not _alike(rows, 0, end) for rows in tables.tilted_derivative]

    def _mixture(self, name: str, n: int, x: Tensor) -> _LogQuadratics:
        return _LogQuadratics(getattr(self._t, name)[n], x, self._share[name])

    def _at(self, n: int, x: Tensor) -> tuple[Any, Any]:
        """Return base and tilted log-quadratics at x; the last ones are remembered.

        An adjoint step asks for several products at the same state.
        """
        last = self._last
        if (
            last is None
            or last[:1] != (n,)
            or last[1] is not x
            or (last[2] != x._version)
        ):
            base = self._mixture("base", n, x) if self._has_base else None
            tilted = self._mixture("tilted", n, x)
            last = self._last = (n, x, x._version, base, tilted)
        return last[3], last[4]

    def start(self, normals: Tensor, uniforms: Tensor) -> Tensor:
        t = self._t
        index = torch.searchsorted(t.start_cumulative, uniforms, right=True)
        index = index.clamp(max=len(t.start_cumulative) - 1)
        return t.start_mean[index] + t.start_scale[index] * normals

    def tilted_sample(self, normals: Tensor, uniforms: Tensor) -> Tensor:
        """Return samples (n, d) of the tilted law p_T e^r / Z."""
        t = self._t
        index = torch.searchsorted(t.end_cumulative, uniforms, right=True)
        index = index.clamp(max=len(t.end_cumulative) - 1)
        return t.end_mean[index] + t.end_scale[index] * normals

    def control(self, n: int, x: Tensor) -> Tensor:
        base, tilted = self._at(n, x)
        score = tilted.score if base is None else tilted.score - base.score
        return self._t.control_gain[n] * score

    def base_mean(self, n: int, x: Tensor) -> Tensor:
        base, _ = self._at(n, x)
        mean = self._t.scale[n] * x + self._t.offset[n]
        return mean if base is None else mean + self._t.base_gain[n] * base.score

    def apply_noise(self, n: int, v: Tensor) -> Tensor:
        return self._t.noise[n] * v

    noise_transpose = apply_noise

    def base_vjp(self, n: int, x: Tensor, v: Tensor) -> Tensor:
        base, _ = self._at(n, x)
        result = self._t.scale[n] * v
        if base is None:
            return result
        return result + self._t.base_gain[n] * base.hessian_product(v)

    def control_vjp(self, n: int, x: Tensor, v: Tensor) -> Tensor:
        base, tilted = self._at(n, x)
        product = tilted.hessian_product(v)
        if base is not None:
            product = product - base.hessian_product(v)
        return self._t.control_gain[n] * product

    def control_parameter_vjp(self, n: int, x: Tensor, v: Tensor) -> Tensor:
        _, tilted = self._at(n, x)
        rows = self._t.tilted_derivative[:, n]  # (P, K, 2d + 1)
        spread, squared, along = tilted.projection(v), x * x, 2.0 * x * v
        found = spread @ rows[..., -1].T  # as sum_k a_k = 0, what all k share is left
        direct = v @ rows[:, 0, : self.dim].T + along @ rows[:, 0, self.dim : -1].T
        columns = []
        for p, varying in enumerate(self._varying):
            value = found[:, p]
            if varying:
                lin, quad = rows[p, :, : self.dim], rows[p, :, self.dim : -1]
                value = value + (spread * (x @ lin.T + squared @ quad.T)).sum(1)
                moved = tilted.weights * (v @ lin.T + along @ quad.T)
                columns.append(value + moved.sum(1))
            else:
                columns.append(value + direct[:, p])
        return self._t.control_gain[n] * torch.stack(columns, dim=1)

    def running_cost(self, n: int, x: Tensor) -> Tensor:
        return x.new_zeros(len(x))

    def running_cost_gradient(self, n: int, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def reward(self, x: Tensor) -> Tensor:
        value = _LogQuadratics(self._t.reward, x).log_value()
        if len(self._t.reward_below):
            value = value - _LogQuadratics(self._t.reward_below, x).log_value()
        return value

    def reward_gradient(self, x: Tensor) -> Tensor:
        slope = _LogQuadratics(self._t.reward, x).score
        if len(self._t.reward_below):
            slope = slope - _LogQuadratics(self._t.reward_below, x).score
        return slope

    def base_log_density(self, n: int, x: Tensor) -> Tensor:
        """Return log p(x) of the base process at time n = 0, ..., N, (n,)."""
        return self._mixture("density", n, x).log_value()

    def base_score(self, n: int, x: Tensor) -> Tensor:
        """Return grad log p(x) of the base process at time n = 0, ..., N."""
        return self._mixture("density", n, x).score


class TorchSine:
    """`SineTables` in torch."""

    def __init__(self, tables: SineTables, dtype: torch.dtype, device: str) -> None:
        self._t: Any = SineTables._make(
            torch.tensor(a, dtype=dtype, device=device) for a in tables
        )
        self.n_steps, self.dim = tables.offset.shape
        self.n_params = len(tables.gain_derivative)

    def _phase(self, x: Tensor) -> Tensor:
        return x @ self._t.direction.T + self._t.phase

    def _extended(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.sin(self._phase(x))], dim=1)

    def _pull(self, x: Tensor, v: Tensor) -> Tensor:
        """Return (dy/dx)^T v for v (n, d + K), or (d + K,) for all states."""
        linear, sines = v[..., : self.dim], v[..., self.dim :]
        return linear + (torch.cos(self._phase(x)) * sines) @ self._t.direction

    def start(self, normals: Tensor, uniforms: Tensor) -> Tensor:
        return self._t.start_mean + normals @ self._t.start_factor.T

    def control(self, n: int, x: Tensor) -> Tensor:
        return self._t.bias[n] + self._extended(x) @ self._t.gain[n].T

    def base_mean(self, n: int, x: Tensor) -> Tensor:
        return self._t.offset[n] + self._extended(x) @ self._t.transition[n].T

    def apply_noise(self, n: int, v: Tensor) -> Tensor:
        return v @ self._t.noise[n].T

    def noise_transpose(self, n: int, v: Tensor) -> Tensor:
        return v @ self._t.noise[n]

    def base_vjp(self, n: int, x: Tensor, v: Tensor) -> Tensor:
        return self._pull(x, v @ self._t.transition[n])

    def control_vjp(self, n: int, x: Tensor, v: Tensor) -> Tensor:
        return self._pull(x, v @ self._t.gain[n])

    def control_parameter_vjp(self, n: int, x: Tensor, v: Tensor) -> Tensor:
        t = self._t
        maps = self._extended(x) @ t.gain_derivative[:, n].mT  # (P, n, d)
        return ((maps + t.bias_derivative[:, n, None, :]) * v).sum(2).T

    def running_cost(self, n: int, x: Tensor) -> Tensor:
        t = self._t
        quadratic = 0.5 * ((x @ t.running_quadratic[n]) * x).sum(1)
        linear = self._extended(x) @ t.running_linear[n]
        return quadratic + linear + t.running_constant[n]

    def running_cost_gradient(self, n: int, x: Tensor) -> Tensor:
        linear = self._pull(x, self._t.running_linear[n])
        return x @ self._t.running_quadratic[n] + linear

    def reward(self, x: Tensor) -> Tensor:
        quadratic = 0.5 * ((x @ self._t.reward_quadratic) * x).sum(1)
        linear = self._extended(x) @ self._t.reward_linear
        return self._t.reward_constant[0] + linear - quadratic

    def reward_gradient(self, x: Tensor) -> Tensor:
        return self._pull(x, self._t.reward_linear) - x @ self._t.reward_quadratic


class TorchSeparable:
    """`SeparableTables` in torch."""

    def __init__(
        self, tables: SeparableTables, dtype: torch.dtype, device: str
    ) -> None:
        self._t: Any = SeparableTables._make(
            torch.tensor(a, dtype=dtype, device=device) for a in tables
        )
        self._reach = float(tables.reach[0])
        self._power = float(tables.wave_power[0])
        self._has_wave = len(tables.wave) > 0
        self.n_steps, self.dim = tables.beyond.shape
        self.n_params = len(tables.gain_derivative)

    def _kept(self, x: Tensor) -> Tensor:
        return x.clamp(-self._reach, self._reach)

    def _slope(self, coefficients: Tensor, x: Tensor) -> Tensor:
        """Return the polynomials' derivatives in x, zero beyond the reach."""
        count = coefficients.shape[-1]
        weights = torch.arange(1, count, dtype=x.dtype, device=x.device)
        slope = _horner(coefficients[..., 1:] * weights, self._kept(x))
        return slope * (x.abs() < self._reach)

    def _wave(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first three derivatives of sin(q^b)."""
        b, p = self._power, q**self._power
        first, sine, cosine = b * p / q, torch.sin(p), torch.cos(p)
        second = (b - 1.0) * first / q
        third = (b - 2.0) * second / q
        return (
            first * cosine,
            second * cosine - first**2 * sine,
            (third - first**3) * cosine - 3.0 * first * second * sine,
        )

    def start(self, normals: Tensor, uniforms: Tensor) -> Tensor:
        return self._t.start_mean + normals @ self._t.start_factor.T

    def control(self, n: int, x: Tensor) -> Tensor:
        return _horner(self._t.gain[n], self._kept(x))

    def base_mean(self, n: int, x: Tensor) -> Tensor:
        y = self._kept(x)
        return _horner(self._t.base[n], y) + self._t.beyond[n] * (x - y)

    def apply_noise(self, n: int, v: Tensor) -> Tensor:
        return self._t.noise[n] * v

    noise_transpose = apply_noise

    def base_vjp(self, n: int, x: Tensor, v: Tensor) -> Tensor:
        far = self._t.beyond[n] * (x.abs() >= self._reach)
        return (self._slope(self._t.base[n], x) + far) * v

    def control_vjp(self, n: int, x: Tensor, v: Tensor) -> Tensor:
        return self._slope(self._t.gain[n], x) * v

    def control_parameter_vjp(self, n: int, x: Tensor, v: Tensor) -> Tensor:
        maps = _horner(self._t.gain_derivative[:, n, None], self._kept(x))
        return (maps * v).sum(2).T

    def running_cost(self, n: int, x: Tensor) -> Tensor:
        t, cost = self._t, x.new_zeros(len(x))
        if t.running.shape[1]:
            cost = cost + _horner(t.running[n], self._kept(x)).sum(1)
        if self._has_wave:
            s = (x * x).sum(1)
            first, second, _ = self._wave(t.wave[n, 0] + s + TINY)
            c = t.wave[n]
            cost = cost + c[1] * first + s * (c[2] * second + c[3] * first**2)
        return cost

    def running_cost_gradient(self, n: int, x: Tensor) -> Tensor:
        t, slope = self._t, torch.zeros_like(x)
        if t.running.shape[1]:
            slope = slope + self._slope(t.running[n], x)
        if self._has_wave:
            s = (x * x).sum(1)
            first, second, third = self._wave(t.wave[n, 0] + s + TINY)
            c = t.wave[n]
            pull = (c[1] + c[2]) * second + c[3] * first**2
            pull = pull + s * (c[2] * third + 2.0 * c[3] * first * second)
            slope = slope + 2.0 * pull[:, None] * x
        return slope

    def reward(self, x: Tensor) -> Tensor:
        t, value = self._t, x.new_zeros(len(x))
        if len(t.reward):
            value = value + _horner(t.reward, self._kept(x)).sum(1)
        if len(t.reward_factor):
            value = value + torch.log(_horner(t.reward_factor, self._kept(x))).sum(1)
        s = (x * x).sum(1)
        value = value - t.reward_log[0] * torch.log(1.0 + s)
        if t.reward_wave[0] != 0.0:
            value = value + t.reward_wave[0] * torch.sin((s + TINY) ** self._power)
        if t.reward_funnel[0] != 0.0:
            pull = t.reward_funnel[0] * torch.exp(-x[:, 0])
            value = value - 0.5 * pull * (x[:, 1:] ** 2).sum(1)
        return value

    def reward_gradient(self, x: Tensor) -> Tensor:
        t, slope = self._t, torch.zeros_like(x)
        if len(t.reward):
            slope = slope + self._slope(t.reward, x)
        if len(t.reward_factor):
            factor = _horner(t.reward_factor, self._kept(x))
            slope = slope + self._slope(t.reward_factor, x) / factor
        s = (x * x).sum(1)
        pull = -t.reward_log[0] / (1.0 + s)
        if t.reward_wave[0] != 0.0:
            pull = pull + t.reward_wave[0] * self._wave(s + TINY)[0]
        slope = slope + 2.0 * pull[:, None] * x
        if t.reward_funnel[0] != 0.0:
            others = x[:, 1:]
            pull = t.reward_funnel[0] * torch.exp(-x[:, :1])
            own = 0.5 * pull * (others**2).sum(1, keepdim=True)
            slope = slope + torch.cat([own, -pull * others], dim=1)
        return slope


def _horner(coefficients: Tensor, y: Tensor) -> Tensor:
    """Return sum_j coefficients[..., j] y^j."""
    if coefficients.shape[-1] == 0:
        return torch.zeros_like(y)
    value = coefficients[..., -1]
    for j in reversed(range(coefficients.shape[-1] - 1)):
        value = value * y + coefficients[..., j]
    return value + torch.zeros_like(y)


def torch_family(tables: Tables, dtype: str, device: str) -> TorchFamily:
    """Return the torch functions of a table, in "float64" or "float32"."""
    torch_dtype = getattr(torch, dtype)
    if isinstance(tables, LinearTables):
        return TorchLinear(tables, torch_dtype, device)
    if isinstance(tables, MixtureTables):
        return TorchMixture(tables, torch_dtype, device)
    if isinstance(tables, SineTables):
        return TorchSine(tables, torch_dtype, device)
    return TorchSeparable(tables, torch_dtype, device)
