"""Noise: known answers, the definition in mpmath, equal bits, statistical quality.

Statistical tests use fixed seeds and a total false-alarm rate of 1e-6 each.
"""

import inspect
from concurrent.futures import ThreadPoolExecutor

import mpmath
import numba
import numpy as np
import pytest
import torch
from scipy import special, stats

from sdebench.errors import ParameterError
from sdebench.simulate import noise, noise_numpy, noise_torch
from sdebench.simulate.noise import normals, split_seed, start_normals, start_uniforms

BACKENDS = ["numba", "numpy", "torch"]
DTYPES = ["float64", "float32"]
FALSE_ALARM = 1e-6

# Random123, kat_vectors, philox4x32 10: counter, key, output
KNOWN = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# seed, replicate, first_path, n_paths, first_step, n_steps, dim
ADDRESSES = [
    (1, 0, 0, 100, 0, 3, 2),
    (2**64 - 1, 7, 2**32 - 50, 100, 5, 7, 3),
    (12345678901234, 2**32 - 1, 2**40 + 3, 1000, 17, 5, 1),
    (5, 5, 7 * 2**32 - 10, 700, 3, 1, 11),
    (3, 2, 2**63 - 1000, 30, 2**33 - 6, 6, 1),
    (4, 9, 123, 1, 40, 3, 4),
]


def as_array(x):
    return x.numpy() if isinstance(x, torch.Tensor) else x


# The definition, once more and slowly -------------------------------------------------


