"""Speed of the kernels beside other libraries and the limits of the machine.

Run from the root of the repository: ``python -m bench.ratios``.  Everything is measured
in one run on one core, as CPU time, in interleaved repeats of which the median counts.
Nothing here is a test: a busy machine moves single ratios by 20 %.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.timing import Timing, interleave, use_one_core

Cases = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Ratio:
    """One line of the table of goals; a missing peer leaves ``measured`` empty."""

    benchmark: str
    measured: float | None
    goal: float
    limit: str = ""
    at_most: bool = False
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        """Whether the goal is met, None if nothing was measured."""
        if self.measured is None:
            return None
        return (self.measured <= self.goal) == self.at_most or (
            self.measured == self.goal
        )


@dataclass(frozen=True)
class Speed:
    """Nanoseconds per path-step of one process, with the limit of the machine."""

    case: str
    ns: float
    limit_ns: float | None = None


@dataclass
class Report:
    """Everything that one run found."""

    settings: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    ratios: list[Ratio] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def ratio(
        self,
        name: str,
        slow: Timing | None,
        fast: Timing | float,
        goal: float,
        **more: Any,
    ) -> None:
        """Add the ratio of the medians of two timings."""
        base = fast.median if isinstance(fast, Timing) else fast
        value = None if slow is None else slow.median / base
        self.ratios.append(Ratio(name, value, goal, **more))


def check_costs(report: Report, name: str, ours: Any, peers: dict[str, Any]) -> None:
    """Warn if a peer's mean cost differs from ours: it would compute something else."""
    import numpy as np

    for peer, cost in peers.items():
        spread = np.hypot(
            cost.std() / np.sqrt(cost.size), ours.std() / np.sqrt(ours.size)
        )
        score = abs(cost.mean() - ours.mean()) / spread
        if score > 5.0:
            report.warnings.append(
                f"{name}: mean cost of {peer} is {score:.1f} standard errors off"
            )


# ---- sections ------------------------------------------------------------------------
def run_ceilings(report: Report, options: argparse.Namespace) -> None:
    """Ceilings of the core and, beside them, the normals of other libraries."""
    import numpy as np
    import torch

    from bench.ceilings import ceiling_cases, ceilings
    from sdebench.simulate.noise import normals

    torch.set_num_threads(1)
    count = 1 << 20
    generator, out = np.random.default_rng(0), np.empty(count)
    tensor = torch.empty(count, dtype=torch.float64)
    public = "sdebench.simulate.noise.normals"
    timed = interleave(
        {
            **ceiling_cases(),
            public: lambda: normals(1, 0, 0, 4096, 0, 256, 1),
            "numpy": lambda: generator.standard_normal(out=out),
            "torch": lambda: tensor.normal_(),
        },
        options.repeats,
    )
    found = ceilings(timed)
    report.ceilings = asdict(found)
    ours = 1e-9 * count * found.normal_ns
    for peer, goal, limit in (("numpy", 3, "8"), ("torch", 5, "15")):
        name = {"numpy": "numpy PCG64 standard_normal", "torch": "torch normal_"}[peer]
        report.ratio(
            f"normals in cache vs {name}", timed[peer], ours, goal, limit=limit
        )
        report.ratio(
            f"normals, public function vs {name}", timed[peer], timed[public], goal
        )


LINEAR_GOALS: dict[int, tuple[tuple[str, float, str], ...]] = {
    1: (("numpy", 5, "17"), ("torch eager", 6, "21")),
    10: (("numpy", 4, "12"), ("torch eager", 6, "18"), ("jax jit", 8, "30")),
}


