"""The truth of problems whose answers for a control are sums or quadratures.

All answers for one control come together, and again from a coarser rule that bounds
their error; both are remembered.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.closed_form.grid_chain import PolicyAnswers
from sdebench.errors import NotExactError
from sdebench.problem import (
    EULER,
    Array,
    Problem,
    Steps,
    Truth,
    as_time,
    check_scheme,
)

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.closed_form.gaussian_mixture import GaussianMixture

ROUNDING = 4e-14
"""Relative error that a coarser rule does not show."""
NO_OPTIMUM = (
    "the optimum of the N-step chain has no closed form with a cost that is not "
    "quadratic"
)


class CertifiedTruth(Truth):
    """Answers for a control with error bounds.

    A subclass writes `_numbers` and `log_normalizer`; X_0 is a point unless it says
    otherwise.

    Class attributes
    ----------------
    rounding : relative error of the numbers that a coarser rule does not show.
    """

    rounding: ClassVar[float] = ROUNDING

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._known: dict[tuple[str, int, bytes, bytes], Array] = {}

    @abstractmethod
    def _numbers(
        self, what: str, theta: Array | None, times: Array | None, level: int
    ) -> Array:
        """Return answers from the fine rule (level 0) or the coarse one (1).

        Parameters
        ----------
        what : "policy" for the numbers of `PolicyAnswers`; others of the subclass.
        times : the grid of a chain, or None for continuous time.
        """

    # ---- remembered ---------------------------------------------------------------
    def _remembered(
        self, what: str, theta: Array | None, n_steps: Steps, level: int = 0
    ) -> Array:
        times = None if n_steps is None else self._problem.time_grid(n_steps)
        key = (
            what,
            level,
            b"" if theta is None else theta.tobytes(),
            b"" if times is None else times.tobytes(),
        )
        if key not in self._known:
            self._known[key] = self._numbers(what, theta, times, level)
        return self._known[key]

    def _bound(self, what: str, theta: Array | None, n_steps: Steps) -> Array:
        """Return bounds of the errors: how far the coarser rule changes the answers."""
        fine, coarse = (
            self._remembered(what, theta, n_steps, level) for level in (0, 1)
        )
        size = self._problem.dim + float(np.max(np.abs(fine)))
        return np.abs(fine - coarse) + self.rounding * size

    def _policy(self, theta: Any, n_steps: Steps, scheme: str) -> PolicyAnswers:
        check_scheme(scheme)
        theta = self._problem.theta(theta)
        return PolicyAnswers.unstacked(self._remembered("policy", theta, n_steps))

    # ---- answers ------------------------------------------------------------------
    def objective(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        return self._policy(theta, n_steps, scheme).objective

    def gradient(self, theta: Any, n_steps: Steps = None, scheme: str = EULER) -> Array:
        return self._policy(theta, n_steps, scheme).gradient.copy()

    def reward_only_objective(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        return self._policy(theta, n_steps, scheme).reward_only_objective

    def reward_only_gradient(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> Array:
        return self._policy(theta, n_steps, scheme).reward_only_gradient.copy()

    def matching_gradient(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> Array:
        return self._policy(theta, n_steps, scheme).matching_gradient.copy()

    def optimal_cost(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        if n_steps is not None:
            raise NotExactError(NO_OPTIMUM)
        return -self.log_normalizer()

    def control_error(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        if n_steps is not None:
            raise NotExactError(NO_OPTIMUM)
        excess = self.objective(theta) - self.optimal_cost()
        return float(np.sqrt(2.0 * max(excess, 0.0)))

    def discrete_control(self, x: Array, step: int, n_steps: int) -> Array:
        raise NotExactError(NO_OPTIMUM)

    def policy_chain(
        self,
        theta: Any,
        n_steps: Steps = None,
        scheme: str = EULER,
        noisy: Array | None = None,
    ) -> PolicyChain:
        raise NotExactError("a cost that is not quadratic has no parts of its gradient")

    # ---- laws ---------------------------------------------------------------------
    def _no_law(self, t: float) -> GaussianMixture:
        if as_time(t, self._problem.time_span) == self._problem.time_span[0]:
            raise NotExactError("X_0 is a point: it has no density")
        raise NotExactError("the law is not a mixture of Gaussians")

    def base_marginal(self, t: float) -> GaussianMixture:
        return self._no_law(t)

    def tilted_marginal(self, t: float) -> GaussianMixture:
        return self._no_law(t)

    # ---- bounds -------------------------------------------------------------------
    def error_bound(
        self, quantity: str, theta: Any = None, n_steps: Steps = None
    ) -> float:
        """Return an absolute error bound: of a vector, of its norm.

        Parameters
        ----------
        quantity : "objective", "gradient", "log_normalizer", "value", ...
        n_steps : bound the answer of the N-step chain instead.
        """
        if quantity in ("value", "log_normalizer", "optimal_cost"):
            return ROUNDING * (self._problem.dim + abs(self.log_normalizer()))
        theta = self._problem.theta("optimum" if theta is None else theta)
        if quantity == "control_error":
            return self._control_error_bound(theta)
        bounds = PolicyAnswers.unstacked(self._bound("policy", theta, n_steps))
        return float(np.linalg.norm(getattr(bounds, quantity)))

    def _control_error_bound(self, theta: Array) -> float:
        """Return the bound of a square root, from that of its argument."""
        bound = self.error_bound("objective", theta)
        bound = 2.0 * (bound + self.error_bound("optimal_cost"))
        return root_bound(self.control_error(theta), bound)


def root_bound(root: float, bound: float) -> float:
    """Return the bound of a square root, from that of its argument."""
    return min(bound / root, float(np.sqrt(bound))) if root else float(np.sqrt(bound))


def best_in_family(
    problem: Problem, steps: int = 80, start: Array | None = None
) -> Array:
    """Return the minimizer of J in the control family, by Newton's method.

    From no control, or from ``start``.

    Raises
    ------
    NumericalError
        If none is found.
    """
    from sdebench.errors import NumericalError

    truth = problem.truth
    theta = np.zeros(problem.n_params) if start is None else start
    size, step = np.inf, 1e-4
    for _ in range(steps):
        gradient = truth.gradient(theta)
        before, size = size, float(np.linalg.norm(gradient))
        if size <= 1e-14 or (size >= before and size <= 1e-10):
            return theta
        rows = [
            (truth.gradient(theta + e) - truth.gradient(theta - e)) / (2.0 * step)
            for e in step * np.eye(len(theta))
        ]
        hessian = 0.5 * (np.array(rows) + np.array(rows).T)
        least = float(np.linalg.eigvalsh(hessian)[0])
        # where J is not convex yet, go downhill; far away a whole step may overshoot
        hessian += max(0.0, 0.05 - least) * np.eye(len(theta))
        change = np.linalg.solve(hessian, gradient)
        theta = theta - change / max(1.0, float(np.linalg.norm(change)))
    raise NumericalError(
        f"no minimizer of J was found in the control family of {problem.label}; "
        "reduce the reward or the horizon"
    )
