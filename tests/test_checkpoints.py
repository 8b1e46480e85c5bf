import json
import math
import random
import resource
import shutil

import numpy as np
import pytest
import torch

from longmix.checkpoints import CheckpointStore, find_checkpoint, load_checkpoint
from longmix.checkpoints import store as store_module
from longmix.errors import CheckpointError, StorageError
from longmix.training import random_state


def state(step: int) -> dict:
    return {"step": step, "model": {"weight": torch.arange(1000.0) * step}, "texts": ["ü", 1, 2.5, None, True]}


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


def test_what_was_saved_comes_back(store):
    path = store.save(state(7), {"validation": {"loss": 2.0}})
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"]["weight"], state(7)["model"]["weight"])
    assert loaded["texts"] == state(7)["texts"]
    info = json.loads((path / "info.json").read_text())
    assert info["step"] == 7
    assert info["validation"] == {"loss": 2.0}


def test_pruning_keeps_the_newest_and_the_best(store):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, None)):
        store.save(state(step), {"validation": {} if loss is None else {"loss": loss}})
    store.prune(keep=2)
    assert [path.name for path in store.all()] == ["step-00000002", "step-00000004", "step-00000005"]
    assert store.best().name == "step-00000002"
    assert store.latest().name == "step-00000005"


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[-200] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "flipped-bit": ("state.pt", damage_flip, "damaged"),
    "truncated": ("state.pt", lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
    "missing-state": ("state.pt", lambda path: path.unlink(), "is missing"),
    "missing-info": ("info.json", lambda path: path.unlink(), "cannot be read"),
    "broken-info": ("info.json", lambda path: path.write_text("{"), "cannot be read"),
    "other-format": ("info.json", lambda path: path.write_text('{"format": 99}'), "has format 99"),
}


@pytest.mark.parametrize(("file", "damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_refused_by_name(store, file, damage, words):
    path = store.save(state(1), {})
    damage(path / file)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_a_checkpoint_cannot_run_code(store):
    path = store.save(state(1), {})

    class Code:
        def __reduce__(self):
            return print, ("run by a checkpoint",)

    torch.save({"step": 1, "bad": Code()}, path / "state.pt")
    info = json.loads((path / "info.json").read_text())
    from longmix.files import sha256_of_file

    info |= {"bytes": (path / "state.pt").stat().st_size, "sha256": sha256_of_file(path / "state.pt")}
    (path / "info.json").write_text(json.dumps(info))
    with pytest.raises(Exception, match="Weights only load failed"):
        load_checkpoint(path)


def test_a_failed_save_leaves_older_checkpoints_and_no_debris(store):
    first = store.save(state(1), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StorageError, match="could not write"):
            store.save(state(2), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in store.folder.iterdir()] == [first.name]
    load_checkpoint(first)


def test_find_checkpoint_takes_a_checkpoint_a_run_or_its_folder(store):
    store.save(state(1), {})
    latest = store.save(state(2), {})
    for path in (latest, store.folder, store.folder.parent):
        assert find_checkpoint(path) == latest


def test_find_checkpoint_says_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="there is no"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)


def test_random_states_survive_a_checkpoint(store):
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(5)
    np.random.randn()  # leaves a cached gaussian behind
    path = store.save({"step": 1, "random": random_state.capture()}, {})
    drawn = [torch.rand(3).tolist(), np.random.randn(3).tolist(), random.random(), random.gauss(0, 1)]
    random_state.restore(load_checkpoint(path)["random"])
    assert [torch.rand(3).tolist(), np.random.randn(3).tolist(), random.random(), random.gauss(0, 1)] == drawn


class TestSameStepTwice:
    """What was saved is what is there: an old checkpoint never stands for a new one."""

    def test_the_new_one_takes_the_place(self, store):
        store.save(state(7), {})
        path = store.save({**state(7), "model": {"weight": torch.ones(3)}}, {})
        assert torch.equal(load_checkpoint(path)["model"]["weight"], torch.ones(3))
        assert [path.name for path in store.folder.iterdir()] == ["step-00000007"]

    def test_the_old_one_stays_if_the_new_one_fails(self, store, monkeypatch):
        path = store.save(state(7), {})

        def fail(*_):
            raise OSError("no room")

        monkeypatch.setattr(store_module, "write_whole", fail)
        with pytest.raises(StorageError, match="no room"):
            store.save(state(7), {"new": True})
        assert load_checkpoint(path)["step"] == 7
        assert [path.name for path in store.folder.iterdir()] == ["step-00000007"]

    @pytest.mark.parametrize("old_is_gone", [False, True])
    def test_killed_in_between_there_is_one_of_them(self, store, old_is_gone):
        old = store.save(state(7), {})
        new = store.save(state(8), {}).rename(store.folder / "step-00000007.new")
        assert store.all() == [old]
        if old_is_gone:
            shutil.rmtree(old)
        store.recover()
        assert load_checkpoint(old)["step"] == (8 if old_is_gone else 7)
        assert not new.exists()


class TestPruneAmongWhatOthersLeft:
    def test_a_link_goes_and_what_it_leads_to_stays(self, store, tmp_path):
        moved = store.save(state(1), {}).rename(tmp_path / "moved")
        (store.folder / "step-00000001").symlink_to(moved)
        store.save(state(2), {})
        store.prune(keep=1)
        assert [path.name for path in store.folder.iterdir()] == ["step-00000002"]
        assert load_checkpoint(moved)["step"] == 1

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"validation": []}', "9" * 50, "[" * 100_000])
    def test_a_damaged_one_stays_and_does_not_count(self, store, caplog, content):
        for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, math.nan)):
            store.save(state(step), {"validation": {"loss": loss}})
        (store.path(4) / "info.json").write_text(content)
        store.prune(keep=2)
        store.prune(keep=2)
        left = [path.name[-1] for path in store.all()]
        readable = content == '{"validation": []}'
        assert left == (["1", "4", "5"] if readable else ["1", "3", "4", "5"])
        warned = [record for record in caplog.records if "step-00000004 is left as it is" in record.getMessage()]
        assert len(warned) == (0 if readable else 1)
        assert store.best() == store.path(1)
