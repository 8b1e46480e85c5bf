"""`python -m longmix.reporting`: runs found, labelled, laid side by side; and a whole sweep."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
from matplotlib import image
from sweep_folder import write_evaluation, write_needles

from longmix.errors import DataError
from longmix.reporting import __main__ as command
from longmix.reporting.__main__ import write_report
from longmix.reporting.runs import find_runs
from longmix.training.loggers import CsvLog

ROW = {
    "run",
    "mixer",
    "seq_len",
    "parameters",
    "tokens",
    "bits_per_byte",
    "loss",
    "tokens_per_second",
    "training_seconds",
    "peak_gib",
    "training_flops_per_token",
    "causal",
}

FILES = ["panels", "report.html", "runs.csv", "runs.json", "runs.png"]


def write_run(folder: Path, bits_per_byte: float = 2.0, finished: bool = True, logged: bool = True) -> Path:
    """A run's folder as training leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    if logged:
        log = CsvLog()
        log.open(folder, {}, "name", 0)
        for step in (10, 20):
            log.write(step, {"train/loss": 3.0, "memory/peak_gib": step / 10})
            log.write(step, {"validation/bits_per_byte": bits_per_byte + 1 / step})
    if finished:
        summary = {
            "mixer": "flash",
            "seq_len": 32,
            "parameters": {"total": 23_744},
            "tokens": 1280,
            "tokens_per_step": 64,
            "tokens_per_second": 1234.5,
            "training_seconds": 1.25,
            "training_flops_per_token": 6e5,
            "validation": {"bits_per_byte": bits_per_byte, "loss": bits_per_byte * math.log(2)},
            "validation_by_position": [{"start": 0, "end": 16, "loss": 3.0}, {"start": 16, "end": 32, "loss": 2.5}],
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def labels(*paths: Path) -> list[str]:
    return [run.label for run in find_runs(list(paths)).runs]


def check_picture(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)
    assert pixels.shape[0] > 200 and pixels.shape[1] > 600 and pixels.std() > 0


class TestFindRuns:
    def test_best_first_and_unfinished_apart(self, tmp_path):
        for name, bits in {"a": 2.0, "b": 1.0, "c": math.nan, "d": 3.0}.items():
            write_run(tmp_path / name, bits)
        unfinished = write_run(tmp_path / "e", finished=False)
        found = find_runs([tmp_path])
        assert [run.label for run in found.runs] == ["b", "a", "d", "c"]
        assert [run.folder for run in found.unfinished] == [unfinished] and found.damaged == []

    def test_a_run_counts_once(self, tmp_path, monkeypatch):
        run = write_run(tmp_path / "runs" / "a")
        write_run(tmp_path / "runs" / "b", 3.0)
        monkeypatch.chdir(tmp_path)
        assert labels(tmp_path, tmp_path / "runs", run, Path("runs"), Path("runs/a")) == ["a", "b"]

    def test_one_run_by_its_own_folder(self, tmp_path):
        assert labels(write_run(tmp_path / "0,seed=1,seq_len=32")) == ["0,seed=1,seq_len=32"]

    def test_configurations_of_wandb_are_no_runs(self, tmp_path):
        run = write_run(tmp_path / "wandb" / "a")  # a folder of that name above the runs does not matter
        (run / "wandb" / "files").mkdir(parents=True)
        (run / "wandb" / "files" / "config.yaml").touch()
        assert find_runs([tmp_path / "wandb"]) == find_runs([run])

    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            pytest.param(["0,a=1,b=2", "1,a=1,b=3"], ["0,b=2", "1,b=3"], id="what all share goes"),
            pytest.param(["one", "two"], ["one", "two"], id="names"),
            pytest.param(["x/same", "y/same"], ["x/same", "y/same"], id="alike in two folders"),
            pytest.param(["x/1/same", "y/1/same"], ["x/1/same", "y/1/same"], id="alike in folders alike"),
            pytest.param(["x/1/same", "x/2/same"], ["1/same", "2/same"], id="no more than needed"),
            pytest.param(["a", "a,b"], ["a", "a,b"], id="none left without a name"),
        ],
    )
    def test_labels_tell_runs_apart(self, tmp_path, names, expected):
        for place, name in enumerate(names):
            write_run(tmp_path / name, bits_per_byte=1.0 + place)
        assert labels(tmp_path) == expected

    @pytest.mark.parametrize(
        ("prepare", "message"),
        [
            pytest.param(lambda folder: None, "there is no .*sweep; give the folder", id="missing"),
            pytest.param(Path.mkdir, "no run at or below .*sweep: no folder there has a config.yaml", id="empty"),
        ],
    )
    def test_refuses(self, tmp_path, prepare, message):
        prepare(tmp_path / "sweep")
        with pytest.raises(DataError, match=message):
            find_runs([tmp_path / "sweep"])


