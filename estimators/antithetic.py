"""Antithetic paths: every path together with its mirror image.

The normals z of all steps and of the start, and the uniform that chooses the start's
mixture component, are reflected, z to -z and u to 1 - u, which does not change their
law.  The mean of the two rows has the variance

    1/2 Var g (1 + rho),   rho = Corr(g(z), g(-z)),

so that the part of g that is odd in the noise cancels altogether and the even part
gains nothing for twice the cost.  The half that is left is what two independent paths
have as well: the gain at equal cost is 1/(1 + rho).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdebench.composite import Runner
from sdebench.estimator import Array
from sdebench.estimators._wrapper import Wrapper
from sdebench.simulate.noise import Noise


def reflected(noise: Noise) -> Noise:
    """Return the mirror image of the noise."""
    return Noise(-noise.steps, -noise.start, 1.0 - noise.uniforms)


@dataclass(frozen=True, kw_only=True)
class Antithetic(Wrapper):
    """Mean of an estimator over each path and its mirror image.

    Parameters
    ----------
    estimator : the wrapped estimator, a specification.
    """

    source: ClassVar[str] = "Hammersley and Morton 1956; Glasserman 2003, section 4.2"
    formula: ClassVar[str] = r"\bar g(z) = \tfrac{1}{2} \left( g(z) + g(-z) \right)"

    def run(self, runner: Runner) -> Array:
        noise = runner.noise()
        (rows,) = runner.run(self.inner, noise=noise)
        (mirrored,) = runner.run(self.inner, noise=reflected(noise))
        return 0.5 * (rows + mirrored)
