r"""Costs that make a chosen function the value function (class M).

For any smooth V, drift b and noise sigma the running cost and reward

    f = -d_t V - b . grad V - 1/2 tr(sigma sigma^T Hess V) + 1/2 |sigma^T grad V|^2,
    r = -V(., T)

have the value function V and the optimal control u* = -sigma^T grad V exactly: the
method of manufactured solutions.  Derivatives are by automatic differentiation, exact
to rounding.  `sdebench.manufactured_problem.ManufacturedProblem` simulates them as they
are; a problem that puts f and r into coefficient tables has its formulas tested against
these functions, as `tests/problems/test_manufactured.py` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdebench.errors import ParameterError

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ManufacturedCosts:
    """Running cost, reward and optimal control of a chosen value function.

    All are differentiable functions of torch tensors x (n, d).

    Parameters
    ----------
    value : V of x (n, d) and t (n,), returns (n,); twice differentiable.
    drift : b of x (n, d) and a time, returns (n, d).
    diffusion : sigma of a time, (d, m) in numpy.
    horizon : T.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    drift: Callable[[Tensor, float], Tensor]
    diffusion: Callable[[float], Array]
    horizon: float

    def value_at(self, x: Tensor, t: float) -> Tensor:
        """Return V(x, t) (n,).

        Raises
        ------
        ParameterError
            If ``value`` returns anything but one number for each state.
        """
        return self._value(x, x.new_full((len(x),), float(t)))

    def _value(self, x: Tensor, times: Tensor) -> Tensor:
        value = self.value(x, times)
        if value.shape != times.shape:
            raise ParameterError(
                f"the value function returns shape {tuple(value.shape)} for x of shape "
                f"{tuple(x.shape)}; return ({len(x)},)"
            )
        return value

    def _derivatives(
        self, x: Tensor, t: float, directions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dV/dt, grad V (n, d) and the sum of second derivatives along rows."""
        import torch

        states = x if x.requires_grad else x.detach().requires_grad_()
        times = x.new_full((len(x),), float(t)).requires_grad_()
        with torch.enable_grad():
            value = self._value(states, times)
            in_time, slope = _gradients(value.sum(), (times, states))
            bend = torch.zeros_like(times)
            for row in () if directions is None else directions:
                along = (slope @ row).sum()
                bend = bend + _gradients(along, (states,))[0] @ row
        found = (in_time, slope, bend)
        if x.requires_grad:
            return found
        return tuple(part.detach() for part in found)  # type: ignore[return-value]

    def _noise(self, x: Tensor, t: float) -> Tensor:
        import torch

        return torch.tensor(
            np.array(self.diffusion(t), np.float64), dtype=x.dtype, device=x.device
        )

    def running_cost(self, x: Tensor, t: float) -> Tensor:
        """Return f(x, t) (n,)."""
        sigma = self._noise(x, t)
        in_time, slope, bend = self._derivatives(x, t, sigma.T)
        drift = self.drift(x, t)
        if drift.shape != x.shape:
            raise ParameterError(
                f"the drift returns shape {tuple(drift.shape)} for x of shape "
                f"{tuple(x.shape)}; return the same"
            )
        transport = (drift * slope).sum(1)
        energy = 0.5 * ((slope @ sigma) ** 2).sum(1)
        return energy - in_time - transport - 0.5 * bend

    def reward(self, x: Tensor) -> Tensor:
        """Return r(x) (n,)."""
        return -self.value_at(x, self.horizon)

    def control(self, x: Tensor, t: float) -> Tensor:
        """Return u*(x, t) (n, m)."""
        return -self._derivatives(x, t)[1] @ self._noise(x, t)


def _gradients(total: Tensor, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the gradients of a number, differentiable; zero where it is constant."""
    import torch

    if not total.requires_grad:
        return tuple(torch.zeros_like(a) for a in arguments)
    found = torch.autograd.grad(total, arguments, create_graph=True, allow_unused=True)
    return tuple(
        torch.zeros_like(a) if g is None else g
        for a, g in zip(arguments, found, strict=True)
    )
