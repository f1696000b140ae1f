"""Variance of every family of gradient estimators against the number of steps.

Halfway, where a policy still learns, all variances tend to those of continuous time,
those of likelihood ratios too: their score is a stochastic integral.  At the optimum
estimators whose noise is that of the costate or of the log-ratio lose it.  Sticking
the landing and the time-reversed BSDE tend to zero; log-variance does where the value
function at the start is a constant, as on a memoryless process, and not where the start
is random: the log-ratio is then the value function at X_0.  RLR is of another
objective, the reward alone, whose gradient does not vanish there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from sdebench import registry
from sdebench.experiments.experiment import Progress
from sdebench.studies import _families
from sdebench.studies._families import FAMILIES, POINTS
from sdebench.studies._study import Study, level_of_each

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROBLEMS = ("ou_quadratic_easy:dim=2", "gaussian_tilt")
LADDER = (4, 8, 16, 32, 64, 128, 256)
COST_STEPS = 64


@dataclass(frozen=True)
class VarianceAndSteps(Study):
    """Variance against the number of time steps, by family of estimators."""

    subject: ClassVar[str] = (
        "Variance of one estimator of each family against the number of time steps, "
        "halfway to the optimum and at it, and its cost in evaluations."
    )
    source: ClassVar[str] = "This catalogue; no numbers of others"
    procedure: ClassVar[str] = (
        "Variance of one path (trace of the covariance) relative to |∇J|², at the "
        "optimum to that at θ = 0, on a linear–quadratic problem and on a Gaussian "
        f"tilt with {LADDER[0]} to {LADDER[-1]} steps. Estimators that couple their "
        "paths are measured in replicates of 256, times 256; zeroth order (SPSA) draws "
        "one direction for all paths of a replicate. Power of N: from 16 to 256 steps."
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        cells = [(spec, n_steps) for spec in PROBLEMS for n_steps in LADDER]
        level = level_of_each(len(cells) * len(FAMILIES) * len(POINTS))
        rows: list[dict[str, Any]] = []
        for done, (spec, n_steps) in enumerate(cells, start=1):
            problem = registry.problem(spec)
            rows += _families.variances(problem, n_steps, level, seed)
            if n_steps == COST_STEPS:
                rows += _families.costs(problem, n_steps)
            progress(done, len(cells))
        return pd.DataFrame(rows)

    def summary(self, evidence: pd.DataFrame) -> str:
        found = evidence[evidence["kind"] == "variance"]
        at = found[(found["point"] == "optimum") & (found["n_steps"] == LADDER[-1])]
        value = at.pivot(index="problem", columns="family", values="value")
        share = 100.0 * value["pathwise, sticking the landing"] / value["pathwise"]
        halfway = found[found["point"] == "halfway"]
        halfway = halfway[halfway["n_steps"] == LADDER[-1]]
        value = halfway.pivot(index="problem", columns="family", values="value")
        ratio = value["REINFORCE, leave-one-out"] / value["pathwise"]
        return (
            f"With {LADDER[-1]} steps halfway REINFORCE has {ratio.min():.0f} to "
            f"{ratio.max():.0f} times the variance of pathwise gradients; at the "
            f"optimum sticking the landing has {share.min():.2g} to "
            f"{share.max():.2g} % of it."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        return _families.table(evidence, "n_steps", "N")

    def figure(self, evidence: pd.DataFrame) -> Figure:
        return _families.panels(evidence, "n_steps", "number of time steps N")