class TestRun:
    def test_row(self, tmp_path):
        (run,) = find_runs([write_run(tmp_path / "a", 2.0)]).runs
        assert run.row() == {
            "run": "a",
            "mixer": "flash",
            "seq_len": 32,
            "parameters": 23_744,
            "tokens": 1280,
            "bits_per_byte": 2.0,
            "loss": 2.0 * math.log(2),
            "tokens_per_second": 1234.5,
            "training_seconds": 1.25,
            "peak_gib": 2.0,
            "training_flops_per_token": 6e5,
            "causal": None,
        }
        assert set(run.row()) == ROW

    def test_memory_of_the_summary_counts_first(self, tmp_path):
        folder = write_run(tmp_path / "a")
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"peak_memory_bytes": 3 * 2**30}))
        (run,) = find_runs([folder]).runs
        assert run.row()["peak_gib"] == 3.0

    def test_curve_takes_rows_that_have_both(self, tmp_path):
        (run,) = find_runs([write_run(tmp_path / "a", 2.0)]).runs
        assert run.curve("validation/bits_per_byte") == ([10, 20], [2.1, 2.05])
        assert run.curve("nothing") == ([], [])

    def test_without_a_log(self, tmp_path):
        (run,) = find_runs([write_run(tmp_path / "a", logged=False)]).runs
        assert run.row()["peak_gib"] is None
        assert run.curve("validation/bits_per_byte") == ([], [])


class TestCommand:
    @pytest.fixture
    def report(self, monkeypatch, capsys):
        """Runs the command in this process; gives its exit code and what it wrote."""

        def run(*arguments: object):
            monkeypatch.setattr(sys, "argv", ["longmix.reporting", *map(str, arguments)])
            return command.main(), capsys.readouterr()

        return run

    @pytest.mark.slow
    def test_table_and_files(self, tmp_path, report):
        for name, bits in {"first": 2.5, "second": 1.5}.items():
            write_run(tmp_path / name, bits)
        unfinished = write_run(tmp_path / "third", finished=False)
        code, written = report(tmp_path)
        assert code == 0
        rows = [line for line in written.out.splitlines() if line.startswith("│")]
        cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
        assert [row[0] for row in cells] == ["second", "first"]
        assert cells[0][1:] == ["flash", "1.500", "1.040", "1,234", "1.2", "2.00"]
        assert "all runs: 32 tokens of context, 23,744 parameters, 1,280 tokens trained on\n" in written.out
        assert (
            f"not finished: {unfinished}: step 20, train loss 3.0000 at step 20, validation 2.0500 bits/byte at step"
            in (written.out)
        )
        assert all(f"wrote {tmp_path}/{name}\n" in written.out for name in FILES)
        saved = json.loads((tmp_path / "runs.json").read_text())
        assert [row["run"] for row in saved] == ["second", "first"]
        assert all(set(row) == ROW for row in saved)
        check_picture(tmp_path / "runs.png")
        pictures = sorted((tmp_path / "panels").iterdir())
        panels = ("loss_by_position", "loss_by_time", "loss_by_tokens", "trade_off")
        assert [path.name for path in pictures] == [f"{name}_32.png" for name in panels]
        for path in pictures:
            check_picture(path)
        with (tmp_path / "runs.csv").open(newline="") as stream:
            lines = list(csv.DictReader(stream))
        assert [line["run"] for line in lines] == ["second", "first"]
        assert float(lines[0]["bits_per_byte"]) == 1.5 and lines[0]["causal"] == ""

    @pytest.mark.slow
    def test_recall_and_causality_as_far_as_evaluated(self, tmp_path, report):
        for name, bits in {"first": 1.5, "second": 2.5}.items():
            write_run(tmp_path / name, bits)
        write_needles(tmp_path / "first", [32, 64], [0.5], [[0.75, 0.25]])
        write_evaluation(tmp_path / "second", "causality_step9", causal=False, step=9)
        rows = [line for line in report(tmp_path)[1].out.splitlines() if line.startswith("│")]
        cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
        assert [row[-3:] for row in cells] == [["75.0 %", "+6.75 nats", "-"], ["-", "-", "LEAKS"]]

    def test_runs_without_a_log_have_a_picture_too(self, tmp_path, report):
        write_run(tmp_path / "a", logged=False)
        assert report(tmp_path)[0] == 0
        check_picture(tmp_path / "runs.png")

    @pytest.mark.slow
    def test_brackets_of_names_are_no_markup(self, tmp_path, report):
        write_run(tmp_path / "[bold]a")
        unfinished = write_run(tmp_path / "[red]b", finished=False)
        code, written = report(tmp_path)
        assert code == 0
        assert "│ [bold]a" in written.out and f"not finished: {unfinished}: step 20" in written.out

    def test_output_folder_is_made(self, tmp_path, report):
        write_run(tmp_path / "a")
        assert report(tmp_path / "a", "--output", tmp_path / "new" / "place")[0] == 0
        assert sorted(path.name for path in (tmp_path / "new" / "place").iterdir()) == FILES
        assert not (tmp_path / "a" / "runs.json").exists()

    def test_error_is_one_line(self, tmp_path, report):
        code, written = report(tmp_path / "nowhere")
        assert code == 2
        assert written.err == f"DataError: there is no {tmp_path}/nowhere; give the folder of a sweep or of runs.\n"
        assert written.out == ""

    @pytest.mark.slow
    def test_report_again_does_not_count_itself(self, tmp_path, report):
        write_run(tmp_path / "a")
        first = report(tmp_path)[1].out
        assert report(tmp_path)[1].out == first

    @pytest.mark.slow
    def test_write_report_returns_what_it_wrote(self, tmp_path):
        written = write_report(find_runs([write_run(tmp_path / "a")]), tmp_path)
        assert sorted(path.name for path in written) == FILES
        assert all(path.exists() for path in written)


