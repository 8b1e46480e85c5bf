"""Elements that escape by themselves, and a page on which no text of any file can become markup."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sweep_folder import write_evaluation, write_needles, write_run

from longmix.printable import printable
from longmix.reporting.__main__ import _write_csv, write_report
from longmix.reporting.markup import Markup, filled, joined, markup, tag
from longmix.reporting.page import html
from longmix.reporting.panels import panels_of
from longmix.reporting.runs import find_runs
from longmix.reporting.table import table

EVIL = "<x onerror=alert(1) a='\"`&lt;$subtitle\x1b[31m\u202e"
FORMULA = "=HYPERLINK(1)"


class TestTag:
    @pytest.mark.parametrize(
        ("made", "expected"),
        [
            (tag("b", "<i>"), "<b>&lt;i&gt;</b>"),
            (tag("b", tag("i", "x"), " & ", 3, None), "<b><i>x</i> &amp; 3</b>"),
            (tag("b", ["<", Markup("<u/>"), [">"]]), "<b>&lt;<u/>&gt;</b>"),
            (tag("a", class_="c", data_mixer="\"'<>", hidden=False, text_anchor=None), None),
            (tag("path", d=2.5), '<path d="2.5"/>'),
            (tag("p", "a\x1b[0m\x00\ud800"), "<p>a\\x1b[0m\\x00\\ud800</p>"),
            (joined(["<", tag("i")], " "), "&lt; <i></i>"),
            (filled("$a $b", a="<$b>", b=Markup("<hr>")), "&lt;$b&gt; <hr>"),
        ],
    )
    def test_escapes(self, made, expected):
        assert isinstance(made, Markup)
        assert made == (expected or '<a class="c" data-mixer="&quot;&#x27;&lt;&gt;"></a>')

    def test_a_text_is_no_markup_whatever_is_done_to_it(self):
        assert not isinstance(Markup("<b>") + "<i>", Markup) and markup(Markup("<b>") + "<i>") == "&lt;b&gt;&lt;i&gt;"
        assert not isinstance(f"{Markup('<b>')}", Markup)


class Elements(HTMLParser):
    """All elements with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def poisoned(content, text: str):
    """A JSON value in which every string is replaced."""
    if isinstance(content, dict):
        return {key: poisoned(part, text) for key, part in content.items()}
    if isinstance(content, list):
        return [poisoned(part, text) for part in content]
    return text if isinstance(content, str) else content


CONFIG = {
    "seed": 0,
    "batch_size": "x",
    "model": {"_target_": "a", "d_model": "x", "num_layers": "x", "block": {"_target_": "x"}},
    "data": {"_target_": "x", "corpus": {"_target_": "x", "path": "x"}, "weights": {"x": "x"}, "path": "x"},
    "tokenizer": {"_target_": "x", "path": "x"},
    "optimizer": {"_target_": "x", "learning_rate": "x"},
    "schedule": {"_target_": "x", "final": "x"},
}


