r"""Jarzynski and Crooks under tilting on a mixture: bias, spread, and the crossing.

Data .3 N(-1.5, .2) + .7 N(1, .4) on the linear flow, reward r = -0.4 (x - 0.5)^2,
levels lambda_t = t^2, noise of constant strength eps = 0.5 from t = 0.02 to 1:

    forward    X' = X + h f+_n(X) + sqrt(2 eps h) z,     f+- = v +- eps (s + lambda r'),
    backward   X  = X' - h f-_{n+1}(X') + sqrt(2 eps h) z.

The ratio of the two path densities, times those of the ends, is the Crooks weight W:
its mean is Z, at any number of steps K.  The Riemann sum of the work
lambda' r + lambda v r' makes the Jarzynski weight, whose mean is off by O(1/K).  Both
means and the effective sizes (E W)^2 / E W^2 are iterated integrals here.

With w = log W along forward paths, and along backward paths from exact samples of the
tilted law p_1 e^r / Z, the two densities of w satisfy p_B(w) = p_F(w) e^w / Z: they
cross at w = log Z.  Bennett's acceptance ratio is the c that solves

    mean_F 1 / (1 + e^(c - w)) = mean_B 1 / (1 + e^(w - c)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logsumexp

from sdebench.closed_form.work import log_weight_moments
from sdebench.experiments.experiment import Progress, columns, exact, records
from sdebench.measure.intervals import Interval, t_quantile
from sdebench.report.format import plain
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

Array = NDArray[np.float64]

WEIGHTS, MEANS, VARIANCES = np.array([0.3, 0.7]), np.array([-1.5, 1.0]), [0.2, 0.4]
CURVATURE, CENTRE = 0.8, 0.5
EPSILON, START_TIME = 0.5, 0.02
STEPS = (5, 10, 20, 40)
CURVE = (4, 5, 6, 8, 10, 14, 20, 28, 40, 56, 80)
"""Numbers of steps of the curves in the figure."""
NODES = np.linspace(-9.0, 9.0, 721)
PRINTED_LOG_Z = "-0.45422"
PRINTED = {
    "Jarzynski": ("1.175", "1.088", "1.044", "1.022"),
    "Crooks": ("1.000", "1.000", "1.000", "1.000"),
    "effective": ("0.39", "0.66", "0.75", "0.79"),
}
QUANTITIES = {
    "Jarzynski": "mean Riemann-sum weight over Z",
    "Crooks": "mean kernel-ratio weight over Z",
    "effective": "effective sample size of kernel ratios, per path",
}
K_WORK = 20
"""Number of steps of the distributions of the work."""
N_PATHS, BATCH, N_BATCHES = 1 << 19, 100_000, 32
BINS = np.linspace(-3.0, 1.2, 43)
N_INTERVALS = 2 + 2 * (len(BINS) - 1)


class Law(NamedTuple):
    """log p_t, its score and the velocity of the flow at points, one time."""

    log_density: Array
    score: Array
    velocity: Array


def law(x: Array, t: float) -> Law:
    """Return the densities of t X_1 + (1 - t) X_0; the velocity is E[X_1 - X_0 | x]."""
    variances = t**2 * np.array(VARIANCES) + (1.0 - t) ** 2
    gap = x[..., None] - t * MEANS
    logs = np.log(WEIGHTS / np.sqrt(2.0 * np.pi * variances)) - 0.5 * gap**2 / variances
    log_density = logsumexp(logs, axis=-1)
    mass = np.exp(logs - log_density[..., None])
    pull = gap / variances
    data = np.sum(mass * (MEANS + t * np.array(VARIANCES) * pull), axis=-1)
    noise = np.sum(mass * (1.0 - t) * pull, axis=-1)
    return Law(log_density, -np.sum(mass * pull, axis=-1), data - noise)


def reward(x: Array) -> tuple[Array, Array]:
    """Return r(x) and its derivative."""
    return -0.5 * CURVATURE * (x - CENTRE) ** 2, -CURVATURE * (x - CENTRE)


def drift(x: Array, t: float, sign: float) -> tuple[Array, Array, Array]:
    """Return the drift f+ or f-, log rho_t, and the rate of the work, at x."""
    here, (value, slope) = law(x, t), reward(x)
    push = here.velocity + sign * EPSILON * (here.score + t**2 * slope)
    log_density = here.log_density + (t**2 * value if t > START_TIME else 0.0)
    return push, log_density, 2.0 * t * value + t**2 * here.velocity * slope


def log_kernel(gap: Array, h: float) -> Array:
    """Return the log density of a step's noise."""
    square: Array = gap**2 / (4.0 * EPSILON * h)
    return -square - 0.5 * np.log(4.0 * np.pi * EPSILON * h)


