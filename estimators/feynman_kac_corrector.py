r"""Feynman-Kac corrector of the reward tilt: particles, weights and resampling.

M particles follow the path of densities rho_n = p_n e^{lambda_n r} by the forward
kernels of `_work` and carry the log-weights

    riemann        h (lambda' r + lambda v . grad r)(x),
    kernel_ratio   log rho_{n+1}(x') B_n(x', x) - log rho_n(x) F_n(x, x').

Whenever the effective sample size (sum W)^2 / sum W^2 of the weights since the last
resampling falls below ``threshold`` M, the logarithm of their mean is added to log Z
and M particles are drawn from them: number i sits at the quantile (U + i) / M of the
weights ("systematic", one uniform U) or (U_i + i) / M ("stratified").

A particle's expected number of copies is M times its share, so that the product of mean
weights is unbiased for the mean of the product without resampling: Z itself with kernel
ratios, and with Riemann sums the mean of the Jarzynski weight, off by O(h).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.errors import ParameterError, unknown
from sdebench.estimator import Array
from sdebench.estimators._work import (
    WorkEstimator,
    add_kernel_ratio,
    add_riemann_work,
    add_row,
    flow_work,
    level,
    levels,
    log_kernel_ratio,
    push,
    step_back,
    step_growth,
    step_noise,
    step_shrink,
    steps_of,
    uniform,
)
from sdebench.simulate import primitives
from sdebench.simulate.tile import clear, combine, glue, path_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.view import View

RESAMPLING = ("systematic", "stratified")
WEIGHTS = ("riemann", "kernel_ratio")


def check_resampling(resampling: str, threshold: float) -> None:
    """Raise for an unknown scheme or a share that is none."""
    if resampling not in RESAMPLING:
        raise unknown("resampling", resampling, RESAMPLING)
    if not 0.0 < threshold <= 1.0:
        raise ParameterError(
            f"threshold {threshold} must be a share of the particles in (0, 1]"
        )


@glue
def weigh(LOGS, row, shares, count):  # type: ignore[no-untyped-def]
    """Set ``shares`` to the weights over their largest; return the log of that."""
    top = np.float64(LOGS[row, 0])
    for p in range(1, count):
        top = max(top, np.float64(LOGS[row, p]))
    for p in range(count):
        shares[p] = math.exp(np.float64(LOGS[row, p]) - top)
    return top


@glue
def gather(A, NEXT, ROWS, shares, total, count, stratified, U):  # type: ignore[no-untyped-def]
    """NEXT = resampled A, ROWS[1] = resampled ROWS[0]."""
    source, passed = 0, shares[0]
    u = uniform(np.float64(U[0]))
    for p in range(count):
        if stratified:
            u = uniform(np.float64(U[p]))
        place = (u + p) * total / count
        while passed < place and source < count - 1:
            source += 1
            passed += shares[source]
        for i in range(A.shape[0]):
            NEXT[i, p] = A[i, source]
        ROWS[1, p] = ROWS[0, source]


@glue
def log_density(prepared, work, n, ours, A, ROWS, B):  # type: ignore[no-untyped-def]
    """ROWS[0] = log p_n(x) + ours r(x); needs two more rows."""
    primitives.base_log_density(prepared, work, n, A, ROWS, 0, B)
    primitives.reward(prepared, work, A, ROWS, 2, B)
    add_row(ours, ROWS, 2, ROWS, B)


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
    exact: bool,
    stratified: bool,
    threshold: float,
    OUT: Any,
) -> None:
    """Set OUT (1, B + PADDING) to the log-weights of the particles of a replicate."""
    N = W.shape[0]
    A, NEXT, R, ROWS = work.adjoint, work.adjoint_next, work.direction, work.start
    shares, log_z = work.uniform, 0.0
    known = False  # whether R is grad r at A
    combine(1.0, X[0], 0.0, X[0], A, B)
    clear(OUT, B)
    clear(ROWS, B)
    if exact:
        log_density(prepared, work, 0, 0.0, A, ROWS, B)
        add_row(-1.0, ROWS, 0, OUT, B)
    for n in range(N):
        g, ours = step_noise(prepared, n), level(n, N, power)
        if not known:
            primitives.reward_gradient(prepared, work, A, R, B)
        primitives.base_mean(prepared, work, n, A, NEXT, B)
        if not exact:
            primitives.reward(prepared, work, A, ROWS, 2, B)
            growth, rate = step_growth(prepared, n), power * level(n, N, power - 1) / N
            add_riemann_work(growth, ours, rate, A, NEXT, R, ROWS[2:3], OUT, B)
        push(0.5 * g * g * ours, R, g, Z[n], NEXT, B)
        if exact:
            ours = level(n + 1, N, power)
            primitives.reward_gradient(prepared, work, NEXT, R, B)
            a, b = step_shrink(prepared, n, N), step_back(prepared, n, N, True)
            add_kernel_ratio(g, a, b, ours, A, NEXT, R, Z[n], OUT, B)
            log_density(prepared, work, n + 1, ours, NEXT, ROWS, B)
            known = True
        A, NEXT = NEXT, A
        combine(1.0, OUT, 0.0, OUT, ROWS[3:4], B)
        add_row(1.0, ROWS, 0, ROWS[3:4], B)
        if n + 1 == N:
            continue
        top = weigh(ROWS, 3, shares, count)
        total, square = 0.0, 0.0
        for p in range(count):
            total += shares[p]
            square += shares[p] * shares[p]
        if total * total < threshold * count * square:
            log_z += top + math.log(total / count)
            gather(A, NEXT, ROWS, shares, total, count, stratified, OWN[n, 0])
            clear(OUT, B)
            add_row(-1.0, ROWS, 1, OUT, B)
            A, NEXT = NEXT, A
            known = False
    for p in range(B):
        OUT[0, p] = ROWS[3, p] + log_z


@dataclass(frozen=True, kw_only=True)
class FeynmanKacCorrector(WorkEstimator):
    """log Z from particles that are weighted and resampled along annealed paths.

    Parameters
    ----------
    weights : "kernel_ratio", unbiased for Z, or "riemann", the work as a Riemann sum.
    resampling : "systematic" or "stratified".
    threshold : in (0, 1]: resample below this effective share of the particles.
    annealing : level of the reward in the share of steps done, "linear", "quadratic"
        or "cubic".
    """

    source: ClassVar[str] = (
        "Skreta et al. 2025, arXiv:2503.02819 (Feynman-Kac correctors); resampling: "
        "Del Moral, Doucet and Jasra 2006"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
\log W_i &= \sum_{n\ \text{since the last resampling}} \log w_n(X_n^i, X_{n+1}^i) \\
\log Z &\approx \sum_{\text{resamplings}} \log \frac{1}{M} \sum_{i=1}^{M} W_i
  + \log \frac{1}{M} \sum_{i=1}^{M} W_i^{\text{end}}
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "before the logarithm: Z at any number of steps with kernel ratios, and with "
        "Riemann sums the mean of the Jarzynski weight"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"resampling": "stratified", "threshold": 1.0},
        {"weights": "riemann"},
    )
    block_kernel = staticmethod(block_kernel)

    weights: str = "kernel_ratio"
    resampling: str = "systematic"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights not in WEIGHTS:
            raise unknown("weights", self.weights, WEIGHTS)
        check_resampling(self.resampling, self.threshold)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        density = {"base_density"} if self.discretization_free else set()
        return frozenset({"reward_gradient"} | density)

    @property
    def discretization_free(self) -> bool:
        return self.weights == "kernel_ratio"

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return (
            self.power,
            self.discretization_free,
            self.resampling == "stratified",
            self.threshold,
        )

    def group_size(self, n_paths: int) -> int:
        return n_paths

    def own_normals(self, n_steps: int) -> int:
        return n_steps

    def not_applicable(self, n_paths: int) -> str | None:
        if n_paths < 2:
            return "resampling needs at least 2 paths per replicate"
        return None

    def target(self, policy: PolicyChain) -> Array:
        """Return the mean without resampling, which leaves it as it is."""
        from sdebench.closed_form.work import log_mean_work

        return np.array([log_mean_work(policy.chain, self.power)])

    def statistics(self, view: View) -> Tensor:
        import torch

        power, count = self.power, view.n_steps
        steps = steps_of(view.denoiser, power, "noising")
        rates = power * levels(count, power - 1) / count
        exact = self.discretization_free
        x = view.start()
        log_z = x.new_zeros(())
        slope = view.reward_gradient(x)
        weight = -view.base_log_density(0, x) if exact else x.new_zeros(view.n_paths)
        total = weight
        for n in range(count):
            z, mean = view.noise(n), view.base_mean(n, x)
            if not exact:
                weight = weight + flow_work(steps, n, x, mean, slope)
                weight = weight + rates[n] * view.reward(x)
            tilt = 0.5 * steps.noise[n] ** 2 * steps.level[n]
            after = mean + tilt * slope + view.apply_noise(n, z)
            slope = view.reward_gradient(after)
            density = torch.zeros_like(weight)
            if exact:
                weight = weight + log_kernel_ratio(steps, n, x, after, slope, z)
                density = view.base_log_density(n + 1, after)
                density = density + steps.level[n + 1] * view.reward(after)
            x, total = after, weight + density
            if n + 1 == count or self._spread(total) >= self.threshold:
                continue
            log_z = log_z + torch.logsumexp(total, 0) - math.log(view.n_paths)
            source = self._ancestors(total, view.noise(count + n)[:, 0])
            x, slope, weight = x[source], slope[source], -density[source]
        return (total + log_z)[:, None]

    def _spread(self, logs: Tensor) -> float:
        """Return the effective share of the particles."""
        weights = (logs - logs.max()).exp()
        return float(weights.sum() ** 2 / (weights * weights).sum() / len(logs))

    def _ancestors(self, logs: Tensor, normals: Tensor) -> Tensor:
        """Return the particles (n,) that the new ones copy."""
        import torch

        passed = torch.cumsum((logs - logs.max()).exp(), 0)
        uniforms = torch.special.ndtr(normals)
        if self.resampling == "systematic":
            uniforms = uniforms[:1].expand(len(logs))
        places = torch.arange(len(logs), dtype=logs.dtype, device=logs.device)
        places = (places + uniforms) * passed[-1] / len(logs)
        return torch.searchsorted(passed, places).clamp(max=len(logs) - 1)
