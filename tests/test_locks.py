"""Who holds a lock is alone; whoever is killed holds nothing."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from longmix import locks
from longmix.locks import adopt, holder, try_lock

SECONDS = 60


@pytest.fixture(params=["flock", "no-flock"])
def system(request, monkeypatch):
    """A file system with locks, and one without."""
    if request.param == "no-flock":

        def flock(*_):
            raise OSError(errno.ENOSYS, "not implemented")

        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param


def hold(path, ready, note=None):
    held = try_lock(path, note)
    ready.send(held is not None)
    time.sleep(SECONDS)


def begin(path, note=None):
    """A forked process that tries to lock `path`, and whether it could."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(path, there, note))
    process.start()
    assert here.poll(SECONDS)
    return process, here.recv()


def test_one_holds_it_until_it_is_released(tmp_path, system):
    held = try_lock(tmp_path / "lock")
    assert held is not None
    assert try_lock(tmp_path / "lock") is None
    held.release()
    held.release()
    with try_lock(tmp_path / "lock"):
        assert try_lock(tmp_path / "lock") is None
    assert try_lock(tmp_path / "lock") is not None


def test_kill_9_frees_it(tmp_path, system):
    process, got = begin(tmp_path / "lock", "process one")
    assert got
    assert try_lock(tmp_path / "lock") is None
    assert holder(tmp_path / "lock") == "process one"
    os.kill(process.pid, signal.SIGKILL)
    process.join(SECONDS)
    assert try_lock(tmp_path / "lock") is not None


def test_a_forked_process_does_not_keep_it(tmp_path):
    held = try_lock(tmp_path / "lock")
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(SECONDS,))
    process.start()
    try:
        assert try_lock(tmp_path / "lock") is None
        held.release()
        deadline = time.monotonic() + SECONDS  # between fork and its first line the child has the file open
        while (again := try_lock(tmp_path / "lock")) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert again is not None
        assert process.is_alive()
    finally:
        process.kill()
        process.join()


def test_a_program_that_is_started_does_not_keep_it(tmp_path):
    held = try_lock(tmp_path / "lock")
    with subprocess.Popen([sys.executable, "-c", "import sys; print(1, flush=True); sys.stdin.read()"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:  # fmt: skip
        program.stdout.readline()
        held.release()
        assert try_lock(tmp_path / "lock") is not None
        program.stdin.close()


def test_the_file_may_be_deleted_with_it(tmp_path, system):
    try_lock(tmp_path / "lock").release(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_file_is_no_lock(tmp_path, monkeypatch):
    """Between opening and locking, the one before may delete the file: who locked it then would not be alone."""
    before = try_lock(tmp_path / "lock")
    flock = fcntl.flock

    def late(descriptor, how):
        if before._descriptor >= 0:
            before.release(remove=True)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    held = try_lock(tmp_path / "lock")
    assert held is not None
    assert try_lock(tmp_path / "lock") is None


def test_content_is_left_alone(tmp_path, system):
    (tmp_path / "file").write_text("mine")
    with try_lock(tmp_path / "file"):
        assert (tmp_path / "file").read_text() == "mine"


def test_folders(tmp_path, system):
    (tmp_path / "folder").mkdir()
    with try_lock(tmp_path / "folder"):
        assert try_lock(tmp_path / "folder") is None


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        try_lock(tmp_path / "nowhere" / "lock")


def test_passed_on_to_a_program(tmp_path):
    """Exactly one holds it: once the first has forgotten it, it ends with the second."""
    held = try_lock(tmp_path / "lock")
    code = (
        "import sys, pathlib; from longmix.locks import adopt; "
        "lock = adopt(pathlib.Path(sys.argv[1]), int(sys.argv[2])); print(1, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock"), str(held.descriptor)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, pass_fds=[held.descriptor], stdin=pipe, stdout=pipe) as program:
        held.forget()
        assert program.stdout.readline() == b"1\n"
        assert try_lock(tmp_path / "lock") is None
        program.kill()
        program.wait()
        assert try_lock(tmp_path / "lock") is not None


def test_passed_on_without_flock(tmp_path, system):
    held = try_lock(tmp_path / "lock")
    again = adopt(tmp_path / "lock", os.dup(held.descriptor))
    held.forget()
    assert try_lock(tmp_path / "lock") is None
    again.release()
    assert try_lock(tmp_path / "lock") is not None


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({}, False),
        ({"start": "1"}, True),  # the number belongs to a younger process now
        ({"pid": 2**22 + 1}, True),
        ({"host": "elsewhere", "pid": 2**22 + 1}, False),
        ({"namespace": "pid:[1]", "pid": 2**22 + 1}, False),
        ({"pid": "?"}, False),
    ],
    ids=["alive", "number-in-use-again", "gone", "other-machine", "other-container", "damaged"],
)
def test_owner_file(tmp_path, monkeypatch, change, stale):
    def flock(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    owner = tmp_path / ".lock.owner"
    owner.write_text(json.dumps(locks._process() | change))
    assert (try_lock(tmp_path / "lock") is not None) == stale
    assert locks._process()["host"] == socket.gethostname()
    assert {path.name for path in tmp_path.iterdir()} == {"lock", ".lock.owner"}


def test_other_errors_are_raised(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="input/output"):
        try_lock(tmp_path / "lock")


def test_a_full_disk_takes_the_note_alone(tmp_path, limited_file_size):
    with limited_file_size(0):
        lock = try_lock(tmp_path / "file", "who")
    assert lock is not None
    lock.release(remove=True)
    assert not list(tmp_path.iterdir())
