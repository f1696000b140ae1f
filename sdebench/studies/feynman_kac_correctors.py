r"""Feynman-Kac correctors for annealing, products and guidance, beside exact answers.

q_1 = .3 N(-1.5, .2) + .7 N(1, .4) and q_0 = .6 N(-1.2, .3) + .4 N(1.4, .3) on the VP
process with rate 8, annealed, multiplied and guided: one formula for the weights, see
`sdebench.closed_form.density_powers`.  The answers int rho_1 and E x^2 are quadratures
(for whole powers also those of a mixture); means, effective sizes (E W)^2 / E W^2 and
second moments of the weighted paths are iterated integrals at any number of steps K.

The printed numbers are estimates from `PRINTED_PARTICLES` particles.  Ours are exact,
with the interval of an estimate from as many, by the exact variance of its mean.

Where sum gamma = 2 the weights have an infinite second moment: (E W)^2 / E W^2 is 0 and
the effective size that a sample shows says how large the sample is.  There particles
are simulated, with and without resampling.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import logsumexp, ndtri

from sdebench.closed_form.density_powers import (
    DensityPath,
    Moments,
    finite_weight_moment,
    log_start_ratio,
    quadrature_moments,
    weighted_ends,
)
from sdebench.closed_form.gaussian_mixture import GaussianMixture
from sdebench.experiments.costates import positive_mean
from sdebench.experiments.experiment import (
    Progress,
    columns,
    exact,
    interval_of,
    records,
)
from sdebench.experiments.mode_weights import effective_share
from sdebench.experiments.particles import Corrector, Particles
from sdebench.measure.intervals import Interval
from sdebench.report.format import interval, plain
from sdebench.studies._study import (
    Study,
    compared,
    comparison_table,
    count_agreeing,
    level_of_each,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.typing.NDArray[np.float64]

FIRST = GaussianMixture.isotropic([[-1.5], [1.0]], [0.2, 0.4], [0.3, 0.7])
OTHER = GaussianMixture.isotropic([[-1.2], [1.4]], [0.3, 0.3], [0.6, 0.4])
RATE = 8.0
ANNEALED, GUIDED, SQUARED, PRODUCT = (
    "annealing, γ = 1/2",
    "guidance, w = 2",
    "annealing, γ = 2",
    "product",
)
TARGETS = {
    ANNEALED: DensityPath([FIRST], [0.5], rate=RATE),
    GUIDED: DensityPath([FIRST, OTHER], [2.0, -1.0], rate=RATE),
    SQUARED: DensityPath([FIRST], [2.0], rate=RATE),
    PRODUCT: DensityPath([FIRST, OTHER], [1.0, 1.0], rate=RATE),
}
NODES = np.linspace(-8.0, 8.0, 401)
STEPS = (50, 100, 200, 400, 800)
KERNEL_STEPS = STEPS[:3]
"""Numbers of steps of the kernel ratios in the figure."""

PRINTED_PARTICLES = 100_000
PRINTED_STEPS = (50, 200, 800)
PRINTED_ERRORS = {
    ANNEALED: (".038", ".004", ".003"),
    GUIDED: ("-.050", ".002", "-.001"),
}
PRINTED_SHARES = {ANNEALED: ".32", GUIDED: ".63"}
PRINTED_SECOND = {"exact": "1.0708", "weighted": "1.0683", "plain": "1.348"}

N_STEPS, N_PARTICLES, N_REPLICATES = 100, 2048, 96
"""Of the simulations."""
SCHEMES: dict[str, tuple[str, float | None]] = {
    "no resampling": ("systematic", None),
    "systematic, below 1/2": ("systematic", 0.5),
    "stratified, below 1/2": ("stratified", 0.5),
    "systematic, every step": ("systematic", 1.0),
    "stratified, every step": ("stratified", 1.0),
}
"""Resampling and threshold."""
N_RUNS = len(TARGETS) * len(SCHEMES)
N_INTERVALS = 8 + 2 * N_RUNS


def answer(target: str) -> Moments:
    """Return log int rho_1 and E x^2 of a target."""
    return quadrature_moments(TARGETS[target], 1.0, NODES)


class Estimate(NamedTuple):
    """Exact limits of a corrector's estimates, and variances of one particle's."""

    error: float
    variance: float
    second: float
    second_variance: float

    @property
    def share(self) -> float:
        """The effective sample size over the number of particles."""
        return 1.0 / (1.0 + self.variance)


def estimate(target: str, n_steps: int, weights: str) -> Estimate:
    """Return the limit of a corrector's log Z error and second moment."""
    path = TARGETS[target]
    one = weighted_ends(path, n_steps, weights, 1.0, NODES)
    two = weighted_ends(path, n_steps, weights, 2.0, NODES)
    m, square = one.second, np.exp(two.log_mass - 2.0 * one.log_mass)
    spread = square * (two.fourth - 2.0 * m * two.second + m**2)
    error = one.log_mass - answer(target).log_mass
    return Estimate(error, float(square - 1.0), m, float(spread))


