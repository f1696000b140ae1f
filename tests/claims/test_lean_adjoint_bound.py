"""The claim about the lean adjoint's size: recursion, planted evidence, a small run.

No path of log-concave data may exceed the bound; the shares of the mixtures are far
from their limit, so that nothing here depends on the seed but with probability < 1e-9.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdebench import claims
from sdebench.claims import lean_adjoint_bound as module
from sdebench.simulate.paths import simulate

CLAIM = claims.claim("lean_adjoint_bound")


@pytest.fixture(scope="module")
def evidence():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 512)
        patch.setattr(module, "N_BLOCKS", 2)
        patch.setattr(module, "N_PATHS", 1024)
        return CLAIM.experiment(3, lambda done, total: None)


def test_a_small_experiment_is_supported(evidence):
    assert CLAIM.decide(evidence).verdict == "supported"
    assert all(axes.has_data() for axes in CLAIM.figure(evidence).axes)
    assert len(CLAIM.table(evidence)) == module.N_CASES


def _paths(frame, kind):
    return frame["part"].eq("paths") & frame["kind"].eq(kind)


def _one_path_above(frame):
    where = np.flatnonzero(_paths(frame, module.LOG_CONCAVE))[0]
    frame.loc[frame.index[where], "largest"] = 1.001
    return frame


def _gaussian_below(frame):
    frame.loc[_paths(frame, module.GAUSSIAN), "smallest"] = 0.99
    return frame


def _half_an_order(frame):
    frame.loc[_paths(frame, module.LOG_CONCAVE), "order"] = 0.5
    return frame


def _mixtures_obey(frame):
    frame.loc[_paths(frame, module.MIXTURE), ["value", "low", "high"]] = 0.0
    return frame


@pytest.mark.parametrize(
    "turn", [_one_path_above, _gaussian_below, _half_an_order, _mixtures_obey]
)
def test_reversed_evidence_is_refuted(evidence, turn):
    assert CLAIM.decide(turn(evidence.copy())).verdict == "refuted"


def test_wide_intervals_decide_nothing(evidence):
    assert CLAIM.decide(evidence.assign(low=0.0, high=100.0)).verdict == "undecided"


@pytest.mark.parametrize("index", [0, 2, 4])
def test_the_recursion_is_the_derivative_at_frozen_controls(index):
    """Second route: the state at the end by torch, differentiated in that at n."""
    case = module.CASES[index]
    problem = module.Base(schedule="linear flow", **case.mixture)
    times = problem.time_grid(9)
    run = simulate(problem, n_steps=9, n_paths=6, seed=2, keep_states=True)
    sizes = module.lean_adjoint_sizes(problem, run.states, times)
    tables = problem.tables(problem.theta_star, times)
    rows = torch.as_tensor(tables.base)
    dim = problem.dim
    for first in (0, 4, 8):
        x = torch.as_tensor(run.states[first].T).clone().requires_grad_(True)
        moved = x
        for n in range(first, 9):
            now = torch.as_tensor(run.states[n].T)
            value = moved
            score = 0.0
            if rows.shape[1]:
                lin, quad = rows[n, :, :dim], rows[n, :, dim:-1]
                terms = value @ lin.T + value**2 @ quad.T + rows[n, :, -1]
                share = torch.softmax(terms, dim=-1)
                score = share @ lin + 2.0 * (share @ quad) * value
            mean = torch.as_tensor(tables.scale[n]) * value
            mean = mean + tables.base_gain[n] * score
            # what noise and control add is held at its value on the path
            following = torch.as_tensor(run.states[n + 1].T)
            moved = mean + (following - mean).detach()
            assert torch.allclose(value.detach(), now)
        slope = torch.autograd.grad(0.5 * ((moved - 1.0) ** 2).sum(), x)[0]
        last = torch.linalg.vector_norm(moved.detach() - 1.0, dim=1)
        found = torch.linalg.vector_norm(slope, dim=1) / last
        np.testing.assert_allclose(sizes[first], found, rtol=1e-10)


def test_a_bound_with_half_the_curvature_holds_and_twice_does_not(evidence):
    """A mutation of m: the check sees a bound that is too small by a factor of two."""
    case = module.CASES[1]
    problem = module.Base(schedule="linear flow", **case.mixture)
    times = problem.time_grid(50)
    run = simulate(problem, n_steps=50, n_paths=2048, seed=1, keep_states=True)
    sizes = module.lean_adjoint_sizes(problem, run.states, times)
    least, most = problem.curvatures
    flow = module.SCHEDULES["linear flow"][0]
    worst = {
        factor: np.max(
            sizes / module.chain_bound(flow, factor * least, most, times)[:, None]
        )
        for factor in (0.5, 1.0, 4.0)
    }
    assert worst[0.5] <= worst[1.0] <= 1.0 + 1e-12
    assert worst[4.0] > 1.1


def test_shares_of_no_path_have_an_upper_end():
    found = module.share_interval(0, 1000)
    assert found.estimate == found.low == 0.0
    assert 0.5 < found.high < 2.0
