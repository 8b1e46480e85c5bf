"""Sharded checkpoints in one process: what is damaged, foreign or hostile is refused by name; and their whole form."""

import contextlib
import json
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from longmix.checkpoints import CheckpointStore, find_checkpoint, load_checkpoint, open_checkpoint, read_info
from longmix.checkpoints import store as store_module
from longmix.checkpoints.__main__ import main as consolidate
from longmix.checkpoints.saver import Saver
from longmix.checkpoints.sharded import ShardedCheckpoint
from longmix.checkpoints.tensors import pieces
from longmix.checkpoints.verify import facts_of
from longmix.distributed.agreement import Processes
from longmix.errors import CheckpointError
from longmix.training import random_state

SHARD = "__0_0.distcp"


def state(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "model": {
            "weight": torch.arange(2000.0).view(40, 50) * step,
            "whole": torch.tensor(step),
            "none": torch.ones(0),
        },
        "optimizers": [
            {
                "state": {"weight": {"sum": torch.ones(40, 50, dtype=torch.bfloat16)}},
                "param_groups": [{"lr": 0.1 * step}],
            }
        ],
        "texts": ["ü", 1, 2.5, None, True],
    }


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


@pytest.fixture
def checkpoint(store) -> Path:
    return saved(store, 3)


def saved(store: CheckpointStore, step: int) -> Path:
    Saver(store, 9, Processes(), sharded=True, asynchronous=False).save(state(step), {"validation": {"loss": 1.5}})
    return store.path(step)


