"""What problems with `SeparableTables` share: the tables, and what they refuse."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sdebench.problem import EULER, Array, Problem, as_time, check_euler_only
from sdebench.simulate.tables import SeparableTables

UNLIMITED = 1e30
"""A reach that no path gets to."""


def temporal_profiles(t: Array, horizon: float) -> Array:
    """Return the profiles 1 and s = 2 t / T - 1 at times t (...), (..., 2)."""
    t = np.asarray(t, dtype=np.float64)
    return np.stack([np.ones_like(t), 2.0 * t / horizon - 1.0], axis=-1)


@dataclass(frozen=True, kw_only=True)
class SeparableProblem(Problem):
    """Coordinates driven by polynomials of their own, noise alike in all of them."""

    schemes: ClassVar[tuple[str, ...]] = (EULER,)
    family_holds_optimum: ClassVar[bool] = False

    # ---- what a subclass writes ---------------------------------------------------
    @property
    def sigma(self) -> float:
        """The noise level."""
        return 1.0

    @property
    def reach(self) -> float:
        """Where the polynomials of a coordinate become constant."""
        return UNLIMITED

    @abstractmethod
    def base_coefficients(self, h: Array) -> Array:
        """Return M of `SeparableTables` (N, d, J) for steps of lengths h (N,)."""

    @abstractmethod
    def gains(self, times: Array) -> Array:
        """Return dw/dtheta of `SeparableTables` (P, N, d, J) on a time grid."""

    @abstractmethod
    def other_tables(self, times: Array) -> dict[str, Array]:
        """Return the fields of rewards and waves, and of a start that is no point."""

    # ---- the tables ----------------------------------------------------------------
    def diffusion(self, t: float) -> Array:
        as_time(t, self.time_span)
        return self.sigma * np.eye(self.dim)

    def tables(
        self,
        theta: Array | None,
        times: Array,
        scheme: str = EULER,
        noisy: Array | None = None,
    ) -> SeparableTables:
        check_euler_only(scheme, noisy, len(times) - 1)
        h, dim = np.diff(times), self.dim
        gains = np.ascontiguousarray(self.gains(times))
        weights = np.zeros(len(gains)) if theta is None else np.asarray(theta, float)
        fields: dict[str, Any] = {
            "start_mean": np.zeros(dim),
            "start_factor": np.zeros((dim, dim)),
        } | self.other_tables(times)
        return SeparableTables(
            reach=np.array([self.reach]),
            base=self.base_coefficients(h),
            beyond=np.ones((len(h), dim)),
            noise=self.sigma * np.sqrt(h)[:, None] * np.ones(dim),
            gain=np.tensordot(weights, gains, 1),
            gain_derivative=gains,
            running=np.zeros((len(h), 0, 0)),
            **fields,
        )