@pytest.mark.slow
class TestSweep:
    @pytest.mark.slow
    def test_from_the_command_line_to_an_evaluation(self, run_process, tiny_overrides, tmp_path):
        swept = ["seq_len=32,64", "seed=1,2"]
        done = run_process("train.py", "-m", *swept, *tiny_overrides, "loop.log_every=1", "loop.validate_every=1")
        assert done.code == 0, done.err
        assert [path.name for path in tmp_path.iterdir()] == ["multirun"]
        (sweep,) = (tmp_path / "multirun").iterdir()
        folders = sorted(path for path in sweep.iterdir() if path.is_dir())
        assert len(folders) == 4
        for number, (folder, settings) in enumerate(
            zip(folders, [("seed=1", "32"), ("seed=2", "32"), ("seed=1", "64"), ("seed=2", "64")], strict=True)
        ):
            assert folder.name.split(",")[0] == str(number)
            assert {settings[0], f"seq_len={settings[1]}"} <= set(folder.name.split(","))
            assert {path.name for path in folder.iterdir()} == {
                "checkpoints",
                "config.yaml",
                "metrics.csv",
                "summary.json",
            }

        unfinished = write_run(sweep / "4,seed=3", finished=False)
        done = run_process("longmix.reporting", str(sweep))
        assert done.code == 0, done.err
        saved = {row["run"]: row for row in json.loads((sweep / "runs.json").read_text())}
        assert set(saved) == {
            "0,seed=1,seq_len=32",
            "1,seed=2,seq_len=32",
            "2,seed=1,seq_len=64",
            "3,seed=2,seq_len=64",
        }
        for folder in folders:
            summary = json.loads((folder / "summary.json").read_text())
            (row,) = [row for label, row in saved.items() if set(label.split(",")) <= set(folder.name.split(","))]
            assert row["tokens"] == summary["tokens"] == 2 * 2 * row["seq_len"]
            assert row["bits_per_byte"] == summary["validation"]["bits_per_byte"]
            with (folder / "metrics.csv").open() as stream:
                validations = [line["validation/bits_per_byte"] for line in csv.DictReader(stream)]
            assert [float(value) for value in validations if value][-1] == pytest.approx(row["bits_per_byte"])
        assert list(saved) == sorted(saved, key=lambda label: saved[label]["bits_per_byte"])
        assert len({row["bits_per_byte"] for row in saved.values()}) == 4
        assert all(f"│ {label} " in done.out for label in saved)
        assert f"not finished: {unfinished}" in done.out
        check_picture(sweep / "runs.png")

        # a folder of a sweep has commas and equal signs in its name, which Hydra must not read
        done = run_process("evaluate.py", f"checkpoint={folders[2]}", "seq_len=[64,128]", "max_tokens=256")
        assert done.code == 0, done.err
        (saved_loss,) = (folders[2] / "evaluation").glob("loss_*_validation_step2_*.json")
        report = json.loads(saved_loss.read_text())
        assert set(report["lengths"]) == {"64", "128"}
        assert report["lengths"]["64"]["bits_per_byte"] == pytest.approx(saved["2,seed=1,seq_len=64"]["bits_per_byte"])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["multirun"]
