import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from sdebench.errors import ParameterError, UnknownNameError
from sdebench.report import render, summary
from sdebench.report.format import interval, labels, latex, plain, short_labels
from sdebench.report.table import COLUMNS, FORMATS


@pytest.fixture(scope="module")
def table(frame):
    return summary(frame)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.51, 0.48, 0.54), "0.51 [0.48, 0.54] %"),
        ((0.51, 0.0, 0.54), "< 0.54 %"),
        ((0.51, 0.0, 0.5401), "< 0.55 %"),  # a limit is rounded up
        ((3.0, 2.9501, 3.0499), "3.00 [2.95, 3.05] %"),  # ends are rounded outwards
        ((12345.0, 12300.0, 12400.0), "1.234 [1.230, 1.240] × 10⁴ %"),
        ((1.2e-5, 1.1e-5, 1.3e-5), "1.20 [1.10, 1.30] × 10⁻⁵ %"),
        ((0.8, 0.05, 1.7), "0.8 [0.05, 1.7] %"),
        ((2381.0, 2266.0, 2496.0), "2380 [2260, 2500] %"),
        ((0.0, 0.0, 0.0), "0 (exact)"),
        ((math.nan,) * 3, "–"),
        ((0.5, math.nan, math.nan), "0.500 % (no interval)"),
        ((2.11e7, 1.849e6, 4.44e13), "2 × 10⁷ [1.8 × 10⁶, 4.5 × 10¹³] %"),
        ((3.0, 1.29e-40, 4.0), "3 [1.2 × 10⁻⁴⁰, 4.0] %"),
        ((2.0, 1.3, math.inf), "> 1.3 %"),
        ((2.0, 0.0, math.inf), "not resolved"),
        ((3.6e7, 7.0e6, 2.2e304), "> 7.0 × 10⁶ %"),
    ],
)
def test_digits_follow_the_interval(numbers, text):
    assert interval(*numbers, unit="%") == text


def test_rounding_never_moves_an_end_inwards():
    rng = np.random.default_rng(1)
    for _ in range(2000):
        value = 10.0 ** rng.uniform(-6, 6)
        low, high = value * (1 - rng.uniform(0, 0.99)), value * (1 + rng.uniform(0, 9))
        shown = interval(value, low, high)
        a, b = map(float, re.search(r"\[(.*), (.*)\]", shown).groups())
        power = re.search(r"× 10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", shown)
        if power:
            raised = power[1].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
            a, b = a * 10.0 ** int(raised), b * 10.0 ** int(raised)
        assert 0.0 < a <= low * (1 + 1e-12)
        assert b >= high * (1 - 1e-12)


def test_plain_numbers():
    shown = [plain(x) for x in (100.0, 0.0, 1234.6, 41.26, 0.00012, 2e7, math.inf)]
    assert shown == ["100", "0", "1235", "41.3", "1.20 × 10⁻⁴", "2.00 × 10⁷", "∞"]


def test_numbers_of_numpy_are_numbers():
    assert plain(np.float64(0.012345)) == plain(0.012345)
    assert plain(np.float64(1e-12)) == "1.00 × 10⁻¹²"


def test_labels_are_what_one_types():
    names = ["reinforce", "reinforce", "pathwise", "a:dim=3"]
    options = ['{"baseline": "mean"}', {"baseline": "none"}, None, '{"dim": 3}']
    full = labels(names, options)
    assert full == [
        "reinforce:baseline=mean",
        "reinforce:baseline=none",
        "pathwise",
        "a:dim=3",
    ]
    many = {"a": 1, "b": 2, "c": 3, "d": [1, 2], "e": 5}
    assert labels(["p", "p"], [many, many | {"e": 6}]) == ["p:e=5", "p:e=6"]
    assert short_labels(["x:a=1,b=2", "x:a=1,b=3", "y:c=1"]) == {
        "x:a=1,b=2": "x:b=2",
        "x:a=1,b=3": "x:b=3",
        "y:c=1": "y",
    }


def test_summary_has_one_row_per_cell_and_no_number_where_nothing_was_measured(
    frame, table
):
    assert len(table) == len(frame) == 11 * 7 * 2
    missing = table[table.status != "ok"]
    assert len(missing) == 4
    numbers = missing.select_dtypes("float").drop(columns="confidence")
    assert numbers.isna().all(axis=None)
    assert set(missing.reason) == {
        "the reward | tilt has no gradient at the pinned start",
        "no exact matching gradient",
    }
    row = table.iloc[7]
    source = frame.iloc[7]
    assert row.relative_bias == source.relative_bias
    size = np.linalg.norm(source.truth)
    gap = np.linalg.norm(np.subtract(source.truth_discrete, source.truth)) / size
    assert row.relative_bias_discretization == pytest.approx(gap, rel=1e-12)
    expected = source.variance_high / size**2
    assert row.relative_variance_high == pytest.approx(expected, rel=1e-12)
    assert row.efficiency_low <= row.efficiency <= row.efficiency_high


