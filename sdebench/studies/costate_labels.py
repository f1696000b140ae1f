r"""Labels of the time-reversed BSDE with the exact costate: how far they are off.

The Ornstein-Uhlenbeck process dX = -X/2 dt + dW on [0, 1] with the terminal cost x^4/4
has, without control, the costate

    phi(t, x) = E ((E x)^3 + 3 q E x),   E = e^{-(1-t)/2}, q = 1 - E^2.

Reversed paths with this phi end at labels Y_0 that differ from phi(0, X_0) by the time
step alone, in root mean square of order 1/2 as phi is not affine.  With increments that
are not those of the state, as in the first released code, the martingale parts do not
cancel; that code takes the costate at the earlier of a step's two times, too.  The
lean adjoint e^{-1/2} X_1^3 of forward paths is a label of the same costate, whose noise

    E Var(e^{-1/2} X_1^3 | X_0)

has no time step in it.  X_0 ~ N(0.3, 1); the score of the reversed paths is the affine
fit to the simulated states, which is exact in the limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import exp, sqrt
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd

from sdebench.estimators.time_reversed_bsde import TimeReversedBSDE
from sdebench.experiments.costates import (
    CubicCostate,
    lean_labels,
    make_view,
    positive_mean,
    replicated,
    root,
)
from sdebench.experiments.experiment import Progress, exact, records
from sdebench.problems.cubic_costate import CubicCostate as CubicProblem
from sdebench.report.format import plain
from sdebench.studies._study import Study, compared, count_agreeing, level_of_each

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sdebench.view import View

LADDER = (20, 40, 80, 160)
PRINTED = {
    "aligned": ("0.393", "0.256", "0.173", "0.120"),
    "misaligned": ("0.81", "0.59", "0.42", "0.30"),
}
SIZES = {
    "lean": ("2.12", "noise of the lean adjoint"),
    "size": ("1.24", "costate itself"),
}
N_PATHS = 1 << 13
N_REPLICATES = 48
N_INTERVALS = len(LADDER) * len(PRINTED) + 2


def exact_costate(t: float) -> CubicCostate:
    """Return the costate at time t, in continuous time."""
    growth = exp(-0.5 * (1.0 - t))
    return CubicCostate(growth, 1.0 - growth**2)


def exact_sizes() -> dict[str, float]:
    """Return the root mean squares of costate and lean-adjoint noise at time 0."""
    problem = CubicProblem()
    nodes, weights = np.polynomial.hermite_e.hermegauss(16)
    weights /= weights.sum()
    phi, at_start = exact_costate(0.0), problem.start_mean
    x = at_start + problem.start_scale * nodes
    mean = phi.growth * x
    costate = phi.growth * (mean**3 + 3.0 * phi.variance * mean)
    ends = mean[:, None] + sqrt(phi.variance) * nodes
    second = phi.growth**2 * (ends**6 @ weights)
    return {
        "size": float(sqrt(weights @ costate**2)),
        "lean": float(sqrt(weights @ (second - costate**2))),
    }


def labels_at_start(view: View, increments: str) -> float:
    """Return the mean square error of the labels at time 0."""
    estimator, n_steps = TimeReversedBSDE(increments=increments), view.n_steps
    earlier = increments == "misaligned"  # as its source has it
    x = view.rollout().states[-1]
    y = -view.reward_gradient(x)
    for n in reversed(range(n_steps)):
        phi = exact_costate((n + 1 - earlier) / n_steps)
        score = estimator.fit_score(view.rollout().states[n + 1])
        x, y = estimator.step_back(view, n, x, y, phi, score)
    return float((y - exact_costate(0.0)(x)).square().mean())


def errors(replicate: int, n_steps: int, seed: int) -> Mapping[str, float]:
    """Return mean squares at time 0: label errors, lean adjoint's, and costate."""
    view = make_view(CubicProblem(), "zero", n_steps, N_PATHS, seed, replicate)
    x, adjoint = lean_labels(view)[0]
    phi = exact_costate(0.0)(x)
    return {name: labels_at_start(view, name) for name in PRINTED} | {
        "lean": float((adjoint - phi).square().mean()),
        "size": float(phi.square().mean()),
    }


