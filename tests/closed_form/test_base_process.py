"""Base processes: kernels, drift and steps must belong to one and the same process."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from sdebench.closed_form import log_quadratics as lq
from sdebench.closed_form.base_process import (
    ConstantNoiseBase,
    GeometricPinnedBase,
    MemorylessBase,
    PinnedBase,
)
from sdebench.closed_form.schedule import (
    Cosine,
    LinearFlow,
    VarianceExploding,
    VariancePreserving,
)
from sdebench.errors import ParameterError

MIXTURE = (
    np.log([0.2, 0.5, 0.3]),
    np.array([[1.0, -0.5], [-1.5, 0.3], [0.2, 2.0]]),
    np.array([[0.3, 0.3], [0.8, 0.8], [0.5, 0.5]]),
)
GAUSSIAN = (np.zeros(1), np.array([[0.7, -0.2]]), np.full((1, 2), 0.4))
SCHEDULES = [
    (VariancePreserving(1.0, 3.0), 0.0),
    (LinearFlow(2.0), 0.2),
    (Cosine(1.0), 0.1),
    (VarianceExploding(1.0, 3.0), 0.0),
]

GAUSSIAN_BASES = {
    **{
        f"memoryless {type(s).__name__}": MemorylessBase(s, *GAUSSIAN, start_time=t0)
        for s, t0 in SCHEDULES
    },
    **{
        f"constant {type(s).__name__}": ConstantNoiseBase(
            s, np.array([0.7, -0.2]), 0.4, 0.9, start_time=t0 * (i % 2)
        )
        for i, (s, t0) in enumerate(SCHEDULES)
    },
    "pinned": PinnedBase(np.array([0.3, -1.0]), 0.8, 1.5),
    "geometric": GeometricPinnedBase(np.array([0.3, -1.0]), 2.0, 1.5, 0.3),
}
MIXTURE_BASES = {
    f"mixture {type(s).__name__}": MemorylessBase(s, *MIXTURE, start_time=t0)
    for s, t0 in SCHEDULES
}
ALL = {**GAUSSIAN_BASES, **MIXTURE_BASES}


def bases(group):
    return pytest.mark.parametrize("base", group.values(), ids=group.keys())


def times(base, *shares):
    span = base.horizon - base.start_time
    return [base.start_time + s * span for s in shares]


def slope(function, step):
    weights = np.array([5 / 6, -5 / 21, 5 / 84, -5 / 504, 1 / 1260])
    return (
        sum(
            c * (function(k * step) - function(-k * step))
            for k, c in enumerate(weights, 1)
        )
        / step
    )


def test_which_bases_are_gaussian():
    assert all(base.gaussian for base in GAUSSIAN_BASES.values())
    assert not any(base.gaussian for base in MIXTURE_BASES.values())
    anisotropic = MemorylessBase(
        VariancePreserving(1.0, 3.0),
        np.zeros(1),
        np.zeros((1, 2)),
        np.array([[1.0, 2]]),
    )
    assert not anisotropic.gaussian


@bases(ALL)
def test_backward_kernels_compose(base):
    """X_s | X_t through X_r, s < r < t (Chapman-Kolmogorov)."""
    s, r, t = times(base, 0.1, 0.35, 0.8)
    (a, p, v), (b, q, w) = base.backward(s, r), base.backward(r, t)
    scale, offset, variance = base.backward(s, t)
    assert scale == pytest.approx(a * b, rel=1e-13)
    np.testing.assert_allclose(offset, a * q + p, atol=1e-13)
    assert variance == pytest.approx(a * a * w + v, rel=1e-12)


@bases(ALL)
def test_backward_kernels_map_marginals_to_marginals(base):
    s, t = times(base, 0.2, 0.9)
    scale, offset, variance = base.backward(s, t)
    masses, means, spreads = lq.gaussian_parameters(base.marginal(t))
    got = lq.gaussian_rows(
        masses, scale * means + offset, scale**2 * spreads + variance
    )
    np.testing.assert_allclose(got, base.marginal(s), rtol=1e-11, atol=1e-12)
    masses, means, spreads = lq.gaussian_parameters(base.marginal(base.horizon))
    np.testing.assert_allclose(
        lq.gaussian_rows(masses, means, spreads), base.terminal, rtol=1e-12, atol=1e-12
    )


@bases(GAUSSIAN_BASES)
def test_forward_kernels_compose_and_fit_the_drift(base):
    s, r, t = times(base, 0.1, 0.35, 0.8)
    (a, p, v), (b, q, w) = base.forward(s, r), base.forward(r, t)
    scale, offset, variance = base.forward(s, t)
    assert scale == pytest.approx(a * b, rel=1e-13)
    np.testing.assert_allclose(offset, b * p + q, atol=1e-13)
    assert variance == pytest.approx(b * b * v + w, rel=1e-12)
    assert base.linear_growth(s, t) == pytest.approx(scale, rel=1e-14)
    # The kernel is the flow of the linear drift with noise sigma^2.
    step = 0.002 * base.horizon

    def kernel(h):
        scale, offset, variance = base.forward(s, r + h)
        return np.concatenate([[scale], offset, [variance]])

    rate = slope(kernel, step)
    scale, offset, variance = base.forward(s, r)
    pull, push = base.linear_drift(r)
    expected = np.concatenate(
        [
            [pull * scale],
            pull * offset + push,
            [2.0 * pull * variance + base.sigma(r) ** 2],
        ]
    )
    np.testing.assert_allclose(rate, expected, rtol=1e-9, atol=1e-9)


@bases(GAUSSIAN_BASES)
def test_forward_and_backward_are_one_joint_law(base):
    """Bayes: the covariance of X_s and X_t by either kernel."""
    s, t = times(base, 0.25, 0.85)
    q_s = lq.gaussian_parameters(base.marginal(s))[2][:, 0]
    q_t = lq.gaussian_parameters(base.marginal(t))[2][:, 0]
    forward = base.forward(s, t)[0] * q_s
    backward = base.backward(s, t)[0] * q_t
    np.testing.assert_allclose(forward, backward, rtol=1e-13)


@bases(GAUSSIAN_BASES)
def test_growth_is_the_exponential_of_the_integrated_drift(base):
    s, t = times(base, 0.1, 0.9)
    flow = solve_ivp(
        lambda r, y: base.linear_drift(r)[0] * y + 0.0,
        (s, t),
        [1.0],
        method="DOP853",
        rtol=1e-12,
        atol=1e-13,
    )
    assert base.linear_growth(s, t) == pytest.approx(flow.y[0, -1], rel=1e-10)


@bases(MIXTURE_BASES)
def test_growth_of_a_mixture_base_is_its_flow(base):
    s, t = times(base, 0.1, 0.9)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    r = s + 0.5 * (t - s) * (nodes + 1.0)
    total = 0.5 * (t - s) * weights @ [base.linear_drift(x)[0] for x in r]
    assert base.linear_growth(s, t) == pytest.approx(np.exp(total), rel=1e-12)


def fokker_planck_residual(base, t, x):
    """d_t p + div(b p) - sigma^2/2 Laplacian p, relative, in terms of log p."""
    step_t, step_x, d = 0.002 * base.horizon, 0.01, x.shape[1]

    def log_p(s):
        return lq.log_value(base.marginal(t + s), x)

    rows, level = base.marginal(t), base.sigma(t) ** 2
    score = lq.gradient(rows, x)
    drift = base.drift(x, t)
    divergence = sum(
        slope(lambda s, e=e: base.drift(x + s * e, t) @ e, step_x) for e in np.eye(d)
    )
    laplacian = np.trace(lq.hessian(rows, x), axis1=1, axis2=2) + np.sum(score**2, 1)
    terms = np.array(
        [
            slope(log_p, step_t),
            np.sum(drift * score, axis=1),
            divergence,
            -0.5 * level * laplacian,
        ]
    )
    return np.max(np.abs(terms.sum(axis=0)) / np.abs(terms).sum(axis=0))


@bases(ALL)
def test_fokker_planck_equation(base):
    x = np.random.default_rng(4).normal(size=(12, base.dim))
    for t in times(base, 0.2, 0.5, 0.9):
        assert fokker_planck_residual(base, t, x) < 1e-9


@bases(MIXTURE_BASES)
def test_fokker_planck_check_sees_half_the_noise(base):
    """Mutant: sigma^2 = eta with the drift kappa x + 2 eta score unchanged."""
    x = np.random.default_rng(4).normal(size=(12, base.dim))

    class Mutant(type(base)):
        def sigma(self, t):
            return np.sqrt(self.schedule.eta(t))

        def drift(self, y, t):
            return base.drift(y, t)

    mutant = Mutant(base.schedule, *MIXTURE, start_time=base.start_time)
    assert fokker_planck_residual(mutant, times(base, 0.5)[0], x) > 1e-3


@bases(MIXTURE_BASES)
def test_backward_kernel_is_the_reversal_of_the_drift(base):
    """The backward kernel solves its own Kolmogorov equation only if sigma^2 = 2 eta.

    Reversed in time the drift is -(b - sigma^2 score), which must be -kappa x.
    """
    x = np.random.default_rng(5).normal(size=(6, 2))
    for t in times(base, 0.2, 0.9):
        score = lq.gradient(base.marginal(t), x)
        reverse = base.drift(x, t) - base.sigma(t) ** 2 * score
        np.testing.assert_allclose(
            reverse, base.schedule.kappa(t) * x, rtol=1e-11, atol=1e-12
        )


@bases(ALL)
@pytest.mark.parametrize("scheme", ["euler_maruyama", "exponential"])
def test_steps_have_the_order_of_the_scheme(base, scheme):
    """Mean of one step without control: x + h b + O(h^2), variance h sigma^2 + ..."""
    (t,) = times(base, 0.4)
    x = np.array([[0.4, -0.9]])
    errors = []
    for h in (1e-3, 5e-4):
        step = base.step(t, t + h, scheme)
        mean = step.scale * x + step.offset
        if not base.gaussian:
            mean = mean + step.base_gain * lq.gradient(base.marginal(t), x)
        errors.append(
            [
                np.max(np.abs(mean - x - h * base.drift(x, t))),
                abs(step.noise**2 - h * base.sigma(t) ** 2),
                abs(step.noise * step.control_gain - h * base.sigma(t) ** 2),
            ]
        )
    coarse, fine = np.array(errors)
    assert np.all(coarse < 1e-4)
    assert np.all((fine < 0.3 * coarse) | (fine < 1e-15))


@bases(GAUSSIAN_BASES)
def test_exponential_step_is_the_kernel_of_a_gaussian_base(base):
    s, t = times(base, 0.3, 0.8)
    step = base.step(s, t, "exponential")
    scale, offset, variance = base.forward(s, t)
    assert step.scale == pytest.approx(scale, rel=1e-14)
    np.testing.assert_allclose(step.offset, offset, atol=1e-14)
    assert step.noise**2 == pytest.approx(variance, rel=1e-12)


@pytest.mark.parametrize("start", [0.5, 0.9, 0.999])
def test_last_exponential_step_with_vanishing_noise(start):
    """sigma = sqrt(2 (1 - t)/t): its integral against the flow has a root at T.

    With the substitution t = 1 - v^2 the integrand is smooth; 400 Gauss nodes.
    """
    base = MemorylessBase(LinearFlow(1.0), *MIXTURE, start_time=0.05)
    step = base.step(start, 1.0, "exponential")
    nodes, weights = np.polynomial.legendre.leggauss(400)
    width = np.sqrt(1.0 - start)
    v = 0.5 * width * (nodes + 1.0)
    t = 1.0 - v**2
    # growth 1/t, sigma = sqrt(2) v / sqrt(t), dt = 2 v dv
    level = np.sqrt(2.0) * v / np.sqrt(t)

    def integral(power):
        return 0.5 * width * weights @ (2.0 * v / t * level**power)

    variance = 0.5 * width * weights @ (2.0 * v * (level / t) ** 2)
    assert step.noise == pytest.approx(np.sqrt(variance), rel=1e-13)
    push = integral(1) * np.sqrt(2.0 * (1.0 - start) / start)
    assert step.noise * step.control_gain == pytest.approx(push, rel=1e-12)
    assert step.base_gain == pytest.approx(integral(2), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MemorylessBase(LinearFlow(1.0), *GAUSSIAN), "start_time"),
        (lambda: MemorylessBase(Cosine(1.0), *GAUSSIAN), "start_time"),
        (
            lambda: MemorylessBase(LinearFlow(1.0), *GAUSSIAN, start_time=1.0),
            "start_time",
        ),
        (
            lambda: MemorylessBase(LinearFlow(1.0), *GAUSSIAN, start_time=-0.1),
            "start_time",
        ),
        (
            lambda: ConstantNoiseBase(LinearFlow(1.0), np.zeros(1), 1.0, 0.0),
            "noise_level",
        ),
        (lambda: PinnedBase(np.zeros(1), 0.0), "noise_level"),
        (lambda: PinnedBase(np.zeros(1), 1.0, -1.0), "horizon"),
        (lambda: GeometricPinnedBase(np.zeros(1), -1.0, 1.0, 1.0), "noise_level"),
        (lambda: GeometricPinnedBase(np.zeros(1), 1.0, 1.0, 0.0), "final_noise_level"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ParameterError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_equal_noise_levels_are_the_constant_base():
    plain, geometric = (
        PinnedBase(np.array([0.4]), 0.7, 2.0),
        GeometricPinnedBase(np.array([0.4]), 0.7, 2.0, 0.7),
    )
    for s, t in ((0.0, 1.1), (0.3, 2.0)):
        for kernel in ("forward", "backward"):
            one, two = getattr(plain, kernel)(s, t), getattr(geometric, kernel)(s, t)
            for a, b in zip(one, two, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-14)


def test_geometric_noise_is_the_integral_of_its_square():
    """Second route: quadrature; equal steps lose equal shares of what is left."""
    base = GeometricPinnedBase(np.zeros(1), 80.0, 2.0, 1.0)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for s, t in ((0.0, 2.0), (0.4, 1.7)):
        r = s + 0.5 * (t - s) * (nodes + 1.0)
        levels = np.array([base.sigma(v) for v in r])
        integral = 0.5 * (t - s) * (weights @ levels**2)
        assert base.forward(s, t)[2] == pytest.approx(integral, rel=1e-12)
    assert base.sigma(2.0) == pytest.approx(1.0, rel=1e-14)
    shares = [base.forward(t, t + 0.1)[2] / base.sigma(t) ** 2 for t in (0, 0.7, 1.5)]
    assert np.ptp(shares) < 1e-14


def test_constant_noise_may_start_where_alpha_is_zero():
    base = ConstantNoiseBase(LinearFlow(1.0), np.array([0.5]), 0.7, 1.0)
    scale, offset = base.linear_drift(0.0)
    assert np.isfinite(scale)
    assert np.all(np.isfinite(offset))
    # q = t^2 C + (1 - t)^2: at t = 0, q = 1, q' = -2
    assert scale == pytest.approx(-1.5, rel=1e-15)
    np.testing.assert_allclose(offset, 0.5, rtol=1e-15)