def philox_python(counter, key):
    """Philox4x32-10 with Python integers, after the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def normal_of_words(words, j):
    """Return normal j of a block from its four words, in mpmath."""
    wr, wa = words[j // 2 * 2], words[j // 2 * 2 + 1]
    u = (mpmath.mpf(wr) + 0.5) / 2**32
    angle = mpmath.pi / 4 * ((mpmath.mpf(wa >> 2) + 0.5) / 2**29 - 1)
    sine, cosine = mpmath.sin(angle), mpmath.cos(angle)
    if wa & 2:
        cosine = -cosine
    pair = (sine, cosine) if wa & 1 else (cosine, sine)
    return float(mpmath.sqrt(-2 * mpmath.log(u)) * pair[j % 2])


def normal_at(seed, replicate, path, q, first_block=0):
    """Return normal q of a path from its address alone."""
    key = (seed % 2**32, seed >> 32)
    counter = (path % 2**32, path >> 32, first_block + q // 4, replicate)
    return normal_of_words(philox_python(counter, key), q % 4)


def worst_deviation(rows, address, first_block, seed=0):
    """Compare 60 entries of rows (blocks, 4, paths) with the definition."""
    key, replicate, first_path = address
    rng = np.random.default_rng(seed)
    worst = 0.0
    for _ in range(60):
        row, p = int(rng.integers(rows.shape[0])), int(rng.integers(rows.shape[1]))
        exact = normal_at(
            key[0] | key[1] << 32, replicate, first_path + p, row, first_block
        )
        worst = max(worst, abs(float(rows[row, p]) - exact))
    return worst


@numba.njit(error_model="numpy")
def numba_philox(counter, key):
    return noise.philox(counter[0], counter[1], counter[2], counter[3], key[0], key[1])


def philox_words(backend, counter, key):
    if backend == "numba":
        return tuple(
            int(w)
            for w in numba_philox(
                np.array(counter, np.uint32), np.array(key, np.uint32)
            )
        )
    if backend == "numpy":
        arrays = [np.array([c], np.uint64) for c in counter]
        return tuple(int(w[0]) for w in noise_numpy.philox(arrays, *key))
    tensors = [torch.tensor([c]) for c in counter]
    return tuple(int(w[0]) for w in noise_torch.philox(tensors, *key))


@pytest.mark.parametrize("backend", [*BACKENDS, "python"])
@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_known_answers(backend, counter, key, output):
    if backend == "python":
        assert philox_python(counter, key) == output
    else:
        assert philox_words(backend, counter, key) == output


@pytest.mark.parametrize("backend", BACKENDS)
def test_words_at_random_counters(backend):
    rng = np.random.default_rng(30)
    for _ in range(50):
        counter = tuple(int(c) for c in rng.integers(0, 2**32, 4))
        key = tuple(int(k) for k in rng.integers(0, 2**32, 2))
        assert philox_words(backend, counter, key) == philox_python(counter, key)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 3e-15), ("float32", 2e-6)]
)
@pytest.mark.parametrize("address", ADDRESSES)
def test_normals_follow_the_definition(address, dtype, tolerance):
    seed, replicate, first_path, n_paths, first_step, n_steps, dim = address
    z = normals(*address, dtype=dtype)
    assert z.shape == (n_steps, n_paths, dim)
    assert z.dtype == dtype
    rng = np.random.default_rng(31)
    for _ in range(40):
        n, p, i = (int(rng.integers(size)) for size in z.shape)
        q = (first_step + n) * dim + i
        exact = normal_at(seed, replicate, first_path + p, q)
        assert z[n, p, i] == pytest.approx(exact, rel=0, abs=tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 3e-15), ("float32", 2e-6)]
)
def test_start_follows_the_definition(dtype, tolerance):
    seed, replicate, first_path = 77 << 32 | 5, 3, 2**32 - 4
    z = start_normals(seed, replicate, first_path, 9, 6, dtype=dtype)
    u = start_uniforms(seed, replicate, first_path, 9, dtype=dtype)
    assert z.shape == (9, 6)
    assert u.shape == (9,)
    for p in range(9):
        for i in range(6):
            exact = normal_at(seed, replicate, first_path + p, i, 0x80000000)
            assert z[p, i] == pytest.approx(exact, rel=0, abs=tolerance)
        path = first_path + p
        counter = (path % 2**32, path >> 32, 0xC0000000, replicate)
        word = philox_python(counter, (5, 77))[0]
        assert u[p] == np.dtype(dtype).type((word + 0.5) / 2**32)


# Equal bits ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_equal_bits(backend, dtype):
    for address in ADDRESSES:
        expected = normals(*address, dtype=dtype)
        got = as_array(normals(*address, backend=backend, dtype=dtype))
        np.testing.assert_array_equal(got, expected, strict=True)
        for function, arguments in (
            (start_normals, (*address[:4], 5)),
            (start_uniforms, address[:4]),
        ):
            expected = function(*arguments, dtype=dtype)
            got = as_array(function(*arguments, backend=backend, dtype=dtype))
            np.testing.assert_array_equal(got, expected, strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_equal_bits_of_many(backend, dtype):
    """Several chunks of the array backends, half a million normals."""
    address = (31, 4, 2**33 - 40_000, 80_000, 1, 1, 6)
    expected = normals(*address, dtype=dtype)
    got = as_array(normals(*address, backend=backend, dtype=dtype))
    np.testing.assert_array_equal(got, expected, strict=True)


@numba.njit(error_model="numpy")
def numba_box_muller(words, Z):
    noise.box_muller(words, Z, 0, Z.shape[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_words(dtype):
    """Ends of the range, of each octave and of float32's rounding intervals."""
    centers = [0, 2**31, 2**32, 0xB504F333, *(2**k for k in range(8, 31))]
    offsets = np.arange(-300, 300)
    w = np.unique([c + o for c in centers for o in offsets]).astype(np.int64)
    w = w[(w >= 0) & (w < 2**32)].astype(np.uint64)
    words = [w, w[::-1].copy(), w, np.roll(w, 7)]
    Z = np.empty((4, w.size), dtype)
    numba_box_muller(np.array(words, dtype=np.uint32), Z)
    for j in (0, 2):
        r = noise_numpy.radius(words[j], Z.dtype)
        c, s = noise_numpy.direction(words[j + 1], Z.dtype)
        np.testing.assert_array_equal(Z[j : j + 2], np.array([r * c, r * s]))
        signed = [torch.from_numpy(x.astype(np.int64)) for x in words]
        r_t = noise_torch.radius(signed[j], getattr(torch, dtype))
        c_t, s_t = noise_torch.direction(signed[j + 1], getattr(torch, dtype))
        np.testing.assert_array_equal(Z[j], (r_t * c_t).numpy())
        np.testing.assert_array_equal(Z[j + 1], (r_t * s_t).numpy())
    exact = np.sqrt(-2 * np.log((w.astype(np.longdouble) + 0.5) / 2**32))
    r = noise_numpy.radius(w, Z.dtype)
    assert np.max(np.abs(r / exact - 1)) < 4 * np.finfo(dtype).eps
    assert np.all(r > 0)
    assert r.max() <= 6.77


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniforms_stay_below_one(dtype, monkeypatch):
    w = np.array([0, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1], np.uint64)
    monkeypatch.setattr(noise_numpy, "block_words", lambda *_: [w[None]])
    monkeypatch.setattr(
        noise_torch,
        "block_words",
        lambda *_: [torch.from_numpy(w.astype(np.int64))[None]],
    )
    u = noise_numpy.uniforms((0, 0), 0, 0, w.size, np.dtype(dtype))
    assert np.all((u > 0) & (u < 1))
    v = noise_torch.uniforms((0, 0), 0, 0, w.size, getattr(torch, dtype))
    np.testing.assert_array_equal(v.numpy(), u, strict=True)


def test_single_and_double_precision_share_their_words():
    address = (8, 1, 50, 20_000, 3, 4, 5)
    double, single = normals(*address), normals(*address, dtype="float32")
    np.testing.assert_allclose(single, double, rtol=0, atol=2e-6)


@numba.njit(error_model="numpy", nogil=True)
def numba_fill(Z, words, rows, B, p0, q0, k0, k1, replicate):
    noise.fill_normals(Z, words, rows, B, p0, q0, k0, k1, replicate)


@numba.njit(error_model="numpy", nogil=True)
def numba_fill_start(Z, words, U, rows, B, p0, q0, k0, k1, replicate):
    noise.fill_start_normals(Z, words, rows, B, p0, q0, k0, k1, replicate)
    noise.fill_start_uniform(U, words, B, p0, k0, k1, replicate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fill_in_blocks_of_any_size(dtype):
    seed, replicate, dim = 2**40 + 9, 6, 3
    first, n_paths = 2**32 - 100, 300
    expected = normals(seed, replicate, first, n_paths, 8, 8, dim, dtype=dtype)
    for B in (1, 7, 64, 300):
        Z = np.full((24, B + 16), 9.0, dtype)
        words = np.zeros((4, B + 16), np.uint32)
        for p in range(0, n_paths, B):
            n = min(B, n_paths - p)
            numba_fill(Z, words, 24, n, first + p, 24, *split_seed(seed), replicate)
            block = Z[:, :n].reshape(8, dim, n).swapaxes(1, 2)
            np.testing.assert_array_equal(block, expected[:, p : p + n])
        assert np.all(Z[:, B:] == 9.0), "the padding must be left alone"


@pytest.mark.parametrize("dtype", DTYPES)
def test_fill_of_the_start(dtype):
    address = (11, 2, 2**32 - 3, 20)
    Z, U = np.zeros((8, 36), dtype), np.zeros(36, dtype)
    words = np.zeros((4, 36), np.uint32)
    numba_fill_start(Z, words, U, 8, 20, address[2], 0, *split_seed(11), 2)
    np.testing.assert_array_equal(Z[:, :20].T, start_normals(*address, 8, dtype=dtype))
    np.testing.assert_array_equal(U[:20], start_uniforms(*address, dtype=dtype))
    assert not U[20:].any()
    numba_fill_start(Z, words, U, 4, 20, address[2], 4, *split_seed(11), 2)
    np.testing.assert_array_equal(
        Z[:4, :20].T, start_normals(*address, 8, dtype=dtype)[:, 4:]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets(backend):
    """A window of a larger array is the array of the window."""
    whole = as_array(normals(9, 1, 10, 40, 0, 20, 3, backend=backend))
    part = as_array(normals(9, 1, 25, 8, 7, 5, 3, backend=backend))
    np.testing.assert_array_equal(part, whole[7:12, 15:23])


def test_threads():
    whole = normals(10, 0, 0, 20_000, 0, 4, 2)
    starts = range(0, 20_000, 1250)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda p: normals(10, 0, p, 1250, 0, 4, 2), starts))
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


# torch, one step at a time ------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_steps(dim, dtype):
    seed, replicate, first, n_paths = 2**50 + 3, 4, 2**32 - 7, 20
    expected = normals(seed, replicate, first, n_paths, 0, 9, dim, dtype=dtype)
    for step in [*range(9), *reversed(range(9)), 3, 7]:
        z = noise_torch.torch_step_normals(
            split_seed(seed),
            replicate,
            first,
            n_paths,
            step,
            dim,
            getattr(torch, dtype),
        )
        assert z.is_contiguous()
        np.testing.assert_array_equal(z.numpy(), expected[step], strict=True)
        z.zero_()  # the caller's own: the next request must not see it


def test_torch_steps_from_torch_operations(monkeypatch):
    """The route of a device other than a CPU, with its larger chunks."""
    expected = normals(6, 4, 11, 50, 0, 30, 3)
    monkeypatch.setattr(noise_torch, "steps_per_chunk", lambda *_: 8)
    monkeypatch.setattr(noise_torch, "_fast_rows", noise_torch.normal_rows)
    noise_torch._chunk.cache_clear()
    for step in (0, 7, 8, 29, 13):
        z = noise_torch.torch_step_normals((6, 0), 4, 11, 50, step, 3)
        np.testing.assert_array_equal(z.numpy(), expected[step])
    noise_torch._chunk.cache_clear()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_fill_whole_blocks(device):
    for dim in range(1, 30):
        for n_paths in (1, 1000, 10**6, 10**9):
            n = noise_torch.steps_per_chunk(n_paths, dim, torch.device(device))
            assert n >= 1
            assert n * dim % 4 == 0
            assert n <= 64


def test_torch_start():
    z = noise_torch.torch_start_normals((5, 77), 3, 100, 9, 6)
    np.testing.assert_array_equal(z.numpy(), start_normals(77 << 32 | 5, 3, 100, 9, 6))
    u = noise_torch.torch_start_uniforms((5, 77), 3, 100, 9)
    np.testing.assert_array_equal(u.numpy(), start_uniforms(77 << 32 | 5, 3, 100, 9))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 2e-15), ("float32", 1e-6)]
)
def test_cuda(dtype, tolerance):
    words = noise_torch.block_words((1, 2), 3, 2**32 - 50, 100, 5, 6, "cuda")
    expected = noise_numpy.block_words((1, 2), 3, 2**32 - 50, 100, 5, 6)
    for got, word in zip(words, expected, strict=True):
        np.testing.assert_array_equal(got.cpu().numpy(), word.astype(np.int64))
    for address in ADDRESSES:
        z = normals(*address, backend="torch", dtype=dtype, device="cuda")
        np.testing.assert_allclose(
            z.cpu().numpy(), normals(*address, dtype=dtype), rtol=0, atol=tolerance
        )


# Statistical quality ------------------------------------------------------------------


def scores(z):
    """Return z-scores of z (steps, paths, dim), N(0, 1) for a perfect generator."""
    x = z.astype(np.float64)
    n = x.size
    result = {
        "mean": x.mean() * np.sqrt(n),
        "variance": (np.mean(x**2) - 1) * np.sqrt(n / 2),
        "third moment": np.mean(x**3) * np.sqrt(n / 15),
        "kurtosis": (np.mean(x**4) - 3) * np.sqrt(n / 96),
    }
    pairs = {
        "adjacent paths": (x[:, 1:], x[:, :-1]),
        "adjacent steps": (x[1:], x[:-1]),
        "adjacent coordinates": (x[..., 1:], x[..., :-1]),
    }
    for name, (a, b) in pairs.items():
        result[name] = np.mean(a * b) * np.sqrt(a.size)
        result[f"squares of {name}"] = np.mean((a**2 - 1) * (b**2 - 1)) * np.sqrt(
            a.size / 4
        )
    for i in range(x.shape[2]):
        result[f"mean of coordinate {i}"] = x[..., i].mean() * np.sqrt(n / x.shape[2])
    # the Kolmogorov-Smirnov distance, as the normal score of its p-value
    p = stats.kstest(x.ravel(), special.ndtr, method="asymp").pvalue
    result["distribution"] = stats.norm.isf(max(p, 1e-300))
    # the far tail: a Poisson count beyond |z| = 4.5
    expected = n * 2 * stats.norm.sf(4.5)
    result["tail"] = (np.sum(np.abs(x) > 4.5) - expected) / np.sqrt(expected)
    return result


def suspicious(result):
    limit = stats.norm.isf(FALSE_ALARM / 2 / len(result))
    return {name: float(s) for name, s in result.items() if abs(s) > limit}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_statistics(seed, dtype):
    z = normals(seed, 0, 0, 1 << 15, 0, 8, 4, dtype=dtype)
    assert not suspicious(scores(z))


def test_streams_are_unrelated():
    n, shape = 1 << 17, (1 << 15, 4)
    base = normals(1, 0, 0, *(shape[0], 0, 1), 4).ravel()
    others = {
        "next replicate": normals(1, 1, 0, shape[0], 0, 1, 4),
        "far replicate": normals(1, 2**31, 0, shape[0], 0, 1, 4),
        "next seed": normals(2, 0, 0, shape[0], 0, 1, 4),
        "seed of the same low half": normals(1 + 2**32, 0, 0, shape[0], 0, 1, 4),
        "paths 2^32 later": normals(1, 0, 2**32, shape[0], 0, 1, 4),
        "start": start_normals(1, 0, 0, shape[0], 4),
        "far step": normals(1, 0, 0, shape[0], 2**20, 1, 4),
    }
    result = {}
    for name, other in others.items():
        x = other.ravel()
        assert x.size == n
        result[name] = np.mean(base * x) * np.sqrt(n)
        result[f"{name}, squares"] = np.mean((base**2 - 1) * (x**2 - 1)) * np.sqrt(
            n / 4
        )
    assert not suspicious(result)


def test_uniforms_are_uniform():
    u = start_uniforms(3, 0, 0, 1 << 18)
    assert stats.kstest(u, "uniform").pvalue > FALSE_ALARM
    z = start_normals(3, 0, 0, 1 << 18, 1)[:, 0]
    correlation = np.mean((u - 0.5) * z) * np.sqrt(12 * u.size)
    assert abs(correlation) < stats.norm.isf(FALSE_ALARM / 2)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda z: z * 1.005,
        lambda z: z + 0.006,
        lambda z: np.abs(z) * np.where(np.arange(z.shape[2]) == 0, 1, np.sign(z)),
        lambda z: (
            np.concatenate([z[:, :-1], z[:, :1]], 1) * 0.01
            + 0.99995 * z[:, ::1]
            + 0.01 * np.roll(z, 1, axis=1)
        ),
        lambda z: np.where(np.abs(z) > 4, 1.2 * z, z),
        lambda z: np.sign(z) * np.abs(z) ** 1.01,
    ],
    ids=["scale", "shift", "quadrant", "neighbors", "tail", "shape"],
)
def test_the_statistics_notice(spoil):
    z = normals(0, 0, 0, 1 << 15, 0, 8, 4)
    assert suspicious(scores(spoil(z)))


# Mutations ----------------------------------------------------------------------------


def rows_are_right(make):
    """Return whether make(key, replicate, path, n, block, n_blocks) is as defined."""
    address = ((123, 456), 7, 2**32 - 20)
    for first_block in (2, 0x80000000):
        rows = make(*address, 40, first_block, 3)
        if worst_deviation(rows, address, first_block) > 3e-15:
            return False
    return True


