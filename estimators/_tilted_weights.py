"""Means under the tilted path law P* from paths of a control v.

The unnormalised weight of a path is alpha = dP*/dP_v Z,

    log alpha = r(X_N) - sum_n (f_n + v_n . z_n + 1/2 |v_n|^2),

and a mean under P* is E_v[alpha g] / E_v[alpha].  The log-weights of all paths of a
replicate are shifted by the largest of them: it cancels in the ratio, no weight exceeds
one and one of them is one, so that neither sum overflows or vanishes.
"""

from __future__ import annotations

import numpy as np

from sdebench.estimator import Array


def log_weight(costs: Array) -> Array:
    """Return log alpha (n_paths,) from the rows (4, n_paths) of `PathCosts`."""
    control, running, martingale, reward = costs
    return np.asarray(reward - running - martingale - control)


def weighted(rows: Array, log_weights: Array) -> Array:
    """Return alpha g and alpha (C + 1, n_paths) of rows g (C, n_paths), shifted."""
    weights = np.exp(log_weights - np.max(log_weights))
    return np.vstack([weights * rows, weights])


def normalized(mean: Array) -> Array:
    """Return the ratio of the means of alpha g (C,) and alpha."""
    return np.asarray(mean[:-1] / mean[-1])
