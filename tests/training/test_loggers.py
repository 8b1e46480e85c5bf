import os
import resource
import subprocess
from pathlib import Path

import pytest

from longmix.errors import StorageError
from longmix.metrics import read_metrics
from longmix.training.loggers import CsvLog, WandbLog


def test_new_columns_join_and_empty_cells_are_left_out(tmp_path):
    log = CsvLog()
    log.open(tmp_path, {}, "name", 0)
    log.write(1, {"a": 1.5})
    log.write(2, {"a": 2.0, "b": -3.0})
    log.write(3, {"b": 4.0})
    assert read_metrics(tmp_path) == [{"step": 1, "a": 1.5}, {"step": 2, "a": 2.0, "b": -3.0}, {"step": 3, "b": 4.0}]
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "step,a,b"


def test_a_resumed_log_drops_the_steps_that_come_again_and_a_torn_line(tmp_path):
    log = CsvLog()
    log.open(tmp_path, {}, "name", 0)
    for step in range(1, 6):
        log.write(step, {"a": float(step)})
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write("6,1.0e")
    again = CsvLog()
    again.open(tmp_path, {}, "name", 3)
    again.write(4, {"a": 40.0})
    assert [(row["step"], row["a"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


@pytest.mark.parametrize("damage", ["9" * 200_000, '"', '"' + "x\n" * 100_000, "\0", "1,2,3"])
def test_a_damaged_line_takes_no_others_with_it(damage, tmp_path):
    (tmp_path / "metrics.csv").write_text(f"step,a\n1,1.0\n2,{damage}\n3,3.0\n")
    CsvLog().open(tmp_path, {}, "name", 3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "fifo"])
def test_what_is_no_file_is_one_error_and_nothing_waits(make, tmp_path):
    make(tmp_path / "metrics.csv")
    with pytest.raises(StorageError, match=r"metrics\.csv: it is not a regular file"):
        CsvLog().open(tmp_path, {}, "name", 3)


def test_a_validation_that_comes_again_stands_there_once(tmp_path):
    log = CsvLog()
    log.open(tmp_path, {}, "name", 0)
    log.write(2, {"train/loss": 1.0})
    log.write(2, {"validation/loss": 2.0})
    again = CsvLog()
    again.open(tmp_path, {}, "name", 2)
    again.write(2, {"validation/loss": 2.5})
    again.write(3, {"train/loss": 3.0})
    assert [(row["step"], row.get("validation/loss")) for row in read_metrics(tmp_path)] == [
        (2, None),
        (2, 2.5),
        (3, None),
    ]


def test_a_fresh_log_begins_empty(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a\n1,2.0\n")
    CsvLog().open(tmp_path, {}, "name", 0)
    assert read_metrics(tmp_path) == []


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc


@pytest.mark.slow
def test_wandb_without_a_key_is_offline_and_keeps_its_id(tmp_path, no_key):
    for first_step in (0, 1):
        log = WandbLog(project="test")
        log.open(tmp_path, {"seed": 1}, "name", first_step)
        assert log.run is not None
        assert log.run.settings.mode == "offline"
        log.write(first_step + 1, {"train/loss": 1.0})
        log.close(0)
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    assert files
    assert all(file.stem == f"run-{run_id}" for file in files)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.slow
def test_a_key_without_a_network_falls_back_to_offline(tmp_path, no_key, monkeypatch, caplog):
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    original = wandb.init

    def without_network(**settings):
        if settings["mode"] == "online":
            raise ConnectionError("no route to host")
        return original(**settings)

    monkeypatch.setattr(wandb, "init", without_network)
    log = WandbLog()
    log.open(tmp_path, {}, "name", 0)
    assert log.run.settings.mode == "offline"
    assert "no route to host" in caplog.text
    log.close(0)


def test_a_failing_wandb_never_stops_the_run(tmp_path, monkeypatch, caplog):
    import wandb

    def refuse(**_):
        raise RuntimeError("no wandb today")

    monkeypatch.setattr(wandb, "init", refuse)
    log = WandbLog(mode="offline")
    log.open(tmp_path, {}, "name", 0)
    log.write(1, {"a": 1.0})
    log.close(1)
    assert "no wandb today" in caplog.text
    assert read_metrics(tmp_path) == [{"step": 1, "a": 1.0}]


def test_wandb_that_fails_later_is_left_behind(tmp_path, caplog):
    class Broken:
        def log(self, row):
            raise OSError("gone")

    log = WandbLog(mode="offline")
    CsvLog.open(log, tmp_path, {}, "name", 0)
    log.run = Broken()
    log.write(1, {"a": 1.0})
    log.write(2, {"a": 2.0})
    assert caplog.text.count("gone") == 1
    assert len(read_metrics(tmp_path)) == 2


def test_integers_stay_integers_when_a_run_is_resumed(tmp_path):
    """So do all other texts: a resumed run changes no byte of the rows that stay."""
    log = CsvLog()
    log.open(tmp_path, {}, "name", 0)
    log.write(1, {"train/tokens": 1280, "loss": 0.1, "tiny": 1e-30})
    log.write(2, {"train/tokens": 2560, "loss": 1 / 3})
    before = (tmp_path / "metrics.csv").read_bytes()
    CsvLog().open(tmp_path, {}, "name", 2)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    log.write(3, {"train/tokens": 3840, "new": 7})
    assert (
        b"1,1280,0.1,1e-30,\r\n2,2560,0.3333333333333333,,\r\n3,3840,,,7\r\n" in (tmp_path / "metrics.csv").read_bytes()
    )


def test_a_full_disk_warns_once_and_the_rows_follow(tmp_path, caplog):
    """Past the limit every write fails with an OSError, as it does on a full disk."""
    log = CsvLog()
    log.open(tmp_path, {}, "name", 0)
    log.write(1, {"a": 1.0})
    before = (tmp_path / "metrics.csv").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 2, limits[1]))
    try:
        log.write(2, {"a": 2.25})
        log.write(3, {"a": 3.25, "b": 1})
        assert (tmp_path / "metrics.csv").read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("cannot be written") == 1
    log.write(4, {"a": 4.25})
    rows = [(row["step"], row["a"], row.get("b")) for row in read_metrics(tmp_path)]
    assert rows == [(1, 1.0, None), (2, 2.25, None), (3, 3.25, 1.0), (4, 4.25, None)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv"]


@pytest.mark.parametrize("damage", [b"2,\xff\n", b"step two,1.0\n", b"2,1.0e", b"nan,1\n", b"2.5,1\n"])
def test_a_damaged_row_is_left_out(damage, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"step,a\n1,1.5\n" + damage)
    assert read_metrics(tmp_path) == [{"step": 1, "a": 1.5}]


@pytest.mark.slow
def test_an_offline_wandb_run_says_how_to_send_it(tmp_path, no_key, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/my run"
    folder.mkdir(parents=True)
    assert CsvLog().upload_command() is None
    log = WandbLog(project="test")
    log.open(folder, {"seed": 1}, "name", 0)
    log.close(0)
    command = log.upload_command()
    assert command == "wandb sync 'runs/my run/wandb'/offline-run-*"
    found = subprocess.run(["bash", "-c", command.replace("wandb sync", "ls -d")], capture_output=True, text=True)
    assert found.stdout.startswith("runs/my run/wandb/offline-run-")
