"""Benes' drift in every coordinate, tilted by a quadratic reward.

Base      dX_i = rate tanh(rate X_i) dt + u_i dt + dW_i,  X_0 = 0,  t in [0, T]
Reward    r(x) = -beta |x - m|^2 / 2,  m = target (1, ..., 1) / sqrt(d)

With phi(x) = prod_i cosh(rate x_i) the transition density is
exp(-d rate^2 t / 2) phi(y) / phi(x) N(y; x, t I): X_T is a mixture of 2^d Gaussians
around the corners rate T (+-1, ..., +-1), h phi is a sum of 2^d exp-quadratics, and

    u* = grad log (h phi) - rate tanh(rate x).

The control family is the optimal control of exp(theta^T features), features
(sum x / sqrt(d), -|x|^2 / 2), theta* = beta (target, 1).
Source: Benes 1981, 10.1080/17442508108833174; in d = 1 the exactly solvable diffusion
of Benes' filter.  Tilt and control family are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np

from sdebench.closed_form.benes import BenesBase, BenesFamily
from sdebench.closed_form.tilting import StartLaw, TiltingFamily
from sdebench.errors import ParameterError
from sdebench.tilting_problem import TiltingProblem

LARGEST = 8
"""Coordinates: the mixture has 2^d components."""


@dataclass(frozen=True, kw_only=True)
class BenesQuadratic(TiltingProblem):
    """Benes' drift from the origin, quadratic reward: 2^d modes, exact.

    Parameters
    ----------
    dim : 1 to 8.
    rate : > 0, of the drift; the modes are at distance rate T from 0.
    beta : > -1/T, curvature of the reward.
    target : its maximum lies at this distance from the origin.
    horizon : T > 0.
    """

    default_steps: ClassVar[int] = 50
    source: ClassVar[str] = (
        "Benes 1981, 10.1080/17442508108833174; tilt and control family ours"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
dX_{t,i} &= a \tanh(a X_{t,i})\,dt + u_i\,dt + dW_{t,i}, \quad X_0 = 0,
  \quad a = \text{rate} \\
r(x) &= -\tfrac{1}{2} \beta\,|x - m|^2, \quad
  m = \text{target}\,(1, \dots, 1) / \sqrt{d}, \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "The drift pushes each coordinate away from zero: a path picks one of 2^d "
        "modes early, and the reward prefers one of them."
    )

    dim: int = 2
    rate: float = 2.0
    beta: float = 0.5
    target: float = 1.5
    horizon: float = 1.0

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "linear", "quadratic"

    def build(self) -> TiltingFamily:
        if not 1 <= self.dim <= LARGEST:
            raise ParameterError(f"dim {self.dim} must be 1 to {LARGEST}")
        if not self.rate > 0:
            raise ParameterError(f"rate {self.rate} must be positive")
        dim = self.dim
        signs = np.array(list(product((1.0, -1.0), repeat=dim)))
        base = BenesBase(
            point=np.zeros(dim),
            directions=self.rate * signs,
            log_weights=np.full(len(signs), -dim * np.log(2.0)),
            horizon=self.horizon,
        )
        features = np.zeros((2, 2 * dim + 1))
        features[0, :dim] = 1.0 / np.sqrt(dim)
        features[1, dim:-1] = -0.5
        return BenesFamily(
            base=base,
            features=features,
            reference=np.zeros((1, 2 * dim + 1)),
            constant=-0.5 * self.beta * self.target**2,
            theta_star=self.beta * np.array([self.target, 1.0]),
            start=StartLaw(np.ones(1), np.zeros((1, dim)), np.zeros((1, dim))),
        )
