"""Score-function (REINFORCE) estimator of the gradient of the objective.

With the cost c = sum_n (1/2 |w_n|^2 + f_n) - r(X_N) of a path, the score of the
policy S_p = sum_n (dw_n/dtheta_p)^T z_n and the direct part
D_p = sum_n (dw_n/dtheta_p)^T w_n,

    dE[c]/dtheta = E[c S + D],

with no derivative of drift or reward.  Of the reward alone, c = -r and D is absent.
E[S] = 0, so that (c - b) S + D has the same mean for every constant b; the modes give
what the choices of b need:

====  =========================================================  ======
mode  rows per path                                              count
====  =========================================================  ======
0     c S + D                                                    P
1     c S + D, S, c S, c                                         3P + 1
2     for even, then odd paths: c S + D, S, (c S + D) S, S^2,    8P
      zero on the paths of the other parity
====  =========================================================  ======

Reward-to-go replaces c S by sum_n (c - c_0 - ... - c_n) (dw_n/dtheta)^T z_n with the
cost c_n = 1/2 |w_n|^2 + f_n of a step.  The costs up to step n, its own included, are
functions of X_0, ..., X_n, which z_n does not depend on: they add nothing but variance.
The baseline stays one constant for all steps.

Where theta moves the law p_theta of X_0 as well, S gains the score of p_theta at X_0,
and D the derivative of its relative entropy to the base process's law, which is a
constant cost of all paths and left out of c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.errors import ParameterError, unknown
from sdebench.estimator import Array, Estimator, estimand_of
from sdebench.simulate import primitives
from sdebench.simulate.tile import block_loop, clear, lanes, load, path_kernel, store

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View


@block_loop
def split_moments(OUT, P, B):  # type: ignore[no-untyped-def]
    """Expand the rows c S + D and S to those of mode 2."""
    for q in range(P):
        gradient, score = OUT[q], OUT[P + q]
        for p in range(B):
            g, s = gradient[p], score[p]
            zero = g * 0
            even = p % 2 == 0
            OUT[q, p] = g if even else zero
            OUT[P + q, p] = s if even else zero
            OUT[2 * P + q, p] = g * s if even else zero
            OUT[3 * P + q, p] = s * s if even else zero
            OUT[4 * P + q, p] = zero if even else g
            OUT[5 * P + q, p] = zero if even else s
            OUT[6 * P + q, p] = zero if even else g * s
            OUT[7 * P + q, p] = zero if even else s * s


@block_loop
def weigh_noise(cost, own, W, Z, V, B):  # type: ignore[no-untyped-def]
    """V = cost z + own w."""
    for p in range(0, B, lanes(V)):
        c = load(cost, 0, p)
        for i in range(V.shape[0]):
            store(V, i, p, c * load(Z, i, p) + own * load(W, i, p))


@block_loop
def add_control_cost(W, d, cost, B):  # type: ignore[no-untyped-def]
    """The first row of ``cost`` += 1/2 |w|^2."""
    for p in range(0, B, lanes(W)):
        total = load(cost, 0, p)
        for i in range(d):
            total = total + 0.5 * (load(W, i, p) * load(W, i, p))
        store(cost, 0, p, total)


@path_kernel
def block_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    mode: int,
    own: float,
    to_go: int,
    OUT: Any,
) -> None:
    """Set OUT to the rows of ``mode`` for every path of a stored block.

    The parity of a path is that of its column.

    Parameters
    ----------
    own : 1 if the cost includes those of the steps, 0 for minus the reward.
    to_go : 1 to leave out of the cost what precedes a step's noise.
    """
    P = prepared.n_parameters
    V, cost = work.direction, work.adjoint
    clear(OUT, B)
    for p in range(0, B, lanes(V)):
        store(cost, 0, p, 0.0 - load(totals, 3, p))
        c = own * (load(totals, 0, p) + load(totals, 1, p)) - load(totals, 3, p)
        if mode == 1:
            store(OUT, 3 * P, p, c)
        if to_go == 0:
            store(cost, 0, p, c)
    for n in range(W.shape[0] - 1, -1, -1):
        primitives.refresh_control(prepared, work, n, X[n], B)
        weigh_noise(cost, own, W[n], Z[n], V, B)
        primitives.control_parameter_vjp(prepared, work, n, X[n], V, OUT, 0, B)
        if mode > 0:
            primitives.control_parameter_vjp(prepared, work, n, X[n], Z[n], OUT, P, B)
        if to_go == 1:
            add_control_cost(W[n], V.shape[0], cost, B)
            primitives.running_cost(prepared, work, n, X[n], cost, 0, B)
    if primitives.has_start_parameters(prepared):
        primitives.start_cost_gradient(prepared, work, own, OUT, B)
        primitives.start_score(prepared, work, X[0], cost, OUT, 0, B)
        if mode > 0:
            for p in range(0, B, lanes(V)):
                store(cost, 0, p, 1.0)
            primitives.start_score(prepared, work, X[0], cost, OUT, P, B)
    if mode == 1:
        for p in range(0, B, lanes(V)):
            for q in range(P):
                c = load(OUT, 3 * P, p)
                store(OUT, 2 * P + q, p, c * load(OUT, P + q, p))
    elif mode == 2:
        split_moments(OUT, P, B)


MODES = {"none": 0, "mean": 1, "leave_one_out": 1, "optimal": 2}


@dataclass(frozen=True, kw_only=True)
class Reinforce(Estimator):
    """Likelihood-ratio gradient with a choice of constant baseline.

    Parameters
    ----------
    baseline : what is subtracted from the cost of a path.
        "none"; "mean" of the replicate (shrinks the gradient by 1 - 1/n_paths);
        "leave_one_out", the mean of the other paths (unbiased); "optimal", the
        variance-optimal constant of each component, estimated on the other half of
        the paths (unbiased).
    objective : "control" for J, "reward" for -E r(X_T).
    reward_to_go : multiply the score of a step by the later costs alone.
    """

    source: ClassVar[str] = (
        "Williams 1992; leave-one-out: Kool et al. 2019; optimal constant: Greensmith "
        "et al. 2004; reward-to-go: Sutton et al. 1999"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
c &= \sum_n \left( \tfrac{1}{2} |w_n|^2 + f_n \right) - r(X_N) \\
S &= \sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top z_n, \quad
  D = \sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top w_n \\
g &= (c - b)\,S + D \quad \text{or, with reward-to-go,} \quad
  \sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top z_n
  \left( \sum_{m > n} \left( \tfrac{1}{2} |w_m|^2 + f_m \right) - r(X_N) - b
  \right) + D
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "the gradient of the discretized objective J_N; with the mean baseline its "
        "likelihood-ratio part times 1 - 1/n_paths"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"control_parameter_vjp"})
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        *({"baseline": baseline} for baseline in MODES),
        {"reward_to_go": True},
        {"objective": "reward"},
    )
    block_kernel = staticmethod(block_kernel)

    baseline: str = "leave_one_out"
    objective: str = "control"
    reward_to_go: bool = False

    def __post_init__(self) -> None:
        if self.baseline not in MODES:
            raise unknown("baseline", self.baseline, MODES)
        if estimand_of(self.objective) != "gradient" and self.reward_to_go:
            raise ParameterError(
                "reward_to_go drops the costs of earlier steps, and objective reward "
                "has none; use objective control"
            )

    @property
    def estimand(self) -> str:  # type: ignore[override]
        return estimand_of(self.objective)

    @property
    def _own(self) -> float:
        """1 if the steps have costs of their own."""
        return float(self.objective == "control")

    @property
    def handles_initial_law(self) -> bool:
        return True

    @property
    def handles_state_dependent_noise(self) -> bool:
        return True

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return MODES[self.baseline], self._own, int(self.reward_to_go)

    def n_statistics(self, n_params: int) -> int:
        return (n_params, 3 * n_params + 1, 8 * n_params)[MODES[self.baseline]]

    @property
    def declared_bias(self) -> str:
        return "1/n_paths" if self.baseline == "mean" else "none"

    def not_applicable(self, n_paths: int) -> str | None:
        least = {"none": 1, "optimal": 4}.get(self.baseline, 2)
        if n_paths < least or (self.baseline == "optimal" and n_paths % 2):
            return (
                f"baseline {self.baseline} compares paths: it needs at least {least} "
                f"paths per replicate{', an even number' if least == 4 else ''}"
            )
        return None

    def statistics(self, view: View) -> Tensor:
        import torch  # not at the top: the numba kernel alone does not need it

        paths = view.rollout()
        total = self._own * (paths.control_cost + paths.running_cost) - paths.reward
        cost = -paths.reward if self.reward_to_go else total
        score = cost.new_zeros(view.n_paths, view.n_params)
        gradient = torch.zeros_like(score)
        for n in reversed(range(view.n_steps)):
            x, w, z = paths.states[n], paths.controls[n], paths.noises[n]
            own = self._own * w + cost[:, None] * z
            gradient = gradient + view.control_parameter_vjp(n, x, own)
            if MODES[self.baseline] > 0:
                score = score + view.control_parameter_vjp(n, x, z)
            if self.reward_to_go:
                cost = cost + 0.5 * (w * w).sum(1) + view.running_cost(n, x)
        if view.has_start_parameters:
            start = view.start_score(paths.states[0])
            gradient = gradient + cost[:, None] * start
            gradient = gradient + self._own * view.start_cost_gradient()
            score = score + start
        total = total[:, None]
        if MODES[self.baseline] == 0:
            return gradient
        if MODES[self.baseline] == 1:
            return torch.cat([gradient, score, total * score, total], dim=1)
        rows = torch.cat([gradient, score, gradient * score, score * score], dim=1)
        even = (torch.arange(view.n_paths, device=rows.device) % 2 == 0)[:, None]
        return torch.cat([rows * even, rows * ~even], dim=1)

    def combine(self, mean: Array, n_paths: int) -> Array:
        if self.baseline == "none":
            return mean
        if self.baseline in ("mean", "leave_one_out"):
            gradient, score, product = np.split(mean[:-1], 3)
            shrunk = gradient - mean[-1] * score
            if self.baseline == "mean":
                return shrunk
            # Leaving the own path out stretches the likelihood-ratio part only.
            return shrunk + (product - mean[-1] * score) / (n_paths - 1)
        even, odd = np.split(mean, 2)
        total = np.zeros(len(even) // 4)
        for own, other in ((even, odd), (odd, even)):
            gradient, score, _, _ = np.split(own, 4)
            _, _, product, square = np.split(other, 4)
            baseline = np.divide(
                product, square, out=np.zeros_like(product), where=square > 0
            )
            total += gradient - baseline * score
        return total
