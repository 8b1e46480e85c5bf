"""The process that `python train.py` leaves behind to wait for those that train: what it does when one of them ends."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from longmix.errors import Interrupted, ProcessLost
from longmix.training import process_launcher

WORKER = """
import os, signal, sys, time
rank, does = int(os.environ["RANK"]), sys.argv[1:]
kind, _, value = does[rank].partition("=")
ends = kind in ("exit", "late")  # such a run ignores the signal: at its end, or since it closes its log
signal.signal(signal.SIGTERM, signal.SIG_IGN if ends else lambda *_: sys.exit(75))
signal.signal(signal.SIGINT, lambda *_: sys.exit(74))
open(f"{rank}.pid", "w").write(str(os.getpid()))
while not all(os.path.exists(f"{other}.pid") for other in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.01)
if kind == "signal":
    os.kill(os.getpid(), int(value))
if kind == "exit":
    sys.exit(int(value))
if kind == "late":
    time.sleep(1.5)
    open("late", "w").close()
    sys.exit(int(value))
time.sleep(300)
"""

KILLED, STOPPED, ABORTED = (f"signal={int(n)}" for n in (signal.SIGKILL, signal.SIGSTOP, signal.SIGABRT))
LOST = f"exit={ProcessLost.exit_code}"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process_launcher, "GRACE_SECONDS", 0.4)


def launch(*does: str, folder: Path = Path("runs/x")) -> None:
    process_launcher.launch([sys.executable, "-S", "-c", WORKER, *does], len(does), 60, folder)


def is_running(rank: int) -> bool:
    return Path(f"/proc/{Path(f'{rank}.pid').read_text()}").exists()


@pytest.mark.parametrize(
    "does", [("exit=75", "sleep"), ("sleep", "exit=75"), ("exit=75", "exit=75", "sleep"), ("exit=75", STOPPED)]
)
def test_a_process_that_was_signalled_alone_takes_the_others_along(does, monkeypatch):
    monkeypatch.setattr(process_launcher, "CLOSING_SECONDS", 1.0)
    with pytest.raises(SystemExit) as raised:
        launch(*does)
    assert raised.value.code == Interrupted.exit_code
    assert not any(is_running(rank) for rank in range(len(does)))


def test_where_the_first_process_could_not_say_so_the_launcher_does():
    with pytest.raises(Interrupted, match="There is no checkpoint yet; run the same command again"):
        launch(LOST, "exit=75")


def test_a_signal_before_python_watches_for_it_is_no_failure():
    """The processes have the system's own answer to SIGTERM, as in their first milliseconds."""
    worker = "import os, time; open(os.environ['RANK'] + '.up', 'w'); time.sleep(30)"

    def send() -> None:
        while not all(Path(f"{rank}.up").exists() for rank in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    with pytest.raises(Interrupted, match="SIGTERM ended the run"):
        process_launcher.launch([sys.executable, "-S", "-c", worker], 2, 60, Path("runs/x"))


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ((LOST, KILLED), ["process 1 of 2", "killed by SIGKILL", "too much memory"]),
        ((KILLED, LOST), ["process 0 of 2", "killed by SIGKILL"]),
        (("sleep", KILLED), ["process 1 of 2", "killed by SIGKILL"]),
        ((KILLED, "exit=0"), ["process 0 of 2", "killed by SIGKILL"]),
        ((LOST, STOPPED), ["process 1 of 2", "which a signal has stopped", "trainer.timeout=60 seconds"]),
        ((STOPPED, LOST, LOST), ["process 0 of 3", "which a signal has stopped"]),
        ((LOST, "sleep"), ["process 1 of 2", "no sign for trainer.timeout=60 seconds"]),
        ((ABORTED, STOPPED), ["process 1 of 2", "which a signal has stopped"]),
        ((ABORTED, LOST), ["process 0 of 2", "killed by SIGABRT"]),
        ((LOST, LOST), ["lost touch with each other"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_the_message_names_the_process_that_failed_and_none_is_left(does, words):
    Path("runs/x/checkpoints/step-00000003").mkdir(parents=True)
    began = time.monotonic()
    with pytest.raises(ProcessLost) as raised:
        launch(*does)
    assert time.monotonic() - began < 60
    text = str(raised.value)
    for word in [*words, "runs/x/checkpoints/step-00000003", "resume=auto"]:
        assert word in text, text
    assert not any(is_running(rank) for rank in range(len(does)))


@pytest.mark.parametrize(
    ("does", "code"),
    [(("exit=3", "exit=3"), 3), (("exit=75", "exit=75"), 75), (("exit=2", LOST), 2), ((LOST, "exit=1"), 1)],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_a_process_that_has_said_what_is_wrong_gives_its_exit_code(does, code):
    with pytest.raises(SystemExit) as ended:
        launch(*does)
    assert ended.value.code == code
    assert not any(is_running(rank) for rank in range(len(does)))


def test_success_is_silent():
    launch("exit=0", "exit=0")


@pytest.mark.slow
@pytest.mark.parametrize(("code", "waits"), [(3, True), (75, True), (2, False)])
def test_what_all_come_to_is_waited_for_and_another_error_is_not(code, waits):
    with pytest.raises(SystemExit) as ended:
        launch(f"exit={code}", f"late={code}")
    assert ended.value.code == code
    assert Path("late").exists() == waits


def test_without_a_checkpoint_there_is_nothing_to_resume():
    with pytest.raises(ProcessLost, match="no checkpoint yet; run the same command again"):
        launch(LOST, KILLED)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 74)])
def test_a_request_to_end_is_passed_on(number, code):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]

    def ask() -> None:
        while not all(Path(f"{rank}.pid").exists() for rank in range(2)):
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask).start()
    with pytest.raises(SystemExit) as ended:
        launch("sleep", "sleep")
    assert ended.value.code == code
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers
