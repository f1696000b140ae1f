r"""Mode weights of `forty_modes` by every route that gives a sample.

The weight of a mode under a law is the mean of its responsibility under the target
(`sdebench.experiments.mode_weights`); all forty are 1/40 under the target.  Beside each
other, by total variation:

- the exact law under the controls u_theta at the evaluation points;
- simulated paths of these controls, Euler-Maruyama with 16 and with 64 steps;
- importance sampling towards the target, from the paths of the base and of three
  controls, self-normalized.  The weights are those of the N-step chain, whose noise
  sums to h sum sigma_n^2, a little more than int sigma^2: its tilted law differs from
  the target by the order 1/N, whatever the proposal.

The interval of an importance-weighted number knows only what its paths have seen: with
an effective share of paths near zero it says nothing, and the table gives that share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from sdebench import registry
from sdebench.experiments.experiment import (
    Progress,
    columns,
    exact,
    interval_of,
    records,
)
from sdebench.experiments.measuring import Array, n_threads
from sdebench.experiments.mode_weights import (
    effective_share,
    mode_weights,
    total_variation,
    total_variation_interval,
)
from sdebench.problem import POINTS
from sdebench.problems.forty_modes import N_MODES, FortyModes
from sdebench.report.format import interval, plain
from sdebench.simulate.paths import simulate
from sdebench.studies._study import Study, level_of_each

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TARGET = np.full(N_MODES, 1.0 / N_MODES)
STEPS = (16, 64)
N_BLOCKS = {2: 16, 50: 2}
"""Blocks of paths by dimension."""
BLOCK = 1 << 13
PROPOSALS = {
    "base (u = 0)": None,
    "u at θ = 0": "zero",
    "u halfway": "halfway",
    "u at the optimum": "optimum",
}
EXACT, PATHS, IMPORTANCE = "exact law", "simulated paths", "importance sampling"
SEEN = 0.02
"""Effective share of the paths below which an interval says nothing."""


def problems() -> list[FortyModes]:
    """Return the problem and its variant in many dimensions."""
    found = [registry.problem("forty_modes", **v) for v in FortyModes.variants]
    return [p for p in found if isinstance(p, FortyModes)]


def n_intervals() -> int:
    """Return the number of measured intervals."""
    return len(N_BLOCKS) * len(STEPS) * (len(POINTS) + len(PROPOSALS))


def sample(
    problem: FortyModes, point: str | None, n_steps: int, seed: int
) -> tuple[Array, Array]:
    """Return responsibilities (n, K) and log-weights (n,) of simulated paths."""
    target = problem.truth.ideal_law()
    rows, logs = [], []
    for block in range(N_BLOCKS[problem.dim]):
        run = simulate(
            problem,
            point=point,
            n_steps=n_steps,
            n_paths=BLOCK,
            seed=seed,
            replicate=block,
            threads=n_threads(),
        )
        rows.append(target.responsibilities(run.terminal.T))
        logs.append(run.log_weight)
    return np.concatenate(rows), np.concatenate(logs)


@dataclass(frozen=True)
class ModeWeights(Study):
    """Total variation of the mode weights of forty modes, by route."""

    subject: ClassVar[str] = (
        "Mode weights of forty_modes, in the plane and in fifty dimensions: under "
        "exact laws of controls, by simulated paths and by importance sampling."
    )
    source: ClassVar[str] = "This catalogue; no numbers of others"
    procedure: ClassVar[str] = (
        "Total variation between a sampler's mode weights (means of the target's "
        "responsibilities) and 1/40 each; "
        f"{N_BLOCKS[2] * BLOCK:,} paths in the plane and {N_BLOCKS[50] * BLOCK:,} in "
        "50 dimensions, Euler–Maruyama. Importance sampling is self-normalized; "
        "effective is the effective sample size over the number of paths, and without "
        f"{100 * SEEN:.0f} % of it an interval says nothing: it knows only the modes "
        "that the paths have seen."
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        for done, problem in enumerate(problems(), start=1):
            rows += _rows(problem, seed)
            progress(done, len(N_BLOCKS))
        return pd.DataFrame(rows)

    def summary(self, evidence: pd.DataFrame) -> str:
        texts = []
        for dim, mine in evidence.groupby("dim"):
            most = mine[mine["n_steps"].isna() | mine["n_steps"].eq(STEPS[-1])]
            found = {(row.route, row.of): row for row in records(most)}
            weighted = found[IMPORTANCE, "u halfway"]
            texts.append(
                f"in {dim} dimensions u at θ = 0 is {_text(found[EXACT, 'zero'])} off, "
                f"{STEPS[-1]} steps of u* {_text(found[PATHS, 'optimum'])} and "
                f"importance sampling from u halfway {_text(weighted)} with an "
                f"effective {plain(100.0 * weighted.effective, 2)} % of its paths"
            )
        text = "; ".join(texts)
        return f"{text[0].upper()}{text[1:]}."

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame(
            [
                {
                    "d": f"{row.dim}",
                    "route": row.route,
                    "of": row.of,
                    "N": "–" if np.isnan(row.n_steps) else f"{row.n_steps:.0f}",
                    "total variation": _text(row),
                    "modes kept": f"{row.kept:.0f}",
                    "effective": "–"
                    if np.isnan(row.effective)
                    else f"{plain(100.0 * row.effective, 2)} %",
                }
                for row in records(evidence)
            ]
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        with style():
            figure = new_figure(PAGE, 2.8)
            panels = figure.subplots(1, 2, sharey=True, sharex=True)
            for axes, dim in zip(panels, N_BLOCKS, strict=True):
                _draw(axes, evidence[evidence["dim"] == dim])
                axes.set_title(f"{dim} dimensions", loc="left", pad=3)
                finish_axes(axes, grid="x")
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, ncols=4, loc="outside upper center")
            settle(figure)
        return figure


def _text(row: Any) -> str:
    """Return the total variation; without an interval where the paths saw too few."""
    if row.route == EXACT:
        return f"{plain(row.value)} %" if row.value > 1e-9 else "0 (exact)"
    if row.effective < SEEN:
        return f"{plain(row.value, 2)} % (no interval)"
    return interval(*interval_of(row), "%")


def _rows(problem: FortyModes, seed: int) -> Iterator[dict[str, Any]]:
    """Yield one row for every route."""
    level = level_of_each(n_intervals())
    for point in POINTS:
        weights = problem.family.ideal_law(problem.theta(point))[0]
        value = exact(total_variation(weights, TARGET))
        yield _row(problem, EXACT, point, weights) | columns(value.scaled(100.0))
    for n_steps in STEPS:
        for point in POINTS:
            rows, _ = sample(problem, point, n_steps, seed)
            found = mode_weights(rows)
            distance = total_variation_interval(*found, TARGET, level)
            yield (
                _row(problem, PATHS, point, found[0], n_steps)
                | columns(distance.scaled(100.0))
            )
        for name, proposal in PROPOSALS.items():
            rows, logs = sample(problem, proposal, n_steps, seed)
            found = mode_weights(rows, logs)
            distance = total_variation_interval(*found, TARGET, level)
            yield (
                _row(problem, IMPORTANCE, name, found[0], n_steps)
                | columns(distance.scaled(100.0))
                | {"effective": effective_share(logs)}
            )


def _row(
    problem: FortyModes, route: str, of: str, weights: Array, n_steps: float = np.nan
) -> dict[str, Any]:
    return {
        "dim": problem.dim,
        "route": route,
        "of": of,
        "n_steps": n_steps,
        "kept": int(np.sum(weights > 0.1 * TARGET)),
        "effective": np.nan,
    }


def _draw(axes: Axes, rows: pd.DataFrame) -> None:
    """Draw the total variation of every route, one line each."""
    import seaborn as sns

    palette = sns.color_palette("colorblind")
    laws = rows[rows["route"] == EXACT].set_index("of")["value"]
    places = [*POINTS, *PROPOSALS]
    axes.plot(
        [laws[p] for p in POINTS],
        [places.index(p) for p in POINTS],
        ls="",
        marker="|",
        ms=13,
        mew=1.6,
        color="0.2",
        label="exact law",
    )
    for shift, n_steps, color in zip((-0.15, 0.15), STEPS, palette, strict=False):
        mine = rows[rows["n_steps"] == n_steps]
        seen = ~(mine["effective"] < SEEN)
        y = np.array([places.index(of) for of in mine["of"]]) + shift
        value = mine["value"]
        shown = {"color": color, "ms": 4}
        axes.hlines(y[seen], mine["low"][seen], mine["high"][seen], color=color, lw=1.2)
        axes.plot(value[seen], y[seen], "o", label=f"N = {n_steps}", **shown)
        axes.plot(value[~seen], y[~seen], "o", mfc="none", **shown)
    axes.set_yticks(
        range(len(places)),
        [f"paths, {p}" for p in POINTS] + [f"weighted, {p}" for p in PROPOSALS],
    )
    axes.plot([], [], "o", mfc="none", ms=4, color="0.35", label="too few paths seen")
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set_xlim(-2.0, 102.0)
    axes.set_xlabel("total variation of the mode weights, %")