def run_linear(report: Report, options: argparse.Namespace) -> None:
    """K1: forward paths of the linear family."""
    import sdebench
    from bench import peers
    from bench.cases import N_STEPS, POINT, dense_linear, forward_only
    from bench.ceilings import Ceilings

    limits = Ceilings(**report.ceilings)
    processes = [(f"linear d={d}", dense_linear(d), d) for d in (1, 2, 10, 20)]
    published = sdebench.problem("ou_linear")
    processes.append(("ou_linear d=10 (dense noise)", published, 10))
    for name, problem, dim in processes:
        n = options.paths if dim <= 2 else max(options.paths // 4, 256)
        grid = problem.time_grid(N_STEPS)
        tables = problem.tables(problem.theta(POINT), grid)

        def simulate(dtype: str, problem: Any = problem, n: int = n) -> Any:
            return sdebench.simulate(
                problem, point=POINT, n_steps=N_STEPS, n_paths=n, dtype=dtype
            )

        few = n // 16
        cases: Cases = {
            "sdebench f64": lambda: simulate("float64"),
            "sdebench f32": lambda: simulate("float32"),
            "forward kernel f64": forward_only(problem, n),
            "forward kernel f32": forward_only(problem, n, "float32"),
            "numpy": peers.linear_numpy(tables, n),
            "torch eager": peers.linear_torch(tables, n),
            "torch eager f32": peers.linear_torch(tables, n, "float32"),
            "plain numba": peers.linear_numba(tables, few),
        }
        if peers.has_jax():
            cases["jax jit"] = peers.linear_jax(tables, n)
        check_costs(
            report,
            name,
            simulate("float64").cost,
            {k: cases[k]() for k in cases if k not in OURS},
        )
        timed = interleave(cases, options.repeats)
        steps = N_STEPS * n
        for case, timing in timed.items():
            work = N_STEPS * few if case == "plain numba" else steps
            limit = limits.simulate_ns(dim) if case in OURS and "f64" in case else None
            report.speeds.append(
                Speed(f"{name}: {case}", 1e9 * timing.median / work, limit)
            )
        if problem is published:
            goals = LINEAR_GOALS[10]
        else:
            goals = LINEAR_GOALS.get(dim, ())
            report.ratio(
                f"float32 vs float64, {name}",
                timed["sdebench f64"],
                timed["sdebench f32"],
                1.5,
                limit="2",
            )
        for peer, goal, limit_text in goals:
            report.ratio(
                f"{name} vs {peer}",
                timed.get(peer),
                timed["sdebench f64"],
                goal,
                limit=limit_text,
            )


OURS = (
    "sdebench f64",
    "sdebench f32",
    "forward kernel f64",
    "forward kernel f32",
)


def run_mixture(report: Report, options: argparse.Namespace) -> None:
    """K2: forward paths of a mixture of nine modes in two dimensions."""
    import sdebench
    from bench import peers
    from bench.cases import N_STEPS, POINT, forward_only, nine_mode_bridge
    from bench.ceilings import Ceilings

    limits = Ceilings(**report.ceilings)
    n = options.paths
    for name, problem, modes in (
        ("mixture K=9 d=2", nine_mode_bridge(), 9),
        ("nine_modes d=2 (two mixtures)", sdebench.problem("nine_modes"), 18),
    ):
        tables = problem.tables(problem.theta(POINT), problem.time_grid(N_STEPS))

        def simulate(problem: Any = problem) -> Any:
            return sdebench.simulate(problem, point=POINT, n_steps=N_STEPS, n_paths=n)

        cases: Cases = {
            "sdebench f64": simulate,
            "forward kernel f64": forward_only(problem, n),
            "forward kernel f32": forward_only(problem, n, "float32"),
            "torch eager": peers.mixture_torch(tables, n),
        }
        if peers.has_jax():
            cases["jax jit"] = peers.mixture_jax(tables, n)
        check_costs(
            report,
            name,
            simulate().cost,
            {k: cases[k]() for k in cases if k not in OURS},
        )
        timed = interleave(cases, options.repeats)
        for case, timing in timed.items():
            limit = limits.mixture_ns(2, modes) if case in OURS else None
            if "f32" in case:
                limit = None
            ns = 1e9 * timing.median / (N_STEPS * n)
            report.speeds.append(Speed(f"{name}: {case}", ns, limit))
        for peer, goal, text in (("torch eager", 8, "28"), ("jax jit", 3, "10")):
            report.ratio(
                f"{name} vs {peer}",
                timed.get(peer),
                timed["sdebench f64"],
                goal,
                limit=text,
            )


def run_gradient(report: Report, options: argparse.Namespace) -> None:
    """K3: per-path gradients, against autodiff and their own forward pass."""
    import sdebench
    from bench import peers
    from bench.cases import N_STEPS, POINT, dense_linear, nine_mode_bridge, runner
    from bench.ceilings import Ceilings

    limits = Ceilings(**report.ceilings)
    n = max(options.paths // 8, 256)
    problem = dense_linear(2)
    theta = problem.theta(POINT)
    tables = problem.tables(theta, problem.time_grid(N_STEPS))
    cases: Cases = {
        "pathwise kernel, its forward pass included": runner(
            problem, ("pathwise",), n_paths=n
        ),
        "torch autograd": peers.gradient_torch(tables, theta, n),
    }
    if peers.has_jax():
        cases["jax vmap(grad(scan))"] = peers.gradient_jax(tables, theta, n)
    _check_gradients(report, problem, {k: cases[k]() for k in list(cases)[1:]})
    settings = {"point": POINT, "n_steps": N_STEPS, "n_paths": n, "n_replicates": 8}
    cases["sdebench.measure (8 replicates)"] = lambda: sdebench.measure(
        problem, "pathwise", **settings
    )
    timed = interleave(cases, options.repeats)
    for case, timing in timed.items():
        work = N_STEPS * n * (8 if "measure" in case else 1)
        limit = limits.simulate_ns(2) + limits.gradient_ns(2)
        report.speeds.append(
            Speed(
                f"gradient, linear d=2: {case}",
                1e9 * timing.median / work,
                limit if case.startswith("pathwise") else None,
            )
        )
    own = timed["pathwise kernel, its forward pass included"]
    for peer, goal in (("torch autograd", 15), ("jax vmap(grad(scan))", 6)):
        report.ratio(f"gradient, linear d=2 vs {peer}", timed.get(peer), own, goal)

    kinds = (
        ("linear d=2", dense_linear(2), 2.0, "1.3"),
        ("linear d=10", dense_linear(10), 2.0, "1.3"),
        ("linear d=20", dense_linear(20), 2.0, "1.3"),
        ("mixture K=9 d=2", nine_mode_bridge(), 2.6, "1.8"),
        ("nine_modes d=2", sdebench.problem("nine_modes"), 2.6, "1.8"),
    )
    pairs: Cases = {}
    for name, process, _, _ in kinds:
        pairs[f"{name}: forward, path kept"] = runner(process, n_paths=2048)
        for estimator in ("pathwise", "reinforce", "adjoint_matching"):
            pairs[f"{name}: {estimator}"] = runner(process, (estimator,), n_paths=2048)
    timed = interleave(pairs, options.repeats)
    for case, timing in timed.items():
        ns = 1e9 * timing.median / (N_STEPS * 2048)
        report.speeds.append(Speed(f"gradient, {case}", ns))
    for name, _, most, text in kinds:
        report.ratio(
            f"gradient vs its own forward pass, {name}",
            timed[f"{name}: pathwise"],
            timed[f"{name}: forward, path kept"],
            most,
            limit=text,
            at_most=True,
        )


def _check_gradients(report: Report, problem: Any, peers: dict[str, Any]) -> None:
    import numpy as np

    from bench.cases import N_STEPS, POINT

    exact = problem.truth.gradient(POINT, n_steps=N_STEPS)
    for peer, rows in peers.items():
        score = np.abs(rows.mean(1) - exact) / (rows.std(1) / np.sqrt(rows.shape[1]))
        if score.max() > 5.0:
            report.warnings.append(
                f"gradient of {peer} is {score.max():.1f} standard errors off"
            )


def run_moments(report: Report, options: argparse.Namespace) -> None:
    """Streaming moments and covariance against numpy expressions."""
    import numpy as np

    from sdebench.measure.moments import StreamingMoments

    def expression(block: Any) -> Any:
        mean = block.mean(1)
        y = block - mean[:, None]
        return mean, (y**2).sum(1), (y**3).sum(1), (y**4).sum(1)

    generator = np.random.default_rng(0)
    for components in (5, 100, 1000):
        block = generator.standard_normal((components, 256))
        streams = {}
        for key in (False, True):
            streams[key] = StreamingMoments(components, 1, with_covariance=key)
            streams[key].set_shift(block)
        cases: Cases = {
            "moments": partial(streams[False].update, 0, block),
            "covariance": partial(streams[True].update, 0, block),
            "numpy moments": partial(expression, block),
            "numpy A @ A.T": partial(np.matmul, block, block.T),
        }
        timed = interleave(cases, options.repeats)
        if components >= 100:
            report.ratio(
                f"moments to order 4 vs numpy expression, P={components}",
                timed["numpy moments"],
                timed["moments"],
                100,
            )
        if components == 1000:
            report.ratio(
                "one A @ A.T vs moments with covariance, P=1000, B=256",
                timed["numpy A @ A.T"],
                timed["covariance"],
                0.75,
                limit="1",
            )
        for case in ("moments", "covariance"):
            ns = 1e9 * timed[case].median / (256 * components)
            report.speeds.append(
                Speed(f"{case} P={components}, per entry of a block of 256", ns)
            )


def run_startup(report: Report, options: argparse.Namespace) -> None:
    """Import and first kernel calls, in fresh processes."""
    from bench.startup import measure_startup

    found = measure_startup()
    for name, seconds in found.cold.items():
        report.ratios.append(
            Ratio(f"first {name} call, cold", seconds, 8.0, "", True, " s")
        )
    for name, seconds in found.cached.items():
        report.ratios.append(
            Ratio(f"first {name} call, from the cache", seconds, 0.2, "", True, " s")
        )
    report.ratios.append(
        Ratio("import sdebench", found.import_seconds, 0.2, "0.11 (numpy)", True, " s")
    )


def run_threads(report: Report, options: argparse.Namespace) -> None:
    """Wall time of two threads against one: means something on a quiet machine only."""
    import sdebench
    from bench.cases import N_STEPS, POINT, dense_linear

    if (os.cpu_count() or 1) < 2:
        return
    problem = dense_linear(10)
    before = None
    if hasattr(os, "sched_setaffinity"):
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    best = {1: float("inf"), 2: float("inf")}
    for _ in range(max(5, options.repeats)):
        for threads in best:
            begin = time.perf_counter()
            sdebench.simulate(
                problem,
                point=POINT,
                n_steps=N_STEPS,
                n_paths=options.paths,
                threads=threads,
            )
            best[threads] = min(best[threads], time.perf_counter() - begin)
    if before is not None:
        os.sched_setaffinity(0, before)
    report.ratios.append(
        Ratio("two threads vs one, wall time, linear d=10", best[1] / best[2], 1.7, "2")
    )


def run_bits(report: Report, options: argparse.Namespace) -> None:
    """Bits of the normals: numba, numpy and torch."""
    import numpy as np

    from sdebench.simulate.noise import normals

    equal = True
    for dtype in ("float64", "float32"):
        made = [
            np.asarray(normals(5, 1, 3, 4096, 2, 16, 3, backend=b, dtype=dtype))
            for b in ("numba", "numpy", "torch")
        ]
        equal &= all(made[0].tobytes() == other.tobytes() for other in made[1:])
    report.ratios.append(
        Ratio(
            "normals with equal bits: numba, numpy, torch",
            float(equal),
            1.0,
            "1",
            unit="",
        )
    )


SECTIONS = {
    "ceilings": run_ceilings,
    "linear": run_linear,
    "mixture": run_mixture,
    "gradient": run_gradient,
    "moments": run_moments,
    "threads": run_threads,
    "startup": run_startup,
    "bits": run_bits,
}


# ---- output --------------------------------------------------------------------------
def markdown(report: Report) -> str:
    """Return the report as Markdown tables."""
    marks = {True: "yes", False: "**no**", None: "not measured"}
    lines = [
        "| benchmark | measured | goal | expected limit | met? |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for r in report.ratios:
        value = "" if r.measured is None else f"{r.measured:.3g}{r.unit}"
        sign = "<=" if r.at_most else ">="
        lines.append(
            f"| {r.benchmark} | {value} | {sign} {r.goal:g}{r.unit} | {r.limit} "
            f"| {marks[r.met]} |"
        )
    lines += [
        "",
        "| case | ns per path-step | limit of this core | reached |",
        "| --- | ---: | ---: | ---: |",
    ]
    for s in report.speeds:
        limit = "" if s.limit_ns is None else f"{s.limit_ns:.2f}"
        share = "" if s.limit_ns is None else f"{100 * s.limit_ns / s.ns:.0f} %"
        lines.append(f"| {s.case} | {s.ns:.3g} | {limit} | {share} |")
    if report.ceilings:
        c = report.ceilings
        lines += [
            "",
            "| ceiling, one core | measured |",
            "| --- | ---: |",
            f"| normals, float64 | {1 / c['normal_ns']:.2f} G/s |",
            f"| normals, float32 | {1 / c['normal32_ns']:.2f} G/s |",
            f"| exponentials, float64 | {1 / c['exp_ns']:.2f} G/s |",
            f"| fused multiply-add, float64 | {c['fma_gflops']:.0f} Gflop/s |",
            f"| memory, copy | {c['copy_gbs']:.0f} GB/s |",
            f"| memory, read | {c['read_gbs']:.0f} GB/s |",
            "",
            "Limits: linear d t_normal + 4 d^2 / F; a mixture of K modes "
            "d t_normal + K t_exp + 4 K (d + 2) / F; a gradient adds 2 d^2 / F and "
            "16 d bytes.",
        ]
    lines += ["", *(f"Warning: {w}" for w in report.warnings)]
    details = ", ".join(f"{k} {v}" for k, v in report.settings.items())
    return "\n".join([*lines, f"Settings: {details}", ""])


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(prog="python -m bench.ratios", description=__doc__)
    result.add_argument(
        "--paths", type=int, default=65536, help="a quarter for d >= 10"
    )
    result.add_argument("--repeats", type=int, default=5)
    result.add_argument("--core", type=int, default=0, help="-1: do not pin")
    result.add_argument("--only", choices=SECTIONS, nargs="+", help="sections to run")
    result.add_argument("--json", type=Path, help="write all numbers to this file")
    result.add_argument("--markdown", type=Path, help="write the tables to this file")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; return 0 whatever the ratios are."""
    options = parser().parse_args(arguments)
    pinned = use_one_core(options.core if options.core >= 0 else None)
    from sdebench.provenance import provenance

    report = Report()
    wanted = options.only or list(SECTIONS)
    begin = time.monotonic()
    for name, section in SECTIONS.items():
        if name in wanted or (name == "ceilings" and {"linear", "mixture"} & {*wanted}):
            print(f"{time.monotonic() - begin:6.0f} s  {name}", file=sys.stderr)
            try:
                section(report, options)
            except Exception as error:
                # the other sections took minutes: keep them
                report.warnings.append(f"section {name} failed: {error!r:.300}")
    report.settings = {
        "paths": options.paths,
        "repeats": options.repeats,
        "clock": "CPU time, medians",
        "pinned to one core": pinned,
        "load average": f"{os.getloadavg()[0]:.1f}",
        **provenance(),
    }
    text = markdown(report)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json:
        content = asdict(report)
        for entry, ratio in zip(content["ratios"], report.ratios, strict=True):
            entry["met"] = ratio.met
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
