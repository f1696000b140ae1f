r"""Jarzynski's identity under tilting: log Z from the work along annealed paths.

Along rho_t = p_t e^{lambda_t r} the paths of dX = (b + 1/2 sigma^2 lambda grad r) dt +
sigma dB, X_0 ~ p_0, carry the work

    dA = (lambda' r + lambda v . grad r) dt,     v = kappa x + eta grad log p_t,

and E e^{A_T} = Z = E_{p_T} e^r in continuous time: base score and velocity enter only
through v, and no divergence is needed since d_t log p + div v + v . s = 0 is used.
The discrete weight is the left Riemann sum along the Euler-Maruyama chain, so that its
mean is off by O(h); on Gaussian problems that mean is exact (`log_mean_work`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.estimator import Array
from sdebench.estimators._work import (
    WorkEstimator,
    add_riemann_work,
    flow_work,
    level,
    levels,
    push,
    step_growth,
    step_noise,
    steps_of,
)
from sdebench.simulate import primitives
from sdebench.simulate.tile import clear, combine, path_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.view import View


@path_kernel
def block_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    power: int,
    OUT: Any,
) -> None:
    """Set OUT (1, B + PADDING) to the work of every path of a chain of its own."""
    N = W.shape[0]
    A, NEXT, R, REWARD = work.adjoint, work.adjoint_next, work.direction, work.start
    clear(OUT, B)
    combine(1.0, X[0], 0.0, X[0], A, B)
    for n in range(N):
        ours, g = level(n, N, power), step_noise(prepared, n)
        rate = power * level(n, N, power - 1) / N
        primitives.reward(prepared, work, A, REWARD, 0, B)
        primitives.reward_gradient(prepared, work, A, R, B)
        primitives.base_mean(prepared, work, n, A, NEXT, B)
        growth = step_growth(prepared, n)
        add_riemann_work(growth, ours, rate, A, NEXT, R, REWARD, OUT, B)
        push(0.5 * g * g * ours, R, g, Z[n], NEXT, B)
        A, NEXT = NEXT, A


@dataclass(frozen=True, kw_only=True)
class Jarzynski(WorkEstimator):
    """log Z from the Riemann sum of the work along annealed paths.

    Parameters
    ----------
    annealing : level of the reward in the share of steps done, "linear", "quadratic"
        or "cubic".
    """

    source: ClassVar[str] = (
        "Jarzynski 1997, Phys. Rev. Lett. 78, 2690; Vaikuntanathan and Jarzynski 2008; "
        "the tilted form as in arXiv:2605.00229"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
X_{n+1} &= X_n + h \left( b_n + \tfrac{1}{2} \sigma_n^2 \lambda_n \nabla r \right)(X_n)
  + \sqrt{h}\, \sigma_n z_n, \quad X_0 \sim p_0 \\
A &= \sum_n h \left( \lambda_n' r + \lambda_n v_n \cdot \nabla r \right)(X_n), \quad
  \log Z \approx \log \frac{1}{M} \sum_{m=1}^{M} e^{A^{(m)}}
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "the mean of the exponential of the Riemann-sum work, before the logarithm; it "
        "differs from Z by O(h)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"reward_gradient"})
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"annealing": "linear"})
    block_kernel = staticmethod(block_kernel)

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return (self.power,)

    def target(self, policy: PolicyChain) -> Array:
        from sdebench.closed_form.work import log_mean_work

        return np.array([log_mean_work(policy.chain, self.power)])

    def statistics(self, view: View) -> Tensor:
        power, count = self.power, view.n_steps
        steps = steps_of(view.denoiser, power)
        rates = power * levels(count, power - 1) / count
        x = view.start()
        work = x.new_zeros(view.n_paths)
        for n in range(count):
            slope, mean = view.reward_gradient(x), view.base_mean(n, x)
            work = work + rates[n] * view.reward(x)
            work = work + flow_work(steps, n, x, mean, slope)
            tilt = 0.5 * steps.noise[n] ** 2 * steps.level[n]
            x = mean + tilt * slope + view.apply_noise(n, view.noise(n))
        return work[:, None]
