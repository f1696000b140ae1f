r"""Adjoint sampling: adjoint matching on bridges to the ends of the model's paths.

The base is Brownian motion from a point, X_{n+1} = X_n + g_n z_n, so that the lean
adjoint -grad r(X_N) does not change along a path.  Only the end X_N of a simulated path
is kept, and one gradient of the reward: the states at all earlier times are drawn anew
from the bridge of the base, with one normal xi for all of them,

    x_n = x_0 + nu_n / nu_N (X_N - x_0) + (nu_n (nu_N - nu_n) / nu_N)^(1/2) xi,

nu_n = sum_{k < n} g_k^2.  The gradient is that of adjoint matching,

    sum_n (dw_n(x_n)/dtheta)^T (w_n(x_n) - G_n^T grad r(X_N)).

Where the model is itself a mixture of bridges, as every control sigma grad log h is,
the bridges have the law of its paths: nothing is changed but the noise, and the mean is
that of adjoint matching up to the time step.  With ends of the tilted law
(``data="optimal"``) it is the gradient of the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.errors import unknown
from sdebench.estimator import Array, Estimator
from sdebench.simulate import primitives
from sdebench.simulate.tables import MixtureTables, Tables
from sdebench.simulate.tile import clear, combine, path_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View

DATA = {"theta": "matching_gradient", "optimal": "cross_entropy_gradient"}
"""Estimand for ends of the model's paths, or of the optimally controlled ones."""


@path_kernel
def block_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    other: Any,
    other_work: Any,
    OWN: Any,
    OUT: Any,
) -> None:
    """Set OUT (P, B + PADDING) to the gradient of every path of a stored block."""
    N = W.shape[0]
    G, V = work.adjoint, work.direction
    Y, CONTROL = other_work.adjoint, other_work.direction
    XI = OWN[0]
    clear(OUT, B)
    whole = 0.0
    for n in range(N):
        whole += prepared.noise[n] ** 2
    primitives.reward_gradient(prepared, work, X[N], G, B)
    spent = 0.0
    for n in range(N):
        share = spent / whole
        spread = (share * (whole - spent)) ** 0.5
        combine(share, X[N], 1.0 - share, X[0], Y, B)
        combine(1.0, Y, spread, XI, Y, B)
        primitives.evaluate(other, other_work, n, Y, CONTROL, B)
        combine(1.0, CONTROL, -prepared.noise[n], G, V, B)
        primitives.control_parameter_vjp(other, other_work, n, Y, V, OUT, 0, B)
        spent += prepared.noise[n] ** 2


@dataclass(frozen=True, kw_only=True)
class AdjointSampling(Estimator):
    """Adjoint matching on bridges to simulated ends, for a pinned Brownian base.

    Parameters
    ----------
    data : control of the paths that are simulated for their ends: "theta" (the model,
        as published) or "optimal".
    """

    source: ClassVar[str] = (
        "Havens et al. 2025, arXiv:2504.11713, reciprocal adjoint matching"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
x_n &= x_0 + \frac{\nu_n}{\nu_N} (X_N - x_0)
  + \sqrt{\frac{\nu_n (\nu_N - \nu_n)}{\nu_N}}\, \xi, \quad
  \nu_n = \sum_{k < n} g_k^2 \\
g &= \sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top
  \left( w_n(x_n) - g_n \nabla r(X_N) \right)
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "the stated sum with the law of X_N of the simulated chain, which tends to the "
        "gradient of adjoint matching where the model is a mixture of bridges, and "
        "with data optimal to that of the cross-entropy"
    )
    needs: ClassVar[frozenset[str]] = frozenset(
        {"control_parameter_vjp", "reward_gradient"}
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"data": "optimal"})
    block_kernel = staticmethod(block_kernel)

    data: str = "theta"

    def __post_init__(self) -> None:
        if self.data not in DATA:
            raise unknown("data", self.data, DATA)

    @property
    def estimand(self) -> str:  # type: ignore[override]
        return DATA[self.data]

    @property
    def control(self) -> str:
        return self.data

    @property
    def other_control(self) -> str:
        return "theta"

    def own_normals(self, n_steps: int) -> int:
        return 1

    def not_applicable_on(self, tables: Tables, times: Array) -> str | None:
        if isinstance(tables, MixtureTables) and not (
            np.any(tables.start_scale)
            or len(tables.start_mean) > 1
            or tables.base.shape[1]
            or np.any(tables.scale != 1.0)
            or np.any(tables.offset)
        ):
            return None
        return (
            "its bridges and its constant adjoint are those of Brownian motion from a "
            "point, and the base process of this problem is another"
        )

    def statistics(self, view: View) -> Tensor:
        import torch

        assert view.other is not None
        states = view.rollout().states
        start, end, xi = states[0], states[-1], view.noise(view.n_steps)
        slope = view.reward_gradient(end)
        unit = torch.ones_like(xi[:1])
        gains = [float(view.apply_noise(n, unit)[0, 0]) for n in range(view.n_steps)]
        spent = np.concatenate([[0.0], np.cumsum(np.square(gains))])
        gradient = end.new_zeros(view.n_paths, view.n_params)
        for n, gain in enumerate(gains):
            share = float(spent[n] / spent[-1])
            spread = float(np.sqrt(share * (spent[-1] - spent[n])))
            x = share * end + (1.0 - share) * start + spread * xi
            direction = view.other.control(n, x) - gain * slope
            gradient = gradient + view.other.control_parameter_vjp(n, x, direction)
        return gradient
