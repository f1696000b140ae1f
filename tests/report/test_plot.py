import warnings

import matplotlib as mpl
import numpy as np
import pytest

from sdebench import registry
from sdebench.errors import ResultsError, UnknownNameError
from sdebench.report import (
    bias_figure,
    figures,
    order_figure,
    summary,
    variance_figure,
    work_precision_figure,
)
from sdebench.report.cells import slope, squared_error
from sdebench.report.style import COLUMN, family, looks

SOME = ["brownian_linear", "ou_quadratic_hard", "two_modes", "follmer_mixture"]


@pytest.fixture(scope="module")
def some(frame):
    return frame[frame.problem.isin(SOME)]


def texts(figure):
    """Return every visible text of a figure with its box in pixels."""
    renderer = figure.canvas.get_renderer()
    found = []
    for item in figure.findobj(mpl.text.Text):
        owner = item.axes
        if (
            item.get_text()
            and item.get_visible()
            and (not owner or owner.get_visible())
        ):
            found.append((item.get_text(), item.get_window_extent(renderer)))
    return found


def assert_legible(figure, smallest=5.5):
    """Check that no text leaves the figure, overlaps another or is too small."""
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    boxes = []
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        for axis in (axes.xaxis, axes.yaxis):
            for tick in axis.get_major_ticks():
                inside = axis.get_view_interval()
                shown = min(inside) <= tick.get_loc() <= max(inside)
                if tick.label1.get_visible() and tick.label1.get_text() and shown:
                    boxes.append(tick.label1)
        boxes += [*axes.texts, axes.xaxis.label, axes._left_title]
    for legend in figure.legends:
        boxes += legend.get_texts()
    boxes += [t for t in (figure._supxlabel, figure._supylabel) if t]
    boxes = [t for t in boxes if t.get_text()]
    renderer = figure.canvas.get_renderer()
    extents = [(t.get_text(), t.get_window_extent(renderer)) for t in boxes]
    for text, box in extents:
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y1 <= height + 1, text
    for i, (text, box) in enumerate(extents):
        for other, place in extents[:i]:
            wide = min(box.x1, place.x1) - max(box.x0, place.x0)
            high = min(box.y1, place.y1) - max(box.y0, place.y0)
            # Boxes include the room of descenders, up to a fifth of the height.
            apart = wide <= 0 or high <= 0.25 * min(box.height, place.height)
            assert apart, (text, other)
    assert min(t.get_size() for t in boxes) >= smallest


@pytest.mark.parametrize("width", [7.0, COLUMN])
def test_figures_are_legible(some, ladder, width):
    few = ladder[ladder.problem.isin(["ou_linear", "gaussian_tilt"])]
    assert_legible(bias_figure(some, width=width))
    assert_legible(variance_figure(some, point="overshoot", width=width))
    assert_legible(work_precision_figure(some, width=width))
    assert_legible(variance_figure(few, width=width))
    assert_legible(order_figure(few, width=width))


def test_the_whole_catalogue_is_legible(frame):
    assert_legible(bias_figure(frame))
    assert_legible(work_precision_figure(frame))


def test_figures_writes_everything_there_is_data_for(some, ladder, tmp_path):
    few = ladder[ladder.problem == "ou_linear"].iloc[::3]
    names = {p.name for p in figures(few, tmp_path / "new" / "folder", ("png", "svg"))}
    kinds = ("bias", "variance", "variance_steps", "work_precision", "order")
    assert names == {f"{k}_halfway.{e}" for k in kinds for e in ("png", "svg")}
    part = some[(some.point == "overshoot") & (some.problem == "two_modes")]
    paths = figures(part, tmp_path, ("pdf",))
    assert [p.name for p in paths] == [
        "bias_overshoot.pdf",
        "variance_overshoot.pdf",
        "work_precision_overshoot.pdf",
    ]
    assert all(p.stat().st_size > 3000 for p in paths)


