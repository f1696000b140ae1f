"""Forty narrow modes scattered over a wide box, from a pinned start.

Base      dX = sigma_t dW,  X_0 = 0,  sigma_t falling geometrically from 2 half_width
          to the modes' standard deviation
Target    nu = mass (1/40) sum_k N(m_k, variance I), the m_k uniform in the box
          [-half_width, half_width]^d;  reward r = log(nu / p_T)

    log Z = log mass,   u* = sigma (grad log p*_t - grad log p_t)

with p*_t the bridges of the base mixed over the target.  The control family is the
Foellmer drift to nu exp((theta - theta*)^T phi), with

    phi = 4 (x_1 / half_width, x_2 / half_width, -|x|^2 / (d half_width^2)):

under u_theta the modes have the weights that are proportional to
exp((theta - theta*)^T phi(m_k)), up to their width.  theta = 0 samples the modes of one
corner of the first two coordinates and misses most others, theta* has all forty alike.

The means are drawn once and for all, with the first seed that leaves any two modes of
the plane at least four standard deviations apart: forty modes that can be told apart.

Scales: the box and the modes' width are the published ones, 40 and about 1.  With
constant noise that spans the box, Euler-Maruyama steps would need N > 500 before one
step's noise is narrower than a mode; the geometric noise of adjoint sampling (Havens et
al. 2025, arXiv:2504.11713) loses the same share of what is left in every step.  The
spread of the log-weights at the optimum grows like log(half_width) (d / N)^(1/2): in 50
dimensions a box of half width 2 is taken, in which the modes are eight standard
deviations apart all the same, and 64 steps still leave useful weights.
Source: Midgley et al. 2022, arXiv:2208.01893 (forty modes in two dimensions, the
standard test of samplers since); means of our own, family ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sdebench.closed_form.base_process import GeometricPinnedBase
from sdebench.closed_form.log_quadratics import Array, gaussian_rows
from sdebench.closed_form.seeded import seeded_uniforms
from sdebench.closed_form.tilting import StartLaw, TiltingFamily
from sdebench.errors import ParameterError
from sdebench.tilting_problem import TiltingProblem

N_MODES = 40
SEED = 627
"""The first whose means in the plane are at least four standard deviations apart."""

TOLERANCE = 1e-10
"""Of the expected reward, the only answer here that needs quadrature."""


@dataclass(frozen=True, kw_only=True)
class FortyModes(TiltingProblem):
    """Forty narrow modes scattered over a wide box, any dimension from two.

    Parameters
    ----------
    dim : >= 2.
    half_width : the means are uniform in [-half_width, half_width]^dim, > 0.
    variance : of each mode, > 0.
    linear, quadratic : theta*, the tilt that separates theta = 0 from the target.
    log_mass : log of the target's mass, equal to log Z.
    horizon : T > 0.
    """

    default_steps: ClassVar[int] = 64
    source: ClassVar[str] = (
        "Midgley et al. 2022, arXiv:2208.01893 (the test of forty modes); means and "
        "control family ours"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= \sigma_t\,(u\,dt + dW_t), \quad X_0 = 0, \quad
  \sigma_t = (2\,\text{half width})^{1 - t / T}
  \,\text{variance}^{t / (2 T)} \\
\nu(x) &= \text{mass}\,\tfrac{1}{40} \sum_{k=1}^{40}
  \mathcal{N}(x; m_k, \text{variance}\,I), \quad
  m_k \in [-\text{half width}, \text{half width}]^d \\
r(x) &= \log \frac{\nu(x)}{p_T(x)}, \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "Forty modes, each a thousandth of the box: a sampler whose paths miss some of "
        "them learns nothing of what they weigh."
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"dim": 50, "half_width": 2.0},
    )

    dim: int = 2
    half_width: float = 40.0
    variance: float = 1.0
    linear: float = 1.0
    quadratic: float = 0.25
    log_mass: float = 0.0
    horizon: float = 1.0

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "linear_1", "linear_2", "quadratic"

    @property
    def means(self) -> Array:
        """The modes' means (40, d); the same numbers whatever numpy."""
        return self.half_width * (2.0 * seeded_uniforms(SEED, (N_MODES, self.dim)) - 1)

    def build(self) -> TiltingFamily:
        dim, width = self.dim, self.half_width
        if dim < 2:
            raise ParameterError(f"dim {dim} must be at least 2")
        for name in ("half_width", "variance"):
            if not getattr(self, name) > 0:
                raise ParameterError(f"{name} {getattr(self, name)} must be positive")
        base = GeometricPinnedBase(
            np.zeros(dim), 2.0 * width, self.horizon, float(np.sqrt(self.variance))
        )
        features = np.zeros((3, 2 * dim + 1))
        features[:2, :2] = 4.0 * np.eye(2) / width
        features[2, dim:-1] = -4.0 / (dim * width**2)
        theta_star = np.array([self.linear, self.linear, self.quadratic])
        target = gaussian_rows(
            np.full(N_MODES, self.log_mass - np.log(N_MODES)),
            self.means,
            np.full((N_MODES, dim), self.variance),
        )
        return TiltingFamily(
            base=base,
            features=features,
            reference=target - base.terminal - theta_star @ features,
            constant=0.0,
            theta_star=theta_star,
            start=StartLaw(np.ones(1), np.zeros((1, dim)), np.zeros((1, dim))),
            tolerance=TOLERANCE,
        )
