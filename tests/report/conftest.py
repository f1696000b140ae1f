"""A frame of made-up but plausible measurements, in the schema of the result rows."""

import json

import numpy as np
import pandas as pd
import pytest

# name: (parameters, exact discretization bias, log10 relative variance of pathwise)
PROBLEMS = {
    "brownian_linear": ({"dim": 2}, 0.0, -1.5),
    "ou_linear": ({"dim": 10}, 0.013, -0.6),
    "ou_quadratic_easy": ({"dim": 20}, 0.023, -0.2),
    "ou_quadratic_hard": ({"dim": 20}, 0.031, 0.9),
    "ou_quadratic_no_state_cost": ({"dim": 20}, 0.0078, 0.1),
    "damped_oscillator": ({"noise": 0.3}, 0.044, 0.4),
    "gaussian_tilt": ({"schedule": "vp"}, 0.0052, 0.0),
    "two_modes": ({"beta": 0.1}, None, 1.3),
    "four_modes": ({}, None, 0.8),
    "nine_modes": ({}, None, 1.1),
    "follmer_mixture": ({"dim": 5}, None, 0.6),
}
CLASSES = {
    "gaussian_tilt": "Gaussian tilt",
    "two_modes": "mixture tilt",
    "four_modes": "mixture tilt",
    "nine_modes": "mixture tilt",
    "follmer_mixture": "pinned start",
}
# name, options, estimand, own relative bias, variance factor, vjps per drift, ns
ESTIMATORS = [
    ("pathwise", {}, "gradient", 0.0, 1.0, 1, 41.0),
    ("reinforce", {"baseline": "none"}, "gradient", 0.0, 300.0, 0, 27.0),
    ("reinforce", {"baseline": "mean"}, "gradient", 0.008, 40.0, 0, 27.5),
    ("reinforce", {"baseline": "leave_one_out"}, "gradient", 0.0, 40.4, 0, 27.8),
    ("reinforce", {"baseline": "optimal"}, "gradient", 0.0, 31.0, 0, 28.9),
    ("adjoint_matching", {}, "matching_gradient", 0.0, 0.35, 1, 38.2),
    (
        "path_importance_sampling",
        {"control": "optimal"},
        "log_normalizer",
        0,
        2e-3,
        0,
        19,
    ),
]
N_PATHS, N_REPLICATES = 4096, 64


