import json
import os
import subprocess
import sys

import pytest

from longmix.errors import StorageError
from longmix.files import atomic_directory, remove_directory, remove_leftovers, replace_json


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "target"
    with pytest.raises(RuntimeError), atomic_directory(target) as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with atomic_directory(target) as folder:
        (folder / "file").write_text("whole")
        assert not target.exists()
    assert (target / "file").read_text() == "whole"


def test_the_first_of_two_writers_wins(tmp_path):
    target = tmp_path / "target"
    with atomic_directory(target) as folder:
        (folder / "file").write_text("second")
        target.mkdir()
        (target / "file").write_text("first")
    assert (target / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_leftovers_of_dead_processes_go_and_those_of_live_ones_stay(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from longmix.files import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "dead")], check=False)
    with atomic_directory(tmp_path / "alive") as alive:
        assert len(list(tmp_path.iterdir())) == 2
        remove_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == [alive]


def test_an_unwritable_place_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write"), atomic_directory(tmp_path / "file" / "target"):
        pass
    with pytest.raises(StorageError, match="could not write"):
        replace_json(tmp_path / "missing" / "x.json", {})


def test_replace_json_leaves_only_the_new_content(tmp_path):
    replace_json(tmp_path / "x.json", {"a": 1})
    replace_json(tmp_path / "x.json", {"b": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"b": 2}
    assert os.listdir(tmp_path) == ["x.json"]  # noqa: PTH208


def test_a_removed_folder_is_gone(tmp_path):
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    remove_directory(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
