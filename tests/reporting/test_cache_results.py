"""What caches lose, on the page: fronts, curves through budgets, models apart, and damaged results."""

from dataclasses import replace

import pytest

from longmix.reporting.__main__ import main
from longmix.reporting.cache_cells import CacheCell, checked_cells, front
from longmix.reporting.cache_panels import Measured, cache_panels, curve_name, different_models
from longmix.reporting.results import read_evaluations
from longmix.reporting.runs import find_runs
from tests.reporting.sweep_folder import write_evaluation, write_run

EXACT = CacheCell("exact", "exact", {}, 64, "after", None, 0.1, 0.0, 1.0, 1.0, 1000, 1100, 2.0)


def cell(cache: str, held: int, found: float | None, loss: float = 1.0, **settings) -> CacheCell:
    kind = cache.partition(":")[0]
    return replace(EXACT, cache=cache, kind=kind, settings=settings, held_bytes=held, found=found, loss=loss)


CELLS = [
    EXACT,
    cell("h2o:budget=0.5", 500, 0.6, budget=0.5, mean=False),
    cell("h2o:budget=0.5:mean=true", 510, 0.7, budget=0.5, mean=True),
    cell("h2o:budget=0.25", 250, 0.3, budget=0.25, mean=False),
    cell("quantised:bits=4", 160, 1.0, bits=4),
]


def written(cells: list[CacheCell]) -> list[dict]:
    return [vars(one) for one in cells]


def test_the_front_is_what_nothing_beats():
    assert front(CELLS) == [False, False, False, False, True]
    assert front(CELLS[:4]) == [True, True, True, True]
    assert front([cell("a", 10, 0.5), cell("b", 10, 0.6), cell("c", 9, 0.5), cell("d", 10, 0.6)]) == [
        *(False, True, True, True)
    ]
    losses = [cell("a", 10, None, loss=2.0), cell("b", 20, None, loss=1.0), cell("c", 30, None, loss=1.0)]
    assert front(losses) == [True, True, False]


def test_a_curve_goes_through_budgets_and_a_choice_has_its_own():
    assert [curve_name(one, CELLS) for one in CELLS] == [*("exact", "h2o", "h2o mean=true", "h2o", "quantised")]
    panels = {panel.key: panel for panel in cache_panels([Measured("", "flash", CELLS)])}
    held = {series.name: series for series in panels["caches_found_held_after_64"].series}
    assert held["h2o"].x == [250.0, 500.0] and held["h2o"].y == [0.3, 0.6]
    assert held["exact"].x == [160.0, 1000.0] and held["exact"].y == [1.0, 1.0]  # a line across
    assert set(panels) == {f"caches_{name}_after_64" for name in ("found_held", "found_read", "loss_held", "loss_read")}


def test_models_without_other_caches_are_points_and_differences_are_said():
    recurrent = Measured("rwkv7", "rwkv7", [replace(EXACT, held_bytes=300, found=0.9, loss=0.2)])
    both = [Measured("flash", "flash", CELLS), recurrent]
    (panel,) = (panel for panel in cache_panels(both) if panel.key == "caches_found_held_after_64")
    (point,) = (series for series in panel.series if series.mixer == "rwkv7")
    assert (point.x, point.y) == ([300.0], [0.9])
    assert any(series.name == "flash h2o mean=true" for series in panel.series)
    (sentence,) = different_models(both)
    assert "64 tokens, question read after compression" in sentence and "flash 0.1, rwkv7 0.2" in sentence
    assert different_models([both[0], replace(recurrent, cells=[EXACT])]) == []
    assert different_models(both[:1]) == []


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "0,mixer=flash", "flash", 64, 2.0, 500.0)
    write_evaluation(folder, "cache_quality_text_validation_step9", step=9, cells=written(CELLS))
    return folder


def test_the_page_has_a_section(run, capsys):
    other = write_run(run.parent / "1,mixer=rwkv7", "rwkv7", 64, 2.0, 500.0)
    write_evaluation(other, "cache_quality_text_validation_step9", step=9, cells=written([replace(EXACT, loss=0.2)]))
    assert main([str(run.parent)]) == 0
    page = (run.parent / "report.html").read_text()
    assert "<h2>What caches lose</h2>" in page and "the models themselves differ" in page
    assert "1 mixer" not in page and "2 runs, 2 mixers" in page  # kinds of caches are none
    assert any("quantised:bits=4" in row and ">*<" in row for row in page.split("<tr"))
    assert any("h2o:budget=0.5<" in row and ">*<" not in row and "0.500" in row for row in page.split("<tr"))
    assert (run.parent / "panels/caches_found_held_after_64.png").is_file()


def test_a_page_without_results_has_none(tmp_path):
    write_run(tmp_path / "0,mixer=flash", "flash", 64, 2.0, 500.0)
    assert main([str(tmp_path)]) == 0
    assert "What caches lose" not in (tmp_path / "report.html").read_text()


def test_the_newest_result_of_each_cache_counts(run):
    newer = [replace(CELLS[1], found=0.65), cell("snapkv", 300, 0.5)]
    write_evaluation(run, "cache_quality_text_validation_step9_b", step=9, date="2", cells=written(newer))
    found = {one.cache: one.found for one in read_evaluations(run).caches[""]}
    assert found["h2o:budget=0.5"] == 0.65 and found["snapkv"] == 0.5 and found["exact"] == 1.0
    write_evaluation(run, "cache_quality_text_validation_step10", step=10, cells=written([EXACT]))
    assert [one.cache for one in read_evaluations(run).caches[""]] == ["exact"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss": "low"}, "the loss of a cell is no number"),
        ({"found": 1.5}, "the found of a cell is 1.5, which cannot be"),
        ({"held_bytes": -5}, "the held_bytes of a cell is -5"),
        ({"cache": 7}, "the cache of a cell is no name"),
        ({"question": []}, "the question of a cell is no word"),
        ({"settings": None}, "the settings of a cell are no object"),
    ],
)
def test_damaged_results_are_left_out_and_named(run, changes, reason):
    with pytest.raises(ValueError, match=reason):
        checked_cells({"cells": [vars(EXACT) | changes]})
    write_evaluation(run, "cache_quality_text_validation_step9", step=9, cells=[vars(EXACT) | changes])
    found = find_runs([run])
    assert len(found.damaged) == 1 and reason in found.damaged[0][1]
    assert found.runs[0].evaluations.caches == {}


def test_a_result_without_cells_is_damaged():
    with pytest.raises(ValueError, match="its cells are no list of results"):
        checked_cells({"cells": []})
