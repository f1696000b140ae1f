"""`check_estimator`: wrong estimators are caught, right ones pass, nothing is lost.

The seeds are fixed.  Every check of the bias has the false-alarm rate 0.1 %, and six
right estimators are checked: the tests of this file would fail by chance with
probability below 1 % had the seeds been drawn anew, and do not with these.
"""

from __future__ import annotations

import functools
import json
import pickle
import time

import numpy as np
import pytest
import torch
from _mutants import CORRECT, MUTANTS, Score, TorchOnly

import sdebench
from sdebench.errors import NotApplicableError, SDEBenchError, UnknownNameError
from sdebench.validate import check_estimator
from sdebench.validate.estimator import CHECK_NAMES
from sdebench.view import DERIVATIVES

SMALL = ("brownian_linear", "damped_oscillator")
QUICK = {"paths": 0.125, "time_limit": None, "on_fail": "report"}


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@functools.cache
def quick(estimator, problems=("brownian_linear",), **settings):
    return check_estimator(estimator, problems=problems, **(QUICK | settings))


def failed(report):
    return [check.name for check in report.checks if check.status == "failed"]


# ---- power and false alarms ---------------------------------------------------------


@pytest.mark.parametrize("estimator", CORRECT, ids=lambda e: e.__name__)
def test_correct_estimators_pass(estimator):
    report = quick(estimator, SMALL)
    assert failed(report) == []
    assert report.passed
    assert report.check("unbiased").details["cells"] == 16


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda e: e.__name__)
def test_every_mutant_is_caught_by_its_bias_alone(mutant):
    problem = MUTANTS[mutant][0]
    report = quick(mutant, (problem,))
    assert failed(report) == ["unbiased"]
    assert "biased in" in report.check("unbiased").message or (
        "together" in report.check("unbiased").message
    )


def test_the_detectable_bias_is_honest():
    """A gradient scaled by 1 + 1.5 times the stated size is found in that very cell."""
    clean = quick(Score)
    cell = min(clean.rows, key=lambda row: row["detectable_bias"])
    size = 1.5 * cell["detectable_bias"]

    class Scaled(Score):
        def statistics(self, view):
            return (1.0 + size) * super().statistics(view)

    row = next(
        row
        for row in check_estimator(Scaled, problems="brownian_linear", **QUICK).rows
        if all(row[k] == cell[k] for k in ("point", "n_steps", "dtype"))
    )
    assert row["p_value"] < row["significance"]
    assert row["relative_bias_low"] < size < row["relative_bias_high"]


def test_a_declared_bias_is_measured_and_not_held_against_it():
    class Declared(Score):
        declared_bias = "any"
        reward_sign = -1.0

    report = quick(Declared)
    assert report.passed
    assert report.check("unbiased").status == "skipped"
    assert "declares a bias; found in" in report.check("unbiased").message
    assert "found in 0" not in report.check("unbiased").message


def test_a_bias_of_order_one_over_n_paths_is_removed_where_declared():
    class Declared(MUTANT_OWN_PATH):
        declared_bias = "1/n_paths"

    assert quick(Declared).passed
    assert not quick(MUTANT_OWN_PATH).passed


MUTANT_OWN_PATH = next(m for m in MUTANTS if m.__name__ == "OwnPathBaseline")


@pytest.mark.slow
def test_estimators_without_exact_answer_are_compared_with_a_built_in():
    report = quick(Score, ("two_modes",))
    assert {row["reference"] is None for row in report.rows} == {False}
    assert report.check("unbiased").details["cells"] == len(report.rows)

    class Wrong(Score):
        direct_weight = 0.0

    assert failed(quick(Wrong, ("two_modes",))) == ["unbiased"]


@pytest.mark.slow
def test_what_cannot_be_tested_is_neither_passed_nor_failed():
    """Adjoint matching off the optimum has no exact answer on a mixture."""
    report = check_estimator("adjoint_matching", problems="two_modes", **QUICK)
    assert report.passed
    assert report.check("unbiased").status == "skipped"
    assert "could not be tested anywhere: no exact answer" in str(report)


def test_log_weights_that_overflow_are_refused():
    class Huge(CORRECT[-1]):
        def statistics(self, view):
            return super().statistics(view) + 800.0

    assert CORRECT[-1].__name__ == "Weights"
    report = quick(Huge)
    assert "completes" in failed(report)
    assert "above log Z" in report.check("completes").message


def test_a_problem_given_as_a_file_is_the_one_that_is_used(tmp_path):
    from sdebench.validate import write_new

    path = write_new("problem", "my_problem", tmp_path).rename(
        tmp_path / "two_modes.py"  # a name that the catalogue has, too
    )
    report = check_estimator(Score, problems=str(path), **QUICK)
    assert report.passed
    assert {row["problem"] for row in report.rows} == {str(path)}
    assert all(row["reference"] is None for row in report.rows)


