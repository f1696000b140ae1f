"""Two modes on the line, pulled to one of them: the fine-tuning toy of TR-BSDE.

Data 1/2 N(3, 1) + 1/2 N(-3, 1); noising dX = -2 X dt + 2 dW, T = 1, so alpha_0 = e^-2:
only nearly memoryless, and started from N(0, 1) as published.  Reward
r(x) = -beta (x - 3)^2 / 2 at inverse temperatures beta from 0.02 to 1.

    -log Z (ideal tilt) = -log(1/2 (1 + beta)^(-1/2) (1 + exp(-18 beta / (1 + beta))))

while J(u*) from N(0, 1) is larger: 0.17286, 0.37553, 0.66889, 0.75289, 1.11712 at
beta = 0.02, 0.05, 0.125, 1/6, 1.  The algebra is in ``_tilted_mixture``.
Source: Mei and Taghvaei 2026, arXiv:2603.20455, fine-tuning toy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sdebench.closed_form.log_quadratics import Array
from sdebench.problems._tilted_mixture import TiltedMixture


@dataclass(frozen=True, kw_only=True)
class TwoModes(TiltedMixture):
    """Two Gaussian modes in one dimension, reward pulls to the right one.

    Parameters
    ----------
    beta : inverse temperature; 1/variance + beta must be positive.
    distance : the modes lie at +distance (also the reward's peak) and -distance.
    variance : of each mode, > 0.
    rate : of the VP schedule, > 0; sigma = sqrt(rate).
    horizon : T > 0.
    start : "normal" (published) or "marginal" (X_0 ~ p_0 of the base).
    """

    default_steps: ClassVar[int] = 50
    source: ClassVar[str] = "Mei and Taghvaei 2026, arXiv:2603.20455, fine-tuning toy"
    hardness: ClassVar[str] = (
        "At beta = 1 one mode must be emptied through a nearly flat barrier, and the "
        "start remembers too much to reach the ideal tilt."
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"beta": 1.0})

    beta: float = 0.125
    distance: float = 3.0
    start: str = "normal"

    def modes(self) -> tuple[Array, Array, Array]:
        means = self.distance * np.array([[1.0], [-1.0]])
        return np.full(2, 0.5), means, means[0]
