r"""Importance sampling of the normaliser h(x) = E_base[exp(r(X_T) - int f)] with paths.

Paths are drawn under the control w and weighted by one of two ratios of path densities,

    girsanov       log W = r(X_N) - sum_n f_n - sum_n w_n . z_n - sum_n 1/2 |w_n|^2,

over the base chain: its mean is Z_N of the discretized process without bias for every
control, and without variance for the optimal one; or, on a memoryless denoising process
with its exact noising kernels B_n(x', x) = p(X_n = x | X_{n+1} = x'),

    kernel_ratio   log W = log p_T(X_N) e^{r(X_N)} / p_0(X_0)
                           + sum_n log B_n(X_{n+1}, X_n) / F_n(X_n, X_{n+1}),

F_n the controlled kernels: its mean is Z of the continuous process at any N.

The mean of log W is a bound, by a relative entropy.  Under the control's own paths P_w

    lower   E_w log W = log Z - KL(P_w || P*) <= log Z     (the evidence bound, ELBO),
    upper   E*  log W = log Z + KL(P* || P_w) >= log Z     (EUBO),

where P* is the tilted law of the paths: X_N ~ p_T e^r / Z, noised step by step by B_n.
For kernel_ratio both hold at any number of steps, with exact samples of the tilted law,
an oracle, for the second.  With girsanov weights P* is the tilted chain of N steps, the
lower bound is on log Z_N, and nothing samples P* for the upper one.  No control moves
the law of X_0: where it remembers X_T, a part of the gap stays even at u*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.errors import ParameterError, unknown
from sdebench.estimator import Array, Estimator
from sdebench.estimators._proposals import PROPOSALS
from sdebench.estimators._work import (
    add_end,
    add_kernel_ratio,
    log_kernel_ratio,
    noise_of,
    not_a_path_of_densities,
    step_back,
    step_noise,
    step_shrink,
    steps_of,
    uniform,
)
from sdebench.simulate import primitives
from sdebench.simulate.tables import Tables
from sdebench.simulate.tile import (
    clear,
    combine,
    lanes,
    load,
    path_kernel,
    store,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.view import View

BOUNDS = ("none", "lower", "upper")
WEIGHTS = ("girsanov", "kernel_ratio")


@path_kernel
def block_kernel(
    prepared: Any, work: Any, X: Any, Z: Any, W: Any, totals: Any, B: int, OUT: Any
) -> None:
    """Set OUT (1, B + PADDING) to the log-weight of every path of a block."""
    for p in range(0, B, lanes(OUT)):
        a = load(totals, 3, p) - load(totals, 1, p)
        b = load(totals, 2, p) + load(totals, 0, p)
        store(OUT, 0, p, a - b)


@path_kernel
def kernel_ratio_kernel(
    prepared: Any, work: Any, X: Any, Z: Any, W: Any, totals: Any, B: int, OUT: Any
) -> None:
    """Set OUT (1, B + PADDING) to the log of the kernel ratio of every path."""
    N, ROWS, ZERO = W.shape[0], work.start, work.direction
    clear(OUT, B)
    add_end(prepared, work, -1.0, 0, False, X[0], ROWS, OUT, B)
    clear(ZERO, B)
    for n in range(N):
        g, a = step_noise(prepared, n), step_shrink(prepared, n, N)
        b = step_back(prepared, n, N, True)
        add_kernel_ratio(g, a, b, 0.0, X[n], X[n + 1], ZERO, Z[n], OUT, B)
    add_end(prepared, work, 1.0, N, True, X[N], ROWS, OUT, B)


@path_kernel
def tilted_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    OWN: Any,
    OUT: Any,
) -> None:
    """Set OUT to the same of paths of the tilted law, noised from its samples."""
    N, ROWS = W.shape[0], work.start
    A, BEFORE, V = work.adjoint, work.adjoint_next, work.direction
    for p in range(B):
        work.uniform[p] = uniform(np.float64(OWN[N + 1, 0, p]))
    primitives.tilted_sample(prepared, work, work.uniform, OWN[N], A, B)
    clear(OUT, B)
    add_end(prepared, work, 1.0, N, True, A, ROWS, OUT, B)
    for n in range(N - 1, -1, -1):
        g, a = step_noise(prepared, n), step_shrink(prepared, n, N)
        b = step_back(prepared, n, N, True)
        combine(a, A, b**0.5, OWN[n], BEFORE, B)
        MEAN, ZERO = OWN[n], OWN[N]  # scratch: their normals are used up
        primitives.evaluate(prepared, work, n, BEFORE, V, B)
        primitives.base_mean(prepared, work, n, BEFORE, MEAN, B)
        noise_of(g, g, A, MEAN, V, MEAN, B)
        clear(ZERO, B)
        add_kernel_ratio(g, a, b, 0.0, BEFORE, A, ZERO, MEAN, OUT, B)
        A, BEFORE = BEFORE, A
    add_end(prepared, work, -1.0, 0, False, A, ROWS, OUT, B)


@dataclass(frozen=True, kw_only=True)
class PathImportanceSampling(Estimator):
    """log Z from the importance weights of controlled paths, or bounds on it.

    Parameters
    ----------
    proposal : control of the simulated paths: "zero", "given" (the evaluation point's)
        or "optimal".
    weights : ratio to the base chain of N steps ("girsanov") or to the continuous
        process ("kernel_ratio", memoryless denoising processes only).
    bound : "none", or the mean of the log-weight under the control, a "lower" bound of
        log Z, or under the tilted law, an "upper" one.
    """

    estimand: ClassVar[str] = "log_normalizer"
    source: ClassVar[str] = (
        "Girsanov weights; Kappen and Ruiz 2016, arXiv:1505.01874; upper bound: "
        "Blessing et al. 2024, arXiv:2406.07423"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
\log W &= r(X_N) - \sum_n \left( f_n + w_n \cdot z_n
  + \tfrac{1}{2} |w_n|^2 \right) \\
\log Z &\approx \log \frac{1}{M} \sum_{m=1}^{M} W^{(m)}, \quad
\mathrm{E}_w [\log W] \le \log Z \le \mathrm{E}_* [\log W]
\end{aligned}"""
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        *({"proposal": proposal} for proposal in PROPOSALS),
        {"bound": "lower", "weights": "kernel_ratio"},
        {"bound": "upper", "weights": "kernel_ratio"},
    )

    proposal: str = "given"
    weights: str = "girsanov"
    bound: str = "none"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("proposal", PROPOSALS),
            ("weights", WEIGHTS),
            ("bound", BOUNDS),
        ):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if self.bound == "upper" and not self._exact:
            raise ParameterError(
                "bound upper needs samples of the tilted law of the paths, and nothing "
                "samples that of the N-step chain: give weights = kernel_ratio"
            )

    @property
    def _exact(self) -> bool:
        return self.weights == "kernel_ratio"

    @property
    def unbiased(self) -> str:  # type: ignore[override]
        whose = "continuous" if self._exact else "discretized"
        if self.bound == "none":
            return (
                f"Z of the {whose} process before the logarithm, which biases by "
                "-Var(weight)/(2 n_paths Z^2)"
            )
        gap = "- KL(P || P*)" if self.bound == "lower" else "+ KL(P* || P)"
        return (
            f"log Z {gap} of the {whose} process, P the law of the controlled paths "
            "and P* the tilted one"
        )

    @property
    def reduction(self) -> str:  # type: ignore[override]
        return "log_mean_exp" if self.bound == "none" else "mean"

    @property
    def block_kernel(self) -> Any:  # type: ignore[override]
        if self.bound == "upper":
            return tilted_kernel
        return kernel_ratio_kernel if self._exact else block_kernel

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        density = {"base_density"} if self._exact else set()
        samples = {"tilted_samples"} if self.bound == "upper" else set()
        return frozenset(density | samples)

    @property
    def needs_denoiser(self) -> bool:
        return self._exact

    @property
    def discretization_free(self) -> bool:
        return self._exact and self.bound == "none"

    @property
    def has_target(self) -> bool:
        return self.bound != "none"

    @property
    def control(self) -> str:
        return PROPOSALS[self.proposal]

    def n_statistics(self, n_params: int) -> int:
        return 1

    @property
    def handles_state_dependent_noise(self) -> bool:
        return True

    def own_normals(self, n_steps: int) -> int:
        return n_steps + 2 if self.bound == "upper" else 0

    def not_applicable_on(self, tables: Tables, times: Array) -> str | None:
        return not_a_path_of_densities(tables, None) if self._exact else None

    def target(self, policy: PolicyChain) -> Array:
        """Return the mean of the log-weight, exactly."""
        from sdebench.closed_form.work import path_bounds

        gain, bias = {
            "zero": (0.0 * policy.gain, 0.0 * policy.bias),
            "given": (policy.gain, policy.bias),
            "optimal": (policy.optimal_gain, policy.optimal_bias),
        }[self.proposal]
        if not self._exact:
            return np.array([-policy.chain.objective(gain, bias)])
        lower, upper = path_bounds(policy.chain, gain, bias)
        return np.array([lower if self.bound == "lower" else upper])

    def statistics(self, view: View) -> Tensor:
        if not self._exact:
            return view.rollout().log_weight[:, None]
        steps, count = steps_of(view.denoiser, 1, "noising"), view.n_steps
        if self.bound == "upper":
            states, noises = self.tilted_paths(view)
        else:
            paths = view.rollout()
            states, noises = paths.states, paths.noises
        zero = states[0].new_zeros(states[0].shape)
        weight = view.base_log_density(count, states[-1]) + view.reward(states[-1])
        for n, z in enumerate(noises):
            x, after = states[n], states[n + 1]
            weight = weight + log_kernel_ratio(steps, n, x, after, zero, z)
        return (weight - view.base_log_density(0, states[0]))[:, None]

    def tilted_paths(self, view: View) -> tuple[list[Tensor], list[Tensor]]:
        """Return states X_0, ..., X_N of the tilted law, and their noises.

        Those of the controlled chain that would have gone through the same states.
        """
        import torch

        steps, count = steps_of(view.denoiser, 1, "noising"), view.n_steps
        uniforms = torch.special.ndtr(view.noise(2 * count + 1)[:, 0])
        states = [view.tilted_sample(view.noise(2 * count), uniforms)]
        noises: list[Tensor] = []
        for n in reversed(range(count)):
            after = states[0]
            x = steps.shrink[n] * after + np.sqrt(steps.back[n]) * view.noise(count + n)
            gap = (after - view.base_mean(n, x)) / steps.noise[n]
            noises.insert(0, gap - view.control(n, x))
            states.insert(0, x)
        return states, noises
