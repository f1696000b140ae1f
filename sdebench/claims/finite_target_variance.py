r"""Which regression targets of the score have finite gradient noise, and which not.

x_1 ~ p*, the tilted law, x_t = alpha_t x_1 + beta_t xi, and a label tau with
E[tau | x_t] = grad log p*_t(x_t).  Under the weight eta = sigma^2/2 of
KL(P* || P_theta) the noise of the regression,

    int eta_t E Tr Cov(tau | x_t) dt,

is the second moment of the gradient's noise where the score model moves at unit rate
in theta and times are drawn in proportion to eta.  In rho = alpha/beta, noise to data
from 0 to infinity, it does not depend on the schedule:

    conditional score matching   d log(rho_max) + O(1)
    target score matching        J / (2 rho_min^2) (1 + o(1)),  J = E|grad log p*|^2
    novel score matching         J/2 - d/2 + H - (d/2) log(2 pi e), H the entropy of p*
    adjoint matching             E|grad r|^2/(2m) - KL(p* || p_1), base N(., I/m).

The divergence is that of the weighted integral: with another density q of times the
second moment is int eta^2 E Tr Cov / q dt, and on the linear flow uniform times take
it from CSM, as eta vanishes at the data.

The closed forms are in `closed_form.regression_targets`; the experiment draws x_1, t
and x_t and knows none of them.  On a mixture base the lean adjoint depends on the whole
path; there its noise on an N-step chain is exact, `closed_form.lean_adjoint_noise`,
and simulated along the paths of the optimal control.

Sources: Domingo-Enrich, Du and Albergo 2026, arXiv:2605.00229; the constants are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import log, log10
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from sdebench import registry
from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.closed_form.lean_adjoint_noise import lean_adjoint_noise
from sdebench.experiments.costates import (
    lean_labels,
    make_view,
    positive_mean,
    ratio_of_means,
    replicated,
)
from sdebench.experiments.experiment import (
    LEVEL,
    Progress,
    columns,
    exact,
    interval_of,
    records,
)
from sdebench.experiments.measuring import Array
from sdebench.experiments.target_noise import (
    LABELS,
    laws,
    mean_noise,
    schedules,
    weighted_noise,
)
from sdebench.measure.intervals import Interval
from sdebench.report.format import interval, plain
from sdebench.simulate.tables import MixtureTables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EDGES = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Values of rho between which the noise is measured."""
FINITE = ("novel", "adjoint", "affine")
N_REPLICATES = 320
MARGIN = 5.0
"""Percent by which a constant or a rate may differ."""
OUTER = 5.0
"""Percent of a finite integral that its outermost decades may hold."""
CHAIN = "two_modes"
"""The problem on a mixture base."""
LADDER = (25, 50, 100, 200, 400)
SIMULATED = 100
"""Steps of the chains whose noise is exact, and of the one that is simulated."""
SHRINKS = 0.7
"""Largest ratio of the last two increments, as N is doubled, that counts as finite.

It tends to 1/2 where the error is O(1/N).
"""
CHAIN_MARGIN = 50.0
"""Percent by which the simulated noise, of heavy tails, may be off."""
N_PATHS, N_CHAINS = 1 << 11, 64
N_INTERVALS = 2 * 3 * (len(LABELS) + 4) + 1


def path_noise(replicate: int, seed: int) -> dict[str, float]:
    """Return the noise of the lean adjoint along paths of the optimal control.

    Sum over steps of 1/2 |w*_n + G_n^T a_{n+1}|^2, which tends to
    int eta |tau - grad log p*_t|^2 dt.
    """
    problem = registry.problem(CHAIN)
    view = make_view(problem, "optimum", SIMULATED, N_PATHS, seed, replicate)
    labels, controls = lean_labels(view), view.rollout().controls
    total = 0.0
    for n, control in enumerate(controls):
        error = control + view.noise_transpose(n, labels[n + 1][1])
        total += 0.5 * float(error.square().sum(1).mean())
    return {"noise": total}


