"""Quadratic Ornstein-Uhlenbeck control without running cost.

The process and its closed form are those of ``_ou_quadratic``; here
a = 0.5, p = 0.0, q = 0.25.  F(0) = 0.3655293, J(u*) = 8.0287915 at d = 20.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdebench.problems._ou_quadratic import OUQuadratic


@dataclass(frozen=True, kw_only=True)
class OUQuadraticNoStateCost(OUQuadratic):
    """Quadratic Ornstein-Uhlenbeck control without running cost.

    Parameters
    ----------
    dim : >= 1.
    rate : a, the drift is a x (positive: unstable).
    state_cost : p, the running cost is p |x|^2.
    terminal_cost : q, the terminal cost is q |x|^2.
    start_scale : standard deviation of X_0, >= 0.
    horizon : T > 0.
    """

    hardness: ClassVar[str] = (
        "All reward comes at the end, from an unstable process in 20 dimensions."
    )

    rate: float = 0.5
    state_cost: float = 0.0
    terminal_cost: float = 0.25
