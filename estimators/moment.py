"""Moment loss: the log-ratio of path laws regressed on a constant, its initial value.

Along paths of a control v, with the log-ratio l of the policy's law to the tilted one
(`sdebench.estimators._log_ratio`), the loss 1/2 E_v[(l - y_0)^2] is differentiated with
the paths held fixed,

    E_v[(l - y_0) grad l] = Cov_v(l, grad l) + (E_v l - y_0) E_v[grad l].

The first term is the gradient of the log-variance loss, and all there is with the best
value y_0 = E_v l.  y_0 is learned along with the policy; here it is the mean of l over
the *other* paths, which is independent of the path that it is subtracted from: the
estimate has no bias, and is that of `log_variance`, path by path.

On policy grad l is the score, of mean zero: every given y_0 leaves the gradient of J_N,
and is the constant baseline of a likelihood-ratio estimator.  Off policy a given y_0
decides the gradient.  At the optimum l is -log Z = V_0, and y_0 the value there, so
that with another y_0 the loss has its minimum elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sdebench.composite import Runner
from sdebench.errors import ParameterError, unknown
from sdebench.estimator import Array
from sdebench.estimators._log_ratio import CentredLogRatio

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain

INITIAL_VALUES = ("learned", "given")


@dataclass(frozen=True, kw_only=True)
class Moment(CentredLogRatio):
    """Gradient of half the second moment of the log-ratio about an initial value.

    Parameters
    ----------
    initial_value : "learned", the mean over the other paths, or "given".
    value : the given one.
    sampling : control of the paths: "current" (the policy's), "base" or "optimal".
    """

    estimand: ClassVar[str] = "gradient"
    source: ClassVar[str] = (
        "Nüsken and Richter 2021, arXiv:2005.05409; backward equations: E, Han and "
        "Jentzen 2017, arXiv:1706.04702"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
\ell &= \sum_n \left( w_n \cdot y_n - \tfrac{1}{2} |w_n|^2 + f_n \right) - r(X_N),
  \quad y_n = z_n + v_n \\
g &= \frac{1}{M} \sum_{m=1}^{M} \left( \ell^{(m)} - y_0^{(m)} \right)
  \nabla_\theta \ell^{(m)}, \quad
y_0^{(m)} = \frac{1}{M - 1} \sum_{k \ne m} \ell^{(k)} \ \text{or given}
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "half the gradient of E(l - y_0)^2 under the paths' law, with y_0 = E l if it "
        "is learned; with paths of the policy itself, the gradient of the discretized "
        "objective J_N for every y_0"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"initial_value": "given"},
        {"initial_value": "given", "sampling": "base"},
    )

    initial_value: str = "learned"
    value: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_value not in INITIAL_VALUES:
            raise unknown("initial_value", self.initial_value, INITIAL_VALUES)
        if not math.isfinite(self.value):
            raise ParameterError(f"value {self.value!r} must be a finite number")
        if self._learned and self.value != 0.0:
            raise ParameterError(
                f"value {self.value!r} was given, and initial_value is learned; use "
                'initial_value="given"'
            )

    @property
    def _learned(self) -> bool:
        return self.initial_value == "learned"

    @property
    def independent(self) -> bool:
        return not self._learned

    def n_statistics(self, n_params: int) -> int:
        return super().n_statistics(n_params) if self._learned else n_params

    def not_applicable(self, n_paths: int) -> str | None:
        return super().not_applicable(n_paths) if self._learned else None

    def target(self, policy: PolicyChain) -> Array:
        if self._learned or self.sampling == "current":
            return super().target(policy)
        return policy.moment_gradient(self.sampling, self.value)

    def run(self, runner: Runner) -> Array:
        if self._learned:
            return super().run(runner)
        log_ratio, score = self.log_ratio(runner)
        return (log_ratio - self.value) * score

    def combine(self, mean: Array, n_paths: int) -> Array:
        return super().combine(mean, n_paths) if self._learned else mean