def plain_guidance(n_steps: int) -> tuple[float, float]:
    """Return the second moment of the guided paths without weights, its variance."""
    ends = weighted_ends(TARGETS[GUIDED], n_steps, "riemann", 0.0, NODES)
    return ends.second, ends.fourth - ends.second**2


def as_sampled(value: float, variance: float) -> Interval:
    """Return a limit with the interval of an estimate from the printed particles."""
    quantile = float(ndtri(0.5 + 0.5 * level_of_each(N_INTERVALS)))
    reach = quantile * float(np.sqrt(variance / PRINTED_PARTICLES))
    return Interval(value, value - reach, value + reach)


def start_bias(target: str) -> float:
    """Return the error of log Z from N(0, 1) in place of N(0, 1 / sum gamma)."""
    path, x = TARGETS[target], NODES[:, None]
    logs = path.at(x, 1.0).log_density
    return float(logsumexp(logs + log_start_ratio(path, x)) - logsumexp(logs))


def simulate(target: str, scheme: str, seed: int, replicate: int) -> Particles:
    """Return the particles of one replicate; all schemes have the same noise."""
    path = TARGETS[target]
    key = [seed, list(TARGETS).index(target) * N_REPLICATES + replicate]
    rng = np.random.Generator(np.random.Philox(key=key))
    resampling, threshold = SCHEMES[scheme]
    corrector = Corrector(path, resampling=resampling, threshold=threshold)
    noise = rng.standard_normal((N_STEPS + 1, N_PARTICLES, 1))
    uniforms = rng.random((N_STEPS, N_PARTICLES))
    return corrector.run(path.start_scale("matched") * noise[0], noise[1:], uniforms)


