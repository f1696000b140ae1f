r"""Noise of regression targets over schedules: exact, measured, and how it diverges.

x_1 ~ p*, the tilted law, and x_t = alpha_t x_1 + beta_t xi.  A target tau with
E[tau | x_t] = grad log p*_t is a label of the score; the noise of the regression with
the weight of KL(P* || P_theta) is

    int eta_t E Tr Cov(tau | x_t) dt,    eta = sigma^2 / 2.

It is the second moment of the gradient's noise where the score model moves at unit
rate, |d score/d theta| = 1 at all times, and times are drawn in proportion to eta.
(Times with another density q have int eta^2 E Tr Cov / q dt: uniform ones take the
divergence of CSM from the linear flow, where eta vanishes at the data.)

In rho = alpha/beta it does not depend on the schedule: see the closed forms in
`closed_form.regression_targets`.  Conditional score matching (CSM) has d log(rho_max),
target score matching (TSM) J / (2 rho_min^2), J = E|grad log p*|^2, and novel score
matching (NSM), the lean adjoint (AM) and the best affine combination have finite
numbers, the gaps in logarithmic Sobolev inequalities and in Stam's.  Where times are
cut off in t, what is left depends on how a schedule's rho goes to zero and infinity.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from sdebench.closed_form.regression_targets import RegressionTargets
from sdebench.experiments.experiment import Progress, columns, interval_of, records
from sdebench.experiments.target_noise import (
    BASE_VARIANCE,
    LABELS,
    Noising,
    laws,
    mean_noise,
    noise_at,
    schedules,
    weighted_noise,
)
from sdebench.measure.intervals import Interval
from sdebench.report.format import interval, plain
from sdebench.studies._study import Study, level_of_each

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CUTS = (0.001, 0.01)
"""Share of the time span that is cut off at both ends, less and more."""
N_REPLICATES = 256
DOTS = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
"""Shares of the time span at which conditional variances are measured."""
N_DOT = 1 << 17
ROUNDING = 1e-12
SHOWN = "two modes"
"""The law of the figure."""
N_INTERVALS = 2 * 3 * (len(LABELS) + 2) + 3 * len(LABELS) * len(DOTS)


def theory(targets: RegressionTargets, target: str) -> str:
    """Return the whole integral as text, or how it diverges."""
    if target == "conditional":
        return "infinite, d log ρ_max"
    if target == "target":
        return f"infinite, J/(2ρ_min²), J = {plain(targets.fisher_information.value)}"
    return _text(targets.integral(target).value)


def rate(targets: RegressionTargets, target: str) -> tuple[str, float] | None:
    """Return the end at which an integral diverges and the factor of its law."""
    if target == "conditional":
        return "data", float(targets.dim)
    if target == "target":
        return "noise", targets.fisher_information.value
    return None


def scale_of(target: str, low: float, high: float) -> float:
    """Return the growth of the diverging law between two rho, factor one."""
    if target == "conditional":
        return log(high / low)
    return 0.5 * (low**-2.0 - high**-2.0)


@dataclass(frozen=True)
class RegressionTargetNoise(Study):
    """Noise of score labels, exact and measured, over targets and schedules."""

    subject: ClassVar[str] = (
        "Which regression targets for the tilted score have finite noise under the "
        "weight of KL(P* ‖ P_θ): conditional, target and novel score matching, the "
        "lean adjoint and the best affine combination, exact and measured, on three "
        "schedules; with the rates of those that diverge."
    )
    source: ClassVar[str] = (
        "Domingo-Enrich, Du and Albergo 2026, arXiv:2605.00229, finite against "
        "infinite variances; the closed forms are ours"
    )
    procedure: ClassVar[str] = (
        f"Base N(0, {BASE_VARIANCE}) with two tilted laws: Gaussian, r = x − x²/2, and "
        "0.3 N(−1.5, 0.2) + 0.7 N(1, 0.4) tilted by −0.4 (x − 0.5)². Exact: closed "
        "form, for the mixture with quadrature, error below 1e-9. Measured: x₁ from "
        "p*, t uniform in strata of the schedule's own time, "
        f"{N_REPLICATES} replicates. Times are cut off at {CUTS[1]:g} of the span at "
        f"both ends; the rate is that between the cuts {CUTS[0]:g} and {CUTS[1]:g} at "
        "the end where the integral diverges."
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        work = [(law, name) for law in laws() for name in schedules()]
        for done, (law, name) in enumerate(work, start=1):
            rng = np.random.default_rng([seed, done])
            rows += _integrals(law, name, rng)
            if law == SHOWN:
                rows += _dots(law, name, rng)
            progress(done, len(work))
        return pd.DataFrame(rows)

    def summary(self, evidence: pd.DataFrame) -> str:
        found = evidence[evidence["kind"] != "dot"]
        inside = (found["low"] <= found["exact"]) & (found["exact"] <= found["high"])
        rates = evidence[evidence["kind"] == "rate"]
        shares = (rates["value"] / rates["exact"]).groupby(rates["target"])
        csm, tsm = (
            f"{plain(low, 3)} to {plain(high, 3)}"
            for low, high in (
                (shares.min()[name], shares.max()[name])
                for name in ("conditional", "target")
            )
        )
        return (
            f"{int(inside.sum())} of {len(found)} measured integrals and rates hold "
            "the exact number. CSM grows with log ρ_max at "
            f"{csm} times the rate d, TSM with 1/(2ρ_min²) at {tsm} times J, on every "
            "schedule; NSM, AM and the best affine combination stay finite."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        rates = evidence[evidence["kind"] == "rate"].set_index(
            ["law", "schedule", "target"]
        )
        rows = []
        for row in records(evidence[evidence["kind"] == "integral"]):
            key = (row.law, row.schedule, row.target)
            text = "–"
            if key in rates.index:
                found = records(rates.loc[[key]])[0]
                text = (
                    f"{interval(*interval_of(found))}, exact {plain(found.exact)}, "
                    f"limit {plain(found.limit)}"
                )
            rows.append(
                {
                    "tilted law": row.law,
                    "schedule": row.schedule,
                    "target": LABELS[row.target],
                    "theory, all times": row.theory,
                    "exact, times cut": _text(row.exact),
                    "measured": interval(*interval_of(row)),
                    "rate": text,
                }
            )
        return pd.DataFrame(rows)

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.experiments.drawing import add_legend, target_colors
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        targets, colors = laws()[SHOWN], target_colors()
        dots = evidence[evidence["kind"] == "dot"]
        with style():
            figure = new_figure(PAGE, 3.0)
            panels = figure.subplots(1, 3, sharey=True)
            for axes, (name, base) in zip(panels, schedules().items(), strict=True):
                _draw(axes, targets, Noising(base), colors)
                for row in records(dots[dots["schedule"] == name]):
                    ends = [[row.value - row.low], [row.high - row.value]]
                    axes.errorbar(
                        row.t,
                        row.value,
                        yerr=ends,
                        fmt="o",
                        ms=2.5,
                        color=colors[row.target],
                    )
                axes.set_title(f"{name}, {SHOWN}", loc="left", pad=3)
                axes.set_xlabel("time t, noise to data")
            panels[0].set_ylabel("E Tr Cov(τ | $x_t$)")
            panels[0].plot([], [], "o", ms=2.5, color="0.35", label="measured")
            add_legend(figure, panels[0], len(LABELS) + 1)
            for axes in panels:
                finish_axes(axes)
            settle(figure)
        return figure


def _level() -> float:
    return level_of_each(N_INTERVALS)


def _text(value: float) -> str:
    return plain(value) if value > ROUNDING else "0"


def _integrals(
    law: str, schedule: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Return integrals and rates of one law and schedule."""
    targets, base = laws()[law], schedules()[schedule]
    span, noising = base.horizon - base.start_time, Noising(base)
    cuts = (*CUTS, *(1.0 - cut for cut in reversed(CUTS)))
    ends = [noising.at(base.start_time + cut * span) for cut in cuts]
    edges = [alpha / beta for alpha, beta in ends]
    edges.insert(2, 1.0)
    names = list(LABELS)
    found = weighted_noise(targets, base, names, edges, N_REPLICATES, rng)
    rows = []
    for target, shells in zip(names, found, strict=True):
        keys: dict[str, Any] = {"law": law, "schedule": schedule, "target": target}
        measured = mean_noise(shells[1:3].sum(axis=0), _level())
        whole = targets.integral(target, edges[1], edges[3]).value
        about: dict[str, Any] = {"kind": "integral", "theory": theory(targets, target)}
        about |= columns(measured) | {"exact": whole if whole > ROUNDING else 0.0}
        rows.append(keys | about)
        diverges = rate(targets, target)
        if diverges:
            place = 3 if diverges[0] == "data" else 0
            low, high = edges[place : place + 2]
            scale = 1.0 / scale_of(target, low, high)
            measured = mean_noise(shells[place], _level()).scaled(scale)
            exact = targets.integral(target, low, high).value * scale
            keys |= {"kind": "rate", "limit": diverges[1], "exact": exact}
            rows.append(keys | columns(measured))
    return rows


