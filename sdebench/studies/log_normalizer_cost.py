r"""Cost of 1 % of Z, and of log Z, for every estimator of log Z.

See `sdebench.experiments.normalizers`: the number of paths that an error takes follows
from the variance of one path and the bias at a number of steps, and the number of steps
is the cheapest of a few.

An error of 1 % of Z is one of 0.01 in log Z, whatever log Z is: what papers report as
the error of log Z.  One of 1 % of log Z depends on a constant in the reward, and is
nothing at all where Z = 1; it is given beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from sdebench.estimator import Estimator
from sdebench.experiments import normalizers
from sdebench.experiments.experiment import Progress, records
from sdebench.experiments.normalizers import (
    AT_LEAST,
    BIASED,
    FACTORS,
    N_PATHS,
    POINT,
    REACHED,
    UNSEEN,
    Measured,
    cost,
)
from sdebench.problem import Problem
from sdebench.report.format import MISSING, plain
from sdebench.studies._study import Study, level_of_each

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ERROR = 0.01
LARGEST = 2048
"""Steps times dimensions of a problem; larger ones take minutes."""
OF_Z, OF_LOG_Z = "Z", "log Z"
REFUSED = "refused"
NEAR_ONE = 1e-9
"""|log Z| that is zero."""


@dataclass(frozen=True)
class LogNormalizerCost(Study):
    """Path-steps and seconds to 1 % of Z."""

    subject: ClassVar[str] = (
        "What 1 % of Z costs with every estimator of log Z, on every problem of "
        "moderate size: path-steps and seconds, from measured variance and bias."
    )
    source: ClassVar[str] = "This catalogue; no numbers of others"
    procedure: ClassVar[str] = (
        "An error of 1 % of Z is one of 0.01 in log Z, what papers report; 1 % of "
        "log Z, which a constant in the reward changes, is in the second row of a "
        f"problem. Replicates of {N_PATHS} paths at "
        f"{', '.join(f'{f:g}' for f in FACTORS)} times the problem's steps, controls "
        f"at the point {POINT}, numba, one thread. Error² = bias² + variance of a path "
        "/ paths; the cheapest number of steps counts. The bias is exact where the "
        'estimator\'s mean is known, else measured. "bias": at no number of steps is '
        'it below the error, and what it is with the most steps. "≥": the bias may '
        "be as large as the error, or a few replicates carry the mean, so that the "
        "variance is larger than it looks."
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        chosen, found = normalizers.problems(LARGEST), normalizers.estimators()
        level = level_of_each(len(chosen) * len(found) * len(FACTORS))
        rows: list[dict[str, Any]] = []
        for done, problem in enumerate(chosen, start=1):
            for estimator in found:
                rows += _rows(problem, estimator, level, seed)
            progress(done, len(chosen))
        return pd.DataFrame(rows)

    def summary(self, evidence: pd.DataFrame) -> str:
        rows = evidence[evidence["of"] == OF_Z]
        tried = rows[rows["outcome"] != REFUSED]
        reached = tried[tried["outcome"] == REACHED]
        real = reached[~reached["oracle"]]
        best = real.loc[real.groupby("problem")["path_steps"].idxmin()]
        counts = best["estimator"].value_counts()
        text = ", ".join(f"{name} ({count})" for name, count in counts.items())
        return (
            f"1 % of Z is reached in {len(reached)} of {len(tried)} pairs of "
            f"{rows['problem'].nunique()} problems and {rows['estimator'].nunique()} "
            f"estimators; {tried['outcome'].eq(BIASED).sum()} stop at their bias and "
            f"{tried['outcome'].isin([AT_LEAST, UNSEEN]).sum()} have a lower bound "
            "only. Fewest path-steps without an oracle (of the optimal control or of "
            f"exact samples): {text}."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        rows = []
        names = list(dict.fromkeys(evidence["estimator"]))
        groups = evidence.groupby(["problem", "of"], sort=False)
        for (problem, of), mine in groups:
            by = {row.estimator: row for row in records(mine)}
            texts = {n: _text(by[n]) if n in by else MISSING for n in names}
            rows.append({"problem": str(problem), "1 % of": str(of)} | texts)
        return pd.DataFrame(rows)

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        rows = evidence[evidence["of"].eq(OF_Z) & evidence["outcome"].ne(REFUSED)]
        count = rows["problem"].nunique()
        with style():
            figure = new_figure(PAGE, 1.2 + 0.3 * count)
            panels = figure.subplots(1, 2, sharey=True)
            for axes, column in zip(panels, ("path_steps", "seconds"), strict=True):
                _draw(axes, rows, column)
                finish_axes(axes, grid="x")
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, ncols=3, loc="outside upper center")
            settle(figure)
        return figure


def _rows(
    problem: Problem, estimator: Estimator, level: float, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield the cost of 1 % of Z, and of log Z where that is not zero."""
    log_z = problem.truth.log_normalizer()
    keys = {
        "problem": problem.label,
        "log_z": log_z,
        "estimator": estimator.label,
        "oracle": estimator.control == "optimal" or "tilted_samples" in estimator.needs,
    }
    rungs, reason = [], ""
    for n_steps in normalizers.step_counts(problem):
        found = normalizers.measure(problem, estimator, n_steps, level, seed)
        if isinstance(found, Measured):
            rungs.append(found)
        else:
            reason = found
    if not rungs:
        yield keys | {"of": OF_Z, "outcome": REFUSED, "reason": reason}
        return
    errors = {OF_Z: ERROR}
    if abs(log_z) > NEAR_ONE:
        errors[OF_LOG_Z] = ERROR * abs(log_z)
    for of, error in errors.items():
        yield keys | {"of": of, "error": error} | asdict(cost(rungs, error))


