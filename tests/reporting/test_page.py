"""The page and its pictures: well-formed, whole in one file, the right winners, names that do not touch."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from sweep_folder import write_evaluation, write_needles, write_run, write_sweep

from longmix.reporting.axes import Axis, doubling_ticks, nice_ticks, tick_labels
from longmix.reporting.page import html
from longmix.reporting.panels import Panel, Series, panels_of
from longmix.reporting.runs import find_runs
from longmix.reporting.svg import NAME_GAP, crosses, draw, spread

VOID = {"meta"}


class Page(HTMLParser):
    """Checks that tags close in order, and gathers text by the classes around it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class", "")))

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if data.strip():
            self.text.append((" ".join(kind for _, kind in self.open), data.strip()))

    def under(self, kind: str) -> list[str]:
        return [text for kinds, text in self.text if kind in kinds.split()]


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path)


def page_of(folder) -> tuple[Page, str]:
    found = find_runs([folder])
    text = html(found, panels_of(found.runs), folder)
    return Page(text), text


class TestPage:
    def test_needs_nothing_else(self, sweep):
        page, text = page_of(sweep)
        assert [value for _, name, value in page.attributes if name in ("src", "href")] == []
        assert "http" not in text and "url(" not in text and "@import" not in text
        assert text.count("<svg") == 10 and "$" not in re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL)

    def test_winners_by_length(self, sweep):
        page, _ = page_of(sweep)
        assert page.under("winner") == ["slow", "fast", "fast"] * 2
        assert page.under("figure")[:3] == ["2.320 bits/byte", "1,000 tokens/s", "1.00 GiB"]
        assert page.under("next")[:3] == ["then fast, 3.320", "then slow, 500", "then slow, 3.00"]

    def test_a_leak_does_not_win_by_its_loss(self, sweep):
        write_evaluation(sweep / "0,mixer=slow,seq_len=32", "causality_step9", causal=False, step=9)
        page, _ = page_of(sweep)
        assert page.under("winner") == ["fast", "fast", "fast", "slow", "fast", "fast"]

    def test_a_mixer_has_one_colour_everywhere(self, sweep):
        _, text = page_of(sweep)
        marks = set(re.findall(r'class="mark (c\d)" data-mixer="(\w+)"', text))
        chips = set(re.findall(r'<button class="(c\d)" data-mixer="(\w+)"', text))
        assert marks == chips == {("c0", "fast"), ("c1", "slow")}

    def test_badges_and_recall(self, sweep):
        runs = sorted(sweep.iterdir())
        write_evaluation(runs[0], "causality_step9", causal=True, step=9)
        write_evaluation(runs[1], "causality_step9", causal=False, step=9)
        lengths = {"32": {"accuracy": 0.75}, "64": {"accuracy": 0.5}}
        write_evaluation(runs[0], "accuracy_mqar_test_step9", data="mqar", step=9, lengths=lengths)
        page, text = page_of(sweep)
        assert [words for words in page.under("badge") if words != "not evaluated"] == [
            "causal",
            "not audited",
            "LEAKS",
            "not audited",
        ]
        assert page.under("badge").count("not evaluated") == 3
        assert "<th>mqar</th>" in text and ">75.0 %<" in text and ">50.0 %<" not in text
        assert "task=causality" in text and "task=needle" in text

    def test_who_recalls_best(self, sweep):
        for name, found in (("0,mixer=slow,seq_len=32", 0.5), ("1,mixer=fast,seq_len=32", 0.75)):
            write_needles(sweep / name, [32], [0.0], [[found]])
        page, text = page_of(sweep)
        assert page.under("winner") == ["slow", "fast", "fast", "fast", "slow", "fast", "fast"]
        assert page.under("figure")[3] == "75.0 %" and page.under("next")[3] == "then slow, 50.0 %"
        assert page.under("next")[-1] == "not measured" and "best recall, needle<" in text

    def test_nobody_wins_with_nothing_or_with_what_others_have(self, sweep):
        for name in ("0,mixer=slow,seq_len=32", "1,mixer=fast,seq_len=32"):
            write_needles(sweep / name, [32], [0.0], [[0.0]])
        for name in ("2,mixer=slow,seq_len=64", "3,mixer=fast,seq_len=64"):
            write_needles(sweep / name, [64], [0.0], [[0.75]])
        page, text = page_of(sweep)
        assert page.under("winner") == ["slow", "fast", "fast"] * 2, "of loss, speed and memory alone"
        assert "none above 0.0 %" in page.under("next") and "a tie: slow, fast" in page.under("next")
        assert ">0.0 %<" in text and 'class="bar best" style="--share:0.000' not in text

    def test_a_run_that_diverged_does_not_win(self, sweep):
        write_run(sweep / "nan", "nan", 32, float("nan"), 100.0)
        assert page_of(sweep)[0].under("winner")[0] == "slow"

    def test_a_run_that_was_not_evaluated_says_so(self, sweep):
        page, text = page_of(sweep)
        assert "<th>recall</th>" in text and page.under("badge") == ["not evaluated", "not audited"] * 4

    def test_says_what_is_missing_and_how_to_get_it(self, tmp_path):
        write_run(tmp_path / "a", "flash", 32, 2.0, 500.0)
        _, text = page_of(tmp_path)
        for command in ("task=causality", "task=needle", "seq_len=2048,8192"):
            assert command in text

    def test_commands_name_the_folder_as_a_shell_takes_it(self, tmp_path):
        sweep = tmp_path / "a sweep"
        write_sweep(sweep)
        _, text = page_of(sweep)
        assert f"checkpoint=&#x27;{sweep}&#x27; task=causality" in text and "FOLDER" not in text
        for run in list(sweep.iterdir())[1:]:
            write_evaluation(run, "causality_step9", causal=True, step=9)
        (lacking,) = [run.folder for run in find_runs([sweep]).runs if run.evaluations.causal is None]
        assert f"checkpoint=&#x27;{lacking}&#x27; task=causality" in page_of(sweep)[1]

    def test_sections_of_one_panel_stand_side_by_side(self, sweep, tmp_path):
        write_run(tmp_path / "one" / "a", "flash", 32, 2.0, 500.0)
        write_run(tmp_path / "one" / "b", "gla", 32, 2.5, 400.0)
        assert 'class="wide"' not in page_of(tmp_path / "one")[1]
        assert page_of(sweep)[1].count('<section class="wide">') == 5

    def test_says_what_was_compared(self, tmp_path):
        config = """
seed: {seed}
batch_size: 2
data: {{corpus: {{_target_: longmix.data.corpora.files.TextFiles, path: {path}}}}}
tokenizer: {{_target_: longmix.data.tokens.tokenizers.ByteTokenizer}}
optimizer: {{_target_: longmix.training.optimizers.muon, learning_rate: {rate}}}
model: {{d_model: 128, num_layers: 6, num_heads: 2, block: {{_target_: longmix.model.blocks.{block}}}}}
mixer: {{x: {seed}}}
name: {seed}
"""
        for seed, mixer, block in ((1, "flash", "Standard"), (2, "gla", "Standard"), (3, "rwkv7", "RWKVBlocks")):
            text = config.format(seed=seed, path="books" if seed < 3 else "web", rate=0.01 * seed, block=block)
            write_run(tmp_path / mixer, mixer, 32, 2.0 + seed, 500.0, config=text)
        page, text = page_of(tmp_path)
        for words in (
            "6 layers, d_model 128, heads 2",
            "TextFiles path=books; TextFiles path=web",
            "1; 2; 3",
            "0.01; 0.02; 0.03",
            "2 windows, 1,000 tokens a step",
            "torch 2.13.0",
            "ByteTokenizer",
        ):
            assert f">{words}<" in text, words
        warnings = page.under("warn")
        assert any(
            words.startswith("rwkv7 ran in another block (RWKVBlocks) than the others (Sta") for words in warnings
        )
        assert any("trained on different data: TextFiles path=books; TextFiles path=web" in words for words in warnings)
        assert ">optimizer.learning_rate<" in text and ">mixer.x<" not in text and ">name<" not in text

    def test_nothing_is_missing(self, sweep):
        for run in sweep.iterdir():
            write_evaluation(run, "causality_step9", causal=True, step=9)
            lengths = {"32": {"accuracy": 0.75}}
            write_evaluation(run, "accuracy_mqar_test_step9", data="mqar", step=9, lengths=lengths)
        assert "Not here" not in page_of(sweep)[1]

    def test_best_of_a_length_is_bold_and_ties_are_not(self, sweep):
        _, text = page_of(sweep)
        best = re.findall(r'<td class="bar best"[^>]*>([^<]+)<', text)
        assert sorted(best) == ["1,000", "1,000", "1.00", "1.00", "2.320", "2.640"]  # FLOPs are equal: none is best

    def test_unfair_comparisons_are_marked(self, sweep):
        write_run(sweep / "other", "other", 32, 2.0, 100.0, parameters={"total": 200_000})
        assert any("match.parameters" in words for words in page_of(sweep)[0].under("warn"))

    def test_names_are_text_not_markup(self, tmp_path):
        write_run(tmp_path / "a", "<b>&amp", 32, 2.0, 500.0)
        write_run(tmp_path / "b", "flash", 32, 2.0, 600.0)
        page, text = page_of(tmp_path)
        assert "<b>" not in text and "<b>&amp" in page.under("winner") + page.under("name")


