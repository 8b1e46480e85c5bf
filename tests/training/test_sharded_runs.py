"""Real runs that write shards or write in the background: they resume, stop and fail as runs with whole files do."""

from pathlib import Path

import pytest
from launched import alone
from test_reliability import assert_same, command, final_state, rows, words

from longmix.checkpoints import CheckpointStore, read_info

pytestmark = pytest.mark.slow

DIVIDED = ["trainer.strategy=fsdp", "trainer.devices=2"]
BACKGROUND = "loop.async_checkpoints=true"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def divided(tmp_path_factory, cache) -> Path:
    """A run of two FSDP processes that keeps all its checkpoints."""
    folder = tmp_path_factory.mktemp("divided")
    done = command(folder, *words(cache, *DIVIDED, "loop.keep_checkpoints=9", BACKGROUND))
    assert done.returncode == 0, done.stderr
    return folder


def early(folder: Path) -> Path:
    return folder / "runs/run/checkpoints/step-00000003"


@pytest.mark.slow
def test_each_process_wrote_its_own_shards(divided):
    store = CheckpointStore(divided / "runs/run/checkpoints")
    assert [path.name for path in store.all()] == ["step-00000003", "step-00000006", "step-00000008"]
    for path in store.all():
        files = read_info(path)["files"]
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "run.pt"} == files.keys()
        assert read_info(path)["processes"] == 2
        shares = [files[f"__{rank}_0.distcp"]["bytes"] for rank in range(2)]
        assert min(shares) > 0.8 * max(shares)
    assert read_info(store.latest())["validation"]["step"] == 8
    assert len(final_state(divided)["random"]) == 2
    assert not list(store.folder.glob(".*"))


@pytest.mark.slow
def test_as_many_processes_continue_bit_for_bit(divided, tmp_path, cache):
    done = command(tmp_path, *words(cache, *DIVIDED, f"resume={early(divided)}"))
    assert done.returncode == 0, done.stderr
    ours, theirs = final_state(tmp_path), final_state(divided)
    for part in ("step", "model", "optimizers", "random", "data_fingerprint", "tokenizer"):
        assert_same(ours[part], theirs[part], part)


@pytest.mark.slow
def test_one_process_continues_and_is_evaluated(divided, tmp_path, cache):
    done = alone(words(cache, f"resume={early(divided)}"), tmp_path)
    assert done.code == 0, done.text
    assert read_info(tmp_path / "runs/run/checkpoints/step-00000008")["format"] == 1
    for column in ("train/loss", "train/gradient_norm", "validation/loss"):
        ours, theirs = rows(tmp_path, column), rows(divided, column)
        assert [step for step, _ in ours] == [step for step, _ in theirs if int(step) > 3]
        for (_, value), (step, expected) in zip(reversed(ours), reversed(theirs), strict=False):
            assert float(value) == pytest.approx(float(expected), rel=2e-5), (column, step)


@pytest.mark.slow
def test_a_sharded_run_is_evaluated_as_it_is(divided, run_process, cache):
    done = run_process(
        "evaluate.py",
        f"checkpoint={divided / 'runs/run'}",
        "max_tokens=512",
        f"output={divided / 'figures'}",
        "device=cpu",
    )
    assert done.code == 0, done.err
    trained = dict(rows(divided, "validation/loss"))["8"]
    assert f"{float(trained):.4f}" in done.out


@pytest.mark.slow
def test_a_signal_waits_for_what_is_being_written(tmp_path, cache):
    stopped = alone(words(cache, BACKGROUND), tmp_path, "sigterm")
    assert stopped.code == 75, stopped.text
    store = CheckpointStore(tmp_path / "runs/run/checkpoints")
    assert f"{store.latest().relative_to(tmp_path)} holds its state" in stopped.text
    assert store.latest().name == "step-00000005"


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_background_ends_the_run_soon(tmp_path, cache):
    # The disk is full after five steps.
    given = words(cache, BACKGROUND, "loop.sharded_checkpoints=true", "loop.checkpoint_every=6")
    failed = alone(given, tmp_path, "full-disk")
    assert failed.code == 2, failed.text
    assert "StorageError: could not write" in failed.text
    assert "step-00000006" in failed.text
    assert "Traceback" not in failed.text
    assert not list(tmp_path.glob("runs/run/checkpoints/*"))
