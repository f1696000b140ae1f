"""Labels of SOC Matching along the paths of a control, path by path.

See `sdebench.estimators.soc_matching`.  The paths have the control v of ``old``; w is
that of theta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.composite import PathCosts, copy_totals
from sdebench.estimators._off_policy import OffPolicy
from sdebench.estimators._rlr_terms import solve_noise, solve_noise_transpose
from sdebench.simulate import primitives
from sdebench.simulate.jit import kernel
from sdebench.simulate.tile import block_loop, clear, combine, lanes, load, store

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View

PLAIN, WORK, COST = 0, 1, 2
LOSSES = {"plain": PLAIN, "work": WORK, "cost": COST}
DECAY, JACOBIAN, CONTROLLED = 0, 1, 2
MATRICES = {"decay": DECAY, "jacobian": JACOBIAN, "controlled": CONTROLLED}


@block_loop
def add_scaled(C, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += C[0] V, path by path."""
    for i in range(V.shape[0]):
        for p in range(0, B, lanes(V)):
            store(OUT, i, p, load(OUT, i, p) + load(C, 0, p) * load(V, i, p))


@block_loop
def add_half_square(W, OUT, B):  # type: ignore[no-untyped-def]
    """OUT[0] += 1/2 |W|^2."""
    for p in range(0, B, lanes(W)):
        total = load(OUT, 0, p)
        for i in range(W.shape[0]):
            w = load(W, i, p)
            total = total + 0.5 * (w * w)
        store(OUT, 0, p, total)


@kernel
def _labels_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    other: Any,
    other_work: Any,
    loss: int,
    matrices: int,
    rate: float,
    OUT: Any,
) -> None:
    """Set OUT (P + 4, .) to the rows of `MatchingLabels`."""
    P, N = prepared.n_parameters, W.shape[0]
    A, V, NEXT = work.adjoint, work.direction, work.adjoint_next
    score, moved = np.zeros_like(X[N]), np.zeros_like(X[N])
    Y, T = np.zeros_like(X[N]), np.zeros_like(X[N])
    cost = np.zeros_like(totals)
    decay = math.exp(-rate / N)
    clear(OUT, B)
    primitives.reward_gradient(prepared, work, X[N], A, B)
    combine(-1.0, A, 0.0, A, A, B)
    for p in range(0, B, lanes(totals)):
        store(cost, 0, p, 0.0 - load(totals, 3, p))
    for n in range(N - 1, -1, -1):
        combine(1.0, A, 0.0, A, Y, B)
        if loss != 0:
            add_scaled(cost, score, Y, B)
        primitives.noise_transpose(prepared, work, n, Y, T, B)
        primitives.evaluate(other, other_work, n, X[n], V, B)
        combine(1.0, V, 1.0, T, V, B)
        primitives.control_parameter_vjp(other, other_work, n, X[n], V, OUT, 0, B)
        if n == 0:
            break
        primitives.refresh(prepared, work, n, X[n], B)
        if matrices != 0:
            primitives.base_vjp(prepared, work, n, X[n], A, NEXT, B)
            if loss == 2:
                primitives.base_vjp(prepared, work, n, X[n], score, moved, B)
            if matrices == 2:
                combine(1.0, T, 1.0, Z[n], V, B)
                combine(1.0, V, 1.0, W[n], V, B)
                primitives.control_vjp(other, other_work, n, X[n], V, NEXT, B)
        else:
            combine(1.0, Z[n], 1.0 if loss == 0 else 0.0, W[n], V, B)
            solve_noise_transpose(prepared, work, n, V, Y, B)
            primitives.base_vjp(prepared, work, n, X[n], Y, T, B)
            if loss == 0:
                combine(decay, A, decay, Y, NEXT, B)
                combine(1.0, NEXT, -1.0, T, NEXT, B)
            else:
                combine(decay, A, 0.0, A, NEXT, B)
                combine(decay, score, -decay, Y, moved, B)
                combine(1.0, moved, 1.0, T, moved, B)
        if loss == 2:
            primitives.control_vjp(prepared, work, n, X[n], Z[n], moved, B)
            primitives.control_vjp(prepared, work, n, X[n], W[n], NEXT, B)
            add_half_square(W[n], cost, B)
        primitives.running_cost_gradient(prepared, work, n, X[n], NEXT, B)
        primitives.running_cost(prepared, work, n, X[n], cost, 0, B)
        A, NEXT = NEXT, A
        score, moved = moved, score
    copy_totals(totals, OUT, P, B)


