"""Checkpoints that several processes write and read: every form into every other, bit for bit, or one error for all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import saving
import torch
from pool import Pool
from saving import FORMS, Form

from longmix.checkpoints import CheckpointStore, load_checkpoint, read_info
from longmix.checkpoints.sharded import ShardedCheckpoint
from longmix.checkpoints.tensors import split

Run = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def run(pool: Pool) -> Run:
    """`run(function, form, ...)` in as many processes as the form has; their results by rank."""

    def in_processes(function: Callable[..., Any], form: Form, *arguments: Any) -> list[Any]:
        if form.processes == 1:
            return [function(None, form, *arguments)]
        return pool.run(form.processes, function, form, *arguments)

    return in_processes


@pytest.fixture(scope="session")
def saved(run: Run, tmp_path_factory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """A checkpoint of each form, and what was in the processes when it was saved."""
    found = {}
    for name, form in FORMS.items():
        folder = tmp_path_factory.mktemp(name)
        states = run(saving.save, form, folder)
        found[name] = folder / "step-00000002", states[0]
    return found


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "target", [name for name in FORMS if name not in ("single-shards", "ddp-4-shards", "fsdp-4-whole")]
)
@pytest.mark.parametrize("source", FORMS)
def test_every_form_continues_in_every_other_bit_for_bit(source, target, run, saved):
    checkpoint, before = saved[source]
    for after in run(saving.restore, FORMS[target], checkpoint):
        assert not saving.differences(after, before)


@pytest.mark.parametrize("target", ["single", "fsdp-2-shards", "fsdp-4-shards"])
def test_a_checkpoint_of_older_versions_continues_in_every_form(target, run, tmp_path):
    training = saving.Training(None, FORMS["single"], seed=0).step(2)
    state = {**training.state(), "optimizers": [optimizer.state_dict() for optimizer in training.optimizers]}
    assert all(isinstance(key, int) for content in state["optimizers"] for key in content["state"])
    checkpoint = CheckpointStore(tmp_path).save(state, {})
    for after in run(saving.restore, FORMS[target], checkpoint):
        assert not saving.differences(after, training.everything())


@pytest.mark.parametrize("name", ["single-shards", "fsdp-2-shards"])
def test_training_goes_on_as_if_it_had_not_stopped(name, run, saved):
    straight = run(saving.continued, FORMS[name], None)
    for ours, theirs in zip(run(saving.continued, FORMS[name], saved[name][0]), straight, strict=True):
        assert not saving.differences(ours, theirs)


@pytest.mark.parametrize("name", FORMS)
def test_one_process_loads_every_form(name, saved):
    checkpoint, before = saved[name]
    state = load_checkpoint(checkpoint)
    tensors, _ = split({key: state[key] for key in ("model", "optimizers")})
    assert not saving.differences(tensors, {key: value for key, value in before.items() if key in tensors})
    assert {"rates", "step"} == before.keys() - tensors.keys()
    assert state["text"] == ["ü", None, (1, 2.5)]
    head, embedding = state["model"]["head.weight"], state["model"]["embedding.weight"]
    assert head.data_ptr() == embedding.data_ptr(), "tied weights are written twice"


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.sharded])
def test_processes_share_the_writing_and_write_nothing_twice(name, saved):
    checkpoint, before = saved[name]
    opened = ShardedCheckpoint(checkpoint)
    chunks = opened._metadata.state_dict_metadata
    for tensor, entry in chunks.items():
        written = sum(chunk.sizes.numel() for chunk in entry.chunks if chunk.sizes.numel())
        assert written == before[tensor].numel(), tensor
    sizes = {file: facts["bytes"] for file, facts in read_info(checkpoint)["files"].items() if "distcp" in file}
    assert len(sizes) == FORMS[name].processes
    assert max(sizes.values()) < 2 * min(sizes.values())
    assert set(read_info(checkpoint)["files"]) | {"info.json"} == {path.name for path in checkpoint.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", "ddp-4-shards", "fsdp-4-shards", "fsdp-4-whole"])
def test_training_goes_on_while_a_copy_is_written(name, run, tmp_path):
    first, second = "step-00000002", "step-00000003"
    for found in run(saving.save_while_training, FORMS[name], tmp_path):
        assert found["in flight"] == ([], None, None)
        assert found["after"] == ([first], tmp_path / first)
        assert found["end"] == ([first, second], tmp_path / second)
    for step, wanted in ((first, found["first"]), (second, found["second"])):
        after = saving.restore(None, FORMS["single"], tmp_path / step)
        assert not saving.differences(after, wanted)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "in-the-background"])
@pytest.mark.parametrize(
    ("name", "full", "words"),
    [
        ("single", 0, ""),
        ("ddp-2", 0, "rank 0: "),
        ("fsdp-2-shards", 1, "rank 1: "),
        ("fsdp-4-shards", 0, "rank 0: "),
        ("ddp-4-shards", 2, "rank 2: "),
    ],
)
def test_one_full_disk_is_the_same_error_in_all_processes(name, full, words, asynchronous, run, tmp_path):
    results = run(saving.save_on_full_disk, FORMS[name], tmp_path, full, asynchronous)
    target = tmp_path / "step-00000002"
    for message, shared, left, seconds in results:
        assert message.startswith(f"StorageError: could not write {target}: {words}File too large.")
        assert shared == (FORMS[name].processes > 1)
        assert left == ["step-00000001"]
        assert seconds < 20
    assert [path.name for path in CheckpointStore(tmp_path).all()] == ["step-00000001", "step-00000003"]
    for path in CheckpointStore(tmp_path).all():
        load_checkpoint(path)


def test_processes_that_share_no_disk_are_told_so(run, tmp_path):
    target = tmp_path / "step-00000001"
    for message in run(saving.save_on_own_disks, FORMS["ddp-4-shards"], tmp_path):
        words = f"StorageError: could not write {target}: rank 3: the folder is not on a disk that all processes share."
        assert message.startswith(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("target", ["fsdp-2-shards", "fsdp-4-shards"])
def test_one_damaged_shard_is_the_same_error_in_all_processes(rank, target, run, saved, tmp_path):
    damaged = copy_of(saved["fsdp-2-shards"][0], tmp_path)
    shard = damaged / f"__{rank}_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    for message, shared in run(saving.error_of_restoring, FORMS[target], damaged):
        assert message.startswith(f"CheckpointError: {shard} is damaged or of another checkpoint")
        assert f"Delete {damaged} and use an older" in message
        assert shared


def test_whatever_fails_in_one_process_is_raised_in_all(pool):
    errors = {
        "OSError: rank 1: No space left on device": OSError(28, "No space left on device"),
        "RuntimeError: rank 1: ValueError: odd": ValueError("odd"),
    }
    for words, error in errors.items():
        assert pool.run(2, saving.fails, 1, error) == [words, words]
    assert pool.run(2, saving.fails, 7, ValueError()) == ["[0, 1]", "[0, 1]"]


def test_other_tools_read_the_shards(saved, tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    checkpoint, before = saved["fsdp-4-shards"]
    dcp_to_torch_save(checkpoint, tmp_path / "theirs.pt")
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    assert not saving.differences(theirs, {name: before[name] for name in theirs})
    assert len(theirs) > 20


def copy_of(checkpoint: Path, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(checkpoint, folder / checkpoint.name))
