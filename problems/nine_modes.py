"""Nine narrow modes on a 3 x 3 grid, pulled to a corner.

Data 1/9 sum N(m_k, variance I) with m_k on the grid spacing {-1, 0, 1}^2; reward
r(x) = -beta |x - (spacing, spacing)|^2 / 2.  The algebra is in ``_tilted_mixture``.
Source: this catalogue; nine-mode grids are a standard test of samplers (Zhang and
Chen 2021, arXiv:2111.15141).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sdebench.closed_form.log_quadratics import Array
from sdebench.problems._tilted_mixture import TiltedMixture


@dataclass(frozen=True, kw_only=True)
class NineModes(TiltedMixture):
    """Nine narrow Gaussian modes on a grid, reward pulls to a corner.

    Parameters
    ----------
    beta : inverse temperature; 1/variance + beta must be positive.
    spacing : distance between neighbouring modes.
    variance : of each mode, > 0.
    rate : of the VP schedule, > 0.
    horizon : T > 0.
    start : "marginal" (X_0 ~ p_0 of the base) or "normal".
    """

    default_steps: ClassVar[int] = 64
    source: ClassVar[str] = "this catalogue, after Zhang and Chen 2021"
    hardness: ClassVar[str] = (
        "Modes four standard deviations apart and more: paths decide late, and the "
        "score changes fast where they do."
    )

    beta: float = 0.2
    spacing: float = 2.5
    variance: float = 0.25
    rate: float = 6.0

    def modes(self) -> tuple[Array, Array, Array]:
        axis = self.spacing * np.array([-1.0, 0.0, 1.0])
        means = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
        return np.full(9, 1.0 / 9.0), means, means[-1]