def _dots(law: str, schedule: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return measured conditional variances at a few times."""
    targets, base = laws()[law], schedules()[schedule]
    rows = []
    for share in DOTS:
        t = base.start_time + share * (base.horizon - base.start_time)
        alpha, beta = Noising(base).at(t)
        found = noise_at(targets, list(LABELS), alpha, beta, N_DOT, rng)
        for target, values in zip(LABELS, found, strict=True):
            exact = targets.conditional_variance(target, alpha, beta).value
            row: dict[str, Any] = {"law": law, "schedule": schedule, "target": target}
            row |= {"kind": "dot", "t": t, "exact": exact}
            rows.append(row | columns(_positive(values)))
    return rows


def _positive(values: np.ndarray) -> Interval:
    # means of blocks are close to normal where single samples are not
    return mean_noise(values.reshape(256, -1).mean(axis=1), _level())


def _draw(
    axes: Axes, targets: RegressionTargets, noising: Noising, colors: dict[str, Any]
) -> None:
    """Draw exact conditional variances over time."""
    base = noising.base
    shares = np.linspace(0.004, 0.996, 160)
    times = base.start_time + shares * (base.horizon - base.start_time)
    for target, text in LABELS.items():
        curve = [
            targets.conditional_variance(target, *noising.at(float(t))).value
            for t in times
        ]
        axes.plot(times, curve, color=colors[target], lw=1.2, label=text)
    axes.set_yscale("log")
    axes.set_ylim(1e-2, 1e5)
