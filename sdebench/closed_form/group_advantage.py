"""Mean of the group-relative policy gradient with standardized rewards, by quadrature.

A group of G actions x_i ~ N(m, s^2) has the rewards R_i = x_i^2 and the scores
S_i = (x_i - m) / s^2; with the mean and the standard deviation of the group's rewards

    g = (1/G) sum_i S_i (R_i - mean) / std,      std^2 = sum_i (R_i - mean)^2 / (G - c),

c = 0 or 1.  Without the division E g = (1 - 1/G) dE[R]/dm = (1 - 1/G) 2 m; with it the
limit for G -> inf is 2 m / std(R).  For finite G two identities take the group apart:

    1/std = 2 pi^(-1/2) int_0^inf exp(-u^2 std^2) du,
    exp(-a sum (R_i - mean)^2) = (G a / pi)^(1/2) int exp(-a sum (R_i - y)^2) dy,

under whose weight the mean of y is that of the group, so that with a = u^2 / (G - c)

    E g = 2 pi^(-1/2) int du (G a / pi)^(1/2) int dy A(y) B(y)^(G - 1),
    A(y) = E[S (R - y) exp(-a (R - y)^2)],    B(y) = E exp(-a (R - y)^2).

Source: Z. Shao et al. 2024, arXiv:2402.03300 (GRPO), the estimator; its mean is ours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sdebench.errors import ParameterError

Array = NDArray[np.float64]

REACH = 7.0
"""Standard deviations of x, and widths of exp(-a R^2), that are integrated over."""
LOG_STEP = 0.2
LARGEST = 60.0
"""Largest u; a power law takes over from there."""


def standardized_gradient(
    group_size: int, mean: float, scale: float, correction: int = 0, step: float = 1.0
) -> float:
    """Return E g with standardized rewards, to about 1e-5.

    Parameters
    ----------
    group_size : G >= 3.
    mean, scale : m and s > 0.
    correction : c in the divisor G - c of the variance.
    step : factor of all steps of the quadrature; less is finer.
    """
    if group_size < 3 or not scale > 0.0:
        raise ParameterError(
            f"group_size {group_size} and scale {scale}: need a group of at least 3 "
            "and a positive scale"
        )
    spacing = step * LOG_STEP
    nodes = np.exp(np.arange(np.log(1e-5), np.log(LARGEST), spacing))
    values = np.zeros(len(nodes))
    for i, u in enumerate(nodes):
        a = u**2 / (group_size - correction)
        values[i] = u * _inner(a, group_size, mean, scale, step)
        if abs(values[i]) < 1e-9 * np.max(np.abs(values)):
            break
    total = spacing * np.sum(values)
    if values[-1]:  # beyond the largest u the tail falls like a power of u
        power = np.log(values[-2] / values[-1]) / spacing
        total += values[-1] * (1.0 / power - 0.5 * spacing)
    return float(2.0 / np.sqrt(np.pi) * total)


def _inner(a: float, group_size: int, mean: float, scale: float, step: float) -> float:
    """Return (G a / pi)^(1/2) int A B^(G - 1) dy by the trapezoidal rule."""
    farthest = abs(mean) + REACH * scale
    width = 1.0 / np.sqrt(a)
    x_step = step * min(0.1 * scale, 0.4 * width / farthest)
    x = np.arange(mean - REACH * scale, mean + REACH * scale, x_step)
    score = (x - mean) / scale**2
    weight = np.exp(-0.5 * scale**2 * score**2)
    weight /= weight.sum()
    y_step = step * 0.6 * width / np.sqrt(group_size)
    y = np.arange(-REACH * width, farthest**2 + REACH * width, y_step)
    total = 0.0
    for part in np.array_split(y, len(y) // 256 + 1):
        gap = x**2 - part[:, None]
        bell = np.exp(-a * gap**2) * weight
        total += float((bell * gap) @ score @ bell.sum(axis=1) ** (group_size - 1))
    return float(np.sqrt(group_size * a / np.pi) * y_step * total)
