r"""Gradients of a path KL divergence: whole, and with detached states.

Student and teacher are chains x_{k+1} = a x_k + 0.8 xi_k of six steps from N(0, 1), the
teacher with a = 0.5.  The divergence of their path laws is a sum over steps,

    KL(student | teacher) = sum_k (a - 0.5)^2 E[x_k^2] / (2 0.8^2),

and on-policy distillation follows its gradient with the states detached: the first
term of

    dKL/da = sum_k (a - 0.5) E[x_k^2] / 0.8^2
             + sum_k (a - 0.5)^2 dE[x_k^2]/da / (2 0.8^2).

As a control problem the teacher is the base process, the student its control
w_k = (a - 0.5) x_k / 0.8, and the divergence the control cost: the whole gradient is
that of the objective J_N without a reward, the detached one that of adjoint matching,
whose lean adjoint is zero without costs on the states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd

from sdebench.closed_form.linear_quadratic import LinearQuadratic
from sdebench.experiments.experiment import Progress, exact, records
from sdebench.experiments.measuring import mean_interval, sample
from sdebench.linear_problem import Array, LinearProblem, Profile
from sdebench.report.format import plain
from sdebench.studies._study import Study, compared, count_agreeing, level_of_each

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEACHER, NOISE, N_STEPS = 0.5, 0.8, 6
PRINTED = {("whole", 0.9): "11.185", ("detached", 0.9): "7.041"} | {
    ("whole", 0.6): "1.0026",
    ("detached", 0.6): "0.9375",
}
ESTIMATORS = {
    "whole": ("pathwise", "reinforce:baseline=leave_one_out"),
    "detached": ("adjoint_matching",),
}
N_REPLICATES = 1 << 13
N_INTERVALS = 6


@dataclass(frozen=True, kw_only=True)
class _PathKL(LinearProblem):
    """The student as a controlled teacher; the parameter is a - 0.5."""

    def build(self) -> LinearQuadratic:
        eye = np.eye(1)
        return LinearQuadratic(
            drift_matrix=(TEACHER - 1.0) * eye,
            drift_offset=np.zeros(1),
            diffusion=NOISE * eye,
            running=0.0 * eye,
            reward_quadratic=0.0 * eye,
            reward_linear=np.zeros(1),
            reward_constant=0.0,
            horizon=float(N_STEPS),
            start_mean=np.zeros(1),
            start_covariance=eye,
        )

    @property
    def profiles(self) -> tuple[Profile, ...]:
        return (Profile("factor", 0, 0),)

    @property
    def theta_star(self) -> Array:
        return np.zeros(1)

    def spatial_map(self, name: str, t: Array) -> tuple[Array, Array]:
        return np.full((len(t), 1, 1), 1.0 / NOISE), np.zeros((len(t), 1))


def exact_gradient(kind: str, factor: float) -> float:
    """Return the whole or the detached gradient of the student ``factor``."""
    truth = _PathKL().truth
    answer = truth.gradient if kind == "whole" else truth.matching_gradient
    return float(answer([factor - TEACHER], N_STEPS)[0])


@dataclass(frozen=True)
class PathKL(Study):
    """Whole and detached gradient of a path KL divergence."""

    subject: ClassVar[str] = (
        "The gradient of the KL divergence between a student's and a teacher's "
        "linear–Gaussian paths, whole and with detached states as on-policy "
        "distillation takes it: both vanish at the teacher and differ elsewhere."
    )
    source: ClassVar[str] = (
        "DiffusionOPD, arXiv:2605.15055, the detached gradient of the per-step KL; the "
        "numbers are derived"
    )
    procedure: ClassVar[str] = (
        f"Six steps of x' = a x + {NOISE} ξ from N(0, 1), teacher a = {TEACHER}. Exact "
        "by moments of the chain; simulated with the estimators named, "
        f"{N_REPLICATES:,} replicates of 256 paths."
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows = []
        for done, ((kind, factor), printed) in enumerate(PRINTED.items(), start=1):
            quantity = f"student {factor}, {kind} gradient"
            keys = {"kind": kind, "factor": factor}
            answer = exact(exact_gradient(kind, factor))
            rows.append(compared(f"{quantity}, exact", printed, answer) | keys)
            names = ESTIMATORS[kind]
            theta = [factor - TEACHER]
            found = sample(_PathKL(), names, theta, N_STEPS, N_REPLICATES, seed)
            for name, (moments, _) in zip(names, found, strict=True):
                ours = mean_interval(moments, level_of_each(N_INTERVALS))
                rows.append(compared(f"{quantity}, {name}", printed, ours) | keys)
            progress(done, len(PRINTED))
        return pd.DataFrame(rows)

    def summary(self, evidence: pd.DataFrame) -> str:
        shares = [
            f"{plain(100 * exact_gradient('detached', a) / exact_gradient('whole', a))}"
            f" % at a = {a}"
            for a in (0.6, 0.9)
        ]
        return (
            f"{count_agreeing(evidence)} of {len(evidence)} comparisons agree. The "
            f"detached gradient is {' and '.join(shares)} of the whole one."
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        import seaborn as sns

        from sdebench.report.style import COLUMN, finish_axes, new_figure, settle, style

        blue, orange = sns.color_palette("colorblind")[:2]
        factors = np.linspace(0.0, 1.0, 101)
        with style():
            figure = new_figure(COLUMN, 2.6)
            axes = figure.subplots()
            for kind, color in (("whole", blue), ("detached", orange)):
                curve = [exact_gradient(kind, a) for a in factors]
                axes.plot(factors, curve, color=color, lw=1.2, label=f"{kind}, exact")
                measured = evidence["low"] < evidence["high"]
                mine = evidence[measured & evidence["kind"].eq(kind)]
                axes.plot(
                    mine["factor"],
                    mine["value"],
                    "o",
                    ms=4,
                    color=color,
                    label=f"{kind}, simulated",
                )
            for row in records(evidence):
                axes.plot(row.factor, float(row.printed), "x", ms=7, color="0.2")
            axes.plot([], [], "x", ms=7, color="0.2", label="source")
            axes.axvline(TEACHER, color="0.35", lw=0.8, ls=(0, (4, 1.5)))
            axes.set_xlabel("factor a of the student; teacher: 0.5")
            axes.set_ylabel("gradient of the path KL in a")
            axes.legend(loc="upper left")
            finish_axes(axes)
            settle(figure)
        return figure