class TestSvg:
    def panel(self, *ends: float, **words) -> Panel:
        series = [Series(f"name{index}", "m", [1, 2, 4], [5.0, 4.0, end]) for index, end in enumerate(ends)]
        return Panel("key", "section", "title", "x", "y", series, **words)

    def test_is_xml_and_lines_have_their_points(self):
        root = ElementTree.fromstring(draw(self.panel(1.0, 2.0), {"m": 0}))
        lines = [line.get("points").split() for line in root.iter("polyline")]
        assert [len(line) for line in lines] == [3, 3]
        down = [float(line[-1].split(",")[1]) for line in lines]
        assert down[0] > down[1] > float(lines[0][0].split(",")[1])  # pixels count downward

    def test_names_at_line_ends_do_not_touch(self):
        root = ElementTree.fromstring(draw(self.panel(*[2.0 + index / 1000 for index in range(9)]), {"m": 0}))
        heights = sorted(float(text.get("y")) for text in root.iter("text") if text.get("class") == "name")
        assert all(b - a >= NAME_GAP - 0.2 for a, b in pairwise(heights))
        assert heights[0] > 0 and heights[-1] < float(root.get("viewBox").split()[3])

    def test_points_are_named_beside_themselves(self):
        places = [(100.0, 2.0), (103.0, 2.02), (106.0, 2.0), (300.0, 5.0)]  # three close together
        series = [Series(f"name{index}", "m", [x], [y]) for index, (x, y) in enumerate(places)]
        panel = Panel("key", "section", "title", "x", "y", series, kind="points")
        root = ElementTree.fromstring(draw(panel, {"m": 0}))
        boxes = []
        for text in (text for text in root.iter("text") if text.get("class") == "name"):
            width = 7.0 * len(text.text)
            left = float(text.get("x")) - {"start": 0, "middle": width / 2, "end": width}[text.get("text-anchor")]
            boxes.append((left, float(text.get("y")), width))
        for one in boxes:
            assert one[0] >= 0 and one[0] + one[2] <= 560
            for other in boxes:
                apart = abs(one[1] - other[1]) >= NAME_GAP - 0.2
                apart = apart or one[0] + one[2] <= other[0] or other[0] + other[2] <= one[0]
                assert one is other or apart

    def test_a_name_at_the_right_edge_stays_inside(self):
        series = [Series(name, "m", [x], [y]) for name, x, y in (("first", 1.0, 1.0), ("a_long_name", 2.0, 3.0))]
        root = ElementTree.fromstring(draw(Panel("key", "", "", "x", "y", series, kind="points"), {"m": 0}))
        (group,) = [group for group in root.iter("g") if group.find("text").text == "a_long_name"]
        text, point = group.find("text"), group.find("circle")
        width = 7.0 * len("a_long_name")
        left = float(text.get("x")) - {"start": 0, "middle": width / 2, "end": width}[text.get("text-anchor")]
        assert left + width <= 560 and float(point.get("cx")) + width > 560

    def test_one_value_alone(self):
        panel = Panel("key", "section", "title", "x", "y", [Series("a", "m", [16], [3.0])], log_x=True)
        assert "nan" not in draw(panel, {"m": 0})

    def test_from_zero_begins_at_zero_and_ends_on_a_tick(self):
        axis = Axis([7.0, 9.5], 300, 0, from_zero=True)
        assert axis(0) == 300 and axis.ticks == [0, 2, 4, 6, 8, 10] and axis(10) == 0

    def test_shares_of_nothing_have_the_axis_of_what_might_have_been(self):
        axis = Axis([0.0, 0.0], 300, 0, from_zero=True)
        assert axis.ticks == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]) and axis(0) == 300 and axis(1) == 0

    def test_names_are_not_crossed_by_the_front(self):
        places = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0), (4.0, 4.0)]  # all on the front, which rises to the right
        series = [Series(f"mlstm_tfla_{index}", "m", [x], [y]) for index, (x, y) in enumerate(places)]
        root = ElementTree.fromstring(draw(Panel("key", "", "", "x", "y", series, kind="points"), {"m": 0}))
        strokes = [
            ((float(line.get("x1")), float(line.get("y1"))), (float(line.get("x2")), float(line.get("y2"))))
            for line in root.iter("line")
            if line.get("class") == "front"
        ]
        assert len(strokes) == 3
        for text in (text for text in root.iter("text") if text.get("class") == "name"):
            width, y = 7.0 * len(text.text), float(text.get("y")) - 4
            left = float(text.get("x")) - {"start": 0, "middle": width / 2, "end": width}[text.get("text-anchor")]
            assert not any(crosses((left, y - 7, left + width, y + 7), *stroke) for stroke in strokes), text.text

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

    def test_log_axis_doubles(self):
        axis = Axis([16, 64], 0, 300, log=True)
        assert axis.ticks == [16, 32, 64]
        assert doubling_ticks([100.0]) == [100.0], "a single length has a tick"
        assert doubling_ticks([100.0, 120.0]) == [100.0, 120.0]
        assert len(doubling_ticks([1.0, 2.0**30])) <= 9
        assert axis(32) - axis(16) == pytest.approx(axis(64) - axis(32))

    @pytest.mark.parametrize(
        ("low", "high", "ticks"),
        [
            (0, 10, [0, 2, 4, 6, 8, 10]),
            (2.31, 2.69, [2.4, 2.5, 2.6]),
            (-1, 1, [-1, -0.5, 0, 0.5, 1]),
            (3, 3, [3]),
        ],
    )
    def test_nice_ticks(self, low, high, ticks):
        assert nice_ticks(low, high) == pytest.approx(ticks)

    @pytest.mark.parametrize(
        ("ticks", "labels"),
        [
            ([256, 512, 1024, 65536], ["256", "512", "1k", "64k"]),
            ([0, 2500, 5000], ["0", "2,500", "5,000"]),
            ([0, 5000, 10_000], ["0", "5k", "10k"]),
            ([200_000, 1_000_000], ["0.2M", "1M"]),
            ([2.4, 2.5], ["2.4", "2.5"]),
        ],
    )
    def test_tick_labels_share_a_unit(self, ticks, labels):
        assert tick_labels(ticks) == labels

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
