"""The stochastic sampler of Flow-GRPO on Gaussian data: its variance, exactly.

Linear flow x_s = s x_1 + (1 - s) x_0 from noise (s = 0) to data x_1 ~ N(0, C); the
paper's time is t = 1 - s.  With K steps h = 1/K, q(s) = s^2 C + (1 - s)^2 the variance
of x_s and v its velocity, a step of the sampler is

    x' = x + h (v - sigma^2 x / (2 q)) + sigma sqrt(h) xi,      v = q' x / (2 q),
    sigma^2 = eta^2 (1 - s) / s,    in the first step  sigma^2 = eta^2 / h,

where -x/q is the score and the last line keeps sigma finite at s = 0.  In continuous
time x_s has the variance q(s) for every eta.  The sampler is linear in x, and the
defect of a step in the variance is, with a = 1 + h m, m = (q' - sigma^2) / (2 q),

    a^2 q(s) + h sigma^2 - q(s + h) = h^2 (m^2 q - q'' / 2),        q'' = 2 (1 + C),

so that the error e = variance - q obeys e' = a^2 e + h^2 (m^2 q - 1 - C), e(0) = 0.

**Order.**  Near s = k h << 1 the recursion does not depend on h: with b = eta^2 / 2,

    e_{k+1} = (1 - b/k)^2 e_k + (b/k)^2      (first step: k = 1),

so that the first steps make an error of order one, and it is forgotten like k^(-2b).
From there to s = 1 it shrinks by C^(1 + b) s^(2b), the solution of e' = 2 m e.  Hence

    e(1) = A K^(-eta^2) + B K^(-1) + ...,
    A = C^(1+b) b^2 sum_{k >= 0} (Gamma(k) / Gamma(k + 1 - b))^2     for 0 < eta < 1,

with the term k = 0 read as 1/Gamma(1 - b)^2: the order is min(1, eta^2); at eta = 1
the two merge to (log K) / K; without noise, eta = 0, A = 0 and the order is 1.

Source: the sampler of J. Liu et al. 2025, arXiv:2505.05470 (Flow-GRPO); the order is
our derivation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sdebench.errors import ParameterError

Array = NDArray[np.float64]


def terminal_variance_error(
    noise_level: float, n_steps: int, data_variance: float = 0.5
) -> float:
    """Return the variance of the sampler's last state minus that of the data.

    Exact to rounding; O(n_steps) time and memory.

    Parameters
    ----------
    noise_level : eta >= 0; 0 is the Euler method for the probability flow.
    n_steps : K >= 1 steps of the same length.
    data_variance : C > 0.

    Raises
    ------
    ParameterError
        For a value out of range.
    """
    if noise_level < 0.0 or n_steps < 1 or not data_variance > 0.0:
        raise ParameterError(
            f"noise_level {noise_level}, n_steps {n_steps}, data_variance "
            f"{data_variance}: need noise_level >= 0, n_steps >= 1, data_variance > 0"
        )
    h = 1.0 / n_steps
    s = np.arange(n_steps) / n_steps
    sigma_squared = noise_level**2 * (1.0 - s) / np.append(h, s[1:])
    q = s**2 * data_variance + (1.0 - s) ** 2
    half_slope = s * data_variance - (1.0 - s)
    m = (half_slope - 0.5 * sigma_squared) / q
    defects = h**2 * (m**2 * q - 1.0 - data_variance)
    # What is left of each step's defect at the end: the product of the later a^2.
    kept = np.cumprod((1.0 + h * m[:0:-1]) ** 2)[::-1]
    return float(defects[:-1] @ kept + defects[-1])


def order(noise_level: float) -> float:
    """Return the order in 1/K of the error's leading term."""
    return min(1.0, noise_level**2) if noise_level else 1.0


def order_of_next_term(noise_level: float) -> float:
    """Return the order in 1/K of the second term of the error.

    At noise level 1 it is that of the leading one, which has a logarithm.
    """
    if not noise_level:
        return 2.0
    return min(2.0, max(1.0, noise_level**2))
