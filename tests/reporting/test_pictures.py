"""Pictures: names that touch nothing, figures in their cells, ticks, rows without empty cells; the page's own form."""

import re
from itertools import combinations, pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sweep_folder import write_needles, write_sweep

from longmix.reporting.__main__ import write_report
from longmix.reporting.labels import EndNames, PointNames, crosses, overlap, short, spread
from longmix.reporting.page import html
from longmix.reporting.panels import Panel, Series, panels_of
from longmix.reporting.pictures import Found, draw_panel, found_needles, needles_svg, overview, panel_svg
from longmix.reporting.plots import (
    balanced,
    decimal_ticks,
    doubling_ticks,
    drawing,
    lay_out,
    new_figure,
    plain,
    tick_labels,
)
from longmix.reporting.results import NeedleMap
from longmix.reporting.runs import find_runs
from longmix.reporting.svg import _style

FOUND = [[1.0, 0.75, 0.0], [1.0, 0.25, 0.125]]
NEEDLES = NeedleMap([32, 64, 128], [0.0, 1.0], FOUND, [[9.0, 6.0, -0.5], [9.0, 2.0, 1.0]], 64, needles=8)


def lines(*ends: float, **words) -> Panel:
    series = [Series(f"name{index}", "m", [1, 2, 4], [5.0, 4.0, end]) for index, end in enumerate(ends)]
    return Panel("key", "section", "title", "x", "y", series, **words)


def points(places: list[tuple[float, float]], name: str = "name") -> Panel:
    series = [Series(f"{name}{index}", "m", [x], [y]) for index, (x, y) in enumerate(places)]
    return Panel("key", "section", "title", "x", "y", series, kind="points", best="low")


def drawn(panel: Panel, height: float = 280):
    """The axes, the names that were placed, their boxes in pixels, and the figure."""
    with drawing():
        figure, (axes,) = new_figure(1, height=height)
        draw_panel(axes, panel, {})
        lay_out(figure)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        (names,) = [child for child in axes.get_children() if isinstance(child, EndNames | PointNames)]
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in names.texts]
    return axes, names, [(box.x0, box.y0, box.x1, box.y1) for box in boxes], figure