def test_samples_too_skewed_to_say_are_a_note():
    """Wrong weights of infinite variance: it looks biased, and nothing is proved."""
    mutant = next(m for m in MUTANTS if m.__name__ == "WeightsMartingaleSign")
    report = quick(mutant)
    assert report.passed
    assert report.check("unbiased").status == "note"
    assert "too skewed to say" in str(report)


# ---- the interface ------------------------------------------------------------------


class Mutating(Score):
    def statistics(self, view):
        rows = super().statistics(view)
        view.rollout().states[1].mul_(1.5)
        return rows


class Single(Score):
    def statistics(self, view):
        return super().statistics(view).float()


class Random(Score):
    def statistics(self, view):
        rows = super().statistics(view)
        return rows + torch.randn_like(rows)


class Stateful(Score):
    def statistics(self, view):
        _calls.append(1)
        return super().statistics(view) * len(_calls)


_calls: list[int] = []


class Coupled(Score):
    def statistics(self, view):
        rows = super().statistics(view)
        return rows - rows.mean(0)


class WrongShape(Score):
    def statistics(self, view):
        return super().statistics(view).mean(0)


class Array(Score):
    def statistics(self, view):
        return super().statistics(view).numpy()


class Undeclared(Score):
    def statistics(self, view):
        view.reward_gradient(view.rollout().states[-1])
        return super().statistics(view)


class Secretly(Score):
    """The reward's gradient by automatic differentiation: found as well."""

    def statistics(self, view):
        with torch.enable_grad():
            x = view.rollout().states[-1].clone().requires_grad_(True)
            torch.autograd.grad(view.reward(x).sum(), x)
        return super().statistics(view)


class Forward(Score):
    """The same in forward mode."""

    def statistics(self, view):
        x = view.rollout().states[-1]
        torch.func.jvp(view.reward, (x,), (torch.ones_like(x),))
        return super().statistics(view)


class WrongWord(Score):
    declared_bias = "1/n"


class WrongControl(Score):
    control = "thetaa"


class WrongNeed(Score):
    needs = frozenset({"drift"})


class WrongReduction(Score):
    reduction = "log_mean_exp"


class Graph(Score):
    def statistics(self, view):
        with torch.enable_grad():
            return super().statistics(view) * torch.ones(1).requires_grad_(True)


class NotANumber(Score):
    def statistics(self, view):
        return super().statistics(view) * torch.nan


class Raises(Score):
    def statistics(self, view):
        raise ValueError("my own mistake")


class Elsewhere(Score):
    estimand = "graident"


class WrongCombine(Score):
    def combine(self, mean, n_paths):
        return mean[:1]


class NoGradient(Score):
    def statistics(self, view):
        return torch.autograd.grad(view.rollout().cost.sum(), view.rollout().states[0])


INTERFACE = {
    NoGradient: ("completes", r"open torch.enable_grad\(\)"),
    Mutating: ("inputs_unchanged", "work on copies"),
    Single: ("dtype", "float32 where the view is torch.float64"),
    Random: ("deterministic", "view.noise"),
    Stateful: ("deterministic", "no state"),
    Coupled: ("paths_independent", "compare paths in combine"),
    WrongShape: ("interface", r"shape \(3,\); expected \(8, 3\)"),
    Array: ("interface", "returned ndarray, not a torch.Tensor"),
    Undeclared: ("declared_needs", "the gradient of the reward without declaring"),
    Secretly: ("declared_needs", "the gradient of the reward without declaring"),
    Graph: ("dtype", "detach"),
    NotANumber: ("finite", "NaN or infinite"),
    Raises: ("completes", "ValueError: my own mistake .*test_check_estimator.py, line"),
    Forward: ("declared_needs", "the gradient of the reward without declaring"),
    Elsewhere: ("interface", "unknown estimand 'graident'; did you mean gradient"),
    WrongWord: ("interface", "unknown declared bias '1/n'; did you mean 1/n_paths"),
    WrongControl: ("interface", "unknown control 'thetaa'; did you mean theta"),
    WrongNeed: ("interface", "unknown needs 'drift'; did you mean drift_vjp"),
    WrongReduction: ("interface", "log_mean_exp gives log Z"),
    WrongCombine: ("combine", r"shape \(1,\)"),
}


@pytest.mark.parametrize("wrong", INTERFACE, ids=lambda e: e.__name__)
def test_each_breach_of_the_interface_is_one_clear_line(wrong):
    name, message = INTERFACE[wrong]
    report = quick(wrong)
    check = report.check(name)
    assert check.status == "failed"
    assert name in failed(report)
    with pytest.raises(AssertionError, match=message):
        report.raise_if_failed()
    assert "\n" not in check.message
    assert bool(check.traceback) == (name == "completes")
    assert check.message.split()[0] in str(report)


