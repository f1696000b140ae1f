"""Estimators that are wrong on purpose, and right ones that the catalogue lacks.

Each wrong one differs from a correct estimator in one place, the comment in its code;
the statistical checks must refuse every one of them and none of the right ones.  They
have no kernel: measure them with backend "torch".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sdebench.estimator import Estimator
from sdebench.view import DERIVATIVES


class TorchOnly(Estimator):
    """Base of the estimators of this file: named after their class, torch only."""

    estimand: ClassVar[str] = "gradient"
    block_kernel = None

    @property
    def name(self):
        return type(self).__name__


# ---- adjoint estimators, with every choice that a mutant may get wrong ------
@dataclass(frozen=True, kw_only=True)
class Adjoint(TorchOnly):
    """The pathwise derivative, correct unless a method below is overridden."""

    needs: ClassVar[frozenset[str]] = frozenset(DERIVATIVES)

    reward_sign = 1.0
    control_weight = 1.0
    lean = False
    running = True

    def terminal(self, view, paths):
        return view.reward_gradient(paths.states[-1])

    def feature_state(self, view, paths, n):
        return n, paths.states[n]

    def base_product(self, view, n, x, costate):
        return view.base_vjp(n, x, costate)

    def statistics(self, view):
        paths = view.rollout()
        costate = -self.reward_sign * self.terminal(view, paths)
        gradient = costate.new_zeros(view.n_paths, view.n_params)
        for n in reversed(range(view.n_steps)):
            x = paths.states[n]
            v = self.control_weight * paths.controls[n]
            v = v + view.noise_transpose(n, costate)
            where = self.feature_state(view, paths, n)
            gradient = gradient + view.control_parameter_vjp(*where, v)
            costate = self.base_product(view, n, x, costate)
            if not self.lean:
                costate = costate + view.control_vjp(n, x, v)
            if self.running:
                costate = costate + view.running_cost_gradient(n, x)
        return gradient


class LeanAdjoint(Adjoint):
    """Correct adjoint matching."""

    estimand: ClassVar[str] = "matching_gradient"
    lean = True


class WrongRewardSign(Adjoint):
    reward_sign = -1.0


class MissingHalf(Adjoint):
    # the cost |w|^2 instead of 1/2 |w|^2
    control_weight = 2.0


class LeanForFull(Adjoint):
    lean = True


class FullForLean(LeanAdjoint):
    lean = False


class MissingRunningCost(Adjoint):
    running = False


class LateState(Adjoint):
    """Off by one: the features of step n at the state after the step."""

    def feature_state(self, view, paths, n):
        return n, paths.states[n + 1]


class LateTime(Adjoint):
    """Off by one: the features of step n at the time of step n + 1."""

    def feature_state(self, view, paths, n):
        return min(n + 1, view.n_steps - 1), paths.states[n]


class EarlyReward(Adjoint):
    """Off by one: the reward's gradient at the state before the last."""

    def terminal(self, view, paths):
        return view.reward_gradient(paths.states[-2])


class TransposedVjp(Adjoint):
    """The Jacobian times the costate, not its transpose (linear drift only)."""

    def base_product(self, view, n, x, costate):
        return view.base_mean(n, x + costate) - view.base_mean(n, x)


class MatchingSign(LeanAdjoint):
    """The control minus, not plus, the adjoint."""

    reward_sign = -1.0


# ---- likelihood-ratio estimators --------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Score(TorchOnly):
    """Likelihood ratio without baseline, correct unless overridden."""

    needs: ClassVar[frozenset[str]] = frozenset({"control_parameter_vjp"})

    control_weight = 1.0
    running_weight = 1.0
    reward_sign = 1.0
    direct_weight = 1.0
    shift = 0

    def cost(self, paths):
        control = self.control_weight * paths.control_cost
        running = self.running_weight * paths.running_cost
        return control + running - self.reward_sign * paths.reward

    def statistics(self, view):
        paths = view.rollout()
        score = paths.cost.new_zeros(view.n_paths, view.n_params)
        direct = torch.zeros_like(score)
        for n in range(view.n_steps):
            x = paths.states[n]
            noise = paths.noises[(n + self.shift) % view.n_steps]
            score = score + view.control_parameter_vjp(n, x, noise)
            direct = direct + view.control_parameter_vjp(n, x, paths.controls[n])
        return self.cost(paths)[:, None] * score + self.direct_weight * direct


class RewardToGo(TorchOnly):
    """Correct: the score of step n times the cost of steps n, n + 1, ... only."""

    needs: ClassVar[frozenset[str]] = frozenset({"control_parameter_vjp"})

    def statistics(self, view):
        paths = view.rollout()
        to_go = -paths.reward
        gradient = to_go.new_zeros(view.n_paths, view.n_params)
        for n in reversed(range(view.n_steps)):
            x, w = paths.states[n], paths.controls[n]
            to_go = to_go + 0.5 * (w * w).sum(1) + view.running_cost(n, x)
            v = to_go[:, None] * paths.noises[n] + w
            gradient = gradient + view.control_parameter_vjp(n, x, v)
        return gradient