def _text(row: Any) -> str:
    """Return a cell of the table."""
    if row.outcome == REFUSED:
        return MISSING
    if row.outcome == BIASED:
        return f"bias {plain(100.0 * row.bias, 2).replace('-', '−')} %"
    bound = "" if row.outcome == REACHED else "≥ "
    return f"{bound}{plain(row.path_steps, 2)}; {plain(row.seconds, 2)} s"


def _draw(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    """Draw a cost of every estimator on every problem; biased ones at the right."""
    from sdebench.report.style import looks

    places = list(dict.fromkeys(rows["problem"]))
    drawn = looks(rows["estimator"])
    finite = rows[column][np.isfinite(rows[column])]
    right = 10.0 ** np.ceil(np.log10(finite.max()) + 1.0)
    axes.set_xscale("log")
    for i, name in enumerate(drawn):
        mine = rows[rows["estimator"] == name]
        shift = 0.7 * ((i + 0.5) / len(drawn) - 0.5)
        y = np.array([places.index(p) for p in mine["problem"]]) + shift
        x = mine[column].replace(np.inf, right)
        color, kinds = drawn[name].color, mine["outcome"]
        reached, biased = kinds.eq(REACHED), kinds.eq(BIASED)
        bound = ~reached & ~biased
        shown: dict[str, Any] = {"ls": "", "ms": 4, "color": color}
        axes.plot(x[reached], y[reached], "o", label=drawn[name].label, **shown)
        axes.plot(x[bound], y[bound], ">", mfc="white", **shown)
        axes.plot(x[biased], y[biased], "x", **shown)
    for place in range(1, len(places), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="0.965", lw=0, zorder=0)
    axes.axvline(right / 10.0**0.5, color="0.6", lw=0.8)
    axes.set_xlim(finite.min() / 3.0, right * 3.0)
    axes.set_yticks(range(len(places)), places)
    axes.set_ylim(len(places) - 0.5, -0.5)
    text = "path-steps" if column == "path_steps" else "seconds, one thread"
    axes.set_xlabel(f"{text} (▷ at least, × bias)")