def chain_noise(n_steps: int) -> float:
    """Return the same exactly."""
    problem = registry.problem(CHAIN)
    tables = problem.tables(problem.theta("optimum"), problem.time_grid(n_steps))
    assert isinstance(tables, MixtureTables)
    return lean_adjoint_noise(tables).value


@dataclass(frozen=True)
class FiniteTargetVariance(Claim):
    """AM and NSM have finite gradient noise, CSM and TSM do not."""

    statement: ClassVar[str] = (
        "Regression on the tilted score with the weight of KL(P* ‖ P_θ), integrated "
        "over time, has finite gradient noise with the targets of adjoint matching "
        "(AM) and novel score matching (NSM). With conditional score matching (CSM) it "
        "grows like d log ρ_max towards the data, with target score matching (TSM) "
        "like J/(2ρ_min²) towards the noise, ρ = α/β and J = E|∇log p*|², whatever the "
        "schedule."
    )
    source: ClassVar[str] = (
        "Domingo-Enrich, Du and Albergo 2026, arXiv:2605.00229; the constants are our "
        "closed forms"
    )
    procedure: ClassVar[str] = (
        "x₁ is drawn from the tilted law, t uniformly in strata of the schedule's own "
        "time and x_t from the noising; |τ − ∇log p*_t(x_t)|² is weighted with η = "
        f"σ²/2 and summed over decades of ρ from {EDGES[0]:g} to {EDGES[-1]:g} "
        f"({N_REPLICATES} replicates). Schedules VP, linear flow and Föllmer with a "
        "Gaussian base, tilted to a Gaussian and to a law with two modes. With a "
        f"mixture as base ({CHAIN}) the noise of the lean adjoint under the optimal "
        f"control is exact on chains of {LADDER[0]} to {LADDER[-1]} steps, and "
        f"simulated with {SIMULATED} ({N_PATHS * N_CHAINS:,} paths)."
    )
    decision_rule: ClassVar[str] = (
        "Supported if on every schedule and law CSM grows by d for each unit of "
        "log ρ in the last decade, TSM with the power −2 of ρ in the first two decades "
        "(±0.05) and with the factor J/2 in the first, the sums of AM, NSM and the "
        "best affine combination are their exact constants, all within "
        f"{MARGIN:.0f} %, and at most {OUTER:.0f} % of each lies in the two outermost "
        "decades; and if on the mixture base the last doubling of N adds to the noise "
        f"of AM at most {SHRINKS:g} times what the one before did, its simulation "
        f"within {CHAIN_MARGIN:.0f} %; refuted if one of these is excluded; "
        f"undecided otherwise. All intervals {JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        work = [(law, name) for law in laws() for name in schedules()]
        n_done = len(work) + 1
        for done, (law, name) in enumerate(work, start=1):
            rows += _noise(law, name, np.random.default_rng([seed, done]))
            progress(done, n_done)
        rows += _chain(seed)
        progress(n_done, n_done)
        return pd.DataFrame(rows)

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        rules: dict[str, dict[str, Any]] = {
            "growth": {"least": 100 - MARGIN, "most": 100 + MARGIN, "unit": "% of d"},
            "power": {"least": -2.05, "most": -1.95},
            "factor": {"least": 100 - MARGIN, "most": 100 + MARGIN, "unit": "% of J/2"},
            "constant": {"least": 100 - MARGIN, "most": 100 + MARGIN, "unit": "%"},
            "outer": {"most": OUTER, "unit": "%"},
            "increment": {"most": SHRINKS},
            "simulated": {
                "least": 100 - CHAIN_MARGIN,
                "most": 100 + CHAIN_MARGIN,
                "unit": "%",
            },
        }
        said = {
            "growth": "growth per unit of log ρ, last decade",
            "power": "power of ρ, first decades",
            "factor": "factor of 1/ρ², first decade",
            "constant": "sum, of the exact constant",
            "outer": "share of the outermost decades",
            "increment": "what N/2 to N adds, by what N/4 to N/2 does",
            "simulated": "simulated noise, of the exact one",
        }
        return [
            Check(
                quantity=f"{row.law}, {row.schedule}, {LABELS[row.target]}"
                f"{_steps(row)}: {said[row.kind]}",
                interval=interval_of(row),
                **rules[row.kind],
            )
            for row in records(evidence)
            if row.kind in rules
        ]

    def summary(self, evidence: pd.DataFrame) -> str:
        power = evidence[evidence["kind"] == "power"]["value"]
        growth = evidence[evidence["kind"] == "growth"]["value"]
        chain = evidence[evidence["kind"] == "chain"]["value"]
        sums = evidence[(evidence["kind"] == "sum") & evidence["limit"].notna()]
        parts = [
            f"{LABELS[target]} {plain(sums[sums['target'] == target]['limit'].min())} "
            f"to {plain(sums[sums['target'] == target]['limit'].max())}"
            for target in FINITE[:2]
        ]
        return (
            f"CSM grows by {plain(growth.min(), 3)} to {plain(growth.max(), 3)} % of d "
            f"per unit of log ρ, TSM with the power {power.min():.2f} to "
            f"{power.max():.2f} of ρ; the finite constants are {' and '.join(parts)}, "
            "the gaps in logarithmic Sobolev inequalities. On the mixture base AM has "
            f"{plain(chain.iloc[-1])} with {LADDER[-1]} steps, with ever smaller steps "
            "up as N is doubled."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        sums = evidence[evidence["kind"] == "sum"]
        rows = []
        for (law, target), mine in sums.groupby(["law", "target"], sort=False):
            first = records(mine)[0]
            row = {
                "tilted law": str(law),
                "target": LABELS[str(target)],
                "all ρ": "∞" if np.isnan(first.limit) else _text(first.limit),
                f"{EDGES[0]:g} < ρ < {EDGES[-1]:g}": _text(first.exact),
            }
            for measured in records(mine):
                row[measured.schedule] = interval(*interval_of(measured))
            rows.append(row)
        return pd.DataFrame(rows)

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.experiments.drawing import add_legend, target_colors
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        colors = target_colors()
        with style():
            figure = new_figure(PAGE, 3.2)
            panels = figure.subplots(1, len(laws()), sharey=True)
            for axes, law in zip(panels, laws(), strict=True):
                _draw(axes, law, evidence, colors)
                axes.set_title(f"tilted law: {law}", loc="left", pad=3)
                axes.set_xlabel("R")
            panels[0].set_ylabel("noise of the times with 1/R < ρ < R")
            add_legend(figure, panels[1], len(LABELS) + len(schedules()))
            for axes in panels:
                finish_axes(axes)
            settle(figure)
        return figure


def _steps(row: Any) -> str:
    return "" if np.isnan(row.n_steps) else f", N = {row.n_steps:.0f}"


def _level() -> float:
    return 1.0 - (1.0 - LEVEL) / N_INTERVALS


def _text(value: float) -> str:
    return plain(value) if value > 1e-12 else "0"


def _percent(found: Interval, of: float) -> dict[str, float]:
    return columns(found.scaled(100.0 / of))


def _noise(law: str, schedule: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return sums and rates of one law and schedule."""
    targets, base = laws()[law], schedules()[schedule]
    names = list(LABELS)
    found = weighted_noise(targets, base, names, EDGES, N_REPLICATES, rng)
    rows: list[dict[str, Any]] = []
    for target, shells in zip(names, found, strict=True):
        keys: dict[str, Any] = {"law": law, "schedule": schedule, "target": target}
        whole = targets.integral(target).value
        for first, last in ((1, 3), (0, 4)):
            measured = mean_noise(shells[first:last].sum(axis=0), _level())
            answer = targets.integral(target, EDGES[first], EDGES[last]).value
            about = {"exact": answer, "limit": whole if np.isfinite(whole) else np.nan}
            kind = {"kind": "sum" if first == 0 else "inner sum", "R": EDGES[last]}
            rows.append(keys | kind | about | columns(measured))
        rows += [keys | row for row in _rates(target, shells, whole, targets.dim)]
        if target == "target":
            rows[-1] |= _factor(shells[0], targets.fisher_information.value)
    return rows


def _rates(target: str, shells: Array, whole: float, dim: int) -> list[dict[str, Any]]:
    """Return what is judged of one target, but for the factor of TSM."""
    if target == "conditional":
        growth = positive_mean(shells[-1], _level()).scaled(
            1.0 / log(EDGES[-1] / EDGES[-2])
        )
        return [{"kind": "growth"} | _percent(growth, dim)]
    if target == "target":
        ratio = ratio_of_means(shells[1], shells[0], _level())
        return [
            {"kind": "power"} | columns(Interval(*(log10(v) for v in ratio))),
            {"kind": "factor"},
        ]
    if whole < 1e-12:
        return []
    total = shells.sum(axis=0)
    outer = ratio_of_means(shells[0] + shells[-1], total, _level())
    return [
        {"kind": "constant"} | _percent(positive_mean(total, _level()), whole),
        {"kind": "outer"} | _percent(outer, 1.0),
    ]


def _factor(shell: Array, information: float) -> dict[str, float]:
    span = EDGES[0] ** -2.0 - EDGES[1] ** -2.0
    return _percent(positive_mean(shell, _level()), 0.5 * information * span)


def _chain(seed: int) -> list[dict[str, Any]]:
    """Return the noise of AM on a mixture base, exact over N and simulated."""
    keys: dict[str, Any] = {"law": CHAIN, "schedule": "VP", "target": "adjoint"}
    values = [chain_noise(n_steps) for n_steps in LADDER]
    rows = [
        keys | {"kind": "chain", "n_steps": n_steps} | columns(exact(value))
        for n_steps, value in zip(LADDER, values, strict=True)
    ]
    growth = np.diff(values)
    last = {"kind": "increment", "n_steps": LADDER[-1]}
    rows.append(keys | last | columns(exact(float(growth[-1] / growth[-2]))))
    draw = partial(path_noise, seed=seed)
    found = positive_mean(replicated(draw, N_CHAINS)["noise"], _level())
    truth = values[LADDER.index(SIMULATED)]
    rows.append(keys | {"kind": "simulated"} | _percent(found, truth))
    return rows


def _draw(axes: Axes, law: str, evidence: pd.DataFrame, colors: dict[str, Any]) -> None:
    """Draw the exact noise of the times with 1/R < rho < R, and what was measured."""
    targets = laws()[law]
    reach = np.geomspace(1.2, 300.0, 60)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for target, text in LABELS.items():
        curve = [targets.integral(target, 1.0 / R, R).value for R in reach]
        if max(curve) > 1e-12:
            axes.plot(reach, curve, color=colors[target], lw=1.2, label=text)
    if min(targets.integral(t).value for t in FINITE) < 1e-12:
        axes.text(0.5, 0.03, "best affine: 0", transform=axes.transAxes)
    looks = zip("osD", (6.5, 4.5, 2.0), strict=True)
    for schedule, (marker, size) in zip(schedules(), looks, strict=True):
        shown: dict[str, Any] = {"marker": marker, "ms": size, "mfc": "none", "ls": ""}
        mine = evidence[(evidence["law"] == law) & (evidence["schedule"] == schedule)]
        mine = mine[mine["R"].notna() & (mine["value"] > 0.0)]
        for row in records(mine):
            ends = [[row.value - row.low], [row.high - row.value]]
            color = colors[row.target]
            axes.errorbar(row.R, row.value, yerr=ends, color=color, **shown)
        axes.plot([], [], color="0.35", label=schedule, **shown)
