r"""Costs that make a chosen function the value function (class M).

For any smooth V, drift b and noise sigma the running cost and reward

    f = -d_t V - b . grad V - 1/2 tr(sigma sigma^T Hess V) + 1/2 |sigma^T grad V|^2,
    r = -V(., T)

have the value function V and the optimal control u* = -sigma^T grad V exactly: the
method of manufactured solutions.  Derivatives are by automatic differentiation, exact
to rounding.  A problem of the catalogue must then put f and r into coefficient tables
(see `sdebench.simulate.tables`); these functions are what its formulas are tested
against, as `tests/problems/test_manufactured.py` does.
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

    Parameters
    ----------
    value : V of torch tensors x (n, d) and t (n,), returns (n,); twice differentiable.
    drift : b of numpy arrays x (n, d) and a time, returns (n, d).
    diffusion : sigma of a time, (d, m).
    horizon : T.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    drift: Callable[[Array, float], Array]
    diffusion: Callable[[float], Array]
    horizon: float

    def _derivatives(
        self, x: Array, t: float, directions: Array | None = None
    ) -> tuple[Array, Array, Array, Array]:
        """Return V, dV/dt, grad V (n, d) and the sum of second derivatives along rows.

        Raises
        ------
        ParameterError
            If ``value`` returns anything but one number for each state.
        """
        import torch

        states = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        times = torch.full((len(x),), float(t), dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            value = self.value(states, times)
            if value.shape != times.shape:
                raise ParameterError(
                    f"value returns shape {tuple(value.shape)} for x of shape "
                    f"{x.shape}; return ({len(x)},)"
                )
            in_time, slope = (
                torch.zeros_like(argument) if found is None else found
                for found, argument in zip(
                    torch.autograd.grad(
                        value.sum(),
                        (times, states),
                        create_graph=True,
                        allow_unused=True,
                    ),
                    (times, states),
                    strict=True,
                )
            )
            bend = torch.zeros_like(times)
            for row in () if directions is None else torch.tensor(directions):
                along = (slope @ row).sum()
                if along.requires_grad:
                    (second,) = torch.autograd.grad(
                        along, states, retain_graph=True, allow_unused=True
                    )
                    bend = bend if second is None else bend + second @ row
        found = (value, in_time, slope, bend)
        return tuple(part.detach().numpy() for part in found)  # type: ignore[return-value]

    def running_cost(self, x: Array, t: float) -> Array:
        """Return f(x, t) (n,) for x (n, d)."""
        sigma = np.asarray(self.diffusion(t), dtype=np.float64)
        _, in_time, slope, bend = self._derivatives(x, t, sigma.T)
        transport = np.sum(self.drift(x, t) * slope, axis=1)
        energy = 0.5 * np.sum((slope @ sigma) ** 2, axis=1)
        return np.asarray(energy - in_time - transport - 0.5 * bend)

    def reward(self, x: Array) -> Array:
        """Return r(x) (n,) for x (n, d)."""
        return -self._derivatives(x, self.horizon)[0]

    def control(self, x: Array, t: float) -> Array:
        """Return u*(x, t) (n, m) for x (n, d)."""
        sigma = np.asarray(self.diffusion(t), dtype=np.float64)
        return np.asarray(-self._derivatives(x, t)[2] @ sigma)
