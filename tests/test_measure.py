"""Measurements end to end: bits, stopping rules, failures, coverage, memory."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
from _mutants import Choosy, NotFinite, TorchOnly
from scipy.stats import binom

from sdebench import registry
from sdebench.errors import (
    NotApplicableError,
    NumericalError,
    ParameterError,
    SDEBenchError,
    UnknownNameError,
)
from sdebench.estimator import Estimator
from sdebench.measure import engine, measure, measure_group, workers
from sdebench.measure.memory import PeakMemory
from sdebench.problem import Problem

pytestmark = pytest.mark.usefixtures("one_torch_thread")


SMALL = {"n_steps": 4, "n_paths": 48, "n_replicates": 20}
# Columns that say how long it took and when, not what came out.
UNSTABLE = ("seconds", "ns_per_path_step", "memory", "created")


def stable(row):
    """The columns that must not depend on time or threads, as text with all bits."""
    kept = {k: v for k, v in row.items() if not any(part in k for part in UNSTABLE)}
    return json.dumps(kept, sort_keys=True)


ANYWHERE = (
    "adjoint_matching",
    "opd",
    "path_importance_sampling",
    "pathwise",
    "reinforce",
)
"""Estimators that no problem and no number of paths here refuses, in most variants."""


def every_estimator():
    found = [
        registry.estimator(name, **variant)
        for name in ANYWHERE
        for variant in type(registry.estimator(name)).variants
    ]
    return [estimator for estimator in found if not estimator.needs_denoiser]


def numbers(row):
    return {
        k: np.asarray(v, float)
        for k, v in row.items()
        if isinstance(v, int | float | list)
        and not isinstance(v, bool)
        and k not in ("parameter_names", "n_paths", "n_replicates")
        and not any(part in k for part in UNSTABLE)
    }


# ---- determinism ------------------------------------------------------------
@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("name", ["damped_oscillator", "two_modes"])
def test_rows_do_not_depend_on_threads_neighbours_or_repetition(name, backend):
    settings = SMALL | {"backend": backend}
    group = every_estimator()
    first = measure_group(name, group, seed=1, **settings)
    for other in (
        measure_group(name, group, seed=1, **settings),
        measure_group(name, group, seed=1, threads=2, **settings),
        measure_group(name, group[::-1], seed=1, threads=3, **settings)[::-1],
        [measure(name, estimator, seed=1, **settings) for estimator in group],
    ):
        for a, b in zip(first, other, strict=True):
            assert stable(a.row) == stable(b.row), a.row["estimator_label"]


def test_adding_replicates_in_portions_changes_no_bit():
    """A sequential measurement ends with the bits of one that asks for all at once."""
    problem = registry.problem("two_modes")
    group = [registry.estimator("pathwise"), registry.estimator("reinforce")]
    times = problem.time_grid(4)
    theta = problem.theta("halfway")
    settings = workers.Settings(
        times=times,
        theta=theta,
        n_paths=40,
        backend="numba",
        dtype="float64",
        device="cpu",
        seed=3,
    )

    def moments(*portions):
        simulation = engine.Simulation(problem, group, settings)
        for portion in portions:
            simulation.run(portion, 1 + portion % 2)
        return [a.values.finalize() for a in simulation.accumulators]

    for a, b in zip(moments(21), moments(2, 5, 13, 21), strict=True):
        assert a.n == b.n == 21
        np.testing.assert_allclose(a.mean, b.mean, rtol=1e-14)
        np.testing.assert_allclose(a.covariance, b.covariance, rtol=1e-12)


def test_different_seeds_give_different_numbers():
    rows = [
        measure("two_modes", "pathwise", seed=seed, **SMALL).row
        for seed in (0, 1, 2**63)
    ]
    means = {tuple(row["mean"]) for row in rows}
    assert len(means) == 3


def test_replicates_and_paths_have_their_own_noise():
    """2 x 64 paths and 1 x 128 paths are different samples, halves are not repeated."""
    problem = registry.problem("brownian_linear")
    times = problem.time_grid(3)
    theta = problem.theta("zero")
    settings = workers.Settings(
        times=times,
        theta=theta,
        n_paths=512,
        backend="numba",
        dtype="float64",
        device="cpu",
        seed=3,
    )
    group = [registry.estimator("pathwise")]
    worker = workers.NumbaWorker(problem.tables(theta, times), group, settings)
    blocks = [
        worker.block(replicate, first, 256)[0][0][:, :256].copy()
        for replicate in (0, 1)
        for first in (0, 256)
    ]
    states = np.concatenate([block[-1] for block in blocks])
    assert len(np.unique(states)) == 1024


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_the_size_of_blocks_changes_rounding_only(monkeypatch, backend):
    settings = {
        "n_steps": 4,
        "n_paths": 600,
        "n_replicates": 4,
        "seed": 5,
        "backend": backend,
    }
    group = every_estimator()
    whole = measure_group("two_modes", group, **settings)
    if backend == "numba":
        monkeypatch.setattr(workers, "BLOCK", 64)
    else:
        monkeypatch.setattr(workers, "TORCH_ELEMENTS", 256)
    parts = measure_group("two_modes", group, **settings)
    for a, b in zip(whole, parts, strict=True):
        # Not the tail index: it is centered at the median of the first block.
        for key in ("mean", "std_error", "variance", "kurtosis"):
            np.testing.assert_allclose(a.row[key], b.row[key], rtol=1e-9, err_msg=key)


def test_both_backends_give_the_same_measurement():
    group = every_estimator()
    ours = measure_group("follmer_mixture", group, seed=6, **SMALL)
    theirs = measure_group("follmer_mixture", group, seed=6, backend="torch", **SMALL)
    for a, b in zip(ours, theirs, strict=True):
        for key in ("mean", "std_error", "variance", "relative_bias", "p_value"):
            np.testing.assert_allclose(a.row[key], b.row[key], rtol=1e-8, err_msg=key)


@pytest.mark.slow
def test_float32_is_close_to_float64():
    for estimator in every_estimator():
        low, high = (
            measure("damped_oscillator", estimator, dtype=dtype, **SMALL).row
            for dtype in ("float32", "float64")
        )
        assert low["dtype"] == "float32"
        np.testing.assert_allclose(
            low["mean"], high["mean"], rtol=1e-3, atol=1e-4 * high["scale"]
        )


# ---- what a row says --------------------------------------------------------
def test_row_is_complete_and_consistent():
    row = measure("damped_oscillator", "pathwise", point="overshoot", **SMALL).row
    problem = registry.problem("damped_oscillator")
    truth = problem.truth
    assert row["status"] == "ok"
    assert row["theta"] == problem.theta("overshoot").tolist()
    assert row["parameter_names"] == list(problem.parameter_names)
    np.testing.assert_array_equal(row["truth"], truth.gradient("overshoot"))
    np.testing.assert_array_equal(row["truth_discrete"], truth.gradient("overshoot", 4))
    mean = np.array(row["mean"])
    np.testing.assert_allclose(row["bias"], mean - row["truth"])
    np.testing.assert_allclose(row["bias_own"], mean - row["truth_discrete"])
    np.testing.assert_allclose(
        row["bias_discretization"], np.subtract(row["truth_discrete"], row["truth"])
    )
    assert np.all(np.less(row["bias_low"], row["bias"]))
    assert np.all(np.less(row["bias"], row["bias_high"]))
    assert row["variance_low"] < row["variance"] < row["variance_high"]
    assert row["mse_low"] <= row["mse"] <= row["mse_high"]
    assert row["relative_variance"] == pytest.approx(
        row["variance"] / row["scale"] ** 2
    )
    assert row["efficiency_evaluations"] == pytest.approx(
        1.0 / (row["mse"] * row["evaluations"] * row["n_paths"])
    )
    assert row["n_replicates"] == 20
    assert row["seconds"] > 0


def test_variance_per_path_is_the_same_for_plain_and_replicate_values():
    """Both scalings of the variance: i.i.d. rows, and replicates times n_paths."""
    none, mean = (
        measure(
            "brownian_linear",
            registry.estimator("reinforce", baseline=baseline),
            point="zero",
            n_steps=3,
            n_paths=16,
            n_replicates=4000,
        ).row
        for baseline in ("none", "leave_one_out")
    )
    # The baseline is zero in mean at this point: nearly the same variance.
    assert mean["variance"] == pytest.approx(none["variance"], rel=0.25)


def test_a_point_may_be_given_as_numbers():
    problem = registry.problem("two_modes")
    given = measure(problem, "pathwise", point=problem.theta("halfway"), **SMALL).row
    named = measure(problem, "pathwise", point="halfway", **SMALL).row
    assert given["mean"] == named["mean"]
    assert given["point"] == "given"


def test_verdicts():
    common = {"n_paths": 256, "n_replicates": 64}
    exact = measure("brownian_linear", "pathwise", point="optimum", **common)
    assert exact.verdict == "unbiased"
    discretized = measure("damped_oscillator", "pathwise", n_steps=5, **common)
    assert discretized.verdict == "discretization bias only"
    coarse = measure("two_modes", "pathwise", n_steps=2, **common)
    assert coarse.verdict == "biased, not split"
    assert coarse.truth_discrete is None
    fine = measure("two_modes", "pathwise", n_steps=200, n_paths=64, n_replicates=64)
    assert fine.verdict == "no bias resolved"


def test_few_samples_of_a_heavy_tail_are_not_called_biased():
    # 128 samples with a tail index near 3: normal theory errs in a fifth of the seeds,
    # and the verdict must know it; with 4096 samples it may be believed.
    small = {"n_steps": 200, "n_paths": 16, "n_replicates": 8}
    rows = [measure("two_modes", "pathwise", seed=s, **small) for s in range(20)]
    assert sum(row.p_value < 0.001 for row in rows) >= 2
    assert all(row.verdict != "biased, not split" for row in rows)


# ---- target and budget ------------------------------------------------------
def test_target_is_reached_and_the_measurement_stops():
    looks = []
    row = measure(
        "damped_oscillator",
        "pathwise",
        n_steps=4,
        n_paths=256,
        n_replicates=4,
        target=0.02,
        progress=lambda done, planned: looks.append((done, planned)),
    ).row
    half = 0.5 * np.subtract(row["bias_high"], row["bias_low"])
    assert np.max(half) <= 0.02 * row["scale"]
    # It stops at the first look that is good enough: half the work was not.
    assert np.max(half) > 0.02 * row["scale"] / 4
    assert row["n_replicates"] > 4
    done = [d for d, _ in looks]
    assert done == [4 * 2**k for k in range(len(done))]
    assert done[-1] == row["n_replicates"]
    # The price of looking more than once.
    assert row["confidence_used"] == pytest.approx(
        1.0 - 0.05 / (len(done) * (len(done) + 1))
    )


def test_target_of_a_group_holds_for_all():
    rows = measure_group(
        "damped_oscillator",
        ["pathwise", "reinforce"],
        n_steps=4,
        n_paths=256,
        n_replicates=4,
        target=0.1,
    )
    for measurement in rows:
        row = measurement.row
        half = 0.5 * np.subtract(row["bias_high"], row["bias_low"])
        assert np.max(half) <= 0.1 * row["scale"]
    assert rows[0].n_replicates == rows[1].n_replicates


def test_target_without_variance_stops_at_the_first_look():
    row = measure(
        "brownian_linear", "pathwise", point="optimum", target=1e-9, n_replicates=2
    ).row
    assert row["n_replicates"] == 2


def test_budget_stops():
    begin = time.monotonic()
    row = measure(
        "damped_oscillator",
        "reinforce",
        n_steps=4,
        n_paths=64,
        n_replicates=2,
        target=1e-9,
        budget=0.3,
    ).row
    spent = time.monotonic() - begin
    half = 0.5 * np.subtract(row["bias_high"], row["bias_low"])
    assert np.max(half) > 1e-9 * row["scale"]
    assert row["n_replicates"] > 2
    # The last look started with half of the budget left; the rest is the exact answer.
    assert spent < 10.0


# ---- failures ---------------------------------------------------------------
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_not_a_number_is_reported_and_the_neighbours_survive(backend):
    settings = SMALL | {"backend": backend}
    with pytest.raises(NumericalError, match="NaN or infinity"):
        measure("damped_oscillator", NotFinite(), **settings)
    good, bad, other = measure_group(
        "damped_oscillator",
        ["pathwise", NotFinite(), "path_importance_sampling"],
        **settings,
    )
    assert bad.status == "failed"
    assert "NotFinite" in bad.reason
    assert "\n" not in bad.reason
    assert not hasattr(bad, "mean")
    bad.to_frame()
    alone = measure("damped_oscillator", "pathwise", **settings)
    assert stable(good.row) == stable(alone.row)
    assert other.status == "ok"


def test_not_a_number_does_not_hold_up_a_target():
    good, bad = measure_group(
        "damped_oscillator",
        ["pathwise", NotFinite()],
        backend="torch",
        n_steps=3,
        n_paths=64,
        n_replicates=4,
        target=0.5,
    )
    assert good.status == "ok"
    assert bad.status == "failed"


def test_overflow_of_a_simulation_is_a_numerical_error():
    with pytest.raises(NumericalError, match="theta closer to"):
        measure("brownian_linear", "pathwise", point=[1e200, 0.0, 0.0], **SMALL)


@pytest.mark.parametrize(
    ("name", "theta"),
    [
        ("two_modes", [1e200, 0.0]),
        ("gaussian_tilt", [1e160, 0.0]),
        ("damped_oscillator", [-300.0, 0.0, 0.0]),
    ],
)
def test_overflow_of_the_exact_answer_is_a_numerical_error(name, theta):
    with pytest.raises(NumericalError, match=r"exact objective .* theta closer to"):
        measure(name, "pathwise", point=theta, **SMALL)


def test_not_applicable_comes_with_the_reason():
    with pytest.raises(NotApplicableError, match="at least 2 paths per replicate"):
        measure("brownian_linear", "reinforce", n_steps=2, n_paths=1)
    with pytest.raises(NotApplicableError, match="even number"):
        measure("brownian_linear", "reinforce:baseline=optimal", n_steps=2, n_paths=5)
    with pytest.raises(NotApplicableError, match="it never is"):
        measure("brownian_linear", Choosy(), backend="torch", **SMALL)
    rows = measure_group(
        "brownian_linear", ["reinforce", "pathwise"], n_steps=2, n_paths=1
    )
    assert [m.status for m in rows] == ["not applicable", "ok"]
    assert "compares paths" in rows[0].reason


def test_torch_only_estimators_need_the_torch_backend():
    class Plain(TorchOnly):
        def statistics(self, view):
            return view.control_parameter_vjp(0, *[view.rollout().states[0]] * 2)

    with pytest.raises(NotApplicableError, match="use backend torch"):
        measure("brownian_linear", Plain(), **SMALL)
    assert measure("brownian_linear", Plain(), backend="torch", **SMALL).status == "ok"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "jax"}, "numba, torch"),
        ({"backend": "numb"}, "numba"),
        ({"dtype": "float16"}, "float"),
        ({"scheme": "heun"}, "euler_maruyama, exponential"),
        ({"point": "half"}, "halfway"),
        ({"point": [1.0]}, "zero, halfway, optimum, overshoot"),
        ({"n_paths": 0}, "n_paths 0 must be a whole number >= 1"),
        ({"n_paths": 2.5}, "n_paths 2.5 must be a whole number >= 1"),
        ({"n_paths": True}, "n_paths True must be"),
        ({"n_replicates": 1}, "n_replicates 1 must be a whole number >= 2"),
        ({"threads": 0}, "threads 0 must be"),
        ({"seed": -1}, "seed -1 must be a whole number >= 0"),
        ({"seed": 2**64}, "seed"),
        ({"n_steps": 0}, "at least 1"),
        ({"n_steps": [0.0, 0.5]}, "increasing times from 0 to 2"),
        ({"target": 0.0}, "positive ratio"),
        ({"target": math.nan}, "positive ratio"),
        ({"target": math.inf}, "positive ratio"),
        ({"budget": -1.0}, "positive number of seconds"),
        ({"device": "cuda"}, "needs backend 'torch'"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message):
    with pytest.raises((ParameterError, UnknownNameError)) as caught:
        measure("damped_oscillator", "pathwise", **SMALL | settings)
    assert isinstance(caught.value, SDEBenchError)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"n_paths": math.inf}, {"n_replicates": math.nan}, {"n_paths": "9"}]
)
def test_settings_that_are_no_numbers_are_refused(settings):
    (name,) = settings
    with pytest.raises(ParameterError, match=name):
        measure("damped_oscillator", "pathwise", **SMALL | settings)


def test_unknown_problems_estimators_and_settings():
    with pytest.raises(UnknownNameError, match="two_modes"):
        measure("two_mods", "pathwise")
    with pytest.raises(UnknownNameError, match="pathwise"):
        measure("two_modes", "pathwse")
    with pytest.raises(TypeError, match="n_path"):
        measure("two_modes", "pathwise", n_path=3)


# ---- coverage end to end ----------------------------------------------------
COVERAGE_FALSE_ALARM = 1e-4
SEEDS = 200


@pytest.mark.parametrize("name", ["brownian_linear", "damped_oscillator"])
def test_intervals_of_the_own_bias_cover_the_exact_answer(name):
    """200 seeds: simultaneous 95 % intervals, binomial bound at 1e-4 for all tests.

    Bonferroni and Hotelling are conservative, so only the lower bound is tested; the
    p-values below 5 % are counted by the same bound.  Intervals of 0.6 times the width
    would be refused.
    """
    problem = registry.problem(name)
    group = [
        registry.estimator("pathwise"),
        registry.estimator("adjoint_matching"),
        registry.estimator("reinforce", baseline="none"),
        registry.estimator("reinforce"),
    ]
    covered = np.zeros(len(group), int)
    rejected, narrow = np.zeros_like(covered), np.zeros_like(covered)
    for seed in range(SEEDS):
        rows = measure_group(
            problem,
            group,
            point="overshoot",
            n_steps=3,
            n_paths=64,
            n_replicates=40,
            seed=10_000 + seed,
        )
        for i, measurement in enumerate(rows):
            row = measurement.row
            low, high = np.array(row["bias_own_low"]), np.array(row["bias_own_high"])
            slack = 1e-12 * row["scale"]  # offset components have no variance
            covered[i] += bool(np.all((low <= slack) & (high >= -slack)))
            rejected[i] += row["p_value_own"] < 0.05
            half = 0.5 * (high - low)
            narrow[i] += bool(np.all(np.abs(row["bias_own"]) <= 0.6 * half + slack))
    tests = 2 * 2 * len(group)
    least = binom.ppf(COVERAGE_FALSE_ALARM / tests, SEEDS, 0.95)
    assert np.all(covered >= least)
    assert np.all(rejected <= binom.isf(COVERAGE_FALSE_ALARM / tests, SEEDS, 0.05))
    if name == "damped_oscillator":  # every component has variance there
        assert np.all(narrow < least)


@pytest.mark.slow
def test_intervals_cover_after_optional_stopping():
    """Stopping at a target decided from the data keeps the nominal coverage."""
    covered = 0
    for seed in range(SEEDS):
        row = measure(
            "damped_oscillator",
            "pathwise",
            point="overshoot",
            n_steps=3,
            n_paths=64,
            n_replicates=4,
            target=0.1,
            seed=30_000 + seed,
        ).row
        low, high = np.array(row["bias_own_low"]), np.array(row["bias_own_high"])
        covered += bool(np.all((low <= 0.0) & (high >= 0.0)))
    assert covered >= binom.ppf(COVERAGE_FALSE_ALARM, SEEDS, 0.95)


# ---- memory -----------------------------------------------------------------
def test_peak_memory_sees_an_allocation():
    with PeakMemory() as memory:
        block = np.ones(8_000_000)
        del block
    assert 60e6 < memory.bytes < 200e6
    with PeakMemory() as memory:
        pass
    assert memory.bytes < 20e6


def test_memory_does_not_grow_with_the_number_of_paths():
    measure("two_modes", "pathwise", n_steps=10, n_paths=64, n_replicates=2)
    row = measure(
        "two_modes", "pathwise", n_steps=10, n_paths=200_000, n_replicates=2
    ).row
    # All states of all paths would take 18 MB, with noise and controls 50 MB.
    assert row["peak_memory_bytes"] < 12e6


def test_abstract_classes_cannot_be_built():
    for base in (Estimator, Problem):
        with pytest.raises(TypeError, match="abstract"):
            base()