MUTATIONS_NUMPY = {
    "multiplier": ("0xD2511F53", "0xD2511F57"),
    "key increment": ("0xBB67AE85", "0xBB67AE87"),
    "rounds": ("range(10)", "range(9)"),
    "half step of the radius": ("w.astype(np.float64) + 0.5", "w.astype(np.float64)"),
    "half step of the angle": ("(2 - 2**31)", "-(2**31)"),
    "words swapped": (
        "radius(w[j], dtype), direction(w[j + 1], dtype)",
        "radius(w[j + 1], dtype), direction(w[j], dtype)",
    ),
    "sine and cosine swapped": ("= r * c, r * s", "= r * s, r * c"),
    "no flip": ("np.where((w & np.uint64(2)) != 0, -c, c)", "c"),
    "path halves": (
        "[path & LOW, path >> HALF_WORD,",
        "[path >> HALF_WORD, path & LOW,",
    ),
    "coordinates": ("part[:, j], part[:, j + 1] =", "part[:, j + 1], part[:, j] ="),
}
MUTATIONS_NUMBA = {
    "half step of the radius": ("U64(0x4120000000000001)", "U64(0x4120000000000000)"),
    "words swapped": (
        "word, radius = W[j], Z[r + j]",
        "word, radius = W[j + 1], Z[r + j]",
    ),
    "no carry into the upper half": ("U32(high + U32(1))", "high"),
}


def mutant(module, old, new):
    """Return the names of ``module`` compiled from its source with old -> new."""
    source = inspect.getsource(module)
    assert old in source
    names = {"__name__": "mutant"}
    # not cached: the kernels of a mutant must not stay on the disk
    exec(source.replace(old, new).replace("@kernel", "@inner"), names)
    return names


@pytest.mark.parametrize("module", [noise, noise_numpy, noise_torch])
def test_no_mutation(module):
    assert rows_are_right(module.normal_rows)


@pytest.mark.parametrize("name", MUTATIONS_NUMPY)
def test_mutations_of_numpy_are_caught(name):
    names = mutant(noise_numpy, *MUTATIONS_NUMPY[name])
    assert not rows_are_right(names["normal_rows"])


@pytest.mark.parametrize("name", MUTATIONS_NUMBA)
def test_mutations_of_numba_are_caught(name):
    names = mutant(noise, *MUTATIONS_NUMBA[name])
    assert not rows_are_right(names["normal_rows"])


# Errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seed": -1},
            "seed must be an integer from 0 to 18446744073709551615; got -1",
        ),
        ({"seed": 2**64}, "seed must be"),
        ({"seed": 1.5}, "got 1.5"),
        ({"seed": True}, "got True"),
        ({"replicate": 2**32}, "replicate must be an integer from 0 to 4294967295"),
        ({"first_path": -1}, "first_path must be"),
        ({"n_paths": 0}, "n_paths must be an integer from 1"),
        ({"first_path": 2**63 - 2, "n_paths": 2}, "n_paths must be"),
        ({"first_step": -2}, "first_step must be"),
        ({"n_steps": 0}, "n_steps must be"),
        ({"dim": 0}, "dim must be"),
        ({"first_step": 2**32, "dim": 3}, "a path has at most"),
        ({"backend": "jax"}, "backend must be 'numba', 'numpy' or 'torch'; got 'jax'"),
        ({"dtype": "float16"}, "dtype must be 'float64' or 'float32'"),
        ({"device": "cuda"}, "device must be 'cpu' for backend 'numba'"),
    ],
)
def test_errors(changes, message):
    arguments = {
        "seed": 0,
        "replicate": 0,
        "first_path": 0,
        "n_paths": 2,
        "first_step": 0,
        "n_steps": 2,
        "dim": 2,
    }
    with pytest.raises(ParameterError, match=message):
        normals(**{**arguments, **changes})


def test_numpy_integers_are_integers():
    z = normals(np.uint64(3), np.int32(0), np.int64(0), np.int16(2), 0, 1, 1)
    np.testing.assert_array_equal(z, normals(3, 0, 0, 2, 0, 1, 1))