def test_where_the_exact_answer_is_zero_numbers_are_absolute(frame):
    one = frame[frame.problem == "ou_linear"].head(1).copy()
    one.at[one.index[0], "truth"] = [0.0, 0.0, 0.0]
    for key in [k for k in one if k.startswith("relative_")]:
        one[key] = np.nan
    row = summary(one).iloc[0]
    source = one.iloc[0]
    assert row.absolute
    assert row.relative_variance == source.variance
    debiased = np.sum(np.square(source.bias)) - np.sum(np.square(source.std_error))
    assert row.relative_bias == pytest.approx(math.sqrt(debiased), rel=1e-12)
    assert row.relative_bias_low < row.relative_bias < row.relative_bias_high
    text = render(one)
    assert "†" in text.splitlines()[2]
    assert "absolute: the exact answer is zero or unknown" in text


def test_rounding_noise_of_an_exact_zero_is_shown_as_zero(frame):
    one = frame[frame.problem == "ou_linear"].head(1).copy()
    size = np.linalg.norm(one.iloc[0].truth)
    one["relative_variance"], one["variance"] = 3e-30, 3e-30 * size**2
    one["variance_low"] = one["variance_high"] = 3e-30
    for key in ("relative_bias", "relative_bias_low", "relative_bias_high"):
        one[key] = 2e-15
    one["tail_index"] = 3e15
    row = summary(one).iloc[0]
    assert row.relative_variance == row.relative_variance_high == 0.0
    assert row.relative_bias == row.relative_bias_high == 0.0
    assert math.isnan(row.tail_index)
    assert render(one).count("0 (exact)") == 2


# ------------------------------------------------------------------------- the best


def two_rows(frame, low, high, **changes):
    rows = frame[frame.problem == "ou_linear"].iloc[[0, 1]].copy()
    rows["variance"], rows["relative_variance"] = [1.0, 2.0], [1.0, 2.0]
    rows["variance_low"], rows["variance_high"] = [0.9, low], [high, 2.2]
    for key, value in changes.items():
        rows[key] = value
    return render(rows, columns=["estimator", "variance"])


def test_bold_only_where_intervals_are_separate(frame):
    assert two_rows(frame, low=1.8, high=1.1).count("**") == 2
    assert two_rows(frame, low=1.0, high=1.1).count("**") == 0
    other_estimand = ["gradient", "log_normalizer"]
    assert two_rows(frame, 1.8, 1.1, estimand=other_estimand).count("**") == 0
    doubtful = ["infinite variance suspected", "unbiased"]
    assert two_rows(frame, 1.8, 1.1, verdict=doubtful).count("**") == 0


# ------------------------------------------------------------------------- formats


def test_every_format_ends_with_its_origin(frame):
    for name in FORMATS:
        text = render(frame, name)
        for part in ("3f2c91ab40", "AMD EPYC 7B13", "sdebench run quick --seed 7"):
            assert part in " ".join(text.split()), (name, part)


def test_words_instead_of_numbers_where_not_applicable(frame):
    lines = [x for x in render(frame).splitlines() if "not applicable" in x]
    assert len(lines) == 4
    for line in lines:
        # Escaped bars are text, the others part the columns.
        cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        assert [bool(c) for c in cells] == [True] * 4 + [False] * 8 + [True]
    assert r"the reward \| tilt has no gradient" in lines[-1]


def test_markdown_is_aligned_and_says_constants_once(frame):
    lines = render(frame).splitlines()
    body = [x for x in lines if x.startswith("|")]
    assert len({len(x) for x in body}) == 1
    assert len(body) == 2 + len(frame)
    assert "steps" not in body[0]
    assert "steps 100" in lines[-1]
    assert "64 replicates of 4096 paths" in lines[-1]
    assert "95 % confidence" in lines[-1]
    assert "∞?" in render(frame)


