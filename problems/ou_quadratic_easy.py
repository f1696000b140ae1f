"""Quadratic Ornstein-Uhlenbeck control, easy setting of SOC Matching.

The process and its closed form are those of ``_ou_quadratic``; here
a = 0.2, p = 0.2, q = 0.1.  F(0) = 0.2925539, J(u*) = 5.5181517 at d = 20.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdebench.problems._ou_quadratic import OUQuadratic


@dataclass(frozen=True, kw_only=True)
class OUQuadraticEasy(OUQuadratic):
    """Quadratic Ornstein-Uhlenbeck control, easy setting of SOC Matching.

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
        "Running and terminal cost in 20 dimensions: likelihood ratios already pay for "
        "the dimension."
    )

    rate: float = 0.2
    state_cost: float = 0.2
    terminal_cost: float = 0.1