@dataclass(frozen=True)
class CostateLabels(Study):
    """Label errors of the time-reversed BSDE with an exact cubic costate."""

    subject: ClassVar[str] = (
        "Root mean square error of the time-reversed BSDE's labels at the start, with "
        "the exact costate of a quartic terminal cost, for the same increments in "
        "state and label and for misaligned ones; and the noise of the lean adjoint."
    )
    source: ClassVar[str] = (
        "Mei and Taghvaei 2026, arXiv:2603.20455, the algorithm, and the first "
        "released code for the misaligned increments; the numbers are derived"
    )
    procedure: ClassVar[str] = (
        "The problem cubic_costate without control, K Euler–Maruyama steps forwards "
        f"and backwards with the exact costate: {N_REPLICATES} replicates of "
        f"{N_PATHS:,} paths for each K. Size of the costate and noise of the lean "
        "adjoint also exact, by Gauss–Hermite quadrature in continuous time; simulated "
        f"with K = {LADDER[-1]}."
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows = []
        level = level_of_each(N_INTERVALS)
        for place, n_steps in enumerate(LADDER):
            draw = partial(errors, n_steps=n_steps, seed=seed)
            found = replicated(draw, N_REPLICATES)
            for name, printed in PRINTED.items():
                ours = root(positive_mean(found[name], level))
                rows.append(
                    compared(
                        f"{name} increments, K = {n_steps}",
                        printed[place],
                        ours,
                    )
                    | {"kind": name, "n_steps": n_steps}
                )
            progress(place + 1, len(LADDER))
        answers = exact_sizes()
        for name, (number, said) in SIZES.items():
            ours = exact(answers[name])
            rows.append(compared(f"{said}, exact", number, ours) | {"kind": name})
            simulated = root(positive_mean(found[name], level))
            rows.append(compared(f"{said}, simulated", number, simulated))
        return pd.DataFrame(rows)

    def summary(self, evidence: pd.DataFrame) -> str:
        slopes = {
            name: -np.polyfit(
                np.log(mine["n_steps"].astype(float)), np.log(mine["value"]), 1
            )[0]
            for name, mine in evidence.groupby("kind")
            if name in PRINTED
        }
        return (
            f"{count_agreeing(evidence)} of {len(evidence)} numbers agree. The error "
            f"falls like K to the power −{plain(slopes['aligned'], 2)} with the same "
            f"increments in state and label, −{plain(slopes['misaligned'], 2)} with "
            "misaligned ones; the lean adjoint's noise does not fall."
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        import seaborn as sns
        from matplotlib.ticker import NullLocator

        from sdebench.experiments.drawing import plain_ticks
        from sdebench.report.style import COLUMN, finish_axes, new_figure, settle, style

        palette = sns.color_palette("colorblind")
        with style():
            figure = new_figure(COLUMN, 2.8)
            axes = figure.subplots()
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            for name, color in (("misaligned", palette[3]), ("aligned", palette[0])):
                mine = evidence[evidence["kind"] == name]
                ends = [mine["value"] - mine["low"], mine["high"] - mine["value"]]
                axes.errorbar(
                    mine["n_steps"],
                    mine["value"],
                    yerr=ends,
                    color=color,
                    lw=1.2,
                    label=f"{name} increments",
                )
                for row in records(mine):
                    axes.plot(row.n_steps, float(row.printed), "x", ms=6, color="0.2")
            for (name, (_, text)), look in zip(SIZES.items(), ("-", "--"), strict=True):
                value = float(evidence.loc[evidence["kind"] == name, "value"].iloc[0])
                axes.axhline(value, color=palette[2], lw=1.2, ls=look, label=text)
            axes.plot([], [], "x", ms=6, ls="", color="0.2", label="source")
            axes.set_xticks(LADDER, [str(k) for k in LADDER])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_yticks([0.1, 0.2, 0.5, 1.0, 2.0])
            plain_ticks(axes)
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("number of steps K")
            axes.set_ylabel("root mean square at time 0")
            figure.legend(ncols=2, loc="outside upper center")
            finish_axes(axes)
            settle(figure)
        return figure