class ScoreMissingDirect(Score):
    direct_weight = 0.0


class ScoreNoiseOfAnotherStep(Score):
    shift = 1


class ScoreMissingHalf(Score):
    control_weight = 2.0


class ScoreMissingRunningCost(Score):
    running_weight = 0.0


class ScoreWrongRewardSign(Score):
    reward_sign = -1.0


@dataclass(frozen=True, kw_only=True)
class Baseline(TorchOnly):
    """Likelihood ratio with the mean cost of the other paths as baseline: correct."""

    needs: ClassVar[frozenset[str]] = frozenset({"control_parameter_vjp"})

    own_path = False

    def n_statistics(self, n_params):
        return 3 * n_params + 1

    def statistics(self, view):
        paths = view.rollout()
        score = paths.cost.new_zeros(view.n_paths, view.n_params)
        direct = torch.zeros_like(score)
        for n in range(view.n_steps):
            x = paths.states[n]
            score = score + view.control_parameter_vjp(n, x, paths.noises[n])
            direct = direct + view.control_parameter_vjp(n, x, paths.controls[n])
        cost = paths.cost[:, None]
        return torch.cat([cost * score, score, direct, cost], dim=1)

    def combine(self, mean, n_paths):
        product, score, direct = np.split(mean[:-1], 3)
        covariance = product - mean[-1] * score
        # the mean over all paths knows the own path
        factor = 1.0 if self.own_path else n_paths / (n_paths - 1)
        return factor * covariance + direct


class OwnPathBaseline(Baseline):
    own_path = True


# ---- importance weights -----------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Weights(TorchOnly):
    """Log-weights of controlled paths, correct unless overridden."""

    estimand: ClassVar[str] = "log_normalizer"
    reduction: ClassVar[str] = "log_mean_exp"
    martingale_sign = 1.0
    control_weight = 1.0
    running_weight = 1.0

    def n_statistics(self, n_params):
        return 1

    def statistics(self, view):
        paths = view.rollout()
        return (
            paths.reward
            - self.running_weight * paths.running_cost
            - self.martingale_sign * paths.martingale
            - self.control_weight * paths.control_cost
        )[:, None]


class WeightsMartingaleSign(Weights):
    martingale_sign = -1.0


class WeightsMissingHalf(Weights):
    control_weight = 2.0


class WeightsMissingRunningCost(Weights):
    running_weight = 0.0


CORRECT = (Adjoint, LeanAdjoint, Score, RewardToGo, Baseline, Weights)

# Where each mutant must be caught: the problem and the evaluation point.
MUTANTS = {
    WrongRewardSign: ("damped_oscillator", "halfway"),
    MissingHalf: ("damped_oscillator", "overshoot"),
    LeanForFull: ("damped_oscillator", "overshoot"),
    FullForLean: ("damped_oscillator", "overshoot"),
    MissingRunningCost: ("ou_quadratic_easy:dim=2", "halfway"),
    LateState: ("damped_oscillator", "halfway"),
    LateTime: ("damped_oscillator", "overshoot"),
    EarlyReward: ("damped_oscillator", "halfway"),
    TransposedVjp: ("damped_oscillator", "halfway"),
    MatchingSign: ("damped_oscillator", "halfway"),
    ScoreMissingDirect: ("brownian_linear", "overshoot"),
    ScoreNoiseOfAnotherStep: ("damped_oscillator", "overshoot"),
    ScoreMissingHalf: ("damped_oscillator", "overshoot"),
    ScoreMissingRunningCost: ("ou_quadratic_easy:dim=2", "halfway"),
    ScoreWrongRewardSign: ("brownian_linear", "halfway"),
    OwnPathBaseline: ("brownian_linear", "overshoot"),
    WeightsMartingaleSign: ("gaussian_tilt", "halfway"),
    WeightsMissingHalf: ("brownian_linear", "halfway"),
    WeightsMissingRunningCost: ("ou_quadratic_easy:dim=2", "halfway"),
}


# ---- estimators that fail ---------------------------------------------------
def _fill_nan(prepared, work, X, Z, W, totals, B, OUT):
    OUT[:] = np.nan


class NotFinite(TorchOnly):
    """Returns NaN on both backends."""

    block_kernel = staticmethod(_fill_nan)

    def statistics(self, view):
        return view.rollout().cost[:, None].expand(-1, view.n_params) * torch.nan


class Choosy(TorchOnly):
    """Declares itself not applicable."""

    def not_applicable(self, n_paths):
        return "it never is"

    def statistics(self, view):
        raise AssertionError("must not be called")
