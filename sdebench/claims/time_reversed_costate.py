r"""Time-reversed BSDEs: labels without noise, gradients with less variance, and a bias.

The costate phi_n(x) = E[a_n | X_n = x] is the conditional mean of the lean adjoint a
under the current control, and all three estimators average

    sum_n (dw_n/dtheta)^T (w_n + G_n^T phi_{n+1}):

adjoint matching with a itself, the non-adapted adjoint with the regression of a on the
state, the time-reversed BSDE with the regression of labels along reversed paths, which
have no noise at the exact costate.  So the variance that is left comes from the sample
of states.  The price is a bias: the reversed Euler steps put an error of order O(h)
into the labels, and the regression of one step feeds on the ones after it.

On damped_oscillator the costate of the chain is affine and known at every control, and
so is the limit of the time-reversed BSDE for many paths; on cubic_costate it is cubic
and known without control.  One replicate of n paths is off by V/n + |bias|^2 in mean
square: with a bias, less variance need not be less error.

All that needs features that hold the costate.  On stochastic_pendulum cubic polynomials
do not: every step of the recursion differentiates the misfit of the one before, which
the regression of the lean adjoint never does.

Source: Mei and Taghvaei 2026, arXiv:2603.20455; the exact costates are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, nan
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import pandas as pd

from sdebench import registry
from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.estimators.time_reversed_bsde import TimeReversedBSDE
from sdebench.experiments.comparisons import replicate_values, variance_ratio
from sdebench.experiments.costates import (
    chain_costates,
    lean_labels,
    make_view,
    positive_mean,
    ratio_of_means,
    replicated,
    root,
    squared_error,
    squared_size,
)
from sdebench.experiments.experiment import (
    LEVEL,
    Progress,
    columns,
    interval_of,
    records,
)
from sdebench.experiments.measuring import N_PATHS, Array
from sdebench.measure.intervals import Interval, bias_norm
from sdebench.problem import Problem
from sdebench.report.format import interval, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOISE_LEVELS = (0.5, 1.0, 2.0, 5.0)
STEPS = (20, 40, 80)
N_REPLICATES = 512
LABEL_REPLICATES = 32


class Setting(NamedTuple):
    """A problem, a point, and the degree of the features.

    known : the features hold the costate, which is known there.
    """

    problem: str
    said: str
    point: str
    degree: int
    known: bool = True


SETTINGS = (
    *(
        Setting(
            f"damped_oscillator:noise_level={level}", f"σ = {level:g}", "halfway", 1
        )
        for level in NOISE_LEVELS
    ),
    Setting("cubic_costate", "cubic", "zero", 3),
    Setting("stochastic_pendulum", "pendulum", "halfway", 3, known=False),
)
QUANTITIES = {
    "by adjoint matching": "variance by adjoint matching's",
    "by regression": "variance by the non-adapted adjoint's",
    "labels": "label error by the lean adjoint's",
    "mse": "mean squared error by adjoint matching's",
    "bias": "bias",
    "matching variance": "relative variance of adjoint matching",
    "time-reversed label": "label error, time-reversed",
    "lean label": "label error, lean adjoint",
}
"""What is measured; the first three decide where the features hold the costate."""
DECIDE = tuple(QUANTITIES)[:3]
N_INTERVALS = len(QUANTITIES) * len(SETTINGS) * len(STEPS)
LEVEL_EACH = 1.0 - (1.0 - LEVEL) / N_INTERVALS


def estimators(degree: int) -> dict[str, str]:
    """Return the estimators as typed."""
    return {
        "matching": "adjoint_matching",
        "regression": f"non_adapted_adjoint:degree={degree}",
        "reversed": f"time_reversed_bsde:degree={degree}",
    }


def gradients(
    problem: Problem, setting: Setting, n_steps: int, seed: int
) -> dict[str, Interval]:
    """Return what is measured of the gradients; bias and errors against the chain's."""
    values = {
        name: replicate_values(
            problem, [spec], setting.point, n_steps, N_REPLICATES, seed
        )[0]
        for name, spec in estimators(setting.degree).items()
    }
    answer = problem.truth.matching_gradient(setting.point, n_steps)
    scale = float(np.linalg.norm(answer))

    def errors(name: str) -> Array:
        return np.asarray(np.sum((values[name] - answer) ** 2, axis=1))

    own, spread = values["reversed"], values["matching"]
    centred = np.sum((spread - spread.mean(axis=0)) ** 2, axis=1)
    gap = own.mean(axis=0) - answer
    return {
        "by adjoint matching": variance_ratio(own, spread, LEVEL_EACH),
        "by regression": variance_ratio(own, values["regression"], LEVEL_EACH),
        "mse": ratio_of_means(errors("reversed"), errors("matching"), LEVEL_EACH),
        "bias": bias_norm(gap, np.cov(own.T), len(own), LEVEL_EACH, scale),
        "matching variance": positive_mean(centred, LEVEL_EACH).scaled(
            N_PATHS / scale**2
        ),
    }