def assert_is(loaded: dict[str, Any], step: int) -> None:
    wanted = state(step)
    for ours, theirs in (
        (loaded["model"], wanted["model"]),
        (loaded["optimizers"][0]["state"]["weight"], wanted["optimizers"][0]["state"]["weight"]),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
    assert loaded["optimizers"][0]["param_groups"] == wanted["optimizers"][0]["param_groups"]
    assert loaded["texts"] == wanted["texts"]
    assert loaded.keys() == wanted.keys()


def test_what_was_saved_comes_back(store, checkpoint):
    assert_is(load_checkpoint(checkpoint), 3)
    assert store.latest() == store.best() == checkpoint
    info = read_info(checkpoint)
    assert (info["format"], info["step"], info["validation"]) == (2, 3, {"loss": 1.5})
    for name, facts in info["files"].items():
        assert facts == facts_of(checkpoint / name)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_the_optimizers_may_be_left_out(store, sharded):
    Saver(store, 9, Processes(), sharded=sharded, asynchronous=False).save(state(3), {})
    loaded = load_checkpoint(store.path(3), optimizers=False)
    assert loaded.keys() == state(3).keys() - {"optimizers"}
    assert torch.equal(loaded["model"]["weight"], state(3)["model"]["weight"])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def exchange(path: Path) -> None:
    shutil.copy(saved(CheckpointStore(path.parents[2] / "other"), 4) / path.name, path)


def list_nothing(checkpoint: Path) -> None:
    info = read_info(checkpoint)
    info["files"] = {name: facts for name, facts in info["files"].items() if name != "run.pt"}
    (checkpoint / "info.json").write_text(json.dumps(info))


DAMAGES = {
    f"{how.__name__}-{name}": (name, how, words)
    for name in (SHARD, ".metadata", "run.pt")
    for how, words in ((flip, "damaged or of another"), (truncate, "bytes instead of"), (Path.unlink, "is missing"))
} | {
    "exchange-shard": (SHARD, exchange, "damaged or of another checkpoint"),
    "unlink-info": ("info.json", Path.unlink, "cannot be read"),
    "nothing-listed": ("run.pt", lambda path: list_nothing(path.parent), "bytes instead of None"),
    "other-format": ("info.json", lambda path: path.write_text('{"format": 3}'), "has format 3; this version"),
}


@pytest.mark.parametrize(("file", "damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_refused_by_name(checkpoint, file, damage, words):
    damage(checkpoint / file)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(checkpoint)
    assert str(checkpoint / file if file != "info.json" else checkpoint) in str(caught.value)


def test_nothing_is_changed_before_all_shards_are_verified(checkpoint):
    opened = open_checkpoint(checkpoint)
    flip(checkpoint / SHARD)
    target = torch.full((40, 50), -1.0)
    with pytest.raises(CheckpointError, match="damaged"):
        opened.read_into({"model/weight": target}, Processes())
    assert torch.all(target == -1)


class Code:
    """Leaves a mark if it is unpickled by one that runs what a pickle names."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def replace(checkpoint: Path, name: str, content: bytes) -> None:
    """Put another file in its place, with a hash that fits."""
    (checkpoint / name).write_bytes(content)
    info = read_info(checkpoint)
    info["files"][name] = facts_of(checkpoint / name)
    (checkpoint / "info.json").write_text(json.dumps(info))


def metadata_of(checkpoint: Path) -> Metadata:
    return ShardedCheckpoint(checkpoint)._metadata


def hostile_metadata(checkpoint: Path, code: Code) -> None:
    metadata = metadata_of(checkpoint)
    metadata.planner_data = code
    replace(checkpoint, ".metadata", pickle.dumps(metadata))


def hostile_entry(checkpoint: Path, code: Code) -> None:
    """DCP unpickles the bytes of an entry that is no tensor without asking."""
    metadata = metadata_of(checkpoint)
    metadata.state_dict_metadata["model/weight"] = BytesStorageMetadata()
    replace(checkpoint, ".metadata", pickle.dumps(metadata))
    replace(checkpoint, SHARD, pickle.dumps(code) + bytes(10_000))


def hostile_shard(checkpoint: Path, code: Code) -> None:
    metadata = metadata_of(checkpoint)
    torch.save(code, checkpoint / SHARD)
    size = (checkpoint / SHARD).stat().st_size
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, size
    replace(checkpoint, ".metadata", pickle.dumps(metadata))
    replace(checkpoint, SHARD, (checkpoint / SHARD).read_bytes())


def hostile_rest(checkpoint: Path, code: Code) -> None:
    torch.save({"step": 1, "aliases": {}, "bad": code}, checkpoint / "run.pt")
    replace(checkpoint, "run.pt", (checkpoint / "run.pt").read_bytes())


HOSTILE = {
    "metadata": (hostile_metadata, r"\.metadata names pathlib\.Path\.?\w*|\.metadata names builtins\.getattr"),
    "entry": (hostile_entry, r"\.metadata names torch\.distributed\.checkpoint\.metadata\.BytesStorageMetadata"),
    "shard": (hostile_shard, "Weights only load failed"),
    "rest": (hostile_rest, r"run\.pt holds no state .*Weights only load failed"),
}


@pytest.mark.parametrize(("attack", "words"), HOSTILE.values(), ids=HOSTILE)
def test_loading_runs_no_code(checkpoint, tmp_path, attack, words):
    mark = tmp_path / "was here"
    attack(checkpoint, Code(mark))
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(checkpoint)
    assert "Delete" in str(caught.value)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Code(mark)))
    assert mark.exists(), "the attack would have done nothing anyway"


def test_a_shard_outside_the_checkpoint_is_not_read(checkpoint, tmp_path):
    metadata = metadata_of(checkpoint)
    next(iter(metadata.storage_data.values())).relative_path = "../../../elsewhere"
    replace(checkpoint, ".metadata", pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"\.metadata names \.\./\.\./\.\./elsewhere, which is not one of"):
        load_checkpoint(checkpoint)


def test_other_tensors_than_are_there_are_refused(checkpoint):
    opened = open_checkpoint(checkpoint)
    for targets in ({"model/weight": torch.ones(3)}, {"model/absent": torch.ones(3)}):
        with pytest.raises(CheckpointError, match="holds no such tensors"):
            opened.read_into(targets, Processes())


@pytest.mark.slow
def test_consolidated_it_is_a_whole_checkpoint(checkpoint, tmp_path, run_process, capsys):
    done = run_process("longmix.checkpoints", "consolidate", "run")
    whole = checkpoint.with_name("step-00000003-whole")
    assert (done.code, done.out) == (0, f"wrote {whole.relative_to(tmp_path)}\n"), done.err
    assert consolidate(["consolidate", str(checkpoint), str(tmp_path / "out")]) == 0
    for folder in (whole, tmp_path / "out"):
        assert sorted(path.name for path in folder.iterdir()) == ["info.json", "state.pt"]
        assert read_info(folder)["validation"] == {"loss": 1.5}
        assert_is(load_checkpoint(folder), 3)
    assert find_checkpoint(tmp_path / "run") == checkpoint, "the other is no checkpoint of the run's own"
    for words, refusal in (([str(checkpoint)], "is there already"), ([str(whole)], "in one file already")):
        assert consolidate(["consolidate", *words]) == 2
        assert refusal in capsys.readouterr().err


def test_a_pruned_run_keeps_the_newest_and_the_best_in_either_form(store):
    for step, loss, sharded in ((1, 3.0, True), (2, 1.0, True), (3, 2.0, False), (4, 2.5, True)):
        saver = Saver(store, 1, Processes(), sharded=sharded, asynchronous=True)
        saver.save(state(step), {"validation": {"loss": loss}})
        saver.wait()
    assert [path.name for path in store.all()] == ["step-00000002", "step-00000004"]
    assert_is(load_checkpoint(store.best()), 2)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_what_changes_after_a_save_is_not_in_it(store, monkeypatch, sharded):
    go, original = threading.Event(), store_module.atomic_directory

    def waits(target: Path) -> contextlib.AbstractContextManager[Path]:
        go.wait(30)
        return original(target)

    monkeypatch.setattr(store_module, "atomic_directory", waits)
    saver = Saver(store, 9, Processes(), sharded=sharded, asynchronous=True)
    content, info = state(3) | {"random": torch.ones(2)}, {"validation": {"loss": 1.5}}
    saver.save(content, info)
    content["model"]["weight"].zero_()
    content["optimizers"][0]["param_groups"][0]["lr"] = 9.0
    content["optimizers"][0]["state"]["weight"]["sum"].zero_()
    content["texts"].clear()
    content["random"].zero_()
    info["validation"]["loss"] = 0.0
    go.set()
    saver.wait()
    loaded = load_checkpoint(store.path(3))
    assert torch.equal(loaded.pop("random"), torch.ones(2))
    assert_is(loaded, 3)
    assert read_info(store.path(3))["validation"] == {"loss": 1.5}


def test_an_error_is_told_once_and_the_next_checkpoint_is_written(store, monkeypatch):
    saver = Saver(store, 1, Processes(), sharded=False, asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", lambda *_: 1 / 0)
        saver.save(state(1), {})
        with pytest.raises(ZeroDivisionError):
            saver.wait()
    assert not saver.failed
    saver.save(state(2), {})
    saver.wait()
    assert saver.last == store.latest() == store.path(2)


def test_a_process_continues_with_its_own_random_state_or_one_of_those_there_were():
    states = [{"torch": rank} for rank in range(3)]
    assert [random_state.of_process(states, rank)["torch"] for rank in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert random_state.of_process(states[1], 5) == {"torch": 1}, "older checkpoints hold one"


def test_what_all_processes_have_is_shared_out_evenly_and_once():
    tensors = {f"{size}-{index}": torch.zeros(size) for size in (1, 7, 100, 900) for index in range(5)}
    shares = [pieces(tensors, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    loads = [sum(piece.part.nbytes for piece in share.values()) for share in shares]
    assert max(loads) - min(loads) <= 900 * 4
    assert pieces(dict(reversed(tensors.items())), 1, 3).keys() == shares[1].keys(), (
        "the order of names must not matter"
    )
