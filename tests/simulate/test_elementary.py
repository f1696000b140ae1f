"""Elementary functions: accuracy against mpmath, equal bits in numba, numpy, torch."""

import mpmath
import numba
import numpy as np
import pytest
import torch

from sdebench.simulate import elementary
from sdebench.simulate.elementary import (
    exp_numpy,
    exp_torch,
    log_numpy,
    log_torch,
    sincos32,
    sincos64,
    sqrt_torch,
)

# Stated bounds in units in the last place: see the module's docstring.
BOUND = {
    ("log", "float64"): 0.85,
    ("log", "float32"): 0.85,
    ("exp", "float64"): 1.15,
    ("exp", "float32"): 1.0,
    ("sin", "float64"): 1.85,
    ("sin", "float32"): 2.0,
    ("cos", "float64"): 1.85,
    ("cos", "float32"): 2.0,
}
DTYPES = ["float64", "float32"]


@numba.njit(error_model="numpy")
def numba_log(x, out):
    for i in range(x.size):
        out[i] = elementary.log(x[i])


@numba.njit(error_model="numpy")
def numba_exp(x, out):
    for i in range(x.size):
        out[i] = elementary.exp(x[i])


@numba.njit(error_model="numpy")
def numba_exp_contracted(x, out):
    for i in range(x.size):
        out[i] = elementary.exp_contracted(x[i])


@numba.njit(error_model="numpy")
def numba_sincos(x, sine, cosine):
    for i in range(x.size):
        sine[i], cosine[i] = elementary.sincos(x[i])


def points(name, dtype, n, seed=20):
    rng = np.random.default_rng(seed)
    if name == "log":
        low = -1000 if dtype == "float64" else -120
        near_one = 1.0 - 2.0 ** -rng.uniform(1, 24, n // 4)
        small = 2.0 ** rng.uniform(low, -low, n // 4)
        x = np.concatenate([rng.random(n - 2 * (n // 4)), near_one, small])
    elif name == "exp":
        x = rng.uniform(-700, 700, n) if dtype == "float64" else rng.uniform(-85, 85, n)
        x[: n // 2] = rng.normal(size=n // 2)
    else:
        x = rng.uniform(-1, 1, n) * 2.0 ** -rng.integers(0, 20, n)
    return x.astype(dtype)


def numba_values(name, x):
    out = np.empty_like(x)
    if name in ("sin", "cos"):
        both = np.empty((2, x.size), x.dtype)
        numba_sincos(x, both[0], both[1])
        return both[0 if name == "sin" else 1]
    {"log": numba_log, "exp": numba_exp, "exp_contracted": numba_exp_contracted}[name](
        x, out
    )
    return out


def reference(name, x):
    """Return mpmath's value, rounded to 30 digits."""
    value = mpmath.mpf(float(x))
    if name in ("sin", "cos"):
        return getattr(mpmath, name)(value * mpmath.pi / 4)
    return getattr(mpmath, name)(value)


def worst_ulp(name, x, got):
    with mpmath.workdps(30):
        errors = [
            abs(mpmath.mpf(float(g)) - (ref := reference(name, v)))
            / mpmath.mpf(float(np.spacing(x.dtype.type(abs(float(ref))))))
            for v, g in zip(x, got, strict=True)
            if v != 1 or name != "log"
        ]
        return float(max(errors))


@pytest.mark.parametrize(("name", "dtype"), BOUND)
def test_accuracy_against_mpmath(name, dtype):
    x = points(name, dtype, 4000)
    assert worst_ulp(name, x, numba_values(name, x)) <= BOUND[name, dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_contracted_exp_is_as_accurate(dtype):
    x = points("exp", dtype, 4000)
    got = numba_values("exp_contracted", x)
    assert worst_ulp("exp", x, got) <= BOUND["exp", dtype]


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no 80-bit numbers")
@pytest.mark.parametrize(("name", "dtype"), BOUND)
def test_accuracy_at_many_points(name, dtype):
    x = points(name, dtype, 400_000, seed=21)
    got = numba_values(name, x)
    wide = x.astype(np.longdouble)
    if name in ("sin", "cos"):
        wide = wide * np.arctan(np.longdouble(1))
    exact = getattr(np, name)(wide)
    keep = exact != 0
    ulp = np.spacing(np.abs(exact.astype(dtype))).astype(np.longdouble)
    assert np.max((np.abs(got - exact) / ulp)[keep]) <= BOUND[name, dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits(dtype):
    for name, by_numpy, by_torch in (
        ("log", log_numpy, log_torch),
        ("exp", exp_numpy, exp_torch),
    ):
        x = points(name, dtype, 100_000, seed=22)
        expected = numba_values(name, x)
        np.testing.assert_array_equal(by_numpy(x), expected)
        np.testing.assert_array_equal(by_torch(torch.from_numpy(x)).numpy(), expected)
    v = points("sin", dtype, 100_000, seed=23)
    twin = sincos64 if dtype == "float64" else sincos32
    for given in (v, torch.from_numpy(v)):
        sine, cosine = (np.asarray(a) for a in twin(given))
        assert sine.dtype == cosine.dtype == dtype
        np.testing.assert_array_equal(sine, numba_values("sin", v))
        np.testing.assert_array_equal(cosine, numba_values("cos", v))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    one = np.ones(1, dtype)
    assert numba_values("log", one)[0] == 0
    assert numba_values("exp", 0 * one)[0] == 1
    assert numba_values("sin", 0 * one)[0] == 0
    assert numba_values("cos", 0 * one)[0] == 1
    # saturates instead of overflowing: 0 < exp < inf for any argument
    far = np.array([-1e30, 1e30], dtype)
    for name in ("exp", "exp_contracted"):
        low, high = numba_values(name, far)
        assert 0 < low < 1e-37
        assert 1e38 < high < np.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_square_root_is_correctly_rounded(dtype):
    x = np.random.default_rng(24).uniform(0, 50, 100_000).astype(dtype)
    expected = np.sqrt(x)
    np.testing.assert_array_equal(sqrt_torch(torch.from_numpy(x)).numpy(), expected)
    if dtype == "float32":
        np.testing.assert_array_equal(
            np.sqrt(x.astype(np.float64)).astype(np.float32), expected
        )


def test_only_for_kernels():
    for function in (
        elementary.log,
        elementary.exp,
        elementary.exp_contracted,
        elementary.sincos,
    ):
        with pytest.raises(NotImplementedError, match="numba kernels"):
            function(1.0)


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("6.666666666666735130e-01", "6.666666666666835130e-01", "log"),
        ("z * 3.99999999994", "z * 3.99999999984", "log"),
        ("-1.66666666666666324348e-01", "-1.66666666666656324348e-01", "sin"),
        ("4.16666666666666019037e-02", "4.16666666666606019037e-02", "cos"),
        ("0.16666666666666669", "0.1666666666666767", "exp"),
        (" - n * LN2_LOW\n", " + n * LN2_LOW\n", "exp"),
    ],
)
def test_a_wrong_digit_is_caught(old, new, name):
    with open(elementary.__file__, encoding="utf-8") as file:
        source = file.read()
    assert old in source
    mutant = {"__name__": "mutant"}
    exec(source.replace(old, new), mutant)
    x = points(name, "float64", 4000)
    if name in ("sin", "cos"):
        got = mutant["sincos64"](x)[0 if name == "sin" else 1]
    else:
        got = mutant[f"{name}_numpy"](x)
    assert worst_ulp(name, x, got) > BOUND[name, "float64"]
