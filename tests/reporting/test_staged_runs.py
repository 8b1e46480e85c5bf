"""Reports of runs with stages: tokens by step, borders, and the loss at the last stage's length."""

import pytest
from sweep_folder import write_run

from longmix.reporting.__main__ import write_report
from longmix.reporting.panels import panels_of
from longmix.reporting.runs import find_runs
from longmix.reporting.stages import borders, steps_of, tokens_at
from longmix.training.loggers import CsvLog

STAGES = [
    {"seq_len": 16, "batch_size": 10, "steps": 10, "tokens_per_step": 160},
    {"seq_len": 64, "batch_size": 10, "steps": 15, "tokens_per_step": 640},
    {"seq_len": 256, "batch_size": 4, "steps": 5, "tokens_per_step": 1024},
]
TOKENS = 1600 + 9600 + 5120


@pytest.fixture
def folder(tmp_path):
    """A run with stages, and one at its last stage's length from the start."""
    staged = write_run(
        tmp_path / "staged", "flash", 256, 2.0, 1000.0, stages=STAGES, tokens=TOKENS, tokens_per_step=1024
    )
    log = CsvLog()
    log.open(staged, {}, "name", 30)
    for step, loss in ((10, 4.0), (25, 3.0), (30, 2.0)):
        log.write(step, {"validation_final/loss": loss})
    write_run(tmp_path / "long", "flash", 256, 2.5, 1000.0)
    return tmp_path


def test_tokens_steps_and_borders():
    summary = {"stages": STAGES, "tokens": TOKENS, "tokens_per_step": 1024}
    assert (steps_of(summary), borders(summary)) == (30, [10, 25])
    assert [tokens_at(summary, step) for step in (0, 5, 10, 11, 25, 30)] == [0, 800, 1600, 2240, 11200, TOKENS]
    plain = {"tokens": 30_000, "tokens_per_step": 1000}
    assert (steps_of(plain), borders(plain), tokens_at(plain, 7)) == (30, [], 7000)


def test_panels_mark_borders_and_compare_the_ends_of_stages(folder):
    panels = {panel.key: panel for panel in panels_of(find_runs([folder]).runs)}
    stages = panels["stages_256"]
    lines = {tuple(series.x): series.y for series in stages.series}
    assert lines[1600, 11200, TOKENS] == [4.0, 3.0, 2.0]
    assert lines[10_000, 20_000, 30_000] == [2.5, 2.5, 2.5]
    assert stages.borders == ()  # its points lie there
    assert panels["loss_by_tokens_256"].borders == (1600, 11200)
    assert panels["loss_by_time_256"].borders == pytest.approx((1.6, 11.2))


def test_a_page_of_runs_with_stages_is_drawn(folder, tmp_path):
    written = write_report(find_runs([folder]), tmp_path / "report")
    page = next(path for path in written if path.suffix == ".html").read_text()
    assert "What stages bring" in page
    assert "160, then 640, then 1,024 tokens a step" in page


@pytest.mark.parametrize("stages", [3, [3], [{"seq_len": 16}], [{**STAGES[0], "steps": 0}]])
def test_a_summary_with_damaged_stages_is_left_out(stages, tmp_path):
    write_run(tmp_path / "damaged", "flash", 256, 2.0, 1000.0, stages=stages)
    found = find_runs([tmp_path])
    assert not found.runs
    assert len(found.damaged) == 1