def row(problem, estimator, point, n_steps, rng, **changes):
    """Return one row of the schema for a problem and estimator of the lists above."""
    name, (parameters, gap, level) = problem
    estimator, options, estimand, own, factor, vjps, ns = estimator
    n_parameters = 1 if estimand == "log_normalizer" else 3
    out = {
        "problem": name,
        "problem_class": CLASSES.get(name, "linear–quadratic"),
        "problem_parameters": json.dumps(parameters),
        "estimator": estimator,
        "estimator_options": json.dumps(options),
        "point": point,
        "theta": [0.5] * 3,
        "n_steps": n_steps,
        "scheme": "euler_maruyama",
        "n_paths": N_PATHS,
        "n_replicates": N_REPLICATES,
        "backend": "numba",
        "dtype": "float64",
        "device": "cpu",
        "seed": 7,
        "estimand": estimand,
        "parameter_names": [f"theta_{i}" for i in range(n_parameters)],
        "confidence": 0.95,
        "drift_evaluations": float(n_steps),
        "vjp_evaluations": float(vjps * n_steps),
        "ns_per_path_step": ns * rng.uniform(0.9, 1.3),
        "status": "ok",
        "reason": "",
        "schema_version": 1,
        "sdebench_version": "0.1.0",
        "commit": "3f2c91ab40",
        "machine": "AMD EPYC 7B13, 2 cores",
        "created": "2025-11-23T00:00:00+00:00",
    }
    truth = rng.normal(size=n_parameters) + np.array([2.0, -1.0, 0.5])[:n_parameters]
    size = np.linalg.norm(truth)
    direction = rng.normal(size=n_parameters)
    direction /= np.linalg.norm(direction)
    h = 100.0 / n_steps
    exact = gap is not None
    gap = (0.018 if gap is None else gap) * h * (1.0 + 0.15 * h)
    if estimand != "gradient":
        gap, exact = gap * 0.2, exact and estimand == "log_normalizer"
    variance = 10.0**level * factor * rng.uniform(0.8, 1.25) * size**2
    if point == "overshoot":
        variance *= 2.6
    if estimator == "reinforce":  # grows with the number of steps
        variance *= 0.3 + 0.7 * n_steps / 100
    heavy = name == "two_modes" and point == "overshoot" and factor == 300.0
    zero = name == "brownian_linear" and estimand != "gradient"
    if zero:
        variance, gap = 0.0, 0.0
    error = np.sqrt(variance / n_parameters / (N_PATHS * N_REPLICATES))
    noise = error * rng.normal(size=n_parameters)
    for suffix, shift in (("", gap + own), ("_own", own)):
        bias = size * shift * direction + noise
        norm, half = np.linalg.norm(bias), 2.4 * error * np.sqrt(n_parameters)
        low, high = max(0.0, norm - half) / size, (norm + half) / size
        value = np.sqrt(max(0.0, norm**2 - error**2 * n_parameters)) / size
        out |= {
            f"bias{suffix}": bias.tolist(),
            f"bias{suffix}_low": (bias - 2.4 * error).tolist(),
            f"bias{suffix}_high": (bias + 2.4 * error).tolist(),
            f"relative_bias{suffix}": value,
            f"relative_bias{suffix}_low": low,
            f"relative_bias{suffix}_high": high,
            f"p_value{suffix}": 0.5 if low == 0.0 else 1e-6,
        }
    if not exact:
        for key in [k for k in out if "_own" in k]:
            out[key] = None
    mean = truth + np.array(out["bias"])
    spread = 0.6 if heavy else 0.012 * (1 + factor / 100)
    out |= {
        "mean": mean.tolist(),
        "std_error": [error] * n_parameters,
        "truth": truth.tolist(),
        "truth_discrete": (truth + size * gap * direction).tolist() if exact else None,
        "truth_error": 1e-13,
        "bias_discretization": (size * gap * direction).tolist() if exact else None,
        "variance": variance,
        "variance_low": variance * (1 - spread),
        "variance_high": np.inf if heavy else variance * (1 + spread),
        "relative_variance": variance / size**2,
        "kurtosis": 3.0 + 0.1 * factor,
        "tail_index": 1.6 if heavy else (np.nan if zero else 6.0 + rng.uniform()),
        "tail_index_low": 1.3 if heavy else (np.nan if zero else 4.9),
        "tail_index_high": 1.95 if heavy else (np.nan if zero else 8.6),
    }
    mse = (out["relative_bias"] * size) ** 2 + variance / N_PATHS
    cost = N_PATHS * n_steps
    out["mse"] = mse
    out["efficiency_evaluations"] = 1.0 / (mse * cost) if mse else np.inf
    if heavy:
        out["verdict"] = "infinite variance suspected"
    elif out["relative_bias_low"] == 0.0:
        out["verdict"] = "unbiased"
    else:
        own_seen = not exact or out["relative_bias_own_low"] > 0.0
        out["verdict"] = "biased" if own_seen else "discretization bias only"
    return out | changes


def not_applicable(out, reason):
    """Return the row of a cell that was never measured."""
    keep = list(out)[: list(out).index("confidence") + 1]
    origin = ("schema_version", "sdebench_version", "commit", "machine", "created")
    kept = {k: out[k] for k in (*keep, *origin)}
    return kept | {"status": "not applicable", "reason": reason}


def build(points=("halfway", "overshoot"), steps=(100,), problems=None):
    """Return the frame of all cells, with the odd ones among them."""
    rng = np.random.default_rng(20251123)
    rows = []
    for problem in PROBLEMS.items():
        if problems and problem[0] not in problems:
            continue
        for point in points:
            for n_steps in steps:
                for estimator in ESTIMATORS:
                    out = row(problem, estimator, point, n_steps, rng)
                    if problem[0] == "follmer_mixture" and estimator[0] == "pathwise":
                        reason = "the reward | tilt has no gradient at the pinned start"
                        out = not_applicable(out, reason)
                    elif problem[0] == "nine_modes" and "matching" in estimator[0]:
                        out = not_applicable(out, "no exact matching gradient")
                    rows.append(out)
    frame = pd.DataFrame(rows)
    frame.attrs["command"] = "sdebench run quick --seed 7"
    return frame


@pytest.fixture(scope="session")
def frame():
    """Eleven problems, seven estimators, two points, one number of steps."""
    return build()


@pytest.fixture(scope="session")
def ladder():
    """Six problems over a ladder of steps at one point."""
    names = list(PROBLEMS)[1:7]
    return build(points=("halfway",), steps=(25, 50, 100, 200, 400), problems=names)
