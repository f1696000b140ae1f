"""The view: all that a torch estimator sees of a problem, and it counts every call.

A view holds coefficient tables at one theta and the addresses of one block of noise.
It has no reference to the problem, so the truth cannot be reached from it.  States are
(n_paths, dim); controls are in noise units (w = sqrt(h) u for Euler-Maruyama, see
`sdebench.simulate.tables`), so that one step is

    X_{n+1} = base_mean(n, X_n) + apply_noise(n, w_n + z_n, X_n).

The state is the last argument of `apply_noise` and `noise_transpose`, and w and z are
those of `base_vjp`, for problems whose noise depends on the state; elsewhere they may
be left out.  An estimator runs on such problems if it says that it
`handles_state_dependent_noise`.

Derivatives may be taken by the view's products or by automatic differentiation inside
``torch.enable_grad()``; the view counts and notes both.  A derivative with respect to
theta goes through a zero that is added to the control:

    with torch.enable_grad():
        x, cost, zeros, states = view.start(), 0.0, [], []
        for n in range(view.n_steps):
            zeros.append(torch.zeros_like(x, requires_grad=True))
            w = view.control(n, x) + zeros[n]
            cost = cost + 0.5 * (w * w).sum(1) + view.running_cost(n, x)
            states.append(x.detach())
            x = view.base_mean(n, x) + view.apply_noise(n, w + view.noise(n), x)
        slopes = torch.autograd.grad((cost - view.reward(x)).sum(), zeros)
    gradient = sum(
        view.control_parameter_vjp(n, states[n], v) for n, v in enumerate(slopes)
    )
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sdebench.simulate.tables import has_start_parameters, noise_mask

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.simulate.noise import Noise
    from sdebench.simulate.tables import Tables
    from sdebench.simulate.torch_family import TorchFamily, TorchLinear, TorchMixture

COUNTERS = (
    "drift_evaluations",
    "vjp_evaluations",
    "control_evaluations",
    "reward_evaluations",
    "reward_gradient_evaluations",
    "density_evaluations",
    "noise_draws",
)
DERIVATIVES = {
    "drift_vjp": "derivatives of the base drift",
    "control_vjp": "derivatives of the control in the state",
    "control_parameter_vjp": "derivatives of the control in theta",
    "running_cost_gradient": "the gradient of the running cost",
    "reward_gradient": "the gradient of the reward",
}
"""Derivatives that an estimator may need, which every problem has."""
NEEDS = DERIVATIVES | {
    "base_density": "the density of the base process, or its score",
    "tilted_samples": "exact samples of the tilted law",
}
"""What an estimator may need besides forward paths and their costs."""


@dataclass
class Rollout:
    """Forward paths of one block under the view's control.

    Costs and weights are those given X_0: without terms for its law.

    states, noises, controls : lists over steps of (n_paths, dim); one state more.
    control_cost : sum 1/2 |w_n|^2, (n_paths,).
    running_cost : sum of the running cost, (n_paths,).
    martingale : sum w_n . z_n, (n_paths,).
    reward : r(X_N), (n_paths,).
    """

    states: list[Tensor] = field(default_factory=list)
    noises: list[Tensor] = field(default_factory=list)
    controls: list[Tensor] = field(default_factory=list)
    control_cost: Tensor = None  # type: ignore[assignment]
    running_cost: Tensor = None  # type: ignore[assignment]
    martingale: Tensor = None  # type: ignore[assignment]
    reward: Tensor = None  # type: ignore[assignment]

    @property
    def cost(self) -> Tensor:
        """Cost of each path: control and running cost minus reward, (n_paths,)."""
        return self.control_cost + self.running_cost - self.reward

    @property
    def log_weight(self) -> Tensor:
        """Log of e^{r - sum f} times base over controlled path density, (n_paths,)."""
        return self.reward - self.running_cost - self.martingale - self.control_cost


class View:
    """The instrumented window on a problem that an estimator gets.

    Attributes
    ----------
    times : (n_steps + 1,) numpy array, the time grid.
    n_steps, n_paths, dim, n_params : sizes.
    theta : (n_params,) numpy array, the control parameters (None: no control).
    noisy : (n_steps,) 1 for the steps with noise, else 0.
    denoiser : (n_steps, 5) or empty, see `sdebench.simulate.tables`.
    has_start_parameters : whether theta moves the law of X_0 as well.
    other : a view of the same noise under the estimator's `other_control`, or None.
    dtype, device : of every tensor.
    counts : evaluations so far, each in units of one path.
    used : which of `NEEDS` were used so far.
    """

    def __init__(
        self,
        tables: Tables,
        times: np.ndarray,
        theta: np.ndarray | None,
        *,
        key: tuple[int, int],
        replicate: int,
        first_path: int,
        n_paths: int,
        dtype: str = "float64",
        device: str = "cpu",
        family: TorchFamily | None = None,
        given: Noise | None = None,
        other: View | None = None,
    ) -> None:
        import torch

        from sdebench.simulate.torch_family import torch_family

        self._family = family or torch_family(tables, dtype, device)
        self._address = (key, replicate, first_path, n_paths)
        self._given = given
        self._rollout: tuple[Rollout, dict[str, int]] | None = None
        self.times = np.array(times)
        self.theta = None if theta is None else np.array(theta)
        self.n_steps, self.dim = self._family.n_steps, self._family.dim
        self.n_params = self._family.n_params
        self.n_paths = n_paths
        self.other = other
        self.denoiser = np.array(tables.denoiser)
        self.noisy = noise_mask(tables)
        self.has_start_parameters = has_start_parameters(tables)
        self.dtype = getattr(torch, dtype)
        self.device = device
        self.counts = dict.fromkeys(COUNTERS, 0)
        self.used: set[str] = set()
        self._charge_other()

    def _charge_other(self) -> None:
        """Evaluations under the other control count as this view's own."""
        if self.other is not None:
            self.other.counts, self.other.used = self.counts, self.used

    def _count(self, counter: str) -> None:
        self.counts[counter] += self.n_paths

    def _derivative(self, need: str, counter: str | None = "vjp_evaluations") -> None:
        self.used.add(need)
        if counter:  # a running cost is free, and so is its gradient
            self._count(counter)

    def _watch(
        self, value: Tensor, need: str, counter: str | None = "vjp_evaluations"
    ) -> Tensor:
        """Notice a derivative that is taken by automatic differentiation."""
        from torch.autograd.forward_ad import unpack_dual

        if value.requires_grad:
            value.register_hook(lambda _: self._derivative(need, counter))
        if unpack_dual(value).tangent is not None:  # forward mode
            self._derivative(need, counter)
        return value

    # ---- noise --------------------------------------------------------------------
    def start(self) -> Tensor:
        """Return X_0 (n_paths, dim)."""
        from sdebench.simulate.noise_torch import (
            torch_start_normals,
            torch_start_uniforms,
        )

        if self._given is not None:
            return self._family.start(
                self._tensor(self._given.start.T), self._tensor(self._given.uniforms)
            )
        key, replicate, first, count = self._address
        where = (self.dtype, self.device)
        normals = torch_start_normals(key, replicate, first, count, self.dim, *where)
        uniforms = torch_start_uniforms(key, replicate, first, count, *where)
        return self._family.start(normals, uniforms)

    def noise(self, step: int) -> Tensor:
        """Return the standard normals z (n_paths, dim) of a step, zero without noise.

        Steps from ``n_steps`` on give normals that no path uses, for an estimator's own
        randomness.
        """
        import torch

        from sdebench.simulate.noise_torch import torch_step_normals

        self._count("noise_draws")
        if step < self.n_steps and not self.noisy[step]:
            return torch.zeros(
                (self.n_paths, self.dim), dtype=self.dtype, device=self.device
            )
        if self._given is not None and step < self.n_steps:
            return self._tensor(self._given.steps[step].T)
        key, replicate, first, count = self._address
        return torch_step_normals(
            key, replicate, first, count, step, self.dim, self.dtype, self.device
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        import torch

        return torch.tensor(array, dtype=self.dtype, device=self.device)

    # ---- the process ----------------------------------------------------------------
    def base_mean(self, step: int, x: Tensor) -> Tensor:
        """Return the mean of the base transition from x (n_paths, dim)."""
        self._count("drift_evaluations")
        return self._watch(self._family.base_mean(step, x), "drift_vjp")

    def control(self, step: int, x: Tensor) -> Tensor:
        """Return the control w_n(x) in noise units (n_paths, dim)."""
        self._count("control_evaluations")
        return self._watch(self._family.control(step, x), "control_vjp")

    def apply_noise(self, step: int, v: Tensor, x: Tensor | None = None) -> Tensor:
        """Return G_n(x) v.

        Raises
        ------
        NotApplicableError
            Without x, where the noise depends on it; so do the next two.
        """
        return self._family.apply_noise(step, v, x)

    def noise_transpose(self, step: int, v: Tensor, x: Tensor | None = None) -> Tensor:
        """Return G_n(x)^T v."""
        return self._family.noise_transpose(step, v, x)

    def base_vjp(self, step: int, x: Tensor, v: Tensor, *shock: Tensor) -> Tensor:
        """Return (d (base_mean + G_n(x) shock) / dx)^T v at a fixed shock.

        ``shock`` : w and z, which are added.  Where the noise does not depend on the
        state they may be left out: it is (d base_mean / dx)^T v.
        """
        self._derivative("drift_vjp")
        return self._family.base_vjp(step, x, v, *shock)

    def control_vjp(self, step: int, x: Tensor, v: Tensor) -> Tensor:
        """Return (d control / dx)^T v."""
        self._derivative("control_vjp")
        return self._family.control_vjp(step, x, v)

    def control_parameter_vjp(self, step: int, x: Tensor, v: Tensor) -> Tensor:
        """Return (d control / d theta)^T v, (n_paths, n_params)."""
        self._derivative("control_parameter_vjp")
        return self._family.control_parameter_vjp(step, x, v)

    # ---- the densities of the base process ------------------------------------------
    @property
    def _mixture(self) -> TorchMixture:
        from sdebench.simulate.torch_family import TorchMixture

        assert isinstance(self._family, TorchMixture)
        return self._family

    def base_log_density(self, step: int, x: Tensor) -> Tensor:
        """Return log p(x) of the base process at time 0, ..., n_steps, (n_paths,)."""
        self.used.add("base_density")
        self._count("density_evaluations")
        return self._mixture.base_log_density(step, x)

    def base_score(self, step: int, x: Tensor) -> Tensor:
        """Return grad log p(x) of the base process at time 0, ..., n_steps.

        It counts as an evaluation of the drift: of a denoising process both are the
        output of one network.
        """
        self.used.add("base_density")
        self._count("drift_evaluations")
        return self._mixture.base_score(step, x)

    def tilted_sample(self, normals: Tensor, uniforms: Tensor) -> Tensor:
        """Return exact samples (n_paths, dim) of the tilted law p_T e^r / Z.

        From standard normals (n_paths, dim) and uniforms (n_paths,).  An oracle: it
        exists in a benchmark only.
        """
        self.used.add("tilted_samples")
        return self._mixture.tilted_sample(normals, uniforms)

    # ---- the law of X_0, where theta moves it ----------------------------------------
    @property
    def _start_family(self) -> TorchLinear:
        from sdebench.simulate.torch_family import TorchLinear

        assert isinstance(self._family, TorchLinear)
        assert self.has_start_parameters
        return self._family

    def start_parameter_vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return (dX_0/dtheta)^T v, (n_paths, n_params), at X_0 = x."""
        self._derivative("control_parameter_vjp")
        return self._start_family.start_parameter_vjp(x, v)

    def start_score(self, x: Tensor) -> Tensor:
        """Return d log p_theta(x)/dtheta of the density of X_0, (n_paths, n_params)."""
        self._derivative("control_parameter_vjp")
        return self._start_family.start_score(x)

    def start_cost_gradient(self) -> Tensor:
        """Return the derivative of the start law's relative entropy, (n_params,)."""
        return self._start_family.start_cost_gradient()

    def start_log_ratio_gradient(self, x: Tensor) -> Tensor:
        """Return the gradient of log p_theta/p_0 at X_0 = x, (n_paths, dim).

        p_0 is the law of X_0 under the base process.
        """
        return self._start_family.start_log_ratio_gradient(x)

    # ---- costs ----------------------------------------------------------------------
    def running_cost(self, step: int, x: Tensor) -> Tensor:
        """Return the running cost of a step, its length included, (n_paths,)."""
        cost = self._family.running_cost(step, x)
        return self._watch(cost, "running_cost_gradient", None)

    def running_cost_gradient(self, step: int, x: Tensor) -> Tensor:
        """Return the gradient of the running cost of a step, (n_paths, dim)."""
        self._derivative("running_cost_gradient", None)
        return self._family.running_cost_gradient(step, x)

    def reward(self, x: Tensor) -> Tensor:
        """Return r(x), (n_paths,)."""
        self._count("reward_evaluations")
        value = self._family.reward(x)
        return self._watch(value, "reward_gradient", "reward_gradient_evaluations")

    def reward_gradient(self, x: Tensor) -> Tensor:
        """Return grad r(x), (n_paths, dim)."""
        self._derivative("reward_gradient", "reward_gradient_evaluations")
        return self._family.reward_gradient(x)

    # ---- forward paths ---------------------------------------------------------------
    def rollout(self) -> Rollout:
        """Return the forward paths under the control; simulated once per block.

        Do not write into its tensors: estimators measured together share them.
        """
        if self._rollout is None:
            before = dict(self.counts)
            rollout = self._simulate()
            spent = {name: self.counts[name] - before[name] for name in COUNTERS}
            self._rollout = rollout, spent
        return self._rollout[0]

    def _simulate(self) -> Rollout:
        rollout = Rollout()
        x = self.start()
        rollout.states.append(x)
        running = energy = martingale = x.new_zeros(self.n_paths)
        for n in range(self.n_steps):
            w, z = self.control(n, x), self.noise(n)
            running = running + self.running_cost(n, x)
            energy = energy + (w * w).sum(1)
            martingale = martingale + (w * z).sum(1)
            x = self.base_mean(n, x) + self.apply_noise(n, w + z, x)
            rollout.states.append(x)
            rollout.noises.append(z)
            rollout.controls.append(w)
        rollout.running_cost = running
        rollout.control_cost = 0.5 * energy
        rollout.martingale = martingale
        rollout.reward = self.reward(x)
        return rollout

    def share(self) -> View:
        """Return a view of the same block that shares the forward paths.

        Its counts start at zero and are charged the whole rollout when it asks for
        it: an estimator's cost does not depend on its neighbours.
        """
        self.rollout()
        other = object.__new__(View)
        other.__dict__.update(self.__dict__)
        other.counts = dict.fromkeys(COUNTERS, 0)
        other.used = set()
        other._rollout = None
        if self.other is not None:
            other.other = self.other.share()
            other._charge_other()
        shared = self._rollout

        def rollout() -> Rollout:
            assert shared is not None
            if other._rollout is None:
                other._rollout = shared
                for name, value in shared[1].items():
                    other.counts[name] += value
            return shared[0]

        other.rollout = rollout  # type: ignore[method-assign]
        return other
