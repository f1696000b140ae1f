"""Quadratic Ornstein-Uhlenbeck control, hard setting of SOC Matching.

The process and its closed form are those of ``_ou_quadratic``; here
a = 1.0, p = 1.0, q = 0.5.  F(0) = 1.3134558, J(u*) = 27.2645274 at d = 20.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdebench.problems._ou_quadratic import OUQuadratic


@dataclass(frozen=True, kw_only=True)
class OUQuadraticHard(OUQuadratic):
    """Quadratic Ornstein-Uhlenbeck control, hard setting of SOC Matching.

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
        "The uncontrolled process is unstable and expensive: importance weights and "
        "likelihood ratios degenerate."
    )

    rate: float = 1.0
    state_cost: float = 1.0
    terminal_cost: float = 0.5