def poison(folder: Path, text: str) -> Path:
    """Two runs of which every string of every file, and as far as they go every name, is `text`."""
    name = text.replace("/", "").replace("\x00", "")
    for number in (1, 2):
        run = write_run(folder / f"{name}{number}", "m", 32, 2.0, 500.0 + number, loose={"note": "x"})
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(poisoned(summary, f"{text}{number}")))
        (run / "config.yaml").write_text(json.dumps(poisoned(CONFIG, f"{text}{number}")))  # JSON is YAML
        (run / "evaluation").mkdir()
        rows = {"32": {"accuracy": 0.5, "state_bytes": 64}}
        places = {"corpus": text, "data_fingerprint": text, "split": text, "date": text}
        for own in (True, False):
            report = {"data": text, "step": 9, "lengths": rows, "own_data": own} | places
            write_evaluation(run, f"accuracy_{name}_{own}", **report)
        write_needles(run, [32], [0.0], [[0.5]])
        needles = json.loads((run / "evaluation" / "needle_validation_step9.json").read_text())
        write_evaluation(run, f"needle_{name}", **needles | places | {"own_data": False})
        (run / "evaluation" / f"causality_{name}.json").write_text(text)
    unfinished = folder / f"{name}3"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("seed: 0\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", [EVIL, "</script><script>alert(1)</script>", "'\"><img src=x onerror=alert(1)>", FORMULA]
)
def test_no_string_of_any_file_becomes_markup(tmp_path, text):
    found = find_runs([poison(tmp_path / "sweep", text)])
    assert len(found.runs) == 2 and len(found.unfinished) == 1 and len(found.damaged) == 2
    page = html(found, panels_of(found.runs), tmp_path / "sweep")
    usual = find_runs([write_run(tmp_path / "usual", "flash", 32, 2.0, 500.0)])
    plain = Elements(html(usual, panels_of(usual.runs), tmp_path)).found
    elements = Elements(page).found
    more = {"use", "defs", "details", "summary", "code"}
    assert {name for name, _ in elements} <= {name for name, _ in plain} | more
    assert not any(key.startswith("on") for _, attributes in elements for key in attributes)
    assert [name for name, _ in elements].count("script") == 1
    assert "\x1b" not in page and "\u202e" not in page and (text == FORMULA or text not in page)
    assert {run.row()["mixer"] for run in found.runs} == {f"{text}1", f"{text}2"}, "data stay as they are"


@pytest.mark.slow
def test_names_of_pictures_lead_nowhere_else(tmp_path):
    run = write_run(tmp_path / "a", "flash", 32, 2.0, 500.0)
    for number, name in enumerate(("../../up", "../../up?", "x" * 300, EVIL)):
        write_evaluation(run, f"accuracy_{number}", data=name, step=9, lengths={"32": {"accuracy": 0.5}})
    write_report(find_runs([run]), tmp_path / "out")
    made = sorted(path.name for path in (tmp_path / "out" / "panels").iterdir())
    assert len([name for name in made if name.startswith("recall_")]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


@pytest.mark.parametrize("text", [FORMULA, "+1", "-1+2", "@SUM(A1)", "\t=1", "\x1b[31m"])
def test_no_cell_is_a_formula(tmp_path, text):
    run = write_run(tmp_path / "a", text, 32, 2.0, 500.0)
    write_evaluation(run, "accuracy_x", data=text, step=9, lengths={"32": {"accuracy": 0.5}})
    _write_csv(find_runs([tmp_path]).runs, tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="", encoding="utf-8") as stream:
        head, row = list(csv.reader(stream))
    for cell in [*head, *row]:
        assert not cell.startswith(("=", "+", "@", "\t", "\r")) and "\x1b" not in cell
        assert not cell.startswith("-") or float(cell) < 0
    assert row[1].lstrip("'") == printable(text), "and says what it said"


def test_a_number_below_zero_stays_a_number(tmp_path):
    run = write_run(tmp_path / "a", "flash", 32, 2.0, 500.0)
    write_needles(run, [32], [0.0], [[0.0]])
    needles = json.loads((run / "evaluation" / "needle_validation_step9.json").read_text())
    needles["cells"][0]["gain"] = -1.5
    write_evaluation(run, "needle_validation_step9", **needles)
    _write_csv(find_runs([tmp_path]).runs, tmp_path / "runs.csv")
    assert ",-1.5" in (tmp_path / "runs.csv").read_text()


def test_the_terminal_shows_control_characters(tmp_path):
    found = find_runs([poison(tmp_path, EVIL)])
    shown, _ = table(found.runs, 400)
    cells = [str(cell) for column in shown.columns for cell in column.cells]
    assert any(r"\x1b[31m" in cell for cell in cells) and not any("\x1b" in cell for cell in cells)


@pytest.mark.slow
def test_names_that_a_picture_might_take_for_formulas(tmp_path):
    for number, name in enumerate(("$x^{$", "a$b$c", "_hidden")):
        write_run(tmp_path / str(number), name, 32, 2.0 + number, 500.0)
    write_report(find_runs([tmp_path]), tmp_path / "out")
    assert (tmp_path / "out" / "runs.png").stat().st_size > 10_000