def test_an_unused_need_is_a_note():
    class Generous(Score):
        needs = frozenset({"control_parameter_vjp", "drift_vjp"})

    report = quick(Generous)
    assert report.passed
    assert report.check("declared_needs").status == "note"
    text = " ".join(str(report).split())
    assert "declares drift_vjp and used it on none of these problems" in text


def test_an_estimator_that_refuses_a_problem_is_not_judged_there():
    class Picky(Score):
        def statistics(self, view):
            if view.dim > 1:
                raise NotApplicableError("it is made for one dimension")
            return super().statistics(view)

    report = quick(Picky, SMALL)
    assert report.passed
    assert "not applicable: it is made for one dimension" in str(report)
    assert {row["problem"] for row in report.rows} == {"brownian_linear"}

    class Choosy(Score):
        def not_applicable(self, n_paths):
            return "it never is"

    report = quick(Choosy)
    assert failed(report) == ["completes"]
    assert "no cell was measured" in report.check("unbiased").message
    assert "not applicable to any problem: it never is" in str(report)


class ByAutomaticDifferentiation(TorchOnly):
    """The example in the docstring of `sdebench.view`."""

    needs = frozenset(DERIVATIVES)

    def statistics(self, view):
        states = []
        with torch.enable_grad():
            x, cost, zeros = view.start(), 0.0, []
            for n in range(view.n_steps):
                zeros.append(torch.zeros_like(x, requires_grad=True))
                w = view.control(n, x) + zeros[n]
                cost = cost + 0.5 * (w * w).sum(1) + view.running_cost(n, x)
                states.append(x.detach())
                x = view.base_mean(n, x) + view.apply_noise(n, w + view.noise(n), x)
            slopes = torch.autograd.grad((cost - view.reward(x)).sum(), zeros)
        return sum(
            view.control_parameter_vjp(n, states[n], v) for n, v in enumerate(slopes)
        )


def test_automatic_differentiation_gives_the_pathwise_gradient():
    report = check_estimator(
        ByAutomaticDifferentiation, problems=("ou_quadratic_easy:dim=2",), **QUICK
    )
    assert failed(report) == []
    same = "pathwise", "adjoint_matching:adjoint=full"  # one estimator, two sweeps
    ratios = [r["variance_ratio"] for r in report.rows if r["competitor"] in same]
    assert ratios
    assert ratios == pytest.approx([1.0] * len(ratios), rel=1e-9)


# ---- the kernel ---------------------------------------------------------------------


def test_a_kernel_is_compared_path_by_path():
    from sdebench.estimators.reinforce import Reinforce

    class WrongKernel(Reinforce):
        """A torch function that is right and a kernel with the baseline of another."""

        name = "wrong_kernel"

        @property
        def kernel_options(self):
            return (0, *super().kernel_options[1:])

        def n_statistics(self, n_params):
            return n_params

        def statistics(self, view):
            return 1.01 * super().statistics(view)[:, : view.n_params]

        def combine(self, mean, n_paths):
            return mean

    report = quick(WrongKernel)
    assert report.backend == "torch"
    assert "kernel_agrees" in failed(report)
    assert "differ by 0.0" in report.check("kernel_agrees").message
    right = quick("reinforce:baseline=none", ("brownian_linear",))
    assert right.backend == "numba"
    assert right.check("kernel_agrees").status == "passed"
    assert right.passed


def _writes_into_states(prepared, work, X, Z, W, totals, B, OUT):
    X[1] *= 1.5
    OUT[:] = 1.0


def _not_a_number(prepared, work, X, Z, W, totals, B, OUT):
    OUT[:] = np.nan


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (_writes_into_states, "wrote into states, which other estimators share"),
        (_not_a_number, "the kernel returned NaN or infinity"),
    ],
)
def test_a_kernel_that_breaks_the_rules_is_refused(kernel, message):
    class Breaking(Score):
        block_kernel = staticmethod(kernel)

    report = quick(Breaking)
    assert report.backend == "torch"
    assert failed(report) == ["kernel_agrees"]
    assert message in report.check("kernel_agrees").message


# ---- a pool of processes ------------------------------------------------------------


class Endless(Score):
    def statistics(self, view):
        while view.dim == 2 and view.n_steps == 80:
            time.sleep(0.01)
        return super().statistics(view)


