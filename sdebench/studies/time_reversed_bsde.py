r"""Costates by regression: the linear tests of the time-reversed BSDE's authors.

**Linear test.**  dX = A X dt + eps dW without control, terminal cost |x|^2 / 2:

    phi(0, x) = e^{A^T T} e^{A T} x,   whatever eps is.

**LQ study.**  At the optimal control of a linear-quadratic problem the costate is
phi(t, x) = G_t x with the Riccati solution G.  The time-reversed BSDE has a bias of
order dt and hardly any variance, so that its squared error falls like dt^2 and does not
fall with the number of paths N once the bias is all there is.  The regression of the
lean adjoint has a variance of order 1/N and the bias of the chain's own costate.

Here both regressions are least squares on affine features and all steps are
Euler-Maruyama, also those of the adjoint; the authors train networks in the linear
test, and integrate its adjoint exactly.  How their squared error of G is averaged is
not known; ours is over the entries of G(0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd

from sdebench.estimators._costate_regression import Slice
from sdebench.estimators.time_reversed_bsde import TimeReversedBSDE
from sdebench.experiments.costates import (
    AffineCostate,
    lean_labels,
    make_view,
    positive_mean,
    replicated,
)
from sdebench.experiments.experiment import Progress, exact, interval_of, records
from sdebench.linear_problem import Array, LinearProblem
from sdebench.problems.damped_oscillator import DampedOscillator
from sdebench.problems.lq_oscillator import LQOscillator
from sdebench.report.format import interval, plain
from sdebench.studies._study import (
    PUBLISHED,
    Study,
    compared,
    comparison_table,
    count_agreeing,
    level_of_each,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sdebench.view import View

REVERSED, LEAN = "time-reversed BSDE", "lean-adjoint regression"
NOISE_LEVELS = ("0", "0.5", "1", "2", "5")
LINEAR = {
    LEAN: ("1.00e-3", "4.45e-3", "8.53e-3", "2.03e-2", "8.96e-2"),
    REVERSED: ("8.27e-4", "2.29e-3", "4.93e-3", "1.22e-2", "2.27e-2"),
}
NO_NOISE = 1e-6
"""Stands for a noise level of zero, at which no law could be tilted."""
LINEAR_STEPS, LINEAR_PATHS = 40, 2000
WIDTHS = {
    "0.02": (200, "2.2e-6"),
    "0.05": (80, "1.5e-5"),
    "0.1": (40, "6.9e-5"),
    "0.2": (20, "3.0e-4"),
    "0.4": (10, "1.45e-3"),
}
"""Steps and published squared errors of G, by time step."""
SIZES = {
    10: "1.1e-4",
    50: "1.2e-5",
    100: "6.8e-6",
    500: "2.5e-6",
    1000: "2.2e-6",
    2000: "2.4e-6",
    4000: "2.1e-6",
}
"""Published squared errors of G at dt = 0.02, by number of paths."""
LQ_PATHS, LQ_STEPS = 1000, 200
RICCATI = (("1.8147", "0.4112"), ("0.4112", "1.2524"))
N_RUNS = 15
N_INTERVALS = 2 * (len(NOISE_LEVELS) + len(WIDTHS) + len(SIZES))


def fitted_slopes(view: View) -> dict[str, Array]:
    """Return S (d, d) and s (d,) as columns (d, d + 1) of both costates at time 0."""
    import torch

    start, adjoint = lean_labels(view)[0]
    eye = torch.eye(view.dim, dtype=start.dtype)
    zero = start.new_zeros(1, view.dim)
    found = {
        LEAN: Slice.fit(start, adjoint, degree=1),
        REVERSED: TimeReversedBSDE().costates(view, first=0)[0][0],
    }
    return {
        name: torch.cat([phi.along(eye, eye).T, phi(zero).T], dim=1).numpy()
        for name, phi in found.items()
    }


def exact_slope(problem: LinearProblem) -> Array:
    """Return G (d, d) of the costate G x at time 0, at the point of the study."""
    if isinstance(problem, LQOscillator):
        return np.asarray(problem.model.riccati(0.0).quadratic)
    d = problem.dim
    zero = np.zeros((d, d)), np.zeros(d)
    return np.asarray(problem.model.frozen_costate(*zero, [0.0])[0][0])


def linear_errors(replicate: int, noise_level: float, seed: int) -> Mapping[str, float]:
    """Return the mean squared errors of Y_0 of a run of the linear test."""
    problem = DampedOscillator(noise_level=noise_level)
    view = make_view(problem, "zero", LINEAR_STEPS, LINEAR_PATHS, seed, replicate)
    phi = AffineCostate(exact_slope(problem), np.zeros(problem.dim))
    x = view.rollout().states[0]
    answer = phi(x)
    return {
        name: float((AffineCostate(f[:, :-1], f[:, -1])(x) - answer).square().mean())
        for name, f in fitted_slopes(view).items()
    }


def riccati_errors(
    replicate: int, n_steps: int, n_paths: int, seed: int
) -> Mapping[str, float]:
    """Return the mean squared errors of the entries of G(0) of a run."""
    problem = LQOscillator()
    view = make_view(problem, "optimum", n_steps, n_paths, seed, replicate)
    answer = exact_slope(problem)
    return {
        name: float(np.mean((found[:, :-1] - answer) ** 2))
        for name, found in fitted_slopes(view).items()
    }


def slope(rows: pd.DataFrame, column: str) -> float:
    """Return the power of a column that the values follow."""
    x, y = (np.log(rows[name].to_numpy(float)) for name in (column, "value"))
    return float(np.polyfit(x, y, 1)[0])


@dataclass(frozen=True)
class TimeReversedBSDEStudy(Study):
    """Squared errors of costates by the time-reversed BSDE and by regression."""

    subject: ClassVar[str] = (
        "Squared errors of the costate at the start by the time-reversed BSDE and by "
        "regression of the lean adjoint: the authors' linear test over noise levels, "
        "and their linear-quadratic study over time steps and numbers of paths."
    )
    source: ClassVar[str] = (
        "Mei and Taghvaei 2026, arXiv:2603.20455, linear test, and 2024, "
        "arXiv:2410.04615, linear–quadratic study; the published numbers are read off "
        "figures"
    )
    procedure: ClassVar[str] = (
        f"Linear test: damped_oscillator, {LINEAR_STEPS} steps, {LINEAR_PATHS:,} "
        "paths, no control. LQ study: lq_oscillator at the optimal control, "
        f"{LQ_PATHS:,} paths for every time step and {LQ_STEPS} steps for every number "
        f"of paths. {N_RUNS} runs each, affine least squares, Euler–Maruyama; the "
        "authors train networks in the linear test and integrate its adjoint exactly, "
        "so that errors need not be equal. Left out: their least-squares BSDEs and "
        "value-function variants, which are other estimators; the pendulum, which is a "
        "training run and not a gradient; the time step 0.3, which does not divide the "
        "horizon, and 0.004."
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows = _riccati_rows()
        level = level_of_each(N_INTERVALS)
        studies = [
            *(
                (
                    f"linear test, ε = {text}",
                    partial(
                        linear_errors, noise_level=float(text) or NO_NOISE, seed=seed
                    ),
                    {name: printed[i] for name, printed in LINEAR.items()},
                    {"kind": "linear", "noise_level": float(text)},
                )
                for i, text in enumerate(NOISE_LEVELS)
            ),
            *(
                (
                    f"G, dt = {width}",
                    partial(
                        riccati_errors, n_steps=n_steps, n_paths=LQ_PATHS, seed=seed
                    ),
                    {REVERSED: printed},
                    {"kind": "width", "dt": float(width)},
                )
                for width, (n_steps, printed) in WIDTHS.items()
            ),
            *(
                (
                    f"G, N = {n_paths:,}",
                    partial(
                        riccati_errors, n_steps=LQ_STEPS, n_paths=n_paths, seed=seed
                    ),
                    {REVERSED: printed},
                    {"kind": "size", "n_paths": n_paths},
                )
                for n_paths, printed in SIZES.items()
            ),
        ]
        for done, (said, draw, printed, keys) in enumerate(studies, start=1):
            for name, values in replicated(draw, N_RUNS).items():
                ours = positive_mean(values, level)
                text, origin = printed.get(name, ""), PUBLISHED
                row = compared(f"{said}: {name}", text, ours, origin)
                rows.append(row | keys | {"estimator": name})
            progress(done, len(studies))
        return pd.DataFrame(rows)

    def summary(self, evidence: pd.DataFrame) -> str:
        linear = evidence[evidence["kind"] == "linear"]
        ours = linear.pivot_table(
            index="noise_level", columns="estimator", values="value"
        )
        noisy = ours[ours.index > 0.0]
        ratio = noisy[REVERSED] / noisy[LEAN]
        widths = evidence[
            (evidence["kind"] == "width") & (evidence["estimator"] == REVERSED)
        ]
        sizes = evidence[(evidence["kind"] == "size") & (evidence["n_paths"] >= 100)]
        powers = {
            name: slope(mine, "n_paths") for name, mine in sizes.groupby("estimator")
        }
        known = evidence[evidence["kind"] == "riccati"]
        return (
            f"In the linear test the time-reversed BSDE has {_ends(ratio)} of the "
            f"squared error of the regression (published: {_ends(_published_ratio())})"
            ". In the LQ study its squared error follows dt to the power "
            f"{plain(slope(widths, 'dt'), 2)}, and N from 100 on to the power "
            f"{_power(powers[REVERSED])}, that of the lean-adjoint regression N to the "
            f"power {_power(powers[LEAN])}; published errors are "
            f"{_ends(_published_excess(evidence))} times ours. "
            f"{count_agreeing(known)} of {len(known)} published entries of G(0) are "
            "equal to the exact ones to the last digit."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        printed = evidence["printed"].fillna("") != ""
        rows = [
            {
                "quantity": row.quantity,
                "source": "–",
                "ours": interval(*interval_of(row)),
                "agreement": "–",
            }
            for row in records(evidence[~printed])
        ]
        return pd.concat(
            [comparison_table(evidence[printed]), pd.DataFrame(rows)],
            ignore_index=True,
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from matplotlib.ticker import NullLocator

        from sdebench.experiments.drawing import add_legend
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        with style():
            figure = new_figure(PAGE, 2.9)
            panels = figure.subplots(1, 3)
            for axes, (kind, column, label) in zip(
                panels,
                (
                    ("linear", "noise_level", "noise level ε; T = 2, N = 2,000"),
                    ("width", "dt", "time step dt; N = 1,000"),
                    ("size", "n_paths", "number of paths N; dt = 0.02"),
                ),
                strict=True,
            ):
                _draw(axes, evidence[evidence["kind"] == kind], column)
                axes.set_xlabel(label)
                finish_axes(axes)
            panels[0].set_xscale("symlog", linthresh=0.5)
            panels[0].set_xticks([float(v) for v in NOISE_LEVELS], NOISE_LEVELS)
            panels[1].set_xticks([float(v) for v in WIDTHS], WIDTHS)
            panels[1].xaxis.set_minor_locator(NullLocator())
            titles = ("mean squared error of Y₀", "of the entries of G(0)", "the same")
            for axes, title in zip(panels, titles, strict=True):
                axes.set_title(title, loc="left", pad=3)
            add_legend(figure, panels[0], 2)
            settle(figure)
        return figure


def _riccati_rows() -> list[dict[str, object]]:
    """Return the published entries of G(0) beside the exact ones."""
    found = exact_slope(LQOscillator())
    return [
        compared(
            f"G(0), entry {i + 1}{j + 1}, exact",
            RICCATI[i][j],
            exact(float(found[i, j])),
            PUBLISHED,
        )
        | {"kind": "riccati"}
        for i in range(2)
        for j in range(i, 2)
    ]


def _published_ratio() -> pd.Series:
    """Return the published squared errors of the linear test over the regression's."""
    own, other = (np.array(LINEAR[name][1:], float) for name in (REVERSED, LEAN))
    return pd.Series(own / other)


