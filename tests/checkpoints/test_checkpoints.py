import json
import math
import random
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from longmix.checkpoints import (
    CheckpointStore,
    chosen_checkpoint,
    find_checkpoint,
    load_checkpoint,
    load_tensors,
    open_checkpoint,
    read_info,
    save_tensors,
)
from longmix.checkpoints import store as store_module
from longmix.checkpoints.__main__ import consolidate
from longmix.checkpoints.contents import load_model_state
from longmix.checkpoints.find import last_checkpoint
from longmix.errors import CheckpointError, ConfigError, StorageError
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


def kept_of(store, best: int, keep: int, steps: range, without: str = "") -> list[int]:
    """The steps of `in_a_row` after pruning; without an entry of `info.json` that earlier versions did not write."""
    for step in steps:
        store.save(state(step), {"validation": {"loss": float(step != best)}})
        store.prune(keep)
    for path in store.all():
        (path / "info.json").write_text(json.dumps({k: v for k, v in read_info(path).items() if k != without}))
    return [store_module.step_of(path) for path in store.in_a_row()]


@pytest.mark.parametrize("without", ["", "previous"], ids=["", "earlier-version"])
@pytest.mark.parametrize(
    ("best", "keep", "steps", "row"),
    [
        (1, 2, range(1, 6), [4, 5]),
        (3, 2, range(1, 6), [3, 4, 5]),  # just before those that were kept anyway
        (4, 3, range(1, 6), [3, 4, 5]),
        (5, 3, range(1, 6), [3, 4, 5]),
        (20, 2, range(10, 60, 10), [40, 50]),
        (10, 9, range(10, 40, 10), [10, 20, 30]),
        (7, 1, range(7, 8), [7]),
    ],
)
def test_between_those_in_a_row_none_was_deleted(store, best, keep, steps, row, without):
    assert kept_of(store, best, keep, steps, without) == row


def test_a_checkpoint_behind_steps_left_out_breaks_no_row(store):
    for step, skips in ((1, 0), (2, 3), (3, 0)):
        store.save(state(step), {"skips_in_a_row": skips, "validation": {"loss": float(step)}})
    store.prune(2)
    assert [path.name for path in store.in_a_row()] == ["step-00000001", "step-00000003"]
    assert CheckpointStore(store.folder / "none").in_a_row() == []


def test_the_best_of_a_run_with_stages_is_of_its_newest_validated_stage(store):
    for step, (stage, loss) in enumerate([(0, 1.0), (0, 0.5), (1, 3.0), (1, 2.0), (1, 2.5), (2, None)], start=1):
        validation = {} if loss is None else {"loss": loss}
        store.save(state(step), {"validation": validation, "stage": stage})
    assert store.best().name == "step-00000004"


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


class TestKilledBetweenTwoRenames:
    """A checkpoint that was to take the place of one of its step is complete under `.new`, and the other is gone."""

    @pytest.fixture
    def killed(self, store):
        older = store.save(state(1), {})
        newest = store.save(state(2), {"validation": {"loss": 1.0}})
        newest.rename(newest.with_name(newest.name + ".new"))
        return older, newest

    def test_every_reader_finds_it(self, store, killed, tmp_path, monkeypatch):
        _, newest = killed
        monkeypatch.chdir(tmp_path)
        waiting = newest.with_name(newest.name + ".new")
        for path in (newest, waiting, store.folder, store.folder.parent):
            assert find_checkpoint(path) == waiting
            assert load_checkpoint(path)["step"] == 2
            assert open_checkpoint(path).rest()["step"] == 2
        assert (store.latest(), store.best()) == (waiting, waiting)
        (tmp_path / "runs").symlink_to(tmp_path / "nothing")
        store.folder.parent.rename(tmp_path / "multirun")
        assert last_checkpoint().name == "step-00000002.new"

    def test_alone_it_is_a_run(self, store, killed):
        older, newest = killed
        shutil.rmtree(older)
        assert find_checkpoint(store.folder.parent).name == "step-00000002.new"
        store.recover()
        assert find_checkpoint(newest.with_name(newest.name + ".new")) == newest

    def test_one_that_is_being_committed_is_not_counted_twice(self, store, killed):
        older, newest = killed
        store.save(state(2), {})
        assert newest.with_name(newest.name + ".new").exists()
        assert store.all() == [older, newest]
        assert find_checkpoint(newest) == newest

    def test_at_any_of_its_moments_one_of_the_two_is_found(self, store, monkeypatch):
        """Killed before each rename and each deletion in turn."""
        moments = 0
        for moment in range(9):
            path = store.save(state(3) | {"which": "old"}, {})
            with monkeypatch.context() as patched:
                killed_before(patched, moment)
                try:
                    store.save(state(3) | {"which": "new"}, {})
                except KeyboardInterrupt:
                    moments += 1
            assert load_checkpoint(store.folder.parent)["which"] in ("old", "new")
            assert load_checkpoint(path)["step"] == 3
            store.recover()
            assert store.all() == [path]
        assert 3 <= moments < 9


def killed_before(patched, moment: int) -> None:
    """Nothing is renamed or deleted any more from the `moment`-th time on."""
    done = []

    def counted(original):
        def call(*arguments, **options):
            if len(done) >= moment:
                raise KeyboardInterrupt
            done.append(original)
            return original(*arguments, **options)

        return call

    patched.setattr(Path, "rename", counted(Path.rename))
    patched.setattr(shutil, "rmtree", counted(shutil.rmtree))


def test_paths_may_be_texts(store, tmp_path):
    path = store.save(state(1), {"validation": {"loss": 1.0}})
    text = str(path)
    assert find_checkpoint(text) == find_checkpoint(str(store.folder.parent)) == chosen_checkpoint(text) == path
    assert CheckpointStore(str(store.folder)).latest() == path
    CheckpointStore(str(store.folder)).add_info(text, {"more": 1})
    assert read_info(text)["more"] == 1
    assert load_checkpoint(text)["step"] == open_checkpoint(text).rest()["step"] == 1
    save_tensors(f"{tmp_path}/file.pt", {"format": 1, "a": torch.ones(2)})
    assert load_tensors(f"{tmp_path}/file.pt", "tensors", format_number=1)["a"].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match="there is no nowhere"):
        find_checkpoint("nowhere")
    with pytest.raises(ConfigError, match="is in one file already"):
        consolidate(text, f"{tmp_path}/out")
    with pytest.raises(CheckpointError, match="holds no model that longmix"):
        load_model_state(text)


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