def test_many_problems_are_a_file_each(frame, tmp_path):
    """A row per estimator and problem would make a figure of metres."""
    measured = frame[(frame.point == "halfway") & (frame.status == "ok")]
    here = measured[measured.relative_variance > 0].groupby("problem").head(1)
    assert here.problem.nunique() > 4
    names = {str(p.relative_to(tmp_path)) for p in figures(here, tmp_path, ("png",))}
    problems = set(here.problem.str.partition(":")[0])
    assert {f"variance_halfway/{name}.png" for name in problems} <= names
    assert "variance_halfway.png" not in names


@pytest.mark.parametrize("high", [4.4e91, 1e304])
def test_a_far_end_of_an_interval_leaves_the_limits_alone(some, high):
    few = summary(some[(some.problem == "two_modes") & (some.point == "halfway")])
    first = few.index[few.relative_variance_low > 0][0]
    few.loc[first, "relative_variance_high"] = high
    for draw in (variance_figure, work_precision_figure):
        axes = draw(few).axes[0]
        assert max(*axes.get_xlim(), *axes.get_ylim()) < 1e15


def test_the_same_results_give_the_same_bytes(some, tmp_path):
    one = some[(some.problem == "two_modes") & (some.point == "halfway")].head(2)
    first = figures(one, tmp_path / "a")
    second = figures(one, tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_nothing_global_is_left_behind(some):
    before = dict(mpl.rcParams)
    import matplotlib.pyplot as plt

    bias_figure(some)
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []


def test_no_warnings(some):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bias_figure(some)
        work_precision_figure(some)


def test_color_is_the_estimator_and_does_not_depend_on_the_rest():
    both = looks(["pathwise", "reinforce:baseline=mean", "reinforce:baseline=none"])
    alone = looks(["pathwise"])
    assert both["pathwise"] == alone["pathwise"]
    shades = [both[k] for k in both if k.startswith("reinforce")]
    assert shades[0].color != shades[1].color
    assert shades[0].line != shades[1].line
    new = looks(["zebra", "pathwise", "antelope"])
    assert len({look.color for look in new.values()}) == 3
    # Text is dark enough on white: contrast of at least 3 for large and bold shades.
    for look in {**both, **new}.values():
        light = [
            c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in look.ink
        ]
        assert 1.05 / (np.dot([0.2126, 0.7152, 0.0722], light) + 0.05) > 3.0


def test_every_estimator_has_a_color_of_its_own():
    names = registry.estimator_names()
    drawn = looks(names)
    assert list(drawn) == names
    assert len({look.color for look in drawn.values()}) == len(names)
    for name in names:
        assert looks([name, "another"])[name] == drawn[name]


def test_a_new_estimator_leaves_nearly_all_colors(monkeypatch):
    names = registry.estimator_names()
    before = looks(names)
    monkeypatch.setattr(registry, "estimator_names", lambda: sorted([*names, "nova"]))
    after = looks([*names, "nova"])
    assert len({look.color for look in after.values()}) == len(names) + 1
    assert sum(after[name] != before[name] for name in names) <= 3


def test_marker_is_the_family():
    classes = ("linear–quadratic", "Gaussian tilt", "mixture tilt", "pinned start", "x")
    assert len({family(name)[1] for name in classes}) == 5
    assert family("") == family("other")


def test_an_interval_that_reaches_zero_has_an_arrow_and_no_marker(frame):
    one = frame[(frame.problem == "ou_linear") & (frame.point == "halfway")].head(1)
    for low, arrows, dots in ((0.0, 1, 0), (0.01, 0, 1)):
        row = one.assign(
            relative_bias=0.02, relative_bias_low=low, relative_bias_high=0.03
        )
        lines = bias_figure(row).axes[0].lines
        assert sum(x.get_marker() == "<" for x in lines) == arrows
        assert sum(x.get_marker() == "o" for x in lines) == dots
        ends = [x for line in lines for x in line.get_xdata()]
        assert 0.03 in ends


def test_unmeasured_and_zero_rows_are_words(some):
    shown = [t for t, _ in texts(bias_figure(some))]
    assert shown.count("n/a") == 2  # one row, both panels
    assert shown.count("0 exactly") == 3
    assert shown.count("no exact discretized answer") == 2


def test_infinite_variance_is_open_and_points_right(some):
    lines = variance_figure(some, point="overshoot").axes[0].lines
    assert sum(x.get_marker() == ">" for x in lines) == 1
    open_ = [x for x in lines if x.get_markerfacecolor() == "white"]
    assert len(open_) == 1
    assert open_[0].get_marker() == "D"


def test_work_precision_is_bias_squared_plus_variance_over_n():
    cell = {
        "relative_bias": 0.1,
        "relative_bias_low": 0.05,
        "relative_bias_high": 0.2,
        "relative_variance": 4.0,
        "relative_variance_low": 3.0,
        "relative_variance_high": 5.0,
    }
    assert squared_error(cell, 100.0) == pytest.approx((0.05, 0.0325, 0.09))
    unresolved = cell | {"relative_bias_low": 0.0}
    assert squared_error(unresolved, 100.0) == pytest.approx((0.04, 0.03, 0.09))


def test_slope_of_an_exact_power_law():
    def cell(n, order, error=0.01):
        bias = 3.0 * n**-order
        parts = {"bias_components": [bias, 0.5 * bias]}
        return {"steps": n, "bias_std_errors": [error * bias] * 2} | parts

    for order in (1.0, 2.0):
        fit = slope([cell(n, order) for n in (10, 20, 40)])
        assert fit.order == pytest.approx(order, abs=1e-3)
        assert fit.low < order < fit.high
    assert slope([cell(10, 1.0), cell(20, 1.0)]) is None
    assert slope([cell(n, 1.0, error=100.0) for n in (10, 20, 40)]) is None


def test_the_cell_with_more_paths_is_drawn_of_two_backends(frame):
    one = frame[(frame.problem == "ou_linear") & (frame.point == "halfway")].head(1)
    other = one.assign(backend="torch", n_paths=17, relative_variance=9.0)
    both = type(one)(one.to_dict("records") + other.to_dict("records"))
    lines = variance_figure(both).axes[0].lines
    values = [x.get_xdata()[0] for x in lines if x.get_marker() == "o"]
    assert values == [one.relative_variance.iloc[0]]


@pytest.mark.parametrize(
    "missing",
    [
        ["point", "theta"],
        ["truth"],
        ["truth_discrete", "bias_discretization", "relative_bias_own_high"],
        ["verdict", "status", "reason"],
        ["n_paths", "scheme", "n_steps"],
        ["variance_low", "variance_high"],
    ],
)
def test_missing_columns_do_no_harm(some, tmp_path, missing):
    part = some[some.problem == "two_modes"].head(7).drop(columns=missing)
    assert figures(part, tmp_path, ("png",), dpi=50)


def test_a_summary_serves_as_well_as_the_frame(some, tmp_path):
    part = summary(some[some.problem == "two_modes"].head(3))
    assert figures(part, tmp_path, ("png",), dpi=50)


def test_errors_say_what_is_missing(some, tmp_path):
    with pytest.raises(ResultsError, match="two or more numbers of steps"):
        order_figure(some)
    with pytest.raises(UnknownNameError, match="did you mean halfway"):
        bias_figure(some, point="halfwy")
    with pytest.raises(ResultsError, match="no figure can be drawn"):
        figures(some[["problem", "estimator"]], tmp_path)
    with pytest.raises(ResultsError, match="no rows"):
        bias_figure(some.head(0))
    with pytest.raises(UnknownNameError, match="figure format"):
        figures(some, tmp_path, ("gif",))
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot be written"):
        figures(some, tmp_path / "file" / "folder", ("png",))


def test_long_legends_stay_inside_the_figure(some):
    long = some.assign(
        estimator_label=[
            f"{e}:an_option_with_a_long_name={i % 7}"
            for i, e in enumerate(some.estimator)
        ]
    )
    assert_legible(bias_figure(long))
    assert_legible(work_precision_figure(long))