@dataclass(frozen=True)
class FeynmanKacCorrectors(Study):
    """Weighted and resampled particles for powers and products of mixtures."""

    subject: ClassVar[str] = (
        "Feynman–Kac correctors for annealing, products and guidance of two mixtures: "
        "error of log Z, effective sample size and second moment against exact "
        "answers, and what resampling changes where the weights have no variance."
    )
    source: ClassVar[str] = (
        "Skreta et al. 2025, arXiv:2503.02819, for the weights; the numbers are "
        f"derived, estimates from {PRINTED_PARTICLES:,} particles"
    )
    procedure: ClassVar[str] = (
        "A = .3 N(−1.5, .2) + .7 N(1, .4), C = .6 N(−1.2, .3) + .4 N(1.4, .3), VP "
        f"process with rate {RATE:g}: A^γ, A C and the guided A² / C (w = 2). Ours "
        f"exact: quadratures and iterated integrals on {len(NODES)} nodes, the "
        f"interval that of an estimate from {PRINTED_PARTICLES:,} particles. "
        f"Simulated: {N_REPLICATES} replicates of {N_PARTICLES:,} particles with "
        f"{N_STEPS} steps and kernel-ratio weights, from N(0, 1/Σγ), resampled at "
        "every step, below half the effective size, or never; errors are means of "
        "absolute values."
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        done, total = 0, 4 + N_RUNS
        rows: list[dict[str, Any]] = []
        for part in (_comparisons(), _curves("riemann"), _curves("kernel_ratio")):
            rows += part
            progress(done := done + 1, total)
        for target in TARGETS:
            keys = {"kind": "start", "target": target}
            rows.append(columns(exact(start_bias(target))) | keys)
        progress(done := done + 1, total)
        for target in TARGETS:
            for scheme in SCHEMES:
                rows += _runs(target, scheme, seed)
                progress(done := done + 1, total)
        return pd.DataFrame(rows).fillna({"printed": ""})

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        found = evidence[evidence["kind"] == "comparison"]
        starts = evidence[evidence["kind"] == "start"]
        runs = evidence[evidence["kind"] == "run"]
        own = []
        for (target, scheme), mine in runs.groupby(["target", "scheme"], sort=False):
            by = {row.of: row for row in records(mine)}
            own.append(_row(f"{target}, {scheme}: mean errors", _run_text(by)))
        own += [
            _row(f"{row.target}: log Z error from N(0, 1)", f"{row.value:.4f}")
            for row in records(starts)
        ]
        return pd.concat(
            [comparison_table(_printed(found)), pd.DataFrame(own)], ignore_index=True
        )

    def summary(self, evidence: pd.DataFrame) -> str:
        rows = _printed(evidence[evidence["kind"] == "comparison"])
        runs = evidence[evidence["kind"] == "run"]
        errors = {
            (row.target, row.scheme): row.value
            for row in records(runs[runs["of"] == "error"])
        }
        never, _, _, always, _ = SCHEMES
        texts = [
            f"from {plain(errors[target, never], 2)} to "
            f"{plain(errors[target, always], 2)} for {name}"
            for target, name in ((SQUARED, "γ = 2"), (PRODUCT, "the product"))
        ]
        starts = evidence[evidence["kind"] == "start"].set_index("target")["value"]
        return (
            f"{count_agreeing(rows)} of {len(rows)} comparisons agree. With Σγ = 2 the "
            "weights have no variance, and systematic resampling at every step takes "
            f"the error of log Z of {N_PARTICLES:,} particles {' and '.join(texts)}. "
            f"From N(0, 1) log Z is off by {starts[ANNEALED]:.2f} at γ = 1/2 and by "
            f"{starts[SQUARED]:.2f} at γ = 2, which no weight shows."
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.experiments.drawing import add_legend
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        with style():
            figure = new_figure(PAGE, 4.8)
            panels = figure.subplots(2, 2)
            _draw_curves(panels[0, 0], evidence, "error")
            _draw_curves(panels[0, 1], evidence, "share")
            _draw_runs(panels[1, 0], evidence, "error")
            _draw_runs(panels[1, 1], evidence, "second")
            for axes in panels.flat:
                finish_axes(axes)
            add_legend(figure, panels[0, 0], len(TARGETS))
            settle(figure)
        return figure


def _printed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(printed=rows["printed"].astype(str))


def _row(quantity: str, ours: str) -> dict[str, str]:
    return {"quantity": quantity, "source": "–", "ours": ours, "agreement": "–"}


# ---- evidence ----------------------------------------------------------------------
def _comparisons() -> Iterator[dict[str, Any]]:
    """Yield the rows with a printed number."""
    kind = {"kind": "comparison"}
    last = {}
    for target, texts in PRINTED_ERRORS.items():
        for n_steps, printed in zip(PRINTED_STEPS, texts, strict=True):
            found = last[target] = estimate(target, n_steps, "riemann")
            ours = as_sampled(found.error, found.variance)
            yield (
                compared(f"{target}, K = {n_steps}: log Z error", printed, ours) | kind
            )
        text = f"{target}, K = {n_steps}: effective sample size per particle"
        yield compared(text, PRINTED_SHARES[target], exact(last[target].share)) | kind
    second = exact(answer(GUIDED).second)
    yield compared(f"{GUIDED}: exact E x²", PRINTED_SECOND["exact"], second) | kind
    n_steps = PRINTED_STEPS[-1]
    weighted = as_sampled(last[GUIDED].second, last[GUIDED].second_variance)
    text = f"{GUIDED}, K = {n_steps}: E x² of weighted particles"
    yield compared(text, PRINTED_SECOND["weighted"], weighted) | kind
    text = f"{GUIDED}, K = {n_steps}: E x² of guided paths without weights"
    unweighted = as_sampled(*plain_guidance(n_steps))
    yield compared(text, PRINTED_SECOND["plain"], unweighted) | kind


def _curves(weights: str) -> Iterator[dict[str, Any]]:
    """Yield errors and, where they are not 0, effective shares over the steps."""
    for target, path in TARGETS.items():
        for n_steps in STEPS if weights == "riemann" else KERNEL_STEPS:
            keys = {"target": target, "weights": weights, "n_steps": n_steps}
            if finite_weight_moment(path, n_steps, weights, 2.0):
                found = estimate(target, n_steps, weights)
                error, share = found.error, found.share
            elif weights == "riemann" and finite_weight_moment(
                path, n_steps, weights, 1.0
            ):
                ends = weighted_ends(path, n_steps, weights, 1.0, NODES)
                error, share = ends.log_mass - answer(target).log_mass, 0.0
            else:
                continue  # without variance; and of kernel ratios unbiased
            yield columns(exact(error)) | keys | {"kind": "error"}
            yield columns(exact(share)) | keys | {"kind": "share"}


def _runs(target: str, scheme: str, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the mean absolute errors of simulated particles."""
    right, level = answer(target), level_of_each(N_INTERVALS)
    found = [simulate(target, scheme, seed, i) for i in range(N_REPLICATES)]
    errors = {
        "error": [p.log_normalizer - right.log_mass for p in found],
        "second": [p.mean(p.states[:, 0] ** 2) - right.second for p in found],
    }
    for name, values in errors.items():
        yield columns(positive_mean(np.abs(values), level)) | {
            "kind": "run",
            "target": target,
            "scheme": scheme,
            "of": name,
            "share": float(np.mean([effective_share(p.log_weights) for p in found])),
            "count": float(np.mean([p.n_resampled for p in found])),
        }


def _run_text(by: dict[str, Any]) -> str:
    """Return both errors, and how even the weights were or how often resampled."""
    error, second = (interval(*interval_of(by[name])) for name in ("error", "second"))
    more = f"effective {plain(100.0 * by['error'].share, 2)} %"
    if by["error"].count:
        more = f"{by['error'].count:.1f} resamplings"
    return f"log Z {error}, E x² {second}; {more}"


# ---- figure ------------------------------------------------------------------------
def _looks() -> dict[str, dict[str, Any]]:
    import seaborn as sns

    palette = sns.color_palette("colorblind")
    colors, markers = (palette[0], palette[1], palette[2], palette[4]), "osD^"
    return {
        target: {"color": color, "marker": marker}
        for target, color, marker in zip(TARGETS, colors, markers, strict=True)
    }


def _draw_curves(axes: Axes, evidence: pd.DataFrame, kind: str) -> None:
    """Draw exact errors or effective shares over the number of steps."""
    from matplotlib.ticker import NullLocator

    rows = evidence[evidence["kind"] == kind]
    for target, look in _looks().items():
        for weights, line in (("riemann", "-"), ("kernel_ratio", (0, (4, 1.5)))):
            mine = rows[rows["target"].eq(target) & rows["weights"].eq(weights)]
            if mine.empty or (kind == "error" and weights != "riemann"):
                continue
            label = target if weights == "riemann" else None
            face = look["color"] if weights == "riemann" else "white"
            shown: dict[str, Any] = {"ls": line, "ms": 3.5, "lw": 1.1, "mfc": face}
            values = mine["value"].abs()
            axes.plot(mine["n_steps"], values, label=label, **shown, **look)
    axes.set_xscale("log", base=2)
    axes.set_xticks(STEPS, [str(n) for n in STEPS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("number of steps K")
    if kind == "error":
        axes.set_yscale("log")
        axes.set_title("|log Z error| of Riemann sums, exact", loc="left", pad=3)
    else:
        axes.set_ylim(-0.03, 1.0)
        title = "effective sample size per particle (- -: kernel ratios)"
        axes.set_title(title, loc="left", pad=3)


def _draw_runs(axes: Axes, evidence: pd.DataFrame, of: str) -> None:
    """Draw the errors of simulated particles by scheme."""
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = evidence[evidence["kind"].eq("run") & evidence["of"].eq(of)]
    for i, (target, look) in enumerate(_looks().items()):
        mine = rows[rows["target"] == target].set_index("scheme").loc[list(SCHEMES)]
        value = mine["value"]
        axes.errorbar(
            np.arange(len(SCHEMES)) + 0.14 * i - 0.21,
            value,
            yerr=[value - mine["low"], mine["high"] - value],
            ls="",
            ms=3.8,
            lw=1.1,
            **look,
        )
    names = [scheme.replace(", ", ",\n").replace(" r", "\nr") for scheme in SCHEMES]
    axes.set_xticks(range(len(SCHEMES)), names)
    axes.set_xlim(-0.5, len(SCHEMES) - 0.5)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.2g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    what = "log Z" if of == "error" else "E x²"
    title = f"mean |error| of {what}, {N_PARTICLES:,} particles"
    axes.set_title(title, loc="left", pad=3)