def times_of(n_steps: int) -> Array:
    """Return the grid."""
    return np.linspace(START_TIME, 1.0, n_steps + 1)


def log_z() -> float:
    """Return log Z in closed form."""
    return float(np.log(np.sum(tilted()[0])))


def tilted() -> tuple[Array, Array, Array]:
    """Return masses, means and variances of p_1 e^r, a mixture too."""
    variances = np.array(VARIANCES)
    factor = 1.0 + CURVATURE * variances
    mass = WEIGHTS / np.sqrt(factor)
    mass = mass * np.exp(-0.5 * CURVATURE * (MEANS - CENTRE) ** 2 / factor)
    return mass, (MEANS + CURVATURE * variances * CENTRE) / factor, variances / factor


def exact_moments(method: str, n_steps: int) -> tuple[float, float]:
    """Return E W / Z and (E W)^2 / E W^2 by iterated integrals."""
    times, x = times_of(n_steps), NODES
    h = times[1] - times[0]
    forward = [drift(x, t, 1.0) for t in times]
    backward = [drift(x, t, -1.0) for t in times]
    means = np.array([x + h * forward[n][0] for n in range(n_steps)])

    def log_weight(n: int) -> Array:
        if method == "Jarzynski":
            return h * forward[n][2][:, None]
        back = x - h * backward[n + 1][0]
        ratio = log_kernel(x[:, None] - back, h) - log_kernel(x - means[n][:, None], h)
        return ratio + forward[n + 1][1] - forward[n][1][:, None]

    noises = np.full(n_steps, np.sqrt(2.0 * EPSILON * h))
    start = law(x, START_TIME).log_density
    first, second = log_weight_moments(x, start, means, noises, log_weight)
    return float(np.exp(first - log_z())), float(np.exp(2.0 * first - second))


def _mixture(
    masses: Array, means: Array, variances: Array, n: int, rng: np.random.Generator
) -> Array:
    index = rng.choice(len(masses), n, p=masses / masses.sum())
    x: Array = means[index] + np.sqrt(variances[index]) * rng.standard_normal(n)
    return x


def simulated_work(n_steps: int, n: int, forward: bool, seed: int) -> Array:
    """Return log W along forward paths, or along backward ones from the tilted law."""
    rng = np.random.default_rng(seed)
    times = times_of(n_steps)
    h = times[1] - times[0]
    spread = np.sqrt(2.0 * EPSILON * h)
    if forward:
        t = START_TIME
        variances = t**2 * np.array(VARIANCES) + (1.0 - t) ** 2
        x = _mixture(WEIGHTS, t * MEANS, variances, n, rng)
    else:
        x = _mixture(*tilted(), n, rng)
    sign = 1.0 if forward else -1.0
    order = range(n_steps) if forward else range(n_steps - 1, -1, -1)
    total = np.zeros(n)
    for k in order:
        here, there = (k, k + 1) if forward else (k + 1, k)
        push, log_here, _ = drift(x, times[here], sign)
        y = x + sign * h * push + spread * rng.standard_normal(n)
        back, log_there, _ = drift(y, times[there], -sign)
        ratio = log_kernel(x - (y - sign * h * back), h)
        ratio = ratio - log_kernel(y - (x + sign * h * push), h) + log_there - log_here
        total += sign * ratio
        x = y
    return total


def acceptance_ratio(forward: Array, backward: Array, level: float) -> Interval:
    """Return Bennett's estimate of log Z from as many works, with its interval."""
    from scipy.optimize import brentq

    def balance(c: float) -> float:
        return float(expit(forward - c).mean() - expit(c - backward).mean())

    both = np.concatenate([forward, backward])
    c = float(brentq(balance, both.min(), both.max(), xtol=1e-12))
    accepted = expit(forward - c), expit(c - backward)
    slope = sum(float(np.mean(a * (1.0 - a))) for a in accepted)
    n = len(forward)
    error = np.sqrt(sum(a.var(ddof=1) for a in accepted) / n) / slope
    reach = float(t_quantile(level, n - 1) * error)
    return Interval(c, c - reach, c + reach)