@dataclass(frozen=True, kw_only=True)
class MatchingLabels(OffPolicy):
    """Rows: sum_n (dw_n/dtheta)^T (w_n + G_n^T a_{n+1}) (P), and those of `PathCosts`.

    Parameters
    ----------
    old : control of the paths; "theta" for the losses "work" and "cost".
    loss : "plain", "work" or "cost".
    matrices : reparametrisation matrices, "decay" by exp(-rate/N) per step, "jacobian"
        of the base, or "controlled", of the process under theta (loss "plain").
    """

    needs: ClassVar[frozenset[str]] = frozenset(
        {
            "control_parameter_vjp",
            "drift_vjp",
            "control_vjp",
            "running_cost_gradient",
            "reward_gradient",
        }
    )
    block_kernel = staticmethod(_labels_kernel)

    loss: str = "plain"
    matrices: str = "decay"
    rate: float = 0.0

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return LOSSES[self.loss], MATRICES[self.matrices], self.rate

    def n_statistics(self, n_params: int) -> int:
        return n_params + 4

    def statistics(self, view: View) -> Tensor:
        import torch

        assert view.other is not None
        paths, loss = view.rollout(), LOSSES[self.loss]
        own = self.old == "theta"
        adjoint = -view.reward_gradient(paths.states[-1])
        score = torch.zeros_like(adjoint)
        gradient = adjoint.new_zeros(view.n_paths, view.n_params)
        cost = -paths.reward
        for n in reversed(range(view.n_steps)):
            x, z, v = paths.states[n], paths.noises[n], paths.controls[n]
            w = v if own else view.other.control(n, x)
            target = adjoint + cost[:, None] * score if loss else adjoint
            residual = w + view.noise_transpose(n, target)
            gradient = gradient + view.other.control_parameter_vjp(n, x, residual)
            if n == 0:
                break
            adjoint, score = self._earlier(view, n, adjoint, score)
            adjoint = adjoint + view.running_cost_gradient(n, x)
            if loss == COST:
                score = score + view.control_vjp(n, x, z)
                adjoint = adjoint + view.control_vjp(n, x, v)
                cost = cost + 0.5 * (v * v).sum(1)
            if loss:
                cost = cost + view.running_cost(n, x)
        costs = PathCosts().statistics(view)
        return torch.cat([gradient, costs], dim=1)

    def _earlier(
        self, view: View, n: int, adjoint: Tensor, score: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return adjoint and score before step n, without the terms of its costs."""
        paths, loss = view.rollout(), LOSSES[self.loss]
        x = paths.states[n]
        if self.matrices != "decay":
            if loss == COST:
                score = view.base_vjp(n, x, score)
            earlier = view.base_vjp(n, x, adjoint)
            if self.matrices == "controlled":
                assert view.other is not None
                noise = paths.noises[n] + paths.controls[n]
                along = view.noise_transpose(n, adjoint) + noise
                earlier = earlier + view.other.control_vjp(n, x, along)
            return earlier, score
        decay = math.exp(-self.rate / view.n_steps)
        noise = paths.noises[n] + (0.0 if loss else paths.controls[n])
        solved = solve_noise(view, n, noise)
        # ((decay - d base mean/dx) / G)^T noise
        slope = decay * solved - view.base_vjp(n, x, solved)
        if loss:
            return decay * adjoint, decay * score - slope
        return decay * adjoint + slope, score