def labels(
    problem: Problem, setting: Setting, n_steps: int, seed: int
) -> dict[str, Interval]:
    """Return root mean square label errors relative to the costate's."""
    policy = problem.truth.policy_chain(setting.point, n_steps)
    costates = chain_costates(policy)
    estimator = TimeReversedBSDE(degree=setting.degree)

    def draw(replicate: int) -> Mapping[str, float]:
        view = make_view(problem, setting.point, n_steps, N_PATHS, seed, replicate)
        forward = lean_labels(view)
        _, states, found = estimator.costates(view, first=0)
        own = {n: (states[n], found[n]) for n in states}
        return {
            "reversed": squared_error(own, costates),
            "lean": squared_error(forward, costates),
            "size": squared_size(forward, costates),
        }

    drawn = replicated(draw, LABEL_REPLICATES)
    size = float(drawn.pop("size").mean())
    own, lean = drawn["reversed"] / size, drawn["lean"] / size
    return {
        "labels": root(ratio_of_means(own, lean, LEVEL_EACH)),
        "time-reversed label": root(positive_mean(own, LEVEL_EACH)),
        "lean label": root(positive_mean(lean, LEVEL_EACH)),
    }


def exact_biases(problem: Problem, setting: Setting, n_steps: int) -> dict[str, float]:
    """Return exact distances relative to the chain's matching gradient; nan if unknown.

    limit : of the time-reversed BSDE with many paths, from the chain's gradient.
    limit_continuous, chain_continuous : of both from that of continuous time.
    """
    truth = problem.truth
    chain = truth.matching_gradient(setting.point, n_steps)
    continuous = truth.matching_gradient(setting.point)
    limit = None
    if setting.known:
        estimator = registry.estimator(estimators(setting.degree)["reversed"])
        limit = estimator.target(truth.policy_chain(setting.point, n_steps))

    def distance(one: Array | None, other: Array) -> float:
        if one is None:
            return nan
        return float(np.linalg.norm(one - other) / np.linalg.norm(chain))

    return {
        "limit": distance(limit, chain),
        "limit_continuous": distance(limit, continuous),
        "chain_continuous": distance(chain, continuous),
    }


