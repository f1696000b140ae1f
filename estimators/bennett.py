r"""Bennett's acceptance ratio: log Z from the work of forward and backward paths.

Along forward paths of `crooks` and along backward ones, started from the tilted law
p_T e^r / Z and run with its backward kernels, the log-weight w = log W has densities
with p_B(w) = p_F(w) e^w / Z.  For every function a of w therefore
E_F[e^w a(w)] = Z E_B[a(w)], and with as many paths in both directions the a of least
variance makes log Z the c that solves

    sum_F 1 / (1 + e^(c - w)) = sum_B 1 / (1 + e^(w - c)).

The backward paths need exact samples of the law that is to be sampled: an oracle, which
shows what an estimate from both directions can reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.estimators._work import (
    KernelRatioEstimator,
    add_end,
    add_forward_weight,
    add_kernel_ratio,
    level,
    log_kernel_ratio,
    noise_of,
    step_back,
    step_noise,
    step_shrink,
    steps_of,
    uniform,
)
from sdebench.simulate import primitives
from sdebench.simulate.tile import (
    block_loop,
    clear,
    combine,
    glue,
    lanes,
    load,
    path_kernel,
    store,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View

BISECTIONS = 60


@block_loop
def backward_state(a, tilt, g, X, R, Z, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = a x + tilt R + g z."""
    for i in range(X.shape[0]):
        for p in range(0, B, lanes(X)):
            mean = a * load(X, i, p) + tilt * load(R, i, p)
            store(OUT, i, p, mean + g * load(Z, i, p))


@glue
def acceptance_ratio(FORWARD, BACKWARD, count):  # type: ignore[no-untyped-def]
    """Return c between the smallest and the largest log-weight, by bisection."""
    low, high = np.float64(FORWARD[0, 0]), np.float64(FORWARD[0, 0])
    for p in range(count):
        for w in (np.float64(FORWARD[0, p]), np.float64(BACKWARD[0, p])):
            low, high = min(low, w), max(high, w)
    for _ in range(BISECTIONS):
        c = 0.5 * (low + high)
        balance = 0.0
        for p in range(count):
            balance += 1.0 / (1.0 + math.exp(c - np.float64(FORWARD[0, p])))
            balance -= 1.0 / (1.0 + math.exp(np.float64(BACKWARD[0, p]) - c))
        if balance > 0.0:
            low = c
        else:
            high = c
    return 0.5 * (low + high)


@path_kernel
def block_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    count: int,
    OWN: Any,
    power: int,
    noising: bool,
    OUT: Any,
) -> None:
    """Set OUT (1, B + PADDING) to the acceptance ratio of all paths."""
    N = W.shape[0]
    A, NEXT, R = work.adjoint, work.adjoint_next, work.direction
    ROWS, BACK = work.start, work.start[1:2]
    clear(OUT, B)
    add_forward_weight(prepared, work, N, power, noising, X[0], Z, ROWS, OUT, B)

    for p in range(B):
        work.uniform[p] = uniform(np.float64(OWN[N + 1, 0, p]))
    primitives.tilted_sample(prepared, work, work.uniform, OWN[N], A, B)
    clear(ROWS, B)
    add_end(prepared, work, 1.0, N, True, A, ROWS, BACK, B)
    primitives.reward_gradient(prepared, work, A, R, B)
    for n in range(N - 1, -1, -1):
        g, a = step_noise(prepared, n), step_shrink(prepared, n, N)
        b, ours = step_back(prepared, n, N, noising), level(n + 1, N, power)
        backward_state(a, 0.5 * b * ours, math.sqrt(b), A, R, OWN[n], NEXT, B)
        SLOPE, FORTH = OWN[n], OWN[N]  # scratch: their normals are used up
        combine(1.0, R, 0.0, R, SLOPE, B)
        primitives.reward_gradient(prepared, work, NEXT, R, B)
        primitives.base_mean(prepared, work, n, NEXT, FORTH, B)
        tilt = 0.5 * g * g * level(n, N, power)
        noise_of(tilt, g, A, FORTH, R, FORTH, B)
        add_kernel_ratio(g, a, b, ours, NEXT, A, SLOPE, FORTH, BACK, B)
        A, NEXT = NEXT, A
    add_end(prepared, work, -1.0, 0, False, A, ROWS, BACK, B)
    c = acceptance_ratio(OUT, BACK, count)
    for p in range(B):
        OUT[0, p] = c


@dataclass(frozen=True, kw_only=True)
class Bennett(KernelRatioEstimator):
    """log Z from forward and backward work, with exact samples of the tilted law.

    Parameters
    ----------
    annealing : level of the reward in the share of steps done, "linear", "quadratic"
        or "cubic".
    backward : variance of the backward kernels, that of the exact "noising" or
        "matched" to the forward ones.
    """

    source: ClassVar[str] = (
        "Bennett 1976, J. Comput. Phys. 22, 245; maximum likelihood: Shirts et al. "
        "2003, Phys. Rev. Lett. 91, 140601"
    )
    formula: ClassVar[str] = r"""
\sum_{m=1}^{M} \frac{1}{1 + e^{c - w_F^{(m)}}}
  = \sum_{m=1}^{M} \frac{1}{1 + e^{w_B^{(m)} - c}}, \quad c \approx \log Z, \quad
  w = \log W"""
    unbiased: ClassVar[str] = (
        "log Z of the continuous process at any number of steps, up to a bias of "
        "O(1/n_paths)"
    )
    needs: ClassVar[frozenset[str]] = frozenset(
        {"reward_gradient", "base_density", "tilted_samples"}
    )
    block_kernel = staticmethod(block_kernel)

    @property
    def declared_bias(self) -> str:
        # of order 1/n_paths, but all paths of a replicate make one number, from which
        # that of fewer paths cannot be told
        return "any"

    def group_size(self, n_paths: int) -> int:
        return n_paths

    def own_normals(self, n_steps: int) -> int:
        return n_steps + 2

    def not_applicable(self, n_paths: int) -> str | None:
        if n_paths < 2:
            return "it compares at least 2 paths per replicate"
        return None

    def statistics(self, view: View) -> Tensor:
        forward, backward = self.works(view)
        low = min(forward.min(), backward.min())
        high = max(forward.max(), backward.max())
        for _ in range(BISECTIONS):
            c = 0.5 * (low + high)
            accepted = (forward - c).sigmoid().sum() - (c - backward).sigmoid().sum()
            low, high = (c, high) if accepted > 0.0 else (low, c)
        return (0.5 * (low + high)).expand(view.n_paths, 1)

    def works(self, view: View) -> tuple[Tensor, Tensor]:
        """Return the log-weights (n,) of forward and of backward paths."""
        import torch

        steps = steps_of(view.denoiser, self.power, self.backward)
        count = view.n_steps
        uniforms = torch.special.ndtr(view.noise(2 * count + 1)[:, 0])
        y = view.tilted_sample(view.noise(2 * count), uniforms)
        backward = view.base_log_density(count, y) + view.reward(y)
        slope = view.reward_gradient(y)
        for n in reversed(range(count)):
            b, g = steps.back[n], steps.noise[n]
            mean = steps.shrink[n] * y + 0.5 * b * steps.level[n + 1] * slope
            before = mean + np.sqrt(b) * view.noise(count + n)
            ahead = view.reward_gradient(before)
            tilt = 0.5 * g**2 * steps.level[n]
            z = (y - view.base_mean(n, before) - tilt * ahead) / g
            backward = backward + log_kernel_ratio(steps, n, before, y, slope, z)
            y, slope = before, ahead
        return self.forward_weights(view), backward - view.base_log_density(0, y)
