"""Verdicts on an estimator over all its cells."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from sdebench.errors import ParameterError
from sdebench.estimator import Estimator
from sdebench.measure.order import fit_order
from sdebench.validate.cells import MAIN_POINT
from sdebench.validate.report import FAILED, NOTE, PASSED, SKIPPED, Check, percent
from sdebench.validate.statistics import POWER, global_test

SMALLEST = 1e-16
"""No p-value below this is printed."""


def where(row: dict[str, Any]) -> str:
    """Return where a cell is, in words."""
    return f"{row['problem']} at {row['point']}, {row['n_steps']} steps, {row['dtype']}"


def bias_text(row: dict[str, Any]) -> str:
    """Return the interval of a cell's own bias, relative to the exact answer."""
    if not row["tested"]:
        return "–"
    low, high = row["relative_bias_low"], row["relative_bias_high"]
    if low <= 0.0:
        return f"< {percent(high)}"
    return f"{percent(low).removesuffix(' %')} … {percent(high)}"


def p_text(p_value: float) -> str:
    """Return a p-value; the smallest ones mean no more than that they are small."""
    return f"p = {p_value:.1g}" if p_value >= SMALLEST else f"p < {SMALLEST:g}"


def unbiased_check(
    built: Estimator, rows: Sequence[dict[str, Any]], false_alarm: float
) -> Check:
    """Return the verdict on the bias over all cells."""
    tested = [row for row in rows if row["tested"]]
    left_out = len(rows) - len(tested) + sum(row["too_skewed"] for row in tested)
    test = global_test([row["p_value"] for row in tested])
    tested.sort(key=lambda row: row["p_value"])
    found = [r for r in tested if r["p_value"] < r["significance"]]
    # A paired difference may have no noise at all: no measure of the power.
    powers = sorted(
        row["detectable_bias"]
        for row in tested
        if math.isfinite(row["detectable_bias"]) and row["reference"] is None
    )
    details: dict[str, Any] = {
        "cells": len(tested),
        "undecided": left_out,
        "p_value": test.p_value,
        "p_value_smallest": test.smallest,
        "p_value_combined": test.combined,
        "false_alarm": false_alarm,
        "power": POWER,
        "detectable_bias": {
            "least": powers[0],
            "median": powers[len(powers) // 2],
            "largest": powers[-1],
        }
        if powers
        else None,
        "worst": [where(row) for row in found[:5] or tested[:1]],
    }
    rest = f"; {left_out} cells undecided" if left_out else ""
    if not rows:
        message = "no cell was measured"
        return Check(name="unbiased", status=SKIPPED, message=message, details=details)
    if not tested:
        message = f"could not be tested anywhere: {rows[0]['why_not']}"
        return Check(name="unbiased", status=SKIPPED, message=message, details=details)
    worst = tested[0]
    size = f"{where(worst)}: {bias_text(worst)}, {p_text(worst['p_value'])}"
    if built.declared_bias == "any":
        largest = max(tested, key=lambda row: row["relative_bias"])
        return Check(
            name="unbiased",
            status=SKIPPED,
            message=f"declares a bias; found in {len(found)} of {len(tested)} cells, "
            f"the largest {bias_text(largest)} on {where(largest)}{rest}",
            details=details,
        )
    if test.p_value < false_alarm:
        cells = (
            f"in {len(found)} of {len(tested)} cells"
            if found
            else f"over all {len(tested)} cells together"
        )
        return Check(
            name="unbiased",
            status=FAILED,
            message=f"biased {cells} ({p_text(test.p_value)}); worst: {size}{rest}",
            details=details,
        )
    if any(row["too_skewed"] for row in tested):
        return Check(
            name="unbiased",
            status=NOTE,
            message=f"undecided in {left_out} of {len(rows)} cells, some of which look "
            "biased with samples too skewed to say: give more paths; no bias found in "
            "the others",
            details=details,
        )
    declared = built.declared_bias == "1/n_paths"
    after = " after the declared 1/n_paths" if declared else ""
    return Check(
        name="unbiased",
        status=PASSED,
        message=f"no bias found{after} in {len(tested)} cells together "
        f"(p = {test.p_value:.2g}){rest}",
        details=details,
    )


def tail_check(rows: Sequence[dict[str, Any]]) -> Check:
    """Return where the variance may be infinite."""
    heavy = [row for row in rows if row["infinite_variance_suspected"]]
    if not rows:
        return Check(name="tails", status=SKIPPED, message="no cell was measured")
    if heavy:
        return Check(
            name="tails",
            status=NOTE,
            message=f"infinite variance suspected in {len(heavy)} of {len(rows)} "
            f"cells: no interval can be trusted there; the first: {where(heavy[0])}",
            details={"cells": [where(row) for row in heavy]},
        )
    return Check(name="tails", status=PASSED, message="no infinite variance suspected")


def weak_orders(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the weak order on every problem whose biases determine it."""
    ladders: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        main = row["point"] == MAIN_POINT and row["dtype"] == "float64"
        if main and row["bias_total"] is not None:
            ladders.setdefault(row["problem"], []).append(row)
    found = []
    for problem, ladder in ladders.items():
        if len(ladder) < 3:
            continue
        with contextlib.suppress(ParameterError):  # a standard error of zero
            fit = fit_order(
                [1.0 / row["n_steps"] for row in ladder],
                [row["bias_total"] for row in ladder],
                [row["bias_covariance"] for row in ladder],
                correction=len(ladder) > 3,
            )
            if not fit.undetermined:
                found.append(
                    {
                        "problem": problem,
                        "order": fit.order,
                        "low": fit.low,
                        "high": fit.high,
                        "p_value": fit.p_value,
                    }
                )
    return found


def order_check(
    orders: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], unbiased: Check
) -> Check:
    """Return the range of the weak orders found."""
    message = ""
    if not rows:
        message = "no cell was measured"
    elif unbiased.status == FAILED:
        message = "means nothing while the estimator is biased for its own chain"
    elif not orders:
        message = "not determined anywhere: the biases are too small or too noisy"
    if message:
        return Check(name="weak_order", status=SKIPPED, message=message)
    found = sorted(o["order"] for o in orders)
    low, high = max(o["low"] for o in orders), min(o["high"] for o in orders)
    common = f"; all intervals hold {low:.2f} … {high:.2f}" if low <= high else ""
    return Check(
        name="weak_order",
        status=PASSED,
        message=f"{found[0]:.2g} … {found[-1]:.2g} on {len(found)} problems{common}"
        if len(found) > 1
        else f"{found[0]:.2g} [{low:.2g}, {high:.2g}] on {orders[0]['problem']}",
        details={"orders": list(orders)},
    )
