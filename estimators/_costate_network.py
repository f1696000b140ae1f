"""Small networks for costates and scores, trained by full-batch Adam in torch.

A network is what one hidden layer adds to a polynomial regression,

    f(x) = polynomial(x) + C tanh(W u + b),    u = (x - mean) / scale,

with C = 0 at first: training starts at the regression.  The derivatives that reversed
labels need are closed forms of one layer.  The initial W and b come from a fixed seed,
so that the same paths give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdebench.estimators._costate_regression import Slice, gaussian_score

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 16
"""Hidden units."""
ITERATIONS = 150
"""Steps of Adam on one time slice; each starts from the network of the later one."""
LEARNING_RATE = 0.03


@dataclass
class HiddenLayer:
    """x -> C tanh(W u + b) with u the standardized state, (n, d) -> (n, d)."""

    mean: Tensor  # (d,)
    scale: Tensor  # (d,)
    weight: Tensor  # (H, d) W
    bias: Tensor  # (H,)   b
    outer: Tensor  # (d, H) C

    @classmethod
    def start(
        cls, mean: Tensor, scale: Tensor, last: HiddenLayer | None
    ) -> HiddenLayer:
        """Return a network that is zero, with the hidden units of ``last``."""
        import torch

        dim = len(mean)
        outer = torch.zeros(dim, WIDTH, dtype=mean.dtype, device=mean.device)
        if last is not None:
            return cls(mean, scale, last.weight, last.bias, outer)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(WIDTH, dim + 1, generator=generator, dtype=mean.dtype)
        drawn = drawn.to(mean.device)
        return cls(mean, scale, drawn[:, :dim] / dim**0.5, drawn[:, dim], outer)

    def trained(self, loss: Callable[[HiddenLayer], Tensor]) -> HiddenLayer:
        """Return the network after `ITERATIONS` steps down ``loss``."""
        import torch

        parts = [
            part.detach().clone().requires_grad_(True)
            for part in (self.weight, self.bias, self.outer)
        ]
        optimizer = torch.optim.Adam(parts, lr=LEARNING_RATE)
        network = HiddenLayer(self.mean, self.scale, *parts)
        with torch.enable_grad():
            for _ in range(ITERATIONS):
                optimizer.zero_grad()
                loss(network).backward()
                optimizer.step()
        return HiddenLayer(self.mean, self.scale, *(part.detach() for part in parts))

    def _hidden(self, x: Tensor) -> Tensor:
        u = (x.double() - self.mean) / self.scale
        return (u @ self.weight.T + self.bias).tanh()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the values (n, d), in double precision."""
        return self._hidden(x) @ self.outer.T

    def along(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the derivative in the directions v (n, d)."""
        slope = 1.0 - self._hidden(x) ** 2
        return (slope * ((v.double() / self.scale) @ self.weight.T)) @ self.outer.T

    def trace(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Return tr(matrix f''(x)) for a symmetric matrix (d, d)."""
        hidden = self._hidden(x)
        rows = self.weight / self.scale
        size = ((rows @ matrix.double()) * rows).sum(1)
        return (-2.0 * hidden * (1.0 - hidden**2) * size) @ self.outer.T

    def divergence(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return sum_i weights_i df_i/dx_i at x, (n,); weights (d,)."""
        slope = 1.0 - self._hidden(x) ** 2
        rows = self.weight / self.scale
        return slope @ (rows * self.outer.T) @ weights


@dataclass
class NetworkSlice:
    """A fitted costate x -> phi(x) (n, d) of one time: polynomial plus network."""

    polynomial: Slice
    network: HiddenLayer

    @classmethod
    def fit(
        cls, x: Tensor, y: Tensor, degree: int, last: NetworkSlice | None
    ) -> NetworkSlice:
        """Regress labels y (n, d) on the states x (n, d), by mean squared error."""
        polynomial = Slice.fit(x, y, degree)
        residual = y.double() - polynomial(x.double())
        size = residual.var(0, correction=0).clamp_min(1e-30)
        mean, scale = polynomial.mean, polynomial.scale
        start = HiddenLayer.start(mean, scale, last.network if last else None)
        # in units of the residual, whose size changes from problem to problem
        unit = size.sqrt()

        def loss(network: HiddenLayer) -> Tensor:
            gap: Tensor = (network(x) - residual / unit) ** 2
            return gap.mean()

        network = start.trained(loss)
        network.outer = network.outer * unit[:, None]
        return cls(polynomial, network)

    def __call__(self, x: Tensor) -> Tensor:
        """Return phi(x), in the precision of x."""
        return self.polynomial(x) + self.network(x).to(x.dtype)

    def along(self, x: Tensor, v: Tensor) -> Tensor:
        """Return phi_x(x) v for directions v (n, d)."""
        return self.polynomial.along(x, v) + self.network.along(x, v).to(x.dtype)

    def trace(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Return tr(matrix phi_xx(x)) for a symmetric matrix (d, d)."""
        own = self.network.trace(x, matrix).to(x.dtype)
        return self.polynomial.trace(x, matrix) + own


@dataclass
class NetworkScore:
    """A fitted score: that of the normal law with the sample's moments plus network.

    Implicit score matching, min E[1/2 |s|^2 + div s].
    """

    slope: Tensor  # (d, d)
    offset: Tensor  # (d,)
    network: HiddenLayer

    @classmethod
    def fit(cls, x: Tensor, last: NetworkScore | None) -> NetworkScore:
        """Fit the score of a sample (n, d)."""
        slope, offset = gaussian_score(x)
        x = x.double()
        affine = x @ slope.T + offset
        scale = x.std(0, correction=0).clamp_min(1e-30)
        start = HiddenLayer.start(x.mean(0), scale, last.network if last else None)

        def loss(network: HiddenLayer) -> Tensor:
            # times the variances, so that coordinates count alike
            own, weights = network(x), scale**2
            energy = ((0.5 * own + affine) * own) @ weights
            total: Tensor = (energy + network.divergence(x, weights)).mean()
            return total

        return cls(slope, offset, start.trained(loss))

    def __call__(self, x: Tensor) -> Tensor:
        """Return s(x) (n, d), in double precision."""
        x = x.double()
        return x @ self.slope.T + self.offset + self.network(x)