def sampled_share(n_steps: int, level: float, seed: int) -> Interval:
    """Return the mean effective share of samples of `BATCH` kernel ratios."""
    works = [
        simulated_work(n_steps, BATCH, True, seed + 1000 + i) for i in range(N_BATCHES)
    ]
    shares = [np.exp(2.0 * logsumexp(w) - logsumexp(2.0 * w)) / BATCH for w in works]
    mean, error = np.mean(shares), np.std(shares, ddof=1) / np.sqrt(N_BATCHES)
    reach = t_quantile(level, N_BATCHES - 1) * error
    return Interval(float(mean), float(mean - reach), float(mean + reach))


def histogram(works: Array, level: float) -> list[Interval]:
    """Return the density of the work in every bin, with exact binomial intervals."""
    from scipy.stats import beta

    counts, n = np.histogram(works, BINS)[0], len(works)
    width, tail = BINS[1] - BINS[0], 0.5 * (1.0 - level)
    low = np.nan_to_num(beta.ppf(tail, counts, n - counts + 1))
    high = beta.isf(tail, counts + 1, n - counts)
    rows = np.array([counts / n, low, high]).T / width
    return [Interval(*map(float, row)) for row in rows]


@dataclass(frozen=True)
class WorkIdentities(Study):
    """Jarzynski and Crooks weights on a tilted mixture."""

    subject: ClassVar[str] = (
        "log Z of a tilted mixture from the work along an annealed path: the mean of "
        "kernel-ratio (Crooks) weights is Z at any number of steps, that of "
        "Riemann-sum (Jarzynski) weights is off by O(1/K); forward and backward work "
        "distributions cross at log Z."
    )
    source: ClassVar[str] = (
        "Jarzynski 1997 and Crooks 1999 under tilting, as in arXiv:2605.00229; the "
        "numbers are derived, the effective sizes estimated from simulated weights"
    )
    procedure: ClassVar[str] = (
        f"Mixture .3 N(−1.5, .2) + .7 N(1, .4) on the linear flow from t = {START_TIME}"
        f", reward −0.4 (x − 0.5)², levels t², ε = {EPSILON}. Exact: iterated "
        f"integrals on {len(NODES)} nodes. Simulated: {N_PATHS:,} forward and as many "
        f"backward paths of {K_WORK} steps, the backward ones from exact samples of "
        f"the tilted law; and {N_BATCHES} samples of {BATCH:,} weights with {STEPS[0]} "
        "steps."
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows = [compared("log Z", PRINTED_LOG_Z, exact(log_z()))]
        level, done = level_of_each(N_INTERVALS), len(CURVE) + 3
        curves = {}
        for i, n_steps in enumerate(sorted({*STEPS, *CURVE})):
            for method in ("Jarzynski", "Crooks"):
                curves[method, n_steps] = exact_moments(method, n_steps)
            progress(i + 1, done)
        for name, texts in PRINTED.items():
            method = "Crooks" if name == "effective" else name
            for n_steps, printed in zip(STEPS, texts, strict=True):
                value = curves[method, n_steps][name == "effective"]
                row = compared(
                    f"K = {n_steps}: {QUANTITIES[name]}", printed, exact(value)
                )
                rows.append(row | {"n_steps": n_steps, "method": name})
        share = sampled_share(STEPS[0], level, seed)
        text = f"K = {STEPS[0]}: the same from samples of {BATCH:,} weights, their mean"
        rows.append(compared(text, PRINTED["effective"][0], share))
        progress(done - 1, done)
        works = {
            name: simulated_work(K_WORK, N_PATHS, name == "forward", seed + i)
            for i, name in enumerate(("forward", "backward"))
        }
        ratio = acceptance_ratio(works["forward"], works["backward"], level)
        text = f"K = {K_WORK}: log Z by the acceptance ratio of both directions"
        rows.append(compared(text, PRINTED_LOG_Z, ratio))
        for (method, n_steps), values in curves.items():
            for kind, value in zip(("mean", "share"), values, strict=True):
                keys = {"kind": kind, "method": method, "n_steps": n_steps}
                rows.append(columns(exact(value)) | keys)
        centres = 0.5 * (BINS[1:] + BINS[:-1])
        for name, work in works.items():
            for centre, found in zip(centres, histogram(work, level), strict=True):
                keys = {"kind": "work", "method": name, "work": centre}
                rows.append(columns(found) | keys)
        progress(done, done)
        frame = pd.DataFrame(rows)
        return frame.fillna({"kind": "comparison", "method": "", "printed": ""})

    def _comparisons(self, evidence: pd.DataFrame) -> pd.DataFrame:
        rows = evidence[evidence["kind"] == "comparison"]
        return rows.assign(printed=rows["printed"].astype(str))

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        return comparison_table(self._comparisons(evidence))

    def summary(self, evidence: pd.DataFrame) -> str:
        rows = self._comparisons(evidence)
        share = evidence[(evidence["kind"] == "share") & (evidence["n_steps"] == 5)]
        value = share.set_index("method")["value"]["Crooks"]
        return (
            f"{count_agreeing(rows)} of {len(rows)} comparisons agree. With 5 steps "
            f"the effective sample size is {plain(value, 2)} of the paths; samples of "
            f"{BATCH:,} weights say more, because they miss the paths that carry the "
            "variance."
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        with style():
            figure = new_figure(PAGE, 4.6)
            panels = figure.subplots(2, 2)
            _draw_work(panels[0, 0], evidence)
            _draw_ratio(panels[0, 1], evidence)
            _draw_curves(panels[1, 0], evidence, "mean")
            _draw_curves(panels[1, 1], evidence, "share")
            for axes in panels.flat:
                finish_axes(axes)
            settle(figure)
        return figure


def _colors() -> dict[str, tuple[float, float, float]]:
    import seaborn as sns

    blue, orange = sns.color_palette("colorblind")[:2]
    return {"forward": blue, "backward": orange, "Crooks": blue, "Jarzynski": orange}


def _draw_work(axes: Axes, evidence: pd.DataFrame) -> None:
    """Draw the densities of the work of both directions, and log Z."""
    for name, rows in evidence[evidence["kind"] == "work"].groupby("method"):
        color = _colors()[str(name)]
        axes.stairs(rows["value"], BINS, color=color, lw=1.2, label=f"{name} paths")
    axes.axvline(log_z(), color="0.35", lw=0.8, ls=(0, (4, 1.5)), label="log Z")
    axes.set_xlabel("log W")
    axes.set_title(f"density of log W, K = {K_WORK}", loc="left", pad=3)
    axes.legend(loc="upper left")


def _draw_ratio(axes: Axes, evidence: pd.DataFrame) -> None:
    """Draw the log-ratio of the two densities, which is w - log Z."""
    rows = evidence[evidence["kind"] == "work"]
    parts = {
        name: rows.pivot(index="work", columns="method", values=name)
        for name in ("value", "low", "high")
    }
    seen = parts["low"].min(axis=1) > 0.0
    logs = {name: np.log(part[seen]) for name, part in parts.items()}
    ratio = logs["value"]["backward"] - logs["value"]["forward"]
    low = logs["low"]["backward"] - logs["high"]["forward"]
    high = logs["high"]["backward"] - logs["low"]["forward"]
    ends = [ratio - low, high - ratio]
    axes.errorbar(ratio.index, ratio, yerr=ends, fmt="o", ms=2.5, lw=1, color="0.2")
    line = np.array([BINS[0], BINS[-1]])
    label = "log W − log Z"
    axes.plot(line, line - log_z(), color="0.35", lw=0.9, label=label)
    axes.plot([log_z()], [0.0], "x", ms=8, color=_colors()["backward"], label="log Z")
    axes.set_xlabel("log W")
    axes.set_title("log of backward over forward density", loc="left", pad=3)
    axes.legend(loc="upper left")


def _draw_curves(axes: Axes, evidence: pd.DataFrame, kind: str) -> None:
    """Draw mean weights, or effective shares, against the number of steps."""
    from matplotlib.ticker import NullLocator

    for name, rows in evidence[evidence["kind"] == kind].groupby("method"):
        rows = rows.sort_values("n_steps")
        color = _colors()[str(name)]
        axes.plot(rows["n_steps"], rows["value"], "o-", ms=3, color=color, label=name)
    wanted = {"mean": ("Jarzynski", "Crooks"), "share": ("effective",)}[kind]
    for row in records(evidence[evidence["kind"] == "comparison"]):
        if row.method in wanted:
            axes.plot(row.n_steps, float(row.printed), "x", ms=6, color="0.2")
    axes.plot([], [], "x", ms=6, color="0.2", label="source")
    axes.set_xscale("log")
    axes.set_xticks(STEPS, [str(k) for k in STEPS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("number of steps K")
    titles = {"mean": "mean weight over Z", "share": "effective sample size per path"}
    axes.set_title(titles[kind], loc="left", pad=3)
    axes.legend(loc="upper right" if kind == "mean" else "lower right")