def _published_excess(evidence: pd.DataFrame) -> pd.Series:
    """Return the published squared errors of G over ours."""
    chosen = evidence["kind"].isin(["width", "size"])
    rows = evidence[chosen & (evidence["estimator"] == REVERSED)]
    return pd.Series(rows["printed"].astype(float) / rows["value"])


def _ends(values: pd.Series) -> str:
    """Return the smallest and the largest as text."""
    return f"{plain(float(values.min()), 2)} to {plain(float(values.max()), 2)}"


def _power(value: float) -> str:
    return plain(value, 2).replace("-", "−")


def _draw(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    """Draw squared errors, ours and published."""
    import seaborn as sns

    palette = sns.color_palette("colorblind")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name, color in ((REVERSED, palette[0]), (LEAN, palette[2])):
        mine = rows[rows["estimator"] == name]
        low = np.maximum(mine["low"], 0.2 * mine["value"])
        axes.vlines(mine[column], low, mine["high"], color=color, lw=1.0)
        axes.plot(mine[column], mine["value"], "o-", ms=3.5, lw=1.1, color=color)
        axes.plot([], [], "o-", ms=3.5, lw=1.1, color=color, label=name)
        printed = mine[mine["printed"].fillna("") != ""]
        axes.plot(
            printed[column],
            printed["printed"].astype(float),
            "x",
            ms=5,
            color=color,
            label=f"{name}, published",
        )
