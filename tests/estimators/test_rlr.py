"""RLR: every step covered once, the published example, and the block's place."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from _chain import ScalarChain, grid, group_mean, random_noise, rows
from scipy.stats import t

from sdebench import registry
from sdebench.composite import some_paths
from sdebench.errors import NotApplicableError, ParameterError, UnknownNameError
from sdebench.estimator import Sizes
from sdebench.estimators.rlr import RLR
from sdebench.measure import measure
from sdebench.measure.workers import GRID_SHIFT, Settings, make_worker

THETA = 0.9
CHAIN = ScalarChain()
"""Four steps, factor 0.9, noise 0.7, start 1.2, reward -x^2."""
NOISE, WEIGHTS = grid(CHAIN, 6)
SIZES = Sizes(n_paths=8, n_steps=4, dim=1, n_params=1)


def rlr(**options):
    return registry.estimator("rlr", **({"baseline": "none"} | options))


def moments(estimator, backend="numba"):
    """Exact mean and variance of one path."""
    mean, covariance = group_mean(
        rows(CHAIN, estimator, THETA, NOISE, backend=backend), WEIGHTS
    )
    return mean[0], covariance[0, 0]


def test_the_example_of_the_index_set():
    """Exact gradient 9.557; with the printed index set 13.109 (13.09 from samples)."""
    exact = CHAIN.policy(THETA).gradient(reward_only=True)[0]
    assert exact == pytest.approx(9.557, abs=5e-4)
    powers = THETA ** np.arange(0, 8, 2)
    slopes = np.array([0.0, 2.0, 4.0, 6.0]) * powers / THETA
    by_hand = 8 * THETA**7 * 1.2**2 + 0.7**2 * slopes.sum()
    assert exact == pytest.approx(by_hand, rel=1e-13)
    for start in (0, 1):
        mean, _ = moments(rlr(start=start))
        assert mean == pytest.approx(exact, rel=1e-12)
    for start in (0, 1, 2):
        mean, _ = moments(rlr(start=start, coverage="printed"))
        assert mean == pytest.approx(13.10945616, rel=1e-9)


def test_variances_of_the_example():
    """Exact; from samples with heavy tails they were given to about two per cent.

    The half-order block does not lower the variance here.
    """
    for options, exact, sampled in (
        ({"terms": "zeroth_order"}, 1357.318267, 1350),
        ({"terms": "half_order", "block": 4}, 1805.693136, 1800),
        ({"block": 0}, 860.201599, 866),
        ({"block": 2, "start": 1}, 955.819688, 945),
        ({"block": 3, "start": 0}, 1042.141203, 1031),
        ({"block": 2, "start": 0}, 906.125421, None),
    ):
        variance = moments(rlr(**options))[1]
        assert variance == pytest.approx(exact, rel=1e-8), options
        assert sampled is None or variance == pytest.approx(sampled, rel=0.02)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("terms", ["all", "half_order", "zeroth_order"])
@pytest.mark.parametrize("coverage", ["corrected", "printed"])
def test_the_mean_is_the_multiplicity_of_every_step(terms, coverage, backend):
    """Exact means of every block at every place against the closed form."""
    policy = CHAIN.policy(THETA)
    for block in range(5):
        options = {"terms": terms, "coverage": coverage, "block": block}
        for start in range(5 - block):
            if terms == "half_order" and block == 0:
                continue
            estimator = rlr(start=start, **options)
            if estimator.not_applicable_to(SIZES):
                assert start == 4 - block
                assert (terms, coverage) == ("all", "corrected")
                continue
            target = estimator.target(policy)
            mean, _ = moments(estimator, backend)
            assert mean == pytest.approx(target[0], rel=1e-11, abs=1e-11)


def test_multiplicity():
    """Fixed numbers, first step first: the printed set counts the last one twice."""

    def count(n_steps, **options):
        return rlr(**options).multiplicity(n_steps)

    for block in (0, 1, 2, 3):
        np.testing.assert_allclose(count(5, block=block), np.ones(5))
        printed = count(5, block=block, coverage="printed")
        np.testing.assert_allclose(printed, [1, 1, 1, 1, 2])
    np.testing.assert_allclose(count(4, terms="zeroth_order"), np.ones(4))
    half = count(4, terms="half_order", block=2)
    np.testing.assert_allclose(half, np.array([1, 2, 2, 1]) / 3)
    fixed = count(4, terms="half_order", block=2, start=1)
    np.testing.assert_allclose(fixed, [0, 1, 1, 0])


def test_one_step_blocks_are_reinforce():
    """Path by path, where the block is one step; so are zeroth-order terms."""
    noise = random_noise(CHAIN, 64, seed=1)
    plain = registry.estimator("reinforce", baseline="none", objective="reward")
    reference = rows(CHAIN, plain, THETA, noise)
    zeroth = rows(CHAIN, rlr(terms="zeroth_order"), THETA, noise)
    np.testing.assert_allclose(zeroth, reference, rtol=1e-12)
    single = [rlr(terms="half_order", block=1, start=n) for n in range(4)]
    blocks = sum(rows(CHAIN, e, THETA, noise) for e in single)
    np.testing.assert_allclose(blocks, reference, rtol=1e-12)


def test_the_whole_block_is_the_derivative_of_the_last_mean():
    """Half order over the chain: -r times the score of d mean(X_N) / dtheta."""
    noise = random_noise(CHAIN, 16, seed=2)
    ours = rows(CHAIN, rlr(terms="half_order", block=4), THETA, noise)[0]
    z = noise.steps[:, 0]

    def end(theta, last):
        x = np.full(16, 1.2)
        for n in range(4):
            x = theta * x + 0.7 * z[n] * (n < 3 or last)
        return x

    step = 1e-5
    slope = (end(THETA + step, False) - end(THETA - step, False)) / (2 * step)
    np.testing.assert_allclose(
        ours, end(THETA, True) ** 2 * slope * z[3] / 0.7, rtol=1e-7
    )


def test_a_baseline_keeps_the_mean():
    """Groups of two paths, all noise by quadrature: exact."""
    chain = ScalarChain(n_steps=2)
    noise, weights = grid(chain, 6, group=2)
    exact = chain.policy(THETA).gradient(reward_only=True)
    pairs = np.split(np.arange(2 * len(weights)), len(weights))
    estimator = rlr(baseline="leave_one_out", block=1, start=0)
    total = 0.0
    for pair, weight in zip(pairs, weights, strict=True):
        part = noise._replace(
            steps=noise.steps[:, :, pair],
            start=noise.start[:, pair],
            uniforms=noise.uniforms[pair],
        )
        if weight > 1e-9:
            total += weight * rows(chain, estimator, THETA, part)[0].mean()
    assert total == pytest.approx(exact[0], rel=1e-6)


def test_the_place_of_the_block_is_uniform():
    """chi^2 of the starts of 600 replicates; false-alarm rate 1e-4."""
    from scipy.stats import chi2

    estimator = rlr(terms="half_order", block=1)
    noise = random_noise(CHAIN, 1, seed=3)
    fixed = [
        rows(CHAIN, rlr(terms="half_order", block=1, start=n), THETA, noise)[0, 0]
        for n in range(4)
    ]
    counts = np.zeros(4)
    for seed in range(600):
        value = rows(CHAIN, estimator, THETA, noise, seed=seed)[0, 0]
        counts[int(np.argmin(np.abs(np.array(fixed) - value)))] += 1
    assert np.sum((counts - 150) ** 2 / 150) < chi2.isf(1e-4, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnHalf(RLR):
    """A wrong one: each half uses the place that varied least on that half itself."""

    def _chosen_by_the_other_half(self, runner, starts):
        parts = [self._parts(runner, start) for start in starts]
        chosen = np.empty((runner.n_params, runner.n_paths))
        for own in np.array_split(np.arange(runner.n_paths), 2):
            rows = [self._gradients(f[:, own], w[:, own]) for f, w in parts]
            best = np.argmin([row.var(axis=1).sum() for row in rows])
            chosen[:, own] = self._gradients(*parts[best])[:, own]
        return chosen


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_an_adaptive_place_keeps_the_mean(baseline):
    """Groups of four paths; t-test, false-alarm rate 1e-4 for each of two."""
    exact = CHAIN.policy(THETA).gradient(reward_only=True)[0]
    count = 5000
    noise = random_noise(CHAIN, 4 * count, seed=11)

    def score(kind):
        estimator = kind(placement="adaptive", baseline=baseline)
        parts = (some_paths(noise, 4 * i, 4) for i in range(count))
        values = np.array([rows(CHAIN, estimator, THETA, p)[0].mean() for p in parts])
        return (values.mean() - exact) / (values.std(ddof=1) / np.sqrt(count))

    limit = t.isf(0.5e-4, count - 1)
    assert abs(score(RLR)) < limit < abs(score(OwnHalf))


def test_an_adaptive_place_is_the_best_of_the_other_half():
    """Both halves get the rows of the fixed place that varied least on the other."""
    noise = random_noise(CHAIN, 200, seed=12)
    options = {"block": 2, "baseline": "none"}
    found = rows(CHAIN, rlr(placement="adaptive", **options), THETA, noise)[0]
    fixed = np.array(
        [rows(CHAIN, rlr(start=n, **options), THETA, noise)[0] for n in range(2)]
    )
    spread = fixed.reshape(2, 2, 100).var(axis=2)
    best = spread.argmin(axis=0)[::-1]
    np.testing.assert_array_equal(found, fixed.reshape(2, 2, 100)[best, [0, 1]].ravel())


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("spec", ["ou_linear:dim=3", "gaussian_tilt:dim=2"])
def test_one_step_blocks_undo_the_noise_matrix(spec, backend):
    """G^T G^-T z = z for every G: blocks of one step are REINFORCE, path by path."""
    problem = registry.problem(spec)
    settings = Settings(
        times=problem.time_grid(3),
        theta=problem.theta("halfway"),
        n_paths=32,
        backend=backend,
        dtype="float64",
        device="cpu",
        seed=5,
    )

    def values(estimator):
        worker = make_worker(problem, [estimator], settings)
        return worker.block(0, 3 << GRID_SHIFT, 32)[0][0][:, :32].copy()

    plain = registry.estimator("reinforce", baseline="none", objective="reward")
    blocks = [rlr(terms="half_order", block=1, start=n) for n in range(3)]
    np.testing.assert_allclose(
        sum(values(e) for e in blocks), values(plain), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("problem", ["ou_linear:dim=3", "gaussian_tilt"])
def test_noise_that_is_not_the_identity(problem):
    """A full matrix G, and a scalar: own bias of a long block, p > 1e-4 / 2."""
    row = measure(
        problem, "rlr:block=4,start=0", n_steps=6, n_paths=512, n_replicates=128, seed=4
    ).row
    assert row["p_value_own"] > 5e-5


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"coverage": "twice"}, UnknownNameError),
        ({"terms": "first_order"}, UnknownNameError),
        ({"baseline": "optimal"}, UnknownNameError),
        ({"block": -1}, ParameterError),
        ({"start": -2}, ParameterError),
        ({"placement": "best"}, UnknownNameError),
        ({"placement": "adaptive", "start": 0}, ParameterError),
        ({"placement": "adaptive", "terms": "half_order"}, ParameterError),
        ({"terms": "half_order", "block": 0}, ParameterError),
    ],
)
def test_wrong_options_are_refused(options, error):
    with pytest.raises(error):
        rlr(**options)


def test_a_block_longer_than_the_chain_is_refused():
    for options, longest in (({}, 3), ({"coverage": "printed"}, 4)):
        assert rlr(block=longest, **options).not_applicable_to(SIZES) is None
        reason = rlr(block=longest + 1, **options).not_applicable_to(SIZES)
        assert "smaller block" in reason
    assert "from step 2" in rlr(block=2, start=2).not_applicable_to(SIZES)
    with pytest.raises(NotApplicableError, match="does not fit"):
        measure("brownian_linear", "rlr:block=4", n_steps=4, n_paths=8)
    assert "2 paths" in registry.estimator("rlr").not_applicable(1)
    adaptive = registry.estimator("rlr", placement="adaptive")
    assert "4 paths" in adaptive.not_applicable(3)


@pytest.mark.parametrize(
    "problem",
    [
        "lq_oscillator",
        pytest.param("stochastic_pendulum", marks=pytest.mark.slow),
    ],
)
def test_noise_that_misses_a_direction_is_refused(problem):
    """The half-order term divides by it; the other terms do not."""
    settings = {"n_steps": 4, "n_paths": 8, "n_replicates": 2}
    with pytest.raises(NotApplicableError, match="every direction"):
        measure(problem, "rlr", **settings)
    row = measure(problem, "rlr:block=0", **settings).row
    assert np.all(np.isfinite(row["mean"]))


@pytest.mark.parametrize("problem", ["double_well", "hjb_log:dim=3", "ou_polynomial"])
def test_diagonal_noise_reaches_every_direction(problem):
    """Tables may hold the diagonal of the noise alone; the backends agree."""
    rows = [
        measure(problem, "rlr", n_steps=8, n_paths=8, n_replicates=2, backend=backend)
        for backend in ("numba", "torch")
    ]
    means = [np.array(row.row["mean"]) for row in rows]
    np.testing.assert_allclose(*means, rtol=1e-9)
