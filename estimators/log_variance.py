"""Log-variance divergence of path laws, and VarGrad.

Along paths of a control v, with the noise y_n = z_n + v_n of the base process, the
log-ratio of the policy's law to the tilted one is, up to a constant,

    l = sum_n (w_n . y_n - 1/2 |w_n|^2 + f_n) - r(X_N),

and L_v = 1/2 Var_v(l) is differentiated with the paths held fixed:

    grad l = sum_n (dw_n/dtheta)^T (y_n - w_n),
    grad L_v = E_v[(l - E_v l) grad l].

On policy, v = w, the noise y_n - w_n is z_n, grad l is the score S and
l = sum_n (1/2 |w_n|^2 + f_n + w_n . z_n) - r(X_N).  Of the martingale times S only the
same step survives, E[w_n . z_n (dw_n/dtheta)^T z_n] = E[(dw_n/dtheta)^T w_n], the
direct part of the gradient: grad L_w = grad J_N exactly (VarGrad; without the factor
1/2 of L twice that).  The covariance over M paths has the factor 1/(M - 1).

Where the policy's law is the tilted law, l is constant, and so the estimate has no
variance.  Off policy L_v has the same minimizer there, but another gradient elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sdebench.estimators._log_ratio import CentredLogRatio


@dataclass(frozen=True, kw_only=True)
class LogVariance(CentredLogRatio):
    """Gradient of half the variance of the log-ratio of path laws (VarGrad).

    Parameters
    ----------
    sampling : control of the paths: "current" (the policy's, VarGrad), "base" or
        "optimal".
    """

    estimand: ClassVar[str] = "gradient"
    source: ClassVar[str] = (
        "Nüsken and Richter 2021, arXiv:2005.05409; VarGrad: Richter et al. 2020, "
        "arXiv:2010.10436"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
\ell &= \sum_n \left( w_n \cdot y_n - \tfrac{1}{2} |w_n|^2 + f_n \right) - r(X_N),
  \quad y_n = z_n + v_n \\
g &= \frac{1}{M - 1} \sum_{m=1}^{M} \left( \ell^{(m)} - \bar\ell \right)
  \nabla_\theta \ell^{(m)}
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "half the gradient of the variance of the log-ratio under the paths' law; with "
        "those of the policy itself, the gradient of the discretized objective J_N"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"sampling": "base"},
    )
