"""First-, half- and zeroth-order terms of RLR for one place of the block.

With the block of steps a, ..., b and the score of the last noise of the block,

    first order    (dw_{N-1}/dtheta)^T G_{N-1}^T grad r(X_N)
    half order     sum_{n=a}^b (dw_n/dtheta)^T G_n^T lambda_{n+1},
                   lambda_{b+1} = G_b^{-T} z_b,
                   lambda_n = (dmu_n/dx)^T lambda_{n+1} + (dw_n/dx)^T G_n^T lambda_{n+1}
    zeroth order   sum over the other steps of (dw_n/dtheta)^T z_n;

the last two are to be multiplied by the reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numba.extending import overload

from sdebench.estimator import Estimator
from sdebench.simulate import primitives
from sdebench.simulate.jit import kernel
from sdebench.simulate.linear import FULL, NOISE, PreparedLinear
from sdebench.simulate.mixture import PreparedMixture
from sdebench.simulate.separable import PreparedSeparable
from sdebench.simulate.sine import PreparedSine
from sdebench.simulate.tile import affine, clear, combine, lanes, load, store

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View


def _solve_linear(prepared, work, n, V, OUT, B):  # type: ignore[no-untyped-def]
    m = n * prepared.stride[NOISE]
    if prepared.kind[NOISE] == FULL:
        inverse = np.linalg.inv(prepared.transposed[prepared.slot[NOISE], m])
        affine(inverse, work.zero.shape[0], work.zero, V, OUT, B)
    else:
        for i in range(work.zero.shape[0]):
            g = prepared.diagonal[NOISE, m, i]
            for p in range(0, B, lanes(V)):
                store(OUT, i, p, load(V, i, p) / g)


def _solve_sine(prepared, work, n, V, OUT, B):  # type: ignore[no-untyped-def]
    inverse = np.linalg.inv(prepared.noise_transposed[n])
    affine(inverse, inverse.shape[1], work.zero, V, OUT, B)


def _solve_separable(prepared, work, n, V, OUT, B):  # type: ignore[no-untyped-def]
    for i in range(V.shape[0]):
        g = prepared.noise[n, i]
        for p in range(0, B, lanes(V)):
            store(OUT, i, p, load(V, i, p) / g)


def _solve_mixture(prepared, work, n, V, OUT, B):  # type: ignore[no-untyped-def]
    g = prepared.noise[n]
    combine(1.0 / g, V, g * 0, V, OUT, B)


def solve_noise_transpose(prepared, work, n, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = G_n^{-T} V."""


@overload(solve_noise_transpose, strict=False)
def _solve_by_family(prepared, *args):  # type: ignore[no-untyped-def]
    solvers = {
        PreparedLinear: _solve_linear,
        PreparedMixture: _solve_mixture,
        PreparedSine: _solve_sine,
        PreparedSeparable: _solve_separable,
    }
    return solvers.get(getattr(prepared, "instance_class", None))


@kernel
def _terms_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    start: int,
    block: int,
    zeroth: int,
    first_order: int,
    OUT: Any,
) -> None:
    """Set OUT (2P + 1, .) to the rows of `RLRTerms`."""
    P, N = prepared.n_parameters, W.shape[0]
    A, V, NEXT = work.adjoint, work.direction, work.adjoint_next
    clear(OUT, B)
    for p in range(0, B, lanes(OUT)):
        store(OUT, 2 * P, p, load(totals, 3, p))
    if first_order == 1:
        primitives.reward_gradient(prepared, work, X[N], A, B)
        primitives.refresh_control(prepared, work, N - 1, X[N - 1], B)
        primitives.noise_transpose(prepared, work, N - 1, A, V, B)
        primitives.control_parameter_vjp(prepared, work, N - 1, X[N - 1], V, OUT, P, B)
    for n in range(zeroth):
        if n < start or n >= start + block:
            primitives.refresh_control(prepared, work, n, X[n], B)
            primitives.control_parameter_vjp(prepared, work, n, X[n], Z[n], OUT, 0, B)
    if block > 0:
        last = start + block - 1
        solve_noise_transpose(prepared, work, last, Z[last], A, B)
    for n in range(start + block - 1, start, -1):
        primitives.refresh(prepared, work, n, X[n], B)
        primitives.noise_transpose(prepared, work, n, A, V, B)
        primitives.adjoint(prepared, work, n, X[n], A, V, NEXT, OUT, B)
        A, NEXT = NEXT, A
    if block > 0:
        primitives.refresh_control(prepared, work, start, X[start], B)
        primitives.noise_transpose(prepared, work, start, A, V, B)
        primitives.control_parameter_vjp(prepared, work, start, X[start], V, OUT, 0, B)


@dataclass(frozen=True, kw_only=True)
class RLRTerms(Estimator):
    """Rows: half- and zeroth-order terms without the reward (P), first (P), reward.

    Parameters
    ----------
    start, block : first step and number of steps of the half-order block.
    zeroth : zeroth-order terms at the steps before this one, outside the block.
    first_order : a first-order term at the last step.
    """

    estimand: ClassVar[str] = "reward_only_gradient"
    needs: ClassVar[frozenset[str]] = frozenset(
        {"control_parameter_vjp", "drift_vjp", "control_vjp", "reward_gradient"}
    )
    block_kernel = staticmethod(_terms_kernel)

    start: int = 0
    block: int = 0
    zeroth: int = 0
    first_order: bool = True

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return self.start, self.block, self.zeroth, int(self.first_order)

    def n_statistics(self, n_params: int) -> int:
        return 2 * n_params + 1

    def statistics(self, view: View) -> Tensor:
        import torch

        paths, block = view.rollout(), range(self.start, self.start + self.block)
        weighted = paths.reward.new_zeros(view.n_paths, view.n_params)
        first = torch.zeros_like(weighted)
        if self.first_order:
            n = view.n_steps - 1
            slope = view.noise_transpose(n, view.reward_gradient(paths.states[-1]))
            first = view.control_parameter_vjp(n, paths.states[n], slope)
        for n in range(self.zeroth):
            if n not in block:
                score = view.control_parameter_vjp(n, paths.states[n], paths.noises[n])
                weighted = weighted + score
        if block:
            costate = solve_noise(view, block[-1], paths.noises[block[-1]])
        for n in reversed(block):
            x, v = paths.states[n], view.noise_transpose(n, costate)
            weighted = weighted + view.control_parameter_vjp(n, x, v)
            if n > self.start:
                costate = view.base_vjp(n, x, costate) + view.control_vjp(n, x, v)
        return torch.cat([weighted, first, paths.reward[:, None]], dim=1)


def solve_noise(view: View, n: int, z: Tensor) -> Tensor:
    """Return G_n^{-T} z (n_paths, dim)."""
    import torch

    eye = torch.eye(view.dim, dtype=view.dtype, device=view.device)
    rows = view.apply_noise(n, eye)  # row i is G e_i: the matrix G^T
    return torch.linalg.solve(rows, z.T).T