class TestNames:
    @pytest.mark.parametrize("count", [2, 9, 14])
    def test_at_line_ends_do_not_touch(self, count):
        axes, names, boxes, figure = drawn(lines(*[2.0 + index / 1000 for index in range(count)]))
        assert not any(overlap(a, b) for a, b in combinations(boxes, 2))
        for text, stroke, box, line in zip(names.texts, names.strokes, boxes, names.lines, strict=True):
            assert axes.bbox.x1 < box[0] and box[2] <= figure.bbox.x1 + 1 and box[3] <= figure.bbox.y1
            assert text.get_color() == line.get_color() and stroke.get_ydata()[1] == text.get_position()[1]

    def test_stand_in_the_order_of_the_ends(self):
        _, names, boxes, _ = drawn(lines(1.0, 3.0, 2.0))
        order = sorted(range(3), key=lambda index: boxes[index][1])
        assert [names.texts[index].get_text() for index in order] == ["name0", "name2", "name1"]

    @pytest.mark.parametrize(
        "places",
        [
            pytest.param([(100.0, 2.0), (103.0, 2.02), (106.0, 2.0), (300.0, 5.0)], id="three close together"),
            pytest.param([(1.0, 4.0), (2.0, 3.0), (3.0, 2.0), (4.0, 1.0)], id="falling"),
            pytest.param([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0), (4.0, 4.0)], id="the front rises"),
            pytest.param([(1.0, 1.0), (2.0, 3.0)], id="one at the right edge"),
        ],
    )
    def test_beside_points_touch_nothing(self, places):
        axes, names, boxes, _ = drawn(points(places, "mlstm_tfla_"))
        assert not any(overlap(a, b) for a, b in combinations(boxes, 2))
        ends = names.ends()
        for box, end in zip(boxes, ends, strict=True):
            assert axes.bbox.x0 - 1 <= box[0] and box[2] <= axes.bbox.x1 + 1
            near = max(box[0] - end[0], end[0] - box[2], 0), max(box[1] - end[1], end[1] - box[3], 0)
            assert max(near) < 80, "it stands by its own point"
        for box, (x, y) in ((box, end) for box in boxes for end in ends):
            assert not overlap(box, (x - 4, y - 4, x + 4, y + 4))
        if names.front is not None:
            front = [tuple(place) for place in axes.transData.transform(names.front.get_xydata())]
            assert not any(crosses(box, a, b) for box in boxes for a, b in pairwise(front))

    def test_the_best_are_joined_and_nothing_else(self):
        _, names, _, _ = drawn(points([(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (4.0, 4.0)]))
        assert names.front.get_xydata().tolist() == [[1.0, 1.0], [3.0, 2.0], [4.0, 4.0]]

    def test_short(self):
        assert short("mlstm_tfla") == "mlstm_tfla"
        assert short("2,mixer=slow,seq_len=64,seed=1", 21) == "2,mixer=sl\u2026=64,seed=1"
        assert len(short("x" * 99)) == 26

    @pytest.mark.parametrize(
        ("start", "end", "expected"),
        [
            pytest.param((0, 0), (10, 10), True, id="through"),
            pytest.param((0, 5), (10, 5), True, id="level"),
            pytest.param((0, 0), (3, 3), False, id="before"),
            pytest.param((0, 9), (10, 9), False, id="above"),
            pytest.param((5, 5), (5, 5.5), True, id="inside"),
            pytest.param((0, 8), (2, 12), False, id="past a corner"),
        ],
    )
    def test_crossing(self, start, end, expected):
        assert crosses((4, 4, 6, 6), start, end) is expected

    @pytest.mark.parametrize(
        ("wanted", "places"),
        [
            ([10, 50], [10, 50]),
            ([10, 10], [5, 15]),
            ([20, 10, 12], [24, 4, 14]),
            ([0, 0], [0, 10]),
            ([99, 100], [90, 100]),
            ([30, 39, 60], [29.5, 39.5, 60]),
        ],
    )
    def test_spread(self, wanted, places):
        assert spread(wanted, 10, 0, 100) == pytest.approx(places)


class TestAxes:
    def test_from_zero(self):
        assert drawn(lines(7.0, 9.5, from_zero=True))[0].get_ylim()[0] == 0

    def test_shares_of_nothing_have_the_axis_of_what_might_have_been(self):
        panel = Panel("key", "", "", "x", "y", [Series(name, "m", [1, 2], [0.0, 0.0]) for name in "ab"], from_zero=True)
        assert drawn(panel)[0].get_ylim() == (0, 1)

    def test_a_loss_below_zero_is_seen(self):
        assert drawn(lines(-3.0, 2.0, from_zero=True))[0].get_ylim()[0] < -3

    def test_doubling(self):
        axes = drawn(lines(1.0, 2.0, log_x=True))[0]
        assert axes.get_xscale() == "log" and [t.get_text() for t in axes.get_xticklabels()] == ["1", "2", "4"]

    @pytest.mark.parametrize(
        ("values", "ticks"),
        [
            pytest.param([16, 64], [16, 32, 64], id="powers of two"),
            pytest.param([100.0], [100.0], id="a single length has a tick"),
            pytest.param([100.0, 120.0], [100.0, 120.0], id="no power between"),
            pytest.param([512, 16384], [512, 1024, 2048, 4096, 8192, 16384], id="short labels"),
            pytest.param([2.5e5, 1.9e7], [2**18, 2**20, 2**22, 2**24], id="labels that would meet"),
        ],
    )
    def test_doubling_ticks(self, values, ticks):
        assert doubling_ticks(values) == ticks and len(doubling_ticks([1.0, 2.0**30])) <= 9

    @pytest.mark.parametrize(
        ("low", "high", "ticks"),
        [
            (0.9, 60, [1, 2, 5, 10, 20, 50]),
            (1, 5000, [1, 10, 100, 1000]),
            (1234, 3456, [1200, 3500]),
            (2e-3, 2e-2, [2e-3, 5e-3, 1e-2, 2e-2]),
            (7, 7, [7]),
        ],
    )
    def test_decimal_ticks(self, low, high, ticks):
        assert decimal_ticks(low, high) == pytest.approx(ticks, rel=1e-12)

    @pytest.mark.parametrize(
        ("ticks", "labels"),
        [
            ([256, 512, 1024, 65536], ["256", "512", "1k", "64k"]),
            ([2**19, 2**20, 2**31], ["512k", "1M", "2G"]),
            ([0, 2500, 5000], ["0", "2,500", "5,000"]),
            ([0, 5000, 10_000], ["0", "5k", "10k"]),
            ([200_000, 1_000_000], ["0.2M", "1M"]),
            ([2.4, 2.5], ["2.4", "2.5"]),
            ([-0.5, 0.0], ["\u22120.5", "0"]),
        ],
    )
    def test_tick_labels_share_a_unit(self, ticks, labels):
        assert tick_labels(ticks) == labels


class TestFigure:
    @pytest.mark.parametrize(
        ("count", "rows"), [(0, []), (1, [1]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (7, [3, 2, 2]), (10, [3, 3, 2, 2])]
    )
    def test_rows(self, count, rows):
        assert balanced(count, 3) == rows

    def test_titles_of_neighbours_do_not_overlap(self):
        long = "a measure with a very long name in other data (abcdef), trained at 65,536 tokens, by state"
        panels = [Panel(f"k{n}", "What quality costs", long, "x", "y", lines(1.0, 2.0).series) for n in range(5)]
        figure = overview(panels)
        lay_out(figure)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        every = [axes for part in figure.subfigs for axes in part.axes]
        titles = [axes.get_title(loc="left") for axes in every]
        assert len(every) == 5 and all(" ".join(title.split()).endswith("by state") for title in titles)
        boxes = [axes.get_tightbbox(canvas.get_renderer()) for axes in every]
        assert not any(overlap(a.extents, b.extents) for a, b in combinations(boxes, 2))
        assert not figure.legends and len(figure.subfigs[-1].legends) == 0, "one mixer needs no legend"

    def test_one_legend(self):
        both = [Series(name, name, [1, 2], [1.0, 2.0]) for name in ("flash", "gla")]
        figure = overview([Panel(f"k{n}", "", "", "x", "y", both) for n in range(2)])
        legends = [legend for part in figure.subfigs for legend in part.legends]
        assert [text.get_text() for legend in legends for text in legend.get_texts()] == ["flash", "gla"]
        assert not any(axes.get_legend() for axes in figure.axes)

    def test_no_letter_of_a_name_has_a_meaning(self):
        assert plain("$x$") == "$x$" and plain("\x1b\uffff") == "\\x1b\ufffd"
        panel = Panel("k", "", "", "x", "y", [Series(name, "m", [1, 2], [1.0, 2.0]) for name in ("$x^{$", "_hidden")])
        assert [text.get_text() for text in drawn(panel)[1].texts] == ["$x^{$", "_hidden"]


def tree(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


class TestSvg:
    def test_lines_have_their_points_which_tell_their_values(self):
        root = tree(panel_svg(lines(1.0, 2.0), "p7", {"m": 4}))
        groups = [group for group in root.iter("g") if group.get("class") == "mark c4"]
        paths = [path for group in groups for path in group.findall("path") if "fill:none" in path.get("style")]
        assert [len(re.findall("[ML]", path.get("d"))) for path in paths[:2]] == [3, 3]
        told = [title.text for title in root.iter("title")]
        assert told[:3] == ["name0: 5 y, 1 x", "name0: 4 y, 2 x", "name0: 1 y, 4 x"] and len(told) == 6
        assert all(use.get("href").startswith("#p7-") for use in root.iter("use"))
        assert root.get("role") == "img" and root.get("aria-label") == "section, title: y over x"

    def test_of_many_points_the_last_one_alone_has_a_marker(self):
        series = [Series("a", "m", list(range(1, 100)), [1.0 + x for x in range(99)])]
        root = tree(panel_svg(Panel("k", "", "", "x", "y", series), "p", {"m": 0}))
        assert [title.text for title in root.iter("title")] == ["a: 99 y, 99 x"]

    def test_fonts_as_older_matplotlib_writes_them(self):
        bold = "fill:var(--colour);font-size:11px;font-weight:700"
        assert _style("font: 700 11px 'DejaVu Sans'; fill: #3c32b6", True) == bold
        assert _style("font: 9.5px 'X', sans-serif; text-anchor: end; fill: #6a6a70", False) == (
            "text-anchor:end;fill:var(--soft);font-size:9.5px"
        )


class TestNeedles:
    def test_figures_stand_in_their_cells_and_can_be_read(self):
        root = tree(needles_svg(Found("flash", None, NEEDLES, "needle"), "n0"))
        cells = [path for path in root.iter("path") if re.search("fill:#", path.get("style", ""))]
        words = [text for text in root.iter("text") if text.get("style", "").startswith(("font-size:10.5", "fill"))]
        words = [text for text in words if re.fullmatch(r"\d\.\d\d", text.text)]
        assert [text.text for text in words] == ["1.00", "0.75", "0.00", "1.00", "0.25", "0.12"]
        assert len(cells) == 6 and len({cell.get("style") for cell in cells}) == 5
        for cell, text in zip(cells, words, strict=True):
            numbers = np.array(re.findall(r"[\d.]+", cell.get("d")), dtype=float).reshape(-1, 2)
            (left, top), (right, bottom) = numbers.min(0), numbers.max(0)
            assert left < float(text.get("x")) < right and top < float(text.get("y")) < bottom
            ground = int(re.search("fill:#(..)(..)(..)", cell.get("style"))[2], 16)  # of viridis green is the lightness
            assert ("#111111" in text.get("style")) == (ground > 110)

    @pytest.mark.slow
    def test_evaluated_runs_side_by_side(self, tmp_path):
        write_sweep(tmp_path)
        for name in ("0,mixer=slow,seq_len=32", "1,mixer=fast,seq_len=32"):
            write_needles(tmp_path / name, [32, 64, 128], [0.0, 1.0], FOUND)
        found = find_runs([tmp_path])
        maps = [(found.title, found.run.folder.name[0], found.needles.accuracy) for found in found_needles(found.runs)]
        assert maps == [("slow", "0", FOUND), ("fast", "1", FOUND)]
        page = html(found, panels_of(found.runs), tmp_path)
        assert page.count(": needles found") == 2 and page.index("Needles found") < page.index("All runs")
        assert '<figure class="mark c1"><h3><span class="dot"></span>slow</h3>' in page
        assert "<th>needle</th>" in page and page.count("not evaluated") == 4  # two measures of two runs
        write_report(found, tmp_path)
        picture = image.imread(tmp_path / "panels" / "needles.png")
        assert picture.shape[1] > 1.8 * picture.shape[0] and picture.std() > 0

    @pytest.mark.slow
    def test_nothing_where_none_was_evaluated(self, tmp_path):
        found = find_runs([write_sweep(tmp_path)])
        write_report(found, tmp_path)
        assert not (tmp_path / "panels" / "needles.png").exists()
        assert "Needles found" not in (tmp_path / "report.html").read_text()
