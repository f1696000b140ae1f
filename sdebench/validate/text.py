"""A validation report for the eye."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from sdebench.report.format import interval, plain
from sdebench.validate.cells import MAIN_POINT
from sdebench.validate.report import FAILED, MARKS, STYLES, percent
from sdebench.validate.verdicts import bias_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sdebench.validate.estimator import EstimatorReport

DECLARED = {
    "none": "no bias against the N-step answer",
    "1/n_paths": "a bias in proportion to 1/n_paths",
    "any": "a bias",
}


def _checks(report: Any) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in report.checks:
        style = STYLES[check.status]
        table.add_row(
            Text(MARKS[check.status], style),
            Text(check.name.replace("_", " "), style),
            Text(check.message),
        )
    return table


def _cells(report: EstimatorReport) -> RenderableType:
    """Return the table of the problems at the main point."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("problem", no_wrap=True)
    for name in ("bias", "found from", "weak order"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("variance ratio", justify="right", no_wrap=True)
    table.add_column("time ratio", justify="right", no_wrap=True)
    table.add_column("built-in", overflow="fold")
    orders = {order["problem"]: order for order in report.orders}
    for row in report.rows:
        if row["point"] != MAIN_POINT or not row["compare"]:
            continue
        table.add_row(
            row["problem"],
            bias_text(row),
            _found_from(row),
            _order(orders.get(row["problem"])),
            _ratio(row),
            _time_ratio(row),
            # The values of the options are names enough here.
            re.sub(r"\w+=", "", row["competitor"] or "–"),
        )
    return table


def _found_from(row: dict[str, Any]) -> str:
    size = row.get("detectable_bias", math.inf)
    return percent(size) if math.isfinite(size) else "–"


def _order(order: dict[str, Any] | None) -> str:
    if order is None:
        return "–"
    return interval(order["order"], order["low"], order["high"])


def _time_ratio(row: dict[str, Any]) -> str:
    if not row["competitor_ns"]:
        return "–"
    return plain(float(row["ns_per_path_step"] / row["competitor_ns"]), 2)


def _ratio(row: dict[str, Any]) -> str:
    ends = [row[f"variance_ratio{end}"] for end in ("", "_low", "_high")]
    return interval(*ends) if all(map(math.isfinite, ends)) else "–"


def estimator_parts(report: EstimatorReport) -> list[RenderableType]:
    """Return the parts of a report, for a rich console."""
    from rich.text import Text

    head = Text()
    head.append(f"{report.class_name}", "bold")
    head.append(f" ({report.estimator}): {report.summary}\n")
    head.append(
        f"estimates {report.estimand.replace('_', ' ')}, declares "
        f"{DECLARED.get(report.declared_bias, report.declared_bias)}; "
        f"needs {', '.join(report.needs) or 'forward paths only'}"
    )
    parts: list[RenderableType] = [head, Text(), _checks(report)]
    if report.rows:
        parts += [Text(), Text(_power(report))]
        parts += [
            Text(),
            Text(
                f"At {MAIN_POINT}, published steps, {report.backend} float64. Bias: "
                "against the exact N-step answer, or where there is none against a "
                "built-in on the same paths; intervals simultaneous over all cells. "
                "Variance (95 %) and time: over those of the best built-in that needs "
                "no more, on the same paths."
            ),
            _cells(report),
        ]
    verdict = "passed" if report.passed else "failed"
    failed = sum(check.status == FAILED for check in report.checks)
    end = Text()
    end.append(f"{verdict}", STYLES[verdict])
    end.append(
        f" ({failed} of {len(report.checks)} checks failed, {report.seconds:.0f} s, "
        f"seed {report.seed})"
        if failed
        else f" ({report.seconds:.0f} s, seed {report.seed})"
    )
    return [*parts, end]


def _power(report: EstimatorReport) -> str:
    details = report.check("unbiased").details
    found = details.get("detectable_bias")
    alarm = f"{100.0 * report.false_alarm:g} %"
    if not found:
        return f"False-alarm rate of the whole bias test: {alarm}."
    return (
        f"A bias of {percent(found['median'])} of the answer in one cell would have "
        f"been found with probability {100 * details['power']:.0f} % (median of "
        f"the cells with an exact answer; {percent(found['least'])} in the sharpest, "
        f"{percent(found['largest'])} in the bluntest). False-alarm rate of the whole "
        f"bias test: {alarm}."
    )
