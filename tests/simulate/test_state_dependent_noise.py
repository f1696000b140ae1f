"""Noise that depends on the state: kernels, torch, and every estimator on it.

An estimator either handles such noise, then its mean is the exact one of the N-step
chain, or says that it does not.  New estimators are covered as they are.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import torch

from sdebench import registry
from sdebench.errors import NotApplicableError
from sdebench.estimator import Estimator
from sdebench.measure.cell import make_request, measure_group, refusal
from sdebench.measure.intervals import bias_test
from sdebench.simulate.noise import split_seed
from sdebench.simulate.primitives import prepare, workspace
from sdebench.simulate.separable import noise_factor
from sdebench.simulate.tables import noise_depends_on_state
from sdebench.simulate.tile import lanes, load, path_kernel, store
from sdebench.simulate.torch_family import torch_family
from sdebench.view import View

EXACT = "geometric_brownian_power", "cir_exponential"
PEARSON = (*EXACT, "jacobi_polynomial")
FALSE_ALARM = 1e-3
N_STEPS, N_PATHS, N_REPLICATES = 6, 512, 128


def every_estimator():
    return [
        registry.estimator(name, **variant)
        for name in registry.estimator_names()
        for variant in type(registry.estimator(name)).variants
    ]


def view_of(problem, point="overshoot", n_steps=8, n_paths=5):
    times, theta = problem.time_grid(n_steps), problem.theta(point)
    tables = problem.tables(theta, times)
    address = {"key": split_seed(7), "replicate": 1, "first_path": 0}
    return View(tables, times, theta, n_paths=n_paths, **address)


# ---- the factor of the noise ---------------------------------------------------------


@path_kernel
def factors(v, X, S, SLOPE, B):
    for i in range(v.shape[0]):
        for p in range(0, B, lanes(X)):
            s, slope = noise_factor(v, i, load(X, i, p))
            store(S, i, p, s)
            store(SLOPE, i, p, slope)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_factor_and_slope_in_kernels_and_in_torch(dtype):
    """Roots of quadratics and their derivatives; both are 0 where a variance is < 0."""
    problem = registry.problem("jacobi_polynomial", dim=2)
    tables = problem.tables(None, problem.time_grid(2))
    x = np.linspace(-0.5, 1.5, 64)
    X = np.zeros((2, 80), dtype)
    X[:, :64] = x
    S, slope = np.zeros_like(X), np.zeros_like(X)
    factors(prepare(tables, dtype).variance, X, S, slope, 64)
    variance = np.maximum(x * (1.0 - x), 0.0)
    inside = variance > 0.0
    wanted = np.zeros(64)
    wanted[inside] = (0.5 - x[inside]) / np.sqrt(variance[inside])
    tolerance = 1e-13 if dtype == "float64" else 2e-5
    np.testing.assert_allclose(S[0, :64], np.sqrt(variance), rtol=tolerance, atol=1e-12)
    np.testing.assert_allclose(slope[1, :64], wanted, rtol=10 * tolerance, atol=1e-12)
    family = torch_family(tables, "float64", "cpu")
    state = torch.tensor(np.stack([x, x], axis=1), requires_grad=True)
    root = family._factor(state)
    (gradient,) = torch.autograd.grad(root.sum(), state)
    np.testing.assert_allclose(root.detach()[:, 0], np.sqrt(variance), atol=1e-14)
    np.testing.assert_allclose(gradient[:, 1], wanted, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(family._factor_slope(state.detach())[:, 0], wanted)


def test_a_kernels_step_is_the_table_outside_of_the_interval_too():
    from sdebench.simulate import primitives
    from sdebench.simulate.jit import kernel

    @kernel
    def one_step(prepared, work, X, W, Z, Y, totals, B):
        primitives.evaluate(prepared, work, 0, X, W, B)
        primitives.step(prepared, work, 0, X, W, Z, Y, totals, B)

    problem = registry.problem("jacobi_polynomial", dim=2)
    tables = problem.tables(problem.theta("overshoot"), problem.time_grid(3))
    prepared = prepare(tables, "float64")
    rng = np.random.default_rng(1)
    X, Z = rng.uniform(-0.4, 1.4, (2, 32)), rng.normal(size=(2, 32))
    X, Z = (np.pad(a, [(0, 0), (0, 16)]) for a in (X, Z))
    W, Y, totals = np.zeros_like(X), np.zeros_like(X), np.zeros((4, 48))
    one_step(prepared, workspace(prepared, 32), X, W, Z, Y, totals, 32)
    family = torch_family(tables, "float64", "cpu")
    x, z = (torch.tensor(a[:, :32].T.copy()) for a in (X, Z))
    w = family.control(0, x)
    y = family.base_mean(0, x) + family.apply_noise(0, w + z, x)
    np.testing.assert_allclose(Y[:, :32].T, y, rtol=1e-13, atol=1e-14)
    outside = (X[0, :32] < 0.0) | (X[0, :32] > 1.0)
    assert outside.sum() > 5
    moved = tables.base[0, 0, 0] + tables.base[0, 0, 1] * X[0, :32]
    np.testing.assert_allclose(Y[0, :32][outside], moved[outside], atol=1e-15)
    np.testing.assert_allclose(totals[0, :32], (w * w).sum(1), rtol=1e-12)
    np.testing.assert_allclose(totals[2, :32], (w * z).sum(1), rtol=1e-10, atol=1e-13)


# ---- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize("name", PEARSON)
def test_the_view_asks_for_the_state(name):
    """Nothing is computed without it: one clear sentence each."""
    view = view_of(registry.problem(name))
    x, v = view.start(), torch.ones(5, 1, dtype=torch.float64)
    for call, hint in [
        (lambda: view.apply_noise(0, v), "apply_noise"),
        (lambda: view.noise_transpose(0, v), "noise_transpose"),
        (lambda: view.base_vjp(0, x, v), "base_vjp"),
    ]:
        with pytest.raises(NotApplicableError, match=hint) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_constant_noise_needs_no_state():
    view = view_of(registry.problem("ou_polynomial"))
    x, v = view.start(), torch.ones(5, 2, dtype=torch.float64)
    pairs = [
        (view.apply_noise(0, v), view.apply_noise(0, v, x)),
        (view.noise_transpose(0, v), view.noise_transpose(0, v, x)),
        (view.base_vjp(0, x, v), view.base_vjp(0, x, v, v, x)),
    ]
    for short, long in pairs:
        torch.testing.assert_close(short, long, rtol=0, atol=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OldPathwise(Estimator):
    """Written before there was noise that depends on the state."""

    estimand: ClassVar[str] = "gradient"

    def statistics(self, view):
        paths = view.rollout()
        costate = -view.reward_gradient(paths.states[-1])
        total = costate.new_zeros(view.n_paths, view.n_params)
        for n in reversed(range(view.n_steps)):
            x = paths.states[n]
            v = paths.controls[n] + view.noise_transpose(n, costate)
            total = total + view.control_parameter_vjp(n, x, v)
            costate = view.base_vjp(n, x, costate) + view.control_vjp(n, x, v)
            costate = costate + view.running_cost_gradient(n, x)
        return total


def test_an_estimator_that_does_not_say_so_is_refused_in_one_line():
    settings = {"n_steps": 4, "n_paths": 32, "n_replicates": 4, "backend": "torch"}
    (row,) = measure_group("cir_exponential", [OldPathwise()], **settings)
    assert row.status == "not applicable"
    assert "depends on the state" in row.reason
    assert "\n" not in row.reason
    (row,) = measure_group("ou_polynomial", [OldPathwise()], **settings)
    assert row.status == "ok"


HANDLED = {
    *("adjoint_matching", "antithetic", "control_variate", "cross_entropy", "grpo"),
    *("log_variance", "moment", "multilevel", "non_adapted_adjoint", "opd"),
    *("path_importance_sampling", "pathwise", "ppo_clip", "quasi_random", "reinforce"),
    *("subspace_gradient", "truncated", "variance", "zeroth_order"),
    "adaptive_importance_sampling",
}
"""Where the derivation was done: a new estimator is not among them by accident."""


@pytest.mark.parametrize("name", PEARSON)
def test_which_estimators_run(name):
    request = make_request(name, n_paths=512, n_steps=8)
    assert noise_depends_on_state(request.base_tables)
    runs = {e.name for e in every_estimator() if refusal(request, e) is None}
    assert runs == HANDLED


# ---- every estimator -----------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_means_are_the_exact_ones_of_the_chain(name):
    """All variants of all estimators with an exact N-step answer and no own bias."""
    chosen = [
        e
        for e in every_estimator()
        if not e.has_target
        and e.declared_bias == "none"
        and e.label != "reinforce:baseline=mean"  # by 1 - 1/n_paths
    ]
    rows = measure_group(
        name,
        chosen,
        n_steps=N_STEPS,
        n_paths=N_PATHS,
        n_replicates=N_REPLICATES,
        seed=12,
    )
    tested = [m.row for m in rows if m.row["status"] == "ok"]
    assert len(tested) >= 20
    for row in tested:
        if row["estimand"] == "log_normalizer":
            variance = np.square(row["std_error"]) * row["n_replicates"]
            allowed = row["variance"] / row["n_paths"] + 1e-12
            numbers = row["mean"], row["target"], variance, row["n_replicates"]
            p_value = bias_test(*numbers, allowed).p_value
        else:
            p_value = row["p_value_own"]
        level = FALSE_ALARM / (len(EXACT) * len(tested))
        assert p_value > level, row["estimator_label"]


@pytest.mark.parametrize("name", EXACT)
def test_an_adjoint_without_the_noises_derivative_would_show(name, monkeypatch):
    """The mutant of the test above, at the same size."""
    from sdebench.simulate.torch_family import TorchSeparable

    monkeypatch.setattr(
        TorchSeparable, "_factor_slope", lambda self, x: torch.zeros_like(x)
    )
    rows = measure_group(
        name,
        ["pathwise", "adjoint_matching"],
        n_steps=N_STEPS,
        n_paths=N_PATHS,
        n_replicates=N_REPLICATES,
        seed=12,
        backend="torch",
    )
    for row in rows:
        assert row.p_value_own < 1e-9, row.estimator_label
