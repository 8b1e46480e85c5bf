import errno
import json
import os
import stat
import subprocess
import sys
import time

import pytest

from longmix import files
from longmix.errors import StorageError
from longmix.files import (
    atomic_directory,
    check_replaceable,
    remove_directory,
    remove_leftovers,
    replace_file,
    replace_json,
)


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


KILLED = {
    "folder": "with atomic_directory(Path(sys.argv[1])) as x: (x / 'file').write_text('half'); os.kill(os.getpid(), 9)",
    "file": "replace_file(Path(sys.argv[1]), lambda x: (x.write_text('half'), os.kill(os.getpid(), 9)))",
    "removal": "shutil.rmtree = lambda x, **_: os.kill(os.getpid(), 9); remove_directory(Path(sys.argv[1]))",
}


@pytest.mark.parametrize("code", KILLED.values(), ids=KILLED)
def test_leftovers_of_dead_processes_go_and_those_of_live_ones_stay(tmp_path, code):
    if code is KILLED["removal"]:
        (tmp_path / "dead" / "sub").mkdir(parents=True)
    code = f"import os, shutil, sys; from pathlib import Path; from longmix.files import *\n{code}"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "dead")], check=False)
    assert [path.name.startswith(".dead.") for path in tmp_path.iterdir()] == [True, True]
    with atomic_directory(tmp_path / "alive") as alive:
        remove_leftovers(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {alive.name, f"{alive.name}.lock"}
    assert [path.name for path in tmp_path.iterdir()] == ["alive"]


@pytest.mark.parametrize(
    "isolated", [(), ("unshare", "--pid", "--fork", "--mount-proc")], ids=["same", "another-pid-namespace"]
)
def test_a_writer_that_another_process_cannot_see_keeps_what_it_writes(tmp_path, isolated):
    if isolated and subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no pid namespaces here")
    code = "import sys; from pathlib import Path; from longmix.files import *; remove_leftovers(Path(sys.argv[1]))"
    with atomic_directory(tmp_path / "target") as folder:
        (folder / "file").write_text("")
        subprocess.run([*isolated, sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (tmp_path / "target" / "file").is_file()


HOST = files._host()
OLD = {
    "dead-pid": (f".step-1.{HOST}.{{dead}}.tmp", 0, True),
    "live-pid": (f".step-1.{HOST}.{os.getpid()}.tmp", 0, False),
    "first-pid": (f".step-1.{HOST}.1.tmp", 0, False),
    "pid-of-another-host": (".step-1.elsewhere.{dead}.tmp", 9e6, False),
    "token-of-another-host": (".step-1.elsewhere.r0123456789abcdef.tmp", 0, False),
    "token-of-another-host-for-days": (".step-1.elsewhere.r0123456789abcdef.tmp", 9e6, True),
    "token": (f".step-1.{HOST}.r0123456789abcdef.tmp", 0, True),
    "lock-alone": (f".step-1.{HOST}.r0123456789abcdef.tmp.lock", 0, True),
    "huge-pid": (f".step-1.{HOST}.99999999999999999999.tmp", 0, False),
    "not-ours": (".step-1.tmp", 9e6, False),
    "no-temporary": ("step-1", 9e6, False),
}


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize(("name", "age", "goes"), OLD.values(), ids=OLD)
def test_leftovers_by_name(tmp_path, name, age, goes, kind):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path = tmp_path / name.format(dead=gone.pid)
    if kind == "folder" and not name.endswith(".lock"):
        path.mkdir()
    else:
        path.write_text("")
    changed_at = time.time() - age
    os.utime(path, (changed_at, changed_at))
    remove_leftovers(tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == ([] if goes else [path.name])


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "x").write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        replace_file(tmp_path / "x", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_a_device_or_folder_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "folder"):
        with pytest.raises(StorageError, match="not a regular file"):
            replace_json(tmp_path / name, {})
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_a_place_is_checked_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, words in (("folder", "not a regular file"), ("missing/x", "there is no folder")):
        with pytest.raises(StorageError, match=words):
            check_replaceable(tmp_path / name)
    check_replaceable(tmp_path / "folder" / "x")
    assert list((tmp_path / "folder").iterdir()) == []


def test_names_as_long_as_the_file_system_takes(tmp_path):
    for name in ("x" * 250, "ü" * 120):
        replace_json(tmp_path / name, {})
        with atomic_directory(tmp_path / f"d{name[:-2]}"):
            pass
    assert len(list(tmp_path.iterdir())) == 4


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


def test_of_a_link_to_a_folder_the_link_goes(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    remove_directory(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
