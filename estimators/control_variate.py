"""Control variates: subtract what has mean zero and moves with the estimate.

Two kinds of functions of a path have mean zero at every number of steps:

- the martingale sum_n w_n . z_n.  It is the noise of a value function along the path
  by Ito's formula, of the one whose optimal control is the current control,
  grad V = -G^{-T} w: once the control is optimal it is the noise of the cost;
- the components of the score S = sum_n (dw_n/dtheta)^T z_n.

The coefficients of the best linear combination are found by least squares.  Found on
the paths that they are used on, they would bias the mean by O(1/n_paths); here the even
paths use the coefficients of the odd ones and the other way round (cross-fitting), and
every coefficient is independent of the mean-zero functions that it multiplies: no bias
at any number of paths.  Where the control is linear in theta the martingale is a
combination of the scores and adds nothing to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sdebench.composite import PathScores, Runner
from sdebench.errors import ParameterError, unknown
from sdebench.estimator import Array, Control, Estimator, Sizes
from sdebench.estimators._cross_fitting import cross_fitted
from sdebench.estimators._wrapper import WRAPPED, Wrapper

COVARIATES = ("all", "martingale", "score")


@dataclass(frozen=True, kw_only=True)
class _ScoresOf(PathScores):
    """Scores on the paths of another estimator."""

    like: Estimator

    @property
    def control(self) -> Control:
        return self.like.control

    def noisy_steps(self, n_steps: int) -> Array | None:
        return self.like.noisy_steps(n_steps)


@dataclass(frozen=True, kw_only=True)
class ControlVariate(Wrapper):
    """An estimator minus its regression on the martingale and the score of the path.

    Parameters
    ----------
    estimator : the wrapped estimator, a specification.
    covariates : "martingale", "score" or "all".
    """

    source: ClassVar[str] = (
        "Glasserman 2003, section 4.1; cross-fitting: Chernozhukov et al. 2018"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
\bar g &= g - B^\top \varphi, \quad
  \varphi = \left( \sum_n w_n \cdot z_n, \ \sum_n
  \left( \frac{\partial w_n}{\partial \theta} \right)^\top z_n \right),
  \quad E \varphi = 0 \\
B &= \text{least squares of } g \text{ on } \varphi \text{ over the other half of the
  paths}
\end{aligned}"""
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        *WRAPPED,
        {"estimator": "reinforce:baseline=none", "covariates": "martingale"},
    )

    covariates: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.covariates not in COVARIATES:
            raise unknown("covariates", self.covariates, COVARIATES)
        if self.inner.other_control is not None:
            raise ParameterError(
                f"{self.name} cannot wrap {self.estimator}: it compares two controls, "
                "and the covariates belong to one"
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs | PathScores.needs

    def group_size(self, n_paths: int) -> int:
        return n_paths

    def not_applicable_to(self, sizes: Sizes) -> str | None:
        count = {"martingale": 1, "score": sizes.n_params}.get(
            self.covariates, sizes.n_params + 1
        )
        least = 2 * (count + 2)
        if sizes.n_paths < least:
            return (
                f"it would be a regression with fewer paths than features: {count} "
                f"covariates and a constant on half of {sizes.n_paths} paths; use at "
                f"least {least}"
            )
        return super().not_applicable_to(sizes)

    def run(self, runner: Runner) -> Array:
        rows, scores = runner.run(self.inner, _ScoresOf(like=self.inner))
        n_params = runner.n_params
        score, martingale = scores[:n_params], scores[2 * n_params + 2][None, :]
        covariates = {"score": score, "martingale": martingale}
        every = np.vstack([score, martingale])
        return cross_fitted(rows, covariates.get(self.covariates, every))
