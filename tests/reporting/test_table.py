"""The table of runs: it fits, names stay whole, and figures are written as people read them."""

import pytest
from rich.console import Console
from sweep_folder import write_evaluation, write_needles, write_run, write_sweep

from longmix.reporting.runs import find_runs
from longmix.reporting.table import nats, speed, table


def printed(folder, width: int) -> tuple[list[str], list[str]]:
    console = Console(width=width)
    shown, notes = table(find_runs([folder]).runs, width)
    with console.capture() as capture:
        console.print(shown)
    return capture.get().splitlines(), notes


@pytest.fixture
def sweep(tmp_path):
    write_sweep(tmp_path)
    for run in tmp_path.iterdir():
        write_needles(run, [32, 64], [0.0], [[0.0, 0.5]])
        write_evaluation(run, "causality_step9", causal=True, step=9)
    return tmp_path


@pytest.mark.parametrize("width", [80, 100, 140])
def test_fits_and_leaves_names_whole(sweep, width):
    lines, notes = printed(sweep, width)
    assert max(map(len, lines)) <= width
    for name in ("0,mixer=slow,seq_len=32", "3,mixer=fast,seq_len=64"):
        assert sum(name in line for line in lines) == 1
    assert notes[0] == "all runs: 100,000 parameters, 30,000 tokens trained on"
    assert any("bits/byte" in line for line in lines)
    left_out = notes[1:] and notes[1].removeprefix("no room here for ").removesuffix(": see runs.csv").split(", ")
    head = " ".join(lines[:3])
    assert all(name not in head for name in left_out) and ("needle" in head or "needle" in left_out)


def test_everything_has_room_where_there_is_some(sweep):
    lines, notes = printed(sweep, 200)
    assert len(notes) == 1
    for words in ("tokens/s", "seconds", "peak GiB", "loss", "needle", "needle gain", "causal", "0.0 %", "yes"):
        assert any(words in line for line in lines), words


def test_a_very_long_name_is_folded_and_loses_nothing(tmp_path):
    write_run(tmp_path / ("x" * 150), "flash", 32, 2.0, 93.9084)
    lines, _ = printed(tmp_path, 80)
    assert max(map(len, lines)) <= 80 and sum(line.count("x") for line in lines) >= 150
    assert any(" 94 " in line for line in lines)


@pytest.mark.parametrize(
    ("value", "words"), [(93.9084, "94"), (299.2, "299"), (12345.6, "12,346"), (3.14, "3.1"), (0, "0.0")]
)
def test_speed(value, words):
    assert speed(value) == words


@pytest.mark.parametrize(("value", "words"), [(-0.001, "0.00"), (0.004, "0.00"), (1.5, "+1.50"), (-2, "-2.00")])
def test_nats(value, words):
    assert nats(value) == words