def test_latex_is_booktabs_with_escaped_names(frame):
    text = render(frame, "latex")
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\caption{"):
        assert text.count(rule) == 1
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    rows = [x for x in body.splitlines() if x.strip()]
    assert len(rows) == len(frame)
    assert {len(re.findall(r"(?<!\\)&", x)) for x in rows} == {12}
    for line in text.splitlines()[1:]:
        outside = re.sub(r"\$[^$]*\$", "", line)  # maths may hold anything
        assert not re.search(r"(?<!\\)[_#^]", outside)
        assert outside.count("{") - outside.count(r"\{") == outside.count("}") - (
            outside.count(r"\}")
        )
        assert not re.search(r"[⁻⁰¹²³⁴⁵⁶⁷⁸⁹×∞†∇–]", line)
    assert r"ou\_quadratic\_hard" in text
    assert r"\times 10^{-4}$" in text
    assert latex("a_b & 1.2 [1.1, 1.3] × 10⁻⁴ %") == (
        r"a\_b \& 1.2 [1.1, 1.3] $\times 10^{-4}$\,\%"
    )


class Outline(HTMLParser):
    void = ("meta",)

    def __init__(self):
        super().__init__()
        self.open, self.rows, self.scopes, self.addresses = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.void:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append(0)
        if tag in ("th", "td"):
            self.rows[-1] += 1
        self.scopes += [v for k, v in attrs if k == "scope"]
        self.addresses += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_well_formed_self_contained_and_accessible(frame):
    outline = Outline()
    outline.feed(render(frame, "html"))
    assert outline.open == []
    assert set(outline.rows) == {13}
    assert len(outline.rows) == 1 + len(frame)
    assert outline.scopes == ["col"] * 13 + ["row"] * 2 * len(frame)
    assert outline.addresses == []
    one = frame[frame.status != "ok"].head(1).copy()
    one["reason"] = "<script>alert(1)</script>"
    assert "<script" not in render(one, "html")
    assert "<script" not in render(one, "markdown")


def test_csv_and_json_keep_every_digit(frame, table):
    again = pd.read_csv(io.StringIO(render(frame, "csv")))
    rows = json.loads(render(frame, "json"))["rows"]
    assert len(rows) == len(again) == len(table)
    for key in ("relative_bias", "relative_variance_high", "efficiency", "tail_index"):
        assert np.array_equal(again[key], table[key], equal_nan=True)
        exact = [None if not math.isfinite(x) else x for x in table[key]]
        assert [r[key] for r in rows] == exact
    assert rows[0]["steps"] == 100
    assert rows[0]["absolute"] is False
    picked = pd.read_csv(io.StringIO(render(frame, "csv", ["problem", "bias"])))
    wanted = ["problem", "relative_bias", "relative_bias_low", "relative_bias_high"]
    assert list(picked) == [*wanted, "command"]


@pytest.mark.parametrize("width", [80, 120, 200, 400])
def test_terminal_table_loses_columns_but_no_text(frame, width):
    part = frame[frame.point == "halfway"]
    text = render(part, "terminal", width=width, color=False)
    assert "\x1b" not in text
    assert "…" not in text
    flat = "".join(text.split())
    for name in ("baseline=leave_one_out", "relativevariance", "verdict"):
        assert name in flat
    assert ("Hidden" in text) == (width < 400)
    lines = text.splitlines()
    assert max(map(len, lines)) <= max(width, 125)
    assert "\x1b[1m" in render(part, "terminal", width=width, color=True)


def test_chosen_columns_come_in_the_order_given(frame):
    text = render(frame, columns=["verdict", "problem", "sample"])
    head = [c.strip() for c in text.splitlines()[0].split("|")[1:-1]]
    assert head == [COLUMNS[k].heading for k in ("verdict", "problem", "sample")]
    assert "64 × 4096" in text


def test_errors_name_the_nearest_choice(frame):
    with pytest.raises(UnknownNameError, match="did you mean markdown"):
        render(frame, "markdwn")
    with pytest.raises(UnknownNameError, match="did you mean variance"):
        render(frame, columns=["varianc"])
    with pytest.raises(UnknownNameError, match="relative_bias"):
        render(frame, "csv", columns=["relative_bia"])
    with pytest.raises(ParameterError, match="no measurement"):
        render(pd.DataFrame({"a": [1]}))


@pytest.mark.parametrize("name", FORMATS)
def test_missing_columns_and_empty_frames_do_no_harm(frame, name):
    small = frame[frame.problem.isin(["ou_linear", "follmer_mixture"])]
    small = small[small.point == "halfway"]
    for i in range(0, len(frame.columns), 7):  # seven neighbours at a time
        keys = set(frame.columns[i : i + 7]) - {"problem", "estimator"}
        assert render(small.drop(columns=list(keys)), name)
    assert render(small[["problem", "estimator"]], name)
    assert render(frame.head(0), name)
    assert render(pd.DataFrame(), name)
    nothing = small.astype(object).where(small.isna(), None)
    nothing[["problem", "estimator"]] = small[["problem", "estimator"]]
    assert render(nothing, name)


def test_import_of_the_report_loads_nothing_heavy():
    code = (
        "import sys, sdebench.report, sdebench.report.table, sdebench.report.plot;"
        "print([m for m in ('pandas','seaborn','matplotlib','rich','torch')"
        " if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
