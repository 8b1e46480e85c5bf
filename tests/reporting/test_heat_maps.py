"""Heat maps of needles: figures in their places, whoever was evaluated, on the page and as a picture."""

from xml.etree import ElementTree

import pytest
from matplotlib import image
from sweep_folder import write_needles, write_sweep

from longmix.reporting.evaluations import NeedleMap
from longmix.reporting.heat_maps import CELL, LEFT, RIGHT, WIDTH, draw, found_needles, section
from longmix.reporting.page import html
from longmix.reporting.panels import panels_of
from longmix.reporting.report import write_report
from longmix.reporting.runs import find_runs

FOUND = [[1.0, 0.75, 0.0], [1.0, 0.25, 0.125]]
NEEDLES = NeedleMap([32, 64, 128], [0.0, 1.0], FOUND, [[9.0, 6.0, -0.5], [9.0, 2.0, 1.0]], 64, needles=8)


@pytest.fixture
def sweep(tmp_path):
    """Two of four runs are evaluated."""
    write_sweep(tmp_path)
    for name in ("0,mixer=slow,seq_len=32", "1,mixer=fast,seq_len=32"):
        write_needles(tmp_path / name, [32, 64, 128], [0.0, 1.0], FOUND)
    return tmp_path


class TestDraw:
    def test_figures_stand_in_their_cells(self):
        root = ElementTree.fromstring(draw("flash", NEEDLES))
        cells = list(root.iter("rect"))
        places = [(float(cell.get("x")), float(cell.get("y"))) for cell in cells]
        width = (WIDTH - LEFT - RIGHT) / 3
        expected = [(LEFT + width * column, places[0][1] + CELL * row) for row in range(2) for column in range(3)]
        for place, wanted in zip(places, expected, strict=True):
            assert place == pytest.approx(wanted, abs=0.05)
        shares = [share for row in FOUND for share in row]
        assert [float(cell.get("fill-opacity")) for cell in cells] == shares
        words = [text for text in root.iter("text") if text.get("class", "").startswith("share")]
        assert [text.text for text in words] == ["1.00", "0.75", "0.00", "1.00", "0.25", "0.12"]
        for text, (x, y) in zip(words, places, strict=True):
            assert x < float(text.get("x")) < x + width and y < float(text.get("y")) < y + CELL
        assert [text.get("class") for text in words] == ["share over"] * 2 + ["share", "share over", "share", "share"]
        told = [title.text for title in root.iter("title")]
        assert told[1] == "64 tokens, depth 0: 75% of 8, +6.0 nats" and told[2].endswith("0% of 8, -0.5 nats")

    def test_the_line_ends_the_trained_lengths(self):
        root = ElementTree.fromstring(draw("flash", NEEDLES))
        (line,) = root.iter("line")
        assert float(line.get("x1")) == pytest.approx(LEFT + 2 * (WIDTH - LEFT - RIGHT) / 3, abs=0.05)


class TestReport:
    def test_evaluated_runs_side_by_side(self, sweep):
        found = find_runs([sweep])
        runs = found.runs
        assert [(name, run.folder.name[0], needle.accuracy) for name, run, needle, _ in found_needles(runs)] == [
            ("slow", "0", FOUND),
            ("fast", "1", FOUND),
        ]
        page = html(found, panels_of(runs), sweep)
        assert page.count('class="cell"') == 12 and page.index("Needles found") < page.index("All runs")
        assert '<figure class="mark c1" data-mixer="slow"><h3>slow</h3>' in page
        assert "<th>needle</th>" in page and page.count("not evaluated") == 4  # two measures of two runs

    def test_picture(self, sweep, capsys):
        found = find_runs([sweep])
        write_report(found, sweep)
        picture = image.imread(sweep / "panels" / "needles.png")
        assert picture.shape[1] > 1.8 * picture.shape[0] and picture.std() > 0

    def test_nothing_where_none_was_evaluated(self, tmp_path):
        found = find_runs([write_sweep(tmp_path)])
        assert section(found.runs, {"slow": 0, "fast": 1}) == ""
        write_report(found, tmp_path)
        assert not (tmp_path / "panels" / "needles.png").exists()
        assert "Needles found" not in (tmp_path / "report.html").read_text()
