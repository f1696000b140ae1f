"""Foellmer drift to a two-mode mixture, from a pinned Brownian start.

Base      dX = noise_level dW,  X_0 = 0,  so p_T = N(0, noise_level^2 T I)
Target    nu = mass (1/3 N(m, variance I) + 2/3 N(-m, variance I)),
          m = distance (1, ..., 1) / sqrt(d);   reward r = log(nu / p_T)

    log Z = log mass,   u* = noise_level (grad log p*_t - grad log p_t)

with p*_t the Brownian bridges mixed over the target.  The control family is the
Foellmer drift to nu exp((theta - theta*)^T phi), phi = (sum x / sqrt(d), -|x|^2 / 2):
theta = 0 is a sampler of a shifted, wider mixture, theta* samples nu.
Source: Zhang and Chen 2021, arXiv:2111.15141 (path-integral sampler); the family is
ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sdebench.closed_form.base_process import PinnedBase
from sdebench.closed_form.log_quadratics import gaussian_rows
from sdebench.closed_form.tilting import StartLaw, TiltingFamily
from sdebench.errors import ParameterError
from sdebench.tilting_problem import TiltingProblem


@dataclass(frozen=True, kw_only=True)
class FollmerMixture(TiltingProblem):
    """Pinned Brownian start, two-mode mixture target, any dimension.

    Parameters
    ----------
    dim : >= 1.
    distance : of each mode from the origin.
    variance : of each mode, > 0; 1/variance - quadratic must be positive.
    linear, quadratic : theta*, the tilt that separates theta = 0 from the target.
    log_mass : log of the target's mass, equal to log Z.
    noise_level : > 0.
    horizon : T > 0.
    """

    default_steps: ClassVar[int] = 50
    source: ClassVar[str] = "Zhang and Chen 2021, arXiv:2111.15141"
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= \sigma\,(u\,dt + dW_t), \quad X_0 = 0 \\
\nu(x) &= \text{mass} \left( \tfrac{1}{3} \mathcal{N}(x; m, \text{variance}\,I)
  + \tfrac{2}{3} \mathcal{N}(x; -m, \text{variance}\,I) \right) \\
r(x) &= \log \frac{\nu(x)}{\mathcal{N}(x; 0, \sigma^2 T I)}, \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "A mixture target from a point: the drift must choose a mode early, and the "
        "reward is not quadratic."
    )

    dim: int = 2
    distance: float = 2.0
    variance: float = 0.5
    linear: float = 0.5
    quadratic: float = 0.5
    log_mass: float = 0.0
    noise_level: float = 1.0
    horizon: float = 1.0

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "linear", "quadratic"

    def build(self) -> TiltingFamily:
        if self.dim < 1:
            raise ParameterError(f"dim {self.dim} must be at least 1")
        if not self.variance > 0:
            raise ParameterError(f"variance {self.variance} must be positive")
        dim = self.dim
        base = PinnedBase(np.zeros(dim), self.noise_level, self.horizon)
        direction = np.full(dim, 1.0 / np.sqrt(dim))
        features = np.zeros((2, 2 * dim + 1))
        features[0, :dim] = direction
        features[1, dim:-1] = -0.5
        theta_star = np.array([self.linear, self.quadratic])
        target = gaussian_rows(
            np.log([1.0 / 3.0, 2.0 / 3.0]) + self.log_mass,
            self.distance * np.array([direction, -direction]),
            np.full((2, dim), self.variance),
        )
        return TiltingFamily(
            base=base,
            features=features,
            reference=target - base.terminal - theta_star @ features,
            constant=0.0,
            theta_star=theta_star,
            start=StartLaw(np.ones(1), np.zeros((1, dim)), np.zeros((1, dim))),
        )
