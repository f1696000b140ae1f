"""Score-function (REINFORCE) estimator of the gradient of the objective.

With the cost c = sum_n (1/2 |w_n|^2 + f_n) - r(X_N) of a path, the score of the
policy S_p = sum_n (dw_n/dtheta_p)^T z_n and the direct part
D_p = sum_n (dw_n/dtheta_p)^T w_n,

    dE[c]/dtheta = E[c S + D],

with no derivative of drift or reward.  E[S] = 0, so that (c - b) S + D has the same
mean for every constant b; the modes give what the choices of b need:

====  =========================================================  ======
mode  rows per path                                              count
====  =========================================================  ======
0     c S + D                                                    P
1     c S + D, S, c S, c                                         3P + 1
2     for even, then odd paths: c S + D, S, (c S + D) S, S^2,    8P
      zero on the paths of the other parity
====  =========================================================  ======
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.errors import unknown
from sdebench.estimator import Array, Estimator
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
    OUT: Any,
) -> None:
    """Set OUT to the rows of ``mode`` for every path of a stored block.

    The parity of a path is that of its column.
    """
    P = prepared.n_parameters
    V = work.direction
    d = V.shape[0]
    clear(OUT, B)
    for n in range(W.shape[0]):
        primitives.refresh_control(prepared, work, n, X[n], B)
        w, z = W[n], Z[n]
        for p in range(0, B, lanes(V)):
            c = load(totals, 0, p) + load(totals, 1, p) - load(totals, 3, p)
            for i in range(d):
                store(V, i, p, c * load(z, i, p) + load(w, i, p))
        primitives.control_parameter_vjp(prepared, work, n, X[n], V, OUT, 0, B)
        if mode > 0:
            primitives.control_parameter_vjp(prepared, work, n, X[n], z, OUT, P, B)
    if mode == 1:
        for p in range(0, B, lanes(V)):
            c = load(totals, 0, p) + load(totals, 1, p) - load(totals, 3, p)
            for q in range(P):
                store(OUT, 2 * P + q, p, c * load(OUT, P + q, p))
            store(OUT, 3 * P, p, c)
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
    """

    estimand: ClassVar[str] = "gradient"
    source: ClassVar[str] = (
        "Williams 1992; leave-one-out: Kool et al. 2019; optimal constant: Greensmith "
        "et al. 2004"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
c &= \sum_n \left( \tfrac{1}{2} |w_n|^2 + f_n \right) - r(X_N) \\
S &= \sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top z_n, \quad
  D = \sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top w_n \\
g &= (c - b)\,S + D
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "the gradient of the discretized objective J_N; with the mean baseline its "
        "likelihood-ratio part times 1 - 1/n_paths"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"control_parameter_vjp"})
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = tuple(
        {"baseline": baseline} for baseline in MODES
    )
    block_kernel = staticmethod(block_kernel)

    baseline: str = "leave_one_out"

    def __post_init__(self) -> None:
        if self.baseline not in MODES:
            raise unknown("baseline", self.baseline, MODES)

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return (MODES[self.baseline],)

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
        score = paths.cost.new_zeros(view.n_paths, view.n_params)
        direct = torch.zeros_like(score)
        for n in range(view.n_steps):
            x = paths.states[n]
            score = score + view.control_parameter_vjp(n, x, paths.noises[n])
            direct = direct + view.control_parameter_vjp(n, x, paths.controls[n])
        cost = paths.cost[:, None]
        gradient = cost * score + direct
        if MODES[self.baseline] == 0:
            return gradient
        if MODES[self.baseline] == 1:
            return torch.cat([gradient, score, cost * score, cost], dim=1)
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
