"""Importance sampling of the normaliser h(x) = E_base[exp(r(X_T) - int f)] with paths.

Paths are drawn under the control w and weighted by the likelihood ratio of the base
chain,

    log weight = r(X_N) - sum_n f_n - sum_n w_n . z_n - sum_n 1/2 |w_n|^2;

the mean of the weights is h without bias for every control, and without variance for
the optimal one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sdebench.errors import unknown
from sdebench.estimator import Estimator
from sdebench.estimators._proposals import PROPOSALS
from sdebench.simulate.tile import lanes, load, path_kernel, store

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View


@path_kernel
def block_kernel(
    prepared: Any, work: Any, X: Any, Z: Any, W: Any, totals: Any, B: int, OUT: Any
) -> None:
    """Set OUT (1, B + PADDING) to the log-weight of every path of a block."""
    for p in range(0, B, lanes(OUT)):
        a = load(totals, 3, p) - load(totals, 1, p)
        b = load(totals, 2, p) + load(totals, 0, p)
        store(OUT, 0, p, a - b)


@dataclass(frozen=True, kw_only=True)
class PathImportanceSampling(Estimator):
    """log Z from the importance weights of controlled paths.

    Parameters
    ----------
    proposal : control of the simulated paths: "zero", "given" (the evaluation point's)
        or "optimal".
    """

    estimand: ClassVar[str] = "log_normalizer"
    source: ClassVar[str] = "Girsanov weights; Kappen and Ruiz 2016, arXiv:1505.01874"
    formula: ClassVar[str] = r"""\begin{aligned}
\log W &= r(X_N) - \sum_n \left( f_n + w_n \cdot z_n
  + \tfrac{1}{2} |w_n|^2 \right) \\
\log Z &\approx \log \frac{1}{M} \sum_{m=1}^{M} W^{(m)}
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "Z of the discretized process before the logarithm, which biases by "
        "-Var(weight)/(2 n_paths Z^2)"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = tuple(
        {"proposal": proposal} for proposal in PROPOSALS
    )
    reduction: ClassVar[str] = "log_mean_exp"
    block_kernel = staticmethod(block_kernel)

    proposal: str = "given"

    def __post_init__(self) -> None:
        if self.proposal not in PROPOSALS:
            raise unknown("proposal", self.proposal, PROPOSALS)

    @property
    def control(self) -> str:
        return PROPOSALS[self.proposal]

    def n_statistics(self, n_params: int) -> int:
        return 1

    @property
    def handles_state_dependent_noise(self) -> bool:
        return True

    def statistics(self, view: View) -> Tensor:
        return view.rollout().log_weight[:, None]
