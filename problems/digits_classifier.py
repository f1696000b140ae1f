"""Handwritten digits without smoothing; the reward is a classifier's log-probability.

Data      sum_k delta_{x_k} / n_images, x_k the first images of scikit-learn's digits
Base      linear flow (alpha = t, beta = 1 - t) with memoryless noise from
          X_{t_0} = 0: X_T is one of the images, whatever the control
Reward    r(x) = share log p(digit | x) + (1 - share) log p(other | x),
          p a multinomial logistic regression fitted to all 1,797 images

    h(x, t) = sum_k omega_k(x, t) e^{r(x_k)},   omega_k ~ N(x; t x_k, (1 - t)^2 I)

is exact for any reward whatever.  The control family has the rewards
theta_1 log p(digit | x_k) + theta_2 log p(other | x_k), known at the images alone.

The chain.  sigma_t^2 = 2 (1 - t) / t vanishes at the data: the last Euler-Maruyama step
has noise 2^(1/2) h and ends within about 3 h of an image in every pixel.  The reward
there is the classifier's own log-probability, which is defined off the images too, and
so is V(x, T) = -r(x).  The exact answers are those of continuous time, which needs r at
the images only; those of N steps differ by O(h), and have no closed form.

The reward has no gradient that an estimator may use, by design: X_T jumps from image to
image as the noise changes, so that in continuous time the derivative of X_T in theta is
zero almost surely, while that of E r(X_T) is not.  On the chain it exists, and grows
without bound as the steps shrink.  Estimators that differentiate the flow or the reward
are refused.

Source: digits of scikit-learn (Alpaydin and Kaynak 1998); classifier guidance after
Dhariwal and Nichol 2021, arXiv:2105.05233; control family ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from sdebench.closed_form.base_process import MemorylessBase
from sdebench.closed_form.empirical import EmpiricalTilting
from sdebench.closed_form.gaussian_mixture import GaussianMixture
from sdebench.closed_form.schedule import LinearFlow
from sdebench.closed_form.tilting import StartLaw
from sdebench.errors import ParameterError
from sdebench.problem import Array, as_states, as_time
from sdebench.problems._digits import Classifier, check_images, classifier, images
from sdebench.tilting_problem import TiltingProblem, TiltingTruth

N_DIGITS = 10
ROUNDING = 1e-11
"""Of V, from exponents of size |x|^2 / (2 beta^2): 2^-52 times 2 * 10^4 at t = 0.96."""


@dataclass(frozen=True, kw_only=True)
class DigitsClassifier(TiltingProblem):
    """Images of digits as they are, tilted by a classifier's log-probability.

    Parameters
    ----------
    n_images : 2 to 1797, the first ones of the data set.
    dim : 64, or fewer: means of rectangles of pixels.
    digit, other : what the reward asks for, two digits.
    share : of ``digit`` in the reward, (share, 1 - share) is theta*.
    start_time : in (0, 1).
    """

    default_steps: ClassVar[int] = 32
    source: ClassVar[str] = (
        "digits of scikit-learn (Alpaydin and Kaynak 1998); classifier guidance after "
        "Dhariwal and Nichol 2021, arXiv:2105.05233; control family ours"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= \left( \kappa_t X_t + \sigma_t^2 \nabla \log p_t(X_t) \right) dt
  + \sigma_t\,(u\,dt + dW_t), \quad X_{t_0} = 0 \\
p_t(x) &= \frac{1}{K} \sum_{k=1}^{K} \mathcal{N}(x; t\,x_k, (1 - t)^2 I), \quad
  \sigma_t^2 = 2\,\frac{1 - t}{t} \\
r(x) &= \text{share} \log p(\text{digit} \mid x)
  + (1 - \text{share}) \log p(\text{other} \mid x), \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "X_T is one of the images: the reward is a number at each of them, and paths "
        "have no derivative."
    )
    has_derivatives: ClassVar[bool] = False

    n_images: int = 100
    dim: int = 64
    digit: int = 3
    other: int = 8
    share: float = 0.7
    start_time: float = 0.1

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "log_probability", "log_probability_other"

    @property
    def classifier(self) -> Classifier:
        """The fitted classifier."""
        return classifier(self.dim)

    @property
    def effort(self) -> int:
        return self.dim * max(1, self.n_images // 20)

    def build(self) -> EmpiricalTilting:
        check_images(self.n_images)
        asked = [self.digit, self.other]
        if not set(asked) <= set(range(N_DIGITS)) or self.digit == self.other:
            raise ParameterError(
                f"digit {self.digit} and other {self.other} must be two different "
                "digits from 0 to 9"
            )
        count, dim = self.n_images, self.dim
        points, origin = images(dim)[0][:count], np.zeros((1, dim))
        return EmpiricalTilting(
            base=MemorylessBase(
                LinearFlow(1.0),
                np.full(count, -np.log(count)),
                points,
                np.zeros((count, dim)),
                self.start_time,
            ),
            features=np.zeros((2, 2 * dim + 1)),
            reference=np.zeros((1, 2 * dim + 1)),
            constant=0.0,
            theta_star=np.array([self.share, 1.0 - self.share]),
            start=StartLaw(np.ones(1), origin, origin),
            values=self.classifier.log_probabilities(points)[:, asked].T,
        )

    @cached_property
    def truth(self) -> DigitsTruth:
        return DigitsTruth(self)

    def _reward_tables(self) -> dict[str, Array]:
        model, dim = self.classifier, self.dim
        rows = np.zeros((N_DIGITS, 2 * dim + 1))
        rows[:, :dim], rows[:, -1] = model.weights, model.biases
        asked = rows[[self.digit, self.other]]
        return {"reward": (self.theta_star @ asked)[None], "reward_below": rows}

    def reward(self, x: Array) -> Array:
        found = self.classifier.log_probabilities(as_states(x, self.dim))
        return np.asarray(found[..., [self.digit, self.other]] @ self.theta_star)


class DigitsTruth(TiltingTruth):
    """Exact answers; at T those of the chain's end, where V = -r off the images too."""

    _problem: DigitsClassifier

    def _is_end(self, t: float) -> bool:
        span = self._problem.time_span
        return as_time(t, span) == span[1]

    def value(self, x: Array, t: float) -> Array:
        return -self._problem.reward(x) if self._is_end(t) else super().value(x, t)

    def control(self, x: Array, t: float) -> Array:
        if self._is_end(t):  # where sigma vanishes
            return np.zeros_like(self._at(x, t)[0])
        return super().control(x, t)

    def policy(self, x: Array, t: float, theta: Any) -> Array:
        if self._is_end(t):
            return np.zeros_like(self._at(x, t)[0])
        return super().policy(x, t, theta)

    def _end_law(self, theta: Array | None) -> GaussianMixture:
        family = self._family
        assert isinstance(family, EmpiricalTilting)
        return family.end_law(theta)

    def base_marginal(self, t: float) -> GaussianMixture:
        return self._end_law(None) if self._is_end(t) else super().base_marginal(t)

    def tilted_marginal(self, t: float) -> GaussianMixture:
        if self._is_end(t):
            return self._end_law(self._problem.theta_star)
        return super().tilted_marginal(t)

    def policy_marginal(self, t: float, theta: Any) -> GaussianMixture:
        if self._is_end(t):
            return self._end_law(self._problem.theta(theta))
        return super().policy_marginal(t, theta)

    def ideal_law(self) -> GaussianMixture:
        return self._end_law(self._problem.theta_star)

    def error_bound(self, quantity: str, theta: Any = None) -> float:
        return ROUNDING if quantity == "value" else super().error_bound(quantity, theta)
