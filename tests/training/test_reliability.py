"""Kill the training process for real, run the same command with resume=auto, and demand the same bits."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched import Ended, alone

from longmix.checkpoints import CheckpointStore, load_checkpoint

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "mixer=sliding_window*1+flash",
    "mixer.sliding_window.window=20",
    "model.num_layers=2",
    "model.d_model=32",
    "model.mlp_hidden=48",
    "seq_len=64",
    "batch_size=4",
    "trainer=cpu",
    "trainer.num_threads=1",
    "trainer.micro_batch_size=2",
    "optimizer=muon",
    "max_steps=8",
    "loop.log_every=1",
    "loop.validate_every=4",
    "loop.checkpoint_every=3",
    "loop.keep_checkpoints=1",
    "data.validation_tokens=512",
    "logger=csv",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def words(cache: Path, *more: str) -> list[str]:
    return [*SETTINGS, f"data.cache_dir={cache}", "name=run", *more]


def command(folder: Path, *given: str) -> subprocess.CompletedProcess:
    """The command as a user types it."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *given], cwd=folder, capture_output=True, text=True, timeout=300
    )


def doomed(moment: str, folder: Path, cache: Path) -> Ended:
    return alone(words(cache), folder, moment)


def resumed(folder: Path, cache: Path) -> Ended:
    return alone(words(cache, "resume=auto"), folder)


def final_state(folder: Path) -> dict:
    return load_checkpoint(folder / "runs/run/checkpoints/step-00000008")


def rows(folder: Path, column: str) -> list[tuple[str, str]]:
    with (folder / "runs/run/metrics.csv").open(newline="") as stream:
        return [(row["step"], row[column]) for row in csv.DictReader(stream) if row[column]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, cache) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    done = command(folder, *words(cache))
    assert done.returncode == 0, done.stderr
    return folder


def assert_same(ours, theirs, path: str = "state") -> None:
    assert type(ours) is type(theirs), path
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), path
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            assert_same(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), path
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    else:
        assert ours == theirs, path


def assert_same_run(folder: Path, straight: Path) -> None:
    ours, theirs = final_state(folder), final_state(straight)
    for part in ("step", "model", "optimizers", "random", "data_fingerprint", "tokenizer"):
        assert_same(ours[part], theirs[part], part)
    for column in ("train/loss", "train/gradient_norm", "validation/loss"):
        assert rows(folder, column) == rows(straight, column), column


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "checkpoints_left"),
    [
        ("between-checkpoints", ["step-00000003"]),
        ("half-written", ["step-00000003"]),
        ("before-rename", ["step-00000003"]),
        ("while-pruning", ["step-00000006"]),
    ],
)
def test_killed_and_resumed_is_bit_for_bit_the_straight_run(moment, checkpoints_left, tmp_path, cache, straight):
    killed = doomed(moment, tmp_path, cache)
    assert killed.code == -9, killed.text
    store = CheckpointStore(tmp_path / "runs/run/checkpoints")
    assert [path.name for path in store.all()] == checkpoints_left
    done = resumed(tmp_path, cache)
    assert done.code == 0, done.text
    assert_same_run(tmp_path, straight)
    assert not list(store.folder.glob(".*")), "leftovers of the killed process were not cleared away"


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "name"), [("sigterm", "SIGTERM"), ("sigint", "SIGINT")])
def test_a_signal_saves_and_exits_with_its_own_code(moment, name, tmp_path, cache, straight):
    stopped = doomed(moment, tmp_path, cache)
    assert stopped.code == 75, stopped.text
    assert f"{name} ended the run after step 5 of 8" in stopped.text
    assert "Traceback" not in stopped.text
    assert CheckpointStore(tmp_path / "runs/run/checkpoints").latest().name == "step-00000005"
    done = resumed(tmp_path, cache)
    assert done.code == 0, done.text
    assert_same_run(tmp_path, straight)


@pytest.mark.slow
def test_a_full_disk_gives_one_error_and_keeps_older_checkpoints(tmp_path, cache, straight):
    failed = doomed("full-disk", tmp_path, cache)
    assert failed.code == 2, failed.text
    assert "StorageError: could not write" in failed.text
    assert "step-00000006" in failed.text
    assert "Traceback" not in failed.text
    assert CheckpointStore(tmp_path / "runs/run/checkpoints").latest().name == "step-00000003"
    assert resumed(tmp_path, cache).code == 0
    assert_same_run(tmp_path, straight)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_by_name_and_the_older_one_resumes(tmp_path, cache, straight):
    assert doomed("sigterm", tmp_path, cache).code == 75
    latest = CheckpointStore(tmp_path / "runs/run/checkpoints").latest()
    state = latest / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    refused = resumed(tmp_path, cache)
    assert refused.code == 2
    assert str(state) in refused.text
    assert "damaged" in refused.text
    assert "Traceback" not in refused.text


@pytest.mark.slow
def test_a_finished_run_resumes_to_its_summary(straight, cache):
    before = final_state(straight)
    done = resumed(straight, cache)
    assert done.code == 0, done.text
    assert "bits/byte" in done.text
    assert_same(final_state(straight), before)


@pytest.mark.slow
def test_a_fresh_run_does_not_overwrite_an_old_one(straight, cache):
    refused = alone(words(cache), straight)
    assert refused.code == 2
    assert "already holds a run" in refused.text


DIVIDED = ["trainer.strategy=fsdp", "trainer.devices=2", "trainer.context_parallel=null"]
"""Other divisions: `test_same_curve`."""


@pytest.mark.slow
def test_several_processes_train_as_one(tmp_path, cache, straight):
    done = command(tmp_path, *words(cache, *DIVIDED))
    assert done.returncode == 0, done.stderr
    for column in ("train/loss", "train/bits_per_byte", "train/gradient_norm", "validation/loss"):
        ours, theirs = rows(tmp_path, column), rows(straight, column)
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        for (_, value), (step, expected) in zip(ours, theirs, strict=True):
            assert float(value) == pytest.approx(float(expected), rel=2e-5), (column, step)
    assert_same_shapes(final_state(tmp_path)["model"], final_state(straight)["model"])


def assert_same_shapes(ours: dict, theirs: dict) -> None:
    assert {name: weight.shape for name, weight in ours.items()} == {name: w.shape for name, w in theirs.items()}
