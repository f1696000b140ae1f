"""Variance of every family of gradient estimators against the dimension.

The coordinates of the problem are independent and share their two parameters, so that
one path holds d samples of the same gradient: the relative variance of an estimator
that treats every coordinate alone falls like 1/d.  Likelihood ratios multiply the noise
of all coordinates and stay.  The claim `variance_and_dimension` has the growth with a
parameter for each coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from sdebench import registry
from sdebench.experiments.experiment import Progress, signed
from sdebench.studies import _families
from sdebench.studies._families import FAMILIES, POINTS
from sdebench.studies._study import Study, level_of_each

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROBLEM, N_STEPS = "gaussian_tilt", 32
DIMENSIONS = (1, 2, 4, 8, 16, 32, 64)
REGRESSION, REGRESSION_MOST = "time-reversed BSDE", 8
"""Regressions cost d^3 in every step: not in more dimensions than this."""


@dataclass(frozen=True)
class VarianceAndDimensionFamilies(Study):
    """Variance against the dimension, by family of estimators."""

    subject: ClassVar[str] = (
        "Variance of one estimator of each family against the dimension, on a problem "
        "of independent coordinates that share their parameters."
    )
    source: ClassVar[str] = "This catalogue; no numbers of others"
    procedure: ClassVar[str] = (
        f"{PROBLEM} in {DIMENSIONS[0]} to {DIMENSIONS[-1]} dimensions with {N_STEPS} "
        "steps. Variance of one path (trace of the covariance) relative to |∇J|², at "
        "the optimum to that at θ = 0. Estimators that couple their paths are measured "
        "in replicates of 256, times 256; zeroth order (SPSA) draws one direction for "
        "all paths of a replicate. Power of d: from 8 to 64 dimensions. The "
        f"time-reversed BSDE runs in up to {REGRESSION_MOST} dimensions."
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        level = level_of_each(len(DIMENSIONS) * len(FAMILIES) * len(POINTS))
        rows: list[dict[str, Any]] = []
        for done, dim in enumerate(DIMENSIONS, start=1):
            problem = registry.problem(PROBLEM, dim=dim)
            families = dict(FAMILIES)
            if dim > REGRESSION_MOST:
                del families[REGRESSION]
            rows += _families.variances(problem, N_STEPS, level, seed, families)
            if dim == DIMENSIONS[0]:
                rows += _families.costs(problem, N_STEPS)
            progress(done, len(DIMENSIONS))
        return pd.DataFrame(rows)

    def summary(self, evidence: pd.DataFrame) -> str:
        found = evidence[evidence["kind"].eq("variance")]
        found = found[found["point"] == "halfway"]
        powers = []
        for family in ("pathwise", "REINFORCE, leave-one-out"):
            exponent = _families.growth(found[found["family"] == family], "dim")
            assert exponent is not None
            powers.append(f"{family} like d to the power {signed(exponent)}")
        return (
            "With shared parameters the relative variance halfway changes, from 8 to "
            f"{DIMENSIONS[-1]} dimensions, for {' and for '.join(powers)}."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        return _families.table(evidence, "dim", "d")

    def figure(self, evidence: pd.DataFrame) -> Figure:
        return _families.panels(evidence, "dim", "dimension d")