@pytest.mark.slow
def test_a_cell_that_never_ends_is_ended_and_the_rest_goes_on():
    report = check_estimator(
        Endless, problems=SMALL, paths=0.01, jobs=2, time_limit=10, on_fail="report"
    )
    check = report.check("completes")
    assert check.status == "failed"
    assert "still running after 10 s" in check.message
    ended = [f for f in check.details["failed"] if f["status"] == "timed out"]
    assert all("damped_oscillator" in f["cell"] for f in ended)
    assert len(report.rows) + len(ended) == 16


class Crashing(Score):
    def statistics(self, view):
        import os

        if view.dim == 2:
            os._exit(7)
        return super().statistics(view)


@pytest.mark.slow
def test_a_crash_takes_no_other_cell_with_it():
    report = check_estimator(
        Crashing, problems=SMALL, paths=0.01, jobs=2, on_fail="report"
    )
    assert "its process died (exit code 7)" in report.check("completes").message
    assert {row["problem"] for row in report.rows} == {"brownian_linear"}


@pytest.mark.slow
def test_processes_give_the_same_numbers():
    settings = {"problems": "brownian_linear", "paths": 0.02, "on_fail": "report"}
    here = check_estimator(Score, time_limit=None, **settings)
    there = check_estimator(Score, jobs=2, **settings)
    for one, two in zip(here.rows, there.rows, strict=True):
        assert one["p_value"] == two["p_value"]
        assert one["bias"] == two["bias"]


# ---- what is returned ---------------------------------------------------------------


def test_the_report_can_be_read_stored_and_sent():
    report = quick(Score, SMALL)
    assert [check.name for check in report.checks] == list(CHECK_NAMES)
    assert len(report.frame) == 16
    text = str(report)
    assert text == repr(report)
    assert "passed" in text
    assert "{" not in text
    assert "in the sharpest, " in text
    assert "False-alarm rate of the whole bias test: 0.1 %" in text
    assert str(pickle.loads(pickle.dumps(report))) == text
    values = json.loads(json.dumps(report.to_dict(), default=float))
    assert values["passed"] is True
    with pytest.raises(UnknownNameError, match="unbiased"):
        report.check("unbaised")


def test_a_failed_check_raises_with_every_name():
    with pytest.raises(sdebench.ValidationError, match="unbiased: biased") as caught:
        check_estimator(
            next(iter(MUTANTS)),
            problems="damped_oscillator",
            **(QUICK | {"on_fail": "raise"}),
        )
    assert not caught.value.report.passed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_fail": "ignore"}, "raise or report|choose from raise, report"),
        ({"false_alarm": 0.0}, "false_alarm"),
        ({"paths": -1.0}, "paths"),
        ({"problems": "ou_lineer"}, "did you mean ou_linear"),
        ({"problems": []}, "problems is empty"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(SDEBenchError, match=message):
        check_estimator(Score, **settings)


def test_what_cannot_be_built_is_refused():
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Needy(Score):
        size: int

    with pytest.raises(SDEBenchError, match="give every option a default"):
        check_estimator(Needy)
    with pytest.raises(SDEBenchError, match="not an estimator"):
        check_estimator(dict)
    with pytest.raises(SDEBenchError, match="TorchOnly lacks statistics"):
        check_estimator(TorchOnly)
    assert quick(Needy(size=1)).passed


# ---- pytest -------------------------------------------------------------------------


@sdebench.parametrize_with_checks(
    [Score], problems=["brownian_linear"], paths=0.125, time_limit=None
)
def test_the_decorator_makes_one_test_per_check(estimator, check):
    assert estimator is Score
    check(estimator)


def test_the_decorator_fails_the_failing_check_only():
    mark = sdebench.parametrize_with_checks([Undeclared], **QUICK_DECORATOR)
    outcomes = {}
    for case in mark.args[1]:
        estimator, check = case.values
        try:
            check(estimator)
        except sdebench.ValidationError as error:
            outcomes[repr(check)] = str(error)
        except pytest.skip.Exception:
            pass
    assert list(outcomes) == ["declared_needs"]
    assert "Undeclared" in outcomes["declared_needs"]
    with pytest.raises(SDEBenchError, match="no estimator"):
        sdebench.parametrize_with_checks([])


QUICK_DECORATOR = {
    "problems": ["brownian_linear"],
    "paths": 0.125,
    "time_limit": None,
}


def test_samples_of_a_cell_are_those_of_its_own_noise():
    """Different cells have different noise: their p-values are independent."""
    rows = quick(Score, SMALL).rows
    seeds = {
        sdebench.validate.cells.ValidationCell(
            **{
                name: row[name]
                for name in sdebench.validate.cells.ValidationCell.__annotations__
            }
        ).noise_seed
        for row in rows
    }
    assert len(seeds) == len(rows) == 16
    assert all(np.isfinite(row["p_value"]) for row in rows)
