"""Four unequal modes in the plane, pulled to the rarest one.

Data sum_k w_k N(m_k, variance I), m_k = distance (+-1, +-1), weights 0.1, 0.2, 0.3
and 0.4; reward r(x) = -beta |x - m_1|^2 / 2 pulls to the mode of weight 0.1.  The
algebra is in ``_tilted_mixture``.
Source: this catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sdebench.closed_form.log_quadratics import Array
from sdebench.problems._tilted_mixture import TiltedMixture


@dataclass(frozen=True, kw_only=True)
class FourModes(TiltedMixture):
    """Four unequal Gaussian modes in two dimensions, reward pulls to the rarest.

    Parameters
    ----------
    beta : inverse temperature; 1/variance + beta must be positive.
    distance : the modes lie at distance (+-1, +-1).
    variance : of each mode, > 0.
    rate : of the VP schedule, > 0.
    horizon : T > 0.
    start : "marginal" (X_0 ~ p_0 of the base) or "normal".
    """

    default_steps: ClassVar[int] = 50
    source: ClassVar[str] = "this catalogue"
    hardness: ClassVar[str] = (
        "The rewarded mode holds a tenth of the mass, so few paths carry the gradient."
    )

    distance: float = 2.0
    variance: float = 0.5
    rate: float = 6.0

    def modes(self) -> tuple[Array, Array, Array]:
        corners = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        means = self.distance * corners
        return np.array([0.1, 0.2, 0.3, 0.4]), means, means[0]