@dataclass(frozen=True)
class TimeReversedCostate(Claim):
    """Time-reversed BSDEs against adjoint matching."""

    statement: ClassVar[str] = (
        "Where the features hold the costate, gradients by time-reversed BSDEs have a "
        "lower variance than those of adjoint matching and of the non-adapted adjoint "
        "with the same regression, and their labels for the costate are closer to it "
        "than the lean adjoint, at all noise levels and numbers of steps. Where the "
        "features do not, on a pendulum, their mean squared error is higher."
    )
    source: ClassVar[str] = (
        "Mei and Taghvaei 2026, arXiv:2603.20455; the exact costates are ours"
    )
    procedure: ClassVar[str] = (
        "damped_oscillator at noise levels σ = 0.5, 1, 2, 5 at the point halfway "
        "(affine costate and features) and cubic_costate without control (cubic ones); "
        "stochastic_pendulum halfway with cubic features, which miss its costate; "
        f"N = {', '.join(map(str, STEPS))}. Gradients: {N_REPLICATES} replicates of "
        "256 paths on common noise, against the exact matching gradient of the chain. "
        f"Labels: {LABEL_REPLICATES} replicates of 256 paths, root mean square over "
        "all steps of label less exact costate of the chain, with regressed costates."
    )
    decision_rule: ClassVar[str] = (
        "Supported if the ratios of variances and of label errors are below 1 in every "
        "setting whose features hold the costate, and that of mean squared errors is "
        "above 1 on the pendulum; refuted if one of these is excluded; undecided "
        f"otherwise. What else is reported does not decide. All intervals {JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows: list[dict[str, object]] = []
        for setting in SETTINGS:
            problem = registry.problem(setting.problem)
            for n_steps in STEPS:
                found = gradients(problem, setting, n_steps, seed)
                if setting.known:
                    found |= labels(problem, setting, n_steps, seed)
                known = exact_biases(problem, setting, n_steps)
                for quantity, ours in found.items():
                    rows.append(
                        {
                            "setting": setting.said,
                            "held": setting.known,
                            "n_steps": n_steps,
                            "quantity": quantity,
                            **columns(ours),
                            **known,
                        }
                    )
                progress(len(rows), N_INTERVALS)
        return pd.DataFrame(rows)

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        found = []
        for row in records(evidence):
            held, quantity = bool(row.held), row.quantity
            if quantity in (DECIDE if held else ("mse",)):
                where = f"{row.setting}, N = {row.n_steps}"
                found.append(
                    Check(
                        quantity=f"{where}: {QUANTITIES[quantity]}",
                        interval=interval_of(row),
                        least=-inf if held else 1.0,
                        most=1.0 if held else inf,
                    )
                )
        return found

    def summary(self, evidence: pd.DataFrame) -> str:
        held = evidence[evidence["held"].astype(bool)]
        other = evidence[~evidence["held"].astype(bool)]
        low, high = _ends(held, "by adjoint matching")
        closest, furthest = _ends(held, "labels")
        errors = held[held["quantity"] == "mse"]
        worse, better = (errors["low"] > 1.0).sum(), (errors["high"] < 1.0).sum()
        most = errors.iloc[int(errors["value"].argmax())]
        variance, error = _ends(other, "by adjoint matching"), _ends(other, "mse")
        bias = _ends(other, "bias")
        return (
            f"Where the features hold the costate the variance is {low} to {high} of "
            f"adjoint matching's, and the label error {closest} to {furthest} of the "
            "lean adjoint's. The bias counts, too: for replicates of 256 paths the "
            f"mean squared error is lower in {better} of {len(errors)} settings and "
            f"higher in {worse}, at most {plain(float(most['value']), 2)} times "
            f"adjoint matching's ({most['setting']}, N = {most['n_steps']}). On the "
            f"pendulum the variance is {variance[0]} to {variance[1]} times adjoint "
            f"matching's, the mean squared error {error[0]} to {error[1]} times, and "
            f"the bias {bias[0]} to {bias[1]} of the gradient."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        rows = []
        for (setting, n_steps), mine in evidence.groupby(
            ["setting", "n_steps"], sort=False
        ):
            found = mine.set_index("quantity")
            known = mine.iloc[0]
            texts = {
                QUANTITIES[quantity]: interval(*interval_of(found.loc[quantity]))
                if quantity in found.index
                else "–"
                for quantity in (*DECIDE, "mse", "bias")
            }
            rows.append(
                {
                    "problem": setting,
                    "N": str(n_steps),
                    **texts,
                    "bias for many paths, exact": plain(known["limit"]),
                    "from continuous time, exact": plain(known["limit_continuous"]),
                    "adjoint matching from continuous time, exact": plain(
                        known["chain_continuous"]
                    ),
                }
            )
        return pd.DataFrame(rows)

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.experiments.drawing import add_legend, plain_ticks
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        with style():
            figure = new_figure(PAGE, 2.9)
            panels = figure.subplots(1, 3)
            _draw(panels[0], evidence, "lean label", hollow=True)
            _draw(panels[0], evidence, "time-reversed label", hollow=False)
            _draw(panels[1], evidence, "by adjoint matching", hollow=False)
            _draw(panels[2], evidence, "mse", hollow=False)
            titles = {
                "label error over costate, rms": "log",
                "variance over adjoint matching's": "linear",
                "MSE over its MSE, 256 paths": "log",
            }
            for axes, (title, scale) in zip(panels, titles.items(), strict=True):
                axes.set_yscale(scale)
                axes.set_title(title, loc="left", pad=3)
                axes.set_xlabel("noise level σ")
                plain_ticks(axes)
                finish_axes(axes)
            panels[1].set_ylim(bottom=0.0)
            for axes in panels[1:]:
                axes.axhline(1.0, color="0.35", lw=0.8, ls=(0, (4, 1.5)))
            add_legend(figure, panels[0], 3)
            settle(figure)
        return figure


def _ends(evidence: pd.DataFrame, quantity: str) -> tuple[str, str]:
    """Return the smallest and the largest estimate as texts."""
    found = evidence.loc[evidence["quantity"] == quantity, "value"]
    return plain(float(found.min()), 2), plain(float(found.max()), 2)


def _draw(axes: Axes, evidence: pd.DataFrame, quantity: str, *, hollow: bool) -> None:
    """Draw a quantity by setting, one color per number of steps."""
    import seaborn as sns

    settings = list(dict.fromkeys(evidence["setting"]))
    palette = sns.color_palette("viridis", len(STEPS))
    kind = "lean adjoint" if hollow else "time-reversed"
    mine = evidence[evidence["quantity"] == quantity]
    for i, (n_steps, rows) in enumerate(mine.groupby("n_steps")):
        x = np.arange(len(settings)) + 0.14 * (i - 1)
        ends = rows.set_index("setting").reindex(settings)
        axes.vlines(x, ends["low"], ends["high"], color=palette[i], lw=1.0)
        axes.plot(
            x,
            ends["value"],
            ls="",
            marker="o",
            ms=4,
            color=palette[i],
            mfc="white" if hollow else palette[i],
            label=f"{kind}, N = {n_steps}",
        )
    names = [setting.removeprefix("σ = ") for setting in settings]
    names[-1] = f"\n{names[-1]}"  # beside its neighbor's it would not fit
    axes.set_xticks(range(len(settings)), names)
